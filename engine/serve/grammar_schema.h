// JSON and JSON Schema to nodes. What is understood: grammar_schema.md.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_SCHEMA_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_SCHEMA_H

#include "engine/serve/grammar_net.h"

#include <jansson.h>

// Rules of JSON at large. They are the first nodes of every net, always the same ones.
struct grammar_base {
    uint32_t space, string, value, object, array, integer, number, boolean, null;
};
void grammar_schema_base(struct net *net, struct grammar_base *out);

// Success: *rule is the rule of the texts that the schema admits. ERR_USAGE names the place by path.
int grammar_schema_build(struct net *net, const struct grammar_base *base, const json_t *schema, const char *path,
                         uint32_t *rule, struct error *err);

#endif

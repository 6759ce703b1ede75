// A plan of the user's own (--plan FILE): a Hugging Face `tp_plan`, a JSON object of patterns and strategies such as
// {"layers.*.self_attn.q_proj": "colwise", ...}. It is checked against the family's table and decides what there is to decide: whether
// experts stay whole. Also whether an architecture which tpshard does not know has the keys and tensors of one that it knows.
#ifndef TPSHARD_SHARD_OWN_PLAN_H
#define TPSHARD_SHARD_OWN_PLAN_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/model_desc.h"

#include <stddef.h>

struct own_plan;

// ERR_USAGE: not such an object, or a strategy without a meaning here (all are named). Success: own_plan_free.
int own_plan_parse(struct own_plan **out, const char *text, size_t bytes, const char *name, struct error *err);
int own_plan_read(struct own_plan **out, const char *path, struct error *err);
void own_plan_free(struct own_plan *plan); // accepts null

// Checks the plan against the table of the model's architecture. ERR_USAGE: its own lines contradict each other. ERR_MODEL: a pattern
// that names no tensor, or a cut that the engine cannot compute with. *experts becomes what the plan says of experts, if anything. note:
// what the plan leaves open, for people; empty if nothing.
int own_plan_check(const struct own_plan *plan, const struct model_desc *model, enum experts_mode *experts, char *note,
                   size_t note_bytes, struct error *err);

// The known architecture whose keys and tensors a checkpoint of an unknown one has; NULL where the checkpoint's own is known. ERR_MODEL
// when there is none. Whether its arithmetic is that architecture's too, no file says. Static storage.
int own_plan_find_family(const char **known_as, const char *model_dir, struct error *err);

#endif

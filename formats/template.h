// Chat templates: an interpreter of the part of Jinja2 that they use, equal byte for byte to Jinja2 as Hugging Face transformers
// runs it (immutable sandbox, trim_blocks, lstrip_blocks, loop controls, tojson without HTML escapes). What is left out is refused
// by name and line when a template is compiled.
// Owns: lexing, parsing, evaluating, and the marks that say which bytes of the result came from the request.
// Leaves to others: where a template comes from and what it is given (chat.h), tokenizing (tokenizer.h).
//
// Templates and requests are hostile input. A template sees JSON values and its own, nothing else; steps, memory, output and depth
// are limited.
#ifndef TPSHARD_FORMATS_TEMPLATE_H
#define TPSHARD_FORMATS_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "formats/error.h"
#include "formats/marked_text.h"

struct template; // immutable once compiled: any number of threads may render it at the same time

// text is UTF-8 and need not outlive the call. name is for messages and is copied. ERR_MODEL: "<name>, line 12: ...".
// Success: the caller owns *out.
int template_compile(struct template **out, const char *text, size_t bytes, const char *name, struct error *err);
void template_free(struct template *tmpl); // accepts NULL

enum template_origin {
    TEMPLATE_TRUSTED,   // strings are as good as the template's own text: special tokens, options
    TEMPLATE_FROM_USER, // every string, keys too, is marked as the user's
    TEMPLATE_MESSAGES, // the same for a list of messages, but the usual role names in "role" count as trusted: templates
                       // write control tokens such as '<|' + role + '|>'
};

struct template_variable {
    const char *name;
    const json_t *value;
    enum template_origin origin;
};

struct template_limits {   // 0: the default
    uint64_t steps;        // 1 M; an operation on long text counts as several
    uint64_t memory_bytes; // 256 MiB
    uint64_t output_bytes; // 64 MiB
};

struct template_output {
    char *text; // malloc'ed, NUL-terminated UTF-8
    size_t bytes;
    struct text_segment *segments; // malloc'ed; in order, they cover the text, and neighbours differ in from_user
    size_t num_segments;
};

// A later variable of the same name wins. limits may be NULL. now_s: seconds since 1970 for strftime_now (local time).
// ERR_USAGE: the template called raise_exception (its text is the whole message), something in it does not fit what it was given
// ("<name>, line 12: ..."), or a limit was met. Success: the caller clears *out.
int template_render(struct template_output *out, const struct template *tmpl, const struct template_variable *variables,
                    size_t count, const struct template_limits *limits, int64_t now_s, struct error *err);
void template_output_clear(struct template_output *out); // accepts a zeroed one

#endif

// The normalizer, pre_tokenizer, post_processor and decoder of tokenizer.json, lowered to steps of the compiled image.
// Owns: which components and settings are supported; everything else is refused by name.
// Leaves to others: the vocabulary, merges and added tokens (tokenizer_compile.c).
#ifndef TPSHARD_FORMATS_TOKENIZER_COMPONENTS_H
#define TPSHARD_FORMATS_TOKENIZER_COMPONENTS_H

#include <jansson.h>
#include <stdbool.h>

#include "formats/error.h"
#include "formats/tokenizer_image.h"
#include "formats/tokenizer_text.h"

enum { TOKENIZER_MAX_TEMPLATE_IDS = 64 };

struct tokenizer_step_list {
    struct tokenizer_op ops[TOKENIZER_MAX_OPS];
    uint32_t count;
};

struct tokenizer_components {
    struct tokenizer_step_list normalizer, pretokenizer, decoder;
    bool has_decoder;
    uint32_t prefix_ids[TOKENIZER_MAX_TEMPLATE_IDS], prefix_count; // what the post-processor puts in front
    uint32_t suffix_ids[TOKENIZER_MAX_TEMPLATE_IDS], suffix_count; // and behind
    struct tokenizer_text text;                                    // op text; the owner frees it
};

// root: the whole document; file: its name for messages. ids must be below vocab_size.
int tokenizer_components_read(struct tokenizer_components *out, const json_t *root, const char *file,
                              uint64_t vocab_size, struct error *err);

#endif

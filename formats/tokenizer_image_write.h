// Lays out a compiled tokenizer image (tokenizer_file.md) from its parts. Used by tokenizer_compile.c alone.
#ifndef TPSHARD_FORMATS_TOKENIZER_IMAGE_WRITE_H
#define TPSHARD_FORMATS_TOKENIZER_IMAGE_WRITE_H

#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"
#include "formats/tokenizer_components.h"
#include "formats/tokenizer_image.h"

struct tokenizer_content { // of one token; NULL text: the id is not used
    const char *text;
    size_t bytes;
};

// Everything an image is made of. Texts of added and decode_texts are in components.text.
struct tokenizer_image_parts {
    const struct tokenizer_content *contents; // [id_count]
    const uint8_t *token_flags;               // [id_count]
    uint32_t id_count, flags, unk_id;
    const struct tokenizer_merge_slot *merges; // by rank; of equal pairs the last counts
    size_t merge_count;
    const uint32_t *byte_ids; // [256]
    const struct tokenizer_components *components;
    const struct tokenizer_added *added_raw, *added_normalized; // ascending by text
    uint32_t added_raw_count, added_normalized_count;
    const struct tokenizer_image_text *decode_texts; // ascending by id
    uint32_t decode_text_count;
};

// file: for messages. The caller frees *out.
int tokenizer_image_write(uint8_t **out, size_t *out_bytes, const struct tokenizer_image_parts *parts, const char *file,
                          struct error *err);

#endif

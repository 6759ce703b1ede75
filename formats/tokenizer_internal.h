// An opened tokenizer, shared by tokenizer.c (opening, questions), tokenizer_bpe.c (the model), tokenizer_encode.c
// and tokenizer_decode.c. No other file includes it, the compiler and its use of the model apart.
#ifndef TPSHARD_FORMATS_TOKENIZER_INTERNAL_H
#define TPSHARD_FORMATS_TOKENIZER_INTERNAL_H

#include "formats/tokenizer.h"
#include "formats/tokenizer_image.h"
#include "formats/tokenizer_regex.h"
#include "formats/tokenizer_text.h"

struct tokenizer_op_list {
    const struct tokenizer_op *ops; // in the image
    uint32_t count;
    struct tokenizer_regex *regexes[TOKENIZER_MAX_OPS]; // NULL where the op has none
};

struct tokenizer_added_list {
    const struct tokenizer_added *added; // in the image, ascending by text
    uint32_t count;
    bool first_byte[256]; // some text begins with this byte
};

struct tokenizer {
    const struct tokenizer_image_header *header; // this and all const pointers point into the image
    const uint32_t *token_offsets;               // [id_count + 1] into token_text
    const uint8_t *token_flags;                  // [id_count] enum tokenizer_token_flags
    const struct tokenizer_vocab_slot *vocab;    // [vocab_slots]
    const struct tokenizer_merge_slot *merges;   // [merge_slots]
    const uint32_t *byte_ids;                    // [256] byte -> id of <0xNN>, or NONE
    const struct tokenizer_image_text *decode_texts;
    const uint32_t *prefix_ids, *suffix_ids;
    const char *token_text, *op_text;
    struct tokenizer_op_list normalizer, pretokenizer, decoder;
    struct tokenizer_added_list added_raw, added_normalized;
    bool *controls;             // [id_count] an added token that is not white space alone; malloc'ed
    uint32_t letter_ids[0x800]; // ids of all one- and two-byte characters, or NONE
    struct tokenizer_letter {   // how byte-level tokenizers write each byte: one letter
        char text[2];           // UTF-8
        uint8_t bytes;          // 1 or 2
    } letters[256];
    int16_t letter_bytes[0x144]; // and back: the byte that a letter up to U+0143 stands for, or -1
    uint32_t fuse_op;            // decoder: first op that joins all tokens; decoder.count if there is none
    bool decodes_in_chunks;      // decoder: what follows fuse_op does not need the whole text at once
    char name[128];
};

struct tokenizer_slice {
    const char *text;
    size_t bytes;
};

static inline struct tokenizer_slice tokenizer_token_content(const struct tokenizer *tok, uint32_t id)
{
    uint32_t begin = tok->token_offsets[id];
    return (struct tokenizer_slice){tok->token_text + begin, tok->token_offsets[id + 1] - begin};
}

// The id of a content among tokens that have all wanted flags, or NONE.
uint32_t tokenizer_find(const struct tokenizer *tok, const char *content, size_t bytes, uint8_t wanted);

int tokenizer_push_id(struct token_list *list, uint32_t id, struct error *err);

// ---- tokenizer_bpe.c

struct tokenizer_bpe { // working memory; start from {0}
    struct bpe_symbol *symbols;
    struct bpe_candidate *heap;
    size_t symbol_capacity, heap_capacity;
};

void tokenizer_bpe_free(struct tokenizer_bpe *bpe);

// What the model may not yield: a merge to it is not made, a whole word is split.
enum tokenizer_block {
    BLOCK_NOTHING,
    BLOCK_SPECIAL, // TOKEN_SPECIAL
    BLOCK_ADDED,   // tokenizer.controls; the unknown token, byte tokens and what cannot be split apart
};

// Appends the ids of one piece of valid UTF-8.
int tokenizer_bpe_encode(const struct tokenizer *tok, struct tokenizer_bpe *bpe, const char *piece, size_t bytes,
                         enum tokenizer_block block, struct token_list *out, struct error *err);

// ---- tokenizer_encode.c

// Appends the normalized form of valid UTF-8. For the compiler, which stores added tokens normalized.
int tokenizer_encode_normalize(const struct tokenizer *tok, const char *text, size_t bytes, struct tokenizer_text *out,
                               struct error *err);

// What OP_REPLACE does: appends text with the matches of op replaced. *changed: there were some; else nothing was
// appended.
int tokenizer_encode_replace(const struct tokenizer *tok, const struct tokenizer_op *op,
                             const struct tokenizer_regex *regex, struct tokenizer_regex_memory *memory,
                             const char *text, size_t bytes, struct tokenizer_text *out, bool *changed,
                             struct error *err);

#endif

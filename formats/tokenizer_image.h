// On-disk structures of a compiled tokenizer, little-endian. Spec: tokenizer_file.md. Shared by the compiler
// (tokenizer_compile.c) and the runtime (tokenizer.c); no other file includes it.
#ifndef TPSHARD_FORMATS_TOKENIZER_IMAGE_H
#define TPSHARD_FORMATS_TOKENIZER_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum {
    TOKENIZER_IMAGE_VERSION = 1,
    TOKENIZER_MAX_OPS = 32,      // per list: normalizer, pre-tokenizer, decoder
    TOKENIZER_PROBE_LIMIT = 64,  // no entry of a hash table lies further from its home slot
    TOKENIZER_MAX_PATTERN = 4096 // bytes of one regular expression
};

static const uint32_t TOKENIZER_NONE = 0xffffffff; // no id, or an empty slot
static const char TOKENIZER_MAGIC[8] = {'T', 'P', 'T', 'O', 'K', 'E', 'N', '1'};

enum tokenizer_image_flags {
    IMAGE_BYTE_FALLBACK = 1, // unknown characters become <0xNN> tokens
    IMAGE_FUSE_UNK = 2,      // neighbouring unknown characters become one unknown token
    IMAGE_CUT_AT_META = 4,   // no merge joins anything with a following U+2581: pieces may be cut before it
    IMAGE_HAS_DECODER = 8,   // else decoding joins tokens with a space
    IMAGE_ALL_FLAGS = 15,
};

enum tokenizer_token_flags {
    TOKEN_EXISTS = 1,
    TOKEN_IN_MODEL = 2, // the BPE model can emit it
    TOKEN_SPECIAL = 4,  // an added token marked special
    TOKEN_SKIPPED = 8,  // decode with skip_special drops it
    TOKEN_WHOLE = 16,   // a piece that equals this token encodes to this token alone
    TOKEN_DECODES = 32, // decoding uses another text than the content: see struct tokenizer_image_text
    TOKEN_ALL_FLAGS = 63,
};

// One step on text. Normalizers and pre-tokenizers are lowered to the first six, decoders use the others as well.
enum tokenizer_op_kind {
    OP_NFC,
    OP_PREPEND,        // text, if the piece is not empty
    OP_PREPEND_UNLESS, // text, unless the piece begins with it
    OP_REPLACE,        // matches of text by content
    OP_SPLIT,          // at matches of text
    OP_BYTE_LEVEL,     // each byte to its letter (decoder: back)
    OP_BYTE_FALLBACK,  // decoder: runs of <0xNN> to text
    OP_FUSE,           // decoder: all tokens become one
    OP_STRIP,          // decoder: up to start times text off the front, up to stop times off the back
    OP_METASPACE,      // decoder: text becomes a space, or nothing in the first token with DROP_FIRST
    OP_KINDS
};

enum tokenizer_op_flags {
    OP_REGEX = 1,      // REPLACE, SPLIT: text is a regular expression
    OP_INVERT = 2,     // SPLIT: what does not match is the delimiter
    OP_START_ONLY = 4, // PREPEND_UNLESS: only at the very start of the whole text
    OP_DROP_FIRST = 8, // METASPACE
    OP_ALL_FLAGS = 15,
};

enum tokenizer_split_behavior { // what becomes of the delimiters
    SPLIT_REMOVED,
    SPLIT_ISOLATED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS,
    SPLIT_BEHAVIORS
};

struct tokenizer_image_header {
    uint8_t magic[8];          //  0  "TPTOKEN1"
    uint32_t version;          //  8  readers reject any other
    uint32_t header_bytes;     // 12  104
    uint64_t file_bytes;       // 16  all of it
    uint32_t id_count;         // 24  >= 1, largest id + 1
    uint32_t flags;            // 28  enum tokenizer_image_flags
    uint32_t unk_id;           // 32  or NONE
    uint32_t vocab_slots;      // 36  a power of two
    uint32_t merge_slots;      // 40  a power of two
    uint32_t normalizer_ops;   // 44  <= 32
    uint32_t pretokenizer_ops; // 48  <= 32
    uint32_t decoder_ops;      // 52  <= 32
    uint32_t added_raw;        // 56  added tokens looked for in the raw text
    uint32_t added_normalized; // 60  added tokens looked for in the normalized text
    uint32_t decode_texts;     // 64
    uint32_t prefix_ids;       // 68  ids that the post-processor puts in front
    uint32_t suffix_ids;       // 72  and behind
    uint32_t longest_token;    // 76  bytes of the longest token of the model
    uint64_t token_text_bytes; // 80  contents of all tokens
    uint64_t op_text_bytes;    // 88  patterns and texts of ops, added tokens, decode texts
    uint64_t reserved;         // 96  writers store 0, readers require
};
_Static_assert(sizeof(struct tokenizer_image_header) == 104, "on-disk layout");
_Static_assert(offsetof(struct tokenizer_image_header, token_text_bytes) == 80, "on-disk layout");

struct tokenizer_vocab_slot {
    uint32_t tag; // upper half of the content's hash
    uint32_t id;  // NONE: empty
};

struct tokenizer_merge_slot {
    uint32_t left, right; // left NONE: empty
    uint32_t rank;        // lower merges first
    uint32_t merged;      // id of the merged token
};

struct tokenizer_op {
    uint32_t kind;                          // enum tokenizer_op_kind
    uint32_t flags;                         // enum tokenizer_op_flags
    uint32_t behavior;                      // SPLIT: enum tokenizer_split_behavior
    uint32_t text_offset, text_bytes;       // into the op text
    uint32_t content_offset, content_bytes; // into the op text
    uint32_t start, stop;                   // STRIP
    uint32_t reserved;                      // 0
};
_Static_assert(sizeof(struct tokenizer_op) == 40, "on-disk layout");

enum tokenizer_added_flags { ADDED_SINGLE_WORD = 1, ADDED_LSTRIP = 2, ADDED_RSTRIP = 4, ADDED_ALL_FLAGS = 7 };

struct tokenizer_added {
    uint32_t text_offset, text_bytes; // what is looked for; into the op text
    uint32_t id;
    uint32_t flags;
};

struct tokenizer_image_text { // decoding this id gives this text
    uint32_t id;
    uint32_t text_offset, text_bytes;
    uint32_t reserved; // 0
};

// Slot of a token's content: hash & (vocab_slots - 1); tag: hash >> 32.
static inline uint64_t tokenizer_image_hash(const char *text, size_t bytes) { return XXH3_64bits(text, bytes); }

// Slot of a merge: hash & (merge_slots - 1).
static inline uint32_t tokenizer_image_pair_hash(uint32_t left, uint32_t right)
{
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93u;
    return (uint32_t)(hash >> 32);
}

#endif

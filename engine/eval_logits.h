// A reference's logits in a file, so that many models are compared with one that ran once, or whose settings are others than theirs. It owns the
// file's layout; what the rows are, the caller knows.
//
//     0  header, 64 bytes, little-endian
//    64  f32 [rows][vocab_size], in the order of the text
//
// A file appears under its name when it is whole. A reader has the right to use what it read after eval_logits_check alone.
#ifndef TPSHARD_ENGINE_EVAL_LOGITS_H
#define TPSHARD_ENGINE_EVAL_LOGITS_H

#include "formats/error.h"

#include <stddef.h>
#include <stdint.h>

// What the rows belong to; a reader's must equal the file's.
struct eval_logits_key {
    uint32_t vocab_size;
    int64_t rows;
    int64_t context, stride; // of the windows
    uint64_t text;           // XXH3-64 of the token ids and the beginning-of-sequence token, i64 each
};

struct eval_logits_header {
    uint8_t magic[8];     //  0  "TPLOGIT1"
    uint32_t vocab_size;  //  8
    uint32_t reserved;    // 12  0
    int64_t rows;         // 16
    int64_t context;      // 24
    int64_t stride;       // 32
    uint64_t text;        // 40
    uint8_t checksum[16]; // 48  XXH3-128 of all rows
};
_Static_assert(sizeof(struct eval_logits_header) == 64, "on-disk layout");
_Static_assert(offsetof(struct eval_logits_header, checksum) == 48, "on-disk layout");

struct eval_logits;

// Takes the room for all rows. Success: the caller owns *out.
int eval_logits_create(struct eval_logits **out, const char *path, const struct eval_logits_key *key,
                       struct error *err);
int eval_logits_write(struct eval_logits *logits, const float *rows, int64_t count, struct error *err);
// All rows have been written: gives the file its name.
int eval_logits_finish(struct eval_logits *logits, struct error *err);

// ERR_CORRUPT: not such a file, or not whole. ERR_USAGE: of another text, vocabulary or other windows.
int eval_logits_open(struct eval_logits **out, const char *path, const struct eval_logits_key *key, struct error *err);
// The next rows, [count][vocab_size], valid until the next call.
int eval_logits_read(struct eval_logits *logits, int64_t count, const float **rows, struct error *err);
// After all rows: ERR_CORRUPT when they are not those that were written.
int eval_logits_check(const struct eval_logits *logits, struct error *err);

// Accepts NULL. A file that was begun and not finished is removed.
void eval_logits_close(struct eval_logits *logits);

#endif

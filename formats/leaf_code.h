// How a leaf of payload is stored in fewer bytes: codes, an encoder that tries them, a decoder that is safe on any input. Weights have
// next to no repetitions but few distinct exponents, so all that is asked of zstd is its Huffman code. It leaves to others: checksums,
// which are of the stored bytes and come first, and the table of lengths and codes (formats/shard_file). The specification is shard_file.md.
#ifndef TPSHARD_FORMATS_LEAF_CODE_H
#define TPSHARD_FORMATS_LEAF_CODE_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

// Numbers are on disk.
enum leaf_code {
    LEAF_RAW = 0, // the payload itself
    LEAF_ZSTD,    // u32 length of each frame, frames
    LEAF_PLANES, // 16-bit floats: u32 length of each frame, frames of the bits below the sign, then the signs and the other bits as they are
    LEAF_CODE_COUNT,
};
const char *leaf_code_name(enum leaf_code code); // "raw", "zstd", "planes"

enum {
    LEAF_MAX_BYTES = 1 << 20, // of payload
    LEAF_FRAME_BYTES =
        128 << 10,           // of payload in a frame (the last one may hold less); frames do not depend on each other
    LEAF_WORTH_PERCENT = 97, // what would take more of its size stays raw
};
// Payload bytes of leaf `leaf`: all but the last one are full.
static inline uint64_t leaf_payload_bytes(uint64_t payload_bytes, uint64_t leaf)
{
    uint64_t left = payload_bytes - leaf * LEAF_MAX_BYTES;
    return left < LEAF_MAX_BYTES ? left : (uint64_t)LEAF_MAX_BYTES;
}
// May a leaf of so much payload lie in so many bytes? Raw: just as many; else at most LEAF_WORTH_PERCENT of it.
bool leaf_code_fits(uint32_t code, uint64_t payload_bytes, uint64_t stored_bytes);

// One thread's memory for encoding.
struct leaf_encoder;
struct leaf_encoder *leaf_encoder_new(void);          // NULL: out of memory
void leaf_encoder_free(struct leaf_encoder *encoder); // accepts NULL
// Tries every code and takes the shortest. *stored [*stored_bytes] points into the encoder or is the payload itself, until the next call.
// The same payload gives the same bytes with every encoder. payload_bytes: 1 to LEAF_MAX_BYTES.
int leaf_encode(enum leaf_code *code, const uint8_t **stored, uint64_t *stored_bytes, struct leaf_encoder *encoder,
                const uint8_t *payload, uint64_t payload_bytes, struct error *err);

// One thread's memory for decoding.
struct leaf_scratch;
struct leaf_scratch *leaf_scratch_new(void);          // NULL: out of memory
void leaf_scratch_free(struct leaf_scratch *scratch); // accepts NULL
// Makes exactly payload_bytes (at most LEAF_MAX_BYTES) at `payload` of exactly stored_bytes. NULL: done; else what is wrong with them, in words,
// and payload holds anything.
const char *leaf_decode(uint8_t *payload, uint64_t payload_bytes, uint32_t code, const uint8_t *stored,
                        uint64_t stored_bytes, struct leaf_scratch *scratch);

#endif

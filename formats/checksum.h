// Checksums of stored bytes: XXH3-64 for leaves, XXH3-128 for whole files and roots; seed 0.
// They detect damage, not malice. The fastest implementation that this CPU and its operating system support is
// chosen at the first call; all give the same values. Every function may be called from any thread.
#ifndef TPSHARD_FORMATS_CHECKSUM_H
#define TPSHARD_FORMATS_CHECKSUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CHECKSUM128_HEX_DIGITS = 32, CHECKSUM128_BYTES = 16 };

struct checksum128 {
    uint64_t low, high;
};

uint64_t checksum_leaf(const void *bytes, size_t num_bytes);
struct checksum128 checksum_whole(const void *bytes, size_t num_bytes);
bool checksum128_equal(struct checksum128 a, struct checksum128 b);

// The canonical spelling, as `xxhsum -H2` prints it: high then low half, big-endian, lower case.
void checksum128_to_hex(struct checksum128 sum, char hex[CHECKSUM128_HEX_DIGITS + 1]);
// False, and *out untouched, unless hex is exactly 32 digits 0-9a-f: one spelling per value.
bool checksum128_from_hex(struct checksum128 *out, const char *hex);
// The same order of bytes, as rank files hold it.
void checksum128_to_bytes(struct checksum128 sum, uint8_t bytes[CHECKSUM128_BYTES]);
struct checksum128 checksum128_from_bytes(const uint8_t bytes[CHECKSUM128_BYTES]);

// checksum_whole in pieces. A stream belongs to one thread at a time. checksum_stream_final may be called at any
// time, and again after more updates.
struct checksum_stream;
struct checksum_stream *checksum_stream_new(void); // null: out of memory
void checksum_stream_update(struct checksum_stream *stream, const void *bytes, size_t num_bytes);
struct checksum128 checksum_stream_final(const struct checksum_stream *stream);
void checksum_stream_free(struct checksum_stream *stream); // accepts null

// One implementation per instruction set; for the functions above, tests and benchmarks.
struct checksum_target {
    const char *name; // "base", "avx2", "avx512"
    uint64_t (*leaf)(const void *bytes, size_t num_bytes);
    struct checksum128 (*whole)(const void *bytes, size_t num_bytes);
    struct checksum_stream *(*stream_new)(void);
    void (*stream_update)(struct checksum_stream *stream, const void *bytes, size_t num_bytes);
    struct checksum128 (*stream_final)(const struct checksum_stream *stream);
    void (*stream_free)(struct checksum_stream *stream);
};

// The supported targets, slowest first; index 0 always exists, null after the last.
const struct checksum_target *checksum_target_at(size_t index);

#endif

// The body of every checksum_<target>.c: xxHash compiled inline for the instruction set in XXH_VECTOR (unset: what
// the compiler's baseline offers), exported as one table CHECKSUM_TARGET named CHECKSUM_NAME. Nothing else leaves
// the file. Included once per file, by those files alone.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "formats/checksum.h"

extern const struct checksum_target CHECKSUM_TARGET;

static struct checksum128 from_xxh(XXH128_hash_t hash) { return (struct checksum128){hash.low64, hash.high64}; }

static uint64_t leaf(const void *bytes, size_t num_bytes) { return XXH3_64bits(bytes, num_bytes); }

static struct checksum128 whole(const void *bytes, size_t num_bytes)
{
    return from_xxh(XXH3_128bits(bytes, num_bytes));
}

// The stream is nothing but xxHash's state, which wants an alignment of 64 bytes.
static struct checksum_stream *stream_new(void)
{
    XXH3_state_t *state = XXH3_createState();
    if (state)
        XXH3_128bits_reset(state);
    return (struct checksum_stream *)state;
}

static void stream_update(struct checksum_stream *stream, const void *bytes, size_t num_bytes)
{
    if (num_bytes)
        XXH3_128bits_update((XXH3_state_t *)stream, bytes, num_bytes);
}

static struct checksum128 stream_final(const struct checksum_stream *stream)
{
    return from_xxh(XXH3_128bits_digest((const XXH3_state_t *)stream));
}

static void stream_free(struct checksum_stream *stream) { XXH3_freeState((XXH3_state_t *)stream); }

const struct checksum_target CHECKSUM_TARGET = {
    CHECKSUM_NAME, leaf, whole, stream_new, stream_update, stream_final, stream_free,
};

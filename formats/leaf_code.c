// See leaf_code.h.
#define ZSTD_STATIC_LINKING_ONLY // the parameter that makes zstd compress literals at negative levels
#include "formats/leaf_code.h"

#include "formats/checked.h"

#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#if ZSTD_VERSION_NUMBER < 10500
#define ZSTD_ps_enable ZSTD_lcm_huffman // its older name
#endif

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "lengths of frames are copied from and to little-endian files");

enum {
    FRAMES_MAX = LEAF_MAX_BYTES / LEAF_FRAME_BYTES,
    PLANE_FRAME_BYTES = LEAF_FRAME_BYTES / 2,
    // Matches are accidents in weights: at higher levels they cost more than they bring. Level -20 hardly looks for any; zeros still become short.
    ZSTD_LEVEL = -20,
    ZSTD_MIN_MATCH = 7,
    ZSTD_HASH_LOG = 6,
};

const char *leaf_code_name(enum leaf_code code)
{
    static const char *const names[LEAF_CODE_COUNT] = {"raw", "zstd", "planes"};
    return (unsigned)code < LEAF_CODE_COUNT ? names[code] : "unknown";
}

bool leaf_code_fits(uint32_t code, uint64_t payload_bytes, uint64_t stored_bytes)
{
    if (code == LEAF_RAW)
        return stored_bytes == payload_bytes;
    return code < LEAF_CODE_COUNT && (code != LEAF_PLANES || payload_bytes % 2 == 0) && stored_bytes > 0 &&
           stored_bytes <= payload_bytes && stored_bytes * 100 <= payload_bytes * LEAF_WORTH_PERCENT;
}

// ---- planes ---------------------------------------------------------------------------------------------------------

// A bfloat16 is sign, exponent (8 bits), mantissa (7 bits). Rotated by one bit to the left, its high byte is the exponent, which a short code
// holds, and its low byte is mantissa and sign, which nothing shortens.
static void split_planes(uint8_t *restrict high, uint8_t *restrict low, const uint8_t *restrict words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        high[i] = (uint8_t)(words[2 * i + 1] << 1 | words[2 * i] >> 7);
        low[i] = (uint8_t)(words[2 * i] << 1 | words[2 * i + 1] >> 7);
    }
}

static void join_planes(uint8_t *restrict words, const uint8_t *restrict high, const uint8_t *restrict low,
                        uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        words[2 * i] = (uint8_t)(low[i] >> 1 | high[i] << 7);
        words[2 * i + 1] = (uint8_t)(high[i] >> 1 | low[i] << 7);
    }
}

// ---- encoding -------------------------------------------------------------------------------------------------------

struct leaf_encoder {
    ZSTD_CCtx *context;
    uint8_t *frame; // one, before it is known to be worth it
    uint64_t frame_capacity;
    uint8_t *tried[LEAF_CODE_COUNT]; // [LEAF_MAX_BYTES] each
    uint8_t high[PLANE_FRAME_BYTES], low[LEAF_MAX_BYTES / 2];
};

struct leaf_encoder *leaf_encoder_new(void)
{
    struct leaf_encoder *encoder = calloc(1, sizeof *encoder);
    if (!encoder)
        return NULL;
    encoder->frame_capacity = ZSTD_compressBound(LEAF_FRAME_BYTES);
    encoder->frame = malloc(encoder->frame_capacity);
    encoder->context = ZSTD_createCCtx();
    bool complete = encoder->frame && encoder->context;
    for (int code = LEAF_ZSTD; code < LEAF_CODE_COUNT; code++)
        complete = (encoder->tried[code] = malloc(LEAF_MAX_BYTES)) && complete;
    ZSTD_CCtx *c = encoder->context;
    if (complete && !ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_compressionLevel, ZSTD_LEVEL)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_minMatch, ZSTD_MIN_MATCH)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_hashLog, ZSTD_HASH_LOG)) &&
        !ZSTD_isError(ZSTD_CCtx_setParameter(c, ZSTD_c_literalCompressionMode, ZSTD_ps_enable)))
        return encoder;
    leaf_encoder_free(encoder);
    return NULL;
}

void leaf_encoder_free(struct leaf_encoder *encoder)
{
    if (!encoder)
        return;
    for (int code = 0; code < LEAF_CODE_COUNT; code++)
        free(encoder->tried[code]);
    ZSTD_freeCCtx(encoder->context);
    free(encoder->frame);
    free(encoder);
}

// The leaf in this code. *bytes 0: it is not worth it.
static int try_code(struct leaf_encoder *encoder, enum leaf_code code, const uint8_t *payload, uint64_t payload_bytes,
                    uint64_t *bytes, struct error *err)
{
    uint64_t frames = div_up(payload_bytes, LEAF_FRAME_BYTES), limit = payload_bytes * LEAF_WORTH_PERCENT / 100;
    uint64_t low_bytes = code == LEAF_PLANES ? payload_bytes / 2 : 0, end = frames * sizeof(uint32_t);
    uint8_t *out = encoder->tried[code];
    *bytes = 0;
    for (uint64_t i = 0; i < frames; i++) {
        uint64_t begin = i * LEAF_FRAME_BYTES;
        uint64_t in_bytes = payload_bytes - begin < LEAF_FRAME_BYTES ? payload_bytes - begin : LEAF_FRAME_BYTES;
        const uint8_t *in = payload + begin;
        if (code == LEAF_PLANES) {
            in_bytes /= 2;
            split_planes(encoder->high, encoder->low + begin / 2, in, in_bytes);
            in = encoder->high;
        }
        size_t got = ZSTD_compress2(encoder->context, encoder->frame, encoder->frame_capacity, in, in_bytes);
        if (ZSTD_isError(got))
            return error_set(err, ERR_MEMORY, "cannot compress weights: %s", ZSTD_getErrorName(got));
        if (end + got + low_bytes > limit)
            return 0;
        uint32_t length = (uint32_t)got;
        memcpy(out + i * sizeof length, &length, sizeof length);
        memcpy(out + end, encoder->frame, got);
        end += got;
    }
    memcpy(out + end, encoder->low, low_bytes);
    *bytes = end + low_bytes;
    return 0;
}

int leaf_encode(enum leaf_code *code, const uint8_t **stored, uint64_t *stored_bytes, struct leaf_encoder *encoder,
                const uint8_t *payload, uint64_t payload_bytes, struct error *err)
{
    *code = LEAF_RAW;
    *stored = payload;
    *stored_bytes = payload_bytes;
    for (int i = LEAF_ZSTD; i < LEAF_CODE_COUNT; i++) {
        uint64_t bytes = 0;
        int rc = i == LEAF_PLANES && payload_bytes % 2 ? 0 : try_code(encoder, i, payload, payload_bytes, &bytes, err);
        if (rc)
            return rc;
        if (bytes && bytes < *stored_bytes) {
            *code = (enum leaf_code)i;
            *stored = encoder->tried[i];
            *stored_bytes = bytes;
        }
    }
    return 0;
}

// ---- decoding -------------------------------------------------------------------------------------------------------

struct leaf_scratch {
    ZSTD_DCtx *context;
    uint8_t high[PLANE_FRAME_BYTES];
};

struct leaf_scratch *leaf_scratch_new(void)
{
    struct leaf_scratch *scratch = malloc(sizeof *scratch);
    if (scratch && !(scratch->context = ZSTD_createDCtx())) {
        free(scratch);
        return NULL;
    }
    return scratch;
}

void leaf_scratch_free(struct leaf_scratch *scratch)
{
    if (!scratch)
        return;
    ZSTD_freeDCtx(scratch->context);
    free(scratch);
}

// One frame, just as long and for just as many bytes. The library also knows old formats, skippable frames and frames behind each other; none
// of these is what a leaf holds, and the code for them need not see what stands in a file.
static const char *decode_frame(uint8_t *out, uint64_t out_bytes, const uint8_t *frame, uint64_t frame_bytes,
                                struct leaf_scratch *scratch)
{
    uint32_t magic;
    if (frame_bytes < sizeof magic)
        return "a frame is too short";
    memcpy(&magic, frame, sizeof magic);
    if (magic != ZSTD_MAGICNUMBER || ZSTD_findFrameCompressedSize(frame, frame_bytes) != frame_bytes)
        return "a frame is not one zstd frame of its length";
    if (ZSTD_getFrameContentSize(frame, frame_bytes) != out_bytes)
        return "a frame is of another size than its place in the leaf";
    size_t got = ZSTD_decompressDCtx(scratch->context, out, out_bytes, frame, frame_bytes);
    return got == out_bytes ? NULL : "a frame cannot be decoded";
}

const char *leaf_decode(uint8_t *payload, uint64_t payload_bytes, uint32_t code, const uint8_t *stored,
                        uint64_t stored_bytes, struct leaf_scratch *scratch)
{
    if (payload_bytes == 0 || payload_bytes > LEAF_MAX_BYTES || !leaf_code_fits(code, payload_bytes, stored_bytes))
        return "impossible size or code";
    if (code == LEAF_RAW) {
        memcpy(payload, stored, payload_bytes);
        return NULL;
    }
    uint64_t frames = div_up(payload_bytes, LEAF_FRAME_BYTES), end = frames * sizeof(uint32_t);
    uint64_t low_bytes = code == LEAF_PLANES ? payload_bytes / 2 : 0;
    if (end + low_bytes > stored_bytes)
        return "too short for its frames";
    const uint8_t *low = stored + stored_bytes - low_bytes;
    for (uint64_t i = 0; i < frames; i++) {
        uint32_t frame_bytes;
        uint64_t begin = i * LEAF_FRAME_BYTES;
        uint64_t out_bytes = payload_bytes - begin < LEAF_FRAME_BYTES ? payload_bytes - begin : LEAF_FRAME_BYTES;
        memcpy(&frame_bytes, stored + i * sizeof frame_bytes, sizeof frame_bytes);
        if (!checked_range(end, frame_bytes, stored_bytes - low_bytes))
            return "a frame is out of place";
        uint8_t *out = code == LEAF_PLANES ? scratch->high : payload + begin;
        uint64_t plane_bytes = code == LEAF_PLANES ? out_bytes / 2 : out_bytes;
        const char *wrong = decode_frame(out, plane_bytes, stored + end, frame_bytes, scratch);
        if (wrong)
            return wrong;
        if (code == LEAF_PLANES)
            join_planes(payload + begin, scratch->high, low + begin / 2, plane_bytes);
        end += frame_bytes;
    }
    return end + low_bytes == stored_bytes ? NULL : "it is longer than its frames";
}

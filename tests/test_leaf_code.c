// Codes of leaves: what is encoded is decoded, weights become as short as they should, the same payload the same bytes, damage is refused.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "formats/leaf_code.h"
#include "formats/number_formats.h"

static uint64_t random_state;

static uint32_t random32(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

static float gaussian(void)
{
    double u = (random32() + 0.5) / 4294967296.0, v = (random32() + 0.5) / 4294967296.0;
    return (float)(0.02 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

// What a leaf may hold.
static void fill_bf16(uint8_t *out, uint64_t bytes)
{
    for (uint64_t i = 0; i + 1 < bytes; i += 2) {
        uint16_t bits = f32_to_bf16(gaussian());
        memcpy(out + i, &bits, 2);
    }
}
static void fill_fp8(uint8_t *out, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        out[i] = f32_to_e4m3(gaussian() * (448 / 0.08f));
}
static void fill_int4(uint8_t *out, uint64_t bytes) // codes to the nearest, the largest of 128 weights being 7
{
    for (uint64_t group = 0; group < 2 * bytes; group += 128) {
        float x[128], largest = 0;
        for (int i = 0; i < 128; i++) {
            x[i] = gaussian();
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        }
        for (int i = 0; i < 128; i += 2) {
            unsigned low = (unsigned)lrintf(x[i] * 7 / largest) & 15, high = (unsigned)lrintf(x[i + 1] * 7 / largest);
            if (group + (uint64_t)i < 2 * bytes)
                out[(group + (uint64_t)i) / 2] = (uint8_t)(low | high << 4);
        }
    }
}
static void fill_random(uint8_t *out, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        out[i] = (uint8_t)random32();
}
static void fill_zeros(uint8_t *out, uint64_t bytes) { memset(out, 0, bytes); }
static void fill_every_word(uint8_t *out, uint64_t bytes) // every bf16 there is, NaN and all
{
    for (uint64_t i = 0; i < bytes; i++)
        out[i] = (uint8_t)(i % 2 ? i >> 9 : i >> 1);
}

static const struct {
    const char *name;
    void (*fill)(uint8_t *out, uint64_t bytes);
    enum leaf_code code; // of a whole leaf
    double most;         // ratio
} fills[] = {
    {"bf16", fill_bf16, LEAF_PLANES, 0.67},  {"fp8", fill_fp8, LEAF_ZSTD, 0.835},
    {"int4", fill_int4, LEAF_ZSTD, 0.855},   {"random", fill_random, LEAF_RAW, 1},
    {"zeros", fill_zeros, LEAF_ZSTD, 0.001}, {"every word", fill_every_word, LEAF_PLANES, 0.6},
};
enum { FILLS = sizeof fills / sizeof *fills };

struct encoded {
    enum leaf_code code;
    const uint8_t *bytes;
    uint64_t num_bytes;
};

static struct encoded encode(struct leaf_encoder *encoder, const uint8_t *payload, uint64_t payload_bytes)
{
    struct encoded out;
    struct error err = {0};
    if (leaf_encode(&out.code, &out.bytes, &out.num_bytes, encoder, payload, payload_bytes, &err))
        fail_msg("%s", err.msg);
    return out;
}

static uint8_t *make(int fill, uint64_t bytes)
{
    uint8_t *payload = malloc(bytes);
    assert_non_null(payload);
    random_state = 7;
    fills[fill].fill(payload, bytes);
    return payload;
}

// An exact copy: a step over its end shows under the address sanitizer.
static const char *decode_copy(uint8_t *out, uint64_t payload_bytes, uint32_t code, const uint8_t *bytes,
                               uint64_t num_bytes, struct leaf_scratch *scratch)
{
    uint8_t *copy = malloc(num_bytes + !num_bytes), *payload = malloc(payload_bytes + !payload_bytes);
    assert_true(copy && payload);
    if (num_bytes)
        memcpy(copy, bytes, num_bytes);
    const char *wrong = leaf_decode(payload, payload_bytes, code, copy, num_bytes, scratch);
    if (!wrong)
        memcpy(out, payload, payload_bytes);
    free(payload);
    free(copy);
    return wrong;
}

static void what_is_encoded_is_decoded(void **state)
{
    (void)state;
    static const uint64_t sizes[] = {
        1, 2, 3, 4096, 8192, 131070, 131071, 131072, 131073, 131074, 135168, LEAF_MAX_BYTES - 4096, LEAF_MAX_BYTES};
    struct leaf_encoder *encoder = leaf_encoder_new();
    struct leaf_scratch *scratch = leaf_scratch_new();
    uint8_t *again = malloc(LEAF_MAX_BYTES);
    assert_true(encoder && scratch && again);
    for (int fill = 0; fill < FILLS; fill++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            uint8_t *payload = make(fill, sizes[s]);
            struct encoded leaf = encode(encoder, payload, sizes[s]);
            assert_true(leaf_code_fits(leaf.code, sizes[s], leaf.num_bytes));
            memset(again, 0xa5, LEAF_MAX_BYTES);
            const char *wrong = decode_copy(again, sizes[s], leaf.code, leaf.bytes, leaf.num_bytes, scratch);
            if (wrong || memcmp(again, payload, sizes[s]) != 0)
                fail_msg("%s, %u bytes as %s: %s", fills[fill].name, (unsigned)sizes[s], leaf_code_name(leaf.code),
                         wrong ? wrong : "other bytes");
            free(payload);
        }
    free(again);
    leaf_scratch_free(scratch);
    leaf_encoder_free(encoder);
}

static void weights_become_short(void **state)
{
    (void)state;
    struct leaf_encoder *encoder = leaf_encoder_new();
    assert_non_null(encoder);
    for (int fill = 0; fill < FILLS; fill++) {
        uint8_t *payload = make(fill, LEAF_MAX_BYTES);
        struct encoded leaf = encode(encoder, payload, LEAF_MAX_BYTES);
        double ratio = (double)leaf.num_bytes / LEAF_MAX_BYTES;
        if (leaf.code != fills[fill].code || !(ratio <= fills[fill].most))
            fail_msg("%s: %s, ratio %.4f instead of %s, %.4f", fills[fill].name, leaf_code_name(leaf.code), ratio,
                     leaf_code_name(fills[fill].code), fills[fill].most);
        free(payload);
    }
    leaf_encoder_free(encoder);
}

// ---- the same bytes -------------------------------------------------------------------------------------------------

enum { THREADS = 4, ROUNDS = 5 };
static uint8_t *payloads[FILLS];
static struct encoded wanted[FILLS];

static void *encode_often(void *arg)
{
    struct leaf_encoder *encoder = leaf_encoder_new();
    uint64_t order = (uint64_t)(uintptr_t)arg;
    bool *same = malloc(sizeof *same);
    *same = encoder != NULL;
    for (int i = 0; *same && i < ROUNDS * FILLS;
         i++) { // each thread in an order of its own: what came before does not matter
        uint64_t fill = (order * 5 + (uint64_t)i * (order % 2 ? 1 : 5)) % FILLS;
        struct encoded leaf;
        struct error err;
        *same =
            leaf_encode(&leaf.code, &leaf.bytes, &leaf.num_bytes, encoder, payloads[fill], LEAF_MAX_BYTES, &err) == 0 &&
            leaf.code == wanted[fill].code && leaf.num_bytes == wanted[fill].num_bytes &&
            memcmp(leaf.bytes, wanted[fill].bytes, leaf.num_bytes) == 0;
    }
    leaf_encoder_free(encoder);
    return same;
}

static void same_payload_same_bytes(void **state)
{
    (void)state;
    struct leaf_encoder *encoders[FILLS];
    pthread_t threads[THREADS];
    for (int fill = 0; fill < FILLS; fill++) {
        payloads[fill] = make(fill, LEAF_MAX_BYTES);
        assert_non_null(encoders[fill] = leaf_encoder_new());
        wanted[fill] = encode(encoders[fill], payloads[fill], LEAF_MAX_BYTES);
    }
    for (uintptr_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, encode_often, (void *)i), 0);
    for (int i = 0; i < THREADS; i++) {
        void *same = NULL;
        pthread_join(threads[i], &same);
        assert_true(*(bool *)same);
        free(same);
    }
    for (int fill = 0; fill < FILLS; fill++) {
        leaf_encoder_free(encoders[fill]);
        free(payloads[fill]);
    }
}

// ---- refusals -------------------------------------------------------------------------------------------------------

static void sizes_and_codes(void **state)
{
    (void)state;
    static const struct {
        uint32_t code;
        uint64_t payload_bytes, stored_bytes;
        bool fits;
    } cases[] = {
        {LEAF_RAW, 4096, 4096, true},
        {LEAF_RAW, 4096, 4095, false},
        {LEAF_RAW, 4096, 4097, false},
        {LEAF_ZSTD, 10000, 9700, true},
        {LEAF_ZSTD, 10000, 9701, false},
        {LEAF_ZSTD, 10000, 0, false},
        {LEAF_PLANES, 10000, 9700, true},
        {LEAF_PLANES, 9999, 5000, false},
        {LEAF_CODE_COUNT, 4096, 100, false},
        {UINT32_MAX, 4096, 100, false},
        {LEAF_ZSTD, 4096, UINT64_MAX / 50, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (leaf_code_fits(cases[i].code, cases[i].payload_bytes, cases[i].stored_bytes) != cases[i].fits)
            fail_msg("case %zu", i);
    for (int i = 0; i < LEAF_CODE_COUNT; i++)
        assert_string_not_equal(leaf_code_name((enum leaf_code)i), "unknown");
    assert_string_equal(leaf_code_name(LEAF_CODE_COUNT), "unknown");
}

// A leaf of one frame, of our own making.
static uint64_t put_leaf(uint8_t *out, uint32_t length, const uint8_t *frame, uint64_t frame_bytes)
{
    memcpy(out, &length, sizeof length);
    memcpy(out + sizeof length, frame, frame_bytes);
    return sizeof length + frame_bytes;
}

static void frames_that_do_not_belong(void **state)
{
    (void)state;
    enum { BYTES = 4096 };
    static const uint8_t skippable[] = {0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4};
    uint8_t payload[BYTES], again[BYTES], frame[BYTES], two[BYTES], leaf[BYTES];
    struct leaf_scratch *scratch = leaf_scratch_new();
    assert_non_null(scratch);
    for (int i = 0; i < BYTES; i++)
        payload[i] = (uint8_t)(i / 64);
    uint64_t frame_bytes = ZSTD_compress(frame, sizeof frame, payload, BYTES, 1), bytes;
    assert_false(ZSTD_isError(frame_bytes));
    bytes = put_leaf(leaf, (uint32_t)frame_bytes, frame, frame_bytes);
    assert_null(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch));
    assert_memory_equal(again, payload, BYTES);

    // The same frame for fewer and for more bytes, in too few and too many.
    assert_string_equal(decode_copy(again, BYTES - 1, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is of another size than its place in the leaf");
    assert_string_equal(decode_copy(again, BYTES + 1, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is of another size than its place in the leaf");
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes + 1, scratch), "it is longer than its frames");
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes - 1, scratch), "a frame is out of place");
    put_leaf(leaf, UINT32_MAX, frame, frame_bytes);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch), "a frame is out of place");
    put_leaf(leaf, (uint32_t)frame_bytes - 1, frame, frame_bytes);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is not one zstd frame of its length");
    put_leaf(leaf, 0, frame, frame_bytes);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch), "a frame is too short");
    // Every stored byte is looked at: none may be cut off or put behind.
    for (uint64_t cut = 0; cut < bytes; cut++)
        assert_non_null(decode_copy(again, BYTES, LEAF_ZSTD, leaf, cut, scratch));

    // A frame that says nothing of its size, one with another behind it, a skippable one, one of an old format.
    ZSTD_CCtx *context = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
    uint64_t other_bytes = ZSTD_compress2(context, two, sizeof two, payload, BYTES);
    ZSTD_freeCCtx(context);
    bytes = put_leaf(leaf, (uint32_t)other_bytes, two, other_bytes);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is of another size than its place in the leaf");
    memcpy(two, frame, frame_bytes);
    memcpy(two + frame_bytes, skippable, sizeof skippable);
    bytes = put_leaf(leaf, (uint32_t)(frame_bytes + sizeof skippable), two, frame_bytes + sizeof skippable);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is not one zstd frame of its length");
    bytes = put_leaf(leaf, sizeof skippable, skippable, sizeof skippable);
    assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch),
                        "a frame is not one zstd frame of its length");
    for (int version = 1; version < 8; version++) { // v0.1 begins with 1eb52ffd, v0.2 to v0.7 with 22b52ffd to 27b52ffd
        memcpy(two, frame, frame_bytes);
        two[0] = (uint8_t)(version == 1 ? 0x1e : 0x20 + version);
        bytes = put_leaf(leaf, (uint32_t)frame_bytes, two, frame_bytes);
        assert_string_equal(decode_copy(again, BYTES, LEAF_ZSTD, leaf, bytes, scratch),
                            "a frame is not one zstd frame of its length");
    }
    assert_string_equal(decode_copy(again, 0, LEAF_RAW, leaf, 0, scratch), "impossible size or code");
    assert_string_equal(leaf_decode(again, (uint64_t)LEAF_MAX_BYTES + 4096, LEAF_ZSTD, leaf, 100, scratch),
                        "impossible size or code");
    leaf_scratch_free(scratch);
}

// Flipped, cut and lengthened: whatever comes, it is refused or becomes a leaf of the right size, and nothing else is touched.
static void damage(void **state)
{
    (void)state;
    enum { BYTES = 3 * LEAF_FRAME_BYTES - 4096 };
    struct leaf_encoder *encoder = leaf_encoder_new();
    struct leaf_scratch *scratch = leaf_scratch_new();
    uint8_t *again = malloc(BYTES), *leaf = malloc(BYTES);
    assert_true(encoder && scratch && again && leaf);
    for (int fill = 0; fill < FILLS; fill++) {
        uint8_t *payload = make(fill, BYTES);
        struct encoded whole = encode(encoder, payload, BYTES);
        int refused = 0;
        for (int i = 0; whole.code != LEAF_RAW && i < 300; i++) {
            memcpy(leaf, whole.bytes, whole.num_bytes);
            uint64_t at = (i % 3 ? random32() : (uint32_t)i / 3) % whole.num_bytes, bytes = whole.num_bytes;
            leaf[at] ^= (uint8_t)(1 << random32() % 8);
            if (i % 5 == 0)
                bytes -= random32() % (i % 2 ? whole.num_bytes : 16);
            refused += decode_copy(again, BYTES, whole.code, leaf, bytes, scratch) != NULL;
        }
        assert_true(whole.code == LEAF_RAW || refused > 60);
        free(payload);
    }
    free(leaf);
    free(again);
    leaf_scratch_free(scratch);
    leaf_encoder_free(encoder);
    leaf_scratch_free(NULL);
    leaf_encoder_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_encoded_is_decoded), cmocka_unit_test(weights_become_short),
        cmocka_unit_test(same_payload_same_bytes),    cmocka_unit_test(sizes_and_codes),
        cmocka_unit_test(frames_that_do_not_belong),  cmocka_unit_test(damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// The bytes of a KV cache on the host. See kv.h.
#include "kernels/kv.h"

#include "formats/number_formats.h"
#include "kernels/kv_codes.h"
#include "kernels/vectors.h"

#include <string.h>

enum kv_format kv_format_from_name(const char *name)
{
    int format = 0;
    while (format < KV_FORMAT_COUNT - 1 && strcmp(kv_format_name((enum kv_format)format), name) != 0)
        format++;
    return (enum kv_format)format;
}

int kv_format_check(const struct model_desc *desc, enum kv_format format, struct error *err)
{
    if (kv_format_scaled(format) && desc->latent.kv_rank > 0)
        return error_set(err, ERR_MODEL,
                         "--kv-cache %s is for keys and values of heads, and this model caches one latent row for all "
                         "heads, which is small already; use bf16 or fp8",
                         kv_format_name(format));
    return 0;
}

// ---- rotation ------------------------------------------------------------------------------------------------------

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE4(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define SHUFFLE4(a, ...) __builtin_shuffle(a, (i32x4){__VA_ARGS__})
#endif

// The stages of distance 1 and 2.
static f32x4 rotate_four(f32x4 x)
{
    const f32x4 odd = {1, -1, 1, -1}, upper = {1, 1, -1, -1};
    x = SHUFFLE4(x, 0, 0, 2, 2) + SHUFFLE4(x, 1, 1, 3, 3) * odd;
    return SHUFFLE4(x, 0, 1, 0, 1) + SHUFFLE4(x, 2, 3, 2, 3) * upper;
}
#undef SHUFFLE4

static void rotate_block(float *x, int64_t block)
{
    f32x4 a, b, sum;
    if (block == 2) {
        float first = x[0], second = x[1];
        x[0] = first + second;
        x[1] = first - second;
    }
    for (int64_t i = 0; i + 4 <= block; i += 4) {
        memcpy(&a, x + i, sizeof a);
        a = rotate_four(a);
        memcpy(x + i, &a, sizeof a);
    }
    for (int64_t distance = 4; distance < block; distance *= 2)
        for (int64_t i = 0; i < block; i += 4) {
            if (i & distance)
                continue;
            memcpy(&a, x + i, sizeof a);
            memcpy(&b, x + i + distance, sizeof b);
            sum = a + b;
            a = a - b;
            memcpy(x + i, &sum, sizeof sum);
            memcpy(x + i + distance, &a, sizeof a);
        }
}

void kv_rotate(float *x, int64_t heads, int64_t dim, float factor)
{
    int64_t block = kv_rotation_block(dim);
    for (int64_t i = 0; i < heads * dim; i += block)
        rotate_block(x + i, block);
    for (int64_t i = 0; i < heads * dim && factor != 1; i++)
        x[i] *= factor;
}

// ---- storing -------------------------------------------------------------------------------------------------------

static uint16_t scale_of(enum kv_format format, const float *x, int64_t count)
{
    uint32_t extent = 0;
    for (int64_t i = 0; i < count; i++)
        extent = kv_extent(x[i]) > extent ? kv_extent(x[i]) : extent;
    return kv_scale(format, extent);
}

enum { MOST_COLUMNS = KERNELS_MAX_KEY_DIM };

// kv_code_int4 of each value, by vectors.
static void codes_int4(uint8_t *codes, const float *x, int64_t count, float inverse)
{
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t here = count - i < LANES ? count - i : LANES;
        f32x16 twice = {0};
        i32x16 code = {0};
        if (inverse < 0 || inverse > 0) { // else zeros, whatever x is
            load_part(&twice, x + i, here, 0);
            twice = 2 * (twice * inverse);
        }
        for (int level = -8; level < 7; level++) // a comparison that holds is -1
            code -= twice >= (float)(weight_nl4_level((uint8_t)level) + weight_nl4_level((uint8_t)(level + 1)));
        for (int64_t j = 0; j < here; j++)
            codes[i + j] = (uint8_t)((code[j] - 8) & 15);
    }
}

// A key, turned: column i at out[i * KV_PAGE_TOKENS], two columns to a byte.
static void store_key_int4(uint8_t *out, const float *x, int64_t count, float inverse)
{
    uint8_t codes[MOST_COLUMNS];
    codes_int4(codes, x, count, inverse);
    for (int64_t i = 0; i < count; i += 2)
        out[i / 2 * KV_PAGE_TOKENS] = nibble_pack(codes[i], codes[i + 1]);
}

static void store_value_int4(uint8_t *out, const float *x, int64_t count, float inverse)
{
    uint8_t codes[MOST_COLUMNS];
    codes_int4(codes, x, count, inverse);
    for (int64_t i = 0; i < count; i += 8) {
        int64_t half = count - i < 8 ? (count - i) / 2 : 4; // as kv_int4_byte has them
        for (int64_t j = 0; j < half; j++)
            out[i / 2 + j] = nibble_pack(codes[i + j], codes[i + half + j]);
    }
}

// x[i] to at + i * stride.
static void store(void *pool, enum kv_format format, int64_t at, int64_t stride, const float *x, int64_t count,
                  float inverse)
{
    uint16_t *wide = (uint16_t *)pool + at;
    uint8_t *narrow = (uint8_t *)pool + at;
    switch (format) {
    case KV_E4M3:
        for (int64_t i = 0; i < count; i++)
            narrow[i * stride] = f32_to_e4m3(x[i]);
        break;
    case KV_INT8:
        for (int64_t i = 0; i < count; i++)
            narrow[i * stride] = kv_code_int8(x[i], inverse);
        break;
    default:
        for (int64_t i = 0; i < count; i++)
            wide[i * stride] = f32_to_bf16(x[i]);
    }
}

// Key and value of one head, rotated, to the page's slot.
static void store_scaled(const struct kv_view *kv, int64_t page, int64_t slot, const float *k, const float *v)
{
    uint16_t k_scale = scale_of(kv->format, k, kv->k_dim), v_scale = scale_of(kv->format, v, kv->v_dim);
    float k_inverse = kv_inverse_scale(k_scale), v_inverse = kv_inverse_scale(v_scale);
    int64_t begin = page * KV_PAGE_TOKENS;
    kv->k_scale[begin + slot] = k_scale;
    kv->v_scale[begin + slot] = v_scale;
    if (kv->format == KV_INT4) {
        store_key_int4((uint8_t *)kv->k + begin * kv->k_dim / 2 + slot, k, kv->k_dim, k_inverse);
        store_value_int4((uint8_t *)kv->v + (begin + slot) * kv->v_stride / 2, v, kv->v_dim, v_inverse);
        return;
    }
    store(kv->k, kv->format, begin * kv->k_dim + slot, KV_PAGE_TOKENS, k, kv->k_dim, k_inverse);
    store(kv->v, kv->format, (begin + slot) * kv->v_stride, 1, v, kv->v_dim, v_inverse);
}

void kv_store(const struct kv_view *kv, int64_t position, float *k, float *v)
{
    int64_t first = kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads, slot = position % KV_PAGE_TOKENS;
    if (kv_format_scaled(kv->format)) {
        kv_rotate(k, kv->num_kv_heads, kv->k_dim, 1);
        kv_rotate(v, kv->num_kv_heads, kv->v_dim, 1);
        for (int64_t head = 0; head < kv->num_kv_heads; head++)
            store_scaled(kv, first + head, slot, k + head * kv->k_dim, v + head * kv->v_dim);
        return;
    }
    for (int64_t head = 0; head < kv->num_kv_heads; head++) {
        int64_t begin = (first + head) * KV_PAGE_TOKENS;
        if (kv_in_rows(kv)) {
            store(kv->k, kv->format, (begin + slot) * kv->k_dim, 1, k + head * kv->k_dim, kv->k_dim, 0);
            continue;
        }
        store(kv->k, kv->format, begin * kv->k_dim + slot, KV_PAGE_TOKENS, k + head * kv->k_dim, kv->k_dim, 0);
        store(kv->v, kv->format, (begin + slot) * kv->v_stride, 1, v + head * kv->v_dim, kv->v_dim, 0);
    }
}

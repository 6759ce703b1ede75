// The bytes of a KV cache on the host. See kv.h.
#include "kernels/kv.h"

#include "formats/number_formats.h"

static void store_row(void *pool, enum kv_format format, int64_t at, const float *x, int64_t count)
{
    if (format == KV_E4M3) {
        uint8_t *out = (uint8_t *)pool + at;
        for (int64_t i = 0; i < count; i++)
            out[i] = f32_to_e4m3(x[i]);
    } else {
        uint16_t *out = (uint16_t *)pool + at;
        for (int64_t i = 0; i < count; i++)
            out[i] = f32_to_bf16(x[i]);
    }
}

// x[i] to at + i * KV_PAGE_TOKENS.
static void store_column(void *pool, enum kv_format format, int64_t at, const float *x, int64_t count)
{
    if (format == KV_E4M3) {
        uint8_t *out = (uint8_t *)pool + at;
        for (int64_t i = 0; i < count; i++)
            out[i * KV_PAGE_TOKENS] = f32_to_e4m3(x[i]);
    } else {
        uint16_t *out = (uint16_t *)pool + at;
        for (int64_t i = 0; i < count; i++)
            out[i * KV_PAGE_TOKENS] = f32_to_bf16(x[i]);
    }
}

void kv_store(const struct kv_view *kv, int64_t position, const float *k, const float *v)
{
    int64_t first = kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads, slot = position % KV_PAGE_TOKENS;
    for (int64_t head = 0; head < kv->num_kv_heads; head++) {
        int64_t begin = (first + head) * KV_PAGE_TOKENS;
        if (kv_in_rows(kv)) {
            store_row(kv->k, kv->format, (begin + slot) * kv->k_dim, k + head * kv->k_dim, kv->k_dim);
            continue;
        }
        store_column(kv->k, kv->format, begin * kv->k_dim + slot, k + head * kv->k_dim, kv->k_dim);
        store_row(kv->v, kv->format, (begin + slot) * kv->v_stride, v + head * kv->v_dim, kv->v_dim);
    }
}

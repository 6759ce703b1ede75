// The bytes of a KV cache on the host. See kv.h.
#include "kernels/kv.h"

#include "formats/number_formats.h"

uint64_t kv_bytes(const struct model_desc *desc, const struct rank_share *share, int64_t num_pages,
                  enum kv_format format)
{
    return (uint64_t)desc->num_layers * 2 * (uint64_t)num_pages * (uint64_t)share->num_kv_heads_local * KV_PAGE_TOKENS *
           (uint64_t)desc->head_dim * kv_format_bytes(format);
}

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

void kv_store(const struct kv_view *kv, int64_t position, const float *k, const float *v)
{
    int64_t page = kv->pages[position / KV_PAGE_TOKENS], head_dim = kv->head_dim;
    for (int64_t head = 0; head < kv->num_kv_heads; head++) {
        int64_t slot = (page * kv->num_kv_heads + head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS;
        store_row(kv->k, kv->format, slot * head_dim, k + head * head_dim, head_dim);
        store_row(kv->v, kv->format, slot * head_dim, v + head * head_dim, head_dim);
    }
}

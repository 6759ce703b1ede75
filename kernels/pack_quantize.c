// The choice of the quantizers' implementation. See pack.h; the quantizers themselves stand in pack_quantize_impl.h.
#include "kernels/kernels_internal.h"
#include "kernels/pack.h"

#include <stdatomic.h>

extern const struct pack_target pack_base, pack_avx2, pack_avx512;

const struct pack_target *pack_target_at(size_t index)
{
    const struct pack_target *supported[3] = {&pack_base};
    size_t count = 1;
#ifdef __x86_64__
    if (kernels_supported_avx2())
        supported[count++] = &pack_avx2;
    if (kernels_supported_avx512())
        supported[count++] = &pack_avx512;
#endif
    return index < count ? supported[index] : NULL;
}

// Found once: it is asked for every row, and to ask the processor costs as much as a row where the machine is a virtual one.
static const struct pack_target *fastest(void)
{
    static _Atomic(const struct pack_target *) found;
    const struct pack_target *target = atomic_load_explicit(&found, memory_order_relaxed);
    size_t last = 0;
    if (target)
        return target;
    while (pack_target_at(last + 1))
        last++;
    target = pack_target_at(last);
    atomic_store_explicit(&found, target, memory_order_relaxed);
    return target;
}

int pack_quantize_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                      const float *weight, struct error *err)
{
    return fastest()->quantize_row(out, kind, group_size, x, cols, weight, WEIGHT_SCALES_SEARCHED, err);
}

int pack_round_row(struct packed_row *out, enum weight_kind kind, uint32_t group_size, const float *x, uint64_t cols,
                   struct error *err)
{
    return fastest()->quantize_row(out, kind, group_size, x, cols, NULL, WEIGHT_SCALES_LARGEST, err);
}

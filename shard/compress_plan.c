// See compress_plan.h.
#include "shard/compress_plan.h"

// Of Gaussian weights, as `bench_leaf_code` prints them: size after / size before, with scales, and GB/s of payload that one core of a Xeon
// at 2 GHz decodes. Trained weights differ by a hundredth or two. Four-bit floats have no code to spare and stay as they are.
static const struct {
    double ratio, core_gb_s;
} kinds[WEIGHT_KIND_COUNT] = {
    [WEIGHT_F32] = {0.89, 1.5},  [WEIGHT_BF16] = {0.67, 2.4},  [WEIGHT_INT8] = {0.90, 1.0}, [WEIGHT_FP8] = {0.82, 0.9},
    [WEIGHT_INT4] = {0.92, 1.0}, [WEIGHT_INT4Z] = {0.93, 1.0}, [WEIGHT_NL4] = {0.97, 1.0},  [WEIGHT_FP8G] = {0.82, 0.9},
    [WEIGHT_MXFP4] = {1, 6},     [WEIGHT_NVFP4] = {1, 6},
};

// Plain rounding leaves codes that are less evenly used.
static double ratio_of(enum weight_kind kind, enum weight_scales scales)
{
    if (scales == WEIGHT_SCALES_LARGEST && weight_group_chosen(kind))
        return kind == WEIGHT_INT4 ? 0.85 : 0.91;
    return kinds[kind].ratio;
}

void compress_plan_make(struct compress_plan *out, const struct rank_memory *ranks, const struct plan *plan)
{
    double payload = 0, stored = 0, seconds = 0;
    struct compress_plan made = {0};
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++) {
        double rank_stored = 0;
        for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++) {
            double bytes = (double)ranks[rank].kind_bytes[kind];
            rank_stored += bytes * ratio_of((enum weight_kind)kind, plan->quant.scales);
            seconds += bytes / kinds[kind].core_gb_s * 1e-9;
        }
        stored += rank_stored;
        payload += (double)ranks[rank].weight_bytes;
        made.plain_bytes += ranks[rank].file_bytes;
        made.stored_bytes += ranks[rank].file_bytes - ranks[rank].weight_bytes + (uint64_t)rank_stored;
    }
    made.ratio = payload > 0 ? stored / payload : 1;
    made.core_gb_s = seconds > 0 ? payload / seconds * 1e-9 : 1;
    *out = made;
}

struct compress_advice compress_plan_advise(const struct compress_plan *plan, double link_gb_s, int64_t cores)
{
    double link = link_gb_s / plan->ratio, decode = (double)cores * plan->core_gb_s;
    struct compress_advice advice = {.rate_gb_s = link < decode ? link : decode};
    advice.helps = advice.rate_gb_s > link_gb_s;
    advice.plain_s = (double)plan->plain_bytes * 1e-9 / link_gb_s;
    advice.compressed_s = (double)plan->plain_bytes * 1e-9 / advice.rate_gb_s;
    return advice;
}

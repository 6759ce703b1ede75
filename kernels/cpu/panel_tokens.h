// What tokens give to a panel of unpacked weights (int8 and tiled kinds), laid side by side so that it stays in L2 while several panels pass;
// included by kernels_<isa>.c.
#ifndef TPSHARD_KERNELS_CPU_PANEL_TOKENS_H
#define TPSHARD_KERNELS_CPU_PANEL_TOKENS_H

#include "kernels/vector_ops.h"

enum { PANEL_COLS = 256 };

// start and sum are told for each 16 columns, those of one group alike.
struct panel_token {
    int8_t q[PANEL_COLS];
    int32_t start[PANEL_COLS / ACT_SUM]; // -bias * sum
    float sum[PANEL_COLS / ACT_SUM];     // of q, over the group
    float scale[PANEL_COLS / ACT_GROUP];
};
_Static_assert(PANEL_COLS / ACT_SUM == LANES, "sums of a panel's columns are one vector");

static void panel_tokens(struct panel_token *out, const struct activations *act, int64_t token, int64_t tokens,
                         int64_t col, int64_t cols, int64_t group_size, int32_t bias)
{
    enum { AHEAD = 4 }; // rows of a length of 2^n come from far
    for (int64_t t = 0; t < tokens; t++, out++) {
        const int8_t *q = act->q + (token + t) * act->stride + col;
        const float *scale = act->q_scale + (token + t) * (act->stride / ACT_GROUP) + col / ACT_GROUP;
        const int32_t *q_sum = act->q_sum + (token + t) * (act->stride / ACT_SUM) + col / ACT_SUM;
        __builtin_prefetch(q_sum + AHEAD * (act->stride / ACT_SUM));
        for (int64_t c = 0; c < cols; c += 64) {
            __builtin_prefetch(q + AHEAD * act->stride + c);
            memcpy(out->q + c, q + c, 64);
        }
        i32x16 sum = {0};
        if (cols == PANEL_COLS)
            memcpy(&sum, q_sum, sizeof sum);
        else
            memcpy(&sum, q_sum, (size_t)(cols / ACT_SUM) * sizeof *q_sum);
        if (group_size >= 32)
            sum += VECTOR_SHUFFLE(i32x16, sum, sum, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        if (group_size >= 64)
            sum += VECTOR_SHUFFLE(i32x16, sum, sum, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        if (group_size == 128)
            sum += VECTOR_SHUFFLE(i32x16, sum, sum, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        i32x16 start = sum * -bias;
        f32x16 real = __builtin_convertvector(sum, f32x16);
        memcpy(out->start, &start, sizeof start);
        memcpy(out->sum, &real, sizeof real);
        for (int64_t c = 0; c < cols; c += ACT_GROUP)
            out->scale[c / ACT_GROUP] = scale[c / ACT_GROUP];
    }
}

#endif

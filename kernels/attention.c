// Joining and ending what attention has summed up. See attention.h.
#include "kernels/attention.h"

#include "formats/checked.h"
#include "kernels/vectors.h"

int64_t attention_room_floats(int64_t k_dim, int64_t v_dim)
{
    int64_t out = (int64_t)round_up((uint64_t)v_dim, LANES), wider = k_dim > out ? k_dim : out;
    // Queries, sums of values, scores, partial sums; one page of keys or values in f32; one of rows as bf16, and turned.
    return ATTENTION_QUERIES * (k_dim + out + KV_PAGE_TOKENS + LANES) + KV_PAGE_TOKENS * (wider + k_dim);
}

static float exp_of(float x)
{
    f32x16 lanes = {0};
    lanes += x;
    exp16(&lanes, &lanes);
    return lanes[0];
}

static bool is_empty(const struct attention_query *query) { return query->largest == -INFINITY && query->sum == 0; }

void attention_join(struct attention_query *total, const struct attention_query *part, int64_t v_dim)
{
    if (is_empty(part))
        return;
    if (is_empty(total)) {
        memcpy(total->out, part->out, (size_t)v_dim * sizeof *total->out);
        total->largest = part->largest;
        total->sum = part->sum;
        return;
    }
    float largest = part->largest > total->largest ? part->largest : total->largest;
    float own = exp_of(total->largest - largest), other = exp_of(part->largest - largest);
    for (int64_t i = 0; i < v_dim; i++)
        total->out[i] = total->out[i] * own + part->out[i] * other;
    total->sum = total->sum * own + part->sum * other;
    total->largest = largest;
}

void attention_finish(struct attention_query *query, int64_t v_dim, const float *sink)
{
    if (is_empty(query)) {
        memset(query->out, 0, (size_t)v_dim * sizeof *query->out);
        return;
    }
    float own = 1, sum = query->sum;
    if (sink) {
        float largest = *sink > query->largest ? *sink : query->largest;
        own = exp_of(query->largest - largest);
        sum = sum * own + exp_of(*sink - largest);
    }
    for (int64_t i = 0; i < v_dim; i++)
        query->out[i] = query->out[i] * own / sum;
}

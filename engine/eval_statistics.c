// Scores of positions, means and intervals. See eval_statistics.h.
#include "engine/eval_statistics.h"

#include <math.h>

// ---- one position ----------------------------------------------------------------------------------------------

int64_t eval_statistics_likeliest(const float *x, int64_t n)
{
    int64_t top = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[top])
            top = i;
    return top;
}

// How many tokens come before this one.
static int64_t place_of(const float *x, int64_t n, int64_t token)
{
    int64_t before = 0;
    for (int64_t i = 0; i < n; i++)
        before += i < token ? x[i] >= x[token] : x[i] > x[token];
    return before;
}

void eval_statistics_score(struct position_score *out, const float *q, const float *p, int64_t vocab, uint32_t next)
{
    int64_t top_q = eval_statistics_likeliest(q, vocab), top_p = p ? eval_statistics_likeliest(p, vocab) : 0;
    double sum_q = 0, sum_p = 0, gap = 0;
    for (int64_t i = 0; i < vocab; i++) {
        double at_q = (double)q[i] - q[top_q];
        sum_q += exp(at_q);
        if (!p)
            continue;
        double at_p = (double)p[i] - p[top_p], weight = exp(at_p);
        sum_p += weight;
        gap += weight * (at_p - at_q);
    }
    *out = (struct position_score){.nll = log(sum_q) - ((double)q[next] - q[top_q])};
    if (!p)
        return;
    out->reference_nll = log(sum_p) - ((double)p[next] - p[top_p]);
    out->kl = gap / sum_p + log(sum_q) - log(sum_p);
    out->top1 = top_p == top_q;
    out->top5 = place_of(q, vocab, top_p) < 5;
}

// ---- intervals -------------------------------------------------------------------------------------------------

// The 97.5 % point of Student's t: exact figures, then the expansion about the normal's (off by less than 0.0002).
static double student_t(int64_t freedom)
{
    static const double few[] = {12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281};
    if (freedom <= (int64_t)(sizeof few / sizeof *few))
        return few[freedom - 1];
    double n = (double)freedom, z = 1.959963985, z3 = z * z * z, z5 = z3 * z * z, z7 = z5 * z * z;
    return z + (z3 + z) / (4 * n) + (5 * z5 + 16 * z3 + 3 * z) / (96 * n * n) +
           (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / (384 * n * n * n);
}

int64_t eval_statistics_block(int64_t count)
{
    enum { LEAST = 32, MOST = 512, BLOCKS = 24 };
    int64_t block = count / BLOCKS;
    return block < LEAST ? LEAST : block > MOST ? MOST : block;
}

// A rest of less than half a block belongs to the last one.
static int64_t blocks_of(int64_t count, int64_t block)
{
    int64_t blocks = (count + block / 2) / block;
    return blocks < 1 ? 1 : blocks;
}

// The standard error of the mean of all: sqrt(B / (B - 1) * sum over blocks of (sum - size * mean)^2) / count. NaN for one block.
static double standard_error(const double *values, int64_t count, double mean, int64_t *blocks)
{
    int64_t block = eval_statistics_block(count);
    double squares = 0;
    *blocks = blocks_of(count, block);
    if (*blocks < 2)
        return NAN;
    for (int64_t b = 0; b < *blocks; b++) {
        int64_t end = b + 1 < *blocks ? (b + 1) * block : count;
        double off = 0;
        for (int64_t i = b * block; i < end; i++)
            off += values[i] - mean;
        squares += off * off;
    }
    return sqrt(squares * (double)*blocks / (double)(*blocks - 1)) / (double)count;
}

static double mean_of(const double *values, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += values[i];
    return sum / (double)count;
}

struct estimate eval_statistics_mean(const double *values, int64_t count)
{
    int64_t blocks;
    double mean = mean_of(values, count), error = standard_error(values, count, mean, &blocks);
    double reach = blocks < 2 ? NAN : student_t(blocks - 1) * error;
    return (struct estimate){.value = mean, .low = mean - reach, .high = mean + reach};
}

struct estimate eval_statistics_share(const double *values, int64_t count)
{
    int64_t blocks;
    double share = mean_of(values, count), error = standard_error(values, count, share, &blocks);
    if (blocks < 2)
        return (struct estimate){.value = share, .low = NAN, .high = NAN};
    // Where all blocks are alike, which happens at 0 and 1, a quarter of the positions counts: agreements of models have been seen to depend
    // on each other much less than that.
    double t = student_t(blocks - 1), n = error > 0 ? share * (1 - share) / (error * error) : (double)count / 4;
    if (n > (double)count)
        n = (double)count;
    double middle = (share + t * t / (2 * n)) / (1 + t * t / n);
    double reach = t / (1 + t * t / n) * sqrt(share * (1 - share) / n + t * t / (4 * n * n));
    double low = middle - reach, high = middle + reach; // of 0 and of 1 one end is the share itself, but for rounding
    return (struct estimate){.value = share, .low = share > 0 ? low : 0, .high = share < 1 ? high : 1};
}

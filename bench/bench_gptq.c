// What calibration costs: the three parts of kernels/gptq.h, for inputs of some widths. Times are of one thread's processor, so that other programs do
// not count; of several runs the quickest.
//
//   moments  sums of x x^T over rows of a window, GMAC/s (the lower triangle alone is counted)
//   factor   seconds, and GMAC/s of cols^3 / 6
//   codes    rows of a matrix quantized, GMAC/s of cols^2 / 2 for each; int4 in groups of 128, the search for scales apart
//   search   the weighted search for scales, values a second
//   minutes  CPU minutes of codes and search for a billion parameters of this width, with the factor of a matrix of as many rows as columns
#include "kernels/gptq.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WINDOW = 512, RUNS = 3 };

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static float noise(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (float)((double)(random_state * 0x2545f4914f6cdd1du >> 11) / 9007199254740992.0 - 0.5);
}

static void must(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "bench_gptq: %s\n", what);
    exit(1);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double quicker(double best, double now) { return best > 0 && best < now ? best : now; }

static float *floats(uint64_t count)
{
    float *memory = malloc(count * sizeof *memory);
    must(memory != NULL, "out of memory");
    return memory;
}

static void measure(uint64_t cols, struct thread_pool *pool)
{
    uint64_t triangle_elems = cols * (cols + 1) / 2, row_bytes = packed_row_bytes(WEIGHT_INT4, 128, cols);
    float *x = floats(WINDOW * cols), *triangle = floats(triangle_elems),
          *panels = floats(moments_panel_elems(WINDOW, cols));
    float *values = floats(GPTQ_ROWS * cols), *scratch = floats(gptq_scratch_elems(cols));
    uint8_t *memory = malloc(GPTQ_ROWS * row_bytes);
    struct packed_row rows[GPTQ_ROWS];
    struct gptq_factor factor = {0};
    struct error err;
    double moments = 0, made = 0, codes = 0, search = 0;
    must(memory != NULL, "out of memory");
    memset(triangle, 0, triangle_elems * sizeof *triangle);
    for (uint64_t i = 0; i < WINDOW * cols; i++)
        x[i] = noise() * (i % 61 ? 1.0f : 8.0f);
    for (uint64_t i = 0; i < GPTQ_ROWS * cols; i++)
        values[i] = 0.02f * noise();
    for (int run = 0; run < RUNS; run++) {
        double begin = seconds();
        moments_add(triangle, cols, x, (int64_t)cols, WINDOW, panels, pool);
        moments = quicker(moments, seconds() - begin);
    }
    for (int run = 0; run < RUNS; run++) {
        gptq_factor_free(&factor);
        double begin = seconds();
        must(gptq_factor_make(&factor, triangle, cols, pool, &err) == 0, "no factor");
        made = quicker(made, seconds() - begin);
    }
    for (int run = 0; run < RUNS; run++) {
        double begin = seconds();
        for (int r = 0; r < GPTQ_ROWS; r++) {
            packed_row_place(&rows[r], memory + (uint64_t)r * row_bytes, WEIGHT_INT4, 128, cols);
            must(pack_quantize_row(&rows[r], WEIGHT_INT4, 128, values + (uint64_t)r * cols, cols, factor.pivots,
                                   &err) == 0,
                 "not quantized");
        }
        double between = seconds();
        gptq_quantize(rows, GPTQ_ROWS, WEIGHT_INT4, 128, values, &factor, scratch);
        search = quicker(search, between - begin);
        codes = quicker(codes, seconds() - between);
    }
    double n = (double)cols, of_row = (codes + search) / GPTQ_ROWS, of_matrix = of_row * n + made;
    printf("gptq cols=%llu moments_gmacs=%.1f factor_s=%.2f factor_gmacs=%.1f codes_gmacs=%.1f search_mvalues_s=%.0f "
           "minutes_per_billion=%.2f\n",
           (unsigned long long)cols, 1e-9 * WINDOW * n * n / 2 / moments, made, 1e-9 * n * n * n / 6 / made,
           1e-9 * GPTQ_ROWS * n * n / 2 / codes, 1e-6 * GPTQ_ROWS * n / search, of_matrix / (n * n) * 1e9 / 60);
    gptq_factor_free(&factor);
    free(x);
    free(triangle);
    free(panels);
    free(values);
    free(scratch);
    free(memory);
}

int main(void)
{
    static const uint64_t widths[] = {1024, 2048, 4096};
    struct thread_pool *pool;
    struct error err;
    must(thread_pool_create(&pool, 1, &err) == 0, "no thread");
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        measure(widths[i], pool);
    thread_pool_free(pool);
    return 0;
}

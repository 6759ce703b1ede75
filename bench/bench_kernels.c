// How fast are the matmul kernels? For each kind of weights, shape, number of tokens and threads: bytes of weights per second,
// their share of what the same threads could read just before and after (bench/bandwidth.h), and operations per second with their share of
// what the table's multiply-add could do in registers (bench/peak.h) at the same time. Weights rotate over copies that no cache holds.
//
//   bench_kernels [table [kind [tokens [shape]]]]     e.g. "avx2 int4 1"; "all" or nothing: everything
#include "bench/bandwidth.h"
#include "bench/median.h"
#include "bench/peak.h"
#include "formats/checked.h"
#include "kernels/kernels.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROUNDS = 7 };
#define ARENA_BYTES ((uint64_t)448 << 20)
#define READ_BYTES ((uint64_t)192 << 20)

static const struct {
    enum weight_kind kind;
    uint32_t group_size;
} kinds[] = {{WEIGHT_INT4, 128}, {WEIGHT_NL4, 128}, {WEIGHT_INT4, 32}, {WEIGHT_INT4Z, 128}, {WEIGHT_MXFP4, 32},
             {WEIGHT_NVFP4, 16}, {WEIGHT_INT8, 0},  {WEIGHT_FP8, 0},   {WEIGHT_FP8G, 128},  {WEIGHT_BF16, 0}};
static const struct {
    int64_t rows, cols;
} shapes[] = {{4096, 4096}, {14336, 4096}};
static const int64_t token_counts[] = {1, 2, 3, 4, 8, 16, 64, 512};
enum { MAX_TOKENS = 512, MAX_ROWS = 14336, MAX_COLS = 4096 };

// One measurement: `copies` products one after the other, each thread its share of the rows.
struct job {
    const struct kernels *kernels;
    const struct activations *act;
    const uint8_t *arena;
    struct weight_shape shape;
    uint64_t copy_bytes, first_copy, copies, all_copies;
    int64_t tokens;
    int threads;
    float *y;
};

static void multiply_share(void *arg, int thread)
{
    const struct job *job = arg;
    int64_t blocks = (int64_t)job->shape.rows / WEIGHT_ROW_UNIT;
    int64_t begin = blocks * thread / job->threads * WEIGHT_ROW_UNIT;
    int64_t end = blocks * (thread + 1) / job->threads * WEIGHT_ROW_UNIT;
    for (uint64_t i = 0; i < job->copies; i++) {
        const uint8_t *copy = job->arena + (job->first_copy + i) % job->all_copies * job->copy_bytes;
        struct matrix w = {job->shape, copy, copy + job->shape.data_bytes};
        job->kernels->matmul(job->y, MAX_ROWS, &w, job->act, job->tokens, begin, end);
    }
}

static void measure(struct job job)
{
    job.copy_bytes = round_up(job.shape.data_bytes + job.shape.scale_bytes, 4096);
    job.all_copies = ARENA_BYTES / job.copy_bytes;
    double operations = 2.0 * (double)job.tokens * (double)(job.shape.rows * job.shape.cols);
    job.copies = 1;
    double once = bench_parallel(job.threads, multiply_share, &job); // warms up, and says how often fits into 60 ms
    job.copies = 1 + (uint64_t)(0.06 / (once > 1e-6 ? once : 1e-6));

    bool integers = job.shape.kind == WEIGHT_INT8 || weight_is_tiled(job.shape.kind);
    double rate[ROUNDS], share[ROUNDS], read[ROUNDS], of_peak[ROUNDS], before, after = 0;
    for (int i = 0; i < ROUNDS; i++) {
        before = i ? after : bandwidth_bytes_per_second(job.arena, READ_BYTES, job.threads);
        job.first_copy = (job.first_copy + job.copies) % job.all_copies;
        double seconds = bench_parallel(job.threads, multiply_share, &job);
        double peak = peak_operations_per_second(job.kernels->name, integers, job.threads);
        after = bandwidth_bytes_per_second(job.arena + (uint64_t)(i % 2) * READ_BYTES, READ_BYTES, job.threads);
        rate[i] = (double)job.copies / seconds;
        read[i] = (before + after) / 2;
        of_peak[i] = peak > 0 ? rate[i] * operations / peak : 0;
        share[i] = rate[i] * (double)(job.shape.data_bytes + job.shape.scale_bytes) / read[i];
    }
    double products = bench_median(rate, ROUNDS);
    printf("kernels table=%s kind=%s group=%" PRIu32 " rows=%" PRIu64 " cols=%" PRIu64 " tokens=%" PRId64
           " threads=%d gb_s=%.2f read_gb_s=%.2f share=%.2f gop_s=%.1f of_peak=%.2f\n",
           job.kernels->name, weight_kind_name(job.shape.kind), job.shape.group_size, job.shape.rows, job.shape.cols,
           job.tokens, job.threads, products * (double)(job.shape.data_bytes + job.shape.scale_bytes) / 1e9,
           bench_median(read, ROUNDS) / 1e9, bench_median(share, ROUNDS), products * operations / 1e9,
           bench_median(of_peak, ROUNDS));
    fflush(stdout);
}

static bool chosen(int argc, char **argv, int index, const char *name)
{
    return argc <= index || strcmp(argv[index], "all") == 0 || strcmp(argv[index], name) == 0;
}

// Where bytes are taken for weights and scales: +-0x30 .. 0x3f, ordinary numbers in every format. No subnormals, no NaN.
static void fill_arena(uint8_t *arena)
{
    uint64_t state = 88172645463325252u;
    for (uint64_t i = 0; i < ARENA_BYTES; i += 8) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        uint64_t word = (state & 0x8f8f8f8f8f8f8f8fu) | 0x3030303030303030u;
        memcpy(arena + i, &word, sizeof word);
    }
}

// All that the command line asks of one table; how many measurements.
static int measure_table(const struct kernels *kernels, int argc, char **argv, struct job job, struct activations *act,
                         const float *x)
{
    int measured = 0;
    job.kernels = kernels;
    job.act = act;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (size_t t = 0; t < sizeof token_counts / sizeof *token_counts; t++) {
                char tokens[32], rows[32];
                snprintf(tokens, sizeof tokens, "%" PRId64, token_counts[t]);
                snprintf(rows, sizeof rows, "%" PRId64, shapes[s].rows);
                if (!chosen(argc, argv, 2, weight_kind_name(kinds[k].kind)) || !chosen(argc, argv, 3, tokens) ||
                    !chosen(argc, argv, 4, rows))
                    continue;
                job.tokens = token_counts[t];
                weight_shape_make(&job.shape, kinds[k].kind, kinds[k].group_size, (uint64_t)shapes[s].rows,
                                  (uint64_t)shapes[s].cols);
                struct matrix w = {job.shape, job.arena, job.arena};
                for (job.threads = 1; job.threads <= 2; job.threads++, measured++) {
                    kernels->prepare(act, &w, x, MAX_COLS, 0, MAX_TOKENS);
                    measure(job);
                }
            }
    return measured;
}

int main(int argc, char **argv)
{
    uint8_t *arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    float *x = malloc(sizeof *x * MAX_TOKENS * MAX_COLS), *y = calloc((size_t)MAX_TOKENS * MAX_ROWS, sizeof *y);
    struct activations act;
    struct error err = {0};
    int measured = 0;
    if (arena == MAP_FAILED || !x || !y || activations_alloc(&act, MAX_TOKENS, MAX_COLS, &err)) {
        fprintf(stderr, "bench_kernels: out of memory\n");
        return 1;
    }
    madvise(arena, ARENA_BYTES, MADV_HUGEPAGE); // as the engine maps its file
    fill_arena(arena);
    for (int64_t i = 0; i < (int64_t)MAX_TOKENS * MAX_COLS; i++)
        x[i] = (float)(i * 7919 % 1013) / 506.0f - 1;
    // The reference is not for speed: only when asked for.
    for (int n = 0; kernels_all[n]; n++)
        if (kernels_all[n]->supported() && chosen(argc, argv, 1, kernels_all[n]->name) &&
            (argc > 1 || strcmp(kernels_all[n]->name, "scalar") != 0))
            measured += measure_table(kernels_all[n], argc, argv, (struct job){.arena = arena, .y = y}, &act, x);
    activations_free(&act);
    free(x);
    free(y);
    munmap(arena, ARENA_BYTES);
    if (!measured)
        fprintf(stderr, "bench_kernels: nothing fits these words; wanted [table [kind [tokens [rows]]]] that this "
                        "processor runs, \"all\" for any\n");
    return measured ? 0 : 2;
}

// How fast is attention on the CPU? The backend's own operation over rows of a step, by table, phase and context: floating-point operations
// per second beside the FMA peak, and bytes of keys and values beside what the same threads read from memory, both measured in the same run.
// Operations: 2 for each product of a query with a key and of a weight with a value. Bytes: the codes of the keys and values that the rows attend to,
// each sequence's once.
//
//   bench_attention [table [threads [latent | fp8 | int8 | int4]]]     e.g. "avx2 2"; the fastest table, 1 and 2 threads, a bf16 cache otherwise
#include "bench/bandwidth.h"
#include "bench/median.h"
#include "formats/checked.h"
#include "kernels/backend.h"
#include "kernels/cpu_device.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROUNDS = 5, MAX_CONTEXT = 8192, MAX_ROWS = 128, HIDDEN = 128 };
#define READ_BYTES ((uint64_t)192 << 20)

static const int64_t contexts[] = {512, 2048, 8192};
static const struct {
    const char *phase;
    int64_t rows;
} steps[] = {{"prefill", 128}, {"decode", 1}, {"decode", 8}};
static const struct {
    const char *name;
    int64_t heads, kv_heads, head_dim;
    struct latent_desc latent;
} shapes[] = {{"gqa", 32, 8, 128, {0}},
              {"latent", 16, 16, 192, {.kv_rank = 512, .nope_dim = 128, .rope_dim = 64, .v_dim = 128}}};

// Of the whole process on processors: on a shared machine the rest belongs to others. Waiting threads spin, so that all take about as long.
static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- the FMA peak --------------------------------------------------------------------------------------------------

enum { PEAK_CHAINS = 12, PEAK_STEPS = 1 << 18 };
struct peak_job {
    int lanes;
    volatile float sink[BANDWIDTH_MAX_THREADS];
};

#ifdef __x86_64__
#define STEP(c) "vfmadd231ps %12, %13, %" #c "\n\t"
#define PEAK(name, isa, bytes)                                                                                         \
    __attribute__((target(isa))) static float name(void)                                                               \
    {                                                                                                                  \
        typedef float lanes __attribute__((vector_size(bytes)));                                                       \
        lanes a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0}, i = {0}, j = {0}, k = {0},       \
              l = {0}, x = {0}, y = {0};                                                                               \
        x += 1.0f, y += 0.5f;                                                                                          \
        for (int n = 0; n < PEAK_STEPS; n++)                                                                           \
            __asm__ volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10)  \
                                 STEP(11)                                                                              \
                             : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i),        \
                               "+v"(j), "+v"(k), "+v"(l)                                                               \
                             : "v"(x), "v"(y));                                                                        \
        a += b + c + d + e + f + g + h + i + j + k + l;                                                                \
        return a[0];                                                                                                   \
    }
PEAK(peak_8, "avx2,fma", 32)
PEAK(peak_16, "avx512f", 64)
#undef PEAK
#undef STEP

static void run_peak(void *arg, int thread)
{
    struct peak_job *job = arg;
    job->sink[thread] = job->lanes == 16 ? peak_16() : peak_8();
}

static double peak_flops(const struct kernels *k, int threads)
{
    struct peak_job job = {.lanes = strcmp(k->name, "avx2") == 0 ? 8 : strcmp(k->name, "scalar") == 0 ? 0 : 16};
    if (job.lanes == 0)
        return 0;
    double seconds = bench_parallel(threads, run_peak, &job);
    return seconds > 0 ? 2.0 * PEAK_CHAINS * PEAK_STEPS * job.lanes * threads / seconds : 0;
}
#else
static double peak_flops(const struct kernels *k, int threads)
{
    (void)k, (void)threads;
    return 0;
}
#endif

// ---- one device ----------------------------------------------------------------------------------------------------

struct bench {
    const struct kernels *kernels;
    int threads;
    enum kv_format format;
    const uint8_t *memory; // READ_BYTES, to be read
    struct model_desc desc;
    struct rank_share share;
    struct layer layer;
    struct weights weights;
    struct device *device;
    int32_t *pages;
    int64_t pages_per_sequence, context;
};

// Ordinary numbers of both signs, below 2 in bf16 and e4m3.
static void fill(void *to, uint64_t bytes)
{
    uint64_t state = 88172645463325252u;
    for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        uint64_t word = (state & 0x8f8f8f8f8f8f8f8fu) | 0x3030303030303030u;
        memcpy((uint8_t *)to + i, &word, sizeof word);
    }
}

// Eight sequences of `context` positions; their pages interleave, as they do when sequences grow side by side.
static int open_device(struct bench *b, size_t shape, int64_t context, struct thread_pool *pool, struct error *err)
{
    struct device_options options = {.kernels = b->kernels, .pool = pool, .tp_size = 1};
    int64_t sequences = 8;
    int rc = backend_cpu.open(&b->device, &options, err);
    if (rc)
        return rc;
    b->context = context;
    b->pages_per_sequence = context / KV_PAGE_TOKENS;
    for (int64_t i = 0; i < sequences * b->pages_per_sequence; i++)
        b->pages[i] = (int32_t)(i % b->pages_per_sequence * sequences + i / b->pages_per_sequence);
    b->desc = (struct model_desc){.num_layers = 1,
                                  .hidden_size = HIDDEN,
                                  .num_heads = shapes[shape].heads,
                                  .num_kv_heads = shapes[shape].kv_heads,
                                  .head_dim = shapes[shape].head_dim,
                                  .latent = shapes[shape].latent,
                                  .attention_scale = 0.05};
    b->share =
        (struct rank_share){.num_heads_local = shapes[shape].heads, .num_kv_heads_local = shapes[shape].kv_heads};
    b->weights = (struct weights){.layers = &b->layer};
    b->layer = (struct layer){.o.shape = {.kind = WEIGHT_BF16, .cols = (uint64_t)attended_width(&b->desc, &b->share)}};
    const struct latent_desc *latent = &b->desc.latent;
    if (latent->kv_rank > 0)
        b->layer.kv_b = (struct matrix){
            .shape = {.cols_padded = (uint64_t)latent->kv_rank},
            .data = b->memory, // bytes that are numbers
        };
    struct device_shape s = {.desc = &b->desc,
                             .share = &b->share,
                             .max_rows = MAX_ROWS,
                             .max_sequences = sequences,
                             .decode_rows = MAX_ROWS,
                             .context = context,
                             .num_pages = sequences * b->pages_per_sequence,
                             .kv_format = b->format};
    if ((rc = backend_cpu.prepare(b->device, &s, &b->weights, err)))
        return rc;
    fill(b->device->kv, b->device->kv_bytes);
    int64_t width = buffer_width(&b->desc, &b->share, BUFFER_QKV);
    for (int64_t i = 0; i < MAX_ROWS * width; i++)
        b->device->all_buffers[BUFFER_QKV][i] = (float)(i * 7919 % 1013) / 506.0f - 1;
    return 0;
}

// Prefill: the last rows of one sequence. Decode: one row of each of so many sequences.
static void measure(struct bench *b, size_t shape, size_t step, struct error *err)
{
    struct token_row rows[MAX_ROWS] = {0};
    bool prefill = strcmp(steps[step].phase, "prefill") == 0;
    int64_t count = steps[step].rows;
    double positions = 0;
    for (int64_t i = 0; i < count; i++) {
        rows[i].sequence = prefill ? 0 : (int32_t)i;
        rows[i].position = prefill ? b->context - count + i : b->context - 1;
        positions += (double)rows[i].position + 1;
    }
    struct kv_pages pages = {.pages = b->pages, .pages_per_sequence = b->pages_per_sequence};
    const struct kv_shape *kv = &b->device->kv_shape;
    double operations = 2 * positions * (double)(shapes[shape].heads * (kv->k_dim + kv->v_dim));
    int64_t columns = (prefill ? 1 : count) * b->context * kv->heads * (kv->latent ? kv->k_dim : kv->k_dim + kv->v_dim);
    double bytes = (double)kv_codes_bytes((uint64_t)columns, b->format);
    backend_cpu.begin(b->device, rows, count, prefill ? PHASE_PREFILL : PHASE_DECODE, &pages, err);
    double begin = seconds_now(), once;
    backend_cpu.attend(b->device, 0, err);
    once = seconds_now() - begin;
    int64_t repeats = 1 + (int64_t)(0.05 / (once > 1e-6 ? once : 1e-6));
    double flops[ROUNDS], rate[ROUNDS], peak[ROUNDS], read[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        peak[i] = peak_flops(b->kernels, b->threads);
        read[i] = bandwidth_bytes_per_second(b->memory, READ_BYTES, b->threads);
        begin = seconds_now();
        for (int64_t r = 0; r < repeats; r++)
            backend_cpu.attend(b->device, 0, err);
        double seconds = (seconds_now() - begin) / (double)(repeats * b->threads);
        flops[i] = operations / seconds;
        rate[i] = bytes / seconds;
    }
    double middle = bench_median(flops, ROUNDS), most = bench_median(peak, ROUNDS), got = bench_median(rate, ROUNDS),
           limit = bench_median(read, ROUNDS);
    printf("attention table=%s threads=%d shape=%s kv=%s phase=%s rows=%" PRId64 " context=%" PRId64
           " gflop_s=%.1f fma_gflop_s=%.1f share=%.2f gb_s=%.2f read_gb_s=%.2f read_share=%.2f us=%.0f\n",
           b->kernels->name, b->threads, shapes[shape].name, kv_format_name(b->format), steps[step].phase, count,
           b->context, middle / 1e9, most / 1e9, most > 0 ? middle / most : 0, got / 1e9, limit / 1e9, got / limit,
           operations / middle * 1e6);
    fflush(stdout);
}

static int measure_threads(struct bench *b, size_t shape, struct error *err)
{
    struct thread_pool *pool;
    int rc = thread_pool_create(&pool, b->threads, err);
    if (rc)
        return rc;
    for (size_t c = 0; c < sizeof contexts / sizeof *contexts && !rc; c++) {
        rc = open_device(b, shape, contexts[c], pool, err);
        for (size_t s = 0; s < sizeof steps / sizeof *steps && !rc; s++)
            measure(b, shape, s, err);
        backend_cpu.close(b->device);
    }
    thread_pool_free(pool);
    return rc;
}

int main(int argc, char **argv)
{
    struct error err = {0};
    const char *what = argc > 3 ? argv[3] : "bf16";
    bool latent = strcmp(what, "latent") == 0;
    struct bench b = {.format = latent ? KV_BF16 : kv_format_from_name(what),
                      .pages = calloc((size_t)8 * MAX_CONTEXT / KV_PAGE_TOKENS, sizeof *b.pages)};
    uint8_t *memory = mmap(NULL, READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int rc = kernels_select(&b.kernels, argc > 1 ? argv[1] : "auto", &err);
    int least = argc > 2 ? atoi(argv[2]) : 1, most = argc > 2 ? least : 2;
    if (!rc && (!b.pages || memory == MAP_FAILED))
        rc = error_set(&err, ERR_MEMORY, "out of memory");
    if (!rc) {
        fill(memory, READ_BYTES);
        b.memory = memory;
    }
    for (b.threads = least; b.threads <= most && !rc; b.threads++)
        rc = measure_threads(&b, latent, &err);
    if (rc)
        fprintf(stderr, "bench_attention: %s\n", err.msg);
    free(b.pages);
    return rc ? 1 : 0;
}

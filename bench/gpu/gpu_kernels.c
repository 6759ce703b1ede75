// Matrix products, attention and sampling on a device, one result line each, beside what the device can do at most in the same run: copying
// memory, and cuBLASLt's own f16 and fp8 products. Weights rotate over copies of more than the L2 cache holds; each figure is the
// median of several runs of a CUDA graph of launches.
//
//   gpu_kernels [quick]      quick: few shapes and runs, own kernels alone: for compute-sanitizer
#include "bench/gpu/gpu_timing.h"
#include "formats/number_formats.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_COPIES = 64, MAX_TOKENS = 4096 };
#define ROTATE_BYTES (256ull << 20)

static struct gpu gpu;

static void fill_floats(float *to, uint64_t count, float value)
{
    float *host = malloc(count * sizeof *host);
    if (!host)
        exit(8);
    for (uint64_t i = 0; i < count; i++)
        host[i] = value;
    gpu_check(cudaMemcpy(to, host, count * sizeof *host, cudaMemcpyHostToDevice), "filling");
    free(host);
}

// ---- what the device can do ------------------------------------------------------------------------------------

struct gemm_work {
    struct gemm_handle *handle;
    struct gemm_plan *plan;
    struct gemm gemm;
};

static void run_gemm(void *arg, int repeat)
{
    struct gemm_work *w = arg;
    struct error err;
    (void)repeat;
    if (gemm_run(w->handle, w->plan, &w->gemm, gpu.stream, &err)) {
        fprintf(stderr, "gpu_kernels: %s\n", err.msg);
        exit(6);
    }
}

static void measure_gemm(struct gemm_handle *handle, const char *name, enum gemm_format in, enum gemm_scale scale,
                         int64_t m, int64_t n, int64_t k)
{
    uint64_t elem = in == GEMM_E4M3 ? 1 : 2;
    struct gemm_work w = {.handle = handle};
    struct error err;
    void *x = gpu_take((uint64_t)(m * k) * elem), *weights = gpu_take((uint64_t)(n * k) * elem);
    float *y = gpu_take((uint64_t)(m * n) * 4), *ones = gpu_take((uint64_t)(m + n) * 4);
    gpu_fill_random(x, (uint64_t)(m * k) * elem, in == GEMM_E4M3 ? 0xb7 : 0xbb);
    gpu_fill_random(weights, (uint64_t)(n * k) * elem, in == GEMM_E4M3 ? 0xb7 : 0xbb);
    fill_floats(ones, (uint64_t)(m + n), 1);
    w.gemm = (struct gemm){.m = m,
                           .n = n,
                           .k = k,
                           .in = in,
                           .out = GEMM_F32,
                           .scale = scale,
                           .x_stride = k,
                           .w_stride = k,
                           .y_stride = n,
                           .x = x,
                           .w = weights,
                           .y = y,
                           .x_scale = scale ? ones : NULL,
                           .w_scale = scale ? ones : NULL,
                           .workspace_bytes = 32 << 20};
    if (gemm_check(&w.gemm, gpu.sm, &err) || gemm_prepare(handle, &w.plan, &w.gemm, &err)) {
        printf("# cublaslt %s %lld x %lld x %lld: %s\n", name, (long long)m, (long long)n, (long long)k, err.msg);
    } else {
        double us = gpu_time_us(&gpu, run_gemm, &w, 8);
        printf("gpu_cublaslt kind=%s tokens=%lld rows=%lld cols=%lld us=%.1f tflops=%.1f gpu=%s\n", name, (long long)m,
               (long long)n, (long long)k, us, 2e-6 * (double)m * (double)n * (double)k / us, gpu.name);
        gemm_plan_free(w.plan);
    }
    cudaFree(x);
    cudaFree(weights);
    cudaFree(y);
    cudaFree(ones);
}

// ---- matrix products -------------------------------------------------------------------------------------------

struct linear_work {
    struct matrix w[MAX_COPIES];
    int copies;
    struct device_input in;
    float *y;
    int64_t tokens, y_stride;
    bool int8;
    // a slab and cuBLASLt instead of an own kernel
    struct gemm_work *gemm;
    void *slab;
    float *slab_scale;
};

static void run_linear(void *arg, int repeat)
{
    struct linear_work *l = arg;
    const struct matrix *w = &l->w[repeat % l->copies];
    if (l->gemm) {
        gpu_check(launch_slab(l->slab, SLAB_E4M3, l->slab_scale, w, 0, (int64_t)w->shape.rows, gpu.stream), "slab");
        run_gemm(l->gemm, repeat);
    } else if (l->int8) {
        gpu_check(launch_linear_int8(l->y, l->y_stride, w, l->in, l->tokens, gpu.stream), "linear_int8");
    } else {
        gpu_check(launch_linear_f16(l->y, l->y_stride, w, l->in, l->tokens, gpu.stream), "linear_f16");
    }
}

static void make_weights(struct linear_work *l, enum weight_kind kind, int64_t rows, int64_t cols)
{
    struct weight_shape shape;
    weight_shape_make(&shape, kind, kind == WEIGHT_INT4 ? 128 : 0, (uint64_t)rows, (uint64_t)cols);
    uint64_t bytes = shape.data_bytes + shape.scale_bytes;
    l->copies = (int)(ROTATE_BYTES / bytes + 1 < MAX_COPIES ? ROTATE_BYTES / bytes + 1 : MAX_COPIES);
    for (int i = 0; i < l->copies; i++) {
        void *data = gpu_take(shape.data_bytes), *scale = shape.scale_bytes ? gpu_take(shape.scale_bytes) : NULL;
        gpu_fill_random(data, shape.data_bytes, kind == WEIGHT_FP8 ? 0xb7 : kind == WEIGHT_BF16 ? 0xbf : 0xff);
        if (scale) // f16 1.0 or f32: any small positive number
            gpu_fill_random(scale, shape.scale_bytes, 0x3c);
        l->w[i] = (struct matrix){shape, data, scale};
    }
}

static void free_weights(struct linear_work *l)
{
    for (int i = 0; i < l->copies; i++) {
        cudaFree((void *)(uintptr_t)l->w[i].data);
        cudaFree((void *)(uintptr_t)l->w[i].scale);
    }
}

static void print_linear(const struct linear_work *l, const char *arithmetic, double us)
{
    const struct weight_shape *s = &l->w[0].shape;
    double gb_s = 1e-3 * (double)(s->data_bytes + s->scale_bytes) / us;
    printf("gpu_linear kind=%s arithmetic=%s rows=%lld cols=%lld tokens=%lld us=%.2f gb_s=%.0f copy_share=%.3f "
           "tflops=%.1f gpu=%s\n",
           weight_kind_name(s->kind), arithmetic, (long long)s->rows, (long long)s->cols, (long long)l->tokens, us,
           gb_s, gb_s / gpu.copy_gb_s, 2e-6 * (double)l->tokens * (double)s->rows * (double)s->cols / us, gpu.name);
    fflush(stdout);
}

// int4 through an e4m3 slab and cuBLASLt, as prefill on sm_90 does it.
static void measure_slab(struct linear_work *l, struct gemm_handle *handle)
{
    const struct weight_shape *s = &l->w[0].shape;
    struct gemm_work g = {.handle = handle};
    struct error err;
    l->slab = gpu_take(s->rows_padded * s->cols_padded);
    l->slab_scale = gpu_take(s->rows_padded * sizeof(float));
    g.gemm = (struct gemm){.m = l->tokens,
                           .n = (int64_t)s->rows,
                           .k = (int64_t)s->cols_padded,
                           .in = GEMM_E4M3,
                           .out = GEMM_F32,
                           .scale = GEMM_SCALE_OUTER,
                           .x_stride = l->in.stride,
                           .w_stride = (int64_t)s->cols_padded,
                           .y_stride = l->y_stride,
                           .x = l->in.values,
                           .w = l->slab,
                           .y = l->y,
                           .x_scale = l->in.scale,
                           .w_scale = l->slab_scale,
                           .workspace_bytes = 32 << 20};
    if (gemm_check(&g.gemm, gpu.sm, &err) == 0 && gemm_prepare(handle, &g.plan, &g.gemm, &err) == 0) {
        l->gemm = &g;
        print_linear(l, "fp8_slab", gpu_time_us(&gpu, run_linear, l, 4));
        gemm_plan_free(g.plan);
    } else {
        printf("# fp8 slab: %s\n", err.msg);
    }
    l->gemm = NULL;
    cudaFree(l->slab);
    cudaFree(l->slab_scale);
}

static void sweep(struct gemm_handle *handle, int64_t rows, int64_t cols, bool quick)
{
    static const enum weight_kind kinds[] = {WEIGHT_INT4, WEIGHT_INT8, WEIGHT_FP8, WEIGHT_BF16};
    static const int64_t few[] = {1, 2, 4, 8, 16, 32, 64}, many[] = {128, 256, 1024, 4096};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        struct linear_work l = {.y_stride = rows};
        make_weights(&l, kinds[k], rows, cols);
        l.in.stride = (cols + 127) / 128 * 128;
        l.in.values = gpu_take((uint64_t)(MAX_TOKENS * l.in.stride) * 2);
        l.in.scale = gpu_take((uint64_t)(MAX_TOKENS * l.in.stride / 128 + MAX_TOKENS) * sizeof(float));
        l.y = gpu_take((uint64_t)(MAX_TOKENS * rows) * sizeof(float));
        gpu_fill_random(l.in.values, (uint64_t)(MAX_TOKENS * l.in.stride) * 2, 0x37);
        fill_floats(l.in.scale, (uint64_t)(MAX_TOKENS * l.in.stride / 128 + MAX_TOKENS), 1);
        bool four = kinds[k] == WEIGHT_INT4;
        for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
            l.tokens = few[i];
            l.int8 = kinds[k] == WEIGHT_INT8;
            if (quick && few[i] != 1 && few[i] != 16)
                continue;
            print_linear(&l,
                         l.int8                    ? "int8"
                         : kinds[k] == WEIGHT_BF16 ? "bf16"
                                                   : "f16",
                         gpu_time_us(&gpu, run_linear, &l, 20));
            if (four) {
                l.int8 = true;
                print_linear(&l, "int8", gpu_time_us(&gpu, run_linear, &l, 20));
            }
        }
        for (size_t i = 0; i < sizeof many / sizeof *many && (four || kinds[k] == WEIGHT_INT8); i++) {
            l.tokens = many[i];
            l.int8 = true;
            if (quick && many[i] != 1024)
                continue;
            print_linear(&l, "int8", gpu_time_us(&gpu, run_linear, &l, 4));
            if (four && handle && gpu.sm == 90)
                measure_slab(&l, handle);
        }
        free_weights(&l);
        cudaFree(l.in.values);
        cudaFree(l.in.scale);
        cudaFree(l.y);
    }
}

// ---- attention and sampling ------------------------------------------------------------------------------------

struct attention_work {
    float *out, *qkv;
    void *scratch;
    struct attention_shape shape;
    struct device_rows rows;
    struct device_kv kv;
    int64_t context;
    bool prefill;
};

static void run_attention(void *arg, int repeat)
{
    struct attention_work *a = arg;
    (void)repeat;
    gpu_check(a->prefill ? launch_attention_prefill(a->out, a->qkv, a->shape, a->rows, a->kv, gpu.stream)
                         : launch_attention_decode(a->out, a->qkv, a->shape, a->rows, a->kv, a->context, a->scratch,
                                                   gpu.stream),
              "attention");
}

// Llama-3-8B's attention: 32 query heads over 8 key heads of 128, one sequence.
static void measure_attention(int64_t context, int64_t rows, bool prefill, enum kv_format format)
{
    enum { HEADS = 32, KV_HEADS = 8, HEAD_DIM = 128 };
    int64_t pages = context / KV_PAGE_TOKENS, width = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    uint64_t kv_bytes = (uint64_t)(context * KV_HEADS * HEAD_DIM) * (format == KV_E4M3 ? 1 : 2);
    int32_t *table = malloc((size_t)pages * 4), *host = malloc((size_t)rows * 8);
    if (!table || !host)
        exit(8);
    for (int64_t i = 0; i < pages; i++)
        table[i] = (int32_t)(pages - 1 - i);
    for (int64_t i = 0; i < rows; i++) {
        host[i] = 0;
        host[rows + i] = (int32_t)(context - rows + i);
    }
    int32_t *pages_device = gpu_take((uint64_t)pages * 4), *rows_device = gpu_take((uint64_t)rows * 8);
    gpu_check(cudaMemcpy(pages_device, table, (size_t)pages * 4, cudaMemcpyHostToDevice), "pages");
    gpu_check(cudaMemcpy(rows_device, host, (size_t)rows * 8, cudaMemcpyHostToDevice), "rows");
    struct attention_work a = {
        .out = gpu_take((uint64_t)(rows * HEADS * HEAD_DIM) * 4),
        .qkv = gpu_take((uint64_t)(rows * width) * 4),
        .scratch = gpu_take(attention_scratch_bytes(rows, HEADS, HEAD_DIM, context)),
        .shape = {.num_heads = HEADS, .heads_per_kv = HEADS / KV_HEADS, .scale = 0.088f},
        .rows = {rows_device, rows_device + rows, rows},
        .kv = {gpu_take(kv_bytes), gpu_take(kv_bytes), format, pages_device, pages, KV_HEADS, HEAD_DIM},
        .context = context,
        .prefill = prefill,
    };
    gpu_fill_random(a.kv.k, kv_bytes, 0x37);
    gpu_fill_random(a.kv.v, kv_bytes, 0x37);
    fill_floats(a.qkv, (uint64_t)(rows * width), 0.5f);
    double us = gpu_time_us(&gpu, run_attention, &a, prefill ? 4 : 20);
    double flops = 4.0 * HEADS * HEAD_DIM * (double)rows * ((double)context - (double)rows / 2);
    printf("gpu_attention phase=%s kv=%s context=%lld rows=%lld us=%.1f kv_gb_s=%.0f copy_share=%.3f tflops=%.1f "
           "gpu=%s\n",
           prefill ? "prefill" : "decode", format == KV_E4M3 ? "fp8" : "bf16", (long long)context, (long long)rows, us,
           2e-3 * (double)kv_bytes / us, 2e-3 * (double)kv_bytes / us / gpu.copy_gb_s, 1e-6 * flops / us, gpu.name);
    cudaFree(a.out);
    cudaFree(a.qkv);
    cudaFree(a.scratch);
    cudaFree(a.kv.k);
    cudaFree(a.kv.v);
    cudaFree(pages_device);
    cudaFree(rows_device);
    free(table);
    free(host);
}

struct sample_work {
    uint32_t *tokens;
    float *logits;
    struct device_sampling *how;
    void *scratch;
    int64_t rows, vocab;
};

static void run_sample(void *arg, int repeat)
{
    struct sample_work *s = arg;
    (void)repeat;
    gpu_check(
        launch_sample(s->tokens, s->logits, s->vocab, s->vocab, s->how, NULL, NULL, s->rows, s->scratch, gpu.stream),
        "sampling");
}

static void measure_sampling(const char *name, struct device_sampling how, int64_t rows)
{
    enum { VOCAB = 128256, MAX_ROWS = 64 };
    struct sample_work s = {gpu_take(MAX_ROWS * 4),
                            gpu_take((uint64_t)VOCAB * MAX_ROWS * 4),
                            gpu_take(MAX_ROWS * sizeof how),
                            gpu_take(sample_scratch_bytes(MAX_ROWS, VOCAB)),
                            rows,
                            VOCAB};
    gpu_fill_random(s.logits, (uint64_t)VOCAB * MAX_ROWS * 4, 0x3f);
    for (int i = 0; i < MAX_ROWS; i++)
        gpu_check(cudaMemcpy(s.how + i, &how, sizeof how, cudaMemcpyHostToDevice), "sampling");
    printf("gpu_sample how=%s rows=%lld vocab=%d us=%.1f gpu=%s\n", name, (long long)rows, VOCAB,
           gpu_time_us(&gpu, run_sample, &s, 10), gpu.name);
    cudaFree(s.tokens);
    cudaFree(s.logits);
    cudaFree(s.how);
    cudaFree(s.scratch);
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][2] = {{4096, 4096},  {8192, 8192},  {14336, 4096},
                                        {4096, 14336}, {28672, 8192}, {12288, 73728}};
    bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    struct gemm_handle *handle = NULL;
    struct error err;
    gpu_open(&gpu, quick);
    gpu_measure_copy(&gpu, 1ull << 30);
    if (!quick && gemm_open(&handle, 32 << 20, &err))
        printf("# %s\n", err.msg);
    for (int64_t n = 4096; handle && n <= 8192; n += 4096) {
        measure_gemm(handle, "f16", GEMM_F16, GEMM_SCALE_NONE, n, n, n);
        measure_gemm(handle, "fp8_tensor", GEMM_E4M3, GEMM_SCALE_TENSOR, n, n, n);
        measure_gemm(handle, "fp8_outer", GEMM_E4M3, GEMM_SCALE_OUTER, n, n, n);
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!quick || i == 1)
            sweep(handle, shapes[i][0], shapes[i][1], quick);
    for (int64_t context = 1024; context <= (quick ? 1024 : 65536); context *= 8) {
        measure_attention(context, 1, false, KV_BF16);
        measure_attention(context, 1, false, KV_E4M3);
    }
    measure_attention(quick ? 1024 : 8192, 16, false, KV_BF16);
    measure_attention(quick ? 256 : 2048, quick ? 256 : 2048, true, KV_BF16);
    if (!quick)
        measure_attention(8192, 2048, true, KV_BF16);
    static const int64_t sampled[] = {1, 16, 64};
    for (size_t i = 0; i < sizeof sampled / sizeof *sampled; i++) {
        measure_sampling("greedy", (struct device_sampling){.top_p = 1, .repetition_penalty = 1}, sampled[i]);
        measure_sampling(
            "top_p", (struct device_sampling){.temperature = 0.7, .top_p = 0.9, .top_k = 40, .repetition_penalty = 1},
            sampled[i]);
    }
    gemm_close(handle);
    return 0;
}

// Matrix products by a library: which are legal on which device, what cuBLASLt is told of them, and the probe that finds a wrong
// one, by the emulator's reference.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include <cmocka.h>
}

#include "formats/number_formats.h"
#include "kernels/cuda/gemm.h"
#include "tests/emulator/emulator.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const int architectures[] = {80, 86, 89, 90, 120};
enum { NUM_ARCHITECTURES = sizeof architectures / sizeof architectures[0] };
enum { ALL = 31, FP8_ONES = 4 | 8 | 16, HOPPER = 8, NOWHERE = 0 }; // a bit for each of the above

// Pointers are never followed; only their alignment counts.
static void *address(uintptr_t a) { return (void *)a; }
static float *scales(uintptr_t a) { return (float *)a; }

static struct gemm good(enum gemm_format in, enum gemm_format out, enum gemm_scale scale)
{
    struct gemm g = {};
    g.m = 100, g.n = 4096, g.k = 1024;
    g.in = in, g.out = out, g.scale = scale;
    g.x_stride = g.w_stride = 1024, g.y_stride = 4096;
    g.x = address(4096), g.w = address(8192), g.y = address(16384);
    g.x_scale = scale == GEMM_SCALE_NONE ? NULL : scales(512);
    g.w_scale = scale == GEMM_SCALE_NONE ? NULL : scales(1024);
    g.workspace_bytes = 4 << 20;
    return g;
}

static void expect(const char *name, const struct gemm *g, int where, const char *fragment)
{
    for (int i = 0; i < NUM_ARCHITECTURES; i++) {
        struct error err = {};
        int rc = gemm_check(g, architectures[i], &err);
        bool want = where >> i & 1;
        if ((rc == 0) != want || (rc && (rc != ERR_GPU || !strstr(err.msg, fragment))))
            fail_msg("%s on sm_%d: %d (%s), wanted %s", name, architectures[i], rc, err.msg, want ? "0" : fragment);
    }
}

// Every pair of formats in every mode.
static void test_kinds(void **)
{
    for (int in = GEMM_F32; in <= GEMM_E4M3; in++)
        for (int out = GEMM_F32; out <= GEMM_E4M3; out++)
            for (int scale = GEMM_SCALE_NONE; scale <= GEMM_SCALE_OUTER; scale++) {
                struct gemm g = good((enum gemm_format)in, (enum gemm_format)out, (enum gemm_scale)scale);
                bool fp8 = in == GEMM_E4M3, wide = in == GEMM_F16 || in == GEMM_BF16;
                bool writes = fp8 ? out != GEMM_E4M3 : wide && (out == GEMM_F32 || out == in);
                int where = !writes                     ? NOWHERE
                            : wide                      ? scale == GEMM_SCALE_NONE ? ALL : NOWHERE
                            : scale == GEMM_SCALE_OUTER ? HOPPER
                                                        : FP8_ONES;
                char name[64];
                snprintf(name, sizeof name, "in %d, out %d, scale %d", in, out, scale);
                expect(name, &g, where, "gemm: ");
            }
}

static void test_sentences(void **)
{
    static const struct {
        const char *name;
        enum gemm_format in, out;
        enum gemm_scale scale;
        int where;
        const char *fragment;
        void (*change)(struct gemm *g);
    } cases[] = {
        {"f32 operands", GEMM_F32, GEMM_F32, GEMM_SCALE_NONE, 0, "x and w are f32; wanted f16, bf16 or e4m3", NULL},
        {"bf16 out of f16", GEMM_F16, GEMM_BF16, GEMM_SCALE_NONE, 0,
         "y is bf16 for x and w in f16; wanted f32 or the same", NULL},
        {"e4m3 out", GEMM_E4M3, GEMM_E4M3, GEMM_SCALE_TENSOR, 0, "scale of its own", NULL},
        {"e4m3", GEMM_E4M3, GEMM_F32, GEMM_SCALE_NONE, FP8_ONES, "e4m3 needs sm_89 or newer, the device is sm_8", NULL},
        {"outer", GEMM_E4M3, GEMM_F32, GEMM_SCALE_OUTER, HOPPER, "sm_", NULL},
        {"outer of f16", GEMM_F16, GEMM_F32, GEMM_SCALE_OUTER, 0, "scales exist for e4m3 only", NULL},
        {"fast", GEMM_E4M3, GEMM_F32, GEMM_SCALE_TENSOR, FP8_ONES, "needs sm_89",
         [](struct gemm *g) { g->fast_accumulate = true; }},
        {"fast f16", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "fast accumulation",
         [](struct gemm *g) { g->fast_accumulate = true; }},
        {"m 0", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "m 0, n 4096, k 1024", [](struct gemm *g) { g->m = 0; }},
        {"m huge", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "each must be from 1",
         [](struct gemm *g) { g->m = 1ll << 31; }},
        {"n negative", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "n -64", [](struct gemm *g) { g->n = -64; }},
        {"m 1", GEMM_E4M3, GEMM_F32, GEMM_SCALE_OUTER, HOPPER, "sm_", [](struct gemm *g) { g->m = 1; }},
        {"n not 16", GEMM_E4M3, GEMM_F32, GEMM_SCALE_TENSOR, 0, "", [](struct gemm *g) { g->n = 4088; }},
        {"n not 16, f16", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, ALL, "", [](struct gemm *g) { g->n = 4093; }},
        {"k not 16, f16", GEMM_BF16, GEMM_F32, GEMM_SCALE_NONE, ALL, "", [](struct gemm *g) { g->k = 1001; }},
        {"scale with none", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "the mode is none",
         [](struct gemm *g) { g->w_scale = scales(64); }},
        {"x NULL", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "x is NULL", [](struct gemm *g) { g->x = NULL; }},
        {"w on 8", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "w is not aligned to 16 bytes",
         [](struct gemm *g) { g->w = address(4104); }},
        {"y on 4", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "y is not aligned to 16 bytes",
         [](struct gemm *g) { g->y = address(4100); }},
        {"x stride", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "rows of x are 2056 bytes apart",
         [](struct gemm *g) { g->x_stride = 1028; }},
        {"w stride", GEMM_BF16, GEMM_F32, GEMM_SCALE_NONE, 0, "rows of w are 1000 apart; wanted at least its 1024",
         [](struct gemm *g) { g->w_stride = 1000; }},
        {"y stride", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 0, "rows of y are 16392 bytes apart",
         [](struct gemm *g) { g->y_stride = 4098; }},
        {"y stride f16", GEMM_F16, GEMM_F16, GEMM_SCALE_NONE, 0, "rows of y are 8200 bytes apart",
         [](struct gemm *g) { g->y_stride = 4100; }},
        {"wide strides", GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, ALL, "",
         [](struct gemm *g) { g->x_stride = 1032, g->y_stride = 4100; }},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gemm g = good(cases[i].in, cases[i].out, cases[i].scale);
        if (cases[i].change)
            cases[i].change(&g);
        expect(cases[i].name, &g, cases[i].where, cases[i].fragment);
    }
}

// Sentences that need the one device on which all before is well.
static void test_sentences_on_hopper(void **)
{
    static const struct {
        enum gemm_scale scale;
        const char *fragment;
        void (*change)(struct gemm *g);
    } cases[] = {
        {GEMM_SCALE_TENSOR, "n 4088, k 1024; both must be multiples of 16 for e4m3",
         [](struct gemm *g) { g->n = 4088; }},
        {GEMM_SCALE_NONE, "n 4096, k 1016; both must be multiples of 16 for e4m3", [](struct gemm *g) { g->k = 1016; }},
        {GEMM_SCALE_OUTER, "that of x is NULL", [](struct gemm *g) { g->x_scale = NULL; }},
        {GEMM_SCALE_TENSOR, "that of w is NULL", [](struct gemm *g) { g->w_scale = NULL; }},
        {GEMM_SCALE_OUTER, "the scale of w is not aligned to 16 bytes",
         [](struct gemm *g) { g->w_scale = scales(516); }},
        {GEMM_SCALE_TENSOR, "the scale of x is not aligned to 4 bytes",
         [](struct gemm *g) { g->x_scale = scales(514); }},
        {GEMM_SCALE_OUTER, "rows of x are 1032 bytes apart", [](struct gemm *g) { g->x_stride = 1032; }},
        {(enum gemm_scale)3, "unknown scale mode 3", [](struct gemm *) {}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gemm g = good(GEMM_E4M3, GEMM_F32, cases[i].scale);
        struct error err = {};
        cases[i].change(&g);
        assert_int_equal(gemm_check(&g, 90, &err), ERR_GPU);
        if (!strstr(err.msg, cases[i].fragment))
            fail_msg("\"%s\" lacks \"%s\"", err.msg, cases[i].fragment);
    }
    struct gemm g = good(GEMM_E4M3, GEMM_F32, GEMM_SCALE_TENSOR);
    g.x_scale = scales(516); // a scalar may lie anywhere
    assert_int_equal(gemm_check(&g, 90, NULL), 0);
    g = good(GEMM_F16, GEMM_F32, GEMM_SCALE_NONE);
    assert_int_equal(gemm_check(&g, 75, NULL), ERR_GPU);
}

static void check_layout(struct gemm_layout l, int type, uint64_t rows, uint64_t cols, int64_t ld)
{
    assert_int_equal(l.type, type);
    assert_int_equal(l.rows, rows);
    assert_int_equal(l.cols, cols);
    assert_int_equal(l.ld, ld);
}

// The library thinks in columns: w is its A [k, n] transposed, x its B [k, m], y its D [n, m].
static void test_attributes(void **)
{
    static const struct {
        enum gemm_format in, out;
        enum gemm_scale scale;
        int in_type, out_type, mode;
    } cases[] = {
        {GEMM_F16, GEMM_F32, GEMM_SCALE_NONE, 2, 0, 0},    {GEMM_F16, GEMM_F16, GEMM_SCALE_NONE, 2, 2, 0},
        {GEMM_BF16, GEMM_F32, GEMM_SCALE_NONE, 14, 0, 0},  {GEMM_BF16, GEMM_BF16, GEMM_SCALE_NONE, 14, 14, 0},
        {GEMM_E4M3, GEMM_F32, GEMM_SCALE_NONE, 28, 0, 0},  {GEMM_E4M3, GEMM_BF16, GEMM_SCALE_TENSOR, 28, 14, 0},
        {GEMM_E4M3, GEMM_F32, GEMM_SCALE_OUTER, 28, 0, 3}, {GEMM_E4M3, GEMM_F16, GEMM_SCALE_OUTER, 28, 2, 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gemm g = good(cases[i].in, cases[i].out, cases[i].scale);
        g.x_stride = 1040, g.w_stride = 1056, g.y_stride = 4112;
        g.fast_accumulate = cases[i].scale == GEMM_SCALE_OUTER;
        struct gemm_attributes at = gemm_attributes(&g);
        assert_int_equal(at.transa, 1); // "TN"
        assert_int_equal(at.transb, 0);
        check_layout(at.a, cases[i].in_type, 1024, 4096, 1056);
        check_layout(at.b, cases[i].in_type, 1024, 100, 1040);
        check_layout(at.d, cases[i].out_type, 4096, 100, 4112);
        assert_int_equal(at.compute_type, 68); // CUBLAS_COMPUTE_32F
        assert_int_equal(at.scale_type, 0);    // CUDA_R_32F
        assert_int_equal(at.has_scales, cases[i].scale != GEMM_SCALE_NONE);
        assert_int_equal(at.a_scale_mode, cases[i].mode);
        assert_int_equal(at.b_scale_mode, cases[i].mode);
        assert_ptr_equal(at.a_scale, g.w_scale); // n factors go with A
        assert_ptr_equal(at.b_scale, g.x_scale);
        assert_int_equal(at.fast_accumulate, cases[i].scale == GEMM_SCALE_OUTER);
        assert_int_equal(at.workspace_bytes, 4 << 20);
        assert_int_equal(at.alignment, 16);
    }
}

static void test_same(void **)
{
    static void (*const changes[])(struct gemm *) = {
        [](struct gemm *g) { g->m++; },
        [](struct gemm *g) { g->n += 16; },
        [](struct gemm *g) { g->k -= 16; },
        [](struct gemm *g) { g->out = GEMM_F16; },
        [](struct gemm *g) { g->scale = GEMM_SCALE_NONE; },
        [](struct gemm *g) { g->fast_accumulate = true; },
        [](struct gemm *g) { g->x_stride += 16; },
        [](struct gemm *g) { g->w_stride += 16; },
        [](struct gemm *g) { g->y_stride += 16; },
    };
    struct gemm a = good(GEMM_E4M3, GEMM_F32, GEMM_SCALE_OUTER), b = a;
    b.x = address(32768), b.w_scale = scales(32768);
    assert_int_equal(gemm_check_same(&a, &b, NULL), 0);
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        b = a;
        changes[i](&b);
        assert_int_equal(gemm_check_same(&a, &b, NULL), ERR_GPU);
    }
}

// The probe passes for every legal kind on every device, through the reference, and an illegal kind is refused by it.
static void test_probe(void **)
{
    for (int a = 0; a < NUM_ARCHITECTURES; a++) {
        emulator_set_sm(architectures[a]);
        struct gemm_handle *handle = NULL;
        struct error err = {};
        assert_int_equal(gemm_open(&handle, 1 << 20, &err), 0);
        assert_non_null(gemm_library(handle));
        for (int in = GEMM_F16; in <= GEMM_E4M3; in++)
            for (int out = GEMM_F32; out <= GEMM_BF16; out++)
                for (int scale = GEMM_SCALE_NONE; scale <= GEMM_SCALE_OUTER; scale++) {
                    struct gemm g = good((enum gemm_format)in, (enum gemm_format)out, (enum gemm_scale)scale);
                    g.workspace_bytes = 1 << 20;
                    int want = gemm_check(&g, architectures[a], NULL), rc = gemm_probe(handle, &g, &err);
                    if (rc != want)
                        fail_msg("sm_%d, in %d, out %d, scale %d: %s", architectures[a], in, out, scale, err.msg);
                }
        struct gemm g = good(GEMM_F16, GEMM_F32, GEMM_SCALE_NONE);
        assert_int_equal(gemm_probe(handle, &g, &err), ERR_GPU); // a larger workspace than the handle's
        gemm_close(handle);
    }
    emulator_set_sm(90);
}

// A captured product runs with every launch of the graph, on what its operands hold then.
static void test_capture(void **)
{
    enum { M = 3, N = 16, K = 16 };
    uint16_t *x, *w;
    float *y;
    struct gemm_handle *handle = NULL;
    struct gemm_plan *plan = NULL;
    struct error err = {};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaMalloc((void **)&x, M * K * 2), 0);
    assert_int_equal(cudaMalloc((void **)&w, N * K * 2), 0);
    assert_int_equal(cudaMalloc((void **)&y, M * N * 4), 0);
    for (int i = 0; i < M * K; i++)
        x[i] = f32_to_f16((float)(i % 7));
    for (int i = 0; i < N * K; i++)
        w[i] = f32_to_f16((float)(i % 5));
    struct gemm g = {};
    g.m = M, g.n = N, g.k = K, g.in = GEMM_F16, g.out = GEMM_F32;
    g.x_stride = g.w_stride = K, g.y_stride = N, g.x = x, g.w = w, g.y = y;
    assert_int_equal(gemm_open(&handle, 0, &err), 0);
    assert_int_equal(gemm_prepare(handle, &plan, &g, &err), 0);
    assert_int_equal(cudaStreamCreate(&stream), 0);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), 0);
    assert_int_equal(gemm_run(handle, plan, &g, stream, &err), 0);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), 0);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), 0);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < M * N; i++)
            y[i] = NAN;
        x[0] = f32_to_f16((float)(round * 100));
        assert_int_equal(cudaGraphLaunch(exec, stream), 0);
        assert_int_equal(cudaStreamSynchronize(stream), 0);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) {
                float want = 0;
                for (int c = 0; c < K; c++)
                    want += f16_to_f32(x[i * K + c]) * f16_to_f32(w[j * K + c]);
                assert_true(y[i * N + j] == want);
            }
    }
    g.m = 2;
    assert_int_equal(gemm_run(handle, plan, &g, stream, &err), ERR_GPU);
    assert_non_null(strstr(err.msg, "prepared for m 3"));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    gemm_plan_free(plan);
    gemm_close(handle);
    cudaFree(x);
    cudaFree(w);
    cudaFree(y);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kinds),      cmocka_unit_test(test_sentences), cmocka_unit_test(test_sentences_on_hopper),
        cmocka_unit_test(test_attributes), cmocka_unit_test(test_same),      cmocka_unit_test(test_probe),
        cmocka_unit_test(test_capture),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// Which arithmetic a matrix product takes on this device, and taking it. See device.h.
//
// Decode steps read every weight for few rows: own kernels, whose sums do not depend on the number of rows. Prefill is bound by
// arithmetic: int8 tensor cores by an own kernel where they are the fastest exact way, sm_120's scaled fp8 ones for four-bit floats,
// cuBLASLt where it is faster. What cuBLASLt and sm_120's instructions are to do is proven at the start, on small products with known results
// and by preparing every shape; what fails there falls back, the latter to cuBLASLt and that to an own kernel, and the line that describes the
// device says so. The head always takes decode's arithmetic.
#include "formats/checked.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/gemm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// How a matrix is multiplied.
enum arithmetic {
    ARITHMETIC_F16,        // own kernel: weights widened to f16 or bf16 in registers
    ARITHMETIC_INT8,       // own kernel: int8 activations, exact sums over groups
    ARITHMETIC_FP4,        // own kernel: e2m1 weights, e4m3 activations with scales of 32 columns (sm_120)
    ARITHMETIC_GEMM_F16,   // cuBLASLt, weights expanded into an f16 slab
    ARITHMETIC_GEMM_BF16,  // cuBLASLt, bf16 as it lies, or weights expanded into a bf16 slab
    ARITHMETIC_FP8_OUTER,  // cuBLASLt, e4m3 with a scale for each row and column (sm_90)
    ARITHMETIC_FP8_TENSOR, // cuBLASLt, e4m3 without scales; rows and columns are scaled afterwards (sm_89, sm_120)
};

// A product of cuBLASLt that has been prepared.
struct gemm_entry {
    struct gemm problem; // pointers apart
    struct gemm_plan *plan;
};

enum {
    MAX_GEMM_PLANS = 512, // distinct products of one model
    // From so many sequences on, int4 decode is bound by arithmetic rather than by memory on most chips: integer tensor cores then. Chosen
    // by what the engine was started for, not by how many sequences happen to run (law 9).
    INT8_DECODE_SEQUENCES = 32,
    PROBLEM_BYTES = 256,
};

struct products {
    enum arithmetic arithmetic[2][WEIGHT_KIND_COUNT]; // by phase
    struct gemm_handle *gemm;                         // NULL: not needed, or the library is not there
    char gemm_problem[PROBLEM_BYTES];                 // why not, when it was wanted
    char fp4_problem[PROBLEM_BYTES];                  // likewise of ARITHMETIC_FP4
    struct gemm_entry plans[MAX_GEMM_PLANS];
    int num_plans;
};

uint64_t multiply_workspace_bytes(int sm) { return sm == 90 ? 32 << 20 : 4 << 20; }

static bool by_cublaslt(enum arithmetic arithmetic) { return arithmetic >= ARITHMETIC_GEMM_F16; }

// The own kernel for a kind, which exists for every shape.
static enum arithmetic own_kernel(enum weight_kind kind, enum phase phase, int64_t max_sequences)
{
    if (kind == WEIGHT_INT8)
        return ARITHMETIC_INT8;
    if (kind == WEIGHT_INT4 && (phase == PHASE_PREFILL || max_sequences >= INT8_DECODE_SEQUENCES))
        return ARITHMETIC_INT8;
    return ARITHMETIC_F16;
}

// Chips whose instructions multiply four-bit floats by eight-bit ones, with scales; code for them runs on no others.
static bool suits_fp4(enum weight_kind kind, int sm)
{
    return sm == 120 && (kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4);
}

// Apart from ARITHMETIC_FP4.
static enum arithmetic best_prefill(enum weight_kind kind, int sm)
{
    if (kind == WEIGHT_INT4Z)
        return ARITHMETIC_GEMM_F16;
    // Groups have scales of any size, which f16 cannot all hold; e2m1 times a power of two is a bf16.
    if (kind == WEIGHT_BF16 || kind == WEIGHT_FP8G || kind == WEIGHT_MXFP4 || kind == WEIGHT_NVFP4)
        return ARITHMETIC_GEMM_BF16;
    if (sm == 90 && (kind == WEIGHT_FP8 || kind == WEIGHT_INT4 || kind == WEIGHT_NL4))
        return ARITHMETIC_FP8_OUTER;
    if (kind == WEIGHT_NL4)
        return ARITHMETIC_GEMM_F16;
    if (kind == WEIGHT_FP8)
        return sm >= 89 ? ARITHMETIC_FP8_TENSOR : ARITHMETIC_GEMM_F16;
    return own_kernel(kind, PHASE_PREFILL, 0);
}

// Products without columns are zeros; where the rows of a result do not begin on 16 bytes the library does not go.
static bool suits_cublaslt(const struct matrix *w)
{
    return w->shape.cols > 0 && w->shape.rows > 0 && w->shape.rows % 4 == 0;
}

static enum arithmetic arithmetic_of(const struct device *d, const struct matrix *w)
{
    enum phase phase = w == &d->weights->head ? PHASE_DECODE : d->phase;
    enum arithmetic arithmetic = d->products->arithmetic[phase][w->shape.kind];
    if (by_cublaslt(arithmetic) && !suits_cublaslt(w))
        return own_kernel(w->shape.kind, phase, d->shape.max_sequences);
    return arithmetic;
}

enum input_format multiply_widening_input(enum weight_kind kind)
{
    return weight_is_tiled(kind) ? INPUT_F16_TILE : kind == WEIGHT_BF16 ? INPUT_BF16 : INPUT_F16;
}

enum input_format multiply_input(const struct device *d, const struct matrix *w)
{
    switch (arithmetic_of(d, w)) {
    case ARITHMETIC_INT8:
        return w->shape.kind == WEIGHT_INT4 ? INPUT_INT8_TILE : INPUT_INT8;
    case ARITHMETIC_FP8_OUTER:
    case ARITHMETIC_FP8_TENSOR:
        return INPUT_E4M3;
    case ARITHMETIC_GEMM_BF16:
        return INPUT_BF16;
    case ARITHMETIC_GEMM_F16:
        return INPUT_F16;
    case ARITHMETIC_FP4:
        return INPUT_MXFP8_TILE;
    case ARITHMETIC_F16:
        break;
    }
    return multiply_widening_input(w->shape.kind);
}

// ---- products by cuBLASLt ----------------------------------------------------------------------------------------

// Weights that do not lie in the file as cuBLASLt wants them are expanded, a slab of rows at a time.
static bool needs_slab(enum arithmetic arithmetic, enum weight_kind kind)
{
    return arithmetic == ARITHMETIC_GEMM_F16 || (arithmetic == ARITHMETIC_GEMM_BF16 && kind != WEIGHT_BF16) ||
           (arithmetic == ARITHMETIC_FP8_OUTER && kind != WEIGHT_FP8);
}

static int64_t slab_rows(enum arithmetic arithmetic, const struct matrix *w)
{
    uint64_t row_bytes = w->shape.cols_padded * (arithmetic == ARITHMETIC_FP8_OUTER ? 1 : 2);
    int64_t fit = (int64_t)(SLAB_BYTES / row_bytes) / WEIGHT_ROW_UNIT * WEIGHT_ROW_UNIT;
    fit = fit < WEIGHT_ROW_UNIT ? WEIGHT_ROW_UNIT : fit; // device_plan sees to it that so many always fit
    return needs_slab(arithmetic, w->shape.kind) && fit < (int64_t)w->shape.rows ? fit : (int64_t)w->shape.rows;
}

// Rows [begin, end) of w times m prepared rows.
static struct gemm make_gemm(const struct device *d, enum arithmetic arithmetic, const struct matrix *w, float *y,
                             int64_t begin, int64_t end, int64_t m)
{
    bool slab = needs_slab(arithmetic, w->shape.kind);
    int64_t k = (int64_t)w->shape.cols_padded, elem_bytes = arithmetic == ARITHMETIC_GEMM_BF16 ? 2 : 1;
    struct gemm gemm = {
        .m = m,
        .n = end - begin,
        .k = k,
        .in = GEMM_E4M3,
        .out = GEMM_F32,
        .x_stride = d->input.stride,
        .w_stride = k,
        .y_stride = (int64_t)w->shape.rows,
        .x = d->input.values,
        .w = slab ? d->slab : (const uint8_t *)w->data + begin * k * elem_bytes,
        .y = y + begin,
        .workspace_bytes = multiply_workspace_bytes(d->sm),
    };
    switch (arithmetic) {
    case ARITHMETIC_FP8_OUTER:
        gemm.scale = GEMM_SCALE_OUTER;
        gemm.x_scale = d->input.scale;
        gemm.w_scale = slab ? d->slab_scale : (const float *)w->scale + begin;
        break;
    case ARITHMETIC_FP8_TENSOR:
        gemm.scale = GEMM_SCALE_TENSOR;
        gemm.x_scale = gemm.w_scale = d->one;
        break;
    case ARITHMETIC_GEMM_BF16:
        gemm.in = GEMM_BF16;
        break;
    default:
        gemm.in = GEMM_F16;
        break;
    }
    return gemm;
}

static bool same_problem(const struct gemm *a, const struct gemm *b)
{
    return a->m == b->m && a->n == b->n && a->k == b->k && a->in == b->in && a->out == b->out && a->scale == b->scale &&
           a->x_stride == b->x_stride && a->w_stride == b->w_stride && a->y_stride == b->y_stride;
}

static const struct gemm_plan *find_plan(const struct products *p, const struct gemm *gemm)
{
    for (int i = 0; i < p->num_plans; i++)
        if (same_problem(&p->plans[i].problem, gemm))
            return p->plans[i].plan;
    return NULL;
}

static int add_plan(struct device *d, const struct gemm *gemm, struct error *err)
{
    struct products *p = d->products;
    int rc;
    if (find_plan(p, gemm))
        return 0;
    if (p->num_plans == MAX_GEMM_PLANS)
        return error_set(err, ERR_GPU, "device %d: the model has more than %d different matrix products", d->index,
                         MAX_GEMM_PLANS);
    if ((rc = gemm_check(gemm, d->sm, err)) || (rc = gemm_prepare(p->gemm, &p->plans[p->num_plans].plan, gemm, err)))
        return rc;
    p->plans[p->num_plans++].problem = *gemm;
    return 0;
}

static int64_t gemm_rows(int64_t rows) { return (int64_t)round_up((uint64_t)rows, GEMM_ROWS_STEP); }

// Plans for every number of rows that a step may have.
static int plan_matrix(struct device *d, enum arithmetic arithmetic, const struct matrix *w, float *y,
                       struct error *err)
{
    int64_t rows = (int64_t)w->shape.rows;
    int rc = 0;
    if (!suits_cublaslt(w))
        return 0;
    int64_t step = slab_rows(arithmetic, w);
    for (int64_t m = GEMM_ROWS_STEP; m <= d->rows_capacity && !rc; m += GEMM_ROWS_STEP)
        for (int64_t begin = 0; begin < rows && !rc; begin += step) {
            int64_t end = begin + step < rows ? begin + step : rows;
            struct gemm gemm = make_gemm(d, arithmetic, w, y, begin, end, m);
            rc = add_plan(d, &gemm, err);
        }
    return rc;
}

// The matrices of a layer that prefill multiplies by, and where their products go.
enum { LAYER_MATRICES = 8 };
struct use {
    const struct matrix *w;
    enum buffer out;
};
static void list_matrices(const struct layer *layer, struct use uses[LAYER_MATRICES])
{
    const struct use all[LAYER_MATRICES] = {
        {&layer->qkv, BUFFER_QKV},          {&layer->q_a, BUFFER_Q_LATENT},        {&layer->q_b, BUFFER_QKV},
        {&layer->kv_a, BUFFER_KV_LATENT},   {&layer->o, BUFFER_PARTIAL},           {&layer->router, BUFFER_ROUTER},
        {&layer->mlp.down, BUFFER_PARTIAL}, {&layer->mlp.gate_up, BUFFER_GATE_UP},
    };
    memcpy(uses, all, sizeof all);
}

static int plan_kind(struct device *d, enum arithmetic arithmetic, enum weight_kind kind, struct error *err)
{
    int rc = 0;
    for (int64_t i = 0; i < d->shape.desc->num_layers; i++) {
        struct use uses[LAYER_MATRICES];
        list_matrices(&d->weights->layers[i], uses);
        for (int j = 0; j < LAYER_MATRICES && !rc; j++)
            if (uses[j].w->data && uses[j].w->shape.kind == kind)
                rc = plan_matrix(d, arithmetic, uses[j].w, d->buffer[uses[j].out], err);
    }
    return rc;
}

static int run_gemm(struct device *d, enum arithmetic arithmetic, const struct matrix *w, float *y, int64_t rows,
                    struct error *err)
{
    const struct products *p = d->products;
    int64_t all = (int64_t)w->shape.rows, step = slab_rows(arithmetic, w);
    bool slab = needs_slab(arithmetic, w->shape.kind);
    enum slab_format slab_format = arithmetic == ARITHMETIC_GEMM_F16    ? SLAB_F16
                                   : arithmetic == ARITHMETIC_GEMM_BF16 ? SLAB_BF16
                                                                        : SLAB_E4M3;
    int rc;
    for (int64_t begin = 0; begin < all; begin += step) {
        int64_t end = begin + step < all ? begin + step : all;
        struct gemm gemm = make_gemm(d, arithmetic, w, y, begin, end, gemm_rows(rows));
        const struct gemm_plan *plan = find_plan(p, &gemm);
        if (!plan)
            return error_set(err, ERR_OTHER, "device %d: a product of %lld x %lld x %lld was not prepared", d->index,
                             (long long)gemm.m, (long long)gemm.n, (long long)gemm.k);
        if (slab && (rc = CHECK(launch_slab(d->slab, slab_format, slab_format == SLAB_E4M3 ? d->slab_scale : NULL, w,
                                            begin, end, d->stream),
                                "expanding weights")))
            return rc;
        if ((rc = gemm_run(p->gemm, plan, &gemm, d->stream, err)))
            return rc;
    }
    const float *columns = arithmetic == ARITHMETIC_FP8_TENSOR ? w->scale : NULL;
    if (arithmetic != ARITHMETIC_FP8_TENSOR && arithmetic != ARITHMETIC_GEMM_F16)
        return 0;
    return device_status(d, launch_scale(y, all, d->input.scale, columns, rows, all, d->stream), "scaling a product",
                         err);
}

int multiply(struct device *d, float *y, const struct matrix *w, int64_t rows, struct error *err)
{
    int64_t stride = (int64_t)w->shape.rows;
    enum arithmetic arithmetic = arithmetic_of(d, w);
    if (by_cublaslt(arithmetic))
        return run_gemm(d, arithmetic, w, y, rows, err);
    if (arithmetic == ARITHMETIC_INT8)
        return device_status(d, launch_linear_int8(y, stride, w, d->input, rows, d->stream), "an int8 matrix product",
                             err);
    if (arithmetic == ARITHMETIC_FP4)
        return device_status(d, launch_linear_fp4(y, stride, w, d->input, rows, d->stream), "a product of FP4 weights",
                             err);
    return device_status(d, launch_linear_f16(y, stride, w, d->input, rows, d->stream), "a matrix product", err);
}

// ---- choosing ------------------------------------------------------------------------------------------------------

// The first stays.
static void note_problem(char problem[PROBLEM_BYTES], const struct error *why)
{
    if (problem[0] == 0)
        snprintf(problem, PROBLEM_BYTES, "%.255s", why->msg);
}

// Whether cuBLASLt does what this kind needs: a small product comes out right, and every shape has an algorithm.
static int prove(struct device *d, enum arithmetic arithmetic, enum weight_kind kind, bool *proven, struct error *err)
{
    struct products *p = d->products;
    struct error why = {0};
    struct matrix any = {
        .shape = {.kind = kind, .cols_padded = ACT_GROUP, .rows = 4}, .data = d->slab, .scale = d->slab_scale};
    struct gemm example = make_gemm(d, arithmetic, &any, d->buffer[BUFFER_PARTIAL], 0, 4, GEMM_ROWS_STEP);
    if ((p->gemm || gemm_open(&p->gemm, multiply_workspace_bytes(d->sm), &why) == 0) &&
        gemm_probe(p->gemm, &example, &why) == 0 && plan_kind(d, arithmetic, kind, &why) == 0) {
        *proven = true;
        return 0;
    }
    note_problem(p->gemm_problem, &why);
    cudaGetLastError(); // what was tried here is forgiven, unless the device itself is broken
    return device_status(d, cudaStreamSynchronize(d->stream), "trying cuBLASLt", err);
}

// Whether sm_120's instructions do what they should.
static int prove_fp4(struct device *d, enum weight_kind kind, bool *proven, struct error *err)
{
    struct error why = {0};
    if (fp4_probe(kind, d->stream, &why) == 0) {
        *proven = true;
        return 0;
    }
    note_problem(d->products->fp4_problem, &why);
    cudaGetLastError();
    return device_status(d, cudaStreamSynchronize(d->stream), "trying FP4 instructions", err);
}

static bool has_kind(const struct device *d, enum weight_kind kind)
{
    for (int64_t i = 0; i < d->shape.desc->num_layers; i++) {
        struct use uses[LAYER_MATRICES];
        list_matrices(&d->weights->layers[i], uses);
        for (int j = 0; j < LAYER_MATRICES; j++)
            if (uses[j].w->data && uses[j].w->shape.kind == kind)
                return true;
    }
    return false;
}

// Kinds that a kernel multiplies by.
static bool is_supported(enum weight_kind kind) { return kind != WEIGHT_F32; }

int multiply_prepare(struct device *d, struct error *err)
{
    struct products *p = d->products = calloc(1, sizeof *p);
    if (!p)
        return error_set(err, ERR_MEMORY, "no memory for the plans of matrix products");
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++) {
        enum arithmetic wanted = best_prefill((enum weight_kind)kind, d->sm);
        p->arithmetic[PHASE_DECODE][kind] = own_kernel((enum weight_kind)kind, PHASE_DECODE, d->shape.max_sequences);
        p->arithmetic[PHASE_PREFILL][kind] = own_kernel((enum weight_kind)kind, PHASE_PREFILL, 0);
        bool proven = false;
        if (!is_supported((enum weight_kind)kind) &&
            (has_kind(d, (enum weight_kind)kind) || d->weights->head.shape.kind == (enum weight_kind)kind))
            return error_set(err, ERR_MODEL, "the CUDA backend does not multiply by %s weights; --backend cpu does",
                             weight_kind_name((enum weight_kind)kind));
        if (!has_kind(d, (enum weight_kind)kind))
            continue;
        int rc = 0;
        if (suits_fp4((enum weight_kind)kind, d->sm) &&
            (rc = prove_fp4(d, (enum weight_kind)kind, &proven, err)) == 0 && proven)
            wanted = ARITHMETIC_FP4;
        else if (rc == 0 && by_cublaslt(wanted))
            rc = prove(d, wanted, (enum weight_kind)kind, &proven, err);
        if (rc)
            return rc;
        if (proven)
            p->arithmetic[PHASE_PREFILL][kind] = wanted;
    }
    return 0;
}

void multiply_free(struct device *d)
{
    struct products *p = d->products;
    if (!p)
        return;
    for (int i = 0; i < p->num_plans; i++)
        gemm_plan_free(p->plans[i].plan);
    gemm_close(p->gemm);
    free(p);
    d->products = NULL;
}

static const char *arithmetic_name(enum arithmetic arithmetic, enum weight_kind kind)
{
    switch (arithmetic) {
    case ARITHMETIC_F16:
        return kind == WEIGHT_BF16 ? "bf16" : "f16";
    case ARITHMETIC_INT8:
        return "int8";
    case ARITHMETIC_FP4:
        return kind == WEIGHT_MXFP4 ? "FP4 x FP8, scaled by the tensor cores"
                                    : "FP8, FP4 widened, scaled by 16 columns";
    case ARITHMETIC_GEMM_F16:
        return "cuBLASLt f16";
    case ARITHMETIC_GEMM_BF16:
        return "cuBLASLt bf16";
    case ARITHMETIC_FP8_OUTER:
        return "cuBLASLt fp8, scales by row and column";
    case ARITHMETIC_FP8_TENSOR:
        break;
    }
    return "cuBLASLt fp8, scales by tensor";
}

bool multiply_expands(const struct device *d)
{
    const struct products *p = d->products;
    for (int kind = 0; p && kind < WEIGHT_KIND_COUNT; kind++)
        if (has_kind(d, (enum weight_kind)kind) &&
            needs_slab(p->arithmetic[PHASE_PREFILL][kind], (enum weight_kind)kind))
            return true;
    return false;
}

void multiply_describe(const struct device *d, char *text, size_t bytes)
{
    const struct products *p = d->products;
    size_t used = 0;
    text[0] = 0;
    if (!p)
        return;
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++) {
        if (!has_kind(d, (enum weight_kind)kind) || used >= bytes)
            continue;
        used += (size_t)snprintf(text + used, bytes - used, "%s%s weights: decode %s, prefill %s", used ? "; " : "",
                                 weight_kind_name((enum weight_kind)kind),
                                 arithmetic_name(p->arithmetic[PHASE_DECODE][kind], (enum weight_kind)kind),
                                 arithmetic_name(p->arithmetic[PHASE_PREFILL][kind], (enum weight_kind)kind));
    }
    if (d->shape.desc->experts.num_experts > 0 && used < bytes)
        used += (size_t)snprintf(text + used, bytes - used, "; experts f16 and bf16");
    if (p->gemm && used < bytes)
        used += (size_t)snprintf(text + used, bytes - used, "; %s", gemm_library(p->gemm));
    if (p->fp4_problem[0] && used < bytes)
        used += (size_t)snprintf(text + used, bytes - used, "; without FP4 instructions: %s", p->fp4_problem);
    if (p->gemm_problem[0] && used < bytes)
        snprintf(text + used, bytes - used, "; without cuBLASLt where it was wanted: %s", p->gemm_problem);
}

// Rotation: a model of made-up weights computes the same with rotated ones, in double; rows do not depend on how they are asked for; four
// bits hold heavy tails as they hold Gaussian rows; what cannot be rotated exactly is refused. That the engine agrees is test_rotation.py's.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/model.h"
#include "shard/build.h"
#include "shard/rotate.h"
#include "tests/random_help.h"

// ---- a model and its weights -----------------------------------------------------------------------------------------

enum { HIDDEN = 96, HEADS = 6, KV_HEADS = 3, HEAD_DIM = 24, MLP = 160, VOCAB = 70 };

static struct model_desc small_model(void)
{
    return (struct model_desc){
        .architecture = "LlamaForCausalLM",
        .num_layers = 2,
        .hidden_size = HIDDEN,
        .intermediate_size = MLP,
        .num_heads = HEADS,
        .num_kv_heads = KV_HEADS,
        .head_dim = HEAD_DIM,
        .rotary_dim = HEAD_DIM,
        .pre_norms = true,
        .qkv_bias = true,
        .o_bias = true,
        .mlp_bias = true,
        .tied_embeddings = true,
        .vocab_size = VOCAB,
        .context = 128,
    };
}

enum tails { UNIFORM, GAUSSIAN, STUDENT_5, OUTLIERS };
static enum tails tails;   // of the weights that the source makes up
static const char *broken; // a tensor whose row 3 holds a NaN

static double uniform(void) { return ((double)(random_bits() >> 11) + 0.5) * 0x1p-53; }
static double gaussian(void) { return sqrt(-2 * log(uniform())) * cos(2 * 3.14159265358979323846 * uniform()); }

static float made_up(void)
{
    double squares = 0;
    switch (tails) {
    case UNIFORM:
        return (float)(uniform() - 0.5);
    case GAUSSIAN:
        return (float)gaussian();
    case STUDENT_5:
        for (int i = 0; i < 5; i++) {
            double x = gaussian();
            squares += x * x;
        }
        return (float)(gaussian() / sqrt(squares / 5));
    case OUTLIERS:
        return (float)(gaussian() * (uniform() < 0.002 ? 8 : 1));
    }
    return 0;
}

static int made_read(const struct row_source *source, struct row_window *window, const struct row_request *request,
                     struct error *err)
{
    (void)source;
    (void)err;
    window->request = *request;
    return 0;
}

// The same row whenever it is asked for.
static int made_values(const struct row_source *source, struct row_window *window, uint64_t row, float *out,
                       struct error *err)
{
    (void)source;
    (void)err;
    const struct row_request *request = &window->request;
    const char *name = request->source->source;
    assert_true(row >= request->row_begin && row - request->row_begin < request->rows); // what was read
    random_state = row + 1;
    for (const char *c = name; *c; c++)
        random_state = random_state * 31 + (uint64_t)*c;
    for (int i = 0; i < 4; i++)
        random_bits();
    for (uint64_t i = 0; i < window->request.source->source_cols; i++)
        out[i] = strstr(name, "norm") ? 1 + made_up() : made_up();
    if (broken && strcmp(name, broken) == 0 && row == 3)
        out[5] = NAN;
    return 0;
}

static int made_row(const struct row_source *source, struct row_window *window, uint64_t row, struct packed_row *out,
                    struct error *err)
{
    float *values = malloc(window->request.source->source_cols * sizeof *values);
    int rc = made_values(source, window, row, values, err);
    if (!rc)
        rc = row_source_pack(out, &window->request, row, values, err);
    free(values);
    return rc;
}

static const struct row_source made = {.read = made_read, .row = made_row, .values = made_values};

struct rotated {
    struct plan *plan;
    struct rotate_source source;
};

static struct rotated rotated_of(const struct model_desc *model)
{
    struct rotated rotated = {0};
    struct model_desc turned = *model;
    struct error err = {0};
    struct plan_options options = {.quant = {.linear = WEIGHT_BF16, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16},
                                   .tp_size = 2};
    if (rotate_model(&turned, &options.quant.rotation, &err) || plan_make(&rotated.plan, &turned, &options, &err) ||
        rotate_plan(rotated.plan, model, &err) || rotate_source_init(&rotated.source, &made, rotated.plan, &err))
        fail_msg("%s", err.msg);
    return rotated;
}

static void free_rotated(struct rotated *rotated)
{
    rotate_source_clear(&rotated->source);
    plan_free(rotated->plan);
}

static uint64_t find(const struct plan *plan, enum tensor_role role, int layer)
{
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        if (plan->ranks[0].tensors[i].role == role && plan->ranks[0].tensors[i].layer == layer)
            return i;
    fail_msg("no %s", tensor_role_name(role));
    return 0;
}

static struct row_request request_of(const struct plan *plan, enum tensor_role role, int layer, int part)
{
    uint64_t index = find(plan, role, layer);
    const struct shard_tensor *tensor = &plan->ranks[0].tensors[index];
    assert_true(part < tensor->num_parts);
    return (struct row_request){.tensor = index,
                                .part = part,
                                .source = &tensor->parts[part],
                                .kind = tensor->shape.kind,
                                .rows = tensor->parts[part].source_rows};
}

// All rows of a part, as they are (source NULL) or rotated.
static float *rows_of(const struct rotated *rotated, const struct row_source *source, enum tensor_role role, int layer,
                      int part)
{
    struct row_request request = request_of(rotated->plan, role, layer, part);
    struct row_window window = {0};
    struct error err = {0};
    uint64_t cols = request.source->source_cols;
    float *out = malloc(request.rows * cols * sizeof *out);
    assert_non_null(out);
    if (source->read(source, &window, &request, &err))
        fail_msg("%s", err.msg);
    for (uint64_t row = 0; row < request.rows; row++)
        if (source->values(source, &window, row, out + row * cols, &err))
            fail_msg("%s", err.msg);
    row_window_free(&window);
    return out;
}

// ---- the same sums ---------------------------------------------------------------------------------------------------

// y = w * (x * gain) + bias
static void multiply(double *y, const float *w, const double *x, const float *gain, const float *bias, int rows,
                     int cols)
{
    for (int r = 0; r < rows; r++) {
        y[r] = bias ? bias[r] : 0;
        for (int c = 0; c < cols; c++)
            y[r] += (double)w[r * cols + c] * x[c] * (gain ? gain[c] : 1);
    }
}

static void assert_close(const double *got, const double *want, int count, const char *what)
{
    double error = 0, squares = 0;
    for (int i = 0; i < count; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        squares += want[i] * want[i];
    }
    if (!(error <= 1e-10 * squares && squares > 0)) // f32 rounds each weight a dozen times: some 1e-7
        fail_msg("%s: relative error %g", what, sqrt(error / squares));
}

// What one block does to a residual row, seen through the head; rotated weights and a rotated row must give the same.
struct outcome {
    double q[HEADS * HEAD_DIM], k[KV_HEADS * HEAD_DIM], after_o[VOCAB], gate[MLP], after_down[VOCAB];
};

static void run_block(struct outcome *out, const struct rotated *rotated, const struct row_source *source, int layer,
                      const struct kernels *rotation)
{
    enum { Q = HEADS * HEAD_DIM, KV = KV_HEADS * HEAD_DIM };
    static const enum tensor_role roles[] = {ROLE_EMBEDDING, ROLE_ATTENTION_NORM, ROLE_O,
                                             ROLE_O_BIAS,    ROLE_MLP_NORM,       ROLE_DOWN,
                                             ROLE_HEAD,      ROLE_FINAL_NORM,     ROLE_DOWN_BIAS};
    enum { EMBEDDING, ATTENTION_NORM, O, O_BIAS, MLP_NORM, DOWN, HEAD, FINAL_NORM, DOWN_BIAS, COUNT };
    float *w[COUNT], *qkv[3], *qkv_bias[3], *gate_up[2], *gate_up_bias[2], rows[MLP];
    double x[HIDDEN], y[HIDDEN], v[KV], values[Q], up[MLP], a[MLP];
    for (int i = 0; i < COUNT; i++)
        w[i] = rows_of(rotated, source, roles[i], i == EMBEDDING || i == HEAD || i == FINAL_NORM ? -1 : layer, 0);
    for (int p = 0; p < 3; p++) {
        qkv[p] = rows_of(rotated, source, ROLE_QKV, layer, p);
        qkv_bias[p] = rows_of(rotated, source, ROLE_QKV_BIAS, layer, p);
    }
    for (int p = 0; p < 2; p++) {
        gate_up[p] = rows_of(rotated, source, ROLE_GATE_UP, layer, p);
        gate_up_bias[p] = rows_of(rotated, source, ROLE_GATE_UP_BIAS, layer, p);
    }
    for (int i = 0; i < HIDDEN; i++)
        x[i] = w[EMBEDDING][7 * HIDDEN + i];
    multiply(out->q, qkv[0], x, w[ATTENTION_NORM], qkv_bias[0], Q, HIDDEN);
    multiply(out->k, qkv[1], x, w[ATTENTION_NORM], qkv_bias[1], KV, HIDDEN);
    multiply(v, qkv[2], x, w[ATTENTION_NORM], qkv_bias[2], KV, HIDDEN);
    for (int i = 0; i < Q; i++) // one position: each query head takes its kv head's values
        values[i] = v[i / HEAD_DIM / (HEADS / KV_HEADS) * HEAD_DIM + i % HEAD_DIM];
    multiply(y, w[O], values, NULL, w[O_BIAS], HIDDEN, Q);
    multiply(out->after_o, w[HEAD], y, w[FINAL_NORM], NULL, VOCAB, HIDDEN);
    multiply(out->gate, gate_up[0], x, w[MLP_NORM], gate_up_bias[0], MLP, HIDDEN);
    multiply(up, gate_up[1], x, w[MLP_NORM], gate_up_bias[1], MLP, HIDDEN);
    for (int i = 0; i < MLP; i++)
        rows[i] = (float)(out->gate[i] / (1 + exp(-out->gate[i])) * up[i]);
    if (rotation)
        rotation->hadamard(rows, MLP, rotated->plan->model.mlp_rotation);
    for (int i = 0; i < MLP; i++)
        a[i] = rows[i];
    multiply(y, w[DOWN], a, NULL, w[DOWN_BIAS], HIDDEN, MLP);
    multiply(out->after_down, w[HEAD], y, w[FINAL_NORM], NULL, VOCAB, HIDDEN);
    for (int i = 0; i < COUNT; i++)
        free(w[i]);
    for (int p = 0; p < 3; p++) {
        free(qkv[p]);
        free(qkv_bias[p]);
    }
    for (int p = 0; p < 2; p++) {
        free(gate_up[p]);
        free(gate_up_bias[p]);
    }
}

static void computes_the_same(void **state)
{
    (void)state;
    struct model_desc model = small_model();
    struct rotated rotated = rotated_of(&model);
    tails = UNIFORM;
    assert_int_equal(rotated.plan->quant.rotation, 32);
    assert_int_equal(rotated.plan->model.mlp_rotation, 32);
    for (int layer = 0; layer < 2; layer++) {
        struct outcome plain, turned;
        run_block(&plain, &rotated, &made, layer, NULL);
        run_block(&turned, &rotated, &rotated.source.source, layer, rotated.source.kernels);
        assert_close(turned.q, plain.q, HEADS * HEAD_DIM, "q");
        assert_close(turned.k, plain.k, KV_HEADS * HEAD_DIM, "k");
        assert_close(turned.after_o, plain.after_o, VOCAB, "o");
        assert_close(turned.gate, plain.gate, MLP, "gate");
        assert_close(turned.after_down, plain.after_down, VOCAB, "down");
    }
    // Something was done, and norms multiply by nothing any more.
    float *plain = rows_of(&rotated, &made, ROLE_DOWN, 0, 0),
          *turned = rows_of(&rotated, &rotated.source.source, ROLE_DOWN, 0, 0);
    double change = 0;
    for (int i = 0; i < HIDDEN * MLP; i++)
        change += fabs(plain[i] - turned[i]);
    assert_true(change > 0.1 * HIDDEN * MLP);
    free(plain);
    free(turned);
    turned = rows_of(&rotated, &rotated.source.source, ROLE_FINAL_NORM, -1, 0);
    for (int i = 0; i < HIDDEN; i++)
        assert_true(turned[i] == 1);
    free(turned);
    free_rotated(&rotated);
}

// ---- rows ------------------------------------------------------------------------------------------------------------

// Bands begin and end anywhere, and a window goes from one tensor to the next.
static void rows_by_themselves(void **state)
{
    (void)state;
    struct model_desc model = small_model();
    struct rotated rotated = rotated_of(&model);
    const struct row_source *source = &rotated.source.source;
    static const struct {
        enum tensor_role role;
        int layer, part;
    } parts[] = {{ROLE_DOWN, 1, 0},    {ROLE_O, 0, 0},          {ROLE_QKV, 1, 2},  {ROLE_QKV, 0, 2},
                 {ROLE_GATE_UP, 1, 1}, {ROLE_EMBEDDING, -1, 0}, {ROLE_HEAD, -1, 0}};
    struct row_window window = {0};
    float row[2 * MLP];
    tails = GAUSSIAN;
    for (int round = 0; round < 300; round++) {
        size_t p = (size_t)round % (sizeof parts / sizeof *parts);
        struct row_request request = request_of(rotated.plan, parts[p].role, parts[p].layer, parts[p].part);
        struct error err = {0};
        uint64_t all = request.rows, cols = request.source->source_cols;
        float *whole = rows_of(&rotated, source, parts[p].role, parts[p].layer, parts[p].part);
        random_state = (uint64_t)round + 1;
        random_bits();
        request.row_begin = random_bits() % all;
        request.rows = 1 + random_bits() % (all - request.row_begin);
        assert_int_equal(source->read(source, &window, &request, &err), 0);
        for (uint64_t i = 0; i < request.rows; i += 5) { // forwards and back
            uint64_t r = request.row_begin + (round % 2 ? request.rows - 1 - i : i);
            assert_int_equal(source->values(source, &window, r, row, &err), 0);
            assert_memory_equal(row, whole + r * cols, cols * sizeof *row);
        }
        free(whole);
    }
    row_window_free(&window);
    free_rotated(&rotated);
}

static void what_is_not_finite_is_named(void **state)
{
    (void)state;
    struct model_desc model = small_model();
    struct rotated rotated = rotated_of(&model);
    const struct row_source *source = &rotated.source.source;
    struct row_request request = request_of(rotated.plan, ROLE_DOWN, 0, 0);
    struct row_window window = {0};
    struct error err = {0};
    float row[MLP];
    broken = "model.layers.0.mlp.down_proj.weight";
    assert_int_equal(source->read(source, &window, &request, &err), 0);
    assert_int_equal(source->values(source, &window, 9, row, &err), ERR_MODEL); // of the same block
    assert_string_equal(err.msg, "tensor model.layers.0.mlp.down_proj.weight, row 3: column 5 is not a finite number");
    assert_int_equal(source->values(source, &window, 33, row, &err), 0);
    broken = NULL;
    row_window_free(&window);
    free_rotated(&rotated);
}

// A search for scales leaves 9.7 % of Gaussian rows, 14 and 15 % of those with heavy tails; rotated, all are Gaussian.
static void four_bits_hold_heavy_tails(void **state)
{
    (void)state;
    enum { COLS = 1024, ROWS = 256 };
    static const struct {
        enum tails tails;
        double at_most;
    } cases[] = {{GAUSSIAN, 0.098}, {STUDENT_5, 0.098}, {OUTLIERS, 0.098}};
    struct model_desc model = small_model();
    model.hidden_size = COLS;
    model.intermediate_size = COLS;
    model.head_dim = 128;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tails = cases[i].tails;
        struct rotated rotated = rotated_of(&model);
        const struct row_source *source = &rotated.source.source;
        static const enum tensor_role roles[] = {ROLE_DOWN, ROLE_O};
        for (int r = 0; r < 2; r++) {
            struct row_request request = request_of(rotated.plan, roles[r], 0, 0);
            struct row_window window = {0};
            struct packed_row packed;
            struct error err = {0};
            float values[COLS], back[COLS];
            double error = 0, squares = 0;
            request.kind = WEIGHT_INT4;
            request.group_size = 128;
            uint64_t cols = request.source->source_cols;
            assert_true(cols <= COLS);
            void *memory = malloc(packed_row_bytes(WEIGHT_INT4, 128, cols));
            packed_row_place(&packed, memory, WEIGHT_INT4, 128, cols);
            assert_int_equal(source->read(source, &window, &request, &err), 0);
            for (uint64_t row = 0; row < ROWS; row++) {
                assert_int_equal(source->values(source, &window, row, values, &err), 0);
                assert_int_equal(source->row(source, &window, row, &packed, &err), 0);
                pack_dequantize_row(back, &packed, WEIGHT_INT4, 128, cols);
                for (uint64_t c = 0; c < cols; c++) {
                    error += (double)(back[c] - values[c]) * (back[c] - values[c]);
                    squares += (double)values[c] * values[c];
                }
            }
            double relative = sqrt(error / squares);
            if (!(relative <= cases[i].at_most && relative >= 0.08))
                fail_msg("tails %d, %s: %.2f %%", cases[i].tails, tensor_role_name(roles[r]), 100 * relative);
            free(memory);
            row_window_free(&window);
        }
        free_rotated(&rotated);
    }
    tails = UNIFORM;
}

// ---- what is rotated -------------------------------------------------------------------------------------------------

static void blocks(void **state)
{
    (void)state;
    static const struct {
        int64_t count;
        uint32_t block;
    } cases[] = {{4096, 128}, {2880, 64}, {14336, 128}, {96, 32}, {84, 4},
                 {10, 0},     {3, 0},     {0, 0},       {4, 4},   {11008, 128}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(rotate_block(cases[i].count), cases[i].block);
}

static void models(void **state)
{
    (void)state;
    static const struct {
        bool pre_norms, post_norms;
        int64_t hidden, mlp, expert, shared;
        const char *refusal;
        uint32_t block;
        int64_t mlp_block;
    } cases[] = {
        {true, false, 4096, 14336, 0, 0, NULL, 128, 128},
        {true, false, 2880, 0, 2880, 0, NULL, 64, 64},
        {true, false, 2048, 10944, 1408, 2816, NULL, 128, 64}, // 10944 = 171 * 64
        {true, false, 2048, 14336, 768, 10, NULL, 128, 0},     // one mlp cannot be: none is
        {true, true, 4096, 14336, 0, 0, "norms what attention and mlp put out", 0, 0},
        {false, true, 4096, 14336, 0, 0, "norms what attention and mlp put out", 0, 0},
        {true, false, 4098, 14336, 0, 0, "hidden size, 4098, cannot be cut into blocks of 4", 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_desc model = small_model();
        struct error err = {0};
        uint32_t block = 0;
        model.pre_norms = cases[i].pre_norms;
        model.post_norms = cases[i].post_norms;
        model.hidden_size = cases[i].hidden;
        model.intermediate_size = cases[i].mlp;
        model.experts.expert_size = cases[i].expert;
        model.experts.shared_size = cases[i].shared;
        int rc = rotate_model(&model, &block, &err);
        if (cases[i].refusal) {
            assert_int_equal(rc, ERR_MODEL);
            if (!strstr(err.msg, cases[i].refusal))
                fail_msg("'%s' does not say '%s'", err.msg, cases[i].refusal);
            continue;
        }
        assert_int_equal(rc, 0);
        assert_int_equal(block, cases[i].block);
        assert_int_equal(model.mlp_rotation, cases[i].mlp_block);
        assert_false(model.tied_embeddings);
    }
}

// No rank's share of mlp columns ends within a block, and the head is read from the embedding.
static void plans(void **state)
{
    (void)state;
    struct model_desc model = small_model();
    for (uint32_t tp = 1; tp <= 8; tp++) {
        struct model_desc turned = model;
        struct plan *plan;
        struct error err = {0};
        struct plan_options options = {.quant = {.linear = WEIGHT_BF16, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16},
                                       .tp_size = tp};
        assert_int_equal(rotate_model(&turned, &options.quant.rotation, &err), 0);
        assert_int_equal(plan_make(&plan, &turned, &options, &err), 0);
        assert_int_equal(rotate_plan(plan, &model, &err), 0);
        for (uint32_t rank = 0; rank < tp; rank++) {
            assert_int_equal(plan->ranks[rank].share.mlp_begin % 32, 0);
            assert_int_equal(plan->ranks[rank].share.intermediate_local % 32, 0);
        }
        uint64_t head = find(plan, ROLE_HEAD, -1);
        assert_string_equal(plan->sources[head][0].tensor, "model.embed_tokens.weight");
        assert_string_equal(plan->ranks[0].tensors[head].parts[0].source, "lm_head.weight");
        plan_free(plan);
    }
}

// ---- a directory that lies -------------------------------------------------------------------------------------------

static int no_frequencies(const struct row_source *source, uint64_t tensor, float *out, uint64_t values,
                          struct error *err)
{
    (void)source;
    (void)tensor;
    (void)err;
    memset(out, 0, values * sizeof *out);
    return 0;
}

static int no_sources(void *arg, struct manifest *manifest, struct error *err)
{
    (void)arg;
    (void)manifest;
    (void)err;
    return 0;
}

// Shares whose ends lie within a block that the engine would rotate: whole and checksummed, but not what tpshard plans.
static void a_cut_block_is_refused(void **state)
{
    (void)state;
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    char dir[256], command[300];
    snprintf(dir, sizeof dir, "%s/tests/test_rotate.%d", build, (int)getpid());
    snprintf(command, sizeof command, "rm -rf %s", dir);
    for (int64_t block = 2; block <= 32; block += 30) { // three ranks hold 53, 53 and 54 of 160 columns, or 54 and 52
        struct model_desc model = small_model();
        struct row_source source = made;
        struct extras extras = {0};
        struct plan *plan;
        struct manifest *manifest = NULL;
        struct model opened;
        struct error err = {0};
        struct build_result result;
        struct plan_options options = {.quant = {.linear = WEIGHT_BF16, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16},
                                       .tp_size = 3};
        uint32_t rotation;
        source.computed = no_frequencies;
        assert_int_equal(rotate_model(&model, &rotation, &err), 0);
        model.norm_eps = 1e-5;
        model.embedding_scale = model.residual_scale = model.logit_scale = model.attention_scale = 1;
        model.rope_attention_factor = 1;
        model.bos_token_id = model.default_top_k = -1;
        model.default_temperature = model.default_top_p = model.default_repetition_penalty = NAN;
        model.mlp_rotation = 2;
        assert_int_equal(plan_make(&plan, &model, &options, &err), 0);
        plan->quant.rotation = rotation;
        plan->model.mlp_rotation = block;
        const struct build_input input = {
            .plan = plan, .source = &source, .extras = &extras, .what = "test", .sources = no_sources};
        const struct build_options how = {.out_dir = dir, .force = true, .quiet = true, .threads = 1};
        if (build_directory(&result, &input, &how, &err) || manifest_read(&manifest, dir, &err))
            fail_msg("%s", err.msg);
        int rc = model_open(&opened, dir, NULL, manifest, 0, NULL, &err);
        assert_int_equal(rc, block == 2 ? 0 : ERR_CORRUPT);
        if (rc)
            assert_non_null(strstr(err.msg, "share of heads, mlp or vocabulary does not fit"));
        else
            model_close(&opened);
        manifest_free(manifest);
        plan_free(plan);
        assert_int_equal(system(command), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(computes_the_same),
        cmocka_unit_test(rows_by_themselves),
        cmocka_unit_test(what_is_not_finite_is_named),
        cmocka_unit_test(four_bits_hold_heavy_tails),
        cmocka_unit_test(blocks),
        cmocka_unit_test(models),
        cmocka_unit_test(plans),
        cmocka_unit_test(a_cut_block_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

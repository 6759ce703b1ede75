// The CPU backend's mixture of experts against double arithmetic: every router, experts cut or dealt out whole, rows in any company.
#include "formats/number_formats.h"
#include "kernels/backend.h"
#include "kernels/buffers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/floats_help.h"

enum { HIDDEN = 64, EXPERTS = 12, SIZE = 96, SHARED = 80, VOCAB = 64, ROWS = 23, MAX_SHARE = 3 };

// ---- a model of one layer ----------------------------------------------------------------------------------------

// The whole model's numbers, exact bfloat16, and one rank's matrices cut from them.
struct model {
    struct model_desc desc;
    float embedding[VOCAB * HIDDEN], norm[HIDDEN], router[(EXPERTS + 1) * HIDDEN];
    float router_bias[EXPERTS], choice_bias[EXPERTS];
    float gate_up[EXPERTS][2 * SIZE * HIDDEN], down[EXPERTS][HIDDEN * SIZE];
    float gate_up_bias[EXPERTS][2 * SIZE], down_bias[EXPERTS][HIDDEN];
    float shared_gate_up[2 * SHARED * HIDDEN], shared_down[HIDDEN * SHARED];
};

static void fill(float *x, size_t count, float scale)
{
    for (size_t i = 0; i < count; i++)
        x[i] = bf16_to_f32(f32_to_bf16(uniform() * scale));
}

static struct model *model_new(const struct experts_desc *experts)
{
    struct model *m = zeroed(sizeof *m);
    m->desc = (struct model_desc){.num_layers = 1,
                                  .layer_flags = {LAYER_EXPERTS},
                                  .hidden_size = HIDDEN,
                                  .num_heads = 1,
                                  .num_kv_heads = 1,
                                  .head_dim = 16,
                                  .vocab_size = VOCAB,
                                  .norm_eps = 1e-6,
                                  .residual_scale = 1,
                                  .logit_scale = 1,
                                  .rotary_dim = 16,
                                  .rope_attention_factor = 1,
                                  .experts = *experts};
    fill(m->embedding, VOCAB * HIDDEN, 1);
    fill(m->norm, HIDDEN, 1);
    fill(m->router, (EXPERTS + 1) * HIDDEN, 1);
    fill(m->router_bias, EXPERTS, 1);
    fill(m->choice_bias, EXPERTS, 1);
    for (int e = 0; e < EXPERTS; e++) {
        fill(m->gate_up[e], 2 * SIZE * HIDDEN, 0.3f);
        fill(m->down[e], HIDDEN * SIZE, 0.3f);
        fill(m->gate_up_bias[e], 2 * SIZE, 1);
        fill(m->down_bias[e], HIDDEN, 1);
    }
    fill(m->shared_gate_up, 2 * SHARED * HIDDEN, 0.3f);
    fill(m->shared_down, HIDDEN * SHARED, 0.3f);
    return m;
}

// Rows [row, row + rows) and, below them, [row2, row2 + rows) (gate and up; rows2 false: only the first), columns [col, col + cols).
static struct matrix cut(const float *from, int64_t stride, int64_t row, int64_t row2, int64_t rows, int64_t col,
                         int64_t cols)
{
    struct matrix m;
    int64_t parts = row2 >= 0 ? 2 : 1;
    assert_true(weight_shape_make(&m.shape, WEIGHT_BF16, 0, (uint64_t)(parts * rows), (uint64_t)cols));
    uint16_t *data = zeroed((size_t)m.shape.data_bytes + 1);
    for (int64_t p = 0; p < parts; p++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < cols; c++)
                data[(p * rows + r) * (int64_t)m.shape.cols_padded + c] =
                    f32_to_bf16(from[((p ? row2 : row) + r) * stride + col + c]);
    m.data = data;
    m.scale = NULL;
    return m;
}

static struct mlp cut_mlp(const float *gate_up, const float *down, int64_t size, int64_t begin, int64_t count)
{
    return (struct mlp){.gate_up = cut(gate_up, HIDDEN, begin, size + begin, count, 0, HIDDEN),
                        .down = cut(down, size, 0, -1, HIDDEN, begin, count)};
}

static void mlp_free(struct mlp *mlp)
{
    free((void *)mlp->gate_up.data);
    free((void *)mlp->down.data);
    free((void *)mlp->gate_up_bias);
}

// ---- double arithmetic -------------------------------------------------------------------------------------------

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static double activation(const struct model_desc *d, double gate, double up)
{
    if (d->activation == ACTIVATION_GPT_OSS)
        return (fmax(fmin(up, 7), -7) + 1) * fmin(gate, 7) * sigmoid(1.702 * fmin(gate, 7));
    return gate * sigmoid(gate) * up;
}

// Whether the kernels that are tested round activations to bf16; then the references do so too, and choose the same experts.
static bool rounds(void);

static double as_activation(double x) { return rounds() ? (double)bf16_to_f32(f32_to_bf16((float)x)) : x; }

static void mlp_reference(const struct model_desc *d, double out[HIDDEN], const double *x, const float *gate_up,
                          const float *gate_up_bias, const float *down, int64_t size, double factor)
{
    double *h = zeroed((size_t)(2 * size) * sizeof *h);
    for (int64_t r = 0; r < 2 * size; r++) {
        h[r] = gate_up_bias ? gate_up_bias[r] : 0;
        for (int i = 0; i < HIDDEN; i++)
            h[r] += x[i] * gate_up[r * HIDDEN + i];
    }
    for (int64_t r = 0; r < size; r++)
        h[r] = as_activation(activation(d, h[r], h[size + r]));
    for (int i = 0; i < HIDDEN; i++)
        for (int64_t r = 0; r < size; r++)
            out[i] += factor * h[r] * down[i * size + r];
    free(h);
}

// Straight from the papers' formulas, by sorting; weight[e] is 0 for experts that were not chosen.
static void route_reference(const struct model *m, const double *logit, double weight[EXPERTS])
{
    const struct experts_desc *e = &m->desc.experts;
    double score[EXPERTS], choice[EXPERTS], sum = 0, largest = -INFINITY;
    bool open[EXPERTS], chosen[EXPERTS] = {false};
    for (int i = 0; i < EXPERTS; i++)
        largest = fmax(largest, logit[i]);
    for (int i = 0; i < EXPERTS; i++)
        sum += exp(logit[i] - largest);
    for (int i = 0; i < EXPERTS; i++) {
        score[i] = e->router == ROUTER_SIGMOID   ? sigmoid(logit[i])
                   : e->router == ROUTER_SOFTMAX ? exp(logit[i] - largest) / sum
                                                 : logit[i];
        choice[i] = score[i] + (e->choice_bias ? m->choice_bias[i] : 0);
    }
    int64_t size = EXPERTS / e->num_groups;
    double rating[EXPERTS];
    for (int64_t g = 0; g < e->num_groups; g++) {
        double best = -INFINITY, second = -INFINITY;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > best) {
                second = best;
                best = choice[i];
            } else if (choice[i] > second) {
                second = choice[i];
            }
        }
        rating[g] = best + (e->group_members == 2 ? second : 0);
    }
    for (int64_t i = 0; i < EXPERTS; i++) {
        int64_t better = 0;
        for (int64_t g = 0; g < e->num_groups; g++)
            better += rating[g] > rating[i / size];
        open[i] = better < e->groups_per_token;
    }
    for (int64_t i = 0; i < EXPERTS; i++) {
        int64_t better = 0;
        for (int64_t j = 0; j < EXPERTS; j++)
            better += open[j] && choice[j] > choice[i];
        chosen[i] = open[i] && better < e->experts_per_token;
    }
    sum = 0;
    for (int i = 0; i < EXPERTS; i++) {
        weight[i] = !chosen[i] ? 0 : e->router == ROUTER_CHOSEN_SOFTMAX ? exp(score[i]) : score[i];
        sum += weight[i];
    }
    for (int i = 0; i < EXPERTS; i++)
        weight[i] *= e->scale / (e->normalise || e->router == ROUTER_CHOSEN_SOFTMAX ? sum : 1);
}

static void row_reference(const struct model *m, double out[HIDDEN], uint32_t token)
{
    const struct experts_desc *e = &m->desc.experts;
    double x[HIDDEN], logit[EXPERTS + 1], weight[EXPERTS], squares = 0;
    for (int i = 0; i < HIDDEN; i++)
        squares += (double)m->embedding[token * HIDDEN + i] * m->embedding[token * HIDDEN + i];
    for (int i = 0; i < HIDDEN; i++)
        x[i] = as_activation(m->embedding[token * HIDDEN + i] / sqrt(squares / HIDDEN + m->desc.norm_eps) * m->norm[i]);
    for (int r = 0; r <= EXPERTS; r++) {
        logit[r] = r < EXPERTS && e->router_bias ? m->router_bias[r] : 0;
        for (int i = 0; i < HIDDEN; i++)
            logit[r] += x[i] * m->router[r * HIDDEN + i];
    }
    route_reference(m, logit, weight);
    memset(out, 0, HIDDEN * sizeof *out);
    if (e->shared_size > 0)
        mlp_reference(&m->desc, out, x, m->shared_gate_up, NULL, m->shared_down, SHARED,
                      e->shared_gate ? sigmoid(logit[EXPERTS]) : 1);
    for (int i = 0; i < EXPERTS; i++) {
        if (weight[i] == 0)
            continue;
        mlp_reference(&m->desc, out, x, m->gate_up[i], e->bias ? m->gate_up_bias[i] : NULL, m->down[i], SIZE,
                      weight[i]);
        for (int j = 0; j < HIDDEN && e->bias; j++)
            out[j] += weight[i] * m->down_bias[i][j];
    }
}

// ---- one rank ----------------------------------------------------------------------------------------------------

static const char *wanted_kernels = "auto";

// Runs rows [first, first + count) through embed, norm, router and experts of a rank; out [count][HIDDEN] += its part.
static void run_rank(const struct model *m, const struct rank_share *share, const struct token_row *rows, int64_t count,
                     int threads, float *out)
{
    const struct experts_desc *e = &m->desc.experts;
    const struct backend *b = &backend_cpu;
    struct error err;
    struct thread_pool *pool;
    struct device *device;
    struct mlp experts[EXPERTS] = {0};
    struct layer layer = {.flags = LAYER_EXPERTS,
                          .router = cut(m->router, HIDDEN, 0, -1, EXPERTS + e->shared_gate, 0, HIDDEN),
                          .router_bias = e->router_bias ? m->router_bias : NULL,
                          .choice_bias = e->choice_bias ? m->choice_bias : NULL,
                          .experts = experts};
    for (int64_t i = 0; i < share->num_experts_local; i++) {
        int64_t id = share->expert_begin + i, begin = share->expert_mlp_begin, size = share->expert_size_local;
        experts[i] = cut_mlp(m->gate_up[id], m->down[id], SIZE, begin, size);
        if (!e->bias)
            continue;
        float *bias = zeroed((size_t)(2 * size + 1) * sizeof *bias);
        memcpy(bias, m->gate_up_bias[id] + begin, (size_t)size * sizeof *bias);
        memcpy(bias + size, m->gate_up_bias[id] + SIZE + begin, (size_t)size * sizeof *bias);
        experts[i].gate_up_bias = bias;
        experts[i].down_bias = m->down_bias[id];
    }
    if (e->shared_size > 0)
        layer.mlp = cut_mlp(m->shared_gate_up, m->shared_down, SHARED, share->shared_begin, share->shared_size_local);
    struct weights weights = {.embedding = cut(m->embedding, HIDDEN, 0, -1, VOCAB, 0, HIDDEN), .layers = &layer};
    static const float inv_freq[8];
    weights.rope = inv_freq;
    struct device_shape shape = {
        .desc = &m->desc, .share = share, .max_rows = ROWS, .max_sequences = 1, .context = 64, .num_pages = 1};
    const struct kernels *kernels;
    int32_t page = 0;
    struct kv_pages pages = {.pages = &page, .pages_per_sequence = 1};

    assert_int_equal(kernels_select(&kernels, wanted_kernels, &err), 0);
    assert_int_equal(thread_pool_create(&pool, threads, &err), 0);
    struct device_options options = {.kernels = kernels, .pool = pool, .tp_size = 1};
    assert_int_equal(b->open(&device, &options, &err), 0);
    assert_int_equal(b->prepare(device, &shape, &weights, &err), 0);
    assert_int_equal(b->begin(device, rows, count, PHASE_PREFILL, &pages, &err), 0);
    assert_int_equal(b->embed(device, &err), 0);
    assert_int_equal(b->norm(device, NULL, m->norm, NULL, &layer.router, &err), 0);
    assert_int_equal(b->linear(device, BUFFER_ROUTER, &layer.router, &err), 0);
    assert_int_equal(b->route(device, 0, &err), 0);
    if (e->shared_size > 0) {
        assert_int_equal(b->linear(device, BUFFER_GATE_UP, &layer.mlp.gate_up, &err), 0);
        assert_int_equal(b->activate(device, &layer.mlp, &err), 0);
        assert_int_equal(b->linear(device, BUFFER_PARTIAL, &layer.mlp.down, &err), 0);
    }
    assert_int_equal(b->experts(device, 0, &err), 0);
    float *partial;
    assert_int_equal(b->lend(device, BUFFER_PARTIAL, false, &partial, &err), 0);
    for (int64_t i = 0; i < count * HIDDEN; i++)
        out[i] += partial[i];
    b->close(device);
    thread_pool_free(pool);
    free((void *)weights.embedding.data);
    free((void *)layer.router.data);
    mlp_free(&layer.mlp);
    for (int i = 0; i < EXPERTS; i++)
        mlp_free(&experts[i]);
}

// ---- tests -------------------------------------------------------------------------------------------------------

static const struct experts_desc cases[] = {
    {.router = ROUTER_SOFTMAX, .experts_per_token = 3, .normalise = true, .num_groups = 1, .groups_per_token = 1},
    {.router = ROUTER_SOFTMAX,
     .experts_per_token = 4,
     .num_groups = 1,
     .groups_per_token = 1,
     .shared_size = SHARED,
     .shared_gate = true},
    {.router = ROUTER_CHOSEN_SOFTMAX,
     .experts_per_token = 4,
     .num_groups = 1,
     .groups_per_token = 1,
     .router_bias = true,
     .bias = true},
    {.router = ROUTER_SOFTMAX,
     .experts_per_token = 3,
     .num_groups = 4,
     .groups_per_token = 2,
     .group_members = 1,
     .shared_size = SHARED},
    {.router = ROUTER_SIGMOID,
     .experts_per_token = 5,
     .normalise = true,
     .num_groups = 3,
     .groups_per_token = 2,
     .group_members = 2,
     .choice_bias = true,
     .shared_size = SHARED},
    {.router = ROUTER_SOFTMAX, .experts_per_token = EXPERTS, .num_groups = 1, .groups_per_token = 1},
};

static struct model *case_model(size_t c)
{
    struct experts_desc e = cases[c];
    e.num_experts = EXPERTS;
    e.expert_size = SIZE;
    e.scale = c == 4 ? 2.5 : 1;
    struct model *m = model_new(&e);
    m->desc.activation = e.bias ? ACTIVATION_GPT_OSS : ACTIVATION_SILU;
    return m;
}

static void make_rows(struct token_row rows[ROWS])
{
    for (int i = 0; i < ROWS; i++)
        rows[i] = (struct token_row){.token = (uint32_t)(i * 7 % VOCAB), .position = i};
}

// Asked for each number of a reference; a processor is asked once, which takes long in a virtual machine.
static bool rounds(void)
{
    static const char *asked_of;
    static bool answer;
    if (asked_of != wanted_kernels) {
        struct error err;
        const struct kernels *kernels;
        assert_int_equal(kernels_select(&kernels, wanted_kernels, &err), 0);
        answer = strcmp(kernels->name, "amx") == 0 || strcmp(kernels->name, "avx512bf16") == 0;
        asked_of = wanted_kernels;
    }
    return answer;
}

// The parts of all ranks add up to the model, whole experts or slices; ranks may hold nothing.
static void check_against_double(void)
{
    // In units of the root mean square of a row. A number near the middle between two of bf16 may be rounded to the other; 4e-5 was seen.
    const double tolerance = rounds() ? 1e-2 : 1e-5;
    struct token_row rows[ROWS];
    make_rows(rows);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int ranks = 1; ranks <= MAX_SHARE; ranks++)
            for (int whole = 0; whole < 2; whole++) {
                struct model *m = case_model(c);
                float *got = zeroed(ROWS * HIDDEN * sizeof *got);
                for (int r = 0; r < ranks; r++) {
                    struct rank_share share = {
                        .num_heads_local = r == 0, .num_kv_heads_local = r == 0, .vocab_local = VOCAB};
                    int64_t parts = ranks == 3 ? 2 : ranks,
                            part = ranks == 3 ? r - 1 : r; // of three ranks the first holds nothing
                    int64_t begin = part < 0 ? 0 : part, end = part + 1;
                    share.expert_begin = whole ? partition_begin(EXPERTS, begin, parts) : 0;
                    share.num_experts_local =
                        whole ? partition_begin(EXPERTS, end, parts) - share.expert_begin : EXPERTS;
                    share.expert_mlp_begin = whole ? 0 : partition_begin(SIZE, begin, parts);
                    share.expert_size_local = whole ? SIZE : partition_begin(SIZE, end, parts) - share.expert_mlp_begin;
                    share.shared_begin = m->desc.experts.shared_size * r / ranks;
                    share.shared_size_local = m->desc.experts.shared_size * (r + 1) / ranks - share.shared_begin;
                    run_rank(m, &share, rows, ROWS, 2, got);
                }
                int off = 0;
                for (int i = 0; i < ROWS; i++) {
                    double want[HIDDEN], rms = 0;
                    bool good = true;
                    row_reference(m, want, rows[i].token);
                    for (int j = 0; j < HIDDEN; j++)
                        rms += want[j] * want[j] / HIDDEN;
                    for (int j = 0; j < HIDDEN; j++)
                        good &= fabs(got[i * HIDDEN + j] - want[j]) <= tolerance * sqrt(rms);
                    off += !good;
                }
                if (off > 0)
                    fail_msg("case %zu, %d ranks, %s: %d rows are off", c, ranks, whole ? "whole experts" : "slices",
                             off);
                free(got);
                free(m);
            }
}

static void test_against_double(void **state)
{
    (void)state;
    check_against_double();
    if (!rounds())
        return;
    wanted_kernels = "avx512"; // which does not round
    check_against_double();
    wanted_kernels = "auto";
}

static struct rank_share whole_model(const struct model *m)
{
    return (struct rank_share){.num_heads_local = 1,
                               .num_kv_heads_local = 1,
                               .vocab_local = VOCAB,
                               .num_experts_local = EXPERTS,
                               .expert_size_local = SIZE,
                               .shared_size_local = m->desc.experts.shared_size};
}

// Law 9: a row's bits are its own, whatever stands beside it and however many threads there are.
static void test_company(void **state)
{
    (void)state;
    struct token_row rows[ROWS];
    make_rows(rows);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct model *m = case_model(c);
        struct rank_share share = whole_model(m);
        float *together = zeroed(ROWS * HIDDEN * sizeof *together);
        run_rank(m, &share, rows, ROWS, 1, together);
        for (int i = 0; i < ROWS; i += 5) {
            float alone[HIDDEN] = {0};
            run_rank(m, &share, rows + i, 1, 3, alone);
            assert_memory_equal(alone, together + i * HIDDEN, sizeof alone);
        }
        free(together);
        free(m);
    }
}

static void test_nan(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct model *m = case_model(c);
        struct rank_share share = whole_model(m);
        struct token_row rows[2] = {{.token = 3}, {.token = 4, .position = 1}};
        float out[2 * HIDDEN] = {0};
        m->embedding[3 * HIDDEN + 17] = NAN;
        run_rank(m, &share, rows, 2, 1, out);
        for (int i = 0; i < HIDDEN; i++)
            assert_true(isnan(out[i]) && !isnan(out[HIDDEN + i]));
        free(m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_double),
        cmocka_unit_test(test_company),
        cmocka_unit_test(test_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

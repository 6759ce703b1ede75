// The plan: who owns what. Known cases by hand, then properties over many shapes: every source element is held, heads
// have their kv heads, groups stay whole, bands cover each stored row once.
#include "shard/plan.h"

#include "shard/band.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct model_desc model_of(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t intermediate,
                                  int64_t vocab)
{
    struct model_desc model = {
        .architecture = "LlamaForCausalLM",
        .num_layers = 2,
        .hidden_size = 192,
        .intermediate_size = intermediate,
        .num_heads = heads,
        .num_kv_heads = kv_heads,
        .head_dim = head_dim,
        .vocab_size = vocab,
        .context = 128,
    };
    return model;
}

static struct manifest_quant quant_of(enum weight_kind linear, uint32_t group_size)
{
    return (struct manifest_quant){linear, WEIGHT_BF16, linear == WEIGHT_INT4 ? WEIGHT_INT8 : linear,
                                   linear == WEIGHT_INT4 ? group_size : 0};
}

static struct plan *planned(const struct model_desc *model, struct manifest_quant quant, uint32_t tp_size)
{
    struct plan *plan;
    struct error err;
    if (plan_make(&plan, model, &quant, tp_size, &err))
        fail_msg("tp %u: %s", tp_size, err.msg);
    return plan;
}

static void test_shares(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int64_t heads, kv_heads, head_dim, intermediate, vocab;
        enum weight_kind kind;
        uint32_t group_size, tp_size, rank;
        struct rank_share share;
    } cases[] = {
        {"whole", 32, 8, 128, 14336, 128256, WEIGHT_BF16, 0, 1, 0, {0, 32, 0, 8, 0, 14336, 0, 128256}},
        {"even", 32, 8, 128, 14336, 128256, WEIGHT_BF16, 0, 4, 1, {8, 8, 2, 2, 3584, 3584, 32064, 32064}},
        {"kv replicated", 8, 2, 64, 1024, 2048, WEIGHT_BF16, 0, 4, 1, {2, 2, 0, 1, 256, 256, 512, 512}},
        {"kv straddled", 6, 2, 64, 1024, 2048, WEIGHT_BF16, 0, 2, 1, {3, 3, 1, 1, 512, 512, 1024, 1024}},
        {"kv shared at the border", 10, 2, 64, 1000, 2048, WEIGHT_BF16, 0, 4, 1, {2, 3, 0, 1, 250, 250, 512, 512}},
        {"kv of two groups", 10, 2, 64, 1000, 2048, WEIGHT_BF16, 0, 3, 1, {3, 3, 0, 2, 333, 333, 640, 704}},
        {"uneven", 7, 7, 32, 101, 130, WEIGHT_INT8, 0, 2, 1, {3, 4, 3, 4, 50, 51, 64, 66}},
        {"int4 pairs of heads", 8, 4, 64, 1024, 2048, WEIGHT_INT4, 128, 3, 1, {2, 2, 1, 1, 256, 384, 640, 704}},
        {"int4 more ranks than units", 8, 4, 64, 1024, 2048, WEIGHT_INT4, 128, 8, 0, {0, 0, 0, 0, 0, 128, 0, 256}},
        {"int4 its neighbour", 8, 4, 64, 1024, 2048, WEIGHT_INT4, 128, 8, 1, {0, 2, 0, 1, 128, 128, 256, 256}},
        {"int4 11008 in 4", 32, 32, 128, 11008, 32000, WEIGHT_INT4, 128, 4, 1, {8, 8, 8, 8, 2688, 2816, 8000, 8000}},
        {"int4 last unit incomplete", 3, 3, 64, 200, 100, WEIGHT_INT4, 128, 2, 1, {2, 1, 2, 1, 128, 72, 64, 36}},
        {"no vocabulary for rank 0", 4, 4, 32, 64, 60, WEIGHT_BF16, 0, 2, 0, {0, 2, 0, 2, 0, 32, 0, 0}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct model_desc model =
            model_of(cases[i].heads, cases[i].kv_heads, cases[i].head_dim, cases[i].intermediate, cases[i].vocab);
        struct plan *plan = planned(&model, quant_of(cases[i].kind, cases[i].group_size), cases[i].tp_size);
        const struct rank_share *want = &cases[i].share, *got = &plan->ranks[cases[i].rank].share;
        if (memcmp(want, got, sizeof *want) != 0)
            fail_msg("%s: heads %d+%d, kv %d+%d, mlp %d+%d, vocab %d+%d", cases[i].name, (int)got->head_begin,
                     (int)got->num_heads_local, (int)got->kv_head_begin, (int)got->num_kv_heads_local,
                     (int)got->mlp_begin, (int)got->intermediate_local, (int)got->vocab_begin, (int)got->vocab_local);
        plan_free(plan);
    }
}

static void test_order_of_first_use(void **state)
{
    (void)state;
    struct model_desc model = model_of(4, 2, 32, 256, 512);
    model.qkv_bias = model.o_bias = model.mlp_bias = model.qk_norm = true;
    static const enum tensor_role layer[] = {
        ROLE_ATTENTION_NORM, ROLE_QKV,      ROLE_QKV_BIAS, ROLE_Q_NORM,       ROLE_K_NORM, ROLE_O,
        ROLE_O_BIAS,         ROLE_MLP_NORM, ROLE_GATE_UP,  ROLE_GATE_UP_BIAS, ROLE_DOWN,   ROLE_DOWN_BIAS};
    enum { PER_LAYER = sizeof layer / sizeof layer[0] };
    struct plan *plan = planned(&model, quant_of(WEIGHT_BF16, 0), 2);
    assert_int_equal(plan->tensor_count, 2 + 2 * PER_LAYER + 2);
    const struct shard_tensor *tensors = plan->ranks[1].tensors;
    assert_int_equal(tensors[0].role, ROLE_EMBEDDING);
    assert_int_equal(tensors[1].role, ROLE_ROPE_INV_FREQ);
    for (int i = 0; i < 2 * PER_LAYER; i++) {
        assert_int_equal(tensors[2 + i].role, layer[i % PER_LAYER]);
        assert_int_equal(tensors[2 + i].layer, i / PER_LAYER);
    }
    assert_int_equal(tensors[2 + 2 * PER_LAYER].role, ROLE_FINAL_NORM);
    assert_int_equal(tensors[3 + 2 * PER_LAYER].role, ROLE_HEAD);
    for (uint64_t i = 1; i < plan->tensor_count; i++)
        assert_true(tensors[i].data_offset > tensors[i - 1].data_offset);

    const struct shard_tensor *qkv = &tensors[2 + PER_LAYER + 1];
    assert_string_equal(qkv->parts[0].source, "model.layers.1.self_attn.q_proj.weight");
    assert_string_equal(qkv->parts[1].source, "model.layers.1.self_attn.k_proj.weight");
    assert_string_equal(qkv->parts[2].source, "model.layers.1.self_attn.v_proj.weight");
    assert_int_equal(qkv->shape.rows, (2 + 1 + 1) * 32);
    assert_int_equal(qkv->parts[0].row_begin, 64);
    assert_int_equal(qkv->parts[1].row_begin, 32);
    plan_free(plan);

    model.tied_embeddings = true;
    model.qkv_bias = model.o_bias = model.mlp_bias = model.qk_norm = false;
    plan = planned(&model, quant_of(WEIGHT_BF16, 0), 2);
    assert_int_equal(plan->tensor_count, 2 + 2 * 6 + 1); // no head of its own
    plan_free(plan);
}

// ---- properties --------------------------------------------------------------------------------------------------

static void check_heads(const struct plan *plan)
{
    int64_t next_head = 0, next_mlp = 0, next_vocab = 0;
    int64_t heads_per_kv_head = plan->model.num_heads / plan->model.num_kv_heads;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        const struct rank_share *share = &plan->ranks[rank].share;
        assert_int_equal(share->head_begin, next_head);
        assert_int_equal(share->mlp_begin, next_mlp);
        assert_int_equal(share->vocab_begin, next_vocab);
        next_head += share->num_heads_local;
        next_mlp += share->intermediate_local;
        next_vocab += share->vocab_local;
        for (int64_t h = 0; h < share->num_heads_local; h++) {
            int64_t kv_head = (share->head_begin + h) / heads_per_kv_head;
            assert_true(kv_head >= share->kv_head_begin && kv_head < share->kv_head_begin + share->num_kv_heads_local);
        }
        if (share->num_heads_local == 0)
            assert_int_equal(share->num_kv_heads_local, 0);
    }
    assert_int_equal(next_head, plan->model.num_heads);
    assert_int_equal(next_mlp, plan->model.intermediate_size);
    assert_int_equal(next_vocab, plan->model.vocab_size);
}

// Every row and column of every source tensor is held by some rank; int4 slices begin at a group.
static void check_tensor(const struct plan *plan, uint64_t index)
{
    const struct shard_tensor *first = &plan->ranks[0].tensors[index];
    for (int p = 0; p < first->num_parts; p++) {
        uint64_t rows = first->parts[p].source_rows, cols = first->parts[p].source_cols, held = 0;
        uint8_t *seen = calloc(rows + cols, 1);
        for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
            const struct shard_tensor *tensor = &plan->ranks[rank].tensors[index];
            const struct shard_part *part = &tensor->parts[p];
            assert_true(tensor->role == first->role && tensor->layer == first->layer);
            assert_true(part->row_begin + part->rows <= rows && part->col_begin + part->cols <= cols);
            if (tensor->shape.kind == WEIGHT_INT4)
                assert_int_equal(part->col_begin % tensor->shape.group_size, 0);
            if (part->rows == 0 || part->cols == 0)
                continue;
            memset(seen + part->row_begin, 1, part->rows);
            memset(seen + rows + part->col_begin, 1, part->cols);
            held += part->rows * part->cols;
        }
        for (uint64_t i = 0; i < rows + cols; i++)
            assert_true(seen[i]);
        assert_true(held >= rows * cols);
        free(seen);
    }
}

static void check_bands(const struct plan *plan, uint64_t index)
{
    struct band *bands;
    struct error err;
    uint64_t count;
    assert_int_equal(band_list(&bands, &count, plan, index, &err), 0);
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        uint64_t next_row = 0, bytes = 0;
        const struct weight_shape *shape = &plan->ranks[rank].tensors[index].shape;
        for (uint64_t i = 0; i < count; i++) {
            if (rank < bands[i].rank_begin || rank >= bands[i].rank_end)
                continue;
            assert_int_equal(bands[i].row_begin, next_row);
            assert_true(bands[i].row_end > next_row);
            next_row = bands[i].row_end;
            struct band_place place = band_place(plan, &bands[i], rank);
            bytes += place.data_bytes + place.scale_bytes;
        }
        assert_int_equal(next_row, shape->rows_padded);
        assert_int_equal(bytes, shape->data_bytes + shape->scale_bytes);
    }
    free(bands);
}

static uint32_t next_random(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 8;
}

static void test_properties(void **state)
{
    (void)state;
    static const enum weight_kind kinds[] = {WEIGHT_BF16, WEIGHT_INT8, WEIGHT_FP8, WEIGHT_INT4};
    static const int64_t head_dims[] = {16, 24, 32, 64, 96, 128};
    uint32_t seed = 4;
    for (int round = 0; round < 400; round++) {
        int64_t kv_heads = 1 + next_random(&seed) % 9;
        struct model_desc model =
            model_of(kv_heads * (1 + next_random(&seed) % 5), kv_heads, head_dims[next_random(&seed) % 6],
                     1 + next_random(&seed) % 700, 1 + next_random(&seed) % 900);
        model.qkv_bias = model.o_bias = model.mlp_bias = round % 3 == 0;
        model.qk_norm = round % 4 == 0;
        model.tied_embeddings = round % 2;
        struct manifest_quant quant = quant_of(kinds[round % 4], 32u << next_random(&seed) % 3);
        struct plan *plan = planned(&model, quant, 1 + next_random(&seed) % PLAN_MAX_TP);
        check_heads(plan);
        for (uint64_t i = 0; i < plan->tensor_count; i++) {
            check_tensor(plan, i);
            check_bands(plan, i);
        }
        plan_free(plan);
    }
}

// ---- options -----------------------------------------------------------------------------------------------------

static void test_quant_words(void **state)
{
    (void)state;
    static const struct {
        const char *quant, *embed, *head;
        bool tied;
        int rc;
        enum weight_kind linear, embedding, out;
        uint32_t group_size;
    } cases[] = {
        {"none", NULL, NULL, false, 0, WEIGHT_BF16, WEIGHT_BF16, WEIGHT_BF16, 0},
        {"int8", NULL, NULL, false, 0, WEIGHT_INT8, WEIGHT_BF16, WEIGHT_INT8, 0},
        {"fp8", NULL, NULL, false, 0, WEIGHT_FP8, WEIGHT_BF16, WEIGHT_FP8, 0},
        {"int4", NULL, NULL, false, 0, WEIGHT_INT4, WEIGHT_BF16, WEIGHT_INT8, 64},
        {"int4", NULL, NULL, true, 0, WEIGHT_INT4, WEIGHT_INT8, WEIGHT_INT8, 64},
        {"none", NULL, NULL, true, 0, WEIGHT_BF16, WEIGHT_BF16, WEIGHT_BF16, 0},
        {"int4", "none", NULL, true, 0, WEIGHT_INT4, WEIGHT_BF16, WEIGHT_BF16, 64},
        {"int4", NULL, "int4", true, 0, WEIGHT_INT4, WEIGHT_INT4, WEIGHT_INT4, 64},
        {"int4", "int8", "none", false, 0, WEIGHT_INT4, WEIGHT_INT8, WEIGHT_BF16, 64},
        {"none", NULL, "int4", false, 0, WEIGHT_BF16, WEIGHT_BF16, WEIGHT_INT4, 64},
        {"int4", "int8", "none", true, ERR_USAGE, 0, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct manifest_quant quant = {0};
        struct error err;
        assert_int_equal(plan_quant(&quant, cases[i].quant, cases[i].embed, cases[i].head, 64, cases[i].tied, &err),
                         cases[i].rc);
        if (cases[i].rc) {
            assert_non_null(strstr(err.msg, "must agree"));
            continue;
        }
        assert_int_equal(quant.linear, cases[i].linear);
        assert_int_equal(quant.embedding, cases[i].embedding);
        assert_int_equal(quant.head, cases[i].out);
        assert_int_equal(quant.group_size, cases[i].group_size);
    }
}

static void test_refusals_and_notes(void **state)
{
    (void)state;
    struct model_desc model = model_of(4, 2, 32, 256, 512);
    struct manifest_quant quant = quant_of(WEIGHT_BF16, 0);
    struct plan *plan;
    struct error err;
    char line[256];
    assert_int_equal(plan_make(&plan, &model, &quant, PLAN_MAX_TP + 1, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "1 to 64"));
    assert_int_equal(plan_make(&plan, &model, &quant, 0, &err), ERR_USAGE);

    plan = planned(&model, quant, 4);
    assert_false(plan_empty_shares(plan, line, sizeof line));
    plan_free(plan);
    plan = planned(&model, quant, 6);
    assert_true(plan_empty_shares(plan, line, sizeof line));
    assert_non_null(strstr(line, "of 6 ranks 2 hold no heads, 0 no mlp columns, 0 no vocabulary"));
    plan_free(plan);

    snprintf(model.architecture, sizeof model.architecture, "T5");
    assert_int_equal(plan_make(&plan, &model, &quant, 1, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "\"T5\""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shares),
        cmocka_unit_test(test_order_of_first_use),
        cmocka_unit_test(test_properties),
        cmocka_unit_test(test_quant_words),
        cmocka_unit_test(test_refusals_and_notes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

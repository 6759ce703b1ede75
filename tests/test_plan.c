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
        .rotary_dim = head_dim,
        .pre_norms = true,
        .vocab_size = vocab,
        .context = 128,
    };
    return model;
}

static struct manifest_quant quant_of(enum weight_kind linear, uint32_t group_size)
{
    return (struct manifest_quant){.linear = linear,
                                   .embedding = WEIGHT_BF16,
                                   .head = linear == WEIGHT_INT4 ? WEIGHT_INT8 : linear,
                                   .group_size = linear == WEIGHT_INT4 ? group_size : 0};
}

static struct plan *planned_as(const struct model_desc *model, struct manifest_quant quant, uint32_t tp_size,
                               enum experts_mode experts)
{
    struct plan *plan;
    struct error err;
    struct plan_options options = {.quant = quant, .tp_size = tp_size, .experts = experts};
    if (plan_make(&plan, model, &options, &err))
        fail_msg("tp %u: %s", tp_size, err.msg);
    return plan;
}

static struct plan *planned(const struct model_desc *model, struct manifest_quant quant, uint32_t tp_size)
{
    return planned_as(model, quant, tp_size, EXPERTS_TP);
}

static void test_shares(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int64_t heads, kv_heads, head_dim, intermediate, vocab;
        enum weight_kind kind;
        uint32_t group_size, tp_size, rank;
        int64_t share[8]; // heads, kv heads, mlp, vocabulary: begin and count
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
        const struct rank_share *got = &plan->ranks[cases[i].rank].share;
        if (memcmp(cases[i].share, got, sizeof cases[i].share) != 0)
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
    model.qkv_bias = model.o_bias = model.mlp_bias = true;
    model.qk_norm = QK_NORM_HEAD;
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
    model.qkv_bias = model.o_bias = model.mlp_bias = false;
    model.qk_norm = QK_NORM_NONE;
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

// Every row and column of every source tensor is held by some rank; slices begin at a group.
static void check_tensor(const struct plan *plan, uint64_t index)
{
    const struct shard_tensor *first = &plan->ranks[0].tensors[index];
    for (int p = 0; p < first->num_parts; p++) {
        uint64_t rows = first->parts[p].source_rows, cols = first->parts[p].source_cols, held = 0;
        uint8_t *seen = calloc(rows + cols, 1);
        for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
            const struct shard_tensor *tensor = &plan->ranks[rank].tensors[index];
            assert_true(tensor->role == first->role && tensor->layer == first->layer &&
                        tensor->expert == first->expert && tensor->num_parts == first->num_parts);
            for (int q = 0; q < tensor->num_parts; q++) {
                const struct shard_part *part = &tensor->parts[q];
                assert_true(part->row_begin + part->rows <= part->source_rows);
                assert_true(part->col_begin + part->cols <= part->source_cols);
                if (tensor->shape.group_size > 0)
                    assert_int_equal(part->col_begin % tensor->shape.group_size, 0);
                if (strcmp(part->source, first->parts[p].source) != 0 || part->rows == 0 || part->cols == 0)
                    continue;
                memset(seen + part->row_begin, 1, part->rows);
                memset(seen + rows + part->col_begin, 1, part->cols);
                held += part->rows * part->cols;
            }
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
        model.qk_norm = round % 4 == 0 ? QK_NORM_HEAD : QK_NORM_NONE;
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

// ---- experts, latents, fused sources -----------------------------------------------------------------------------

static struct model_desc model_with_experts(const char *architecture, int64_t experts, int64_t expert_size)
{
    struct model_desc model = model_of(6, 3, 32, 0, 160);
    snprintf(model.architecture, sizeof model.architecture, "%s", architecture);
    memset(model.layer_flags, LAYER_EXPERTS, 2);
    model.experts = (struct experts_desc){.num_experts = experts,
                                          .experts_per_token = 1,
                                          .expert_size = expert_size,
                                          .scale = 1,
                                          .num_groups = 1,
                                          .groups_per_token = 1,
                                          .group_members = 1};
    return model;
}

static const struct shard_tensor *tensor_of(const struct plan *plan, uint32_t rank, enum tensor_role role,
                                            int32_t layer, int32_t expert, uint64_t *index)
{
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[rank].tensors[i];
        if (tensor->role == role && tensor->layer == layer && tensor->expert == expert) {
            *index = i;
            return tensor;
        }
    }
    fail_msg("no %s of layer %d, expert %d", tensor_role_name(role), layer, expert);
    return NULL;
}

static void test_experts_in_both_modes(void **state)
{
    (void)state;
    struct model_desc model = model_with_experts("MixtralForCausalLM", 5, 320);
    uint64_t index;
    struct plan *plan = planned_as(&model, quant_of(WEIGHT_INT4, 128), 2, EXPERTS_TP);
    assert_int_equal(plan->units.expert, 128);
    assert_int_equal(plan->ranks[1].share.expert_mlp_begin, 128); // units of 128: one, then two (the last incomplete)
    assert_int_equal(plan->ranks[1].share.expert_size_local, 192);
    assert_int_equal(plan->ranks[1].share.num_experts_local, 5);
    assert_int_equal(plan->ranks[1].share.expert_begin, 0);
    const struct shard_tensor *gate_up = tensor_of(plan, 1, ROLE_EXPERT_GATE_UP, 1, 4, &index);
    assert_string_equal(gate_up->parts[0].source, "model.layers.1.block_sparse_moe.experts.4.w1.weight");
    assert_string_equal(gate_up->parts[1].source, "model.layers.1.block_sparse_moe.experts.4.w3.weight");
    assert_int_equal(gate_up->shape.rows, 2 * 192);
    assert_int_equal(plan->sources[index][0].index, -1);
    const struct shard_tensor *down = tensor_of(plan, 1, ROLE_EXPERT_DOWN, 1, 4, &index);
    assert_int_equal(down->parts[0].col_begin, 128);
    assert_int_equal(down->shape.cols, 192);
    assert_int_equal(plan->splits[index], SPLIT_IN);
    const struct shard_tensor *router = tensor_of(plan, 1, ROLE_ROUTER, 1, -1, &index);
    assert_true(router->shape.kind == WEIGHT_BF16 && router->shape.rows == 5);
    plan_free(plan);

    plan = planned_as(&model, quant_of(WEIGHT_INT4, 128), 3, EXPERTS_EP);
    static const int64_t begins[] = {0, 1, 3, 5};
    for (uint32_t rank = 0; rank < 3; rank++) {
        const struct rank_share *share = &plan->ranks[rank].share;
        assert_int_equal(share->expert_begin, begins[rank]);
        assert_int_equal(share->num_experts_local, begins[rank + 1] - begins[rank]);
        assert_int_equal(share->expert_size_local, 320);
        for (int32_t expert = 0; expert < 5; expert++) {
            bool here = expert >= begins[rank] && expert < begins[rank + 1];
            assert_int_equal(tensor_of(plan, rank, ROLE_EXPERT_GATE_UP, 0, expert, &index)->shape.rows, here ? 640 : 0);
            down = tensor_of(plan, rank, ROLE_EXPERT_DOWN, 0, expert, &index);
            assert_int_equal(down->shape.rows, here ? 192 : 0);
            assert_int_equal(down->shape.cols, 320);
            assert_int_equal(plan->splits[index], SPLIT_OUT);
        }
    }
    plan_free(plan);
}

// Stacks and fused sources: a part is a range of one matrix, and says where this lies in the checkpoint.
static void test_sources_of_several_parts(void **state)
{
    (void)state;
    uint64_t index;
    struct model_desc model = model_with_experts("GptOssForCausalLM", 4, 96);
    model.sinks = model.qkv_bias = model.o_bias = true;
    model.experts.bias = model.experts.router_bias = true;
    struct plan *plan = planned_as(&model, quant_of(WEIGHT_BF16, 0), 2, EXPERTS_TP);
    const struct shard_tensor *gate_up = tensor_of(plan, 1, ROLE_EXPERT_GATE_UP, 0, 3, &index);
    const struct plan_source *from = plan->sources[index];
    assert_string_equal(gate_up->parts[1].source, "model.layers.0.mlp.experts.gate_up_proj[3]");
    assert_string_equal(from[1].tensor, "model.layers.0.mlp.experts.gate_up_proj");
    assert_true(from[0].index == 3 && from[1].index == 3 && from[1].form == TURNED_ALTERNATING);
    assert_int_equal(gate_up->parts[0].source_rows, 192);
    assert_int_equal(gate_up->parts[0].row_begin, 48);
    assert_int_equal(gate_up->parts[1].row_begin, 96 + 48);
    const struct shard_tensor *bias = tensor_of(plan, 1, ROLE_EXPERT_GATE_UP_BIAS, 0, 3, &index);
    assert_int_equal(bias->parts[1].col_begin, 96 + 48);
    assert_int_equal(plan->sources[index][0].form, ALTERNATING);
    assert_int_equal(tensor_of(plan, 1, ROLE_EXPERT_DOWN_BIAS, 0, 3, &index)->shape.cols, 192);
    assert_int_equal(tensor_of(plan, 1, ROLE_SINKS, 0, -1, &index)->shape.cols, 3);
    plan_free(plan);
    plan = planned_as(&model, quant_of(WEIGHT_BF16, 0), 2, EXPERTS_EP);
    assert_int_equal(tensor_of(plan, 1, ROLE_EXPERT_DOWN_BIAS, 0, 1, &index)->shape.cols, 0);
    assert_int_equal(tensor_of(plan, 1, ROLE_EXPERT_DOWN_BIAS, 0, 2, &index)->shape.cols, 192);
    plan_free(plan);

    model = model_of(6, 3, 32, 128, 160);
    snprintf(model.architecture, sizeof model.architecture, "Phi3ForCausalLM");
    plan = planned(&model, quant_of(WEIGHT_BF16, 0), 3);
    const struct shard_tensor *qkv = tensor_of(plan, 1, ROLE_QKV, 1, -1, &index);
    static const uint64_t begins[] = {64, 192 + 32, 192 + 96 + 32};
    for (int p = 0; p < 3; p++) {
        assert_string_equal(qkv->parts[p].source, "model.layers.1.self_attn.qkv_proj.weight");
        assert_int_equal(qkv->parts[p].source_rows, 192 + 2 * 96);
        assert_int_equal(qkv->parts[p].row_begin, begins[p]);
    }
    plan_free(plan);

    snprintf(model.architecture, sizeof model.architecture, "Gemma3ForConditionalGeneration");
    model.qk_norm = QK_NORM_HEAD;
    model.post_norms = true;
    model.sliding_window = 16;
    model.layer_flags[0] = LAYER_WINDOW | LAYER_LOCAL_ROPE;
    plan = planned(&model, quant_of(WEIGHT_BF16, 0), 2);
    const struct shard_tensor *norm = tensor_of(plan, 1, ROLE_Q_NORM, 1, -1, &index);
    assert_string_equal(norm->parts[0].source, "language_model.model.layers.1.self_attn.q_norm.weight");
    assert_int_equal(plan->sources[index][0].form, PLUS_ONE);
    assert_int_equal(tensor_of(plan, 0, ROLE_ROPE_LOCAL, -1, -1, &index)->num_parts, 0);
    plan_free(plan);
}

static void test_latent_attention(void **state)
{
    (void)state;
    struct model_desc model = model_with_experts("DeepseekV3ForCausalLM", 4, 64);
    uint64_t index;
    model.layer_flags[0] = 0; // a dense layer in front
    model.intermediate_size = 128;
    model.num_kv_heads = 6;
    model.head_dim = 48;
    model.rotary_dim = 16;
    model.latent = (struct latent_desc){.kv_rank = 40, .q_rank = 24, .nope_dim = 32, .rope_dim = 16, .v_dim = 64};
    model.experts.shared_size = 64;
    struct plan *plan = planned(&model, quant_of(WEIGHT_INT4, 128), 2);
    assert_int_equal(plan->units.heads, 2);                    // 2 x 64 columns of o are a group
    assert_int_equal(plan->ranks[1].share.num_heads_local, 4); // three units of two heads: one, then two
    assert_int_equal(plan->ranks[1].share.num_kv_heads_local, 4);
    assert_int_equal(tensor_of(plan, 1, ROLE_Q_B, 1, -1, &index)->shape.rows, 4 * 48);
    assert_int_equal(tensor_of(plan, 1, ROLE_Q_B, 1, -1, &index)->shape.cols, 24);
    assert_int_equal(tensor_of(plan, 1, ROLE_KV_A, 1, -1, &index)->shape.rows, 40 + 16);
    assert_int_equal(plan->splits[index], REPLICATE);
    const struct shard_tensor *kv_b = tensor_of(plan, 1, ROLE_KV_B, 1, -1, &index);
    assert_int_equal(kv_b->shape.kind, WEIGHT_BF16);
    assert_int_equal(kv_b->shape.rows, 4 * (32 + 64));
    assert_int_equal(kv_b->shape.cols, 40);
    assert_int_equal(tensor_of(plan, 1, ROLE_O, 1, -1, &index)->shape.cols, 4 * 64);
    assert_int_equal(tensor_of(plan, 0, ROLE_GATE_UP, 0, -1, &index)->layer, 0);
    assert_int_equal(tensor_of(plan, 0, ROLE_SHARED_DOWN, 1, -1, &index)->parts[0].source_cols, 64);
    assert_int_equal(tensor_of(plan, 0, ROLE_ROUTER_CHOICE_BIAS, 1, -1, &index)->shape.cols, 4);
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        assert_false(tensor->layer == 0 && tensor->role == ROLE_ROUTER);
        assert_false(tensor->layer == 1 && tensor->role == ROLE_GATE_UP);
    }
    plan_free(plan);

    model.latent.q_rank = 0;
    plan = planned(&model, quant_of(WEIGHT_BF16, 0), 2);
    const struct shard_tensor *q = tensor_of(plan, 0, ROLE_Q_B, 1, -1, &index);
    assert_string_equal(q->parts[0].source, "model.layers.1.self_attn.q_proj.weight");
    assert_int_equal(q->shape.cols, 192);
    plan_free(plan);
}

static void test_properties_of_experts(void **state)
{
    (void)state;
    static const char *const architectures[] = {"MixtralForCausalLM", "GptOssForCausalLM", "Qwen2MoeForCausalLM",
                                                "DeepseekV3ForCausalLM", "GraniteMoeForCausalLM"};
    uint32_t seed = 5;
    for (int round = 0; round < 60; round++) {
        struct model_desc model =
            model_with_experts(architectures[round % 5], 1 + next_random(&seed) % 9, 1 + next_random(&seed) % 400);
        model.experts.shared_size = round % 5 == 2 || round % 5 == 3 ? 1 + next_random(&seed) % 300 : 0;
        model.experts.shared_gate = round % 5 == 2;
        if (round % 5 == 3) {
            model.num_kv_heads = 6;
            model.latent = (struct latent_desc){.kv_rank = 24, .nope_dim = 16, .rope_dim = 16, .v_dim = 20};
            model.rotary_dim = 16;
        }
        struct manifest_quant quant = quant_of(round % 2 ? WEIGHT_INT4 : WEIGHT_BF16, 32u << next_random(&seed) % 3);
        struct plan *plan = planned_as(&model, quant, 1 + next_random(&seed) % 12, round % 3 ? EXPERTS_TP : EXPERTS_EP);
        for (uint64_t i = 0; i < plan->tensor_count; i++) {
            check_tensor(plan, i);
            check_bands(plan, i);
        }
        plan_free(plan);
    }
}

// The largest model there is: its index fits, and no cut depends on how many experts there are.
static void test_deepseek_v3(void **state)
{
    (void)state;
    struct model_desc model = model_with_experts("DeepseekV3ForCausalLM", 256, 2048);
    model.num_layers = 61;
    model.hidden_size = 7168;
    model.intermediate_size = 18432;
    model.num_heads = model.num_kv_heads = 128;
    model.head_dim = 192;
    model.rotary_dim = 64;
    model.vocab_size = 129280;
    model.latent = (struct latent_desc){.kv_rank = 512, .q_rank = 1536, .nope_dim = 128, .rope_dim = 64, .v_dim = 128};
    model.experts.experts_per_token = 8;
    model.experts.shared_size = 2048;
    memset(model.layer_flags, 0, 3);
    memset(model.layer_flags + 3, LAYER_EXPERTS, 58);
    for (int experts = EXPERTS_TP; experts <= EXPERTS_EP; experts++) {
        struct plan *plan = planned_as(&model, quant_of(WEIGHT_INT4, 128), 2, (enum experts_mode)experts);
        assert_int_equal(plan->tensor_count, 4 + 61 * 9 + 3 * 2 + 58 * (256 * 2 + 4));
        assert_true(plan->ranks[0].payload_offset < 32 << 20);
        plan_free(plan);
    }
}

// ---- kinds -------------------------------------------------------------------------------------------------------

// What a checkpoint that came quantized might decide: o in groups of 128, down of layer 1 in groups of 32, q, k, v of layer 0
// with columns in an order of their own.
static int mixed_kinds(const struct plan_kinds *kinds, struct plan_kind *out, const struct shard_tensor *tensor,
                       const struct plan_source *sources, struct error *err)
{
    (void)kinds;
    if (tensor->role == ROLE_QKV && tensor->layer == 0)
        assert_string_equal(sources[1].tensor, "model.layers.0.self_attn.k_proj.weight");
    assert_true(tensor->parts[0].source_rows > 0 && tensor->parts[0].source_cols > 0);
    if (tensor->role == ROLE_EMBEDDING)
        return error_set(err, ERR_MODEL, "no embedding");
    if (tensor->role == ROLE_O)
        *out = (struct plan_kind){WEIGHT_INT4Z, 128, false};
    if (tensor->role == ROLE_DOWN && tensor->layer == 1)
        *out = (struct plan_kind){WEIGHT_MXFP4, 32, false};
    out->order = tensor->role == ROLE_QKV && tensor->layer == 0;
    return 0;
}

static int without_embedding(const struct plan_kinds *kinds, struct plan_kind *out, const struct shard_tensor *tensor,
                             const struct plan_source *sources, struct error *err)
{
    return tensor->role == ROLE_EMBEDDING ? 0 : mixed_kinds(kinds, out, tensor, sources, err);
}

static void test_kinds_by_matrix(void **state)
{
    (void)state;
    struct model_desc model = model_of(8, 4, 64, 320, 160);
    struct plan_kinds kinds = {without_embedding}, refusing = {mixed_kinds};
    struct plan_options options = {.quant = quant_of(WEIGHT_BF16, 0), .tp_size = 3, .kinds = &kinds};
    struct plan *plan;
    struct error err;
    uint64_t index;
    assert_int_equal(plan_make(&plan, &model, &options, &err), 0);
    assert_int_equal(plan->units.heads, 2);
    assert_int_equal(plan->units.mlp, 32);
    assert_int_equal(tensor_of(plan, 0, ROLE_O, 1, -1, &index)->shape.kind, WEIGHT_INT4Z);
    assert_int_equal(tensor_of(plan, 0, ROLE_DOWN, 0, -1, &index)->shape.kind, WEIGHT_BF16);
    assert_int_equal(tensor_of(plan, 0, ROLE_DOWN, 1, -1, &index)->shape.group_size, 32);
    uint64_t qkv = 0, order = 0;
    tensor_of(plan, 0, ROLE_QKV, 0, -1, &qkv);
    const struct shard_tensor *columns = tensor_of(plan, 2, ROLE_QKV_ORDER, 0, -1, &order);
    assert_int_equal(order, qkv + 1);
    assert_true(columns->num_parts == 0 && columns->shape.cols == 192 && columns->shape.kind == WEIGHT_F32);
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        check_tensor(plan, i);
    plan_free(plan);
    options.kinds = &refusing;
    assert_int_equal(plan_make(&plan, &model, &options, &err), ERR_MODEL);
    assert_string_equal(err.msg, "no embedding");
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
        {"nl4", NULL, NULL, false, 0, WEIGHT_NL4, WEIGHT_BF16, WEIGHT_INT8, 64},
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
    struct plan_options options = {.quant = quant, .tp_size = PLAN_MAX_TP + 1};
    struct plan *plan;
    struct error err;
    char line[256];
    assert_int_equal(plan_make(&plan, &model, &options, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "1 to 64"));
    options.tp_size = 0;
    assert_int_equal(plan_make(&plan, &model, &options, &err), ERR_USAGE);
    options.tp_size = 1;

    plan = planned(&model, quant, 4);
    assert_false(plan_empty_shares(plan, line, sizeof line));
    plan_free(plan);
    plan = planned(&model, quant, 6);
    assert_true(plan_empty_shares(plan, line, sizeof line));
    assert_non_null(strstr(line, "of 6 ranks 2 hold no heads, 0 no mlp columns, 0 no vocabulary"));
    plan_free(plan);

    snprintf(model.architecture, sizeof model.architecture, "T5");
    assert_int_equal(plan_make(&plan, &model, &options, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "\"T5\""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shares),
        cmocka_unit_test(test_order_of_first_use),
        cmocka_unit_test(test_properties),
        cmocka_unit_test(test_experts_in_both_modes),
        cmocka_unit_test(test_sources_of_several_parts),
        cmocka_unit_test(test_latent_attention),
        cmocka_unit_test(test_properties_of_experts),
        cmocka_unit_test(test_deepseek_v3),
        cmocka_unit_test(test_kinds_by_matrix),
        cmocka_unit_test(test_quant_words),
        cmocka_unit_test(test_refusals_and_notes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

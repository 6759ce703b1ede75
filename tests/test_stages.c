// Pipeline stages as tpshard makes them: layers divided by bytes, what each stage's ranks hold, what manifest and rank files say of it.
#include "formats/checksum.h"
#include "formats/manifest.h"
#include "formats/rank_file.h"
#include "shard/plan.h"
#include "shard/stages.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

// ---- the division ------------------------------------------------------------------------------------------------

static void expect_division(uint32_t pp_size, const uint64_t *bytes, int64_t layers, uint64_t first, uint64_t last,
                            const char *wanted)
{
    uint16_t found[MODEL_MAX_LAYERS];
    struct error err;
    char text[256] = "";
    if (stages_balance(found, pp_size, bytes, layers, first, last, &err))
        fail_msg("pp %u: %s", pp_size, err.msg);
    for (uint32_t stage = 0; stage < pp_size; stage++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%u", stage ? " " : "", found[stage]);
    assert_string_equal(text, wanted);
}

static void test_known_divisions(void **state)
{
    (void)state;
    static const uint64_t even[12] = {7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7}, rising[6] = {1, 2, 3, 4, 5, 6},
                          nothing[4] = {0};
    expect_division(1, even, 12, 5, 5, "12");
    expect_division(3, even, 12, 0, 0, "4 4 4");
    expect_division(2, even, 12, 14, 0, "5 7");
    expect_division(2, even, 12, 0, 28, "8 4");
    expect_division(4, even, 10, 0, 0,
                    "2 2 3 3"); // the largest has 3 layers either way: the evenest, the first ones smaller
    expect_division(2, rising, 6, 0, 0, "4 2");
    expect_division(3, rising, 6, 0, 0, "3 2 1");
    expect_division(6, rising, 6, 1000, 0, "1 1 1 1 1 1");
    expect_division(2, even, 12, 1000, 0, "1 11");
    expect_division(2, nothing, 4, 0, 0, "1 3");
}

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

struct best {
    uint64_t largest, squares;
};

// Every division there is.
static void try_all(struct best *best, const uint64_t *bytes, int64_t layers, uint32_t stages, bool first_stage,
                    uint64_t first, uint64_t last, struct best so_far)
{
    uint64_t sum = first_stage ? first : 0;
    for (int64_t count = 1; count <= layers - (int64_t)stages + 1; count++) {
        sum += bytes[count - 1];
        if (stages == 1 && count < layers)
            continue;
        uint64_t size = sum + (stages == 1 ? last : 0);
        struct best now = {size > so_far.largest ? size : so_far.largest, so_far.squares + size * size};
        if (stages > 1)
            try_all(best, bytes + count, layers - count, stages - 1, false, first, last, now);
        else if (now.largest < best->largest || (now.largest == best->largest && now.squares < best->squares))
            *best = now;
    }
}

static void test_against_all_divisions(void **state)
{
    (void)state;
    uint64_t random = 20260101;
    for (int round = 0; round < 300; round++) {
        int64_t layers = 1 + (int64_t)(next_random(&random) % 9);
        uint32_t stages = 1 + (uint32_t)(next_random(&random) % (uint64_t)layers);
        uint64_t bytes[9], first = next_random(&random) % 40, last = next_random(&random) % 40;
        uint16_t found[MODEL_MAX_LAYERS];
        struct best best = {UINT64_MAX, UINT64_MAX}, got = {0};
        struct error err;
        for (int64_t i = 0; i < layers; i++)
            bytes[i] = 1 + next_random(&random) % 30;
        try_all(&best, bytes, layers, stages, true, first, last, (struct best){0});
        assert_int_equal(stages_balance(found, stages, bytes, layers, first, last, &err), 0);
        int64_t at = 0;
        for (uint32_t stage = 0; stage < stages; stage++) {
            uint64_t size = (stage == 0 ? first : 0) + (stage + 1 == stages ? last : 0);
            assert_in_range(found[stage], 1, layers);
            for (int i = 0; i < found[stage]; i++)
                size += bytes[at++];
            got.largest = size > got.largest ? size : got.largest;
            got.squares += size * size;
        }
        assert_int_equal(at, layers);
        assert_int_equal(got.largest, best.largest);
        assert_int_equal(got.squares, best.squares);
    }
}

static void test_large_model(void **state)
{
    (void)state;
    static uint64_t bytes[MODEL_MAX_LAYERS];
    for (int i = 0; i < MODEL_MAX_LAYERS; i++)
        bytes[i] = 4ull << 30; // 2 TiB in all
    uint16_t found[MODEL_MAX_LAYERS];
    struct error err;
    assert_int_equal(stages_balance(found, 64, bytes, MODEL_MAX_LAYERS, 0, 0, &err), 0);
    for (int stage = 0; stage < 64; stage++)
        assert_int_equal(found[stage], 8);
    assert_int_equal(stages_balance(found, 4, bytes, 3, 0, 0, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "--pp 4: the model has 3 layers, and each stage needs one"));
}

// ---- the plan ----------------------------------------------------------------------------------------------------

static struct model_desc model_of(const char *architecture, bool tied, int64_t experts)
{
    struct model_desc model = {
        .num_layers = 5,
        .hidden_size = 192,
        .intermediate_size = experts ? 0 : 256,
        .num_heads = 4,
        .num_kv_heads = 2,
        .head_dim = 32,
        .rotary_dim = 32,
        .pre_norms = true,
        .vocab_size = 300,
        .context = 128,
        .tied_embeddings = tied,
        .experts = {.num_experts = experts},
    };
    snprintf(model.architecture, sizeof model.architecture, "%s", architecture);
    return model;
}

static struct plan *planned(const struct model_desc *model, enum experts_mode experts, uint32_t tp, uint32_t pp)
{
    struct plan *plan;
    struct error err;
    struct plan_options options = {
        .quant = {.linear = WEIGHT_INT4, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16, .group_size = 64},
        .tp_size = tp,
        .pp_size = pp,
        .experts = experts};
    if (plan_make(&plan, model, &options, &err))
        fail_msg("tp %u pp %u: %s", tp, pp, err.msg);
    return plan;
}

static bool is_empty(const struct shard_tensor *tensor)
{
    return tensor->shape.kind == WEIGHT_F32 ? tensor->shape.cols == 0 : tensor->shape.rows == 0;
}

// A rank of a stage holds of its stage's tensors what the rank of that number holds in one stage, and nothing of the others.
static void check_plan(const struct model_desc *model, enum experts_mode experts, uint32_t tp, uint32_t pp)
{
    struct plan *whole = planned(model, experts, tp, 1), *cut = planned(model, experts, tp, pp);
    assert_int_equal(cut->num_ranks, tp * pp);
    assert_int_equal(cut->tensor_count, whole->tensor_count);
    for (uint32_t rank = 0; rank < cut->num_ranks; rank++) {
        uint32_t stage = rank / tp;
        int64_t begin, count;
        manifest_stage(cut->stage_layers, stage, &begin, &count);
        assert_memory_equal(&cut->ranks[rank].share, &whole->ranks[rank % tp].share, sizeof whole->ranks[0].share);
        for (uint64_t i = 0; i < cut->tensor_count; i++) {
            const struct shard_tensor *mine = &cut->ranks[rank].tensors[i], *of = &whole->ranks[rank % tp].tensors[i];
            bool last = stage + 1 == pp;
            bool here = of->layer >= 0                   ? of->layer >= begin && of->layer < begin + count
                        : of->role == ROLE_EMBEDDING     ? stage == 0 || (last && model->tied_embeddings)
                        : of->role == ROLE_ROPE_INV_FREQ ? true
                                                         : last;
            assert_int_equal(plan_rank_holds(cut, rank, i), here);
            assert_int_equal(mine->role, of->role);
            assert_int_equal(mine->layer, of->layer);
            assert_int_equal(mine->num_parts, of->num_parts);
            if (!here) {
                assert_true(is_empty(mine));
                continue;
            }
            assert_memory_equal(&mine->shape, &of->shape, sizeof mine->shape);
            for (int p = 0; p < mine->num_parts; p++) {
                assert_string_equal(mine->parts[p].source, of->parts[p].source);
                assert_int_equal(mine->parts[p].row_begin, of->parts[p].row_begin);
                assert_int_equal(mine->parts[p].rows, of->parts[p].rows);
                assert_int_equal(mine->parts[p].col_begin, of->parts[p].col_begin);
                assert_int_equal(mine->parts[p].cols, of->parts[p].cols);
            }
        }
    }
    plan_free(whole);
    plan_free(cut);
}

static void test_plans(void **state)
{
    (void)state;
    struct model_desc dense = model_of("LlamaForCausalLM", false, 0), tied = model_of("LlamaForCausalLM", true, 0);
    struct model_desc moe = model_of("MixtralForCausalLM", false, 8);
    moe.experts.experts_per_token = 2;
    moe.experts.expert_size = 128;
    for (int64_t i = 0; i < moe.num_layers; i++)
        moe.layer_flags[i] = LAYER_EXPERTS;
    for (uint32_t tp = 1; tp <= 3; tp++)
        for (uint32_t pp = 2; pp <= 5; pp++) {
            check_plan(&dense, EXPERTS_TP, tp, pp);
            check_plan(&tied, EXPERTS_TP, tp, pp);
            check_plan(&moe, EXPERTS_TP, tp, pp);
            check_plan(&moe, EXPERTS_EP, tp, pp);
        }
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        uint32_t tp, pp;
        const char *wanted;
    } cases[] = {
        {1, 6, "--pp 6: the model has 5 layers"},
        {33, 2, "a model can be cut for 64 ranks in all, not for 66"},
        {1, 65, "64 ranks in all"},
        {65, 1, "1 to 64"},
    };
    struct model_desc model = model_of("LlamaForCausalLM", false, 0);
    struct plan *plan;
    struct error err;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct plan_options options = {.quant = {.linear = WEIGHT_BF16, .embedding = WEIGHT_BF16, .head = WEIGHT_BF16},
                                       .tp_size = cases[i].tp,
                                       .pp_size = cases[i].pp};
        assert_int_equal(plan_make(&plan, &model, &options, &err), ERR_USAGE);
        if (!strstr(err.msg, cases[i].wanted))
            fail_msg("wanted \"%s\", got \"%s\"", cases[i].wanted, err.msg);
    }
}

// ---- files -------------------------------------------------------------------------------------------------------

static struct shard_file *head_of(const struct plan *plan, uint32_t rank, struct shard_identity *identity,
                                  struct checksum128 *root, struct error *err)
{
    const struct plan_rank *r = &plan->ranks[rank];
    uint64_t leaves[64] = {0};
    uint8_t *head;
    struct shard_file *file = NULL;
    assert_in_range(r->payload_bytes, 1, sizeof leaves / sizeof leaves[0] * SHARD_LEAF_BYTES);
    if (shard_head_serialise(&head, identity, r->tensors, plan->tensor_count, leaves, root, err))
        return NULL;
    if (shard_file_parse(&file, head, r->payload_offset, r->file_bytes, "a.tpshard", err))
        file = NULL;
    free(head);
    return file;
}

// What a header may say of its stage: all of it or nothing.
static void test_heads(void **state)
{
    (void)state;
    struct model_desc model = model_of("LlamaForCausalLM", false, 0);
    struct plan *plan = planned(&model, EXPERTS_TP, 2, 2);
    struct checksum128 root;
    struct error err;
    const struct {
        uint32_t pp_rank, pp_size, begin, count;
        bool good;
    } cases[] = {
        {1, 2, 2, 3, true},
        {0, 2, 0, 3, true},
        {0, 1, 0, 0, true},
        {1, 2, 0, 0, false},
        {0, 1, 0, 5, false},
        {0, 1, 1, 0, false},
        {0, 2, 511, 1, true},
        {0, 2, 512, 1, false},
        {2, 2, 0, 1, false},
        {0, 2, 0, 513, false},
        {0, 2, 4294967295u, 1, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct shard_identity identity = {.rank = 1,
                                          .tp_size = 2,
                                          .pp_rank = cases[i].pp_rank,
                                          .pp_size = cases[i].pp_size,
                                          .layer_begin = cases[i].begin,
                                          .num_layers = cases[i].count,
                                          .share = plan->ranks[1].share};
        struct shard_file *file = head_of(plan, 1, &identity, &root, &err);
        if ((file != NULL) != cases[i].good)
            fail_msg("case %zu: %s", i, file ? "taken" : err.msg);
        if (!file)
            continue;
        assert_int_equal(shard_file_identity(file)->pp_rank, cases[i].pp_rank);
        assert_int_equal(shard_file_identity(file)->layer_begin, cases[i].begin);
        assert_int_equal(shard_file_identity(file)->num_layers, cases[i].count);
        shard_file_close(file);
    }
    plan_free(plan);
}

// The file of every place is taken in its own and refused in any other.
static void test_places(void **state)
{
    (void)state;
    struct model_desc model = model_of("LlamaForCausalLM", false, 0);
    struct plan *plan = planned(&model, EXPERTS_TP, 2, 2);
    struct manifest_file files[4] = {{0}};
    struct manifest *manifest = calloc(1, sizeof *manifest);
    struct error err;
    assert_non_null(manifest);
    manifest->model = model;
    manifest->tp_size = manifest->pp_size = 2;
    memcpy(manifest->stage_layers, plan->stage_layers, sizeof manifest->stage_layers);
    manifest->ranks = files;
    manifest->num_ranks = 4;
    for (uint32_t rank = 0; rank < 4; rank++) {
        int64_t begin, count;
        manifest_stage(plan->stage_layers, rank / 2, &begin, &count);
        struct shard_identity identity = {.rank = rank % 2,
                                          .tp_size = 2,
                                          .pp_rank = rank / 2,
                                          .pp_size = 2,
                                          .layer_begin = (uint32_t)begin,
                                          .num_layers = (uint32_t)count,
                                          .share = plan->ranks[rank].share};
        struct shard_file *file = head_of(plan, rank, &identity, &files[rank].hash, &err);
        assert_non_null(file);
        files[rank].bytes = plan->ranks[rank].file_bytes;
        for (uint32_t place = 0; place < 4; place++) {
            files[place].hash = files[rank].hash; // the place alone decides
            files[place].bytes = files[rank].bytes;
            assert_int_equal(rank_file_check(file, manifest, place, "a.tpshard", &err),
                             place == rank ? 0 : ERR_CORRUPT);
            if (place == rank)
                continue;
            char wanted[128];
            snprintf(wanted, sizeof wanted,
                     "it is the file of rank %u of stage %u, but rank %u of stage %u belongs there", rank % 2, rank / 2,
                     place % 2, place / 2);
            assert_non_null(strstr(err.msg, wanted));
        }
        manifest->stage_layers[0]--; // the manifest of another division
        manifest->stage_layers[1]++;
        assert_int_equal(rank_file_check(file, manifest, rank, "a.tpshard", &err), ERR_CORRUPT);
        assert_non_null(strstr(err.msg, "and the manifest gives its stage"));
        manifest->stage_layers[0]++;
        manifest->stage_layers[1]--;
        shard_file_close(file);
    }
    free(manifest);
    plan_free(plan);
}

static void test_names(void **state)
{
    (void)state;
    static const struct {
        uint32_t rank, tp, pp;
        const char *wanted;
    } cases[] = {
        {0, 4, 1, "rank-00-of-04.tpshard"},          {3, 4, 1, "rank-03-of-04.tpshard"},
        {0, 4, 2, "stage-00-rank-00-of-04.tpshard"}, {7, 4, 2, "stage-01-rank-03-of-04.tpshard"},
        {2, 1, 3, "stage-02-rank-00-of-01.tpshard"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char name[64];
        manifest_rank_file_name(name, sizeof name, cases[i].rank, cases[i].tp, cases[i].pp);
        assert_string_equal(name, cases[i].wanted);
    }
}

static void test_stage_model(void **state)
{
    (void)state;
    struct model_desc model = model_of("LlamaForCausalLM", false, 0), stage;
    for (int i = 0; i < 5; i++)
        model.layer_flags[i] = (uint8_t)i;
    manifest_stage_model(&stage, &model, 2, 3);
    assert_int_equal(stage.num_layers, 3);
    assert_int_equal(stage.hidden_size, 192);
    for (int i = 0; i < MODEL_MAX_LAYERS; i++)
        assert_int_equal(stage.layer_flags[i], i < 3 ? i + 2 : 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_divisions), cmocka_unit_test(test_against_all_divisions),
        cmocka_unit_test(test_large_model),     cmocka_unit_test(test_plans),
        cmocka_unit_test(test_refusals),        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_places),          cmocka_unit_test(test_names),
        cmocka_unit_test(test_stage_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

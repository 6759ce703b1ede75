// The CUDA backend's host side, by itself: a step from loading to tokens on a tiny model, and the same with every call of the CUDA runtime
// failing in turn: each failure is an error with a sentence, and a device that failed anywhere can be closed.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include <cmocka.h>

#include "kernels/backend.h"

const struct backend *tpengine_cuda_backend(void);
}
#include "tests/emulator/emulator.h"

namespace
{

enum { RESERVE = 192 << 20 }; // of the plan, for what the driver takes
enum { HIDDEN = 128, HEADS = 2, HEAD_DIM = 64, MLP = 128, VOCAB = 64, CONTEXT = 128, SEQUENCES = 2, MAX_ROWS = 8 };

// A rank file's payload with one layer, all zeros but the norms: every logit is 0, so token 0 wins.
struct tiny_model {
    struct model_desc desc;
    struct rank_share share;
    struct layer layer;
    struct weights weights;
    uint8_t payload[4 << 20];
    uint64_t bytes;
};

void *place(struct tiny_model *m, const uint8_t *base, uint64_t bytes)
{
    void *at = (void *)(uintptr_t)(base + m->bytes);
    m->bytes += (bytes + 255) / 256 * 256;
    assert_true(m->bytes <= sizeof m->payload);
    return at;
}

struct matrix place_matrix(struct tiny_model *m, const uint8_t *base, enum weight_kind kind, int64_t rows, int64_t cols)
{
    struct matrix w = {};
    assert_true(weight_shape_make(&w.shape, kind, kind == WEIGHT_INT4 ? 32 : 0, (uint64_t)rows, (uint64_t)cols));
    w.data = place(m, base, w.shape.data_bytes);
    w.scale = w.shape.scale_bytes ? place(m, base, w.shape.scale_bytes) : NULL;
    return w;
}

void bind(struct tiny_model *m, const uint8_t *base)
{
    m->bytes = 0;
    m->weights.layers = &m->layer;
    m->weights.embedding = place_matrix(m, base, WEIGHT_BF16, VOCAB, HIDDEN);
    m->weights.head = place_matrix(m, base, WEIGHT_INT8, VOCAB, HIDDEN);
    m->weights.inv_freq = (const float *)place(m, base, HEAD_DIM / 2 * 4);
    m->weights.final_norm = m->layer.attention_norm = m->layer.mlp_norm = (const float *)place(m, base, HIDDEN * 4);
    m->layer.qkv = place_matrix(m, base, WEIGHT_INT4, (HEADS + 2) * HEAD_DIM, HIDDEN);
    m->layer.o = place_matrix(m, base, WEIGHT_FP8, HIDDEN, HEADS * HEAD_DIM);
    m->layer.gate_up = place_matrix(m, base, WEIGHT_BF16, 2 * MLP, HIDDEN);
    m->layer.down = place_matrix(m, base, WEIGHT_INT4, HIDDEN, MLP);
}

struct tiny_model *make_model()
{
    struct tiny_model *m = (struct tiny_model *)calloc(1, sizeof *m);
    m->desc.num_layers = 1;
    m->desc.hidden_size = HIDDEN;
    m->desc.intermediate_size = MLP;
    m->desc.num_heads = HEADS;
    m->desc.num_kv_heads = 1;
    m->desc.head_dim = HEAD_DIM;
    m->desc.vocab_size = VOCAB;
    m->desc.norm_eps = 1e-5;
    m->desc.rope_attention_factor = 1;
    m->share.num_heads_local = HEADS;
    m->share.num_kv_heads_local = 1;
    m->share.intermediate_local = MLP;
    m->share.vocab_local = VOCAB;
    bind(m, m->payload);
    return m;
}

int checked_pieces;
int accept(void *arg, const uint8_t *data, uint64_t offset, uint64_t bytes, struct error *err)
{
    (void)arg;
    (void)data;
    (void)offset;
    (void)bytes;
    checked_pieces++;
    return error_set(err, ERR_OTHER, "unused"), 0;
}
int refuse(void *arg, const uint8_t *data, uint64_t offset, uint64_t bytes, struct error *err)
{
    (void)arg;
    (void)data;
    (void)offset;
    (void)bytes;
    return error_set(err, ERR_CORRUPT, "a leaf is broken");
}

// The operations of a step, as the decoder orders them.
int run_layers(const struct backend *b, struct device *d, const struct tiny_model *m, struct error *err)
{
    const struct layer *l = &m->layer;
    int rc;
    if ((rc = b->embed(d, err)) || (rc = b->norm(d, false, NULL, l->attention_norm, &l->qkv, err)) ||
        (rc = b->linear(d, BUFFER_QKV, &l->qkv, err)) || (rc = b->finish_qkv(d, 0, err)) ||
        (rc = b->attend(d, 0, &l->o, err)) || (rc = b->linear(d, BUFFER_PARTIAL, &l->o, err)) ||
        (rc = b->norm(d, true, NULL, l->mlp_norm, &l->gate_up, err)) ||
        (rc = b->linear(d, BUFFER_GATE_UP, &l->gate_up, err)) || (rc = b->activate(d, NULL, &l->down, err)))
        return rc;
    return b->linear(d, BUFFER_PARTIAL, &l->down, err);
}

int sampled_step(const struct backend *b, struct device *d, const struct tiny_model *m, const struct token_row *rows,
                 int64_t count, enum phase phase, const struct kv_pages *pages, struct error *err)
{
    static const struct sampling greedy = {0, 1, 0, 0, 1, 0, 0, 0};
    const struct sampling *how[SEQUENCES] = {&greedy, &greedy};
    uint64_t steps[SEQUENCES] = {};
    uint32_t tokens[SEQUENCES];
    int64_t last = count - 1, sampled = phase == PHASE_DECODE ? count : 1;
    bool replayed = false;
    int rc;
    if ((rc = b->begin(d, rows, count, phase, pages, err)) ||
        (rc = b->sampling(d, how, steps, rows + count - sampled, sampled, err)) ||
        (phase == PHASE_DECODE && (rc = b->record(d, &replayed, err))))
        return rc;
    if (!replayed && ((rc = run_layers(b, d, m, err)) ||
                      (rc = b->logits(d, NULL, phase == PHASE_DECODE ? NULL : &last, sampled, NULL, 0, err)) ||
                      (rc = b->sample(d, err)) || (rc = b->finish(d, err))))
        return rc;
    if ((rc = b->tokens(d, tokens, sampled, err)))
        return rc;
    for (int64_t i = 0; i < sampled; i++)
        assert_int_equal(tokens[i], 0);
    return 0;
}

// Everything a rank does with a device: a prompt, three decode steps (as it comes, recorded, replayed), logits and an exchange.
int whole_run(const struct backend *b, struct device **out, struct tiny_model *m, struct thread_pool *pool,
              payload_check_fn *check, struct error *err)
{
    struct device_options options = {NULL, pool, 0, 2, -1};
    struct device_shape shape = {&m->desc, &m->share, MAX_ROWS, SEQUENCES, CONTEXT, 4, KV_BF16, true};
    static const int32_t table[] = {2, 0, 1, 3};
    struct kv_pages pages = {table, CONTEXT / KV_PAGE_TOKENS, 1};
    struct token_row prompt[3] = {{5, 0, 0}, {6, 0, 1}, {7, 0, 2}}, next[2] = {{8, 0, 3}, {9, 1, 0}};
    uint32_t ids[3] = {5, 6, 7};
    float logits[3 * VOCAB], *lent;
    struct memory_plan plan;
    const uint8_t *base;
    int rc;
    if ((rc = b->open(out, &options, err)))
        return rc;
    struct device *d = *out;
    if ((rc = b->plan(d, &shape, &plan, err)) || (rc = b->load(d, &base, m->payload, m->bytes, check, NULL, err)))
        return rc;
    bind(m, base);
    if ((rc = b->prepare(d, &shape, &m->weights, err)) || (rc = b->count_prompt(d, 0, ids, 3, err)) ||
        (rc = sampled_step(b, d, m, prompt, 3, PHASE_PREFILL, &pages, err)))
        return rc;
    for (int i = 0; i < 3; i++, next[0].position++, next[1].position++, pages.version++)
        if ((rc = sampled_step(b, d, m, next, 2, PHASE_DECODE, &pages, err)))
            return rc;
    if ((rc = b->begin(d, prompt, 3, PHASE_PREFILL, &pages, err)) || (rc = run_layers(b, d, m, err)) ||
        (rc = b->lend(d, BUFFER_PARTIAL, &lent, err)))
        return rc;
    lent[0] += 1;
    if ((rc = b->returned(d, BUFFER_PARTIAL, err)))
        return rc;
    return b->logits(d, NULL, NULL, 3, logits, VOCAB, err);
}

void test_a_run(void **state)
{
    (void)state;
    const struct backend *b = tpengine_cuda_backend();
    struct thread_pool *pool;
    struct error err = {};
    assert_int_equal(b->abi, BACKEND_ABI);
    assert_int_equal(thread_pool_create(&pool, 2, &err), 0);
    static const int chips[] = {80, 86, 89, 90, 120};
    for (int sm : chips) {
        struct tiny_model *m = make_model();
        struct device *d = NULL;
        char text[DEVICE_TEXT_BYTES];
        emulator_set_sm(sm);
        checked_pieces = 0;
        int rc = whole_run(b, &d, m, pool, accept, &err);
        if (rc)
            fail_msg("%s", err.msg);
        assert_true(checked_pieces > 0);
        b->describe(d, text);
        assert_non_null(strstr(text, "int4 weights"));
        b->close(d);
        free(m);
    }
    b->close(NULL);
    thread_pool_free(pool);
}

void test_refused_weights(void **state)
{
    (void)state;
    const struct backend *b = tpengine_cuda_backend();
    struct thread_pool *pool;
    struct device *d = NULL;
    struct error err = {};
    struct tiny_model *m = make_model();
    assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
    assert_int_equal(whole_run(b, &d, m, pool, refuse, &err), ERR_CORRUPT);
    assert_string_equal(err.msg, "a leaf is broken");
    b->close(d);
    thread_pool_free(pool);
    free(m);
}

// What prepare takes is no more than plan said, and no less than that without its reserve.
void test_the_plan_holds(void **state)
{
    (void)state;
    const struct backend *b = tpengine_cuda_backend();
    struct thread_pool *pool;
    struct device *d = NULL;
    struct error err = {};
    struct tiny_model *m = make_model();
    struct memory_plan plan;
    emulator_set_sm(86);
    size_t before, after, total;
    const uint8_t *base;
    struct device_shape shape = {&m->desc, &m->share, 4096, SEQUENCES, CONTEXT, 4, KV_E4M3, true};
    assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
    struct device_options options = {NULL, pool, 0, 1, -1};
    assert_int_equal(b->open(&d, &options, &err), 0);
    assert_int_equal(b->plan(d, &shape, &plan, &err), 0);
    cudaMemGetInfo(&before, &total);
    assert_int_equal(plan.available_bytes, before);
    assert_int_equal(b->load(d, &base, m->payload, m->bytes, accept, NULL, &err), 0);
    bind(m, base);
    assert_int_equal(b->prepare(d, &shape, &m->weights, &err), 0);
    cudaMemGetInfo(&after, &total);
    assert_int_equal(plan.kv_bytes, 2 * 4 * KV_PAGE_TOKENS * HEAD_DIM);
    assert_true(plan.scratch_bytes > RESERVE);
    assert_true(before - after <= m->bytes + plan.kv_bytes + plan.scratch_bytes - RESERVE);
    // What the plan keeps free: code, graphs, cuBLASLt's workspace.
    assert_true(before - after + (200 << 20) >= m->bytes + plan.kv_bytes + plan.scratch_bytes);
    b->close(d);
    cudaMemGetInfo(&after, &total);
    assert_int_equal(before, after);
    thread_pool_free(pool);
    free(m);
}

// Where trying cuBLASLt fails, an own kernel takes over, and nothing of the failure comes up later.
void test_a_failed_trial_is_forgiven(void **state)
{
    (void)state;
    const struct backend *b = tpengine_cuda_backend();
    struct thread_pool *pool;
    struct error err = {};
    char text[DEVICE_TEXT_BYTES];
    assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
    emulator_set_sm(90);
    int forgiven = 0;
    for (int nth = 2; nth < (getenv("TEST_QUICK") ? 3 : 5);
         nth++) { // the first two allocations are the weights' and the arena's
        struct tiny_model *m = make_model();
        struct device *d = NULL;
        emulator_fail_call("cudaMalloc", nth, cudaErrorMemoryAllocation);
        if (whole_run(b, &d, m, pool, accept, &err))
            fail_msg("%s", err.msg);
        b->describe(d, text);
        forgiven += strstr(text, "without cuBLASLt where it was wanted") != NULL;
        emulator_fail_call(NULL, 0, cudaSuccess);
        b->close(d);
        free(m);
    }
    assert_true(forgiven > 0);
    thread_pool_free(pool);
}

void test_every_call_fails_once(void **state)
{
    (void)state;
    static const struct {
        const char *call;
        cudaError_t error;
        int code;
    } calls[] = {
        {"cudaGetDeviceCount", cudaErrorNoDevice, ERR_GPU},
        {"cudaSetDevice", cudaErrorInvalidDevice, ERR_GPU},
        {"cudaGetDeviceProperties", cudaErrorUnknown, ERR_GPU},
        {"cudaStreamCreateWithFlags", cudaErrorUnknown, ERR_GPU},
        {"cudaEventCreateWithFlags", cudaErrorUnknown, ERR_GPU},
        {"cudaMemGetInfo", cudaErrorUnknown, ERR_GPU},
        {"cudaMalloc", cudaErrorMemoryAllocation, ERR_MEMORY},
        {"cudaMallocHost", cudaErrorMemoryAllocation, ERR_MEMORY},
        {"cudaMemcpy", cudaErrorUnknown, ERR_GPU},
        {"cudaMemcpyAsync", cudaErrorLaunchFailure, ERR_GPU},
        {"cudaMemsetAsync", cudaErrorLaunchFailure, ERR_GPU},
        {"cudaStreamSynchronize", cudaErrorLaunchFailure, ERR_GPU},
        {"cudaEventSynchronize", cudaErrorLaunchFailure, ERR_GPU},
        {"cudaEventRecord", cudaErrorUnknown, ERR_GPU},
        {"cudaStreamBeginCapture", cudaErrorUnknown, ERR_GPU},
        {"cudaStreamEndCapture", cudaErrorUnknown, ERR_GPU},
        {"cudaGraphInstantiate", cudaErrorUnknown, ERR_GPU},
        {"cudaGraphLaunch", cudaErrorLaunchFailure, ERR_GPU},
    };
    const struct backend *b = tpengine_cuda_backend();
    struct thread_pool *pool;
    struct error err = {};
    assert_int_equal(thread_pool_create(&pool, 1, &err), 0);
    emulator_set_sm(86);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        int failed = 0;
        for (int nth = 0, rc = -1; rc; nth += getenv("TEST_QUICK") ? 40 : 1) { // slow builds try fewer
            struct tiny_model *m = make_model();
            struct device *d = NULL;
            err.code = 0;
            err.msg[0] = 0;
            emulator_fail_call(calls[i].call, nth, calls[i].error);
            rc = whole_run(b, &d, m, pool, accept, &err);
            if (rc) {
                failed++;
                if (rc != calls[i].code && rc != ERR_GPU)
                    fail_msg("%s, call %d: error %d, %s", calls[i].call, nth, rc, err.msg);
                assert_int_equal(err.code, rc);
                assert_true(strlen(err.msg) > 10);
            }
            emulator_fail_call(NULL, 0, cudaSuccess); // forget what was not met
            b->close(d);
            free(m);
            assert_true(nth < 200);
        }
        if (failed == 0)
            fail_msg("%s is not called, or its failure goes unnoticed", calls[i].call);
    }
    thread_pool_free(pool);
}

} // namespace

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_run),
        cmocka_unit_test(test_refused_weights),
        cmocka_unit_test(test_the_plan_holds),
        cmocka_unit_test(test_a_failed_trial_is_forgiven),
        cmocka_unit_test(test_every_call_fails_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

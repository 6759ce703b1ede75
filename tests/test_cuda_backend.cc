// The CUDA backend's host side, by itself: a step from loading to tokens on a tiny model, and the same with every call of the CUDA runtime
// failing in turn: each failure is an error with a sentence, and a device that failed anywhere can be closed.
#include "tests/device/tiny_model.h"

#include <pthread.h>

#include <vector>

extern "C" const struct backend *tpengine_cuda_backend(void);

namespace
{

enum { RESERVE = 192 << 20 }; // of the plan, for what the driver takes
enum { VOCAB = 64, CONTEXT = 128, SEQUENCES = 2, MAX_ROWS = 8 };

// A rank file's payload with one layer, all zeros: every logit is 0, so token 0 wins.
struct tiny_model *make_model()
{
    struct tiny_model *m = tiny_make();
    m->desc.num_layers = 1;
    m->qkv = m->down = {WEIGHT_INT4, 32};
    m->gate_up = {WEIGHT_BF16, 0};
    m->head = {WEIGHT_INT8, 0};
    tiny_bind(m, m->payload);
    return m;
}

// What every test has: the backend, a pool, a model; and a device, which it may open.
struct fixture {
    const struct backend *b;
    struct thread_pool *pool;
    struct tiny_model *m;
    struct device *d;
    struct error err;
};

int set_up(void **state)
{
    struct fixture *f = (struct fixture *)calloc(1, sizeof *f);
    *state = f;
    f->b = tpengine_cuda_backend();
    f->m = make_model();
    emulator_set_sm(86);
    return thread_pool_create(&f->pool, 2, &f->err);
}

int tear_down(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    emulator_fail_call(NULL, 0, cudaSuccess); // forget what was not met
    f->b->close(f->d);
    thread_pool_free(f->pool);
    free(f->m);
    free(f);
    return 0;
}

// A new device, of which nothing is known yet.
void start_again(struct fixture *f)
{
    emulator_fail_call(NULL, 0, cudaSuccess);
    f->b->close(f->d);
    f->d = NULL;
    f->err.code = 0;
    f->err.msg[0] = 0;
    tiny_bind(f->m, f->m->payload);
}

int sampled_step(struct fixture *f, const struct token_row *rows, int64_t count, enum phase phase,
                 const struct kv_pages *pages)
{
    const struct backend *b = f->b;
    struct device *d = f->d;
    struct error *err = &f->err;
    static const struct sampling greedy = {0, 1, 0, 0, 1, 0, 0, 0};
    const struct sampling *how[SEQUENCES] = {&greedy, &greedy};
    uint64_t steps[SEQUENCES] = {};
    uint32_t tokens[SEQUENCES];
    int64_t last = count - 1, sampled = phase == PHASE_DECODE ? count : 1;
    bool replayed = false;
    int rc;
    if ((rc = b->begin(d, rows, count, phase, pages, err)) ||
        (rc = b->sampling(d, how, steps, phase == PHASE_DECODE ? NULL : &last, sampled, err)) ||
        (phase == PHASE_DECODE && (rc = b->record(d, &replayed, err))))
        return rc;
    if (!replayed &&
        ((rc = tiny_layers(b, d, f->m, err)) ||
         (rc = b->logits(d, &f->m->layers[0].mlp_join, phase == PHASE_DECODE ? NULL : &last, sampled, NULL, 0, err)) ||
         (rc = b->sample(d, err)) || (rc = b->finish(d, err))))
        return rc;
    if ((rc = b->tokens(d, tokens, sampled, err)))
        return rc;
    for (int64_t i = 0; i < sampled; i++)
        assert_int_equal(tokens[i], 0);
    return 0;
}

// Everything a rank does with a device: a prompt, three decode steps (as it comes, recorded, replayed), logits and an exchange.
int whole_run(struct fixture *f)
{
    const struct backend *b = f->b;
    struct tiny_model *m = f->m;
    struct error *err = &f->err;
    struct device_options options = {NULL, f->pool, 0, 2, -1};
    struct device_shape shape = {&m->desc, &m->share, MAX_ROWS, SEQUENCES,     SEQUENCES, CONTEXT,
                                 4,        KV_BF16,   true,     TRANSPORT_SHM, false};
    static const int32_t table[] = {2, 0, 1, 3};
    struct kv_pages pages = {table, CONTEXT / KV_PAGE_TOKENS, 1};
    struct token_row prompt[3] = {{5, 0, 0}, {6, 0, 1}, {7, 0, 2}}, next[2] = {{8, 0, 3}, {9, 1, 0}};
    uint32_t ids[3] = {5, 6, 7};
    float logits[3 * VOCAB], *lent;
    struct memory_plan plan;
    const uint8_t *base;
    int rc;
    if ((rc = b->open(&f->d, &options, err)))
        return rc;
    struct device *d = f->d;
    if ((rc = b->plan(d, &shape, &plan, err)) || (rc = tiny_load(b, d, m, &base, err)))
        return rc;
    tiny_bind(m, base);
    if ((rc = b->prepare(d, &shape, &m->weights, err)) || (rc = b->count_tokens(d, 0, ids, 2, 3, err)) ||
        (rc = sampled_step(f, prompt, 3, PHASE_PREFILL, &pages)))
        return rc;
    for (int i = 0; i < 3; i++, next[0].position++, next[1].position++, pages.version++)
        if ((rc = sampled_step(f, next, 2, PHASE_DECODE, &pages)))
            return rc;
    if ((rc = b->begin(d, prompt, 3, PHASE_PREFILL, &pages, err)) || (rc = tiny_layers(b, d, f->m, err)) ||
        (rc = b->lend(d, BUFFER_PARTIAL, false, &lent, err)))
        return rc;
    lent[0] += 1;
    std::vector<float> left(lent, lent + 3 * m->desc.hidden_size);
    if ((rc = b->returned(d, BUFFER_PARTIAL, err)) || (rc = b->lend(d, BUFFER_RESIDUAL, true, &lent, err)))
        return rc;
    // What is to be overwritten is not copied first.
    assert_memory_equal(lent, left.data(), left.size() * sizeof(float));
    if ((rc = b->lend(d, BUFFER_RESIDUAL, false, &lent, err)))
        return rc;
    assert_memory_not_equal(lent, left.data(), left.size() * sizeof(float));
    return b->logits(d, &m->layers[0].mlp_join, NULL, 3, logits, VOCAB, err);
}

void test_a_run(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    assert_int_equal(f->b->abi, BACKEND_ABI);
    static const int chips[] = {80, 86, 89, 90, 120};
    for (int sm : chips) {
        char text[DEVICE_TEXT_BYTES];
        start_again(f);
        emulator_set_sm(sm);
        if (whole_run(f))
            fail_msg("%s", f->err.msg);
        f->b->describe(f->d, text);
        assert_non_null(strstr(text, "int4 weights"));
    }
    f->b->close(NULL);
}

// What no kernel does is refused by name, before anything is loaded.
void test_refused_models(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    f->m->desc.head_dim = KERNELS_MAX_HEAD_DIM + 2;
    assert_int_equal(whole_run(f), ERR_MODEL);
    assert_non_null(strstr(f->err.msg, "heads of this size"));
}

// Lanes copy at the same time, each from a buffer of its own, and what begin took is the device's until close.
struct lane_job {
    const struct backend *b;
    struct device *d;
    const uint8_t *payload;
    uint64_t bytes;
    int lane;
    bool failed;
};

void *run_lane(void *arg)
{
    struct lane_job *job = (struct lane_job *)arg;
    struct error err;
    uint8_t *buffer, *again;
    for (uint64_t at = (uint64_t)job->lane * 4096; at < job->bytes; at += LOAD_LANES * 4096) {
        job->failed |= job->b->load_buffer(job->d, job->lane, 4096, &buffer, &err) ||
                       job->b->load_buffer(job->d, job->lane, 4096, &again, &err) || buffer != again ||
                       (uintptr_t)buffer % 4096 != 0;
        if (job->failed)
            return NULL;
        memcpy(buffer, job->payload + at, 4096);
        job->failed |= job->b->load_copy(job->d, job->lane, at, buffer, 4096, &err) != 0;
        memset(buffer, 0xee, 4096); // the copy is complete
    }
    return NULL;
}

void test_lanes(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    struct device_options options = {NULL, f->pool, 0, 1, -1};
    enum { BYTES = 256 << 10 };
    static uint8_t payload[BYTES];
    struct load_target target;
    struct lane_job jobs[LOAD_LANES];
    pthread_t threads[LOAD_LANES];
    size_t before, after, total;
    for (int i = 0; i < BYTES; i++)
        payload[i] = (uint8_t)(i * 7 + i / 4096);
    assert_int_equal(f->b->open(&f->d, &options, &f->err), 0);
    cudaMemGetInfo(&before, &total);
    assert_int_equal(f->b->load_begin(f->d, NULL, BYTES, &target, &f->err), 0);
    assert_null(target.place);
    for (int i = 0; i < LOAD_LANES; i++) {
        jobs[i] = {f->b, f->d, payload, BYTES, i, false};
        assert_int_equal(pthread_create(&threads[i], NULL, run_lane, &jobs[i]), 0);
    }
    for (int i = 0; i < LOAD_LANES; i++) {
        pthread_join(threads[i], NULL);
        assert_false(jobs[i].failed);
    }
    f->b->load_end(f->d);
    f->b->load_end(f->d);
    assert_memory_equal(target.base, payload, BYTES);
    uint8_t back[1000];
    assert_int_equal(f->b->load_read(f->d, 5000, back, sizeof back, &f->err), 0);
    assert_memory_equal(back, payload + 5000, sizeof back);
    f->b->close(f->d);
    f->d = NULL;
    cudaMemGetInfo(&after, &total);
    assert_int_equal(before, after);
}

// What prepare takes is no more than plan said, and no less than that without its reserve.
void test_the_plan_holds(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    const struct backend *b = f->b;
    struct tiny_model *m = f->m;
    struct error *err = &f->err;
    struct memory_plan plan;
    size_t before, after, total;
    const uint8_t *base;
    struct device_shape shape = {&m->desc, &m->share, 4096, SEQUENCES,     SEQUENCES, CONTEXT,
                                 4,        KV_E4M3,   true, TRANSPORT_SHM, false};
    struct device_options options = {NULL, f->pool, 0, 1, -1};
    assert_int_equal(b->open(&f->d, &options, err), 0);
    assert_int_equal(b->plan(f->d, &shape, &plan, err), 0);
    cudaMemGetInfo(&before, &total);
    assert_int_equal(plan.available_bytes, before);
    assert_int_equal(tiny_load(b, f->d, m, &base, err), 0);
    tiny_bind(m, base);
    assert_int_equal(b->prepare(f->d, &shape, &m->weights, err), 0);
    cudaMemGetInfo(&after, &total);
    assert_int_equal(plan.kv_bytes, 2 * 4 * KV_PAGE_TOKENS * m->desc.head_dim);
    assert_true(plan.scratch_bytes > RESERVE);
    assert_true(before - after <= m->bytes + plan.kv_bytes + plan.scratch_bytes - RESERVE);
    // What the plan keeps free: code, graphs, cuBLASLt's workspace.
    assert_true(before - after + (200 << 20) >= m->bytes + plan.kv_bytes + plan.scratch_bytes);
    b->close(f->d);
    f->d = NULL;
    cudaMemGetInfo(&after, &total);
    assert_int_equal(before, after);
}

// Where trying cuBLASLt fails, an own kernel takes over, and nothing of the failure comes up later.
void test_a_failed_trial_is_forgiven(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    char text[DEVICE_TEXT_BYTES];
    int forgiven = 0;
    emulator_set_sm(90);
    for (int nth = 2; nth < (quick() ? 3 : 5); nth++) { // the first two allocations are the weights' and the arena's
        start_again(f);
        emulator_fail_call("cudaMalloc", nth, cudaErrorMemoryAllocation);
        if (whole_run(f))
            fail_msg("%s", f->err.msg);
        f->b->describe(f->d, text);
        forgiven += strstr(text, "without cuBLASLt where it was wanted") != NULL;
    }
    assert_true(forgiven > 0);
}

// sm_120 multiplies by four-bit floats with instructions of its own, where they prove to do what they should; else as other chips do.
void test_fp4_instructions(void **state)
{
    struct fixture *f = (struct fixture *)*state;
    char text[DEVICE_TEXT_BYTES];
    f->m->qkv = {WEIGHT_MXFP4, 32};
    f->m->down = {WEIGHT_NVFP4, 16};
    int untried = 0;
    const int turns = quick() ? 3 : 9;
    for (int turn = 0; turn < turns; turn++) { // trusted; wrong; another chip; without memory for one trial or another
        start_again(f);
        emulator_set_sm(turn == 2 ? 90 : 120);
        emulator_misread_scales(turn == 1);
        if (turn > 2) // the first two are those of the weights and the arena
            emulator_fail_call("cudaMalloc", turn - 1, cudaErrorMemoryAllocation);
        int rc = whole_run(f);
        emulator_misread_scales(false);
        if (rc)
            fail_msg("%s", f->err.msg);
        f->b->describe(f->d, text);
        bool mx = strstr(text, "mxfp4 weights: decode f16, prefill FP4 x FP8") != NULL;
        bool nv = strstr(text, "nvfp4 weights: decode f16, prefill FP8, FP4 widened") != NULL;
        bool slabs = strstr(text, "fp4 weights: decode f16, prefill cuBLASLt bf16") != NULL;
        bool said = strstr(text, "without FP4 instructions: ") != NULL;
        if (turn < 3 ? mx != (turn == 0) || nv != mx || said != (turn == 1) : (!mx && !nv) || said != (!mx || !nv))
            fail_msg("turn %d: %s", turn, text);
        assert_true(slabs == (!mx || !nv));
        assert_int_equal(strstr(text, "of a known product") != NULL, turn == 1);
        untried += turn > 2 && said;
    }
    assert_true(quick() || untried == 2); // either kind
}

void test_every_call_fails_once(void **state)
{
    struct fixture *f = (struct fixture *)*state;
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
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        int failed = 0;
        // The first may be one whose failure is of no account, as when a lane is given back. Slow builds try no more than two.
        for (int nth = 0, rc = -1; nth < 2 || (rc && !quick()); nth++) {
            start_again(f);
            emulator_fail_call(calls[i].call, nth, calls[i].error);
            rc = whole_run(f);
            if (rc) {
                failed++;
                if (rc != calls[i].code && rc != ERR_GPU)
                    fail_msg("%s, call %d: error %d, %s", calls[i].call, nth, rc, f->err.msg);
                assert_int_equal(f->err.code, rc);
                assert_true(strlen(f->err.msg) > 10);
            }
            assert_true(nth < 200);
        }
        if (failed == 0)
            fail_msg("%s is not called, or its failure goes unnoticed", calls[i].call);
    }
}

} // namespace

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_a_run),
        TEST(test_lanes),
        TEST(test_refused_models),
        TEST(test_the_plan_holds),
        TEST(test_a_failed_trial_is_forgiven),
        TEST(test_fp4_instructions),
        TEST(test_every_call_fails_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// Sums over ranks by their devices (kernels/cuda/exchange.*), in the emulator: each rank is a thread with a stream of its own, over pinned memory that
// all have mapped. Held, bit for bit, to comm_all_reduce of the same ranks on the CPU: every algorithm and codec, feedback, rows with NaN, Inf, zeros
// and denormals, one row to some hundreds, through the wrap of the tokens. A norm behind an exchange is held to launch_norm. Then ranks that never come,
// and the abort word.
#include "tests/device/cuda_test.h"

extern "C" {
#include "engine/comm.h"
#include "kernels/clock.h"
#include "kernels/cuda/exchange_host.h"
}

#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

enum { TEST_RANKS = 8, MAX_ROWS = 300, HIDDEN = 1024, SCRATCH_BYTES = 64 << 10, TIMEOUT_MS = 60000 };

// ---- the ranks -----------------------------------------------------------------------------------------------------

struct group {
    int tp_size, memory, timeout_ms;
    bool feedback;
    uint64_t region_bytes;
    struct comm_region *comm_region;
    void *comm_memory;
};

struct end {
    struct group *group;
    int rank;
    struct comm *comm;
    struct device device;
    struct model_desc desc;
    struct rank_share share;
    uint8_t *region;
    float *memory
        [3]; // of SCRATCH_BYTES, on the device: nothing is allocated or freed there while ranks wait for each other
    struct exchange_failure failure;
    int failures;      // with and without a record
    std::string wrong; // what this rank found
};

static int gather(void *arg, void *all, const void *mine, size_t bytes, struct error *err)
{
    return comm_all_gather(((struct end *)arg)->comm, all, mine, bytes, err);
}
static bool is_aborted(void *arg) { return comm_region_aborted(((struct end *)arg)->group->comm_region); }
static int on_failure(void *arg, const struct exchange_failure *failure, struct error *err)
{
    struct end *e = (struct end *)arg;
    e->failures++;
    if (failure)
        e->failure = *failure;
    return error_set(err, ERR_RANK, "an exchange had no end");
}

static void note(struct end *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note(struct end *e, const char *format, ...)
{
    char text[256];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (e->wrong.empty())
        e->wrong = "rank " + std::to_string(e->rank) + ": " + text;
}

static bool open_end(struct end *e)
{
    struct error err;
    struct group *g = e->group;
    struct device *d = &e->device;
    memset(d, 0, sizeof *d);
    memset(&e->desc, 0, sizeof e->desc);
    memset(&e->share, 0, sizeof e->share);
    e->desc.hidden_size = HIDDEN;
    d->shape.desc = &e->desc;
    d->shape.share = &e->share;
    d->shape.max_rows = MAX_ROWS;
    d->tp_size = g->tp_size;
    e->region = (uint8_t *)mmap(NULL, g->region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, g->memory, 0);
    struct exchange_options options = {};
    options.transport = TRANSPORT_HOST;
    options.rank = e->rank;
    options.tp_size = g->tp_size;
    options.timeout_ms = g->timeout_ms;
    options.feedback = g->feedback;
    options.region = e->region;
    options.region_bytes = g->region_bytes;
    options.all_gather = gather;
    options.aborted = is_aborted;
    options.failed = on_failure;
    options.arg = e;
    bool has_memory = true;
    for (float *&memory : e->memory)
        has_memory = has_memory && cudaMalloc((void **)&memory, SCRATCH_BYTES) == cudaSuccess;
    if (!has_memory || cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking) != cudaSuccess ||
        cudaMalloc((void **)&d->buffer[BUFFER_PARTIAL], MAX_ROWS * HIDDEN * 4) != cudaSuccess ||
        cudaMalloc((void **)&d->buffer[BUFFER_RESIDUAL], MAX_ROWS * HIDDEN * 4) != cudaSuccess ||
        comm_open(&e->comm, g->comm_region, e->rank, g->timeout_ms, &err) || exchange_open(d, &options, &err)) {
        note(e, "opening: %s", err.msg);
        return false;
    }
    return true;
}

static void close_end(struct end *e)
{
    struct error err;
    if (e->comm)
        comm_barrier(e->comm, &err);
    exchange_close(&e->device);
    for (float *memory : e->memory)
        cudaFree(memory);
    cudaFree(e->device.buffer[BUFFER_PARTIAL]);
    cudaFree(e->device.buffer[BUFFER_RESIDUAL]);
    cudaStreamDestroy(e->device.stream);
    comm_close(e->comm);
    munmap(e->region, e->group->region_bytes);
}

// Runs fn as every rank of a group, a thread each.
template <typename FN> static void run_ranks(int tp_size, int timeout_ms, bool feedback, FN fn)
{
    static struct end ends[TEST_RANKS];
    struct group g = {};
    g.tp_size = tp_size;
    g.timeout_ms = timeout_ms;
    g.feedback = feedback;
    g.region_bytes = exchange_region_bytes(tp_size);
    g.memory = memfd_create("exchange", MFD_CLOEXEC);
    assert_true(g.memory >= 0);
    assert_int_equal(ftruncate(g.memory, (off_t)g.region_bytes), 0);
    uint64_t bytes = comm_region_bytes(tp_size, 1, MAX_ROWS * HIDDEN, 0);
    g.comm_memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g.comm_region = comm_region_init(g.comm_memory, tp_size, 1, MAX_ROWS * HIDDEN, 0);
    std::vector<std::thread> threads;
    for (int r = 0; r < tp_size; r++) {
        ends[r].group = &g;
        ends[r].rank = r;
        ends[r].failures = 0;
        ends[r].failure = {};
        ends[r].wrong.clear();
        threads.emplace_back([=] {
            if (open_end(&ends[r]))
                fn(&ends[r]);
            close_end(&ends[r]);
        });
    }
    for (std::thread &t : threads)
        t.join();
    for (int r = 0; r < tp_size; r++)
        if (!ends[r].wrong.empty())
            fail_msg("%s", ends[r].wrong.c_str());
    munmap(g.comm_memory, bytes);
    close(g.memory);
}

// ---- messages ------------------------------------------------------------------------------------------------------

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A value of a message: most rows hold ordinary numbers; the others one kind of special ones each, of some ranks.
static float value_of(uint64_t message, int rank, int64_t row, int64_t col)
{
    uint64_t bits = mix(message << 40 ^ (uint64_t)rank << 34 ^ (uint64_t)row << 16 ^ (uint64_t)col);
    float x = ((float)(bits >> 40) * 0x1p-23f - 1.0f) * (bits % 97 == 0 ? 300.0f : 1.0f);
    bool here = (bits >> 8) % 64 == 0;
    switch (row % 9) {
    case 2:
        return rank == 1 && here ? f32_from_bits(0x7fa00000u | (uint32_t)(bits & 0x8000ffffu)) : x; // NaN, not quiet
    case 3:
        return here ? f32_from_bits(0x7f800000u | (uint32_t)(bits & 0x80000000u)) : x; // Inf of both signs
    case 4:
        return rank % 2 ? -0.0f : 0.0f;
    case 5:
        return x * 0x1p-140f;
    case 6:
        return x * 0x1p125f;
    case 7:
        return x * 0x1p-30f;
    default:
        return x;
    }
}

static void fill(float *data, uint64_t message, int rank, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            data[i * cols + j] = value_of(message, rank, i, j);
}

static const char *const algorithm_names[] = {"one-shot", "two-shot", "chunks"};

// One sum on the device and on the CPU.
static void check_sum(struct end *e, uint64_t message, int64_t rows, int64_t cols, struct exchange_choice choice,
                      bool feedback, std::vector<uint16_t> &lost)
{
    struct error err;
    struct device *d = &e->device;
    size_t count = (size_t)(rows * cols), bytes = count * sizeof(float);
    std::vector<float> want(count), got(count);
    fill(want.data(), message, e->rank, rows, cols);
    cudaMemcpy(d->buffer[BUFFER_PARTIAL], want.data(), bytes, cudaMemcpyHostToDevice);
    d->count = rows;
    e->desc.hidden_size = cols;
    if (exchange_all_reduce(d, BUFFER_PARTIAL, &choice, feedback, OP_MLP, 3, &err) || exchange_flush(d, &err) ||
        device_wait(d, "a sum", &err) ||
        comm_all_reduce(e->comm, want.data(), rows, cols, cols, choice.wire, feedback ? lost.data() : NULL, NULL,
                        &err)) {
        note(e, "%s", err.msg);
        return;
    }
    cudaMemcpy(got.data(), d->buffer[BUFFER_PARTIAL], bytes, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < count; i++)
        if (f32_bits(got[i]) != f32_bits(want[i])) {
            note(e, "%s, %s, %d ranks, %lld x %lld%s: value %zu is %a (%08x), not %a (%08x)",
                 algorithm_names[choice.algorithm], wire_name(choice.wire), e->group->tp_size, (long long)rows,
                 (long long)cols, feedback ? ", feedback" : "", i, (double)got[i], f32_bits(got[i]), (double)want[i],
                 f32_bits(want[i]));
            return;
        }
    std::vector<uint16_t> device_lost(feedback ? count : 0);
    if (feedback)
        cudaMemcpy(device_lost.data(), d->exchange->lost, count * sizeof lost[0], cudaMemcpyDeviceToHost);
    if (feedback && memcmp(lost.data(), device_lost.data(), count * sizeof lost[0]) != 0)
        note(e, "%s, %s: other losses than on the CPU", algorithm_names[choice.algorithm], wire_name(choice.wire));
}

static const struct shape {
    int64_t rows, cols;
} shapes[] = {{1, 1024}, {1, 128}, {2, 5}, {9, 257}, {27, 384}, {11, 1000}, {200, 132}};

static void test_sums(void **state)
{
    (void)state;
    for (int tp_size : {2, 3, 4, 8})
        run_ranks(tp_size, TIMEOUT_MS, false, [](struct end *e) {
            std::vector<uint16_t> none;
            uint64_t message = 0;
            for (const struct shape &s : shapes)
                for (int wire = 0; wire < WIRE_COUNT; wire++)
                    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++) {
                        if (e->group->tp_size == 8 && s.rows * s.cols > 2000)
                            continue;
                        // Chunks of few rows, so that there are several; of the largest shape the less usual half is left out.
                        if (s.rows * s.cols * e->group->tp_size > 150000 && (wire + algorithm) % 2)
                            continue;
                        struct exchange_choice choice = {(enum exchange_algorithm)algorithm, (enum wire)wire,
                                                         (uint64_t)(4 * s.cols)};
                        check_sum(e, message++, s.rows, s.cols, choice, false, none);
                    }
        });
}

static void test_feedback(void **state)
{
    (void)state;
    for (int tp_size : {2, 4})
        run_ranks(tp_size, TIMEOUT_MS, true, [](struct end *e) {
            uint64_t message = 100;
            for (int wire : {WIRE_FP8, WIRE_S8X})
                for (int algorithm : {ALGORITHM_TWO_SHOT, ALGORITHM_CHUNKS}) {
                    std::vector<uint16_t> lost(20 * 300);
                    struct error err;
                    struct exchange_choice choice = {(enum exchange_algorithm)algorithm, (enum wire)wire, 4 * 300};
                    e->desc.hidden_size = 300;
                    e->device.count = 20;
                    e->device.phase = PHASE_PREFILL;
                    if (exchange_begin_step(&e->device, &err))
                        note(e, "%s", err.msg);
                    for (int i = 0; i < 4; i++)
                        check_sum(e, message++, 20, 300, choice, true, lost);
                }
        });
}

// ---- with a norm ---------------------------------------------------------------------------------------------------

static void check_norm(struct end *e, uint64_t message, int64_t rows, int64_t cols, enum input_format format,
                       bool join_norm)
{
    struct error err;
    struct device *d = &e->device;
    struct exchange_choice choice = {ALGORITHM_ONE_SHOT, WIRE_BF16, 0};
    int64_t stride = round_up_to(cols, 128);
    size_t count = (size_t)(rows * cols), value_bytes = (size_t)(rows * stride) * 4;
    std::vector<float> x(count), weight((size_t)cols, 1.5f), residual(count);
    std::vector<uint8_t> values[2], scales[2];
    std::vector<float> residuals[2];
    float *device_weight = e->memory[0];
    struct exchange_norm norm = {};
    norm.out.values = e->memory[1];
    norm.out.scale = e->memory[2];
    norm.out.stride = stride;
    norm.format = format;
    norm.residual = d->buffer[BUFFER_RESIDUAL];
    norm.join.partial = d->buffer[BUFFER_PARTIAL];
    norm.join.scale = 0.75f;
    norm.join.norm = join_norm ? device_weight : NULL;
    norm.weight = device_weight;
    norm.eps = 1e-5f;
    fill(x.data(), message, e->rank, rows, cols);
    fill(residual.data(), message, 99, rows, cols);
    cudaMemcpy(device_weight, weight.data(), (size_t)cols * 4, cudaMemcpyHostToDevice);
    d->count = rows;
    e->desc.hidden_size = cols;
    for (int apart = 0; apart < 2; apart++) {
        memset(norm.out.values, 0, value_bytes);
        memset(norm.out.scale, 0, value_bytes);
        cudaMemcpy(d->buffer[BUFFER_PARTIAL], x.data(), count * 4, cudaMemcpyHostToDevice);
        cudaMemcpy(d->buffer[BUFFER_RESIDUAL], residual.data(), count * 4, cudaMemcpyHostToDevice);
        int rc = exchange_all_reduce(d, BUFFER_PARTIAL, &choice, false, OP_ATTENTION, 0, &err);
        if (!rc && !exchange_takes_norm(d))
            note(e, "an exchange of %lld rows does not wait for its norm", (long long)rows);
        if (!rc && apart) {
            rc = exchange_flush(d, &err);
            launch_norm(norm.out, format, norm.residual, norm.join, norm.weight, NULL, rows, cols, norm.eps, d->stream);
        } else if (!rc) {
            rc = exchange_with_norm(d, &norm, &err);
        }
        if (rc || device_wait(d, "a norm", &err))
            note(e, "%s", err.msg);
        const uint8_t *at = (const uint8_t *)norm.out.values, *scale = (const uint8_t *)norm.out.scale;
        values[apart].assign(at, at + value_bytes);
        scales[apart].assign(scale, scale + value_bytes);
        residuals[apart].assign(norm.residual, norm.residual + count);
    }
    if (values[0] != values[1] || scales[0] != scales[1] ||
        memcmp(residuals[0].data(), residuals[1].data(), count * 4) != 0)
        note(e, "format %d, %lld x %lld: a norm behind its exchange differs from one apart", (int)format,
             (long long)rows, (long long)cols);
}

static void test_norms(void **state)
{
    (void)state;
    for (int tp_size : {2, 4})
        run_ranks(tp_size, TIMEOUT_MS, false, [](struct end *e) {
            uint64_t message = 200;
            for (int format = INPUT_F16; format <= INPUT_F32; format++) {
                check_norm(e, message++, 1, 1024, (enum input_format)format, false);
                check_norm(e, message++, 10, 260, (enum input_format)format, format % 2);
            }
        });
}

// ---- graphs --------------------------------------------------------------------------------------------------------

// A graph with exchanges is launched again and again: tokens are counted on the device.
static void test_graph(void **state)
{
    (void)state;
    run_ranks(2, TIMEOUT_MS, false, [](struct end *e) {
        struct error err;
        struct device *d = &e->device;
        enum { ROWS = 3, COLS = 256, COUNT = ROWS * COLS, REPLAYS = 12 };
        std::vector<float> x(COUNT), want(COUNT), two_ranks[2];
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        e->desc.hidden_size = COLS;
        d->count = ROWS;
        cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        for (int algorithm : {ALGORITHM_ONE_SHOT, ALGORITHM_TWO_SHOT, ALGORITHM_ONE_SHOT}) {
            struct exchange_choice choice = {(enum exchange_algorithm)algorithm, WIRE_F32, 0};
            if (exchange_all_reduce(d, BUFFER_PARTIAL, &choice, false, OP_MLP, 0, &err) || exchange_flush(d, &err))
                note(e, "%s", err.msg);
        }
        cudaStreamEndCapture(d->stream, &graph);
        cudaGraphInstantiate(&exec, graph, 0);
        for (int i = 0; i < REPLAYS; i++) {
            for (int k = 0; k < COUNT; k++)
                x[(size_t)k] = (float)((e->rank + 1) * (k + i)), want[(size_t)k] = (float)(3 * (k + i) * 4);
            cudaMemcpy(d->buffer[BUFFER_PARTIAL], x.data(), COUNT * 4, cudaMemcpyHostToDevice);
            cudaGraphLaunch(exec, d->stream);
            if (device_wait(d, "a graph", &err))
                note(e, "%s", err.msg);
            if (memcmp(want.data(), d->buffer[BUFFER_PARTIAL], COUNT * 4) != 0)
                note(e, "replay %d has other sums", i);
        }
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
    });
}

// ---- failures ------------------------------------------------------------------------------------------------------

// The last rank leaves before a sum; the others must not wait for ever.
static void test_missing_rank(void **state)
{
    (void)state;
    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++)
        run_ranks(4, 300, false, [=](struct end *e) {
            struct error err;
            std::vector<uint16_t> none;
            struct exchange_choice choice = {(enum exchange_algorithm)algorithm, WIRE_BF16, 4 * 256};
            int missing = e->group->tp_size - 1;
            check_sum(e, 300, 7, 256, choice, false, none);
            comm_barrier(e->comm, &err);
            if (e->rank == missing)
                return;
            int64_t begin = clock_now_ns();
            int rc = exchange_all_reduce(&e->device, BUFFER_PARTIAL, &choice, false, OP_ATTENTION, 17, &err);
            rc = rc ? rc : exchange_flush(&e->device, &err);
            rc = rc ? rc : device_wait(&e->device, "a sum", &err);
            if (rc != ERR_RANK || e->failures != 1)
                note(e, "%s without a rank: %d, %d failures", algorithm_names[algorithm], rc, e->failures);
            if (clock_now_ns() - begin > 20000000000)
                note(e, "%s: the wait had no end for %.1f s", algorithm_names[algorithm],
                     1e-9 * (double)(clock_now_ns() - begin));
            const struct exchange_record *record = e->device.exchange->record;
            if (record->told && (e->failure.whom != missing || e->failure.layer != 17 ||
                                 e->failure.operation != OP_ATTENTION || e->failure.expected - e->failure.seen != 1))
                note(e, "%s: the record names rank %d, layer %d, operation %d, token %u of %u",
                     algorithm_names[algorithm], e->failure.whom, e->failure.layer, e->failure.operation,
                     e->failure.seen, e->failure.expected);
            // Whoever comes later leaves at once.
            rc = exchange_all_reduce(&e->device, BUFFER_PARTIAL, &choice, false, OP_MLP, 17, &err);
            rc = rc ? rc : exchange_flush(&e->device, &err);
            if (!rc && device_wait(&e->device, "a sum", &err) != ERR_RANK)
                note(e, "a sum behind a broken one went well");
        });
}

// Somebody raises the abort word: waits that may last long end at once.
static void test_abort(void **state)
{
    (void)state;
    run_ranks(3, 600000, false, [](struct end *e) {
        struct error err;
        struct exchange_choice choice = {ALGORITHM_TWO_SHOT, WIRE_S8X, 0};
        e->desc.hidden_size = 256;
        e->device.count = 7;
        memset(e->device.buffer[BUFFER_PARTIAL], 0, 7 * 256 * 4);
        if (e->rank == 2) {
            usleep(100000);
            __atomic_store_n((uint32_t *)(void *)e->region, 1, __ATOMIC_RELEASE);
            return;
        }
        int rc = exchange_all_reduce(&e->device, BUFFER_PARTIAL, &choice, false, OP_MLP, 1, &err);
        rc = rc ? rc : device_wait(&e->device, "a sum", &err);
        if (rc != ERR_RANK || e->device.exchange->record->told)
            note(e, "an abort gave %d", rc);
    });
}

// ---- all ranks in one launch -----------------------------------------------------------------------------------------

// Rank blockIdx.y: what a device runs as one cooperative launch.
static void check_together(int tp_size, bool two_shot, enum wire wire)
{
    enum { ROWS = 5, COLS = 520, BLOCKS = 3, CALLS = 12 };
    int64_t area_bytes = EXCHANGE_DIRECT_BYTES, count = ROWS * COLS;
    struct exchange_ranks *ranks = (struct exchange_ranks *)device_zeros(tp_size * (int64_t)sizeof *ranks);
    struct exchange_message *messages = (struct exchange_message *)device_zeros(tp_size * (int64_t)sizeof *messages);
    struct exchange_state *states = (struct exchange_state *)device_zeros(tp_size * (int64_t)sizeof *states);
    struct exchange_record *records = (struct exchange_record *)device_zeros(tp_size * (int64_t)sizeof *records);
    uint32_t *abort_word = (uint32_t *)device_zeros(4);
    uint8_t *areas = (uint8_t *)device_zeros(tp_size * area_bytes);
    float *data = (float *)device_zeros(tp_size * count * 4);
    for (int r = 0; r < tp_size; r++) {
        struct exchange_ranks *one = &ranks[r];
        one->rank = r;
        one->tp_size = tp_size;
        one->num_every = 1;
        for (int other = 0; other < tp_size; other++) {
            one->to[other] = areas + r * area_bytes;
            one->from[other] = areas + other * area_bytes;
        }
        one->every[0] = areas + r * area_bytes;
        one->state = &states[r];
        one->record = &records[r];
        one->abort = abort_word;
        one->timeout_ns = 60000000000u;
        for (int lane = 0; lane < EXCHANGE_LANES; lane++)
            states[r].token[lane] = *(uint32_t *)(void *)(areas + r * area_bytes + lane * EXCHANGE_TOKEN_BYTES) =
                (uint32_t)EXCHANGE_FIRST_TOKEN;
        messages[r] = {data + r * count, NULL, ROWS, COLS, wire, 0};
    }
    for (int call = 0; call < CALLS; call++) {
        for (int r = 0; r < tp_size; r++)
            for (int64_t i = 0; i < count; i++)
                data[r * count + i] = (float)(i % 64 + r + call); // exact in every codec that is tried
        finish(launch_exchange_together(ranks, messages, tp_size, two_shot, BLOCKS, NULL));
        assert_int_equal(*abort_word, 0);
        for (int r = 0; r < tp_size; r++) {
            assert_memory_equal(data + r * count, data, (size_t)count * 4);
            for (int64_t i = 0; i < count; i++)
                assert_true(data[i] == (float)(tp_size * (i % 64 + call) + tp_size * (tp_size - 1) / 2));
        }
    }
    cudaFree(ranks), cudaFree(messages), cudaFree(states), cudaFree(records), cudaFree(abort_word), cudaFree(areas);
    cudaFree(data);
}

static void test_together(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 3; seed++) {
        emulator_seed(seed);
        for (int tp_size : {2, 4})
            for (bool two_shot : {false, true})
                check_together(tp_size, two_shot, two_shot ? WIRE_F32 : WIRE_BF16);
    }
    emulator_seed(0);
}

int main(void)
{
    // On a device: its code is there before a kernel waits, and each stream has a queue of its own.
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums),     cmocka_unit_test(test_feedback),     cmocka_unit_test(test_norms),
        cmocka_unit_test(test_graph),    cmocka_unit_test(test_missing_rank), cmocka_unit_test(test_abort),
        cmocka_unit_test(test_together),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

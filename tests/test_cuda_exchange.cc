// Sums over ranks by their devices (kernels/cuda/exchange.*): each rank is a thread with streams of its own, over pinned memory that all have mapped
// (host) or straight into each other's device memory (p2p), on devices of their own or all on one. Held, bit for bit, to comm_all_reduce of the same ranks on the CPU: every algorithm and codec, feedback, rows with NaN, Inf, zeros
// and denormals, one row to some hundreds, through the wrap of the tokens. A norm behind an exchange is held to launch_norm. Then ranks that never come,
// and the abort word.
#include "tests/device/exchange_threads.h"

// ---- sums ----------------------------------------------------------------------------------------------------------

static const struct shape {
    int64_t rows, cols;
} shapes[] = {{1, 1024}, {1, 128}, {2, 5}, {9, 257}, {27, 384}, {11, 1000}, {200, 132}};

static void test_sums(void **state)
{
    for (int tp_size : {2, 3, 4, 8})
        run_ranks(*state, tp_size, TIMEOUT_MS, false, [](struct end *e) {
            std::vector<uint16_t> none;
            uint64_t message = 0;
            for (const struct shape &s : shapes)
                for (int wire = 0; wire < WIRE_COUNT; wire++)
                    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++) {
                        if (e->group->tp_size == 8 && s.rows * s.cols > 2000)
                            continue;
                        if (algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed((enum wire)wire))
                            continue; // never together
                        // The arithmetic is the same over all ways; what they differ in, every wire and algorithm shows with some shapes.
                        if (e->group->way->transport == TRANSPORT_P2P && emulator_present() &&
                            (s.cols == 1024 || s.cols == 384 || s.cols == 1000))
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
    for (int tp_size : {2, 4})
        run_ranks(*state, tp_size, TIMEOUT_MS, true, [](struct end *e) {
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

// ---- memory ------------------------------------------------------------------------------------------------------------

// What opening takes of the device is what the plan has counted, to a byte: nothing is taken that was not counted.
static void test_memory(void **state)
{
    size_t before, total;
    if (!emulator_present()) // others take memory there, and it is rounded
        skip();
    assert_int_equal(cudaMemGetInfo(&before, &total), cudaSuccess);
    for (bool feedback : {false, true})
        run_ranks(*state, 4, TIMEOUT_MS, feedback, [=](struct end *e) {
            struct error err;
            struct device_shape shape = e->device.shape;
            size_t after = 0, whole = 0, own = 3 * SCRATCH_BYTES + 2 * MAX_ROWS * HIDDEN * sizeof(float);
            shape.exchange = e->group->way->transport;
            shape.feedback = feedback;
            uint64_t planned = exchange_memory_bytes(&shape, 4);
            if (comm_barrier(e->comm, &err) || cudaMemGetInfo(&after, &whole) != cudaSuccess ||
                comm_barrier(e->comm, &err))
                note(e, "asking for its memory: %s", err.msg);
            if (before - after != 4 * (own + planned))
                note(e, "%zu bytes taken, %zu of the tests and %llu planned", before - after, 4 * own,
                     (unsigned long long)(4 * planned));
            if (exchange_memory_bytes(&shape, 1) != 0)
                note(e, "one rank alone needs memory");
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
    exchange_fill(x.data(), message, e->rank, rows, cols);
    exchange_fill(residual.data(), message, 99, rows, cols);
    send(device_weight, weight.data(), (size_t)cols * 4);
    d->count = rows;
    e->desc.hidden_size = cols;
    for (int apart = 0; apart < 2; apart++) {
        cudaMemsetAsync(norm.out.values, 0, value_bytes, d->stream);
        cudaMemsetAsync(norm.out.scale, 0, value_bytes, d->stream);
        send(d->buffer[BUFFER_PARTIAL], x.data(), count * 4);
        send(d->buffer[BUFFER_RESIDUAL], residual.data(), count * 4);
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
        values[apart].resize(value_bytes);
        scales[apart].resize(value_bytes);
        residuals[apart].resize(count);
        cudaMemcpy(values[apart].data(), norm.out.values, value_bytes, cudaMemcpyDeviceToHost);
        cudaMemcpy(scales[apart].data(), norm.out.scale, value_bytes, cudaMemcpyDeviceToHost);
        cudaMemcpy(residuals[apart].data(), norm.residual, count * 4, cudaMemcpyDeviceToHost);
    }
    if (values[0] != values[1] || scales[0] != scales[1] ||
        memcmp(residuals[0].data(), residuals[1].data(), count * 4) != 0)
        note(e, "format %d, %lld x %lld: a norm behind its exchange differs from one apart", (int)format,
             (long long)rows, (long long)cols);
}

static void test_norms(void **state)
{
    for (int tp_size : {2, 4})
        run_ranks(*state, tp_size, TIMEOUT_MS, false, [](struct end *e) {
            uint64_t message = 200;
            for (int format = INPUT_F16; format <= INPUT_F32; format++) {
                check_norm(e, message++, 1, 1024, (enum input_format)format, false);
                check_norm(e, message++, 10, 260, (enum input_format)format, format % 2);
            }
        });
}

// ---- graphs --------------------------------------------------------------------------------------------------------

// A graph with exchanges is launched again and again: tokens are counted on the device. A copy at its beginning gives each launch the same numbers.
// The second of three sums is over `algorithm`, and so is one behind each turn that is in no graph.
static void check_graph(void *way, enum exchange_algorithm second)
{
    run_ranks(way, 2, TIMEOUT_MS, false, [=](struct end *e) {
        struct error err;
        struct device *d = &e->device;
        enum { ROWS = 3, COLS = 256, COUNT = ROWS * COLS, TURNS = 12 };
        int replays = emulator_present() ? 2 : second == ALGORITHM_CHUNKS ? 500 : 10000;
        std::vector<float> x(COUNT), want(COUNT), got(COUNT);
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        e->desc.hidden_size = COLS;
        d->count = ROWS;
        cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        cudaMemcpyAsync(d->buffer[BUFFER_PARTIAL], e->memory[0], COUNT * 4, cudaMemcpyDeviceToDevice, d->stream);
        struct exchange_choice alone = {second, WIRE_F32, 2 * COLS}; // chunks of a row
        for (enum exchange_algorithm algorithm : {ALGORITHM_ONE_SHOT, second, ALGORITHM_ONE_SHOT}) {
            struct exchange_choice choice = {algorithm, WIRE_F32, 2 * COLS};
            if (exchange_all_reduce(d, BUFFER_PARTIAL, &choice, false, OP_MLP, 0, &err) || exchange_flush(d, &err))
                note(e, "%s", err.msg);
        }
        if (cudaStreamEndCapture(d->stream, &graph) != cudaSuccess)
            note(e, "recording: %s", cudaGetErrorName(cudaGetLastError()));
        cudaGraphInstantiate(&exec, graph, 0);
        comm_barrier(e->comm, &err); // nobody makes a graph while others wait on the device
        for (int i = 0; i < TURNS; i++) {
            for (int k = 0; k < COUNT; k++)
                x[(size_t)k] = (float)((e->rank + 1) * (k + i)), want[(size_t)k] = (float)(3 * (k + i) * 8);
            send(e->memory[0], x.data(), COUNT * 4);
            for (int k = 0; k < replays; k++)
                cudaGraphLaunch(exec, d->stream);
            if (exchange_all_reduce(d, BUFFER_PARTIAL, &alone, false, OP_MLP, 0, &err) ||
                device_wait(d, "a graph", &err))
                note(e, "%s", err.msg);
            cudaMemcpy(got.data(), d->buffer[BUFFER_PARTIAL], COUNT * 4, cudaMemcpyDeviceToHost);
            if (memcmp(want.data(), got.data(), COUNT * 4) != 0)
                note(e, "turn %d has other sums", i);
        }
        comm_barrier(e->comm, &err);
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
    });
}

static void test_graph(void **state)
{
    check_graph(*state, ALGORITHM_TWO_SHOT);
    check_graph(*state, ALGORITHM_CHUNKS);
}

// ---- failures ------------------------------------------------------------------------------------------------------

// The last rank leaves before a sum; the others must not wait for ever.
static void test_missing_rank(void **state)
{
    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++)
        run_ranks(*state, 4, 700, false, [=](struct end *e) {
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
    run_ranks(*state, 3, 600000, false, [](struct end *e) {
        struct error err;
        struct exchange_choice choice = {ALGORITHM_TWO_SHOT, WIRE_S8X, 0};
        e->desc.hidden_size = 256;
        e->device.count = 7;
        cudaMemsetAsync(e->device.buffer[BUFFER_PARTIAL], 0, 7 * 256 * 4, e->device.stream);
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

// A step fails while it is recorded, with chunks that have taken their streams into the recording.
static void test_failed_recording(void **state)
{
    run_ranks(*state, 2, TIMEOUT_MS, false, [](struct end *e) {
        struct error err;
        struct device *d = &e->device;
        struct exchange_choice choice = {ALGORITHM_CHUNKS, WIRE_BF16, 2 * 4 * 256};
        e->desc.hidden_size = 256;
        d->count = 12;
        d->recording = true;
        if (cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess ||
            exchange_all_reduce(d, BUFFER_PARTIAL, &choice, false, OP_MLP, 3, &err))
            note(e, "recording: %s", err.msg);
        exchange_close(d);
        if (d->recording || cudaStreamQuery(d->stream) != cudaSuccess)
            note(e, "the recording goes on");
    });
}

int main(void)
{
    if (!begin_exchange_tests())
        return 0;
    static struct way host = {TRANSPORT_HOST, 1}, p2p = {TRANSPORT_P2P, TEST_RANKS}, shared = {TRANSPORT_P2P, 1};
    const struct CMUnitTest tests[] = {
        {"sums over host", test_sums, NULL, NULL, &host},
        {"sums over p2p", test_sums, NULL, NULL, &p2p},
        {"feedback over host", test_feedback, NULL, NULL, &host},
        {"feedback over p2p", test_feedback, NULL, NULL, &p2p},
        {"memory over host", test_memory, NULL, NULL, &host},
        {"memory over p2p on one device", test_memory, NULL, NULL, &shared},
        {"norms over host", test_norms, NULL, NULL, &host},
        {"norms over p2p on one device", test_norms, NULL, NULL, &shared},
        {"graphs over host", test_graph, NULL, NULL, &host},
        {"graphs over p2p", test_graph, NULL, NULL, &p2p},
        {"a missing rank over host", test_missing_rank, NULL, NULL, &host},
        {"a missing rank over p2p", test_missing_rank, NULL, NULL, &p2p},
        {"an abort over host", test_abort, NULL, NULL, &host},
        {"an abort over p2p on one device", test_abort, NULL, NULL, &shared},
        {"a failed recording", test_failed_recording, NULL, NULL, &host},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

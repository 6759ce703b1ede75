// Sums over ranks in one launch, rank blockIdx.y: its blocks run together, so that one device, compute-sanitizer and the emulator can run it without
// ranks that wait for others which do not run. The ranks' kernels are those of kernels/cuda/exchange.cu; their areas lie in memory of the device.
//
// Held, bit for bit and on every rank, to the arithmetic of the CPU's collectives (engine/comm_reduce.h): both algorithms, every codec, feedback,
// rows with NaN, Inf, zeros and denormals, through the wrap of the tokens; likewise the halves of a sum, whose rows have owners; then a graph of it, launched again and again.
#include "tests/device/cuda_test.h"
#include "tests/device/exchange_messages.h"

extern "C" {
#include "engine/comm_reduce.h"
}
#include "kernels/cuda/exchange.h"

#include <vector>

enum { MAX_RANKS = 8, BLOCKS = 4, CALLS_BEFORE_WRAP = -EXCHANGE_FIRST_TOKEN };
static const uint64_t TIMEOUT_NS = 60000000000u;

// ---- the CPU -----------------------------------------------------------------------------------------------------------

typedef std::vector<float> values;

// What every rank has after a sum of data; lost (empty: no feedback) goes on to the next one. Both [tp_size].
static void sum_on_cpu(std::vector<values> &data, std::vector<std::vector<uint16_t>> &lost, int64_t rows, int64_t cols,
                       enum wire wire)
{
    int tp_size = (int)data.size();
    uint64_t groups = wire_groups((uint64_t)cols), count = (uint64_t)rows * groups;
    size_t bytes = (size_t)(count * wire_group_bytes(wire));
    std::vector<std::vector<uint8_t>> parts((size_t)tp_size), sums((size_t)tp_size);
    std::vector<struct reduce_piece> pieces((size_t)tp_size);
    for (size_t r = 0; r < data.size(); r++) {
        struct reduce_piece *p = &pieces[r];
        parts[r].resize(bytes);
        sums[r].resize(bytes);
        *p = {};
        p->data = data[r].data();
        p->lost = lost.empty() ? NULL : lost[r].data();
        p->cols = p->stride = (uint64_t)cols;
        p->groups_per_row = groups;
        p->count = count;
        p->wire = wire;
        p->rank = (int)r;
        p->tp_size = tp_size;
        p->to = parts[r].data();
        reduce_encode(p, 0, count);
    }
    for (struct reduce_piece &p : pieces) {
        for (size_t r = 0; r < data.size(); r++)
            p.from[r] = parts[r].data();
        p.to = sums[(size_t)p.rank].data();
        reduce_add_up(&p, 0, count);
    }
    for (struct reduce_piece &p : pieces) {
        for (size_t r = 0; r < data.size(); r++)
            p.from[r] = sums[r].data();
        reduce_decode(&p, 0, count);
    }
}

// ---- the device --------------------------------------------------------------------------------------------------------

// All ranks of a group. Managed memory, or the emulator's: the host sees it while nothing runs.
struct together {
    int tp_size;
    int64_t rows, cols;
    struct exchange_ranks *ranks;
    struct exchange_message *messages;
    struct exchange_state *states;
    struct exchange_record *records;
    uint32_t *abort_word;
    uint8_t *areas;
    float *data;    // [tp_size][rows][cols]
    uint16_t *lost; // likewise
};

static bool p2p; // ranks write to areas of the others', one for each pair; else all read what one writes

static int num_areas(int tp_size) { return p2p ? tp_size * tp_size : tp_size; }

static uint8_t *area_of(const struct together *t, int owner, int sender)
{
    return t->areas + (int64_t)(p2p ? owner * t->tp_size + sender : sender) * EXCHANGE_DIRECT_BYTES;
}

static void open_together(struct together *t, int tp_size, int64_t rows, int64_t cols)
{
    *t = {};
    t->tp_size = tp_size, t->rows = rows, t->cols = cols;
    t->ranks = (struct exchange_ranks *)device_zeros(tp_size * (int64_t)sizeof *t->ranks);
    t->messages = (struct exchange_message *)device_zeros(tp_size * (int64_t)sizeof *t->messages);
    t->states = (struct exchange_state *)device_zeros(tp_size * (int64_t)sizeof *t->states);
    t->records = (struct exchange_record *)device_zeros(tp_size * (int64_t)sizeof *t->records);
    t->abort_word = (uint32_t *)device_zeros(4);
    t->areas = (uint8_t *)device_zeros(num_areas(tp_size) * (int64_t)EXCHANGE_DIRECT_BYTES);
    t->data = (float *)device_zeros(tp_size * rows * cols * 4);
    t->lost = (uint16_t *)device_zeros(tp_size * rows * cols * 2);
    for (int r = 0; r < tp_size; r++) {
        struct exchange_ranks *one = &t->ranks[r];
        one->rank = r;
        one->tp_size = tp_size;
        for (int other = 0; other < tp_size; other++) {
            one->to[other] = area_of(t, other, r);
            one->from[other] = area_of(t, r, other);
            if (p2p ? other != r : other == 0)
                one->every[one->num_every++] = one->to[other];
        }
        one->state = &t->states[r];
        one->record = &t->records[r];
        one->abort = t->abort_word;
        one->timeout_ns = TIMEOUT_NS;
        for (int lane = 0; lane < EXCHANGE_LANES; lane++)
            t->states[r].token[lane] = (uint32_t)EXCHANGE_FIRST_TOKEN;
    }
    for (int a = 0; a < num_areas(tp_size); a++)
        for (int lane = 0; lane < EXCHANGE_LANES; lane++)
            *(uint32_t *)(void *)(t->areas + (int64_t)a * EXCHANGE_DIRECT_BYTES + lane * EXCHANGE_TOKEN_BYTES) =
                (uint32_t)EXCHANGE_FIRST_TOKEN;
}

static void close_together(struct together *t)
{
    cudaFree(t->ranks), cudaFree(t->messages), cudaFree(t->states), cudaFree(t->records), cudaFree(t->abort_word);
    cudaFree(t->areas), cudaFree(t->data), cudaFree(t->lost);
}

static void set_messages(struct together *t, enum wire wire, bool feedback)
{
    int64_t count = t->rows * t->cols;
    for (int r = 0; r < t->tp_size; r++) {
        struct exchange_message *m = &t->messages[r];
        *m = {};
        m->data = t->data + r * count;
        m->lost = feedback ? t->lost + r * count : NULL;
        m->rows = (uint32_t)t->rows;
        m->cols = (uint32_t)t->cols;
        m->wire = wire;
    }
}

static const char *const names[] = {"one-shot", "two-shot"};

static void compare(const struct together *t, const std::vector<values> &want,
                    const std::vector<std::vector<uint16_t>> &lost, bool two_shot, enum wire wire)
{
    size_t count = (size_t)(t->rows * t->cols);
    for (size_t r = 0; r < want.size(); r++) {
        const float *got = t->data + r * count;
        for (size_t i = 0; i < count; i++)
            if (f32_bits(got[i]) != f32_bits(want[r][i]))
                fail_msg("%s, %s, %d ranks, %lld x %lld: value %zu of rank %zu is %a (%08x), not %a (%08x)",
                         names[two_shot], wire_name(wire), t->tp_size, (long long)t->rows, (long long)t->cols, i, r,
                         (double)got[i], f32_bits(got[i]), (double)want[r][i], f32_bits(want[r][i]));
        if (!lost.empty() && memcmp(t->lost + r * count, lost[r].data(), count * sizeof lost[r][0]) != 0)
            fail_msg("%s, %s: rank %zu has other losses than on the CPU", names[two_shot], wire_name(wire), r);
        if (memcmp(got, t->data, count * sizeof *got) != 0)
            fail_msg("%s, %s: ranks 0 and %zu have other bits", names[two_shot], wire_name(wire), r);
    }
}

static void check_shape(int tp_size, int64_t rows, int64_t cols, bool two_shot, enum wire wire, bool feedback,
                        int calls)
{
    struct together t;
    size_t count = (size_t)(rows * cols);
    std::vector<values> want((size_t)tp_size, values(count));
    std::vector<std::vector<uint16_t>> lost;
    if (feedback)
        lost.assign((size_t)tp_size, std::vector<uint16_t>(count));
    open_together(&t, tp_size, rows, cols);
    set_messages(&t, wire, feedback);
    for (int call = 0; call < calls; call++) {
        for (size_t r = 0; r < want.size(); r++) {
            exchange_fill(want[r].data(), (uint64_t)(call + 17 * tp_size), (int)r, rows, cols);
            memcpy(t.data + r * count, want[r].data(), count * sizeof(float));
        }
        finish(launch_exchange_together(t.ranks, t.messages, tp_size, two_shot, BLOCKS, NULL));
        assert_int_equal(*t.abort_word, 0);
        sum_on_cpu(want, lost, rows, cols, wire);
        compare(&t, want, lost, two_shot, wire);
    }
    if (calls > CALLS_BEFORE_WRAP) // each call is a phase at least
        assert_true(t.states[0].token[0] < UINT32_MAX / 2);
    close_together(&t);
}

static void test_bits(void **state)
{
    (void)state;
    static const struct {
        int64_t rows, cols;
    } shapes[] = {{1, 1024}, {3, 5}, {11, 520}}, large[] = {{700, 1000}, {4096, 256}};
    for (int tp_size : {2, 4, 8})
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            for (bool two_shot : {false, true}) {
                if (!two_shot && wire_is_compressed((enum wire)wire))
                    continue;                // never together
                for (const auto &s : shapes) // the emulator takes its time
                    if (emulator_present() && p2p && (s.rows == 1 || wire == WIRE_FP8))
                        continue;
                    else if (tp_size < 8 || s.rows < 4 || !(emulator_present() || quick()))
                        check_shape(tp_size, s.rows, s.cols, two_shot, (enum wire)wire, false, 2);
                if (!emulator_present() && !quick())
                    for (const auto &s : large)
                        check_shape(tp_size, s.rows, s.cols, two_shot, (enum wire)wire, false, 1);
            }
}

// ---- halves ------------------------------------------------------------------------------------------------------------

// A row at its owner, of others' coded parts and its own as it is; then what it is after the way over the wire.
static void row_on_cpu(const std::vector<values> &data, size_t owner, int64_t row, int64_t cols, enum wire wire,
                       values &sum, values &all)
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    for (int64_t col = 0; col < cols; col += WIRE_GROUP) {
        int count = cols - col < WIRE_GROUP ? (int)(cols - col) : WIRE_GROUP;
        for (int i = 0; i < count; i++)
            sum[(size_t)(col + i)] = 0;
        for (size_t r = 0; r < data.size(); r++) {
            enum wire coded = r == owner ? WIRE_F32 : wire;
            wire_encode_group(bytes, &data[r][(size_t)(row * cols + col)], count, coded);
            wire_add_group(&sum[(size_t)col], bytes, count, coded);
        }
        wire_encode_group(bytes, &sum[(size_t)col], count, wire);
        wire_decode_group(&all[(size_t)col], bytes, count, wire);
    }
}

static void compare_rows(const struct together *t, const std::vector<values> &data, uint32_t first_owner,
                         enum wire wire, bool gathered)
{
    size_t cols = (size_t)t->cols, count = (size_t)t->rows * cols;
    values sum(cols), all(cols);
    for (int64_t row = 0; row < t->rows; row++) {
        size_t owner = (first_owner + (size_t)row) % data.size();
        row_on_cpu(data, owner, row, t->cols, wire, sum, all);
        for (size_t r = 0; r < data.size(); r++) {
            const float *got = t->data + r * count + (size_t)row * cols;
            const float *want = gathered ? all.data() : r == owner ? sum.data() : &data[r][(size_t)row * cols];
            if (memcmp(got, want, cols * sizeof *want) != 0)
                fail_msg("%s, %s, %d ranks, %lld x %lld: rank %zu has another row %lld",
                         gathered ? "to all" : "to owners", wire_name(wire), t->tp_size, (long long)t->rows,
                         (long long)t->cols, r, (long long)row);
        }
    }
}

static void check_rows(int tp_size, int64_t rows, int64_t cols, uint32_t first_owner, enum wire wire, int calls)
{
    struct together t;
    size_t count = (size_t)(rows * cols);
    std::vector<values> data((size_t)tp_size, values(count));
    open_together(&t, tp_size, rows, cols);
    set_messages(&t, wire, false);
    for (int call = 0; call < calls; call++) {
        for (size_t r = 0; r < data.size(); r++) {
            exchange_fill(data[r].data(), (uint64_t)(call + 31 * tp_size), (int)r, rows, cols);
            memcpy(t.data + r * count, data[r].data(), count * sizeof(float));
        }
        for (enum exchange_half half : {EXCHANGE_TO_OWNERS, EXCHANGE_TO_ALL}) {
            for (int r = 0; r < tp_size; r++)
                t.messages[r].half = half, t.messages[r].first_owner = first_owner;
            finish(launch_exchange_together(t.ranks, t.messages, tp_size, true, BLOCKS, NULL));
            assert_int_equal(*t.abort_word, 0);
            compare_rows(&t, data, first_owner, wire, half == EXCHANGE_TO_ALL);
        }
    }
    close_together(&t);
}

static void test_halves(void **state)
{
    (void)state;
    for (int tp_size : {2, 4, 8})
        for (int wire = 0; wire < WIRE_COUNT; wire++) {
            check_rows(tp_size, 3, 520, 1, (enum wire)wire, 1);
            if (tp_size < 8 || !(emulator_present() || quick()))
                check_rows(tp_size, 11, 260, (uint32_t)tp_size - 1, (enum wire)wire, 1);
            if (!emulator_present() && !quick())
                check_rows(tp_size, 2049, 1000, 0, (enum wire)wire, 2);
        }
    check_rows(2, 2, 130, 1, WIRE_S8X, CALLS_BEFORE_WRAP / 2 + 2); // through the wrap
}

static void test_wrap_and_feedback(void **state)
{
    (void)state;
    for (int tp_size : {2, 4}) {
        check_shape(tp_size, 2, 260, false, WIRE_BF16, false, CALLS_BEFORE_WRAP + 4);
        check_shape(tp_size, 2, 260, true, WIRE_F32, false, CALLS_BEFORE_WRAP + 4);
        for (enum wire wire : {WIRE_FP8, WIRE_S8X})
            check_shape(tp_size, 5, 520, true, wire, true, 4);
    }
}

// Threads and blocks in other orders.
static void test_orders(void **state)
{
    (void)state;
    if (!emulator_present())
        skip();
    for (uint64_t seed = 1; seed < 4; seed++) {
        emulator_seed(seed);
        for (bool two_shot : {false, true})
            check_shape(4, 5, 520, two_shot, two_shot ? WIRE_F32 : WIRE_BF16, false, 3);
    }
    emulator_seed(0);
}

// A graph with two sums in it, each two-shot or not: tokens are counted on the device. The first copy gives each launch the same numbers.
static void check_graph(const bool (&two_shot)[2], enum wire wire)
{
    enum { TP_SIZE = 4, ROWS = 3, COLS = 384, LAUNCHES = 4 };
    struct together t;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    size_t count = ROWS * COLS;
    int replays = emulator_present() || quick() ? 5 : 2000;
    std::vector<values> want(TP_SIZE, values(count));
    std::vector<std::vector<uint16_t>> none;
    open_together(&t, TP_SIZE, ROWS, COLS);
    set_messages(&t, wire, false);
    float *first = (float *)device_zeros((int64_t)(TP_SIZE * count * sizeof(float)));
    for (size_t r = 0; r < want.size(); r++) {
        exchange_fill(want[r].data(), 5, (int)r, ROWS, COLS);
        memcpy(first + r * count, want[r].data(), count * sizeof(float));
    }
    for (bool two : two_shot) // loads the code
        finish(launch_exchange_together(t.ranks, t.messages, TP_SIZE, two, BLOCKS, NULL));
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(t.data, first, TP_SIZE * count * sizeof(float), cudaMemcpyDeviceToDevice, stream),
                     cudaSuccess);
    for (bool two : two_shot)
        assert_int_equal(launch_exchange_together(t.ranks, t.messages, TP_SIZE, two, BLOCKS, stream), cudaSuccess);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    sum_on_cpu(want, none, ROWS, COLS, wire);
    sum_on_cpu(want, none, ROWS, COLS, wire);
    for (int i = 0; i < LAUNCHES; i++) {
        for (int k = 0; k < replays; k++)
            assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
        assert_int_equal(*t.abort_word, 0);
        compare(&t, want, none, true, wire);
        memset(t.data, 0xff, TP_SIZE * count * sizeof(float));
    }
    assert_int_equal(t.states[0].calls, 2 + 2 * LAUNCHES * replays);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    cudaFree(first);
    close_together(&t);
}

static void test_graph(void **state)
{
    (void)state;
    check_graph({false, true}, WIRE_BF16);
    check_graph({true, true}, WIRE_S8X);
}

static int over_host(void **state)
{
    (void)state;
    p2p = false;
    return 0;
}

static int over_p2p(void **state)
{
    (void)state;
    p2p = true;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"bits over host", test_bits, over_host, NULL, NULL},
        {"bits over p2p", test_bits, over_p2p, NULL, NULL},
        {"halves over host", test_halves, over_host, NULL, NULL},
        {"halves over p2p", test_halves, over_p2p, NULL, NULL},
        {"wrap and feedback over host", test_wrap_and_feedback, over_host, NULL, NULL},
        {"wrap and feedback over p2p", test_wrap_and_feedback, over_p2p, NULL, NULL},
        {"orders over host", test_orders, over_host, NULL, NULL},
        {"orders over p2p", test_orders, over_p2p, NULL, NULL},
        {"a graph over host", test_graph, over_host, NULL, NULL},
        {"a graph over p2p", test_graph, over_p2p, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

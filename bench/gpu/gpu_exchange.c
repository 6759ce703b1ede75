// Sums over ranks on one device, one result line each. No link between devices is in these figures: bench/gpu/gpu_nccl.c and `tpengine doctor` measure
// links.
//
//   gpu_coding    what a rank computes of one sum of a prompt whose bytes copy engines or NCCL move: its parts coded, those that came for it added up
//                 and coded, the others' sums decoded (kernels/cuda/shares.h). Bytes of the device's memory that must be read and written, by
//                 its time, beside what the device copies in the same run. Messages rotate, so that none is still in the L2 cache.
//   gpu_together  all ranks in one cooperative launch, a message of one row over areas in the device's memory or in the host's, where every byte crosses
//                 PCIe: a graph of a copy that sets the numbers and one exchange, launched REPLAYS times. Every sum that is looked at must be
//                 right, no wait may have ended late, and the device must have counted every launch.
//
//   gpu_exchange [quick]     quick: small shapes, few launches: for compute-sanitizer and the emulator
#include "bench/gpu/gpu_timing.h"
#include "kernels/clock.h"
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/shares.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    COPIES = 4,
    ROWS = 2048,
    COLS = 8192,
    REPLAYS = 1000000,
    FEW_REPLAYS = 100000,
    LOOK_REPLAYS = 1000, // launches between two looks
    BLOCKS = 8,          // of a rank
    MAX_RANKS = 8,
};

static struct gpu gpu;

// ---- what a rank computes of a sum -------------------------------------------------------------------------------------

struct coding {
    struct share_piece piece;
    float *data[COPIES];
    uint8_t *parts_out[COPIES], *parts_in[COPIES], *sums_out[COPIES], *sums_in[COPIES];
};

static void code_sum(void *arg, int repeat)
{
    struct coding *c = arg;
    int i = repeat % COPIES;
    c->piece.data = c->data[i];
    gpu_check(launch_share_encode(c->parts_out[i], &c->piece, NULL, 0, gpu.stream), "encoding");
    gpu_check(launch_share_add_up(c->sums_out[i], c->parts_in[i], &c->piece, gpu.stream), "adding up");
    gpu_check(launch_share_decode(c->sums_in[i], &c->piece, gpu.stream), "decoding");
}

static void measure_coding(int tp_size, enum wire wire, int64_t rows, int64_t cols)
{
    struct coding c = {.piece = {.rows = rows, .cols = cols, .stride = cols, .wire = wire, .tp_size = tp_size}};
    uint64_t values = (uint64_t)(rows * cols) * sizeof(float), share = (uint64_t)share_bytes(rows, cols, tp_size, wire);
    uint64_t others = (uint64_t)tp_size - 1, all = (uint64_t)tp_size * share;
    for (int i = 0; i < COPIES; i++) {
        c.data[i] = gpu_take(values);
        gpu_fill_random(c.data[i], values, 0x3f); // small and finite
        uint8_t **buffers[] = {&c.parts_out[i], &c.parts_in[i], &c.sums_in[i]};
        for (size_t b = 0; b < sizeof buffers / sizeof *buffers; b++) {
            *buffers[b] = gpu_take(all);
            gpu_check(cudaMemset(*buffers[b], 0, all), "clearing");
        }
        c.sums_out[i] = gpu_take(share);
        // What comes from others is coded numbers too.
        c.piece.data = c.data[i];
        gpu_check(launch_share_encode(c.parts_in[i], &c.piece, NULL, 0, gpu.stream), "encoding");
        gpu_check(launch_share_encode(c.sums_in[i], &c.piece, NULL, 0, gpu.stream), "encoding");
    }
    gpu_check(cudaStreamSynchronize(gpu.stream), "running");
    double us = gpu_time_us(&gpu, code_sum, &c, 2 * COPIES);
    // All values are read once, and written once as results; others' groups are coded, read and decoded, its own coded once.
    double bytes = 2 * (double)values + (double)share * (double)(3 * others + 1), gb_s = 1e-3 * bytes / us;
    printf("gpu_coding wire=%s tp=%d rows=%lld cols=%lld us=%.1f gb_s=%.0f copy_share=%.3f gpu=%s\n", wire_name(wire),
           tp_size, (long long)rows, (long long)cols, us, gb_s, gb_s / gpu.copy_gb_s, gpu.name);
    fflush(stdout);
    for (int i = 0; i < COPIES; i++) {
        cudaFree(c.data[i]);
        cudaFree(c.parts_out[i]);
        cudaFree(c.parts_in[i]);
        cudaFree(c.sums_out[i]);
        cudaFree(c.sums_in[i]);
    }
}

// ---- all ranks in one launch -------------------------------------------------------------------------------------------

struct together {
    int tp_size;
    bool in_host;
    uint8_t *areas, *host_areas; // as the device and as the host see them; host_areas NULL: in the device's memory
    struct exchange_ranks *ranks;
    struct exchange_message *messages;
    struct exchange_state *states;
    struct exchange_record *records; // pinned, like the abort word
    uint32_t *abort_word;
    float *first, *data; // [tp_size][COLS]
    float want[COLS];
};

static void *pin(uint64_t bytes)
{
    void *p;
    gpu_check(cudaMallocHost(&p, bytes), "pinned memory");
    memset(p, 0, bytes);
    return p;
}

static void *seen_by_device(void *pinned)
{
    void *p;
    gpu_check(cudaHostGetDevicePointer(&p, pinned, 0), "pinned memory");
    return p;
}

static void send(void *to, const void *from, uint64_t bytes)
{
    gpu_check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copying");
    gpu_check(cudaStreamSynchronize(NULL), "copying"); // gpu.stream does not wait for it
}

// The tokens before the first one, in states and areas.
static void make_areas(struct together *t)
{
    static struct exchange_state states[MAX_RANKS];
    static uint32_t tokens[EXCHANGE_SLOTS_OFFSET / sizeof(uint32_t)];
    uint64_t bytes = (uint64_t)t->tp_size * EXCHANGE_DIRECT_BYTES;
    t->host_areas = t->in_host ? pin(bytes) : NULL;
    t->areas = t->in_host ? seen_by_device(t->host_areas) : gpu_take(bytes);
    t->states = gpu_take(sizeof states);
    for (int lane = 0; lane < EXCHANGE_LANES; lane++) {
        tokens[lane * EXCHANGE_TOKEN_BYTES / (int)sizeof *tokens] = (uint32_t)EXCHANGE_FIRST_TOKEN;
        for (int r = 0; r < t->tp_size; r++)
            states[r].token[lane] = states[r].waited[lane] = (uint32_t)EXCHANGE_FIRST_TOKEN;
    }
    for (int r = 0; r < t->tp_size; r++) {
        uint64_t at = (uint64_t)r * EXCHANGE_DIRECT_BYTES;
        if (t->in_host)
            memcpy(t->host_areas + at, tokens, sizeof tokens);
        else
            send(t->areas + at, tokens, sizeof tokens);
    }
    send(t->states, states, sizeof states);
}

// Values whose sum bf16 carries exactly.
static void make_messages(struct together *t)
{
    static float first[MAX_RANKS][COLS];
    uint64_t bytes = (uint64_t)t->tp_size * COLS * sizeof(float);
    for (int i = 0; i < COLS; i++) {
        t->want[i] = (float)(t->tp_size * (i % 16) + t->tp_size * (t->tp_size - 1) / 2);
        for (int r = 0; r < t->tp_size; r++)
            first[r][i] = (float)(i % 16 + r);
    }
    t->first = gpu_take(bytes);
    t->data = gpu_take(bytes);
    send(t->first, first, bytes);
}

static void make_ranks(struct together *t)
{
    struct exchange_ranks ranks[MAX_RANKS];
    struct exchange_message messages[MAX_RANKS];
    t->abort_word = pin(sizeof *t->abort_word);
    t->records = pin(MAX_RANKS * sizeof *t->records);
    uint32_t *abort_word = seen_by_device(t->abort_word);
    struct exchange_record *records = seen_by_device(t->records);
    memset(ranks, 0, sizeof ranks);
    memset(messages, 0, sizeof messages);
    for (int r = 0; r < t->tp_size; r++) {
        ranks[r] = (struct exchange_ranks){.rank = r,
                                           .tp_size = t->tp_size,
                                           .num_every = 1,
                                           .state = t->states + r,
                                           .abort = abort_word,
                                           .record = records + r,
                                           .timeout_ns = 10000000000};
        ranks[r].every[0] = t->areas + (uint64_t)r * EXCHANGE_DIRECT_BYTES;
        for (int other = 0; other < t->tp_size; other++) {
            ranks[r].to[other] = ranks[r].every[0];
            ranks[r].from[other] = t->areas + (uint64_t)other * EXCHANGE_DIRECT_BYTES;
        }
        messages[r] =
            (struct exchange_message){.data = t->data + (uint64_t)r * COLS, .rows = 1, .cols = COLS, .wire = WIRE_BF16};
    }
    t->ranks = gpu_take(sizeof ranks);
    t->messages = gpu_take(sizeof messages);
    send(t->ranks, ranks, sizeof ranks);
    send(t->messages, messages, sizeof messages);
}

static void free_together(struct together *t)
{
    if (t->in_host)
        cudaFreeHost(t->host_areas);
    else
        cudaFree(t->areas);
    cudaFreeHost(t->abort_word);
    cudaFreeHost(t->records);
    void *const on_device[] = {t->ranks, t->messages, t->states, t->first, t->data};
    for (size_t i = 0; i < sizeof on_device / sizeof *on_device; i++)
        cudaFree(on_device[i]);
}

static void exchange(struct together *t)
{
    gpu_check(cudaMemcpyAsync(t->data, t->first, (uint64_t)t->tp_size * COLS * sizeof(float), cudaMemcpyDeviceToDevice,
                              gpu.stream),
              "copying");
    gpu_check(launch_exchange_together(t->ranks, t->messages, t->tp_size, false, BLOCKS, gpu.stream), "an exchange");
}

// After so many exchanges: the last one's sums, and that none was late or left out.
static void look(const struct together *t, int exchanges)
{
    static float got[MAX_RANKS][COLS];
    struct exchange_state states[MAX_RANKS];
    gpu_check(cudaStreamSynchronize(gpu.stream), "exchanges");
    gpu_check(cudaMemcpy(got, t->data, (uint64_t)t->tp_size * COLS * sizeof(float), cudaMemcpyDeviceToHost), "copying");
    gpu_check(cudaMemcpy(states, t->states, (uint64_t)t->tp_size * sizeof *states, cudaMemcpyDeviceToHost), "copying");
    for (int r = 0; r < t->tp_size; r++) {
        bool right = memcmp(got[r], t->want, sizeof t->want) == 0;
        if (right && !*t->abort_word && !states[r].broken && states[r].calls == (uint32_t)exchanges)
            continue;
        fflush(stdout);
        fprintf(stderr,
                "gpu_exchange: %d ranks, areas in %s memory, after %d exchanges: rank %d has %s sums, counted %u, %s\n",
                t->tp_size, t->in_host ? "the host's" : "device", exchanges, r, right ? "the right" : "other",
                states[r].calls,
                states[r].broken || *t->abort_word ? "and a wait was too long" : "and no wait was too long");
        exit(6);
    }
}

static void replay(int tp_size, bool in_host, int replays, int between)
{
    static struct together t;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    t = (struct together){.tp_size = tp_size, .in_host = in_host};
    make_areas(&t);
    make_messages(&t);
    make_ranks(&t);
    exchange(&t); // loads the code
    look(&t, 1);
    gpu_check(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal), "capture");
    exchange(&t);
    gpu_check(cudaStreamEndCapture(gpu.stream, &graph), "capture");
    gpu_check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    double looking_s = 0, begin_s = clock_now_s();
    for (int done = 0; done < replays;) {
        int now = replays - done < between ? replays - done : between;
        for (int i = 0; i < now; i++)
            gpu_check(cudaGraphLaunch(exec, gpu.stream), "launching");
        done += now;
        gpu_check(cudaStreamSynchronize(gpu.stream), "exchanges");
        double look_s = clock_now_s();
        look(&t, 1 + done);
        looking_s += clock_now_s() - look_s;
    }
    printf("gpu_together tp=%d areas=%s wire=bf16 rows=1 cols=%d replays=%d us=%.2f gpu=%s\n", tp_size,
           in_host ? "host" : "device", COLS, replays, 1e6 * (clock_now_s() - begin_s - looking_s) / replays, gpu.name);
    fflush(stdout);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    free_together(&t);
}

int main(int argc, char **argv)
{
    static const enum wire wires[] = {WIRE_S8X, WIRE_FP8, WIRE_BF16};
    bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    gpu_open(&gpu, quick);
    gpu_measure_copy(&gpu, quick ? 1ull << 20 : 1ull << 30);
    for (size_t w = 0; w < sizeof wires / sizeof *wires; w++)
        for (int tp_size = 2; tp_size <= (quick ? 2 : MAX_RANKS); tp_size *= 2)
            measure_coding(tp_size, wires[w], quick ? 8 : ROWS, quick ? 1024 : COLS);
    replay(4, false, quick ? 6 : REPLAYS, quick ? 3 : LOOK_REPLAYS);
    replay(2, false, quick ? 2 : FEW_REPLAYS, LOOK_REPLAYS);
    replay(2, true, quick ? 2 : FEW_REPLAYS, LOOK_REPLAYS);
    replay(4, true, quick ? 2 : FEW_REPLAYS, LOOK_REPLAYS);
    cudaStreamDestroy(gpu.stream);
    return 0;
}

// What does an all_reduce between cards cost on PCIe links, in bytes and time? bench/link_simulator.h says what is real and what is
// a model: bytes are counted as they are moved; us are of its virtual clock.
//
//   exchange    one line for each transport, codec, size and number of ranks, by the algorithm of engine/comm_select.h;
//               to_bytes, from_bytes: of rank 0, over its link; formula=exact: they are those of the formulae in the header
//   nccl        beside them, what NCCL over shared host memory was measured at by others: 1.9 to 5.3 GB/s, 39 us (no simulation)
//   table       by size, which algorithm is the fastest, and how much slower the one is that comm_select takes
//
// bench_links [link_gb=24] [read_gb=12] [dram_gb=0] [device_gb=936] [tp=2,4] [rows=1,8,64,512] [cols=8192] [clock=1]
//   clock=1: times alone, nothing is moved and nothing counted; dram_gb=0: copies stay in the host's cache
#include "bench/link_simulator.h"
#include "engine/comm_select.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 16 };
static struct {
    double link_gb, read_gb, dram_gb, device_gb;
    int64_t tp[MOST], rows[MOST], cols;
    int num_tp, num_rows;
    bool clock;
} options = {.link_gb = 24,
             .read_gb = 12,
             .device_gb = 936,
             .tp = {2, 4},
             .num_tp = 2,
             .rows = {1, 8, 64, 512},
             .num_rows = 4,
             .cols = 8192};

static int parse_list(int64_t *out, const char *text)
{
    int count = 0;
    for (char *end; count < MOST && *text; text = *end ? end + 1 : end) {
        out[count++] = strtoll(text, &end, 10);
        if (end == text || (*end && *end != ','))
            return 0;
    }
    return count;
}

static bool parse(const char *word)
{
    double *numbers[] = {&options.link_gb, &options.read_gb, &options.dram_gb, &options.device_gb};
    static const char *const names[] = {"link_gb=", "read_gb=", "dram_gb=", "device_gb="};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strncmp(word, names[i], strlen(names[i])) == 0) {
            *numbers[i] = strtod(word + strlen(names[i]), NULL);
            return *numbers[i] > 0 || (i == 2 && *numbers[i] == 0);
        }
    if (strncmp(word, "tp=", 3) == 0)
        return (options.num_tp = parse_list(options.tp, word + 3)) > 0;
    if (strncmp(word, "rows=", 5) == 0)
        return (options.num_rows = parse_list(options.rows, word + 5)) > 0;
    if (strncmp(word, "cols=", 5) == 0)
        return (options.cols = strtoll(word + 5, NULL, 10)) > 0;
    options.clock = strcmp(word, "clock=1") == 0;
    return options.clock;
}

static struct link_message message_of(enum transport transport, int tp_size, int64_t rows,
                                      struct exchange_choice choice)
{
    struct link_message message = {.transport = transport,
                                   .choice = choice,
                                   .tp_size = tp_size,
                                   .rows = rows,
                                   .cols = options.cols,
                                   .rates = link_rates_pcie4_x16};
    message.rates.link_bytes_s = 1e9 * options.link_gb;
    message.rates.kernel_read_bytes_s = 1e9 * options.read_gb;
    message.rates.dram_bytes_s = options.dram_gb > 0 ? 1e9 * options.dram_gb : (double)INFINITY;
    message.rates.device_bytes_s = 1e9 * options.device_gb;
    return message;
}

static void print_exchange(enum transport transport, int tp_size, int64_t rows, enum phase phase, enum wire wire)
{
    struct error err;
    struct link_result result = {0};
    struct exchange_choice choice = comm_select(transport, tp_size, 2 * (uint64_t)(rows * options.cols), phase, wire);
    struct link_message message = message_of(transport, tp_size, rows, choice);
    uint64_t to, from;
    printf("exchange transport=%s tp=%d phase=%s wire=%s rows=%lld cols=%lld bf16_bytes=%lld algorithm=%s",
           transport_name(transport), tp_size, phase == PHASE_DECODE ? "decode" : "prefill", wire_name(choice.wire),
           (long long)rows, (long long)options.cols, (long long)(2 * rows * options.cols),
           exchange_algorithm_name(choice.algorithm));
    if (!options.clock) {
        if (link_simulate(&result, &message, &err)) {
            printf("\n");
            fprintf(stderr, "bench_links: %s\n", err.msg);
            exit(1);
        }
        link_formula(&message, &to, &from);
        printf(" to_bytes=%llu from_bytes=%llu formula=%s bits=%s", (unsigned long long)result.to_bytes[0],
               (unsigned long long)result.from_bytes[0],
               result.to_bytes[0] == to && result.from_bytes[0] == from ? "exact" : "DIFFERS",
               result.same_bits ? "equal" : "DIFFER");
    }
    printf(" us=%.1f\n", 1e6 * (options.clock ? link_seconds(&message) : result.seconds));
}

static void print_nccl(int tp_size, int64_t rows)
{
    double bytes = 2.0 * (double)rows * (double)options.cols;
    printf("nccl transport=shm tp=%d wire=bf16 rows=%lld bf16_bytes=%.0f wire_bytes=%.0f us_at_5.3=%.1f us_at_1.9=%.1f "
           "source=published\n",
           tp_size, (long long)rows, bytes, 2.0 * (tp_size - 1) / tp_size * bytes, 39 + bytes / 5.3e3,
           39 + bytes / 1.9e3);
}

// The fastest of all algorithms for a size.
static struct exchange_choice fastest(enum transport transport, int tp_size, int64_t rows, enum wire wire,
                                      double *seconds)
{
    struct exchange_choice best = {0}, tried = {.wire = wire};
    *seconds = INFINITY;
    for (int algorithm = 0; algorithm < ALGORITHM_COUNT; algorithm++)
        for (uint64_t kib = 256; kib <= 8192; kib *= 2) {
            bool chunks = algorithm == ALGORITHM_CHUNKS;
            if ((!chunks && kib > 256) || (algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed(wire)))
                continue;
            tried.algorithm = (enum exchange_algorithm)algorithm;
            tried.chunk_bytes = chunks ? kib << 10 : 0;
            struct link_message message = message_of(transport, tp_size, rows, tried);
            double took = link_seconds(&message);
            if (took < *seconds) {
                *seconds = took;
                best = tried;
            }
        }
    return best;
}

static void print_table(enum transport transport, int tp_size, enum wire wire)
{
    for (int64_t bytes = 8192; bytes <= 64 << 20; bytes *= 2) {
        int64_t cols = options.cols, rows = bytes / (2 * cols);
        if (rows == 0) { // part of a row
            rows = 1;
            options.cols = bytes / 2;
        }
        double best_s;
        enum phase phase = wire_is_compressed(wire) ? PHASE_PREFILL : PHASE_DECODE;
        struct exchange_choice best = fastest(transport, tp_size, rows, wire, &best_s),
                               ours = comm_select(transport, tp_size, (uint64_t)bytes, phase, wire);
        struct link_message message = message_of(transport, tp_size, rows, ours);
        double ours_s = link_seconds(&message);
        printf("table transport=%s tp=%d wire=%s bf16_bytes=%lld fastest=%s", transport_name(transport), tp_size,
               wire_name(wire), (long long)bytes, exchange_algorithm_name(best.algorithm));
        if (best.chunk_bytes)
            printf(":%lluK", (unsigned long long)best.chunk_bytes >> 10);
        printf(" us=%.1f chosen=%s", 1e6 * best_s, exchange_algorithm_name(ours.algorithm));
        if (ours.chunk_bytes)
            printf(":%lluK", (unsigned long long)ours.chunk_bytes >> 10);
        printf(" us=%.1f slower_pct=%.0f\n", 1e6 * ours_s, 100 * (ours_s / best_s - 1));
        options.cols = cols;
    }
}

int main(int argc, char **argv)
{
    static const enum transport transports[] = {TRANSPORT_HOST, TRANSPORT_P2P};
    for (int i = 1; i < argc; i++)
        if (!parse(argv[i])) {
            fprintf(stderr, "bench_links: \"%s\"; the options are at the head of bench/bench_links.c\n", argv[i]);
            return 2;
        }
    if (options.cols % WIRE_GROUP) {
        fprintf(stderr, "bench_links: cols=%lld: wanted a multiple of %d\n", (long long)options.cols, WIRE_GROUP);
        return 2;
    }
    printf("links link_gb=%g read_gb=%g dram_gb=%g device_gb=%g clock=virtual\n", options.link_gb, options.read_gb,
           options.dram_gb, options.device_gb);
    for (int t = 0; t < options.num_tp; t++) {
        for (size_t p = 0; p < sizeof transports / sizeof *transports; p++)
            for (int r = 0; r < options.num_rows; r++) {
                print_exchange(transports[p], (int)options.tp[t], options.rows[r], PHASE_DECODE, WIRE_BF16);
                for (int wire = WIRE_FP8; wire <= WIRE_S8X; wire++)
                    print_exchange(transports[p], (int)options.tp[t], options.rows[r], PHASE_PREFILL, (enum wire)wire);
            }
        for (int r = 0; r < options.num_rows; r++)
            print_nccl((int)options.tp[t], options.rows[r]);
        for (size_t p = 0; p < sizeof transports / sizeof *transports; p++) {
            print_table(transports[p], (int)options.tp[t], WIRE_BF16);
            print_table(transports[p], (int)options.tp[t], WIRE_S8X);
        }
    }
    return 0;
}

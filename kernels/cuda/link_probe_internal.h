// What the files of the probe of links share: one end, in a process of its own. See link_probe.c.
#ifndef TPSHARD_KERNELS_CUDA_LINK_PROBE_INTERNAL_H
#define TPSHARD_KERNELS_CUDA_LINK_PROBE_INTERNAL_H

#include "kernels/cuda/link_probe.h"
#include "kernels/link_board.h"

#include <stdbool.h>

enum {
    CALL_AREA_BYTES = 64 << 10, // of the window, before the messages
    GUARD_BYTES = 256,          // on both sides of a message: stay as they are
    WINDOW_BYTES = CALL_AREA_BYTES + LINK_MOST_BYTES + 2 * GUARD_BYTES,
    EAGER_LOOKS = 2000, // before an end sleeps between two looks
};

struct prober {
    struct link_board *board;
    struct link_end *end;
    int me, count;            // count: devices
    cudaStream_t stream, out; // out: what a running kernel of the other end waits for
    cudaEvent_t begin, finish;
    uint8_t *window;  // the others write into it
    uint8_t *scratch; // [LINK_MOST_BYTES]: what is sent by copies, and what was read
    uint8_t *host;    // pinned [LINK_MOST_BYTES + 2 * GUARD_BYTES]
    struct link_call_result *called;
    struct link_hand_result *handed;
    uint8_t *other_window; // of the pair under way; NULL: not mapped
};

// ---- what an end is at: link_probe.c -----------------------------------------------------------------------------------

void probe_is_at(struct prober *prober, enum link_doing doing, enum link_means means, uint64_t bytes);
// Until the other end has made as many steps of the pair.
void probe_meet(struct prober *prober, int other);
int probe_status(const struct prober *prober, cudaError_t status, const char *what, struct error *err);
#define STEP(call, what)                                                                                               \
    do {                                                                                                               \
        int step_rc = probe_status(p, (call), (what), err);                                                            \
        if (step_rc)                                                                                                   \
            return step_rc;                                                                                            \
    } while (0)

// Of the direction from end a to end b. The first fault that an end finds counts.
static inline struct link_result *probe_result(const struct prober *p, int a, int b) { return &p->board->result[a][b]; }
static inline bool probe_is_condemned(const struct prober *p, int a, int b)
{
    return probe_result(p, a, b)->fault != LINK_UNTRIED;
}
static inline bool probe_are_condemned(const struct prober *p, int a, int b)
{
    return probe_is_condemned(p, a, b) || probe_is_condemned(p, b, a);
}
void probe_condemn(const struct prober *prober, int a, int b, enum link_fault fault, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

// ---- messages: link_probe_messages.c -----------------------------------------------------------------------------------

// One message of the direction from a to b.
struct trial {
    int a, b;
    enum link_means means;
    uint32_t index, seed;
    uint64_t bytes;
    bool reads; // a reads what b wrote; else a writes
};
static inline const char *probe_means_name(enum link_means means)
{
    return means == LINK_BY_COPY ? "copy engine" : "kernel";
}
static inline uint8_t *probe_message_place(uint8_t *window) { return window + CALL_AREA_BYTES; }

// All messages from a to b; both ends call it. It ends with the first one that condemns the direction.
int probe_messages(struct prober *prober, int a, int b, struct error *err);
// Writes the message to `to`, in any device's memory; a copy takes what is in scratch.
int probe_send(struct prober *prober, const struct trial *trial, uint8_t *to, double *gb_s, struct error *err);
// What was queued since prober->begin was recorded has come to its end: 1e9 bytes a second; 0: too fast for its clock.
int probe_take_rate(struct prober *prober, uint64_t bytes, double *gb_s, const char *what, struct error *err);
static inline void probe_keep_best(double *best, double gb_s) { *best = gb_s > *best ? gb_s : *best; }

// ---- kernels that see each other's words: link_probe_words.c -----------------------------------------------------------

// Of both directions; each end judges what it was to see. words: before each number; 0: the number alone, and its latency.
int probe_call(struct prober *prober, int other, uint32_t words, uint32_t rounds, struct error *err);
// Copies with a word behind each: one direction, the other, and both at once.
int probe_copies(struct prober *prober, int a, int b, struct error *err);

// ---- rates: link_probe_rates.c -----------------------------------------------------------------------------------------

// Between this device and memory of the host, into its end of the board.
int probe_host_rates(struct prober *prober, struct error *err);
// Links that are much slower than the way over the host are condemned; both ends of the pair call it.
int probe_judge_rates(struct prober *prober, int a, int b, struct error *err);

#endif

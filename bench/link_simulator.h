// An all_reduce between cards behind PCIe links, simulated: one process for each rank really encodes, copies, adds up and decodes
// (engine/comm_reduce.h, kernels/wire.h), by the algorithms of kernels/exchange_choice.h; every copy over a link is counted by the
// byte. Time is a virtual clock: each link is a token bucket that a copy takes its bytes from, each card one that its kernels take
// their memory traffic from; nobody sleeps, so the same parameters give the same times on any machine. Kernels run as fast as
// memory lets them; that is an assumption, as are all rates.
#ifndef TPSHARD_BENCH_LINK_SIMULATOR_H
#define TPSHARD_BENCH_LINK_SIMULATOR_H

#include "formats/error.h"
#include "kernels/exchange_choice.h"

#include <stdbool.h>
#include <stdint.h>

// Seconds and bytes per second.
struct link_rates {
    double link_bytes_s;        // of a card's link, each direction, by copy engines or posted writes
    double kernel_read_bytes_s; // of a kernel that reads the host's memory
    double dram_bytes_s;   // of the host's memory, all copies of all cards together; INFINITY: they stay in its cache
    double device_bytes_s; // of a card's own memory
    double launch_s;       // of one kernel that does all
    double phase_p2p_s, phase_host_s; // from the last byte written to its being seen: in a kernel
    // Of what runs in chunks: start of a copy by an engine, of a kernel; and from a copy's end to its being seen by another card's stream.
    double copy_s, kernel_s, flag_s;
};
// PCIe 4.0 x16 at 24 GB/s a direction, kernels that read the host at 12 GB/s, 936 GB/s of a card (RTX 3090). The latencies are those of a model
// fitted to published figures (one-shot over P2P 5.8 us for 16 KB and two cards, over the host 8.7 us), not measured by this project.
extern const struct link_rates link_rates_pcie4_x16;

enum { LINK_MAX_RANKS = 8 };
struct link_message {
    enum transport transport; // TRANSPORT_HOST or TRANSPORT_P2P
    struct exchange_choice choice;
    int tp_size;
    int64_t rows, cols;
    struct link_rates rates;
};

struct link_result {
    uint64_t to_bytes[LINK_MAX_RANKS];   // from the card to the host, or to other cards
    uint64_t from_bytes[LINK_MAX_RANKS]; // from the host, or from other cards
    double seconds;                      // of the slowest rank
    bool same_bits;                      // on all ranks, and those of the definition in comm.h
};

// Really runs it. ERR_USAGE for what cannot be simulated.
int link_simulate(struct link_result *out, const struct link_message *message, struct error *err);
// The time alone, of rank 0: the same, but no data move and no process starts.
double link_seconds(const struct link_message *message);
// What rank 0 sends and receives by the formulae: n ranks, M bytes of the message in its codec.
//   p2p two-shot  2 (n - 1) / n M each way          host two-shot  M to the host, 2 (n - 1) / n M from it
//   p2p one-shot  (n - 1) M each way                host one-shot  M to the host, (n - 1) M from it
// Exact where n divides a row's groups; of a one-shot always.
void link_formula(const struct link_message *message, uint64_t *to_bytes, uint64_t *from_bytes);

#endif

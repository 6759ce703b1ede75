// The table of exchanges: which algorithm and codec a sum over ranks takes. A pure function of what all ranks know alike; its hash
// is part of what they compare at their start.
//
// Law 9: the codec follows from the phase and --wire alone, never from the size of a message, which depends on what else is in the
// batch. The size chooses among algorithms that give the same bits (kernels/exchange_choice.h).
//
// The bounds of the table are those of bench/bench_links, a simulation with published rates of PCIe 4.0 x16; not measured by this
// project on GPUs.
//   one-shot   its one phase less is worth 3 us over P2P and 4.6 over the host. For two ranks it moves as much as two-shot, M bytes; for more
//              ranks more: 3 M instead of 1.5 M for four, 7 M instead of 1.75 M for eight. Not for what compresses (exchange_choice.h).
//   two-shot   in one kernel, as one-shot; as long as copy engines, which take both directions at once, do not win by more than their start costs:
//              up to 256 KB over the host, which a kernel reads at half the speed of a copy, up to 1 MB over P2P.
//   chunks     beyond; a few of each message, and two of each rank stay in a processor's last cache.
// Halves of a sum, where rows are dealt out to the ranks, take the row of the whole sum: each has half of its bytes and half of its phases, so that one
// way overtakes the other at the same size. One-shot and two-shot are then the same, one phase.
// Over NCCL there is one algorithm, two-shot. NCCL's own sum would cost its latency once instead of twice, but its order of additions
// changes with the size of the message, and on a ring each step rounds.
// CPU ranks of one host (shm) compute their parts where the others read them, which nobody encodes: one-shot of two ranks always, of few ranks with
// the small messages of decoding, where the phase less is worth more than the bytes; what compresses, dealt-out rows and the embedding's sum go the
// other way. Otherwise CPU ranks have one algorithm, two-shot; comm.c
// cuts their messages itself.
#ifndef TPSHARD_ENGINE_COMM_SELECT_H
#define TPSHARD_ENGINE_COMM_SELECT_H

#include "engine/comm.h"
#include "kernels/backend.h"
#include "kernels/exchange_choice.h"

#include <stdbool.h>
#include <stdint.h>

// The codec of a phase: what compresses is of prompts; messages of decoding are small, time is all they cost, and they lose nothing
// beyond bf16.
enum wire comm_select_wire(enum phase phase, enum wire wanted);

// message_bytes: of all values as bf16, 2 * rows * cols, whatever the codec. 1 <= tp_size <= COMM_MAX_RANKS. wanted: --wire, or the
// advice of the shards. With larger messages the algorithm goes from one-shot over two-shot to chunks, and chunks grow.
struct exchange_choice comm_select(enum transport transport, int tp_size, uint64_t message_bytes, enum phase phase,
                                   enum wire wanted);

// Whether prompts go through the layers in two halves by themselves, so that one computes while the other's sums are on their way. least_bytes: of a
// step's sums, as message_bytes; smaller steps are not cut. local: the ranks share a host's memory. expands: see kernels/backend.h, of any rank.
//   CPU ranks of one host    no: an exchange is work of the same processors, and halves read the weights twice. (Large steps whose sums are made in
//                            common memory are cut nevertheless, so that a rank may be late: decoder.in_large_parts.)
//   CPU ranks over a network always
//   GPUs, host, p2p, nccl    from 8 MB on, which take 0.2 to 0.3 ms over PCIe 4.0 (bench/bench_links): twice as many kernels, and products of half the
//                            rows, cost a tenth of that for each block. Not where weights are expanded: doing that twice takes longer than the
//                            exchange it hides.
bool comm_select_overlaps(enum transport transport, bool local, bool expands, uint64_t *least_bytes);

// --transport. missing[t]: why ranks cannot have transport t here, a clause; NULL: they can. wanted: a transport's name, or "auto", which
// is the first that there is of p2p, host, nccl, shm, tcp, mpi. ERR_USAGE with the reason where it is missing.
int comm_select_transport(enum transport *out, const char *wanted, const char *const missing[TRANSPORT_COUNT],
                          struct error *err);

// What decides, beside the table.
struct comm_select_options {
    enum transport transport;
    int tp_size;
    enum wire wire; // wanted
    bool feedback;
};
// XXH3-64 of the table and the options, the same on every machine.
uint64_t comm_select_hash(const struct comm_select_options *options);
// All ranks of the group call it: ERR_CORRUPT with both hashes where they differ.
int comm_select_agree(struct comm *comm, uint64_t hash, struct error *err);

#endif

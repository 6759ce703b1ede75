// How the ranks' sums are exchanged: transports, algorithms, and one choice of them. engine/comm_select.h makes the choice; who
// carries it out is told it and chooses nothing, since a choice made by one rank alone is a hang.
//
// Law: all algorithms give the same bits, those of engine/comm_reduce.h, so that the size of a message,
// which depends on the company of a row, decides how bytes move and never what a row becomes (laws 4 and 9). The owner of group g
// of a row is rank g % tp_size; it adds up in rank order, its own part in wire_of_own's codec; what the encoded sum decodes to is the result.
#ifndef TPSHARD_KERNELS_EXCHANGE_CHOICE_H
#define TPSHARD_KERNELS_EXCHANGE_CHOICE_H

#include "kernels/wire.h"

#include <stdint.h>

enum transport {
    TRANSPORT_SHM,  // ranks on one host, over its memory, computed by the CPU
    TRANSPORT_TCP,  // ranks on any hosts, over sockets, computed by the CPU
    TRANSPORT_MPI,  // the same over Open MPI
    TRANSPORT_HOST, // GPUs of one host through pinned host memory: they need not reach each other
    TRANSPORT_P2P,  // GPUs of one host that write to each other's memory
    TRANSPORT_NCCL, // GPUs of any hosts
    TRANSPORT_COUNT
};

// n: ranks, M: bytes of the message in its codec. Per rank and direction:
enum exchange_algorithm {
    // One phase: every rank sends its whole message to all others and does the work of all owners. (n - 1) M; over host memory M to the
    // host, (n - 1) M from it. For codecs of which wire_of_own is the same, those that do not compress.
    ALGORITHM_ONE_SHOT,
    // Two phases: groups to their owners, sums back. 2 (n - 1) / n M. Over host memory a byte is written once for all readers: M to
    // the host, 2 (n - 1) / n M from it.
    ALGORITHM_TWO_SHOT,
    // ALGORITHM_TWO_SHOT in chunks of chunk_bytes that copy engines move while the chunks before are added up.
    ALGORITHM_CHUNKS,
    ALGORITHM_COUNT
};
// A half of a sum over rows that have owners (backend.h) is one phase of either: ALGORITHM_ONE_SHOT stands for ALGORITHM_TWO_SHOT there.

struct exchange_choice {
    enum exchange_algorithm algorithm;
    enum wire wire;
    uint64_t chunk_bytes; // of ALGORITHM_CHUNKS: bytes of a chunk's values as bf16, whole groups; else 0
};

// The ranks' parts of a sum, [rows][cols] each, where every rank can read all of them. What they become is ALGORITHM_ONE_SHOT's.
enum { RANK_PARTS_MOST = 8 };
struct rank_parts {
    const float *part[RANK_PARTS_MOST]; // [ranks]
    int ranks;
    enum wire wire;
};

static inline const char *transport_name(enum transport transport)
{
    static const char *const names[TRANSPORT_COUNT] = {"shm", "tcp", "mpi", "host", "p2p", "nccl"};
    return (unsigned)transport < TRANSPORT_COUNT ? names[transport] : "unknown";
}

static inline const char *exchange_algorithm_name(enum exchange_algorithm algorithm)
{
    static const char *const names[ALGORITHM_COUNT] = {"one-shot", "two-shot", "chunks"};
    return (unsigned)algorithm < ALGORITHM_COUNT ? names[algorithm] : "unknown";
}

#endif

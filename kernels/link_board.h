// A probe of the links between devices: what the engine, which starts a process for each end and watches it (engine/link_probe.c), and the
// backend, which moves bytes between the ends (kernels/cuda/link_probe.c), have in memory that all of these processes share.
//
// The engine posts orders, one at a time: it fills `order`, then raises order.number. An end carries out those that concern it and says so with
// `taken`; the next order comes when all have. With an order of pairs, which no two share an end, the two ends of each go from step to step together (`steps`):
// one writes, the other looks. Nobody in here keeps time: who does not go on is ended from outside, and `doing` then says what it was at.
//
// result[a][b] is the direction from a to b: what a does with the memory of b. It is written by one of the two in turn, between two steps.
#ifndef TPSHARD_KERNELS_LINK_BOARD_H
#define TPSHARD_KERNELS_LINK_BOARD_H

#include "formats/error.h"

#include <stdint.h>

// C++ reads boards that are done.
#ifdef __cplusplus
#define LINK_ATOMIC(type) type
#else
#include <stdatomic.h>
#define LINK_ATOMIC(type) _Atomic(type)
#endif

enum {
    LINK_ENDS = 64,
    LINK_SENTENCE_BYTES = 224,
    LINK_HANDLE_BYTES = 64,
    LINK_MOST_BYTES = 16 << 20, // the largest message
};

enum link_fault {
    LINK_UNTRIED,
    LINK_GOOD,
    LINK_REFUSED, // by the driver
    LINK_LOST,    // what a writes does not arrive in b's memory
    LINK_CHANGED, // or not as it was
    LINK_STALE,   // a does not see what b has in its memory
    LINK_LATE,    // it did not end in time
    LINK_FAILED,  // an error of the driver, or a process that died
    LINK_SLOW,    // all arrives, but later than over the host's memory
};

enum link_means { LINK_BY_KERNEL, LINK_BY_COPY, LINK_MEANS };

struct link_result {
    uint32_t fault;    // enum link_fault
    uint32_t claimed;  // the driver says that a reaches b
    uint32_t crossing; // LINK_LATE: bytes were on their way then; 0: an end was at something else, or had no time left
    double gb_s[LINK_MEANS]; // 1e9 bytes a second that a writes to b: by a kernel, by a copy engine; 0: not measured
    double us;               // from a's write of a word to b's sight of it, both by running kernels; 0: not measured
    char sentence[LINK_SENTENCE_BYTES]; // what is wrong; LINK_GOOD: ""
};

enum link_doing {
    LINK_IDLE,
    LINK_MEETING, // it waits for the other end
    LINK_ASKING,  // the driver for devices and claims
    LINK_OPENING, // its device
    LINK_MAPPING, // the other's memory
    LINK_PREPARING,
    LINK_WRITING, // to the other's memory, by `means`
    LINK_LOOKING, // into its own memory
    LINK_READING, // the other's memory, by `means`
    LINK_CALLING, // words that go to and fro between running kernels
    LINK_HANDING, // copies, each with a word behind it that a running kernel waits for
};

enum link_way { LINK_TO_HOST, LINK_FROM_HOST, LINK_WAYS };

struct link_end {
    int device; // wanted; -1: by the backend's rule for rank `rank`, and then what that gave
    int rank;
    char bus[24]; // "0000:01:00.0"; "": not known
    LINK_ATOMIC(uint32_t) taken, steps;
    LINK_ATOMIC(uint32_t) doing, means;      // enum link_doing, enum link_means
    LINK_ATOMIC(uint64_t) bytes;             // of it
    LINK_ATOMIC(uint32_t) calls;             // rounds that its running kernel has taken in
    LINK_ATOMIC(uint32_t) posts;             // words that it has posted behind copies
    double host_gb_s[LINK_WAYS][LINK_MEANS]; // between its device and the host's memory; 0: not measured
    uint8_t handle[LINK_HANDLE_BYTES];
    struct error err; // why it has ended; code 0: it has not failed
};

enum link_order { LINK_ORDER_NONE, LINK_ORDER_LOOK, LINK_ORDER_OPEN, LINK_ORDER_PAIRS, LINK_ORDER_END };

struct link_board {
    // Set before the ends begin.
    int num_ends, group;              // ends a and b are a pair where a / group == b / group
    int rounds;                       // of each timed write, beside the one that is looked at
    uint32_t seed;                    // of what is written
    uint64_t largest_bytes;           // of a message; at most LINK_MOST_BYTES
    uint64_t call_timeout_ns;         // of a running kernel's wait for another one
    LINK_ATOMIC(uint64_t) watched_ns; // when the engine last looked
    // The engine's. Fields of an order are valid when its number can be read.
    struct {
        LINK_ATOMIC(uint32_t) number;
        uint32_t kind;        // enum link_order
        int other[LINK_ENDS]; // of LINK_ORDER_PAIRS: with whom each end is a pair; -1: with nobody
    } order;
    LINK_ATOMIC(uint32_t) done; // nothing in here changes any more
    double seconds;             // that it took
    struct link_end end[LINK_ENDS];
    struct link_result result[LINK_ENDS][LINK_ENDS];
};

#endif

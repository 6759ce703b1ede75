// A library in NCCL's place, for tests: the functions that kernels/cuda/nccl_library.h asks for, between threads or processes, over the memory of
// the emulator. Communicators do not block, as NCCL's: what is queued reaches the stream only when it is asked whether it has.
//
// It moves no byte that it was not told to, keeps the order of each pair of ranks, and can be made to fail.
#ifndef TPSHARD_TESTS_NCCL_STAND_IN_H
#define TPSHARD_TESTS_NCCL_STAND_IN_H

#ifdef __cplusplus
extern "C" {
#endif

enum { STAND_IN_RANKS = 16 };

enum stand_in_fault {
    FAULT_NONE,
    FAULT_ASYNC_ERROR, // from its nth message on the rank's communicator reports ncclRemoteError
    FAULT_CALL,        // the rank's nth group of calls returns ncclSystemError
    FAULT_STUCK,       // the rank's nth message never moves
    FAULT_NO_INIT,     // the rank's communicator is never ready
    FAULT_DUPLICATE,   // the rank's communicator is refused, as if another one had its GPU
    FAULT_NO_END,      // the rank's communicator never finishes in order
    FAULT_ABORT_HANGS, // so does the rank's ncclCommAbort; and its first message never moves
    FAULT_CORRUPT,     // a bit of what the rank sends in its nth message is changed on the way
    FAULT_ENDLESS,     // the rank's nth message never moves, and stays on its stream when the communicator is aborted
};

// In memory that processes forked after loading share.
struct stand_in {
    int version; // 22809 at first
    enum stand_in_fault fault;
    int rank, nth; // messages count from 0: an all-to-all is one, an all-gather the next
    int aborts[STAND_IN_RANKS], destroys[STAND_IN_RANKS], opened[STAND_IN_RANKS]; // communicators, by rank
};

// The variable STAND_IN_FAULT, "fault:rank:nth" in numbers, sets the three of them at first.
// Where the variable STAND_IN_TOLD names a file, a communicator that ends in order appends a line to it: "rank 1: 12 messages".
struct stand_in *nccl_stand_in(void);
#define STAND_IN_ENTRY "nccl_stand_in"

#ifdef __cplusplus
}
#endif
#endif

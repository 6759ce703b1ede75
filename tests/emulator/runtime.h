// What the files of the emulator's host side share.
#ifndef TPSHARD_TESTS_EMULATOR_RUNTIME_H
#define TPSHARD_TESTS_EMULATOR_RUNTIME_H

#include "tests/emulator/block.h"

#include <mutex>

namespace emulator
{

// A number of the environment.
uint64_t setting(const char *name, uint64_t otherwise);
// Keeps an error for cudaGetLastError; returns it.
cudaError_t give(cudaError_t error);
// cudaSuccess, or the failure that a test has planned for this call.
cudaError_t planned(const char *name);
#define PLANNED()                                                                                                      \
    do {                                                                                                               \
        cudaError_t planned_error = emulator::planned(__func__);                                                       \
        if (planned_error != cudaSuccess)                                                                              \
            return emulator::give(planned_error);                                                                      \
    } while (0)

int device_count(void);
extern thread_local int current_device; // cudaSetDevice's
extern thread_local int running_device; // that of the stream whose work runs; -1: none does

// ---- memory.cc -----------------------------------------------------------------------------------------------------

extern std::mutex memory_lock; // of the allocations and what is known of them
size_t memory_total(void);     // of a device
size_t memory_taken(int device);

// ---- peers.cc: memory that a device reaches of another one ------------------------------------------------------------

enum fault { NO_FAULT, MIRROR, DROP, STALE, CORRUPT, HANG, REFUSE, LATE, LOOSE, SLOW };

// One device's sight of an allocation of another device, or of another process.
struct view {
    enum fault fault = NO_FAULT;
    char *copy = nullptr; // of the whole allocation: MIRROR, STALE
};
// What EMULATED_PEERS says of accesses from device a to the memory of device b.
enum fault fault_of(int from, int to, bool other_process);
// Whether kernels of a device may touch another one's memory in the same process.
bool peer_enabled(int from, int to);
view *view_new(enum fault fault, const void *memory, size_t bytes);
void view_free(view *v);
// Copies bytes, of which either side may be seen through a view; begin: of its allocation.
struct side {
    char *address, *begin;
    const view *seen; // NULL: plain
};
void copy_seen(const side &to, const side &from, size_t bytes);
// What this thread's work has copied and what has not arrived yet, arrives.
void land_copies(void);

} // namespace emulator

#endif

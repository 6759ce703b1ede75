// The device's side of the emulator: what kernels/cuda/primitives.cuh is made of when it is compiled for the CPU.
#ifndef TPSHARD_TESTS_EMULATOR_BLOCK_H
#define TPSHARD_TESTS_EMULATOR_BLOCK_H

#include "tests/emulator/emulator.h"

#include <functional>
#include <stddef.h>
#include <stdint.h>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

namespace emulator
{

// Where an access stands in the source: as a default argument `place()` is the caller's line. (g++ would take place{__builtin_FILE(), ...} for
// the line of the declaration.)
struct place {
    const char *file;
    int line;
    constexpr place(const char *its_file = __builtin_FILE(), int its_line = __builtin_LINE())
        : file(its_file), line(its_line)
    {
    }
};

// The thread that runs.
struct indices {
    dim3 thread, block, block_size, grid;
};
extern __thread indices at;

// Queues a launch; the name is for messages and counts. together: all blocks run at the same time, and may wait for each other with give_way;
// else one after the other, and only other threads of the host can do what a thread waits for. Launches together are not counted.
cudaError_t launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> body, bool together = false);
// Runs work when the stream comes to it.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void *shared_array(place where, size_t bytes); // the block's array that is declared at this place
void *shared_dynamic(void);

void barrier(place where);

// All lanes of the mask meet; the last to come calls run with every lane's `in` and `out`. `what` must be the same for all.
struct lanes {
    uint32_t mask;
    const void *in[32];
    void *out[32];
};
void meet(uint32_t mask, const char *what, const void *in, void *out, void (*run)(lanes &all));
// The tensor cores' products of a warp whose lanes bring fragments and take c, as kernels/cuda/primitives.cuh has them.
struct fragments {
    const uint32_t *a, *b;
};
void multiply_f16(lanes &all);
void multiply_bf16(lanes &all);
void multiply_int8(lanes &all);
int lane(void);
// The thread waits for what another processor writes: others run before it goes on.
void give_way(void);
uint64_t now_ns(void);
// Leaves the processor to others, longer once nothing but this has been done for some time: since then, 0 at first.
void bide(uint64_t *idle_since_ns);

// The allocation that holds an address, of the device or pinned; empty where there is none.
struct view;
struct range {
    uintptr_t begin, end;
    const view *seen; // not NULL: another device's or process's memory, with a fault on the way (peers.cc)
};
range allocation_of(const void *address);
// Where an access through a view goes. What it stores is on its way until settle_stores.
enum space { GLOBAL_LOAD, GLOBAL_STORE, GLOBAL_POST, SHARED_LOAD, SHARED_STORE };
static inline bool is_global(space which) { return which <= GLOBAL_POST; }
void *through_view(const range &r, space which, void *address, size_t bytes);
extern __thread bool store_held; // one of this thread of the host
void settle_held_store(void);
static inline void settle_stores(void)
{
    if (store_held)
        settle_held_store();
}
// A block has ended: all that it has stored arrives.
void land_stores(void);
// The kernel does not go on, and never ends: for its stream an endless is thrown.
struct endless {
};
[[noreturn]] void never_ends(void);

// Each access is checked: a power of two bytes, aligned to them, inside an allocation or a shared array, not where a copy is still on its way.
// Returns where it goes, which is the address itself but where a device reaches another one through a fault.
void *note_access(space which, place where, const void *address, size_t bytes);

// See emulator_misread_scales.
extern bool misread_scales;

void copy_async(void *to, const void *from, bool valid, place where);
void copy_async_commit();
void copy_async_wait(int groups_left);

} // namespace emulator

#endif

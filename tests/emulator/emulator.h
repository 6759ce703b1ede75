// A CUDA device on the CPU, for tests: the backend's own sources, compiled as C++ (-DCUDA_EMULATOR -Itests/emulator/include), run on it
// unchanged.
//
//   block.cc    a block of threads: one fiber each, barriers, warp collectives, shared memory, asynchronous copies
//   tensor_cores.cc  products of a warp
//   runtime.cc  the host's side: devices, streams that run when someone waits, events, graphs
//   memory.cc   allocations, copies, memory that other processes open
//   peers.cc    devices that reach each other, and faults on their way
//
// What it checks beyond results. Shared memory starts poisoned (0xCD), and so does device memory. An asynchronous copy poisons its
// target and lands at the wait. Threads and blocks run in an order that the seed decides. Threads that wait for each other for ever, or
// meet at different barriers, end the program with a sentence. Work on a stream runs only when the host waits for it, so a missing wait
// shows. Asynchronous copies want pinned memory. Each allocation has guard bytes. An access through the wrappers of primitives.cuh must be
// aligned, inside an allocation or a shared array, and not where an asynchronous copy is still on its way.
//
// Devices reach each other (EMULATED_DEVICES of them), and memory that another process has opened: all as it should be, or with the faults of
// EMULATED_PEERS, for all pairs or for accesses from device a to b's memory: "mirror", "0>1:drop,1>0:stale". A bare fault holds for memory of other
// processes on the same device too (but for refuse); memory is looked at when it is opened or first touched.
//   mirror   what is written lands in a copy of one's own, which reads see
//   drop     what is written vanishes
//   stale    reads see what was there at first
//   corrupt  of what is written or copied a byte in 4096 changes on its way: those whose place in the allocation is 1000 modulo 4096
//   late     what is copied arrives when the host has waited for it: words that kernels post behind it overtake it
//   loose    what a kernel stores arrives when its block has ended: words that it posts overtake it
//   slow     copies take sixteen times as long
//   hang     a copy or a kernel that touches it never ends; the host can go on asking
//   refuse   there is no access, as cudaDeviceCanAccessPeer says
// Copies between devices without access go over the host, where nothing is wrong.
//
// A kernel may wait for those of another thread of the process only with CUDA_MODULE_LOADING=EAGER.
//
// One test is built by `make build/tests/test_<area>`.
#ifndef TPSHARD_TESTS_EMULATOR_EMULATOR_H
#define TPSHARD_TESTS_EMULATOR_EMULATOR_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Whether this is the emulator: false in the same tests built for a device (tests/device), which counts nothing.
bool emulator_present(void);
// The order of threads and blocks from now on (0: as numbered).
void emulator_seed(uint64_t seed);
// The compute capability that the device reports, 10 * major + minor. Without it: EMULATED_SM, or 86. Other variables:
// EMULATED_MEMORY (bytes), EMULATED_DEVICES, EMULATED_FIRST (devices of the bus that are not shown before them), EMULATED_DRIVER (CUDA's version, 13000), EMULATED_LOCKED (bytes of the
// host's that can be pinned at once), EMULATED_COMPUTE_MODE (enum cudaComputeMode: what devices report; nobody is kept out).
void emulator_set_sm(int sm);
// The nth call from now (0: the next) of the runtime function of this name fails with the error. NULL: nothing planned fails any more.
void emulator_fail_call(const char *name, int nth, cudaError_t error);
// From now on scaled products of the tensor cores are wrong, as on a device whose instructions mean something else.
void emulator_misread_scales(bool wrong);
// From now on work on streams of high priority runs at once, not when the host waits: it overtakes what it has not been told to wait for. So does
// EMULATED_HURRY=1.
void emulator_hurry(bool on);
// This process was forked from one that had made calls, and may make its own nevertheless: otherwise all fail.
void emulator_new_process(void);
// Runs fn(arg) when the stream comes to it; may be captured.
void emulator_enqueue(cudaStream_t stream, void (*fn)(void *arg), void *arg);
// Work that waits for others: when the stream comes to it, it is tried until done(arg) is true. Nothing behind it runs before.
void emulator_enqueue_until(cudaStream_t stream, bool (*done)(void *arg), void *arg);

// What kernels did since the reset, which also turns counting on. Counted are the accesses through the wrappers of
// kernels/cuda/primitives.cuh, grouped as a warp issues them: the nth access of each lane at the same place in the source.
struct emulator_stats {
    uint64_t launches;
    uint64_t global_requests, global_sectors; // 32-byte sectors touched
    uint64_t global_ideal_sectors;            // were the same bytes contiguous and aligned
    uint64_t shared_requests;
    uint64_t shared_conflicts; // wavefronts beyond those that the request's bytes need
};
void emulator_stats_reset(void);
struct emulator_stats emulator_count(const char *kernel); // sum over kernels whose name contains this

#ifdef __cplusplus
}
#endif
#endif

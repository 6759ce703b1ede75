// Put before every test of the emulator when it is built for a real device: allocations that host and device both see.
#ifndef TPSHARD_TESTS_DEVICE_DEVICE_H
#define TPSHARD_TESTS_DEVICE_DEVICE_H

#include <cuda_runtime_api.h>

#define cudaMalloc(pointer, bytes) cudaMallocManaged((void **)(pointer), bytes, cudaMemAttachGlobal)

#endif

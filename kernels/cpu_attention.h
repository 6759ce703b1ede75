// Attention of the CPU backend: operations of kernels/backend.h.
#ifndef TPSHARD_KERNELS_CPU_ATTENTION_H
#define TPSHARD_KERNELS_CPU_ATTENTION_H

#include "formats/error.h"

#include "kernels/backend.h"

#include <stdint.h>

struct device;

// Bytes of the scratch that attention takes; alloc takes them, for d->shape, free accepts what a failed alloc leaves.
uint64_t cpu_attention_bytes(const struct device_shape *shape, int threads);
int cpu_attention_alloc(struct device *device, struct error *err);
void cpu_attention_free(struct device *device);

int cpu_squares(struct device *device, int64_t layer, struct error *err);
int cpu_finish_qkv(struct device *device, int64_t layer, struct error *err);
int cpu_attend(struct device *device, int64_t layer, struct error *err);

#endif

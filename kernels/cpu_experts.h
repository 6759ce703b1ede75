// Mixtures of experts of the CPU backend: operations of kernels/backend.h, and the memory they need.
#ifndef TPSHARD_KERNELS_CPU_EXPERTS_H
#define TPSHARD_KERNELS_CPU_EXPERTS_H

#include "formats/error.h"

#include <stdint.h>

struct device;

// After the device's shape is known; nothing for a model without experts. cpu_experts_free also after a failure.
int cpu_experts_alloc(struct device *device, struct error *err);
void cpu_experts_free(struct device *device);

int cpu_route(struct device *device, int64_t layer, struct error *err);
int cpu_experts(struct device *device, int64_t layer, struct error *err);

#endif

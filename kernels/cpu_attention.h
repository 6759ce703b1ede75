// Attention of the CPU backend: operations of kernels/backend.h.
#ifndef TPSHARD_KERNELS_CPU_ATTENTION_H
#define TPSHARD_KERNELS_CPU_ATTENTION_H

#include "formats/error.h"

#include <stdint.h>

struct device;

int cpu_squares(struct device *device, int64_t layer, struct error *err);
int cpu_finish_qkv(struct device *device, int64_t layer, struct error *err);
int cpu_attend(struct device *device, int64_t layer, struct error *err);

#endif

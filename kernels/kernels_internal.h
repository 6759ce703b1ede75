// What the files of the kernel tables share: the tables themselves and what the machine can run.
#ifndef TPSHARD_KERNELS_KERNELS_INTERNAL_H
#define TPSHARD_KERNELS_KERNELS_INTERNAL_H

#include "kernels/kernels.h"

extern const struct kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512vbmi, kernels_avx512bf16,
    kernels_amx;

// CPU and operating system. Not in the tables' own files: those may not run an instruction before they are asked.
bool kernels_supported_avx2(void);
bool kernels_supported_avx512(void);
bool kernels_supported_avx512vbmi(void);
bool kernels_supported_avx512bf16(void);
bool kernels_supported_amx(void); // asks the operating system once, for the whole process and its children
// Supported, but "auto" takes a later one, which is faster on this processor.
bool kernels_auto_passes_by(const struct kernels *kernels);

#endif

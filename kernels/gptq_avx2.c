// Moments, factors and codes for AVX2. Empty on other architectures.
#ifdef __x86_64__
#define GPTQ_TARGET gptq_avx2
#define GPTQ_TARGET_NAME "avx2"
#include "kernels/gptq_impl.h"
#endif

// Moments, factors and codes for AVX-512. Empty on other architectures.
#ifdef __x86_64__
#define GPTQ_TARGET gptq_avx512
#define GPTQ_TARGET_NAME "avx512"
#include "kernels/gptq_impl.h"
#endif

// Attention for AVX2, FMA and F16C. Empty on other architectures.
#ifdef __x86_64__
#define ATTENTION_FN attention_avx2
#define ATTENTION_VECTORS 1
#define ATTENTION_ROWS 6
#include "kernels/attention_impl.h"
#endif

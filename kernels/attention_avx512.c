// Attention for AVX-512. Empty on other architectures.
#ifdef __x86_64__
#define ATTENTION_FN attention_avx512
#define ATTENTION_VECTORS 4
#define ATTENTION_ROWS 6
#include "kernels/attention_impl.h"
#endif

// Quantizers for AVX-512. Empty on other architectures.
#ifdef __x86_64__
#define PACK_TARGET pack_avx512
#define PACK_TARGET_NAME "avx512"
#include "kernels/pack_quantize_impl.h"
#endif

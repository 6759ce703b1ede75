// Quantizers for AVX2. Empty on other architectures.
#ifdef __x86_64__
#define PACK_TARGET pack_avx2
#define PACK_TARGET_NAME "avx2"
#include "kernels/pack_quantize_impl.h"
#endif

// Wire codecs for AVX2 and FMA. Empty on other architectures.
#ifdef __x86_64__
#define WIRE_TARGET wire_avx2
#define WIRE_TARGET_NAME "avx2"
#include "kernels/wire_impl.h"
#endif

// Checksums for AVX2; compiled with at least -mavx2, at most what checksum.c asks the CPU for. Empty on other architectures.
#ifdef __x86_64__
#define XXH_VECTOR XXH_AVX2
#define CHECKSUM_TARGET checksum_avx2
#define CHECKSUM_NAME "avx2"
#include "formats/checksum_impl.h"
#endif

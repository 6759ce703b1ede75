// Checksums for AVX-512; compiled with at least -mavx512f, at most what checksum.c asks for. Empty on other architectures.
#ifdef __x86_64__
#define XXH_VECTOR XXH_AVX512
#define CHECKSUM_TARGET checksum_avx512
#define CHECKSUM_NAME "avx512"
#include "formats/checksum_impl.h"
#endif

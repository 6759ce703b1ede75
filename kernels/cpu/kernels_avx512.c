// The table for processors with AVX-512 and VNNI.
#define AVX512_TABLE kernels_avx512
#define AVX512_NAME "avx512"
#define AVX512_SUPPORTED kernels_supported_avx512
#include "kernels/cpu/avx512_table.h"

// The same for processors that look bytes up in tables of 64 and 128 (VBMI): what four bits or an FP8 code stand for. The same bits.
#define AVX512_TABLE kernels_avx512vbmi
#define AVX512_NAME "avx512vbmi"
#define AVX512_SUPPORTED kernels_supported_avx512vbmi
#include "kernels/cpu/avx512_table.h"

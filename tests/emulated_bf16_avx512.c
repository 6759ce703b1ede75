// The AVX512_BF16 table without its two instructions: kernels_avx512bf16_emulated. It goes by this name to the compiler's flags.
#include "kernels/cpu/avx512_help.h"

// What kernels/cpu/avx512_bf16.h says of each.
static __m512 bf16_dot(__m512 sum, __m512i a, __m512i b)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512 odd_a = _mm512_castsi512_ps(_mm512_and_si512(a, upper)),
           odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
    __m512 even_a = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
           even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    return _mm512_fmadd_ps(even_a, even_b, _mm512_fmadd_ps(odd_a, odd_b, sum));
}

static __m512i bytes_of_128(const __m512i table[2], __m512i codes)
{
    uint8_t bytes[128], code[64];
    memcpy(bytes, table, sizeof bytes);
    memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 64; i++)
        code[i] = bytes[code[i] & 0x7f];
    memcpy(&codes, code, sizeof code);
    return codes;
}

#define BF16_DOT(sum, a, b) bf16_dot(sum, a, b)
#define BYTES_OF_128(table, codes) bytes_of_128(table, codes)
#define kernels_avx512bf16 kernels_avx512bf16_emulated
extern const struct kernels kernels_avx512bf16_emulated;
#include "kernels/cpu/kernels_avx512bf16.c" // NOLINT(bugprone-suspicious-include)

// The tile registers of AMX, as kernels_amx.c uses them. A test puts an emulation in their place: tests/amx_emulator.h.
//
// There are eight registers of up to 16 rows of 64 bytes, which a thread must configure before it uses them. `tile` is a literal number: it
// becomes a part of the instruction.
//   TILES_CONFIGURE(config)     const struct tile_config *; empties all registers
//   TILES_RELEASE()             there is nothing to save any more when the thread is interrupted
//   TILE_ZERO(tile)
//   TILE_LOAD(tile, from, stride), TILE_STORE(tile, to, stride)    rows stand `stride` bytes apart; stores go to words, int32_t or float
//   TILE_DOT_INT8(sum, a, b)    int32 sum[m][n] += a[m][k] * b[k / 4][n][k % 4] over k < 64, int8
//   TILE_DOT_BF16(sum, a, b)    float sum[m][n] += even + odd, each a chain of fused multiply-adds from zero over ascending k < 16:
//                               even of a[m][2k] * b[k][n][0], odd of a[m][2k + 1] * b[k][n][1]. All to nearest even; subnormal
//                               operands and results count as zero, whatever the thread's own floating point does. The processor's
//                               manual says so in the pseudo-code of TDPBF16PS. Operands may change places: a product is the same either way.
#ifndef TPSHARD_KERNELS_CPU_AMX_TILES_H
#define TPSHARD_KERNELS_CPU_AMX_TILES_H

#include <stdint.h>

enum { TILE_COUNT = 8, TILE_ROWS = 16, TILE_ROW_BYTES = 64 };

// What LDTILECFG reads.
struct tile_config {
    uint8_t palette;        //  0  1
    uint8_t start_row;      //  1  0
    uint8_t reserved[14];   //  2
    uint16_t row_bytes[16]; // 16  of each tile
    uint8_t rows[16];       // 48
};
_Static_assert(sizeof(struct tile_config) == 64, "read by the processor");

#ifndef TILE_LOAD
#include <immintrin.h>

// gcc is not told what the instructions read: all that was written before must be in memory, and nothing that is written later.
#define TILES_BARRIER() __asm__ volatile("" ::: "memory")

#define TILES_CONFIGURE(config)                                                                                        \
    do {                                                                                                               \
        TILES_BARRIER();                                                                                               \
        _tile_loadconfig(config);                                                                                      \
    } while (0)
#define TILES_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride)                                                                                  \
    do {                                                                                                               \
        TILES_BARRIER();                                                                                               \
        _tile_loadd(tile, from, stride);                                                                               \
        TILES_BARRIER();                                                                                               \
    } while (0)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT_INT8(sum, a, b) _tile_dpbssd(sum, a, b)
#define TILE_DOT_BF16(sum, a, b) _tile_dpbf16ps(sum, a, b)
#endif

#endif

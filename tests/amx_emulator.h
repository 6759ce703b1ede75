// The tile registers of AMX in plain C, in place of those of kernels/cpu/amx_tiles.h: include this instead. Faults are found as the processor
// finds them, and what it leaves to the program is counted.
#ifndef TPSHARD_TESTS_AMX_EMULATOR_H
#define TPSHARD_TESTS_AMX_EMULATOR_H

#include "kernels/kernels.h"

struct tile_config;
void amx_configure(const struct tile_config *config);
void amx_release(void);
void amx_zero(int tile);
void amx_load(int tile, const void *from, int64_t stride);
void amx_store(int tile, void *to, int64_t stride);
void amx_dot_int8(int sum, int a, int b);
void amx_dot_bf16(int sum, int a, int b); // needs AVX-512

#define TILES_CONFIGURE(config) amx_configure(config)
#define TILES_RELEASE() amx_release()
#define TILE_ZERO(tile) amx_zero(tile)
#define TILE_LOAD(tile, from, stride) amx_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) amx_store(tile, to, stride)
#define TILE_DOT_INT8(sum, a, b) amx_dot_int8(sum, a, b)
#define TILE_DOT_BF16(sum, a, b) amx_dot_bf16(sum, a, b)

#include "kernels/cpu/amx_tiles.h"

// Each thread has registers of its own, empty at first, and its own counts.
struct amx_counts {
    int64_t configures, releases, loads, stores, dots;
};
extern _Thread_local struct amx_counts amx_counts;
bool amx_is_released(void);

// Runs fn, up to its first fault. Returns its reason, NULL: there was none. A fault at any other time ends the program.
const char *amx_fault_of(void (*fn)(void));

// kernels/cpu/kernels_amx.c, compiled with these registers. Needs AVX-512.
extern const struct kernels kernels_amx_emulated;

#endif

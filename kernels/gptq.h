// Quantizing by what a matrix is multiplied with. A row w of a matrix and its stored version q differ, over the tokens of a text, by
// (w - q)^T H (w - q), where H = sum of x x^T over the input's rows x. Here: the sum, and codes that make the difference small.
//
// Codes are taken one column after the other; the error of each column is made up for by the columns that are still to come, as far as H says
// that they can (GPTQ, Frantar et al. 2022). With H = L L^T in the order of the columns, last first, and L' = L divided by its diagonal, column k
// aims at t_k = w_k + sum over the columns j before it of (w_j - q_j) L'_jk, and what is left is sum of (t_k - q_k)^2 L_kk^2: this form (LDLQ,
// Chee et al. 2023) gives the codes of GPTQ without the inverse of H. Scales of groups are chosen before, from w alone, so that the order of
// columns is free and nothing of it is stored: columns that carry most come first.
//
// Plain C with a fixed order of operations: factors and codes have the same bytes from every compiler and instruction set and with any number of
// threads, and a row's codes do not depend on the rows beside it (laws 1 and 2). Sums of moments use fused products where there are such.
#ifndef TPSHARD_KERNELS_GPTQ_H
#define TPSHARD_KERNELS_GPTQ_H

#include "formats/error.h"
#include "kernels/pack.h"
#include "kernels/thread_pool.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ---- moments -------------------------------------------------------------------------------------------------------

// Room for a copy of `rows` rows in the order in which moments_add reads them, in floats.
uint64_t moments_panel_elems(uint64_t rows, uint64_t cols);
// triangle [cols * (cols + 1) / 2] (row i: columns 0 .. i) += sum over rows of x x^T. x [rows][x_stride]; panels: scratch.
void moments_add(float *triangle, uint64_t cols, const float *x, int64_t x_stride, uint64_t rows, float *panels,
                 struct thread_pool *pool);

// ---- factors -------------------------------------------------------------------------------------------------------

// H of one input, made ready.
struct gptq_factor {
    uint64_t cols;
    uint32_t *order; // [cols]: the column at each place; codes are taken from the last place to the first
    float *lower;    // rows 0 .. cols - 1 of L', place i: its columns 0 .. i, of which the last is 1
    float *pivots;   // [cols], by column: L_kk^2, what an error that is left in column k counts
    float damping;   // added to the diagonal, relative to its mean
};
// triangle: H, is read only. 1 % of the diagonal's mean is added to the diagonal, more where that does not make it positive definite. ERR_MODEL: nothing does
// (or H is 0). Success: gptq_factor_free.
int gptq_factor_make(struct gptq_factor *out, const float *triangle, uint64_t cols, struct thread_pool *pool,
                     struct error *err);
void gptq_factor_free(struct gptq_factor *factor); // accepts a zeroed one

// ---- codes ---------------------------------------------------------------------------------------------------------

enum { GPTQ_ROWS = 32 }; // at a time: each is worked on by itself, but they read the factor together
// Kinds that have a choice of codes for a given scale: those of four bits.
bool gptq_has(enum weight_kind kind);
// Scratch of gptq_quantize, in floats.
uint64_t gptq_scratch_elems(uint64_t cols);
// Replaces the codes of rows that pack_quantize_row has made, and leaves their scales. values [rows][factor->cols]; rows at most GPTQ_ROWS.
void gptq_quantize(struct packed_row *rows, uint64_t count, enum weight_kind kind, uint32_t group_size,
                   const float *values, const struct gptq_factor *factor, float *scratch);

// One implementation per instruction set; for the functions above, tests and benchmarks.
struct gptq_target {
    const char *name; // "base", "avx2", "avx512"
    // out [64][64], row-major: sum over rows of a[row][i] * b[row][j], both [rows][64].
    void (*moments_block)(float *out, const float *a, const float *b, uint64_t rows);
    // rows[i][count + j] -= sum over k < count of rows[i][k] * by[j][k], at most 64 of each; triangle: for j <= i alone. count: a multiple of 16.
    void (*subtract_products)(float *const *rows, uint64_t num_rows, const float *const *by, uint64_t num_by,
                              uint64_t count, bool triangle);
    void (*quantize)(struct packed_row *rows, uint64_t count, enum weight_kind kind, uint32_t group_size,
                     const float *values, const struct gptq_factor *factor, float *scratch);
};
// The supported targets, slowest first; index 0 always exists, null after the last.
const struct gptq_target *gptq_target_at(size_t index);

#endif

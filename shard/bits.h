// Mixed precision: which kind each matrix of the layers is stored in, so that all together take at most a given number of bits per weight and
// the model loses as little as possible. Owns the candidates, the model of what is lost and the choice; bits_measure.h measures the errors.
//
// Lost, of the whole model, is taken to be the sum over its matrices of sensitivity x error: error is the square of the matrix's relative error in
// a kind, sensitivity what such an error does to the model's output. The choice
// minimises that sum under the budget, exactly but for the rounding of sizes (bits_choose). It is a function of the checkpoint alone: the number
// of ranks and of threads do not enter.
#ifndef TPSHARD_SHARD_BITS_H
#define TPSHARD_SHARD_BITS_H

#include "formats/error.h"
#include "shard/plan.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BITS_CANDIDATES = 12 };
extern const struct plan_kind bits_candidates[BITS_CANDIDATES];

// One matrix of a layer, or the layer's experts of one role together.
struct bits_unit {
    int32_t layer;
    enum tensor_role role;
    uint64_t matrices, rows, cols;   // of each
    uint64_t bytes[BITS_CANDIDATES]; // codes, scales and padding of the whole matrices
    double error[BITS_CANDIDATES];   // squared, relative
    double sensitivity;
    int chosen; // a candidate
};

struct bits {
    struct bits_unit *units; // by layer, then role
    size_t num_units;
    uint64_t weights;
    bool left_out[BITS_CANDIDATES]; // candidates that are not to be chosen
    bool measured;                  // errors of the checkpoint's own weights; else of normal ones
};

// The units of a plan with any kinds; errors are those of normally distributed weights, sensitivities the default ones. Success: bits_clear.
int bits_init(struct bits *out, const struct plan *plan, struct error *err);
void bits_clear(struct bits *bits); // accepts a zeroed one
// Leaves out all candidates but those of the kinds in a list such as "int4,int8"; NULL: the usual ones, int4, int4z, fp8, int8 and bf16.
// ERR_USAGE: a word that is none of them.
int bits_among(struct bits *bits, const char *list, struct error *err);
// The unit of a matrix; NULL where its kind is not chosen here (embedding, head, vectors).
struct bits_unit *bits_find(const struct bits *bits, int32_t layer, enum tensor_role role);

// Chooses. millibits: thousandths of a bit per weight, of all units together. ERR_USAGE when that is too little.
int bits_choose(struct bits *bits, uint32_t millibits, struct error *err);

// The sum that is lost by what is chosen.
double bits_lost(const struct bits *bits);
// The choice. Success: the caller frees *out, sorted (matrix_kinds_sort).
int bits_matrices(struct matrix_kind **out, const struct bits *bits, struct error *err);

// Stored bytes of a unit in any kind; 0: it cannot be stored so.
uint64_t bits_unit_bytes(const struct bits_unit *unit, enum weight_kind kind, uint32_t group_size);

#endif

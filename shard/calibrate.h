// Quantizing by calibration statistics (formats/calibration_file.h): rows from another source, whose four-bit matrices are rounded so that what they put
// out over the calibration text errs least. Matrices of other kinds, and those whose input has no statistics, are quantized as ever.
//
//   scales  the search for each group's scale weighs columns by the second moments of what they multiply
//   gptq    the same, and codes are chosen one column after the other so that each makes up for the errors of those before (kernels/gptq.h)
//
// An input that was zero all over the text says nothing of its matrix, which is then quantized as ever.
//
// A row's codes depend on the row, the statistics and the method alone: not on tp, threads or the rows beside it. One factor is in memory at a time,
// which takes 4 * columns^2 bytes while it is made and half of it afterwards.
#ifndef TPSHARD_SHARD_CALIBRATE_H
#define TPSHARD_SHARD_CALIBRATE_H

#include "formats/calibration_file.h"
#include "formats/error.h"
#include "kernels/gptq.h"
#include "shard/plan.h"
#include "shard/row_source.h"

#include <stdbool.h>
#include <stdint.h>

// What is ready for the tensor under way.
struct calibrate_state {
    const struct calibration_moments *moments; // NULL: it is quantized without statistics
    const float *weight;                       // [columns], of the search
    struct gptq_factor factor;                 // of `factored`
    const struct calibration_moments *factored;
};

struct calibrate_source {
    struct row_source source; // must be first
    const struct row_source *base;
    const struct plan *plan;
    const struct calibration_file *file;
    enum calibration_method method;
    struct calibrate_state *state;
};

// file must be of the plan's model: ERR_MODEL when a matrix has other columns than its input's statistics, or no statistics where its
// kind asks for them. ERR_USAGE: the text was too short. ERR_MEMORY: the largest factor does not fit. base, which has `values`, plan and file must outlive it. Success: calibrate_source_clear.
int calibrate_source_init(struct calibrate_source *out, const struct row_source *base, const struct plan *plan,
                          const struct calibration_file *file, enum calibration_method method, struct error *err);
void calibrate_source_clear(struct calibrate_source *source); // accepts a zeroed one

// Columns of the widest matrix whose codes make up for each other's errors; 0: there is none. Fewer tokens than these leave some of that to chance.
uint64_t calibrate_widest(const struct plan *plan);
// ERR_MEMORY: its factor does not fit. To be asked before any heavy work.
int calibrate_check_memory(const struct plan *plan, enum calibration_method method, struct error *err);
// Weights of the plan's matrices that are quantized by statistics; 0: there are none.
uint64_t calibrate_weights(const struct plan *plan);
// Whether a manifest (its sources may lack their hashes: with_weights false) is of the model that was captured. ERR_MODEL when it is not.
int calibrate_check_model(const struct calibration_file *file, const struct manifest *manifest, bool with_weights,
                          const char *path, struct error *err);

#endif

// A band: some rows of one stored tensor, for the ranks that hold just these rows. The unit of work of everything that
// makes or checks weights: rows are fetched whole from a row source and placed in each rank's layout.
// How a tensor is divided into bands depends on its shape alone, never on the number of threads.
#ifndef TPSHARD_SHARD_BAND_H
#define TPSHARD_SHARD_BAND_H

#include "formats/error.h"
#include "shard/plan.h"
#include "shard/row_source.h"

#include <stdint.h>

struct band {
    uint64_t tensor;               // index in the plan
    uint32_t rank_begin, rank_end; // columns cut or replicated: all ranks of the stages that hold it; rows cut: one
    uint64_t row_begin, row_end;   // stored rows, padding included
};

// Bands of one tensor, all ranks, in a fixed order. Success: the caller frees *out. *count may be 0.
int band_list(struct band **out, uint64_t *count, const struct plan *plan, uint64_t tensor, struct error *err);

// Where a band's bytes lie in a rank file, from the file's start.
struct band_place {
    uint64_t data_offset, data_bytes;
    uint64_t scale_offset, scale_bytes;
};
struct band_place band_place(const struct plan *plan, const struct band *band, uint32_t rank);

// One thread's memory for building bands; zeroed before the first use.
struct band_buffer {
    struct row_window window;
    void *row; // one packed row
    uint64_t row_capacity;
    uint8_t *bytes; // the built band: for each rank data, then scales
    uint64_t bytes_capacity;
};
void band_buffer_free(struct band_buffer *buffer);

// Builds the band into buffer->bytes. Padding is zero.
int band_build(struct band_buffer *buffer, const struct plan *plan, const struct band *band,
               const struct row_source *source, struct error *err);
// Room for a band's bytes, zeroed, without building it.
int band_reserve(struct band_buffer *buffer, const struct plan *plan, const struct band *band, struct error *err);
// The bytes of one of the band's ranks: data, and right behind them scales.
uint8_t *band_bytes(const struct band_buffer *buffer, const struct plan *plan, const struct band *band, uint32_t rank);

// "model.layers.0.self_attn.k_proj.weight", row 17: what stands in a stored row. NULL for a row of padding.
const char *band_row_source(const struct shard_tensor *tensor, uint64_t stored_row, uint64_t *source_row);

#endif

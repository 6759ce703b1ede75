// Where weights come from: whole source rows, quantized. Two sources give the same rows bit for bit: a checkpoint (reads
// and quantizes: checkpoint_source.h) and the rank files of another tp (reads and joins slices: shards_source.h).
// That is why `reshard` equals `convert`, and why slicing commutes with quantizing.
#ifndef TPSHARD_SHARD_ROW_SOURCE_H
#define TPSHARD_SHARD_ROW_SOURCE_H

#include "formats/error.h"
#include "formats/shard_file.h"
#include "kernels/pack.h"
#include "kernels/thread_pool.h"

#include <stdint.h>

// Rows [row_begin, row_begin + rows) of the source tensor of part `part` of stored tensor `tensor`, all columns.
struct row_request {
    uint64_t tensor; // index in the plan
    int part;
    const struct shard_part *source; // name and whole shape
    enum weight_kind kind;           // what rows are wanted as
    uint32_t group_size;             // int4; else 0
    enum weight_scales scales;       // of what is rounded to four bits
    uint64_t row_begin, rows;
};

// One thread's memory for one request; the buffers grow and are kept from request to request.
struct row_window {
    struct row_request request;
    uint8_t *raw; // bytes as read
    uint64_t raw_capacity;
    int raw_format;             // for the source alone, as the next two
    uint64_t raw_row, raw_rows; // rows of the source that raw holds
    float *values;              // one row
    uint64_t values_capacity;
    void *own; // what a source keeps from request to request, and how it is freed
    void (*free_own)(void *own);
};
void row_window_free(struct row_window *window); // accepts a zeroed one
// Make room; contents are lost. ERR_MEMORY.
int row_window_reserve(struct row_window *window, uint64_t raw_bytes, uint64_t values, struct error *err);

// A source is called by many threads at once, each with a window of its own.
struct row_source {
    // Reads what the request needs from disk, in large pieces.
    int (*read)(const struct row_source *source, struct row_window *window, const struct row_request *request,
                struct error *err);
    // Fills a vector that has no source tensor, computed from the config. out [values].
    int (*computed)(const struct row_source *source, uint64_t tensor, float *out, uint64_t values, struct error *err);
    // Fills one whole row, request.row_begin <= row < row_begin + rows. out has room for source_cols.
    // Errors name the tensor and the row.
    int (*row)(const struct row_source *source, struct row_window *window, uint64_t row, struct packed_row *out,
               struct error *err);
    // The same row before it is quantized, as floats: out [source_cols]. NULL: what is read is quantized for good.
    int (*values)(const struct row_source *source, struct row_window *window, uint64_t row, float *out,
                  struct error *err);
    // Called before the first row of a tensor is asked for, and not while rows are: makes ready what they share. NULL: nothing is.
    int (*begin)(const struct row_source *source, uint64_t tensor, struct thread_pool *pool, struct error *err);
};

// Quantizes a whole row of values as the request asks. The error names the tensor and the row.
int row_source_pack(struct packed_row *out, const struct row_request *request, uint64_t row, const float *values,
                    struct error *err);

#endif

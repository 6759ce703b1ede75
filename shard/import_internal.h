// What the files of the import share: a bound matrix. See import.h.
#ifndef TPSHARD_SHARD_IMPORT_INTERNAL_H
#define TPSHARD_SHARD_IMPORT_INTERNAL_H

#include "shard/import.h"
#include "shard/import_slab.h"

#include <pthread.h>

enum { GPTQ_WORD_BITS = 32, NF4_CODES = 16, NESTED_CODES = 256 };

struct import_matrix {
    char *source;  // key: the plan's name, with the index into a stack
    char *name;    // without it
    int64_t index; // -1: of no stack
    struct import_form form;
    uint64_t rows, cols; // of this expert
    uint64_t groups;     // of a row: scales
    uint64_t first_row;  // of a stack of experts: where this one begins
    bool interleaved;    // stored row i of the first half is row 2 i, of the second 2 i + 1
    const struct safetensors_tensor *codes, *scales, *zeros, *nested_scales;
    float global;           // NVFP4: multiplies every scale
    bool scale_per_tensor;  // one scale for all rows
    float table[NF4_CODES]; // NF4
    float *nested_table;    // NF4 with doubly quantized scales [NESTED_CODES]
    float nested_offset;
    uint64_t nested_block;

    // Act-order.
    uint32_t *column_group; // [cols] of source columns; NULL: column / group_size
    uint32_t *sorted;       // [cols] source columns, sorted by group; NULL: the groups do not come out whole
    bool reordered;         // stored column i is source column sorted[i]
    bool order_stored;      // and that order is stored beside the matrix
    bool rows_follow;       // of a down matrix: gate and up are known to be stored in its order
    const struct import_matrix *row_leader; // whose `sorted` orders the rows; NULL: none
    uint64_t row_period;

    // What storing it lost, under import->mutex.
    double error_squares, squares;
};

struct import {
    const struct import_config *config;
    const struct checkpoint *checkpoint; // NULL: planning from the config
    struct slab_cache *slabs;
    struct import_matrix **table; // by hash of source; open addressing
    uint64_t table_size, count;   // size a power of two
    uint64_t mixed;
    const char *first_mixed;
    pthread_mutex_t mutex;
};

struct import_matrix *import_find(const struct import *import, const char *source); // or NULL
const struct safetensors_tensor *import_companion(const struct import *import, const char *name, const char *suffix);
// "<name without .weight><suffix>", cut off when too long.
void import_companion_name(char *out, size_t bytes, const char *name, const char *suffix);

// Scales and tables of f32, f16, bf16, as f32.
bool import_is_real(enum dtype dtype);
float import_real(const uint8_t *raw, enum dtype dtype, uint64_t index);
// Reads a whole small tensor of reals. out [count], which is its number of elements.
int import_read_reals(const struct import *import, const struct safetensors_tensor *tensor, float *out, uint64_t count,
                      struct error *err);

// Refusals of a tensor: by its shape, its type, for what it is (`what`: a sentence); and of a matrix without one of its tensors.
int import_wrong_shape(const struct import *import, const struct safetensors_tensor *tensor, const uint64_t *wanted,
                       int num_wanted, struct error *err);
int import_wrong_dtype(const struct import *import, const struct safetensors_tensor *tensor, const char *wanted,
                       struct error *err);
int import_unsupported(const struct import *import, const struct safetensors_tensor *tensor, const char *what,
                       struct error *err);
int import_missing(const struct import_matrix *matrix, const char *suffix, struct error *err);
int import_want_reals(const struct import *import, const struct safetensors_tensor *tensor, struct error *err);
uint64_t import_elements(const struct safetensors_tensor *tensor);

// Binding (import_bind_flat.c): finds what stands beside matrix->codes, checks it all, and settles the form.
int import_bind_nf4(const struct import *import, struct import_matrix *matrix, struct error *err);
int import_bind_hqq(const struct import *import, struct import_matrix *matrix, struct error *err);

// The parts of window->memory.
struct import_unpacked {
    uint64_t *rows;     // [rows] in the source's order
    float *values;      // [rows][cols] where codes do not describe the row (NF4, plain); else one row of scratch
    float *scales;      // [rows][groups]
    float *zeros;       // [rows][groups]
    uint8_t *codes;     // [rows][cols]
    uint8_t *scratch;   // [cols]
    uint8_t *scales_u8; // [rows][groups] FP4
};

struct import_unpacked import_unpacked_of(const struct import_window *window);
// True where codes and scales do not describe the row: unpacked rows are values.
bool import_as_values(const struct import_matrix *matrix);

// Whether rows of a matrix become this kind by copying codes.
bool import_is_exact(const struct import_matrix *matrix, enum weight_kind kind, uint32_t group_size);

#endif

// Checkpoints that are already quantized, as they lie on the Hub: what each weight matrix is stored as, and its rows as
// exact codes. Owns every format's layout (which tensors, which nibble, which scale) and the reordering of columns that
// GPTQ's act-order asks for. Leaves to others which rank gets which rows (plan) and where rows go (band).
//
// A matrix is named as in the checkpoint it was made from: "model.layers.0.self_attn.q_proj.weight" stands for
// ...q_proj.qweight and its companions. A matrix whose quantized tensors are absent is plain: bf16, f16 or f32.
#ifndef TPSHARD_SHARD_IMPORT_H
#define TPSHARD_SHARD_IMPORT_H

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/json_file.h"
#include "formats/shard_file.h"
#include "formats/weight.h"
#include "kernels/pack.h"

#include <stdbool.h>
#include <stdint.h>

// ---- what the config says ----------------------------------------------------------------------------------------

enum import_method {
    IMPORT_PLAIN, // not quantized
    IMPORT_GPTQ,
    IMPORT_AWQ,
    IMPORT_COMPRESSED_TENSORS,
    IMPORT_FP8,
    IMPORT_FBGEMM_FP8,
    IMPORT_MXFP4,
    IMPORT_MODELOPT,
    IMPORT_BITSANDBYTES,
    IMPORT_HQQ,
};

// How codes and scales of one matrix lie.
enum import_layout {
    LAYOUT_PLAIN,
    LAYOUT_GPTQ,   // i32 [K * bits / 32, N], scales [G, N], qzeros i32 [G, N * bits / 32], g_idx i32 [K]
    LAYOUT_AWQ,    // i32 [K, N / 8], scales [G, N], qzeros i32 [G, N / 8]
    LAYOUT_PACKED, // i32 [N, K * bits / 32], scale [N, G], zero point i32 [N * bits / 32, G]
    LAYOUT_INT8,   // i8 [N, K], scale [1] or [N, 1]
    LAYOUT_FP8,    // e4m3 [N, K], scale [1], [N, 1] or one for each block
    LAYOUT_NVFP4,  // u8 [N, K / 2], e4m3 scale [N, K / 16], one f32
    LAYOUT_MXFP4,  // u8 [N, K / 2] or [..., K / 32, 16], e8m0 scale [N, K / 32]
    LAYOUT_NF4,    // u8 [N * K / 2], a table of 16 values, one scale for each block of the flat matrix
    LAYOUT_HQQ,    // u8: groups in the upper nibbles, the other half of them in the lower ones; scale and zero for each
};

// The numbers of one matrix.
struct import_form {
    enum import_layout layout;
    int bits;            // of a code
    uint64_t group_size; // columns that share a scale; 0: the whole row
    uint64_t block_rows; // LAYOUT_FP8: rows that share a scale; 1: every row has its own
    bool symmetric;      // no zero points
};

// Names of modules, globs, and regular expressions ("re:...") compiled once.
struct import_patterns {
    struct import_pattern *items;
    size_t count;
};

struct import_scheme {
    struct import_form form;
    struct import_patterns targets; // modules; none: all
};

enum { IMPORT_MAX_SCHEMES = 16 };

struct import_config {
    enum import_method method;
    char name[96]; // for people: "gptq", "compressed-tensors pack-quantized"
    struct import_scheme schemes[IMPORT_MAX_SCHEMES];
    int num_schemes;
    struct import_patterns ignore; // modules that are not quantized
    bool zero_minus_one;           // GPTQ's first version stores zero points less one
    bool act_order;                // GPTQ: columns are not in the order of their groups, g_idx says which
    bool head;                     // the head is quantized too, unless ignored
    bool experts_only;
};

// From the root of config.json and, where there is one (else NULL), of ModelOpt's hf_quant_config.json. A quantization
// that cannot be read is refused by name (ERR_MODEL), with what would be needed. Success: import_config_clear.
int import_config_parse(struct import_config *out, const struct json_object *config,
                        const struct json_object *hf_quant_config, struct error *err);
int import_config_read(struct import_config *out, const char *model_dir, struct error *err);
void import_config_clear(struct import_config *config); // accepts a zeroed one

// The form that the config gives a module ("model.layers.0.mlp.down_proj"); NULL: plain. ERR_MODEL: a regular expression
// of the config takes too long on this name.
int import_config_form(const struct import_form **out, const struct import_config *config, const char *module,
                       struct error *err);

// ---- matrices ----------------------------------------------------------------------------------------------------

struct import;

// checkpoint may be NULL: answers then come from the config alone, and rows cannot be read. Both must outlive *out.
int import_open(struct import **out, const struct import_config *config, const struct checkpoint *checkpoint,
                struct error *err);
void import_close(struct import *import); // accepts null

// One matrix that goes into a stored tensor, as the plan names it: whole, [out, in]; "...gate_up_proj[5]" is the sixth
// of a stack, rows of gate in front of rows of up.
struct import_part {
    const char *source;
    uint64_t rows, cols;
};

// Finds the tensors of a matrix and checks dtypes and shapes; every part must be bound, or chosen for, before its rows
// are read. ERR_MODEL names the tensor. Not to be called while threads read rows.
int import_bind(struct import *import, const struct import_part *part, struct error *err);

// Binds the parts of one stored tensor and settles the order in which their rows and columns are stored; for every
// tensor that the plan stores, whatever its kind.
int import_settle(struct import *import, enum tensor_role role, const struct import_part *parts, int num_parts,
                  struct error *err);

// The kind that holds a form of so many columns without loss (NF4: with little); false: none does.
bool import_kind_of_form(const struct import_form *form, uint64_t cols, enum weight_kind *kind, uint32_t *group_size);

// Settles, and gives kind and group of the stored tensor that takes these parts as they are, without loss where one
// exists: the parts' own kind, the finest common one where they differ, else bf16 (see import_mixed). ERR_MODEL: a part
// is wrong, or is of a form that no kind can hold (the sentence says what can be done).
int import_choose(struct import *import, enum tensor_role role, const struct import_part *parts, int num_parts,
                  enum weight_kind *kind, uint32_t *group_size, struct error *err);

// True when the columns of the stored tensor that begins with this part are in an order of their own, which the plan
// adds as ROLE_QKV_ORDER or ROLE_GATE_UP_ORDER.
bool import_has_order(const struct import *import, enum tensor_role role, const char *source);
// That order as f32: stored column i is column out[i] of the input.
void import_order(const struct import *import, const char *source, float *out, uint64_t cols);
// Act-order of the matrix behind gate and up moves their rows (and the elements of their biases): stored row i of each
// of them is row order[i]; *period is how many there are (a source that holds gate and up has two periods). NULL: as
// they are. source: the weight's name.
const uint32_t *import_row_order(const struct import *import, const char *source, uint64_t *period);

// ---- rows --------------------------------------------------------------------------------------------------------

// True when the rows of a bound matrix come from here: it is quantized, or its rows are reordered.
bool import_serves(const struct import *import, const char *source);

// One thread's unpacked rows; zeroed before the first use.
struct import_window {
    struct import_matrix *matrix;
    uint64_t row_begin, rows;
    uint8_t *memory, *raw; // unpacked; as read
    uint64_t memory_capacity, raw_capacity;
};
void import_window_free(struct import_window *window); // accepts a zeroed one
// Reads stored rows [row_begin, row_begin + rows) of a quantized matrix, all columns. Many threads may read at once.
int import_read(struct import *import, struct import_window *window, const char *source, uint64_t row_begin,
                uint64_t rows, struct error *err);
// One of these rows as a packed row of the kind. Exact when the kind can hold it; else dequantized and quantized anew,
// and the error noted.
int import_row(struct import *import, struct import_window *window, uint64_t row, enum weight_kind kind,
               uint32_t group_size, enum weight_scales scales, struct packed_row *out, struct error *err);
// One of these rows as floats, for tests. out [cols].
int import_values(struct import *import, struct import_window *window, uint64_t row, float *out, struct error *err);

// ---- reports -----------------------------------------------------------------------------------------------------

// A tensor that belongs to a matrix in use, or that carries nothing that inference needs (scales of activations and
// caches, biases of zeros).
int import_tensor_known(struct import *import, const struct safetensors_tensor *tensor, bool *known, struct error *err);

// Stored tensors that became bf16 because their parts have no kind in common: how many, and the first part of the first
// of them.
uint64_t import_mixed(const struct import *import, const char **first);

// Matrices that were not stored exactly, with the error relative to the matrix's root mean square.
struct import_loss {
    const char *source;
    double relative_rmse;
};
uint64_t import_losses(const struct import *import, struct import_loss *out,
                       uint64_t max); // the largest first; returns how many there are

#endif

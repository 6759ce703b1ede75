// Calibration files: second moments of what a model's matrices are multiplied with, over the tokens of a text. tpengine capture writes them,
// tpshard quantizes by them. Specification: formats/calibration_file.md.
// It leaves to others: how moments are summed (kernels/gptq.h) and what is made of them (there, and shard/calibrate.h).
#ifndef TPSHARD_FORMATS_CALIBRATION_FILE_H
#define TPSHARD_FORMATS_CALIBRATION_FILE_H

#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/shard_file.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The inputs of a layer's products; matrices that multiply the same rows share one. Numbers are on disk.
enum calibration_input {
    CALIBRATION_ATTENTION =
        0, // behind the norm in front of attention: qkv; latent attention: q_a, kv_a, q_b without a q_rank
    CALIBRATION_Q_LATENT,    // behind the norm of the queries' latent: q_b
    CALIBRATION_O,           // what attention put out: o
    CALIBRATION_MLP,         // behind the norm in front of the mlp: gate_up, that of every expert and of the shared one
    CALIBRATION_DOWN,        // behind the activation: down, that of the shared expert in a layer of experts
    CALIBRATION_EXPERT_DOWN, // behind an expert's activation: its down; over the tokens that chose it
    CALIBRATION_HEAD,        // behind the last norm; of no layer
    CALIBRATION_INPUT_COUNT,
};
const char *calibration_input_name(enum calibration_input input); // "attention", "expert_down"
// Which input a stored matrix multiplies; false: none of them (vectors, tables, the router, kv_b, and an embedding that is no head).
bool calibration_input_of(enum calibration_input *out, enum tensor_role role, const struct model_desc *model);

#define CALIBRATION_MAGIC "TPCALIB1" // 8 bytes, without the NUL
// Behind the name of a file that is being captured: of the file beside it in which the text's residuals wait.
#define CALIBRATION_RESIDUALS ".residuals"
enum { CALIBRATION_VERSION = 1, CALIBRATION_KERNELS_BYTES = 24, CALIBRATION_MAX_COLS = 1 << 18 };

// Little-endian.
struct calibration_header {
    uint8_t magic[8];       //   0  "TPCALIB1"
    uint32_t version;       //   8  CALIBRATION_VERSION
    uint32_t header_bytes;  //  12  128
    uint32_t num_layers;    //  16  of the model, 1 .. MODEL_MAX_LAYERS
    uint32_t window_tokens; //  20  longest piece of the text that was read at once, > 0
    uint64_t tokens;        //  24  of all windows, > 0
    uint8_t model[16];      //  32  calibration_model_key
    uint8_t weights[16];    //  48  calibration_weights_key
    uint8_t text[16];       //  64  XXH3-128 of the text
    char kernels[24];       //  80  whose sums they are, "avx2" (struct kernels); ends in NUL
    uint8_t reserved[16];   // 104  zero
    uint64_t checksum;      // 120  XXH3-64 of the bytes in front of it
};
_Static_assert(sizeof(struct calibration_header) == 128, "on-disk layout");
_Static_assert(offsetof(struct calibration_header, checksum) == 120, "on-disk layout");
// Fills the fields that follow from the others. kernels is cut where it is too long.
void calibration_header_make(struct calibration_header *out, uint32_t num_layers, uint32_t window_tokens,
                             uint64_t tokens, struct checksum128 model, struct checksum128 weights,
                             struct checksum128 text, const char *kernels);

// What statistics belong to, whatever a shard directory's kinds and cut: the description of its model and the names and sizes of
// the checkpoint's files; and the same with their hashes.
int calibration_model_key(const struct manifest *manifest, struct checksum128 *out, struct error *err);
int calibration_weights_key(const struct manifest *manifest, struct checksum128 *out, struct error *err);

// Sums over rows x, not means.
struct calibration_moments {
    enum calibration_input input;
    int32_t layer, expert; // -1: of no layer; of no expert
    uint64_t rows, cols;
    const float *diagonal; // [cols]: sum of x[i]^2
    const float *
        triangle; // the lower triangle of the sum of x x^T, row by row: row i holds columns 0 .. i; NULL: it is not there
};
static inline uint64_t calibration_triangle_elems(uint64_t cols) { return cols * (cols + 1) / 2; }

// ---- reading ---------------------------------------------------------------------------------------------------

struct calibration_file;

// Reads and checks everything but the triangles and what pads them. ERR_CORRUPT for what is damaged or unfinished. Success: calibration_file_close.
int calibration_file_open(struct calibration_file **out, const char *path, struct error *err);
void calibration_file_close(struct calibration_file *file); // accepts NULL
const struct calibration_header *calibration_file_header(const struct calibration_file *file);
// Of the header and of every record's head, which hold checksums of all the rest: stands for every byte, since padding is zeros.
struct checksum128 calibration_file_hash(const struct calibration_file *file);

uint64_t calibration_file_count(const struct calibration_file *file);
// Its triangle is NULL; *has_triangle (may be NULL) says whether calibration_file_triangle can read it.
const struct calibration_moments *calibration_file_at(const struct calibration_file *file, uint64_t index,
                                                      bool *has_triangle);
// NULL: there are none. Takes logarithmic time.
const struct calibration_moments *calibration_file_find(const struct calibration_file *file,
                                                        enum calibration_input input, int32_t layer, int32_t expert,
                                                        bool *has_triangle);
// Reads and checks a triangle and what pads it, out [calibration_triangle_elems(cols)]. Any thread.
int calibration_file_triangle(const struct calibration_file *file, const struct calibration_moments *moments,
                              float *out, struct error *err);

// ---- writing ---------------------------------------------------------------------------------------------------

struct calibration_writer;

// Begins a file, or goes on with one that begins with the same header: *layers_done of its layers are complete, what stands behind them is
// dropped; *finished: there is nothing left to do. ERR_USAGE: the file that stands there is another one. Success: calibration_writer_close.
int calibration_writer_open(struct calibration_writer **out, const char *path, const struct calibration_header *header,
                            uint32_t *layers_done, bool *finished, struct error *err);
int calibration_writer_add(struct calibration_writer *writer, const struct calibration_moments *moments,
                           struct error *err);
// The layer's moments are all there: they survive a crash from now on. Layers end in order.
int calibration_writer_end_layer(struct calibration_writer *writer, struct error *err);
// Behind the last layer and what belongs to none.
int calibration_writer_finish(struct calibration_writer *writer, struct error *err);
void calibration_writer_close(struct calibration_writer *writer); // accepts NULL

#endif

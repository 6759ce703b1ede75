// model.json, the manifest: written last, so that a directory without it is not a model. Specification:
// formats/shard_file.md.
#ifndef TPSHARD_FORMATS_MANIFEST_H
#define TPSHARD_FORMATS_MANIFEST_H

#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/matrix_kinds.h"
#include "formats/model_desc.h"
#include "formats/weight.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MANIFEST_FILE_NAME "model.json"
enum {
    MANIFEST_VERSION = 2,
    MANIFEST_MAX_MILLIBITS = 64000, // per weight; narrow matrices are mostly padding
};

// A file of the directory (rank file, tokenizer.bin, ...) or, under sources, of the checkpoint it was made from.
struct manifest_file {
    char *name; // plain file name: no '/', no control characters
    uint64_t bytes;
    struct checksum128 hash; // XXH3-128: of a rank file, everything before the payload (which holds the payload's
                             // leaves); of all others, the whole file
};

// How calibration statistics decided about what was rounded to four bits (shard/calibrate.h).
enum calibration_method { CALIBRATION_NONE, CALIBRATION_SCALES, CALIBRATION_GPTQ };
const char *calibration_method_name(enum calibration_method method); // "none", "scales", "gptq"
bool calibration_method_from_name(const char *name, enum calibration_method *method);

// Kinds of the three groups of weights. A checkpoint that came quantized may hold single matrices of other kinds: what
// counts is what the rank files say. Where matrices were stored in kinds of their own (--bits, --kinds), linear is the one that holds most
// weights, and the manifest lists them all.
struct manifest_quant {
    enum weight_kind linear, embedding, head;
    uint32_t group_size;       // int4, int4z and nl4; 0 when nothing is
    enum weight_scales scales; // of four-bit kinds; WEIGHT_SCALES_SEARCHED when there are none
    uint32_t
        rotation; // channels of the residual stream that were rotated together (tpshard --rot); 0: the model is as it was
    // Matrices of the layers are stored in kinds of their own: together they take at most so many thousandths of a bit per weight,
    // scales and padding of the whole matrices included. 0: all as linear says.
    uint32_t millibits;
    enum calibration_method calibration;
    struct checksum128 statistics; // calibration_file_hash of the statistics; 0 without
};
enum { MANIFEST_MIN_ROTATION = 4 };

// How the experts of a layer are dealt out to the ranks.
enum experts_mode {
    EXPERTS_TP, // every rank holds a slice of each
    EXPERTS_EP, // every rank holds some of them, whole
};
const char *experts_mode_name(enum experts_mode mode); // "tp", "ep"
bool experts_mode_from_name(const char *name, enum experts_mode *mode);

// What each codec of the sums over ranks does to the model's predictions of a text, beside sums without a loss, as
// `tpengine advise` has measured it. Informative.
#define MANIFEST_MAX_KL 1e6 // nats
struct manifest_wire {
    char name[8];
    bool finite;          // false: NaN or infinity came out, and there are no figures
    double kl_divergence; // in nats, the mean over tokens; at most MANIFEST_MAX_KL
    double kl_high;       // the upper end of its interval of 95 %
    double same_top;      // share of tokens where both find the same one likeliest
};
enum { MANIFEST_MAX_WIRES = 8 };
struct manifest_wires {
    struct checksum128 text; // XXH3-128 of the text
    int64_t tokens, context; // scored tokens; longest window
    bool feedback;           // with error feedback
    double limit;            // kl_high above it counted as too much
    struct manifest_wire wires[MANIFEST_MAX_WIRES];
    size_t count; // 0: nothing was measured, and the rest counts for nothing
};

struct manifest {
    uint32_t version; // MANIFEST_VERSION
    char *tool;       // "tpshard 0.1.0 (commit)"; informative, not part of the contract
    struct model_desc model;
    uint32_t tp_size, pp_size; // ranks of a stage; pipeline stages
    // Layers that each stage has, one run behind the other; at least one, num_layers in all. Of pp_size stages.
    uint16_t stage_layers[MODEL_MAX_LAYERS];
    struct manifest_quant quant;
    struct matrix_kind *matrices; // with quant.millibits: those of the layers, sorted (matrix_kinds_sort); else none
    size_t num_matrices;
    enum experts_mode experts; // EXPERTS_TP where the model has none
    char *wire_advice;         // "bf16", "f32", "fp8", "s8x": what `--wire auto` should take
    struct manifest_wires wires_measured;
    struct checksum128 contract; // XXH3-128 of the canonical core: see manifest_core
    struct manifest_file *ranks; // tp_size * pp_size, stage by stage, in rank order
    size_t num_ranks;
    struct manifest_file *extras; // tokenizer.bin, chat_template.jinja, generation_config.json, config.json ...
    size_t num_extras;
    struct manifest_file *sources; // provenance: files of the checkpoint
    size_t num_sources;
};

// The canonical core: compact JSON, sorted keys, of version, model, tp/pp and stages, quant, experts, and sources (name, bytes, hash). It
// reads nothing else. Its XXH3-128 is the contract that every rank file carries, computable before the first weight is
// written. Caller frees *out.
int manifest_core(const struct manifest *manifest, char **out, struct error *err);
int manifest_contract(const struct manifest *manifest, struct checksum128 *out, struct error *err);

// The file's text, indented; the same manifest gives the same bytes. The contract is computed anew, manifest->contract
// is not read. Refuses whatever manifest_parse would refuse. Caller frees *out.
int manifest_to_json(const struct manifest *manifest, char **out, struct error *err);
// Parses and checks everything, the contract too. ERR_CORRUPT when it does not hold. name is for messages.
int manifest_parse(struct manifest **out, const char *text, size_t bytes, const char *name, struct error *err);
// dir/model.json. ERR_CORRUPT when the directory is there and holds none.
int manifest_read(struct manifest **out, const char *dir, struct error *err);
// Frees the manifest and all it points to; accepts NULL.
void manifest_free(struct manifest *manifest);

// Name of a rank file: "rank-00-of-04.tpshard"; with several stages "stage-01-rank-00-of-04.tpshard". rank counts over all stages: stage *
// tp_size + rank of the stage. Buffer of at least 64 bytes.
void manifest_rank_file_name(char *buffer, size_t bytes, uint32_t rank, uint32_t tp_size, uint32_t pp_size);

// Layers [*begin, *begin + *count) of a stage, of stages with so many layers each.
void manifest_stage(const uint16_t *stage_layers, uint32_t stage, int64_t *begin, int64_t *count);
// The description of a stage's layers alone, numbered from 0 on.
void manifest_stage_model(struct model_desc *out, const struct model_desc *model, int64_t layer_begin,
                          int64_t num_layers);

#endif

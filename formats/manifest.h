// model.json, the manifest: written last, so that a directory without it is not a model. Specification:
// formats/shard_file.md.
#ifndef TPSHARD_FORMATS_MANIFEST_H
#define TPSHARD_FORMATS_MANIFEST_H

#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/model_desc.h"
#include "formats/weight.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MANIFEST_FILE_NAME "model.json"
enum { MANIFEST_VERSION = 2 };

// A file of the directory (rank file, tokenizer.bin, ...) or, under sources, of the checkpoint it was made from.
struct manifest_file {
    char *name; // plain file name: no '/', no control characters
    uint64_t bytes;
    struct checksum128 hash; // XXH3-128: of a rank file, everything before the payload (which holds the payload's
                             // leaves); of all others, the whole file
};

// Kinds of the three groups of weights. A checkpoint that came quantized may hold single matrices of other kinds: what
// counts is what the rank files say.
struct manifest_quant {
    enum weight_kind linear, embedding, head;
    uint32_t group_size;       // int4 and int4z; 0 when nothing is
    enum weight_scales scales; // of four-bit kinds; WEIGHT_SCALES_SEARCHED when there are none
};

// How the experts of a layer are dealt out to the ranks.
enum experts_mode {
    EXPERTS_TP, // every rank holds a slice of each
    EXPERTS_EP, // every rank holds some of them, whole
};
const char *experts_mode_name(enum experts_mode mode); // "tp", "ep"
bool experts_mode_from_name(const char *name, enum experts_mode *mode);

struct manifest {
    uint32_t version; // MANIFEST_VERSION
    char *tool;       // "tpshard 0.1.0 (commit)"; informative, not part of the contract
    struct model_desc model;
    uint32_t tp_size, pp_size;
    struct manifest_quant quant;
    enum experts_mode experts;   // EXPERTS_TP where the model has none
    char *wire_advice;           // "bf16", "fp8", "s8x": what `--wire auto` should take
    struct checksum128 contract; // XXH3-128 of the canonical core: see manifest_core
    struct manifest_file *ranks; // tp_size * pp_size, in rank order
    size_t num_ranks;
    struct manifest_file *extras; // tokenizer.bin, chat_template.jinja, generation_config.json, config.json ...
    size_t num_extras;
    struct manifest_file *sources; // provenance: files of the checkpoint
    size_t num_sources;
};

// The canonical core: compact JSON, sorted keys, of version, model, tp/pp, quant, experts, and sources (name, bytes, hash). It
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

// Name of a rank file: "rank-00-of-04.tpshard" (pp: "stage-00-rank-00-of-04.tpshard" is reserved). Buffer of at least
// 64 bytes.
void manifest_rank_file_name(char *buffer, size_t bytes, uint32_t rank, uint32_t tp_size);

#endif

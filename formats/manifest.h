// model.json, the manifest: written last, so that a directory without it is not a model. Specification: formats/shard_file.md.
#ifndef TPSHARD_FORMATS_MANIFEST_H
#define TPSHARD_FORMATS_MANIFEST_H

#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/model_desc.h"
#include "formats/weight.h"

#include <stddef.h>
#include <stdint.h>

#define MANIFEST_FILE_NAME "model.json"

struct manifest_file { // a file that belongs to the directory (rank files, tokenizer.bin, ...)
    char *name;        // plain file name
    uint64_t bytes;
    struct checksum128
        hash; // rank files: XXH3-128 of everything before the payload (which holds the payload's leaves);
              // all others: XXH3-128 of the whole file
};


struct manifest_quant {
    enum weight_kind linear, embedding, head; // kinds of the three groups of weights
    uint32_t group_size;                      // int4; 0 when nothing is int4
};

struct manifest {
    uint32_t version; // 1
    char *tool;       // "tpshard 0.1.0 (commit)"; informative, not part of the contract
    struct model_desc model;
    uint32_t tp_size, pp_size;
    struct manifest_quant quant;
    char *wire_advice;           // "bf16", "fp8", "s8x": what `--wire auto` should take
    struct checksum128 contract; // XXH3-128 of the canonical core: see manifest_core
    struct manifest_file *ranks; // tp_size * pp_size, in rank order
    size_t num_ranks;
    struct manifest_file *extras; // tokenizer.bin, chat_template.jinja, generation_config.json, config.json ...
    size_t num_extras;
    struct manifest_source *sources;
    size_t num_sources;
};

// The canonical core: compact JSON, sorted keys, of version, model, tp/pp, quant, and sources (name, bytes, hash). Its
// XXH3-128 is the contract that every rank file carries, computable before the first weight is written. Caller frees *out.
int manifest_core(const struct manifest *manifest, char **out, struct error *err);
int manifest_contract(const struct manifest *manifest, struct checksum128 *out, struct error *err);

int manifest_to_json(const struct manifest *manifest, char **out,
                     struct error *err); // pretty, deterministic; caller frees
// Parses and checks everything, the contract too. ERR_CORRUPT when it does not hold.
int manifest_parse(struct manifest **out, const char *text, size_t bytes, const char *name, struct error *err);
int manifest_read(struct manifest **out, const char *dir,
                  struct error *err); // dir/model.json; a clear word when it is missing
void manifest_free(struct manifest *manifest);

// Name of a rank file: "rank-00-of-04.tpshard" (pp: "stage-00-rank-00-of-04.tpshard" is reserved). Buffer of at least 64 bytes.
void manifest_rank_file_name(char *buffer, size_t bytes, uint32_t rank, uint32_t tp_size);

#endif

// The commands of tpshard: each file commands_<name>.c holds one, its option table and its function.
#ifndef TPSHARD_SHARD_COMMANDS_H
#define TPSHARD_SHARD_COMMANDS_H

#include "formats/error.h"
#include "formats/options.h"
#include "shard/bits.h"
#include "shard/build.h"
#include "shard/hf_config.h"
#include "shard/import_plan.h"

#include <jansson.h>

#include <stdbool.h>
#include <stdint.h>

// Options of every command.
struct common_options {
    bool json, quiet;
};
extern struct common_options common;

// Options that `convert` and `plan` share: how the model is to be cut and stored.
struct model_options {
    int64_t tp, pp;         // -1: not said
    const char *quant;      // NULL: not said; "keep": as a checkpoint that is quantized has it
    const char *group_size; // NULL: not said
    const char *scales;
    const char *embed, *head;        // NULL: the default that goes with quant
    double bits;                     // per weight, of all matrices of the layers; -1: not said
    const char *among;               // kinds that --bits chooses among; NULL: the usual ones
    const char *kinds, *sensitivity; // files about matrices; or NULL
    const char *experts;             // a name of enum experts_mode
    bool rot;
    const char *plan, *as; // a plan of the user's own; the architecture as which to read one that is not known; or NULL
};

// clang-format off
#define MODEL_OPTIONS_DEFAULT {.tp = -1, .pp = -1, .scales = "search", .bits = -1, .experts = "tp"}
#define MODEL_OPTION_SPECS(options)                                                                                    \
    {"tp", OPTION_INT, &(options).tp, "N", 1, PLAN_MAX_TP, "ranks to cut the model for (default: 1)"},                 \
    {"pp", OPTION_INT, &(options).pp, "N", 1, PLAN_MAX_PP,                                                             \
     "pipeline stages to cut the layers for, each of --tp ranks (default: 1)"},                                        \
    {"quant", OPTION_CHOICE, &(options).quant, "keep|none|int8|fp8|int4|int4z|nl4|mxfp4|nvfp4", 0, 0,                      \
     "how the weights of the layers are stored; none is bf16, keep what a quantized checkpoint holds (its default)"},  \
    {"group-size", OPTION_CHOICE, &(options).group_size, "128|64|32", 0, 0,                                            \
     "int4, int4z and nl4: columns that share a scale (default: 128; with --bits and --kinds those of embedding and "  \
     "head alone)"},                                                                                                   \
    {"scales", OPTION_CHOICE, &(options).scales, "search|max", 0, 0,                                                   \
     "four-bit weights: search the scale of each group that errs least, or take it from the largest magnitude "        \
     "(plain rounding: quicker, smaller with --zstd, less exact)"},                                                    \
    {"rot", OPTION_FLAG, &(options).rot, NULL, 0, 0,                                                                   \
     "rotate the model, which computes the same then, so that four bits hold weights with outliers better; a head that is the " \
     "embedding is stored apart from it"},                                                                             \
    {"bits", OPTION_NUMBER, &(options).bits, "N", 1, 16,                                                               \
     "instead of --quant: store each matrix of the layers in the kind and with the "                                   \
     "groups that lose least, N bits per weight of them all at most, scales included (embedding, head, routers and kv_b " \
     "do not count); `inspect` shows the choice"},                                                                     \
    {"among", OPTION_TEXT, &(options).among, "KINDS", 0, 0,                                                            \
     "with --bits: kinds to choose among, of int4, nl4, int4z, fp8, int8 and bf16, and no others (default: "           \
     "int4,int4z,fp8,int8,bf16)"},                                                                                     \
    {"sensitivity", OPTION_TEXT, &(options).sensitivity, "FILE", 0, 0,                                                 \
     "with --bits: how much an error of each matrix costs (JSON, from scripts/measure_sensitivity.py), instead of the " \
     "usual values"},                                                                                                  \
    {"kinds", OPTION_TEXT, &(options).kinds, "FILE", 0, 0,                                                             \
     "instead of --quant: the kind of each matrix of the layers, as you say it (JSON: {\"kinds\": {\"*\": "         \
     "\"int4:64\", \"*.down\": \"int8\"}})"},                                                                    \
    {"embed", OPTION_CHOICE, &(options).embed, "none|int8|fp8|int4|int4z|nl4|mxfp4|nvfp4", 0, 0,                           \
     "how the embedding is stored (default: none; where it is also the head, as --head)"},                             \
    {"head", OPTION_CHOICE, &(options).head, "none|int8|fp8|int4|int4z|nl4|mxfp4|nvfp4", 0, 0,                             \
     "how the head is stored (default: as --quant; int8 with four bits)"},                                             \
    {"experts", OPTION_CHOICE, &(options).experts, "tp|ep", 0, 0,                                                      \
     "tp: every rank holds a slice of each expert; ep: some of them, whole"},                                          \
    {"plan", OPTION_TEXT, &(options).plan, "FILE", 0, 0,                                                               \
     "a tp_plan of your own (JSON: patterns and strategies), checked against the model's tensors"},                    \
    {"as", OPTION_TEXT, &(options).as, "ARCHITECTURE", 0, 0,                                                           \
     "read an architecture that is not known as this one, which has its keys and tensors and computes the same"}
#define THREADS_OPTION_SPEC(target)                                                                                    \
    {"threads", OPTION_INT, target, "N", 1, 1024, "threads to work on (default: all CPUs); the bytes do not depend on it"}
#define ZSTD_OPTION_SPEC(target)                                                                                       \
    {"zstd", OPTION_FLAG, target, NULL, 0, 0,                                                                          \
     "compress the rank files, without loss (bf16 by a third, fp8 by a sixth, int8 and int4 by a tenth); `plan --zstd` " \
     "says whether a start becomes quicker; the disk holds both forms while it works"}
// clang-format on

extern const struct option_spec convert_options[];
int convert_run(int argc, char **argv, struct error *err);
extern const struct option_spec plan_options[];
int plan_run(int argc, char **argv, struct error *err);
extern const struct option_spec inspect_options[];
int inspect_run(int argc, char **argv, struct error *err);
extern const struct option_spec verify_options[];
int verify_run(int argc, char **argv, struct error *err);
extern const struct option_spec reshard_options[];
int reshard_run(int argc, char **argv, struct error *err);
extern const struct option_spec repair_options[];
int repair_run(int argc, char **argv, struct error *err);
extern const struct option_spec sums_options[];
int sums_run(int argc, char **argv, struct error *err);

// config.json (path itself with is_file, else in the directory `path`), read as the options say. *experts: as the options or the
// user's own plan say.
int commands_read_model(struct hf_config *config, enum experts_mode *experts, const char *path, bool is_file,
                        const struct model_options *options, struct error *err);
struct plan_wish commands_wish(const struct model_options *options, enum experts_mode experts);
// ERR_USAGE: --scales is said, and nothing is rounded to four bits. chooses: where no --quant is said, the command chooses one.
int commands_check_scales(const struct model_options *options, bool chooses, struct error *err);

// Kinds matrix by matrix, from --bits or --kinds.
struct mix {
    struct plan_mix choice; // without a list: every matrix as --quant says
    struct bits bits;       // errors and sensitivities of the units; list[u] is of unit u
    double average;         // stored bits per weight
};
bool commands_mixes(const struct model_options *options);
int commands_check_mix(const struct model_options *options, struct error *err);
// has_weights: those of model_dir are measured; else taken to be normal. Success: commands_mix_clear.
int commands_make_mix(struct mix *out, const struct hf_config *config, const char *model_dir, bool has_weights,
                      const struct model_options *options, int threads, struct error *err);
// What is known of each matrix and what was chosen. NULL elements where memory lacks (commands_print_json says it).
json_t *commands_mix_json(const struct mix *mix);
void commands_mix_clear(struct mix *mix); // accepts a zeroed one

// What `convert --dry-run` shows: `plan` without its own options.
int plan_report(const char *model_dir, const struct model_options *options, struct error *err);

// The line, or with --json the object, with which convert and reshard end.
int commands_report_build(const struct build_result *result, const struct plan *plan, const char *out_dir,
                          struct error *err);
// Prints a JSON object to stdout and frees it; ERR_IO when stdout cannot take it.
int commands_print_json(json_t *object, struct error *err);
// A note for people on stderr, unless --quiet.
void commands_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif

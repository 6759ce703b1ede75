// The commands of tpshard: each file commands_<name>.c holds one, its option table and its function.
#ifndef TPSHARD_SHARD_COMMANDS_H
#define TPSHARD_SHARD_COMMANDS_H

#include "formats/error.h"
#include "formats/options.h"
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
    int64_t tp;        // -1: not said
    const char *quant; // NULL: not said; "keep": as a checkpoint that is quantized has it
    const char *group_size, *scales;
    const char *embed, *head; // NULL: the default that goes with quant
    const char *experts;      // a name of enum experts_mode
    const char *plan, *as; // a plan of the user's own; the architecture as which to read one that is not known; or NULL
};

// clang-format off
#define MODEL_OPTIONS_DEFAULT {.tp = -1, .group_size = "128", .scales = "search", .experts = "tp"}
#define MODEL_OPTION_SPECS(options)                                                                                    \
    {"tp", OPTION_INT, &(options).tp, "N", 1, PLAN_MAX_TP, "ranks to cut the model for (default: 1)"},                 \
    {"quant", OPTION_CHOICE, &(options).quant, "keep|none|int8|fp8|int4|int4z|mxfp4|nvfp4", 0, 0,                      \
     "how the weights of the layers are stored; none is bf16, keep what a quantized checkpoint holds (its default)"},  \
    {"group-size", OPTION_CHOICE, &(options).group_size, "128|64|32", 0, 0,                                            \
     "int4 and int4z: columns that share a scale"},                                                                    \
    {"scales", OPTION_CHOICE, &(options).scales, "search|max", 0, 0,                                                   \
     "four-bit weights: search the scale of each group that errs least, or take it from the largest magnitude "        \
     "(plain rounding: quicker, smaller with --zstd, less exact)"},                                                    \
    {"embed", OPTION_CHOICE, &(options).embed, "none|int8|fp8|int4|int4z|mxfp4|nvfp4", 0, 0,                           \
     "how the embedding is stored (default: none; where it is also the head, as --head)"},                             \
    {"head", OPTION_CHOICE, &(options).head, "none|int8|fp8|int4|int4z|mxfp4|nvfp4", 0, 0,                             \
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

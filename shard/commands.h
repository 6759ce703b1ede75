// The commands of tpshard: each file commands_<name>.c holds one, its option table and its function.
#ifndef TPSHARD_SHARD_COMMANDS_H
#define TPSHARD_SHARD_COMMANDS_H

#include "formats/error.h"
#include "formats/options.h"
#include "shard/build.h"

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
    int64_t tp;
    const char *quant, *group_size;
    const char *embed, *head; // NULL: the default that goes with quant
};
extern struct model_options model_options;

// clang-format off
#define MODEL_OPTION_SPECS                                                                                             \
    {"tp", OPTION_INT, &model_options.tp, "N", 1, PLAN_MAX_TP, "ranks to cut the model for"},                          \
    {"quant", OPTION_CHOICE, &model_options.quant, "none|int8|int4|fp8", 0, 0,                                         \
     "how the weights of the layers are stored; none is bf16"},                                                        \
    {"group-size", OPTION_CHOICE, &model_options.group_size, "128|64|32", 0, 0,                                        \
     "int4: columns that share a scale"},                                                                              \
    {"embed", OPTION_CHOICE, &model_options.embed, "none|int8|int4|fp8", 0, 0,                                         \
     "how the embedding is stored (default: none; where it is also the head, as --head)"},                             \
    {"head", OPTION_CHOICE, &model_options.head, "none|int8|int4|fp8", 0, 0,                                           \
     "how the head is stored (default: as --quant; int8 with int4)"}
#define THREADS_OPTION_SPEC(target)                                                                                    \
    {"threads", OPTION_INT, target, "N", 1, 1024, "threads to work on (default: all CPUs); the bytes do not depend on it"}
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

// What `convert --dry-run` shows: plan_run without its own options.
int plan_report(const char *model_dir, int64_t context_tokens, uint64_t gpu_memory_bytes, struct error *err);

// The line, or with --json the object, with which convert and reshard end.
int commands_report_build(const struct build_result *result, const struct plan *plan, const char *out_dir,
                          struct error *err);
// Prints a JSON object to stdout and frees it; ERR_IO when stdout cannot take it.
int commands_print_json(json_t *object, struct error *err);
// A note for people on stderr, unless --quiet.
void commands_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#endif

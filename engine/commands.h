// The commands of tpengine, one file each, and the options that they share. main.c holds the table.
#ifndef TPSHARD_ENGINE_COMMANDS_H
#define TPSHARD_ENGINE_COMMANDS_H

#include "engine/session.h"
#include "formats/error.h"
#include "formats/options.h"
#include "kernels/kv.h"

#include <jansson.h>

#include <stdbool.h>
#include <stdint.h>

// Options of every command; filled by the parser before a command runs.
struct common_options {
    bool json, quiet;
};
extern struct common_options common_options;

// Options of every command that takes a shard directory, which may be a URL.
extern struct place_options {
    const char *cache_dir;
    uint64_t cache_limit_bytes;
} place_options;
#define PLACE_OPTION_LINES                                                                                             \
    {"cache",                                                                                                          \
     OPTION_TEXT,                                                                                                      \
     &place_options.cache_dir,                                                                                         \
     "DIR",                                                                                                            \
     0,                                                                                                                \
     0,                                                                                                                \
     "keep rank files that come from a URL here; those of a directory stay where they are"},                           \
    {                                                                                                                  \
        "cache-limit", OPTION_BYTES, &place_options.cache_limit_bytes, "SIZE", 0, 0,                                   \
            "of all files in --cache; the longest unused go first, never those of the model itself; 0: no limit"       \
    }
// What they say, and TPENGINE_TOKEN of the environment: a command line is no place for a secret. ERR_USAGE for a limit of no cache. A cache of which a
// place that is no URL has no use is noted on standard error; place NULL: the caller says it.
int choose_store(struct store_options *out, const char *place, struct error *err);

// Options of every command that starts ranks.
extern struct session_options session_options;
// The lines of the option table for session_options; each such command's table ends with them.
#define SESSION_OPTION_LINES                                                                                           \
    {"backend",                                                                                                        \
     OPTION_CHOICE,                                                                                                    \
     &session_options.backend,                                                                                         \
     "auto|cpu|cuda|scalar|avx2|avx512|avx512vbmi|avx512bf16|amx",                                                     \
     0,                                                                                                                \
     0,                                                                                                                \
     "where to compute; auto: cuda where there is a driver, else cpu, its fastest kernels"},                           \
        {"cuda-library",                                                                                               \
         OPTION_TEXT,                                                                                                  \
         &session_options.cuda_library,                                                                                \
         "FILE",                                                                                                       \
         0,                                                                                                            \
         0,                                                                                                            \
         "the CUDA backend, if it is not beside tpengine or in ../lib"},                                               \
        {"kv-cache",                                                                                                   \
         OPTION_CHOICE,                                                                                                \
         &session_options.kv_cache,                                                                                    \
         KV_FORMAT_CHOICES,                                                                                            \
         0,                                                                                                            \
         0,                                                                                                            \
         "format of keys and values; int8 and int4 are rotated and scaled by head and token, and not for models with " \
         "latent attention"},                                                                                          \
        {"wire",                                                                                                       \
         OPTION_CHOICE,                                                                                                \
         &session_options.wire,                                                                                        \
         "auto|bf16|f32|fp8|s8x",                                                                                      \
         0,                                                                                                            \
         0,                                                                                                            \
         "codec of the sums over ranks; auto: as the shards advise. fp8 and s8x are of prompts, decoding stays with "  \
         "bf16"},                                                                                                      \
        {"wire-feedback",                                                                                              \
         OPTION_CHOICE,                                                                                                \
         &session_options.wire_feedback,                                                                               \
         "auto|off",                                                                                                   \
         0,                                                                                                            \
         0,                                                                                                            \
         "what fp8 and s8x lose of one sum is made up for by the next; off: it is not. Models with post-norms: off"},  \
        {"transport",                                                                                                  \
         OPTION_CHOICE,                                                                                                \
         &session_options.transport,                                                                                   \
         "auto|shm|tcp|mpi|host|p2p|nccl",                                                                             \
         0,                                                                                                            \
         0,                                                                                                            \
         "how the ranks reach each other; auto: p2p between GPUs whose links work, as seen, else host; shm without "   \
         "GPUs, tcp over hosts"},                                                                                      \
        {"sequence-parallel",                                                                                          \
         OPTION_CHOICE,                                                                                                \
         &session_options.sequence_parallel,                                                                           \
         "auto|on|off",                                                                                                \
         0,                                                                                                            \
         0,                                                                                                            \
         "prompts: each rank adds up and norms some of the rows, and the ranks exchange normed rows; auto: off"},      \
        {"overlap",                                                                                                    \
         OPTION_CHOICE,                                                                                                \
         &session_options.overlap,                                                                                     \
         "auto|on|off",                                                                                                \
         0,                                                                                                            \
         0,                                                                                                            \
         "prompts go through the layers in two halves: while one's sums are on their way, the other computes; auto: "  \
         "over networks, and where it pays between GPUs and two ranks of one host"},                                   \
        {"check-sums",                                                                                                 \
         OPTION_INT,                                                                                                   \
         &session_options.check_sums,                                                                                  \
         "N",                                                                                                          \
         0,                                                                                                            \
         INT32_MAX,                                                                                                    \
         "one step of N has what the GPUs added up over their links added up again by the processors, and compared "   \
         "bit by bit; 0: none"},                                                                                       \
        {"verify",                                                                                                     \
         OPTION_CHOICE,                                                                                                \
         &session_options.verify,                                                                                      \
         "full|sample|off",                                                                                            \
         0,                                                                                                            \
         0,                                                                                                            \
         "how much of the weights is compared with its checksums before the first result; compressed leaves always "   \
         "are"},                                                                                                       \
        {"load",                                                                                                       \
         OPTION_CHOICE,                                                                                                \
         &session_options.load,                                                                                        \
         "auto|map|read|direct|uring",                                                                                 \
         0,                                                                                                            \
         0,                                                                                                            \
         "how weights come from disk; auto: by where the file lies and what works here"},                              \
        {"load-threads",                                                                                               \
         OPTION_INT,                                                                                                   \
         &session_options.load_threads,                                                                                \
         "N",                                                                                                          \
         0,                                                                                                            \
         LOAD_LANES,                                                                                                   \
         "threads of each rank that load; 0: as many as keep the store busy"},                                         \
        PLACE_OPTION_LINES,                                                                                            \
        {"timings",                                                                                                    \
         OPTION_FLAG,                                                                                                  \
         &program_start.timings,                                                                                       \
         NULL,                                                                                                         \
         0,                                                                                                            \
         0,                                                                                                            \
         "at the end, how long each part of the start took: JSON on standard error"},                                  \
        {"ranks", OPTION_CHOICE, &session_options.ranks, "process|thread", 0, 0, "run ranks as processes or threads"}, \
        {"launcher",                                                                                                   \
         OPTION_CHOICE,                                                                                                \
         &session_options.launcher.launcher,                                                                           \
         LAUNCHER_CHOICES,                                                                                             \
         0,                                                                                                            \
         0,                                                                                                            \
         "who has started one process for each rank, as its variables say; none: this process starts all ranks"},      \
        {"rank",                                                                                                       \
         OPTION_INT,                                                                                                   \
         &session_options.launcher.rank,                                                                               \
         "N",                                                                                                          \
         0,                                                                                                            \
         COMM_MAX_RANKS - 1,                                                                                           \
         "this process is rank N of --world-size; rank 0 runs the command, the others end with it"},                   \
        {"world-size",                                                                                                 \
         OPTION_INT,                                                                                                   \
         &session_options.launcher.world_size,                                                                         \
         "N",                                                                                                          \
         1,                                                                                                            \
         COMM_MAX_RANKS,                                                                                               \
         "ranks that were started, each with --rank, maybe on several hosts"},                                         \
        {"local-rank",                                                                                                 \
         OPTION_INT,                                                                                                   \
         &session_options.launcher.local_rank,                                                                         \
         "N",                                                                                                          \
         0,                                                                                                            \
         COMM_MAX_RANKS - 1,                                                                                           \
         "the device of this rank on its host"},                                                                       \
        {"master",                                                                                                     \
         OPTION_TEXT,                                                                                                  \
         &session_options.launcher.master,                                                                             \
         "HOST:PORT",                                                                                                  \
         0,                                                                                                            \
         0,                                                                                                            \
         "where rank 0 listens until all ranks have come; in place of the launcher's address"},                        \
        {"token-file",                                                                                                 \
         OPTION_TEXT,                                                                                                  \
         &session_options.token_file,                                                                                  \
         "FILE",                                                                                                       \
         0,                                                                                                            \
         0,                                                                                                            \
         "its first line is the secret by which ranks on several hosts know each other; else TPENGINE_RANK_TOKEN"},    \
        {"join-timeout",                                                                                               \
         OPTION_NUMBER,                                                                                                \
         &session_options.join_timeout_s,                                                                              \
         "SECONDS",                                                                                                    \
         0.1,                                                                                                          \
         86400,                                                                                                        \
         "how long to wait for the other ranks' processes"},                                                           \
        {"threads",                                                                                                    \
         OPTION_INT,                                                                                                   \
         &session_options.threads,                                                                                     \
         "N",                                                                                                          \
         0,                                                                                                            \
         1024,                                                                                                         \
         "worker threads of each rank; 0: cores / ranks"},                                                             \
        {"pin",                                                                                                        \
         OPTION_CHOICE,                                                                                                \
         &session_options.pin,                                                                                         \
         "none|node|core",                                                                                             \
         0,                                                                                                            \
         0,                                                                                                            \
         "node: a rank's threads and memory stay on a NUMA node; core: each thread on a processor of its own too; "    \
         "none: anywhere; of the CPU backend"},                                                                        \
        {"context",                                                                                                    \
         OPTION_INT,                                                                                                   \
         &session_options.context,                                                                                     \
         "N",                                                                                                          \
         0,                                                                                                            \
         1 << 24,                                                                                                      \
         "longest sequence in tokens; 0: the model's own, at most 4096"},                                              \
    {                                                                                                                  \
        "timeout", OPTION_NUMBER, &session_options.timeout_s, "SECONDS", 0.1, 86400,                                   \
            "longest silence of a rank before all are ended"                                                           \
    }

// How the command was started, for print_timings.
struct program_start {
    int64_t main_ns; // main began; CLOCK_MONOTONIC
    double exec_s;   // CPU time that the process had used until then: for loading the program and its libraries
    bool timings;    // --timings
};
extern struct program_start program_start;
// With --timings: one JSON object on standard error, of the ranks' last start. Before session_close.
int print_timings(struct session *session, struct error *err);

// Runs a command that runs ranks; argv[0] is the place. Where a launcher has started this process for a rank other than 0 it runs that rank instead. A failure
// before the ranks have met is told to the other ranks.
int run_among_ranks(int (*command)(int argc, char **argv, struct error *err), int argc, char **argv, struct error *err);

extern const struct option_spec generate_options[], serve_options[], bench_options[], eval_options[], advise_options[],
    logits_options[], tokenize_options[], capture_options[], doctor_options[];
int generate_run(int argc, char **argv, struct error *err);
int serve_run(int argc, char **argv, struct error *err);
void serve_set_defaults(void); // before the parser runs: they stand in other parts' tables
int bench_run(int argc, char **argv, struct error *err);
int advise_run(int argc, char **argv, struct error *err);
int eval_run(int argc, char **argv, struct error *err);
int logits_run(int argc, char **argv, struct error *err);
int tokenize_run(int argc, char **argv, struct error *err);
int capture_run(int argc, char **argv, struct error *err);
int doctor_run(int argc, char **argv, struct error *err);

// Reads a whole text: a file, or standard input for "-". *out is malloc'ed and NUL-terminated.
int read_text(const char *path, char **out, size_t *bytes, struct error *err);
// "1,2,3" with optional blanks; appends to *out, whose ids the caller frees.
int parse_token_ids(const char *text, struct token_list *out, struct error *err);
// Prints a report and gives it back (decref). NULL, as json_pack returns it, and failed printing are ERR_MEMORY.
int print_report(json_t *report, struct error *err);

#endif

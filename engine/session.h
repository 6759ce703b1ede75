// The parent's end of a running model: opens a shard directory, here or behind a URL, plans memory, starts the ranks and gives them work. Every command of
// tpengine goes through it. It never touches a weight. It belongs to one thread, the one that starts the ranks: they die with it. But session_manifest,
// session_store, session_context and session_tokenizer may meanwhile be another's.
#ifndef TPSHARD_ENGINE_SESSION_H
#define TPSHARD_ENGINE_SESSION_H

#include "engine/launcher_env.h"
#include "engine/scheduler.h"
#include "engine/store.h"
#include "engine/worker.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct session_options {
    const char *backend;           // "auto", "cuda" or a kernel table's name
    const char *cuda_library;      // NULL: libtpengine_cuda.so beside the program or in ../lib
    const char *kv_cache;          // a word of KV_FORMAT_CHOICES
    const char *wire;              // "auto", "bf16", "f32", "fp8", "s8x"
    const char *wire_feedback;     // "auto", "off"
    const char *transport;         // "auto" or a transport's name
    const char *sequence_parallel; // "auto", "on", "off"
    const char *overlap;           // "auto", "on", "off"
    int64_t check_sums;            // worker_options.check_sums
    const char *verify;            // "full", "sample", "off"
    const char *load;              // "auto", "map", "read", "direct", "uring"
    int64_t load_threads;          // of each rank; 0: as many as keep the store busy
    bool load_first;               // the ranks are ready when all weights are in place, not before
    struct store_options store;
    const char *ranks;                // "process", "thread"
    struct launcher_options launcher; // whether ranks are processes that another program starts, and which one this is
    const char *token_file; // of the secret that such ranks share; NULL: TPENGINE_RANK_TOKEN of the environment
    double join_timeout_s;  // for all of them to come
    const char *pin;        // "none", "node", "core"; see numa.h
    int64_t threads;        // worker threads of each rank; 0: cores / ranks
    int64_t context;        // longest sequence; 0: default_context, or the model's own if that is less
    int64_t default_context;
    double timeout_s;     // longest silence of a busy rank
    int64_t kv_tokens;    // room of the KV cache; 0: context for each sequence
    bool kv_fits;         // with kv_tokens 0: no more than there is memory for, but one context at least
    int64_t draft_tokens; // longest draft of a sequence by prompt lookup; 0: none
    // Most rows of a piece of a prompt, where that is less than the backend's own; 0: that. Others wait less while a prompt is computed; where
    // the cuts matter, prefixes are shared at its multiples.
    int64_t prefill_rows;
    int64_t
        residual_rows; // most tokens of a session_forward that shows the residual stream, at least the logits_rows; 0: it does not
    bool recomputes;    // session_generate shares no prefix of earlier or other prompts, for measuring
    bool leave_signals; // SIGINT and SIGTERM are the caller's (see launch.h)
    // What the user has said, where the caller has changed some of it: ranks of other processes compare that. NULL: these options.
    const struct session_options *given;
};
extern const struct session_options session_defaults;

struct session;

// Reads the manifest and plans; no rank runs yet, so that whatever is wrong with options is said before any weight is touched. What is wrong with
// prompts or tokens may be found while the ranks load: session_close then ends them. max_sequences: how many sequences generate may run together. logits_rows: most tokens of one session_forward (0: none).
// Success: caller owns *out.
int session_open(struct session **out, const char *place, const struct session_options *options, int64_t max_sequences,
                 int64_t logits_rows, struct error *err);
// Starts the ranks and waits until they take work; the first work does it as well. Their weights may still be on their way (worker.h says what
// that means for results). ERR_MEMORY with both figures when it cannot fit. Also starts again after session_stop.
int session_start(struct session *session, struct error *err);
// Plans the memory, with room for what `other` (NULL: none) has planned and not yet taken: ERR_MEMORY with both figures. session_launch does it where
// nobody has; whoever launches two settles both before.
int session_settle(struct session *session, const struct session *other, struct error *err);
// Starts the ranks and returns at once. Until somebody waits for them, a signal ends the program.
int session_launch(struct session *session, struct error *err);
// After session_launch, between steps: 0 once, when all ranks are ready; 2 when extra_fd has input; or an error, at once when a rank is lost:
// the ranks are then ended. With extra_fd -1 it returns 0 at once when the ranks are ready and idle.
int session_wait(struct session *session, int extra_fd, struct error *err);
// Ends the ranks, lost ones too; manifest and tokenizer stay, and the ranks can be started again. Everything that pointed into the ranks'
// memory (session_shared, session_step_area) is gone, so a scheduler over it goes first.
void session_stop(struct session *session);
// Where a launcher has started this process for a rank other than 0 (by options->launcher and the environment): *rank is it, and there is nothing to be
// done here but session_run_rank. Else 0.
int session_find_rank(const struct session_options *options, int *rank, struct error *err);
// Such a process: joins rank 0's, runs its one rank as that says, and returns when it has ended: 0 when it was told to. Of a session that has not started.
int session_run_rank(struct session *session, struct error *err);
// Where a launcher has started this process and it cannot come to the other ranks, or has not come to them: they are told why, as far as they are found
// within a few seconds. Once they have met they know.
void session_tell_others(const struct session_options *options, const struct error *why);
// The ranks are processes that a launcher started; they start once.
bool session_is_spread(const struct session *session);
// Ends the ranks. Accepts NULL.
void session_close(struct session *session);

const struct manifest *session_manifest(const struct session *session);
struct store *session_store(struct session *session);
struct shared_area *session_shared(struct session *session); // NULL before the start
int64_t session_context(const struct session *session);
const char *session_backend(const struct session *session); // "cuda", or the name of the host's kernel table
// What devices the ranks run on and how, one line each, and session_threads_note; after the start. Equal lines are said once; the host's CPU needs none.
void session_print_devices(struct session *session, FILE *out);
int session_threads(const struct session *session);              // of each rank
const char *session_threads_note(const struct session *session); // numa_note of the ranks of this machine
const char *session_wire(const struct session *session);
const char *session_transport(const struct session *session); // between the ranks; after the start: as they have agreed
// After the start, how the rows of long prompts travel: "plain", "overlap", "sequence-parallel" or "sequence-parallel+overlap". Overlap: steps as long
// as they get here are cut.
const char *session_prefill_way(const struct session *session);
bool session_feeds_back(const struct session *session); // what a compressing wire loses is made up for

// The directory's compiled tokenizer, read and verified on first use. ERR_MODEL when the directory has none.
int session_tokenizer(struct session *session, const struct tokenizer **out, struct error *err);

// ---- steps, for a scheduler --------------------------------------------------------------------------------------

// After the start: where steps are written and what they may hold. The caller of scheduler_options adds share_prefixes, draft_tokens and
// hash_seed.
const struct step_area *session_step_area(const struct session *session);
void session_scheduler_options(const struct session *session, struct scheduler_options *out);
struct step_runner session_runner(struct session *session);
// Runs the step that stands in the area and waits for its end. Without leave_signals a signal ends the wait: ERR_SIGINT, ERR_SIGTERM.
int session_run_step(struct session *session, struct error *err);

// One rank, at any time between session_launch and session_stop, on the session's thread.
struct rank_report {
    int64_t pid;           // this process where ranks are threads
    const char *operation; // "load", "attention" ...
    int layer;             // -1: none
    int64_t loaded_bytes, file_bytes;
    int64_t rss_bytes;   // 0: not known
    double exchange_s;   // in exchanges with other ranks, waiting included
    double stage_wait_s; // of that, in handing over from stage to stage
    const char *device;  // "" while it starts
    double load_s,
        load_cpu_s; // from the rank's start until all was in place, and its process' CPU time until then; 0: not yet
    struct load_figures load; // the same
    bool lost;                // its failure has ended all of them
};
void session_rank_report(const struct session *session, int rank, struct rank_report *out);
// From the first rank's start until the last one had everything in place; 0: not yet.
double session_load_s(const struct session *session);

// The last start, kept over session_stop. Times are nanoseconds of CLOCK_MONOTONIC, 0: did not happen.
struct start_figures {
    int64_t open_ns;        // session_open was called
    int64_t launch_ns;      // the ranks were started
    int64_t first_token_ns; // the first result was there
    struct rank_start ranks[COMM_MAX_RANKS];
};
const struct start_figures *session_start_figures(struct session *session);

// ---- work without one --------------------------------------------------------------------------------------------

// Runs `count` <= logits_rows tokens at positions start .. of sequence 0 (start 0 forgets what was before) and waits.
// *logits: [count][vocab_size], valid until the next call.
int session_forward(struct session *session, const uint32_t *tokens, int64_t count, int64_t start, const float **logits,
                    struct error *err);

// Of the last session_forward, with residual_rows: the residual stream f32 [num_layers + 1][residual_rows][hidden_size], behind the embedding
// and behind each layer.
const float *session_residual(const struct session *session);
// The same for any sequence below max_sequences, its sums over ranks coded otherwise than the session's: for comparing codecs. Each sequence
// should keep to one.
int session_forward_over(struct session *session, enum wire wire, int32_t sequence, const uint32_t *tokens,
                         int64_t count, int64_t start, const float **logits, struct error *err);

// One sequence of session_generate. on_tokens is called as new tokens come; returning false ends the sequence.
struct generation {
    const uint32_t *prompt;
    int64_t prompt_count, max_tokens;
    bool ignore_eos;
    struct sampling sampling;
    bool (*on_tokens)(void *arg, int64_t sequence, const uint32_t *tokens, int64_t count);
    void *arg;
    // results
    int64_t produced;
    enum finish_reason finished;
    struct sequence_usage usage;
};
// One session_generate: until every sequence had its first token, and from there to the end.
struct generate_figures {
    double begin_s, first_s, end_s;         // CLOCK_MONOTONIC
    int64_t first_tokens, tokens;           // produced by first_s; altogether
    int64_t steps, decode_rows, sent_bytes; // of steps without prefill: rows fed, bytes sent by rank 0 to the others
    int64_t exchanges, exchange_ns; // of the same steps: rank 0's sums over ranks, its time in them, waiting included
};
// Whether all prompts fit the model and the context; also done by session_generate, before the ranks start.
int session_check_prompts(const struct session *session, const struct generation *generations, int64_t count,
                          struct error *err);
// Runs count <= max_sequences sequences together to their ends. figures may be NULL.
int session_generate(struct session *session, struct generation *generations, int64_t count,
                     struct generate_figures *figures, struct error *err);

// A tokenizer of a shard directory without starting any rank (tpengine tokenize). Caller closes with tokenizer_file_close.
struct tokenizer_file {
    struct tokenizer *tokenizer;
    uint8_t *bytes;
};
int tokenizer_file_open(struct tokenizer_file *out, struct store *store, const struct manifest *manifest,
                        struct error *err);
void tokenizer_file_close(struct tokenizer_file *file);

#endif

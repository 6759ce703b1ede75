// The parent's end of a running model: opens a shard directory, plans memory, starts the ranks and gives them work. Every command of
// tpengine (generate, bench, eval, logits) goes through it. It never touches a weight.
#ifndef TPSHARD_ENGINE_SESSION_H
#define TPSHARD_ENGINE_SESSION_H

#include "engine/worker.h"
#include "formats/error.h"
#include "formats/manifest.h"
#include "formats/tokenizer.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct session_options {
    const char *backend;      // "auto", "cuda" or a kernel table's name
    const char *cuda_library; // NULL: libtpengine_cuda.so beside the program or in ../lib
    const char *kv_cache;     // "bf16", "fp8"
    const char *wire;         // "auto", "bf16", "fp8", "s8x"
    const char *verify;       // "full", "sample", "off"
    const char *ranks;        // "process", "thread"
    int64_t threads;          // worker threads of each rank; 0: cores / ranks
    int64_t context;          // longest sequence; 0: default_context, or the model's own if that is less
    int64_t default_context;
    double timeout_s; // longest silence of a busy rank
};
extern const struct session_options session_defaults;

struct session;

// Reads the manifest and plans; no rank runs yet, so that whatever is wrong with options, prompts or tokens is said before any weight is
// touched. max_sequences: how many sequences generate may run together. logits_rows: most tokens of one session_forward (0: none).
// Success: caller owns *out.
int session_open(struct session **out, const char *dir, const struct session_options *options, int64_t max_sequences,
                 int64_t logits_rows, struct error *err);
// Starts the ranks and waits until their weights are ready; the first work does it as well. ERR_MEMORY with both figures when it
// cannot fit.
int session_start(struct session *session, struct error *err);
// Ends the ranks. Accepts NULL.
void session_close(struct session *session);

const struct manifest *session_manifest(const struct session *session);
struct shared_area *session_shared(struct session *session); // NULL before the start
int64_t session_context(const struct session *session);
const char *session_backend(const struct session *session); // "cuda", or the name of the host's kernel table
// What devices the ranks run on and how, one line each; after the start. Equal lines are said once; the host's CPU needs none.
void session_print_devices(struct session *session, FILE *out);
int session_threads(const struct session *session); // of each rank
const char *session_wire(const struct session *session);

// The directory's compiled tokenizer, mapped and verified on first use. ERR_MODEL when the directory has none.
int session_tokenizer(struct session *session, const struct tokenizer **out, struct error *err);

// Runs `count` <= logits_rows tokens at positions start .. of sequence 0 (start 0 forgets what was before) and waits.
// *logits: [count][vocab_size], valid until the next call.
int session_forward(struct session *session, const uint32_t *tokens, int64_t count, int64_t start, const float **logits,
                    struct error *err);

// One sequence of session_generate. on_tokens is called in the parent whenever new tokens are there; returning false ends the sequence.
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
};
// Whether all prompts fit the model and the context; also done by session_generate, before the ranks start.
int session_check_prompts(const struct session *session, const struct generation *generations, int64_t count,
                          struct error *err);
int session_generate(struct session *session, struct generation *generations, int64_t count, struct error *err);

// A tokenizer of a shard directory without starting any rank (tpengine tokenize). Caller closes with tokenizer_file_close.
struct tokenizer_file {
    struct tokenizer *tokenizer;
    uint8_t *bytes;
};
int tokenizer_file_open(struct tokenizer_file *out, const char *dir, const struct manifest *manifest,
                        struct error *err);
void tokenizer_file_close(struct tokenizer_file *file);

#endif

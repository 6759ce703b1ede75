// The OpenAI-compatible API on top of the HTTP server: routes, keys, parameters, requests and their answers.
// Owns: what a request means, its way through worker threads and engine, what clients see. Leaves to others: HTTP (http_server.h), computing
// (engine.h), text of a model taken apart (output_parser.h), the command line.
//
// Order of a server's life:
//     api_create, http_server_create(api_handlers), api_start(server), listen, http_server_run on a thread of its own;
//     api_load (until then /health and its like say "loading"), engine_run;
//     http_server_stop, that thread joined, api_stop, engine_free (the last on_end is made), api_free, http_server_free.
#ifndef TPSHARD_ENGINE_SERVE_API_H
#define TPSHARD_ENGINE_SERVE_API_H

#include "engine/serve/engine.h"
#include "engine/serve/grammar.h"
#include "engine/serve/http_server.h"
#include "engine/serve/metrics.h"
#include "engine/serve/output_parser.h"
#include "formats/chat.h"
#include "formats/model_desc.h"
#include "formats/tokenizer.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { API_KEY_BYTES = 256, API_MAX_CHOICES = MAX_SEQUENCES }; // longest key; most sequences of one request

// The engine as the API sees it: a table, so that tests put another in its place. Any thread calls; submit, cancel, state and read_stats as
// in engine.h. No callback of a sequence is made while a lock is held that cancel needs.
struct api_engine {
    void *arg;
    int (*submit)(void *arg, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                  struct error *err);
    void (*cancel)(void *arg, struct engine_job *job, int64_t index);
    enum engine_state (*state)(void *arg);
    void (*read_stats)(void *arg, struct engine_stats *out);
    // Further members of /v1/stats, such as ranks: a new object, or NULL. May be NULL.
    json_t *(*describe)(void *arg);
    char *(*metrics_text)(void *arg); // malloc'ed; NULL: no /metrics
};

// What is known of the model once it is there. Borrowed until api_free.
struct api_model {
    const struct tokenizer *tokenizer;
    const struct chat *chat;       // NULL: the model has no chat template
    struct output_format format;   // output_format_find of the template's text
    bool knows_developer;          // the template does; else such messages become the system's
    const struct model_desc *desc; // vocabulary, end-of-sequence tokens, sampling defaults
    struct vocabulary *vocabulary; // NULL: no response_format, no forced tool calls
    const uint32_t *eos_ids;       // [num_eos]
    int64_t num_eos;
    const uint32_t *kept; // special tokens that mark tool calls and reasoning [num_kept]: the parser sees them
    int num_kept;
    int64_t context;
};

struct api_options {                // borrowed until api_free; start from api_options_default
    const char *const *model_names; // of /v1/models and of requests; the first is the one shown
    int num_model_names;
    const char *const *keys; // none: no key is asked for
    int num_keys;
    const char *const *cors_origins; // none: no CORS headers; "*": any
    int num_cors_origins;
    const char *version;        // of /version
    int64_t default_max_tokens; // of a chat without one; 0: what the context leaves
    double keep_alive_s;        // silence of a stream before a comment; 0: no comments
    double
        request_timeout_s; // from a request's last byte to its answer's last; above: 504, or an error that ends its stream; 0: no limit
    int worker_threads;     // that parse, render and tokenize
    int64_t max_jobs;       // waiting for them; above: 503
    uint64_t max_job_bytes; // their bodies together
    const char *page;       // HTML of GET /; NULL: none
    size_t page_bytes;
    const char *page_policy; // its Content-Security-Policy
    struct api_engine engine;
    struct metrics *metrics; // NULL: nothing is counted
    bool log_requests;       // a line for each
};
extern const struct api_options api_options_default;

struct api;

// ERR_USAGE for keys that are empty or too long. Success: the caller owns *out.
int api_create(struct api **out, const struct api_options *options, struct error *err);
struct http_handlers api_handlers(struct api *api); // all five; on_answered and on_refused count and log
// Before the server runs: starts the worker threads. server is borrowed until api_free.
int api_start(struct api *api, struct http_server *server, struct error *err);
// Once, from any thread, before the engine is ready: tokenizer, chat template and vocabulary of a shard directory, which the API owns from then
// on, the tokenizer apart.
int api_load(struct api *api, struct session *session, struct error *err);
// The same with what the caller has (tests).
void api_set_model(struct api *api, const struct api_model *model);
// After http_server_run has returned: nothing is submitted after this. Accepts NULL.
void api_stop(struct api *api);
void api_free(struct api *api); // after the last on_end; stops as well; accepts NULL

#endif

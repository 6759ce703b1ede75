// What the files of the API share. Nobody else includes it.
//
// A request lives on three threads, one after the other and partly at once:
//
//     I/O thread      on_request: route, key, limits; the body is taken; the job goes to the pool                      api_routes.c
//     worker thread   JSON, template, tokens, grammar, engine submit; or an answer, or an error                         api_prepare.c, api_text_jobs.c
//     engine thread   on_tokens, on_end: tokens into the sequence's queue                                               api_request.c
//     I/O thread      api_request_advance: text, events, the answer                                                     api_answer.c
//
// Lifetime: struct api_request counts its owners. The exchange is one (from on_request to on_ended), the job another (until run returns), the
// sequences together another, once the engine has accepted them (until the last on_end), every post on its way to the I/O thread another. Whoever is
// last frees it. What is left when the process ends (posts that never ran) api_free frees.
//
// Who may touch what: exchange, stream and choices belong to the I/O thread; params, prompts and specs to the worker until phase says RUNNING, then
// nobody changes them; what is marked "mutex" is shared under request->mutex. Engine cancel is called under that mutex, which also makes sure that
// the job still exists: the last on_end takes it away under the same mutex. Engine submit is called without it.
#ifndef TPSHARD_ENGINE_SERVE_API_INTERNAL_H
#define TPSHARD_ENGINE_SERVE_API_INTERNAL_H

#include "engine/serve/api.h"
#include "engine/serve/api_auth.h"
#include "engine/serve/api_error.h"
#include "engine/serve/api_params.h"
#include "engine/serve/job_pool.h"
#include "kernels/clock.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

struct api_request;

struct api_route {
    const char *path;
    bool prefix;                                                   // and something behind it
    bool post;                                                     // POST; else GET and HEAD
    bool open;                                                     // no key is asked for
    bool health;                                                   // also on a listener for health checks
    bool generates;                                                // the engine must be ready
    void (*answer)(struct api_request *request, const char *rest); // at once, on the I/O thread; rest: of the path. Or
    void (*work)(struct api_request *request);                     // on a worker thread
};

enum { API_ID_BYTES = 129, API_MAX_KEPT = 16, API_RATE_SECONDS = 8 };

struct api {
    struct api_options options;
    struct api_auth *auth;
    char fingerprint[64];
    uint64_t secret; // seeds hashes of salts
    double created_s;
    int64_t created; // Unix time
    struct http_server *server;
    struct job_pool *pool;
    _Atomic(const struct api_model *) model; // NULL until it is there
    struct api_model loaded;
    struct chat *chat; // owned
    struct vocabulary *vocabulary;
    uint32_t kept[API_MAX_KEPT], eos_ids[MODEL_MAX_EOS]; // of loaded
    pthread_mutex_t mutex;                               // of all
    struct api_request *all;
    struct api_text scratch; // I/O thread: what is about to be written

    // The ticker: posts itself to the I/O thread once a second.
    pthread_t ticker;
    bool ticking; // the thread exists
    bool ending;  // ticker_mutex
    pthread_mutex_t ticker_mutex;
    pthread_cond_t ticker_changed;
    struct http_post tick_post;
    atomic_bool tick_posted;
    struct { // I/O thread: tokens per second over the last seconds
        double at_s[API_RATE_SECONDS];
        int64_t produced[API_RATE_SECONDS];
        int next;
    } rate;
};

// ---- generation --------------------------------------------------------------------------------------------------

// A token on its way through a choice whose text may still be taken back.
struct api_pending {
    uint64_t begin, end; // of its text, bytes
    struct step_choice choice;
};

// I/O thread: one choice of the answer.
struct api_choice {
    struct api_sequence *sequence;
    struct text_stream *text;
    struct output_parser *parser;         // NULL: all text is content
    struct tokenizer_stream *token_bytes; // for logprobs
    struct api_text input;                // tokens taken from the queue
    size_t at;                            // of input: used
    int64_t tokens;                       // of the answer, an end-of-sequence token included
    bool role_sent, over;                 // over: the finish reason is known
    const char *finish_reason;
    struct api_pending *pending; // where logprobs are wanted
    size_t num_pending, pending_capacity;
    struct api_text *out; // of the running push
    // A stream: escaped text that waits for its chunk, of which type (-1: none) and tool; and the chunk.
    int delta_type, delta_tool;
    struct api_text delta, chunk;
    // A whole answer: escaped text, and JSON of the calls.
    struct api_text content, reasoning, calls;
    // JSON without brackets; the latter three for completions only.
    struct api_text logprobs, tokens_text, offsets, tops;
};

// One sequence of the engine.
struct api_sequence {
    struct api_request *request;
    int index, group;
    // mutex
    struct api_text queue; // struct step_choice, cut behind their last alternative
    bool cancelled, ended;
    bool out_of_memory; // the queue had no room for tokens
    enum finish_reason reason;
    uint32_t stop_token;
    struct sequence_usage usage;
    // engine thread
    double last_token_s;
    struct grammar_state *grammar;
    struct token_filter filter;
    // I/O thread
    struct api_choice choice;
};

// Sequences that continue one prompt.
struct api_group {
    struct token_list prompt;
    int first, count;
};

// With the worker; with the engine; an answer or error is there.
enum api_phase { PHASE_WORKER, PHASE_RUNNING, PHASE_ANSWERED };

struct api_request {
    struct api *api;
    atomic_int refs;
    struct api_request *next, *previous; // of api->all, under its mutex
    char id[API_ID_BYTES];               // of X-Request-Id
    uint64_t tenant;                     // a key, or an address
    bool salted;                         // a key: what it caches is its own
    const struct api_route *route;
    const struct api_model *model;
    char *body;
    uint64_t body_bytes;
    double received_s;
    struct job job;

    // I/O thread
    struct http_exchange *exchange; // NULL: over
    bool streaming;                 // http_stream_begin was called
    bool writable, finished, failed;
    bool commented; // a stream that gets comments while it is silent
    double last_write_s;
    int status; // of the answer; 0: none yet

    // worker, then constant
    struct api_params params;
    struct grammar *grammar;
    struct api_group *groups;
    int num_groups;
    struct api_sequence *sequences;
    struct sequence_spec *specs;
    int num_sequences;
    int64_t prompt_tokens;
    bool starts_in_reasoning;
    char completion_id[64];
    int64_t created;

    pthread_mutex_t mutex;
    enum api_phase phase;       // mutex
    bool cancelled;             // mutex: nobody waits for the answer
    struct engine_job *running; // mutex: of all sequences, while it may be cancelled
    int num_ended;              // mutex: sequences
    struct api_error error;     // mutex; status 0: none
    struct api_text answer;     // mutex: JSON with status 200
    struct error engine_error;  // mutex
    double first_token_s;       // mutex; 0: none yet

    atomic_bool posted;
    struct http_post post;
};

double api_rate(const struct api *api,
                int64_t produced);          // tokens per second over the last seconds, up to a total of now
void api_random_hex(char *out, int digits); // and a NUL

// api_request.c
struct api_request *api_request_create(struct api *api,
                                       struct http_exchange *exchange); // one owner; NULL without memory
void api_request_free(struct api_request *request);                     // whoever owns it
void api_request_hold(struct api_request *request);
void api_request_drop(struct api_request *request);
void api_request_wake(struct api_request *request); // any thread: api_request_advance will run on the I/O thread
// Any thread: nobody waits any more. All its sequences end within a step.
void api_request_cancel(struct api_request *request);
void api_request_cancel_one(struct api_request *request, struct api_sequence *sequence);
bool api_request_cancelled(struct api_request *request);
// Worker: the end of its work.
void api_request_answer(struct api_request *request, struct api_text *json); // takes the text
void api_request_fail(struct api_request *request, const struct api_error *error);
// Worker: hands all sequences to the engine.
int api_request_submit(struct api_request *request, struct api_error *error);

// api_answer.c, I/O thread
void api_request_advance(struct api_request *request);
void api_request_comment(struct api_request *request, double now); // if its stream has been silent for too long
void api_request_expire(struct api_request *request, double now);  // if it takes too long
void api_request_summary(struct api_request *request, bool complete, struct request_record *record);

// api_choice.c, I/O thread
void api_choice_free(struct api_choice *choice); // what it has counted stays; may be called again
// Of a whole answer, so far.
size_t api_choice_bytes(const struct api_choice *choice);
size_t
api_choice_held_bytes(const struct api_choice *choice); // memory of the same, and of what comes before and behind it
// The next token of a choice; or the end of its tokens. What it adds to the answer goes to choice; a stream's chunks are appended to out.
int api_choice_push(struct api_choice *choice, const struct step_choice *token, struct api_text *out,
                    struct error *err);
int api_choice_finish(struct api_choice *choice, const char *reason, struct api_text *out, struct error *err);
// The stop token, where it is part of the text.
int api_choice_stop_token(struct api_choice *choice, const struct step_choice *token, struct api_text *out,
                          struct error *err);
void api_choice_write_logprobs(struct api_choice *choice, struct api_text *out); // what waits: the value of "logprobs"
output_delta_fn api_choice_delta;                                                // for the parser; arg: the choice
void api_choice_flush(struct api_choice *choice, struct api_text *out);          // text that waits for its chunk
void api_chunk_begin(const struct api_request *request,
                     struct api_text *out); // data: {"id": ... up to, not with, "choices"
void api_write_usage(const struct api_request *request, int64_t completion_tokens, int64_t cached_tokens,
                     struct api_text *out); // "usage":{...}

// api_routes.c, I/O thread
void api_route_request(struct api_request *request);
void api_respond(struct api_request *request, int status, const char *type, const void *body, size_t bytes);
void api_respond_json(struct api_request *request, int status, const char *json, size_t bytes);
void api_respond_error(struct api_request *request, const struct api_error *error);
void api_add_headers(struct api_request *request); // X-Request-Id and CORS

// Workers' routes: api_prepare.c, api_text_jobs.c
void api_chat_completions(struct api_request *request);
void api_completions(struct api_request *request);
void api_invocations(struct api_request *request);
void api_tokenize(struct api_request *request);
void api_detokenize(struct api_request *request);
void api_apply_template(struct api_request *request);
// Of a chat: its tokens, appended. *in_reasoning: the prompt ends inside of <think>.
int api_encode_chat(const struct api_model *model, const struct api_params *params, struct token_list *out,
                    bool *in_reasoning, struct api_error *error);
int api_render_chat(const struct api_model *model, const struct api_params *params, struct template_output *out,
                    struct api_error *error);
// What response_format and tool_choice ask of the tokens: request->grammar, or NULL.
int api_constrain(struct api_request *request, struct api_error *error); // api_constrain.c

// api_info.c, I/O thread: routes that are answered at once
void api_info_models(struct api_request *request, const char *rest);
void api_info_model(struct api_request *request, const char *name);
void api_info_health(struct api_request *request, const char *rest);
void api_info_ping(struct api_request *request, const char *rest);
void api_info_version(struct api_request *request, const char *rest);
void api_info_metrics(struct api_request *request, const char *rest);
void api_info_props(struct api_request *request, const char *rest);
void api_info_stats(struct api_request *request, const char *rest);
void api_info_page(struct api_request *request, const char *rest);
const char *api_state_word(enum engine_state state); // of /health: "ok", "loading" ...

#endif

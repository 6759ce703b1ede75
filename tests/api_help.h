// What the tests of the API share: an API on a real server, with an engine in which a thread plays back given tokens.
// Include behind cmocka.h.
#ifndef TPSHARD_TESTS_API_HELP_H
#define TPSHARD_TESTS_API_HELP_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "engine/serve/api_internal.h"
#include "formats/checksum.h"
#include "tests/client_help.h"
#include "tests/tokenizer_help.h"

#define CHAT "/v1/chat/completions"
#define HELLO "\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]"

// ---- an engine that plays back -----------------------------------------------------------------------------------

struct engine_job {
    struct fake_sequence {
        struct sequence_spec spec;
        int64_t at; // tokens given so far
        bool cancelled, ended;
    } sequences[API_MAX_CHOICES];
    int64_t count, live;
    struct engine_job *next;
};

// Every sequence gets tokens [count] and then its end. All members are read under the mutex.
struct fake_engine {
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct engine_job *jobs;
    bool stopping;
    enum engine_state state;
    const uint32_t *tokens;
    int64_t count;
    int64_t batch;             // most tokens of a callback
    uint64_t random;           // of batches
    int64_t hold_after;        // stand still after so many tokens; -1: never
    int64_t error_after;       // FINISH_ERROR after so many tokens; -1: never
    int64_t pause_us;          // between rounds
    int submit_error;          // of every submit
    bool hold_submit;          // submit waits
    int64_t pages;             // of the KV cache, in stats
    struct sequence_spec seen; // the first spec of the last submit; prompt copied
    int64_t seen_count;        // its sequences
    uint32_t seen_prompt[4096];
    int64_t submitted, ended, cancelled; // sequences
};

static inline void fake_wait(struct fake_engine *fake, long microseconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 1000 * microseconds;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&fake->changed, &fake->mutex, &until);
}

static inline uint64_t fake_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

// Logprobs that tokens can be told by.
static inline void fake_choice(const struct fake_sequence *sequence, uint32_t token, struct step_choice *choice)
{
    *choice = (struct step_choice){.token = token, .logprob = -(float)(token % 97) / 8};
    choice->num_top = sequence->spec.num_logprobs > 0 ? sequence->spec.num_logprobs : 0;
    for (int32_t i = 0; i < choice->num_top; i++) {
        choice->top[i].token = token + (uint32_t)i;
        choice->top[i].logprob = choice->logprob - (float)i;
    }
}

// One round of one sequence; the mutex is released during callbacks. True when it ended.
static inline bool fake_round(struct fake_engine *fake, struct fake_sequence *sequence)
{
    enum { MOST = 64 };
    struct step_choice choices[MOST];
    struct sequence_usage usage = {.prompt_tokens = sequence->spec.prompt_count,
                                   .cached_tokens = sequence->spec.prompt_count / 2,
                                   .queued_s = 0.5,
                                   .prefill_s = 0.25,
                                   .decode_s = 2};
    struct error lost;
    int64_t limit = sequence->spec.max_tokens < fake->count ? sequence->spec.max_tokens : fake->count, n = 0;
    enum finish_reason reason = FINISH_NONE;
    if (sequence->cancelled)
        reason = FINISH_CANCELLED;
    else if (fake->error_after >= 0 && sequence->at >= fake->error_after)
        reason = FINISH_ERROR;
    else if (sequence->at == limit)
        reason = limit == sequence->spec.max_tokens ? FINISH_LENGTH : FINISH_EOS;
    else if (fake->hold_after < 0 || sequence->at < fake->hold_after) {
        n = 1 + (int64_t)(fake_random(&fake->random) % (uint64_t)(fake->batch < MOST ? fake->batch : MOST));
        int64_t end = fake->hold_after >= 0 && fake->hold_after < limit ? fake->hold_after : limit;
        if (fake->error_after >= 0 && fake->error_after < end)
            end = fake->error_after;
        n = n < end - sequence->at ? n : end - sequence->at;
    }
    for (int64_t i = 0; i < n; i++)
        fake_choice(sequence, fake->tokens[sequence->at + i], &choices[i]);
    sequence->at += n;
    usage.produced_tokens = sequence->at;
    fake->cancelled += reason == FINISH_CANCELLED;
    uint32_t stop = sequence->spec.num_eos ? sequence->spec.eos_ids[0] : 0;
    pthread_mutex_unlock(&fake->mutex);
    bool wanted = !n || sequence->spec.on_tokens(sequence->spec.arg, choices, n);
    error_set(&lost, ERR_RANK, "rank 1 was lost");
    if (reason)
        sequence->spec.on_end(sequence->spec.arg, reason, &usage, stop, reason == FINISH_ERROR ? &lost : NULL);
    pthread_mutex_lock(&fake->mutex);
    sequence->cancelled |= !wanted;
    return reason != FINISH_NONE;
}

static inline void *fake_run(void *arg)
{
    struct fake_engine *fake = arg;
    pthread_mutex_lock(&fake->mutex);
    while (!fake->stopping || fake->jobs) {
        for (struct engine_job **at = &fake->jobs, *job; (job = *at);) {
            for (int64_t i = 0; i < job->count; i++) {
                job->sequences[i].cancelled |= fake->stopping;
                if (!job->sequences[i].ended && fake_round(fake, &job->sequences[i])) {
                    job->sequences[i].ended = true;
                    job->live--;
                    fake->ended++;
                }
            }
            at = &fake->jobs; // it may have grown at the front
            while (*at != job)
                at = &(*at)->next;
            if (job->live == 0) {
                *at = job->next;
                free(job);
            } else
                at = &job->next;
        }
        fake_wait(fake, fake->pause_us);
    }
    pthread_mutex_unlock(&fake->mutex);
    return NULL;
}

static inline int fake_submit(void *arg, const struct sequence_spec *specs, int64_t count, struct engine_job **out,
                              struct error *err)
{
    struct fake_engine *fake = arg;
    pthread_mutex_lock(&fake->mutex);
    while (fake->hold_submit)
        fake_wait(fake, 1000);
    if (fake->submit_error) {
        int code = fake->submit_error;
        pthread_mutex_unlock(&fake->mutex);
        return error_set(err, code, "the fake engine takes nothing");
    }
    struct engine_job *job = calloc(1, sizeof *job);
    for (int64_t i = 0; i < count; i++)
        job->sequences[i].spec = specs[i];
    fake->seen = specs[0];
    fake->seen_count = count;
    memcpy(fake->seen_prompt, specs[0].prompt,
           (size_t)(specs[0].prompt_count < 4096 ? specs[0].prompt_count : 4096) * sizeof(uint32_t));
    job->count = job->live = count;
    job->next = fake->jobs;
    fake->jobs = job;
    fake->submitted += count;
    *out = job;
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
    return 0;
}

static inline void fake_cancel(void *arg, struct engine_job *job, int64_t index)
{
    struct fake_engine *fake = arg;
    pthread_mutex_lock(&fake->mutex);
    for (int64_t i = 0; i < job->count; i++)
        if (index < 0 || index == i)
            job->sequences[i].cancelled = true;
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
}

static inline enum engine_state fake_state(void *arg)
{
    struct fake_engine *fake = arg;
    pthread_mutex_lock(&fake->mutex);
    enum engine_state state = fake->state;
    pthread_mutex_unlock(&fake->mutex);
    return state;
}

static inline void fake_stats(void *arg, struct engine_stats *out)
{
    struct fake_engine *fake = arg;
    *out = (struct engine_stats){.retry_after_s = 3, .num_ranks = 1};
    pthread_mutex_lock(&fake->mutex);
    out->scheduler.running = fake->submitted - fake->ended;
    out->scheduler.pages = fake->pages;
    pthread_mutex_unlock(&fake->mutex);
}

static inline char *fake_metrics(void *arg)
{
    (void)arg;
    return strdup("a_metric 1\n");
}

// ---- a server ----------------------------------------------------------------------------------------------------

#define TEST_TEMPLATE                                                                                                  \
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"                         \
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

struct test_server {
    struct fake_engine fake;
    struct opened tokenizer;
    struct token_list script; // what the engine plays
    struct chat *chat;
    struct model_desc desc;
    struct api_model model;
    struct api_options options;
    struct http_limits limits;
    struct api *api;
    struct http_server *http;
    pthread_t thread;
    int port, health_port;
};

static inline struct chat *open_test_chat(const char *text)
{
    const struct chat_files files = {.place = "test", .usual = {text, strlen(text)}};
    struct chat *chat = NULL;
    struct error err = {0};
    if (chat_open(&chat, &files, &err))
        fail_msg("%s", err.msg);
    return chat;
}

static const uint32_t test_eos[] = {3};
static const char *const test_names[] = {"test-model", "alias"};

// The tokenizer, the template and the options that a test may change before test_server_start.
static inline void test_server_init(struct test_server *server)
{
    struct fake_engine *fake = &server->fake;
    memset(server, 0, sizeof *server);
    pthread_mutex_init(&fake->mutex, NULL);
    pthread_cond_init(&fake->changed, NULL);
    fake->state = ENGINE_READY;
    fake->batch = 4;
    fake->random = 88172645463325252u;
    fake->hold_after = fake->error_after = -1;
    fake->pause_us = 200;
    server->tokenizer = open_family("qwen");
    server->chat = open_test_chat(TEST_TEMPLATE);
    server->desc = (struct model_desc){.vocab_size = tokenizer_vocab_size(server->tokenizer.tok),
                                       .default_temperature = 0.5,
                                       .default_top_p = 1,
                                       .default_repetition_penalty = 1,
                                       .default_top_k = -1};
    server->model = (struct api_model){.tokenizer = server->tokenizer.tok,
                                       .chat = server->chat,
                                       .desc = &server->desc,
                                       .eos_ids = test_eos,
                                       .num_eos = 1,
                                       .context = 1 << 20};
    server->limits = http_limits_default;
    server->options = api_options_default;
    server->options.model_names = test_names;
    server->options.num_model_names = 2;
    server->options.version = "1.2.3";
    server->options.log_requests = false;
    server->options.engine = (struct api_engine){.arg = fake,
                                                 .submit = fake_submit,
                                                 .cancel = fake_cancel,
                                                 .state = fake_state,
                                                 .read_stats = fake_stats,
                                                 .metrics_text = fake_metrics};
}

static inline void *test_server_run(void *arg)
{
    struct error err = {0};
    if (http_server_run(((struct test_server *)arg)->http, &err))
        print_error("%s\n", err.msg);
    return NULL;
}

static inline void test_server_start(struct test_server *server)
{
    struct error err = {0};
    struct http_handlers handlers;
    if (api_create(&server->api, &server->options, &err))
        fail_msg("%s", err.msg);
    handlers = api_handlers(server->api);
    if (http_server_create(&server->http, &server->limits, &handlers, &err) ||
        http_server_listen(server->http, "127.0.0.1", 0, false, &server->port, &err) ||
        http_server_listen(server->http, "127.0.0.1", 0, true, &server->health_port, &err) ||
        api_start(server->api, server->http, &err))
        fail_msg("%s", err.msg);
    if (server->model.tokenizer)
        api_set_model(server->api, &server->model);
    assert_int_equal(pthread_create(&server->fake.thread, NULL, fake_run, &server->fake), 0);
    assert_int_equal(pthread_create(&server->thread, NULL, test_server_run, server), 0);
}

static inline void test_server_stop(struct test_server *server)
{
    http_server_stop(server->http);
    pthread_join(server->thread, NULL);
    api_stop(server->api);
    pthread_mutex_lock(&server->fake.mutex);
    server->fake.stopping = true;
    pthread_cond_broadcast(&server->fake.changed);
    pthread_mutex_unlock(&server->fake.mutex);
    pthread_join(server->fake.thread, NULL);
    http_server_free(server->http);
    api_free(server->api);
    chat_close(server->chat);
    close_opened(&server->tokenizer);
    free(server->script.ids);
    pthread_cond_destroy(&server->fake.changed);
    pthread_mutex_destroy(&server->fake.mutex);
}

// Changes the engine between or during requests.
#define FAKE_SET(server, member, value)                                                                                \
    do {                                                                                                               \
        pthread_mutex_lock(&(server)->fake.mutex);                                                                     \
        (server)->fake.member = (value);                                                                               \
        pthread_cond_broadcast(&(server)->fake.changed);                                                               \
        pthread_mutex_unlock(&(server)->fake.mutex);                                                                   \
    } while (0)

// The engine plays this text.
static inline void play(struct test_server *server, const char *text)
{
    free(server->script.ids);
    server->script = encode(server->tokenizer.tok, text, strlen(text), 0);
    FAKE_SET(server, tokens, server->script.ids);
    FAKE_SET(server, count, (int64_t)server->script.count);
}

static inline int64_t fake_live(struct test_server *server)
{
    pthread_mutex_lock(&server->fake.mutex);
    int64_t live = server->fake.submitted - server->fake.ended;
    pthread_mutex_unlock(&server->fake.mutex);
    return live;
}

// Waits until nothing of any request is left in the API and the engine.
static inline void wait_for_quiet(struct test_server *server)
{
    for (int i = 0; i < 5000; i++) {
        pthread_mutex_lock(&server->api->mutex);
        bool quiet = server->api->all == NULL;
        pthread_mutex_unlock(&server->api->mutex);
        if (quiet && fake_live(server) == 0)
            return;
        usleep(1000);
    }
    fail_msg("requests are left: %lld sequences", (long long)fake_live(server));
}

static inline struct answer post(const struct test_server *server, const char *path, const char *body)
{
    return call(server->port, "POST", path, "Content-Type: application/json\r\n", body);
}

// Around a test: a server that answers.
static inline int setup(void **state)
{
    struct test_server *server = malloc(sizeof *server);
    test_server_init(server);
    test_server_start(server);
    play(server, "The answer is 42.");
    *state = server;
    return 0;
}

static inline int teardown(void **state)
{
    struct test_server *server = *state;
    wait_for_quiet(server);
    test_server_stop(server);
    free(server);
    return 0;
}

#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

#endif

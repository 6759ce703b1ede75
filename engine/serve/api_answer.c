// The answer of a request, as far as it is known: events of a stream, or the whole at the end. I/O thread. See api_internal.h.
#include "engine/serve/api_internal.h"

#include <string.h>

enum { TOKENS_AT_ONCE = 2048 }; // of one request, before others have their turn

// Sums over all sequences; times of the longest.
static void sum_usage(struct api_request *request, struct sequence_usage *sum)
{
    *sum = (struct sequence_usage){.prompt_tokens = request->prompt_tokens};
    for (int i = 0; i < request->num_sequences; i++) {
        const struct sequence_usage *usage = &request->sequences[i].usage;
        if (request->sequences[i].index == request->groups[request->sequences[i].group].first)
            sum->cached_tokens += usage->cached_tokens; // the others of a group share what the first has computed
        sum->produced_tokens += request->sequences[i].choice.tokens;
        sum->preemptions += usage->preemptions;
        sum->drafted_tokens += usage->drafted_tokens;
        sum->accepted_tokens += usage->accepted_tokens;
        sum->queued_s = usage->queued_s > sum->queued_s ? usage->queued_s : sum->queued_s;
        sum->prefill_s = usage->prefill_s > sum->prefill_s ? usage->prefill_s : sum->prefill_s;
        sum->decode_s = usage->decode_s > sum->decode_s ? usage->decode_s : sum->decode_s;
    }
}

void api_write_usage(const struct api_request *request, int64_t completion_tokens, int64_t cached_tokens,
                     struct api_text *out)
{
    api_text_printf(out,
                    "\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
                    "\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
                    (long long)request->prompt_tokens, (long long)completion_tokens,
                    (long long)(request->prompt_tokens + completion_tokens), (long long)cached_tokens);
}

static double rate(int64_t tokens, double seconds) { return seconds > 0 ? (double)tokens / seconds : 0; }

static void write_timings(const struct sequence_usage *usage, struct api_text *out)
{
    int64_t prompt = usage->prompt_tokens - usage->cached_tokens;
    api_text_printf(out,
                    "\"timings\":{\"queue_ms\":%.3f,\"cache_n\":%lld,\"prompt_n\":%lld,\"prompt_ms\":%.3f,"
                    "\"prompt_per_second\":%.3f,\"predicted_n\":%lld,\"predicted_ms\":%.3f,"
                    "\"predicted_per_second\":%.3f,\"draft_n\":%lld,\"draft_n_accepted\":%lld}",
                    1e3 * usage->queued_s, (long long)usage->cached_tokens, (long long)prompt, 1e3 * usage->prefill_s,
                    rate(prompt, usage->prefill_s), (long long)usage->produced_tokens, 1e3 * usage->decode_s,
                    rate(usage->produced_tokens, usage->decode_s), (long long)usage->drafted_tokens,
                    (long long)usage->accepted_tokens);
}

// ---- a whole answer ----------------------------------------------------------------------------------------------

static void append_text(struct api_text *out, const struct api_text *text)
{
    if (text->bytes)
        api_text_append(out, text->data, text->bytes);
    out->failed |= text->failed;
}

static void write_message(const struct api_choice *choice, struct api_text *out)
{
    api_text_puts(out, "\"message\":{\"role\":\"assistant\",\"content\":");
    if (choice->calls.bytes && !choice->content.bytes)
        api_text_puts(out, "null");
    else {
        api_text_puts(out, "\"");
        append_text(out, &choice->content);
        api_text_puts(out, "\"");
    }
    if (choice->reasoning.bytes) {
        api_text_puts(out, ",\"reasoning_content\":\"");
        append_text(out, &choice->reasoning);
        api_text_puts(out, "\"");
    }
    if (choice->calls.bytes) {
        api_text_puts(out, ",\"tool_calls\":[");
        append_text(out, &choice->calls);
        api_text_puts(out, "]");
    }
    api_text_puts(out, "}");
}

static void write_choice(struct api_choice *choice, int index, bool chat, struct api_text *out)
{
    api_text_printf(out, "%s{\"index\":%d,", index ? "," : "", index);
    if (chat)
        write_message(choice, out);
    else {
        api_text_puts(out, "\"text\":\"");
        append_text(out, &choice->content);
        api_text_puts(out, "\"");
    }
    api_text_puts(out, ",\"logprobs\":");
    api_choice_write_logprobs(choice, out);
    api_text_printf(out, ",\"finish_reason\":\"%s\"}", choice->finish_reason);
}

static void answer_whole(struct api_request *request, const struct sequence_usage *usage)
{
    struct api_text *out = &request->api->scratch;
    struct api_error error = {0};
    const struct api_params *params = &request->params;
    api_text_clear(out);
    api_text_printf(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", request->completion_id,
                    params->chat ? "chat.completion" : "text_completion", (long long)request->created);
    api_text_string(out, params->model_name, strlen(params->model_name));
    api_text_puts(out, ",\"system_fingerprint\":");
    api_text_string(out, request->api->fingerprint, strlen(request->api->fingerprint));
    api_text_puts(out, ",\"choices\":[");
    for (int i = 0; i < request->num_sequences; i++)
        write_choice(&request->sequences[i].choice, i, params->chat, out);
    api_text_puts(out, "],");
    api_write_usage(request, usage->produced_tokens, usage->cached_tokens, out);
    api_text_puts(out, ",");
    write_timings(usage, out);
    api_text_puts(out, "}");
    http_exchange_hold(request->exchange, 0); // the answer itself counts from here on
    if (out->failed) {
        api_error_memory(&error);
        api_respond_error(request, &error);
    } else
        api_respond_json(request, 200, out->data, out->bytes);
    api_text_clear(out);
    for (int i = 0; i < request->num_sequences; i++) // the client may take long to read its copy
        api_choice_free(&request->sequences[i].choice);
}

// ---- a stream ----------------------------------------------------------------------------------------------------

static void write_stream(struct api_request *request, const void *data, size_t bytes)
{
    if (!request->streaming) {
        request->streaming = true;
        request->status = 200;
        api_add_headers(request);
        http_add_header(request->exchange, "Cache-Control", "no-cache");
        http_add_header(request->exchange, "X-Accel-Buffering", "no");
        http_stream_begin(request->exchange, 200, "text/event-stream; charset=utf-8");
    }
    request->last_write_s = clock_now_s();
    if (request->exchange && bytes)
        request->writable = http_stream_write(request->exchange, data, bytes);
}

void api_request_comment(struct api_request *request, double now)
{
    static const char comment[] = ": keep-alive\n\n";
    double silence_s = request->api->options.keep_alive_s;
    if (silence_s > 0 && request->commented && request->exchange && !request->finished && request->writable &&
        now - request->last_write_s >= silence_s)
        write_stream(request, comment, sizeof comment - 1);
}

static void end_stream(struct api_request *request)
{
    request->finished = true;
    if (request->exchange)
        http_stream_end(request->exchange);
}

static void finish_stream(struct api_request *request, const struct sequence_usage *usage)
{
    struct api_text *out = &request->api->scratch;
    api_text_clear(out);
    if (request->params.include_usage) {
        api_chunk_begin(request, out);
        api_text_puts(out, ",\"choices\":[],");
        api_write_usage(request, usage->produced_tokens, usage->cached_tokens, out);
        api_text_puts(out, ",");
        write_timings(usage, out);
        api_text_puts(out, "}\n\n");
    }
    api_text_puts(out, "data: [DONE]\n\n");
    if (!out->failed)
        write_stream(request, out->data, out->bytes);
    end_stream(request);
}

// ---- progress ----------------------------------------------------------------------------------------------------

static void fail(struct api_request *request, const struct api_error *error)
{
    struct api_text event = {0};
    api_request_cancel(request);
    request->failed = true;
    if (!request->streaming) {
        request->finished = true;
        api_respond_error(request, error);
        return;
    }
    api_text_puts(&event, "data: ");
    api_error_write(&event, error);
    api_text_puts(&event, "\n\n");
    if (!event.failed)
        write_stream(request, event.data, event.bytes);
    api_text_free(&event);
    end_stream(request);
}

static void fail_with(struct api_request *request, const struct error *err)
{
    struct api_error error = {0};
    if (err->code == ERR_USAGE) // found too late to be the client's fault
        api_error_set(&error, 500, NULL, NULL, "%s", err->msg);
    else
        api_error_from(&error, err, NULL);
    fail(request, &error);
}

void api_request_expire(struct api_request *request, double now)
{
    double limit_s = request->api->options.request_timeout_s;
    struct api_error error = {0};
    if (limit_s <= 0 || !request->exchange || request->finished || now - request->received_s < limit_s)
        return;
    api_error_set(&error, 504, "request_timeout", NULL,
                  "the answer was not complete within %g s, the limit of this server (--request-timeout)", limit_s);
    // Else clients ask for the same again at once.
    if (!request->streaming)
        http_add_header(request->exchange, "X-Should-Retry", "false");
    fail(request, &error);
}

// Memory that the answer takes before it is the connection's. Tells the server of it; false: others need the room.
static bool hold(struct api_request *request)
{
    uint64_t bytes = 0;
    pthread_mutex_lock(&request->mutex);
    for (int i = 0; i < request->num_sequences; i++)
        bytes += request->sequences[i].queue.capacity;
    pthread_mutex_unlock(&request->mutex);
    for (int i = 0; i < request->num_sequences; i++)
        bytes += api_choice_held_bytes(&request->sequences[i].choice);
    return http_exchange_hold(request->exchange, bytes);
}

static void fail_for_room(struct api_request *request)
{
    struct api_error error = {0};
    api_error_set(&error, 503, "overloaded", NULL, "%s", HTTP_NO_ROOM);
    error.retry_after_s = 1;
    fail(request, &error);
}

// What a sequence looks like from here: its new tokens are in choice.input.
struct progress {
    bool ended;
    enum finish_reason reason;
    uint32_t stop_token;
    struct error error; // with another reason than a stop or the length
};

// Why a sequence ended early, though nobody asked for it. Under the mutex.
static void find_reason(const struct api_sequence *sequence, struct error *err)
{
    const struct error *engine = &sequence->request->engine_error;
    if (sequence->out_of_memory)
        error_set(err, ERR_MEMORY, "no memory for the output");
    else if (engine->code)
        *err = *engine;
    else
        error_set(err, ERR_RANK, "the server is stopping; the answer was cut short");
}

static struct progress take_tokens(struct api_request *request, struct api_sequence *sequence)
{
    struct api_choice *choice = &sequence->choice;
    pthread_mutex_lock(&request->mutex);
    struct progress progress = {sequence->ended, sequence->reason, sequence->stop_token, {.code = 0}};
    if (sequence->ended && sequence->reason != FINISH_EOS && sequence->reason != FINISH_LENGTH)
        find_reason(sequence, &progress.error);
    if (choice->at == choice->input.bytes) {
        struct api_text empty = choice->input;
        api_text_clear(&empty);
        choice->input = sequence->queue;
        choice->at = 0;
        sequence->queue = empty;
    } else if (!choice->over)
        progress.ended = progress.ended && sequence->queue.bytes == 0;
    pthread_mutex_unlock(&request->mutex);
    return progress;
}

static bool next_token(struct api_choice *choice, struct step_choice *token)
{
    const size_t head = offsetof(struct step_choice, top);
    if (choice->at == choice->input.bytes)
        return false;
    memcpy(token, choice->input.data + choice->at, head);
    memcpy(token->top, choice->input.data + choice->at + head, (size_t)token->num_top * sizeof token->top[0]);
    choice->at += head + (size_t)token->num_top * sizeof token->top[0];
    return true;
}

// The sequence has ended and all its tokens are used.
static int end_choice(struct api_choice *choice, const struct progress *progress, struct api_text *out,
                      struct error *err)
{
    struct step_choice stop = {.token = progress->stop_token};
    if (progress->reason == FINISH_LENGTH)
        return api_choice_finish(choice, "length", out, err);
    if (progress->reason != FINISH_EOS) {
        *err = progress->error;
        return err->code;
    }
    if (choice->sequence->request->params.rules.include_stop) {
        int rc = api_choice_stop_token(choice, &stop, out, err);
        if (rc)
            return rc;
    } else
        choice->tokens++;
    return api_choice_finish(choice, "stop", out, err);
}

// Uses what the sequence has produced. *budget falls by the tokens used.
static int advance_choice(struct api_request *request, struct api_sequence *sequence, int *budget, bool *ended,
                          struct api_text *out, struct error *err)
{
    struct api_choice *choice = &sequence->choice;
    struct step_choice token;
    struct progress progress;
    bool more;
    int rc = 0;
    do { // until a look into the queue brings nothing: what was left over from last time hides what came since
        progress = take_tokens(request, sequence);
        more = choice->at < choice->input.bytes;
        while (!choice->over && *budget > 0 && next_token(choice, &token)) {
            --*budget;
            if ((rc = api_choice_push(choice, &token, out, err)))
                return rc;
            if (text_stream_stopped(choice->text)) {
                api_request_cancel_one(request, sequence);
                rc = api_choice_finish(choice, "stop", out, err);
            }
        }
    } while (more && !rc && !choice->over && *budget > 0);
    *ended = progress.ended && (choice->over || choice->at == choice->input.bytes);
    if (!rc && *ended && !choice->over)
        rc = end_choice(choice, &progress, out, err);
    if (!choice->over && request->params.stream) // before an error too
        api_choice_flush(choice, out);
    return rc;
}

// All choices, also behind one that fails: what they have comes before the error. The first error is *err.
static bool advance_choices(struct api_request *request, int *budget, struct api_text *out, struct error *err)
{
    bool all_ended = true;
    for (int i = 0; i < request->num_sequences; i++) {
        struct error now = {0};
        bool ended = false;
        if (advance_choice(request, &request->sequences[i], budget, &ended, out, &now) && !err->code)
            *err = now;
        all_ended = all_ended && ended;
    }
    return all_ended;
}

static bool is_too_large(const struct api_request *request)
{
    size_t bytes = 0;
    for (int i = 0; i < request->num_sequences; i++)
        bytes += api_choice_bytes(&request->sequences[i].choice);
    return bytes > API_ANSWER_BYTES;
}

static void advance_running(struct api_request *request)
{
    struct api_text *out = &request->api->scratch;
    struct sequence_usage usage;
    struct error err = {0};
    struct api_error large = {0};
    int budget = TOKENS_AT_ONCE;
    api_text_clear(out);
    bool all_ended = advance_choices(request, &budget, out, &err);
    if (out->failed)
        error_set(&err, ERR_MEMORY, "no memory for the answer");
    else if (out->bytes)
        write_stream(request, out->data, out->bytes);
    if (!request->exchange)
        return;
    if (err.code) {
        fail_with(request, &err);
        return;
    }
    if (!request->params.stream && is_too_large(request)) {
        api_error_large(&large, "ask for a stream, for less tokens or for less logprobs");
        fail(request, &large);
        return;
    }
    if (!all_ended) {
        if (budget == 0 && request->writable)
            api_request_wake(request);
        return;
    }
    sum_usage(request, &usage);
    request->finished = true;
    if (request->params.stream)
        finish_stream(request, &usage);
    else
        answer_whole(request, &usage);
}

void api_request_advance(struct api_request *request)
{
    if (!request->exchange || request->finished)
        return;
    pthread_mutex_lock(&request->mutex);
    enum api_phase phase = request->phase;
    pthread_mutex_unlock(&request->mutex);
    if (phase == PHASE_ANSWERED) {
        request->finished = true;
        if (request->error.status)
            api_respond_error(request, &request->error);
        else
            api_respond_json(request, 200, request->answer.data, request->answer.bytes);
        api_text_free(&request->answer); // the client may take long to read its copy
    } else if (phase == PHASE_RUNNING) {
        request->commented = request->params.stream;
        if (!hold(request)) { // looked at also while the client takes nothing: tokens still come
            fail_for_room(request);
        } else if (request->writable) {
            advance_running(request);
            if (request->exchange)
                hold(request);
        }
    }
}

// What metrics and logs are told at the end.
void api_request_summary(struct api_request *request, bool complete, struct request_record *record)
{
    const char *finish = NULL;
    record->status = request->status ? request->status : 499; // as nginx names a client that did not wait
    record->end_s = clock_now_s() - request->received_s;
    record->first_token_s = -1;
    pthread_mutex_lock(&request->mutex);
    enum api_phase phase = request->phase;
    if (phase == PHASE_RUNNING) {
        if (request->first_token_s > 0)
            record->first_token_s = request->first_token_s - request->received_s;
        sum_usage(request, &record->usage);
        finish = request->num_sequences ? request->sequences[0].choice.finish_reason : NULL;
    }
    pthread_mutex_unlock(&request->mutex);
    if (phase == PHASE_RUNNING)
        record->finish_reason = request->failed ? "error" : !complete || !request->finished ? "abort" : finish;
}

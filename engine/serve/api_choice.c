// One choice of an answer: tokens into text, text into what the client sees; for streams the chunks, for whole answers their parts. I/O thread.
#include "engine/serve/api_internal.h"
#include "formats/tokenizer_text.h"

#include <stdlib.h>
#include <string.h>

static const struct api_request *request_of(const struct api_choice *choice) { return choice->sequence->request; }

// ---- chunks of a stream ------------------------------------------------------------------------------------------

void api_chunk_begin(const struct api_request *request, struct api_text *out)
{
    const char *model = request->params.model_name;
    api_text_printf(out, "data: {\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", request->completion_id,
                    request->params.chat ? "chat.completion.chunk" : "text_completion", (long long)request->created);
    api_text_string(out, model, strlen(model));
    api_text_puts(out, ",\"system_fingerprint\":");
    api_text_string(out, request->api->fingerprint, strlen(request->api->fingerprint));
}

// Logprobs that wait, as the value of "logprobs".
void api_choice_write_logprobs(struct api_choice *choice, struct api_text *out)
{
    out->failed |=
        choice->logprobs.failed || choice->tokens_text.failed || choice->offsets.failed || choice->tops.failed;
    if (!choice->logprobs.bytes) {
        api_text_puts(out, "null");
        return;
    }
    api_text_puts(out, request_of(choice)->params.chat ? "{\"content\":[" : "{\"token_logprobs\":[");
    api_text_append(out, choice->logprobs.data, choice->logprobs.bytes);
    if (!request_of(choice)->params.chat) {
        api_text_puts(out, "],\"tokens\":[");
        api_text_append(out, choice->tokens_text.data, choice->tokens_text.bytes);
        api_text_puts(out, "],\"text_offset\":[");
        api_text_append(out, choice->offsets.data, choice->offsets.bytes);
        api_text_puts(out, "],\"top_logprobs\":[");
        api_text_append(out, choice->tops.data, choice->tops.bytes);
    }
    api_text_puts(out, "]}");
    api_text_clear(&choice->logprobs);
    api_text_clear(&choice->tokens_text);
    api_text_clear(&choice->offsets);
    api_text_clear(&choice->tops);
}

// One chunk with this choice; delta: what stands between the braces of "delta", or the value of "text".
static void write_chunk(struct api_choice *choice, const char *delta, size_t bytes, const char *finish_reason,
                        struct api_text *out)
{
    const struct api_request *request = request_of(choice);
    api_chunk_begin(request, out);
    api_text_printf(out, ",\"choices\":[{\"index\":%d,%s", choice->sequence->index,
                    request->params.chat ? "\"delta\":{" : "\"text\":");
    api_text_append(out, delta, bytes);
    api_text_puts(out, request->params.chat ? "},\"logprobs\":" : ",\"logprobs\":");
    api_choice_write_logprobs(choice, out);
    if (finish_reason)
        api_text_printf(out, ",\"finish_reason\":\"%s\"}]", finish_reason);
    else
        api_text_puts(out, ",\"finish_reason\":null}]");
    if (request->params.continuous_usage) {
        api_text_puts(out, ",");
        api_write_usage(request, choice->tokens, 0, out);
    } else if (request->params.include_usage)
        api_text_puts(out, ",\"usage\":null");
    api_text_puts(out, "}\n\n");
}

static void send_role(struct api_choice *choice, struct api_text *out)
{
    static const char role[] = "\"role\":\"assistant\",\"content\":\"\"";
    if (!choice->role_sent && request_of(choice)->params.chat)
        write_chunk(choice, role, sizeof role - 1, NULL, out);
    choice->role_sent = true;
}

void api_choice_flush(struct api_choice *choice, struct api_text *out)
{
    struct api_text *chunk = &choice->chunk;
    const struct api_text *delta = &choice->delta;
    if (choice->delta_type < 0)
        return;
    api_text_clear(chunk);
    if (choice->delta_type == DELTA_TOOL_ARGUMENTS)
        api_text_printf(chunk, "\"tool_calls\":[{\"index\":%d,\"function\":{\"arguments\":\"", choice->delta_tool);
    else if (request_of(choice)->params.chat)
        api_text_puts(chunk, choice->delta_type == DELTA_REASONING ? "\"reasoning_content\":\"" : "\"content\":\"");
    else
        api_text_puts(chunk, "\"");
    api_text_append(chunk, delta->data, delta->bytes);
    api_text_puts(chunk, choice->delta_type == DELTA_TOOL_ARGUMENTS ? "\"}}]" : "\"");
    out->failed |= delta->failed || chunk->failed;
    write_chunk(choice, chunk->data ? chunk->data : "", chunk->bytes, NULL, out);
    api_text_clear(&choice->delta);
    choice->delta_type = -1;
}

// ---- deltas ------------------------------------------------------------------------------------------------------

static void begin_call(struct api_text *to, const struct output_delta *delta)
{
    char id[25];
    api_random_hex(id, 24);
    api_text_printf(to, "\"id\":\"call_%s\",\"type\":\"function\",\"function\":{\"name\":", id);
    api_text_string(to, delta->text, delta->bytes);
    api_text_puts(to, ",\"arguments\":\"");
}

static void collect(struct api_choice *choice, const struct output_delta *delta)
{
    switch ((int)delta->type) {
    case DELTA_CONTENT:
        api_text_escaped(&choice->content, delta->text, delta->bytes);
        break;
    case DELTA_REASONING:
        api_text_escaped(&choice->reasoning, delta->text, delta->bytes);
        break;
    case DELTA_TOOL_BEGIN:
        api_text_puts(&choice->calls, choice->calls.bytes ? ",{" : "{");
        begin_call(&choice->calls, delta);
        break;
    case DELTA_TOOL_ARGUMENTS:
        api_text_escaped(&choice->calls, delta->text, delta->bytes);
        break;
    case DELTA_TOOL_END:
        api_text_puts(&choice->calls, "\"}}");
        break;
    }
}

static void stream_delta(struct api_choice *choice, const struct output_delta *delta, struct api_text *out)
{
    send_role(choice, out);
    if (delta->type != (unsigned)choice->delta_type || delta->tool != choice->delta_tool)
        api_choice_flush(choice, out);
    if (delta->type == DELTA_TOOL_BEGIN) {
        api_text_clear(&choice->chunk);
        api_text_printf(&choice->chunk, "\"tool_calls\":[{\"index\":%d,", delta->tool);
        begin_call(&choice->chunk, delta);
        api_text_puts(&choice->chunk, "\"}}]");
        out->failed |= choice->chunk.failed;
        write_chunk(choice, choice->chunk.data ? choice->chunk.data : "", choice->chunk.bytes, NULL, out);
    } else if (delta->type != DELTA_TOOL_END && delta->bytes) {
        choice->delta_type = (int)delta->type;
        choice->delta_tool = delta->tool;
        api_text_escaped(&choice->delta, delta->text, delta->bytes);
    }
}

void api_choice_delta(void *arg, const struct output_delta *delta)
{
    struct api_choice *choice = arg;
    if (request_of(choice)->params.stream)
        stream_delta(choice, delta, choice->out);
    else
        collect(choice, delta);
}

static int pass_on(struct api_choice *choice, struct error *err)
{
    struct output_delta delta = {.type = DELTA_CONTENT};
    delta.text = text_stream_take(choice->text, &delta.bytes);
    if (delta.bytes == 0)
        return 0;
    if (choice->parser)
        return output_parser_push(choice->parser, delta.text, delta.bytes, err);
    api_choice_delta(choice, &delta);
    return 0;
}

// ---- logprobs ----------------------------------------------------------------------------------------------------

// Of a chat: "token":..., "bytes":[...]; of completions: the text. A piece of a character shows as U+FFFD.
static void write_token(struct api_choice *choice, uint32_t token, struct api_text *out)
{
    struct tokenizer_text shown = {0};
    const char *bytes = "";
    size_t num_bytes = 0, used;
    bool chat = request_of(choice)->params.chat;
    if (tokenizer_stream_token_bytes(choice->token_bytes, token, &bytes, &num_bytes, NULL))
        num_bytes = 0;
    if (!tokenizer_text_append_lossy(&shown, bytes, num_bytes, false, &used))
        out->failed = true;
    if (chat)
        api_text_puts(out, "\"token\":");
    api_text_string(out, shown.data, shown.bytes);
    if (chat) {
        api_text_puts(out, ",\"bytes\":[");
        for (size_t i = 0; i < num_bytes; i++)
            api_text_printf(out, i ? ",%u" : "%u", (unsigned char)bytes[i]);
        api_text_puts(out, "]");
    }
    tokenizer_text_free(&shown);
}

static void write_chat_logprob(struct api_choice *choice, const struct step_choice *token)
{
    struct api_text *out = &choice->logprobs;
    api_text_puts(out, out->bytes ? ",{" : "{");
    write_token(choice, token->token, out);
    api_text_puts(out, ",\"logprob\":");
    api_text_number(out, token->logprob);
    api_text_puts(out, ",\"top_logprobs\":[");
    for (int32_t i = 0; i < token->num_top; i++) {
        api_text_puts(out, i ? ",{" : "{");
        write_token(choice, token->top[i].token, out);
        api_text_puts(out, ",\"logprob\":");
        api_text_number(out, token->top[i].logprob);
        api_text_puts(out, "}");
    }
    api_text_puts(out, "]}");
}

// As in OpenAI's completions: four lists. Alternatives that look alike are one member of an object: the likeliest stays.
static void write_completion_logprob(struct api_choice *choice, const struct api_pending *pending)
{
    const struct step_choice *token = &pending->choice;
    const char *comma = choice->logprobs.bytes ? "," : "";
    api_text_puts(&choice->logprobs, comma);
    api_text_number(&choice->logprobs, token->logprob);
    api_text_puts(&choice->tokens_text, comma);
    write_token(choice, token->token, &choice->tokens_text);
    api_text_printf(&choice->offsets, "%s%llu", comma, (unsigned long long)pending->begin);
    api_text_printf(&choice->tops, "%s{", comma);
    struct api_text names[STEP_MAX_LOGPROBS] = {0};
    bool any = false;
    for (int32_t i = 0; i < token->num_top; i++) {
        bool seen = false;
        write_token(choice, token->top[i].token, &names[i]);
        for (int32_t j = 0; j < i; j++)
            seen |= names[i].bytes == names[j].bytes && memcmp(names[i].data, names[j].data, names[i].bytes) == 0;
        choice->tops.failed |= names[i].failed;
        if (seen || names[i].failed)
            continue;
        api_text_puts(&choice->tops, any ? "," : "");
        api_text_append(&choice->tops, names[i].data, names[i].bytes);
        api_text_puts(&choice->tops, ":");
        api_text_number(&choice->tops, token->top[i].logprob);
        any = true;
    }
    for (int32_t i = 0; i < token->num_top; i++)
        api_text_free(&names[i]);
    api_text_puts(&choice->tops, "}");
}

static int remember_token(struct api_choice *choice, const struct step_choice *token, uint64_t begin, struct error *err)
{
    if (request_of(choice)->params.num_logprobs < 0)
        return 0;
    if (choice->num_pending == choice->pending_capacity) {
        size_t capacity = 2 * choice->pending_capacity + 8;
        struct api_pending *more = realloc(choice->pending, capacity * sizeof *more);
        if (!more)
            return error_set(err, ERR_MEMORY, "no memory for logprobs");
        choice->pending = more;
        choice->pending_capacity = capacity;
    }
    choice->pending[choice->num_pending++] =
        (struct api_pending){.begin = begin, .end = text_stream_total(choice->text), .choice = *token};
    return 0;
}

// Of the tokens whose text is released; at the end, of all that began before it.
static void write_released(struct api_choice *choice, bool end)
{
    uint64_t released = text_stream_released(choice->text);
    size_t done = 0;
    while (done < choice->num_pending &&
           (end ? choice->pending[done].begin < released || choice->pending[done].end <= released
                : choice->pending[done].end <= released)) {
        if (request_of(choice)->params.chat)
            write_chat_logprob(choice, &choice->pending[done].choice);
        else
            write_completion_logprob(choice, &choice->pending[done]);
        done++;
    }
    choice->num_pending -= done;
    memmove(choice->pending, choice->pending + done, choice->num_pending * sizeof *choice->pending);
}

// ---- tokens ------------------------------------------------------------------------------------------------------

int api_choice_push(struct api_choice *choice, const struct step_choice *token, struct api_text *out, struct error *err)
{
    uint64_t begin = text_stream_total(choice->text);
    int rc;
    choice->out = out;
    choice->tokens++;
    if (request_of(choice)->params.stream)
        send_role(choice, out);
    if ((rc = text_stream_push(choice->text, token->token, err)) || (rc = remember_token(choice, token, begin, err)) ||
        (rc = pass_on(choice, err)))
        return rc;
    if (choice->num_pending)
        write_released(choice, text_stream_stopped(choice->text));
    return 0;
}

// It has no logprob of its own.
int api_choice_stop_token(struct api_choice *choice, const struct step_choice *token, struct api_text *out,
                          struct error *err)
{
    choice->out = out;
    choice->tokens++;
    int rc = text_stream_push(choice->text, token->token, err);
    return rc ? rc : pass_on(choice, err);
}

int api_choice_finish(struct api_choice *choice, const char *reason, struct api_text *out, struct error *err)
{
    int rc;
    choice->out = out;
    if ((rc = text_stream_finish(choice->text, err)) || (rc = pass_on(choice, err)) ||
        (choice->parser && (rc = output_parser_finish(choice->parser, err))))
        return rc;
    if (choice->num_pending)
        write_released(choice, true);
    bool calls = choice->parser && output_parser_tool_calls(choice->parser) > 0;
    choice->finish_reason = calls && strcmp(reason, "stop") == 0 ? "tool_calls" : reason;
    choice->over = true;
    if (request_of(choice)->params.stream) {
        send_role(choice, out);
        api_choice_flush(choice, out);
        write_chunk(choice, request_of(choice)->params.chat ? "" : "\"\"", request_of(choice)->params.chat ? 0 : 2,
                    choice->finish_reason, out);
    }
    return 0;
}

size_t api_choice_bytes(const struct api_choice *choice)
{
    return choice->content.bytes + choice->reasoning.bytes + choice->calls.bytes + choice->logprobs.bytes +
           choice->tokens_text.bytes + choice->offsets.bytes + choice->tops.bytes;
}

size_t api_choice_held_bytes(const struct api_choice *choice)
{
    const struct api_text *const texts[] = {&choice->input,     &choice->delta, &choice->chunk,    &choice->content,
                                            &choice->reasoning, &choice->calls, &choice->logprobs, &choice->tokens_text,
                                            &choice->offsets,   &choice->tops};
    size_t bytes = choice->pending_capacity * sizeof *choice->pending;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        bytes += texts[i]->capacity;
    return bytes;
}

void api_choice_free(struct api_choice *choice)
{
    text_stream_free(choice->text);
    output_parser_free(choice->parser);
    tokenizer_stream_free(choice->token_bytes);
    api_text_free(&choice->input);
    api_text_free(&choice->delta);
    api_text_free(&choice->chunk);
    api_text_free(&choice->content);
    api_text_free(&choice->reasoning);
    api_text_free(&choice->calls);
    api_text_free(&choice->logprobs);
    api_text_free(&choice->tokens_text);
    api_text_free(&choice->offsets);
    api_text_free(&choice->tops);
    free(choice->pending);
    choice->text = NULL;
    choice->parser = NULL;
    choice->token_bytes = NULL;
    choice->pending = NULL;
    choice->num_pending = choice->pending_capacity = 0;
    choice->at = 0;
}

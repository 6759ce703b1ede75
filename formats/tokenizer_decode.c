// Ids -> text, all at once or as they come. There is one implementation: decoding everything is a stream that is
// pushed every id and flushed, so both give the same text.
//
// Tokens fall through the decoder's steps one by one. Three steps remember something between tokens: BYTE_FALLBACK
// holds a run of byte tokens until the run ends (only then is it known whether it is valid UTF-8), FUSE and BYTE_LEVEL
// make one token of everything. What follows those would have to wait for the end; in the decoders in use that is a
// Strip at the front, which can work on chunks (tok->decodes_in_chunks). Else the text comes with the flush.
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer_internal.h"

enum { MAX_DECODED_TOKEN_BYTES = 1 << 26 }; // a hostile chain of Replace steps must not grow for ever

struct step_state {
    struct tokenizer_text held;   // bytes that wait: a byte run, a cut-off character, or the whole text
    struct tokenizer_text result; // what the step made of one token
    bool started;                 // METASPACE: a token has passed. STRIP in chunks: a character was kept
    uint32_t stripped;            // STRIP in chunks: characters taken off so far
};

struct tokenizer_stream {
    const struct tokenizer *tok;
    bool skip_special, any_token;
    bool only_token; // the bytes of one token are asked for: no step holds anything back
    struct tokenizer_regex_memory *memory;
    struct tokenizer_text text; // what the current call releases
    struct step_state steps[TOKENIZER_MAX_OPS];
};

static int out_of_memory(struct error *err) { return error_set(err, ERR_MEMORY, "out of memory while decoding"); }

static int pass(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err);

// True when the step sees the text behind FUSE or BYTE_LEVEL chunk by chunk.
static bool in_chunks(const struct tokenizer_stream *s, uint32_t step)
{
    return step > s->tok->fuse_op && s->tok->decodes_in_chunks;
}

// <0xNN> with two hexadecimal digits; else -1.
static int byte_token_value(const char *token, size_t bytes)
{
    if (bytes != 6 || memcmp(token, "<0x", 3) || token[5] != '>')
        return -1;
    int value = 0;
    for (int i = 3; i < 5; i++) {
        char c = token[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return -1;
        value = value * 16 + digit;
    }
    return value;
}

// A run of byte tokens is its text, or one U+FFFD per byte when it is not valid UTF-8.
static int end_byte_run(struct tokenizer_stream *s, uint32_t step, struct error *err)
{
    struct tokenizer_text *run = &s->steps[step].held;
    size_t bytes = run->bytes;
    run->bytes = 0;
    if (!bytes)
        return 0;
    if (tokenizer_text_valid_prefix(run->data, bytes) == bytes)
        return pass(s, step + 1, run->data, bytes, err);
    int rc = 0;
    for (size_t i = 0; i < bytes && !rc; i++)
        rc = pass(s, step + 1, "\xEF\xBF\xBD", 3, err);
    return rc;
}

static int byte_fallback(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    int value = byte_token_value(token, bytes);
    if (value >= 0) {
        char byte = (char)value;
        if (s->only_token)
            return pass(s, step + 1, &byte, 1, err);
        return tokenizer_text_append(&s->steps[step].held, &byte, 1) ? 0 : out_of_memory(err);
    }
    int rc = end_byte_run(s, step, err);
    return rc ? rc : pass(s, step + 1, token, bytes, err);
}

// Appends the bytes that a token's letters stand for, or the token itself if one is not such a letter.
static bool append_letter_bytes(const struct tokenizer *tok, struct tokenizer_text *out, const char *token,
                                size_t bytes)
{
    if (!tokenizer_text_reserve(out, bytes))
        return false;
    char *to = out->data + out->bytes;
    for (size_t at = 0; at < bytes;) {
        uint32_t letter = (uint8_t)token[at++];
        if (letter >= 0xC2 && letter <= 0xC5 && at < bytes) // the letters end at U+0143
            letter = (letter & 0x1F) << 6 | ((uint8_t)token[at++] & 0x3F);
        else if (letter >= 0x80)
            letter = UINT32_MAX;
        if (letter >= sizeof tok->letter_bytes / sizeof *tok->letter_bytes || tok->letter_bytes[letter] < 0)
            return tokenizer_text_append(out, token, bytes);
        *to++ = (char)tok->letter_bytes[letter];
    }
    out->bytes = (size_t)(to - out->data);
    return true;
}

// Passes on the complete characters of the bytes so far; at the end everything.
static int release_bytes(struct tokenizer_stream *s, uint32_t step, bool at_end, struct error *err)
{
    struct step_state *state = &s->steps[step];
    size_t used;
    state->result.bytes = 0;
    if (!state->held.bytes)
        return 0;
    if (!tokenizer_text_append_lossy(&state->result, state->held.data, state->held.bytes, !at_end, &used))
        return out_of_memory(err);
    state->held.bytes -= used;
    memmove(state->held.data, state->held.data + used, state->held.bytes);
    return pass(s, step + 1, state->result.data, state->result.bytes, err);
}

static int byte_level(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    struct tokenizer_text *held = &s->steps[step].held;
    if (!append_letter_bytes(s->tok, held, token, bytes))
        return out_of_memory(err);
    if (s->only_token)
        return pass(s, step + 1, held->data, held->bytes, err);
    return s->tok->decodes_in_chunks ? release_bytes(s, step, false, err) : 0;
}

static int fuse(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    if (s->tok->decodes_in_chunks)
        return pass(s, step + 1, token, bytes, err);
    return tokenizer_text_append(&s->steps[step].held, token, bytes) ? 0 : out_of_memory(err);
}

static int strip(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    const struct tokenizer_op *op = &s->tok->decoder.ops[step];
    const char *content = s->tok->op_text + op->text_offset;
    size_t length = op->text_bytes;
    struct step_state *state = &s->steps[step];
    if (!in_chunks(s, step)) {
        state->started = false;
        state->stripped = 0;
    }
    while (!state->started && state->stripped < op->start && bytes >= length && !memcmp(token, content, length)) {
        token += length;
        bytes -= length;
        state->stripped++;
    }
    state->started |= bytes > 0;
    for (uint32_t i = 0; i < op->stop && bytes >= length && !memcmp(token + bytes - length, content, length); i++)
        bytes -= length;
    return pass(s, step + 1, token, bytes, err);
}

static int metaspace(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    const struct tokenizer_op *op = &s->tok->decoder.ops[step];
    const char *mark = s->tok->op_text + op->text_offset;
    struct step_state *state = &s->steps[step];
    bool drop = op->flags & OP_DROP_FIRST && !state->started;
    state->started = true;
    state->result.bytes = 0;
    for (;;) {
        const char *found = tokenizer_text_find(token, bytes, mark, op->text_bytes);
        size_t before = found ? (size_t)(found - token) : bytes;
        if (!tokenizer_text_append(&state->result, token, before) ||
            (found && !drop && !tokenizer_text_append(&state->result, " ", 1)))
            return out_of_memory(err);
        if (!found)
            break;
        token = found + op->text_bytes;
        bytes -= before + op->text_bytes;
    }
    return pass(s, step + 1, state->result.data, state->result.bytes, err);
}

static int replace(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    const struct tokenizer_op_list *list = &s->tok->decoder;
    struct tokenizer_text *result = &s->steps[step].result;
    bool changed;
    result->bytes = 0;
    int rc = tokenizer_encode_replace(s->tok, &list->ops[step], list->regexes[step], s->memory, token, bytes, result,
                                      &changed, err);
    if (rc)
        return rc;
    if (!changed)
        return pass(s, step + 1, token, bytes, err);
    if (result->bytes > MAX_DECODED_TOKEN_BYTES && result->bytes > bytes)
        return error_set(err, ERR_MODEL, "%s: the decoder makes %zu bytes out of one token", s->tok->name,
                         result->bytes);
    return pass(s, step + 1, result->data, result->bytes, err);
}

// One token enters a step; behind the last step is the text.
static int pass(struct tokenizer_stream *s, uint32_t step, const char *token, size_t bytes, struct error *err)
{
    if (step == s->tok->decoder.count)
        return tokenizer_text_append(&s->text, token, bytes) ? 0 : out_of_memory(err);
    switch (s->tok->decoder.ops[step].kind) {
    case OP_REPLACE:
        return replace(s, step, token, bytes, err);
    case OP_BYTE_LEVEL:
        return byte_level(s, step, token, bytes, err);
    case OP_BYTE_FALLBACK:
        return byte_fallback(s, step, token, bytes, err);
    case OP_FUSE:
        return fuse(s, step, token, bytes, err);
    case OP_STRIP:
        return strip(s, step, token, bytes, err);
    default:
        return metaspace(s, step, token, bytes, err);
    }
}

// The sequence ends: every step lets go of what it holds.
static int finish(struct tokenizer_stream *s, struct error *err)
{
    int rc = 0;
    for (uint32_t step = 0; step < s->tok->decoder.count && !rc; step++) {
        struct tokenizer_text *held = &s->steps[step].held;
        switch (s->tok->decoder.ops[step].kind) {
        case OP_BYTE_FALLBACK:
            rc = end_byte_run(s, step, err);
            break;
        case OP_BYTE_LEVEL:
            rc = release_bytes(s, step, true, err);
            break;
        case OP_FUSE:
            if (!s->tok->decodes_in_chunks && held->bytes)
                rc = pass(s, step + 1, held->data, held->bytes, err);
            break;
        }
    }
    return rc;
}

static void reset(struct tokenizer_stream *s)
{
    s->any_token = false;
    for (int i = 0; i < TOKENIZER_MAX_OPS; i++) {
        s->steps[i].held.bytes = 0;
        s->steps[i].started = false;
        s->steps[i].stripped = 0;
    }
}

int tokenizer_stream_new(struct tokenizer_stream **out, const struct tokenizer *tok, bool skip_special,
                         struct error *err)
{
    struct tokenizer_stream *s = calloc(1, sizeof *s);
    if (!s)
        return out_of_memory(err);
    s->tok = tok;
    s->skip_special = skip_special;
    if (!(s->memory = tokenizer_regex_memory_new())) {
        free(s);
        return out_of_memory(err);
    }
    *out = s;
    return 0;
}

void tokenizer_stream_free(struct tokenizer_stream *s)
{
    if (!s)
        return;
    tokenizer_regex_memory_free(s->memory);
    tokenizer_text_free(&s->text);
    for (int i = 0; i < TOKENIZER_MAX_OPS; i++) {
        tokenizer_text_free(&s->steps[i].held);
        tokenizer_text_free(&s->steps[i].result);
    }
    free(s);
}

static struct tokenizer_slice decoded_token(const struct tokenizer *tok, uint32_t id)
{
    if (!(tok->token_flags[id] & TOKEN_DECODES))
        return tokenizer_token_content(tok, id);
    uint32_t low = 0, high = tok->header->decode_texts;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (tok->decode_texts[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == tok->header->decode_texts || tok->decode_texts[low].id != id)
        return tokenizer_token_content(tok, id);
    return (struct tokenizer_slice){tok->op_text + tok->decode_texts[low].text_offset,
                                    tok->decode_texts[low].text_bytes};
}

static bool exists(const struct tokenizer *tok, uint32_t id)
{
    return id < tok->header->id_count && tok->token_flags[id] & TOKEN_EXISTS;
}

// Adds one id that exists to s->text.
static int add_id(struct tokenizer_stream *s, uint32_t id, struct error *err)
{
    const struct tokenizer *tok = s->tok;
    if (s->skip_special && tok->token_flags[id] & TOKEN_SKIPPED)
        return 0;
    struct tokenizer_slice token = decoded_token(tok, id);
    if (!(tok->header->flags & IMAGE_HAS_DECODER) && s->any_token && !tokenizer_text_append(&s->text, " ", 1))
        return out_of_memory(err);
    s->any_token = true;
    return pass(s, 0, token.text, token.bytes, err);
}

int tokenizer_stream_push(struct tokenizer_stream *s, uint32_t id, const char **text, size_t *bytes, struct error *err)
{
    s->text.bytes = 0;
    int rc = exists(s->tok, id) ? add_id(s, id, err) : 0;
    if (rc)
        return rc;
    *text = s->text.bytes ? s->text.data : "";
    *bytes = s->text.bytes;
    return 0;
}

int tokenizer_stream_flush(struct tokenizer_stream *s, const char **text, size_t *bytes, struct error *err)
{
    s->text.bytes = 0;
    int rc = finish(s, err);
    reset(s);
    if (rc)
        return rc;
    *text = s->text.bytes ? s->text.data : "";
    *bytes = s->text.bytes;
    return 0;
}

int tokenizer_stream_token_bytes(struct tokenizer_stream *s, uint32_t id, const char **bytes, size_t *count,
                                 struct error *err)
{
    const struct tokenizer *tok = s->tok;
    int rc = 0;
    if (!tok->decodes_in_chunks)
        return error_set(err, ERR_MODEL, "%s: the decoder changes the text of several tokens at once", tok->name);
    s->text.bytes = 0;
    if (exists(tok, id) && id != tok->header->unk_id) {
        s->only_token = s->any_token = true;
        for (uint32_t step = 0; step < tok->decoder.count; step++)
            s->steps[step].started = true;
        rc = add_id(s, id, err);
        s->only_token = false;
        reset(s);
    }
    *bytes = s->text.bytes ? s->text.data : "";
    *count = s->text.bytes;
    return rc;
}

int tokenizer_decode(const struct tokenizer *tok, const uint32_t *ids, size_t count, bool skip_special, char **out,
                     size_t *out_bytes, struct error *err)
{
    struct tokenizer_stream *s = NULL;
    int rc = tokenizer_stream_new(&s, tok, skip_special, err);
    for (size_t i = 0; i < count && !rc; i++)
        rc = exists(tok, ids[i]) ? add_id(s, ids[i], err)
                                 : error_set(err, ERR_USAGE, "%s: there is no token with id %u", tok->name, ids[i]);
    if (!rc)
        rc = finish(s, err);
    if (!rc && !tokenizer_text_append(&s->text, "", 1))
        rc = out_of_memory(err);
    if (!rc) {
        *out = s->text.data;
        *out_bytes = s->text.bytes - 1;
        s->text = (struct tokenizer_text){0};
    }
    tokenizer_stream_free(s);
    return rc;
}

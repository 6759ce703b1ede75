// tpengine generate: prompts in, text out, as it is made.
#include "engine/commands.h"
#include "engine/generate_chat.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    struct option_list prompts, stops;
    int64_t max_tokens, top_k;
    double temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty;
    int64_t seed;
    bool ignore_eos, ids, chat;
    const char *system, *messages;
} options = {
    .max_tokens = 256, .top_k = -1, .temperature = -1, .top_p = -1, .min_p = 0, .repetition_penalty = -1, .seed = 0};

const struct option_spec generate_options[] = {
    {"prompt", OPTION_LIST, &options.prompts, "TEXT|-", 0, 0,
     "text to continue, - for standard input; several run as one batch"},
    {"chat", OPTION_FLAG, &options.chat, NULL, 0, 0,
     "prompts are messages to the model's chat template; with none, a conversation: one line of standard input a turn"},
    {"system", OPTION_TEXT, &options.system, "TEXT", 0, 0, "the system message of a chat"},
    {"messages", OPTION_TEXT, &options.messages, "FILE|-", 0, 0,
     "chat: a JSON list of messages with role and content, instead of a prompt"},
    {"max-tokens", OPTION_INT, &options.max_tokens, "N", 1, 1 << 24, "most tokens to generate"},
    {"temperature", OPTION_NUMBER, &options.temperature, "T", 0, 100, "0 is greedy; default: the model's own, else 0"},
    {"top-p", OPTION_NUMBER, &options.top_p, "P", 1e-6, 1, "keep the likeliest tokens with this much mass"},
    {"top-k", OPTION_INT, &options.top_k, "K", 0, 1 << 24, "keep the K likeliest tokens; 0: all"},
    {"min-p", OPTION_NUMBER, &options.min_p, "P", 0, 1, "keep tokens at least this likely, relative to the likeliest"},
    {"repetition-penalty", OPTION_NUMBER, &options.repetition_penalty, "X", 0.01, 100,
     "above 1 discourages tokens already seen"},
    {"frequency-penalty", OPTION_NUMBER, &options.frequency_penalty, "X", -100, 100,
     "subtracted per earlier occurrence in the output"},
    {"presence-penalty", OPTION_NUMBER, &options.presence_penalty, "X", -100, 100,
     "subtracted once for a token in the output"},
    {"seed", OPTION_INT, &options.seed, "N", 0, 9e15, "the same seed gives the same text"},
    {"stop", OPTION_LIST, &options.stops, "TEXT", 0, 0, "end before this text; may be repeated"},
    {"ignore-eos", OPTION_FLAG, &options.ignore_eos, NULL, 0, 0, "go on after an end-of-sequence token"},
    {"draft-tokens", OPTION_INT, &session_options.draft_tokens, "N", 0, 64,
     "guess up to N tokens ahead from what the text repeats; the same output, sooner"},
    {"ids", OPTION_FLAG, &options.ids, NULL, 0, 0, "print token ids instead of text"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

// One prompt's way to text. With several prompts, or --json, text is collected and printed at the end.
struct output {
    struct tokenizer_stream *stream;
    struct token_list prompt;
    char *text; // malloc'ed, all text so far
    size_t bytes, capacity, printed;
    uint32_t *ids; // malloc'ed
    int64_t num_ids, ids_capacity;
    bool live;          // print as it comes
    bool stopped;       // a stop string was met
    struct error error; // the first failure: memory, an id the tokenizer does not know, writing
};

static size_t longest_stop(void)
{
    size_t longest = 0;
    for (int i = 0; i < options.stops.count; i++) {
        size_t bytes = strlen(options.stops.items[i]);
        longest = bytes > longest ? bytes : longest;
    }
    return longest;
}

// Prints what can no longer become part of a stop string.
static void print_live(struct output *o, bool end)
{
    size_t keep = end || o->stopped || longest_stop() == 0 ? 0 : longest_stop() - 1;
    size_t until = o->bytes > keep ? o->bytes - keep : 0;
    while (until < o->bytes && until > 0 && ((unsigned char)o->text[until] & 0xc0) == 0x80)
        until--; // not inside a UTF-8 sequence
    if (!o->live || until <= o->printed)
        return;
    if (fwrite(o->text + o->printed, 1, until - o->printed, stdout) != until - o->printed || fflush(stdout) != 0)
        error_set_errno(&o->error, "the output could not be written");
    o->printed = until;
}

static void append(struct output *o, const char *text, size_t bytes)
{
    if (o->bytes + bytes + 1 > o->capacity) {
        size_t capacity = 2 * (o->bytes + bytes + 1);
        char *larger = realloc(o->text, capacity);
        if (!larger) {
            error_set(&o->error, ERR_MEMORY, "no memory for the output");
            return;
        }
        o->text = larger;
        o->capacity = capacity;
    }
    memcpy(o->text + o->bytes, text, bytes);
    o->bytes += bytes;
    o->text[o->bytes] = 0;
    // A stop string may begin in earlier text.
    size_t back = longest_stop() + bytes, from = o->bytes > back ? o->bytes - back : 0;
    const char *first = NULL;
    for (int i = 0; i < options.stops.count; i++) {
        size_t length = strlen(options.stops.items[i]);
        const char *found = length ? memmem(o->text + from, o->bytes - from, options.stops.items[i], length) : NULL;
        if (found && (!first || found < first))
            first = found;
    }
    if (first) {
        o->bytes = (size_t)(first - o->text);
        o->text[o->bytes] = 0;
        o->stopped = true;
    }
}

static void append_id(struct output *o, uint32_t id)
{
    if (o->num_ids == o->ids_capacity) {
        int64_t capacity = 2 * o->ids_capacity + 64;
        uint32_t *larger = realloc(o->ids, (size_t)capacity * sizeof *larger);
        if (!larger) {
            error_set(&o->error, ERR_MEMORY, "no memory for the output");
            return;
        }
        o->ids = larger;
        o->ids_capacity = capacity;
    }
    o->ids[o->num_ids++] = id;
}

static bool on_tokens(void *arg, int64_t sequence, const uint32_t *tokens, int64_t count)
{
    struct output *o = (struct output *)arg + sequence;
    for (int64_t i = 0; i < count && !o->stopped && !o->error.code; i++) {
        const char *text;
        size_t bytes;
        append_id(o, tokens[i]);
        if (options.ids) {
            if (o->live && (printf("%s%u", o->num_ids == 1 ? "" : ",", tokens[i]) < 0 || fflush(stdout) != 0))
                error_set_errno(&o->error, "the output could not be written");
            continue;
        }
        if (tokenizer_stream_push(o->stream, tokens[i], &text, &bytes, &o->error) == 0)
            append(o, text, bytes);
        print_live(o, false);
    }
    return !o->stopped && !o->error.code;
}

static double or_default(double given, double model, double otherwise)
{
    return given >= 0 ? given : isnan(model) || model < 0 ? otherwise : model;
}

static struct sampling sampling_for(const struct model_desc *desc)
{
    struct sampling how = {
        .temperature = or_default(options.temperature, desc->default_temperature, 0),
        .top_p = or_default(options.top_p, desc->default_top_p, 1),
        .min_p = options.min_p,
        .top_k = options.top_k >= 0        ? options.top_k
                 : desc->default_top_k > 0 ? desc->default_top_k
                                           : 0,
        .repetition_penalty = or_default(options.repetition_penalty, desc->default_repetition_penalty, 1),
        .frequency_penalty = options.frequency_penalty,
        .presence_penalty = options.presence_penalty,
        .seed = (uint64_t)options.seed,
    };
    return how;
}

// Exactly one of prompt and messages is given; chat is NULL without --chat.
static int encode_prompt(struct session *session, const struct chat *chat, struct output *o, const char *prompt,
                         const json_t *messages, struct error *err)
{
    const struct tokenizer *tokenizer;
    char *text = NULL;
    size_t bytes = prompt ? strlen(prompt) : 0;
    int rc = session_tokenizer(session, &tokenizer, err);
    if (rc)
        return rc;
    if (prompt && strcmp(prompt, "-") == 0 && (rc = read_text("-", &text, &bytes, err)))
        return rc;
    if (messages)
        rc = generate_chat_encode(chat, tokenizer, messages, &o->prompt, err);
    else if (chat)
        rc = generate_chat_prompt(chat, tokenizer, options.system, text ? text : prompt, bytes, &o->prompt, err);
    else
        rc = tokenizer_encode(tokenizer, text ? text : prompt, bytes, TOKENIZER_ADD_SPECIAL, &o->prompt, err);
    free(text);
    if (rc)
        return rc;
    if (o->prompt.count == 0)
        return error_set(err, ERR_USAGE,
                         "the prompt is empty and the model has no beginning-of-sequence token; give some text");
    return tokenizer_stream_new(&o->stream, tokenizer, true, err);
}

static const char *finish_name(const struct output *o, enum finish_reason reason)
{
    return o->stopped || reason == FINISH_EOS ? "stop" : reason == FINISH_CANCELLED ? "cancelled" : "length";
}

static int print_json(const struct output *outputs, const struct generation *generations, int count, struct error *err)
{
    json_t *choices = json_array();
    for (int i = 0; i < count; i++) {
        json_t *ids = json_array();
        for (int64_t t = 0; t < outputs[i].num_ids; t++)
            json_array_append_new(ids, json_integer(outputs[i].ids[t]));
        json_array_append_new(choices, json_pack("{s:i, s:s#, s:o, s:I, s:I, s:s}", "index", i, "text",
                                                 outputs[i].text ? outputs[i].text : "", (int)outputs[i].bytes,
                                                 "token_ids", ids, "prompt_tokens", (json_int_t)outputs[i].prompt.count,
                                                 "generated_tokens", (json_int_t)outputs[i].num_ids, "finish_reason",
                                                 finish_name(&outputs[i], generations[i].finished)));
    }
    return print_report(json_pack("{s:i, s:o}", "schema_version", 1, "choices", choices), err);
}

static void print_batch(const struct output *outputs, int count)
{
    for (int i = 0; i < count; i++) {
        printf("%s[%d] ", i ? "\n" : "", i);
        if (options.ids)
            for (int64_t t = 0; t < outputs[i].num_ids; t++)
                printf("%s%u", t ? "," : "", outputs[i].ids[t]);
        else
            fwrite(outputs[i].text, 1, outputs[i].bytes, stdout);
    }
    printf("\n");
}

static void print_start(struct session *session)
{
    const struct manifest *m = session_manifest(session);
    if (!common_options.quiet)
        fprintf(stderr, "%u rank%s (%s), %d thread%s each, %s kernels, %s wire over %s, prompts %s, context %lld\n",
                (unsigned)m->num_ranks, m->num_ranks == 1 ? "" : "s", session_options.ranks, session_threads(session),
                session_threads(session) == 1 ? "" : "s", session_backend(session), session_wire(session),
                session_transport(session), session_prefill_way(session), (long long)session_context(session));
    if (!common_options.quiet)
        session_print_devices(session, stderr);
}

// Once everything has arrived, which may be after the first token.
static void print_load(struct session *session)
{
    const struct manifest *m = session_manifest(session);
    const struct start_figures *start = session_start_figures(session);
    double load_s = session_load_s(session);
    uint64_t bytes = 0;
    for (uint32_t r = 0; r < m->num_ranks; r++)
        bytes += m->ranks[r].bytes;
    if (load_s > 0 && !common_options.quiet)
        fprintf(stderr, "loaded %.1f MiB in %.3f s (%s: %s)\n", (double)bytes / 0x1p20, load_s,
                load_path_name(start->ranks[0].load.path), start->ranks[0].load.why);
    for (uint32_t r = 0; r < m->num_ranks && load_s > 0; r++)
        if (start->ranks[r].note[0])
            fprintf(stderr, "rank %u: %s\n", r, start->ranks[r].note);
}

static void print_rates(const struct generate_figures *figures, const struct generation *generations, int count)
{
    double decode_s = figures->end_s - figures->first_s;
    long long steps = figures->steps, drafted = 0, accepted = 0;
    for (int i = 0; i < count; i++) {
        drafted += generations[i].usage.drafted_tokens;
        accepted += generations[i].usage.accepted_tokens;
    }
    if (common_options.quiet || steps < 1 || !(decode_s > 0))
        return;
    fprintf(stderr, "%lld decode steps in %.2f s: %.1f steps/s, %.1f tokens/s\n", steps, decode_s,
            (double)steps / decode_s, (double)(figures->tokens - figures->first_tokens) / decode_s);
    if (drafted > 0)
        fprintf(stderr, "%lld of %lld drafted tokens accepted\n", accepted, drafted);
}

// The prompts of the command line, or one conversation.
static int run_prompts(struct session *session, const struct chat *chat, const json_t *messages, struct output *outputs,
                       int count, struct error *err)
{
    struct generation generations[OPTION_LIST_MAX];
    int rc;
    bool live = count == 1 && !common_options.json;
    for (int i = 0; i < count; i++) {
        const char *prompt = messages ? NULL : options.prompts.items[i];
        if ((rc = encode_prompt(session, chat, &outputs[i], prompt, messages, err)))
            return rc;
        outputs[i].live = live;
        generations[i] = (struct generation){.prompt = outputs[i].prompt.ids,
                                             .prompt_count = (int64_t)outputs[i].prompt.count,
                                             .max_tokens = options.max_tokens,
                                             .ignore_eos = options.ignore_eos,
                                             .sampling = sampling_for(&session_manifest(session)->model),
                                             .on_tokens = on_tokens,
                                             .arg = outputs};
    }
    bool started = session_start_figures(session)->first_token_ns > 0; // in an earlier turn
    if ((rc = session_check_prompts(session, generations, count, err)) || (rc = session_start(session, err)))
        return rc;
    if (!started)
        print_start(session);
    struct generate_figures figures = {0};
    rc = session_generate(session, generations, count, &figures, err);
    for (int i = 0; i < count; i++) {
        const char *text;
        size_t bytes;
        if (!options.ids && !outputs[i].stopped &&
            tokenizer_stream_flush(outputs[i].stream, &text, &bytes, &outputs[i].error) == 0)
            append(&outputs[i], text, bytes);
        print_live(&outputs[i], true);
        if (outputs[i].error.code && !rc) {
            rc = outputs[i].error.code;
            *err = outputs[i].error;
        }
    }
    if (rc)
        return rc;
    if (live) {
        printf("\n");
        fflush(stdout); // before what goes to stderr
    }
    if (!started)
        print_load(session);
    if (!live && !common_options.json)
        print_batch(outputs, count);
    if (options.prompts.count || options.messages)
        print_rates(&figures, generations, count);
    return common_options.json ? print_json(outputs, generations, count, err) : 0;
}

static void clear_output(struct output *o)
{
    tokenizer_stream_free(o->stream);
    free(o->prompt.ids);
    free(o->text);
    free(o->ids);
    *o = (struct output){0};
}

// One line of standard input a turn; the model sees all turns so far.
static int run_conversation(struct session *session, const struct chat *chat, struct error *err)
{
    struct output output = {0};
    char *line = NULL;
    size_t bytes;
    json_t *messages = NULL;
    int rc = generate_chat_begin(&messages, options.system, err);
    while (!rc && (rc = generate_chat_line(&line, &bytes, err)) == 0 && line) {
        if ((rc = generate_chat_add(messages, "user", line, bytes, err)) ||
            (rc = run_prompts(session, chat, messages, &output, 1, err)) ||
            (rc = generate_chat_add(messages, "assistant", output.text ? output.text : "", output.bytes, err)))
            break;
        clear_output(&output);
    }
    clear_output(&output);
    free(line);
    json_decref(messages);
    return rc;
}

static int check_options(struct error *err)
{
    bool chat = options.chat || options.messages;
    if (options.prompts.count == 0 && !chat)
        return error_set(err, ERR_USAGE, "generate needs --prompt TEXT, or --prompt - for standard input, or --chat");
    if (options.system && (!chat || options.messages))
        return error_set(err, ERR_USAGE,
                         "--system goes with --chat, and not with --messages, which holds all messages");
    if (options.messages && options.prompts.count)
        return error_set(err, ERR_USAGE, "--messages and --prompt cannot be given together");
    if (chat && !options.prompts.count && !options.messages && (common_options.json || options.ids))
        return error_set(err, ERR_USAGE, "--json and --ids need --prompt or --messages");
    return 0;
}

// Whether someone may still be typing: no rank runs then, so that a signal ends the program at once.
static bool waits_for_input(void)
{
    bool waits = options.prompts.count == 0 && !options.messages;
    for (int i = 0; i < options.prompts.count; i++)
        waits |= strcmp(options.prompts.items[i], "-") == 0;
    return waits;
}

// The ranks load while the prompts are made. What can be found wrong in no time is said before; to fetch the chat's files across a network first
// would hold up the load.
static int launch_with_chat(struct session *session, struct chat **chat, struct error *err)
{
    struct store *store = session_store(session);
    bool wants_chat = options.chat || options.messages, first = !store_is_remote(store);
    int rc = wants_chat && first ? store_chat(chat, store, session_manifest(session), err) : 0;
    if (!rc && !waits_for_input())
        rc = session_launch(session, err);
    if (!rc && wants_chat && !first)
        rc = store_chat(chat, store, session_manifest(session), err);
    return rc;
}

int generate_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct session *session = NULL;
    struct chat *chat = NULL;
    json_t *messages = NULL;
    int count = options.prompts.count > 0 ? options.prompts.count : 1, rc = check_options(err);
    if (rc)
        return rc;
    struct output *outputs = calloc((size_t)count, sizeof *outputs);
    if (!outputs)
        return error_set(err, ERR_MEMORY, "no memory for %d prompts", count);
    if ((rc = choose_store(&session_options.store, argv[0], err)) ||
        (rc = session_open(&session, argv[0], &session_options, count, 0, err)) ||
        (options.messages && (rc = generate_chat_read(&messages, options.messages, err))) ||
        (rc = launch_with_chat(session, &chat, err)))
        goto done;
    if (messages || options.prompts.count)
        rc = run_prompts(session, chat, messages, outputs, count, err);
    else
        rc = run_conversation(session, chat, err);
    if (!rc)
        rc = print_timings(session, err);
done:
    for (int i = 0; i < count; i++)
        clear_output(&outputs[i]);
    free(outputs);
    json_decref(messages);
    chat_close(chat);
    session_close(session);
    return rc;
}

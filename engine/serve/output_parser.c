// See output_parser.h. Text is taken byte by byte; what may still become a mark or a call is held back, and comes as content if it does not.
// Nothing is looked at twice, so the time is linear in the text, and what is held is bounded.
#include "engine/serve/output_parser.h"

#include "engine/serve/output_call.h"
#include "engine/serve/output_channels.h"

#include <stdlib.h>
#include <string.h>

enum { HELD_BYTES = 64 << 10, HELD_BLANK_BYTES = 256, OUT_BYTES = 1024 };

enum mark {
    MARK_THINK,
    MARK_THINK_END,
    MARK_CALL,
    MARK_CALL_END,
    MARK_CALLS,
    MARK_PYTHON,
    MARK_ARGS,
    MARK_ID,
    // Harmony's:
    MARK_START,
    MARK_CHANNEL,
    MARK_CONSTRAIN,
    MARK_MESSAGE,
    MARK_ENDS,
    MARK_ENDS_CALL,
    MARK_RETURNS
};
// The first byte of a mark occurs in it nowhere else: where a mark breaks off, another one can begin only with the byte that broke it.
const char *const output_marks[OUTPUT_MARKS] = {
    [MARK_THINK] = "<think>",
    [MARK_THINK_END] = "</think>",
    [MARK_CALL] = "<tool_call>",
    [MARK_CALL_END] = "</tool_call>",
    [MARK_CALLS] = "[TOOL_CALLS]",
    [MARK_PYTHON] = "<|python_tag|>",
    [MARK_ARGS] = "[ARGS]",
    [MARK_ID] = "[CALL_ID]",
    [MARK_START] = "<|start|>",
    [MARK_CHANNEL] = "<|channel|>",
    [MARK_CONSTRAIN] = "<|constrain|>",
    [MARK_MESSAGE] = "<|message|>",
    [MARK_ENDS] = "<|end|>",
    [MARK_ENDS_CALL] = "<|call|>",
    [MARK_RETURNS] = "<|return|>",
};

enum state {
    IN_TEXT,
    IN_REASONING,
    IN_CALLS, // behind [TOOL_CALLS]: a list, an object or a name
    IN_NAME,  // [TOOL_CALLS]name, up to [ARGS]
    IN_ID,    // behind [CALL_ID]
    IN_CALL,  // an object
    IN_LIST,  // behind a call of a list
    // Harmony: the head of a message, behind a message, arguments of a call; else what a message says or thinks.
    IN_HEAD,
    IN_BETWEEN,
    IN_ARGUMENTS,
};

struct output_parser {
    struct output_format format;
    bool tools;
    output_delta_fn *emit;
    void *arg;
    enum state state;
    bool fresh;      // nothing but blanks since the beginning, or since the reasoning
    bool thought;    // the reasoning is over
    bool after_call; // nothing but blanks since a call
    bool in_list;
    char *held; // not decided yet
    size_t held_bytes, held_capacity;
    size_t mark_bytes; // at the end of held: the beginning of a mark
    char name[OUTPUT_CALL_NAME_BYTES];
    size_t name_bytes;
    struct output_call call;
    struct output_head head;
    bool head_begun; // by a mark: else it may be text without any
    bool has_arguments;
    int calls;
    char out[OUT_BYTES + 8]; // of one delta that is being put together
    size_t out_bytes;
    int out_type;
    bool no_memory;
};

// ---- formats -----------------------------------------------------------------------------------------------------

struct output_format output_format_find(const char *text)
{
    struct output_format format = {TOOLS_NONE, strstr(text, "</think>") != NULL};
    // Qwen3-Coder and GLM have the same tags around calls that are no JSON.
    bool tagged = strstr(text, "<function=") || strstr(text, "<arg_key>");
    if (strstr(text, "<|channel|>") && strstr(text, "<|message|>"))
        format = (struct output_format){TOOLS_HARMONY, true};
    else if (strstr(text, "[TOOL_CALLS]"))
        format.tools = strstr(text, "[ARGS]") ? TOOLS_MISTRAL_V11 : TOOLS_MISTRAL;
    else if (strstr(text, "<tool_call>") && strstr(text, "arguments") && !tagged)
        format.tools = TOOLS_HERMES;
    else if (strstr(text, "\"parameters\"") && strstr(text, "ipython"))
        format.tools = TOOLS_LLAMA3;
    return format;
}

bool output_format_has(struct output_format format, int mark)
{
    return (format.tools == TOOLS_HARMONY) == (mark >= MARK_START);
}

// ---- out ---------------------------------------------------------------------------------------------------------

static void give(struct output_parser *parser, int type, const char *text, size_t bytes)
{
    struct output_delta delta = {.text = text, .bytes = bytes, .tool = parser->calls ? parser->calls - 1 : 0};
    delta.type = (unsigned)type;
    parser->emit(parser->arg, &delta);
}

static void flush(struct output_parser *parser)
{
    if (parser->out_bytes)
        give(parser, parser->out_type, parser->out, parser->out_bytes);
    parser->out_bytes = 0;
}

// A delta ends with a whole character, where the text is UTF-8.
static void put(struct output_parser *parser, int type, const char *text, size_t bytes)
{
    if (type != parser->out_type)
        flush(parser);
    parser->out_type = type;
    for (size_t i = 0; i < bytes; i++) {
        bool begins = ((unsigned char)text[i] & 0xC0) != 0x80;
        if ((parser->out_bytes >= OUT_BYTES && begins) || parser->out_bytes == sizeof parser->out)
            flush(parser);
        parser->out[parser->out_bytes++] = text[i];
    }
}

static void hold(struct output_parser *parser, char byte)
{
    if (parser->held_bytes == parser->held_capacity) {
        size_t capacity = 2 * parser->held_capacity + 64;
        char *held = realloc(parser->held, capacity);
        if (!held) {
            parser->no_memory = true;
            return;
        }
        parser->held = held;
        parser->held_capacity = capacity;
    }
    parser->held[parser->held_bytes++] = byte;
}

static void drop_held(struct output_parser *parser) { parser->held_bytes = parser->mark_bytes = 0; }

static void release_held(struct output_parser *parser)
{
    int type = parser->state == IN_REASONING   ? DELTA_REASONING
               : parser->state == IN_ARGUMENTS ? DELTA_TOOL_ARGUMENTS
                                               : DELTA_CONTENT;
    put(parser, type, parser->held, parser->held_bytes);
    drop_held(parser);
}

// ---- calls -------------------------------------------------------------------------------------------------------

static void take(struct output_parser *parser, char byte);

static void call_begins(void *arg, const char *name, size_t bytes)
{
    struct output_parser *parser = arg;
    drop_held(parser);
    flush(parser);
    parser->calls++;
    give(parser, DELTA_TOOL_BEGIN, name, bytes);
}

static void call_continues(void *arg, const char *text, size_t bytes) { put(arg, DELTA_TOOL_ARGUMENTS, text, bytes); }

static struct output_call_sink sink_of(struct output_parser *parser)
{
    return (struct output_call_sink){call_begins, call_continues, parser};
}

static void end_call(struct output_parser *parser)
{
    flush(parser);
    give(parser, DELTA_TOOL_END, "", 0);
}

static void begin_call(struct output_parser *parser)
{
    output_call_start(&parser->call, sink_of(parser), parser->format.tools == TOOLS_LLAMA3);
    parser->state = IN_CALL;
}

// What was held is content after all.
static void no_call(struct output_parser *parser)
{
    parser->state = IN_TEXT;
    parser->fresh = parser->after_call = parser->in_list = false;
    release_held(parser);
}

static void take_call(struct output_parser *parser, char byte)
{
    enum output_call_step step = output_call_take(&parser->call, byte);
    if (step == OUTPUT_CALL_NO_MEMORY)
        parser->no_memory = true;
    if (!parser->call.begun && step != OUTPUT_CALL_BAD)
        hold(parser, byte);
    if (step == OUTPUT_CALL_END) {
        end_call(parser);
        parser->state = parser->in_list ? IN_LIST : IN_TEXT;
        parser->after_call = true;
        parser->fresh = false;
    } else if (step == OUTPUT_CALL_BAD || step == OUTPUT_CALL_BAD_ENDS || parser->held_bytes > HELD_BYTES) {
        if (parser->call.begun)
            end_call(parser); // cut short: what was passed on can not be taken back
        no_call(parser);
        if (step == OUTPUT_CALL_BAD)
            take(parser, byte);
    }
}

static bool is_blank(char byte) { return byte == ' ' || byte == '\n' || byte == '\t' || byte == '\r'; }

static bool in_name(char byte) { return byte && strchr(OUTPUT_NAME_BYTES, byte); }

static void take_calls(struct output_parser *parser, char byte)
{
    if (byte == '{') {
        begin_call(parser);
        take_call(parser, byte);
    } else if (is_blank(byte) || (byte == '[' && !parser->in_list)) {
        hold(parser, byte);
        parser->in_list |= byte == '[';
    } else if (in_name(byte) && !parser->in_list) {
        parser->state = IN_NAME;
        parser->name_bytes = 0;
        take(parser, byte);
    } else {
        no_call(parser);
        take(parser, byte);
    }
    if (parser->held_bytes > HELD_BYTES)
        no_call(parser);
}

static void take_list(struct output_parser *parser, char byte)
{
    if (byte == ',') {
        hold(parser, byte);
        parser->state = IN_CALLS;
    } else if (byte == ']') {
        drop_held(parser);
        parser->state = IN_TEXT;
        parser->in_list = false;
    } else if (is_blank(byte) && parser->held_bytes < HELD_BLANK_BYTES)
        hold(parser, byte);
    else {
        no_call(parser);
        take(parser, byte);
    }
}

// ---- marks -------------------------------------------------------------------------------------------------------

static bool expected(const struct output_parser *parser, enum mark mark)
{
    enum tool_format tools = parser->tools ? parser->format.tools : TOOLS_NONE;
    if (!output_format_has(parser->format, mark))
        return false;
    bool text = parser->state == IN_TEXT, mistral = tools == TOOLS_MISTRAL || tools == TOOLS_MISTRAL_V11;
    switch (mark) {
    case MARK_THINK:
        return text && parser->format.reasoning && parser->fresh && !parser->thought;
    case MARK_THINK_END:
        return parser->state == IN_REASONING;
    case MARK_CALL:
        return text && tools == TOOLS_HERMES;
    case MARK_CALL_END:
        return text && tools == TOOLS_HERMES && parser->after_call;
    case MARK_CALLS:
        return text && mistral;
    case MARK_PYTHON:
        return text && tools == TOOLS_LLAMA3;
    case MARK_ID:
        return parser->state == IN_NAME;
    case MARK_START:
    case MARK_CHANNEL:
        return true;
    case MARK_CONSTRAIN:
    case MARK_MESSAGE:
        return parser->state == IN_HEAD;
    case MARK_ENDS:
    case MARK_ENDS_CALL:
    case MARK_RETURNS:
        return parser->state != IN_BETWEEN;
    default:
        return parser->state == IN_NAME || parser->state == IN_ID;
    }
}

enum { NO_MARK = -1, PART_OF_MARK = -2 };

// With this byte behind what is held: a whole mark, the beginning of one, or neither.
static int match(const struct output_parser *parser, char byte)
{
    const char *begun = parser->held_bytes ? parser->held + parser->held_bytes - parser->mark_bytes : "";
    for (int i = 0; i < OUTPUT_MARKS; i++) {
        const char *mark = output_marks[i];
        if (byte && strncmp(mark, begun, parser->mark_bytes) == 0 && mark[parser->mark_bytes] == byte &&
            expected(parser, (enum mark)i))
            return mark[parser->mark_bytes + 1] ? PART_OF_MARK : i;
    }
    return NO_MARK;
}

static void reach_mark(struct output_parser *parser, enum mark mark)
{
    parser->mark_bytes = 0;
    switch (mark) {
    case MARK_THINK:
        drop_held(parser);
        parser->state = IN_REASONING;
        break;
    case MARK_THINK_END:
        drop_held(parser);
        parser->state = IN_TEXT;
        parser->thought = parser->fresh = true;
        break;
    case MARK_CALL_END:
        drop_held(parser);
        break;
    case MARK_CALLS:
        parser->state = IN_CALLS;
        break;
    case MARK_ID:
        parser->state = IN_ID;
        break;
    case MARK_ARGS:
        output_call_start_arguments(&parser->call, sink_of(parser), parser->name, parser->name_bytes);
        parser->state = IN_CALL;
        break;
    default:
        begin_call(parser);
        break;
    }
}

// ---- text --------------------------------------------------------------------------------------------------------

static void take_name(struct output_parser *parser, char byte)
{
    bool room = parser->name_bytes < sizeof parser->name, named = parser->state == IN_NAME;
    if (parser->mark_bytes || !in_name(byte) || !room) {
        no_call(parser);
        take(parser, byte);
        return;
    }
    hold(parser, byte);
    if (named)
        parser->name[parser->name_bytes++] = byte;
    else if (parser->held_bytes > HELD_BLANK_BYTES + sizeof parser->name)
        no_call(parser);
}

static void take_blank(struct output_parser *parser, char byte)
{
    bool wanted = parser->tools || parser->state == IN_REASONING || parser->fresh;
    if (parser->fresh && (parser->thought || parser->state == IN_REASONING))
        return; // around the marks of reasoning
    hold(parser, byte);
    if (!wanted || parser->held_bytes >= HELD_BLANK_BYTES)
        release_held(parser);
}

static void take_text(struct output_parser *parser, char byte)
{
    bool llama = parser->state == IN_TEXT && parser->tools && parser->format.tools == TOOLS_LLAMA3;
    if (is_blank(byte)) {
        take_blank(parser, byte);
    } else if (llama && byte == '{' && (parser->fresh || parser->after_call)) {
        begin_call(parser);
        take_call(parser, byte);
    } else if (llama && byte == ';' && parser->after_call && parser->held_bytes < HELD_BLANK_BYTES) {
        hold(parser, byte);
    } else {
        hold(parser, byte);
        release_held(parser);
        parser->fresh = parser->after_call = false;
    }
}

// ---- channels ----------------------------------------------------------------------------------------------------

// What was held is content after all.
static void no_message(struct output_parser *parser)
{
    parser->state = IN_TEXT;
    release_held(parser);
}

static void end_message(struct output_parser *parser)
{
    if (parser->state == IN_ARGUMENTS) {
        if (!parser->has_arguments)
            put(parser, DELTA_TOOL_ARGUMENTS, "{}", 2);
        end_call(parser);
    }
    parser->state = IN_BETWEEN;
}

static void begin_head(struct output_parser *parser)
{
    if (parser->state != IN_BETWEEN)
        end_message(parser);
    parser->head = (struct output_head){0};
    parser->head_begun = true;
    parser->state = IN_HEAD;
}

static void begin_message(struct output_parser *parser)
{
    const char *name;
    size_t bytes;
    enum output_message message = output_head_message(&parser->head, &name, &bytes);
    drop_held(parser);
    parser->state = message == MESSAGE_REASONING ? IN_REASONING : IN_TEXT;
    if (message != MESSAGE_CALL || !parser->tools)
        return;
    parser->state = IN_ARGUMENTS;
    parser->has_arguments = false;
    call_begins(parser, name, bytes);
}

static void reach_channel_mark(struct output_parser *parser, enum mark mark)
{
    parser->mark_bytes = 0;
    switch (mark) {
    case MARK_START:
        begin_head(parser);
        break;
    case MARK_CHANNEL:
        if (parser->state != IN_HEAD)
            begin_head(parser);
        parser->head_begun = true;
        output_head_channel(&parser->head);
        break;
    case MARK_CONSTRAIN:
        parser->head.bounded = true;
        break;
    case MARK_MESSAGE:
        begin_message(parser);
        break;
    default:
        end_message(parser);
        drop_held(parser);
        break;
    }
}

// Text that no mark announced as a head: only a recipient may stand there.
static bool may_be_head(const struct output_parser *parser)
{
    static const char recipient[] = "to=";
    const struct output_head *head = &parser->head;
    size_t blanks = 0, most = sizeof recipient - 1;
    while (blanks < head->bytes && is_blank(head->text[blanks]))
        blanks++;
    if (most > head->bytes - blanks)
        most = head->bytes - blanks;
    return parser->head_begun || memcmp(head->text + blanks, recipient, most) == 0;
}

static void take_channels(struct output_parser *parser, char byte)
{
    int mark = match(parser, byte);
    if (mark == NO_MARK && parser->mark_bytes) { // what was begun is none
        bool outside = parser->state == IN_HEAD || parser->state == IN_BETWEEN;
        parser->has_arguments = true;
        (outside ? no_message : release_held)(parser);
        mark = match(parser, byte);
    }
    hold(parser, byte);
    if (mark != NO_MARK) {
        parser->mark_bytes++;
        if (mark != PART_OF_MARK)
            reach_channel_mark(parser, (enum mark)mark);
    } else if (parser->state == IN_HEAD) {
        if (!output_head_take(&parser->head, byte) || !may_be_head(parser))
            no_message(parser);
    } else if (parser->state == IN_BETWEEN) {
        if (!is_blank(byte) || parser->held_bytes >= HELD_BLANK_BYTES)
            no_message(parser);
    } else {
        parser->has_arguments |= !is_blank(byte);
        release_held(parser);
    }
}

static void take(struct output_parser *parser, char byte)
{
    if (parser->format.tools == TOOLS_HARMONY) {
        take_channels(parser, byte);
    } else if (parser->state == IN_CALL) {
        take_call(parser, byte);
    } else if (parser->state == IN_CALLS) {
        take_calls(parser, byte);
    } else if (parser->state == IN_LIST) {
        take_list(parser, byte);
    } else {
        int mark = match(parser, byte);
        if (mark == NO_MARK && parser->mark_bytes && parser->state <= IN_REASONING) { // what was begun is none
            parser->fresh = parser->after_call = false;
            release_held(parser);
            mark = match(parser, byte);
        }
        if (mark != NO_MARK) {
            hold(parser, byte);
            parser->mark_bytes++;
            if (mark != PART_OF_MARK)
                reach_mark(parser, (enum mark)mark);
        } else if (parser->state == IN_NAME || parser->state == IN_ID) {
            take_name(parser, byte);
        } else {
            take_text(parser, byte);
        }
    }
}

// ---- the whole ---------------------------------------------------------------------------------------------------

int output_parser_create(struct output_parser **out, struct output_format format, bool tools, bool starts_in_reasoning,
                         output_delta_fn *on_delta, void *arg, struct error *err)
{
    struct output_parser *parser = calloc(1, sizeof *parser);
    if (!parser)
        return error_set(err, ERR_MEMORY, "no memory for a parser of output");
    parser->format = format;
    parser->tools = tools && format.tools != TOOLS_NONE;
    parser->emit = on_delta;
    parser->arg = arg;
    parser->state = format.reasoning && starts_in_reasoning ? IN_REASONING : IN_TEXT;
    parser->fresh = true;
    if (format.tools == TOOLS_HARMONY)
        parser->state = IN_HEAD; // the prompt has begun it
    *out = parser;
    return 0;
}

void output_parser_free(struct output_parser *parser)
{
    if (!parser)
        return;
    output_call_clear(&parser->call);
    free(parser->held);
    free(parser);
}

static int finish(struct output_parser *parser, struct error *err)
{
    flush(parser);
    return parser->no_memory ? error_set(err, ERR_MEMORY, "no memory for the output") : 0;
}

int output_parser_push(struct output_parser *parser, const char *text, size_t bytes, struct error *err)
{
    for (size_t i = 0; i < bytes && !parser->no_memory; i++)
        take(parser, text[i]);
    return finish(parser, err);
}

int output_parser_finish(struct output_parser *parser, struct error *err)
{
    bool between =
        parser->state == IN_TEXT || parser->state == IN_LIST || (parser->state == IN_CALLS && parser->in_list);
    bool head = (parser->state == IN_HEAD && parser->head_begun) || parser->state == IN_BETWEEN;
    bool unsaid =
        head || (parser->after_call && between); // a message that never began; blanks and separators behind a call
    if (parser->state == IN_CALL && parser->call.begun)
        end_call(parser);
    else if (unsaid && !parser->mark_bytes)
        drop_held(parser);
    else
        release_held(parser);
    if (parser->state == IN_ARGUMENTS)
        end_message(parser);
    return finish(parser, err);
}

int output_parser_tool_calls(const struct output_parser *parser) { return parser->calls; }

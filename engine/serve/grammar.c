// Pieces of a grammar, put together and compiled to a language of the cache. See grammar.h.
#include "engine/serve/grammar_internal.h"

#include "engine/serve/grammar_regex.h"
#include "engine/serve/grammar_schema.h"
#include "formats/memory_stream.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum piece_kind {
    PIECE_TEXT = 'T',
    PIECE_UNTIL = 'U',
    PIECE_MARKER = 'M',
    PIECE_REGEX = 'R',
    PIECE_SCHEMA = 'S',
    PIECE_JSON = 'J',
    PIECE_OBJECT = 'O',
    PIECE_BEGIN = '(',
    PIECE_OR = '|',
    PIECE_END = ')',
};

struct piece {
    enum piece_kind kind;
    char *text; // UNTIL, REGEX and so on; END: the separator
    char *path;
    json_t *schema;
    int64_t min, max;
};

enum { MAX_GROUPS_DEEP = 16, MAX_REPEAT = 1000, MAX_KEY_BYTES = 1 << 20 };

struct grammar {
    struct vocabulary *vocabulary;
    struct piece *pieces;
    size_t count, capacity;
    struct grammar_language *language; // once compiled
    bool no_memory;
    bool refused; // compiling has failed
};

// ---- pieces --------------------------------------------------------------------------------------------------------

int grammar_create(struct grammar **out, struct vocabulary *vocabulary, struct error *err)
{
    struct grammar *grammar = calloc(1, sizeof *grammar);
    if (!grammar)
        return error_set(err, ERR_MEMORY, "out of memory for a grammar");
    grammar->vocabulary = vocabulary;
    *out = grammar;
    return 0;
}

static void clear_pieces(struct grammar *grammar)
{
    for (size_t i = 0; i < grammar->count; i++) {
        free(grammar->pieces[i].text);
        free(grammar->pieces[i].path);
        json_decref(grammar->pieces[i].schema);
    }
    free(grammar->pieces);
    grammar->pieces = NULL;
    grammar->count = grammar->capacity = 0;
}

void grammar_free(struct grammar *grammar)
{
    if (!grammar)
        return;
    if (grammar->language)
        grammar_cache_release(grammar->language);
    clear_pieces(grammar);
    free(grammar);
}

static struct piece *add(struct grammar *grammar, enum piece_kind kind, const char *text, const char *path)
{
    if (grammar->count == grammar->capacity) {
        size_t capacity = grammar->capacity ? 2 * grammar->capacity : 16;
        struct piece *pieces = realloc(grammar->pieces, capacity * sizeof *pieces);
        if (!pieces) {
            grammar->no_memory = true;
            return NULL;
        }
        grammar->pieces = pieces;
        grammar->capacity = capacity;
    }
    struct piece *piece = &grammar->pieces[grammar->count++];
    *piece = (struct piece){.kind = kind, .text = text ? strdup(text) : NULL, .path = path ? strdup(path) : NULL};
    grammar->no_memory |= (text && !piece->text) || (path && !piece->path);
    return piece;
}

void grammar_text(struct grammar *grammar, const char *text) { add(grammar, PIECE_TEXT, text, NULL); }
void grammar_marker(struct grammar *grammar, const char *content) { add(grammar, PIECE_MARKER, content, NULL); }
void grammar_until(struct grammar *grammar, const char *text) { add(grammar, PIECE_UNTIL, text, NULL); }
void grammar_blank(struct grammar *grammar) { add(grammar, PIECE_REGEX, "\\n{0,2}| ", "blank"); }
void grammar_begin(struct grammar *grammar) { add(grammar, PIECE_BEGIN, NULL, NULL); }
void grammar_or(struct grammar *grammar) { add(grammar, PIECE_OR, NULL, NULL); }

void grammar_json(struct grammar *grammar, bool object_only)
{
    add(grammar, object_only ? PIECE_OBJECT : PIECE_JSON, NULL, NULL);
}

void grammar_regex(struct grammar *grammar, const char *expression, const char *path)
{
    add(grammar, PIECE_REGEX, expression, path);
}

void grammar_schema(struct grammar *grammar, const json_t *schema, const char *path)
{
    struct piece *piece = add(grammar, PIECE_SCHEMA, NULL, path);
    if (piece)
        piece->schema = json_incref((json_t *)schema);
}

void grammar_end(struct grammar *grammar, int64_t min, int64_t max, const char *separator)
{
    struct piece *piece = add(grammar, PIECE_END, separator, NULL);
    if (piece) {
        piece->min = min;
        piece->max = max;
    }
}

// ---- building, from the last piece to the first -------------------------------------------------------------------

struct building {
    const struct grammar *grammar;
    struct net *net;
    struct grammar_base base;
    size_t left; // pieces in front of the current one
    int depth;
    struct error *err;
    int rc;
};

static uint32_t build_marker(struct building *b, const char *content, uint32_t next)
{
    static const char mark = (char)VOCABULARY_MARK;
    uint32_t node = grammar_net_text(b->net, content, strlen(content), next);
    return vocabulary_has_special(b->grammar->vocabulary, content) ? grammar_net_text(b->net, &mark, 1, node) : node;
}

// Knuth, Morris and Pratt: state n has seen the first n bytes of the text.
static uint32_t build_until(struct building *b, const char *text, uint32_t next)
{
    size_t length = strlen(text);
    uint32_t states[256], special = NET_NOTHING;
    uint8_t border[256] = {0}; // border[n]: longest proper prefix of the first n bytes that ends them too
    if (!length || length >= 256) {
        b->rc = error_set(b->err, ERR_USAGE, "a text that ends free text must have 1 to 255 bytes");
        return NET_NOTHING;
    }
    for (size_t n = 1, k = 0; n < length; border[++n] = (uint8_t)k) {
        while (k && text[n] != text[k])
            k = border[k];
        k += text[n] == text[k];
    }
    if (vocabulary_has_special(b->grammar->vocabulary, text))
        special = grammar_net_text(b->net, text, length, next);
    for (size_t n = 0; n < length; n++)
        states[n] = grammar_net_later(b->net);
    for (size_t n = 0; n < length; n++) {
        uint32_t node = grammar_net_begin(b->net, NET_BYTES), target = 0;
        int begin = 0;
        for (int byte = 0; byte <= VOCABULARY_MARK; byte++) {
            size_t k = n;
            while (k && (uint8_t)text[k] != byte)
                k = border[k];
            k += (uint8_t)text[k] == byte;
            bool in_text = byte < 0xC0 || (byte > 0xC1 && byte < 0xF5); // as far as one byte tells
            uint32_t to = byte == VOCABULARY_MARK ? special : !in_text ? NET_NOTHING : k == length ? next : states[k];
            if (byte && to != target) {
                grammar_net_edge(b->net, node, (uint8_t)begin, (uint8_t)(byte - 1), target);
                begin = byte;
            }
            target = to;
        }
        grammar_net_edge(b->net, node, VOCABULARY_MARK, VOCABULARY_MARK, special);
        grammar_net_set(b->net, states[n], node);
    }
    return states[0];
}

static uint32_t build_pieces(struct building *b, uint32_t next);

// The alternatives of a group whose end was just passed.
static uint32_t build_alternatives(struct building *b, uint32_t next)
{
    uint32_t result = NET_NOTHING;
    if (++b->depth > MAX_GROUPS_DEEP) {
        b->rc = error_set(b->err, ERR_USAGE, "groups of a grammar are nested too deeply");
        return NET_NOTHING;
    }
    for (;;) {
        result = grammar_net_either(b->net, build_pieces(b, next), result);
        if (b->rc)
            return NET_NOTHING;
        if (!b->left) {
            b->rc = error_set(b->err, ERR_USAGE, "a group of a grammar has no beginning");
            return NET_NOTHING;
        }
        if (b->grammar->pieces[--b->left].kind == PIECE_BEGIN)
            break;
    }
    b->depth--;
    return result;
}

static uint32_t build_group(struct building *b, const struct piece *end, uint32_t next)
{
    struct net *net = b->net;
    size_t bytes = strlen(end->text);
    if (end->min == 1 && end->max == 1)
        return build_alternatives(b, next);
    if (end->min < 0 || end->min > MAX_REPEAT || end->max > MAX_REPEAT || end->max < -1 ||
        (end->max >= 0 && end->max < end->min)) {
        b->rc = error_set(b->err, ERR_USAGE, "a group of a grammar is repeated %lld to %lld times", (long long)end->min,
                          (long long)end->max);
        return NET_NOTHING;
    }
    uint32_t rule = build_alternatives(b, NET_ACCEPT_NODE), after = next;
    if (end->max < 0) {
        after = grammar_net_later(net);
        uint32_t again = grammar_net_text(net, end->text, bytes, grammar_net_call(net, rule, after));
        grammar_net_set(net, after, grammar_net_either(net, again, next));
    }
    // Once more than needed where there is no limit: then `after` may follow each time.
    int64_t times = end->max < 0 ? (end->min ? end->min : 1) : end->max;
    for (int64_t i = times; i > 0; i--) {
        uint32_t one = grammar_net_call(net, rule, after);
        if (i > 1)
            one = grammar_net_text(net, end->text, bytes, one);
        after = i > end->min ? grammar_net_either(net, one, next) : one;
    }
    return after;
}

static uint32_t build_piece(struct building *b, const struct piece *piece, uint32_t next)
{
    uint32_t rule = NET_NOTHING;
    struct error why;
    switch (piece->kind) {
    case PIECE_TEXT:
        return grammar_net_text(b->net, piece->text, strlen(piece->text), next);
    case PIECE_MARKER:
        return build_marker(b, piece->text, next);
    case PIECE_UNTIL:
        return build_until(b, piece->text, next);
    case PIECE_JSON:
        return grammar_net_call(b->net, b->base.value, next);
    case PIECE_OBJECT:
        return grammar_net_call(b->net, b->base.object, next);
    case PIECE_SCHEMA:
        b->rc = grammar_schema_build(b->net, &b->base, piece->schema, piece->path, &rule, b->err);
        return grammar_net_call(b->net, rule, next);
    case PIECE_REGEX:
        b->rc =
            grammar_regex_build(b->net, piece->text, strlen(piece->text), REGEX_PLAIN, REGEX_WHOLE, next, &rule, &why);
        if (b->rc)
            error_set(b->err, b->rc, "%s: the regular expression cannot be used: %s", piece->path, why.msg);
        return rule;
    default:
        return build_group(b, piece, next);
    }
}

// Pieces back to the beginning of their group or alternative.
static uint32_t build_pieces(struct building *b, uint32_t next)
{
    while (b->left > 0 && !b->rc) {
        const struct piece *piece = &b->grammar->pieces[b->left - 1];
        if (piece->kind == PIECE_BEGIN || piece->kind == PIECE_OR)
            break;
        b->left--;
        next = build_piece(b, piece, next);
    }
    return next;
}

// ---- compiling -----------------------------------------------------------------------------------------------------

static const char *first_path(const struct grammar *grammar)
{
    for (size_t i = 0; i < grammar->count; i++)
        if (grammar->pieces[i].kind == PIECE_SCHEMA || grammar->pieces[i].kind == PIECE_REGEX)
            return grammar->pieces[i].path;
    return "grammar";
}

static int build_language(const struct grammar *grammar, struct grammar_language *language, struct error *err)
{
    struct net *net = &language->net;
    struct building b = {.grammar = grammar, .net = net, .left = grammar->count, .err = err};
    if (grammar_net_init(net))
        return error_set(err, ERR_MEMORY, "out of memory for a grammar");
    grammar_schema_base(net, &b.base);
    language->base_nodes = net->num_nodes;
    net->start = build_pieces(&b, NET_ACCEPT_NODE);
    if (!b.rc && b.left)
        b.rc = error_set(err, ERR_USAGE, "a group of a grammar has no end");
    if (b.rc)
        return b.rc;
    if (net->failed == ERR_USAGE)
        return error_set(err, ERR_USAGE, "%s: the schema is too large", first_path(grammar));
    if (net->failed || !grammar_net_finish(net))
        return error_set(err, ERR_MEMORY, "out of memory for a grammar");
    if (net->start == NET_NOTHING || net->nodes[net->start].height == NET_NO_HEIGHT)
        return error_set(err, ERR_USAGE, "%s: no text can satisfy it", first_path(grammar));
    return 0;
}

// All that the language depends on. NULL: out of memory.
static char *make_key(const struct grammar *grammar, size_t *bytes)
{
    struct memory_stream memory;
    bool failed = false;
    if (!memory_stream_open(&memory))
        return NULL;
    FILE *out = memory.out;
    for (size_t i = 0; i < grammar->count; i++) {
        const struct piece *piece = &grammar->pieces[i];
        fprintf(out, "%c%lld,%lld,%zu:%s", piece->kind, (long long)piece->min, (long long)piece->max,
                piece->text ? strlen(piece->text) : 0, piece->text ? piece->text : "");
        failed |= piece->schema && json_dumpf(piece->schema, out, JSON_COMPACT | JSON_ENCODE_ANY);
    }
    char *key = memory_stream_close(&memory, bytes);
    if (failed) {
        free(key);
        return NULL;
    }
    return key;
}

static int find_or_build(struct grammar *grammar, struct error *err)
{
    size_t key_bytes = 0;
    int rc;
    char *key = grammar->no_memory ? NULL : make_key(grammar, &key_bytes);
    if (!key)
        return error_set(err, ERR_MEMORY, "out of memory for a grammar");
    if (key_bytes > MAX_KEY_BYTES) {
        free(key);
        return error_set(err, ERR_USAGE, "%s: the schemas have more than %d bytes", first_path(grammar),
                         (int)MAX_KEY_BYTES);
    }
    if ((grammar->language = grammar_cache_find(grammar->vocabulary, key, key_bytes))) {
        free(key);
        return 0;
    }
    struct grammar_language *language = calloc(1, sizeof *language);
    if (!language) {
        free(key);
        return error_set(err, ERR_MEMORY, "out of memory for a grammar");
    }
    language->key = key;
    language->key_bytes = key_bytes;
    language->users = 1;
    if ((rc = build_language(grammar, language, err))) {
        grammar_language_free(language);
        return rc;
    }
    grammar_cache_add(grammar->vocabulary, language);
    grammar->language = language;
    return 0;
}

int grammar_compile(struct grammar *grammar, struct error *err)
{
    if (grammar->language)
        return 0;
    if (grammar->refused)
        return error_set(err, ERR_USAGE, "the grammar was refused before");
    int rc = find_or_build(grammar, err);
    grammar->refused = rc != 0;
    clear_pieces(grammar); // here, not in grammar_free: a large schema takes its time, and this thread has it
    return rc;
}

struct grammar_language *grammar_language(struct grammar *grammar) { return grammar->language; }
struct vocabulary *grammar_vocabulary(struct grammar *grammar) { return grammar->vocabulary; }

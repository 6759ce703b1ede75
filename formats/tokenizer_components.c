// Components of tokenizer.json as steps. See tokenizer_components.h.
//
// Composite components are written as sequences of simple steps, which is exact because every component treats each
// piece on its own:
//   pre_tokenizer ByteLevel  [PREPEND_UNLESS " "] [SPLIT by the GPT-2 pattern, isolated] BYTE_LEVEL
//   pre_tokenizer Metaspace  REPLACE " " by the mark, [PREPEND_UNLESS mark] [SPLIT at the mark, merged with next]
//   pre_tokenizer Digits     SPLIT by \p{N}, isolated or contiguous
#include "formats/tokenizer_components.h"

#include <stdio.h>
#include <string.h>

static const char GPT2_PATTERN[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

enum { MAX_SEQUENCE_DEPTH = 8 };

struct reader {
    struct tokenizer_components *out;
    const char *file;
    uint64_t vocab_size;
    const json_t *special_tokens; // of the template being read
    bool saw_template;
    struct error *err;
};

// Where in the document a component is, for messages: "pre_tokenizer", "pre_tokenizer[1]".
struct place {
    char path[80];
    int depth;
};

static int refuse(const struct reader *r, const struct place *place, const char *type, const char *what)
{
    return error_set(r->err, ERR_MODEL, "%s: %s: %s%s%s", r->file, place->path, type, *type ? ": " : "", what);
}

static const char *type_of(const json_t *component)
{
    const char *type = json_string_value(json_object_get(component, "type"));
    return type ? type : "";
}

static int unsupported_type(const struct reader *r, const struct place *place, const json_t *component)
{
    const char *type = type_of(component);
    if (!*type)
        return refuse(r, place, "", "component without a type");
    return error_set(r->err, ERR_MODEL, "%s: %s of type \"%.60s\" is not supported", r->file, place->path, type);
}

// ---- settings

static int read_bool(const struct reader *r, const struct place *place, const json_t *component, const char *key,
                     bool fallback, bool *out)
{
    const json_t *value = json_object_get(component, key);
    *out = fallback;
    if (!value || json_is_null(value))
        return 0;
    if (!json_is_boolean(value))
        return error_set(r->err, ERR_MODEL, "%s: %s: \"%s\" is not true or false", r->file, place->path, key);
    *out = json_is_true(value);
    return 0;
}

static int read_count(const struct reader *r, const struct place *place, const json_t *component, const char *key,
                      uint32_t *out)
{
    const json_t *value = json_object_get(component, key);
    json_int_t count = json_integer_value(value);
    if (!json_is_integer(value) || count < 0 || count > UINT32_MAX)
        return error_set(r->err, ERR_MODEL, "%s: %s: \"%s\" is not a count", r->file, place->path, key);
    *out = (uint32_t)count;
    return 0;
}

static int store_text(const struct reader *r, const char *text, size_t bytes, uint32_t *offset, uint32_t *stored_bytes)
{
    if (bytes > UINT32_MAX - r->out->text.bytes)
        return error_set(r->err, ERR_MODEL, "%s: the texts of its components exceed 4 GiB", r->file);
    *offset = (uint32_t)r->out->text.bytes;
    *stored_bytes = (uint32_t)bytes;
    return tokenizer_text_append(&r->out->text, text, bytes)
               ? 0
               : error_set(r->err, ERR_MEMORY, "%s: out of memory", r->file);
}

// A step with its text, appended to the list. *op stays valid; NULL text: none.
static int add_op(const struct reader *r, const struct place *place, struct tokenizer_step_list *list,
                  enum tokenizer_op_kind kind, const char *text, size_t bytes, struct tokenizer_op **op)
{
    if (list->count == TOKENIZER_MAX_OPS)
        return refuse(r, place, "", "more than 32 steps");
    *op = &list->ops[list->count++];
    **op = (struct tokenizer_op){.kind = kind};
    return text ? store_text(r, text, bytes, &(*op)->text_offset, &(*op)->text_bytes) : 0;
}

// A step whose text is the string setting "key". single_character: it must be one character.
static int add_op_with_string(const struct reader *r, const struct place *place, struct tokenizer_step_list *list,
                              enum tokenizer_op_kind kind, const json_t *component, const char *key,
                              bool single_character, struct tokenizer_op **op)
{
    const json_t *value = json_object_get(component, key);
    const char *text = json_string_value(value);
    size_t bytes = json_string_length(value);
    if (!text || (single_character && (!bytes || tokenizer_text_last(text, bytes) != bytes)))
        return error_set(r->err, ERR_MODEL, "%s: %s: \"%s\" is not a %s", r->file, place->path, key,
                         single_character ? "character" : "string");
    return add_op(r, place, list, kind, text, bytes, op);
}

// REPLACE or SPLIT with its {"String": ...} or {"Regex": ...}.
static int add_op_with_pattern(const struct reader *r, const struct place *place, struct tokenizer_step_list *list,
                               enum tokenizer_op_kind kind, const json_t *component, struct tokenizer_op **op)
{
    const json_t *pattern = json_object_get(component, "pattern");
    const json_t *literal = json_object_get(pattern, "String"), *regex = json_object_get(pattern, "Regex");
    const json_t *value = literal ? literal : regex;
    if (json_object_size(pattern) != 1 || !json_is_string(value))
        return refuse(r, place, type_of(component), "\"pattern\" is neither a String nor a Regex");
    if (!json_string_length(value))
        return refuse(r, place, type_of(component), "\"pattern\" is empty");
    int rc = add_op(r, place, list, kind, json_string_value(value), json_string_length(value), op);
    (*op)->flags = regex ? OP_REGEX : 0;
    return rc;
}

static int add_replace(const struct reader *r, const struct place *place, struct tokenizer_step_list *list,
                       const json_t *component)
{
    struct tokenizer_op *op = NULL;
    const json_t *content = json_object_get(component, "content");
    if (!json_is_string(content))
        return refuse(r, place, "Replace", "\"content\" is not a string");
    int rc = add_op_with_pattern(r, place, list, OP_REPLACE, component, &op);
    return rc ? rc
              : store_text(r, json_string_value(content), json_string_length(content), &op->content_offset,
                           &op->content_bytes);
}

// ---- the members of a Sequence, or the component itself

typedef int component_function(struct reader *r, const struct place *place, const json_t *component);

static int read_component(struct reader *r, const struct place *place, const json_t *component, const char *members_key,
                          component_function *read_one)
{
    if (json_is_null(component) || !component)
        return 0;
    if (!json_is_object(component))
        return refuse(r, place, "", "not an object");
    if (strcmp(type_of(component), "Sequence"))
        return read_one(r, place, component);
    const json_t *members = json_object_get(component, members_key), *member;
    if (!json_is_array(members))
        return error_set(r->err, ERR_MODEL, "%s: %s: Sequence without \"%s\"", r->file, place->path, members_key);
    if (place->depth == MAX_SEQUENCE_DEPTH)
        return refuse(r, place, "Sequence", "nested too deeply");
    size_t i;
    json_array_foreach(members, i, member)
    {
        struct place inner = {.depth = place->depth + 1};
        snprintf(inner.path, sizeof inner.path, "%.48s[%zu]", place->path, i);
        if (!json_is_object(member))
            return refuse(r, &inner, "", "not an object");
        int rc = read_component(r, &inner, member, members_key, read_one);
        if (rc)
            return rc;
    }
    return 0;
}

// ---- normalizers

static int read_normalizer(struct reader *r, const struct place *place, const json_t *component)
{
    struct tokenizer_step_list *list = &r->out->normalizer;
    struct tokenizer_op *op;
    const char *type = type_of(component);
    if (!strcmp(type, "NFC"))
        return add_op(r, place, list, OP_NFC, NULL, 0, &op);
    if (!strcmp(type, "Prepend"))
        return add_op_with_string(r, place, list, OP_PREPEND, component, "prepend", false, &op);
    if (!strcmp(type, "Replace"))
        return add_replace(r, place, list, component);
    return unsupported_type(r, place, component);
}

// ---- pre-tokenizers

static int read_split(struct reader *r, const struct place *place, const json_t *component)
{
    static const char *const behaviors[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext",
                                            "Contiguous"};
    struct tokenizer_op *op = NULL;
    const char *behavior = json_string_value(json_object_get(component, "behavior"));
    bool invert;
    int rc = read_bool(r, place, component, "invert", false, &invert);
    if (rc || (rc = add_op_with_pattern(r, place, &r->out->pretokenizer, OP_SPLIT, component, &op)))
        return rc;
    op->flags |= invert ? OP_INVERT : 0;
    for (uint32_t i = 0; behavior && i < sizeof behaviors / sizeof *behaviors; i++)
        if (!strcmp(behavior, behaviors[i])) {
            op->behavior = i;
            return 0;
        }
    return refuse(r, place, "Split", "unknown \"behavior\"");
}

static int read_byte_level(struct reader *r, const struct place *place, const json_t *component)
{
    struct tokenizer_step_list *list = &r->out->pretokenizer;
    struct tokenizer_op *op = NULL;
    bool prefix_space, use_regex;
    int rc = read_bool(r, place, component, "add_prefix_space", true, &prefix_space);
    if (rc || (rc = read_bool(r, place, component, "use_regex", true, &use_regex)))
        return rc;
    if (prefix_space && (rc = add_op(r, place, list, OP_PREPEND_UNLESS, " ", 1, &op)))
        return rc;
    if (use_regex) {
        if ((rc = add_op(r, place, list, OP_SPLIT, GPT2_PATTERN, strlen(GPT2_PATTERN), &op)))
            return rc;
        op->flags = OP_REGEX;
        op->behavior = SPLIT_ISOLATED;
    }
    return add_op(r, place, list, OP_BYTE_LEVEL, NULL, 0, &op);
}

enum prepend_scheme { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS };

// The old setting "add_prefix_space": false means never; true says nothing.
static int read_prepend_scheme(struct reader *r, const struct place *place, const json_t *component,
                               enum prepend_scheme *scheme)
{
    static const char *const names[] = {"never", "first", "always"};
    const json_t *value = json_object_get(component, "prepend_scheme");
    bool prefix_space;
    int rc = read_bool(r, place, component, "add_prefix_space", true, &prefix_space);
    if (rc)
        return rc;
    *scheme = prefix_space ? PREPEND_ALWAYS : PREPEND_NEVER;
    if (!value)
        return 0;
    for (int i = PREPEND_NEVER; i <= PREPEND_ALWAYS; i++)
        if (json_is_string(value) && !strcmp(json_string_value(value), names[i])) {
            *scheme = (enum prepend_scheme)i;
            if (!prefix_space && i != PREPEND_NEVER)
                return refuse(r, place, "Metaspace", "\"add_prefix_space\" contradicts \"prepend_scheme\"");
            return 0;
        }
    return refuse(r, place, "Metaspace", "unknown \"prepend_scheme\"");
}

static int read_metaspace(struct reader *r, const struct place *place, const json_t *component)
{
    struct tokenizer_step_list *list = &r->out->pretokenizer;
    struct tokenizer_op *op = NULL;
    enum prepend_scheme scheme;
    bool cut;
    int rc = read_prepend_scheme(r, place, component, &scheme);
    if (rc || (rc = read_bool(r, place, component, "split", true, &cut)) ||
        (rc = add_op(r, place, list, OP_REPLACE, " ", 1, &op)))
        return rc;
    struct tokenizer_op *replacement = op;
    const json_t *mark = json_object_get(component, "replacement");
    if (scheme != PREPEND_NEVER) {
        if ((rc = add_op_with_string(r, place, list, OP_PREPEND_UNLESS, component, "replacement", true, &op)))
            return rc;
        op->flags = scheme == PREPEND_FIRST ? OP_START_ONLY : 0;
    }
    if (cut) {
        if ((rc = add_op_with_string(r, place, list, OP_SPLIT, component, "replacement", true, &op)))
            return rc;
        op->behavior = SPLIT_MERGED_WITH_NEXT;
    }
    if (!json_is_string(mark) || !json_string_length(mark))
        return refuse(r, place, "Metaspace", "\"replacement\" is not a character");
    return store_text(r, json_string_value(mark), json_string_length(mark), &replacement->content_offset,
                      &replacement->content_bytes);
}

static int read_digits(struct reader *r, const struct place *place, const json_t *component)
{
    struct tokenizer_op *op = NULL;
    bool individual;
    int rc = read_bool(r, place, component, "individual_digits", false, &individual);
    if (rc || (rc = add_op(r, place, &r->out->pretokenizer, OP_SPLIT, "\\p{N}", 5, &op)))
        return rc;
    op->flags = OP_REGEX;
    op->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    return 0;
}

static int read_pretokenizer(struct reader *r, const struct place *place, const json_t *component)
{
    static const struct {
        const char *type;
        component_function *read;
    } known[] = {
        {"Split", read_split}, {"ByteLevel", read_byte_level}, {"Metaspace", read_metaspace}, {"Digits", read_digits}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(type_of(component), known[i].type))
            return known[i].read(r, place, component);
    return unsupported_type(r, place, component);
}

// ---- decoders

static int read_decoder(struct reader *r, const struct place *place, const json_t *component)
{
    struct tokenizer_step_list *list = &r->out->decoder;
    struct tokenizer_op *op = NULL;
    const char *type = type_of(component);
    int rc;
    if (!strcmp(type, "ByteLevel"))
        return add_op(r, place, list, OP_BYTE_LEVEL, NULL, 0, &op);
    if (!strcmp(type, "ByteFallback"))
        return add_op(r, place, list, OP_BYTE_FALLBACK, NULL, 0, &op);
    if (!strcmp(type, "Fuse"))
        return add_op(r, place, list, OP_FUSE, NULL, 0, &op);
    if (!strcmp(type, "Replace"))
        return add_replace(r, place, list, component);
    if (!strcmp(type, "Strip")) {
        if ((rc = add_op_with_string(r, place, list, OP_STRIP, component, "content", true, &op)) ||
            (rc = read_count(r, place, component, "start", &op->start)))
            return rc;
        return read_count(r, place, component, "stop", &op->stop);
    }
    if (!strcmp(type, "Metaspace")) {
        enum prepend_scheme scheme;
        if ((rc = read_prepend_scheme(r, place, component, &scheme)) ||
            (rc = add_op_with_string(r, place, list, OP_METASPACE, component, "replacement", true, &op)))
            return rc;
        op->flags = scheme == PREPEND_NEVER ? 0 : OP_DROP_FIRST;
        return 0;
    }
    return unsupported_type(r, place, component);
}

// ---- post-processors

// The ids of one special token of a template, appended in front of or behind the text.
static int add_template_ids(struct reader *r, const struct place *place, const char *name, bool in_front)
{
    uint32_t *ids = in_front ? r->out->prefix_ids : r->out->suffix_ids;
    uint32_t *count = in_front ? &r->out->prefix_count : &r->out->suffix_count;
    const json_t *listed = name ? json_object_get(json_object_get(r->special_tokens, name), "ids") : NULL, *id;
    if (!json_is_array(listed))
        return refuse(r, place, "TemplateProcessing", "it uses a special token that it does not list");
    size_t i;
    json_array_foreach(listed, i, id)
    {
        json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || (uint64_t)value >= r->vocab_size)
            return error_set(r->err, ERR_MODEL,
                             "%s: %s: TemplateProcessing: special token \"%.60s\" has id %lld, wanted below the %llu "
                             "rows of the embedding",
                             r->file, place->path, name, (long long)value, (unsigned long long)r->vocab_size);
        if (*count == TOKENIZER_MAX_TEMPLATE_IDS)
            return refuse(r, place, "TemplateProcessing", "more than 64 special tokens");
        ids[(*count)++] = (uint32_t)value;
    }
    return 0;
}

static int read_template(struct reader *r, const struct place *place, const json_t *component)
{
    const json_t *pieces = json_object_get(component, "single"), *piece;
    bool in_front = true;
    if (r->saw_template)
        return refuse(r, place, "TemplateProcessing", "there is a second one");
    r->saw_template = true;
    r->special_tokens = json_object_get(component, "special_tokens");
    if (!json_is_array(pieces))
        return refuse(r, place, "TemplateProcessing", "\"single\" is not a list of pieces");
    size_t i;
    json_array_foreach(pieces, i, piece)
    {
        const json_t *special = json_object_get(piece, "SpecialToken"), *text = json_object_get(piece, "Sequence");
        if (special) {
            int rc = add_template_ids(r, place, json_string_value(json_object_get(special, "id")), in_front);
            if (rc)
                return rc;
            continue;
        }
        const char *name = json_string_value(json_object_get(text, "id"));
        if (!name || strcmp(name, "A") || !in_front)
            return refuse(r, place, "TemplateProcessing", "\"single\" does not contain the text A exactly once");
        in_front = false;
    }
    if (in_front)
        return refuse(r, place, "TemplateProcessing", "\"single\" does not contain the text A exactly once");
    return 0;
}

static int read_postprocessor(struct reader *r, const struct place *place, const json_t *component)
{
    if (!strcmp(type_of(component), "TemplateProcessing"))
        return read_template(r, place, component);
    if (!strcmp(type_of(component), "ByteLevel")) // concerns offsets only
        return 0;
    return unsupported_type(r, place, component);
}

int tokenizer_components_read(struct tokenizer_components *out, const json_t *root, const char *file,
                              uint64_t vocab_size, struct error *err)
{
    static const struct {
        const char *key, *members_key;
        component_function *read;
    } components[] = {{"normalizer", "normalizers", read_normalizer},
                      {"pre_tokenizer", "pretokenizers", read_pretokenizer},
                      {"post_processor", "processors", read_postprocessor},
                      {"decoder", "decoders", read_decoder}};
    struct reader r = {.out = out, .file = file, .vocab_size = vocab_size, .err = err};
    int rc = 0;
    for (size_t i = 0; i < sizeof components / sizeof *components && !rc; i++) {
        struct place place = {{0}, 0};
        snprintf(place.path, sizeof place.path, "%s", components[i].key);
        rc = read_component(&r, &place, json_object_get(root, components[i].key), components[i].members_key,
                            components[i].read);
    }
    out->has_decoder = json_is_object(json_object_get(root, "decoder"));
    return rc;
}

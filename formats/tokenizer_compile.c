// tokenizer.json -> compiled image. See tokenizer_compile.h; the components: tokenizer_components.c.
//
// The JSON is hostile until proven otherwise. Everything that Hugging Face would read differently from what is written
// (ids of added tokens that it reassigns, texts listed twice) is refused instead of guessed.
#include "formats/tokenizer_compile.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "formats/file_io.h"
#include "formats/json_file.h"
#include "formats/tokenizer_components.h"
#include "formats/tokenizer_image_write.h"
#include "formats/tokenizer_internal.h"

enum { MAX_JSON_BYTES = 512 << 20, MAX_IDS = 1 << 22 };

static const char META[] = "\xE2\x96\x81"; // U+2581, the word mark of SentencePiece

struct added_token {
    const char *content; // in the JSON document
    uint32_t id, flags;  // enum tokenizer_added_flags
    bool normalized, special;
    struct tokenizer_text pattern; // what is looked for: the content, normalized if normalized is set
};

struct compiler {
    const char *file; // base name for messages
    uint64_t vocab_size;
    json_t *root, *config;
    const json_t *vocab; // {content: id}
    struct tokenizer_content *contents;
    uint8_t *token_flags;
    uint32_t id_count, id_capacity;
    struct tokenizer_merge_slot *merges;
    size_t merge_count;
    struct added_token *added;
    size_t added_count, added_capacity;
    json_t *added_index; // {content: position in added}
    uint32_t next_id;    // that Hugging Face gives to the next added token which the vocabulary lacks
    uint32_t byte_ids[256];
    uint32_t flags, unk_id;
    bool ignore_merges;
    struct tokenizer_components components;
    struct error *err;
};

static int out_of_memory(const struct compiler *c)
{
    return error_set(c->err, ERR_MEMORY, "%s: out of memory", c->file);
}

// ---- JSON

static int read_json(const char *path, const char *file, json_t **out, struct error *err)
{
    uint8_t *data;
    uint64_t bytes;
    json_error_t error;
    bool no_memory;
    struct stat status;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode))
        return error_set(err, ERR_MODEL, "%s: not a regular file", file);
    int rc = file_read_all(&data, &bytes, path, MAX_JSON_BYTES, ERR_MODEL, err);
    if (rc)
        return rc;
    *out = json_file_load((const char *)data, bytes, JSON_REJECT_DUPLICATES, &error, &no_memory);
    free(data);
    if (json_is_object(*out)) // not so for NULL
        return 0;
    if (*out)
        return error_set(err, ERR_MODEL, "%s: not a JSON object", file);
    if (no_memory)
        return error_set(err, ERR_MEMORY, "%s: out of memory", file);
    switch (json_error_code(&error)) {
    case json_error_null_character:
    case json_error_null_byte_in_key:
        return error_set(err, ERR_MODEL,
                         "%s: line %d: a token or text contains the NUL character (\\u0000), which is not supported",
                         file, error.line);
    default:
        return error_set(err, ERR_MODEL, "%s: line %d: %s", file, error.line, error.text);
    }
}

// ---- vocabulary

static int set_token(struct compiler *c, uint32_t id, const char *content, uint8_t flags)
{
    if (id >= c->id_capacity) {
        uint32_t capacity = c->id_capacity ? c->id_capacity : 1024;
        while (capacity <= id)
            capacity *= 2;
        struct tokenizer_content *contents = realloc(c->contents, capacity * sizeof *contents);
        if (!contents)
            return out_of_memory(c);
        c->contents = contents;
        uint8_t *token_flags = realloc(c->token_flags, capacity);
        if (!token_flags)
            return out_of_memory(c);
        c->token_flags = token_flags;
        memset(contents + c->id_capacity, 0, (capacity - c->id_capacity) * sizeof *contents);
        memset(token_flags + c->id_capacity, 0, capacity - c->id_capacity);
        c->id_capacity = capacity;
    }
    if (id >= c->id_count)
        c->id_count = id + 1;
    c->contents[id] = (struct tokenizer_content){content, strlen(content)};
    c->token_flags[id] |= flags;
    return 0;
}

static bool id_is_used(const struct compiler *c, uint32_t id) { return id < c->id_count && c->contents[id].text; }

static int check_id(const struct compiler *c, const char *content, const json_t *id)
{
    json_int_t value = json_integer_value(id);
    uint64_t limit = c->vocab_size < MAX_IDS ? c->vocab_size : MAX_IDS;
    if (!json_is_integer(id))
        return error_set(c->err, ERR_MODEL, "%s: token \"%.60s\": its id is not an integer", c->file, content);
    if (value < 0 || (uint64_t)value >= limit)
        return error_set(c->err, ERR_MODEL,
                         "%s: token \"%.60s\" has id %lld, wanted 0 to %llu (the embedding has %llu rows)", c->file,
                         content, (long long)value, (unsigned long long)limit - 1, (unsigned long long)c->vocab_size);
    return 0;
}

static int read_vocab(struct compiler *c, const json_t *model)
{
    const char *content;
    json_t *id;
    c->vocab = json_object_get(model, "vocab");
    if (!json_object_size(c->vocab))
        return error_set(c->err, ERR_MODEL, "%s: model: \"vocab\" is missing or empty", c->file);
    json_object_foreach((json_t *)c->vocab, content, id)
    {
        int rc = check_id(c, content, id);
        if (rc)
            return rc;
        uint32_t value = (uint32_t)json_integer_value(id);
        if (id_is_used(c, value))
            return error_set(c->err, ERR_MODEL, "%s: tokens \"%.60s\" and \"%.60s\" have the same id %u", c->file,
                             c->contents[value].text, content, value);
        if ((rc = set_token(c, value, content, TOKEN_EXISTS | TOKEN_IN_MODEL)))
            return rc;
    }
    c->next_id = (uint32_t)json_object_size(c->vocab);
    return 0;
}

static uint32_t vocab_id(const struct compiler *c, const char *content, size_t bytes)
{
    const json_t *id = json_object_getn(c->vocab, content, bytes);
    return id ? (uint32_t)json_integer_value(id) : TOKENIZER_NONE;
}

// ---- merges

// The two texts of a merge: ["a", "b"], or "a b" with exactly one space.
static int read_pair(const struct compiler *c, const json_t *merge, size_t index, struct tokenizer_content pair[2])
{
    if (json_is_array(merge) && json_array_size(merge) == 2) {
        for (size_t side = 0; side < 2; side++) {
            const json_t *text = json_array_get(merge, side);
            pair[side] = (struct tokenizer_content){json_string_value(text), json_string_length(text)};
        }
        if (pair[0].text && pair[1].text)
            return 0;
    } else if (json_is_string(merge)) {
        const char *text = json_string_value(merge), *space = strchr(text, ' ');
        if (space && !strchr(space + 1, ' ')) {
            pair[0] = (struct tokenizer_content){text, (size_t)(space - text)};
            pair[1] = (struct tokenizer_content){space + 1, strlen(space + 1)};
            return 0;
        }
    }
    return error_set(c->err, ERR_MODEL, "%s: model: merge %zu is neither \"a b\" nor [\"a\", \"b\"]", c->file, index);
}

static int no_such_token(const struct compiler *c, size_t index, const char *text, size_t bytes)
{
    return error_set(c->err, ERR_MODEL, "%s: model: merge %zu needs the token \"%.*s\", which the vocabulary lacks",
                     c->file, index, bytes < 60 ? (int)bytes : 60, text);
}

// True when a merge joins something that does not end in the word mark with something that begins with it.
static bool crosses_mark(const struct tokenizer_content pair[2])
{
    bool left_is_mark = pair[0].bytes >= 3 && !memcmp(pair[0].text + pair[0].bytes - 3, META, 3);
    return pair[1].bytes >= 3 && !memcmp(pair[1].text, META, 3) && pair[0].bytes && !left_is_mark;
}

static int read_merges(struct compiler *c, const json_t *model)
{
    const json_t *merges = json_object_get(model, "merges"), *merge;
    struct tokenizer_text joined = {0};
    int rc = 0;
    bool crossed = false;
    if (!json_is_array(merges))
        return error_set(c->err, ERR_MODEL, "%s: model: \"merges\" is missing", c->file);
    bool legacy = json_is_string(json_array_get(merges, 0));
    c->merges = calloc(json_array_size(merges) + 1, sizeof *c->merges);
    if (!c->merges)
        return out_of_memory(c);
    size_t i;
    json_array_foreach(merges, i, merge)
    {
        struct tokenizer_content pair[2];
        if (legacy != json_is_string(merge)) {
            rc = error_set(c->err, ERR_MODEL, "%s: model: merge %zu has another form than the first", c->file, i);
            break;
        }
        if (legacy && !strncmp(json_string_value(merge), "#version", 8))
            continue;
        if ((rc = read_pair(c, merge, i, pair)))
            break;
        joined.bytes = 0;
        if (!tokenizer_text_append(&joined, pair[0].text, pair[0].bytes) ||
            !tokenizer_text_append(&joined, pair[1].text, pair[1].bytes)) {
            rc = out_of_memory(c);
            break;
        }
        uint32_t left = vocab_id(c, pair[0].text, pair[0].bytes), right = vocab_id(c, pair[1].text, pair[1].bytes);
        uint32_t merged = vocab_id(c, joined.data, joined.bytes);
        if (left == TOKENIZER_NONE || right == TOKENIZER_NONE) {
            const struct tokenizer_content *missing = &pair[left != TOKENIZER_NONE];
            rc = no_such_token(c, i, missing->text, missing->bytes);
            break;
        }
        if (merged == TOKENIZER_NONE) {
            rc = no_such_token(c, i, joined.data, joined.bytes);
            break;
        }
        crossed |= crosses_mark(pair);
        c->merges[c->merge_count] = (struct tokenizer_merge_slot){left, right, (uint32_t)c->merge_count, merged};
        c->merge_count++;
    }
    tokenizer_text_free(&joined);
    // Words may be encoded one by one. A whole-piece look-up (ignore_merges) must see whole pieces, and the mark must
    // be a token: then it ends a run of unknown characters, which could otherwise fuse across it.
    if (!rc && !crossed && !c->ignore_merges && vocab_id(c, META, 3) != TOKENIZER_NONE)
        c->flags |= IMAGE_CUT_AT_META;
    return rc;
}

// ---- model settings

static int read_model_bool(const struct compiler *c, const json_t *model, const char *key, bool *out)
{
    const json_t *value = json_object_get(model, key);
    *out = json_is_true(value);
    if (value && !json_is_null(value) && !json_is_boolean(value))
        return error_set(c->err, ERR_MODEL, "%s: model: \"%s\" is not true or false", c->file, key);
    return 0;
}

static int refuse_setting(const struct compiler *c, const json_t *model, const char *key)
{
    const json_t *value = json_object_get(model, key);
    if (!value || json_is_null(value) || (json_is_string(value) && !json_string_length(value)) ||
        (json_is_number(value) && json_number_value(value) == 0))
        return 0;
    return error_set(c->err, ERR_MODEL, "%s: model: BPE with \"%s\" is not supported", c->file, key);
}

static int read_model(struct compiler *c)
{
    const json_t *model = json_object_get(c->root, "model");
    const char *type = json_string_value(json_object_get(model, "type"));
    bool byte_fallback, fuse_unk;
    int rc;
    if (!json_is_object(model))
        return error_set(c->err, ERR_MODEL, "%s: \"model\" is missing", c->file);
    if (json_object_get(model, "type") && (!type || strcmp(type, "BPE")))
        return error_set(c->err, ERR_MODEL, "%s: model of type \"%.60s\" is not supported, only BPE", c->file,
                         type ? type : "?");
    if ((rc = refuse_setting(c, model, "dropout")) || (rc = refuse_setting(c, model, "continuing_subword_prefix")) ||
        (rc = refuse_setting(c, model, "end_of_word_suffix")) ||
        (rc = read_model_bool(c, model, "byte_fallback", &byte_fallback)) ||
        (rc = read_model_bool(c, model, "fuse_unk", &fuse_unk)) ||
        (rc = read_model_bool(c, model, "ignore_merges", &c->ignore_merges)) || (rc = read_vocab(c, model)) ||
        (rc = read_merges(c, model)))
        return rc;
    c->flags |= (byte_fallback ? IMAGE_BYTE_FALLBACK : 0) | (fuse_unk ? IMAGE_FUSE_UNK : 0);
    const json_t *unk = json_object_get(model, "unk_token");
    c->unk_id = TOKENIZER_NONE;
    if (unk && !json_is_null(unk)) {
        if (json_is_string(unk))
            c->unk_id = vocab_id(c, json_string_value(unk), json_string_length(unk));
        if (c->unk_id == TOKENIZER_NONE)
            return error_set(c->err, ERR_MODEL, "%s: model: unk_token \"%.60s\" is not in the vocabulary", c->file,
                             json_is_string(unk) ? json_string_value(unk) : "?");
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        char content[8];
        int bytes = snprintf(content, sizeof content, "<0x%02X>", byte);
        c->byte_ids[byte] = byte_fallback ? vocab_id(c, content, (size_t)bytes) : TOKENIZER_NONE;
    }
    return 0;
}

// ---- added tokens

static bool is_set(const json_t *token, const char *key) { return json_is_true(json_object_get(token, key)); }

static struct added_token *find_added(const struct compiler *c, const char *content, size_t bytes)
{
    const json_t *position = json_object_getn(c->added_index, content, bytes);
    return position ? &c->added[json_integer_value(position)] : NULL;
}

// Hugging Face takes the id from the vocabulary, or else the next free one; the id in the file must say the same.
static int read_added(struct compiler *c, const json_t *token, const json_t *id)
{
    const json_t *text = json_object_get(token, "content");
    const char *content = json_string_value(text);
    if (!content)
        return error_set(c->err, ERR_MODEL, "%s: an added token has no \"content\"", c->file);
    if (!*content) // Hugging Face ignores those
        return 0;
    int rc = check_id(c, content, id);
    if (rc)
        return rc;
    struct added_token *added = find_added(c, content, json_string_length(text));
    uint32_t written = (uint32_t)json_integer_value(id), known = vocab_id(c, content, json_string_length(text));
    uint32_t assigned = added ? added->id : known != TOKENIZER_NONE ? known : c->next_id;
    if (written != assigned)
        return error_set(c->err, ERR_MODEL,
                         "%s: added token \"%.60s\" has id %u in the file, but Hugging Face tokenizers gives it id %u; "
                         "correct the file",
                         c->file, content, written, assigned);
    if (!added) {
        if (known == TOKENIZER_NONE && id_is_used(c, written))
            return error_set(c->err, ERR_MODEL, "%s: added token \"%.60s\" and token \"%.60s\" have the same id %u",
                             c->file, content, c->contents[written].text, written);
        if (c->added_count == c->added_capacity) {
            size_t capacity = c->added_capacity ? c->added_capacity * 2 : 64;
            struct added_token *all = realloc(c->added, capacity * sizeof *all);
            if (!all)
                return out_of_memory(c);
            c->added = all;
            c->added_capacity = capacity;
        }
        if (json_object_set_new(c->added_index, content, json_integer((json_int_t)c->added_count)))
            return out_of_memory(c);
        added = &c->added[c->added_count++];
        *added = (struct added_token){.content = content, .id = written};
        c->next_id += known == TOKENIZER_NONE;
    }
    added->normalized = is_set(token, "normalized");
    added->special = is_set(token, "special");
    added->flags = (is_set(token, "single_word") ? ADDED_SINGLE_WORD : 0) |
                   (is_set(token, "lstrip") ? ADDED_LSTRIP : 0) | (is_set(token, "rstrip") ? ADDED_RSTRIP : 0);
    if ((rc = set_token(c, written, content, TOKEN_EXISTS)))
        return rc;
    c->token_flags[written] &= (uint8_t)~TOKEN_SPECIAL;
    c->token_flags[written] |= added->special ? TOKEN_SPECIAL : 0;
    return 0;
}

static int read_added_tokens(struct compiler *c)
{
    const json_t *list = json_object_get(c->root, "added_tokens"), *token;
    if (list && !json_is_null(list) && !json_is_array(list))
        return error_set(c->err, ERR_MODEL, "%s: \"added_tokens\" is not a list", c->file);
    size_t i;
    json_array_foreach(list, i, token)
    {
        int rc = read_added(c, token, json_object_get(token, "id"));
        if (rc)
            return rc;
    }
    return 0;
}

static int compare_ids(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

// {"id": {content, flags}} of tokenizer_config.json, in the order of ids.
static int read_config_tokens(struct compiler *c)
{
    json_t *decoder = json_object_get(c->config, "added_tokens_decoder"), *token;
    const char *key;
    size_t count = 0;
    int rc = 0;
    if (!json_is_object(decoder))
        return 0;
    uint32_t *ids = calloc(json_object_size(decoder) + 1, sizeof *ids);
    if (!ids)
        return out_of_memory(c);
    json_object_foreach(decoder, key, token)
    {
        size_t digits = strspn(key, "0123456789");
        if (!digits || digits > 9 || key[digits] || (key[0] == '0' && digits > 1)) {
            rc = error_set(c->err, ERR_MODEL, "%s: tokenizer_config.json: added_tokens_decoder: \"%.60s\" is not an id",
                           c->file, key);
            break;
        }
        ids[count++] = (uint32_t)strtoul(key, NULL, 10);
    }
    qsort(ids, count, sizeof *ids, compare_ids);
    for (size_t i = 0; i < count && !rc; i++) {
        char digits[16];
        snprintf(digits, sizeof digits, "%u", ids[i]);
        json_t *id = json_integer(ids[i]);
        rc = id ? read_added(c, json_object_get(decoder, digits), id) : out_of_memory(c);
        json_decref(id);
    }
    free(ids);
    return rc;
}

// ---- the image

static int compare_patterns(const void *a, const void *b)
{
    const struct added_token *left = *(const struct added_token *const *)a;
    const struct added_token *right = *(const struct added_token *const *)b;
    size_t left_bytes = left->pattern.bytes, right_bytes = right->pattern.bytes;
    int order = memcmp(left->pattern.data, right->pattern.data, left_bytes < right_bytes ? left_bytes : right_bytes);
    return order ? order : (left_bytes > right_bytes) - (left_bytes < right_bytes);
}

// One of the two lists of the image, in order, texts stored. *out has room for all added tokens.
static int list_added(struct compiler *c, bool normalized, struct tokenizer_added *out, uint32_t *count)
{
    int rc = 0;
    size_t used = 0;
    const struct added_token **sorted = calloc(c->added_count + 1, sizeof *sorted);
    if (!sorted)
        return out_of_memory(c);
    for (size_t i = 0; i < c->added_count; i++)
        if (c->added[i].normalized == normalized)
            sorted[used++] = &c->added[i];
    qsort(sorted, used, sizeof *sorted, compare_patterns);
    for (size_t i = 0; i < used; i++) {
        const struct tokenizer_text *pattern = &sorted[i]->pattern;
        if (!pattern->bytes || (i && !compare_patterns(&sorted[i - 1], &sorted[i]))) {
            rc = error_set(c->err, ERR_MODEL, "%s: added token \"%.60s\" is empty or equal to another when normalized",
                           c->file, sorted[i]->content);
            break;
        }
        out[i] = (struct tokenizer_added){(uint32_t)c->components.text.bytes, (uint32_t)pattern->bytes, sorted[i]->id,
                                          sorted[i]->flags};
        if (!tokenizer_text_append(&c->components.text, pattern->data, pattern->bytes)) {
            rc = out_of_memory(c);
            break;
        }
    }
    *count = (uint32_t)used;
    free(sorted);
    return rc;
}

static int compare_texts(const void *a, const void *b)
{
    return compare_ids(&((const struct tokenizer_image_text *)a)->id, &((const struct tokenizer_image_text *)b)->id);
}

// Hugging Face decodes a normalized added token to its normalized form, and drops a token as special when the decoded
// form equals a special token's content.
static int list_decode_texts(struct compiler *c, struct tokenizer_image_text *out, uint32_t *count)
{
    *count = 0;
    for (size_t i = 0; i < c->added_count; i++) {
        const struct added_token *added = &c->added[i];
        uint8_t *flags = &c->token_flags[added->id];
        *flags &= (uint8_t) ~(TOKEN_SKIPPED | TOKEN_DECODES);
        const struct added_token *same = find_added(c, added->pattern.data, added->pattern.bytes);
        *flags |= same && same->special ? TOKEN_SKIPPED : 0;
        if (added->pattern.bytes == strlen(added->content) &&
            !memcmp(added->pattern.data, added->content, added->pattern.bytes))
            continue;
        *flags |= TOKEN_DECODES;
        out[(*count)++] = (struct tokenizer_image_text){added->id, (uint32_t)c->components.text.bytes,
                                                        (uint32_t)added->pattern.bytes, 0};
        if (!tokenizer_text_append(&c->components.text, added->pattern.data, added->pattern.bytes))
            return out_of_memory(c);
    }
    qsort(out, *count, sizeof *out, compare_texts);
    return 0;
}

static int write_image(struct compiler *c, bool complete, uint8_t **out, size_t *out_bytes)
{
    size_t text_before = c->components.text.bytes;
    struct tokenizer_added *raw = calloc(c->added_count + 1, sizeof *raw);
    struct tokenizer_added *normalized = calloc(c->added_count + 1, sizeof *normalized);
    struct tokenizer_image_text *texts = calloc(c->added_count + 1, sizeof *texts);
    struct tokenizer_image_parts parts = {
        .contents = c->contents,
        .token_flags = c->token_flags,
        .id_count = c->id_count,
        .flags = c->flags | (c->components.has_decoder ? IMAGE_HAS_DECODER : 0),
        .unk_id = c->unk_id,
        .merges = c->merges,
        .merge_count = c->merge_count,
        .byte_ids = c->byte_ids,
        .components = &c->components,
        .added_raw = raw,
        .added_normalized = normalized,
        .decode_texts = texts,
    };
    int rc = raw && normalized && texts ? 0 : out_of_memory(c);
    if (!rc && complete && !(rc = list_added(c, false, raw, &parts.added_raw_count)) &&
        !(rc = list_added(c, true, normalized, &parts.added_normalized_count)))
        rc = list_decode_texts(c, texts, &parts.decode_text_count);
    if (!rc)
        rc = tokenizer_image_write(out, out_bytes, &parts, c->file, c->err);
    c->components.text.bytes = text_before;
    free(raw);
    free(normalized);
    free(texts);
    return rc;
}

// A piece that equals a token usually encodes to that token alone, but not always: asks the model and marks those.
static int mark_whole_tokens(struct compiler *c, const struct tokenizer *tok)
{
    struct tokenizer_bpe bpe = {0};
    struct token_list ids = {0};
    int rc = 0;
    for (uint32_t id = 0; id < c->id_count && !rc; id++) {
        if (!(c->token_flags[id] & TOKEN_IN_MODEL))
            continue;
        ids.count = 0;
        if (!c->ignore_merges)
            rc = tokenizer_bpe_encode(tok, &bpe, c->contents[id].text, c->contents[id].bytes, BLOCK_NOTHING, &ids,
                                      c->err);
        if (c->ignore_merges || (ids.count == 1 && ids.ids[0] == id))
            c->token_flags[id] |= TOKEN_WHOLE;
    }
    tokenizer_bpe_free(&bpe);
    free(ids.ids);
    return rc;
}

// What only the tokenizer itself can say, asked of an image without it: normalized forms and whole tokens.
static int finish_with(struct compiler *c, const struct tokenizer *tok)
{
    for (size_t i = 0; i < c->added_count; i++) {
        struct added_token *added = &c->added[i];
        size_t bytes = strlen(added->content);
        int rc = 0;
        if (added->normalized)
            rc = tokenizer_encode_normalize(tok, added->content, bytes, &added->pattern, c->err);
        else if (!tokenizer_text_append(&added->pattern, added->content, bytes))
            rc = out_of_memory(c);
        if (rc)
            return rc;
    }
    return mark_whole_tokens(c, tok);
}

static int compile(struct compiler *c, uint8_t **out, size_t *out_bytes)
{
    uint8_t *image = NULL;
    size_t bytes;
    struct tokenizer *tok = NULL;
    const json_t *version = json_object_get(c->root, "version");
    int rc;
    if (version && (!json_is_string(version) || strcmp(json_string_value(version), "1.0")))
        return error_set(c->err, ERR_MODEL, "%s: \"version\" is not 1.0", c->file);
    if ((rc = read_model(c)) || (rc = read_added_tokens(c)) || (rc = read_config_tokens(c)) ||
        (rc = tokenizer_components_read(&c->components, c->root, c->file, c->vocab_size, c->err)))
        return rc;
    const struct tokenizer_components *components = &c->components;
    for (uint32_t i = 0; i < components->prefix_count + components->suffix_count; i++) {
        uint32_t id = i < components->prefix_count ? components->prefix_ids[i]
                                                   : components->suffix_ids[i - components->prefix_count];
        if (!id_is_used(c, id))
            return error_set(c->err, ERR_MODEL, "%s: post_processor: TemplateProcessing: no token has id %u", c->file,
                             id);
    }
    if ((rc = write_image(c, false, &image, &bytes)) || (rc = tokenizer_open(&tok, image, bytes, c->file, c->err)) ||
        (rc = finish_with(c, tok)))
        goto done;
    tokenizer_close(tok);
    tok = NULL;
    free(image);
    image = NULL;
    if ((rc = write_image(c, true, &image, &bytes)) || (rc = tokenizer_open(&tok, image, bytes, c->file, c->err)))
        goto done;
    *out = image;
    *out_bytes = bytes;
    image = NULL;
done:
    tokenizer_close(tok);
    free(image);
    return rc;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int tokenizer_compile(uint8_t **out, size_t *out_bytes, const char *tokenizer_json_path,
                      const char *tokenizer_config_path, uint64_t vocab_size, struct error *err)
{
    struct compiler *c = calloc(1, sizeof *c);
    struct stat status;
    if (!c)
        return error_set(err, ERR_MEMORY, "%s: out of memory", tokenizer_json_path);
    c->file = base_name(tokenizer_json_path);
    c->vocab_size = vocab_size;
    c->err = err;
    c->added_index = json_object();
    int rc = c->added_index ? 0 : out_of_memory(c);
    if (!rc)
        rc = read_json(tokenizer_json_path, c->file, &c->root, err);
    if (!rc && tokenizer_config_path && (!stat(tokenizer_config_path, &status) || errno != ENOENT))
        rc = read_json(tokenizer_config_path, base_name(tokenizer_config_path), &c->config, err);
    if (!rc)
        rc = compile(c, out, out_bytes);
    for (size_t i = 0; i < c->added_count; i++)
        tokenizer_text_free(&c->added[i].pattern);
    free(c->added);
    free(c->contents);
    free(c->token_flags);
    free(c->merges);
    tokenizer_text_free(&c->components.text);
    json_decref(c->added_index);
    json_decref(c->root);
    json_decref(c->config);
    free(c);
    return rc;
}

// Opening a compiled tokenizer, and simple questions about it. See tokenizer.h; the image: tokenizer_file.md.
//
// Opening checks everything that is read later without a check: sizes, offsets, UTF-8. Ids in the two hash tables are
// checked where they are used, so that opening does not have to touch the whole file.
#include "formats/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/checked.h"
#include "formats/tokenizer_internal.h"
#include "formats/utf8.h"

static int corrupt(const struct tokenizer *tok, struct error *err, const char *what)
{
    return error_set(err, ERR_CORRUPT, "%s: not a usable compiled tokenizer: %s; compile it again", tok->name, what);
}

static int check_header(const struct tokenizer *tok, size_t byte_count, struct error *err)
{
    const struct tokenizer_image_header *h = tok->header;
    if (memcmp(h->magic, TOKENIZER_MAGIC, sizeof h->magic))
        return corrupt(tok, err, "it does not begin with TPTOKEN1");
    if (h->version != TOKENIZER_IMAGE_VERSION)
        return error_set(err, ERR_CORRUPT, "%s: compiled tokenizer version %u, this program reads %d; compile it again",
                         tok->name, h->version, (int)TOKENIZER_IMAGE_VERSION);
    if (h->header_bytes != sizeof *h || h->reserved)
        return corrupt(tok, err, "a reserved field is set");
    if (h->file_bytes != byte_count)
        return error_set(err, ERR_CORRUPT, "%s: compiled tokenizer of %zu bytes, its header says %llu", tok->name,
                         byte_count, (unsigned long long)h->file_bytes);
    if (h->flags & ~(uint32_t)IMAGE_ALL_FLAGS)
        return corrupt(tok, err, "an unknown flag is set");
    if (!h->id_count || h->id_count == TOKENIZER_NONE || (h->unk_id != TOKENIZER_NONE && h->unk_id >= h->id_count))
        return corrupt(tok, err, "an id count or the unknown id is out of range");
    if (!h->vocab_slots || h->vocab_slots & (h->vocab_slots - 1) || !h->merge_slots ||
        h->merge_slots & (h->merge_slots - 1))
        return corrupt(tok, err, "a table size is not a power of two");
    if (h->normalizer_ops > TOKENIZER_MAX_OPS || h->pretokenizer_ops > TOKENIZER_MAX_OPS ||
        h->decoder_ops > TOKENIZER_MAX_OPS)
        return corrupt(tok, err, "too many steps");
    return 0;
}

// Hands out the sections one after the other, each at a multiple of 8.
struct cursor {
    const uint8_t *bytes;
    uint64_t at, end;
    bool overflow;
};

static const void *take(struct cursor *cursor, uint64_t count, uint64_t item_bytes)
{
    uint64_t bytes, next;
    const void *section = cursor->bytes + cursor->at;
    if (cursor->overflow || !checked_mul(count, item_bytes, &bytes) || !checked_round_up(bytes, 8, &bytes) ||
        !checked_add(cursor->at, bytes, &next) || next > cursor->end) {
        cursor->overflow = true;
        return NULL;
    }
    cursor->at = next;
    return section;
}

static int find_sections(struct tokenizer *tok, struct error *err)
{
    const struct tokenizer_image_header *h = tok->header;
    struct cursor cursor = {(const uint8_t *)h, sizeof *h, h->file_bytes, false};
    tok->token_offsets = take(&cursor, (uint64_t)h->id_count + 1, sizeof *tok->token_offsets);
    tok->token_flags = take(&cursor, h->id_count, 1);
    tok->vocab = take(&cursor, h->vocab_slots, sizeof *tok->vocab);
    tok->merges = take(&cursor, h->merge_slots, sizeof *tok->merges);
    tok->byte_ids = take(&cursor, 256, sizeof *tok->byte_ids);
    tok->normalizer.ops = take(&cursor, h->normalizer_ops, sizeof *tok->normalizer.ops);
    tok->pretokenizer.ops = take(&cursor, h->pretokenizer_ops, sizeof *tok->pretokenizer.ops);
    tok->decoder.ops = take(&cursor, h->decoder_ops, sizeof *tok->decoder.ops);
    tok->added_raw.added = take(&cursor, h->added_raw, sizeof *tok->added_raw.added);
    tok->added_normalized.added = take(&cursor, h->added_normalized, sizeof *tok->added_normalized.added);
    tok->decode_texts = take(&cursor, h->decode_texts, sizeof *tok->decode_texts);
    tok->prefix_ids = take(&cursor, h->prefix_ids, sizeof *tok->prefix_ids);
    tok->suffix_ids = take(&cursor, h->suffix_ids, sizeof *tok->suffix_ids);
    tok->token_text = take(&cursor, h->token_text_bytes, 1);
    tok->op_text = take(&cursor, h->op_text_bytes, 1);
    if (cursor.overflow || cursor.at != cursor.end)
        return corrupt(tok, err, "its sections do not fill it");
    tok->normalizer.count = h->normalizer_ops;
    tok->pretokenizer.count = h->pretokenizer_ops;
    tok->decoder.count = h->decoder_ops;
    tok->added_raw.count = h->added_raw;
    tok->added_normalized.count = h->added_normalized;
    return 0;
}

static bool is_char_boundary(const char *text, uint64_t bytes, uint64_t at)
{
    return at == bytes || ((uint8_t)text[at] & 0xC0) != 0x80;
}

static int check_tokens(const struct tokenizer *tok, struct error *err)
{
    const struct tokenizer_image_header *h = tok->header;
    if (tokenizer_text_valid_prefix(tok->token_text, h->token_text_bytes) != h->token_text_bytes)
        return corrupt(tok, err, "a token is not valid UTF-8");
    if (tok->token_offsets[0] != 0 || tok->token_offsets[h->id_count] != h->token_text_bytes)
        return corrupt(tok, err, "the tokens do not fill their section");
    for (uint32_t id = 0; id < h->id_count; id++) {
        if (tok->token_offsets[id] > tok->token_offsets[id + 1] || tok->token_offsets[id] > h->token_text_bytes ||
            !is_char_boundary(tok->token_text, h->token_text_bytes, tok->token_offsets[id]))
            return corrupt(tok, err, "a token lies outside its section");
        if (tok->token_flags[id] & ~TOKEN_ALL_FLAGS)
            return corrupt(tok, err, "an unknown token flag is set");
    }
    return 0;
}

static bool op_text_is_valid(const struct tokenizer *tok, uint32_t offset, uint32_t bytes)
{
    return checked_range(offset, bytes, tok->header->op_text_bytes) &&
           tokenizer_text_valid_prefix(tok->op_text + offset, bytes) == bytes;
}

static bool ids_are_valid(const struct tokenizer *tok, const uint32_t *ids, uint32_t count, bool or_none)
{
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] >= tok->header->id_count && !(or_none && ids[i] == TOKENIZER_NONE))
            return false;
    return true;
}

// Checks a list of steps and compiles its regular expressions.
static int open_ops(struct tokenizer *tok, struct tokenizer_op_list *list, bool decoder, const char *list_name,
                    struct error *err)
{
    for (uint32_t i = 0; i < list->count; i++) {
        const struct tokenizer_op *op = &list->ops[i];
        bool for_both = op->kind == OP_REPLACE || op->kind == OP_BYTE_LEVEL;
        bool needs_text = op->kind != OP_NFC && op->kind != OP_BYTE_LEVEL && op->kind != OP_BYTE_FALLBACK &&
                          op->kind != OP_FUSE && op->kind != OP_PREPEND;
        if (op->kind >= OP_KINDS || op->behavior >= SPLIT_BEHAVIORS || op->flags & ~(uint32_t)OP_ALL_FLAGS ||
            op->reserved || (!for_both && decoder != (op->kind >= OP_BYTE_FALLBACK)))
            return corrupt(tok, err, "a step of unknown kind");
        if (!op_text_is_valid(tok, op->text_offset, op->text_bytes) ||
            !op_text_is_valid(tok, op->content_offset, op->content_bytes) || (needs_text && !op->text_bytes))
            return corrupt(tok, err, "a step has no valid text");
        if (!(op->flags & OP_REGEX))
            continue;
        if (op->kind != OP_REPLACE && op->kind != OP_SPLIT)
            return corrupt(tok, err, "a pattern where none belongs");
        char where[96];
        snprintf(where, sizeof where, "%.60s: %s step %u", tok->name, list_name, i);
        int rc = tokenizer_regex_open(&list->regexes[i], tok->op_text + op->text_offset, op->text_bytes, where, err);
        if (rc)
            return rc;
    }
    return 0;
}

static int open_added(struct tokenizer *tok, struct tokenizer_added_list *list, struct error *err)
{
    for (uint32_t i = 0; i < list->count; i++) {
        const struct tokenizer_added *added = &list->added[i];
        if (added->id >= tok->header->id_count || added->flags & ~(uint32_t)ADDED_ALL_FLAGS || !added->text_bytes ||
            !op_text_is_valid(tok, added->text_offset, added->text_bytes))
            return corrupt(tok, err, "an added token is out of range");
        const char *text = tok->op_text + added->text_offset;
        if (i) {
            uint32_t before_bytes = added[-1].text_bytes;
            uint32_t common = before_bytes < added->text_bytes ? before_bytes : added->text_bytes;
            int order = memcmp(tok->op_text + added[-1].text_offset, text, common);
            if (order > 0 || (order == 0 && before_bytes >= added->text_bytes))
                return corrupt(tok, err, "the added tokens are not in order");
        }
        list->first_byte[(uint8_t)text[0]] = true;
    }
    return 0;
}

static int check_decode_texts(const struct tokenizer *tok, struct error *err)
{
    for (uint32_t i = 0; i < tok->header->decode_texts; i++) {
        const struct tokenizer_image_text *text = &tok->decode_texts[i];
        if (text->id >= tok->header->id_count || text->reserved ||
            !op_text_is_valid(tok, text->text_offset, text->text_bytes) || (i && text[-1].id >= text->id))
            return corrupt(tok, err, "a decode text is out of range");
    }
    return 0;
}

// Printable Latin-1 bytes are their own letters; the other 68 are U+0100 onwards, in order.
static void fill_letters(struct tokenizer *tok)
{
    memset(tok->letter_bytes, 0xff, sizeof tok->letter_bytes);
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; byte++) {
        bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
        uint32_t code_point = printable ? byte : next++;
        struct tokenizer_letter *letter = &tok->letters[byte];
        letter->bytes = (uint8_t)utf8_put(letter->text, code_point);
        tok->letter_bytes[code_point] = (int16_t)byte;
    }
}

static void fill_letter_ids(struct tokenizer *tok)
{
    for (uint32_t c = 0; c < 0x800; c++) {
        char text[UTF8_MAX_BYTES];
        tok->letter_ids[c] = tokenizer_find(tok, text, utf8_put(text, c), TOKEN_IN_MODEL);
    }
}

static void plan_decoder(struct tokenizer *tok)
{
    const struct tokenizer_op_list *list = &tok->decoder;
    uint32_t fuse = 0;
    while (fuse < list->count && list->ops[fuse].kind != OP_FUSE && list->ops[fuse].kind != OP_BYTE_LEVEL)
        fuse++;
    tok->fuse_op = fuse;
    tok->decodes_in_chunks = true;
    for (uint32_t i = fuse + 1; i < list->count; i++)
        if (list->ops[i].kind != OP_FUSE && !(list->ops[i].kind == OP_STRIP && list->ops[i].stop == 0))
            tok->decodes_in_chunks = false;
}

// White space and the mark that stands for a space.
static bool is_blank(const struct tokenizer *tok, const struct tokenizer_added *added)
{
    const char *text = tok->op_text + added->text_offset;
    for (size_t at = 0; at < added->text_bytes;) {
        uint32_t code_point;
        at += tokenizer_text_next(text + at, added->text_bytes - at, &code_point);
        if (!tokenizer_text_is_space(code_point) && code_point != 0x2581)
            return false;
    }
    return true;
}

static int find_controls(struct tokenizer *tok, struct error *err)
{
    const struct tokenizer_added_list *lists[] = {&tok->added_raw, &tok->added_normalized};
    tok->controls = calloc(tok->header->id_count, sizeof *tok->controls);
    if (!tok->controls)
        return error_set(err, ERR_MEMORY, "%s: out of memory", tok->name);
    for (int list = 0; list < 2; list++)
        for (uint32_t i = 0; i < lists[list]->count; i++)
            if (!is_blank(tok, &lists[list]->added[i]))
                tok->controls[lists[list]->added[i].id] = true;
    return 0;
}

int tokenizer_open(struct tokenizer **out, const uint8_t *bytes, size_t byte_count, const char *name_for_messages,
                   struct error *err)
{
    int rc;
    struct tokenizer *tok = calloc(1, sizeof *tok);
    if (!tok)
        return error_set(err, ERR_MEMORY, "%s: out of memory", name_for_messages);
    snprintf(tok->name, sizeof tok->name, "%s", name_for_messages);
    tok->header = (const struct tokenizer_image_header *)bytes;
    if (byte_count < sizeof *tok->header || (uintptr_t)bytes % 8) {
        rc = corrupt(tok, err, "it is shorter than its header, or not aligned to 8 bytes in memory");
        goto fail;
    }
    if ((rc = check_header(tok, byte_count, err)) || (rc = find_sections(tok, err)) || (rc = check_tokens(tok, err)))
        goto fail;
    if (!ids_are_valid(tok, tok->prefix_ids, tok->header->prefix_ids, false) ||
        !ids_are_valid(tok, tok->suffix_ids, tok->header->suffix_ids, false) ||
        !ids_are_valid(tok, tok->byte_ids, 256, true)) {
        rc = corrupt(tok, err, "a special or byte id is out of range");
        goto fail;
    }
    if ((rc = check_decode_texts(tok, err)) || (rc = open_added(tok, &tok->added_raw, err)) ||
        (rc = open_added(tok, &tok->added_normalized, err)) || (rc = find_controls(tok, err)))
        goto fail;
    if ((rc = open_ops(tok, &tok->normalizer, false, "normalizer", err)) ||
        (rc = open_ops(tok, &tok->pretokenizer, false, "pre_tokenizer", err)) ||
        (rc = open_ops(tok, &tok->decoder, true, "decoder", err)))
        goto fail;
    fill_letters(tok);
    fill_letter_ids(tok);
    plan_decoder(tok);
    *out = tok;
    return 0;
fail:
    tokenizer_close(tok);
    return rc;
}

void tokenizer_close(struct tokenizer *tok)
{
    if (!tok)
        return;
    for (int i = 0; i < TOKENIZER_MAX_OPS; i++) {
        tokenizer_regex_close(tok->normalizer.regexes[i]);
        tokenizer_regex_close(tok->pretokenizer.regexes[i]);
        tokenizer_regex_close(tok->decoder.regexes[i]);
    }
    free(tok->controls);
    free(tok);
}

uint32_t tokenizer_find(const struct tokenizer *tok, const char *content, size_t bytes, uint8_t wanted)
{
    uint64_t hash = tokenizer_image_hash(content, bytes);
    uint32_t mask = tok->header->vocab_slots - 1;
    for (uint32_t probe = 0; probe < TOKENIZER_PROBE_LIMIT; probe++) {
        const struct tokenizer_vocab_slot *slot = &tok->vocab[(uint32_t)(hash + probe) & mask];
        if (slot->id >= tok->header->id_count) // empty
            return TOKENIZER_NONE;
        if (slot->tag != (uint32_t)(hash >> 32))
            continue;
        struct tokenizer_slice token = tokenizer_token_content(tok, slot->id);
        if (token.bytes == bytes && !memcmp(token.text, content, bytes))
            return (tok->token_flags[slot->id] & wanted) == wanted ? slot->id : TOKENIZER_NONE;
    }
    return TOKENIZER_NONE;
}

int tokenizer_push_id(struct token_list *list, uint32_t id, struct error *err)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        uint32_t *ids = realloc(list->ids, capacity * sizeof *ids);
        if (!ids)
            return error_set(err, ERR_MEMORY, "out of memory for %zu token ids", capacity);
        list->ids = ids;
        list->capacity = capacity;
    }
    list->ids[list->count++] = id;
    return 0;
}

uint32_t tokenizer_vocab_size(const struct tokenizer *tok) { return tok->header->id_count; }

bool tokenizer_token_id(const struct tokenizer *tok, const char *content, uint32_t *id)
{
    uint32_t found = tokenizer_find(tok, content, strlen(content), TOKEN_EXISTS);
    if (found == TOKENIZER_NONE)
        return false;
    *id = found;
    return true;
}

bool tokenizer_is_special(const struct tokenizer *tok, uint32_t id)
{
    return id < tok->header->id_count && tok->token_flags[id] & TOKEN_SPECIAL;
}

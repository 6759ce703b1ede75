// Text -> ids: added tokens, normalizer, pre-tokenizer, then the model for each piece.
//
// A text takes this way, depth first, so that every piece stays in the cache:
//   raw text -> cut at added tokens -> normalizer steps -> cut at added tokens that are looked for in normalized
//   text -> pre-tokenizer steps, which split and rewrite -> pieces -> BPE.
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer_internal.h"

enum { MAX_TEXT_BYTES = 1 << 30 };

static const char META[] = "\xE2\x96\x81"; // U+2581, the word mark of SentencePiece

struct encoder { // one call of tokenizer_encode
    const struct tokenizer *tok;
    bool plain;
    enum tokenizer_block block; // of what is being encoded
    struct token_list *out;
    struct tokenizer_bpe bpe;
    struct tokenizer_regex_memory *memory;
    struct tokenizer_text normalized[2];                // normalizer steps write to these in turn
    struct tokenizer_text normalized_marks[2];          // a byte for each of theirs
    struct tokenizer_text rewritten[TOKENIZER_MAX_OPS]; // pre-tokenizer step i writes to the i-th
    struct error *err;
};

static int out_of_memory(struct error *err) { return error_set(err, ERR_MEMORY, "out of memory while encoding text"); }

// ---- matches of a Replace or Split pattern

struct matcher {
    const struct tokenizer_regex *regex; // NULL: text is looked for literally
    struct tokenizer_regex_memory *memory;
    const char *text;
    size_t text_bytes;
    struct tokenizer_regex_walk walk;
};

// 1: [*start, *end) is the next match. 0: no more. Negative: error.
static int next_match(struct matcher *m, size_t *start, size_t *end, struct error *err)
{
    if (m->regex)
        return tokenizer_regex_next(m->regex, m->memory, &m->walk, start, end, err);
    const char *from = m->walk.text + m->walk.position;
    const char *found = tokenizer_text_find(from, m->walk.bytes - m->walk.position, m->text, m->text_bytes);
    if (!found)
        return 0;
    *start = (size_t)(found - m->walk.text);
    *end = m->walk.position = *start + m->text_bytes;
    return 1;
}

static struct matcher matcher_of(const struct tokenizer *tok, const struct tokenizer_op *op,
                                 const struct tokenizer_regex *regex, struct tokenizer_regex_memory *memory,
                                 const char *text, size_t bytes)
{
    return (struct matcher){
        regex, memory, tok->op_text + op->text_offset, op->text_bytes, {.text = text, .bytes = bytes}};
}

int tokenizer_encode_replace(const struct tokenizer *tok, const struct tokenizer_op *op,
                             const struct tokenizer_regex *regex, struct tokenizer_regex_memory *memory,
                             const char *text, size_t bytes, struct tokenizer_text *out, bool *changed,
                             struct error *err)
{
    struct matcher matcher = matcher_of(tok, op, regex, memory, text, bytes);
    size_t done = 0, start, end;
    int found;
    *changed = false;
    if (!bytes) // Hugging Face finds nothing in nothing, not even an empty match
        return 0;
    while ((found = next_match(&matcher, &start, &end, err)) > 0) {
        if (!tokenizer_text_append(out, text + done, start - done) ||
            !tokenizer_text_append(out, tok->op_text + op->content_offset, op->content_bytes))
            return out_of_memory(err);
        if (out->bytes > MAX_TEXT_BYTES)
            return error_set(err, ERR_MODEL, "%s: a Replace step makes more than 1 GiB out of a text", tok->name);
        *changed = true;
        done = end;
    }
    if (found < 0)
        return found;
    if (*changed && !tokenizer_text_append(out, text + done, bytes - done))
        return out_of_memory(err);
    return 0;
}

// ---- pieces to the model

// In SentencePiece-like vocabularies no merge crosses the front of a word, so words can be encoded one by one with the
// same result (the compiler has checked this for IMAGE_CUT_AT_META), each with the short cut for whole tokens.
static int encode_words(struct encoder *e, const char *piece, size_t bytes)
{
    size_t start = 0;
    int rc = 0;
    while (!rc && start < bytes) {
        size_t at = start; // behind the marks at the front, which may be several
        while (bytes - at >= 3 && !memcmp(piece + at, META, 3))
            at += 3;
        const char *mark = tokenizer_text_find(piece + at, bytes - at, META, 3);
        size_t end = mark ? (size_t)(mark - piece) : bytes;
        rc = tokenizer_bpe_encode(e->tok, &e->bpe, piece + start, end - start, e->block, e->out, e->err);
        start = end;
    }
    return rc;
}

static int encode_piece(struct encoder *e, const char *piece, size_t bytes)
{
    if (e->tok->header->flags & IMAGE_CUT_AT_META)
        return encode_words(e, piece, bytes);
    return tokenizer_bpe_encode(e->tok, &e->bpe, piece, bytes, e->block, e->out, e->err);
}

// ---- pre-tokenizer steps

static int run_steps(struct encoder *e, uint32_t step, const char *piece, size_t bytes, bool at_start);

struct part { // of a text to split: a match or what lies between matches
    size_t start, end;
    bool is_match;
};

struct parts {
    struct matcher matcher;
    size_t done;      // end of the last part
    bool match_waits; // the match [match_start, match_end) comes after the part before it
    size_t match_start, match_end;
    bool invert;
};

// 1: *part is the next part; together they cover the text. 0: no more. Negative: error.
static int next_part(struct parts *parts, struct part *part, struct error *err)
{
    if (!parts->match_waits) {
        int found = next_match(&parts->matcher, &parts->match_start, &parts->match_end, err);
        if (found < 0)
            return found;
        size_t bytes = parts->matcher.walk.bytes;
        if (!found) {
            *part = (struct part){parts->done, bytes, parts->invert};
            parts->done = bytes;
            return part->end > part->start;
        }
        if (parts->match_start > parts->done) {
            *part = (struct part){parts->done, parts->match_start, parts->invert};
            parts->match_waits = true;
            return 1;
        }
    }
    parts->match_waits = false;
    parts->done = parts->match_end;
    *part = (struct part){parts->match_start, parts->match_end, !parts->invert};
    return 1;
}

// Whether a part and the one behind it stay together.
static bool joins(uint32_t behavior, const struct part *part, const struct part *next)
{
    switch (behavior) {
    case SPLIT_CONTIGUOUS:
        return part->is_match == next->is_match;
    case SPLIT_MERGED_WITH_PREVIOUS:
        return !part->is_match && next->is_match;
    case SPLIT_MERGED_WITH_NEXT:
        return part->is_match && !next->is_match;
    default:
        return false;
    }
}

static int split(struct encoder *e, uint32_t step, const char *piece, size_t bytes, bool at_start)
{
    const struct tokenizer_op *op = &e->tok->pretokenizer.ops[step];
    struct parts parts = {
        .matcher = matcher_of(e->tok, op, e->tok->pretokenizer.regexes[step], e->memory, piece, bytes),
        .invert = op->flags & OP_INVERT,
    };
    struct part part, next;
    int more = next_part(&parts, &part, e->err);
    while (more > 0) {
        size_t start = part.start;
        while ((more = next_part(&parts, &next, e->err)) > 0 && joins(op->behavior, &part, &next)) {
            part = next;
            if (op->behavior != SPLIT_CONTIGUOUS) { // two at most
                more = next_part(&parts, &next, e->err);
                break;
            }
        }
        if (more < 0)
            break;
        if (!(op->behavior == SPLIT_REMOVED && part.is_match)) {
            int rc = run_steps(e, step + 1, piece + start, part.end - start, at_start && start == 0);
            if (rc)
                return rc;
        }
        part = next;
    }
    return more;
}

static bool append_byte_letters(const struct tokenizer *tok, struct tokenizer_text *out, const char *text, size_t bytes)
{
    if (!tokenizer_text_reserve(out, 2 * bytes))
        return false;
    char *to = out->data + out->bytes;
    for (size_t i = 0; i < bytes; i++) {
        const struct tokenizer_letter *letter = &tok->letters[(uint8_t)text[i]];
        memcpy(to, letter->text, 2);
        to += letter->bytes;
    }
    out->bytes = (size_t)(to - out->data);
    return true;
}

// One step that rewrites a text into *out. *changed: out holds the new text; else the text stays as it is.
static int rewrite(struct encoder *e, const struct tokenizer_op *op, const struct tokenizer_regex *regex,
                   const char *text, size_t bytes, bool at_start, struct tokenizer_text *out, bool *changed)
{
    const struct tokenizer *tok = e->tok;
    const char *op_text = tok->op_text + op->text_offset;
    out->bytes = 0;
    *changed = false;
    switch (op->kind) {
    case OP_REPLACE:
        return tokenizer_encode_replace(tok, op, regex, e->memory, text, bytes, out, changed, e->err);
    case OP_NFC:
        if (tokenizer_text_is_nfc_at_sight(text, bytes))
            return 0;
        *changed = true;
        return tokenizer_text_append_nfc(out, text, bytes) ? 0 : out_of_memory(e->err);
    case OP_BYTE_LEVEL:
        *changed = true;
        return append_byte_letters(tok, out, text, bytes) ? 0 : out_of_memory(e->err);
    case OP_PREPEND_UNLESS:
        if ((op->flags & OP_START_ONLY && !at_start) ||
            (bytes >= op->text_bytes && !memcmp(text, op_text, op->text_bytes)))
            return 0;
        // fall through
    case OP_PREPEND:
        if (!bytes)
            return 0;
        *changed = true;
        return tokenizer_text_append(out, op_text, op->text_bytes) && tokenizer_text_append(out, text, bytes)
                   ? 0
                   : out_of_memory(e->err);
    }
    return 0;
}

static int run_steps(struct encoder *e, uint32_t step, const char *piece, size_t bytes, bool at_start)
{
    const struct tokenizer_op_list *list = &e->tok->pretokenizer;
    for (; bytes && step < list->count; step++) {
        if (list->ops[step].kind == OP_SPLIT)
            return split(e, step, piece, bytes, at_start);
        bool changed;
        struct tokenizer_text *out = &e->rewritten[step];
        int rc = rewrite(e, &list->ops[step], list->regexes[step], piece, bytes, at_start, out, &changed);
        if (rc)
            return rc;
        if (changed) {
            piece = out->data;
            bytes = out->bytes;
        }
    }
    return bytes ? encode_piece(e, piece, bytes) : 0;
}

// ---- added tokens

struct added_match {
    size_t start, end;
    const struct tokenizer_added *added;
};

// The longest added token that the text begins with, or NULL. The list is in order, so those that share the first
// n bytes with the text are neighbours: the range is narrowed byte by byte.
static const struct tokenizer_added *longest_added(const struct tokenizer *tok, const struct tokenizer_added_list *list,
                                                   const char *text, size_t bytes)
{
    const struct tokenizer_added *longest = NULL;
    uint32_t low = 0, high = list->count;
    for (size_t depth = 0; low < high; depth++) {
        // Of the tokens in range, all equal to the text so far, only the first can end here.
        if (list->added[low].text_bytes == depth)
            longest = &list->added[low++];
        if (depth == bytes)
            break;
        uint32_t bounds[2] = {low, high}; // first token whose byte at depth is >= wanted, then > wanted
        for (int side = 0; side < 2; side++) {
            uint32_t first = low, last = high;
            while (first < last) {
                uint32_t middle = first + (last - first) / 2;
                uint8_t byte = (uint8_t)tok->op_text[list->added[middle].text_offset + depth];
                if (byte < (uint8_t)text[depth] + side)
                    first = middle + 1;
                else
                    last = middle;
            }
            bounds[side] = first;
        }
        low = bounds[0];
        high = bounds[1];
    }
    return longest;
}

static bool is_word_at(const char *text, size_t bytes)
{
    uint32_t code_point;
    if (!bytes)
        return false;
    tokenizer_text_next(text, bytes, &code_point);
    return tokenizer_text_is_word(code_point);
}

static bool is_word_before(const char *text, size_t end)
{
    size_t length = end ? tokenizer_text_last(text, end) : 0;
    return is_word_at(text + end - length, length);
}

static size_t skip_spaces(const char *text, size_t bytes, size_t at)
{
    while (at < bytes) {
        uint32_t code_point;
        size_t length = tokenizer_text_next(text + at, bytes - at, &code_point);
        if (!tokenizer_text_is_space(code_point))
            break;
        at += length;
    }
    return at;
}

static size_t skip_spaces_back(const char *text, size_t end)
{
    while (end) {
        uint32_t code_point;
        size_t length = tokenizer_text_last(text, end);
        tokenizer_text_next(text + end - length, length, &code_point);
        if (!tokenizer_text_is_space(code_point))
            break;
        end -= length;
    }
    return end;
}

static bool any_from_user(const uint8_t *marks, size_t bytes) { return marks && memchr(marks, 1, bytes) != NULL; }

// Whether a user wrote something of a token that begins a text. Word marks in front of it do not count: normalizing puts them
// there, for a space that may be the user's.
static bool is_forged(const char *text, const uint8_t *marks, size_t bytes)
{
    size_t begin = 0;
    while (bytes - begin > 3 && !memcmp(text + begin, META, 3))
        begin += 3;
    return marks && any_from_user(marks + begin, bytes - begin);
}

// The longest added token at the front of a text that has no byte from a user, or is white space.
static const struct tokenizer_added *longest_allowed(const struct tokenizer *tok,
                                                     const struct tokenizer_added_list *list, const char *text,
                                                     const uint8_t *marks, size_t bytes)
{
    const struct tokenizer_added *added = longest_added(tok, list, text, bytes);
    while (added && tok->controls[added->id] && is_forged(text, marks, added->text_bytes))
        added = longest_added(tok, list, text, added->text_bytes - 1);
    return added;
}

// The next added token at or behind *position, leftmost then longest; *position moves behind it. False: none.
static bool next_added(const struct tokenizer *tok, const struct tokenizer_added_list *list, const char *text,
                       const uint8_t *marks, size_t bytes, size_t *position, struct added_match *match)
{
    for (size_t at = *position; at < bytes;) {
        const struct tokenizer_added *added =
            list->first_byte[(uint8_t)text[at]]
                ? longest_allowed(tok, list, text + at, marks ? marks + at : NULL, bytes - at)
                : NULL;
        if (!added) {
            at++;
            continue;
        }
        size_t end = at + added->text_bytes;
        bool inside_word =
            added->flags & ADDED_SINGLE_WORD && (is_word_before(text, at) || is_word_at(text + end, bytes - end));
        if (!inside_word) {
            *match = (struct added_match){at, end, added};
            *position = end;
            return true;
        }
        at = end;
    }
    return false;
}

typedef int segment_function(struct encoder *e, const char *text, const uint8_t *marks, size_t bytes, bool at_start);

// Pushes the ids of the added tokens in a text and hands what lies between them to encode_segment. marks: 1 for each byte from
// a user; NULL: none is.
static int cut_at_added(struct encoder *e, const struct tokenizer_added_list *list, const char *text,
                        const uint8_t *marks, size_t bytes, bool at_start, segment_function *encode_segment)
{
#define MARKS_AT(at) (marks ? marks + (at) : NULL)
    struct added_match match;
    size_t done = 0, position = 0;
    int rc = 0;
    if (e->plain || !list->count)
        return encode_segment(e, text, marks, bytes, at_start);
    while (!rc && next_added(e->tok, list, text, marks, bytes, &position, &match)) {
        if (match.added->flags & ADDED_LSTRIP) {
            match.start = skip_spaces_back(text, match.start);
            match.start = match.start > done ? match.start : done; // the token before may have taken the spaces
        }
        if (match.added->flags & ADDED_RSTRIP)
            match.end = skip_spaces(text, bytes, match.end);
        if (match.start > done)
            rc = encode_segment(e, text + done, MARKS_AT(done), match.start - done, at_start && done == 0);
        if (!rc)
            rc = tokenizer_push_id(e->out, match.added->id, e->err);
        done = match.end;
    }
    if (!rc && done < bytes)
        rc = encode_segment(e, text + done, MARKS_AT(done), bytes - done, at_start && done == 0);
    return rc;
#undef MARKS_AT
}

static int encode_normalized_segment(struct encoder *e, const char *text, const uint8_t *marks, size_t bytes,
                                     bool at_start)
{
    e->block = e->plain ? BLOCK_SPECIAL : any_from_user(marks, bytes) ? BLOCK_ADDED : BLOCK_NOTHING;
    return run_steps(e, 0, text, bytes, at_start);
}

// The normalizer steps. *normalized points to the result: into e, or text itself.
static int normalize(struct encoder *e, const char *text, size_t bytes, struct tokenizer_slice *normalized)
{
    const struct tokenizer_op_list *list = &e->tok->normalizer;
    *normalized = (struct tokenizer_slice){text, bytes};
    int turn = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        bool changed;
        struct tokenizer_text *out = &e->normalized[turn];
        int rc = rewrite(e, &list->ops[i], list->regexes[i], normalized->text, normalized->bytes, true, out, &changed);
        if (rc)
            return rc;
        if (changed) {
            *normalized = (struct tokenizer_slice){out->data, out->bytes};
            turn = !turn;
        }
    }
    return 0;
}

// ---- marks of normalized text

// A character composes with nothing before it. Everything below U+0300 is such a character.
static bool begins_cluster(const char *text) { return (uint8_t)*text < 0xCC && ((uint8_t)*text & 0xC0) != 0x80; }

// NFC cluster by cluster: one that changes is the user's as soon as one byte of it is.
static int mark_nfc(struct encoder *e, struct tokenizer_slice from, const uint8_t *marks, struct tokenizer_text *out)
{
    struct tokenizer_text cluster = {0};
    int rc = 0;
    for (size_t begin = 0, end; begin < from.bytes && !rc; begin = end) {
        for (end = begin + 1; end < from.bytes && !begins_cluster(from.text + end); end++)
            ;
        cluster.bytes = 0;
        if (!tokenizer_text_append_nfc(&cluster, from.text + begin, end - begin) ||
            !tokenizer_text_reserve(out, cluster.bytes)) {
            rc = out_of_memory(e->err);
        } else if (cluster.bytes == end - begin && !memcmp(cluster.data, from.text + begin, cluster.bytes)) {
            memcpy(out->data + out->bytes, marks + begin, cluster.bytes);
        } else {
            memset(out->data + out->bytes, any_from_user(marks + begin, end - begin), cluster.bytes);
        }
        out->bytes += rc ? 0 : cluster.bytes;
    }
    tokenizer_text_free(&cluster);
    return rc;
}

// What a Replace step puts in is the user's as soon as one byte of what it replaces is.
static int mark_replaced(struct encoder *e, const struct tokenizer_op *op, const struct tokenizer_regex *regex,
                         struct tokenizer_slice from, const uint8_t *marks, struct tokenizer_text *out)
{
    struct matcher matcher = matcher_of(e->tok, op, regex, e->memory, from.text, from.bytes);
    size_t done = 0, start, end;
    int found;
    while ((found = next_match(&matcher, &start, &end, e->err)) > 0) {
        if (!tokenizer_text_append(out, (const char *)marks + done, start - done) ||
            !tokenizer_text_reserve(out, op->content_bytes))
            return out_of_memory(e->err);
        memset(out->data + out->bytes, any_from_user(marks + start, end - start), op->content_bytes);
        out->bytes += op->content_bytes;
        done = end;
    }
    if (found < 0)
        return found;
    return tokenizer_text_append(out, (const char *)marks + done, from.bytes - done) ? 0 : out_of_memory(e->err);
}

// The normalizer steps on a text and its marks. *normalized as in normalize, *marks into e or as they were.
static int normalize_marked(struct encoder *e, const char *text, size_t bytes, struct tokenizer_slice *normalized,
                            const uint8_t **marks)
{
    const struct tokenizer_op_list *list = &e->tok->normalizer;
    *normalized = (struct tokenizer_slice){text, bytes};
    int turn = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        bool changed;
        struct tokenizer_text *out = &e->normalized[turn], *marked = &e->normalized_marks[turn];
        const struct tokenizer_op *op = &list->ops[i];
        int rc = rewrite(e, op, list->regexes[i], normalized->text, normalized->bytes, true, out, &changed);
        if (rc || !changed) {
            if (rc)
                return rc;
            continue;
        }
        marked->bytes = 0;
        if (op->kind == OP_NFC) {
            rc = mark_nfc(e, *normalized, *marks, marked);
        } else if (op->kind == OP_REPLACE) {
            rc = mark_replaced(e, op, list->regexes[i], *normalized, *marks, marked);
        } else { // a prefix
            size_t added = out->bytes - normalized->bytes;
            if (!tokenizer_text_reserve(marked, out->bytes))
                return out_of_memory(e->err);
            memset(marked->data, 0, added);
            memcpy(marked->data + added, *marks, normalized->bytes);
            marked->bytes = out->bytes;
        }
        if (rc)
            return rc;
        if (marked->bytes != out->bytes) // never: marks that do not fit would be another text's
            return error_set(e->err, ERR_OTHER, "the marks of a normalized text do not fit it");
        *normalized = (struct tokenizer_slice){out->data, out->bytes};
        *marks = (const uint8_t *)marked->data;
        turn = !turn;
    }
    return 0;
}

static int encode_raw_segment(struct encoder *e, const char *text, const uint8_t *marks, size_t bytes, bool at_start)
{
    struct tokenizer_slice normalized;
    marks = any_from_user(marks, bytes) ? marks : NULL;
    int rc = marks ? normalize_marked(e, text, bytes, &normalized, &marks) : normalize(e, text, bytes, &normalized);
    if (rc || !normalized.bytes)
        return rc;
    return cut_at_added(e, &e->tok->added_normalized, normalized.text, marks, normalized.bytes, at_start,
                        encode_normalized_segment);
}

static int encoder_open(struct encoder *e, const struct tokenizer *tok, struct error *err)
{
    *e = (struct encoder){.tok = tok, .err = err};
    e->memory = tokenizer_regex_memory_new();
    return e->memory ? 0 : out_of_memory(err);
}

static void encoder_close(struct encoder *e)
{
    tokenizer_bpe_free(&e->bpe);
    tokenizer_regex_memory_free(e->memory);
    for (int i = 0; i < 2; i++) {
        tokenizer_text_free(&e->normalized[i]);
        tokenizer_text_free(&e->normalized_marks[i]);
    }
    for (int i = 0; i < TOKENIZER_MAX_OPS; i++)
        tokenizer_text_free(&e->rewritten[i]);
}

static int push_ids(struct token_list *out, const uint32_t *ids, uint32_t count, struct error *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < count && !rc; i++)
        rc = tokenizer_push_id(out, ids[i], err);
    return rc;
}

static int encode_text(struct encoder *e, const char *text, const uint8_t *marks, size_t bytes, unsigned flags)
{
    const struct tokenizer *tok = e->tok;
    int rc = 0;
    if (flags & TOKENIZER_ADD_SPECIAL)
        rc = push_ids(e->out, tok->prefix_ids, tok->header->prefix_ids, e->err);
    if (!rc && bytes)
        rc = cut_at_added(e, &tok->added_raw, text, marks, bytes, true, encode_raw_segment);
    if (!rc && flags & TOKENIZER_ADD_SPECIAL)
        rc = push_ids(e->out, tok->suffix_ids, tok->header->suffix_ids, e->err);
    return rc;
}

int tokenizer_encode(const struct tokenizer *tok, const char *text, size_t text_bytes, unsigned flags,
                     struct token_list *out, struct error *err)
{
    struct encoder e;
    struct tokenizer_text repaired = {0}; // the text without invalid UTF-8, if it had some
    size_t count_before = out->count, used;
    int rc = encoder_open(&e, tok, err);
    if (rc)
        goto done;
    e.plain = flags & TOKENIZER_PLAIN_TEXT;
    e.out = out;
    if (text_bytes > MAX_TEXT_BYTES) {
        rc = error_set(err, ERR_USAGE, "a text of %zu bytes is too long to encode, at most 1 GiB is possible",
                       text_bytes);
        goto done;
    }
    if (tokenizer_text_valid_prefix(text, text_bytes) != text_bytes) {
        if (!tokenizer_text_append_lossy(&repaired, text, text_bytes, false, &used)) {
            rc = out_of_memory(err);
            goto done;
        }
        text = repaired.data;
        text_bytes = repaired.bytes;
    }
    rc = encode_text(&e, text, NULL, text_bytes, flags);
done:
    if (rc)
        out->count = count_before;
    tokenizer_text_free(&repaired);
    encoder_close(&e);
    return rc;
}

int tokenizer_encode_marked(const struct tokenizer *tok, const char *text, size_t text_bytes,
                            const struct text_segment *segments, size_t num_segments, unsigned flags,
                            struct token_list *out, struct error *err)
{
    struct encoder e;
    size_t count_before = out->count, covered = 0;
    uint8_t *marks = malloc(text_bytes + 1);
    int rc = encoder_open(&e, tok, err);
    e.out = out;
    if (!rc && !marks)
        rc = out_of_memory(err);
    if (!rc && (text_bytes > MAX_TEXT_BYTES || tokenizer_text_valid_prefix(text, text_bytes) != text_bytes))
        rc = error_set(err, ERR_USAGE, "a marked text must be valid UTF-8 of at most 1 GiB, this one has %zu bytes",
                       text_bytes);
    for (size_t i = 0; i < num_segments && !rc; i++) {
        if (segments[i].begin != covered || segments[i].end < covered || segments[i].end > text_bytes) {
            rc = error_set(err, ERR_USAGE, "the marked segments of a text do not cover it in order");
            break;
        }
        covered = segments[i].end;
        memset(marks + segments[i].begin, segments[i].from_user, covered - segments[i].begin);
    }
    if (!rc && covered != text_bytes)
        rc = error_set(err, ERR_USAGE, "the marked segments of a text do not cover it");
    if (!rc)
        rc = encode_text(&e, text, marks, text_bytes, flags);
    if (rc)
        out->count = count_before;
    free(marks);
    encoder_close(&e);
    return rc;
}

int tokenizer_encode_normalize(const struct tokenizer *tok, const char *text, size_t bytes, struct tokenizer_text *out,
                               struct error *err)
{
    struct encoder e;
    struct tokenizer_slice normalized;
    int rc = encoder_open(&e, tok, err);
    if (!rc)
        rc = normalize(&e, text, bytes, &normalized);
    if (!rc && !tokenizer_text_append(out, normalized.text, normalized.bytes))
        rc = out_of_memory(err);
    encoder_close(&e);
    return rc;
}

// Byte-pair encoding of one piece: the cheapest merge first, the leftmost among equals, until none applies.
// Owns: the model. Leaves to others: cutting text into pieces (tokenizer_encode.c).
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer_internal.h"

// Up to this many symbols a scan for the best merge beats a heap.
enum { SCAN_SYMBOLS = 40 };

struct bpe_symbol {
    uint32_t id;         // NONE: merged into its left neighbour
    uint32_t prev, next; // positions, or NONE
};

struct bpe_candidate { // a merge that was possible when it was pushed
    uint32_t rank, position, merged;
};

void tokenizer_bpe_free(struct tokenizer_bpe *bpe)
{
    free(bpe->symbols);
    free(bpe->heap);
    *bpe = (struct tokenizer_bpe){0};
}

static int out_of_memory(struct error *err) { return error_set(err, ERR_MEMORY, "out of memory while encoding text"); }

static int push_symbol(struct tokenizer_bpe *bpe, size_t *count, uint32_t id, struct error *err)
{
    if (*count == bpe->symbol_capacity) {
        size_t capacity = bpe->symbol_capacity ? bpe->symbol_capacity * 2 : 256;
        struct bpe_symbol *symbols = realloc(bpe->symbols, capacity * sizeof *symbols);
        if (!symbols)
            return out_of_memory(err);
        bpe->symbols = symbols;
        bpe->symbol_capacity = capacity;
    }
    bpe->symbols[(*count)++].id = id;
    return 0;
}

static bool blocked(const struct tokenizer *tok, uint32_t id, enum tokenizer_block block)
{
    return block == BLOCK_SPECIAL ? tok->token_flags[id] & TOKEN_SPECIAL : block == BLOCK_ADDED && tok->controls[id];
}

static bool all_bytes_have_ids(const struct tokenizer *tok, const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if (tok->byte_ids[(uint8_t)text[i]] == TOKENIZER_NONE)
            return false;
    return true;
}

static uint32_t character_id(const struct tokenizer *tok, const char *text, size_t length, uint32_t code_point,
                             enum tokenizer_block block)
{
    uint32_t id = code_point < 0x800 ? tok->letter_ids[code_point] : tokenizer_find(tok, text, length, TOKEN_IN_MODEL);
    if (id == TOKENIZER_NONE || !blocked(tok, id, block))
        return id;
    // A letter that is an added token has no smaller parts but its bytes: without those, dropping it would lose text.
    bool splits = tok->header->flags & IMAGE_BYTE_FALLBACK && all_bytes_have_ids(tok, text, length);
    return block == BLOCK_ADDED && !splits ? id : TOKENIZER_NONE;
}

// One symbol per character; unknown characters become byte tokens, the unknown token, or nothing.
static int split_characters(const struct tokenizer *tok, struct tokenizer_bpe *bpe, const char *piece, size_t bytes,
                            enum tokenizer_block block, size_t *count, struct error *err)
{
    const struct tokenizer_image_header *h = tok->header;
    int rc = 0;
    *count = 0;
    bool unknown_pending = false; // an unknown token waits: it may still fuse with the next
    for (size_t at = 0; at < bytes && !rc;) {
        uint32_t code_point;
        size_t length = tokenizer_text_next(piece + at, bytes - at, &code_point);
        uint32_t id = character_id(tok, piece + at, length, code_point, block);
        if (id != TOKENIZER_NONE) {
            if (unknown_pending)
                rc = push_symbol(bpe, count, h->unk_id, err);
            unknown_pending = false;
            rc = rc ? rc : push_symbol(bpe, count, id, err);
        } else if (h->flags & IMAGE_BYTE_FALLBACK && all_bytes_have_ids(tok, piece + at, length)) {
            // Hugging Face does not flush a pending unknown token here, so neither may we.
            for (size_t i = 0; i < length && !rc; i++)
                rc = push_symbol(bpe, count, tok->byte_ids[(uint8_t)piece[at + i]], err);
        } else if (h->unk_id != TOKENIZER_NONE) {
            if (unknown_pending && !(h->flags & IMAGE_FUSE_UNK))
                rc = push_symbol(bpe, count, h->unk_id, err);
            unknown_pending = true;
        }
        at += length;
    }
    if (unknown_pending && !rc)
        rc = push_symbol(bpe, count, h->unk_id, err);
    return rc;
}

// The merge of two neighbours, or NULL.
static const struct tokenizer_merge_slot *find_merge(const struct tokenizer *tok, uint32_t left, uint32_t right,
                                                     enum tokenizer_block block)
{
    uint32_t mask = tok->header->merge_slots - 1;
    uint32_t hash = tokenizer_image_pair_hash(left, right);
    for (uint32_t probe = 0; probe < TOKENIZER_PROBE_LIMIT; probe++) {
        const struct tokenizer_merge_slot *slot = &tok->merges[(hash + probe) & mask];
        if (slot->left == left && slot->right == right)
            return slot->merged < tok->header->id_count && !blocked(tok, slot->merged, block) ? slot : NULL;
        if (slot->left == TOKENIZER_NONE)
            return NULL;
    }
    return NULL;
}

static int merge_by_scan(const struct tokenizer *tok, const struct bpe_symbol *symbols, size_t count,
                         enum tokenizer_block block, struct token_list *out, struct error *err)
{
    uint32_t ids[SCAN_SYMBOLS];
    const struct tokenizer_merge_slot *merges[SCAN_SYMBOLS]; // [i]: of ids[i] and ids[i + 1]
    for (size_t i = 0; i < count; i++)
        ids[i] = symbols[i].id;
    for (size_t i = 0; i + 1 < count; i++)
        merges[i] = find_merge(tok, ids[i], ids[i + 1], block);
    for (;;) {
        const struct tokenizer_merge_slot *best = NULL;
        size_t at = 0;
        for (size_t i = 0; i + 1 < count; i++)
            if (merges[i] && (!best || merges[i]->rank < best->rank)) {
                best = merges[i];
                at = i;
            }
        if (!best)
            break;
        ids[at] = best->merged;
        count--;
        memmove(&ids[at + 1], &ids[at + 2], (count - at - 1) * sizeof *ids);
        memmove(&merges[at], &merges[at + 1], (count - at - 1) * sizeof *merges);
        if (at)
            merges[at - 1] = find_merge(tok, ids[at - 1], ids[at], block);
        if (at + 1 < count)
            merges[at] = find_merge(tok, ids[at], ids[at + 1], block);
    }
    int rc = 0;
    for (size_t i = 0; i < count && !rc; i++)
        rc = tokenizer_push_id(out, ids[i], err);
    return rc;
}

static bool comes_before(struct bpe_candidate a, struct bpe_candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.position < b.position;
}

static void heap_push(struct bpe_candidate *heap, size_t *size, struct bpe_candidate candidate)
{
    size_t i = (*size)++;
    for (; i && comes_before(candidate, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = candidate;
}

static struct bpe_candidate heap_pop(struct bpe_candidate *heap, size_t *size)
{
    struct bpe_candidate top = heap[0], last = heap[--*size];
    size_t i = 0;
    for (size_t child = 1; child < *size; child = 2 * i + 1) {
        if (child + 1 < *size && comes_before(heap[child + 1], heap[child]))
            child++;
        if (!comes_before(heap[child], last))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static void push_candidate(const struct tokenizer *tok, struct tokenizer_bpe *bpe, size_t *size, uint32_t left,
                           uint32_t right, enum tokenizer_block block)
{
    const struct tokenizer_merge_slot *merge = find_merge(tok, bpe->symbols[left].id, bpe->symbols[right].id, block);
    if (merge)
        heap_push(bpe->heap, size, (struct bpe_candidate){merge->rank, left, merge->merged});
}

// n log n for long pieces. Candidates whose symbols changed meanwhile stay in the heap and are dropped when popped.
static int merge_by_heap(const struct tokenizer *tok, struct tokenizer_bpe *bpe, size_t count,
                         enum tokenizer_block block, struct token_list *out, struct error *err)
{
    // At most one candidate per neighbours at first; each merge pops one, pushes two, and there are below count merges.
    if (bpe->heap_capacity < 2 * count) {
        free(bpe->heap);
        bpe->heap_capacity = 0;
        if (!(bpe->heap = malloc(2 * count * sizeof *bpe->heap)))
            return out_of_memory(err);
        bpe->heap_capacity = 2 * count;
    }
    struct bpe_symbol *symbols = bpe->symbols;
    size_t size = 0;
    for (uint32_t i = 0; i < count; i++) {
        symbols[i].prev = i ? i - 1 : TOKENIZER_NONE;
        symbols[i].next = i + 1 < count ? i + 1 : TOKENIZER_NONE;
    }
    for (uint32_t i = 0; i + 1 < count; i++)
        push_candidate(tok, bpe, &size, i, i + 1, block);
    while (size) {
        struct bpe_candidate top = heap_pop(bpe->heap, &size);
        struct bpe_symbol *left = &symbols[top.position];
        if (left->id == TOKENIZER_NONE || left->next == TOKENIZER_NONE)
            continue;
        struct bpe_symbol *right = &symbols[left->next];
        const struct tokenizer_merge_slot *merge = find_merge(tok, left->id, right->id, block);
        if (!merge || merge->merged != top.merged)
            continue;
        left->id = merge->merged;
        left->next = right->next;
        right->id = TOKENIZER_NONE;
        if (left->next != TOKENIZER_NONE)
            symbols[left->next].prev = top.position;
        if (left->prev != TOKENIZER_NONE)
            push_candidate(tok, bpe, &size, left->prev, top.position, block);
        if (left->next != TOKENIZER_NONE)
            push_candidate(tok, bpe, &size, top.position, left->next, block);
    }
    int rc = 0;
    for (uint32_t i = 0; i != TOKENIZER_NONE && !rc; i = symbols[i].next)
        rc = tokenizer_push_id(out, symbols[i].id, err);
    return rc;
}

int tokenizer_bpe_encode(const struct tokenizer *tok, struct tokenizer_bpe *bpe, const char *piece, size_t bytes,
                         enum tokenizer_block block, struct token_list *out, struct error *err)
{
    if (bytes <= tok->header->longest_token) {
        uint32_t id = tokenizer_find(tok, piece, bytes, TOKEN_WHOLE);
        if (id != TOKENIZER_NONE && !blocked(tok, id, block))
            return tokenizer_push_id(out, id, err);
    }
    size_t count;
    int rc = split_characters(tok, bpe, piece, bytes, block, &count, err);
    if (rc || !count)
        return rc;
    if (count >= TOKENIZER_NONE / 2)
        return error_set(err, ERR_USAGE, "a text of %zu characters without a break is too long to encode", count);
    if (count <= SCAN_SYMBOLS)
        return merge_by_scan(tok, bpe->symbols, count, block, out, err);
    return merge_by_heap(tok, bpe, count, block, out, err);
}

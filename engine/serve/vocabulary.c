// The bytes of every token, and the trie of them. See vocabulary.h.
#include "engine/serve/vocabulary_internal.h"

#include "engine/serve/grammar_cache.h"

#include <stdlib.h>
#include <string.h>

static int out_of_memory(struct error *err)
{
    return error_set(err, ERR_MEMORY, "out of memory for the vocabulary's trie");
}

// Bytes that no UTF-8 has: a token with one can never be part of a text, and the mark stays for special tokens.
static bool in_utf8(const char *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint8_t byte = (uint8_t)bytes[i];
        if (byte == 0xC0 || byte == 0xC1 || byte >= 0xF5)
            return false;
    }
    return true;
}

// ---- the trie ----------------------------------------------------------------------------------------------------

static int compare_tokens(const void *a, const void *b, void *arg)
{
    const struct vocabulary *v = arg;
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    uint32_t x_bytes = v->offsets[x + 1] - v->offsets[x], y_bytes = v->offsets[y + 1] - v->offsets[y];
    int order = memcmp(v->bytes + v->offsets[x], v->bytes + v->offsets[y], x_bytes < y_bytes ? x_bytes : y_bytes);
    if (order)
        return order;
    if (x_bytes != y_bytes)
        return x_bytes < y_bytes ? -1 : 1;
    return x < y ? -1 : x > y;
}

// Nodes come out in the right order because the tokens are sorted. open: the nodes of the current token's prefixes.
static int build_trie(struct vocabulary *v, struct error *err)
{
    struct vocabulary_trie *trie = &v->trie;
    uint32_t count = 0, total = v->offsets[v->num_tokens], depth = 0;
    size_t most = (size_t)total + 1;
    uint32_t *open = calloc((size_t)v->longest_bytes + 1, sizeof *open);
    trie->tokens = calloc((size_t)v->num_tokens + 1, sizeof *trie->tokens);
    trie->byte = calloc(most, sizeof *trie->byte);
    trie->end = calloc(most, sizeof *trie->end);
    trie->first_token = calloc(most + 1, sizeof *trie->first_token);
    if (!open || !trie->tokens || !trie->byte || !trie->end || !trie->first_token) {
        free(open);
        return out_of_memory(err);
    }
    for (int64_t id = 0; id < v->num_tokens; id++)
        if (v->offsets[id + 1] > v->offsets[id])
            trie->tokens[count++] = (uint32_t)id;
    qsort_r(trie->tokens, count, sizeof *trie->tokens, compare_tokens, v);
    trie->num_nodes = 1;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *bytes = v->bytes + v->offsets[trie->tokens[i]];
        uint32_t num_bytes = v->offsets[trie->tokens[i] + 1] - v->offsets[trie->tokens[i]], common = 0;
        while (common < depth && common < num_bytes && trie->byte[open[common + 1]] == bytes[common])
            common++;
        for (; depth > common; depth--)
            trie->end[open[depth]] = trie->num_nodes;
        for (; depth < num_bytes; depth++) {
            open[depth + 1] = trie->num_nodes;
            trie->byte[trie->num_nodes] = bytes[depth];
            trie->first_token[trie->num_nodes++] = i;
        }
    }
    for (; depth > 0; depth--)
        trie->end[open[depth]] = trie->num_nodes;
    trie->end[0] = trie->num_nodes;
    trie->first_token[trie->num_nodes] = count;
    free(open);
    // What the many children of short prefixes did not use.
    void *smaller;
    if ((smaller = realloc(trie->byte, trie->num_nodes)))
        trie->byte = smaller;
    if ((smaller = realloc(trie->end, trie->num_nodes * sizeof *trie->end)))
        trie->end = smaller;
    if ((smaller = realloc(trie->first_token, ((size_t)trie->num_nodes + 1) * sizeof *trie->first_token)))
        trie->first_token = smaller;
    return 0;
}

bool vocabulary_has_special(const struct vocabulary *vocabulary, const char *content)
{
    const struct vocabulary_trie *trie = &vocabulary->trie;
    uint32_t node = 0, wanted = VOCABULARY_MARK;
    for (const char *next = content;; next++) {
        uint32_t child = node + 1;
        while (child < trie->end[node] && trie->byte[child] != wanted)
            child = trie->end[child];
        if (child >= trie->end[node])
            return false;
        node = child;
        if (!*next)
            break;
        wanted = (uint8_t)*next;
    }
    return trie->first_token[node] < trie->first_token[node + 1] && *content;
}

// ---- creation ----------------------------------------------------------------------------------------------------

static bool is_eos(const struct vocabulary *v, int64_t id)
{
    for (int64_t i = 0; i < v->num_eos; i++)
        if (v->eos[i] == id)
            return true;
    return false;
}

static int create_empty(struct vocabulary **out, int64_t count, const uint32_t *eos, int64_t num_eos, struct error *err)
{
    struct vocabulary *v = calloc(1, sizeof *v);
    if (!v)
        return out_of_memory(err);
    pthread_mutex_init(&v->lock, NULL);
    v->num_tokens = count;
    v->num_eos = num_eos;
    v->offsets = calloc((size_t)count + 1, sizeof *v->offsets);
    v->eos = calloc((size_t)num_eos + 1, sizeof *v->eos);
    if (!v->offsets || !v->eos) {
        vocabulary_free(v);
        return out_of_memory(err);
    }
    if (num_eos)
        memcpy(v->eos, eos, (size_t)num_eos * sizeof *eos);
    *out = v;
    return 0;
}

// Appends the bytes of the next id to v->bytes, whose room is *capacity.
static int add_token(struct vocabulary *v, int64_t id, const char *bytes, size_t count, bool special, size_t *capacity,
                     struct error *err)
{
    uint32_t begin = v->offsets[id];
    if (is_eos(v, id) || !count || count >= VOCABULARY_MAX_TOKEN_BYTES || (!special && !in_utf8(bytes, count)))
        count = special = 0;
    if (count > UINT32_MAX / 4 - begin)
        return error_set(err, ERR_MODEL, "the tokens of the vocabulary have more than 1 GiB of text");
    size_t end = begin + count + special;
    if (end > *capacity) {
        size_t wanted = 2 * end + 4096;
        uint8_t *more = realloc(v->bytes, wanted);
        if (!more)
            return out_of_memory(err);
        v->bytes = more;
        *capacity = wanted;
    }
    if (special)
        v->bytes[begin] = VOCABULARY_MARK;
    if (count)
        memcpy(v->bytes + begin + special, bytes, count);
    v->offsets[id + 1] = (uint32_t)end;
    if (end - begin > v->longest_bytes)
        v->longest_bytes = (uint32_t)(end - begin);
    return 0;
}

static int finish(struct vocabulary *v, struct vocabulary **out, struct error *err)
{
    int rc;
    if ((rc = build_trie(v, err)) || (rc = grammar_cache_create(&v->cache, err)))
        return rc;
    *out = v;
    return 0;
}

int vocabulary_create_from(struct vocabulary **out, const struct vocabulary_token *tokens, int64_t count,
                           const uint32_t *eos, int64_t num_eos, struct error *err)
{
    struct vocabulary *v = NULL;
    size_t capacity = 0;
    int rc = create_empty(&v, count, eos, num_eos, err);
    for (int64_t id = 0; id < count && !rc; id++)
        rc = add_token(v, id, tokens[id].bytes, tokens[id].count, tokens[id].special, &capacity, err);
    if (rc || (rc = finish(v, out, err)))
        vocabulary_free(v);
    return rc;
}

int vocabulary_create(struct vocabulary **out, const struct tokenizer *tokenizer, const uint32_t *eos, int64_t num_eos,
                      struct error *err)
{
    struct vocabulary *v = NULL;
    struct tokenizer_stream *plain = NULL, *all = NULL;
    size_t capacity = 0;
    int64_t count = tokenizer_vocab_size(tokenizer);
    int rc = create_empty(&v, count, eos, num_eos, err);
    if (rc || (rc = tokenizer_stream_new(&plain, tokenizer, true, err)) ||
        (rc = tokenizer_stream_new(&all, tokenizer, false, err)))
        goto done;
    for (int64_t id = 0; id < count; id++) {
        bool special = tokenizer_is_special(tokenizer, (uint32_t)id);
        const char *bytes;
        size_t num_bytes;
        if ((rc = tokenizer_stream_token_bytes(special ? all : plain, (uint32_t)id, &bytes, &num_bytes, err)) ||
            (rc = add_token(v, id, bytes, num_bytes, special, &capacity, err)))
            goto done;
    }
    rc = finish(v, out, err);
done:
    if (rc)
        vocabulary_free(v);
    tokenizer_stream_free(plain);
    tokenizer_stream_free(all);
    return rc;
}

void vocabulary_free(struct vocabulary *v)
{
    if (!v)
        return;
    grammar_cache_free(v->cache);
    pthread_mutex_destroy(&v->lock);
    free(v->offsets);
    free(v->bytes);
    free(v->eos);
    free(v->trie.byte);
    free(v->trie.end);
    free(v->trie.first_token);
    free(v->trie.tokens);
    free(v);
}

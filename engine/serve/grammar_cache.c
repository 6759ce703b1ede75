// Compiled languages and the tokens that their places allow; the walk of the trie. See grammar_cache.h.
#include "engine/serve/grammar_cache.h"

#include <stdlib.h>
#include <string.h>

// ---- walking the trie ----------------------------------------------------------------------------------------------

void grammar_walk(const struct vocabulary *vocabulary, struct machine *machine, uint32_t config, uint32_t trie_node,
                  uint32_t *mask, int64_t words, uint32_t *leaves, uint32_t *num_leaves)
{
    const struct vocabulary_trie *trie = &vocabulary->trie;
    struct {
        uint32_t end, config;
    } levels[VOCABULARY_MAX_TOKEN_BYTES + 1];
    int level = 0;
    levels[0].end = trie->end[trie_node];
    levels[0].config = config;
    int64_t steps = 0;
    for (uint32_t node = trie_node + 1; node < levels[0].end; steps++) {
        while (levels[level].end <= node)
            level--;
        uint32_t to = machine_step(machine, levels[level].config, trie->byte[node]), end = trie->end[node];
        if (to == MACHINE_DEAD) {
            node = end;
            continue;
        }
        for (uint32_t i = trie->first_token[node]; i < trie->first_token[node + 1]; i++)
            if (trie->tokens[i] / 32 < words)
                mask[trie->tokens[i] / 32] |= 1u << trie->tokens[i] % 32;
        if (end > node + 1) {
            if (leaves && machine->configs[to].ends)
                leaves[(*num_leaves)++] = node;
            level++;
            levels[level].end = end;
            levels[level].config = to;
        }
        node++;
    }
    machine->work -= steps / GRAMMAR_CACHE_NODES_PER_WORK;
}

// ---- entries -------------------------------------------------------------------------------------------------------

static void entry_free(struct grammar_entry *entry)
{
    if (!entry)
        return;
    free(entry->bits);
    free(entry->ids);
    free(entry->leaves);
    free(entry);
}

static void table_clear(struct entry_table *table)
{
    for (uint32_t i = 0; i < table->capacity; i++)
        entry_free(table->slots[i]);
    free(table->slots);
    *table = (struct entry_table){0};
}

static uint32_t slot_of(const struct entry_table *table, uint64_t key)
{
    uint32_t slot = (uint32_t)(key * 0x9E3779B97F4A7C15u >> 32) & (table->capacity - 1);
    while (table->slots[slot] && table->slots[slot]->key != key)
        slot = (slot + 1) & (table->capacity - 1);
    return slot;
}

static bool table_add(struct entry_table *table, struct grammar_entry *entry)
{
    if (2 * (table->used + 1) > table->capacity) {
        struct entry_table larger = {.capacity = table->capacity ? 2 * table->capacity : 64, .used = table->used};
        if (!(larger.slots = calloc(larger.capacity, sizeof *larger.slots)))
            return false;
        for (uint32_t i = 0; i < table->capacity; i++)
            if (table->slots[i])
                larger.slots[slot_of(&larger, table->slots[i]->key)] = table->slots[i];
        free(table->slots);
        *table = larger;
    }
    table->slots[slot_of(table, entry->key)] = entry;
    table->used++;
    return true;
}

// What can be told apart of a place by one token: a token of b bytes begins at most b iterations of a loop.
static uint64_t place_key(const struct vocabulary *vocabulary, const struct net *net, struct machine_place place)
{
    uint32_t index = net->nodes[place.node].loop, least = 0, most = 0, far = vocabulary->longest_bytes + 1;
    if (index) {
        const struct net_loop *loop = &net->loops[index];
        least = loop->min > place.count ? loop->min - place.count : 0;
        most = loop->max == NET_NO_LIMIT ? far : loop->max - place.count;
        least = least < far ? least : far;
        most = most < far ? most : far;
    }
    return (uint64_t)place.node << 40 | (uint64_t)(least & 0xFFFFF) << 20 | (most & 0xFFFFF);
}

// From the mask of a walk to what is kept: a list where that is shorter.
static bool entry_take_mask(struct grammar_entry *entry, const uint32_t *mask, int64_t words, uint64_t *bytes)
{
    int64_t count = 0;
    for (int64_t i = 0; i < words; i++)
        count += __builtin_popcount(mask[i]);
    bool list = count < words;
    uint32_t *kept = malloc((size_t)(list ? count + 1 : words) * sizeof *kept);
    if (!kept)
        return false;
    *bytes += (size_t)(list ? count : words) * sizeof *kept;
    if (!list) {
        memcpy(kept, mask, (size_t)words * sizeof *kept);
        entry->bits = kept;
        return true;
    }
    entry->ids = kept;
    for (int64_t i = 0; i < words; i++)
        for (uint32_t word = mask[i]; word; word &= word - 1)
            kept[entry->num_ids++] = (uint32_t)(32 * i) + (uint32_t)__builtin_ctz(word);
    return true;
}

static struct grammar_entry *entry_create(struct vocabulary *vocabulary, struct grammar_language *language,
                                          struct machine_place place, uint64_t key)
{
    struct machine *machine = &language->machine;
    int64_t words = (vocabulary->num_tokens + 31) / 32;
    uint64_t bytes = sizeof(struct grammar_entry);
    if (!machine->net && machine_init(machine, &language->net))
        return NULL;
    if (machine->exhausted || machine_bytes(machine) > MACHINE_COMPACT_BYTES)
        machine_reset(machine);
    bool all_work = vocabulary->cache->work == GRAMMAR_CACHE_WORK;
    machine->work = vocabulary->cache->work;
    struct grammar_entry *entry = calloc(1, sizeof *entry);
    uint32_t *mask = calloc((size_t)words + 1, sizeof *mask);
    uint32_t *leaves = malloc((size_t)vocabulary->trie.num_nodes * sizeof *leaves);
    if (!entry || !mask || !leaves)
        goto fail;
    entry->key = key;
    uint32_t start = machine_start(machine, place.node, place.count);
    grammar_walk(vocabulary, machine, start, 0, mask, words, leaves, &entry->num_leaves);
    vocabulary->cache->work = machine->work > 0 ? machine->work : 0;
    if (machine->exhausted && !all_work)
        goto fail; // it may succeed another time
    entry->cut = machine->exhausted;
    // Some of them may be of earlier walks: the depth is not below what it was in this one.
    for (uint32_t i = 1; i < machine->num_configs; i++) {
        entry->cut |= machine->configs[i].cut;
        if (machine->configs[i].depth > entry->depth)
            entry->depth = machine->configs[i].depth;
    }
    if (entry->cut) {
        entry->num_leaves = 0;
        machine_reset(machine);
    } else if (!entry_take_mask(entry, mask, words, &bytes)) {
        goto fail;
    }
    if (!(entry->leaves = malloc(((size_t)entry->num_leaves + 1) * sizeof *leaves)))
        goto fail;
    memcpy(entry->leaves, leaves, entry->num_leaves * sizeof *leaves);
    bytes += entry->num_leaves * sizeof *leaves;
    vocabulary->cache->entry_bytes += bytes;
    free(mask);
    free(leaves);
    return entry;
fail:
    free(mask);
    free(leaves);
    entry_free(entry);
    return NULL;
}

const struct grammar_entry *grammar_cache_entry(struct vocabulary *vocabulary, struct grammar_language *language,
                                                struct machine_place place)
{
    struct grammar_cache *cache = vocabulary->cache;
    struct entry_table *table = place.node < language->base_nodes ? &cache->base : &language->entries;
    uint64_t key = place_key(vocabulary, &language->net, place);
    if (table->capacity) {
        struct grammar_entry *found = table->slots[slot_of(table, key)];
        if (found)
            return found;
    }
    if (cache->entry_bytes > GRAMMAR_CACHE_ENTRY_BYTES) {
        table_clear(&cache->base);
        for (struct grammar_language *each = cache->languages; each; each = each->next)
            table_clear(&each->entries);
        table_clear(&language->entries);
        cache->entry_bytes = 0;
    }
    struct grammar_entry *entry = entry_create(vocabulary, language, place, key);
    if (entry && !table_add(table, entry)) {
        entry_free(entry);
        entry = NULL;
    }
    return entry;
}

// ---- languages -----------------------------------------------------------------------------------------------------

void grammar_language_free(struct grammar_language *language)
{
    if (!language)
        return;
    machine_clear(&language->machine);
    grammar_net_clear(&language->net);
    table_clear(&language->entries);
    free(language->key);
    free(language);
}

static void free_languages(struct grammar_language *first)
{
    while (first) {
        struct grammar_language *next = first->next;
        grammar_language_free(first);
        first = next;
    }
}

int grammar_cache_create(struct grammar_cache **out, struct error *err)
{
    *out = calloc(1, sizeof **out);
    return *out ? 0 : error_set(err, ERR_MEMORY, "out of memory for the vocabulary");
}

void grammar_cache_free(struct grammar_cache *cache)
{
    if (!cache)
        return;
    free_languages(cache->languages);
    table_clear(&cache->base);
    free(cache);
}

static uint64_t language_bytes(const struct grammar_language *language)
{
    return language->net.node_capacity * sizeof(struct net_node) +
           language->net.edge_capacity * sizeof(struct net_edge) + language->key_bytes +
           machine_bytes(&language->machine);
}

// Takes out those that were not used for longest until the rest is small enough; returns them. Languages in use do not count.
static struct grammar_language *trim(struct grammar_cache *cache)
{
    struct grammar_language *dropped = NULL;
    uint64_t bytes = 0;
    int64_t count = 0;
    for (struct grammar_language **at = &cache->languages; *at;) {
        struct grammar_language *language = *at;
        if (!atomic_load(&language->users)) {
            bytes += language_bytes(language);
            if (++count > GRAMMAR_CACHE_LANGUAGES || bytes > GRAMMAR_CACHE_NET_BYTES) {
                *at = language->next;
                language->next = dropped;
                dropped = language;
                continue;
            }
        }
        at = &language->next;
    }
    return dropped;
}

struct grammar_language *grammar_cache_find(struct vocabulary *vocabulary, const char *key, size_t key_bytes)
{
    struct grammar_cache *cache = vocabulary->cache;
    struct grammar_language *found = NULL, *dropped;
    pthread_mutex_lock(&vocabulary->lock);
    for (struct grammar_language **at = &cache->languages; *at && !found; at = &(*at)->next) {
        if ((*at)->key_bytes == key_bytes && !memcmp((*at)->key, key, key_bytes)) {
            found = *at;
            *at = found->next;
            found->next = cache->languages;
            cache->languages = found;
            atomic_fetch_add(&found->users, 1);
            break;
        }
    }
    dropped = trim(cache);
    pthread_mutex_unlock(&vocabulary->lock);
    free_languages(dropped);
    return found;
}

void grammar_cache_add(struct vocabulary *vocabulary, struct grammar_language *language)
{
    pthread_mutex_lock(&vocabulary->lock);
    language->next = vocabulary->cache->languages;
    vocabulary->cache->languages = language;
    pthread_mutex_unlock(&vocabulary->lock);
}

void grammar_cache_release(struct grammar_language *language) { atomic_fetch_sub(&language->users, 1); }

// Compiled languages of one vocabulary, kept for the next request with the same schema, and for each place of their automata the tokens that
// it allows whatever called its rule. Most tokens are decided by the rule that the text is in: these masks are found once and then copied;
// only tokens that go on behind the rule's end are walked from there, in the context of each sequence (after XGrammar, Dong et al. 2024).
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_CACHE_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_CACHE_H

#include "engine/serve/grammar_machine.h"
#include "engine/serve/vocabulary_internal.h"

#include <stdatomic.h>

enum {
    GRAMMAR_CACHE_LANGUAGES = 64,         // kept though nobody uses them
    GRAMMAR_CACHE_ENTRY_BYTES = 96 << 20, // of all entries together; above it all are forgotten
    GRAMMAR_CACHE_NET_BYTES = 64 << 20,   // of languages that nobody uses
    GRAMMAR_CACHE_WORK = 200000,          // places visited for one mask: some 10 ms
    GRAMMAR_CACHE_NODES_PER_WORK = 8,     // of the trie
};

struct grammar_language { // immutable but for entries and what belongs to the cache
    struct net net;
    uint32_t base_nodes; // the first nodes are the same in all languages, and so are their entries
    char *key;           // what it was compiled from [key_bytes]
    size_t key_bytes;
    // Rises under the lock alone, so that one without users stays so while the lock is held; falls without it.
    atomic_int_least64_t users;
    struct grammar_language *next; // used latest first
    struct machine machine;        // for entries; net NULL: none yet
    struct entry_table {
        struct grammar_entry **slots;
        uint32_t capacity, used;
    } entries;
};

// The tokens that one place allows.
struct grammar_entry {
    uint64_t key;
    bool cut;       // the machine left something out: the entry says nothing
    uint16_t depth; // of the deepest stack that was met
    uint32_t *bits; // [words] tokens that end within the rule or at its end; or
    uint32_t *ids;  // [num_ids] the same as a list
    uint32_t num_ids;
    uint32_t *leaves; // [num_leaves] nodes of the trie that have children and where the rule may have ended
    uint32_t num_leaves;
};

struct grammar_cache {
    struct grammar_language *languages;
    struct entry_table base;
    uint64_t entry_bytes;
    int64_t work; // what entries may still cost before the next mask
};

int grammar_cache_create(struct grammar_cache **out, struct error *err);
void grammar_cache_free(struct grammar_cache *cache); // accepts NULL

// The language with this key, with one more user; NULL when there is none. Frees languages that nobody has used for long. Takes the lock.
struct grammar_language *grammar_cache_find(struct vocabulary *vocabulary, const char *key, size_t key_bytes);
// Takes over a language that has one user. Takes the lock.
void grammar_cache_add(struct vocabulary *vocabulary, struct grammar_language *language);
// One user less. Takes no lock and frees nothing, so that no thread waits in it: the next grammar_cache_find does that.
void grammar_cache_release(struct grammar_language *language);
void grammar_language_free(struct grammar_language *language);

// The entry of a place; the lock is held, also while the entry is used. NULL: memory or the work for this mask is out.
const struct grammar_entry *grammar_cache_entry(struct vocabulary *vocabulary, struct grammar_language *language,
                                                struct machine_place place);

// Sets the bits of all tokens below a node of the trie that may follow this configuration. leaves [*num_leaves], if not NULL, receives
// the nodes with children where the configuration ends.
void grammar_walk(const struct vocabulary *vocabulary, struct machine *machine, uint32_t config, uint32_t trie_node,
                  uint32_t *mask, int64_t words, uint32_t *leaves, uint32_t *num_leaves);

#endif

// Following one sequence. See grammar.h.
#include "engine/serve/grammar_internal.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_ENTRY_PLACES = 64, // with more places the trie is walked for all of them at once
    // Such walks are for texts that are in very many places at once. One sequence may need some; one that needs them for each token gets less
    // for each, so that a schema that was made for it cannot take the time of all other sequences.
    WALK_CREDIT = 8 * GRAMMAR_CACHE_WORK,
    WALK_CREDIT_PER_TOKEN = GRAMMAR_CACHE_WORK / 8,
    ADVANCE_WORK = 64 * GRAMMAR_CACHE_WORK, // a token that was allowed is never refused for want of it
};

struct grammar_state {
    struct vocabulary *vocabulary;
    struct grammar_language *language;
    struct machine machine;
    uint32_t config;
    bool lost;      // dead for want of work or memory
    int64_t credit; // work that walks of the whole trie may still take
};

int grammar_state_create(struct grammar_state **out, struct grammar *grammar, struct error *err)
{
    struct grammar_state *state = calloc(1, sizeof *state);
    struct grammar_language *language = grammar_language(grammar);
    if (!state || machine_init(&state->machine, &language->net)) {
        free(state);
        return error_set(err, ERR_MEMORY, "out of memory for the state of a grammar");
    }
    state->vocabulary = grammar_vocabulary(grammar);
    state->language = language;
    state->machine.work = ADVANCE_WORK;
    state->credit = WALK_CREDIT;
    state->config = machine_start(&state->machine, language->net.start, 0);
    if (state->config == MACHINE_DEAD && state->machine.exhausted) { // not that nothing is allowed
        grammar_state_free(state);
        return error_set(err, ERR_MEMORY, "out of memory for the state of a grammar");
    }
    *out = state;
    return 0;
}

void grammar_state_free(struct grammar_state *state)
{
    if (!state)
        return;
    machine_clear(&state->machine);
    free(state);
}

bool grammar_state_complete(const struct grammar_state *state) { return state->machine.configs[state->config].ends; }
bool grammar_state_dead(const struct grammar_state *state) { return state->config == MACHINE_DEAD; }

// ---- taking bytes --------------------------------------------------------------------------------------------------

static uint32_t follow(struct machine *machine, uint32_t config, const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count && config != MACHINE_DEAD; i++)
        config = machine_step(machine, config, bytes[i]);
    return config;
}

// Where these bytes lead; MACHINE_DEAD if they may not follow, or, with machine.exhausted, if that could not be found out.
static uint32_t after(struct grammar_state *state, const uint8_t *bytes, size_t count)
{
    struct machine *machine = &state->machine;
    state->config = machine_compact(machine, state->config);
    machine->work = ADVANCE_WORK;
    uint32_t to = follow(machine, state->config, bytes, count);
    bool exhausted = machine->exhausted;
    // Places left out on the way may have been those that count: then each place goes its own way.
    for (uint32_t i = 0; to == MACHINE_DEAD && i < machine->configs[state->config].count; i++) {
        struct machine_place place = machine->places[machine->configs[state->config].first + i];
        machine->exhausted = false;
        to = follow(machine, machine_single(machine, place), bytes, count);
        exhausted |= machine->exhausted;
    }
    machine->exhausted = exhausted;
    return to;
}

bool grammar_state_admits(struct grammar_state *state, const char *bytes, size_t count)
{
    return after(state, (const uint8_t *)bytes, count) != MACHINE_DEAD;
}

bool grammar_state_take(struct grammar_state *state, const char *bytes, size_t count)
{
    uint32_t to = after(state, (const uint8_t *)bytes, count);
    if (to != MACHINE_DEAD)
        state->config = to;
    return to != MACHINE_DEAD;
}

void grammar_state_advance(void *arg, uint32_t token)
{
    struct grammar_state *state = arg;
    const struct vocabulary *v = state->vocabulary;
    uint32_t begin = 0, end = 0;
    if (token < v->num_tokens) {
        begin = v->offsets[token];
        end = v->offsets[token + 1];
    }
    bool was_dead = grammar_state_dead(state);
    state->config = begin == end ? MACHINE_DEAD : after(state, v->bytes + begin, end - begin);
    if (!was_dead)
        state->lost = grammar_state_dead(state) && begin < end && state->machine.exhausted;
}

// ---- the mask ------------------------------------------------------------------------------------------------------

// Adds what one place allows. false: its entry cannot be used here.
static bool add_place(struct grammar_state *state, struct machine_place place, uint32_t *mask, int64_t words)
{
    struct machine *machine = &state->machine;
    const struct grammar_entry *entry = grammar_cache_entry(state->vocabulary, state->language, place);
    int64_t all_words = (state->vocabulary->num_tokens + 31) / 32;
    if (!entry || entry->cut ||
        machine->stacks[place.stack].depth + entry->depth + state->language->net.max_height > NET_MAX_DEPTH)
        return false;
    for (int64_t i = 0; entry->bits && i < words && i < all_words; i++)
        mask[i] |= entry->bits[i];
    for (uint32_t i = 0; i < entry->num_ids; i++)
        if (entry->ids[i] / 32 < words)
            mask[entry->ids[i] / 32] |= 1u << entry->ids[i] % 32;
    uint32_t after = entry->num_leaves ? machine_return(machine, place.stack) : MACHINE_DEAD;
    for (uint32_t i = 0; after != MACHINE_DEAD && i < entry->num_leaves; i++)
        grammar_walk(state->vocabulary, machine, after, entry->leaves[i], mask, words, NULL, NULL);
    return true;
}

static void fill(struct grammar_state *state, uint32_t *mask, int64_t words)
{
    struct machine *machine = &state->machine;
    struct machine_config config = machine->configs[state->config];
    bool by_entries = !config.cut && config.count <= MAX_ENTRY_PLACES;
    for (uint32_t i = 0; by_entries && i < config.count; i++)
        by_entries = add_place(state, machine->places[config.first + i], mask, words);
    if (!by_entries) {
        memset(mask, 0, (size_t)words * sizeof *mask);
        machine->exhausted = false;
        int64_t work = state->credit < GRAMMAR_CACHE_WORK ? state->credit : GRAMMAR_CACHE_WORK;
        machine->work = work;
        grammar_walk(state->vocabulary, machine, state->config, 0, mask, words, NULL, NULL);
        state->credit -= machine->work > 0 ? work - machine->work : work;
    }
}

void grammar_state_fill(void *arg, uint32_t *mask, int64_t words)
{
    struct grammar_state *state = arg;
    struct vocabulary *v = state->vocabulary;
    memset(mask, 0, (size_t)words * sizeof *mask);
    state->config = machine_compact(&state->machine, state->config);
    state->machine.work = GRAMMAR_CACHE_WORK;
    state->credit += WALK_CREDIT_PER_TOKEN;
    if (state->credit > WALK_CREDIT)
        state->credit = WALK_CREDIT;
    if (state->machine.configs[state->config].count) {
        pthread_mutex_lock(&v->lock);
        v->cache->work = GRAMMAR_CACHE_WORK;
        fill(state, mask, words);
        pthread_mutex_unlock(&v->lock);
    }
    if (grammar_state_complete(state) || (grammar_state_dead(state) && !state->lost))
        for (int64_t i = 0; i < v->num_eos; i++)
            if (v->eos[i] / 32 < words)
                mask[v->eos[i] / 32] |= 1u << v->eos[i] % 32;
}

// Configurations of a net, their stacks and transitions, each found once. See grammar_machine.h.
#include "engine/serve/grammar_machine.h"

#define XXH_INLINE_ALL
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { VISIT_SLOTS = 4 * MACHINE_MAX_VISITS };

struct machine_closure {
    struct machine_place visits[MACHINE_MAX_VISITS]; // in the order in which they were found
    uint32_t slots[VISIT_SLOTS], stamps[VISIT_SLOTS], stamp;
    uint32_t count;
    bool ends, cut;
    struct machine_place places[MACHINE_MAX_PLACES];
};

// ---- memory ------------------------------------------------------------------------------------------------------

uint64_t machine_bytes(const struct machine *m)
{
    return m->num_places * sizeof *m->places + m->num_stacks * sizeof *m->stacks + m->num_configs * sizeof *m->configs +
           m->num_transitions * sizeof *m->transitions;
}

// Room for `more` items. Sets m->exhausted.
static bool reserve(struct machine *m, void *items, uint32_t count, uint32_t more, uint32_t *capacity,
                    size_t item_bytes)
{
    void **array = items;
    if (count + more <= *capacity)
        return true;
    uint32_t wanted = (count + more) / 2 * 3 + 64;
    void *grown =
        machine_bytes(m) + more * item_bytes > MACHINE_MAX_BYTES ? NULL : realloc(*array, wanted * item_bytes);
    if (!grown) {
        m->exhausted = true;
        return false;
    }
    *array = grown;
    *capacity = wanted;
    return true;
}

static bool table_grow(struct machine *m, struct machine_table *table,
                       uint64_t (*hash)(const struct machine *, uint32_t), uint32_t items)
{
    if (2 * (table->used + 1) <= table->capacity)
        return true;
    uint32_t capacity = table->capacity ? 2 * table->capacity : 256;
    uint32_t *slots = calloc(capacity, sizeof *slots);
    if (!slots) {
        m->exhausted = true;
        return false;
    }
    free(table->slots);
    *table = (struct machine_table){slots, capacity, items - 1}; // item 0 is in no table
    for (uint32_t i = 1; i < items; i++) {
        uint32_t slot = (uint32_t)hash(m, i) & (capacity - 1);
        while (slots[slot])
            slot = (slot + 1) & (capacity - 1);
        slots[slot] = i;
    }
    return true;
}

void machine_reset(struct machine *m)
{
    // Stack 0 is the bottom, configuration 0 the dead one, transitions 0 stands for none.
    m->num_places = 0;
    m->num_stacks = m->num_configs = m->num_transitions = 1;
    m->stacks[0] = (struct machine_stack){0};
    m->configs[0] = (struct machine_config){0};
    m->exhausted = false;
    struct machine_table *tables[] = {&m->stack_table, &m->config_table};
    for (int i = 0; i < 2; i++) {
        tables[i]->used = 0;
        if (tables[i]->capacity)
            memset(tables[i]->slots, 0, tables[i]->capacity * sizeof *tables[i]->slots);
    }
}

int machine_init(struct machine *m, const struct net *net)
{
    *m = (struct machine){.net = net};
    m->closure = calloc(1, sizeof *m->closure);
    if (!m->closure || !reserve(m, &m->stacks, 0, 1, &m->stack_capacity, sizeof *m->stacks) ||
        !reserve(m, &m->configs, 0, 1, &m->config_capacity, sizeof *m->configs) ||
        !reserve(m, &m->places, 0, 1, &m->place_capacity, sizeof *m->places)) {
        machine_clear(m);
        return ERR_MEMORY;
    }
    machine_reset(m);
    return 0;
}

void machine_clear(struct machine *m)
{
    free(m->places);
    free(m->stacks);
    free(m->configs);
    free(m->transitions);
    free(m->stack_table.slots);
    free(m->config_table.slots);
    free(m->closure);
    *m = (struct machine){0};
}

// ---- stacks and configurations, each kept once -------------------------------------------------------------------

static uint64_t hash_stack(const struct machine *m, uint32_t i)
{
    return XXH3_64bits(&m->stacks[i], sizeof *m->stacks);
}

static uint64_t hash_config(const struct machine *m, uint32_t i)
{
    const struct machine_config *config = &m->configs[i];
    return XXH3_64bits_withSeed(m->places + config->first, config->count * sizeof *m->places,
                                2u * config->ends + config->cut);
}

// The number of this stack; MACHINE_NO_STACK and m->exhausted without memory.
static uint32_t push(struct machine *m, uint32_t node, uint32_t count, uint32_t below)
{
    if (!reserve(m, &m->stacks, m->num_stacks, 1, &m->stack_capacity, sizeof *m->stacks) ||
        !table_grow(m, &m->stack_table, hash_stack, m->num_stacks))
        return MACHINE_NO_STACK;
    m->stacks[m->num_stacks] = (struct machine_stack){node, count, below, m->stacks[below].depth + 1};
    uint32_t mask = m->stack_table.capacity - 1, slot = (uint32_t)hash_stack(m, m->num_stacks) & mask;
    for (; m->stack_table.slots[slot]; slot = (slot + 1) & mask)
        if (!memcmp(&m->stacks[m->stack_table.slots[slot]], &m->stacks[m->num_stacks], sizeof *m->stacks))
            return m->stack_table.slots[slot];
    m->stack_table.slots[slot] = m->num_stacks;
    m->stack_table.used++;
    return m->num_stacks++;
}

static int compare_places(const void *a, const void *b)
{
    const struct machine_place *x = a, *y = b;
    if (x->stack != y->stack)
        return x->stack < y->stack ? -1 : 1;
    if (x->node != y->node)
        return x->node < y->node ? -1 : 1;
    return x->count < y->count ? -1 : x->count > y->count;
}

static uint32_t intern(struct machine *m, struct machine_place *places, uint32_t count, bool ends, bool cut)
{
    if (!count && !ends)
        return MACHINE_DEAD;
    if (!reserve(m, &m->configs, m->num_configs, 1, &m->config_capacity, sizeof *m->configs) ||
        !reserve(m, &m->places, m->num_places, count, &m->place_capacity, sizeof *m->places) ||
        !table_grow(m, &m->config_table, hash_config, m->num_configs))
        return MACHINE_DEAD;
    qsort(places, count, sizeof *places, compare_places);
    struct machine_config *config = &m->configs[m->num_configs];
    *config = (struct machine_config){.first = m->num_places, .count = count, .ends = ends, .cut = cut};
    memcpy(m->places + m->num_places, places, count * sizeof *places);
    uint32_t mask = m->config_table.capacity - 1, slot = (uint32_t)hash_config(m, m->num_configs) & mask;
    for (; m->config_table.slots[slot]; slot = (slot + 1) & mask) {
        const struct machine_config *other = &m->configs[m->config_table.slots[slot]];
        if (other->count == count && other->ends == ends && other->cut == cut &&
            !memcmp(m->places + other->first, places, count * sizeof *places))
            return m->config_table.slots[slot];
    }
    for (uint32_t i = 0; i < count; i++)
        if (m->stacks[places[i].stack].depth > config->depth)
            config->depth = (uint16_t)m->stacks[places[i].stack].depth;
    m->config_table.slots[slot] = m->num_configs;
    m->config_table.used++;
    m->num_places += count;
    return m->num_configs++;
}

// ---- where one may be without a further byte ----------------------------------------------------------------------

static void closure_begin(struct machine *m)
{
    struct machine_closure *c = m->closure;
    c->count = 0;
    c->ends = c->cut = false;
    if (++c->stamp == 0) {
        memset(c->stamps, 0, sizeof c->stamps);
        c->stamp = 1;
    }
}

static void visit(struct machine *m, uint32_t node, uint32_t count, uint32_t stack)
{
    struct machine_closure *c = m->closure;
    struct machine_place place = {node, count, stack};
    if (m->net->nodes[node].height + m->stacks[stack].depth > NET_MAX_DEPTH) // no way out of it
        return;
    uint32_t slot =
        (uint32_t)((node * 0x9E3779B97F4A7C15u ^ count * 0xC2B2AE3D27D4EB4Fu ^ stack * 0xD6E8FEB86659FD93u) >> 32) %
        VISIT_SLOTS;
    for (; c->stamps[slot] == c->stamp; slot = (slot + 1) % VISIT_SLOTS)
        if (!memcmp(&c->visits[c->slots[slot]], &place, sizeof place))
            return;
    if (c->count == MACHINE_MAX_VISITS) {
        c->cut = true;
        return;
    }
    c->stamps[slot] = c->stamp;
    c->slots[slot] = c->count;
    c->visits[c->count++] = place;
}

// An iteration of a loop may begin, or the loop end; `count` were made.
static void visit_loop(struct machine *m, uint32_t loop_index, uint32_t count, uint32_t stack)
{
    const struct net_loop *loop = &m->net->loops[loop_index];
    const struct net_node *node = &m->net->nodes[loop->node];
    if (count >= loop->min)
        visit(m, node->count, 0, stack);
    if (count < loop->max)
        visit(m, node->first, loop->max == NET_NO_LIMIT && count >= loop->min ? count : count + 1, stack);
}

static void follow(struct machine *m, struct machine_place place)
{
    const struct net_node *node = &m->net->nodes[place.node];
    const struct machine_stack *stack = &m->stacks[place.stack];
    switch (node->kind) {
    case NET_ACCEPT:
        if (place.stack == MACHINE_NO_STACK)
            m->closure->ends = true;
        else
            visit(m, stack->node, stack->count, stack->below);
        break;
    case NET_SPLIT:
        for (uint32_t i = 0; i < node->count; i++)
            visit(m, m->net->edges[node->first + i].target, place.count, place.stack);
        break;
    case NET_CALL:
        // A call at the end of a rule needs no way back.
        if (node->count == NET_ACCEPT_NODE) {
            visit(m, node->first, 0, place.stack);
        } else {
            uint32_t pushed = push(m, node->count, place.count, place.stack);
            if (pushed != MACHINE_NO_STACK)
                visit(m, node->first, 0, pushed);
        }
        break;
    case NET_ENTER:
        visit_loop(m, node->loop, 0, place.stack);
        break;
    case NET_LOOP:
        visit_loop(m, node->loop, place.count, place.stack);
        break;
    default:
        break;
    }
}

static uint32_t closure_end(struct machine *m, bool cut)
{
    struct machine_closure *c = m->closure;
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->count && !m->exhausted; i++) {
        if (m->net->nodes[c->visits[i].node].kind != NET_BYTES)
            follow(m, c->visits[i]);
        else if (count < MACHINE_MAX_PLACES)
            c->places[count++] = c->visits[i];
        else
            c->cut = true;
    }
    m->work -= c->count + count + 1; // found, and put in order
    if (m->exhausted)
        return MACHINE_DEAD;
    return intern(m, c->places, count, c->ends, cut || c->cut);
}

// ---- steps -------------------------------------------------------------------------------------------------------

uint32_t machine_start(struct machine *m, uint32_t node, uint32_t count)
{
    closure_begin(m);
    visit(m, node, count, MACHINE_NO_STACK);
    return closure_end(m, false);
}

uint32_t machine_return(struct machine *m, uint32_t stack)
{
    const struct machine_stack *from = &m->stacks[stack];
    if (stack == MACHINE_NO_STACK)
        return MACHINE_DEAD;
    closure_begin(m);
    visit(m, from->node, from->count, from->below);
    return closure_end(m, false);
}

uint32_t machine_single(struct machine *m, struct machine_place place) { return intern(m, &place, 1, false, false); }

uint32_t machine_compute(struct machine *m, uint32_t from, uint8_t byte)
{
    uint32_t classes = m->net->num_classes;
    if (from == MACHINE_DEAD || m->exhausted || m->work <= 0) {
        m->exhausted |= from != MACHINE_DEAD;
        return MACHINE_DEAD;
    }
    if (!m->configs[from].transitions) {
        if (!reserve(m, &m->transitions, m->num_transitions, classes, &m->transition_capacity, sizeof *m->transitions))
            return MACHINE_DEAD;
        memset(m->transitions + m->num_transitions, 0xff, classes * sizeof *m->transitions);
        m->configs[from].transitions = m->num_transitions;
        m->num_transitions += classes;
    }
    closure_begin(m);
    m->work -= m->configs[from].count / 8; // looking at one is cheap beside finding one
    for (uint32_t i = 0; i < m->configs[from].count; i++) {
        struct machine_place place = m->places[m->configs[from].first + i];
        const struct net_node *node = &m->net->nodes[place.node];
        for (uint32_t e = 0; e < node->count; e++) {
            const struct net_edge *edge = &m->net->edges[node->first + e];
            if (edge->low <= byte && byte <= edge->high)
                visit(m, edge->target, place.count, place.stack);
        }
    }
    uint32_t to = closure_end(m, m->configs[from].cut);
    if (!m->exhausted)
        m->transitions[m->configs[from].transitions + m->net->class_of[byte]] = to;
    return to;
}

uint32_t machine_compact(struct machine *m, uint32_t config)
{
    m->exhausted = false;
    if (machine_bytes(m) <= MACHINE_COMPACT_BYTES)
        return config;
    struct machine_config kept = m->configs[config];
    uint32_t num_stacks = m->num_stacks;
    struct machine_stack *stacks = malloc(num_stacks * sizeof *stacks);
    uint32_t *moved = calloc(num_stacks, sizeof *moved); // a stack's number afterwards; 0: not needed so far
    if (!stacks || !moved)
        goto done; // all stays as it is
    memcpy(stacks, m->stacks, num_stacks * sizeof *stacks);
    memcpy(m->closure->places, m->places + kept.first, kept.count * sizeof *m->places);
    machine_reset(m);
    for (uint32_t i = 0; i < kept.count; i++) {
        uint32_t path[NET_MAX_DEPTH + 1], depth = 0, below;
        for (below = m->closure->places[i].stack; below != MACHINE_NO_STACK && !moved[below];
             below = stacks[below].below)
            path[depth++] = below;
        below = moved[below];
        while (depth > 0) {
            const struct machine_stack *stack = &stacks[path[--depth]];
            below = moved[path[depth]] = push(m, stack->node, stack->count, below);
        }
        m->closure->places[i].stack = below;
    }
    config = intern(m, m->closure->places, kept.count, kept.ends, kept.cut);
done:
    free(stacks);
    free(moved);
    return config;
}

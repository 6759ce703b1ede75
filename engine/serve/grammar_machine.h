// Runs a net: a configuration is the set of all places where the automaton may be, each with the stack of the rules that called it.
// Configurations and their transitions are found once and remembered, so that a walk of the vocabulary's trie costs one look-up a byte.
// Bounded: what goes beyond the limits is left out, which makes the language smaller and never lets a wrong text through.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_MACHINE_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_MACHINE_H

#include "engine/serve/grammar_net.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MACHINE_MAX_PLACES = 512,        // of one configuration
    MACHINE_MAX_VISITS = 4096,       // nodes on the way to them
    MACHINE_MAX_BYTES = 4 << 20,     // of everything remembered; half as much again may be reserved
    MACHINE_COMPACT_BYTES = 1 << 20, // above it machine_compact forgets
    MACHINE_DEAD = 0,                // the configuration without places
    MACHINE_NO_STACK = 0,            // the bottom
};

struct machine_place {           // a node that waits for a byte
    uint32_t node, count, stack; // count: iterations of the node's loop, not above its min where it has no max
};
struct machine_stack {
    uint32_t node, count, below, depth; // where the rule's end leads to; its caller's stack
};
struct machine_config {
    uint32_t first, count; // places
    uint32_t transitions;  // into machine.transitions; 0: none yet
    uint16_t depth;        // of the deepest stack
    bool ends;             // the rule at the bottom may end here
    bool cut;              // places were left out, here or on the way
};

struct machine_table { // open addressing; 0: empty
    uint32_t *slots, capacity, used;
};

struct machine {
    const struct net *net;
    struct machine_place *places;
    struct machine_stack *stacks;
    struct machine_config *configs;
    uint32_t *transitions; // [num_classes] for each configuration that has been left
    uint32_t num_places, num_stacks, num_configs, num_transitions;
    uint32_t place_capacity, stack_capacity, config_capacity, transition_capacity;
    struct machine_table stack_table, config_table;
    struct machine_closure *closure; // working memory
    int64_t work;                    // places that may still be visited; set by the caller
    bool exhausted;                  // memory or work is out: what was not known before counts as dead
};

int machine_init(struct machine *machine, const struct net *net); // 0 or ERR_MEMORY
void machine_clear(struct machine *machine);
// Forgets everything.
void machine_reset(struct machine *machine);
// Forgets all but this configuration if there is much; returns its new number.
uint32_t machine_compact(struct machine *machine, uint32_t config);
uint64_t machine_bytes(const struct machine *machine);

// The configuration of one place, before a byte of it was taken (a place may be any node).
uint32_t machine_start(struct machine *machine, uint32_t node, uint32_t count);
// What follows when the rule of this stack ends: MACHINE_DEAD for the bottom.
uint32_t machine_return(struct machine *machine, uint32_t stack);
// One place of another configuration alone.
uint32_t machine_single(struct machine *machine, struct machine_place place);

uint32_t machine_compute(struct machine *machine, uint32_t config, uint8_t byte);
static inline uint32_t machine_step(struct machine *machine, uint32_t config, uint8_t byte)
{
    uint32_t transitions = machine->configs[config].transitions;
    if (transitions) {
        uint32_t to = machine->transitions[transitions + machine->net->class_of[byte]];
        if (to != UINT32_MAX)
            return to;
    }
    return machine_compute(machine, config, byte);
}

#endif

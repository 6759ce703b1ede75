// The automaton of a language: a net of nodes that are walked byte by byte, and that call each other as rules do. Not deterministic.
//
// A net is built backwards: each function takes the node that follows and returns the node where its own part begins. A rule ends in
// NET_ACCEPT. Running: grammar_machine.h.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_NET_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_NET_H

#include "formats/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    NET_MAX_NODES = 200000,
    NET_MAX_EDGES = 400000,
    NET_MAX_DEPTH = 200,           // rules within rules
    NET_MAX_REGEX_STEPS = 2000000, // parts of regular expressions built, those that make no node too
    NET_NO_HEIGHT = 0xFFFF,
};
static const uint32_t NET_NO_LIMIT = UINT32_MAX;
static const uint32_t NET_ACCEPT_NODE = 0; // the only one

enum net_kind {
    NET_ACCEPT, // the rule's end
    NET_BYTES,  // one byte: edges [first, first + count)
    NET_SPLIT,  // any of the targets of the edges
    NET_CALL,   // the rule that begins at `first`, then node `count`
    NET_ENTER,  // loop `loop` begins
    NET_LOOP,   // an iteration of it has ended: `first` is the body, `count` what follows the loop
};

struct net_node {
    uint8_t kind;
    // How many rules within rules the shortest way to the rule's end needs; NET_NO_HEIGHT: there is none.
    uint16_t height;
    uint32_t loop;         // in the body of this loop; 0: none
    uint32_t first, count; // by kind
};
struct net_edge {
    uint8_t low, high; // both included
    uint32_t target;
};
// A counted loop. The body takes at least one byte, has no loop of its own and stands in a rule that has no loop around it.
struct net_loop {
    uint32_t min, max; // max NET_NO_LIMIT: none
    uint32_t node;
};

struct net {
    struct net_node *nodes;
    struct net_edge *edges;
    struct net_loop *loops; // [0] is unused
    uint32_t num_nodes, num_edges, num_loops;
    uint32_t node_capacity, edge_capacity, loop_capacity;
    uint32_t regex_steps;
    uint32_t in_loop; // nodes that are being built belong to this loop
    uint32_t start;
    uint8_t class_of[256]; // bytes that no edge tells apart
    uint32_t num_classes;
    uint32_t max_height;
    int failed; // ERR_USAGE: too large; ERR_MEMORY. Nothing grows any more.
};

int grammar_net_init(struct net *net); // 0 or ERR_MEMORY
void grammar_net_clear(struct net *net);
void grammar_net_fail(struct net *net, int code); // the first code counts

// A node whose edges are set one after the other before the next node is made.
uint32_t grammar_net_node(struct net *net, enum net_kind kind, uint32_t first, uint32_t count);
uint32_t grammar_net_begin(struct net *net, enum net_kind kind);
void grammar_net_edge(struct net *net, uint32_t node, uint8_t low, uint8_t high, uint32_t target);

uint32_t grammar_net_text(struct net *net, const char *text, size_t bytes, uint32_t next);
uint32_t grammar_net_either(struct net *net, uint32_t a, uint32_t b); // what is NET_NOTHING falls away
uint32_t grammar_net_call(struct net *net, uint32_t rule, uint32_t next);
// A node that is set later: a rule that is called before it is built, the way back of a loop.
uint32_t grammar_net_later(struct net *net);
void grammar_net_set(struct net *net, uint32_t later, uint32_t target);
// A counted loop: begin, build the body so that it ends in *again, end. Returns where the loop begins.
uint32_t grammar_net_loop_begin(struct net *net, uint32_t min, uint32_t max, uint32_t next, uint32_t *again);
uint32_t grammar_net_loop_end(struct net *net, uint32_t again, uint32_t body);
// Any of these texts. Reorders the array, which holds the same texts afterwards.
struct net_text {
    const char *text;
    size_t bytes;
};
uint32_t grammar_net_texts(struct net *net, struct net_text *texts, size_t count, uint32_t next);

// No way leads through it: what an empty alternative is.
static const uint32_t NET_NOTHING = UINT32_MAX;

// Heights and classes. false: out of memory.
bool grammar_net_finish(struct net *net);

#endif

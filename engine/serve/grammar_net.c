// Nodes, edges and loops of an automaton; sets of texts as tries; heights and classes. See grammar_net.h.
#include "engine/serve/grammar_net.h"

#include <stdlib.h>
#include <string.h>

int grammar_net_init(struct net *net)
{
    *net = (struct net){.num_loops = 1};
    grammar_net_node(net, NET_ACCEPT, 0, 0);
    return net->failed;
}

void grammar_net_clear(struct net *net)
{
    free(net->nodes);
    free(net->edges);
    free(net->loops);
    *net = (struct net){0};
}

void grammar_net_fail(struct net *net, int code)
{
    if (!net->failed)
        net->failed = code;
}

// Room for one more item. Sets net->failed.
static bool reserve(struct net *net, void *items, uint32_t count, uint32_t *capacity, size_t item_bytes, uint32_t most)
{
    void **array = items;
    if (net->failed)
        return false;
    if (count < *capacity)
        return true;
    uint32_t wanted = *capacity ? *capacity * 2 : 256;
    void *more = count >= most ? NULL : realloc(*array, wanted * item_bytes);
    if (!more) {
        grammar_net_fail(net, count >= most ? ERR_USAGE : ERR_MEMORY);
        return false;
    }
    *array = more;
    *capacity = wanted;
    return true;
}

uint32_t grammar_net_node(struct net *net, enum net_kind kind, uint32_t first, uint32_t count)
{
    if (!reserve(net, &net->nodes, net->num_nodes, &net->node_capacity, sizeof *net->nodes, NET_MAX_NODES))
        return NET_ACCEPT_NODE;
    net->nodes[net->num_nodes] =
        (struct net_node){.kind = (uint8_t)kind, .loop = net->in_loop, .first = first, .count = count};
    return net->num_nodes++;
}

uint32_t grammar_net_begin(struct net *net, enum net_kind kind)
{
    return grammar_net_node(net, kind, net->num_edges, 0);
}

void grammar_net_edge(struct net *net, uint32_t node, uint8_t low, uint8_t high, uint32_t target)
{
    if (target == NET_NOTHING ||
        !reserve(net, &net->edges, net->num_edges, &net->edge_capacity, sizeof *net->edges, NET_MAX_EDGES))
        return;
    net->edges[net->num_edges++] = (struct net_edge){low, high, target};
    net->nodes[node].count++;
}

uint32_t grammar_net_text(struct net *net, const char *text, size_t bytes, uint32_t next)
{
    while (bytes > 0 && !net->failed && next != NET_NOTHING) {
        uint32_t node = grammar_net_begin(net, NET_BYTES);
        uint8_t byte = (uint8_t)text[--bytes];
        grammar_net_edge(net, node, byte, byte, next);
        next = node;
    }
    return next;
}

uint32_t grammar_net_either(struct net *net, uint32_t a, uint32_t b)
{
    if (a == b || b == NET_NOTHING)
        return a;
    if (a == NET_NOTHING)
        return b;
    uint32_t node = grammar_net_begin(net, NET_SPLIT);
    grammar_net_edge(net, node, 0, 0, a);
    grammar_net_edge(net, node, 0, 0, b);
    return node;
}

uint32_t grammar_net_call(struct net *net, uint32_t rule, uint32_t next)
{
    if (rule == NET_NOTHING || next == NET_NOTHING)
        return NET_NOTHING;
    return grammar_net_node(net, NET_CALL, rule, next);
}

uint32_t grammar_net_later(struct net *net)
{
    uint32_t node = grammar_net_begin(net, NET_SPLIT);
    grammar_net_edge(net, node, 0, 0, node); // until it is set it leads nowhere
    return node;
}

void grammar_net_set(struct net *net, uint32_t later, uint32_t target)
{
    if (!net->failed && target != NET_NOTHING)
        net->edges[net->nodes[later].first].target = target;
}

uint32_t grammar_net_loop_begin(struct net *net, uint32_t min, uint32_t max, uint32_t next, uint32_t *again)
{
    *again = NET_ACCEPT_NODE;
    if (!reserve(net, &net->loops, net->num_loops, &net->loop_capacity, sizeof *net->loops, NET_MAX_NODES))
        return NET_ACCEPT_NODE;
    uint32_t loop = net->num_loops++;
    net->in_loop = loop;
    *again = grammar_net_node(net, NET_LOOP, NET_ACCEPT_NODE, next);
    net->loops[loop] = (struct net_loop){min, max, *again};
    return *again;
}

uint32_t grammar_net_loop_end(struct net *net, uint32_t again, uint32_t body)
{
    uint32_t loop = net->in_loop;
    net->in_loop = 0;
    if (net->failed)
        return NET_ACCEPT_NODE;
    if (body == NET_NOTHING) { // no iteration is possible
        net->nodes[again].first = again;
        return net->loops[loop].min ? NET_NOTHING : net->nodes[again].count;
    }
    net->nodes[again].first = body;
    uint32_t enter = grammar_net_node(net, NET_ENTER, 0, 0);
    if (!net->failed)
        net->nodes[enter].loop = loop;
    return enter;
}

// ---- sets of texts -----------------------------------------------------------------------------------------------

static int compare_texts(const void *a, const void *b)
{
    const struct net_text *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->bytes < y->bytes ? x->bytes : y->bytes);
    return order ? order : x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

// texts [count], sorted and different, are equal up to depth.
static uint32_t texts_from(struct net *net, const struct net_text *texts, size_t count, size_t depth, uint32_t next)
{
    const struct net_text *first = &texts[0], *last = &texts[count - 1];
    size_t common = depth, groups = 0;
    if (count == 1 || net->failed)
        return grammar_net_text(net, first->text + depth, first->bytes - depth, next);
    while (common < first->bytes && first->text[common] == last->text[common])
        common++;
    bool ends = first->bytes == common; // the others go on
    uint32_t *targets = calloc(256, sizeof *targets);
    uint8_t *bytes = calloc(256, 1);
    if (!targets || !bytes)
        net->failed = ERR_MEMORY;
    for (size_t i = ends; i < count && !net->failed; groups++) {
        size_t begin = i;
        while (i < count && texts[i].text[common] == texts[begin].text[common])
            i++;
        bytes[groups] = (uint8_t)texts[begin].text[common];
        targets[groups] = texts_from(net, texts + begin, i - begin, common + 1, next);
    }
    uint32_t node = grammar_net_begin(net, NET_BYTES);
    for (size_t i = 0; i < groups && !net->failed; i++)
        grammar_net_edge(net, node, bytes[i], bytes[i], targets[i]);
    free(targets);
    free(bytes);
    if (ends)
        node = grammar_net_either(net, node, next);
    return grammar_net_text(net, first->text + depth, common - depth, node);
}

uint32_t grammar_net_texts(struct net *net, struct net_text *texts, size_t count, uint32_t next)
{
    size_t different = 0;
    if (!count)
        return NET_NOTHING;
    qsort(texts, count, sizeof *texts, compare_texts);
    for (size_t i = 0; i < count; i++)
        if (!different || compare_texts(&texts[different - 1], &texts[i])) {
            // Exchanged, so that the caller still holds each text once.
            struct net_text kept = texts[different];
            texts[different++] = texts[i];
            texts[i] = kept;
        }
    return texts_from(net, texts, different, 0, next);
}

// ---- heights -----------------------------------------------------------------------------------------------------

// What a node's height depends on: calls visit(arg, dependency) and returns how many of them must be known first.
static int dependencies(const struct net *net, uint32_t node, void (*visit)(void *arg, uint32_t on, uint32_t node),
                        void *arg)
{
    const struct net_node *n = &net->nodes[node], *loop;
    switch (n->kind) {
    case NET_BYTES:
    case NET_SPLIT:
        for (uint32_t i = 0; i < n->count; i++)
            visit(arg, net->edges[n->first + i].target, node);
        return 1;
    case NET_CALL:
        visit(arg, n->first, node);
        visit(arg, n->count, node);
        return 2;
    case NET_ENTER:
        loop = &net->nodes[net->loops[n->loop].node];
        visit(arg, loop->count, node);
        if (!net->loops[n->loop].min)
            return 1;
        visit(arg, loop->first, node);
        return 2;
    case NET_LOOP:
        visit(arg, n->count, node);
        return 1;
    default:
        return 0;
    }
}

struct heights {
    uint32_t *first; // [num_nodes + 1] into dependants; while counting, first[n + 1] is the number of n's
    uint32_t *dependants;
    uint32_t *next; // [num_nodes] lists of nodes of one height
    uint8_t *missing;
    uint32_t lists[NET_MAX_DEPTH + 1];
};

static void count_one(void *arg, uint32_t on, uint32_t node)
{
    (void)node;
    ((struct heights *)arg)->first[on + 1]++;
}

static void store_one(void *arg, uint32_t on, uint32_t node)
{
    struct heights *h = arg;
    h->dependants[h->first[on]++] = node;
}

// Something that `node` needs is known, at the level that is being worked on.
static void known(struct net *net, struct heights *h, uint32_t node, uint32_t level)
{
    struct net_node *n = &net->nodes[node];
    if (n->height != NET_NO_HEIGHT || h->missing[node] == 0 || --h->missing[node] > 0)
        return;
    if (n->kind == NET_CALL && net->nodes[n->first].height + 1u > level)
        level = net->nodes[n->first].height + 1u;
    if (level > NET_MAX_DEPTH)
        return;
    h->next[node] = h->lists[level];
    h->lists[level] = node;
}

// Knuth's generalization of Dijkstra's algorithm: heights become known in ascending order.
static bool find_heights(struct net *net)
{
    uint32_t count = net->num_nodes;
    struct heights h = {.first = calloc((size_t)count + 2, sizeof *h.first),
                        .next = calloc(count, sizeof *h.next),
                        .missing = calloc(count, 1)};
    bool ok = h.first && h.next && h.missing;
    if (!ok)
        goto done;
    for (uint32_t i = 0; i < count; i++)
        h.missing[i] = (uint8_t)dependencies(net, i, count_one, &h);
    for (uint32_t i = 0; i < count; i++)
        h.first[i + 1] += h.first[i];
    h.dependants = calloc((size_t)h.first[count] + 1, sizeof *h.dependants);
    if (!(ok = h.dependants != NULL))
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        net->nodes[i].height = NET_NO_HEIGHT;
        dependencies(net, i, store_one, &h); // moves first[i] to where first[i + 1] was
    }
    for (int level = 0; level <= NET_MAX_DEPTH; level++)
        h.lists[level] = UINT32_MAX;
    h.next[NET_ACCEPT_NODE] = UINT32_MAX;
    h.lists[0] = NET_ACCEPT_NODE;
    for (uint32_t level = 0; level <= NET_MAX_DEPTH; level++) {
        while (h.lists[level] != UINT32_MAX) {
            uint32_t node = h.lists[level];
            h.lists[level] = h.next[node];
            net->nodes[node].height = (uint16_t)level;
            net->max_height = level;
            for (uint32_t i = node ? h.first[node - 1] : 0; i < h.first[node]; i++)
                known(net, &h, h.dependants[i], level);
        }
    }
done:
    free(h.first);
    free(h.dependants);
    free(h.next);
    free(h.missing);
    return ok;
}

bool grammar_net_finish(struct net *net)
{
    bool begins[257] = {false};
    for (uint32_t i = 0; i < net->num_nodes; i++) {
        const struct net_node *node = &net->nodes[i];
        for (uint32_t e = 0; node->kind == NET_BYTES && e < node->count; e++) {
            begins[net->edges[node->first + e].low] = true;
            begins[net->edges[node->first + e].high + 1] = true;
        }
    }
    net->num_classes = 1;
    for (int byte = 0; byte < 256; byte++) {
        if (byte && begins[byte])
            net->num_classes++;
        net->class_of[byte] = (uint8_t)(net->num_classes - 1);
    }
    return find_heights(net);
}

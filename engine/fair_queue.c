// Fair queueing between tenants. See fair_queue.h.
#include "engine/fair_queue.h"

#include <stdlib.h>

enum { MAX_IDLE_TENANTS = 256 };

struct fair_tenant {
    uint64_t id;
    int64_t served;  // tokens, the virtual counter
    int64_t members; // items between join and leave; 0: idle
    struct fair_item *first, *last;
    struct fair_tenant *next;
};

struct fair_queue {
    struct fair_tenant *tenants;
    int64_t num_idle, count;
    int64_t last_served; // counter of the tenant that left last
    uint64_t arrivals;
};

int fair_queue_create(struct fair_queue **out, struct error *err)
{
    struct fair_queue *q = calloc(1, sizeof *q);
    if (!q)
        return error_set(err, ERR_MEMORY, "no memory for the queue");
    *out = q;
    return 0;
}

void fair_queue_free(struct fair_queue *q)
{
    if (!q)
        return;
    for (struct fair_tenant *t = q->tenants, *next; t; t = next) {
        next = t->next;
        free(t);
    }
    free(q);
}

// Where a tenant that was idle begins at least.
static int64_t floor_of(const struct fair_queue *q)
{
    int64_t least = INT64_MAX;
    for (const struct fair_tenant *t = q->tenants; t; t = t->next)
        if (t->members > 0 && t->served < least)
            least = t->served;
    return least < INT64_MAX ? least : q->last_served;
}

int fair_queue_join(struct fair_queue *q, struct fair_item *item, uint64_t id, struct error *err)
{
    struct fair_tenant *t = q->tenants;
    while (t && t->id != id)
        t = t->next;
    if (!t) {
        t = calloc(1, sizeof *t);
        if (!t)
            return error_set(err, ERR_MEMORY, "no memory for another tenant of the queue");
        t->id = id;
        t->next = q->tenants;
        q->tenants = t;
        q->num_idle++;
    }
    if (t->members == 0) {
        int64_t least = floor_of(q);
        q->num_idle--;
        if (t->served < least)
            t->served = least;
    }
    t->members++;
    *item = (struct fair_item){.tenant = t, .arrival = q->arrivals++};
    return 0;
}

// The idle tenant that was served least has the least to lose.
static void forget_one(struct fair_queue *q)
{
    struct fair_tenant **least = NULL;
    for (struct fair_tenant **at = &q->tenants; *at; at = &(*at)->next)
        if ((*at)->members == 0 && (!least || (*at)->served < (*least)->served))
            least = at;
    if (!least)
        return;
    struct fair_tenant *gone = *least;
    *least = gone->next;
    free(gone);
    q->num_idle--;
}

void fair_queue_leave(struct fair_queue *q, struct fair_item *item)
{
    struct fair_tenant *t = item->tenant;
    if (--t->members > 0)
        return;
    q->last_served = t->served;
    if (++q->num_idle > MAX_IDLE_TENANTS)
        forget_one(q);
}

void fair_queue_push(struct fair_queue *q, struct fair_item *item, bool in_front)
{
    struct fair_tenant *t = item->tenant;
    item->previous = in_front ? NULL : t->last;
    item->next = in_front ? t->first : NULL;
    *(item->previous ? &item->previous->next : &t->first) = item;
    *(item->next ? &item->next->previous : &t->last) = item;
    q->count++;
}

void fair_queue_remove(struct fair_queue *q, struct fair_item *item)
{
    struct fair_tenant *t = item->tenant;
    *(item->previous ? &item->previous->next : &t->first) = item->next;
    *(item->next ? &item->next->previous : &t->last) = item->previous;
    q->count--;
}

struct fair_item *fair_queue_first(const struct fair_queue *q)
{
    const struct fair_tenant *turn = NULL;
    if (q->count == 0)
        return NULL;
    for (const struct fair_tenant *t = q->tenants; t; t = t->next)
        if (t->first && (!turn || t->served < turn->served ||
                         (t->served == turn->served && t->first->arrival < turn->first->arrival)))
            turn = t;
    return turn ? turn->first : NULL;
}

int64_t fair_queue_count(const struct fair_queue *q) { return q->count; }

void fair_queue_charge(struct fair_item *item, int64_t tokens) { item->tenant->served += tokens; }

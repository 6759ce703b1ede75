// Whose turn it is: one queue per tenant, first come first served, and of the tenants that wait the one that was served least (virtual token
// counter: Sheng et al., "Fairness in Serving Large Language Models", 2024). Idle time earns nothing: who comes back begins at the
// smallest counter of those that are there, or where the last one left. Tenants without sequences are remembered up to a number.
#ifndef TPSHARD_ENGINE_FAIR_QUEUE_H
#define TPSHARD_ENGINE_FAIR_QUEUE_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct fair_queue;
struct fair_tenant;

// Part of what is queued.
struct fair_item {
    struct fair_tenant *tenant;
    struct fair_item *previous, *next;
    uint64_t arrival; // ties between tenants
};

int fair_queue_create(struct fair_queue **out, struct error *err);
void fair_queue_free(struct fair_queue *queue); // accepts NULL

// An item belongs to its tenant from join to leave, in the queue or not. A failed join has done nothing.
int fair_queue_join(struct fair_queue *queue, struct fair_item *item, uint64_t tenant, struct error *err);
void fair_queue_leave(struct fair_queue *queue, struct fair_item *item);

void fair_queue_push(struct fair_queue *queue, struct fair_item *item, bool in_front);
void fair_queue_remove(struct fair_queue *queue, struct fair_item *item);
struct fair_item *fair_queue_first(const struct fair_queue *queue); // NULL: empty
int64_t fair_queue_count(const struct fair_queue *queue);

// The item's tenant was served so many tokens.
void fair_queue_charge(struct fair_item *item, int64_t tokens);

#endif

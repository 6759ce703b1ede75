// Places of sequences, shared between tenants. See places.h.
#include "engine/serve/places.h"

#include <stddef.h>
#include <stdlib.h>

enum { CROWDED_S = 60 }; // so long at most a client that found no place is told to wait before it comes again

struct tenant {
    uint64_t id;
    int64_t taken; // at least 1
};

int places_init(struct places *places, int64_t count, struct error *err)
{
    *places = (struct places){.count = count, .tenants = calloc((size_t)count, sizeof(struct tenant))};
    return places->tenants ? 0
                           : error_set(err, ERR_MEMORY, "no memory for the places of %lld sequences", (long long)count);
}

void places_clear(struct places *places) { free(places->tenants); }

// NULL: has none.
static struct tenant *find(const struct places *places, uint64_t id)
{
    for (int64_t i = 0; i < places->num_tenants; i++)
        if (places->tenants[i].id == id)
            return &places->tenants[i];
    return NULL;
}

static bool others_are_there(const struct places *places, uint64_t id, int64_t has, double now_s)
{
    bool refused = places->refused_s > 0 && places->refused_tenant != id && now_s - places->refused_s < CROWDED_S;
    return places->taken > has || refused;
}

bool places_take(struct places *places, uint64_t id, int64_t count, double now_s)
{
    struct tenant *tenant = find(places, id);
    int64_t has = tenant ? tenant->taken : 0;
    bool within_share = has + count <= (places->count + 1) / 2;
    if (places->taken + count > places->count) {
        if (within_share) {
            places->refused_tenant = id;
            places->refused_s = now_s;
        }
        return false;
    }
    if (!within_share && others_are_there(places, id, has, now_s))
        return false;
    if (!tenant) {
        tenant = &places->tenants[places->num_tenants++];
        *tenant = (struct tenant){.id = id};
    }
    tenant->taken += count;
    places->taken += count;
    return true;
}

void places_leave(struct places *places, uint64_t id)
{
    struct tenant *tenant = find(places, id);
    places->taken--;
    if (--tenant->taken == 0)
        *tenant = places->tenants[--places->num_tenants];
}

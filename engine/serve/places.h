// How many sequences may be here at the same time, and whose they are. While others have sequences, or one found no place a moment ago, a tenant
// holds at most half of the places: whoever comes first cannot keep everyone else out. Not thread-safe.
#ifndef TPSHARD_ENGINE_SERVE_PLACES_H
#define TPSHARD_ENGINE_SERVE_PLACES_H

#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct tenant;
struct places {
    int64_t count, taken;
    struct tenant *tenants; // [count], who has some
    int64_t num_tenants;
    uint64_t refused_tenant; // had no more than its share and found none, last
    double refused_s;        // when; 0: never
};

int places_init(struct places *places, int64_t count, struct error *err);
void places_clear(struct places *places);
// Takes so many for a tenant, or none. now_s: CLOCK_MONOTONIC.
bool places_take(struct places *places, uint64_t tenant, int64_t count, double now_s);
// Gives one back.
void places_leave(struct places *places, uint64_t tenant);

#endif

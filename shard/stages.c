// See stages.h. Two passes over (stage, first layer): the smallest size that the largest stage can have, then the evenest division within it.
#include "shard/stages.h"

#include <stdlib.h>

struct division {
    uint32_t stages;
    int64_t layers;
    uint64_t first_bytes, last_bytes;
    uint64_t *bytes; // [layers + 1], of the layers before
    uint64_t *best;  // [stages + 1][layers + 1], of stages s .. from layer i on to the end; UINT64_MAX: cannot be
    int shift;       // squares of bytes >> shift do not overflow, nor does their sum
};

static uint64_t *best_at(const struct division *d, uint32_t stage, int64_t layer)
{
    return &d->best[stage * (uint64_t)(d->layers + 1) + (uint64_t)layer];
}

static uint64_t stage_bytes(const struct division *d, uint32_t stage, int64_t begin, int64_t end)
{
    return d->bytes[end] - d->bytes[begin] + (stage == 0 ? d->first_bytes : 0) +
           (stage + 1 == d->stages ? d->last_bytes : 0);
}

// What a division costs of which this stage has so many bytes, and the stages behind it cost `rest`. limit 0: its largest stage.
static uint64_t cost(const struct division *d, uint64_t bytes, uint64_t rest, uint64_t limit)
{
    uint64_t units = bytes >> d->shift;
    if (rest == UINT64_MAX || (limit && bytes > limit))
        return UINT64_MAX;
    if (!limit)
        return bytes > rest ? bytes : rest;
    return units * units + rest;
}

// Fills `best` from the last stage to the first.
static void solve(const struct division *d, uint64_t limit)
{
    for (int64_t layer = 0; layer <= d->layers; layer++)
        *best_at(d, d->stages, layer) = layer == d->layers ? 0 : UINT64_MAX;
    for (uint32_t stage = d->stages; stage-- > 0;)
        for (int64_t begin = 0; begin <= d->layers; begin++) {
            uint64_t least = UINT64_MAX;
            for (int64_t end = begin + 1; end <= d->layers; end++) {
                uint64_t found = cost(d, stage_bytes(d, stage, begin, end), *best_at(d, stage + 1, end), limit);
                least = found < least ? found : least;
            }
            *best_at(d, stage, begin) = least;
        }
}

static void read_division(uint16_t *stage_layers, const struct division *d, uint64_t limit)
{
    int64_t begin = 0;
    for (uint32_t stage = 0; stage < d->stages; stage++) {
        int64_t end = begin + 1;
        while (end < d->layers && cost(d, stage_bytes(d, stage, begin, end), *best_at(d, stage + 1, end), limit) !=
                                      *best_at(d, stage, begin))
            end++;
        stage_layers[stage] = (uint16_t)(end - begin);
        begin = end;
    }
}

int stages_balance(uint16_t *stage_layers, uint32_t pp_size, const uint64_t *layer_bytes, int64_t num_layers,
                   uint64_t first_bytes, uint64_t last_bytes, struct error *err)
{
    struct division d = {.stages = pp_size, .layers = num_layers, .first_bytes = first_bytes, .last_bytes = last_bytes};
    size_t row = (size_t)num_layers + 1;
    int rc = 0;
    if (pp_size < 1 || (int64_t)pp_size > num_layers)
        return error_set(err, ERR_USAGE, "--pp %u: the model has %lld layers, and each stage needs one", pp_size,
                         (long long)num_layers);
    d.bytes = calloc(row, sizeof *d.bytes);
    d.best = calloc(row * (pp_size + 1), sizeof *d.best);
    if (!d.bytes || !d.best) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the division into %u stages", pp_size);
        goto done;
    }
    for (int64_t layer = 0; layer < num_layers; layer++)
        d.bytes[layer + 1] = d.bytes[layer] + layer_bytes[layer];
    while ((d.bytes[num_layers] + first_bytes + last_bytes) >> d.shift > UINT32_MAX / 2)
        d.shift++;
    solve(&d, 0);
    uint64_t limit = *best_at(&d, 0, 0);
    if (limit > 0) // of a model without a byte any division will do
        solve(&d, limit);
    read_division(stage_layers, &d, limit);
done:
    free(d.bytes);
    free(d.best);
    return rc;
}

// See sum_check.h.
#include "engine/sum_check.h"

#include "engine/comm_internal.h"
#include "engine/comm_rows.h"
#include "formats/number_formats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sum_check {
    int64_t every, steps;
    int64_t elems;  // room
    float *values;  // [elems]
    uint16_t *lost; // bf16 [elems], as decoder.lost; NULL: no feedback
};

int sum_check_create(struct sum_check **out, int64_t every, int64_t rows, int64_t hidden_size, bool feedback,
                     struct error *err)
{
    struct sum_check *c = calloc(1, sizeof *c);
    if (c) {
        c->every = every;
        c->elems = rows * hidden_size;
        c->values = calloc((size_t)c->elems, sizeof *c->values);
        c->lost = feedback ? calloc((size_t)c->elems, sizeof *c->lost) : NULL;
    }
    if (!c || !c->values || (feedback && !c->lost)) {
        sum_check_free(c);
        return error_set(err, ERR_MEMORY, "no memory to check sums of %lld rows", (long long)rows);
    }
    *out = c;
    return 0;
}

void sum_check_free(struct sum_check *c)
{
    if (!c)
        return;
    free(c->values);
    free(c->lost);
    free(c);
}

bool sum_check_begin(struct sum_check *c)
{
    if (!c || c->steps++ % c->every != 0)
        return false;
    if (c->lost)
        memset(c->lost, 0, (size_t)c->elems * sizeof *c->lost);
    return true;
}

int sum_check_take_losses(struct sum_check *c, const uint16_t *lost, int64_t count, struct error *err)
{
    if (!c->lost || count > c->elems)
        return error_set(err, ERR_OTHER,
                         "what the wire lost in %lld values is to be made up for; there is room for %lld",
                         (long long)count, c->lost ? (long long)c->elems : 0LL);
    memcpy(c->lost, lost, (size_t)count * sizeof *c->lost);
    return 0;
}

int sum_check_take(struct sum_check *c, const struct backend *backend, struct device *device,
                   const struct checked_sum *sum, struct error *err)
{
    float *part;
    int64_t count = sum->rows * sum->cols;
    int64_t end = sum->first * sum->cols + count; // c->lost is read from sum->first on
    if (end > c->elems)
        return error_set(err, ERR_OTHER, "a sum of values %lld to %lld is to be checked; there is room for %lld",
                         (long long)(end - count), (long long)end, (long long)c->elems);
    int rc = backend->lend(device, sum->buffer, false, &part, err);
    if (rc)
        return rc;
    memcpy(c->values, part + sum->first * sum->cols, (size_t)count * sizeof *part);
    return backend->returned(device, sum->buffer, err);
}

// The same by the processors, in c->values.
static int make_again(struct sum_check *c, struct comm *comm, struct thread_pool *pool, const struct checked_sum *sum,
                      struct error *err)
{
    uint16_t *lost = sum->feedback ? c->lost + sum->first * sum->cols : NULL;
    if (sum->kind == EXCHANGE_SUM_TO_OWN)
        return comm_reduce_scatter_rows(comm, c->values, sum->rows, sum->cols, sum->first_owner, sum->wire, lost, pool,
                                        err);
    if (sum->kind == EXCHANGE_OWN_TO_ALL)
        return comm_all_gather_rows(comm, c->values, sum->rows, sum->cols, sum->first_owner, sum->wire, pool, err);
    return comm_all_reduce(comm, c->values, sum->rows, sum->cols, sum->cols, sum->wire, lost, pool, err);
}

// Of the first half, what is at its owner counts: the other rows are parts.
static bool counts(const struct comm *comm, const struct checked_sum *sum, int64_t row)
{
    return sum->kind != EXCHANGE_SUM_TO_OWN || (sum->first_owner + row) % comm->size == comm->rank;
}

// How many values are others; *first: the first of them.
static int64_t count_others(const struct sum_check *c, const struct comm *comm, const struct checked_sum *sum,
                            const float *found, int64_t *first)
{
    int64_t count = 0;
    for (int64_t row = 0; row < sum->rows; row++)
        for (int64_t i = row * sum->cols; i < (row + 1) * sum->cols && counts(comm, sum, row); i++)
            if (f32_bits(found[i]) != f32_bits(c->values[i]) && count++ == 0)
                *first = i;
    return count;
}

static int report(const struct sum_check *c, const struct comm *comm, enum transport transport,
                  const struct checked_sum *sum, const float *found, int64_t first, int64_t others, struct error *err)
{
    bool gathered = sum->kind == EXCHANGE_OWN_TO_ALL;
    char where[64];
    if (sum->layer < 0)
        snprintf(where, sizeof where, "the %s", comm_operation_name(sum->op));
    else
        snprintf(where, sizeof where, "layer %d (%s)", comm->first_layer + sum->layer, comm_operation_name(sum->op));
    return error_set(err, ERR_GPU,
                     "rank %d: %s %s over %s %s: value %lld of row %lld is %.9g (0x%08x), wanted %.9g (0x%08x), and "
                     "%lld other%s wrong; a link or a memory changes data: "
                     "--transport shm does without links between devices",
                     comm->first + comm->rank,
                     gathered ? "the rows that the devices have from others for" : "the devices' sum of", where,
                     transport_name(transport), gathered ? "are not those of their owners" : "is not that of its parts",
                     (long long)(first % sum->cols), (long long)(sum->first + first / sum->cols), (double)found[first],
                     f32_bits(found[first]), (double)c->values[first], f32_bits(c->values[first]),
                     (long long)others - 1, others == 2 ? " is" : "s are");
}

int sum_check_compare(struct sum_check *c, const struct backend *backend, struct device *device, struct comm *comm,
                      struct thread_pool *pool, enum transport transport, const struct checked_sum *sum,
                      struct error *err)
{
    float *found;
    int64_t first = 0;
    int rc;
    comm_at(comm, sum->op, sum->layer);
    if ((rc = make_again(c, comm, pool, sum, err)) || (rc = backend->lend(device, sum->buffer, false, &found, err)))
        return rc;
    int64_t others = count_others(c, comm, sum, found + sum->first * sum->cols, &first);
    if (others > 0)
        return report(c, comm, transport, sum, found + sum->first * sum->cols, first, others, err);
    return backend->returned(device, sum->buffer, err);
}

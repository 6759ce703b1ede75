// Sums over ranks whose bytes NCCL carries (nccl.h), for the backend's table: who the ranks are, and what is said when one does not come.
#include "kernels/cuda/exchange_host.h"

#include "kernels/buffers.h"

#include <string.h>

enum {
    MOST_RANKS = 64,
    START_TIMEOUT_MS = 60000, // at least, of connecting: NCCL looks at the machine and at the network
};

static int64_t most_cols(const struct device_shape *shape)
{
    return larger_of(shape->desc->hidden_size, 2 * shape->max_rows); // sums of squares are one row
}

uint64_t exchange_nccl_memory_bytes(const struct device_shape *shape, int tp_size)
{
    return nccl_buffer_bytes(shape->max_rows, most_cols(shape), tp_size) + nccl_own_bytes(tp_size);
}

static int check(void *context, struct error *err)
{
    const struct exchange_options *options = context;
    return options->aborted(options->arg) ? options->failed(options->arg, NULL, err) : 0;
}

static int give_up(void *context, struct nccl_place place, bool late, struct error *err)
{
    const struct exchange_options *options = context;
    struct exchange_failure failure = {
        .rank = options->rank, .whom = -1, .operation = place.operation, .layer = place.layer, .phase = 1};
    return late ? options->failed(options->arg, &failure, err) : options->raise(options->arg, err);
}

static void describe(void *context, struct nccl_place place, char text[NCCL_PLACE_BYTES])
{
    const struct exchange_options *options = context;
    options->describe(options->arg, place.operation, place.layer, text, NCCL_PLACE_BYTES);
}

// What the ranks tell each other before they connect.
struct greeting {
    struct nccl_hello hello;
    struct error problem; // of what this rank did alone
};

int exchange_nccl_open(struct device *d, struct exchange *x, struct error *err)
{
    if (x->options.tp_size > MOST_RANKS) // engine/comm.h has no more
        return error_set(err, ERR_USAGE, "%d ranks over NCCL: at most %d", x->options.tp_size, MOST_RANKS);
    struct nccl_options options = {
        .group = {.context = &x->options,
                  .rank = x->options.rank,
                  .tp_size = x->options.tp_size,
                  .check = check,
                  .give_up = give_up,
                  .describe = describe},
        .timeout_ms = x->options.timeout_ms,
        .start_timeout_ms = x->options.timeout_ms > START_TIMEOUT_MS ? x->options.timeout_ms : START_TIMEOUT_MS,
        .max_rows = d->shape.max_rows,
        .max_cols = most_cols(&d->shape),
        .stream = d->stream,
    };
    struct greeting mine, all[MOST_RANKS];
    struct nccl_hello hellos[MOST_RANKS];
    int rc;
    memset(&mine, 0, sizeof mine);
    if (!exchange_open_sides(d, x, &mine.problem) && !exchange_make_lost(d, x, &mine.problem))
        nccl_open(&x->nccl, &options, &mine.hello, &mine.problem);
    if ((rc = x->options.all_gather(x->options.arg, all, &mine, sizeof mine, err)))
        return rc;
    for (int r = 0; r < x->options.tp_size; r++) {
        hellos[r] = all[r].hello;
        if (all[r].problem.code) {
            *err = all[r].problem;
            return err->code;
        }
    }
    return nccl_connect(x->nccl, hellos, err);
}

int exchange_nccl_all_reduce(struct exchange *x, const struct exchange_message *m, int operation, int layer,
                             struct error *err)
{
    return nccl_all_reduce(x->nccl, m->data, m->lost, m->rows, m->cols, m->cols, m->wire,
                           (struct nccl_place){operation, layer}, err);
}

int exchange_nccl_half(struct exchange *x, const struct exchange_message *m, int operation, int layer,
                       struct error *err)
{
    struct nccl_place place = {operation, layer};
    struct nccl_rows rows = {m->data, m->rows, m->cols, (int)m->first_owner, m->wire};
    return m->half == EXCHANGE_TO_OWNERS ? nccl_reduce_scatter_rows(x->nccl, &rows, m->lost, place, err)
                                         : nccl_all_gather_rows(x->nccl, &rows, place, err);
}

// What the wire has lost in the sums of a step, on its way to a later pipeline stage. See kernels/backend.h.
//
// It goes through the memory that lends the residual: a copy to it comes, in the stream's order, behind the copy that has last read it, and the host
// waits for that copy before it writes there, even where it has nothing copied to it first.
#include "kernels/cuda/exchange_host.h"

static uint64_t lost_elems(const struct device *d) { return (uint64_t)(d->count * d->shape.desc->hidden_size); }

static uint16_t *lost_of_window(const struct device *d)
{
    return d->exchange->lost + d->window_first * d->shape.desc->hidden_size;
}

int exchange_lend_lost(struct device *d, bool overwrite, uint16_t **host, struct error *err)
{
    uint64_t bytes = lost_elems(d) * sizeof **host;
    int rc = exchange_flush(d, err);
    if (rc)
        return rc;
    if (!d->exchange || !d->exchange->lost)
        return error_set(err, ERR_OTHER, "device %d: nothing keeps what the wire loses", d->index);
    *host = (uint16_t *)(void *)d->lent;
    if (!overwrite && (rc = CHECK(cudaMemcpyAsync(*host, lost_of_window(d), bytes, cudaMemcpyDeviceToHost, d->stream),
                                  "copying what the wire lost")))
        return rc;
    return device_wait(d, "computing what the wire lost", err);
}

int exchange_returned_lost(struct device *d, struct error *err)
{
    uint64_t bytes = lost_elems(d) * sizeof(uint16_t);
    return CHECK(cudaMemcpyAsync(lost_of_window(d), d->lent, bytes, cudaMemcpyHostToDevice, d->stream),
                 "copying what the wire lost");
}

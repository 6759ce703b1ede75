// Exchanges beside the device's other operations: the sums of one half of a prompt travel while the other half computes. See kernels/backend.h.
//
// A side is a stretch of one stream that all sides share; while one is open, that stream stands in for the device's. So exchanges follow each other
// on it in one order, the same on every rank, as their tokens want it; and an exchange that no side holds comes behind them, since its stream waits
// for every side first (exchange_wait_for_sides). A side begins behind what the device's stream had been given, and that stream waits for a side by an event: both
// directions are order among streams alone, and the host waits for nothing.
//
// The side's stream and those of chunks (exchange_chunks.c) are of the highest priority: an exchange's few blocks must not stand behind the thousands of a
// product. They wait for other ranks, and so they hold their places on the chip; there are few enough of them.
#include "kernels/cuda/exchange_host.h"

int exchange_make_stream(struct device *d, cudaStream_t *stream, struct error *err)
{
    int least, greatest, rc;
    if ((rc = CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for priorities of streams")))
        return rc;
    return CHECK(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, greatest), "making a stream");
}

int exchange_open_sides(struct device *d, struct exchange *x, struct error *err)
{
    int rc;
    if ((rc = exchange_make_stream(d, &x->side, err)) ||
        (rc = CHECK(cudaEventCreateWithFlags(&x->handed, cudaEventDisableTiming), "making an event")))
        return rc;
    for (int i = 0; i < DEVICE_SIDES && !rc; i++)
        rc = CHECK(cudaEventCreateWithFlags(&x->sided[i], cudaEventDisableTiming), "making an event");
    return rc;
}

void exchange_close_sides(struct exchange *x)
{
    if (x->handed)
        cudaEventDestroy(x->handed);
    for (int i = 0; i < DEVICE_SIDES; i++)
        if (x->sided[i])
            cudaEventDestroy(x->sided[i]);
    if (x->side)
        cudaStreamDestroy(x->side);
}

static void stand_in(struct device *d, cudaStream_t stream)
{
    d->stream = stream;
    if (d->exchange->nccl)
        nccl_follow(d->exchange->nccl, stream);
}

int exchange_side_begin(struct device *d, int side, struct error *err)
{
    static const char what[] = "beginning an exchange beside";
    struct exchange *x = d->exchange;
    int rc;
    if (!x || x->main || d->recording || side < 0 || side >= DEVICE_SIDES)
        return error_set(err, ERR_OTHER, "device %d: side %d of exchanges cannot begin here", d->index, side);
    if ((rc = exchange_flush(d, err)) || (rc = CHECK(cudaEventRecord(x->handed, d->stream), what)) ||
        (rc = CHECK(cudaStreamWaitEvent(x->side, x->handed, 0), what)))
        return rc;
    x->main = d->stream;
    x->open_side = side;
    stand_in(d, x->side);
    return 0;
}

int exchange_side_end(struct device *d, struct error *err)
{
    struct exchange *x = d->exchange;
    int rc;
    if (!x || !x->main)
        return 0;
    x->under_way[x->open_side] = true;
    if ((rc = exchange_flush(d, err)) == 0)
        rc = CHECK(cudaEventRecord(x->sided[x->open_side], d->stream), "ending an exchange beside");
    stand_in(d, x->main);
    x->main = NULL;
    return rc;
}

int exchange_side_wait(struct device *d, int side, struct error *err)
{
    struct exchange *x = d->exchange;
    if (!x || x->main || side < 0 || side >= DEVICE_SIDES)
        return error_set(err, ERR_OTHER, "device %d: side %d of exchanges cannot be waited for here", d->index, side);
    x->under_way[side] = false;
    return CHECK(cudaStreamWaitEvent(d->stream, x->sided[side], 0), "waiting for an exchange beside");
}

int exchange_wait_for_sides(struct device *d, struct error *err)
{
    int rc = 0;
    for (int i = 0; i < DEVICE_SIDES && !d->exchange->main && !rc; i++)
        rc = d->exchange->under_way[i] ? exchange_side_wait(d, i, err) : 0;
    return rc;
}

// Part of a step's rows, and a residual whose rows are dealt out to the ranks. See kernels/backend.h.
//
// A window's buffers begin where its rows do, so that every operation counts from there. Its first row is a multiple of GEMM_ROWS_STEP, and the rows
// before it are whole steps: what a product by cuBLASLt writes beyond its rows lies behind the last window alone.
#include "kernels/cuda/device.h"

#include "kernels/buffers.h"

int step_window(struct device *d, int64_t first, int64_t count, struct error *err)
{
    const struct device_shape *s = &d->shape;
    bool last = first + count == d->step_count;
    if (first < 0 || count < 0 || first % GEMM_ROWS_STEP || first + count > d->step_count ||
        (!last && count % GEMM_ROWS_STEP))
        return error_set(err, ERR_OTHER, "device %d: a window of rows %lld to %lld in a step of %lld", d->index,
                         (long long)first, (long long)(first + count), (long long)d->step_count);
    d->window_first = first;
    d->count = count;
    for (int i = 0; i < BUFFER_COUNT; i++)
        if (d->all_buffer[i])
            d->buffer[i] = d->all_buffer[i] + first * buffer_width(s->desc, s->share, (enum buffer)i);
    d->normed = d->buffer[BUFFER_NORMED];
    d->block = d->all_block;
    d->block.token += first;
    d->block.sequence += first;
    d->block.position += first;
    return 0;
}

int step_norm_own(struct device *d, const struct join *join, const float *weight, int64_t first, int64_t stride,
                  struct error *err)
{
    int64_t hidden = d->shape.desc->hidden_size, own = first < d->count ? (d->count - first + stride - 1) / stride : 0;
    struct device_join joining = step_join(d, join);
    if (joining.partial)
        joining.partial += first * hidden;
    return CHECK(launch_norm_apart(d->normed + first * hidden, d->buffer[BUFFER_RESIDUAL] + first * hidden, joining,
                                   weight, own, hidden, stride * hidden, (float)d->shape.desc->norm_eps, d->stream),
                 "a norm of own rows");
}

int step_take_normed(struct device *d, const float *order, const struct matrix *next, struct error *err)
{
    return step_keep(d, d->normed, order, d->shape.desc->hidden_size, next, err);
}

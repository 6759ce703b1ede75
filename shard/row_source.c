// See row_source.h.
#include "shard/row_source.h"

#include <stdlib.h>

void row_window_free(struct row_window *window)
{
    free(window->raw);
    free(window->values);
    if (window->own)
        window->free_own(window->own);
    *window = (struct row_window){0};
}

int row_source_pack(struct packed_row *out, const struct row_request *request, uint64_t row, const float *values,
                    struct error *err)
{
    struct error cause;
    uint64_t cols = request->source->source_cols;
    int rc = request->scales == WEIGHT_SCALES_LARGEST
                 ? pack_round_row(out, request->kind, request->group_size, values, cols, &cause)
                 : pack_quantize_row(out, request->kind, request->group_size, values, cols, NULL, &cause);
    return rc ? error_set(err, rc, "tensor %s, row %llu: %s", request->source->source, (unsigned long long)row,
                          cause.msg)
              : 0;
}

int row_window_reserve(struct row_window *window, uint64_t raw_bytes, uint64_t values, struct error *err)
{
    if (raw_bytes > window->raw_capacity) {
        free(window->raw);
        window->raw_capacity = 0;
        if (!(window->raw = malloc(raw_bytes)))
            return error_set(err, ERR_MEMORY, "out of memory for %llu bytes of rows", (unsigned long long)raw_bytes);
        window->raw_capacity = raw_bytes;
    }
    if (values > window->values_capacity) {
        free(window->values);
        window->values_capacity = 0;
        if (!(window->values = malloc(values * sizeof(float))))
            return error_set(err, ERR_MEMORY, "out of memory for a row of %llu values", (unsigned long long)values);
        window->values_capacity = values;
    }
    return 0;
}

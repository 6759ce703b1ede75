// Proof by example for the products of FP4 weights. See device.h.
//
// Values are small integers and halves, scales powers of two (nvfp4: times few eighths) that differ from row to row, token to token and group to
// group in the same row, far apart between rows but near within one, so that every sum is exact in f32 and a scale that is swapped, ignored
// or applied twice shows. One row has a NaN scale and one token NaN codes: they show, and nowhere else.
#include "formats/number_formats.h"
#include "kernels/cuda/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    TOKENS = 75,
    ROWS = 141,
    COLS = 434, // four steps of 128 columns, the last with one tile of 64, and that not full
    STRIDE = 512,
    Y_STRIDE = ROWS + 3,
    NAN_ROW = 37,
    NAN_TOKEN = 22,
};

struct probe {
    struct matrix w;
    unsigned char *host; // weights, their scales, inputs, their scales and y as on the device, one behind the other
    unsigned char *device;
    uint64_t scale_at, x_at, x_scale_at, y_at, bytes;
};

static uint32_t hash(uint32_t what, uint32_t row, uint32_t col)
{
    uint32_t h = (what * 0x9e3779b9u + row) * 0x85ebca6bu + col;
    h = (h ^ h >> 15) * 0x2c1b3c6du;
    h = (h ^ h >> 12) * 0x297a2d39u;
    return h ^ h >> 15;
}
static uint8_t code_at(uint32_t row, uint32_t col) { return (uint8_t)(hash(1, row, col) & 15); }
static int value_at(uint32_t token, uint32_t col) { return (int)(hash(2, token, col) % 9) - 4; }
static uint8_t x_scale_at(uint32_t token, uint32_t group)
{
    return (uint8_t)(127 - 18 + token * 5 % 37 + hash(3, token, group) % 3);
}
static uint8_t w_scale_at(enum weight_kind kind, uint32_t row, uint32_t group)
{
    if (kind == WEIGHT_MXFP4)
        return row == NAN_ROW && group == 2 ? 255 : (uint8_t)(127 - 20 + row * 7 % 41 + hash(4, row, group) % 3);
    return row == NAN_ROW && group == 5 ? 0x7f : (uint8_t)(0x38 + hash(4, row, group) % 16); // 1, 9/8 .. 15/4
}
static float global_at(uint32_t row) { return f32_from_bits((127 - 20 + row * 7 % 41) << 23); }

static double expected(enum weight_kind kind, uint32_t token, uint32_t row)
{
    uint32_t group_cols = kind == WEIGHT_MXFP4 ? 32 : 16;
    double sum = 0;
    if (row == NAN_ROW || token == NAN_TOKEN)
        return (double)NAN;
    for (uint32_t c = 0; c < COLS; c++) {
        uint8_t scale = w_scale_at(kind, row, c / group_cols);
        double w = (double)e2m1_to_f32(code_at(row, c)) *
                   (double)(kind == WEIGHT_MXFP4 ? e8m0_to_f32(scale) : e4m3_to_f32(scale) * global_at(row));
        sum += w * value_at(token, c) * (double)e8m0_to_f32(x_scale_at(token, c / 32));
    }
    return sum;
}

static void fill_weights(const struct probe *p)
{
    const struct weight_shape *shape = &p->w.shape;
    uint32_t groups = (uint32_t)shape->cols_padded / shape->group_size;
    for (uint32_t row = 0; row < ROWS; row++) {
        for (uint32_t col = 0; col < COLS; col++) {
            bool high;
            uint64_t at = weight_tile_offset(row, col, shape->cols_padded, &high);
            p->host[at] |= (unsigned char)(code_at(row, col) << (high ? 4 : 0));
        }
        unsigned char *scales = p->host + p->scale_at + row / 16 * groups * 16;
        if (shape->kind == WEIGHT_NVFP4) {
            uint32_t before = row / WEIGHT_ROW_UNIT * WEIGHT_ROW_UNIT * (uint32_t)sizeof(float);
            float global = global_at(row);
            scales += before;
            memcpy(p->host + p->scale_at + before + (row / WEIGHT_ROW_UNIT + 1) * WEIGHT_ROW_UNIT * groups +
                       row % WEIGHT_ROW_UNIT * sizeof global,
                   &global, sizeof global);
        }
        for (uint32_t group = 0; group < groups; group++)
            scales[group * 16 + row % 16] = w_scale_at(shape->kind, row, group);
    }
}

static void fill_inputs(const struct probe *p)
{
    static const uint8_t place[16] = {0, 2, 16, 18, 32, 34, 48, 50,
                                      1, 3, 17, 19, 33, 35, 49, 51}; // t * 16 + j of INPUT_INT8_TILE
    for (uint32_t token = 0; token < TOKENS; token++) {
        unsigned char *x = p->host + p->x_at + token * STRIDE,
                      *scales = p->host + p->x_scale_at + token * (STRIDE / 32);
        for (uint32_t col = 0; col < COLS; col++) {
            bool nan = token == NAN_TOKEN && col / 32 == 3;
            x[col / 64 * 64 + col % 64 / 16 * 4 + place[col % 16]] =
                nan ? 0x7f : f32_to_e4m3((float)value_at(token, col));
        }
        for (uint32_t group = 0; group < STRIDE / 32; group++)
            scales[group] = token == NAN_TOKEN && group == 3 ? 255 : x_scale_at(token, group);
    }
}

static int compare(const struct probe *p, struct error *err)
{
    for (uint32_t i = 0; i < TOKENS; i++) {
        for (uint32_t j = 0; j < Y_STRIDE; j++) {
            float got;
            memcpy(&got, p->host + p->y_at + (i * Y_STRIDE + j) * sizeof got, sizeof got);
            double want =
                j < ROWS ? expected(p->w.shape.kind, i, j) : (double)NAN; // beside the result stays what was there
            if (!((double)got == want) && !(isnan(got) && isnan(want)))
                return error_set(err, ERR_GPU,
                                 "element (%u, %u) of a known product with %s weights is %g instead of %g", i, j,
                                 weight_kind_name(p->w.shape.kind), (double)got, want);
        }
    }
    return 0;
}

static int cuda_error(cudaError_t status, struct error *err)
{
    return status == cudaSuccess ? 0 : error_set(err, ERR_GPU, "FP4 probe: %s", cudaGetErrorString(status));
}

static int run(const struct probe *p, cudaStream_t stream, struct error *err)
{
    struct device_input in = {p->device + p->x_at, (float *)(void *)(p->device + p->x_scale_at), STRIDE};
    int rc;
    if ((rc = cuda_error(cudaMemcpyAsync(p->device, p->host, p->bytes, cudaMemcpyHostToDevice, stream), err)) ||
        (rc = cuda_error(launch_linear_fp4((float *)(void *)(p->device + p->y_at), Y_STRIDE, &p->w, in, TOKENS, stream),
                         err)) ||
        (rc = cuda_error(cudaMemcpyAsync(p->host + p->y_at, p->device + p->y_at, p->bytes - p->y_at,
                                         cudaMemcpyDeviceToHost, stream),
                         err)) ||
        (rc = cuda_error(cudaStreamSynchronize(stream), err)))
        return rc;
    return compare(p, err);
}

int fp4_probe(enum weight_kind kind, cudaStream_t stream, struct error *err)
{
    struct probe p = {.host = NULL};
    int rc;
    if (!weight_shape_make(&p.w.shape, kind, weight_group_default(kind), ROWS, COLS))
        return error_set(err, ERR_GPU, "FP4 probe: no such weights");
    p.scale_at = p.w.shape.data_bytes; // all are multiples of 16
    p.x_at = p.scale_at + p.w.shape.scale_bytes;
    p.x_scale_at = p.x_at + TOKENS * STRIDE;
    p.y_at = p.x_scale_at + TOKENS * (STRIDE / 32);
    p.bytes = p.y_at + TOKENS * Y_STRIDE * sizeof(float);
    if ((rc = cuda_error(cudaMallocHost((void **)&p.host, p.bytes), err)) ||
        (rc = cuda_error(cudaMalloc((void **)&p.device, p.bytes), err)))
        goto fail;
    memset(p.host, 0, p.y_at);
    memset(p.host + p.y_at, 0xff, p.bytes - p.y_at); // NaN
    fill_weights(&p);
    fill_inputs(&p);
    p.w.data = p.device;
    p.w.scale = p.device + p.scale_at;
    rc = run(&p, stream, err);
    cudaStreamSynchronize(stream); // also after a failure nothing of this runs any more
fail:
    cudaFree(p.device);
    cudaFreeHost(p.host);
    return rc;
}

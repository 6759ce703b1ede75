// The CUDA backend's table, and a device's beginning and end. See kernels/backend.h.
#include "kernels/cuda/exchange_host.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Ranks of one process that share a device have one context, whose kernels wait for each other. Code that is loaded when it is first run waits for all
// kernels of its context: for one that waits for it. And a copy must not stand in a queue behind one that waits for it. Read by the driver when
// it is first called, which is later.
static void cuda_before_threads(void)
{
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
}

int device_count(int *count, struct error *err)
{
    cudaError_t status = cudaGetDeviceCount(count);
    if (status != cudaSuccess || *count < 1)
        return error_set(err, ERR_GPU, "no GPU can be used: %s; --backend cpu runs without one",
                         status != cudaSuccess ? cudaGetErrorString(status) : "the driver reports none");
    return 0;
}

static int choose_device(struct device *d, const struct device_options *options, struct error *err)
{
    int count = 0, rc = device_count(&count, err);
    if (rc)
        return rc;
    d->index = device_of_rank(options->rank, options->device, count);
    if (d->index >= count)
        return error_set(err, ERR_GPU, "device %d does not exist: there are %d", d->index, count);
    return device_status(d, cudaSetDevice(d->index), "choosing it", err);
}

static int read_properties(struct device *d, struct error *err)
{
    struct cudaDeviceProp properties;
    int rc = device_status(d, cudaGetDeviceProperties(&properties, d->index), "reading its properties", err);
    if (rc)
        return rc;
    d->sm = 10 * properties.major + properties.minor;
    snprintf(d->name, sizeof d->name, "%.63s", properties.name);
    // Code for sm_80, 86, 89, 90 and 120 runs on its own generation and on later members of it.
    if (properties.major == 8 || properties.major == 9 || properties.major == 12)
        return 0;
    return error_set(err, ERR_GPU,
                     "device %d: %s has compute capability %d.%d; the kernels are compiled for 8.x, 9.0 and 12.x; "
                     "--backend cpu runs without it",
                     d->index, d->name, properties.major, properties.minor);
}

static void cuda_close(struct device *d)
{
    if (!d)
        return;
    cudaSetDevice(d->index);
    if (!exchange_close(d)) {
        free(d); // the rest stays until the process ends: the device hangs, and to free its memory would wait for it
        return;
    }
    device_settle(d);
    multiply_free(d);
    device_free_memory(d);
    if (d->uploaded)
        cudaEventDestroy(d->uploaded);
    if (d->stream)
        cudaStreamDestroy(d->stream);
    free(d);
}

static int cuda_open(struct device **out, const struct device_options *options, struct error *err)
{
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return error_set(err, ERR_MEMORY, "no memory for a device");
    int rc;
    d->pool = options->pool;
    d->tp_size = options->tp_size;
    if ((rc = choose_device(d, options, err)) || (rc = read_properties(d, err)) ||
        (rc = device_status(d, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "making a stream", err)) ||
        (rc = device_status(d, cudaEventCreateWithFlags(&d->uploaded, cudaEventDisableTiming), "making an event",
                            err))) {
        cuda_close(d);
        return rc;
    }
    *out = d;
    return 0;
}

static void cuda_describe(const struct device *d, char text[DEVICE_TEXT_BYTES])
{
    int used = snprintf(text, DEVICE_TEXT_BYTES, "device %d, %s (sm_%d): ", d->index, d->name, d->sm);
    multiply_describe(d, text + used, DEVICE_TEXT_BYTES - (size_t)used);
    used = (int)strlen(text);
    if (d->exchange)
        snprintf(text + used, DEVICE_TEXT_BYTES - (size_t)used, "; sums of ranks over %s",
                 transport_name(d->exchange->options.transport));
    used = (int)strlen(text);
    if (d->exchange && d->exchange->nccl && used + 3 < DEVICE_TEXT_BYTES) {
        text[used++] = ',', text[used++] = ' ';
        nccl_describe(d->exchange->nccl, text + used, DEVICE_TEXT_BYTES - (size_t)used);
    }
}

static void cuda_bus(const struct device *d, char bus[DEVICE_BUS_BYTES])
{
    if (cudaDeviceGetPCIBusId(bus, DEVICE_BUS_BYTES, d->index) != cudaSuccess) {
        cudaGetLastError();
        bus[0] = 0;
    }
}

static const struct backend table = {
    .abi = BACKEND_ABI,
    .name = "cuda",
    .prefill_rows = PREFILL_ROWS,
    .decode_rows = LOGITS_ROWS,
    .balance_rows = 128,
    .chunks_fixed = true,
    .window_rows = GEMM_ROWS_STEP,
    .host_bytes = device_host_bytes,
    .devices = device_count,
    .link_probe = link_probe,
    .before_threads = cuda_before_threads,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .bus = cuda_bus,
    .plan = device_plan,
    .load_begin = device_load_begin,
    .load_buffer = device_load_buffer,
    .load_copy = device_load_copy,
    .load_read = device_load_read,
    .load_end = device_load_end,
    .prepare = device_prepare,
    .expands = multiply_expands,
    .begin = step_begin,
    .record = step_record,
    .finish = step_finish,
    .embed = step_embed,
    .scale_residual = step_scale_residual,
    .norm = step_norm,
    .linear = step_linear,
    .norm_latent = step_norm_latent,
    .squares = step_squares,
    .finish_qkv = step_finish_qkv,
    .attend = step_attend,
    .activate = step_activate,
    .route = step_route,
    .experts = step_experts,
    .lend = step_lend,
    .returned = step_returned,
    .window = step_window,
    .norm_own = step_norm_own,
    .take_normed = step_take_normed,
    .exchange_bytes = exchange_region_bytes,
    .exchange_open = exchange_open,
    .all_reduce = exchange_all_reduce,
    .reduce_scatter_rows = exchange_reduce_scatter_rows,
    .all_gather_rows = exchange_all_gather_rows,
    .norm_dealt = exchange_norm_dealt,
    .lend_lost = exchange_lend_lost,
    .returned_lost = exchange_returned_lost,
    .side_begin = exchange_side_begin,
    .side_end = exchange_side_end,
    .side_wait = exchange_side_wait,
    .logits = step_logits,
    .count_tokens = step_count_tokens,
    .sampling = step_sampling,
    .sample = step_sample,
    .tokens = step_tokens,
};

__attribute__((visibility("default"))) const struct backend *tpengine_cuda_backend(void);
const struct backend *tpengine_cuda_backend(void) { return &table; }

// The operations over rows that make the input of a matrix product: norm, prepare, activate; and scale. Declared in launch.h.
//
// Owns the formats in which a matrix product finds its input (enum input_format), written by one kernel template for the three operations
// that end in it: a warp takes a group of 128 columns, a lane the four columns that stand side by side in memory in that format.
// Values are computed once and kept in shared memory as far as it reaches; what lies behind is computed again.
//
// The same bits as the CPU's table: prepare, activate (its exp is plain arithmetic, see rows.cuh), scale, the bias and the int8 formats of
// whatever they are given. Sums of squares have another order than the CPU's 16 lanes, whose chain of cols / 16
// additions would be most of a small norm's time: a thread's columns in ascending order, then its warp by halves, then the warps
// in ascending order in double. Relative error of the sum at most (4 * groups / warps + 6) * 2^-24; the CPU's: (cols / 16) * 2^-24.
#include "kernels/cuda/write_row.cuh"

// One block per row.
template <enum row_source SOURCE, enum input_format FORMAT>
__global__ void __launch_bounds__(MAX_WARPS *WARP)
    write_row(struct device_input out, struct row_input in, int64_t kept_groups)
{
    write_one_row<SOURCE, FORMAT>(out, in, kept_groups, blockIdx.x);
}

template <enum row_source SOURCE>
static cudaError_t launch_rows(struct device_input out, enum input_format format, struct row_input in, int64_t rows,
                               cudaStream_t stream)
{
    if (rows == 0)
        return cudaSuccess;
    in.aligned = row_is_aligned(out, in);
    struct row_launch how = row_launch_of(in.cols);
    int64_t kept = how.kept_groups;
    unsigned bytes = how.shared_bytes;
    dim3 grid((unsigned)rows), block(how.threads);
    switch (format) {
    case INPUT_F32:
        if (SOURCE == SOURCE_NORM)
            return LAUNCH((write_row<SOURCE_NORM, INPUT_F32>), grid, block, bytes, stream, out, in, kept);
        break;
    case INPUT_F16:
        return LAUNCH((write_row<SOURCE, INPUT_F16>), grid, block, bytes, stream, out, in, kept);
    case INPUT_F16_TILE:
        return LAUNCH((write_row<SOURCE, INPUT_F16_TILE>), grid, block, bytes, stream, out, in, kept);
    case INPUT_BF16:
        return LAUNCH((write_row<SOURCE, INPUT_BF16>), grid, block, bytes, stream, out, in, kept);
    case INPUT_INT8:
        return LAUNCH((write_row<SOURCE, INPUT_INT8>), grid, block, bytes, stream, out, in, kept);
    case INPUT_INT8_TILE:
        return LAUNCH((write_row<SOURCE, INPUT_INT8_TILE>), grid, block, bytes, stream, out, in, kept);
    case INPUT_MXFP8_TILE:
        return LAUNCH((write_row<SOURCE, INPUT_MXFP8_TILE>), grid, block, bytes, stream, out, in, kept);
    case INPUT_E4M3:
        return LAUNCH((write_row<SOURCE, INPUT_E4M3>), grid, block, bytes, stream, out, in, kept);
    }
    return cudaErrorInvalidValue;
}

extern "C" cudaError_t launch_norm(struct device_input out, enum input_format format, float *residual,
                                   struct device_join join, const float *weight, const int32_t *row_index, int64_t rows,
                                   int64_t cols, float eps, cudaStream_t stream)
{
    struct row_input in = {};
    in.residual = residual;
    in.row_stride = cols;
    in.join = join;
    in.weight = weight;
    in.row_index = row_index;
    in.cols = cols;
    in.eps = eps;
    return launch_rows<SOURCE_NORM>(out, format, in, rows, stream);
}

extern "C" cudaError_t launch_norm_apart(float *out, float *residual, struct device_join join, const float *weight,
                                         int64_t rows, int64_t cols, int64_t row_stride, float eps, cudaStream_t stream)
{
    struct row_input in = {};
    struct device_input to = {};
    to.values = out;
    to.stride = row_stride;
    in.residual = residual;
    in.row_stride = row_stride;
    in.join = join;
    in.weight = weight;
    in.cols = cols;
    in.eps = eps;
    return launch_rows<SOURCE_NORM>(to, INPUT_F32, in, rows, stream);
}

extern "C" cudaError_t launch_prepare(struct device_input out, enum input_format format, const float *x,
                                      int64_t x_stride, const float *order, int64_t rows, int64_t cols,
                                      cudaStream_t stream)
{
    struct row_input in = {};
    in.x = x;
    in.x_stride = x_stride;
    in.order = order;
    in.cols = cols;
    return launch_rows<SOURCE_PLAIN>(out, format, in, rows, stream);
}

static void set_rotation(struct row_input *in, int64_t rotation)
{
    int log2 = 0;
    while (rotation >> (log2 + 1))
        log2++;
    in->rotation = (int)rotation;
    in->rotation_factor = f32_from_bits((uint32_t)(127 - log2 / 2) << 23) * (log2 % 2 ? 0x1.6a09e6p-1f : 1.0f);
}

extern "C" cudaError_t launch_activate(struct device_input out, enum input_format format, enum activation activation,
                                       int64_t rotation, const float *gate_up, const float *bias, int64_t rows,
                                       int64_t cols, cudaStream_t stream)
{
    struct row_input in = {};
    in.x = gate_up;
    in.x_stride = 2 * cols;
    in.activation = activation;
    set_rotation(&in, rotation);
    in.bias = bias;
    in.cols = cols;
    return launch_rows<SOURCE_ACTIVATE>(out, format, in, rows, stream);
}

extern "C" cudaError_t launch_activate_slots(struct device_input out, enum input_format format,
                                             enum activation activation, int64_t rotation, const float *gate_up,
                                             const int32_t *chosen, const struct device_expert *experts, int64_t count,
                                             int64_t cols, cudaStream_t stream)
{
    struct row_input in = {};
    in.x = gate_up;
    in.x_stride = 2 * cols;
    in.activation = activation;
    set_rotation(&in, rotation);
    in.chosen = chosen;
    in.experts = experts;
    in.cols = cols;
    return launch_rows<SOURCE_ACTIVATE>(out, format, in, count, stream);
}

// ---- scale ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256) scale_values(float *x, int64_t count, float factor, float softcap)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count)
        return;
    float value = x[i] * factor;
    x[i] = softcap > 0 ? softcap_as_cpu(value, softcap) : value;
}

extern "C" cudaError_t launch_scale_values(float *x, int64_t count, float factor, float softcap, cudaStream_t stream)
{
    if (count == 0)
        return cudaSuccess;
    return LAUNCH(scale_values, dim3((unsigned)rounded_up_quotient(count, 256)), dim3(256), 0, stream, x, count, factor,
                  softcap);
}

// The products of a layer's experts, whose rows are listed expert by expert. See linear_f16.cuh; declared in launch.h.
#include "kernels/cuda/linear_f16.cuh"

namespace
{

// blockIdx.y: a tile of the list, of one expert's tokens.
template <int KIND, int GROUP, int TILES>
__global__ void __launch_bounds__(256, TILES < 4 ? 2 : 1)
    linear_experts(struct linear l, struct device_slots slots, const struct device_weights *experts,
                   int64_t experts_step, int slots_per_row, int stage_bytes)
{
    SHARED_DYNAMIC(uint8_t, shared);
    SHARED(int32_t, x_row, TILES * TILE_TOKENS);
    SHARED(int32_t, y_row, TILES * TILE_TOKENS);
    struct expert_tile tile = slots.tiles[blockIdx.y];
    if (tile.count == 0)
        return;
    struct device_weights w = experts[tile.expert * experts_step];
    l.weights = (const uint8_t *)w.data;
    l.weight_scale = w.scale;
    l.tokens = tile.count;
    if ((int)threadIdx.x < tile.count) {
        y_row[threadIdx.x] = slots.slot[tile.first + threadIdx.x];
        x_row[threadIdx.x] = y_row[threadIdx.x] / slots_per_row;
    }
    __syncthreads();
    struct token_list list = {x_row, y_row};
    multiply_block<KIND, GROUP, TILES, true>(l, list, 0, stage_bytes, shared);
}

struct experts_job {
    struct device_slots slots;
    const struct device_weights *experts;
    int64_t step;
    int slots_per_row;
};

template <int KIND, int GROUP, int TILES>
cudaError_t launch_listed(const struct linear *l, const struct experts_job *job, cudaStream_t stream)
{
    struct block_shape b = shape_of<KIND, GROUP, TILES>(l);
    dim3 grid(b.blocks, (unsigned)job->slots.num_tiles);
    return LAUNCH((linear_experts<KIND, GROUP, TILES>), grid, 256, b.shared_bytes, stream, *l, job->slots, job->experts,
                  job->step, job->slots_per_row, b.stage_bytes);
}

template <int KIND, int GROUP, class JOB>
cudaError_t launch_product(const struct linear *l, const JOB *job, cudaStream_t stream)
{
    return job->slots.tile_tokens == EXPERT_TILE_FEW
               ? launch_listed<KIND, GROUP, EXPERT_TILE_FEW / TILE_TOKENS>(l, job, stream)
               : launch_listed<KIND, GROUP, EXPERT_TILE_MANY / TILE_TOKENS>(l, job, stream);
}

} // namespace

extern "C" cudaError_t launch_linear_experts(float *y, const struct weight_shape *shape, struct device_input in,
                                             int slots_per_row, const struct device_weights *experts,
                                             int64_t experts_step, struct device_slots slots, cudaStream_t stream)
{
    struct matrix w = {*shape, NULL, NULL};
    if (shape->rows == 0 || shape->cols == 0 || slots.num_tiles == 0)
        return cudaSuccess;
    if (slots.num_tiles > 65535)
        return cudaErrorInvalidValue;
    struct linear l = linear_of(y, (int64_t)shape->rows, &w, in, 0, 2);
    l.split_bits = 2; // experts fill the device by their number
    struct experts_job job = {slots, experts, experts_step, slots_per_row};
    return launch_for_kind(&l, &job, shape, stream);
}

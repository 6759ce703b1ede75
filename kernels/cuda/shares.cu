// The kernels of an all_reduce in packed shares, and of its halves. See shares.h.
//
// A warp takes a slot: 128 values of a row, 512 bytes, four in each lane. All three are bound by memory: each value is read once and each
// byte written once, neighbouring warps touch neighbouring groups of the same rank.
#include "kernels/cuda/shares.h"
#include "kernels/cuda/wire.cuh"

namespace
{

enum { BLOCK_WARPS = 8 };

// What a kernel is told of a piece.
struct share_view {
    float *data;
    uint16_t *lost;
    int64_t cols, stride;
    uint32_t rows, groups_per_row;
    uint32_t share_rows, slots_per_row; // of a share
    int rank, tp_size, first_owner;
    bool by_rows, aligned;
};

struct share_slot {
    uint32_t owner, in_share; // its share, and which slot of it
    float *x;                 // NULL: the slot is empty
    uint16_t *lost;
    int count;
};

// The warp's slot, numbered through `owners` shares from that of `first_owner` on; false when there is none.
__device__ __forceinline__ bool slot_of_warp(const struct share_view &view, uint32_t first_owner, uint32_t owners,
                                             struct share_slot *slot)
{
    uint32_t index = blockIdx.x * BLOCK_WARPS + threadIdx.x / WARP, in_share = view.share_rows * view.slots_per_row;
    if (index >= in_share * owners)
        return false;
    slot->owner = first_owner + index / in_share;
    slot->in_share = index % in_share;
    uint32_t row = slot->in_share / view.slots_per_row, group = slot->in_share % view.slots_per_row;
    uint32_t tp_size = (uint32_t)view.tp_size;
    if (view.by_rows)
        row = row * tp_size + (slot->owner + tp_size - (uint32_t)view.first_owner) % tp_size;
    else
        group = group * tp_size + slot->owner;
    bool empty = row >= view.rows || group >= view.groups_per_row;
    int64_t column = (int64_t)group * WIRE_GROUP, left = view.cols - column;
    slot->x = empty ? nullptr : view.data + row * view.stride + column;
    slot->lost = view.lost ? view.lost + row * view.cols + column : nullptr;
    slot->count = left < WIRE_GROUP ? (int)left : WIRE_GROUP;
    return true;
}

// Codes x, or with error feedback x and what was lost before; then x is what it decodes to.
template <enum wire WIRE>
__device__ __forceinline__ struct wire_lane encode_slot(const struct share_view &view, const struct share_slot &slot,
                                                        float *x)
{
    if (!view.lost)
        return wire_encode<WIRE>(x);
    uint16_t lost[LANE_VALUES];
    wire_read_lost(lost, slot.lost, slot.count, view.aligned);
    struct wire_lane code = wire_feed<WIRE>(x, lost);
    wire_write_lost(slot.lost, lost, slot.count, view.aligned);
    return code;
}

template <enum wire WIRE>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP)
    share_encode(uint8_t *to, struct share_view view, uint32_t *began, uint32_t number)
{
    struct share_slot slot;
    if (began && blockIdx.x == 0 && threadIdx.x == 0)
        *(volatile uint32_t *)began = number;
    if (!slot_of_warp(view, 0, (uint32_t)view.tp_size, &slot) || slot.owner == (uint32_t)view.rank)
        return;
    struct wire_lane code = {};
    if (slot.x) {
        float x[LANE_VALUES];
        wire_read(x, slot.x, slot.count, view.aligned);
        code = encode_slot<WIRE>(view, slot, x);
    }
    int64_t at = (int64_t)slot.owner * view.share_rows * view.slots_per_row + slot.in_share;
    wire_store<WIRE>(to + at * wire_bytes(WIRE), code);
}

template <enum wire WIRE>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP)
    share_encode_own(uint8_t *to, struct share_view view, uint32_t *began, uint32_t number)
{
    struct share_slot slot;
    if (began && blockIdx.x == 0 && threadIdx.x == 0)
        *(volatile uint32_t *)began = number;
    if (!slot_of_warp(view, (uint32_t)view.rank, 1, &slot))
        return;
    struct wire_lane code = {};
    if (slot.x) {
        float x[LANE_VALUES];
        wire_read(x, slot.x, slot.count, view.aligned);
        code = wire_encode<WIRE>(x);
        wire_decode<WIRE>(x, code);
        wire_write(slot.x, x, slot.count, view.aligned);
    }
    wire_store<WIRE>(to + (int64_t)slot.in_share * wire_bytes(WIRE), code);
}

template <enum wire WIRE>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP)
    share_add_up(uint8_t *to, const uint8_t *from, struct share_view view)
{
    struct share_slot slot;
    if (!slot_of_warp(view, (uint32_t)view.rank, 1, &slot))
        return;
    struct wire_lane code = {};
    if (slot.x) {
        float own[LANE_VALUES], sum[LANE_VALUES] = {};
        int64_t slots = (int64_t)view.share_rows * view.slots_per_row;
        wire_read(own, slot.x, slot.count, view.aligned);
        if (wire_of_own(WIRE) == WIRE_BF16 && to && !view.lost)
            for (int i = 0; i < LANE_VALUES; i++)
                own[i] = bf16_to_f32(f32_to_bf16(own[i]));
        for (int rank = 0; rank < view.tp_size; rank++) {
            if (rank == view.rank)
                for (int i = 0; i < LANE_VALUES; i++)
                    sum[i] = wire_canonical(sum[i] + own[i]);
            else
                wire_add<WIRE>(sum, wire_load<WIRE>(from + (rank * slots + slot.in_share) * wire_bytes(WIRE)));
        }
        if (to) {
            code = encode_slot<WIRE>(view, slot, sum);
            if (!view.lost)
                wire_decode<WIRE>(sum, code);
        }
        wire_write(slot.x, sum, slot.count, view.aligned);
    }
    if (to)
        wire_store<WIRE>(to + (int64_t)slot.in_share * wire_bytes(WIRE), code);
}

template <enum wire WIRE>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP) share_decode(const uint8_t *from, struct share_view view)
{
    struct share_slot slot;
    if (!slot_of_warp(view, 0, (uint32_t)view.tp_size, &slot) || slot.owner == (uint32_t)view.rank || !slot.x)
        return;
    float x[LANE_VALUES];
    int64_t at = (int64_t)slot.owner * view.share_rows * view.slots_per_row + slot.in_share;
    wire_decode<WIRE>(x, wire_load<WIRE>(from + at * wire_bytes(WIRE)));
    wire_write(slot.x, x, slot.count, view.aligned);
}

struct share_view view_of(const struct share_piece *piece)
{
    struct share_view view = {};
    view.data = piece->data, view.lost = piece->lost;
    view.cols = piece->cols, view.stride = piece->stride;
    view.rows = (uint32_t)piece->rows;
    view.groups_per_row = (uint32_t)wire_groups((uint64_t)piece->cols);
    view.by_rows = piece->by_rows;
    view.first_owner = piece->first_owner;
    view.share_rows = piece->by_rows ? (uint32_t)rounded_up_quotient(piece->rows, piece->tp_size) : view.rows;
    view.slots_per_row =
        piece->by_rows ? view.groups_per_row : (uint32_t)share_slots_per_row(piece->cols, piece->tp_size);
    view.rank = piece->rank, view.tp_size = piece->tp_size;
    view.aligned = piece->cols % LANE_VALUES == 0 && piece->stride % LANE_VALUES == 0 && on_16_bytes(piece->data) &&
                   (uintptr_t)piece->lost % 8 == 0;
    return view;
}

dim3 blocks_of(const struct share_view &view, int owners)
{
    int64_t slots = (int64_t)view.share_rows * view.slots_per_row * owners;
    return dim3((unsigned)rounded_up_quotient(slots, BLOCK_WARPS));
}

// Picks the instance of a piece's codec.
#define LAUNCH_SHARE(kernel, owners, ...)                                                                              \
    do {                                                                                                               \
        struct share_view view = view_of(piece);                                                                       \
        dim3 grid = blocks_of(view, owners), block(BLOCK_WARPS * WARP);                                                \
        switch (piece->wire) {                                                                                         \
        case WIRE_BF16:                                                                                                \
            return LAUNCH((kernel<WIRE_BF16>), grid, block, 0, stream, __VA_ARGS__);                                   \
        case WIRE_FP8:                                                                                                 \
            return LAUNCH((kernel<WIRE_FP8>), grid, block, 0, stream, __VA_ARGS__);                                    \
        case WIRE_S8X:                                                                                                 \
            return LAUNCH((kernel<WIRE_S8X>), grid, block, 0, stream, __VA_ARGS__);                                    \
        case WIRE_F32:                                                                                                 \
            return LAUNCH((kernel<WIRE_F32>), grid, block, 0, stream, __VA_ARGS__);                                    \
        case WIRE_COUNT:                                                                                               \
            break;                                                                                                     \
        }                                                                                                              \
        return cudaErrorInvalidValue;                                                                                  \
    } while (0)

} // namespace

cudaError_t launch_share_encode(uint8_t *to, const struct share_piece *piece, uint32_t *began, uint32_t number,
                                cudaStream_t stream)
{
    LAUNCH_SHARE(share_encode, piece->tp_size, to, view, began, number);
}

cudaError_t launch_share_add_up(uint8_t *to, const uint8_t *from, const struct share_piece *piece, cudaStream_t stream)
{
    LAUNCH_SHARE(share_add_up, 1, to, from, view);
}

cudaError_t launch_share_encode_own(uint8_t *to, const struct share_piece *piece, uint32_t *began, uint32_t number,
                                    cudaStream_t stream)
{
    LAUNCH_SHARE(share_encode_own, 1, to, view, began, number);
}

cudaError_t launch_share_decode(const uint8_t *from, const struct share_piece *piece, cudaStream_t stream)
{
    LAUNCH_SHARE(share_decode, piece->tp_size, from, view);
}

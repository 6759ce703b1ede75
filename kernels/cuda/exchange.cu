// Sums over ranks on their devices. See exchange.h for the memory, the tokens and why their order is enough.
//
// A message is cut into units: up to EXCHANGE_UNIT_GROUPS groups of one row. Unit u belongs to block u modulo the number of blocks, on all ranks;
// a block waits for the blocks of its number alone. So blocks need no order among them, but all blocks of a launch must run: there are few enough
// for any chip.
//
// Of a unit a warp takes whole groups (wire.cuh).
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/wire.cuh"
#include "kernels/cuda/write_row.cuh"

namespace
{

enum { THREADS = 256, CLOCK_POLLS = 64, EAGER_POLLS = 16 };

// ---- tokens --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t *token_of(const uint8_t *area, int lane)
{
    return (uint32_t *)(void *)(area + lane * EXCHANGE_TOKEN_BYTES);
}

__device__ __forceinline__ uint64_t slot_of(int lane, uint32_t token)
{
    return (uint64_t)EXCHANGE_SLOTS_OFFSET + (uint64_t)(2 * lane + (int)(token % 2)) * EXCHANGE_SLOT_BYTES;
}

// The time is up for rank r, or for one that is further behind: says so once for this rank, and ends everybody's waits.
__device__ void report(const struct exchange_ranks &ranks, int r, int lane, uint32_t expected, uint32_t phase,
                       uint32_t place)
{
    if (atomicMax(&ranks.state->broken, 1u) == 0) {
        struct exchange_record *record = ranks.record;
        uint32_t oldest = posted_system(token_of(ranks.from[r], lane));
        for (int other = 0; other < ranks.tp_size; other++) {
            if (other == ranks.rank)
                continue;
            uint32_t seen = posted_system(token_of(ranks.from[other], lane));
            if ((int32_t)(seen - oldest) < 0) {
                oldest = seen;
                r = other;
            }
        }
        record->call = ranks.state->calls;
        record->place = place;
        record->phase = phase;
        record->expected = expected;
        record->seen = oldest;
        record->whom = (uint32_t)r;
        post_system(&record->told, 1);
    }
    post_system(ranks.abort, 1);
}

// Until rank r has posted; false: everybody is to leave.
__device__ bool wait_for(const struct exchange_ranks &ranks, int r, int lane, uint32_t expected, uint32_t phase,
                         uint32_t place)
{
    const uint32_t *word = token_of(ranks.from[r], lane);
    uint64_t begin = 0;
    for (uint32_t polls = 1;; polls++) {
        if ((int32_t)(posted_system(word) - expected) >= 0)
            return true;
        if (polls % CLOCK_POLLS == 0) {
            uint64_t now = device_now_ns();
            if (begin == 0)
                begin = now;
            if (posted_system(ranks.abort)) {
                atomicMax(&ranks.state->broken, 1u);
                return false;
            }
            if (now - begin > ranks.timeout_ns) {
                report(ranks, r, lane, expected, phase, place);
                return false;
            }
        }
        if (polls > EAGER_POLLS)
            wait_a_little();
    }
}

// What the block wrote is there for the others, and what they wrote for this one; all threads call it. failed: shared.
__device__ bool meet_ranks(const struct exchange_ranks &ranks, int lane, uint32_t token, uint32_t phase, uint32_t place,
                           uint32_t *failed)
{
    __syncthreads();
    int t = (int)threadIdx.x;
    if (t < ranks.num_every)
        post_system(token_of(ranks.every[t], lane), token);
    if (t < ranks.tp_size && t != ranks.rank && !wait_for(ranks, t, lane, token, phase, place))
        *failed = 1;
    __syncthreads();
    return *failed == 0;
}

// Before a block's first phase.
__device__ uint32_t begin_lane(const struct exchange_ranks &ranks, int lane, uint32_t *failed)
{
    if (threadIdx.x == 0) {
        *failed = ranks.state->broken;
        if (lane == 0)
            ranks.state->calls++;
    }
    uint32_t token = ranks.state->token[lane];
    __syncthreads();
    return token;
}

__device__ __forceinline__ void end_lane(const struct exchange_ranks &ranks, int lane, uint32_t token)
{
    __syncthreads();
    if (threadIdx.x == 0)
        ranks.state->token[lane] = token;
}

// ---- units ---------------------------------------------------------------------------------------------------------

// How a message is cut; the same on all ranks.
struct cut {
    uint32_t groups_per_row, unit_groups, units_per_row, units;
};

// A half is cut as if tp_size rows, which all have other owners, were one row: its groups are theirs in turn, so that in both cases group g of a row is
// owned by the rank that comes g % tp_size behind that of group 0, and each unit has work for all ranks.
__host__ __device__ inline struct cut cut_of(const struct exchange_message &m, int tp_size, uint32_t blocks)
{
    struct cut c;
    uint32_t ranks = (uint32_t)tp_size, rows = m.rows;
    c.groups_per_row = (m.cols + WIRE_GROUP - 1) / WIRE_GROUP;
    if (m.half != EXCHANGE_WHOLE) {
        rows = (rows + ranks - 1) / ranks;
        c.groups_per_row *= ranks;
    }
    uint32_t share = (rows * c.groups_per_row + blocks - 1) / blocks, least = MAX_WARPS / 2;
    share = share < least ? least : share;
    share = (share + ranks - 1) / ranks * ranks; // units begin with a group of rank 0
    c.unit_groups = share > EXCHANGE_UNIT_GROUPS ? EXCHANGE_UNIT_GROUPS / ranks * ranks : share;
    c.units_per_row = (c.groups_per_row + c.unit_groups - 1) / c.unit_groups;
    c.units = rows * c.units_per_row;
    return c;
}

struct unit {
    uint32_t row, first, count; // groups
};

__device__ __forceinline__ struct unit unit_at(const struct cut &c, uint32_t index)
{
    struct unit u;
    u.row = index / c.units_per_row;
    u.first = index % c.units_per_row * c.unit_groups;
    u.count = min(c.unit_groups, c.groups_per_row - u.first);
    return u;
}

// A group's values in the message.
struct place {
    float *x;
    uint16_t *lost;
    int count;
    bool aligned;
};

__device__ __forceinline__ struct place place_of(const struct exchange_message &m, uint32_t row, uint32_t group)
{
    uint64_t at = (uint64_t)row * m.cols + (uint64_t)group * WIRE_GROUP;
    struct place p;
    p.x = m.data + at;
    p.lost = m.lost ? m.lost + at : nullptr;
    p.count = (int)min((uint32_t)WIRE_GROUP, m.cols - group * WIRE_GROUP);
    p.aligned = m.cols % LANE_VALUES == 0 && (uintptr_t)m.data % 16 == 0 && (uintptr_t)m.lost % 8 == 0;
    return p;
}

// Group `index` of a row as a half is cut; beyond the last row there is none: count 0.
__device__ __forceinline__ struct place place_in_half(const struct exchange_message &m, const struct unit &u,
                                                      uint32_t i, uint32_t tp_size)
{
    uint32_t index = u.first + i, row = u.row * tp_size + index % tp_size;
    struct place none = {};
    return row < m.rows ? place_of(m, row, index / tp_size) : none;
}

__device__ __forceinline__ void read_place(float *x, const struct place &p) { wire_read(x, p.x, p.count, p.aligned); }
__device__ __forceinline__ void write_place(const struct place &p, const float *x)
{
    wire_write(p.x, x, p.count, p.aligned);
}

// ---- a codec by its number -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bytes_of(enum wire wire)
{
    return wire == WIRE_BF16 ? wire_bytes(WIRE_BF16) : wire == WIRE_F32 ? wire_bytes(WIRE_F32) : wire_bytes(WIRE_S8X);
}

__device__ __forceinline__ struct wire_lane encode(const float *x, enum wire wire)
{
    return wire == WIRE_BF16  ? wire_encode<WIRE_BF16>(x)
           : wire == WIRE_F32 ? wire_encode<WIRE_F32>(x)
           : wire == WIRE_S8X ? wire_encode<WIRE_S8X>(x)
                              : wire_encode<WIRE_FP8>(x);
}

__device__ __forceinline__ void add_coded(float *sum, struct wire_lane code, enum wire wire)
{
    if (wire == WIRE_BF16)
        wire_add<WIRE_BF16>(sum, code);
    else if (wire == WIRE_F32)
        wire_add<WIRE_F32>(sum, code);
    else if (wire == WIRE_S8X)
        wire_add<WIRE_S8X>(sum, code);
    else
        wire_add<WIRE_FP8>(sum, code);
}

__device__ __forceinline__ void decode(float *x, struct wire_lane code, enum wire wire)
{
    for (int i = 0; i < LANE_VALUES; i++)
        x[i] = 0;
    add_coded(x, code, wire);
}

__device__ __forceinline__ void store_coded(uint8_t *group, struct wire_lane code, enum wire wire)
{
    if (wire == WIRE_BF16)
        wire_store<WIRE_BF16>(group, code);
    else if (wire == WIRE_F32)
        wire_store<WIRE_F32>(group, code);
    else
        wire_store<WIRE_S8X>(group, code); // and fp8
}

// What another processor wrote while this kernel runs.
__device__ __forceinline__ struct wire_lane load_coded(const uint8_t *group, enum wire wire)
{
    struct wire_lane code = {};
    int lane = threadIdx.x % WARP;
    if (wire == WIRE_BF16) {
        uint2 words = load_system((const uint2 *)(const void *)group + lane);
        code.word[0] = words.x, code.word[1] = words.y;
    } else if (wire == WIRE_F32) {
        uint4 words = load_system((const uint4 *)(const void *)group + lane);
        code.word[0] = words.x, code.word[1] = words.y, code.word[2] = words.z, code.word[3] = words.w;
    } else {
        code.word[0] = load_system((const uint32_t *)(const void *)group + lane);
        code.tail = load_system((const uint32_t *)(const void *)group + WARP);
    }
    return code;
}

// Encodes x; with error feedback x and what was lost before, and then x is what that decodes to.
__device__ __forceinline__ struct wire_lane encode_place(const struct place &p, float *x, enum wire wire)
{
    if (!p.lost)
        return encode(x, wire);
    uint16_t lost[LANE_VALUES];
    wire_read_lost(lost, p.lost, p.count, p.aligned);
    struct wire_lane code = wire == WIRE_BF16  ? wire_feed<WIRE_BF16>(x, lost)
                            : wire == WIRE_F32 ? wire_feed<WIRE_F32>(x, lost)
                            : wire == WIRE_S8X ? wire_feed<WIRE_S8X>(x, lost)
                                               : wire_feed<WIRE_FP8>(x, lost);
    wire_write_lost(p.lost, lost, p.count, p.aligned);
    return code;
}

// ---- one-shot ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void send_all(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                         const struct unit &u, uint64_t slot)
{
    for (uint32_t i = threadIdx.x / WARP; i < u.count; i += blockDim.x / WARP) {
        float x[LANE_VALUES];
        read_place(x, place_of(m, u.row, u.first + i));
        struct wire_lane c = encode(x, m.wire);
        for (int e = 0; e < ranks.num_every; e++)
            store_coded(ranks.every[e] + slot + i * bytes_of(m.wire), c, m.wire);
    }
}

// The work of all owners: sums in rank order.
__device__ __forceinline__ void add_all(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                        const struct unit &u, uint64_t slot)
{
    for (uint32_t i = threadIdx.x / WARP; i < u.count; i += blockDim.x / WARP) {
        struct place p = place_of(m, u.row, u.first + i);
        float x[LANE_VALUES], sum[LANE_VALUES] = {};
        read_place(x, p);
        struct wire_lane own = encode(x, m.wire);
        for (int r = 0; r < ranks.tp_size; r++)
            add_coded(sum, r == ranks.rank ? own : load_coded(ranks.from[r] + slot + i * bytes_of(m.wire), m.wire),
                      m.wire);
        decode(x, encode(sum, m.wire), m.wire);
        write_place(p, x);
    }
}

// The last block that has a part of the row goes on with it; for all threads of a block.
__device__ bool is_last_of_row(const struct exchange_ranks &ranks, uint32_t row, uint32_t parts)
{
    SHARED(uint32_t, last, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(&ranks.state->arrived[row], 1u) == parts - 1;
        if (*last)
            ranks.state->arrived[row] = 0;
        __threadfence();
    }
    __syncthreads();
    return *last != 0;
}

template <bool NORM, enum input_format FORMAT>
__device__ void one_shot(const struct exchange_ranks &ranks, const struct exchange_message &m, struct device_input out,
                         struct row_input in, int64_t kept_groups, int lane, int lanes)
{
    SHARED(uint32_t, failed, 1);
    struct cut c = cut_of(m, ranks.tp_size, (uint32_t)lanes);
    uint32_t token = begin_lane(ranks, lane, failed);
    for (uint32_t index = (uint32_t)lane; index < c.units && *failed == 0; index += (uint32_t)lanes) {
        struct unit u = unit_at(c, index);
        uint64_t slot = slot_of(lane, ++token);
        send_all(ranks, m, u, slot);
        if (!meet_ranks(ranks, lane, token, 0, m.place, failed))
            break;
        add_all(ranks, m, u, slot);
        if (NORM && is_last_of_row(ranks, u.row, c.units_per_row)) {
            write_one_row<SOURCE_NORM, FORMAT>(out, in, kept_groups, u.row);
            __syncthreads(); // its shared arrays may be written again
        }
    }
    end_lane(ranks, lane, token);
}

__global__ void __launch_bounds__(THREADS)
    exchange_one_shot(const __grid_constant__ struct exchange_ranks ranks, struct exchange_message message)
{
    one_shot<false, INPUT_F32>(ranks, message, {}, {}, 0, (int)blockIdx.x, (int)gridDim.x);
}

template <enum input_format FORMAT>
__global__ void __launch_bounds__(MAX_WARPS *WARP)
    exchange_one_shot_norm(const __grid_constant__ struct exchange_ranks ranks, struct exchange_message message,
                           struct device_input out, struct row_input in, int64_t kept_groups)
{
    one_shot<true, FORMAT>(ranks, message, out, in, kept_groups, (int)blockIdx.x, (int)gridDim.x);
}

// ---- two-shot ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void send_parts(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                           const struct unit &u, uint64_t slot)
{
    for (uint32_t i = threadIdx.x / WARP; i < u.count; i += blockDim.x / WARP) {
        int owner = (int)((u.first + i) % (uint32_t)ranks.tp_size);
        if (owner == ranks.rank)
            continue;
        struct place p = place_of(m, u.row, u.first + i);
        float x[LANE_VALUES];
        read_place(x, p);
        struct wire_lane c = encode_place(p, x, m.wire);
        store_coded(ranks.to[owner] + slot + i * bytes_of(m.wire), c, m.wire);
    }
}

// Of a group that is this rank's.
__device__ __forceinline__ void sum_parts(float *sum, const struct exchange_ranks &ranks,
                                          const struct exchange_message &m, const struct place &p, uint64_t offset)
{
    float x[LANE_VALUES];
    bool rounds = m.half == EXCHANGE_WHOLE && !m.lost && wire_of_own(m.wire) == WIRE_BF16;
    read_place(x, p);
    for (int i = 0; i < LANE_VALUES; i++) {
        sum[i] = 0;
        x[i] = rounds ? bf16_to_f32(f32_to_bf16(x[i])) : x[i];
    }
    for (int r = 0; r < ranks.tp_size; r++) {
        if (r == ranks.rank)
            for (int i = 0; i < LANE_VALUES; i++)
                sum[i] = wire_canonical(sum[i] + x[i]);
        else
            add_coded(sum, load_coded(ranks.from[r] + offset, m.wire), m.wire);
    }
}

// The encoded sum; in the group's place is then what it decodes to.
__device__ __forceinline__ struct wire_lane add_up(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                                   const struct place &p, uint64_t offset)
{
    float sum[LANE_VALUES];
    sum_parts(sum, ranks, m, p, offset);
    struct wire_lane c = encode_place(p, sum, m.wire);
    if (!p.lost)
        decode(sum, c, m.wire);
    write_place(p, sum);
    return c;
}

__device__ void two_shot(const struct exchange_ranks &ranks, const struct exchange_message &m, int lane, int lanes)
{
    SHARED(uint32_t, failed, 1);
    struct cut c = cut_of(m, ranks.tp_size, (uint32_t)lanes);
    uint32_t token = begin_lane(ranks, lane, failed), bytes = bytes_of(m.wire);
    uint32_t step = (uint32_t)ranks.tp_size, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (uint32_t index = (uint32_t)lane; index < c.units && *failed == 0; index += (uint32_t)lanes) {
        struct unit u = unit_at(c, index);
        uint64_t parts = slot_of(lane, ++token);
        send_parts(ranks, m, u, parts);
        if (!meet_ranks(ranks, lane, token, 0, m.place, failed))
            break;
        uint64_t sums = slot_of(lane, ++token);
        for (uint32_t i = (uint32_t)ranks.rank + warp * step; i < u.count; i += warps * step) {
            struct wire_lane sum = add_up(ranks, m, place_of(m, u.row, u.first + i), parts + i * bytes);
            for (int e = 0; e < ranks.num_every; e++)
                store_coded(ranks.every[e] + sums + i * bytes, sum, m.wire);
        }
        if (!meet_ranks(ranks, lane, token, 1, m.place, failed))
            break;
        for (uint32_t i = warp; i < u.count; i += warps) {
            int owner = (int)((u.first + i) % step);
            if (owner == ranks.rank)
                continue;
            float x[LANE_VALUES];
            decode(x, load_coded(ranks.from[owner] + sums + i * bytes, m.wire), m.wire);
            write_place(place_of(m, u.row, u.first + i), x);
        }
    }
    end_lane(ranks, lane, token);
}

__global__ void __launch_bounds__(THREADS)
    exchange_two_shot(const __grid_constant__ struct exchange_ranks ranks, struct exchange_message message)
{
    two_shot(ranks, message, (int)blockIdx.x, (int)gridDim.x);
}

// ---- halves --------------------------------------------------------------------------------------------------------

// What this rank does of a unit before the ranks meet, and after. The first half sends others' rows and adds up its own; the second sends its own and
// takes others'.
__device__ __forceinline__ void send_rows(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                          const struct unit &u, uint64_t slot)
{
    uint32_t bytes = bytes_of(m.wire), tp_size = (uint32_t)ranks.tp_size;
    for (uint32_t i = threadIdx.x / WARP; i < u.count; i += blockDim.x / WARP) {
        int owner = (int)((m.first_owner + i) % tp_size);
        struct place p = place_in_half(m, u, i, tp_size);
        bool own = owner == ranks.rank, all = m.half == EXCHANGE_TO_ALL;
        if (p.count == 0 || own != all)
            continue;
        float x[LANE_VALUES];
        read_place(x, p);
        struct wire_lane c = encode_place(p, x, m.wire);
        if (!all) {
            store_coded(ranks.to[owner] + slot + i * bytes, c, m.wire);
            continue;
        }
        decode(x, c, m.wire);
        write_place(p, x);
        for (int e = 0; e < ranks.num_every; e++)
            store_coded(ranks.every[e] + slot + i * bytes, c, m.wire);
    }
}

__device__ __forceinline__ void take_rows(const struct exchange_ranks &ranks, const struct exchange_message &m,
                                          const struct unit &u, uint64_t slot)
{
    uint32_t bytes = bytes_of(m.wire), tp_size = (uint32_t)ranks.tp_size;
    for (uint32_t i = threadIdx.x / WARP; i < u.count; i += blockDim.x / WARP) {
        int owner = (int)((m.first_owner + i) % tp_size);
        struct place p = place_in_half(m, u, i, tp_size);
        bool own = owner == ranks.rank, all = m.half == EXCHANGE_TO_ALL;
        if (p.count == 0 || own == all)
            continue;
        float x[LANE_VALUES];
        if (all)
            decode(x, load_coded(ranks.from[owner] + slot + i * bytes, m.wire), m.wire);
        else
            sum_parts(x, ranks, m, p, slot + i * bytes);
        write_place(p, x);
    }
}

__device__ void owned_rows(const struct exchange_ranks &ranks, const struct exchange_message &m, int lane, int lanes)
{
    SHARED(uint32_t, failed, 1);
    struct cut c = cut_of(m, ranks.tp_size, (uint32_t)lanes);
    uint32_t token = begin_lane(ranks, lane, failed);
    for (uint32_t index = (uint32_t)lane; index < c.units && *failed == 0; index += (uint32_t)lanes) {
        struct unit u = unit_at(c, index);
        uint64_t slot = slot_of(lane, ++token);
        send_rows(ranks, m, u, slot);
        if (!meet_ranks(ranks, lane, token, m.half == EXCHANGE_TO_ALL, m.place, failed))
            break;
        take_rows(ranks, m, u, slot);
    }
    end_lane(ranks, lane, token);
}

__global__ void __launch_bounds__(THREADS)
    exchange_owned_rows(const __grid_constant__ struct exchange_ranks ranks, struct exchange_message message)
{
    owned_rows(ranks, message, (int)blockIdx.x, (int)gridDim.x);
}

// Rank blockIdx.y.
template <bool TWO_SHOT>
__global__ void __launch_bounds__(THREADS)
    exchange_together(const struct exchange_ranks *ranks, const struct exchange_message *messages)
{
    if (TWO_SHOT && messages[blockIdx.y].half != EXCHANGE_WHOLE)
        owned_rows(ranks[blockIdx.y], messages[blockIdx.y], (int)blockIdx.x, (int)gridDim.x);
    else if (TWO_SHOT)
        two_shot(ranks[blockIdx.y], messages[blockIdx.y], (int)blockIdx.x, (int)gridDim.x);
    else
        one_shot<false, INPUT_F32>(ranks[blockIdx.y], messages[blockIdx.y], {}, {}, 0, (int)blockIdx.x, (int)gridDim.x);
}

// ---- chunks --------------------------------------------------------------------------------------------------------

// What a copy engine has moved before it in the stream is there.
__global__ void __launch_bounds__(WARP) exchange_post(const __grid_constant__ struct exchange_ranks ranks, int lane)
{
    if (threadIdx.x == 0) {
        uint32_t token = ranks.state->token[lane] + 1;
        ranks.state->token[lane] = token;
        for (int e = 0; e < ranks.num_every; e++)
            post_system(token_of(ranks.every[e], lane), token);
    }
}

__global__ void __launch_bounds__(WARP)
    exchange_wait(const __grid_constant__ struct exchange_ranks ranks, int lane, uint32_t place)
{
    int t = (int)threadIdx.x;
    uint32_t token = ranks.state->waited[lane] + 1;
    __syncwarp();
    if (t == 0)
        ranks.state->waited[lane] = token;
    if (t < ranks.tp_size && t != ranks.rank && !ranks.state->broken)
        wait_for(ranks, t, lane, token, lane == EXCHANGE_LANE_SUMS, place);
}

// ---- launching -----------------------------------------------------------------------------------------------------

unsigned blocks_of(const struct exchange_message *m, int tp_size, int blocks)
{
    uint32_t most = (uint32_t)at_most(blocks < 1 ? 1 : blocks, EXCHANGE_BLOCKS);
    uint32_t units = cut_of(*m, tp_size, most).units;
    return units < most ? units : most;
}

template <enum input_format FORMAT>
cudaError_t launch_with_norm(const struct exchange_ranks *ranks, const struct exchange_message *message,
                             struct device_input out, struct row_input in, unsigned blocks, cudaStream_t stream)
{
    struct row_launch how = row_launch_of(in.cols);
    return LAUNCH((exchange_one_shot_norm<FORMAT>), dim3(blocks), dim3(how.threads), how.shared_bytes, stream, *ranks,
                  *message, out, in, how.kept_groups);
}

} // namespace

extern "C" cudaError_t launch_exchange_one_shot(const struct exchange_ranks *ranks,
                                                const struct exchange_message *message,
                                                const struct exchange_norm *norm, int blocks, cudaStream_t stream)
{
    unsigned grid = blocks_of(message, ranks->tp_size, blocks);
    if (message->lost || message->half != EXCHANGE_WHOLE || wire_is_compressed(message->wire) ||
        (norm && message->rows > EXCHANGE_NORM_ROWS))
        return cudaErrorInvalidValue;
    if (grid == 0)
        return cudaSuccess;
    if (!norm)
        return LAUNCH(exchange_one_shot, dim3(grid), dim3(THREADS), 0, stream, *ranks, *message);
    struct row_input in = {};
    in.residual = norm->residual;
    in.join = norm->join;
    in.weight = norm->weight;
    in.cols = message->cols;
    in.row_stride = message->cols;
    in.eps = norm->eps;
    in.aligned = row_is_aligned(norm->out, in);
    switch (norm->format) {
    case INPUT_F32:
        return launch_with_norm<INPUT_F32>(ranks, message, norm->out, in, grid, stream);
    case INPUT_F16:
        return launch_with_norm<INPUT_F16>(ranks, message, norm->out, in, grid, stream);
    case INPUT_F16_TILE:
        return launch_with_norm<INPUT_F16_TILE>(ranks, message, norm->out, in, grid, stream);
    case INPUT_BF16:
        return launch_with_norm<INPUT_BF16>(ranks, message, norm->out, in, grid, stream);
    case INPUT_INT8:
        return launch_with_norm<INPUT_INT8>(ranks, message, norm->out, in, grid, stream);
    case INPUT_INT8_TILE:
        return launch_with_norm<INPUT_INT8_TILE>(ranks, message, norm->out, in, grid, stream);
    case INPUT_MXFP8_TILE:
        return launch_with_norm<INPUT_MXFP8_TILE>(ranks, message, norm->out, in, grid, stream);
    case INPUT_E4M3:
        return launch_with_norm<INPUT_E4M3>(ranks, message, norm->out, in, grid, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" cudaError_t launch_exchange_two_shot(const struct exchange_ranks *ranks,
                                                const struct exchange_message *message, int blocks, cudaStream_t stream)
{
    unsigned grid = blocks_of(message, ranks->tp_size, blocks);
    if (message->half != EXCHANGE_WHOLE)
        return cudaErrorInvalidValue;
    return grid == 0 ? cudaSuccess : LAUNCH(exchange_two_shot, dim3(grid), dim3(THREADS), 0, stream, *ranks, *message);
}

extern "C" cudaError_t launch_exchange_half(const struct exchange_ranks *ranks, const struct exchange_message *message,
                                            int blocks, cudaStream_t stream)
{
    unsigned grid = blocks_of(message, ranks->tp_size, blocks);
    if (message->half == EXCHANGE_WHOLE || (message->lost && message->half == EXCHANGE_TO_ALL))
        return cudaErrorInvalidValue;
    return grid == 0 ? cudaSuccess
                     : LAUNCH(exchange_owned_rows, dim3(grid), dim3(THREADS), 0, stream, *ranks, *message);
}

extern "C" cudaError_t launch_exchange_together(const struct exchange_ranks *ranks,
                                                const struct exchange_message *messages, int tp_size, bool two_shot,
                                                int blocks, cudaStream_t stream)
{
    dim3 grid((unsigned)blocks, (unsigned)tp_size);
    if (two_shot)
        return LAUNCH_TOGETHER(exchange_together<true>, grid, dim3(THREADS), 0, stream, ranks, messages);
    return LAUNCH_TOGETHER(exchange_together<false>, grid, dim3(THREADS), 0, stream, ranks, messages);
}

extern "C" cudaError_t launch_exchange_post(const struct exchange_ranks *ranks, int lane, cudaStream_t stream)
{
    return LAUNCH(exchange_post, dim3(1), dim3(WARP), 0, stream, *ranks, lane);
}

extern "C" cudaError_t launch_exchange_wait(const struct exchange_ranks *ranks, int lane, uint32_t place,
                                            cudaStream_t stream)
{
    return LAUNCH(exchange_wait, dim3(1), dim3(WARP), 0, stream, *ranks, lane, place);
}

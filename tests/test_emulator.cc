// The emulator's device side shown to do what it says, each feature by a tiny kernel whose result is known: threads and blocks, warps, tensor
// cores, asynchronous copies, and the counts of sectors and bank conflicts. Where the elements of fragments stand is written here from PTX's
// definition, not taken from the emulator.
#include "tests/emulator_help.h"

// ---- threads and blocks --------------------------------------------------------------------------------------------

struct visit {
    uint32_t times, thread[3], block[3], first_of_warp;
};

__global__ static void indices_kernel(visit *visits)
{
    uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
    visit *v = &visits[block * threads + thread];
    atomicAdd(&v->times, 1u);
    v->thread[0] = threadIdx.x, v->thread[1] = threadIdx.y, v->thread[2] = threadIdx.z;
    v->block[0] = blockIdx.x, v->block[1] = blockIdx.y, v->block[2] = blockIdx.z;
    v->first_of_warp = __shfl_sync(ALL, thread, 0);
}

static void test_indices(void **)
{
    static const struct {
        dim3 grid, block;
    } shapes[] = {{1, 1}, {3, 70}, {dim3(2, 3, 2), dim3(4, 3, 5)}, {dim3(1, 1, 4), dim3(1, 64)}, {2, 1024}};
    for (const auto &shape : shapes)
        for (uint64_t seed = 0; seed < 3; seed++) {
            uint32_t threads = shape.block.x * shape.block.y * shape.block.z;
            uint32_t blocks = shape.grid.x * shape.grid.y * shape.grid.z;
            visit *visits = device<visit>(threads * blocks);
            memset(visits, 0, threads * blocks * sizeof *visits);
            emulator_seed(seed);
            RUN(indices_kernel, shape.grid, shape.block, 0, visits);
            for (uint32_t i = 0; i < threads * blocks; i++) {
                uint32_t thread = i % threads, block = i / threads;
                assert_int_equal(visits[i].times, 1);
                assert_int_equal(visits[i].thread[0], thread % shape.block.x);
                assert_int_equal(visits[i].thread[1], thread / shape.block.x % shape.block.y);
                assert_int_equal(visits[i].thread[2], thread / shape.block.x / shape.block.y);
                assert_int_equal(visits[i].block[0], block % shape.grid.x);
                assert_int_equal(visits[i].block[1], block / shape.grid.x % shape.grid.y);
                assert_int_equal(visits[i].block[2], block / shape.grid.x / shape.grid.y);
                assert_int_equal(visits[i].first_of_warp, thread / WARP * WARP);
            }
            cudaFree(visits);
        }
}

__global__ static void nothing_kernel(int) {}

static void test_launch_limits(void **)
{
    assert_int_equal(LAUNCH(nothing_kernel, 1, 1024, 99 << 10, nullptr, 0), cudaSuccess);
    assert_int_equal(LAUNCH(nothing_kernel, dim3(1, 65535), 1, 0, nullptr, 0), cudaSuccess);
    assert_int_equal(LAUNCH(nothing_kernel, 1, 32, (99 << 10) + 1, nullptr, 0), cudaErrorInvalidValue);
    assert_int_equal(LAUNCH(nothing_kernel, 1, 1025, 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(LAUNCH(nothing_kernel, 1, dim3(32, 33), 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(LAUNCH(nothing_kernel, 0, 32, 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(LAUNCH(nothing_kernel, 1, dim3(32, 0), 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(LAUNCH(nothing_kernel, dim3(1, 65536), 32, 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(LAUNCH(nothing_kernel, dim3(1, 1, 65536), 32, 0, nullptr, 0), cudaErrorInvalidConfiguration);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

// Both kinds of shared memory are poison when a block begins, each block's own, and common to its threads.
__global__ static void shared_kernel(uint32_t *out)
{
    SHARED(uint32_t, first, 96);
    SHARED(uint32_t, second, 96);
    SHARED_DYNAMIC(uint32_t, dynamic);
    uint32_t t = threadIdx.x, *mine = out + (blockIdx.x * 96 + t) * 6;
    mine[0] = first[t];
    mine[1] = second[t];
    mine[2] = dynamic[t];
    __syncthreads();
    first[t] = t;
    second[t] = 1000 + t;
    dynamic[t] = 2000 + t;
    __syncthreads();
    mine[3] = first[95 - t];
    mine[4] = second[95 - t];
    mine[5] = dynamic[95 - t] + (((uintptr_t)dynamic & 127) != 0);
}

static void test_shared_and_barrier(void **)
{
    uint32_t *out = device<uint32_t>(3 * 96 * 6);
    for (uint64_t seed = 0; seed < 5; seed++) {
        emulator_seed(seed);
        memset(out, 0, 3 * 96 * 6 * 4);
        RUN(shared_kernel, 3, 96, 96 * 4, out);
        for (uint32_t i = 0; i < 3 * 96; i++) {
            for (int k = 0; k < 3; k++) {
                assert_int_equal(out[i * 6 + k], POISON_WORD);
                assert_int_equal(out[i * 6 + 3 + k], 1000 * k + 95 - i % 96);
            }
        }
    }
    cudaFree(out);
}

// Legal: threads at their end are not waited for, and the others meet again and again.
__global__ static void early_exit_kernel(uint32_t *out)
{
    SHARED(uint32_t, sum, 1);
    uint32_t t = threadIdx.x;
    if (t == 0)
        *sum = 0;
    __syncthreads();
    if (t % 3 == 0)
        return;
    for (int round = 0; round < 4; round++) {
        atomicAdd(sum, 1u);
        __syncthreads();
        out[round * 64 + t] = *sum;
        __syncthreads();
    }
}

static void test_early_exit(void **)
{
    uint32_t *out = device<uint32_t>(4 * 64);
    for (uint64_t seed = 0; seed < 5; seed++) {
        emulator_seed(seed);
        RUN(early_exit_kernel, 1, 64, 0, out);
        for (uint32_t t = 0; t < 64; t++)
            for (uint32_t round = 0; round < 4 && t % 3; round++)
                assert_int_equal(out[round * 64 + t], (round + 1) * 42);
    }
    cudaFree(out);
}

__global__ static void order_kernel(uint32_t *ticket, uint32_t *order)
{
    order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(ticket, 1u);
}

static void run_order(uint64_t seed, uint32_t *order)
{
    uint32_t *memory = device<uint32_t>(1 + 8 * 64);
    bool taken[8 * 64] = {};
    memory[0] = 0;
    emulator_seed(seed);
    RUN(order_kernel, 8, 64, 0, memory, memory + 1);
    memcpy(order, memory + 1, 8 * 64 * 4);
    for (int i = 0; i < 8 * 64; i++) {
        assert_true(order[i] < 8 * 64 && !taken[order[i]]);
        taken[order[i]] = true;
        assert_int_equal(order[i] / 64, order[i / 64 * 64] / 64); // a block runs to its end
    }
    cudaFree(memory);
}

static void test_order(void **)
{
    uint32_t plain[8 * 64], first[8 * 64], again[8 * 64], other[8 * 64];
    run_order(0, plain);
    run_order(7, first);
    run_order(7, again);
    run_order(8, other);
    for (uint32_t i = 0; i < 8 * 64; i++)
        assert_int_equal(plain[i], i);
    assert_memory_equal(first, again, sizeof first);
    assert_memory_not_equal(first, other, sizeof first);
    int blocks_moved = 0, threads_moved = 0;
    for (uint32_t i = 0; i < 8 * 64; i++) {
        blocks_moved += first[i] / 64 != i / 64;
        threads_moved += first[i] % 64 != i % 64;
    }
    assert_true(blocks_moved > 0 && threads_moved > 0);
}

__global__ static void atomics_kernel(int *i, unsigned *u, unsigned long long *l, uint32_t *seen)
{
    SHARED(unsigned, sum, 1);
    int t = (int)threadIdx.x;
    if (t == 0)
        *sum = 0;
    __syncthreads();
    seen[atomicAdd(sum, 1u)] += 1; // each old value once
    atomicAdd(&i[0], -t);
    atomicMax(&i[1], t - 50);
    atomicMin(&i[2], t - 50);
    atomicAdd(&u[0], 0x10000001u);
    atomicMax(&u[1], 0x80000000u + (unsigned)t);
    atomicMin(&u[2], 0x80000000u + (unsigned)t);
    atomicAdd(l, 1ull << 33);
}

static void test_atomics(void **)
{
    struct memory {
        unsigned long long l;
        int i[3];
        unsigned u[3];
        uint32_t seen[100];
    } *m = device<memory>(1);
    for (uint64_t seed = 0; seed < 3; seed++) {
        *m = {1, {5, -1000, 1000}, {0, 0, ~0u}, {}};
        emulator_seed(seed);
        RUN(atomics_kernel, 1, 100, 0, m->i, m->u, &m->l, m->seen);
        assert_int_equal(m->i[0], 5 - 4950);
        assert_int_equal(m->i[1], 49);
        assert_int_equal(m->i[2], -50);
        assert_int_equal(m->u[0], 0x10000001u * 100u);
        assert_int_equal(m->u[1], 0x80000063u);
        assert_int_equal(m->u[2], 0x80000000u);
        assert_true(m->l == 1 + (100ull << 33));
        for (int k = 0; k < 100; k++)
            assert_int_equal(m->seen[k], 1);
    }
    cudaFree(m);
}

// ---- warps ---------------------------------------------------------------------------------------------------------

template <typename T> __global__ static void shuffle_kernel(T *out)
{
    int l = (int)threadIdx.x % WARP;
    T own = (T)(100 + threadIdx.x), *mine = out + threadIdx.x * 10;
    mine[0] = __shfl_sync(ALL, own, (l * 7 + 3) % WARP);
    mine[1] = __shfl_sync(ALL, own, 2, 8);
    mine[2] = __shfl_sync(ALL, own, l + 1); // wraps
    mine[3] = __shfl_xor_sync(ALL, own, 5);
    mine[4] = __shfl_xor_sync(ALL, own, 12, 8); // to a later group: one's own; to an earlier one: that lane's
    mine[5] = __shfl_down_sync(ALL, own, 3);
    mine[6] = __shfl_down_sync(ALL, own, 3, 16);
    mine[7] = __shfl_up_sync(ALL, own, 9);
    mine[8] = __shfl_up_sync(ALL, own, 2, 4);
    mine[9] = l < 16 ? __shfl_xor_sync(0x0000ffffu, own, 1) : __shfl_xor_sync(0xffff0000u, own, 2);
}

template <typename T> static void check_shuffles(void)
{
    T *out = device<T>(64 * 10);
    for (uint64_t seed = 0; seed < 4; seed++) {
        emulator_seed(seed);
        RUN((shuffle_kernel<T>), 1, 64, 0, out);
        for (int t = 0; t < 64; t++) {
            int l = t % WARP;
            int from[10] = {(l * 7 + 3) % WARP,
                            l / 8 * 8 + 2,
                            (l + 1) % WARP,
                            l ^ 5,
                            (l ^ 12) / 8 > l / 8 ? l : l ^ 12,
                            l < 29 ? l + 3 : l,
                            l % 16 < 13 ? l + 3 : l,
                            l >= 9 ? l - 9 : l,
                            l % 4 >= 2 ? l - 2 : l,
                            l < 16 ? l ^ 1 : l ^ 2};
            for (int k = 0; k < 10; k++)
                assert_true(out[t * 10 + k] == (T)(100 + t / WARP * WARP + from[k]));
        }
    }
    cudaFree(out);
}

static void test_shuffles(void **)
{
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<float>();
    check_shuffles<uint64_t>();
}

__global__ static void vote_kernel(uint32_t *out, uint32_t bits)
{
    SHARED(uint32_t, words, 64);
    int t = (int)threadIdx.x, l = t % WARP, predicate = bits >> l & 1;
    uint32_t *mine = out + t * 5;
    mine[0] = __ballot_sync(ALL, predicate ? 256 : 0);
    mine[1] = (uint32_t)__any_sync(ALL, predicate);
    mine[2] = (uint32_t)__all_sync(ALL, predicate);
    mine[3] = l < 8 ? __ballot_sync(0xffu, predicate) : 0;
    words[t] = (uint32_t)t; // a warp's own exchange needs no barrier of the block
    __syncwarp();
    mine[4] = words[t ^ 31];
}

static void test_votes(void **)
{
    static const uint32_t patterns[] = {0, ALL, 1, 0x80000000u, 0x12345678u, 0x7fffffffu};
    uint32_t *out = device<uint32_t>(64 * 5);
    for (uint32_t bits : patterns)
        for (uint64_t seed = 0; seed < 4; seed++) {
            emulator_seed(seed);
            RUN(vote_kernel, 1, 64, 0, out, bits);
            for (uint32_t t = 0; t < 64; t++) {
                assert_int_equal(out[t * 5], bits);
                assert_int_equal(out[t * 5 + 1], bits != 0);
                assert_int_equal(out[t * 5 + 2], bits == ALL);
                assert_int_equal(out[t * 5 + 3], t % WARP < 8 ? bits & 0xff : 0);
                assert_int_equal(out[t * 5 + 4], t ^ 31);
            }
        }
    cudaFree(out);
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

// As PTX tells where the elements of a fragment stand, with elements numbered from the low bits of the first register. per: elements in a
// register, 2 or 4.
struct cell {
    int row, column;
};
static cell cell_of_a(int lane, int i, int per)
{
    bool upper = (i / per) % 2 == 1;
    return {lane / 4 + (upper ? 8 : 0), lane % 4 * per + i % per + (i < 2 * per ? 0 : 4 * per)};
}
static cell cell_of_b(int lane, int i, int per)
{
    return {lane % 4 * per + i % per + (i < per ? 0 : 4 * per), lane / 4};
}
static cell cell_of_c(int lane, int i) { return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + i % 2}; }

enum product { PRODUCT_F16, PRODUCT_BF16, PRODUCT_INT8 };

struct fragments {
    uint32_t a[4], b[2];
    union {
        float f[4];
        int i[4];
    };
};

template <int KIND> __global__ static void mma_kernel(fragments *all)
{
    fragments *f = &all[threadIdx.x];
    for (int twice = 0; twice < 2; twice++) { // sums go on
        if (KIND == PRODUCT_F16)
            mma_f16(f->f, f->a, f->b);
        else if (KIND == PRODUCT_BF16)
            mma_bf16(f->f, f->a, f->b);
        else
            mma_int8(f->i, f->a, f->b);
    }
}

// Small integers, so that sums are exact whatever their order.
template <int KIND> static void check_mma(void)
{
    enum {
        PER = KIND == PRODUCT_INT8 ? 4 : 2,
        BITS = 32 / PER,
        DEPTH = 8 * PER,
        LIMIT = KIND == PRODUCT_INT8 ? 128 : 60
    };
    int a[16][DEPTH], b[DEPTH][8], c[16][8];
    for (auto &row : a)
        for (int &v : row)
            v = (int)(random_bits() % (2 * LIMIT)) - LIMIT;
    for (auto &row : b)
        for (int &v : row)
            v = (int)(random_bits() % (2 * LIMIT)) - LIMIT;
    for (auto &row : c)
        for (int &v : row)
            v = (int)(random_bits() % 2000) - 1000;
    auto code = [](int v) -> uint32_t {
        return KIND == PRODUCT_F16    ? f32_to_f16((float)v)
               : KIND == PRODUCT_BF16 ? f32_to_bf16((float)v)
                                      : (uint32_t)v & 0xff;
    };
    fragments *all = device<fragments>(WARP);
    memset(all, 0, WARP * sizeof *all);
    for (int l = 0; l < WARP; l++) {
        for (int i = 0; i < 4 * PER; i++)
            all[l].a[i / PER] |= code(a[cell_of_a(l, i, PER).row][cell_of_a(l, i, PER).column]) << i % PER * BITS;
        for (int i = 0; i < 2 * PER; i++)
            all[l].b[i / PER] |= code(b[cell_of_b(l, i, PER).row][cell_of_b(l, i, PER).column]) << i % PER * BITS;
        for (int i = 0; i < 4; i++) {
            int start = c[cell_of_c(l, i).row][cell_of_c(l, i).column];
            if (KIND == PRODUCT_INT8)
                all[l].i[i] = start;
            else
                all[l].f[i] = (float)start;
        }
    }
    RUN((mma_kernel<KIND>), 1, WARP, 0, all);
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++) {
            cell at = cell_of_c(l, i);
            int want = c[at.row][at.column];
            for (int k = 0; k < DEPTH; k++)
                want += 2 * a[at.row][k] * b[k][at.column];
            assert_true(KIND == PRODUCT_INT8 ? all[l].i[i] == want : all[l].f[i] == (float)want);
        }
    cudaFree(all);
}

static void test_mma(void **)
{
    for (uint64_t seed = 0; seed < 4; seed++) {
        emulator_seed(seed);
        check_mma<PRODUCT_F16>();
        check_mma<PRODUCT_BF16>();
        check_mma<PRODUCT_INT8>();
    }
}

enum { MATRIX_STRIDE = 24 }; // of rows, in halves: not next to each other

__global__ static void load_matrix_kernel(uint32_t *out)
{
    SHARED(uint16_t, rows, WARP * MATRIX_STRIDE);
    int l = (int)threadIdx.x;
    for (int i = 0; i < 8; i++)
        rows[l * MATRIX_STRIDE + i] = (uint16_t)(l * 8 + i);
    __syncwarp();
    load_matrix_x4(out + l * 8, rows + l * MATRIX_STRIDE);
    load_matrix_x4_transposed(out + l * 8 + 4, rows + l * MATRIX_STRIDE);
}

static void test_load_matrix(void **)
{
    uint32_t *out = device<uint32_t>(WARP * 8);
    RUN(load_matrix_kernel, 1, WARP, 0, out);
    for (uint32_t l = 0; l < WARP; l++)
        for (uint32_t m = 0; m < 4; m++) {
            uint32_t g = l / 4, t = l % 4,
                     first = m * 64; // the element in row r, column c of matrix m is 64 m + 8 r + c
            assert_int_equal(out[l * 8 + m], (first + g * 8 + 2 * t) | (first + g * 8 + 2 * t + 1) << 16);
            assert_int_equal(out[l * 8 + 4 + m], (first + 2 * t * 8 + g) | (first + (2 * t + 1) * 8 + g) << 16);
        }
    cudaFree(out);
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

enum { COPIES = 4, COPY_MOMENTS = 4 };

// What a thread sees of four copies (the second invalid, the last never committed): at once, with two groups under way, one, none.
__global__ static void copy_async_kernel(uint32_t *out, const uint4 *in)
{
    SHARED(uint4, landed, WARP * COPIES);
    uint32_t t = threadIdx.x;
    for (int i = 0; i < COPIES; i++)
        landed[t * COPIES + i] = make_uint4(7, 7, 7, 7);
    for (uint32_t i = 0; i < COPIES; i++) {
        copy_async16(&landed[t * COPIES + i], &in[t * COPIES + i], i != 1);
        if (i < 3)
            copy_async_commit();
    }
    for (int moment = 0; moment < COPY_MOMENTS; moment++) {
        if (moment == 1)
            copy_async_wait<2>();
        if (moment == 2)
            copy_async_wait<1>();
        if (moment == 3)
            copy_async_wait<0>();
        for (int i = 0; i < COPIES; i++)
            out[(t * COPY_MOMENTS + moment) * COPIES + i] = landed[t * COPIES + i].w;
    }
}

static void test_copy_async(void **)
{
    uint32_t *out = device<uint32_t>(WARP * COPIES * COPY_MOMENTS);
    uint4 *in = device<uint4>(WARP * COPIES);
    for (uint32_t i = 0; i < WARP * COPIES; i++)
        in[i] = make_uint4(0, 0, 0, i + 1);
    for (uint64_t seed = 0; seed < 3; seed++) {
        emulator_seed(seed);
        RUN(copy_async_kernel, 1, WARP, 0, out, in);
        for (uint32_t t = 0; t < WARP; t++)
            for (uint32_t moment = 0; moment < COPY_MOMENTS; moment++)
                for (uint32_t i = 0; i < COPIES; i++) {
                    uint32_t value = i == 1 ? 0 : t * COPIES + i + 1;
                    bool there = i < 3 && i < moment;
                    assert_int_equal(out[(t * COPY_MOMENTS + moment) * COPIES + i], there ? value : POISON_WORD);
                }
    }
    cudaFree(out);
    cudaFree(in);
}

// ---- counts --------------------------------------------------------------------------------------------------------

enum { LOAD, LOAD_WEIGHTS, STORE };

template <typename T> __global__ static void global_kernel(char *memory, int which, int stride, int lanes, int rounds)
{
    int l = (int)threadIdx.x % WARP;
    if (l >= lanes)
        return;
    for (int round = 0; round < rounds; round++) {
        T *p = (T *)(void *)(memory + (int)threadIdx.x / WARP * 8192 + l * stride);
        if (which == STORE)
            store_global(p, T());
        else if (which == LOAD_WEIGHTS)
            load_weights((const uint4 *)(void *)p);
        else
            load_global(p);
    }
}

static void test_sectors(void **)
{
    static const struct {
        int bytes, which, start, stride, lanes;
        uint64_t sectors, ideal; // of a request
    } cases[] = {
        {16, LOAD, 0, 16, 32, 16, 16},
        {16, LOAD_WEIGHTS, 0, 16, 32, 16, 16},
        {16, STORE, 0, 16, 32, 16, 16},
        {16, LOAD, 0, 32, 32, 32, 16},
        {16, LOAD, 16, 16, 32, 17, 16},
        {16, LOAD, 32, 16, 32, 16, 16},
        {16, LOAD_WEIGHTS, 0, 64, 32, 32, 16},
        {16, LOAD, 0, 0, 32, 1, 1},
        {16, STORE, 16, 16, 3, 2, 2},
        {8, LOAD, 0, 8, 32, 8, 8},
        {8, LOAD, 24, 8, 32, 9, 8},
        {8, STORE, 0, 64, 32, 32, 8},
        {4, LOAD, 0, 4, 32, 4, 4},
        {4, LOAD, 4, 4, 32, 5, 4},
        {4, LOAD, 0, 128, 32, 32, 4},
        {4, STORE, 0, 4, 8, 1, 1},
        {4, LOAD, 0, 4, 9, 2, 2},
        {4, LOAD, 28, 4, 2, 2, 1},
    };
    char *memory = device<char>(16384);
    for (const auto &c : cases)
        for (uint64_t seed = 0; seed < 3; seed++) {
            emulator_seed(seed);
            emulator_stats_reset();
            // Two warps, three rounds.
            if (c.bytes == 16)
                RUN((global_kernel<uint4>), 1, 64, 0, memory + c.start, c.which, c.stride, c.lanes, 3);
            else if (c.bytes == 8)
                RUN((global_kernel<uint2>), 1, 64, 0, memory + c.start, c.which, c.stride, c.lanes, 3);
            else
                RUN((global_kernel<uint32_t>), 1, 64, 0, memory + c.start, c.which, c.stride, c.lanes, 3);
            struct emulator_stats s = emulator_count("global_kernel");
            if (s.launches != 1 || s.global_requests != 6 || s.global_sectors != 6 * c.sectors ||
                s.global_ideal_sectors != 6 * c.ideal || s.shared_requests != 0)
                fail_msg("%d bytes, kind %d, start %d, stride %d, %d lanes: %d requests, %d sectors, %d ideal", c.bytes,
                         c.which, c.start, c.stride, c.lanes, (int)s.global_requests, (int)s.global_sectors,
                         (int)s.global_ideal_sectors);
        }
    assert_int_equal(emulator_count("another").launches, 0);
    assert_int_equal(emulator_count("uint32_t").launches, 1);
    emulator_stats_reset();
    assert_int_equal(emulator_count("").launches, 0);
    cudaFree(memory);
}

// Lanes that part ways make requests of their own, each at its place in the source.
__global__ static void parted_kernel(const uint32_t *memory)
{
    if (threadIdx.x % 2)
        load_global(memory + threadIdx.x);
    else
        load_global(memory + threadIdx.x);
    load_global(memory + threadIdx.x);
}

static void test_places(void **)
{
    uint32_t *memory = device<uint32_t>(WARP);
    for (uint64_t seed = 0; seed < 3; seed++) {
        emulator_seed(seed);
        emulator_stats_reset();
        RUN(parted_kernel, 1, WARP, 0, memory);
        struct emulator_stats s = emulator_count("parted_kernel");
        assert_int_equal(s.global_requests, 3);
        assert_int_equal(s.global_sectors, 12);
        assert_int_equal(s.global_ideal_sectors, 8);
    }
    cudaFree(memory);
}

enum { MATRIX = 3, COPY = 4 };

template <typename T> __global__ static void bank_kernel(int which, int stride, int modulus, const uint4 *in)
{
    SHARED_DYNAMIC(char, memory);
    int place = (int)threadIdx.x % modulus * stride;
    T *p = (T *)(void *)(memory + place);
    if (which == STORE)
        store_shared(p, T());
    else if (which == MATRIX) {
        uint32_t r[4];
        load_matrix_x4(r, p);
    } else if (which == COPY)
        copy_async16(p, in + threadIdx.x, true);
    else
        load_shared(p);
}

static void test_bank_conflicts(void **)
{
    static const struct {
        int bytes, which, stride, modulus; // lane l is at l % modulus * stride bytes
        uint64_t conflicts;
    } cases[] = {
        {4, LOAD, 4, 32, 0},      {4, LOAD, 8, 32, 1},   {4, LOAD, 128, 32, 31},  {4, LOAD, 12, 32, 0},
        {4, LOAD, 16, 32, 3},     {4, LOAD, 132, 32, 0}, {4, LOAD, 0, 32, 0},     {4, LOAD, 128, 2, 1},
        {8, LOAD, 8, 32, 0},      {8, LOAD, 16, 32, 2},  {8, LOAD, 128, 32, 30},  {8, LOAD, 0, 32, 0},
        {8, LOAD, 136, 32, 0},    {16, LOAD, 16, 32, 0}, {16, LOAD, 32, 32, 4},   {16, LOAD, 128, 32, 28},
        {16, LOAD, 144, 32, 0},   {16, LOAD, 0, 32, 0},  {16, MATRIX, 16, 32, 0}, {16, MATRIX, 128, 32, 28},
        {16, MATRIX, 144, 32, 0}, {16, COPY, 16, 32, 0}, {16, COPY, 64, 32, 12},
    };
    uint4 *in = device<uint4>(WARP);
    for (const auto &c : cases)
        for (uint64_t seed = 0; seed < 2; seed++) {
            emulator_seed(seed);
            emulator_stats_reset();
            if (c.bytes == 16)
                RUN((bank_kernel<uint4>), 1, WARP, 144 * WARP, c.which, c.stride, c.modulus, in);
            else if (c.bytes == 8)
                RUN((bank_kernel<uint2>), 1, WARP, 144 * WARP, c.which, c.stride, c.modulus, in);
            else
                RUN((bank_kernel<float>), 1, WARP, 144 * WARP, c.which, c.stride, c.modulus, in);
            struct emulator_stats s = emulator_count("bank_kernel");
            if (s.shared_requests != 1 || s.shared_conflicts != c.conflicts ||
                s.global_sectors != (c.which == COPY ? 16 : 0))
                fail_msg("%d bytes, kind %d, stride %d: %d requests, %d conflicts, wanted %d", c.bytes, c.which,
                         c.stride, (int)s.shared_requests, (int)s.shared_conflicts, (int)c.conflicts);
        }
    cudaFree(in);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_indices),
        cmocka_unit_test(test_launch_limits),
        cmocka_unit_test(test_shared_and_barrier),
        cmocka_unit_test(test_early_exit),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_atomics),
        cmocka_unit_test(test_shuffles),
        cmocka_unit_test(test_votes),
        cmocka_unit_test(test_mma),
        cmocka_unit_test(test_load_matrix),
        cmocka_unit_test(test_copy_async),
        cmocka_unit_test(test_sectors),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_bank_conflicts),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}

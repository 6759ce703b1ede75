// What the kernels are written in: a launch, shared arrays, counted loads and stores, asynchronous copies, the tensor cores, and the few
// instructions that C has no word for. Each has two bodies with the same meaning: PTX for nvcc, and plain C++ for the emulator of
// thread blocks in tests/emulator. Kernels hold no inline PTX of their own.
#ifndef TPSHARD_KERNELS_CUDA_PRIMITIVES_CUH
#define TPSHARD_KERNELS_CUDA_PRIMITIVES_CUH

#include "formats/number_formats.h"

#include <stddef.h>
#include <stdint.h>

#ifndef CUDA_EMULATOR

#include <cuda_runtime.h>

// ---- launching and shared memory ---------------------------------------------------------------------------------

// LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...) queues a launch and gives a cudaError_t. A template's instance stands in
// parentheses.
#define LAUNCH(kernel, ...) primitives_launch(kernel, __VA_ARGS__)

template <typename... PARAMETERS, typename... ARGUMENTS>
static cudaError_t primitives_launch(void (*kernel)(PARAMETERS...), dim3 grid, dim3 block, size_t shared_bytes,
                                     cudaStream_t stream, ARGUMENTS... arguments)
{
    enum { WITHOUT_ASKING = 32 << 10 }; // of 48 KiB, which static arrays share
    if (shared_bytes > WITHOUT_ASKING) {
        cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (status != cudaSuccess)
            return status;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<PARAMETERS>(arguments)...);
}

// The same for a kernel whose blocks wait for each other: all of them run at the same time, or the launch fails.
#define LAUNCH_TOGETHER(kernel, ...) primitives_launch_together(kernel, __VA_ARGS__)

template <typename... PARAMETERS, typename... ARGUMENTS>
static cudaError_t primitives_launch_together(void (*kernel)(PARAMETERS...), dim3 grid, dim3 block, size_t shared_bytes,
                                              cudaStream_t stream, ARGUMENTS... arguments)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<PARAMETERS>(arguments)...);
}

// An array of the block; and the part whose size the launch gives.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SHARED_DYNAMIC(type, name)                                                                                     \
    extern __shared__ __align__(128) unsigned char primitives_dynamic[];                                               \
    type *name = reinterpret_cast<type *>(primitives_dynamic)

// ---- memory ------------------------------------------------------------------------------------------------------

// 16 bytes of weights, which nobody reads again.
__device__ __forceinline__ uint4 load_weights(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// 4, 8 or 16 bytes of memory that no thread writes while the kernel runs.
template <typename T> __device__ __forceinline__ T load_global(const T *p) { return __ldg(p); }
template <typename T> __device__ __forceinline__ void store_global(T *p, T v) { *p = v; }
template <typename T> __device__ __forceinline__ T load_shared(const T *p) { return *p; }
template <typename T> __device__ __forceinline__ void store_shared(T *p, T v) { *p = v; }

// ---- with other processors -----------------------------------------------------------------------------------------

// 4, 8 or 16 bytes of memory of the host or of any device that others write while the kernel runs.
__device__ __forceinline__ uint32_t load_system(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_system(const uint2 *p)
{
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_system(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
// A word that says that all that this thread, and threads which it has met at a barrier, wrote before is there; and reading one: what was
// written before it is seen behind it.
__device__ __forceinline__ void post_system(uint32_t *p, uint32_t v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t posted_system(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Nanoseconds of a clock that goes on at the same pace for all threads of a device.
__device__ __forceinline__ uint64_t device_now_ns(void)
{
    uint64_t v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)::"memory");
    return v;
}
// Between two looks at a word that another processor writes.
__device__ __forceinline__ void wait_a_little(void) { __nanosleep(64); }

// 16 bytes from global to shared memory, or zeros; they land when their group is waited for.
__device__ __forceinline__ void copy_async16(void *shared, const void *global, bool valid)
{
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_LEFT> __device__ __forceinline__ void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

// c [16 x 8] += a [16 x 16] * b [16 x 8] of a warp. With g = lane / 4 and t = lane % 4: a[0] holds row g, columns 2t and 2t + 1; a[1] row
// g + 8; a[2] and a[3] the same rows, columns 8 further. b[0] holds rows 2t and 2t + 1 of column g, b[1] rows 8 further. c[0], c[1] are row g,
// columns 2t and 2t + 1; c[2], c[3] row g + 8.
__device__ __forceinline__ void mma_f16(float *c, const uint32_t *a, const uint32_t *b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float *c, const uint32_t *a, const uint32_t *b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16 x 8] += a [16 x 32] * b [32 x 8], exact: as above with four bytes at columns 4t .. 4t + 3, and 16 columns further.
__device__ __forceinline__ void mma_int8(int *c, const uint32_t *a, const uint32_t *b)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16 x 8] += (a [16 x 32] * scales of its rows) * (b [32 x 8] * scales of its columns): a is e2m1, each in bits 2 .. 5 of a byte whose
// other bits are 0; b is e4m3; both lie as in mma_int8, and so do the results. Scales are e8m0, 255 makes a NaN. a_scale: of row g in lanes
// with an even t, of row g + 8 in the others, in byte 0; b_scale: of column g, in byte BYTE.
//
// Only chips of capability 12.0, and only in code compiled for sm_120a; elsewhere the results are NaN. PTX ISA: "Matrix Fragments for
// mma.m16n8k32" (.e4m3 / .e2m1, in containers of 8 bits) and "Block Scaling for mma.sync", .scale_vec::1X, where thread-id 0 chooses lanes 0 and 1
// of a quad for a, lane 0 for b; the same in CUTLASS's MMA_Traits<SM120_16x8x32_TN_VS> (SFALayout, SFBLayout, fp4_shift_A).
template <int BYTE>
__device__ __forceinline__ void mma_e2m1_e4m3(float *c, const uint32_t *a, const uint32_t *b, uint32_t a_scale,
                                              uint32_t b_scale)
{
#ifdef __CUDA_ARCH_FEAT_SM120_ALL
    asm volatile("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e2m1.e4m3.f32.ue8m0 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0, 0}, {%11}, {%12, 0};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(a_scale), "r"(b_scale),
                   "n"(BYTE));
#else
    c[0] = c[1] = c[2] = c[3] = __int_as_float(0x7fc00000);
    (void)a, (void)b, (void)a_scale, (void)b_scale;
#endif
}
// c [16 x 8] += a [16 x 16] * b [16 x 8], both e4m3: the first halves of mma_int8's columns. From sm_89 on, elsewhere NaN. PTX ISA: "Matrix
// Fragments for mma.m16n8k16 with integer type", which are those of .e4m3 too.
__device__ __forceinline__ void mma_e4m3(float *c, const uint32_t *a, uint32_t b)
{
#if __CUDA_ARCH__ >= 890
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
#else
    c[0] = c[1] = c[2] = c[3] = __int_as_float(0x7fc00000);
    (void)a, (void)b;
#endif
}
// Four 8 x 8 matrices of 16-bit elements: lanes 8i .. 8i + 7 give the addresses of matrix i's rows (16 bytes each); r[i] receives row
// lane / 4, columns 2 (lane % 4) and the next. transposed: of the transposed matrix.
__device__ __forceinline__ void load_matrix_x4(uint32_t *r, const void *shared_row)
{
    uint32_t from = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t *r, const void *shared_row)
{
    uint32_t from = (uint32_t)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// ---- bits and halves -----------------------------------------------------------------------------------------------

// Bit i of the result is bit (a_i * 4 + b_i * 2 + c_i) of TABLE.
template <int TABLE> __device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return r;
}
// Byte i of the result is byte (selector >> 4 i & 7) of a (0 .. 3) and b (4 .. 7).
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector)
{
    return __byte_perm(a, b, selector);
}
// Sum of four products of signed bytes, added to c.
__device__ __forceinline__ int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
// Two halves at once: a * b + c, rounded once.
__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
__device__ __forceinline__ float half_to_float(uint16_t h)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ uint16_t float_to_half(float f)
{
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ uint32_t floats_to_half2(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ uint32_t floats_to_bf162(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Two e4m3 in the low 16 bits, saturating as f32_to_e4m3; NaN and Inf become NaN.
__device__ __forceinline__ uint32_t floats_to_e4m3x2(float low, float high)
{
#if __CUDA_ARCH__ >= 890
    uint16_t r;
    float nan = __int_as_float(0x7fc00000); // the instruction would make Inf 448
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(r)
        : "f"(isinf(high) ? nan : high), "f"(isinf(low) ? nan : low));
    return r;
#else
    return f32_to_e4m3(low) | (uint32_t)f32_to_e4m3(high) << 8;
#endif
}
// Two e4m3 as two halves, exactly; NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_half2(uint16_t two)
{
#if __CUDA_ARCH__ >= 890
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(two));
    return r;
#else
    // Exponent and mantissa moved to a half's place are 2^-8 of the value, subnormals included. A NaN code would read as 480: it is made
    // the half 0x7fff by its exponent and mantissa being all ones.
    uint32_t wide = __byte_perm(two, 0, 0x1404); // byte 0 and 1 into the upper bytes of the halves
    uint32_t sign = wide & 0x80008000u, magnitude = wide >> 1 & 0x3f803f80u;
    uint32_t half = fma_half2(magnitude, 0x5c005c00u, 0); // times 256
    uint32_t low_nan = (wide & 0x7f00u) == 0x7f00u ? 0x7fffu : 0;
    uint32_t high_nan = (wide & 0x7f000000u) == 0x7f000000u ? 0x7fff0000u : 0;
    return half | sign | low_nan | high_nan;
#endif
}

#else // ---- the same for the emulator --------------------------------------------------------------------------------

#include <emulator_block.h>

#include <algorithm>
#include <math.h>
#include <string.h>

using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (emulator::at.thread)
#define blockIdx (emulator::at.block)
#define blockDim (emulator::at.block_size)
#define gridDim (emulator::at.grid)
#define EMULATOR_PLACE emulator::place()

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define LAUNCH(kernel, ...) emulator_launch(#kernel, kernel, __VA_ARGS__)

template <typename... PARAMETERS, typename... ARGUMENTS>
static cudaError_t emulator_launch(const char *name, void (*kernel)(PARAMETERS...), dim3 grid, dim3 block,
                                   size_t shared_bytes, cudaStream_t stream, ARGUMENTS... arguments)
{
    return emulator::launch(name, grid, block, shared_bytes, stream,
                            [=] { kernel(static_cast<PARAMETERS>(arguments)...); });
}

#define LAUNCH_TOGETHER(kernel, ...) emulator_launch_together(#kernel, kernel, __VA_ARGS__)

template <typename... PARAMETERS, typename... ARGUMENTS>
static cudaError_t emulator_launch_together(const char *name, void (*kernel)(PARAMETERS...), dim3 grid, dim3 block,
                                            size_t shared_bytes, cudaStream_t stream, ARGUMENTS... arguments)
{
    return emulator::launch(
        name, grid, block, shared_bytes, stream, [=] { kernel(static_cast<PARAMETERS>(arguments)...); }, true);
}

#define SHARED(type, name, count)                                                                                      \
    type *name = static_cast<type *>(                                                                                  \
        emulator::shared_array(emulator::place{__FILE__, __LINE__}, sizeof(type) * (size_t)(count)))
#define SHARED_DYNAMIC(type, name) type *name = static_cast<type *>(emulator::shared_dynamic())

// ---- threads together ----------------------------------------------------------------------------------------------

static inline void __syncthreads(emulator::place where = EMULATOR_PLACE) { emulator::barrier(where); }
static inline void __threadfence() {}

static inline void __syncwarp(uint32_t mask = 0xffffffffu)
{
    emulator::meet(mask, "__syncwarp", nullptr, nullptr, [](emulator::lanes &) {});
}

// What a lane brings to a shuffle.
template <typename T> struct emulator_shuffle {
    T value;
    int lane; // whose value it wants
};
template <typename T> static inline T emulator_exchange(uint32_t mask, const char *what, T value, int from)
{
    emulator_shuffle<T> in = {value, from};
    T out;
    emulator::meet(mask, what, &in, &out, [](emulator::lanes &all) {
        for (int l = 0; l < 32; l++) {
            if (!(all.mask >> l & 1))
                continue;
            int wanted = static_cast<const emulator_shuffle<T> *>(all.in[l])->lane;
            if (!(all.mask >> wanted & 1))
                emulator::fail("a shuffle reads lane %d, which does not take part", wanted);
            *static_cast<T *>(all.out[l]) = static_cast<const emulator_shuffle<T> *>(all.in[wanted])->value;
        }
    });
    return out;
}
template <typename T> static inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32)
{
    int first = emulator::lane() / width * width;
    return emulator_exchange(mask, "__shfl_sync", value, first + (lane & (width - 1)));
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32)
{
    int own = emulator::lane(), last = own / width * width + width - 1, other = own ^ bits;
    return emulator_exchange(mask, "__shfl_xor_sync", value, other <= last ? other : own);
}
template <typename T> static inline T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32)
{
    int own = emulator::lane(), last = own / width * width + width - 1;
    return emulator_exchange(mask, "__shfl_down_sync", value, own + distance <= last ? own + distance : own);
}
template <typename T> static inline T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32)
{
    int own = emulator::lane(), first = own / width * width;
    return emulator_exchange(mask, "__shfl_up_sync", value, own - distance >= first ? own - distance : own);
}
static inline uint32_t __ballot_sync(uint32_t mask, int predicate)
{
    uint32_t out;
    emulator::meet(mask, "__ballot_sync", &predicate, &out, [](emulator::lanes &all) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; l++)
            if (all.mask >> l & 1)
                votes |= (uint32_t)(*static_cast<const int *>(all.in[l]) != 0) << l;
        for (int l = 0; l < 32; l++)
            if (all.mask >> l & 1)
                *static_cast<uint32_t *>(all.out[l]) = votes;
    });
    return out;
}
static inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// One block runs at a time, and a thread gives way only where it waits.
template <typename T> static inline T atomicAdd(T *p, T v)
{
    T old = *p;
    *p = old + v;
    return old;
}
template <typename T> static inline T atomicMax(T *p, T v)
{
    T old = *p;
    *p = max(old, v);
    return old;
}
template <typename T> static inline T atomicMin(T *p, T v)
{
    T old = *p;
    *p = min(old, v);
    return old;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

static inline int __popc(uint32_t v) { return __builtin_popcount(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline float __int_as_float(int v) { return f32_from_bits((uint32_t)v); }
static inline float __uint_as_float(uint32_t v) { return f32_from_bits(v); }
static inline int __float_as_int(float v) { return (int)f32_bits(v); }
static inline uint32_t __float_as_uint(float v) { return f32_bits(v); }
static inline int __float2int_rn(float v) { return (int)rintf(v); }

// ---- memory --------------------------------------------------------------------------------------------------------

// Where an access goes.
template <typename T> static inline T *reached(emulator::space which, emulator::place where, T *p)
{
    return (T *)emulator::note_access(which, where, p, sizeof *p);
}
static inline uint4 load_weights(const uint4 *p, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_LOAD, where, p);
    return *p;
}
template <typename T> static inline T load_global(const T *p, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_LOAD, where, p);
    return *p;
}
template <typename T> static inline void store_global(T *p, T v, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_STORE, where, p);
    *p = v;
}
template <typename T> static inline T load_shared(const T *p, emulator::place where = EMULATOR_PLACE)
{
    emulator::note_access(emulator::SHARED_LOAD, where, p, sizeof *p);
    return *p;
}
template <typename T> static inline void store_shared(T *p, T v, emulator::place where = EMULATOR_PLACE)
{
    emulator::note_access(emulator::SHARED_STORE, where, p, sizeof *p);
    *p = v;
}
template <typename T> static inline T load_system(const T *p, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_LOAD, where, p);
    return *p;
}
static inline void post_system(uint32_t *p, uint32_t v, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_POST, where, p);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
static inline uint32_t posted_system(const uint32_t *p, emulator::place where = EMULATOR_PLACE)
{
    p = reached(emulator::GLOBAL_LOAD, where, p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline uint64_t device_now_ns(void) { return emulator::now_ns(); }
static inline void wait_a_little(void) { emulator::give_way(); }
static inline void copy_async16(void *shared, const void *global, bool valid, emulator::place where = EMULATOR_PLACE)
{
    emulator::copy_async(shared, global, valid, where);
}
static inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int GROUPS_LEFT> static inline void copy_async_wait() { emulator::copy_async_wait(GROUPS_LEFT); }

// ---- tensor cores --------------------------------------------------------------------------------------------------

static inline void mma_f16(float *c, const uint32_t *a, const uint32_t *b)
{
    emulator::fragments in = {a, b};
    emulator::meet(0xffffffffu, "mma_f16", &in, c, emulator::multiply_f16);
}
static inline void mma_bf16(float *c, const uint32_t *a, const uint32_t *b)
{
    emulator::fragments in = {a, b};
    emulator::meet(0xffffffffu, "mma_bf16", &in, c, emulator::multiply_bf16);
}
static inline void mma_int8(int *c, const uint32_t *a, const uint32_t *b)
{
    emulator::fragments in = {a, b};
    emulator::meet(0xffffffffu, "mma_int8", &in, c, emulator::multiply_int8);
}

struct emulator_scaled_fragments {
    const uint32_t *a, *b;
    uint8_t a_scale, b_scale;
};
// The product of a row and a column is exact in f64 but for the last bits of sums over scales far apart.
template <int BYTE>
static inline void mma_e2m1_e4m3(float *c, const uint32_t *a, const uint32_t *b, uint32_t a_scale, uint32_t b_scale)
{
    for (int i = 0; i < 4; i++)
        if (a[i] & 0xc3c3c3c3u)
            emulator::fail("an e2m1 operand has bits outside of its place");
    emulator_scaled_fragments in = {a, b, (uint8_t)a_scale, (uint8_t)(b_scale >> 8 * BYTE)};
    emulator::meet(0xffffffffu, "mma_e2m1_e4m3", &in, c, [](emulator::lanes &all) {
        double a[16][32], b[8][32];
        for (int l = 0; l < 32; l++) {
            int g = l >> 2, t = l & 3, quad = l & ~3;
            for (int byte = 0; byte < 16; byte++) {
                const emulator_scaled_fragments *f = static_cast<const emulator_scaled_fragments *>(all.in[l]);
                int i = byte / 4, col = 4 * t + 16 * (i >> 1) + byte % 4, row_lane = quad + (i & 1);
                if (emulator::misread_scales)
                    row_lane ^= 1;
                double scale =
                    (double)e8m0_to_f32(static_cast<const emulator_scaled_fragments *>(all.in[row_lane])->a_scale);
                a[g + 8 * (i & 1)][col] = (double)e2m1_to_f32((uint8_t)(f->a[i] >> byte % 4 * 8 >> 2 & 15)) * scale;
                if (i & 1)
                    continue;
                scale = (double)e8m0_to_f32(static_cast<const emulator_scaled_fragments *>(all.in[quad])->b_scale);
                b[g][col] = (double)e4m3_to_f32((uint8_t)(f->b[i >> 1] >> byte % 4 * 8)) * scale;
            }
        }
        for (int l = 0; l < 32; l++) {
            float *c = static_cast<float *>(all.out[l]);
            for (int i = 0; i < 4; i++) {
                double sum = 0;
                for (int k = 0; k < 32; k++)
                    sum += a[(l >> 2) + 8 * (i >> 1)][k] * b[2 * (l & 3) + (i & 1)][k];
                c[i] = (float)((double)c[i] + sum);
            }
        }
    });
}
static inline void mma_e4m3(float *c, const uint32_t *a, uint32_t b)
{
    emulator::fragments in = {a, &b};
    emulator::meet(0xffffffffu, "mma_e4m3", &in, c, [](emulator::lanes &all) {
        float a[16][16], b[8][16];
        for (int l = 0; l < 32; l++) {
            const emulator::fragments *f = static_cast<const emulator::fragments *>(all.in[l]);
            for (int byte = 0; byte < 4; byte++) {
                int col = 4 * (l & 3) + byte;
                a[l >> 2][col] = e4m3_to_f32((uint8_t)(f->a[0] >> byte * 8));
                a[(l >> 2) + 8][col] = e4m3_to_f32((uint8_t)(f->a[1] >> byte * 8));
                b[l >> 2][col] = e4m3_to_f32((uint8_t)(f->b[0] >> byte * 8));
            }
        }
        for (int l = 0; l < 32; l++) {
            float *c = static_cast<float *>(all.out[l]);
            for (int i = 0; i < 4; i++) {
                double sum = emulator::misread_scales ? 1 : 0;
                for (int k = 0; k < 16; k++)
                    sum += (double)a[(l >> 2) + 8 * (i >> 1)][k] * (double)b[2 * (l & 3) + (i & 1)][k];
                c[i] = (float)((double)c[i] + sum);
            }
        }
    });
}

template <bool TRANSPOSED> static inline void emulator_load_matrix(emulator::lanes &all)
{
    for (int l = 0; l < 32; l++) {
        uint32_t *r = static_cast<uint32_t *>(all.out[l]);
        for (int i = 0; i < 4; i++) {
            uint16_t two[2];
            for (int h = 0; h < 2; h++) {
                int row = TRANSPOSED ? 2 * (l % 4) + h : l / 4, column = TRANSPOSED ? l / 4 : 2 * (l % 4) + h;
                two[h] = static_cast<const uint16_t *>(all.in[8 * i + row])[column];
            }
            r[i] = two[0] | (uint32_t)two[1] << 16;
        }
    }
}
static inline void load_matrix_x4(uint32_t *r, const void *shared_row, emulator::place where = EMULATOR_PLACE)
{
    emulator::note_access(emulator::SHARED_LOAD, where, shared_row, 16);
    emulator::meet(0xffffffffu, "load_matrix_x4", shared_row, r, emulator_load_matrix<false>);
}
static inline void load_matrix_x4_transposed(uint32_t *r, const void *shared_row,
                                             emulator::place where = EMULATOR_PLACE)
{
    emulator::note_access(emulator::SHARED_LOAD, where, shared_row, 16);
    emulator::meet(0xffffffffu, "load_matrix_x4_transposed", shared_row, r, emulator_load_matrix<true>);
}

// ---- bits and halves -----------------------------------------------------------------------------------------------

template <int TABLE> static inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r = 0;
    for (int i = 0; i < 8; i++)
        if (TABLE >> i & 1)
            r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
static inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++)
        r |= (uint32_t)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
static inline int dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++)
        c += (int8_t)((uint32_t)a >> 8 * i) * (int8_t)((uint32_t)b >> 8 * i);
    return c;
}
static inline float half_to_float(uint16_t h) { return f16_to_f32(h); }
static inline uint16_t float_to_half(float f) { return f32_to_f16(f); }
static inline uint32_t floats_to_half2(float low, float high)
{
    return f32_to_f16(low) | (uint32_t)f32_to_f16(high) << 16;
}
static inline uint32_t floats_to_bf162(float low, float high)
{
    return f32_to_bf16(low) | (uint32_t)f32_to_bf16(high) << 16;
}
static inline uint32_t floats_to_e4m3x2(float low, float high)
{
    return f32_to_e4m3(low) | (uint32_t)f32_to_e4m3(high) << 8;
}
// Product and sum are exact in f64 (but for parts 2^31 apart, where the smaller one only decides ties). On the way to f16 the f32 is rounded
// to odd, so that only the last step rounds.
static inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r = 0;
    for (int h = 0; h < 32; h += 16) {
        double exact = (double)f16_to_f32((uint16_t)(a >> h)) * (double)f16_to_f32((uint16_t)(b >> h)) +
                       (double)f16_to_f32((uint16_t)(c >> h));
        float near = (float)exact;
        if ((double)near != exact && exact == exact)
            near = f32_from_bits((f32_bits(near) - (fabs((double)near) > fabs(exact))) | 1);
        r |= (uint32_t)f32_to_f16(near) << h;
    }
    return r;
}
static inline uint32_t e4m3x2_to_half2(uint16_t two)
{
    return f32_to_f16(e4m3_to_f32((uint8_t)two)) | (uint32_t)f32_to_f16(e4m3_to_f32((uint8_t)(two >> 8))) << 16;
}

#endif

// ---- for both --------------------------------------------------------------------------------------------------------

// Four codes of nl4, the nibbles of half a word: their levels + WEIGHT_NL4_TOP as bytes. Of the table each half is looked up, by three bits; the
// fourth chooses between them.
__device__ __forceinline__ uint32_t nl4_bytes(uint32_t three_bits, uint32_t choice)
{
    uint32_t positive = byte_permute(0x2b282522u, 0x3f38332fu, three_bits);
    uint32_t negative = byte_permute(0x120e0800u, 0x1f1c1916u, three_bits);
    return byte_permute(positive, negative, choice);
}

#endif

// The emulator's host side shown to do what it says: streams, events, graphs, limits, planned failures. And each of its detectors, host and
// device, by a program that must end with its sentence.
#include "tests/emulator_help.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- streams, events, graphs ---------------------------------------------------------------------------------------

static int *pinned_ints(int count)
{
    void *p;
    assert_int_equal(cudaMallocHost(&p, (size_t)count * sizeof(int)), cudaSuccess);
    return static_cast<int *>(p);
}

__global__ static void add_kernel(int *value, int by) { *value += by; }

static void test_streams(void **)
{
    cudaStream_t one, two;
    assert_int_equal(cudaStreamCreate(&one), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&two, cudaStreamNonBlocking), cudaSuccess);
    int *host = pinned_ints(2), *a = device<int>(1), *b = device<int>(1);
    host[0] = 1, host[1] = 2;
    assert_int_equal(*a, (int)POISON_WORD);
    assert_int_equal(host[0], 1);

    // Nothing happens before someone waits, and then in the stream's order; what the host changes meanwhile, arrives.
    assert_int_equal(cudaMemcpyAsync(a, host, sizeof(int), cudaMemcpyHostToDevice, one), cudaSuccess);
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 10), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(&host[1], a, sizeof(int), cudaMemcpyDeviceToHost, one), cudaSuccess);
    assert_int_equal(cudaMemsetAsync(b, 1, sizeof(int), two), cudaSuccess);
    host[0] = 5;
    assert_int_equal(*a, (int)POISON_WORD);
    assert_int_equal(cudaStreamSynchronize(two), cudaSuccess);
    assert_int_equal(*b, 0x01010101);
    assert_int_equal(*a, (int)POISON_WORD);
    assert_int_equal(host[1], 2);
    assert_int_equal(cudaStreamSynchronize(one), cudaSuccess);
    assert_int_equal(*a, 15);
    assert_int_equal(host[1], 15);

    // Asking lets time pass.
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 1), cudaSuccess);
    assert_int_equal(cudaStreamQuery(one), cudaErrorNotReady);
    assert_int_equal(cudaStreamQuery(one), cudaSuccess);
    assert_int_equal(*a, 16);
    assert_int_equal(cudaGetLastError(), cudaSuccess); // not being ready is no error

    // The plain copy waits for the default stream, not for the others.
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, two, b, 1), cudaSuccess);
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, nullptr, a, 1), cudaSuccess);
    assert_int_equal(cudaMemcpy(host, a, sizeof(int), cudaMemcpyDeviceToHost), cudaSuccess);
    assert_int_equal(host[0], 17);
    assert_int_equal(*b, 0x01010101);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    assert_int_equal(*b, 0x01010102);

    int calls = 0;
    auto count_call = [](void *arg) { ++*(int *)arg; };
    assert_int_equal(cudaLaunchHostFunc(one, count_call, &calls), cudaSuccess);
    emulator_enqueue(one, count_call, &calls);
    assert_int_equal(calls, 0);
    assert_int_equal(cudaStreamDestroy(one), cudaSuccess); // what is queued still runs
    assert_int_equal(calls, 2);
    cudaStreamDestroy(two);
    cudaFreeHost(host);
    cudaFree(a);
    cudaFree(b);
}

static void test_events(void **)
{
    cudaStream_t one, two;
    cudaEvent_t event, later;
    cudaStreamCreate(&one);
    cudaStreamCreate(&two);
    assert_int_equal(cudaEventCreateWithFlags(&event, cudaEventDefault), cudaSuccess);
    assert_int_equal(cudaEventCreateWithFlags(&later, cudaEventDefault), cudaSuccess);
    int *a = device<int>(2);
    a[0] = a[1] = 0;
    assert_int_equal(cudaEventQuery(event), cudaSuccess); // never recorded
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 1), cudaSuccess);
    assert_int_equal(cudaEventRecord(event, one), cudaSuccess);
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 10), cudaSuccess);
    assert_int_equal(cudaStreamWaitEvent(two, event, 0), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(&a[1], a, sizeof(int), cudaMemcpyDeviceToDevice, two), cudaSuccess);
    assert_int_equal(cudaEventRecord(later, two), cudaSuccess);
    assert_int_equal(cudaEventQuery(later), cudaErrorNotReady);
    assert_int_equal(cudaStreamSynchronize(two), cudaSuccess);
    assert_int_equal(a[0], 1); // up to the event and no further
    assert_int_equal(a[1], 1);
    assert_int_equal(cudaEventQuery(event), cudaSuccess);
    float ms = -1;
    assert_int_equal(cudaEventElapsedTime(&ms, event, later), cudaSuccess);
    assert_true(ms >= 0);
    assert_int_equal(cudaEventRecord(event, one), cudaSuccess);
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 100), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(event), cudaSuccess);
    assert_int_equal(a[0], 11);
    cudaEventDestroy(event);
    cudaEventDestroy(later);
    cudaStreamDestroy(one);
    cudaStreamDestroy(two);
    cudaFree(a);
}

static void test_graphs(void **)
{
    cudaStream_t one, two;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCreate(&one);
    cudaStreamCreate(&two);
    int *host = pinned_ints(2), *a = device<int>(1), calls = 0;
    host[0] = 1;
    assert_int_equal(cudaStreamBeginCapture(one, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    assert_int_equal(cudaMemcpyAsync(a, &host[0], sizeof(int), cudaMemcpyHostToDevice, one), cudaSuccess);
    assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, one, a, 100), cudaSuccess);
    emulator_enqueue(
        one, [](void *arg) { ++*(int *)arg; }, &calls);
    assert_int_equal(cudaMemcpyAsync(&host[1], a, sizeof(int), cudaMemcpyDeviceToHost, one), cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(one), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaGetLastError(), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaStreamBeginCapture(one, cudaStreamCaptureModeThreadLocal), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(cudaStreamEndCapture(one, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphDestroy(graph), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    assert_int_equal(calls, 0); // captured, not run
    for (int round = 1; round <= 3; round++) {
        cudaStream_t stream = round == 2 ? two : one;
        host[0] = 7 * round;
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(calls, round - 1);
        assert_int_equal(cudaStreamSynchronize(stream), cudaSuccess);
        assert_int_equal(calls, round);
        assert_int_equal(host[1], 7 * round + 100);
    }
    assert_int_equal(cudaStreamEndCapture(one, &graph), cudaErrorInvalidValue);
    cudaGraphExecDestroy(exec);
    cudaStreamDestroy(one);
    cudaStreamDestroy(two);
    cudaFreeHost(host);
    cudaFree(a);
}

// ---- the device as a test wants it ---------------------------------------------------------------------------------

// A stream that waits for an event of a capture belongs to it until it ends, and must have been waited for then.
static void test_forks(void **)
{
    cudaStream_t one, two;
    cudaEvent_t fork, join, outside, never;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int *a = device<int>(1);
    cudaStreamCreate(&one);
    cudaStreamCreate(&two);
    for (cudaEvent_t *event : {&fork, &join, &outside, &never})
        cudaEventCreateWithFlags(event, cudaEventDisableTiming);
    assert_int_equal(cudaMemset(a, 0, sizeof(int)), cudaSuccess);
    assert_int_equal(cudaEventRecord(outside, two), cudaSuccess);
    for (bool joined : {false, true}) {
        assert_int_equal(cudaStreamBeginCapture(one, cudaStreamCaptureModeThreadLocal), cudaSuccess);
        assert_int_equal(cudaStreamWaitEvent(one, outside, 0), cudaErrorStreamCaptureIsolation);
        assert_int_equal(cudaStreamWaitEvent(one, never, 0), cudaSuccess);
        assert_int_equal(cudaEventRecord(fork, one), cudaSuccess);
        assert_int_equal(cudaStreamWaitEvent(two, fork, 0), cudaSuccess);
        assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, two, a, 5), cudaSuccess);
        assert_int_equal(cudaStreamSynchronize(two), cudaErrorStreamCaptureUnsupported);
        assert_int_equal(cudaEventRecord(join, two), cudaSuccess);
        if (!joined)
            assert_int_equal(LAUNCH(add_kernel, 1, 1, 0, two, a, 5), cudaSuccess);
        assert_int_equal(cudaStreamWaitEvent(one, join, 0), cudaSuccess);
        assert_int_equal(cudaStreamEndCapture(one, &graph), joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
        assert_int_equal(cudaStreamWaitEvent(one, join, 0), cudaErrorCapturedEvent);
        cudaGetLastError();
    }
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    assert_int_equal(*a, 0);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    assert_int_equal(cudaGraphLaunch(exec, one), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    assert_int_equal(*a, 5);
    for (cudaEvent_t event : {fork, join, outside, never})
        cudaEventDestroy(event);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(one);
    cudaStreamDestroy(two);
    cudaFree(a);
}

static void test_planned_failures(void **)
{
    void *p = nullptr, *q = nullptr;
    cudaGetLastError();
    emulator_fail_call("cudaMalloc", 1, cudaErrorMemoryAllocation);
    emulator_fail_call("cudaStreamSynchronize", 0, cudaErrorLaunchFailure);
    assert_int_equal(cudaMalloc(&p, 10), cudaSuccess);
    assert_int_equal(cudaMalloc(&q, 10), cudaErrorMemoryAllocation);
    assert_int_equal(cudaPeekAtLastError(), cudaErrorMemoryAllocation);
    assert_int_equal(cudaGetLastError(), cudaErrorMemoryAllocation);
    assert_int_equal(cudaGetLastError(), cudaSuccess);
    assert_int_equal(cudaMalloc(&q, 10), cudaSuccess);
    assert_int_equal(cudaStreamSynchronize(nullptr), cudaErrorLaunchFailure);
    assert_int_equal(cudaStreamSynchronize(nullptr), cudaSuccess);
    emulator_fail_call("cudaMalloc", 0, cudaErrorMemoryAllocation);
    emulator_fail_call(NULL, 0, cudaSuccess); // changed its mind
    assert_string_equal(cudaGetErrorName(cudaErrorLaunchFailure), "cudaErrorLaunchFailure");
    cudaGetLastError();
    assert_int_equal(cudaFree(p), cudaSuccess);
    assert_int_equal(cudaMalloc(&p, 10), cudaSuccess);
    assert_int_equal(cudaFree(p), cudaSuccess);
    assert_int_equal(cudaFree(q), cudaSuccess);
    assert_int_equal(cudaFree(nullptr), cudaSuccess);
    assert_int_equal(cudaFree(&p), cudaErrorInvalidValue); // not the device's
    cudaGetLastError();
}

static void test_memory_limit(void **)
{
    void *p, *q;
    size_t available, total;
    setenv("EMULATED_MEMORY", "1000000", 1);
    assert_int_equal(cudaMalloc(&p, 1000001), cudaErrorMemoryAllocation);
    assert_int_equal(cudaMalloc(&p, SIZE_MAX), cudaErrorMemoryAllocation);
    assert_int_equal(cudaMalloc(&p, 600000), cudaSuccess);
    assert_int_equal(cudaMalloc(&q, SIZE_MAX - 1000), cudaErrorMemoryAllocation);
    assert_int_equal(cudaMalloc(&q, 600000), cudaErrorMemoryAllocation);
    assert_int_equal(cudaMemGetInfo(&available, &total), cudaSuccess);
    assert_int_equal(available, 400000);
    assert_int_equal(total, 1000000);
    for (int i = 0; i < 600000; i++)
        assert_int_equal(((unsigned char *)p)[i], POISON);
    assert_int_equal(cudaFree(p), cudaSuccess);
    assert_int_equal(cudaMalloc(&q, 1000000), cudaSuccess);
    assert_int_equal(cudaFree(q), cudaSuccess);
    unsetenv("EMULATED_MEMORY");
    cudaGetLastError();
}

static void test_devices(void **)
{
    int count = -1;
    struct cudaDeviceProp properties;
    setenv("EMULATED_DEVICES", "0", 1);
    assert_int_equal(cudaGetDeviceCount(&count), cudaErrorNoDevice);
    assert_int_equal(count, 0);
    assert_int_equal(cudaSetDevice(0), cudaErrorInvalidDevice);
    setenv("EMULATED_DEVICES", "2", 1);
    assert_int_equal(cudaGetDeviceCount(&count), cudaSuccess);
    assert_int_equal(count, 2);
    assert_int_equal(cudaSetDevice(1), cudaSuccess);
    assert_int_equal(cudaGetDevice(&count), cudaSuccess);
    assert_int_equal(count, 1);
    assert_int_equal(cudaSetDevice(2), cudaErrorInvalidDevice);
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
    unsetenv("EMULATED_DEVICES");
    setenv("EMULATED_SM", "89", 1);
    assert_int_equal(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    assert_int_equal(properties.major * 10 + properties.minor, 89);
    emulator_set_sm(120);
    assert_int_equal(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    assert_int_equal(properties.major * 10 + properties.minor, 120);
    emulator_set_sm(0);
    unsetenv("EMULATED_SM");
    cudaGetLastError();
}

// ---- detectors -----------------------------------------------------------------------------------------------------

enum fault {
    BARRIER_NOT_REACHED,
    COLLECTIVE_NOT_REACHED,
    BARRIERS_DIFFER,
    COLLECTIVES_DIFFER,
    MASK_WITHOUT_ITSELF,
    SHUFFLE_FROM_OUTSIDE,
    MISALIGNED_LOAD,
    MISALIGNED_COPY,
    LOAD_BEHIND,
    STORE_BEFORE,
    COPY_BEHIND,
    SHARED_BEHIND,
    NOT_LANDED,
    OTHERS_NOT_LANDED,
    TWO_ARRAYS,
};

static __device__ uint32_t *array_of(int count)
{
    SHARED(uint32_t, words, count);
    return words;
}

__global__ static void faulty_kernel(int which, char *memory)
{
    SHARED(uint4, target, WARP);
    int l = (int)threadIdx.x;
    switch (which) {
    case BARRIER_NOT_REACHED:
        if (l < 16)
            __syncthreads();
        else
            __syncwarp();
        break;
    case COLLECTIVE_NOT_REACHED:
        if (l != 9)
            __shfl_xor_sync(ALL, l, 1);
        break;
    case BARRIERS_DIFFER:
        if (l < 16)
            __syncthreads();
        else
            __syncthreads();
        break;
    case COLLECTIVES_DIFFER:
        if (l < 16)
            __ballot_sync(ALL, 1);
        else
            __shfl_sync(ALL, l, 0);
        break;
    case MASK_WITHOUT_ITSELF:
        __ballot_sync(0x0000ffffu, 1);
        break;
    case SHUFFLE_FROM_OUTSIDE:
        if (l < 16)
            __shfl_sync(0x0000ffffu, l, 20);
        break;
    case MISALIGNED_LOAD:
        load_global((const uint2 *)(const void *)(memory + 4 + l * 8));
        break;
    case MISALIGNED_COPY:
        copy_async16(&target[l], memory + 8 + l * 16, true);
        break;
    case LOAD_BEHIND: // 1024 bytes
        load_global((const uint2 *)(const void *)(memory + 776 + l * 8));
        break;
    case STORE_BEFORE:
        store_global((uint32_t *)(void *)memory + l - 1, 0u);
        break;
    case COPY_BEHIND:
        copy_async16(&target[l], memory + 528 + l * 16, l != 30); // nothing is read where it is not valid
        break;
    case SHARED_BEHIND:
        load_shared(&target[l + 1]);
        break;
    case NOT_LANDED:
        copy_async16(&target[l], memory + l * 16, true);
        copy_async_commit();
        copy_async_wait<1>();
        load_shared((const uint32_t *)(const void *)&target[l] + 3);
        break;
    case OTHERS_NOT_LANDED: // a barrier waits for threads, not for their copies
        copy_async16(&target[l], memory + l * 16, l % 2);
        copy_async_commit();
        __syncthreads();
        load_shared(&target[l ^ 1]);
        break;
    case TWO_ARRAYS:
        array_of(l == 0 ? 8 : 16)[0] = 1;
        break;
    }
}

static void run_faulty(int which)
{
    char *memory = device<char>(1024);
    (void)LAUNCH(faulty_kernel, 1, WARP, 0, nullptr, which, memory);
    cudaDeviceSynchronize();
}

static void copy_unpinned(int size)
{
    char *memory = device<char>(100), *host = (char *)malloc(100);
    cudaMemcpyAsync(memory, host, (size_t)size, cudaMemcpyHostToDevice, nullptr);
}
static void copy_to_unpinned(int size)
{
    char *memory = device<char>(100), *host = (char *)pinned_ints(20); // 80 bytes
    cudaMemcpyAsync(host, memory, (size_t)size, cudaMemcpyDeviceToHost, nullptr);
}
static void write_at(int byte)
{
    char *memory = device<char>(101);
    memory[byte] = 1;
    cudaFree(memory);
}
static void write_pinned_at(int byte)
{
    char *memory = (char *)pinned_ints(20);
    memory[byte] = 1;
    cudaFreeHost(memory);
}

static void test_detectors(void **)
{
    static const struct {
        void (*fn)(int);
        int argument;
        const char *words[5]; // null: the end
    } cases[] = {
        {run_faulty,
         BARRIER_NOT_REACHED,
         {"faulty_kernel", "deadlock: 32 of 32 threads", "thread 0 and 15 others wait for a barrier at tests/",
          "thread 16 and 15 others wait for __syncwarp"}},
        {run_faulty, COLLECTIVE_NOT_REACHED, {"deadlock", "__shfl_xor_sync", "31 of 32 threads"}},
        {run_faulty, BARRIERS_DIFFER, {"faulty_kernel", "divergent barrier", "test_emulator_runtime.cc"}},
        {run_faulty, COLLECTIVES_DIFFER, {"lanes diverge", "__ballot_sync", "__shfl_sync"}},
        {run_faulty, MASK_WITHOUT_ITSELF, {"does not hold the lane itself"}},
        {run_faulty, SHUFFLE_FROM_OUTSIDE, {"lane 20, which does not take part"}},
        {run_faulty, MISALIGNED_LOAD, {"faulty_kernel", "test_emulator_runtime.cc", "8 bytes at an address"}},
        {run_faulty, MISALIGNED_COPY, {"asynchronous copy", "not aligned"}},
        {run_faulty,
         LOAD_BEHIND,
         {"thread 31", "test_emulator_runtime.cc", "8 bytes that is not inside an allocation"}},
        {run_faulty, STORE_BEFORE, {"thread 0", "4 bytes that is not inside an allocation"}},
        {run_faulty, COPY_BEHIND, {"thread 31", "16 bytes that is not inside an allocation"}},
        {run_faulty, SHARED_BEHIND, {"thread 31", "16 bytes that is not inside a shared array"}},
        {run_faulty, NOT_LANDED, {"4 bytes where an asynchronous copy has not landed"}},
        {run_faulty, OTHERS_NOT_LANDED, {"16 bytes where an asynchronous copy has not landed"}},
        {run_faulty, TWO_ARRAYS, {"two shared arrays", "test_emulator_runtime.cc"}},
        {copy_unpinned, 100, {"from memory of the host that is not pinned"}},
        {copy_to_unpinned, 81, {"to memory of the host that is not pinned"}},
        {write_at, 101, {"byte 101 of a device allocation of 101 bytes"}},
        {write_at, -1, {"1 bytes before a device allocation"}},
        {write_pinned_at, 80, {"byte 80 of a pinned allocation"}},
    };
    for (uint64_t seed = 0; seed < 4; seed++) {
        emulator_seed(seed);
        for (const auto &c : cases)
            expect_sentence(c.fn, c.argument, c.words);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_streams), cmocka_unit_test(test_events),           cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_forks),   cmocka_unit_test(test_planned_failures), cmocka_unit_test(test_memory_limit),
        cmocka_unit_test(test_devices), cmocka_unit_test(test_detectors),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}

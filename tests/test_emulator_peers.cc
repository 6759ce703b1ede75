// Emulated devices that reach each other's memory, in one process and over handles that other processes open: that it works as with the
// runtime, and that each fault of EMULATED_PEERS does what it says, to kernels and to copies.
#include "tests/emulator_help.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { COUNT = 2048, OLD = 7, NEW = 1000, CORRUPT_WORD = 1000 / 4, ASKED = 20 };

// to[i] = from[i] + by.
__global__ static void move_kernel(uint32_t *to, const uint32_t *from, uint32_t by)
{
    for (int i = (int)threadIdx.x; i < COUNT; i += (int)blockDim.x)
        store_global(to + i, load_system(from + i) + by);
}

// What a word posted behind a value says of it, to a block that reads both again.
__global__ static void post_kernel(uint32_t *there, uint32_t *seen)
{
    store_global(there, (uint32_t)NEW);
    post_system(there + 1, 1);
    store_global(seen + 1, posted_system(there + 1));
    store_global(seen, load_system(there));
}

static void fill(uint32_t *memory, uint32_t first)
{
    for (uint32_t i = 0; i < COUNT; i++)
        memory[i] = first + i;
}

// Values that are not first + i.
static int wrong(const uint32_t *memory, uint32_t first)
{
    int count = 0;
    for (uint32_t i = 0; i < COUNT; i++)
        count += memory[i] != first + i;
    return count;
}

// What is moved by a device that reaches `there`: to it, and back again into another array of its own.
struct moved {
    bool ended;
    int back; // values that differ from what was sent
};

static bool ends(cudaStream_t stream)
{
    for (int i = 0; i < ASKED; i++)
        if (cudaStreamQuery(stream) == cudaSuccess)
            return true;
    return false;
}

static struct moved move_there(uint32_t *there, bool by_copy)
{
    cudaStream_t stream;
    uint32_t *mine = device<uint32_t>(COUNT), *again = device<uint32_t>(COUNT);
    struct moved m = {true, 0};
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    fill(mine, NEW);
    if (by_copy) {
        cudaMemcpyAsync(there, mine, COUNT * 4, cudaMemcpyDeviceToDevice, stream);
        cudaMemcpyAsync(again, there, COUNT * 4, cudaMemcpyDeviceToDevice, stream);
    } else {
        LAUNCH(move_kernel, 1, 64, 0, stream, there, mine, 0u);
        LAUNCH(move_kernel, 1, 64, 0, stream, again, there, 0u);
    }
    m.ended = ends(stream);
    m.back = wrong(again, NEW);
    cudaStreamDestroy(stream);
    cudaFree(mine), cudaFree(again);
    return m;
}

static const struct fault_case {
    const char *setting; // of EMULATED_PEERS; device 1 reaches the memory of device 0
    bool ends;
    int there, back; // values that are not the new ones: where they were sent to, and read again
} faults[] = {
    {"", true, 0, 0},
    {"0>1:drop", true, 0, 0}, // the other way
    {"1>0:mirror", true, COUNT, 0},
    {"drop", true, COUNT, COUNT},
    {"stale", true, 0, COUNT},
    {"corrupt", true, 2, 2},
    {"late", true, 0, COUNT}, // what is read again was read before
    {"loose", true, 0, 0},
    {"slow", true, 0, 0},
    {"1>0:hang", false, COUNT, COUNT},
    {"hang,1>0:none", true, 0, 0},
};

static void check_fault(const struct fault_case &c, bool by_copy, const char *how, const uint32_t *there,
                        struct moved m)
{
    int lost = wrong(there, NEW), back = c.back;
    if (strcmp(c.setting, "corrupt") == 0 && by_copy)
        back = 0; // changed on both ways, which is what it was
    if (strcmp(c.setting, "late") == 0 && !by_copy)
        back = 0; // it is about copies
    if (m.ended != c.ends || lost != c.there || (m.ended && m.back != back))
        fail_msg("EMULATED_PEERS=%s, %s, %s: %s, %d values wrong there and %d read again, not %d and %d", c.setting,
                 how, by_copy ? "copy" : "kernel", m.ended ? "ended" : "no end", lost, m.back, c.there, back);
    if (c.there == 2 &&
        (there[CORRUPT_WORD] == NEW + CORRUPT_WORD || there[CORRUPT_WORD + 1024] == NEW + CORRUPT_WORD + 1024))
        fail_msg("another byte changed than said");
}

static void test_one_process(void **)
{
    int can;
    setenv("EMULATED_DEVICES", "2", 1);
    for (const struct fault_case &c : faults)
        for (bool by_copy : {false, true}) {
            setenv("EMULATED_PEERS", c.setting, 1);
            cudaSetDevice(0);
            uint32_t *there = device<uint32_t>(COUNT);
            fill(there, OLD);
            cudaSetDevice(1);
            assert_int_equal(cudaDeviceCanAccessPeer(&can, 1, 0), cudaSuccess);
            assert_int_equal(can, 1);
            assert_int_equal(cudaDeviceEnablePeerAccess(0, 0), cudaSuccess);
            assert_int_equal(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessAlreadyEnabled);
            check_fault(c, by_copy, "one process", there, move_there(there, by_copy));
            assert_int_equal(cudaDeviceDisablePeerAccess(0), cudaSuccess);
            assert_int_equal(cudaDeviceDisablePeerAccess(0), cudaErrorPeerAccessNotEnabled);
            cudaFree(there);
        }
    // Without access copies go over the host.
    setenv("EMULATED_PEERS", "refuse", 1);
    assert_int_equal(cudaDeviceCanAccessPeer(&can, 1, 0), cudaSuccess);
    assert_int_equal(can, 0);
    assert_int_equal(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessUnsupported);
    cudaSetDevice(0);
    uint32_t *there = device<uint32_t>(COUNT);
    cudaSetDevice(1);
    check_fault(faults[0], true, "without access", there, move_there(there, true));
    cudaFree(there);
    unsetenv("EMULATED_PEERS");
    assert_int_equal(cudaDeviceCanAccessPeer(&can, 1, 1), cudaSuccess);
    assert_int_equal(can, 0);
    assert_int_equal(cudaDeviceCanAccessPeer(&can, 1, 2), cudaErrorInvalidDevice);
    assert_int_equal(cudaDeviceEnablePeerAccess(1, 0), cudaErrorInvalidDevice);
    cudaSetDevice(0);
    cudaGetLastError();
}

// Words that are posted arrive at once; what was stored before them arrives with the end of the block, over a loose link.
static void test_overtaken(void **)
{
    setenv("EMULATED_DEVICES", "2", 1);
    for (const char *setting : {"", "1>0:loose"}) {
        setenv("EMULATED_PEERS", setting, 1);
        cudaSetDevice(0);
        uint32_t *there = device<uint32_t>(2);
        there[0] = there[1] = OLD;
        cudaSetDevice(1);
        uint32_t *seen = device<uint32_t>(2);
        assert_int_equal(cudaDeviceEnablePeerAccess(0, 0), cudaSuccess);
        RUN(post_kernel, 1, 1, 0, there, seen);
        assert_int_equal(seen[0], *setting ? OLD : NEW);
        assert_int_equal(seen[1], 1);
        assert_int_equal(there[0], NEW);
        assert_int_equal(there[1], 1);
        assert_int_equal(cudaDeviceDisablePeerAccess(0), cudaSuccess);
        cudaFree(seen), cudaFree(there);
    }
    unsetenv("EMULATED_PEERS");
    cudaSetDevice(0);
}

// Runs fn in another process; its asserts end it with another code.
template <typename FN> static void in_other_process(FN fn)
{
    int status;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        emulator_new_process(); // tests before this one have made calls
        fn();
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (status != 0)
        fail_msg("the other process ended with status %x", (unsigned)status);
}
#define CHILD_CHECK(condition)                                                                                         \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition);                                        \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

// Without that it is as with the driver: nothing works in a process that was forked behind the first call.
static void test_forked_behind_a_call(void **)
{
    int status, count;
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        _exit(cudaSetDevice(0) == cudaErrorInitializationError && cudaGetDeviceCount(&count) != cudaSuccess ? 0 : 1);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(cudaSetDevice(0), cudaSuccess);
}

static void test_two_processes(void **)
{
    setenv("EMULATED_DEVICES", "2", 1);
    for (const struct fault_case &c : faults)
        for (bool by_copy : {false, true}) {
            cudaIpcMemHandle_t handle;
            int ends[2];
            struct moved m = {false, 0};
            unsetenv("EMULATED_PEERS");
            cudaSetDevice(0);
            uint32_t *there = device<uint32_t>(COUNT);
            fill(there, OLD);
            assert_int_equal(cudaIpcGetMemHandle(&handle, there), cudaSuccess);
            assert_int_equal(wrong(there, OLD), 0);
            assert_int_equal(pipe(ends), 0);
            in_other_process([&] {
                void *opened;
                setenv("EMULATED_PEERS", c.setting, 1);
                cudaSetDevice(1);
                CHILD_CHECK(cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess);
                CHILD_CHECK(wrong((uint32_t *)opened, OLD) == 0);
                struct moved mine = move_there((uint32_t *)opened, by_copy);
                CHILD_CHECK(write(ends[1], &mine, sizeof mine) == sizeof mine);
                CHILD_CHECK(cudaFree(opened) == cudaErrorInvalidValue);
                CHILD_CHECK(cudaIpcCloseMemHandle(opened) == cudaSuccess);
                CHILD_CHECK(cudaIpcCloseMemHandle(opened) == cudaErrorInvalidValue);
            });
            assert_int_equal(read(ends[0], &m, sizeof m), (int)sizeof m);
            close(ends[0]), close(ends[1]);
            check_fault(c, by_copy, "two processes", there, m);
            assert_int_equal(cudaFree(there), cudaSuccess);
        }
}

// Both see what the other writes, whatever their devices; a bare fault holds on one device too.
static void test_same_device(void **)
{
    cudaIpcMemHandle_t handle;
    setenv("EMULATED_DEVICES", "1", 1);
    cudaSetDevice(0);
    uint32_t *there = device<uint32_t>(COUNT);
    assert_int_equal(cudaIpcGetMemHandle(&handle, there), cudaSuccess);
    for (const char *setting : {"", "refuse", "drop"}) {
        fill(there, OLD);
        setenv("EMULATED_PEERS", setting, 1);
        in_other_process([&] {
            void *opened;
            CHILD_CHECK(cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess);
            move_there((uint32_t *)opened, false);
        });
        assert_int_equal(wrong(there, NEW), strcmp(setting, "drop") == 0 ? COUNT : 0);
    }
    unsetenv("EMULATED_PEERS");
    assert_int_equal(cudaFree(there), cudaSuccess);
}

static void test_handles(void **)
{
    cudaIpcMemHandle_t handle, other;
    void *opened;
    setenv("EMULATED_DEVICES", "2", 1);
    uint32_t *there = device<uint32_t>(COUNT);
    assert_int_equal(cudaIpcGetMemHandle(&handle, there + 1), cudaErrorInvalidValue);
    assert_int_equal(cudaIpcGetMemHandle(&handle, there), cudaSuccess);
    assert_int_equal(cudaIpcGetMemHandle(&other, there), cudaSuccess);
    assert_memory_equal(&handle, &other, sizeof handle);
    assert_int_equal(cudaIpcOpenMemHandle(&opened, handle, cudaIpcMemLazyEnablePeerAccess),
                     cudaErrorDeviceUninitialized); // in the process that made it
    in_other_process([&] {
        void *first, *second;
        cudaIpcMemHandle_t broken = handle;
        broken.reserved[0] ^= 1;
        CHILD_CHECK(cudaIpcOpenMemHandle(&first, handle, 0) == cudaErrorInvalidValue);
        CHILD_CHECK(cudaIpcOpenMemHandle(&first, broken, cudaIpcMemLazyEnablePeerAccess) == cudaErrorInvalidValue);
        CHILD_CHECK(cudaIpcOpenMemHandle(&first, handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess);
        CHILD_CHECK(cudaIpcOpenMemHandle(&second, handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess);
        CHILD_CHECK(first == second);
        CHILD_CHECK(cudaIpcCloseMemHandle(first) == cudaSuccess);
        *(uint32_t *)second = NEW; // it was opened twice
        CHILD_CHECK(cudaIpcCloseMemHandle(second) == cudaSuccess);
        cudaSetDevice(1);
        setenv("EMULATED_PEERS", "refuse", 1);
        CHILD_CHECK(cudaIpcOpenMemHandle(&first, handle, cudaIpcMemLazyEnablePeerAccess) ==
                    cudaErrorPeerAccessUnsupported);
    });
    assert_int_equal(there[0], NEW);
    assert_int_equal(cudaFree(there), cudaSuccess);
    in_other_process([&] { // it is gone
        void *first;
        CHILD_CHECK(cudaIpcOpenMemHandle(&first, handle, cudaIpcMemLazyEnablePeerAccess) ==
                    cudaErrorInvalidResourceHandle);
    });
    cudaGetLastError();
}

// A kernel that touches memory to which its device has no access, and a setting that says nothing.
static void touch_without_access(int)
{
    setenv("EMULATED_DEVICES", "2", 1);
    uint32_t *there = device<uint32_t>(COUNT);
    cudaSetDevice(1);
    move_there(there, false);
}

static void ask_for_nonsense(int)
{
    int can;
    setenv("EMULATED_DEVICES", "2", 1);
    setenv("EMULATED_PEERS", "0>1:weak", 1);
    cudaDeviceCanAccessPeer(&can, 0, 1);
}

static void test_sentences(void **)
{
    static const char *const no_access[] = {"device 1 touches memory of device 0", "no access", NULL};
    static const char *const nonsense[] = {"EMULATED_PEERS=0>1:weak", "mirror drop stale", NULL};
    expect_sentence(touch_without_access, 0, no_access);
    expect_sentence(ask_for_nonsense, 0, nonsense);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_process),   cmocka_unit_test(test_forked_behind_a_call),
        cmocka_unit_test(test_two_processes), cmocka_unit_test(test_same_device),
        cmocka_unit_test(test_handles),       cmocka_unit_test(test_sentences),
        cmocka_unit_test(test_overtaken),
    };
    return cmocka_run_group_tests(tests, nullptr, nullptr);
}

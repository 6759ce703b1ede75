// The kernels of the probe of links: writing, reading, and kernels that call each other from two streams.
#include "tests/device/cuda_test.h"

#include "kernels/cuda/link_probe.h"

#include <thread>
#include <vector>

static void test_write_and_read(void **)
{
    static const uint32_t counts[] = {1, 3, 4, 7, 1023, 4096, 70001};
    for (uint32_t words : counts) {
        uint32_t *written = device_array<uint32_t>(words + 4), *read = device_array<uint32_t>(words + 4);
        memset(written, 0x5a, (words + 4) * 4);
        memset(read, 0x5a, (words + 4) * 4);
        assert_int_equal(launch_link_write(written, words, 77, 0), cudaSuccess);
        assert_int_equal(launch_link_read(read, written, words, 0), cudaSuccess);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        for (uint32_t i = 0; i < words + 4; i++) {
            uint32_t want = i < words ? link_word(77, i) : 0x5a5a5a5a;
            if (written[i] != want || read[i] != want)
                fail_msg("%u words: word %u is %08x, and read %08x, instead of %08x", words, i, written[i], read[i],
                         want);
        }
        cudaFree(written);
        cudaFree(read);
    }
}

struct caller {
    struct link_call call;
    cudaStream_t stream;
};

// Two kernels on two streams; each ends by itself, also without the other.
static void run_callers(struct caller *c, int count, uint32_t words, uint32_t rounds, uint32_t second_seed)
{
    uint8_t *area[2];
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; i++) {
        area[i] = (uint8_t *)device_zeros(LINK_CALL_BYTES);
        c[i].call = {};
    }
    for (int i = 0; i < count; i++) {
        c[i].call.own = area[i];
        c[i].call.other = area[1 - i];
        c[i].call.rounds = rounds;
        c[i].call.words = words;
        c[i].call.seed = i ? second_seed : 5;
        c[i].call.first = i == 0;
        c[i].call.most_ns = 1000000000;
        c[i].call.timeout_ns = count == 2 ? 60000000000 : 50000000;
        c[i].call.result = (struct link_call_result *)device_zeros(sizeof(struct link_call_result));
    }
    for (int i = 0; i < count; i++)
        threads.emplace_back([=] {
            cudaStreamCreateWithFlags(&c[i].stream, cudaStreamNonBlocking);
            if (launch_link_call(&c[i].call, c[i].stream) == cudaSuccess)
                cudaStreamSynchronize(c[i].stream);
            cudaStreamDestroy(c[i].stream);
        });
    for (std::thread &t : threads)
        t.join();
    for (int i = 0; i < 2; i++)
        cudaFree(area[i]);
}

static void test_calls(void **)
{
    struct caller c[2];
    run_callers(c, 1, 3, 6, 6); // nobody is there; and the kernel is loaded before two of them wait for each other
    assert_int_equal(c[0].call.result->rounds, 0);
    assert_int_equal(c[0].call.result->missed, 1);
    cudaFree(c[0].call.result);
    for (uint32_t words : {0u, 5u, (uint32_t)LINK_CALL_WORDS}) {
        run_callers(c, 2, words, 20, 5);
        for (auto &i : c) {
            assert_int_equal(i.call.result->rounds, 20);
            assert_int_equal(i.call.result->missed, 0);
            assert_int_equal(i.call.result->wrong, 0);
            assert_true(i.call.result->ns > 0);
            cudaFree(i.call.result);
        }
    }
    run_callers(c, 2, 3, 6, 6); // who speaks of other things is heard
    for (auto &i : c) {
        assert_int_equal(i.call.result->wrong, 18);
        cudaFree(i.call.result);
    }
    struct link_call call = {};
    call.rounds = 1;
    call.words = LINK_CALL_WORDS + 1;
    assert_int_equal(launch_link_call(&call, 0), cudaErrorInvalidValue);
}

int main(void)
{
    setenv("CUDA_MODULE_LOADING", "EAGER", 1); // kernels of two threads wait for each other
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_write_and_read),
        cmocka_unit_test(test_calls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

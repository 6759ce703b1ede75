// The kernels of the probe of links: writing, reading, kernels that call each other from two streams, and copies with a word behind each.
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

enum { HAND_ROUNDS = 7, HAND_WORDS = LINK_HAND_BYTES / 4 };

// What one device gives and the other one takes, in streams of two threads; either alone is in vain.
struct hands {
    struct link_hand give, take;
    uint8_t *area[2], *place;
    uint32_t *sent;
    struct link_hand_result *result; // of who gives, of who takes
};

static void make_hands(struct hands *h, uint32_t seed, uint64_t timeout_ns)
{
    h->give = {};
    h->place = (uint8_t *)device_zeros(LINK_HAND_BYTES);
    h->sent = device_array<uint32_t>(HAND_WORDS + link_hand_first(HAND_ROUNDS));
    h->result = (struct link_hand_result *)device_zeros(2 * sizeof(struct link_hand_result));
    for (uint8_t *&area : h->area)
        area = (uint8_t *)device_zeros(LINK_CALL_BYTES);
    h->give.rounds = HAND_ROUNDS;
    h->give.words[0] = 4;
    h->give.words[1] = HAND_WORDS;
    h->give.words[2] = 1000;
    h->give.timeout_ns = timeout_ns;
    h->give.place = h->place;
    h->give.seed = 9;
    h->take = h->give;
    h->take.seed = seed;
    for (int i = 0; i < 2; i++) {
        struct link_hand *hand = i ? &h->take : &h->give;
        hand->own = h->area[i];
        hand->other = h->area[1 - i];
        hand->result = h->result + i;
    }
    assert_int_equal(launch_link_write(h->sent, HAND_WORDS + link_hand_first(HAND_ROUNDS), 9, 0), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

static void free_hands(const struct hands *h)
{
    for (void *memory : {(void *)h->place, (void *)h->sent, (void *)h->result, (void *)h->area[0], (void *)h->area[1]})
        assert_int_equal(cudaFree(memory), cudaSuccess);
}

static void give(const struct hands *h)
{
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (uint32_t round = 1; round <= HAND_ROUNDS; round++) {
        launch_link_await(&h->give, round, stream);
        cudaMemcpyAsync(h->place, h->sent + link_hand_first(round), 4 * link_hand_words(&h->give, round),
                        cudaMemcpyDeviceToDevice, stream);
        launch_link_post(&h->give, round, stream);
    }
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
}

static void take(const struct hands *h)
{
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    launch_link_take(&h->take, stream);
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
}

static void test_hands(void **)
{
    struct hands h;
    for (uint32_t seed : {9u, 10u}) {
        make_hands(&h, seed, 60000000000);
        std::thread other(give, &h);
        take(&h);
        other.join();
        assert_int_equal(h.result[0].posted, HAND_ROUNDS);
        assert_int_equal(h.result[0].unready, 0);
        assert_int_equal(h.result[1].rounds, HAND_ROUNDS);
        assert_int_equal(h.result[1].missed, 0);
        assert_int_equal(h.result[1].wrong, seed == 9 ? 0 : 3 * 4 + 2 * HAND_WORDS + 2 * 1000);
        free_hands(&h);
    }
    make_hands(&h, 9, 50000000);
    take(&h);
    assert_int_equal(h.result[1].rounds, 0);
    assert_int_equal(h.result[1].missed, 1);
    free_hands(&h);
    make_hands(&h, 9, 50000000);
    give(&h);
    assert_int_equal(h.result[0].unready, 1);
    assert_int_equal(h.result[0].posted, 0);
    free_hands(&h);
}

int main(void)
{
    setenv("CUDA_MODULE_LOADING", "EAGER", 1); // kernels of two threads wait for each other
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_write_and_read),
        cmocka_unit_test(test_calls),
        cmocka_unit_test(test_hands),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

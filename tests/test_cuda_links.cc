// The probe of links (engine/link_probe.c with kernels/cuda/link_probe.*) on emulated devices, whose links are as they should be or have a fault: what each
// fault is called, that the other links stay good, that rates and latencies are there, and that hanging links end in time.
#include "tests/device/cuda_test.h"

extern "C" {
#include "engine/link_probe.h"
#include "kernels/clock.h"
}

extern "C" const struct backend *tpengine_cuda_backend(void);

// ---- links with faults -----------------------------------------------------------------------------------------------

static struct link_probe *probe_devices(int ends, const char *peers, bool all, uint64_t largest_bytes)
{
    struct link_probe *p = NULL;
    struct error err;
    struct link_probe_options options = link_probe_defaults;
    options.backend = tpengine_cuda_backend();
    options.num_ends = options.group = ends;
    options.all = all;
    options.step_s = 2;
    options.largest_bytes = largest_bytes;
    setenv("EMULATED_PEERS", peers, 1);
    if (link_probe_begin(&p, &options, &err))
        fail_msg("%s", err.msg);
    link_probe_wait(p);
    unsetenv("EMULATED_PEERS");
    assert_true(link_probe_is_done(p));
    return p;
}

enum { MESSAGE = 256 << 10 };

static void test_faults(void **)
{
    static const struct {
        const char *peers;
        enum link_fault fault; // of the direction from 0 to 1
        const char *words;
    } cases[] = {
        {"", LINK_GOOD, ""},
        {"0>1:refuse", LINK_REFUSED, "the driver does not let device 0 reach the memory of device 1"},
        {"0>1:mirror", LINK_LOST,
         "what device 0 writes does not arrive in the memory of device 1 (4 of 4 bytes by a kernel)"},
        {"0>1:drop", LINK_LOST, "what device 0 writes does not arrive in the memory of device 1"},
        {"0>1:stale", LINK_STALE, "device 0 does not see what is in the memory of device 1"},
        {"0>1:corrupt", LINK_CHANGED,
         "what device 0 writes arrives changed in the memory of device 1 (1 of 4096 bytes by a kernel; byte"},
        {"0>1:late", LINK_CHANGED,
         "a kernel that runs on device 1 sees the word that device 0 posts behind a copy before the copy has arrived"},
        {"0>1:loose", LINK_CHANGED,
         "a kernel that runs on device 1 sees device 0's word before what was written ahead of it"},
        {"0>1:slow", LINK_SLOW, "GB/s to device 1 by a copy engine, and"},
        {"0>1:hang", LINK_LATE, "a write of 4 bytes by a kernel from device 0 to device 1 did not end within 2."},
    };
    setenv("EMULATED_DEVICES", "3", 1);
    for (auto &c : cases) {
        double begin_s = clock_now_s();
        struct link_probe *p = probe_devices(3, c.peers, true, MESSAGE);
        const struct link_board *board = link_probe_board(p);
        char why[LINK_SENTENCE_BYTES];
        assert_int_equal(link_probe_verdict(p, why), c.fault == LINK_GOOD);
        assert_int_equal(link_probe_delivers(p), c.fault == LINK_GOOD || c.fault == LINK_SLOW);
        for (int a = 0; a < 3; a++)
            for (int b = 0; b < 3; b++) {
                const struct link_result *r = &board->result[a][b];
                bool bad = a == 0 && b == 1 && c.fault != LINK_GOOD;
                enum link_fault want = a == b ? LINK_UNTRIED : bad ? c.fault : LINK_GOOD;
                if (r->fault != (uint32_t)want || !strstr(r->sentence, bad ? c.words : ""))
                    fail_msg("%s, %d to %d: %s, \"%s\"", c.peers, a, b, link_fault_name((enum link_fault)r->fault),
                             r->sentence);
                if (want == LINK_GOOD && !(r->gb_s[LINK_BY_KERNEL] > 0 && r->gb_s[LINK_BY_COPY] > 0))
                    fail_msg("%s, %d to %d: no rate", c.peers, a, b);
                if (want == LINK_GOOD && (c.fault == LINK_GOOD || a + b > 1) && !(r->us > 0))
                    fail_msg("%s, %d to %d: no latency", c.peers, a, b);
                assert_int_equal(r->claimed, a != b && c.fault == LINK_REFUSED ? !bad : a != b);
            }
        if (c.fault != LINK_GOOD)
            assert_string_equal(why, board->result[0][1].sentence);
        for (int end = 0; end < 3 && c.fault == LINK_GOOD; end++) // in the end both of a pair sent copies at once
            assert_true(board->end[end].posts > 0 && board->end[end].posts == board->end[end].calls);
        assert_true(clock_now_s() - begin_s < 60);
        link_probe_end(p);
    }
    unsetenv("EMULATED_DEVICES");
}

// Ranks of one device reach each other's memory too, or do not: there the driver is not asked.
static void test_one_device(void **)
{
    struct link_probe *p = probe_devices(2, "", false, MESSAGE + 1); // the largest that there is, then
    char why[LINK_SENTENCE_BYTES];
    if (!link_probe_verdict(p, why))
        fail_msg("%s", why);
    assert_true(link_probe_board(p)->result[0][1].gb_s[LINK_BY_COPY] > 0);
    assert_string_equal(link_probe_board(p)->end[1].bus, "0000:01:00.0");
    link_probe_end(p);
    p = probe_devices(2, "mirror", false, MESSAGE);
    assert_false(link_probe_verdict(p, why));
    assert_non_null(strstr(why, "what device 0 writes does not arrive in the memory of device 0"));
    link_probe_end(p);
}

// A device that one process at most may use is the ranks': the probe asks, and opens none.
static void test_exclusive_devices(void **)
{
    static const uint8_t none[LINK_HANDLE_BYTES] = {0};
    setenv("EMULATED_DEVICES", "2", 1);
    for (int mode = cudaComputeModeProhibited; mode <= cudaComputeModeExclusiveProcess; mode++)
        for (int all = 0; all < 2; all++) {
            char why[LINK_SENTENCE_BYTES], text[8];
            snprintf(text, sizeof text, "%d", mode);
            setenv("EMULATED_COMPUTE_MODE", text, 1);
            struct link_probe *p = probe_devices(2, "", all, MESSAGE);
            unsetenv("EMULATED_COMPUTE_MODE");
            assert_false(link_probe_verdict(p, why));
            assert_non_null(strstr(why, "the compute mode of device 0 lets one process at most use it"));
            for (int end = 0; end < 2; end++) {
                assert_int_equal(link_probe_board(p)->result[end][!end].fault, LINK_REFUSED);
                assert_memory_equal(link_probe_board(p)->end[end].handle, none, sizeof none);
            }
            link_probe_end(p);
        }
    unsetenv("EMULATED_DEVICES");
}

// The largest message, as ranks do it at their start: it costs little.
static void test_as_ranks_start(void **)
{
    setenv("EMULATED_DEVICES", "2", 1);
    struct link_probe *p = probe_devices(2, "", false, LINK_MOST_BYTES);
    char why[LINK_SENTENCE_BYTES];
    if (!link_probe_verdict(p, why))
        fail_msg("%s", why);
    link_probe_end(p);
    unsetenv("EMULATED_DEVICES");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_one_device),
        cmocka_unit_test(test_exclusive_devices),
        cmocka_unit_test(test_as_ranks_start),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

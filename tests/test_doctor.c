// The doctor's probes: bodies that end, hang, die or leave processes behind; and NVML as a stand-in that this program itself is:
// pairs that can, that cannot, cards that are kept from us, and a library that hangs.
#include "engine/doctor.h"
#include "kernels/clock.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include <cmocka.h>

// ---- NVML's stand-in: found by its names in this program ---------------------------------------------------------------

struct fake_memory {
    unsigned long long total, free, used;
};
static int fake_init_status, fake_hang;
int nvmlInit_v2(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device);
int nvmlDeviceGetName(const void *device, char *name, unsigned bytes);
int nvmlDeviceGetMemoryInfo(const void *device, struct fake_memory *memory);
int nvmlDeviceGetP2PStatus(const void *a, const void *b, int caps, int *status);

static char devices[] = "ABCD"; // a device is a pointer to its letter

int nvmlInit_v2(void) { return fake_init_status; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
    if (bus[6] > '4')
        return 6; // not found
    *device = &devices[bus[6] - '1'];
    return 0;
}

int nvmlDeviceGetName(const void *device, char *name, unsigned bytes)
{
    snprintf(name, bytes, "NVIDIA GeForce RTX %c090", *(const char *)device);
    return 0;
}

int nvmlDeviceGetMemoryInfo(const void *device, struct fake_memory *memory)
{
    memory->total = (unsigned long long)(*(const char *)device - 'A' + 1) << 30;
    return *(const char *)device == 'D'; // fails for the last
}

// A and B can; A and C can read and not write; with D the question fails.
int nvmlDeviceGetP2PStatus(const void *a, const void *b, int caps, int *status)
{
    const char first = *(const char *)a, second = *(const char *)b;
    while (fake_hang)
        pause();
    *status = first + second == 'A' + 'B' ? 0 : first + second == 'A' + 'C' && caps == 0 ? 0 : 3;
    return first == 'D' || second == 'D';
}

static struct doctor_nvml *ask(struct doctor_system *system, double seconds)
{
    struct doctor_nvml *nvml = doctor_probe_new(sizeof *nvml);
    void *self = dlopen(NULL, RTLD_NOW);
    assert_non_null(nvml);
    assert_non_null(self);
    doctor_nvml_read(nvml, system, self, seconds);
    dlclose(self);
    return nvml;
}

static struct doctor_system *new_system(int cards)
{
    struct doctor_system *system = doctor_probe_new(sizeof *system);
    assert_non_null(system);
    system->probe.end = PROBE_DONE;
    system->num_cards = cards;
    system->device_files = true;
    system->shm_bytes = system->memlock_bytes = -1;
    strcpy(system->driver, "550.54.14");
    for (int i = 0; i < cards; i++) {
        system->cards[i].node = system->cards[i].iommu_group = system->cards[i].redirects = -1;
        snprintf(system->cards[i].bus, sizeof system->cards[i].bus, "0000:0%d:00.0", i + 1);
    }
    return system;
}

static void test_nvml(void **state)
{
    (void)state;
    struct doctor_system *system = new_system(5);
    struct doctor_nvml *nvml = ask(system, 60);
    assert_int_equal(nvml->probe.end, PROBE_DONE);
    assert_true(nvml->there);
    assert_int_equal(nvml->p2p[0][1], P2P_CLAIMED);
    assert_int_equal(nvml->p2p[1][0], P2P_CLAIMED);
    assert_int_equal(nvml->p2p[0][2], P2P_REFUSED);
    assert_string_equal(nvml->refused[0][2], "not across this topology");
    assert_int_equal(nvml->p2p[1][2], P2P_REFUSED);
    assert_int_equal(nvml->p2p[0][3], P2P_UNKNOWN);
    assert_int_equal(nvml->p2p[0][4], P2P_UNKNOWN); // the driver keeps that card from us
    assert_int_equal(nvml->p2p[0][0], P2P_UNKNOWN);
    assert_string_equal(nvml->name[1], "NVIDIA GeForce RTX B090");
    assert_string_equal(nvml->name[4], "");
    assert_true(nvml->memory_bytes[2] == 3 * 0x1p30);
    assert_true(nvml->memory_bytes[3] == 0);
    doctor_probe_free(nvml, sizeof *nvml);

    fake_init_status = 9;
    nvml = ask(system, 60);
    assert_non_null(strstr(nvml->probe.err.msg, "NVML does not start (status 9)"));
    assert_int_equal(nvml->p2p[0][1], P2P_UNKNOWN);
    fake_init_status = 0;
    doctor_probe_free(nvml, sizeof *nvml);
    doctor_probe_free(system, sizeof *system);
}

static bool found(const struct doctor_report *report, const char *words, bool hinders)
{
    for (int i = 0; i < report->num_findings; i++)
        if (strstr(report->findings[i].text, words))
            return report->findings[i].hinders == hinders;
    return false;
}

static void test_nvml_that_hangs(void **state)
{
    (void)state;
    struct doctor_system *system = new_system(2);
    fake_hang = 1;
    struct doctor_nvml *nvml = ask(system, 0.3);
    fake_hang = 0;
    assert_int_equal(nvml->probe.end, PROBE_LATE);
    assert_string_equal(nvml->name[1], "NVIDIA GeForce RTX B090"); // what came before stays
    struct doctor_report *report = calloc(1, sizeof *report);
    assert_non_null(report);
    report->system = system;
    report->nvml = nvml;
    doctor_advice(report);
    assert_true(found(report, "asking the driver through NVML was ended after 0.", true));
    assert_true(found(report, "at nvmlDeviceGetP2PStatus of cards 0 and 1", true));
    free(report);
    doctor_probe_free(nvml, sizeof *nvml);
    doctor_probe_free(system, sizeof *system);
}

// What the driver claims makes ACS and the IOMMU a hindrance: without it no card would write to another anyway.
static void test_claims_and_acs(void **state)
{
    (void)state;
    struct doctor_system *system = new_system(2);
    struct doctor_nvml *nvml = doctor_probe_new(sizeof *nvml);
    struct doctor_report *report = calloc(1, sizeof *report);
    assert_true(nvml && report);
    report->system = system;
    report->nvml = nvml;
    for (int claimed = 0; claimed < 2; claimed++) {
        nvml->p2p[0][1] = nvml->p2p[1][0] = claimed ? P2P_CLAIMED : P2P_REFUSED;
        system->cards[1].redirects = 1;
        system->iommu_groups = 3;
        doctor_advice(report);
        assert_true(found(report, "ACS sends", claimed));
        assert_true(found(report, "the IOMMU translates", false)); // one thing at a time
        system->cards[1].redirects = -1;
        doctor_advice(report);
        assert_false(found(report, "ACS sends", claimed));
        assert_true(found(report, "the IOMMU translates", claimed));
    }
    free(report);
    doctor_probe_free(nvml, sizeof *nvml);
    doctor_probe_free(system, sizeof *system);
}

// Of two cards and three devices, two of them on the cards' buses; freed with free_links.
struct links_report {
    struct doctor_system *system;
    struct doctor_nvml *nvml;
    struct doctor_devices counted;
    struct link_board board;
    struct doctor_report report;
};

static struct links_report *new_links(void)
{
    struct links_report *links = calloc(1, sizeof *links);
    assert_non_null(links);
    links->system = new_system(2);
    links->nvml = doctor_probe_new(sizeof *links->nvml);
    assert_non_null(links->nvml);
    links->counted = (struct doctor_devices){.probe.end = PROBE_DONE, .count = 3};
    links->report.system = links->system;
    links->report.nvml = links->nvml;
    links->report.devices = &links->counted;
    links->report.links = &links->board;
    links->board.num_ends = links->board.group = 3;
    snprintf(links->board.end[0].bus, sizeof links->board.end[0].bus, "0000:02:00.0");
    snprintf(links->board.end[1].bus, sizeof links->board.end[1].bus, "0000:01:00.0");
    links->board.end[2].device = 2;
    for (int a = 0; a < 3; a++)
        for (int b = 0; b < 3; b++)
            links->board.result[a][b].fault = LINK_GOOD;
    return links;
}

static void free_links(struct links_report *links)
{
    doctor_probe_free(links->nvml, sizeof *links->nvml);
    doctor_probe_free(links->system, sizeof *links->system);
    free(links);
}

// Links as they were seen: a driver that claims what is not so hinders, one that refuses does not.
static void test_links_between_devices(void **state)
{
    (void)state;
    struct links_report *links = new_links();
    struct doctor_report *report = &links->report;
    struct link_board *board = &links->board;
    static const struct {
        enum link_fault fault;
        uint32_t claimed, crossing;
        bool hinders;
        const char *words, *absent;
    } cases[] = {
        {LINK_LOST, 1, 0, true, "it is lost, though the driver claims P2P: ranks go through", "other links"},
        {LINK_LATE, 1, 1, true, "NCCL_P2P_DISABLE=1", "other links"},
        {LINK_LATE, 1, 0, true, "it is lost: ranks go through the host's memory instead", "claims"},
        {LINK_FAILED, 1, 0, true, "it is lost: ranks go through the host's memory instead", "claims"},
        {LINK_FAILED, 0, 0, true, "it is lost: ranks go through the host's memory instead", "claims"},
        {LINK_REFUSED, 0, 0, false, "it is lost: ranks go through the host's memory, which needs no P2P", "claims"},
        {LINK_GOOD, 1, 0, false, NULL, "it is lost"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        board->result[1][2].fault = (uint32_t)cases[i].fault;
        board->result[1][2].claimed = cases[i].claimed;
        board->result[1][2].crossing = cases[i].crossing;
        snprintf(board->result[1][2].sentence, sizeof board->result[1][2].sentence, "it is lost");
        doctor_advice(report);
        if (cases[i].words && !found(report, cases[i].words, cases[i].hinders))
            fail_msg("case %zu: %s", i, report->num_findings ? report->findings[0].text : "nothing found");
        for (int f = 0; f < report->num_findings; f++)
            assert_null(strstr(report->findings[f].text, cases[i].absent));
    }
    board->result[0][1].fault = LINK_FAILED; // found before the others, and no lie
    board->result[0][1].claimed = board->result[2][0].claimed = 1;
    board->result[1][2].fault = board->result[2][0].fault = LINK_STALE;
    doctor_advice(report);
    assert_true(found(report, "(and other links are no better)", true));
    free_links(links);
}

// Ends are named as the cards on their buses; devices that could not be counted hinder.
static void test_names_and_counts(void **state)
{
    (void)state;
    struct links_report *links = new_links();
    struct doctor_report *report = &links->report;
    static const char *const names[] = {"GPU1", "GPU0", "device 2"};
    for (int end = 0; end < 3; end++) {
        char name[DOCTOR_END_BYTES];
        doctor_end_name(name, report, end);
        assert_string_equal(name, names[end]);
    }
    links->counted.probe.end = PROBE_LATE;
    links->counted.probe.seconds = 5;
    snprintf(links->counted.probe.at, sizeof links->counted.probe.at, "the start of the driver");
    doctor_advice(report);
    assert_true(found(report, "counting the devices was ended after 5.0 s, at the start of the driver", true));
    free_links(links);
}

// ---- bodies ------------------------------------------------------------------------------------------------------------

struct trial {
    struct probe probe;
    pid_t left; // a process that the body has started
    int reached;
};

static void ends(struct probe *probe, void *arg)
{
    ((struct trial *)(void *)probe)->reached = *(int *)arg;
    probe->at[0] = 0;
}

static void hangs(struct probe *probe, void *arg)
{
    (void)arg;
    struct trial *trial = (struct trial *)(void *)probe;
    snprintf(probe->at, sizeof probe->at, "the third step");
    signal(SIGTERM, SIG_IGN);
    trial->left = fork();
    for (;;)
        pause();
}

static void dies(struct probe *probe, void *arg)
{
    (void)arg;
    snprintf(probe->at, sizeof probe->at, "a bad place");
    raise(SIGKILL);
}

static void fails(struct probe *probe, void *arg)
{
    (void)arg;
    error_set(&probe->err, ERR_IO, "no such thing");
}

static void fills_at(struct probe *probe, void *arg)
{
    (void)arg;
    memset(probe->at, 'x', sizeof probe->at); // as one that was killed in the middle of it
    raise(SIGKILL);
}

static void test_bodies(void **state)
{
    (void)state;
    static const struct {
        void (*body)(struct probe *probe, void *arg);
        double seconds;
        enum probe_end end;
        const char *sentence;
    } cases[] = {
        {ends, 60, PROBE_DONE, "ended"},
        {hangs, 0.2, PROBE_LATE, "was ended after 0."},
        {dies, 60, PROBE_DIED, "at a bad place: it was ended by signal 9"},
        {fails, 60, PROBE_DONE, "no such thing"},
        {fills_at, 60, PROBE_DIED, "at xxxxxxxx"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct trial *trial = doctor_probe_new(sizeof *trial);
        char sentence[PROBE_SENTENCE_BYTES];
        int word = 77;
        double begin_s = clock_now_s();
        assert_non_null(trial);
        doctor_probe_run(&trial->probe, cases[i].body, &word, cases[i].seconds);
        assert_true(clock_now_s() - begin_s < 30);
        assert_int_equal(trial->probe.end, cases[i].end);
        assert_int_equal(trial->reached, cases[i].body == ends ? 77 : 0);
        doctor_probe_sentence(sentence, &trial->probe);
        if (!strstr(sentence, cases[i].sentence))
            fail_msg("case %zu: \"%s\" lacks \"%s\"", i, sentence, cases[i].sentence);
        // What a body has started ends with it; who is nobody's child any more is reaped by init, sooner or later.
        for (int tries = 0; trial->left > 0 && kill(trial->left, 0) == 0 && tries < 2000; tries++) {
            char path[64], text[256] = "";
            snprintf(path, sizeof path, "/proc/%d/stat", trial->left);
            FILE *f = fopen(path, "re");
            if (f) {
                size_t got = fread(text, 1, sizeof text - 1, f);
                text[got] = 0;
                fclose(f);
            }
            if (strstr(text, ") Z "))
                break;
            assert_true(tries < 1999);
            usleep(10000);
        }
        doctor_probe_free(trial, sizeof *trial);
    }
}

// ---- exchanges -----------------------------------------------------------------------------------------------------------

static void test_measured_in_time(void **state)
{
    (void)state;
    struct doctor_times *times = doctor_probe_new(sizeof *times);
    assert_non_null(times);
    for (int transport = TRANSPORT_SHM; transport <= TRANSPORT_TCP; transport++) {
        memset(times, 0, sizeof *times);
        doctor_links_measure(times, (enum transport)transport, 3, 100);
        if (times->probe.end != PROBE_DONE || times->probe.err.code)
            fail_msg("%s: %s", transport_name((enum transport)transport), times->probe.err.msg);
        for (int i = 0; i < DOCTOR_SIZES; i++)
            assert_true(times->us[i] > 0 && times->us[i] < 1e8);
    }
    memset(times, 0, sizeof *times);
    doctor_links_measure(times, TRANSPORT_SHM, 3, 0.01); // less than the first sizes take
    assert_int_equal(times->probe.end, PROBE_LATE);
    assert_true(times->us[DOCTOR_SIZES - 1] == 0);
    memset(times, 0, sizeof *times);
    doctor_links_measure(times, TRANSPORT_NCCL, 2, 1);
    assert_int_equal(times->probe.err.code, ERR_USAGE);
    doctor_probe_free(times, sizeof *times);
}

// ---- exchanges between devices: a backend of the host's memory, whose sums are right, wrong or late ------------------

enum { RIGHT, WRONG, FAILS_ON_1, LATE, SLOW_TO_LEND };
enum { LEND_US = 20000 };
static int fake_mode;
struct device {
    int rank, tp_size;
    int64_t rows;
    float data[512][DOCTOR_COLS];
    float squares[512][2];
};

static int fake_open(struct device **out, const struct device_options *options, struct error *err)
{
    if (fake_mode == FAILS_ON_1 && options->rank == 1)
        return error_set(err, ERR_GPU, "device %d is lost", options->device);
    *out = calloc(1, sizeof **out);
    assert_non_null(*out);
    (*out)->rank = options->rank;
    (*out)->tp_size = options->tp_size;
    return 0;
}

static void fake_close(struct device *d) { free(d); }

static int fake_prepare(struct device *d, const struct device_shape *shape, const struct weights *weights,
                        struct error *err)
{
    (void)d, (void)weights, (void)err;
    assert_true(shape->max_rows <= 512 && shape->desc->hidden_size == DOCTOR_COLS);
    return 0;
}

static int fake_begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
                      const struct kv_pages *pages, struct error *err)
{
    (void)rows, (void)pages, (void)err;
    assert_int_equal(phase, count == 1 ? PHASE_DECODE : PHASE_PREFILL);
    d->rows = count;
    return 0;
}

static int fake_lend(struct device *d, enum buffer buffer, bool overwrite, float **host, struct error *err)
{
    (void)overwrite, (void)err;
    if (fake_mode == SLOW_TO_LEND && buffer == BUFFER_PARTIAL)
        usleep(LEND_US);
    *host = buffer == BUFFER_PARTIAL ? d->data[0] : d->squares[0];
    return 0;
}

static int fake_returned(struct device *d, enum buffer buffer, struct error *err)
{
    (void)d, (void)buffer, (void)err;
    return 0;
}

static uint64_t fake_exchange_bytes(int tp_size) { return tp_size > 4 ? 0 : 4096; }

static int fake_exchange_open(struct device *d, const struct exchange_options *options, struct error *err)
{
    (void)d, (void)err;
    assert_int_equal(options->transport, TRANSPORT_HOST);
    return 0;
}

// Behind the first sum every rank has the same.
static int fake_all_reduce(struct device *d, enum buffer buffer, const struct exchange_choice *choice, bool feedback,
                           int operation, int layer, struct error *err)
{
    (void)buffer, (void)operation, (void)err;
    assert_false(feedback);
    assert_int_equal(choice->algorithm, d->rows == 1 ? ALGORITHM_ONE_SHOT : ALGORITHM_CHUNKS);
    while (fake_mode == LATE && d->rows == 512)
        pause();
    for (int64_t row = 0; row < d->rows; row++)
        for (int64_t col = 0; col < DOCTOR_COLS; col++) {
            float sum = 0;
            for (int rank = 0; rank < d->tp_size; rank++)
                sum += layer > 0 ? d->data[row][col] : doctor_value(rank, col);
            d->data[row][col] = sum + (float)(fake_mode == WRONG && d->rank == 1 && row == 63 && col == 8191);
        }
    return 0;
}

static void test_devices_measured(void **state)
{
    (void)state;
    static const struct backend backend = {.abi = BACKEND_ABI,
                                           .name = "fake",
                                           .open = fake_open,
                                           .close = fake_close,
                                           .prepare = fake_prepare,
                                           .begin = fake_begin,
                                           .lend = fake_lend,
                                           .returned = fake_returned,
                                           .exchange_bytes = fake_exchange_bytes,
                                           .exchange_open = fake_exchange_open,
                                           .all_reduce = fake_all_reduce};
    static const struct {
        int mode;
        const char *problem;
        int sizes; // that are measured
    } cases[] = {
        {RIGHT, NULL, DOCTOR_SIZES},
        {WRONG,
         "a sum of 2 ranks over host is wrong on device 1: value 8191 of row 63 is 32 instead of 31; --transport shm "
         "does without",
         1},
        {FAILS_ON_1, "device 1 is lost", 0},
        {LATE, NULL, 3},
        {SLOW_TO_LEND, NULL, DOCTOR_SIZES},
    };
    struct doctor_times *times = doctor_probe_new(sizeof *times);
    assert_non_null(times);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memset(times, 0, sizeof *times);
        fake_mode = cases[i].mode;
        doctor_devices_measure(times, &backend, NULL, TRANSPORT_HOST, 2, 3, fake_mode == LATE ? 5 : 100);
        assert_int_equal(times->probe.end, fake_mode == LATE ? PROBE_LATE : PROBE_DONE);
        if (cases[i].problem)
            assert_string_equal(times->probe.err.msg, cases[i].problem);
        else
            assert_int_equal(times->probe.err.code, 0);
        for (int size = 0; size < DOCTOR_SIZES; size++)
            if ((times->us[size] > 0) != (size < cases[i].sizes))
                fail_msg("case %zu, size %d: %g us", i, size, times->us[size]);
        if (fake_mode == SLOW_TO_LEND && !(times->us[0] < LEND_US / 4.0)) // that the sums are looked at takes no part
            fail_msg("%g us, with the time of looking at the sums", times->us[0]);
    }
    memset(times, 0, sizeof *times);
    doctor_devices_measure(times, &backend, NULL, TRANSPORT_HOST, 5, 5, 1);
    assert_int_equal(times->probe.err.code, ERR_USAGE);
    doctor_probe_free(times, sizeof *times);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nvml),
        cmocka_unit_test(test_nvml_that_hangs),
        cmocka_unit_test(test_claims_and_acs),
        cmocka_unit_test(test_links_between_devices),
        cmocka_unit_test(test_names_and_counts),
        cmocka_unit_test(test_bodies),
        cmocka_unit_test(test_measured_in_time),
        cmocka_unit_test(test_devices_measured),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

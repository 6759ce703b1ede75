// Sums over ranks whose devices write to each other's memory, each rank a process of its own (CUDA IPC), in the emulator: the bits of the CPU's sums; ranks
// that are killed at any time; links that lose what is written, hang, or are not there; and an end that waits for those who may still write.
#include "tests/device/exchange_ends.h"

#include <signal.h>
#include <sys/wait.h>

enum {
    LONG_MS = 120000, // of waits that are to end
    END_S = 60,       // of ranks after a failure
    KILL_ROUNDS = 10, // or P2P_KILL_ROUNDS
    SLEEP_MS = 400,
};

static const struct way apart = {TRANSPORT_P2P, TEST_RANKS}, shared = {TRANSPORT_P2P, 1};

// ---- processes -----------------------------------------------------------------------------------------------------

// What a rank says before it ends, in memory that all share.
struct report {
    volatile uint32_t sums; // so many have been computed
    int rc;                 // of the last call
    bool told;              // the device wrote down whom it waited for
    struct exchange_failure failure;
    size_t kept; // of the device's memory, where it could not open
    char text[256];
};

struct team {
    struct group group;
    struct report *reports; // [TEST_RANKS]
    pid_t pids[TEST_RANKS];
    int status[TEST_RANKS];
};

typedef void rank_fn(struct end *e, struct report *report, int argument);

// rank unpinned can pin nothing.
static void start(struct team *t, const struct way *way, int tp_size, int timeout_ms, rank_fn *fn, int argument,
                  int unpinned = -1)
{
    size_t bytes = TEST_RANKS * sizeof *t->reports;
    open_group(&t->group, way, tp_size, timeout_ms, false);
    t->group.host_timeout_ms = LONG_MS; // ranks may open late on a busy machine
    t->reports = (struct report *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fflush(stdout);
    for (int r = 0; r < tp_size; r++) {
        t->pids[r] = fork();
        assert_true(t->pids[r] >= 0);
        if (t->pids[r] > 0)
            continue;
        static struct end e;
        size_t before, after, total;
        begin_end(&e, &t->group, r);
        if (r == unpinned)
            setenv("EMULATED_LOCKED", "1", 1);
        cudaSetDevice(r % devices_of(&t->group));
        cudaMemGetInfo(&before, &total);
        if (open_end(&e)) {
            fn(&e, &t->reports[r], argument);
        } else {
            cudaMemGetInfo(&after, &total);
            t->reports[r].rc = ERR_GPU;
            t->reports[r].kept = before - after;
        }
        snprintf(t->reports[r].text, sizeof t->reports[r].text, "%s", e.wrong.c_str());
        close_end(&e);
        _exit(0);
    }
}

// Waits for a rank's end; false: it has none in time.
static bool has_ended(struct team *t, int rank)
{
    for (int64_t begin_ns = clock_now_ns(); clock_now_ns() - begin_ns < END_S * (int64_t)1000000000; usleep(2000)) {
        pid_t pid = waitpid(t->pids[rank], &t->status[rank], WNOHANG);
        if (pid == t->pids[rank])
            return true;
    }
    return false;
}

static void kill_rank(struct team *t, int rank)
{
    kill(t->pids[rank], SIGKILL);
    waitpid(t->pids[rank], &t->status[rank], 0);
}

static void finish_team(struct team *t)
{
    munmap(t->reports, TEST_RANKS * sizeof *t->reports);
    close_group(&t->group);
}

// All ranks but `but` end in time, by themselves.
static void expect_ends(struct team *t, int but, const char *what)
{
    for (int r = 0; r < t->group.tp_size; r++) {
        if (r == but)
            continue;
        if (!has_ended(t, r))
            fail_msg("%s: rank %d has no end", what, r);
        if (t->status[r] != 0)
            fail_msg("%s: rank %d ended with status %x", what, r, (unsigned)t->status[r]);
    }
}

// ---- sums ----------------------------------------------------------------------------------------------------------

static void run_sums(struct end *e, struct report *report, int argument)
{
    static const struct {
        int64_t rows, cols;
    } shapes[] = {{1, 1024}, {9, 257}, {40, 384}, {4096, 64}};
    std::vector<uint16_t> none;
    uint64_t message = 0;
    (void)report;
    for (const auto &s : shapes)
        for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++)
            for (int wire = 0; wire < WIRE_COUNT; wire++) {
                // Of long messages one each; eight ranks are many for the emulator.
                if ((algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed((enum wire)wire)) || // never together
                    (s.rows > 100 && (wire != algorithm || e->group->tp_size > 2)) ||
                    (e->group->tp_size == 8 && (s.rows > 10 || wire % 2)))
                    continue;
                uint64_t chunk_rows = s.rows > 100 ? 512 : 4;
                struct exchange_choice choice = {(enum exchange_algorithm)algorithm, (enum wire)wire,
                                                 2 * chunk_rows * (uint64_t)s.cols};
                check_sum(e, message + (uint64_t)argument, s.rows, s.cols, choice, false, none);
                message++;
            }
}

static void check_sums(const struct way *way, int tp_size)
{
    struct team t;
    start(&t, way, tp_size, LONG_MS, run_sums, 100 * tp_size);
    expect_ends(&t, -1, "sums");
    for (int r = 0; r < tp_size; r++)
        if (t.reports[r].text[0])
            fail_msg("%s", t.reports[r].text);
    finish_team(&t);
}

static void test_sums(void **state)
{
    (void)state;
    for (int tp_size : {2, 4, 8})
        check_sums(&apart, tp_size);
    check_sums(&shared, 3);
}

// ---- ranks that are killed -----------------------------------------------------------------------------------------

// Sums without an end, and halves, of all algorithms in turn, from the one that is named.
static void run_on(struct end *e, struct report *report, int argument)
{
    struct error err;
    e->desc.hidden_size = 256;
    e->device.count = 12;
    memset(e->device.buffer[BUFFER_PARTIAL], 0, 12 * 256 * 4);
    for (uint64_t i = (uint64_t)argument; report->rc == 0; i++) {
        enum exchange_algorithm algorithm = (enum exchange_algorithm)(i % 3);
        struct exchange_choice choice = {algorithm, algorithm != ALGORITHM_ONE_SHOT && i % 2 ? WIRE_S8X : WIRE_BF16,
                                         4 * 256};
        report->rc = exchange_all_reduce(&e->device, BUFFER_PARTIAL, &choice, false, OP_MLP, 5, &err);
        report->rc = report->rc ? report->rc : exchange_flush(&e->device, &err);
        struct dealt_rows rows = {(int64_t)(i % 2), 11, (int)(i % (uint64_t)e->group->tp_size)};
        report->rc = report->rc ? report->rc
                                : exchange_reduce_scatter_rows(&e->device, BUFFER_PARTIAL, &rows, &choice, false,
                                                               OP_MLP, 5, &err);
        report->rc = report->rc ? report->rc
                                : exchange_all_gather_rows(&e->device, BUFFER_PARTIAL, &rows, &choice, OP_MLP, 5, &err);
        report->rc = report->rc ? report->rc : device_wait(&e->device, "a sum", &err);
        report->sums++;
    }
    report->told = e->device.exchange->record->told;
    report->failure = e->failure;
    comm_region_abort(e->group->comm_region, e->rank, &err); // nobody waits for this rank any more
}

// A rank dies; whoever watches it says so to the others, hosts and devices. They were in any phase, or still opening.
static void test_kills(void **state)
{
    (void)state;
    const char *wanted = getenv("P2P_KILL_ROUNDS");
    int rounds = wanted ? atoi(wanted) : KILL_ROUNDS, early = 0;
    for (int round = 0; round < rounds; round++) {
        struct team t;
        struct error why;
        int tp_size = round % 3 == 2 ? 4 : 2, victim = (int)(random_bits() % (uint64_t)tp_size);
        start(&t, round % 2 ? &apart : &shared, tp_size, LONG_MS, run_on, 0);
        uint32_t sums = round % 5 == 0 ? 0 : (uint32_t)(random_bits() % 24); // of the victim before its end
        for (int64_t begin_ns = clock_now_ns();
             t.reports[victim].sums < sums && clock_now_ns() - begin_ns < END_S * (int64_t)1000000000;)
            usleep(200);
        usleep((useconds_t)(random_bits() % 20000));
        early += t.reports[victim].sums == 0;
        kill_rank(&t, victim);
        error_set(&why, ERR_RANK, "rank %d was killed", victim);
        comm_region_abort(t.group.comm_region, victim, &why);
        uint32_t *word = (uint32_t *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, t.group.memory, 0);
        __atomic_store_n(word, 1, __ATOMIC_RELEASE);
        munmap(word, 4096);
        expect_ends(&t, victim, "a killed rank");
        for (int r = 0; r < tp_size; r++)
            if (r != victim && t.reports[r].rc == 0)
                fail_msg("round %d: rank %d did not find that rank %d was killed", round, r, victim);
        finish_team(&t);
    }
    print_message("%d ranks killed, %d of them before their first sum\n", rounds, early);
}

// ---- links ---------------------------------------------------------------------------------------------------------

// What rank 1 writes to rank 0 does not arrive: waits end in time, and it is said for whom they were. A rank whose own writes hang ends as well.
static void test_faults(void **state)
{
    (void)state;
    for (const char *setting : {"1>0:drop", "1>0:mirror", "1>0:hang"}) {
        struct team t;
        setenv("EMULATED_PEERS", setting, 1);
        start(&t, &apart, 2, 2000, run_on, ALGORITHM_ONE_SHOT);
        expect_ends(&t, -1, setting);
        // Rank 1 goes on to the next phase and waits for rank 0 there: whose time is up first tells.
        bool told = false;
        for (int r = 0; r < 2; r++) {
            const struct report *report = &t.reports[r];
            told = told || report->told;
            if (report->rc != ERR_RANK ||
                (report->told &&
                 (report->failure.whom != 1 - r || report->failure.layer != 5 || report->failure.operation != OP_MLP ||
                  (int32_t)(report->failure.expected - report->failure.seen) <= 0)))
                fail_msg("%s: rank %d: %d, %s, rank %d, layer %d: %s", setting, r, report->rc,
                         report->told ? "told" : "not told", report->failure.whom, report->failure.layer, report->text);
        }
        if (!told)
            fail_msg("%s: nobody told", setting);
        finish_team(&t);
    }
    unsetenv("EMULATED_PEERS");
}

// Nothing that a rank writes to another one ends: no kernel that waits ever runs, and the hosts find it.
static void test_all_hang(void **state)
{
    (void)state;
    setenv("EMULATED_PEERS", "hang", 1);
    for (int algorithm : {ALGORITHM_ONE_SHOT, ALGORITHM_CHUNKS}) {
        struct team t;
        int first = 0;
        start(&t, &apart, 2, 500, run_on, algorithm);
        expect_ends(&t, -1, algorithm_names[algorithm]);
        for (int r = 0; r < 2; r++) {
            const struct report *report = &t.reports[r];
            first += report->failure.whom == -1 && report->failure.operation == -1;
            if (report->rc != ERR_RANK || report->told)
                fail_msg("%s: rank %d: %d, %s: %s", algorithm_names[algorithm], r, report->rc,
                         report->told ? "told" : "not told", report->text);
        }
        if (first != 1)
            fail_msg("%s: %d hosts said that the device comes no further", algorithm_names[algorithm], first);
        finish_team(&t);
    }
    unsetenv("EMULATED_PEERS");
}

// No way to the memory: all ranks say the same, and nobody waits.
static void test_no_access(void **state)
{
    (void)state;
    struct team t;
    setenv("EMULATED_PEERS", "2>1:refuse", 1);
    start(&t, &apart, 3, LONG_MS, run_on, 0);
    expect_ends(&t, -1, "no access");
    for (int r = 0; r < 3; r++) {
        assert_non_null(
            strstr(t.reports[r].text, "rank 2's device (0000:03:00.0) cannot write to the memory of rank 1's"));
        assert_non_null(strstr(t.reports[r].text, "--transport host does without"));
    }
    finish_team(&t);
    unsetenv("EMULATED_PEERS");
}

// ---- the end -------------------------------------------------------------------------------------------------------

// Rank 0 closes at once, rank 1 later: until then there is what rank 1 might write to.
static void run_to_end(struct end *e, struct report *report, int argument)
{
    struct error err;
    size_t before, after, total;
    std::vector<uint16_t> none;
    (void)argument;
    (void)report;
    for (int algorithm = ALGORITHM_ONE_SHOT; algorithm <= ALGORITHM_CHUNKS; algorithm++)
        check_sum(e, 500, 9, 257, {(enum exchange_algorithm)algorithm, WIRE_BF16, 4 * 257}, false, none);
    comm_barrier(e->comm, &err);
    if (e->rank == 1)
        usleep(SLEEP_MS * 1000);
    cudaMemGetInfo(&before, &total);
    int64_t begin_ns = clock_now_ns();
    exchange_close(&e->device);
    cudaMemGetInfo(&after, &total);
    if (after - before < exchange_p2p_bytes(2))
        note(e, "%zu bytes were given back", after - before);
    // It is asleep for as long, less what the two ends may differ by.
    if (e->rank == 0 && clock_now_ns() - begin_ns < SLEEP_MS / 2 * (int64_t)1000000)
        note(e, "the end took %lld us", (long long)(clock_now_ns() - begin_ns) / 1000);
}

static void test_end(void **state)
{
    (void)state;
    struct team t;
    start(&t, &apart, 2, LONG_MS, run_to_end, 0);
    expect_ends(&t, -1, "an end");
    for (int r = 0; r < 2; r++)
        if (t.reports[r].text[0])
            fail_msg("%s", t.reports[r].text);
    finish_team(&t);
}

// Rank 1 can pin nothing, before it has an inbox: the others give theirs back.
static void test_no_opening(void **state)
{
    (void)state;
    struct team t;
    start(&t, &apart, 3, LONG_MS, run_on, 0, 1);
    expect_ends(&t, -1, "no opening");
    for (int r = 0; r < 3; r++)
        if (t.reports[r].rc != ERR_GPU || !strstr(t.reports[r].text, "pinning") ||
            t.reports[r].kept >= exchange_p2p_bytes(3))
            fail_msg("rank %d: %d, %zu bytes kept: %s", r, t.reports[r].rc, t.reports[r].kept, t.reports[r].text);
    finish_team(&t);
}

int main(void)
{
    if (!emulator_present()) {
        puts("SKIP: the ranks' devices are emulated");
        return 0;
    }
    setenv("EMULATED_DEVICES", "8", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums),     cmocka_unit_test(test_kills),     cmocka_unit_test(test_faults),
        cmocka_unit_test(test_all_hang), cmocka_unit_test(test_no_access), cmocka_unit_test(test_no_opening),
        cmocka_unit_test(test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

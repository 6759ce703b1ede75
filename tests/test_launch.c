// The launcher: commands and notices, ranks that start beside other threads and open connections, signals that are the caller's, options.
// Faults: test_launch_faults.c; the parent's end and signals: test_launch_parent.c.
#include "tests/launch_help.h"

#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

// ---- without faults ------------------------------------------------------------------------------------------------

static void test_commands(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    for (int mode = 0; mode < 2; mode++)
        for (int tp_size = 1; tp_size <= 4; tp_size++) {
            struct error err = {0};
            struct launch *launch = start(tp_size, mode, &plan, 0, 0);
            struct area *area = launch_shared(launch);
            expect(launch_wait(launch, -1, &err), 0, &err);
            for (int i = 0; i < 50; i++) {
                expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
                assert_int_equal(launch_post(launch, COMMAND_STEP, &err), ERR_OTHER); // one at a time
                expect(launch_wait(launch, -1, &err), 0, &err);
                int sum_of_ranks = tp_size * (tp_size + 1) / 2;
                for (int rank = 0; rank < tp_size; rank++)
                    assert_true(area->sums[rank] == (float)sum_of_ranks && area->commands[rank] == i + 1);
            }
            assert_int_equal(launch_post(launch, 0, &err), ERR_OTHER);
            expect(launch_wait(launch, -1, &err), 0, &err); // nothing runs, nothing to wait for
            stop(launch);
        }
    launch_stop(NULL, NULL);
}

static void test_notices_and_input(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 200};
    for (int mode = 0; mode < 2; mode++) {
        struct error err = {0};
        struct launch *launch = start(2, mode, &plan, 0, 0);
        struct area *area = launch_shared(launch);
        // Posting before the ranks are there is fine.
        expect(launch_post(launch, COMMAND_NOTIFY, &err), 0, &err);
        int rc, notices = 0;
        while ((rc = launch_wait(launch, -1, &err)) == 1)
            notices++;
        expect(rc, 0, &err);
        assert_int_equal(area->tokens, 200);
        assert_true(notices >= 1 && notices <= 200);

        // Idle with a descriptor: its input ends the wait; a running command and input are both seen.
        int fds[2];
        assert_int_equal(pipe(fds), 0);
        assert_int_equal(write(fds[1], "x", 1), 1);
        expect(launch_wait(launch, fds[0], &err), 2, &err);
        int seen[3] = {0};
        expect(launch_post(launch, COMMAND_NOTIFY, &err), 0, &err);
        while ((rc = launch_wait(launch, fds[0], &err)) > 0)
            seen[rc]++;
        expect(rc, 0, &err);
        assert_true(seen[1] >= 1 && seen[2] >= 1);
        close(fds[0]), close(fds[1]);
        stop(launch);
    }
}

static double rusage_children_and_self_s(void)
{
    double total = 0;
    for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
        struct rusage usage;
        getrusage(who, &usage);
        total += (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                 (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    }
    return total;
}

static void test_idle_ranks_sleep(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    for (int mode = 0; mode < 2; mode++) {
        struct error err = {0};
        double before_s = rusage_children_and_self_s();
        // Idle for longer than both deadlines.
        struct launch *launch = start(2, mode, &plan, 200, 200);
        expect(launch_wait(launch, -1, &err), 0, &err);
        usleep(500000);
        expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
        expect(launch_wait(launch, -1, &err), 0, &err);
        stop(launch);
        double used_s = rusage_children_and_self_s() - before_s;
        print_message("%s: %.1f ms of processor time for a start, 500 ms idle and one command\n", mode_names[mode],
                      used_s * 1e3);
        if (!(used_s < 0.1))
            fail_msg("idle ranks used %.1f ms", used_s * 1e3);
    }
}

// ---- a server's process --------------------------------------------------------------------------------------------

static atomic_bool churning;

static void *churn(void *arg)
{
    // Takes the locks that a fork must find in order: the allocator's and a stream's.
    FILE *out = arg;
    for (unsigned i = 0; atomic_load(&churning); i++) {
        char *piece = malloc(16 + i % 5000);
        piece[0] = (char)i;
        fprintf(out, "%p", (void *)piece);
        free(piece);
    }
    return NULL;
}

// Ranks start while other threads live and connections are open: they end up with none of these, whatever their numbers.
static void test_threads_and_connections(void **state)
{
    (void)state;
    static const struct plan plans[] = {{.faulty_rank = -1, .stage = NOWHERE}, {1, AT_COMPUTE, KILL, .layers = 0}};
    FILE *null = fopen("/dev/null", "w");
    pthread_t threads[2];
    atomic_store(&churning, true);
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, churn, null);
    for (int cycle = 0; cycle < 20; cycle++) {
        struct error err = {0};
        int fds[2], high = 900 + cycle;
        assert_int_equal(pipe(fds), 0);
        assert_int_equal(dup2(fds[1], high), high);
        struct launch *launch = start(2, PROCESSES, &plans[cycle % 2], 5000, 5000);
        expect(launch_wait(launch, -1, &err), 0, &err);
        close(fds[1]), close(high);
        char byte;
        struct pollfd end = {.fd = fds[0], .events = POLLIN};
        assert_int_equal(poll(&end, 1, 1000), 1);
        assert_int_equal(read(fds[0], &byte, 1), 0); // no rank holds the other end
        expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
        expect(launch_wait(launch, -1, &err), cycle % 2 ? ERR_RANK : 0, &err);
        stop(launch);
        close(fds[0]);
    }
    atomic_store(&churning, false);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    fclose(null);
}

static volatile sig_atomic_t own_signals;
static void on_own_signal(int number) { own_signals += number == SIGTERM; }

static void test_signals_left_alone(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE};
    struct launch_options options = {
        .tp_size = 2, .leave_signals = true, .comm_max_elems = 4096, .shared_bytes = sizeof(struct area)};
    struct sigaction own = {.sa_handler = on_own_signal}, before;
    struct launch *launch = NULL;
    struct error err = {0};
    int fds[2];
    sigaction(SIGTERM, &own, &before);
    expect(launch_start(&launch, &options, rank_main, (void *)&plan, &err), 0, &err);
    expect(launch_wait(launch, -1, &err), 0, &err);
    raise(SIGTERM);
    assert_int_equal(own_signals, 1);
    struct area *area = launch_shared(launch);
    kill(area->pids[0], SIGTERM); // as a terminal's or a service manager's whole group gets it
    expect(launch_post(launch, COMMAND_STEP, &err), 0, &err);
    expect(launch_wait(launch, -1, &err), 0, &err);
    assert_int_equal(launch_pid(launch, 1), area->pids[1]);
    double end_s = clock_now_s() + 1;
    while (launch_position(launch, 1).op != OP_IDLE && clock_now_s() < end_s)
        usleep(100);
    assert_int_equal(launch_position(launch, 1).op, OP_IDLE);
    assert_int_equal(pipe(fds), 0);
    assert_int_equal(write(fds[1], "x", 1), 1);
    expect(launch_wait(launch, fds[0], &err), 2, &err);
    close(fds[0]), close(fds[1]);
    stop(launch);
    sigaction(SIGTERM, &before, NULL);
}

static void test_bad_options(void **state)
{
    (void)state;
    struct error err = {0};
    struct launch *launch = NULL;
    static const struct plan plan = {.faulty_rank = -1};
    struct launch_options options = {.tp_size = 0, .comm_max_elems = 100};
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_USAGE);
    options.tp_size = COMM_MAX_RANKS + 1;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_USAGE);
    options.tp_size = 2;
    options.shared_bytes = (size_t)1 << 60;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_MEMORY);
    options.shared_bytes = SIZE_MAX - 100;
    assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_MEMORY);
    assert_null(launch);
}

// A start that fails closes the links that it was given, so that the others see at once that this rank is gone.
static void test_links_of_a_failed_start(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1};
    for (int threads = 0; threads < 2; threads++) {
        struct error err = {0};
        struct launch *launch = NULL;
        int pair[2], links[2] = {-1, -1};
        char byte;
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
        links[1] = pair[0];
        struct launch_options options = {.tp_size = 2, .links = links, .only = 2, .threads = threads};
        assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_USAGE);
        assert_int_equal(links[1], pair[0]);
        options.only = 0;
        options.comm_max_elems = 100;
        options.shared_bytes = (size_t)1 << 60;
        assert_int_equal(launch_start(&launch, &options, rank_main, (void *)&plan, &err), ERR_MEMORY);
        assert_int_equal(links[1], -1);
        assert_int_equal(recv(pair[1], &byte, 1, MSG_DONTWAIT), 0); // its end, not "nothing yet"
        close(pair[1]);
    }
}

int main(void)
{
    prepare_process();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commands),
        cmocka_unit_test(test_notices_and_input),
        cmocka_unit_test(test_idle_ranks_sleep),
        cmocka_unit_test(test_threads_and_connections),
        cmocka_unit_test(test_signals_left_alone),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_links_of_a_failed_start),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

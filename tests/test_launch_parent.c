// The process that launches ranks: it dies, it is interrupted or told to drain, it is stopped and goes on.
#include "tests/launch_help.h"

#include <sys/mman.h>

// ---- the parent ----------------------------------------------------------------------------------------------------

struct family {
    _Atomic int ready;
    _Atomic int pids[8];
    _Atomic int rc;
    _Atomic int stop_rc;
};

static struct family *new_family(void)
{
    struct family *family = mmap(NULL, sizeof *family, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(family != MAP_FAILED);
    return family;
}

enum { UNWATCHED = 100 }; // instead of a command: nobody waits for the ranks

// A process that launches ranks and runs one command for a second.
static pid_t fork_parent(struct family *family, int command, const struct plan *plan, int wait_timeout_ms)
{
    pid_t parent = fork();
    assert_true(parent >= 0);
    if (parent > 0)
        return parent;
    setpgid(0, 0);
    alarm(20); // whatever goes wrong, the test goes on
    struct error err = {0};
    struct launch *launch = start(2, PROCESSES, plan, 1000, wait_timeout_ms);
    struct area *area = launch_shared(launch);
    if (command != UNWATCHED && launch_wait(launch, -1, &err))
        _exit(99);
    for (int rank = 0; rank < 2; rank++) {
        while (!area->pids[rank])
            usleep(1000);
        family->pids[rank] = area->pids[rank];
    }
    if (command && command != UNWATCHED && launch_post(launch, command, &err))
        _exit(99);
    family->ready = 1;
    if (command == UNWATCHED) {
        sleep(10);
        _exit(98);
    }
    int fds[2];
    if (pipe(fds))
        _exit(99);
    family->rc = launch_wait(launch, command ? -1 : fds[0], &err);
    if (family->rc == ERR_SIGTERM) // drain
        family->rc = launch_wait(launch, command ? -1 : fds[0], &err) ? 1 : ERR_SIGTERM;
    family->stop_rc = launch_stop(launch, &err);
    _exit(0);
}

static void wait_until_ready(struct family *family)
{
    for (int i = 0; i < 5000 && !family->ready; i++)
        usleep(1000);
    assert_int_equal(family->ready, 1);
}

// R4: the parent is killed, while its ranks idle and while they work.
static void test_killed_parent(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 500};
    for (int command = 0; command <= COMMAND_LONG; command += COMMAND_LONG) {
        struct family *family = new_family();
        pid_t parent = fork_parent(family, command, &plan, 10000);
        wait_until_ready(family);
        usleep(20000);
        double start_s = clock_now_s();
        kill(parent, SIGKILL);
        int pids[2] = {family->pids[0], family->pids[1]}, status;
        for (int i = 0; i < 3; i++)
            if (waitpid(-1, &status, 0) < 0)
                fail_msg("%d processes were left of 3", i);
        double took_s = clock_now_s() - start_s;
        expect_all_gone(pids, 2, 0);
        print_message("parent killed, ranks %s: all gone after %.1f ms\n", command ? "working" : "idle", took_s * 1e3);
        if (!(took_s < 1))
            fail_msg("ranks outlived their parent by %.3f s", took_s);
        munmap(family, sizeof *family);
    }
}

static void test_signals(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 50};
    static const struct {
        const char *name;
        int signals[2];
        int command, rc, exit_code;
    } cases[] = {
        {"SIGINT before anybody waits", {SIGINT, 0}, UNWATCHED, 0, 130},
        {"SIGINT while idle", {SIGINT, 0}, 0, ERR_SIGINT, 0},
        {"SIGINT in a command", {SIGINT, 0}, COMMAND_LONG, ERR_SIGINT, 0},
        {"SIGTERM and drain", {SIGTERM, 0}, COMMAND_LONG, ERR_SIGTERM, 0},
        {"SIGTERM, then SIGINT", {SIGTERM, SIGINT}, COMMAND_LONG, ERR_SIGTERM, 130},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct family *family = new_family();
        pid_t parent = fork_parent(family, cases[i].command, &plan, 10000);
        wait_until_ready(family);
        double start_s = clock_now_s();
        // To the whole group, as a terminal does: the ranks must not mind.
        kill(-parent, cases[i].signals[0]);
        if (cases[i].signals[1]) {
            usleep(50000);
            kill(-parent, cases[i].signals[1]);
        }
        int status;
        assert_int_equal(waitpid(parent, &status, 0), parent);
        print_message("%s: over after %.1f ms\n", cases[i].name, (clock_now_s() - start_s) * 1e3);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != cases[i].exit_code || family->rc != cases[i].rc ||
            family->stop_rc)
            fail_msg("%s: status %x, launch_wait %d, launch_stop %d", cases[i].name, status, family->rc,
                     family->stop_rc);
        int pids[2] = {family->pids[0], family->pids[1]};
        expect_all_gone(pids, 2, 1);
        munmap(family, sizeof *family);
    }
}

// Ctrl-Z and fg: parent and ranks are stopped together for longer than every deadline, and go on.
static void test_stopped_together(void **state)
{
    (void)state;
    static const struct plan plan = {.faulty_rank = -1, .stage = NOWHERE, .layers = 60};
    struct family *family = new_family();
    pid_t parent = fork_parent(family, COMMAND_LONG, &plan, 300);
    wait_until_ready(family);
    usleep(100000);
    kill(-parent, SIGSTOP);
    sleep_ms(1200);
    kill(-parent, SIGCONT);
    int status;
    assert_int_equal(waitpid(parent, &status, 0), parent);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(family->rc, 0);
    assert_int_equal(family->stop_rc, 0);
    munmap(family, sizeof *family);
}

int main(void)
{
    prepare_process();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_killed_parent),
        cmocka_unit_test(test_signals),
        cmocka_unit_test(test_stopped_together),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

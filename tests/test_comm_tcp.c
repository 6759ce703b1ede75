// Collectives and messages over sockets: the same bits as over shared memory, the volume of the formula, and every way in which
// a rank can be missing: killed, stopped, closed, silent, foreign or of other figures. Each ends all ranks in time, with its name.
#include "engine/comm_frames.h"
#include "engine/comm_tcp.h"
#include "kernels/clock.h"
#include "tests/comm_cases.h"
#include "tests/comm_help.h"
#include "tests/comm_rank_help.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void test_all_operations(void **state)
{
    (void)state;
    static const struct {
        int tp_size, pp_size;
    } grids[] = {{2, 1}, {3, 1}, {4, 1}, {8, 1}, {2, 2}, {1, 3}, {3, 2}};
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++)
        for (int mode = SOCKET_THREADS; mode <= SOCKET_PROCESSES; mode++) {
            int tp_size = grids[i].tp_size, pp_size = grids[i].pp_size;
            struct rank_result *results =
                run_stages((enum mode)mode, tp_size, pp_size, CASES_MESSAGE_BYTES, 30000, comm_cases_all, NULL);
            expect_success(results, tp_size * pp_size, mode_names[mode]);
            print_message("tp %d, pp %d, %s: %.2f s\n", tp_size, pp_size, mode_names[mode], results[0].seconds);
        }
}

// ---- the sender is ahead -----------------------------------------------------------------------------------------------

enum { AHEAD_BYTES = 8 << 20 };

// Two messages of more than any socket holds: the sender computes on, and they arrive meanwhile.
static int ahead_body(struct comm *comm, void *arg, struct error *err)
{
    atomic_int *sent = arg;
    uint8_t *data = malloc(AHEAD_BYTES);
    int rc = 0;
    for (int number = 0; number < 2 && comm_rank(comm) == 0 && !rc; number++) {
        memset(data, 5 + number, AHEAD_BYTES);
        rc = comm_send(comm, data, AHEAD_BYTES, 1, err);
    }
    if (comm_rank(comm) == 0) {
        atomic_store(sent, 1);
        for (int i = 0; i < 3000 && atomic_load(sent) == 1; i++)
            usleep(10000); // no collective, no message
        if (!rc && atomic_load(sent) == 1)
            rc = error_set(err, ERR_OTHER, "the messages waited for their sender");
    } else {
        for (int i = 0; i < 3000 && !atomic_load(sent); i++)
            usleep(10000);
        if (!atomic_load(sent))
            rc = error_set(err, ERR_OTHER, "the sender waited for its receiver");
        for (int number = 0; number < 2 && !rc; number++) {
            rc = comm_receive(comm, data, AHEAD_BYTES, 0, err);
            for (size_t i = 0; i < AHEAD_BYTES && !rc; i++)
                if (data[i] != 5 + number)
                    rc = error_set(err, ERR_OTHER, "byte %zu of message %d is wrong", i, number);
        }
        atomic_store(sent, 2);
    }
    free(data);
    return rc;
}

static void test_sender_is_ahead(void **state)
{
    (void)state;
    for (int mode = SOCKET_THREADS; mode <= SOCKET_PROCESSES; mode++) {
        atomic_int *sent = map_shared(sizeof *sent);
        expect_success(run_stages((enum mode)mode, 1, 2, AHEAD_BYTES, 30000, ahead_body, sent), 2, mode_names[mode]);
        munmap(sent, sizeof *sent);
    }
}

// ---- missing ranks -----------------------------------------------------------------------------------------------------

enum { LOST_TIMEOUT_MS = 1000, GOOD_CALLS = 3 };

struct loss {
    const char *name;
    enum { KILL, STOP, LEAVE, SILENT, FAIL } kind;
    enum { IN_SUM, IN_COMMAND, IN_COMPUTE, IN_MESSAGE } others; // where the others are
    double least_s, most_s;
    int code;
    const char *parts[4];
};

// Rank 1 goes after some good calls. It says nothing more, whatever the others are at.
static int loss_body(struct comm *comm, void *arg, struct error *err)
{
    const struct loss *loss = arg;
    float data[1000] = {1};
    int rank = comm_rank(comm), rc = 0;
    for (int call = 0; call < GOOD_CALLS && !rc; call++) {
        comm_at(comm, OP_MLP, call);
        rc = comm_all_reduce(comm_stage(comm), data, 1, 1000, 1000, WIRE_S8X, NULL, NULL, err);
    }
    if (!rc)
        rc = comm_barrier(comm, err);
    if (rc)
        return rc;
    comm_at(comm, OP_HEAD, -1);
    if (rank == 1) {
        usleep(100000); // the others see where it is
        if (loss->kind == KILL)
            raise(SIGKILL);
        if (loss->kind == STOP)
            raise(SIGSTOP);
        if (loss->kind == SILENT)
            usleep(LOST_TIMEOUT_MS * 2500);
        return loss->kind == FAIL ? error_set(err, ERR_IO, "rank 1 has an error of its own") : 0;
    }
    if (loss->others == IN_SUM)
        return comm_all_reduce(comm, data, 1, 1000, 1000, WIRE_BF16, NULL, NULL, err);
    if (loss->others == IN_COMMAND)
        return comm_broadcast_idle(comm, data, sizeof data, 1, err);
    if (loss->others == IN_MESSAGE)
        return comm_receive(comm, data, sizeof data, 1, err);
    for (int i = 0; i < 100; i++) // nothing to do with the others, for long
        usleep(10000);
    return comm_barrier(comm, err);
}

struct world {
    int ranks, tp_size;
    struct rank_result *results;
    pid_t pids[8];
};

static void fork_ranks(struct world *world, comm_body *body, void *arg)
{
    static int connections[COMM_MAX_RANKS][COMM_MAX_RANKS];
    connect_ranks(connections, world->ranks, true);
    for (int rank = 0; rank < world->ranks; rank++) {
        world->results[rank].code = -99;
        if ((world->pids[rank] = fork()) > 0)
            continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int a = 0; a < world->ranks; a++)
            for (int b = 0; b < world->ranks; b++)
                if (a != rank && a != b)
                    close(connections[a][b]);
        int pp_size = world->ranks / world->tp_size;
        void *memory = map_shared(comm_region_bytes(world->tp_size, pp_size, 4096, 4096));
        struct comm_region *region = comm_region_init(memory, world->tp_size, pp_size, 4096, 4096);
        struct rank_result *result = &world->results[rank];
        struct comm *comm;
        double start_s = clock_now_s();
        int code = comm_open_sockets(&comm, region, connections[rank], rank, LOST_TIMEOUT_MS, &result->error);
        if (!code && (code = body(comm, arg, &result->error)))
            comm_region_abort(region, rank, &result->error);
        result->seconds = clock_now_s() - start_s;
        if (code != ERR_MEMORY)
            comm_close(comm);
        result->code = code;
        _exit(0);
    }
    for (int a = 0; a < world->ranks; a++)
        for (int b = 0; b < world->ranks; b++)
            if (a != b)
                close(connections[a][b]);
}

static void test_losses_are_named(void **state)
{
    (void)state;
    static const struct loss losses[] = {
        {"killed in a sum", KILL, IN_SUM, 0, 0.9, ERR_RANK, {"rank 1 is lost: it closed", "last seen in head", NULL}},
        {"killed while idle", KILL, IN_COMMAND, 0, 0.9, ERR_RANK, {"rank 1 is lost: it closed", NULL}},
        {"killed while the others compute", KILL, IN_COMPUTE, 0.9, 4, ERR_RANK, {"rank 1 is lost: it closed", NULL}},
        {"killed before its message", KILL, IN_MESSAGE, 0, 0.9, ERR_RANK, {"rank 1 is lost: it closed", NULL}},
        {"stopped in a sum", STOP, IN_SUM, 0.9, 4, ERR_RANK, {"rank 1", "rank 1 was last seen in head", NULL}},
        {"stopped while idle",
         STOP,
         IN_COMMAND,
         0.9,
         4,
         ERR_RANK,
         {"has heard nothing from it", "rank 1 is lost", NULL}},
        {"leaves", LEAVE, IN_SUM, 0, 0.9, ERR_RANK, {"rank 1 has ended while rank", "last seen in head", NULL}},
        {"silent",
         SILENT,
         IN_SUM,
         0.9,
         2,
         ERR_RANK,
         {"rank 1 did not reach all_reduce (head) within 1.0 s", "rank 1 was last seen in head", NULL}},
        {"fails", FAIL, IN_COMMAND, 0, 0.9, ERR_IO, {"rank 1 has an error of its own", NULL}},
    };
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++) {
        const struct loss *loss = &losses[i];
        struct world world = {.ranks = 3,
                              .tp_size = loss->others == IN_MESSAGE ? 1 : 3,
                              .results = map_shared(8 * sizeof *world.results)};
        fork_ranks(&world, loss_body, (void *)loss);
        for (int n = 0; n < 2; n++) { // the others end; the lost one may need help
            int rank = n == 0 ? 0 : 2;
            waitpid(world.pids[rank], NULL, 0);
            const struct rank_result *result = &world.results[rank];
            print_message("%s: rank %d after %.2f s: %s\n", loss->name, rank, result->seconds, result->error.msg);
            expect_error(result, 1, loss->code, loss->parts);
            // A loaded machine may be late, but not early.
            if (!(result->seconds > loss->least_s && result->seconds < loss->most_s + 3))
                fail_msg("%s: %.2f s", loss->name, result->seconds);
        }
        kill(world.pids[1], SIGKILL);
        waitpid(world.pids[1], NULL, 0);
        munmap(world.results, 8 * sizeof *world.results);
    }
}

// Seen from the parent that shares the region of a rank: where a rank elsewhere is, and an abort that reaches it.
// Rank 0 waits for a command of rank 1, which computes.
struct stay {
    struct comm_region *region;
    const int *fds;
    int rank, rc;
    struct error err;
};

static void *stay_rank(void *arg)
{
    struct stay *stay = arg;
    struct comm *comm;
    stay->rc = comm_open_sockets(&comm, stay->region, stay->fds, stay->rank, 20000, &stay->err);
    if (!stay->rc) {
        comm_at(comm, OP_ATTENTION, 5 + stay->rank);
        while (stay->rank == 1 && !comm_region_aborted(stay->region))
            usleep(1000);
        stay->rc = comm_broadcast_idle(comm, NULL, 0, 1, &stay->err);
        comm_close(comm);
    }
    return NULL;
}

static void test_region_tells_of_ranks_elsewhere(void **state)
{
    (void)state;
    static int connections[COMM_MAX_RANKS][COMM_MAX_RANKS];
    struct stay stays[2];
    pthread_t threads[2];
    connect_ranks(connections, 2, true);
    for (int rank = 0; rank < 2; rank++) {
        void *memory = map_shared(comm_region_bytes(2, 1, 100, 0));
        stays[rank] = (struct stay){comm_region_init(memory, 2, 1, 100, 0), connections[rank], rank, 0, {0}};
        pthread_create(&threads[rank], NULL, stay_rank, &stays[rank]);
    }
    for (int i = 0; i < 2000 && !(comm_region_position(stays[0].region, 1).op == OP_ATTENTION &&
                                  comm_region_position(stays[1].region, 0).waits_for == 1);
         i++)
        usleep(10000);
    struct comm_position at = comm_region_position(stays[0].region, 1);
    assert_int_equal(at.op, OP_ATTENTION);
    assert_int_equal(at.layer, 6);
    struct error why;
    error_set(&why, ERR_IO, "the parent of rank 0 has had enough");
    double start_s = clock_now_s();
    comm_region_abort(stays[0].region, 0, &why);
    for (int rank = 0; rank < 2; rank++) {
        pthread_join(threads[rank], NULL);
        assert_int_equal(stays[rank].rc, ERR_IO);
        assert_string_equal(stays[rank].err.msg, why.msg);
        munmap(stays[rank].region, comm_region_bytes(2, 1, 100, 0));
    }
    assert_true(clock_now_s() - start_s < 5);
}

// ---- ranks that have ended ---------------------------------------------------------------------------------------------

enum { ENDED_WAIT_MS = 1500 };

// Stage 1 ends in good order; in stage 0 rank 0 then waits for rank 1. What it waits costs no processor's time.
static int ended_body(struct comm *comm, void *arg, struct error *err)
{
    double *cpu_s = arg;
    struct timespec before, after;
    int rc = comm_barrier(comm, err);
    if (rc || comm_rank(comm) >= 2)
        return rc;
    if (comm_rank(comm) == 1)
        usleep(ENDED_WAIT_MS * 1000);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    rc = comm_barrier(comm_stage(comm), err);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    if (comm_rank(comm) == 0)
        *cpu_s = (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
    return rc;
}

static void test_waits_beside_ended_ranks(void **state)
{
    (void)state;
    double *cpu_s = map_shared(sizeof *cpu_s);
    for (int mode = SOCKET_THREADS; mode <= SOCKET_PROCESSES; mode++) {
        expect_success(run_stages((enum mode)mode, 2, 2, 64, 30000, ended_body, cpu_s), 4, mode_names[mode]);
        print_message("%s: %.3f s of a processor in a wait of %.1f s\n", mode_names[mode], *cpu_s, ENDED_WAIT_MS / 1e3);
        if (!(*cpu_s < 0.2 * ENDED_WAIT_MS / 1000))
            fail_msg("%s: a wait of %d ms kept a processor busy for %.3f s", mode_names[mode], ENDED_WAIT_MS, *cpu_s);
    }
    munmap(cpu_s, sizeof *cpu_s);
}

// ---- what must be refused --------------------------------------------------------------------------------------------

// The other side of a connection has been told an error with this part.
static bool was_told(int fd, const char *part)
{
    struct frame_head head;
    struct frame_error error;
    while (recv(fd, &head, sizeof head, MSG_WAITALL) == sizeof head && head.kind != FRAME_ABORT)
        for (char byte; head.payload_bytes > 0; head.payload_bytes--)
            assert_int_equal(recv(fd, &byte, 1, MSG_WAITALL), 1);
    return head.kind == FRAME_ABORT && recv(fd, &error, sizeof error, MSG_WAITALL) == sizeof error &&
           strstr(error.msg, part) != NULL;
}

// Rank 0 opens its end; the other side of its connection sends what a test likes.
static void check_refused(const void *bytes, size_t count, bool close_after, const char *part)
{
    int pair[2], fds[2] = {-1, -1};
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    fds[1] = pair[0];
    void *memory = map_shared(comm_region_bytes(2, 1, 100, 0));
    struct comm *comm;
    struct error err = {0};
    assert_int_equal(comm_open_sockets(&comm, comm_region_init(memory, 2, 1, 100, 0), fds, 0, LOST_TIMEOUT_MS, &err),
                     0);
    assert_int_equal(write(pair[1], bytes, count), count);
    if (close_after)
        shutdown(pair[1], SHUT_WR);
    int rc = comm_barrier(comm, &err);
    print_message("%s\n", err.msg);
    assert_true(rc < 0);
    if (!strstr(err.msg, part))
        fail_msg("\"%s\" does not hold \"%s\"", err.msg, part);
    comm_close(comm);
    assert_true(close_after || was_told(pair[1], part));
    close(pair[1]);
    munmap(memory, comm_region_bytes(2, 1, 100, 0));
}

static int barrier_body(struct comm *comm, void *arg, struct error *err)
{
    (void)arg;
    return comm_barrier(comm, err);
}

static void test_foreign_bytes(void **state)
{
    (void)state;
    static const char http[200] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    check_refused(http, sizeof http, false, "rank 1 to rank 0 is not as it must be: no head of a frame");
    check_refused(http, 20, true, "rank 1 is lost: it closed its connection to rank 0");
    // Random bytes behind a good beginning: whatever they say, an error ends it.
    uint8_t noise[4096];
    for (uint64_t seed = 0; seed < 20; seed++) {
        for (size_t i = 0; i < sizeof noise; i++)
            noise[i] = (uint8_t)mix(seed * 100000 + i);
        memcpy(noise, "FSPT", 4);
        noise[4] = (uint8_t)(seed % 7);
        check_refused(noise, sizeof noise, true, "rank 1");
    }
}

// Ranks whose regions have other figures.
static void test_other_figures(void **state)
{
    (void)state;
    static int connections[COMM_MAX_RANKS][COMM_MAX_RANKS];
    connect_ranks(connections, 2, false);
    struct comm *comms[2];
    struct error err = {0};
    void *memory = map_shared(2 * comm_region_bytes(2, 1, 100000, 0));
    for (int rank = 0; rank < 2; rank++) {
        uint8_t *own = (uint8_t *)memory + (size_t)rank * comm_region_bytes(2, 1, 100000, 0);
        struct comm_region *region = comm_region_init(own, 2, 1, rank ? 100000 : 256, 0);
        assert_int_equal(comm_open_sockets(&comms[rank], region, connections[rank], rank, 5000, &err), 0);
    }
    for (int rank = 0; rank < 2; rank++) {
        assert_int_equal(barrier_body(comms[rank], NULL, &err), ERR_CORRUPT);
        print_message("%s\n", err.msg);
        assert_non_null(strstr(err.msg, rank ? "pieces of 782 groups" : "pieces of 2 groups"));
        assert_non_null(strstr(err.msg, rank ? "has 2, 1, 2, 65536 and 0" : "has 2, 1, 782, 401408 and 0"));
    }
    comm_close(comms[0]);
    comm_close(comms[1]);
    munmap(memory, 2 * comm_region_bytes(2, 1, 100000, 0));
}

// ---- as a rank of several hosts: test_comm_namespaces.py -------------------------------------------------------------

enum { CONNECT_TRIES = 1000, CONNECT_NAP_US = 10000 };

// "address:port" of each rank, separated by commas.
static int parse_addresses(struct sockaddr_in addresses[COMM_MAX_RANKS], char *text)
{
    int count = 0;
    char *rest;
    for (char *one = strtok_r(text, ",", &rest); one && count < COMM_MAX_RANKS; one = strtok_r(NULL, ",", &rest)) {
        char *colon = strchr(one, ':');
        assert_non_null(colon);
        *colon = 0;
        addresses[count] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(colon + 1))};
        assert_int_equal(inet_pton(AF_INET, one, &addresses[count++].sin_addr), 1);
    }
    return count;
}

// Connects to the ranks below this one, which are told who it is, and takes those above it.
static void connect_hosts(int *fds, const struct sockaddr_in *addresses, int rank, int count)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    assert_int_equal(bind(listener, (const struct sockaddr *)&addresses[rank], sizeof *addresses), 0);
    assert_int_equal(listen(listener, COMM_MAX_RANKS), 0);
    for (int other = 0; other < rank; other++) {
        int tries = 0;
        while (fds[other] = socket(AF_INET, SOCK_STREAM, 0),
               connect(fds[other], (const struct sockaddr *)&addresses[other], sizeof *addresses) < 0) {
            close(fds[other]);
            assert_true(tries++ < CONNECT_TRIES);
            usleep(CONNECT_NAP_US);
        }
        assert_int_equal(write(fds[other], &rank, sizeof rank), sizeof rank);
    }
    for (int more = rank + 1; more < count; more++) {
        int other = -1, fd = accept(listener, NULL, NULL);
        assert_int_equal(recv(fd, &other, sizeof other, MSG_WAITALL), sizeof other);
        assert_in_range(other, rank + 1, count - 1);
        fds[other] = fd;
    }
    close(listener);
}

static int be_rank(const char *name)
{
    struct sockaddr_in addresses[COMM_MAX_RANKS];
    int fds[COMM_MAX_RANKS] = {0}, count = parse_addresses(addresses, getenv("COMM_TCP_ADDRESSES"));
    int rank = atoi(getenv("COMM_TCP_RANK")), stages = atoi(getenv("COMM_TCP_STAGES"));
    connect_hosts(fds, addresses, rank, count);
    struct comm_region *region = comm_rank_region(count, stages);
    struct error err = {0};
    struct comm *comm;
    if (comm_open_sockets(&comm, region, fds, rank, comm_rank_timeout_ms(name), &err)) {
        printf("rank %d of %d: %s\n", rank, count, err.msg);
        return 1;
    }
    return comm_rank_run(name, comm, region) ? 3 : 0;
}

int main(void)
{
    if (getenv("COMM_TCP_CASE"))
        return be_rank(getenv("COMM_TCP_CASE"));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_operations),
        cmocka_unit_test(test_sender_is_ahead),
        cmocka_unit_test(test_losses_are_named),
        cmocka_unit_test(test_region_tells_of_ranks_elsewhere),
        cmocka_unit_test(test_waits_beside_ended_ranks),
        cmocka_unit_test(test_foreign_bytes),
        cmocka_unit_test(test_other_figures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

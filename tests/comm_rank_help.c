// See comm_rank_help.h.
#include "tests/comm_rank_help.h"

#include "kernels/clock.h"
#include "tests/comm_cases.h"
#include "tests/comm_help.h"
#include "tests/patience.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { TIMEOUT_MS = 30000, LOST_TIMEOUT_MS = 1500 * PATIENCE };

int comm_rank_timeout_ms(const char *name) { return strcmp(name, "all") == 0 ? TIMEOUT_MS : LOST_TIMEOUT_MS; }

struct comm_region *comm_rank_region(int ranks, int stages)
{
    void *memory = map_shared(comm_region_bytes(ranks / stages, stages, 4096, CASES_MESSAGE_BYTES));
    return comm_region_init(memory, ranks / stages, stages, 4096, CASES_MESSAGE_BYTES);
}

static void say_ready(const struct comm *comm)
{
    printf("rank %d is ready\n", comm_rank(comm));
    fflush(stdout);
}

static int sum_for_ever(struct comm *comm, struct error *err)
{
    float data[1000] = {0};
    for (int call = 0;; call++) {
        comm_at(comm, OP_MLP, call % 32);
        int rc = comm_all_reduce(comm, data, 1, 1000, 1000, WIRE_BF16, NULL, NULL, err);
        if (rc)
            return rc;
        if (call == 20)
            say_ready(comm);
    }
}

static int fail_on_purpose(const char *name, struct error *err)
{
    usleep(200000); // the others see where it is
    if (strcmp(name, "stop") == 0)
        raise(SIGSTOP);
    if (strcmp(name, "kill") == 0)
        raise(SIGKILL);
    return error_set(err, ERR_IO, "rank 1 has an error of its own");
}

int comm_rank_body(const char *name, struct comm *comm, struct error *err)
{
    if (strcmp(name, "all") == 0)
        return comm_cases_all(comm, NULL, err);
    int rc = comm_barrier(comm, err);
    if (rc)
        return rc;
    if (strcmp(name, "sums") == 0)
        return sum_for_ever(comm, err);
    comm_at(comm, OP_HEAD, -1);
    if (strcmp(name, "idle") == 0) {
        say_ready(comm);
        for (int i = 0; i < 300 && comm_rank(comm) == 0; i++) // and looks at no other rank
            usleep(10000);
        return comm_rank(comm) == 0 ? comm_barrier(comm, err) : comm_broadcast_idle(comm, NULL, 0, 0, err);
    }
    return comm_rank(comm) == 1 ? fail_on_purpose(name, err) : comm_barrier(comm, err);
}

int comm_rank_run(const char *name, struct comm *comm, struct comm_region *region)
{
    struct error err = {0};
    double start_s = clock_now_s();
    int rank = comm_rank(comm), rc = comm_rank_body(name, comm, &err);
    if (rc)
        comm_region_abort(region, rank, &err);
    printf("rank %d of %d after %.2f s: %s\n", rank, comm_size(comm), clock_now_s() - start_s,
           rc ? err.msg : "all is well");
    fflush(stdout);
    comm_close(comm);
    return rc;
}

// Which rank a process is, by the variables of each launcher: tables of environments.
#include "engine/launcher_env.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define NOT LAUNCHER_NOT_GIVEN

// "A=1 B=2": the value of a variable, in turns of a few buffers.
static const char *look_up(void *arg, const char *name)
{
    static char values[8][256];
    static unsigned turn;
    size_t bytes = strlen(name);
    for (const char *at = arg; at && *at; at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL) {
        if (strncmp(at, name, bytes) != 0 || at[bytes] != '=')
            continue;
        char *value = values[turn++ % 8];
        size_t length = strcspn(at + bytes + 1, " ");
        memcpy(value, at + bytes + 1, length);
        value[length] = 0;
        return value;
    }
    return NULL;
}

#define TORCHRUN "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=29500"
#define MPI "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2"
#define MPI_HERE                                                                                                       \
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2"
#define SLURM "SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_NTASKS=3 SLURM_LOCALID=0 SLURM_JOB_ID=7"
#define LWS "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=leader.svc"

static const struct {
    const char *environment, *launcher;
    int64_t rank, world_size, local_rank;
    const char *master;
    // wanted; port 0: not compared
    const char *found;
    int want_rank, want_world, want_local, want_local_size;
    const char *host;
    int port;
} places[] = {
    {"", "auto", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {"", "none", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {"", "auto", 1, 2, NOT, "h:5", "options", 1, 2, NOT, 0, "h", 5},
    {"", "auto", 1, 2, 3, "[fe80::1]:65535", "options", 1, 2, 3, 0, "fe80::1", 65535},
    {TORCHRUN, "auto", 0, 2, NOT, "h:5", "options", 0, 2, NOT, 0, "h", 5},
    {TORCHRUN, "auto", 0, 1, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {TORCHRUN, "auto", NOT, NOT, NOT, NULL, "torchrun", 1, 4, 1, 2, "node1", 29500},
    {TORCHRUN, "torchrun", NOT, NOT, NOT, "x:9", "torchrun", 1, 4, 1, 2, "x", 9},
    {TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=True", "auto", NOT, NOT, NOT, NULL, "torchrun", 1, 4, 1, 2, "node1",
     29501},
    {TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=False", "auto", NOT, NOT, NOT, NULL, "torchrun", 1, 4, 1, 2, "node1",
     29500},
    {TORCHRUN, "none", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {TORCHRUN " " SLURM " SLURM_JOB_NODELIST=a", "auto", NOT, NOT, NOT, NULL, "torchrun", 1, 4, 1, 2, "node1", 29500},
    {TORCHRUN " TORCHELASTIC_RUN_ID=r " MPI, "auto", NOT, NOT, NOT, NULL, "torchrun", 1, 4, 1, 2, "node1", 29500},
    {TORCHRUN " " MPI " MASTER_ADDR=b", "mpi", NOT, NOT, NOT, NULL, "mpi", 3, 4, 1, 2, "node1", 29500},
    {"RANK=0 WORLD_SIZE=1", "auto", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {MPI " MASTER_ADDR=node2 MASTER_PORT=77", "auto", NOT, NOT, NOT, NULL, "mpi", 3, 4, 1, 2, "node2", 77},
    {MPI, "auto", NOT, NOT, NOT, "node3:78", "mpi", 3, 4, 1, 2, "node3", 78},
    {MPI_HERE, "auto", NOT, NOT, NOT, NULL, "mpi", 1, 2, 1, 2, "127.0.0.1", 0},
    {"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1", "auto", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {SLURM " SLURM_JOB_NODELIST=gpu[07-09,12],x", "auto", NOT, NOT, NOT, NULL, "slurm", 2, 3, 0, 0, "gpu07", 0},
    {SLURM " SLURM_STEP_NODELIST=b,c SLURM_JOB_NODELIST=a,b,c", "auto", NOT, NOT, NOT, NULL, "slurm", 2, 3, 0, 0, "b",
     0},
    {SLURM " SLURM_JOB_NODELIST=r[1-2]-n[3,5]", "auto", NOT, NOT, NOT, NULL, "slurm", 2, 3, 0, 0, "r1-n3", 0},
    {SLURM " SLURM_JOB_NODELIST=a SLURM_STEP_NUM_NODES=1", "auto", NOT, NOT, NOT, NULL, "slurm", 2, 3, 0, 3, "a", 0},
    {SLURM " SLURM_JOB_NODELIST=a MASTER_ADDR=b MASTER_PORT=6", "auto", NOT, NOT, NOT, NULL, "slurm", 2, 3, 0, 0, "b",
     6},
    {"SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_NODELIST=a", "auto", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
    {"SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1", "auto", NOT, NOT, NOT, NULL, "none", 0, 1,
     NOT, 0, "", 0},
    {LWS, "auto", NOT, NOT, NOT, NULL, "lws", 1, 2, NOT, 0, "leader.svc", 0},
    {LWS " MASTER_PORT=7", "lws", NOT, NOT, 2, NULL, "lws", 1, 2, 2, 0, "leader.svc", 7},
    {"LWS_WORKER_INDEX=0 LWS_GROUP_SIZE=1", "auto", NOT, NOT, NOT, NULL, "none", 0, 1, NOT, 0, "", 0},
};

static void test_places(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        struct launcher_options options = {places[i].launcher, places[i].rank, places[i].world_size,
                                           places[i].local_rank, places[i].master};
        struct launcher_place place;
        struct error err = {0};
        int rc = launcher_find(&place, &options, look_up, (void *)(uintptr_t)places[i].environment, &err);
        if (rc || strcmp(place.launcher, places[i].found) != 0)
            print_message("place %zu: %s\n", i, rc ? err.msg : place.launcher);
        assert_int_equal(rc, 0);
        assert_string_equal(place.launcher, places[i].found);
        assert_int_equal(place.rank, places[i].want_rank);
        assert_int_equal(place.world_size, places[i].want_world);
        assert_int_equal(place.local_rank, places[i].want_local);
        assert_int_equal(place.local_size, places[i].want_local_size);
        assert_string_equal(place.host, places[i].host);
        if (places[i].port)
            assert_int_equal(place.port, places[i].port);
        else if (place.world_size > 1)
            assert_in_range(place.port, 29400, 30399);
    }
}

static const struct {
    const char *environment, *launcher;
    int64_t rank, world_size;
    const char *master, *words;
} refusals[] = {
    {"RANK=1", "auto", NOT, NOT, NULL, "WORLD_SIZE is missing"},
    {"WORLD_SIZE=2", "auto", NOT, NOT, NULL, "RANK is missing"},
    {"RANK=1 WORLD_SIZE=2", "auto", NOT, NOT, NULL, "MASTER_ADDR"},
    {"RANK=1 WORLD_SIZE=2 MASTER_ADDR=a", "auto", NOT, NOT, NULL, "MASTER_PORT is missing"},
    {"RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=65536", "auto", NOT, NOT, NULL, "MASTER_PORT=65536"},
    {"RANK=x WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL, "RANK=x"},
    {"RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL, "RANK=-1"},
    {"RANK=99999999999 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL, "RANK=99999999999"},
    {"RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL, "rank 2 of 2"},
    {"RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL,
     "rank 2 of 2 on this host"},
    {"RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=5", "auto", NOT, NOT, NULL, "of 4 on this host"},
    {TORCHRUN " " MPI, "auto", NOT, NOT, NULL, "OMPI_COMM_WORLD_RANK 3 of 4"},
    {"OMPI_COMM_WORLD_RANK=1", "auto", NOT, NOT, NULL, "OMPI_COMM_WORLD_SIZE is missing"},
    {MPI, "auto", NOT, NOT, NULL, "MASTER_ADDR"},
    {"SLURM_STEP_ID=0 SLURM_PROCID=1", "auto", NOT, NOT, NULL, "SLURM_NTASKS is missing"},
    {SLURM, "auto", NOT, NOT, NULL, "not where rank 0 is"},
    {SLURM " SLURM_JOB_NODELIST=a[1-2", "auto", NOT, NOT, NULL, "not a list of hosts"},
    {SLURM " SLURM_JOB_NODELIST=a[]", "auto", NOT, NOT, NULL, "not a list of hosts"},
    {SLURM " SLURM_JOB_NODELIST=,a", "auto", NOT, NOT, NULL, "name of 0 bytes"},
    {"LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2", "auto", NOT, NOT, NULL, "not where rank 0 is"},
    {"LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=a", "auto", NOT, NOT, NULL, "LWS_WORKER_INDEX is missing"},
    {"", "lws", NOT, NOT, NULL, "LWS_WORKER_INDEX is missing"},
    {"", "pbs", NOT, NOT, NULL, "--launcher pbs"},
    {"", "auto", 1, NOT, NULL, "only --rank is given"},
    {"", "auto", NOT, 2, NULL, "only --world-size is given"},
    {"", "auto", 1, 2, NULL, "give --master HOST:PORT"},
    {"", "mpi", 1, 2, "a:5", "contradict"},
    {"", "auto", 1, 2, "a", "wanted HOST:PORT"},
    {"", "auto", 1, 2, "a:0", "wanted HOST:PORT"},
    {"", "auto", 1, 2, ":5", "0 bytes"},
    {"", "auto", 1, 2, "::1:5", "wanted HOST:PORT"},
    {"", "auto", 1, 2, "[:5", "wanted HOST:PORT"},
    {"", "auto", 1, 2, "[]:5", "wanted HOST:PORT"},
};

static void test_refusals(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) {
        struct launcher_options options = {refusals[i].launcher, refusals[i].rank, refusals[i].world_size, NOT,
                                           refusals[i].master};
        struct launcher_place place;
        struct error err = {0};
        int rc = launcher_find(&place, &options, look_up, (void *)(uintptr_t)refusals[i].environment, &err);
        if (rc != ERR_USAGE || !strstr(err.msg, refusals[i].words))
            print_message("refusal %zu (%d): %s\n", i, rc, err.msg);
        assert_int_equal(rc, ERR_USAGE);
        assert_non_null(strstr(err.msg, refusals[i].words));
    }
}

// A rank out of its world is refused, but knows where rank 0 is.
static void test_out_of_world(void **state)
{
    (void)state;
    static const struct {
        const char *environment, *master;
        int64_t rank, world_size;
        const char *host;
        int want_rank, want_world;
    } cases[] = {
        {"RANK=5 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=7", NULL, NOT, NOT, "a", 5, 2},
        {"RANK=1 WORLD_SIZE=1 MASTER_ADDR=a MASTER_PORT=7", NULL, NOT, NOT, "a", 1, 1},
        {"RANK=1 WORLD_SIZE=1", NULL, NOT, NOT, "", 1, 1},
        {"", "b:7", 3, 2, "b", 3, 2},
        {"OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=c MASTER_PORT=7", NULL, NOT, NOT, "c", 2, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct launcher_options options = {"auto", cases[i].rank, cases[i].world_size, NOT, cases[i].master};
        struct launcher_place place = {0};
        struct error err = {0};
        assert_int_equal(launcher_find(&place, &options, look_up, (void *)(uintptr_t)cases[i].environment, &err),
                         ERR_USAGE);
        assert_non_null(strstr(err.msg, "ranks are numbered from 0"));
        assert_string_equal(place.host, cases[i].host);
        assert_int_equal(place.rank, cases[i].want_rank);
        assert_int_equal(place.world_size, cases[i].want_world);
        if (cases[i].host[0])
            assert_int_equal(place.port, 7);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_out_of_world),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

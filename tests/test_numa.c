// Where ranks belong on machines that are not there: trees of files as /sys/devices/system/node, from one node to eight, with holes, nodes
// without processors, processors that are not allowed, and damage. And that the place is kept to: on this machine's own processors.
#include "engine/numa.h"

#include "kernels/thread_pool.h"

#include <linux/mempolicy.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

enum { MOST_NODES = 8, MOST_RANKS = 8 };

static char work[] = "/tmp/test_numa_XXXXXX";

static void write_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

// cpulists [node], NULL: there is no such file.
static void make_tree(char dir[128], const char *online, const char *const *cpulists)
{
    static int trees;
    char path[256];
    snprintf(dir, 128, "%s/%d", work, trees++);
    assert_int_equal(mkdir(dir, 0700), 0);
    snprintf(path, sizeof path, "%s/online", dir);
    if (online)
        write_text(path, online);
    for (int node = 0; node < MOST_NODES; node++) {
        if (!cpulists[node])
            continue;
        snprintf(path, sizeof path, "%s/node%d", dir, node);
        assert_int_equal(mkdir(path, 0700), 0);
        snprintf(path, sizeof path, "%s/node%d/cpulist", dir, node);
        write_text(path, cpulists[node]);
    }
}

// "0-3,8" of a set; "" of an empty one.
static void say(char text[256], const cpu_set_t *cpus)
{
    size_t used = 0;
    text[0] = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        int last = cpu;
        if (!CPU_ISSET(cpu, cpus))
            continue;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, cpus))
            last++;
        used += (size_t)snprintf(text + used, 256 - used, last > cpu ? "%s%d-%d" : "%s%d", used ? "," : "", cpu, last);
        cpu = last;
    }
}

static cpu_set_t range(int first, int last)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (int cpu = first; cpu <= last; cpu++)
        CPU_SET(cpu, &cpus);
    return cpus;
}

static const struct {
    const char *name, *online, *cpulists[MOST_NODES];
    int first_allowed, last_allowed;
    enum numa_pin pin;
    int tp_size;
    struct {
        const char *cpus;
        int node;
    } want[MOST_RANKS];
} cases[] = {
    {"one node is left alone", "0\n", {"0-7\n"}, 0, 127, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"a rank for each node", "0-1\n", {"0-7\n", "8-15\n"}, 0, 127, PIN_NODE, 2, {{"0-7", 0}, {"8-15", 1}}},
    {"nodes that interleave", "0-1", {"0,2,4", "1,3,5"}, 0, 127, PIN_NODE, 2, {{"0,2,4", 0}, {"1,3,5", 1}}},
    {"two ranks a node",
     "0-1",
     {"0-3,8-11", "4-7,12-15"},
     0,
     127,
     PIN_NODE,
     4,
     {{"0-3,8-11", 0}, {"0-3,8-11", 0}, {"4-7,12-15", 1}, {"4-7,12-15", 1}}},
    {"three ranks on two nodes", "0-1", {"0-3", "4-7"}, 0, 127, PIN_NODE, 3, {{"0-3", 0}, {"0-3", 0}, {"4-7", 1}}},
    {"two ranks on four nodes", "0-3", {"0-1", "2-3", "4-5", "6-7"}, 0, 127, PIN_NODE, 2, {{"0-3", -1}, {"4-7", -1}}},
    {"one rank has all", "0-1", {"0-3", "4-7"}, 0, 127, PIN_NODE, 1, {{"0-7", -1}}},
    {"a node of memory alone", "0-2", {"0-3", "\n", "4-7"}, 0, 127, PIN_NODE, 2, {{"0-3", 0}, {"4-7", 2}}},
    {"a hole in the numbers", "0,3", {"0-3", NULL, NULL, "4-7"}, 0, 127, PIN_NODE, 2, {{"0-3", 0}, {"4-7", 3}}},
    {"a node is not allowed", "0-2", {"0-3", "4-7", "8-11"}, 4, 9, PIN_NODE, 2, {{"4-7", 1}, {"8-9", 2}}},
    {"one node is allowed", "0-1", {"0-3", "4-7"}, 4, 6, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"not pinned", "0-1", {"0-3", "4-7"}, 0, 127, PIN_NONE, 2, {{"", -1}, {"", -1}}},
    {"cores of one node", "0", {"0-7"}, 0, 7, PIN_CORE, 2, {{"0-3", -1}, {"4-7", -1}}},
    {"cores of two nodes",
     "0-1",
     {"0-3", "4-7"},
     0,
     127,
     PIN_CORE,
     4,
     {{"0-1", 0}, {"2-3", 0}, {"4-5", 1}, {"6-7", 1}}},
    {"cores that do not divide", "0", {"0-4"}, 0, 127, PIN_CORE, 3, {{"0", -1}, {"1-2", -1}, {"3-4", -1}}},
    {"more ranks than cores", "0", {"0-1"}, 0, 127, PIN_CORE, 3, {{"0", -1}, {"0", -1}, {"1", -1}}},
    {"no tree", NULL, {NULL}, 0, 3, PIN_CORE, 2, {{"0-1", -1}, {"2-3", -1}}},
    {"no tree, nodes wanted", NULL, {NULL}, 0, 3, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"a list that is none", "0-1", {"0-3", "4-x"}, 0, 3, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"a list backwards", "0-1", {"0-3", "7-4"}, 0, 3, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"a processor beyond all", "0-1", {"0-3", "4-99999999999999999999"}, 0, 3, PIN_NODE, 2, {{"", -1}, {"", -1}}},
    {"a node's list is missing", "0-1", {"0-3"}, 0, 3, PIN_NODE, 2, {{"", -1}, {"", -1}}},
};

static void test_places(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[128], got[256];
        cpu_set_t allowed = range(cases[i].first_allowed, cases[i].last_allowed);
        make_tree(dir, cases[i].online, cases[i].cpulists);
        for (int rank = 0; rank < cases[i].tp_size; rank++) {
            struct numa_place place = numa_place_of(dir, &allowed, cases[i].pin, rank, cases[i].tp_size, 1);
            say(got, &place.cpus);
            if (strcmp(got, cases[i].want[rank].cpus) != 0 || place.node != cases[i].want[rank].node)
                fail_msg("%s: rank %d has processors %s, node %d; wanted %s, node %d", cases[i].name, rank, got,
                         place.node, cases[i].want[rank].cpus, cases[i].want[rank].node);
        }
    }
}

// With more threads than processors on any node all ranks are left alone: the kernel deals better.
static void test_too_small_nodes(void **state)
{
    static const char *const lists[MOST_NODES] = {"0-6", "7"};
    char dir[128];
    cpu_set_t allowed = range(0, 7);
    (void)state;
    make_tree(dir, "0-1", lists);
    assert_int_equal(numa_place_of(dir, &allowed, PIN_NODE, 0, 2, 1).node, 0);
    assert_int_equal(numa_place_of(dir, &allowed, PIN_NODE, 1, 2, 1).node, 1);
    for (int rank = 0; rank < 2; rank++) {
        struct numa_place place = numa_place_of(dir, &allowed, PIN_NODE, rank, 2, 4);
        assert_int_equal(place.node, -1);
        assert_int_equal(CPU_COUNT(&place.cpus), 0);
    }
    assert_int_equal(numa_place_of(dir, &allowed, PIN_NODE, 2, 3, 1).node, 1);
    assert_int_equal(numa_place_of(dir, &allowed, PIN_NODE, 2, 3, 2).node, -1);
}

static const struct {
    const char *name, *online, *cpulists[MOST_NODES];
    int last_allowed;
    enum numa_pin pin;
    int tp_size, threads;
    const char *want;
} notes[] = {
    {"all fit", "0-1", {"0-3", "4-7"}, 7, PIN_NODE, 2, 4, ""},
    {"not pinned", "0-1", {"0-6", "7"}, 7, PIN_NONE, 2, 4, ""},
    {"more threads than processors",
     "0",
     {"0-1"},
     1,
     PIN_NONE,
     2,
     512,
     "2 ranks of 512 threads have 2 processors here, so threads wait for each other: --threads 1 fits"},
    {"one rank, one processor",
     "0",
     {"0-7"},
     0,
     PIN_NODE,
     1,
     1024,
     "1 rank of 1024 threads has 1 processor here, so threads wait for each other: --threads 1 fits"},
    {"more ranks than processors, of several threads",
     "0",
     {"0-1"},
     1,
     PIN_NODE,
     4,
     2,
     "4 ranks of 2 threads have 2 processors here, so threads wait for each other: --threads 1 comes nearest"},
    {"more ranks than processors", "0", {"0-1"}, 1, PIN_NODE, 4, 1, ""},
    {"a small node",
     "0-1",
     {"0-4", "5-7"},
     7,
     PIN_NODE,
     2,
     4,
     "--pin node keeps no rank to its node: 1 rank of 4 threads would have the 3 processors of NUMA node 1: "
     "--threads 3 fits"},
    {"two ranks on a node of one",
     "0-1",
     {"0-6", "7"},
     7,
     PIN_NODE,
     4,
     2,
     "--pin node keeps no rank to its node: 2 ranks of 2 threads would have the 1 processor of NUMA node 1: "
     "--threads 1 comes nearest"},
    {"two ranks on a node for one of them",
     "0-1",
     {"0-7", "8-10"},
     10,
     PIN_NODE,
     4,
     2,
     "--pin node keeps no rank to its node: 2 ranks of 2 threads would have the 3 processors of NUMA node 1: "
     "--threads 1 fits"},
    {"cores of a small node",
     "0-1",
     {"0-4", "5-7"},
     7,
     PIN_CORE,
     2,
     4,
     "--pin core: rank 1 has 3 processors of NUMA node 1 for 4 threads, so some share one: --threads 3 fits"},
    {"a rank with several nodes", "0-2", {"0-1", "2-3", "4-7"}, 7, PIN_NODE, 1, 8, ""},
};

// What is left as it is, is said; and only then.
static void test_notes(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof notes / sizeof *notes; i++) {
        char dir[128], got[NUMA_NOTE_BYTES];
        cpu_set_t allowed = range(0, notes[i].last_allowed);
        make_tree(dir, notes[i].online, notes[i].cpulists);
        numa_note(got, dir, &allowed, notes[i].pin, notes[i].tp_size, notes[i].threads);
        if (strcmp(got, notes[i].want) != 0)
            fail_msg("%s: \"%s\", wanted \"%s\"", notes[i].name, got, notes[i].want);
        struct numa_place place = numa_place_of(dir, &allowed, notes[i].pin, 0, notes[i].tp_size, notes[i].threads);
        bool several = strchr(notes[i].online, '-') != NULL && notes[i].pin == PIN_NODE;
        assert_int_equal(several && CPU_COUNT(&place.cpus) == 0, strncmp(got, "--pin node", 10) == 0);
    }
}

// However many nodes and ranks: nobody is without a processor, and every allowed one is somebody's.
static void test_all_are_used(void **state)
{
    static const char *const lists[MOST_NODES] = {"0-3", "4-7", "8-11", "12-15", "16-19", "20-23", "24-27", "28-31"};
    (void)state;
    for (int nodes = 1; nodes <= MOST_NODES; nodes++) {
        char dir[128], online[16];
        cpu_set_t allowed = range(0, 4 * nodes - 1);
        snprintf(online, sizeof online, "0-%d", nodes - 1);
        make_tree(dir, online, lists);
        for (int tp_size = 1; tp_size <= 16; tp_size++) {
            cpu_set_t used;
            CPU_ZERO(&used);
            for (int rank = 0; rank < tp_size; rank++) {
                struct numa_place place = numa_place_of(dir, &allowed, PIN_CORE, rank, tp_size, 1);
                assert_true(CPU_COUNT(&place.cpus) > 0);
                CPU_OR(&used, &used, &place.cpus);
            }
            if (!CPU_EQUAL(&used, &allowed))
                fail_msg("%d nodes, %d ranks: %d of %d processors are used", nodes, tp_size, CPU_COUNT(&used),
                         CPU_COUNT(&allowed));
        }
    }
}

struct seen {
    pthread_barrier_t all; // so that each thread has a task
    cpu_set_t cpus[3];
    long policy[3];
};

static long memory_policy(void)
{
    int mode = -1;
    return syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 0) ? -1 : mode;
}

// That memory may come from; -1: nobody tells.
static int first_node(void)
{
    unsigned long nodes[16] = {0};
    if (syscall(SYS_get_mempolicy, NULL, nodes, 8 * sizeof nodes, NULL, MPOL_F_MEMS_ALLOWED) || !nodes[0])
        return -1;
    return __builtin_ctzl(nodes[0]);
}

static void look(void *arg, int64_t task, int thread)
{
    struct seen *seen = arg;
    (void)task;
    sched_getaffinity(0, sizeof seen->cpus[thread], &seen->cpus[thread]);
    seen->policy[thread] = memory_policy();
    pthread_barrier_wait(&seen->all);
}

static void *keep(void *arg)
{
    cpu_set_t allowed = *(cpu_set_t *)arg, one;
    struct numa_place place = {.node = first_node()};
    struct thread_pool *pool;
    struct error err = {0};
    struct seen seen = {0};
    int cpu = 0;
    while (!CPU_ISSET(cpu, &allowed))
        cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    place.cpus = one;
    if (numa_keep_to(&place, &err) || thread_pool_create(&pool, 3, &err))
        return strdup(err.msg);
    numa_gather_pages(&place, &seen, sizeof seen);
    pthread_barrier_init(&seen.all, NULL, 3);
    thread_pool_run(pool, look, &seen, 3);
    for (int i = 0; i < 3; i++) {
        if (!CPU_EQUAL(&seen.cpus[i], &one))
            return strdup("a thread of the pool does not keep to its rank's processor");
        if (place.node >= 0 && memory_policy() >= 0 && seen.policy[i] != MPOL_PREFERRED)
            return strdup("a thread of the pool takes memory anywhere");
    }
    if (thread_pool_pin(pool, &allowed, &err))
        return strdup(err.msg);
    memset(seen.cpus, 0, sizeof seen.cpus);
    thread_pool_run(pool, look, &seen, 3);
    thread_pool_free(pool);
    pthread_barrier_destroy(&seen.all);
    for (int i = 0; i < 3; i++)
        if (CPU_COUNT(&seen.cpus[i]) != 1)
            return strdup("a thread that was pinned has a choice");
    if (CPU_COUNT(&allowed) > 1 && CPU_EQUAL(&seen.cpus[0], &seen.cpus[1]))
        return strdup("two threads were pinned to one processor");
    place.cpus = range(CPU_SETSIZE - 1, CPU_SETSIZE - 1);
    return CPU_ISSET(CPU_SETSIZE - 1, &allowed) || numa_keep_to(&place, &err) == ERR_IO
               ? NULL
               : strdup("a processor that is not there was taken");
}

static void test_place_is_kept_to(void **state)
{
    cpu_set_t allowed;
    pthread_t thread; // its own affinity and policy
    void *why = NULL;
    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof allowed, &allowed), 0);
    assert_int_equal(pthread_create(&thread, NULL, keep, &allowed), 0);
    pthread_join(thread, &why);
    if (why)
        fail_msg("%s", (char *)why);
}

static void test_names(void **state)
{
    (void)state;
    assert_int_equal(numa_pin_from_name("none"), PIN_NONE);
    assert_int_equal(numa_pin_from_name("node"), PIN_NODE);
    assert_int_equal(numa_pin_from_name("core"), PIN_CORE);
}

static int set_up(void **state)
{
    (void)state;
    return mkdtemp(work) ? 0 : 1;
}

static int tear_down(void **state)
{
    char command[256];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", work);
    return system(command) != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places),       cmocka_unit_test(test_too_small_nodes),
        cmocka_unit_test(test_all_are_used), cmocka_unit_test(test_place_is_kept_to),
        cmocka_unit_test(test_names),        cmocka_unit_test(test_notes),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

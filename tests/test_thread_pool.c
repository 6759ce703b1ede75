// The thread pool: every task once, results visible to the caller, many short runs, sleeping workers that cost nothing,
// and more threads than cores.
#include "kernels/thread_pool.h"

#include "kernels/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

struct run {
    int64_t tasks;
    int threads;
    int64_t *counts; // plain memory: the pool alone orders it
    _Atomic int64_t bad_threads;
    int work; // rounds of busy work for one task
};

static void count_task(void *arg, int64_t task, int thread)
{
    struct run *run = arg;
    if (thread < 0 || thread >= run->threads || task < 0 || task >= run->tasks) {
        atomic_fetch_add(&run->bad_threads, 1);
        return;
    }
    volatile unsigned x = 1;
    for (int i = 0; i < run->work; i++)
        x = x * 3 + 1;
    run->counts[task]++;
}

static double cpu_s(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static struct thread_pool *new_pool(int threads)
{
    struct thread_pool *pool = NULL;
    struct error err = {0};
    if (thread_pool_create(&pool, threads, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(thread_pool_size(pool), threads);
    return pool;
}

static void check_runs(struct thread_pool *pool, int64_t tasks, int runs, int work)
{
    struct run run = {.tasks = tasks, .threads = thread_pool_size(pool), .work = work};
    run.counts = calloc((size_t)tasks + 1, sizeof *run.counts);
    assert_non_null(run.counts);
    for (int i = 0; i < runs; i++) {
        thread_pool_run(pool, count_task, &run, tasks);
        // Read by the caller at once: a task still running would show as a race or a wrong count.
        for (int64_t task = 0; task < tasks; task++)
            if (run.counts[task] != i + 1)
                fail_msg("run %d: task %lld ran %lld times", i, (long long)task, (long long)run.counts[task] - i);
    }
    assert_int_equal(atomic_load(&run.bad_threads), 0);
    free(run.counts);
}

static void test_every_task_once(void **state)
{
    (void)state;
    static const struct {
        int threads;
        int64_t tasks;
        int runs, work;
    } cases[] = {
        {1, 0, 3, 0},      {1, 1, 3, 0},       {1, 100, 3, 0},   {2, 0, 3, 0},     {2, 1, 100, 0},
        {2, 2, 20000, 0},  {2, 3, 20000, 0},   {2, 1000, 5, 9},  {3, 7, 3000, 50}, {4, 4, 300, 0},
        {4, 100000, 3, 0}, {8, 64, 300, 1000}, {16, 5, 100, 10},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct thread_pool *pool = new_pool(cases[i].threads);
        check_runs(pool, cases[i].tasks, cases[i].runs, cases[i].work);
        thread_pool_free(pool);
    }
}

static void test_create_and_free(void **state)
{
    (void)state;
    struct error err;
    struct thread_pool *pool = NULL;
    assert_int_equal(thread_pool_create(&pool, 0, &err), ERR_USAGE);
    assert_int_equal(thread_pool_create(&pool, 1000000, &err), ERR_USAGE);
    assert_null(pool);
    thread_pool_free(NULL);
    for (int i = 0; i < 100; i++)
        thread_pool_free(new_pool(1 + i % 5));
}

static void test_idle_pool_sleeps(void **state)
{
    (void)state;
    struct thread_pool *pool = new_pool(4);
    check_runs(pool, 100, 10, 10);
    usleep(20000);
    double before_s = cpu_s();
    usleep(300000);
    double used_s = cpu_s() - before_s;
    print_message("4 threads, idle: %.2f ms of processor time in 300 ms\n", used_s * 1e3);
    if (!(used_s < 0.02))
        fail_msg("idle workers used %.1f ms", used_s * 1e3);
    check_runs(pool, 100, 10, 10); // and they wake again
    thread_pool_free(pool);
}

struct meeting {
    _Atomic int threads[3], come;
};

// Each task holds its thread until all have begun.
static void meet(void *arg, int64_t task, int thread)
{
    struct meeting *meeting = arg;
    atomic_store(&meeting->threads[task], thread);
    atomic_fetch_add(&meeting->come, 1);
    for (int i = 0; i < 30000 && atomic_load(&meeting->come) < 3; i++)
        usleep(1000);
}

static void test_sleeping_workers_wake(void **state)
{
    (void)state;
    struct thread_pool *pool = new_pool(3);
    for (int i = 0; i < 2; i++) {
        struct meeting meeting = {0};
        usleep(20000); // longer than any spin
        thread_pool_run(pool, meet, &meeting, 3);
        assert_int_equal(1 << meeting.threads[0] | 1 << meeting.threads[1] | 1 << meeting.threads[2], 7);
    }
    thread_pool_free(pool);
}

// Far more threads than cores: a thread that never got a core is not waited for.
static void test_oversubscribed(void **state)
{
    (void)state;
    struct thread_pool *one = new_pool(1), *many = new_pool(16);
    double start_s = clock_now_s();
    check_runs(one, 64, 500, 200);
    double one_s = clock_now_s() - start_s;
    start_s = clock_now_s();
    check_runs(many, 64, 500, 200);
    double many_s = clock_now_s() - start_s;
    print_message("500 runs of 64 tasks: 1 thread %.1f ms, 16 threads %.1f ms\n", one_s * 1e3, many_s * 1e3);
    if (!(many_s < 20 * one_s + 10)) // the machine may be busy
        fail_msg("16 threads took %.3f s, one %.3f s", many_s, one_s);
    thread_pool_free(one);
    thread_pool_free(many);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_task_once),  cmocka_unit_test(test_create_and_free),
        cmocka_unit_test(test_idle_pool_sleeps), cmocka_unit_test(test_sleeping_workers_wake),
        cmocka_unit_test(test_oversubscribed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// The engine behind the server when ranks are lost: who hears of it, restarts, a drain meanwhile, and a storm of requests and cancels.
#include "tests/entries_help.h"
#include "tests/serve_engine_help.h"

static void test_lost_ranks(void **state)
{
    (void)state;
    enum { COUNT = SLOTS + 4 };
    struct run run = new_run();
    struct request requests[COUNT];
    struct engine_job *job;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 1000);
    for (uint32_t i = 0; i < COUNT; i++) {
        request_init(&requests[i], i, 90);
        assert_int_equal(submit(run.engine, &requests[i], &job), 0);
    }
    wait_for(&requests[0], 2);
    change(&the_session, &the_session.lose, 1);
    for (int i = 0; i < COUNT; i++) {
        wait_for(&requests[i], -1);
        assert_int_equal(requests[i].reason, FINISH_ERROR);
        assert_int_equal(requests[i].code, ERR_RANK);
        assert_int_equal(requests[i].ends, 1);
        assert_int_equal(requests[i].state_at_end, ENGINE_FAILED); // whoever tries again at once is told
        request_clear(&requests[i]);
    }
    assert_int_equal(end(&run), ERR_RANK);
    assert_int_equal(run.states[ENGINE_FAILED], 1);
    assert_non_null(strstr(run.err.msg, "signal 9"));
}

static void test_lost_while_idle(void **state)
{
    (void)state;
    struct run run = new_run();
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    change(&the_session, &the_session.lose, 1);
    assert_int_equal(end(&run), ERR_RANK);
}

static void test_restarts(void **state)
{
    (void)state;
    enum { CRASHES = 100 };
    struct run run = new_run();
    struct engine_stats stats, before = {0};
    int descriptors = 0;
    // A loss follows each start at once, so the waits double up to their limit: they are kept short here by so small a first one.
    run.options.restart = true;
    run.options.restart_delay_s = 1e-32;
    run.options.restart_limit = CRASHES;
    begin(&run);
    for (int i = 0; i < CRASHES; i++) {
        struct request request;
        struct engine_job *job;
        request_init(&request, (uint32_t)i, 20);
        int rc;
        do
            rc = submit(run.engine, &request, &job);
        while (rc == ERR_RANK && usleep(200) == 0);
        assert_int_equal(rc, 0);
        wait_for(&request, i % 2 ? 1 : -1); // lost while it runs, or idle
        engine_read_stats(run.engine, &stats);
        assert_true(stats.scheduler.steps >= before.scheduler.steps);
        assert_true(stats.scheduler.produced_tokens >= before.scheduler.produced_tokens);
        before = stats;
        int launches = atomic_load(&the_session.launches);
        change(&the_session, &the_session.lose, 1);
        wait_for(&request, -1);
        assert_true(tokens_are_right(&request));
        while (atomic_load(&the_session.launches) == launches)
            usleep(200);
        request_clear(&request);
        if (i == 10)
            descriptors = count_descriptors();
    }
    wait_for_state(&run, ENGINE_READY);
    assert_int_equal(count_descriptors(), descriptors);
    engine_read_stats(run.engine, &stats);
    assert_int_equal(stats.restarts, CRASHES);
    assert_int_equal(stats.ranks[0].losses, 0);
    assert_int_equal(stats.ranks[1].losses, CRASHES);
    assert_int_equal(stats.loaded_bytes, (CRASHES + 1) * 1000 * TP);
    assert_non_null(strstr(stats.error, "signal 9"));
    // One more is too many.
    change(&the_session, &the_session.lose, 1);
    assert_int_equal(end(&run), ERR_RANK);
    assert_non_null(strstr(run.err.msg, "100 restarts"));
}

static void test_drain_in_back_off(void **state)
{
    (void)state;
    struct run run = new_run();
    run.options.restart = true;
    run.options.restart_delay_s = 20;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    change(&the_session, &the_session.lose, 1);
    wait_for_state(&run, ENGINE_RESTARTING);
    assert_int_equal(drain_and_end(&run), 0);
}

// ---- a storm -----------------------------------------------------------------------------------------------------

enum { STORM_THREADS = 4, STORM_JOBS = 60 };
struct stormer {
    struct engine *engine;
    uint32_t seed;
    int finished, cancelled, failed;
    bool wrong;
};

static void *storm(void *arg)
{
    struct stormer *stormer = arg;
    uint32_t random = stormer->seed * 2654435761u + 1;
    for (int i = 0; i < STORM_JOBS; i++) {
        struct request requests[3];
        struct sequence_spec specs[3];
        struct engine_job *job;
        struct error err;
        random = random * 1664525u + 1013904223u;
        int count = 1 + (int)(random >> 28) % 3;
        for (int n = 0; n < count; n++) {
            request_init(&requests[n], random >> 20, 1 + (random >> 10) % 40);
            specs[n] = spec_of(&requests[n]);
        }
        int rc;
        do
            rc = engine_submit(stormer->engine, specs, count, &job, &err);
        while ((rc == ERR_BUSY || rc == ERR_RANK) && usleep(100) == 0);
        // A callback cannot end the last sequence while its owner holds the lock that take_end needs: that keeps the job valid.
        if (rc == 0 && (random >> 8) % 2) {
            pthread_mutex_lock(&requests[0].mutex);
            if (!requests[0].ends)
                engine_cancel(stormer->engine, job, (random >> 9) % 2 ? -1 : 0);
            pthread_mutex_unlock(&requests[0].mutex);
        }
        for (int n = 0; n < count; n++) {
            if (rc == 0)
                wait_for(&requests[n], -1);
            pthread_mutex_lock(&requests[n].mutex);
            stormer->finished += requests[n].reason == FINISH_LENGTH;
            stormer->cancelled += requests[n].reason == FINISH_CANCELLED;
            stormer->failed += requests[n].reason == FINISH_ERROR;
            stormer->wrong |= requests[n].ends != (rc == 0) || !tokens_are_right(&requests[n]) ||
                              (requests[n].reason == FINISH_LENGTH && requests[n].count != requests[n].max_tokens);
            pthread_mutex_unlock(&requests[n].mutex);
            request_clear(&requests[n]);
        }
    }
    return NULL;
}

static void test_storm(void **state)
{
    bool losing = *state != NULL;
    struct run run = new_run();
    pthread_t threads[STORM_THREADS];
    struct stormer stormers[STORM_THREADS];
    int finished = 0, cancelled = 0, failed = 0;
    run.options.max_queue = 4;
    run.options.restart = true;
    run.options.restart_delay_s = 1e-32;
    run.options.restart_limit = 1000;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 50);
    for (uint32_t i = 0; i < STORM_THREADS; i++) {
        stormers[i] = (struct stormer){.engine = run.engine, .seed = i};
        assert_int_equal(pthread_create(&threads[i], NULL, storm, &stormers[i]), 0);
    }
    for (int i = 0; losing && i < 10; i++) {
        usleep(10000);
        change(&the_session, &the_session.lose, 1);
    }
    for (int i = 0; i < STORM_THREADS; i++) {
        pthread_join(threads[i], NULL);
        assert_false(stormers[i].wrong);
        finished += stormers[i].finished;
        cancelled += stormers[i].cancelled;
        failed += stormers[i].failed;
    }
    assert_true(finished > 20);
    assert_true(cancelled > 5 || losing);
    assert_true((failed > 0) == losing);
    assert_int_equal(drain_and_end(&run), 0);
}

int main(void)
{
    static int losing;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lost_ranks), cmocka_unit_test(test_lost_while_idle),
        cmocka_unit_test(test_restarts),   cmocka_unit_test(test_drain_in_back_off),
        cmocka_unit_test(test_storm),      {"test_storm_with_lost_ranks", test_storm, NULL, NULL, &losing},
    };
    alarm(120);
    return cmocka_run_group_tests(tests, set_up, NULL);
}

// The engine behind the server: requests, cancels, drains. Lost ranks, and a storm of both: test_serve_engine_lost_threads.c. The threads are real;
// the tests also run under ThreadSanitizer.
#include "tests/serve_engine_help.h"

static void test_requests(void **state)
{
    (void)state;
    struct run run = new_run();
    struct request requests[3];
    struct sequence_spec specs[3];
    struct engine_job *job;
    struct error err;
    struct engine_stats stats;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    for (uint32_t i = 0; i < 3; i++) {
        request_init(&requests[i], 5, 10 + i);
        specs[i] = spec_of(&requests[i]);
    }
    assert_int_equal(engine_submit(run.engine, specs, 3, &job, &err), 0);
    for (int i = 0; i < 3; i++) {
        wait_for(&requests[i], -1);
        assert_int_equal(requests[i].reason, FINISH_LENGTH);
        assert_int_equal(requests[i].count, 10 + i);
        assert_true(tokens_are_right(&requests[i]));
        request_clear(&requests[i]);
    }
    static const uint32_t longest[CONTEXT];
    specs[0].prompt = longest;
    specs[0].prompt_count = CONTEXT + 1;
    assert_int_equal(engine_submit(run.engine, specs, 1, &job, &err), ERR_USAGE);
    request_init(&requests[0], 5, 10);
    specs[0].prompt_count = CONTEXT; // and one token behind it
    assert_int_equal(engine_submit(run.engine, specs, 1, &job, &err), 0);
    wait_for(&requests[0], -1);
    assert_true(requests[0].reason == FINISH_LENGTH && requests[0].count == 1);
    request_clear(&requests[0]);
    specs[0].prompt_count = 0;
    assert_int_equal(engine_submit(run.engine, specs, 1, &job, &err), ERR_USAGE);
    engine_read_stats(run.engine, &stats);
    assert_true(stats.ready);
    assert_int_equal(stats.num_ranks, TP);
    assert_int_equal(stats.loaded_bytes, 1000 * TP);
    assert_string_equal(stats.ranks[1].device, "played");
    assert_int_equal(drain_and_end(&run), 0);
    assert_int_equal(run.states[ENGINE_READY], 1);
    assert_int_equal(run.states[ENGINE_DRAINING], 1);
}

static void test_not_ready(void **state)
{
    (void)state;
    struct run run = new_run();
    struct request request;
    struct engine_job *job;
    begin(&run);
    atomic_store(&the_session.hold_load, 1); // may be too late for this start; then the request is taken
    request_init(&request, 1, 4);
    int rc = submit(run.engine, &request, &job);
    if (rc == 0)
        wait_for(&request, -1);
    else
        assert_int_equal(rc, ERR_RANK);
    assert_int_equal(drain_and_end(&run), 0);
    request_clear(&request);
}

static void test_drain_while_loading(void **state)
{
    (void)state;
    struct run run = new_run();
    atomic_store(&the_session.hold_load, 1);
    assert_int_equal(engine_create(&run.engine, &the_session, &run.options, NULL), 0);
    assert_int_equal(pthread_create(&run.thread, NULL, run_engine, &run), 0);
    usleep(20000);
    assert_int_equal(drain_and_end(&run), 0);
    assert_int_equal(run.states[ENGINE_READY], 0);
}

static void test_full_queue(void **state)
{
    (void)state;
    enum { QUEUE = 3 };
    struct run run = new_run();
    struct request requests[SLOTS + QUEUE + 1];
    struct engine_job *jobs[SLOTS + QUEUE + 1];
    run.options.max_queue = QUEUE;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 2000);
    for (uint32_t i = 0; i < SLOTS + QUEUE + 1; i++)
        request_init(&requests[i], i, 60);
    for (int i = 0; i < SLOTS + QUEUE; i++)
        assert_int_equal(submit(run.engine, &requests[i], &jobs[i]), 0);
    assert_int_equal(submit(run.engine, &requests[SLOTS + QUEUE], &jobs[0]), ERR_BUSY);
    struct engine_stats stats;
    engine_read_stats(run.engine, &stats);
    assert_true(stats.retry_after_s >= 1 && stats.retry_after_s <= 60);
    // One that waits goes; its place is free again.
    engine_cancel(run.engine, jobs[SLOTS + QUEUE - 1], -1);
    wait_for(&requests[SLOTS + QUEUE - 1], -1);
    assert_int_equal(requests[SLOTS + QUEUE - 1].reason, FINISH_CANCELLED);
    int rc = submit(run.engine, &requests[SLOTS + QUEUE], &jobs[0]);
    for (int i = 0; rc == ERR_BUSY && i < 100; i++, usleep(1000)) // on_end comes a moment before
        rc = submit(run.engine, &requests[SLOTS + QUEUE], &jobs[0]);
    assert_int_equal(rc, 0);
    atomic_store(&the_session.step_us, 0);
    assert_int_equal(drain_and_end(&run), 0);
    for (int i = 0; i < SLOTS + QUEUE + 1; i++) {
        assert_int_equal(requests[i].ends, 1);
        if (i != SLOTS + QUEUE - 1)
            assert_int_equal(requests[i].count, 60);
        assert_true(tokens_are_right(&requests[i]));
        request_clear(&requests[i]);
    }
}

// A request of several prompts has its places together: none while it does not fit, never when it has more sequences than there are places.
static void test_several_prompts(void **state)
{
    (void)state;
    enum { QUEUE = 2, PLACES = SLOTS + QUEUE };
    struct run run = new_run();
    struct request requests[PLACES + 1], other;
    struct sequence_spec specs[PLACES + 1];
    struct engine_job *job;
    struct error err;
    run.options.max_queue = QUEUE;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 5000);
    for (uint32_t i = 0; i < PLACES + 1; i++) {
        request_init(&requests[i], 3 * i + 2, 8);
        specs[i] = spec_of(&requests[i]);
    }
    assert_int_equal(engine_submit(run.engine, specs, PLACES + 1, &job, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "7 sequences in one request: from 1 to 6"));
    request_init(&other, 1, 40);
    assert_int_equal(submit(run.engine, &other, &job), 0);
    assert_int_equal(engine_submit(run.engine, specs, PLACES, &job, &err), ERR_BUSY);
    engine_cancel(run.engine, job, -1);
    wait_for(&other, -1);
    specs[PLACES - 1] = specs[PLACES - 2]; // the last two continue the same prompt
    specs[PLACES - 1].arg = &requests[PLACES - 1];
    memcpy(requests[PLACES - 1].prompt, requests[PLACES - 2].prompt, sizeof requests[0].prompt);
    requests[PLACES - 1].prompt_count = requests[PLACES - 2].prompt_count;
    assert_int_equal(engine_submit(run.engine, specs, PLACES, &job, &err), 0);
    for (int i = 0; i < PLACES; i++) {
        wait_for(&requests[i], -1);
        assert_true(requests[i].reason == FINISH_LENGTH && requests[i].count == 8 && tokens_are_right(&requests[i]));
        assert_int_equal(requests[i].ends, 1);
    }
    assert_int_equal(drain_and_end(&run), 0);
    assert_int_equal(other.ends, 1);
    request_clear(&other);
    for (int i = 0; i < PLACES + 1; i++)
        request_clear(&requests[i]);
}

// Who is alone may hold every place; from when another one has asked, and while it is there, half of them.
static void test_one_tenant_leaves_places(void **state)
{
    (void)state;
    enum { QUEUE = 4, PLACES = SLOTS + QUEUE, COUNT = PLACES + 4 };
    struct run run = new_run();
    struct request requests[COUNT];
    struct engine_job *jobs[COUNT];
    run.options.max_queue = QUEUE;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 50000);
    for (uint32_t i = 0; i < COUNT; i++) {
        request_init(&requests[i], i, 100);
        requests[i].tenant = i == PLACES || i == PLACES + 3 ? 2 : 1;
    }
    for (int i = 0; i < PLACES; i++)
        assert_int_equal(submit(run.engine, &requests[i], &jobs[i]), 0);
    assert_int_equal(submit(run.engine, &requests[PLACES], &jobs[PLACES]), ERR_BUSY);
    // A place is free: not for the first one again.
    engine_cancel(run.engine, jobs[0], -1);
    wait_for(&requests[0], -1);
    assert_int_equal(submit(run.engine, &requests[PLACES + 1], &jobs[PLACES + 1]), ERR_BUSY);
    assert_int_equal(submit(run.engine, &requests[PLACES], &jobs[PLACES]), 0);
    // Down to its half it gets no more, then one for one.
    for (int i = 1; i <= PLACES / 2; i++) {
        assert_int_equal(submit(run.engine, &requests[PLACES + 1], &jobs[PLACES + 1]), ERR_BUSY);
        engine_cancel(run.engine, jobs[i], -1);
        wait_for(&requests[i], -1);
    }
    assert_int_equal(submit(run.engine, &requests[PLACES + 1], &jobs[PLACES + 1]), 0);
    assert_int_equal(submit(run.engine, &requests[PLACES + 2], &jobs[PLACES + 2]), ERR_BUSY);
    assert_int_equal(submit(run.engine, &requests[PLACES + 3], &jobs[PLACES + 3]), 0);
    engine_drain(run.engine);
    assert_int_equal(drain_and_end(&run), ERR_SIGTERM);
    for (int i = 0; i < COUNT; i++) {
        assert_int_equal(requests[i].ends, i != PLACES + 2);
        request_clear(&requests[i]);
    }
}

static void test_cancel_within_a_step(void **state)
{
    (void)state;
    struct run run = new_run();
    struct request request;
    struct engine_job *job;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    atomic_store(&the_session.step_us, 5000);
    request_init(&request, 3, 100);
    assert_int_equal(submit(run.engine, &request, &job), 0);
    wait_for(&request, 3);
    int steps = atomic_load(&the_session.steps);
    engine_cancel(run.engine, job, 0);
    wait_for(&request, -1);
    assert_true(atomic_load(&the_session.steps) - steps <= 2); // the one that ran, and one that had begun
    assert_int_equal(request.reason, FINISH_CANCELLED);
    assert_true(tokens_are_right(&request));
    assert_int_equal(drain_and_end(&run), 0);
    request_clear(&request);
}

static void test_drain(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        double timeout_s;
        int drains, rc;
        enum finish_reason reason;
    } cases[] = {
        {"what runs ends by itself", 20, 1, 0, FINISH_LENGTH},
        {"the time is over", 0.05, 1, ERR_SIGTERM, FINISH_ERROR},
        {"a second call ends at once", 20, 2, ERR_SIGTERM, FINISH_ERROR},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct run run = new_run();
        struct request first, late;
        struct engine_job *job;
        run.options.drain_timeout_s = cases[i].timeout_s;
        begin(&run);
        wait_for_state(&run, ENGINE_READY);
        atomic_store(&the_session.step_us, cases[i].rc ? 5000 : 500);
        request_init(&first, 9, 100);
        request_init(&late, 9, 100);
        assert_int_equal(submit(run.engine, &first, &job), 0);
        wait_for(&first, 1);
        for (int n = 0; n < cases[i].drains; n++)
            engine_drain(run.engine);
        wait_for_state(&run, ENGINE_DRAINING);
        assert_int_equal(submit(run.engine, &late, &job), ERR_RANK);
        wait_for(&first, -1);
        if (end(&run) != cases[i].rc || first.reason != cases[i].reason || first.ends != 1)
            fail_msg("%s: rc %d, reason %d, %d ends", cases[i].name, run.rc, first.reason, first.ends);
        request_clear(&first);
        request_clear(&late);
    }
}

static atomic_int alive;
static void count_alive(void) { atomic_fetch_add(&alive, 1); }

// How often it is said within so many milliseconds.
static int alive_within(int ms)
{
    int before = atomic_load(&alive);
    usleep((useconds_t)ms * 1000);
    return atomic_load(&alive) - before;
}

// The sign of life comes while ranks load, while nothing is to do and between steps, not while a step does not end.
static void test_alive(void **state)
{
    (void)state;
    struct run run = new_run();
    struct request request;
    struct engine_job *job;
    run.options.alive_s = 0.02;
    run.options.on_alive = count_alive;
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    int idle = alive_within(400);
    assert_true(idle >= 5 && idle <= 25);
    atomic_store(&the_session.step_us, 5000);
    request_init(&request, 3, 100);
    assert_int_equal(submit(run.engine, &request, &job), 0);
    wait_for(&request, 1);
    int working = alive_within(300);
    assert_true(working >= 3 && working <= 20);
    atomic_store(&the_session.step_us, 600000);
    usleep(50000); // the step that takes so long has begun
    assert_int_equal(alive_within(300), 0);
    atomic_store(&the_session.step_us, 0);
    engine_cancel(run.engine, job, -1);
    wait_for(&request, -1);
    assert_int_equal(drain_and_end(&run), 0);
    request_clear(&request);
    // Loading; the played ranks are held at the next start.
    run = new_run();
    run.options.alive_s = 0.05;
    run.options.on_alive = count_alive;
    atomic_store(&the_session.hold_load, 1);
    assert_int_equal(engine_create(&run.engine, &the_session, &run.options, NULL), 0);
    assert_int_equal(pthread_create(&run.thread, NULL, run_engine, &run), 0);
    assert_true(alive_within(900) >= 2);
    assert_int_equal(engine_state(run.engine), ENGINE_LOADING);
    assert_int_equal(drain_and_end(&run), 0);
    atomic_store(&the_session.hold_load, 0);
}

static void test_signal(void **state)
{
    (void)state;
    struct run run = new_run();
    sigset_t set, before;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, &before); // as the server's other threads do
    begin(&run);
    wait_for_state(&run, ENGINE_READY);
    kill(getpid(), SIGTERM);
    assert_int_equal(end(&run), 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    assert_int_equal(run.states[ENGINE_DRAINING], 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests),
        cmocka_unit_test(test_not_ready),
        cmocka_unit_test(test_drain_while_loading),
        cmocka_unit_test(test_full_queue),
        cmocka_unit_test(test_several_prompts),
        cmocka_unit_test(test_one_tenant_leaves_places),
        cmocka_unit_test(test_cancel_within_a_step),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_alive),
        cmocka_unit_test(test_signal),
    };
    alarm(120);
    return cmocka_run_group_tests(tests, set_up, NULL);
}

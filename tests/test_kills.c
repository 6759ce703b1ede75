// Ranks of a real model that are killed, or stopped, at random places of their work: while they start and load, in every operation of a step and
// between the phases of a collective. Always: no hang, the end within the deadline and two seconds, one sentence that names the rank and where it was
// to the letter, and nothing left behind.
//   KILLS=1000   so many (default 40; slow builds 8)
//   KILL=17      that one alone
#include "engine/launch.h"
#include "engine/session_internal.h"
#include "tests/entries_help.h"
#include "tests/patience.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { NUM_MODELS = 2, PROMPT_TOKENS = 12, OUTPUT_TOKENS = 4, MOST_RUNS = 200 };
static const int tp_sizes[NUM_MODELS] = {2, 4};
static const double deadline_s = PATIENCE * 0.5;

static char work[] = "/tmp/test_kills_XXXXXX";
static const char *build(void) { return getenv("BUILD") ? getenv("BUILD") : "build"; }

static long number_of(const char *variable, long otherwise)
{
    const char *value = getenv(variable);
    return value ? atol(value) : otherwise;
}

static uint64_t random_state;
static uint64_t random_below(uint64_t limit)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (random_state >> 33) % limit;
}

// ---- the model -----------------------------------------------------------------------------------------------------

static struct session *sessions[NUM_MODELS];
static uint64_t moves_of_a_run[NUM_MODELS]; // of the rank that moves least, from its start on

static int generate(struct session *session, struct error *err)
{
    uint32_t prompt[PROMPT_TOKENS];
    for (uint32_t i = 0; i < PROMPT_TOKENS; i++)
        prompt[i] = (i * i * 31 + 7 * i + 11) % 500;
    struct generation generation = {.prompt = prompt,
                                    .prompt_count = PROMPT_TOKENS,
                                    .max_tokens = OUTPUT_TOKENS,
                                    .ignore_eos = true,
                                    .sampling = {.top_p = 1, .repetition_penalty = 1}};
    return session_generate(session, &generation, 1, NULL, err);
}

static int open_models(void **state)
{
    (void)state;
    char text[512];
    struct error err;
    if (!mkdtemp(work))
        return 1;
    for (int i = 0; i < NUM_MODELS; i++) {
        snprintf(text, sizeof text, "%s/tpshard --tp %d --quant int4 tests/model %s/%d --quiet", build(), tp_sizes[i],
                 work, tp_sizes[i]);
        if (system(text) != 0)
            return 1;
        snprintf(text, sizeof text, "%s/%d", work, tp_sizes[i]);
        struct session_options options = session_defaults;
        options.context = 128;
        options.backend = "cpu";
        options.threads = 1;
        options.timeout_s = deadline_s;
        options.ranks = "process";
        options.recomputes = true;
        if (session_open(&sessions[i], text, &options, 1, 0, &err) || generate(sessions[i], &err)) {
            print_message("%s\n", err.msg);
            return 1;
        }
        moves_of_a_run[i] = UINT64_MAX;
        for (int rank = 0; rank < tp_sizes[i]; rank++) {
            uint64_t moves = launch_position(sessions[i]->launch, rank).progress;
            moves_of_a_run[i] = moves < moves_of_a_run[i] ? moves : moves_of_a_run[i];
        }
        session_stop(sessions[i]);
    }
    return 0;
}

static int close_models(void **state)
{
    (void)state;
    char text[64];
    for (int i = 0; i < NUM_MODELS; i++)
        session_close(sessions[i]);
    snprintf(text, sizeof text, "rm -r %s", work);
    return system(text) != 0;
}

// ---- the killer ----------------------------------------------------------------------------------------------------

struct killer {
    const struct launch *launch;
    int rank, signal;
    uint64_t at_move;
    _Atomic bool over; // the run is; nothing more is to be killed
    bool done;
    struct stopwatch watch; // since then
};

// A rank that starts has two minutes for it, so there it is killed in any case.
static bool is_at_start(struct comm_position at) { return at.op <= OP_HANDSHAKE; }

static void *wait_and_kill(void *arg)
{
    struct killer *killer = arg;
    struct comm_position at;
    do {
        if (atomic_load(&killer->over))
            return NULL;
        at = launch_position(killer->launch, killer->rank);
    } while (at.progress < killer->at_move);
    if (is_at_start(at))
        killer->signal = SIGKILL;
    killer->done = true;
    killer->watch = stopwatch_start();
    kill((pid_t)launch_pid(killer->launch, killer->rank), killer->signal);
    return NULL;
}

static void expect_sentence(const struct killer *killer, const char *msg, struct comm_position at)
{
    char place[COMM_PLACE_BYTES], wanted[2][160], stopped[160];
    comm_place(place, at.op, at.layer);
    snprintf(wanted[0], sizeof wanted[0],
             killer->signal == SIGKILL ? "rank %d was ended by signal 9 (Killed) in %s" : "rank %d was last seen in %s",
             killer->rank, place);
    snprintf(wanted[1], sizeof wanted[1], "rank %d has made no progress for ", killer->rank);
    const char *other = killer->signal == SIGSTOP ? strstr(msg, "; it was last seen in ") : NULL;
    snprintf(stopped, sizeof stopped, "%s; the process of rank %d is stopped", place, killer->rank);
    bool second = other && strncmp(msg, wanted[1], strlen(wanted[1])) == 0 &&
                  strcmp(other + strlen("; it was last seen in "), stopped) == 0;
    if ((!strstr(msg, wanted[0]) && !second) || (killer->signal == SIGSTOP && !strstr(msg, stopped)))
        fail_msg("signal %d: \"%s\", wanted \"%s\"", killer->signal, msg, wanted[0]);
}

struct tally {
    int places[OP_COUNT], kills, stops;
    double kill_s[1000], stop_s[1000];
};

static void kill_one(long number, struct tally *tally)
{
    random_state = (uint64_t)number * 0x9e3779b97f4a7c15u + 5;
    random_below(1);
    const int model = (int)random_below(NUM_MODELS);
    struct session *session = sessions[model];
    struct error err = {0};
    struct killer killer = {.rank = (int)random_below((uint64_t)tp_sizes[model]),
                            .signal = random_below(2) ? SIGKILL : SIGSTOP};
    // One in eight in what comes first, which are few moves.
    killer.at_move = random_below(8) ? random_below(moves_of_a_run[model]) : random_below(8);
    pthread_t thread;
    int rc = session_launch(session, &err), pids[8];
    if (rc)
        fail_msg("kill %ld: the start: %s", number, err.msg);
    killer.launch = session->launch;
    for (int rank = 0; rank < tp_sizes[model]; rank++)
        pids[rank] = (int)launch_pid(session->launch, rank);
    assert_int_equal(pthread_create(&thread, NULL, wait_and_kill, &killer), 0);
    for (int run = 0; run < MOST_RUNS && !rc; run++)
        rc = generate(session, &err);
    atomic_store(&killer.over, true);
    pthread_join(thread, NULL);
    if (!killer.done || rc != ERR_RANK)
        fail_msg("kill %ld, rank %d at move %d: returned %d: %s", number, killer.rank, (int)killer.at_move, rc,
                 err.msg);
    double took_s = stopwatch_s(&killer.watch), idle_s = stopwatch_idle_s(&killer.watch);
    struct comm_position at = launch_position(session->launch, killer.rank);
    expect_sentence(&killer, err.msg, at);
    assert_int_equal(launch_lost_rank(session->launch), killer.rank);
    for (int rank = 0; rank < tp_sizes[model]; rank++)
        if (kill(pids[rank], 0) == 0 || errno != ESRCH)
            fail_msg("kill %ld: process %d of rank %d is still there", number, pids[rank], rank);
    if (!(idle_s < (killer.signal == SIGSTOP ? deadline_s : 0) + PATIENCE * 2))
        fail_msg("kill %ld: over after %.3f s: %s", number, took_s, err.msg);
    session_stop(session);
    tally->places[at.op]++;
    if (killer.signal == SIGKILL)
        tally->kill_s[tally->kills++ % 1000] = took_s;
    else
        tally->stop_s[tally->stops++ % 1000] = took_s;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void tell_times(const char *what, double *seconds, int count)
{
    count = count < 1000 ? count : 1000;
    qsort(seconds, (size_t)count, sizeof *seconds, by_size);
    if (count > 0)
        print_message("%d %s: all had ended after %.0f ms (median), %.0f ms (longest)\n", count, what,
                      1e3 * seconds[count / 2], 1e3 * seconds[count - 1]);
}

static void test_random_kills(void **state)
{
    (void)state;
#ifdef KERNELS_SANITIZED
    const long kills = number_of("KILLS", 8), only = number_of("KILL", -1);
#else
    const long kills = number_of("KILLS", 40), only = number_of("KILL", -1);
#endif
    static struct tally tally;
    int descriptors = count_descriptors(), shm = count_entries_named("/dev/shm", "tpengine");
    for (long i = 0; i < kills; i++)
        if (only < 0 || i == only)
            kill_one(i, &tally);
    tell_times("kills", tally.kill_s, tally.kills);
    tell_times("stops", tally.stop_s, tally.stops);
    for (int op = 0; op < OP_COUNT; op++)
        print_message("  in %s: %d\n", comm_operation_name((enum comm_operation)op), tally.places[op]);
    for (int i = 0; i < NUM_MODELS; i++) { // and after all that they still work
        struct error err;
        if (generate(sessions[i], &err))
            fail_msg("%s", err.msg);
        session_stop(sessions[i]);
    }
    assert_int_equal(count_descriptors(), descriptors);
    assert_int_equal(count_entries_named("/dev/shm", "tpengine"), shm);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_random_kills)};
    return cmocka_run_group_tests(tests, open_models, close_models);
}

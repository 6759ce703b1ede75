// The engine's side of a probe of links (engine/link_probe.c), with ends that move no bytes: orders, pairs at the same time, verdicts, ends that hang at any
// place, die, fail, or cannot be started; what is tried again after that, and what is not; deadlines; and a probe that is ended in the middle.
#include "engine/link_probe.h"
#include "kernels/clock.h"
#include "tests/patience.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

// ---- the stand-in: what each end does, by the direction or the order ---------------------------------------------------

enum act { ACT_WELL, ACT_REFUSED, ACT_LOST, ACT_SLOW, ACT_HANGS, ACT_DIES, ACT_FAILS, ACT_RETURNS, ACT_STAYS };
enum { ENDS = 9 };

static struct {
    enum act look[ENDS], open[ENDS]; // by end
    enum act pair[ENDS][ENDS];       // by the end that acts, and the other
    enum link_doing doing;           // of an end that hangs in a pair
    int devices;                     // end e is on device e % devices
    int slow_end;                    // reads its orders late; -1: none
    int together;                    // ends that a pair waits for before it goes on
} script;

// Ends count what they do, for all processes.
static struct tally {
    _Atomic uint32_t opened[ENDS], pairs[ENDS][ENDS];
    _Atomic uint32_t inside[4 * ENDS], most_inside; // ends in such an order, by its number
    _Atomic int pid[ENDS];
    _Atomic int tracer;           // -1: it may not trace
    _Atomic uint32_t overwritten; // orders, before an end had read them
} * tally;

// From now on this process cannot be seen to die: who traces it would have to look first, and does not.
static void be_traced(void)
{
    pid_t me = getpid();
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    if (fork() == 0) {
        atomic_store(&tally->tracer, ptrace(PTRACE_SEIZE, me, NULL, NULL) == 0 ? getpid() : -1);
        for (int s = 0; s < 300 && atomic_load(&tally->tracer) > 0; s++)
            sleep(1);
        _exit(0);
    }
    while (atomic_load(&tally->tracer) == 0)
        usleep(100);
}

static int perform(struct link_board *board, int end, int other, enum act act, struct error *err)
{
    struct link_result *result = other < 0 ? NULL : &board->result[end][other];
    switch (act) {
    case ACT_WELL:
        break;
    case ACT_REFUSED:
    case ACT_LOST:
    case ACT_SLOW:
        if (result && result->fault == LINK_UNTRIED) {
            snprintf(result->sentence, sizeof result->sentence, "link %d to %d", end, other);
            result->fault = act == ACT_LOST ? LINK_LOST : act == ACT_SLOW ? LINK_SLOW : LINK_REFUSED;
        }
        break;
    case ACT_STAYS:
        be_traced();
        // fall through
    case ACT_HANGS:
        signal(SIGTERM, SIG_IGN);
        for (;;)
            pause();
    case ACT_DIES:
        raise(SIGKILL);
        break;
    case ACT_FAILS:
        return error_set(err, ERR_GPU, "end %d has a bad day", end);
    case ACT_RETURNS:
        _exit(0);
    }
    return 0;
}

static int look(struct link_board *board, int end, struct error *err)
{
    int rc = perform(board, end, -1, script.look[end], err);
    board->end[end].device = end % script.devices;
    for (int other = 0; other < board->num_ends && !rc; other++)
        if (other != end && other / board->group == end / board->group)
            rc = perform(board, end, other, script.look[end], err);
    return rc;
}

// Until so many ends are in this order.
static void come_together(const struct link_board *board)
{
    uint32_t number = atomic_load(&board->order.number) % (4 * ENDS),
             inside = atomic_fetch_add(&tally->inside[number], 1) + 1;
    uint32_t most = atomic_load(&tally->most_inside);
    while (inside > most && !atomic_compare_exchange_weak(&tally->most_inside, &most, inside))
        ;
    while (atomic_load(&tally->inside[number]) < (uint32_t)script.together)
        usleep(100);
}

static int try_pair(struct link_board *board, int end, int other, struct error *err)
{
    struct link_end *me = &board->end[end];
    atomic_fetch_add(&tally->pairs[end][other], 1);
    come_together(board);
    atomic_store(&me->bytes, 4096);
    atomic_store(&me->means, LINK_BY_COPY);
    if (board->result[end][other].fault == LINK_UNTRIED) { // else it is known by now
        atomic_store(&me->doing, script.pair[end][other] == ACT_HANGS || script.pair[end][other] == ACT_STAYS
                                     ? script.doing
                                     : LINK_MEETING);
        int rc = perform(board, end, other, script.pair[end][other], err);
        if (rc)
            return rc;
    }
    atomic_store(&me->doing, LINK_MEETING);
    atomic_fetch_add(&me->steps, 1);
    while (atomic_load(&board->end[other].steps) == 0)
        usleep(100);
    if (board->result[end][other].fault == LINK_UNTRIED)
        board->result[end][other].fault = LINK_GOOD;
    return 0;
}

static int stand_in(struct link_board *board, int end, struct error *err)
{
    uint32_t number = atomic_load(&board->end[end].taken);
    atomic_store(&tally->pid[end], getpid());
    for (int rc = 0;;) {
        while (atomic_load(&board->order.number) == number)
            usleep(100);
        enum link_order kind = (enum link_order)board->order.kind;
        int other = board->order.other[end];
        number = atomic_load(&board->order.number);
        if (end == script.slow_end)
            usleep(20000);
        if (atomic_load(&board->order.number) != number || board->order.other[end] != other)
            atomic_fetch_add(&tally->overwritten, 1);
        if (kind == LINK_ORDER_END)
            return 0;
        atomic_store(&board->end[end].doing, kind == LINK_ORDER_LOOK ? LINK_ASKING : LINK_OPENING);
        if (kind == LINK_ORDER_LOOK)
            rc = look(board, end, err);
        else if (kind == LINK_ORDER_OPEN)
            rc = perform(board, end, -1, script.open[end], err);
        else if (other >= 0)
            rc = try_pair(board, end, other, err);
        if (kind == LINK_ORDER_OPEN)
            atomic_fetch_add(&tally->opened[end], 1);
        if (rc)
            return rc;
        atomic_store(&board->end[end].taken, number);
    }
}

static const struct backend backend = {.name = "stand-in", .link_probe = stand_in};

// ---- running it --------------------------------------------------------------------------------------------------------

static void begin_script(void)
{
    memset(&script, 0, sizeof script);
    memset(tally, 0, sizeof *tally);
    script.devices = ENDS;
    script.slow_end = -1;
    script.doing = LINK_WRITING;
}

static struct link_probe_options options_for(int ends, int group, bool all)
{
    struct link_probe_options options = link_probe_defaults;
    options.backend = &backend;
    options.num_ends = ends;
    options.group = group;
    options.all = all;
    options.open_s = options.step_s = 0.4 * PATIENCE;
    return options;
}

static struct link_probe *probe(const struct link_probe_options *options)
{
    struct link_probe *p = NULL;
    struct error err;
    if (link_probe_begin(&p, options, &err))
        fail_msg("%s", err.msg);
    return p;
}

static struct link_probe *probed(const struct link_probe_options *options)
{
    struct link_probe *p = probe(options);
    link_probe_wait(p);
    assert_true(link_probe_is_done(p));
    return p;
}

static void expect_fault(const struct link_probe *p, int a, int b, enum link_fault fault, const char *words)
{
    const struct link_result *result = &link_probe_board(p)->result[a][b];
    if (result->fault != (uint32_t)fault || !strstr(result->sentence, words))
        fail_msg("link %d to %d: %s \"%s\" instead of %s \"%s\"", a, b, link_fault_name((enum link_fault)result->fault),
                 result->sentence, link_fault_name(fault), words);
}

static void expect_verdict(const struct link_probe *p, const char *words)
{
    char why[LINK_SENTENCE_BYTES];
    bool good = link_probe_verdict(p, why);
    if (good != (words == NULL) || !strstr(why, words ? words : ""))
        fail_msg("verdict %d \"%s\" instead of \"%s\"", good, why, words ? words : "good");
}

static uint32_t tries(int a, int b) { return atomic_load(&tally->pairs[a][b]); }

// Nothing that the probe has started lives on.
static void expect_no_process(void)
{
    for (int end = 0; end < ENDS; end++) {
        int pid = atomic_load(&tally->pid[end]);
        for (int ms = 0; pid > 0 && kill(pid, 0) == 0; ms++) {
            char path[64], text[256] = "";
            snprintf(path, sizeof path, "/proc/%d/stat", pid);
            FILE *f = fopen(path, "re");
            if (f) {
                text[fread(text, 1, sizeof text - 1, f)] = 0;
                fclose(f);
            }
            if (strstr(text, ") Z ")) // whoever adopted it has not yet looked
                break;
            if (ms == 10000)
                fail_msg("end %d lives on", end);
            usleep(1000);
        }
    }
}

// ---- tests ---------------------------------------------------------------------------------------------------------------

static void test_all_good(void **state)
{
    (void)state;
    for (int all = 0; all < 2; all++) {
        begin_script();
        struct link_probe_options options = options_for(4, 4, all);
        struct link_probe *p = probed(&options);
        expect_verdict(p, NULL);
        for (int a = 0; a < 4; a++)
            for (int b = 0; b < 4; b++)
                assert_int_equal(tries(a, b), a != b);
        expect_fault(p, 3, 0, LINK_GOOD, "");
        expect_fault(p, 2, 2, LINK_UNTRIED, "");
        link_probe_end(p);
        expect_no_process();
    }
}

// Pairs are tried at the same time, in as few turns as there can be; or one by one.
static void test_turns(void **state)
{
    (void)state;
    static const struct {
        int ends, group;
        uint32_t turns, inside;
    } cases[] = {{2, 2, 1, 2}, {3, 3, 3, 2}, {4, 4, 3, 4}, {5, 5, 5, 4},
                 {6, 6, 5, 6}, {8, 8, 7, 8}, {9, 9, 9, 8}, {8, 4, 3, 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int at_once = 0; at_once < 2; at_once++) {
            begin_script();
            script.together = at_once ? (int)cases[i].inside : 2;
            struct link_probe_options options = options_for(cases[i].ends, cases[i].group, true);
            options.at_once = at_once;
            struct link_probe *p = probed(&options);
            uint32_t pairs = 0, orders = atomic_load(&link_probe_board(p)->order.number);
            expect_verdict(p, NULL);
            for (int a = 0; a < cases[i].ends; a++)
                for (int b = 0; b < cases[i].ends; b++) {
                    bool is_pair = a != b && a / cases[i].group == b / cases[i].group;
                    assert_int_equal(tries(a, b), is_pair);
                    pairs += is_pair && a < b;
                }
            assert_int_equal(atomic_load(&tally->most_inside), at_once ? cases[i].inside : 2);
            assert_int_equal(orders, 3 + (at_once ? cases[i].turns : pairs)); // to look, to open, to end
            link_probe_end(p);
        }
}

// Who is late or gone holds up nobody: the others of its turn come to their ends, and are not tried again.
static void test_others_of_a_turn(void **state)
{
    (void)state;
    static const enum act acts[] = {ACT_HANGS, ACT_DIES};
    for (size_t i = 0; i < sizeof acts / sizeof *acts; i++) {
        begin_script();
        script.together = 4;
        script.pair[0][1] = acts[i];
        struct link_probe_options options = options_for(4, 4, true);
        struct link_probe *p = probed(&options);
        expect_fault(p, 0, 1, acts[i] == ACT_HANGS ? LINK_LATE : LINK_FAILED, "");
        for (int a = 0; a < 4; a++)
            for (int b = 0; b < 4; b++) {
                if (a == b || a + b == 1)
                    continue;
                expect_fault(p, a, b, LINK_GOOD, "");
                assert_int_equal(tries(a, b), 1);
            }
        link_probe_end(p);
        expect_no_process();
    }
}

// Where pairs hang, those that were to be tried one after the other are not any more: there would be no time for all.
static void test_hurry(void **state)
{
    (void)state;
    enum { ORDERS = 3 + 2 + 3 + 1 }; // to look, to open, the pair; again, with turns of two, two pairs and one; to end
    begin_script();
    script.pair[0][1] = ACT_HANGS;
    struct link_probe_options options = options_for(4, 4, true);
    options.at_once = false;
    struct link_probe *p = probed(&options);
    expect_fault(p, 0, 1, LINK_LATE, "");
    expect_fault(p, 2, 3, LINK_GOOD, "");
    assert_int_equal(atomic_load(&link_probe_board(p)->order.number), ORDERS);
    link_probe_end(p);
}

// Ends on one device keep it to themselves while they are tried.
static void test_shared_devices(void **state)
{
    (void)state;
    begin_script();
    script.devices = 2;
    script.together = 2;
    struct link_probe_options options = options_for(4, 4, true);
    struct link_probe *p = probed(&options);
    expect_verdict(p, NULL);
    assert_int_equal(tries(0, 1) + tries(0, 3) + tries(2, 1) + tries(2, 3), 1);
    link_probe_end(p);
}

// A link that is slow delivers: it ends nothing, and others that do not are what is said.
static void test_slow_link(void **state)
{
    (void)state;
    for (int lost = 0; lost < 2; lost++) {
        begin_script();
        script.pair[0][1] = ACT_SLOW;
        script.pair[2][1] = lost ? ACT_LOST : ACT_WELL;
        struct link_probe_options options = options_for(3, 3, false);
        struct link_probe *p = probed(&options);
        expect_fault(p, 0, 1, LINK_SLOW, "link 0 to 1");
        expect_fault(p, 1, 0, LINK_GOOD, "");
        assert_int_equal(tries(1, 2), 1);
        assert_int_equal(link_probe_delivers(p), !lost);
        expect_verdict(p, lost ? "link 2 to 1" : "link 0 to 1");
        link_probe_end(p);
    }
}

// An end that has nothing to do with a pair still reads the order, however late.
static void test_slow_reader(void **state)
{
    (void)state;
    for (int end = 0; end < 3; end++) {
        begin_script();
        script.slow_end = end;
        struct link_probe_options options = options_for(3, 3, true);
        struct link_probe *p = probed(&options);
        expect_verdict(p, NULL);
        assert_int_equal(atomic_load(&tally->overwritten), 0);
        link_probe_end(p);
    }
}

// Ranks of other stages exchange nothing with these; ranks on the devices of others before them need no trial of their own.
static void test_groups_and_twins(void **state)
{
    (void)state;
    begin_script();
    struct link_probe_options options = options_for(4, 2, true);
    struct link_probe *p = probed(&options);
    expect_verdict(p, NULL);
    assert_int_equal(tries(0, 1) + tries(2, 3), 2);
    assert_int_equal(tries(0, 2) + tries(1, 2) + tries(0, 3) + tries(1, 3), 0);
    link_probe_end(p);

    begin_script();
    script.devices = 2;
    script.pair[0][1] = ACT_LOST;
    options = options_for(4, 4, true);
    p = probed(&options);
    expect_verdict(p, "link 0 to 1");
    assert_int_equal(tries(0, 1), 1);
    assert_int_equal(tries(0, 3) + tries(2, 3) + tries(1, 2),
                     0);                            // as (0, 1) or the other way round, never at the same time
    assert_int_equal(tries(0, 2) + tries(1, 3), 2); // on one device each
    expect_fault(p, 0, 3, LINK_LOST, "link 0 to 1");
    expect_fault(p, 3, 0, LINK_GOOD, "");
    expect_fault(p, 2, 1, LINK_LOST, "link 0 to 1");
    expect_fault(p, 1, 2, LINK_GOOD, "");
    link_probe_end(p);
}

// One bad link ends it for ranks, which take another way then; the doctor wants to know of all.
static void test_first_bad_link(void **state)
{
    (void)state;
    for (int all = 0; all < 2; all++) {
        begin_script();
        script.pair[1][0] = ACT_LOST;
        struct link_probe_options options = options_for(3, 3, all);
        struct link_probe *p = probed(&options);
        expect_verdict(p, "link 1 to 0");
        expect_fault(p, 0, 1, LINK_GOOD, "");
        expect_fault(p, 1, 0, LINK_LOST, "link 1 to 0");
        expect_fault(p, 1, 2, all ? LINK_GOOD : LINK_UNTRIED, "");
        link_probe_end(p);
    }
}

static void test_hangs(void **state)
{
    (void)state;
    static const struct {
        enum link_doing doing;
        const char *sentence;
        bool both; // directions are condemned
    } cases[] = {
        {LINK_WRITING, "a write of 4096 bytes by a copy engine from device 1 to device 2 did not end within 0.", false},
        {LINK_READING, "a read of 4096 bytes by a copy engine of device 1 from device 2 did not end", false},
        {LINK_MAPPING, "device 1 did not map the memory of device 2 within", false},
        {LINK_LOOKING, "device 1 did not write and read its own memory", true},
        {LINK_CALLING, "kernels that write to each other between devices 1 and 2 did not end", true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_script();
        script.pair[1][2] = ACT_HANGS;
        script.doing = cases[i].doing;
        struct link_probe_options options = options_for(3, 3, true);
        struct link_probe *p = probed(&options);
        expect_fault(p, 1, 2, LINK_LATE, cases[i].sentence + (PATIENCE > 1 && i == 0));
        expect_fault(p, 2, 1, cases[i].both ? LINK_LATE : LINK_GOOD, "");
        bool crossing =
            cases[i].doing == LINK_WRITING || cases[i].doing == LINK_READING || cases[i].doing == LINK_CALLING;
        assert_int_equal(link_probe_board(p)->result[1][2].crossing, crossing);
        expect_fault(p, 0, 1, LINK_GOOD, "");
        expect_fault(p, 2, 0, LINK_GOOD, "");
        assert_int_equal(tries(0, 1), 1); // what was known stays known
        assert_true(link_probe_board(p)->seconds < 30);
        link_probe_end(p);
        expect_no_process();
    }
}

static void test_ends_that_go(void **state)
{
    (void)state;
    static const struct {
        enum act act;
        const char *sentence;
    } cases[] = {
        {ACT_DIES, "1 was ended by signal 9"},
        {ACT_FAILS, "end 1 has a bad day"},
        {ACT_RETURNS, "1 ended with status 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_script();
        script.pair[1][2] = cases[i].act; // with one other end
        struct link_probe_options options = options_for(3, 3, true);
        struct link_probe *p = probed(&options);
        expect_fault(p, 1, 2, LINK_FAILED, cases[i].sentence);
        expect_fault(p, 0, 1, LINK_GOOD, "");
        expect_fault(p, 0, 2, LINK_GOOD, "");
        link_probe_end(p);

        for (int opening = 0; opening < 2; opening++) { // with all of them
            begin_script();
            (opening ? script.open : script.look)[1] = cases[i].act;
            options = options_for(3, 3, true);
            p = probed(&options);
            for (int other = 0; other <= 2; other += 2) {
                expect_fault(p, 1, other, LINK_FAILED, cases[i].sentence);
                expect_fault(p, other, 1, LINK_FAILED, cases[i].sentence);
            }
            expect_fault(p, 0, 2, LINK_GOOD, "");
            link_probe_end(p);
        }
    }
}

// A driver that does not start, and a device that does not open: the others are tried without it.
static void test_late_starts(void **state)
{
    (void)state;
    for (int opening = 0; opening < 2; opening++) {
        begin_script();
        (opening ? script.open : script.look)[2] = ACT_HANGS;
        struct link_probe_options options = options_for(3, 3, true);
        struct link_probe *p = probed(&options);
        const char *sentence = opening ? "device 2 could not be opened within" : "the driver did not start within";
        expect_fault(p, 0, 2, LINK_LATE, sentence);
        expect_fault(p, 2, 1, LINK_LATE, sentence);
        expect_fault(p, 0, 1, LINK_GOOD, "");
        link_probe_end(p);
        expect_no_process();
    }
}

// Where a driver lets no pair through, no device is opened, hence no memory taken.
static void test_refused(void **state)
{
    (void)state;
    for (int all = 0; all < 2; all++) {
        begin_script();
        for (int a = 0; a < 3; a++)
            script.look[a] = ACT_REFUSED;
        struct link_probe_options options = options_for(3, 3, all);
        struct link_probe *p = probed(&options);
        expect_verdict(p, "link 0 to 1");
        expect_fault(p, 2, 1, LINK_REFUSED, "link 2 to 1");
        assert_int_equal(atomic_load(&tally->opened[1]), 0);
        link_probe_end(p);
    }
}

// A process that hangs in a driver does not end when it is killed: no other is sent after it.
static void test_unkillable(void **state)
{
    (void)state;
    begin_script();
    script.pair[0][1] = ACT_STAYS;
    struct link_probe_options options = options_for(3, 3, true);
    struct link_probe *p = probed(&options);
    int tracer = atomic_load(&tally->tracer);
    if (tracer > 0)
        kill(tracer, SIGKILL);
    if (tracer > 0) {
        expect_fault(p, 0, 1, LINK_LATE, "did not end within");
        expect_fault(p, 1, 2, LINK_LATE, "which tried the links of device 0, hangs in the driver");
        expect_fault(p, 2, 0, LINK_LATE, "hangs in the driver");
        assert_int_equal(tries(0, 2) + tries(1, 2), 0);
    }
    link_probe_end(p);
    if (tracer <= 0)
        skip();
}

static void test_time_is_up(void **state)
{
    (void)state;
    begin_script();
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++)
            script.pair[a][b] = ACT_HANGS;
    struct link_probe_options options = options_for(4, 4, true);
    options.seconds = options.step_s * 1.5;
    struct link_probe *p = probed(&options);
    expect_verdict(p, "did not end within");
    expect_fault(p, 3, 0, LINK_LATE, "there was no time left for it after");
    assert_true(link_probe_board(p)->seconds < 20 * PATIENCE);
    link_probe_end(p);
    expect_no_process();
}

static void test_ended_in_the_middle(void **state)
{
    (void)state;
    begin_script();
    script.pair[0][1] = ACT_HANGS;
    struct link_probe_options options = options_for(2, 2, true);
    options.step_s = 1000;
    double begin_s = clock_now_s();
    struct link_probe *p = probe(&options);
    while (tries(0, 1) + tries(1, 0) < 2)
        usleep(1000);
    char why[LINK_SENTENCE_BYTES];
    assert_false(link_probe_verdict(p, why));
    assert_non_null(strstr(why, "was not done after"));
    assert_false(link_probe_has_ended(p));
    link_probe_end(p);
    expect_no_process();
    assert_true(clock_now_s() - begin_s < 60);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
}

// Who waits for a probe that nobody watches any more waits no longer.
static void test_watcher_lost(void **state)
{
    (void)state;
    begin_script();
    script.pair[0][1] = ACT_HANGS;
    struct link_probe_options options = options_for(2, 2, true);
    options.step_s = 1000;
    struct link_probe *p = probe(&options);
    while (tries(0, 1) + tries(1, 0) < 2)
        usleep(1000);
    char path[64];
    int watcher = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", getpid(), getpid());
    FILE *f = fopen(path, "re");
    if (!f || fscanf(f, "%d", &watcher) != 1 || watcher <= 0)
        skip();
    fclose(f);
    kill(watcher, SIGKILL);
    struct stopwatch watch = stopwatch_start();
    link_probe_wait(p);
    assert_true(stopwatch_idle_s(&watch) < 30);
    assert_false(link_probe_is_done(p));
    link_probe_end(p);
    expect_no_process();
}

static void test_refused_options(void **state)
{
    (void)state;
    static const struct backend without = {.name = "without"};
    struct link_probe *p = NULL;
    struct error err;
    struct link_probe_options options = options_for(2, 2, true);
    options.num_ends = LINK_ENDS + 1;
    assert_int_equal(link_probe_begin(&p, &options, &err), ERR_USAGE);
    options = options_for(2, 2, true);
    options.backend = &without;
    assert_int_equal(link_probe_begin(&p, &options, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "the without backend"));
    options = options_for(2, 2, true);
    options.largest_bytes = LINK_MOST_BYTES + 1;
    assert_int_equal(link_probe_begin(&p, &options, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "16777217 bytes"));
    assert_null(p);
    link_probe_end(NULL);
}

int main(void)
{
    tally = mmap(NULL, sizeof *tally, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (tally == MAP_FAILED)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_good),         cmocka_unit_test(test_turns),
        cmocka_unit_test(test_others_of_a_turn), cmocka_unit_test(test_hurry),
        cmocka_unit_test(test_shared_devices),   cmocka_unit_test(test_slow_link),
        cmocka_unit_test(test_slow_reader),      cmocka_unit_test(test_groups_and_twins),
        cmocka_unit_test(test_first_bad_link),   cmocka_unit_test(test_hangs),
        cmocka_unit_test(test_ends_that_go),     cmocka_unit_test(test_late_starts),
        cmocka_unit_test(test_refused),          cmocka_unit_test(test_unkillable),
        cmocka_unit_test(test_time_is_up),       cmocka_unit_test(test_ended_in_the_middle),
        cmocka_unit_test(test_watcher_lost),     cmocka_unit_test(test_refused_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// Starting, ordering and watching the ends of a probe of links. See link_probe.h.
#include "engine/link_probe.h"

#include "engine/process.h"
#include "kernels/clock.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LOOK_US = 200, END_S = 2, LOST_S = 5 };
#define MOST_LOOK_S 0.1 // between two looks

const struct link_probe_options link_probe_defaults = {
    .open_s = 30,
    .step_s = 5,
    .seconds = 90,
    .at_once = true,
    .largest_bytes = LINK_MOST_BYTES,
};

struct link_probe {
    struct link_board *board; // all processes'
    struct link_probe_options options;
    int64_t begin_ns;
    pid_t pid;             // who watches
    pid_t pids[LINK_ENDS]; // its children; 0: none
    int device[LINK_ENDS]; // as they were wanted
    bool hurries;          // some hung, which takes time that the others may miss
};

const char *link_fault_name(enum link_fault fault)
{
    static const char *const names[] = {"untried", "good", "refused", "lost", "changed",
                                        "stale",   "late", "failed",  "slow"};
    return (unsigned)fault < sizeof names / sizeof *names ? names[fault] : "unknown";
}

static bool is_pair(const struct link_board *board, int a, int b)
{
    return a != b && a / board->group == b / board->group;
}

static void condemn(struct link_board *board, int a, int b, enum link_fault fault, const char *sentence)
{
    struct link_result *result = &board->result[a][b];
    if (result->fault != LINK_UNTRIED && result->fault != LINK_GOOD)
        return;
    snprintf(result->sentence, sizeof result->sentence, "%s", sentence);
    result->fault = fault;
}

// All pairs of an end that have no verdict yet.
static void condemn_end(struct link_board *board, int end, enum link_fault fault, const char *sentence)
{
    for (int other = 0; other < board->num_ends; other++)
        if (is_pair(board, end, other)) {
            if (board->result[end][other].fault == LINK_UNTRIED)
                condemn(board, end, other, fault, sentence);
            if (board->result[other][end].fault == LINK_UNTRIED)
                condemn(board, other, end, fault, sentence);
        }
}

// Between two looks: also says that the watch goes on.
static void rest(const struct link_probe *p)
{
    atomic_store(&p->board->watched_ns, (uint64_t)clock_now_ns());
    usleep(LOOK_US);
}

// ---- the ends ------------------------------------------------------------------------------------------------------

// Set before the look at the parent: it cannot end unseen in between.
static void end_with(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

static void run_end(struct link_probe *p, int end, pid_t parent)
{
    struct error err = {.code = 0};
    end_with(parent);
    int rc = p->options.backend->link_probe(p->board, end, &err);
    if (rc)
        p->board->end[end].err = err;
    _exit(rc ? 1 : 0);
}

static void start_ends(struct link_probe *p)
{
    struct link_board *board = p->board;
    pid_t parent = getpid();
    for (int end = 0; end < board->num_ends; end++) {
        struct link_end *e = &board->end[end];
        e->device = p->device[end];
        atomic_store(&e->taken, atomic_load(&board->order.number));
        atomic_store(&e->doing, LINK_IDLE);
        p->pids[end] = e->err.code ? 0 : fork();
        if (p->pids[end] == 0 && !e->err.code)
            run_end(p, end, parent);
        if (p->pids[end] < 0) {
            error_set_errno(&e->err, "cannot start a process");
            condemn_end(board, end, LINK_FAILED, e->err.msg);
            p->pids[end] = 0;
        }
    }
}

// The pair that was being tried when an end went by itself, or else every pair of that end, has failed.
static void note_gone(struct link_probe *p, int end, int status)
{
    struct link_board *board = p->board;
    struct link_end *e = &board->end[end];
    char sentence[LINK_SENTENCE_BYTES];
    p->pids[end] = 0;
    bool known = e->device >= 0; // its device
    const char *whose = known ? "device" : "rank";
    int number = known ? e->device : end;
    if (!e->err.code && WIFSIGNALED(status))
        error_set(&e->err, ERR_GPU, "the process of %s %d was ended by signal %d", whose, number, WTERMSIG(status));
    else if (!e->err.code)
        error_set(&e->err, ERR_GPU, "the process of %s %d ended with status %d", whose, number, WEXITSTATUS(status));
    snprintf(sentence, sizeof sentence, "%.200s", e->err.msg);
    if (board->order.kind != LINK_ORDER_PAIRS) {
        condemn_end(board, end, LINK_FAILED, sentence);
        return;
    }
    e->err.code = 0; // it may do better with others
    int other = board->order.other[end];
    if (other >= 0) {
        condemn(board, end, other, LINK_FAILED, sentence);
        condemn(board, other, end, LINK_FAILED, sentence);
    }
}

static bool gone(struct link_probe *p, int end)
{
    int status = 0;
    if (p->pids[end] == 0)
        return true;
    if (waitpid(p->pids[end], &status, WNOHANG) == p->pids[end])
        note_gone(p, end, status);
    return p->pids[end] == 0;
}

// At most so many seconds; kills those that are left. One that does not even die is given up, and stays in p->pids.
static void end_ends(struct link_probe *p, double seconds)
{
    for (int kills = 0; kills < 2; kills++) {
        double end_s = clock_now_s() + (kills ? END_S : seconds);
        for (bool any = true; any && clock_now_s() < end_s;) {
            any = false;
            for (int end = 0; end < p->board->num_ends; end++) {
                if (p->pids[end] && waitpid(p->pids[end], NULL, WNOHANG) != 0)
                    p->pids[end] = 0;
                any = any || p->pids[end];
            }
            if (any)
                rest(p);
        }
        for (int end = 0; end < p->board->num_ends; end++)
            if (p->pids[end])
                kill(p->pids[end], SIGKILL);
    }
}

// ---- orders --------------------------------------------------------------------------------------------------------

static double left_s(const struct link_probe *p) { return p->options.seconds - link_probe_age_s(p); }

// A pair that is being tried.
struct pair {
    int a, b;
    bool over;
    uint64_t mark;   // of what its ends were at when they last moved
    double waited_s; // since then
};

static void post_order(struct link_probe *p, enum link_order kind, const struct pair *pairs, int count)
{
    struct link_board *board = p->board;
    for (int end = 0; end < board->num_ends; end++) {
        atomic_store(&board->end[end].steps, 0);
        board->order.other[end] = -1;
    }
    for (int i = 0; i < count; i++) {
        board->order.other[pairs[i].a] = pairs[i].b;
        board->order.other[pairs[i].b] = pairs[i].a;
    }
    board->order.kind = (uint32_t)kind;
    atomic_fetch_add(&board->order.number, 1);
}

static bool has_taken(const struct link_board *board, int end)
{
    return atomic_load(&board->end[end].taken) == atomic_load(&board->order.number);
}

// What an end is at, as the reason why a direction is late: "a copy of 4096 bytes from device 0 to device 1".
static void describe_late(char text[LINK_SENTENCE_BYTES], const struct link_board *board, int end, int other,
                          double seconds)
{
    const struct link_end *e = &board->end[end];
    int from = e->device, to = other < 0 ? -1 : board->end[other].device;
    uint64_t bytes = atomic_load(&e->bytes);
    const char *means = atomic_load(&e->means) == LINK_BY_COPY ? "copy engine" : "kernel";
    switch ((enum link_doing)atomic_load(&e->doing)) {
    case LINK_WRITING:
        snprintf(text, LINK_SENTENCE_BYTES,
                 "a write of %" PRIu64 " bytes by a %s from device %d to device %d did not end within %.1f s", bytes,
                 means, from, to, seconds);
        break;
    case LINK_READING:
        snprintf(text, LINK_SENTENCE_BYTES,
                 "a read of %" PRIu64 " bytes by a %s of device %d from device %d did not end within %.1f s", bytes,
                 means, from, to, seconds);
        break;
    case LINK_CALLING:
        snprintf(text, LINK_SENTENCE_BYTES,
                 "kernels that write to each other between devices %d and %d did not end within %.1f s", from, to,
                 seconds);
        break;
    case LINK_HANDING:
        snprintf(text, LINK_SENTENCE_BYTES,
                 "copies with a word behind each between devices %d and %d did not end within %.1f s", from, to,
                 seconds);
        break;
    case LINK_MAPPING:
        snprintf(text, LINK_SENTENCE_BYTES, "device %d did not map the memory of device %d within %.1f s", from, to,
                 seconds);
        break;
    case LINK_ASKING:
        snprintf(text, LINK_SENTENCE_BYTES, "the driver did not start within %.1f s", seconds);
        break;
    case LINK_OPENING:
        snprintf(text, LINK_SENTENCE_BYTES, "device %d could not be opened within %.1f s", from, seconds);
        break;
    case LINK_IDLE:
    case LINK_MEETING:
    case LINK_PREPARING:
    case LINK_LOOKING:
        snprintf(text, LINK_SENTENCE_BYTES, "device %d did not write and read its own memory within %.1f s", from,
                 seconds);
        break;
    }
}

// Rests; what has passed since the last time, without what this process itself was kept from running.
static double let_pass(const struct link_probe *p, double *looked_s)
{
    rest(p);
    double now_s = clock_now_s(), passed_s = now_s - *looked_s;
    *looked_s = now_s;
    return passed_s < MOST_LOOK_S ? passed_s : MOST_LOOK_S;
}

// All ends that are there have carried out the order, or the first that is late is condemned; false: the ends are to be ended.
static bool wait_for_all(struct link_probe *p)
{
    struct link_board *board = p->board;
    double waited_s = 0, looked_s = clock_now_s();
    for (int end = 0; end < board->num_ends; end++)
        while (!has_taken(board, end) && !gone(p, end)) {
            if (waited_s > p->options.open_s || left_s(p) < 0) {
                char sentence[LINK_SENTENCE_BYTES];
                describe_late(sentence, board, end, -1, waited_s);
                error_set(&board->end[end].err, ERR_GPU, "%s", sentence);
                condemn_end(board, end, LINK_LATE, sentence);
                return false;
            }
            waited_s += let_pass(p, &looked_s);
        }
    return true;
}

static bool is_crossing(uint32_t doing)
{
    return doing == LINK_WRITING || doing == LINK_READING || doing == LINK_CALLING || doing == LINK_HANDING;
}

// The end that is the reason why a pair does not go on, and its direction.
static void condemn_late(struct link_probe *p, const struct pair *pair)
{
    struct link_board *board = p->board;
    int a = pair->a, b = pair->b;
    int waits = (int)(atomic_load(&board->end[a].doing) == LINK_MEETING), end = waits ? b : a, other = waits ? a : b;
    uint32_t doing = atomic_load(&board->end[end].doing), crossing = is_crossing(doing);
    char sentence[LINK_SENTENCE_BYTES];
    describe_late(sentence, board, end, other, pair->waited_s);
    if (doing == LINK_WRITING || doing == LINK_READING || doing == LINK_MAPPING) {
        condemn(board, end, other, LINK_LATE, sentence);
        board->result[end][other].crossing = crossing;
    } else {
        condemn(board, a, b, LINK_LATE, sentence);
        condemn(board, b, a, LINK_LATE, sentence);
        board->result[a][b].crossing = board->result[b][a].crossing = crossing;
    }
}

// How long an end may be at it. What touches the link is short; what a device does alone can be slow where others use it, too.
static double limit_of(const struct link_probe *p, uint32_t doing)
{
    enum { CALLS = 3 }; // each of the kernels ends by itself after a step's time
    bool of_link = doing == LINK_WRITING || doing == LINK_READING || doing == LINK_MAPPING;
    bool by_kernels = doing == LINK_CALLING || doing == LINK_HANDING;
    return of_link ? p->options.step_s : by_kernels ? CALLS * p->options.step_s : p->options.open_s;
}

// A pair goes on as long as its ends move. false: it is late, or an end is gone.
static bool look_at(struct link_probe *p, struct pair *pair)
{
    struct link_board *board = p->board;
    int a = pair->a, b = pair->b;
    uint32_t steps = atomic_load(&board->end[a].steps) + atomic_load(&board->end[b].steps);
    uint32_t doing_a = atomic_load(&board->end[a].doing), doing_b = atomic_load(&board->end[b].doing);
    uint64_t mark = (uint64_t)steps << 16 | doing_a << 8 | doing_b;
    pair->over = has_taken(board, a) && has_taken(board, b);
    if (pair->over)
        return true;
    if (mark != pair->mark)
        pair->waited_s = 0;
    pair->mark = mark;
    pair->over = (!has_taken(board, a) && gone(p, a)) || (!has_taken(board, b) && gone(p, b));
    if (!pair->over && pair->waited_s > limit_of(p, doing_a == LINK_MEETING ? doing_b : doing_a)) {
        condemn_late(p, pair);
        pair->over = true;
    }
    return !pair->over;
}

// Until each of them is over; false: the ends are to be ended.
static bool wait_for_pairs(struct link_probe *p, struct pair *pairs, int count)
{
    bool well = true, any = true;
    double passed_s = 0, looked_s = clock_now_s();
    while (any) {
        any = false;
        for (int i = 0; i < count; i++) {
            if (pairs[i].over)
                continue;
            pairs[i].waited_s += passed_s;
            well = look_at(p, &pairs[i]) && well;
            any = any || !pairs[i].over;
        }
        if (left_s(p) < 0)
            return false;
        if (any)
            passed_s = let_pass(p, &looked_s);
    }
    return well;
}

// ---- all pairs -----------------------------------------------------------------------------------------------------

static bool is_untried(const struct link_board *board, int a, int b)
{
    return board->result[a][b].fault == LINK_UNTRIED || board->result[b][a].fault == LINK_UNTRIED;
}

static bool delivers(uint32_t fault) { return fault == LINK_GOOD || fault == LINK_SLOW; }

// One that is slow may do yet.
static bool some_is_bad(const struct link_board *board)
{
    for (int a = 0; a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++) {
            uint32_t fault = board->result[a][b].fault;
            if (is_pair(board, a, b) && fault != LINK_UNTRIED && !delivers(fault))
                return true;
        }
    return false;
}

// Two ends have the verdict of two others on the same devices.
static void take_from_twins(struct link_board *board, int a, int b)
{
    for (int c = 0; c < board->num_ends; c++)
        for (int d = 0; d < board->num_ends; d++)
            if (is_pair(board, c, d) && !is_untried(board, c, d) && board->end[c].device == board->end[a].device &&
                board->end[d].device == board->end[b].device) {
                board->result[a][b] = board->result[c][d];
                board->result[b][a] = board->result[d][c];
                return;
            }
}

// They share no device, so that each has its own to itself.
static bool are_apart(const struct link_board *board, int a, int b, const struct pair *pair)
{
    int first = board->end[a].device, second = board->end[b].device;
    int c = board->end[pair->a].device, d = board->end[pair->b].device;
    return first != c && first != d && second != c && second != d;
}

// Some pair is still to be tried; those that have twins are not.
static bool some_is_left(const struct link_probe *p)
{
    struct link_board *board = p->board;
    bool any = false;
    if (!p->options.all && some_is_bad(board))
        return false;
    for (int a = 0; a < board->num_ends; a++)
        for (int b = a + 1; b < board->num_ends; b++) {
            if (is_pair(board, a, b) && is_untried(board, a, b))
                take_from_twins(board, a, b);
            any = any || (is_pair(board, a, b) && is_untried(board, a, b));
        }
    return any;
}

// A tournament in which every end of a group meets every other one: so many turns, in each of which an end has at most one other.
static int num_turns(const struct link_board *board) { return board->group % 2 ? board->group : board->group - 1; }

static int turn_of(const struct link_board *board, int a, int b)
{
    int turns = num_turns(board), i = a % board->group, j = b % board->group; // i < j
    return (j == turns ? 2 * i : i + j) % turns;
}

// The pairs of a turn that are still to be tried, all of them on devices of their own; one, if they are to be tried one after the other.
static int take_turn(const struct link_probe *p, int turn, struct pair pairs[LINK_ENDS / 2])
{
    struct link_board *board = p->board;
    int count = 0;
    for (int a = 0; a < board->num_ends; a++)
        for (int b = a + 1; b < board->num_ends; b++) {
            bool apart = true;
            if (!is_pair(board, a, b) || turn_of(board, a, b) != turn % num_turns(board) || !is_untried(board, a, b))
                continue;
            for (int i = 0; i < count; i++)
                apart = apart && are_apart(board, a, b, &pairs[i]);
            if (count == 0 || ((p->options.at_once || p->hurries) && apart))
                pairs[count++] = (struct pair){.a = a, .b = b};
        }
    return count;
}

// One set of processes, until all is tried or one of them is late or dies.
static void run_ends(struct link_probe *p)
{
    struct pair pairs[LINK_ENDS / 2];
    bool well;
    start_ends(p);
    post_order(p, LINK_ORDER_LOOK, NULL, 0);
    well = wait_for_all(p);
    if (well && some_is_left(p)) {
        post_order(p, LINK_ORDER_OPEN, NULL, 0);
        well = wait_for_all(p);
    }
    for (int turn = 1; well && some_is_left(p); turn++) {
        int count = take_turn(p, turn, pairs);
        if (count == 0)
            continue;
        post_order(p, LINK_ORDER_PAIRS, pairs, count);
        // The others have seen the order, too, before another one is written over it.
        well = wait_for_pairs(p, pairs, count) && wait_for_all(p);
    }
    if (well)
        post_order(p, LINK_ORDER_END, NULL, 0);
    end_ends(p, well ? END_S : 0);
    p->hurries = p->hurries || !well;
}

static void condemn_rest(struct link_probe *p)
{
    char sentence[LINK_SENTENCE_BYTES];
    snprintf(sentence, sizeof sentence, "there was no time left for it after %.1f s", link_probe_age_s(p));
    for (int end = 0; left_s(p) <= 0 && end < p->board->num_ends; end++)
        condemn_end(p->board, end, LINK_LATE, sentence);
}

// Of an end that was killed and lives on; what it holds of its device is not to be had, and nobody knows what it still does there.
static bool some_hangs(struct link_probe *p)
{
    char sentence[LINK_SENTENCE_BYTES];
    bool any = false;
    for (int end = 0; end < p->board->num_ends; end++)
        if (p->pids[end]) {
            snprintf(sentence, sizeof sentence, "process %lld, which tried the links of device %d, hangs in the driver",
                     (long long)p->pids[end], p->board->end[end].device);
            any = true;
        }
    for (int end = 0; any && end < p->board->num_ends; end++)
        condemn_end(p->board, end, LINK_LATE, sentence);
    return any;
}

static void run(struct link_probe *p, pid_t parent)
{
    end_with(parent);
    setpgid(0, 0); // a terminal's signals are its parent's
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_DFL);
    process_close_descriptors(3, ~0u);
    if (p->options.as_the_bus_counts)
        setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
    do
        run_ends(p);
    while (!some_hangs(p) && some_is_left(p) && left_s(p) > 0);
    condemn_rest(p);
    p->board->seconds = link_probe_age_s(p);
    atomic_store(&p->board->done, 1);
    _exit(0);
}

// ---- for others ----------------------------------------------------------------------------------------------------

int link_probe_begin(struct link_probe **out, const struct link_probe_options *options, struct error *err)
{
    if (!options->backend->link_probe || options->num_ends < 1 || options->num_ends > LINK_ENDS || options->group < 1)
        return error_set(err, ERR_USAGE, "links between %d ends of the %s backend cannot be probed", options->num_ends,
                         options->backend->name);
    if (options->largest_bytes > LINK_MOST_BYTES)
        return error_set(err, ERR_USAGE, "links cannot be probed with messages of %" PRIu64 " bytes: at most %d",
                         options->largest_bytes, (int)LINK_MOST_BYTES);
    struct link_probe *p = calloc(1, sizeof *p);
    struct link_board *board =
        mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); // zeros
    if (!p || board == MAP_FAILED) {
        free(p);
        if (board != MAP_FAILED)
            munmap(board, sizeof *board);
        return error_set(err, ERR_MEMORY, "no memory for a probe of links");
    }
    p->options = *options;
    p->begin_ns = clock_now_ns();
    p->board = board;
    board->num_ends = options->num_ends;
    board->group = options->group;
    board->rounds = options->rounds;
    board->seed = (uint32_t)p->begin_ns;
    board->largest_bytes = options->largest_bytes ? options->largest_bytes : LINK_MOST_BYTES;
    board->watched_ns = (uint64_t)p->begin_ns;
    board->call_timeout_ns = (uint64_t)(options->step_s * 1e9);
    for (int end = 0; end < options->num_ends; end++) {
        p->device[end] = options->device ? options->device[end] : -1;
        board->end[end].rank = options->rank ? options->rank[end] : end;
    }
    pid_t parent = getpid();
    fflush(NULL); // or what is buffered would be written twice
    if ((p->pid = fork()) == 0)
        run(p, parent);
    if (p->pid < 0) {
        error_set_errno(err, "cannot start a process that probes links");
        link_probe_end(p);
        return ERR_IO;
    }
    *out = p;
    return 0;
}

bool link_probe_is_done(const struct link_probe *p) { return atomic_load(&p->board->done) != 0; }
double link_probe_age_s(const struct link_probe *p) { return 1e-9 * (double)(clock_now_ns() - p->begin_ns); }
const struct link_board *link_probe_board(const struct link_probe *p) { return p->board; }

bool link_probe_has_ended(const struct link_probe *p)
{
    int64_t silent_ns = clock_now_ns() - (int64_t)atomic_load(&p->board->watched_ns);
    return link_probe_is_done(p) || silent_ns > LOST_S * (int64_t)1000000000;
}

void link_probe_wait(const struct link_probe *p)
{
    while (!link_probe_has_ended(p))
        usleep(LOOK_US);
}

bool link_probe_verdict(const struct link_probe *p, char why[LINK_SENTENCE_BYTES])
{
    const struct link_board *board = p->board;
    why[0] = 0;
    if (!link_probe_is_done(p)) {
        snprintf(why, LINK_SENTENCE_BYTES, "the probe of the links between the devices was not done after %.1f s",
                 link_probe_age_s(p));
        return false;
    }
    // What was tried and is wrong says more than what was not, and than what is slow.
    for (int pass = 0; pass < 3; pass++)
        for (int a = 0; a < board->num_ends; a++)
            for (int b = 0; b < board->num_ends; b++) {
                uint32_t fault = board->result[a][b].fault;
                int its_pass = fault == LINK_UNTRIED ? 1 : fault == LINK_SLOW ? 2 : 0;
                if (!is_pair(board, a, b) || fault == LINK_GOOD || pass != its_pass)
                    continue;
                snprintf(why, LINK_SENTENCE_BYTES, "%.*s", LINK_SENTENCE_BYTES - 1,
                         fault == LINK_UNTRIED ? "not every link was tried" : board->result[a][b].sentence);
                return false;
            }
    return true;
}

bool link_probe_delivers(const struct link_probe *p)
{
    const struct link_board *board = p->board;
    bool all = link_probe_is_done(p);
    for (int a = 0; a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++)
            all = all && (!is_pair(board, a, b) || delivers(board->result[a][b].fault));
    return all;
}

void link_probe_stop(struct link_probe *p)
{
    if (p->pid <= 0)
        return;
    if (!link_probe_is_done(p))
        kill(p->pid, SIGKILL); // its children end with it
    while (waitpid(p->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    p->pid = 0;
}

void link_probe_end(struct link_probe *p)
{
    if (!p)
        return;
    link_probe_stop(p);
    munmap(p->board, sizeof *p->board);
    free(p);
}

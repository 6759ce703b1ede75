// Starting, commanding, watching and ending the ranks. See launch.h.
//
// One anonymous shared mapping holds the launch area below, the region of the collectives, and the caller's area. The
// parent sleeps in poll on an eventfd (ranks' notices, signals) and on a pidfd for each rank; ranks sleep on the futex
// `command_number`.
#include "engine/launch_internal.h"

#include "engine/process.h"
#include "formats/checked.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    PAGE_BYTES = 4096,
    DEFAULT_START_TIMEOUT_MS = 120000,
    DEFAULT_WAIT_TIMEOUT_MS = 10000,
    FAIL_GRACE_MS = 200, // for ranks to end by themselves after a failure
    STOP_GRACE_MS = 3000,
    KILL_GRACE_MS = 3000, // for the kernel to end what was killed
    SELDOM_MS = 500,      // between two looks whether a rank is stopped
};

// ---- signals -------------------------------------------------------------------------------------------------------

static volatile sig_atomic_t signal_pending, signals_seen, signal_event_fd = -1;
static volatile sig_atomic_t somebody_waits; // has waited since the handlers are there

static void on_signal(int number)
{
    int saved = errno;
    // Ranks are killed by the kernel when this process ends.
    if (signals_seen || !somebody_waits)
        _exit(128 + number);
    signals_seen = 1;
    signal_pending = number;
    launch_wake_parent(signal_event_fd);
    errno = saved;
}

static void handle_signals(struct launch *launch)
{
    if (signal_event_fd >= 0)
        return;
    signal_pending = signals_seen = somebody_waits = 0;
    signal_event_fd = launch->event_fd;
    launch->handles_signals = true;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, &launch->before_int);
    sigaction(SIGTERM, &action, &launch->before_term);
}

static void restore_signals(struct launch *launch)
{
    if (!launch->handles_signals)
        return;
    sigaction(SIGINT, &launch->before_int, NULL);
    sigaction(SIGTERM, &launch->before_term, NULL);
    signal_event_fd = -1;
    launch->handles_signals = false;
}

// ---- starting ------------------------------------------------------------------------------------------------------

static int map_shared(struct launch *launch, struct error *err)
{
    const struct launch_options *options = &launch->options;
    uint64_t area_bytes = round_up(sizeof(struct launch_area), PAGE_BYTES);
    uint64_t region_bytes = round_up(comm_region_bytes(options->tp_size, options->pp_size, options->comm_max_elems,
                                                       options->comm_message_bytes),
                                     PAGE_BYTES),
             bytes;
    if (!checked_add(area_bytes + region_bytes, options->shared_bytes, &bytes))
        return error_set(err, ERR_MEMORY, "%zu bytes of shared memory cannot be had", options->shared_bytes);
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return error_set_errno(err, "cannot map %llu bytes of memory to share between the ranks",
                               (unsigned long long)bytes);
    launch->mapped_bytes = bytes;
    launch->area = (struct launch_area *)memory;
    launch->region = comm_region_init(memory + area_bytes, options->tp_size, options->pp_size, options->comm_max_elems,
                                      options->comm_message_bytes);
    comm_region_set_start_timeout(launch->region, options->start_timeout_ms);
    launch->shared = memory + area_bytes + region_bytes;
    return 0;
}

static int start_thread(struct rank_handle *handle, struct error *err)
{
    // Signals are for the parent's thread, but for the one that a mapped file raises where it is read.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&handle->thread, NULL, launch_rank_thread, handle);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return error_set(err, ERR_MEMORY, "cannot start a thread for rank %d: %s", handle->env.rank, strerror(failed));
    handle->running = true;
    return 0;
}

static int start_process(struct rank_handle *handle, struct error *err)
{
    pid_t parent = getpid();
    handle->pid = fork();
    if (handle->pid < 0)
        return error_set_errno(err, "cannot start a process for rank %d", handle->env.rank);
    if (handle->pid == 0)
        launch_rank_process(handle, parent);
    launch_close_links(handle->launch->links,
                       handle->launch->num_ranks); // the rank has them: others must see its end at once
    handle->running = true;
    handle->pidfd = (int)syscall(SYS_pidfd_open, handle->pid, 0);
    return 0;
}

// The options, their defaults filled in, and the links, which are the launch's from now on.
static void take_options(struct launch *launch, const struct launch_options *options, int num_ranks)
{
    launch->options = *options;
    launch->num_ranks = num_ranks;
    if (options->pp_size == 0)
        launch->options.pp_size = 1;
    if (options->start_timeout_ms <= 0)
        launch->options.start_timeout_ms = DEFAULT_START_TIMEOUT_MS;
    if (options->wait_timeout_ms <= 0)
        launch->options.wait_timeout_ms = DEFAULT_WAIT_TIMEOUT_MS;
    launch->spread = options->links != NULL;
    launch->first = launch->spread ? options->only : 0;
    launch->end = launch->spread ? options->only + 1 : num_ranks;
    memset(launch->links, -1, sizeof launch->links);
    for (int rank = 0; launch->spread && rank < num_ranks; rank++) {
        launch->links[rank] = options->links[rank];
        options->links[rank] = -1;
    }
    for (int rank = launch->first; rank < launch->end; rank++)
        launch->ranks[rank].pidfd = -1; // also of those that a failed start never reaches
}

static int start_rank(struct launch *launch, int rank, struct error *err)
{
    struct rank_handle *handle = &launch->ranks[rank];
    *handle = (struct rank_handle){.pidfd = -1, .launch = launch};
    handle->env = (struct rank_env){.rank = rank,
                                    .num_ranks = launch->num_ranks,
                                    .tp_size = launch->options.tp_size,
                                    .shared = launch->shared,
                                    .launch = launch,
                                    .spread = launch->spread};
    spinner_init(&handle->spinner);
    return launch->options.threads ? start_thread(handle, err) : start_process(handle, err);
}

int launch_start(struct launch **out, const struct launch_options *options, rank_main_fn *rank_main, void *arg,
                 struct error *err)
{
    int rc = 0;
    int pp_size = options->pp_size ? options->pp_size : 1, num_ranks = options->tp_size * pp_size;
    if (options->tp_size < 1 || options->tp_size > COMM_MAX_RANKS || pp_size < 1 || pp_size > COMM_MAX_RANKS ||
        num_ranks > COMM_MAX_RANKS)
        return error_set(err, ERR_USAGE, "%d ranks: wanted 1 to %d", num_ranks, COMM_MAX_RANKS);
    if (options->links && (options->only < 0 || options->only >= num_ranks))
        return error_set(err, ERR_USAGE, "rank %d of %d", options->only, num_ranks);
    struct launch *launch = calloc(1, sizeof *launch);
    if (!launch) {
        launch_close_links(options->links, options->links ? num_ranks : 0);
        return error_set(err, ERR_MEMORY, "out of memory for %d ranks", num_ranks);
    }
    take_options(launch, options, num_ranks);
    launch->rank_main = rank_main;
    launch->arg = arg;
    launch->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (launch->event_fd < 0) {
        rc = error_set_errno(err, "cannot make an event descriptor");
        goto fail;
    }
    if ((rc = map_shared(launch, err)))
        goto fail;
    if (!options->leave_signals)
        handle_signals(launch);
    launch->looked_ns = launch->stop_watch.looked_ns = clock_now_ns();
    fflush(NULL); // or every rank would write what is buffered once more
    for (int rank = launch->first; rank < launch->end && !rc; rank++)
        rc = start_rank(launch, rank, err);
    if (rc)
        goto fail;
    *out = launch;
    return 0;
fail:
    if (launch->area)
        comm_region_abort(launch->region, 0, &(struct error){.code = rc, .msg = "the start of the ranks failed"});
    launch_stop(launch, NULL);
    return rc;
}

void *launch_shared(struct launch *launch) { return launch->shared; }

struct comm_position launch_position(const struct launch *launch, int rank)
{
    return comm_region_position(launch->region, rank);
}

int64_t launch_pid(const struct launch *launch, int rank)
{
    bool here = rank >= launch->first && rank < launch->end;
    return !here ? 0 : launch->options.threads ? getpid() : launch->ranks[rank].pid;
}

int launch_lost_rank(const struct launch *launch) { return launch->error.code ? launch->lost_rank : -1; }

// ---- watching ------------------------------------------------------------------------------------------------------

static void post_number(struct launch *launch, int command)
{
    atomic_store(&launch->area->command, command);
    atomic_fetch_add(&launch->area->command_number, 1);
    if (atomic_load(&launch->area->sleeping_ranks))
        futex_wake(&launch->area->command_number, INT_MAX);
}

// How a rank that ended came to its end; 0 when as it was told.
static int explain_end(struct launch *launch, struct rank_handle *handle, int status, bool stopping, struct error *err)
{
    int rank = handle->env.rank;
    struct rank_state *state = launch_state_of(launch, rank);
    struct comm_position at = comm_region_position(launch->region, rank);
    char place[COMM_PLACE_BYTES];
    comm_place(place, at.op, at.layer);
    if (status >= 0 && WIFSIGNALED(status)) {
        int number = WTERMSIG(status);
        return error_set(err, ERR_RANK, "rank %d was ended by signal %d (%s) in %s", rank, number, strsignal(number),
                         place);
    }
    if (!atomic_load(&state->returned)) {
        if (status < 0)
            return error_set(err, ERR_RANK, "rank %d has vanished in %s", rank, place);
        return error_set(err, ERR_RANK, "rank %d exited with code %d in %s", rank, WEXITSTATUS(status), place);
    }
    if (state->code)
        return error_set(err, state->code, "rank %d failed in %s", rank, place); // its own error is in the region
    if (!stopping)
        return error_set(err, ERR_RANK, "rank %d ended without being told to, in %s", rank, place);
    return 0;
}

// Notices ranks that have ended. Returns the first error among them.
static int reap(struct launch *launch, bool stopping, int *bad_rank, struct error *err)
{
    int rc = 0;
    for (int rank = launch->first; rank < launch->end; rank++) {
        struct rank_handle *handle = &launch->ranks[rank];
        int status = 0;
        if (!handle->running)
            continue;
        if (launch->options.threads) {
            if (!atomic_load(&launch_state_of(launch, rank)->returned))
                continue;
            pthread_join(handle->thread, NULL);
        } else {
            pid_t pid = waitpid(handle->pid, &status, WNOHANG);
            if (pid == 0 || (pid < 0 && errno == EINTR))
                continue;
            if (pid < 0)
                status = -1; // someone else took it
            if (handle->pidfd >= 0)
                close(handle->pidfd);
            handle->pidfd = -1;
        }
        handle->running = false;
        struct error found;
        int code = explain_end(launch, handle, status, stopping, &found);
        if (code && !rc) {
            rc = code;
            *bad_rank = rank;
            *err = found;
        }
    }
    return rc;
}

static bool any_running(const struct launch *launch)
{
    for (int rank = launch->first; rank < launch->end; rank++)
        if (launch->ranks[rank].running)
            return true;
    return false;
}

// The eventfd, the pidfds and extra_fd (which may be -1: poll skips it). Returns whether extra_fd has input.
static bool wait_for_events(struct launch *launch, int extra_fd, int timeout_ms)
{
    struct pollfd fds[COMM_MAX_RANKS + 2];
    nfds_t count = 0;
    fds[count++] = (struct pollfd){.fd = extra_fd, .events = POLLIN};
    fds[count++] = (struct pollfd){.fd = launch->event_fd, .events = POLLIN};
    for (int rank = launch->first; rank < launch->end && !launch->options.threads; rank++) {
        if (launch->ranks[rank].running && launch->ranks[rank].pidfd < 0 && (timeout_ms < 0 || timeout_ms > LOOK_MS))
            timeout_ms = LOOK_MS;
        fds[count++] = (struct pollfd){.fd = launch->ranks[rank].pidfd, .events = POLLIN};
    }
    if (poll(fds, count, timeout_ms) <= 0)
        return false;
    uint64_t events;
    if (fds[1].revents && read(launch->event_fd, &events, sizeof events) < 0)
        return false; // a signal was faster; the next look sees what it was
    return fds[0].revents != 0;
}

// Waits until all ranks have ended, at most grace_ms.
static bool wait_for_ends(struct launch *launch, int grace_ms, int *bad_rank, struct error *first)
{
    int64_t end_ns = clock_now_ns() + (int64_t)grace_ms * 1000000;
    for (;;) {
        struct error found;
        int rank;
        if (reap(launch, true, &rank, &found) && !first->code) {
            *first = found;
            *bad_rank = rank;
        }
        int64_t left_ns = end_ns - clock_now_ns();
        if (!any_running(launch) || left_ns <= 0)
            return !any_running(launch);
        int left_ms = (int)(left_ns / 1000000) + 1;
        wait_for_events(launch, -1, left_ms < LOOK_MS ? left_ms : LOOK_MS);
    }
}

// Ends all ranks: whoever does not go in time is killed. Threads cannot be killed; false when one lives on.
static bool end_ranks(struct launch *launch, int grace_ms, struct error *first)
{
    int bad_rank = 0;
    post_number(launch, 0);
    bool ended = wait_for_ends(launch, launch->options.threads ? STOP_GRACE_MS : grace_ms, &bad_rank, first);
    if (ended || launch->options.threads)
        return ended;
    for (int rank = launch->first; rank < launch->end; rank++) {
        if (!launch->ranks[rank].running)
            continue;
        kill(launch->ranks[rank].pid, SIGKILL);
        if (!first->code)
            error_set(first, ERR_RANK, "rank %d did not end within %d ms and was killed", rank, grace_ms);
    }
    return wait_for_ends(launch, KILL_GRACE_MS, &bad_rank, first);
}

// Ranks that wait in a circle name each other; a process that stands still among them is the reason.
static void name_stopped(struct launch *launch)
{
    for (int rank = launch->first; rank < launch->end && !launch->options.threads; rank++) {
        size_t used = strlen(launch->error.msg);
        if (launch->ranks[rank].running && process_is_stopped(launch->ranks[rank].pid))
            snprintf(launch->error.msg + used, sizeof launch->error.msg - used, "; the process of rank %d is stopped",
                     rank);
    }
}

// The launch has failed: the error that came first counts, every rank ends.
static int fail(struct launch *launch, int rank, const struct error *found, struct error *err)
{
    comm_region_abort(launch->region, rank, found);
    if (!comm_region_error(launch->region, &rank, &launch->error))
        launch->error = *found;
    launch->lost_rank = rank;
    name_stopped(launch);
    struct error ignored = {.code = ERR_RANK};
    end_ranks(launch, FAIL_GRACE_MS, &ignored);
    launch->command_running = false;
    if (err)
        *err = launch->error;
    return launch->error.code;
}

// Whether a rank is at its start, or waits for weights in the middle of a step.
static bool is_starting(const struct comm_position *at) { return at->op <= OP_HANDSHAKE; }

// A rank that has work, waits for no other rank and does not move is stuck. So is, later, one that waits beyond every
// deadline; but not one that waits for a rank which still loads: that one is watched itself.
static int watch(struct launch *launch, int *stuck, struct error *err)
{
    int64_t now_ns = clock_now_ns(), passed_ns = now_ns - launch->looked_ns;
    // Time in which this process itself did not run does not count: it may have been stopped together with the ranks.
    if (passed_ns > 2 * (int64_t)LOOK_MS * 1000000)
        passed_ns = 2 * (int64_t)LOOK_MS * 1000000;
    launch->looked_ns = now_ns;
    for (int rank = launch->first; rank < launch->end; rank++) {
        struct rank_handle *handle = &launch->ranks[rank];
        struct rank_state *state = launch_state_of(launch, rank);
        struct comm_position at = comm_region_position(launch->region, rank), other = {.op = OP_COUNT, .waits_for = -1};
        bool starting = !atomic_load(&state->started) || is_starting(&at);
        bool busy = starting || (launch->command_running &&
                                 atomic_load(&state->done) != atomic_load(&launch->area->command_number));
        if (at.waits_for >= 0)
            other = comm_region_position(launch->region, at.waits_for);
        bool waits_for_load = is_starting(&other) && other.waits_for < 0;
        // Between stages a wait is as long as what it is for, so who waits moves with the rank for which it waits in the end.
        uint64_t progress = at.progress;
        if (at.waits_for >= 0)
            progress += comm_region_position(launch->region, comm_region_cause(launch->region, rank)).progress;
        if (!busy || progress != handle->progress || waits_for_load)
            handle->silent_ns = 0;
        else
            handle->silent_ns += passed_ns;
        handle->progress = progress;
        int timeout_ms = starting ? launch->options.start_timeout_ms : launch->options.wait_timeout_ms;
        // A waiting rank reports who is missing by itself, so it gets the first word.
        int64_t limit_ns = (int64_t)timeout_ms * 1250000;
        if (handle->silent_ns < (at.waits_for < 0 ? limit_ns : 2 * limit_ns))
            continue;
        char place[COMM_PLACE_BYTES];
        comm_place(place, at.op, at.layer);
        *stuck = rank;
        return error_set(err, ERR_RANK, "rank %d has made no progress for %.1f s%s; it was last seen in %s", rank,
                         (double)handle->silent_ns / 1e9, starting ? " of its start" : "", place);
    }
    return 0;
}

// Ranks of other processes do without one that stands still, be it idle or at its start; then it ends here too: its thread for the links, or nobody,
// knows of that.
static int watch_stopped(struct launch *launch, int *rank, struct error *err)
{
    if (!launch->spread || launch->options.threads)
        return 0;
    *rank = launch->first;
    int64_t stopped_ns = launch_stopped_ns(&launch->stop_watch, launch->ranks[*rank].pid, SELDOM_MS);
    // The others report who is missing by themselves, so they get the first word.
    if (stopped_ns <= (int64_t)launch->options.wait_timeout_ms * 1250000)
        return 0;
    return error_set(err, ERR_RANK, "rank %d stood still for %.1f s; ranks may be silent for %.1f s", *rank,
                     (double)stopped_ns / 1e9, launch->options.wait_timeout_ms / 1000.0);
}

// ---- parent side ---------------------------------------------------------------------------------------------------

int launch_post(struct launch *launch, int command, struct error *err)
{
    if (launch->error.code) {
        if (err)
            *err = launch->error;
        return launch->error.code;
    }
    if (launch->command_running || command <= 0)
        return error_set(err, ERR_OTHER, "command %d was posted %s", command,
                         command <= 0 ? "but commands are above 0" : "while another one runs");
    for (int rank = launch->first; rank < launch->end; rank++)
        launch->ranks[rank].silent_ns = 0;
    launch->looked_ns = clock_now_ns();
    launch->command_running = true;
    atomic_store(&launch->area->done_ranks, 0);
    post_number(launch, command);
    return 0;
}

int launch_wait(struct launch *launch, int extra_fd, struct error *err)
{
    struct launch_area *area = launch->area;
    uint32_t num_ranks = launch_num_here(launch);
    somebody_waits = 1;
    const int idle_ms = launch->spread ? SELDOM_MS : -1;
    for (int timeout_ms = 0;; timeout_ms = launch->ready && !launch->command_running ? idle_ms : LOOK_MS) {
        if (launch->error.code) {
            if (err)
                *err = launch->error;
            return launch->error.code;
        }
        bool extra = wait_for_events(launch, extra_fd, timeout_ms);
        if (signal_pending) {
            int number = signal_pending;
            signal_pending = 0;
            return error_set(err, number == SIGINT ? ERR_SIGINT : ERR_SIGTERM, "stopped by %s",
                             number == SIGINT ? "SIGINT" : "SIGTERM");
        }
        struct error found;
        int rank = 0;
        if (reap(launch, false, &rank, &found) || watch(launch, &rank, &found) || watch_stopped(launch, &rank, &found))
            return fail(launch, rank, &found, err);

        bool was_ready = launch->ready, notice = atomic_load(&area->notices);
        launch->ready = atomic_load(&area->started_ranks) == num_ranks;
        if (launch->command_running && !notice && atomic_load(&area->done_ranks) == num_ranks) {
            launch->command_running = false;
            return 0;
        }
        // Notices and input take turns, so that neither starves the other.
        if (extra && !(notice && !launch->last_was_notice)) {
            launch->last_was_notice = false;
            return 2;
        }
        if (notice) {
            atomic_exchange(&area->notices, 0); // takes what the notice announced
            launch->last_was_notice = true;
            return 1;
        }
        if (launch->ready && !launch->command_running && (!was_ready || extra_fd < 0))
            return 0;
    }
}

int launch_wait_end(struct launch *launch, struct error *err)
{
    somebody_waits = 1;
    while (any_running(launch)) {
        bool ready = atomic_load(&launch->area->started_ranks) == launch_num_here(launch);
        struct error found;
        int rank = 0;
        wait_for_events(launch, -1, ready ? SELDOM_MS : LOOK_MS);
        signal_pending = 0;
        if (reap(launch, true, &rank, &found) ||
            (ready ? comm_region_error(launch->region, &rank, &found) : watch(launch, &rank, &found)) ||
            watch_stopped(launch, &rank, &found))
            return fail(launch, rank, &found, err);
    }
    launch->ready = true;
    return 0;
}

int launch_stop(struct launch *launch, struct error *err)
{
    if (!launch)
        return 0;
    struct error first = {0};
    bool ended = true;
    if (launch->area) {
        // What launch_wait has told, and what is stopped from here, is no news.
        bool told = launch->error.code != 0;
        bool starting = atomic_load(&launch->area->started_ranks) < launch_num_here(launch);
        if ((launch->command_running || starting) && !comm_region_aborted(launch->region)) {
            struct error stop;
            error_set(&stop, ERR_RANK, "the ranks were stopped in the middle of %s",
                      starting ? "their start" : "a command");
            comm_region_abort(launch->region, 0, &stop);
            told = true;
        }
        if (any_running(launch))
            ended = end_ranks(launch, STOP_GRACE_MS, &first);
        int rank;
        if (told)
            first.code = 0;
        else
            comm_region_error(launch->region, &rank, &first); // a rank's own sentence says more than how it ended
        if (!ended)
            error_set(&first, ERR_RANK, "a rank has not ended within %d ms; its memory is left behind", STOP_GRACE_MS);
    }
    restore_signals(launch);
    if (ended) {
        launch_close_links(launch->links, launch->num_ranks); // of a start that failed
        if (launch->area)
            munmap(launch->area, launch->mapped_bytes);
        if (launch->event_fd >= 0)
            close(launch->event_fd);
        free(launch);
    }
    if (first.code && err)
        *err = first;
    return first.code;
}

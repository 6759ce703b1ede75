// A rank's side of a launch: its process or thread, its commands, its end. See launch.h.
#include "engine/launch_internal.h"

#include "engine/comm_mpi.h"
#include "engine/comm_tcp.h"
#include "engine/process.h"

#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

enum { PARENT_LOOK_MS = 250 };

void launch_wake_parent(int event_fd)
{
    uint64_t one = 1;
    // It cannot fail: the counter is far from its end.
    if (write(event_fd, &one, sizeof one) != sizeof one)
        return;
}

void launch_close_links(int *links, int count)
{
    for (int rank = 0; rank < count; rank++) {
        if (links[rank] >= 0)
            close(links[rank]);
        links[rank] = -1;
    }
}

int64_t launch_stopped_ns(struct stop_watch *watch, pid_t pid, int look_ms)
{
    const int64_t look_ns = (int64_t)look_ms * 1000000;
    int64_t now_ns = clock_now_ns(), passed_ns = now_ns - watch->looked_ns;
    if (passed_ns < look_ns)
        return watch->stopped_ns;
    bool was = watch->stopped;
    watch->looked_ns = now_ns;
    watch->stopped = process_is_stopped(pid);
    watch->stopped_ns = was && watch->stopped ? watch->stopped_ns + (passed_ns < 2 * look_ns ? passed_ns : look_ns) : 0;
    return watch->stopped_ns;
}

// ---- the parent, as a rank sees it -------------------------------------------------------------------------------

static bool parent_is_stopped(const struct launch *launch)
{
    return !launch->options.threads && process_is_stopped(getppid());
}

// Ends all ranks when the parent has been stopped for longer than a rank may be silent. Ranks of other processes wait for rank 0 without a deadline while
// there is nothing to do, and rank 0 for its parent: nobody else would ever notice that the parent stands still.
static void watch_parent(struct rank_env *env, struct stop_watch *watch)
{
    struct launch *launch = env->launch;
    int64_t stopped_ns = launch->options.threads ? 0 : launch_stopped_ns(watch, getppid(), PARENT_LOOK_MS);
    if (stopped_ns <= (int64_t)launch->options.wait_timeout_ms * 1000000)
        return;
    char host[64] = "";
    struct error found;
    gethostname(host, sizeof host - 1);
    error_set(&found, ERR_RANK,
              "rank %d gets no work: the process that was started for it (%d on %s) was stopped for %.1f s", env->rank,
              (int)getppid(), host, (double)stopped_ns / 1e9);
    comm_region_abort(launch->region, env->rank, &found);
}

// A parent that is stopped is to end with its rank, and after an error to say it: launchers wait for it.
static void continue_parent(const struct launch *launch, pid_t parent)
{
    if (launch->spread && parent_is_stopped(launch) && getppid() == parent)
        kill(parent, SIGCONT);
}

// ---- commands ----------------------------------------------------------------------------------------------------

void rank_is_ready(struct rank_env *env)
{
    struct launch *launch = env->launch;
    comm_at(env->comm, OP_IDLE, -1);
    if (!atomic_exchange(&launch_state_of(launch, env->rank)->started, 1) &&
        atomic_fetch_add(&launch->area->started_ranks, 1) + 1 == launch_num_here(launch))
        launch_wake_parent(launch->event_fd);
}

// Sleeps until there is a command after number `taken`, or the end of all ranks.
static void sleep_for_command(struct rank_env *env, uint32_t taken)
{
    struct launch *launch = env->launch;
    struct launch_area *area = launch->area;
    struct stop_watch watch = {.looked_ns = clock_now_ns()};
    atomic_fetch_add(&area->sleeping_ranks, 1);
    // Ranks of other processes that are lost raise the abort word, but not the number.
    while (atomic_load(&area->command_number) == taken && !(env->spread && comm_region_aborted(launch->region))) {
        futex_wait(&area->command_number, taken, env->spread ? LOOK_MS * 1000000ll : -1);
        if (env->spread)
            watch_parent(env, &watch);
    }
    atomic_fetch_sub(&area->sleeping_ranks, 1);
}

int rank_next_command(struct rank_env *env, int *command, struct error *err)
{
    struct launch *launch = env->launch;
    struct launch_area *area = launch->area;
    struct rank_state *state = launch_state_of(launch, env->rank);
    struct spinner *spinner = &launch->ranks[env->rank].spinner;
    rank_is_ready(env);

    uint32_t taken = atomic_load_explicit(&state->taken, memory_order_relaxed);
    struct spin spin = spin_begin(spinner);
    bool slept = false;
    while (atomic_load_explicit(&area->command_number, memory_order_acquire) == taken &&
           !(env->spread && comm_region_aborted(launch->region))) {
        if (spin_again(&spin))
            continue;
        slept = true;
        sleep_for_command(env, taken);
    }
    spinner_learn(spinner, !slept);

    // Ending a failed launch raises the number as well.
    int error_rank;
    struct error kept;
    if (comm_region_aborted(launch->region)) {
        if (!comm_region_error(launch->region, &error_rank, &kept))
            error_set(&kept, ERR_RANK, "rank %d was stopped after an error elsewhere", env->rank);
        if (err)
            *err = kept;
        return kept.code;
    }
    atomic_store(&state->taken, atomic_load(&area->command_number));
    *command = atomic_load(&area->command);
    return 0;
}

void rank_command_done(struct rank_env *env)
{
    struct launch *launch = env->launch;
    struct rank_state *state = launch_state_of(launch, env->rank);
    atomic_store(&state->done, atomic_load(&state->taken));
    if (atomic_fetch_add(&launch->area->done_ranks, 1) + 1 == launch_num_here(launch))
        launch_wake_parent(launch->event_fd);
}

bool rank_is_stopped(const struct rank_env *env) { return comm_region_aborted(env->launch->region); }

void rank_notify(struct rank_env *env)
{
    // A notice that the parent has not yet taken carries this one too.
    if (!atomic_exchange(&env->launch->area->notices, 1))
        launch_wake_parent(env->launch->event_fd);
}

void rank_ends(struct rank_env *env, const struct error *why)
{
    comm_region_abort(env->launch->region, env->rank, why);
    // What cannot be written is lost: nothing more can be done here.
    if (env->launch->options.threads &&
        (write(STDERR_FILENO, why->msg, strlen(why->msg)) < 0 || write(STDERR_FILENO, "\n", 1) < 0))
        return;
}

void rank_failed(struct rank_env *env, int code, struct error *err)
{
    if (!err->msg[0])
        error_set(err, code, "rank %d failed with code %d", env->rank, code);
    err->code = code;
    comm_region_abort(env->launch->region, env->rank, err);
}

// ---- its life ----------------------------------------------------------------------------------------------------

static int open_comm(struct launch *launch, struct rank_env *env, struct error *err)
{
    int timeout_ms = launch->options.wait_timeout_ms, rank, size, rc;
    if (!env->spread)
        return comm_open(&env->comm, launch->region, env->rank, timeout_ms, err);
    if (!launch->options.mpi) {
        rc = comm_open_sockets(&env->comm, launch->region, launch->links, env->rank, timeout_ms, err);
        memset(launch->links, -1, sizeof launch->links); // they are comm's, which closes them in every case
        return rc;
    }
    launch_close_links(launch->links, launch->num_ranks);
    if ((rc = comm_mpi_start(NULL, &rank, &size, err)))
        return rc;
    if (rank != env->rank)
        return error_set(err, ERR_USAGE, "this process is rank %d to MPI and rank %d by its variables or options", rank,
                         env->rank);
    return comm_open_mpi(&env->comm, launch->region, timeout_ms, err);
}

// Runs rank_main and leaves its result in the shared area; its error becomes the launch's unless one came before.
static int run_rank(struct rank_handle *handle)
{
    struct launch *launch = handle->launch;
    struct rank_env *env = &handle->env;
    struct rank_state *state = launch_state_of(launch, env->rank);
    struct error err = {0};
    int code = open_comm(launch, env, &err);
    if (!code) {
        comm_at(env->comm, OP_START, -1);
        code = launch->rank_main(env, launch->arg, &err);
    }
    if (code)
        rank_failed(env, code, &err);
    comm_close(env->comm);
    env->comm = NULL;
    // After an error the process ends without an end of MPI, which its launcher takes for what it is.
    if (launch->options.mpi && !code)
        comm_mpi_end(0, launch->options.wait_timeout_ms,
                     NULL); // the work is done: nothing is lost with a rank that does not come
    state->code = code;
    atomic_store(&state->returned, 1);
    return code;
}

void *launch_rank_thread(void *arg)
{
    struct rank_handle *handle = arg;
    run_rank(handle);
    launch_wake_parent(handle->launch->event_fd);
    return NULL;
}

// What this process got from its parent, but for 0, 1, 2, the event descriptor and the links: clients' connections must not outlive the parent's close.
static void close_others(const struct launch *launch)
{
    unsigned keep[COMM_MAX_RANKS + 1], count = 0, next = 3;
    keep[count++] = (unsigned)launch->event_fd;
    for (int rank = 0; rank < launch->num_ranks; rank++)
        if (launch->links[rank] >= 0)
            keep[count++] = (unsigned)launch->links[rank];
    for (;;) {
        unsigned lowest = ~0u;
        for (unsigned i = 0; i < count; i++)
            lowest = keep[i] >= next && keep[i] < lowest ? keep[i] : lowest;
        process_close_descriptors(next, lowest);
        if (lowest == ~0u)
            return;
        next = lowest + 1;
    }
}

_Noreturn void launch_rank_process(struct rank_handle *handle, pid_t parent)
{
    // Set before the look at the parent: it cannot end unseen in between.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(error_exit_code(ERR_RANK));
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    close_others(handle->launch);
    int code = run_rank(handle);
    continue_parent(handle->launch, parent);
    _exit(error_exit_code(code));
}

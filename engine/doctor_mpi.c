// What a sum over ranks takes over MPI, between processes that mpirun starts. See doctor.h.
#include "engine/doctor.h"

#include "engine/comm_mpi.h"

#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_ROWS = 512, MOST_VALUES = MOST_ROWS * DOCTOR_COLS, TIMEOUT_MS = 10000, TEXT_BYTES = 65536 };

// ---- as a rank -----------------------------------------------------------------------------------------------------

struct mpi_rank {
    struct comm *comm;
    int rank;
    float *data; // [MOST_VALUES]
};

static int prepare_values(void *arg, const struct doctor_size *size, struct error *err)
{
    struct mpi_rank *r = arg;
    (void)err;
    for (int64_t i = 0; i < size->rows * DOCTOR_COLS; i++)
        r->data[i] = doctor_value(r->rank, i % DOCTOR_COLS);
    return 0;
}

static int add_up(void *arg, const struct doctor_size *size, int count, struct error *err)
{
    struct mpi_rank *r = arg;
    int rc = 0;
    for (int i = 0; i < count && !rc; i++)
        rc = comm_all_reduce(r->comm, r->data, size->rows, DOCTOR_COLS, DOCTOR_COLS, size->wire, NULL, NULL, err);
    return rc;
}

int doctor_mpi_rank(struct doctor_times *out, bool *first, struct error *err)
{
    struct mpi_rank r = {0};
    const struct doctor_sums sums = {.prepare = prepare_values, .run = add_up, .arg = &r};
    int size, rc;
    prctl(PR_SET_PDEATHSIG, SIGKILL); // with who has started it
    if ((rc = comm_mpi_start(NULL, &r.rank, &size, err)))
        return rc;
    if (size < 2 || size > COMM_MAX_RANKS)
        return error_set(err, ERR_USAGE,
                         "doctor --mpi is for 2 to %d ranks, and MPI has started %d: mpirun -n 2 "
                         "tpengine doctor --mpi",
                         COMM_MAX_RANKS, size);
    out->transport = TRANSPORT_MPI;
    out->ranks = size;
    *first = r.rank == 0;
    r.data = doctor_probe_new(MOST_VALUES * sizeof *r.data);
    void *memory = doctor_probe_new(comm_region_bytes(size, 1, MOST_VALUES, 0));
    if (!r.data || !memory)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", r.rank);
    if ((rc = comm_open_mpi(&r.comm, comm_region_init(memory, size, 1, MOST_VALUES, 0), TIMEOUT_MS, err)))
        return rc;
    rc = doctor_time_sums(out, r.comm, &sums, err);
    out->probe.end = PROBE_DONE;
    comm_close(r.comm);
    return rc ? rc : comm_mpi_end(0, TIMEOUT_MS, err);
}

// ---- as the one who starts them ------------------------------------------------------------------------------------

bool doctor_mpi_can_start(void)
{
    const char *folders = getenv("PATH");
    char path[PATH_MAX];
    for (const char *at = folders ? folders : ""; *at; at += *at == ':') {
        int length = (int)strcspn(at, ":");
        snprintf(path, sizeof path, "%.*s/mpirun", length, at);
        if (length > 0 && access(path, X_OK) == 0)
            return true;
        at += length;
    }
    return false;
}

// In a process of its own. Open MPI's own variables: as many ranks as are asked for on any number of processors, by any user.
static void be_mpirun(int ranks, int out, int problem)
{
    char self[PATH_MAX], count[16];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0)
        _exit(126);
    self[length] = 0;
    snprintf(count, sizeof count, "%d", ranks);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    int nothing = open("/dev/null", O_RDONLY);
    if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(out, 1) < 0 || dup2(problem, 2) < 0)
        _exit(126);
    execlp("mpirun", "mpirun", "--oversubscribe", "--bind-to", "none", "-n", count, self, "doctor", "--mpi", "--json",
           (char *)NULL);
    _exit(127);
}

static void read_text(int fd, char text[TEXT_BYTES])
{
    ssize_t length = pread(fd, text, TEXT_BYTES - 1, 0);
    text[length > 0 ? length : 0] = 0;
}

// The last line of a rank, which is the cause; else the first one that says something: mpirun frames what it has to say.
static void take_words(char line[190], const char *text)
{
    static const char ours[] = "tpengine: ";
    const char *words = text + strcspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz");
    for (const char *at = text; *at; at += strcspn(at, "\n"), at += *at == '\n')
        if (strncmp(at, ours, sizeof ours - 1) == 0)
            words = at;
    snprintf(line, 190, "%.*s", (int)strcspn(words, "\n"), words);
}

// How mpirun has ended without all times, and what was said.
static void set_end(struct error *err, int status, const char *text)
{
    char line[190];
    take_words(line, text);
    const char *between = line[0] ? ": " : " and said nothing";
    if (WIFSIGNALED(status))
        error_set(err, ERR_OTHER, "it was ended by signal %d%s%s", WTERMSIG(status), between, line);
    else if (WEXITSTATUS(status) != 0)
        error_set(err, ERR_OTHER, "it ended with status %d%s%s", WEXITSTATUS(status), between, line);
    else
        error_set(err, ERR_OTHER, "its report has not the times of %d sizes%s%s", DOCTOR_SIZES, line[0] ? ": " : "",
                  line);
}

// What --json has printed: the sizes in their order.
static bool take_times(struct doctor_times *out, const char *text)
{
    const char *begin = strchr(text, '{');
    json_t *report = begin ? json_loads(begin, JSON_DISABLE_EOF_CHECK, NULL) : NULL;
    json_t *times = json_object_get(report, "times");
    bool whole = json_array_size(times) == DOCTOR_SIZES;
    for (size_t i = 0; i < DOCTOR_SIZES && whole; i++)
        out->us[i] = json_number_value(json_object_get(json_array_get(times, i), "us"));
    json_decref(report);
    return whole;
}

static void run_mpirun(struct probe *probe, void *arg)
{
    static char text[TEXT_BYTES];
    struct doctor_times *times = (struct doctor_times *)(void *)probe;
    int out = memfd_create("out", MFD_CLOEXEC), problem = memfd_create("problem", MFD_CLOEXEC), status = -1;
    (void)arg;
    snprintf(probe->at, sizeof probe->at, "mpirun -n %d tpengine doctor --mpi", times->ranks);
    pid_t pid = out < 0 || problem < 0 ? -1 : fork();
    if (pid == 0)
        be_mpirun(times->ranks, out, problem);
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        error_set_errno(&probe->err, "cannot start mpirun");
        return;
    }
    read_text(out, text);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && take_times(times, text)) {
        probe->at[0] = 0;
        return;
    }
    read_text(problem, text);
    set_end(&probe->err, status, text);
}

void doctor_mpi_measure(struct doctor_times *out, int ranks, double seconds)
{
    out->transport = TRANSPORT_MPI;
    out->ranks = ranks;
    out->devices = 0;
    doctor_probe_run(&out->probe, run_mpirun, NULL, seconds);
}

// Ranks as launchers number them. See launcher_env.h.
#include "engine/launcher_env.h"

#include "formats/fnv.h"

#include <ctype.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

// Where a launcher names no port: one of so many, by the job, so that two jobs on a host seldom meet.
enum { FIRST_PORT = 29400, NUM_PORTS = 1000, LAST_PORT = 65535 };

struct finder {
    struct launcher_place *out;
    launcher_variable *get;
    void *arg;
};

const char *launcher_process_variable(void *arg, const char *name)
{
    (void)arg;
    return getenv(name);
}

// An empty variable is one that is not set.
static const char *variable(const struct finder *f, const char *name)
{
    const char *value = f->get(f->arg, name);
    return value && value[0] ? value : NULL;
}

// ---- numbers and names -----------------------------------------------------------------------------------------

static bool read_number(const char *text, int least, int most, int *out)
{
    long value = 0;
    if (!text[0] || strlen(text) > 9)
        return false;
    for (const char *c = text; *c; c++) {
        if (!isdigit((unsigned char)*c))
            return false;
        value = 10 * value + (*c - '0');
    }
    if (value < least || value > most)
        return false;
    *out = (int)value;
    return true;
}

static int need_number(const struct finder *f, const char *name, int least, int most, int *out, struct error *err)
{
    const char *text = variable(f, name);
    if (!text)
        return error_set(err, ERR_USAGE,
                         "%s is set by halves: %s is missing; set it, or give --launcher none to run all ranks here",
                         f->out->launcher, name);
    if (!read_number(text, least, most, out))
        return error_set(err, ERR_USAGE, "%s=%.40s: wanted a number from %d to %d (launcher %s)", name, text, least,
                         most, f->out->launcher);
    return 0;
}

// `otherwise` where it is not set.
static int may_number(const struct finder *f, const char *name, int least, int most, int otherwise, int *out,
                      struct error *err)
{
    *out = otherwise;
    return variable(f, name) ? need_number(f, name, least, most, out, err) : 0;
}

static int set_host(struct launcher_place *out, const char *host, size_t bytes, const char *from, struct error *err)
{
    if (bytes == 0 || bytes >= sizeof out->host)
        return error_set(err, ERR_USAGE, "%s: a host's name of %zu bytes; wanted 1 to %zu", from, bytes,
                         sizeof out->host - 1);
    memcpy(out->host, host, bytes);
    out->host[bytes] = 0;
    return 0;
}

static int default_port(const char *job) { return FIRST_PORT + (int)(fnv1a_32(job, strlen(job)) % NUM_PORTS); }

// The first host of Slurm's list: "a", "a,b", "a[01-04,07],b", "a[1-2]-b[3,5]".
static int first_host(struct launcher_place *out, const char *list, const char *from, struct error *err)
{
    char host[LAUNCHER_HOST_BYTES];
    size_t used = 0;
    for (const char *c = list; *c && *c != ',' && used + 1 < sizeof host; c++) {
        if (*c != '[') {
            host[used++] = *c;
            continue;
        }
        const char *end = strchr(c, ']');
        size_t digits = strspn(c + 1, "0123456789");
        if (!end || digits == 0 || used + digits >= sizeof host)
            return error_set(err, ERR_USAGE, "%s=%.80s: not a list of hosts", from, list);
        memcpy(host + used, c + 1, digits);
        used += digits;
        c = end;
    }
    return set_host(out, host, used, from, err);
}

// "host:port", "[v6]:port"
static int read_master(struct launcher_place *out, const char *text, struct error *err)
{
    const char *colon = strrchr(text, ':');
    bool brackets = text[0] == '[';
    if (!colon || !read_number(colon + 1, 1, LAST_PORT, &out->port) ||
        (brackets && (colon[-1] != ']' || colon < text + 3)) ||
        (!brackets && memchr(text, ':', (size_t)(colon - text))))
        return error_set(err, ERR_USAGE, "--master %.80s: wanted HOST:PORT", text);
    return set_host(out, text + brackets, (size_t)(colon - text) - 2 * (size_t)brackets, "--master", err);
}

static int check_rank(const struct launcher_place *p, struct error *err)
{
    if (p->rank >= p->world_size)
        return error_set(err, ERR_USAGE, "%s says rank %d of %d: ranks are numbered from 0", p->launcher, p->rank,
                         p->world_size);
    if (p->local_size > p->world_size || (p->local_size > 0 && p->local_rank >= p->local_size))
        return error_set(err, ERR_USAGE, "%s says rank %d of %d on this host, and %d altogether: that cannot be",
                         p->launcher, p->local_rank, p->local_size, p->world_size);
    return 0;
}

// ---- launchers: each is asked whether it applies, then fills the place -------------------------------------------

static int find_torchrun(struct finder *f, struct error *err)
{
    struct launcher_place *p = f->out;
    int rc;
    if ((rc = need_number(f, "RANK", 0, INT_MAX, &p->rank, err)) ||
        (rc = need_number(f, "WORLD_SIZE", 1, INT_MAX, &p->world_size, err)) ||
        (rc = may_number(f, "LOCAL_RANK", 0, INT_MAX, LAUNCHER_NOT_GIVEN, &p->local_rank, err)) ||
        (rc = may_number(f, "LOCAL_WORLD_SIZE", 1, INT_MAX, 0, &p->local_size, err)))
        return rc;
    const char *address = variable(f, "MASTER_ADDR"), *store = variable(f, "TORCHELASTIC_USE_AGENT_STORE"),
               *run = variable(f, "TORCHELASTIC_RUN_ID"), *rank = variable(f, "OMPI_COMM_WORLD_RANK"),
               *size = variable(f, "OMPI_COMM_WORLD_SIZE");
    // torchrun may have been started by mpirun; whoever has set its variables by hand there means the same ranks.
    if (!run && rank && size && (atoi(rank) != p->rank || atoi(size) != p->world_size))
        return error_set(err, ERR_USAGE,
                         "RANK %d of WORLD_SIZE %d, but OMPI_COMM_WORLD_RANK %.12s of %.12s: say which counts with "
                         "--launcher torchrun or mpi",
                         p->rank, p->world_size, rank, size);
    if (p->world_size == 1 && (p->rank == 0 || !address))
        return 0;
    if (!address)
        return error_set(err, ERR_USAGE,
                         "torchrun is set by halves: RANK and WORLD_SIZE without MASTER_ADDR; set it, or "
                         "give --launcher none to run all ranks here");
    if ((rc = set_host(p, address, strlen(address), "MASTER_ADDR", err)) ||
        (rc = need_number(f, "MASTER_PORT", 1, LAST_PORT - 1, &p->port, err)))
        return rc;
    if (store && strcasecmp(store, "true") == 0)
        p->port++;
    snprintf(p->job, sizeof p->job, "torchrun %s", run ? run : "");
    return 0;
}

// MASTER_ADDR and MASTER_PORT where a launcher has none of its own.
static int find_master(struct finder *f, const char *otherwise, struct error *err)
{
    struct launcher_place *p = f->out;
    const char *address = variable(f, "MASTER_ADDR");
    int rc = 0;
    if (address)
        rc = set_host(p, address, strlen(address), "MASTER_ADDR", err);
    else if (otherwise)
        rc = set_host(p, otherwise, strlen(otherwise), "the address of rank 0", err);
    return rc ? rc : may_number(f, "MASTER_PORT", 1, LAST_PORT, default_port(p->job), &p->port, err);
}

static int find_mpi(struct finder *f, struct error *err)
{
    struct launcher_place *p = f->out;
    int rc;
    if ((rc = need_number(f, "OMPI_COMM_WORLD_RANK", 0, INT_MAX, &p->rank, err)) ||
        (rc = need_number(f, "OMPI_COMM_WORLD_SIZE", 1, INT_MAX, &p->world_size, err)) ||
        (rc = may_number(f, "OMPI_COMM_WORLD_LOCAL_RANK", 0, INT_MAX, LAUNCHER_NOT_GIVEN, &p->local_rank, err)) ||
        (rc = may_number(f, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, INT_MAX, 0, &p->local_size, err)))
        return rc;
    const char *job = variable(f, "PMIX_NAMESPACE");
    if (!job)
        job = variable(f, "OMPI_MCA_ess_base_jobid");
    snprintf(p->job, sizeof p->job, "mpi %s", job ? job : "");
    return find_master(f, p->local_size == p->world_size ? "127.0.0.1" : NULL, err);
}

static int find_slurm(struct finder *f, struct error *err)
{
    struct launcher_place *p = f->out;
    const char *tasks = variable(f, "SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
    int rc;
    if ((rc = need_number(f, "SLURM_PROCID", 0, INT_MAX, &p->rank, err)) ||
        (rc = need_number(f, tasks, 1, INT_MAX, &p->world_size, err)) ||
        (rc = may_number(f, "SLURM_LOCALID", 0, INT_MAX, LAUNCHER_NOT_GIVEN, &p->local_rank, err)))
        return rc;
    // All tasks on one host, where Slurm says so.
    int nodes;
    const char *count = variable(f, "SLURM_STEP_NUM_NODES") ? "SLURM_STEP_NUM_NODES" : "SLURM_JOB_NUM_NODES";
    if ((rc = may_number(f, count, 1, INT_MAX, 0, &nodes, err)))
        return rc;
    p->local_size = nodes == 1 ? p->world_size : 0;
    const char *job = variable(f, "SLURM_JOB_ID"), *step = variable(f, "SLURM_STEP_ID");
    snprintf(p->job, sizeof p->job, "slurm %s.%s", job ? job : "", step ? step : "");
    if ((rc = find_master(f, NULL, err)) || p->host[0] || p->world_size == 1)
        return rc;
    const char *name = variable(f, "SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST";
    const char *list = variable(f, name);
    return list ? first_host(p, list, name, err) : 0;
}

static int find_lws(struct finder *f, struct error *err)
{
    struct launcher_place *p = f->out;
    int rc;
    if ((rc = need_number(f, "LWS_WORKER_INDEX", 0, INT_MAX, &p->rank, err)) ||
        (rc = need_number(f, "LWS_GROUP_SIZE", 1, INT_MAX, &p->world_size, err)))
        return rc;
    const char *leader = variable(f, "LWS_LEADER_ADDRESS");
    snprintf(p->job, sizeof p->job, "lws %s", leader ? leader : "");
    return find_master(f, leader, err);
}

static const struct {
    const char *name;
    const char *marks[2]; // it applies where one of them is set
    const char *needs;    // and this as well; NULL: nothing
    int (*find)(struct finder *f, struct error *err);
} launchers[] = {
    {"torchrun", {"RANK", "WORLD_SIZE"}, NULL, find_torchrun},
    {"mpi", {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}, NULL, find_mpi},
    {"slurm", {"SLURM_PROCID", "SLURM_PROCID"}, "SLURM_STEP_ID", find_slurm},
    {"lws", {"LWS_WORKER_INDEX", "LWS_GROUP_SIZE"}, NULL, find_lws},
};

static bool applies(const struct finder *f, size_t i)
{
    return (variable(f, launchers[i].marks[0]) || variable(f, launchers[i].marks[1])) &&
           (!launchers[i].needs || variable(f, launchers[i].needs));
}

static int find_launcher(struct finder *f, const char *wanted, struct error *err)
{
    enum { NUM_LAUNCHERS = sizeof launchers / sizeof launchers[0] };
    bool any = strcmp(wanted, "auto") == 0;
    if (strcmp(wanted, "none") == 0)
        return 0;
    for (size_t i = 0; i < NUM_LAUNCHERS; i++) {
        if (any ? !applies(f, i) : strcmp(wanted, launchers[i].name) != 0)
            continue;
        f->out->launcher = launchers[i].name;
        return launchers[i].find(f, err);
    }
    return any ? 0 : error_set(err, ERR_USAGE, "--launcher %s is not " LAUNCHER_CHOICES, wanted);
}

static int use_options(struct launcher_place *p, const struct launcher_options *options, struct error *err)
{
    if (options->rank == LAUNCHER_NOT_GIVEN || options->world_size == LAUNCHER_NOT_GIVEN)
        return error_set(err, ERR_USAGE, "--rank and --world-size go together: only --%s is given",
                         options->rank == LAUNCHER_NOT_GIVEN ? "world-size" : "rank");
    if (strcmp(options->launcher, "auto") != 0)
        return error_set(err, ERR_USAGE, "--rank and --launcher %s contradict each other", options->launcher);
    p->launcher = "options";
    p->rank = (int)options->rank;
    p->world_size = (int)options->world_size;
    return 0;
}

int launcher_find(struct launcher_place *out, const struct launcher_options *options, launcher_variable *get, void *arg,
                  struct error *err)
{
    struct launcher_place place = {.launcher = "none", .world_size = 1, .local_rank = LAUNCHER_NOT_GIVEN};
    struct finder finder = {.out = &place, .get = get, .arg = arg};
    bool by_options = options->rank != LAUNCHER_NOT_GIVEN || options->world_size != LAUNCHER_NOT_GIVEN;
    int rc = by_options ? use_options(&place, options, err) : find_launcher(&finder, options->launcher, err);
    if (rc)
        return rc;
    if (options->local_rank != LAUNCHER_NOT_GIVEN)
        place.local_rank = (int)options->local_rank;
    bool alone = place.world_size == 1 && place.rank == 0, has_master = options->master && options->master[0];
    if (has_master && !alone && (rc = read_master(&place, options->master, err)))
        return rc;
    if ((rc = check_rank(&place, err))) {
        *out = place;
        return rc;
    }
    if (alone) { // nobody else
        *out = (struct launcher_place){.launcher = "none", .world_size = 1, .local_rank = place.local_rank};
        return 0;
    }
    if (!place.host[0])
        return error_set(err, ERR_USAGE, "%s says rank %d of %d, but not where rank 0 is: give --master HOST:PORT%s",
                         place.launcher, place.rank, place.world_size, by_options ? "" : " or set MASTER_ADDR");
    *out = place;
    return 0;
}

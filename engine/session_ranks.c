// Ranks in processes that a launcher started, on one host or several. Rank 0's process is the one whose session works; each other one only runs its rank,
// as rank 0's plan says. See session.h.
#include "engine/session_internal.h"

#include "engine/rendezvous.h"
#include "engine/session_plan.h"
#include "formats/checksum.h"
#include "version.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKEN_MIN_BYTES = 16, TOKEN_MAX_BYTES = 1024 };

bool session_is_spread(const struct session *s) { return s->where.world_size > 1; }

int session_check_world(const struct session *s, struct error *err)
{
    uint32_t ranks = s->manifest->tp_size * s->manifest->pp_size;
    if (s->where.world_size == 1 || s->where.world_size == (int)ranks)
        return 0;
    return error_set(
        err, ERR_USAGE,
        "%s: cut for %u rank%s, but the launcher (%s) has started %d: start one process for each rank, or give "
        "--launcher none to run all of them in this one",
        s->dir, ranks, ranks == 1 ? "" : "s", s->where.launcher, s->where.world_size);
}

int session_find_rank(const struct session_options *options, int *rank, struct error *err)
{
    struct launcher_place where;
    int rc = launcher_find(&where, &options->launcher, launcher_process_variable, NULL, err);
    *rank = rc ? 0 : where.rank;
    return rc;
}

// Who listens to the ranks' meeting can try out tokens at leisure: none that could be guessed.
static int check_token(const char *token, const char *from, struct error *err)
{
    size_t bytes = strlen(token);
    if (bytes >= TOKEN_MIN_BYTES && bytes < TOKEN_MAX_BYTES - 1)
        return 0;
    return error_set(err, ERR_USAGE, "%s: a token of %d to %d characters is wanted (openssl rand -hex 32 makes one)",
                     from, TOKEN_MIN_BYTES, TOKEN_MAX_BYTES - 2);
}

// The first line of the file, or the environment's. It is not the store's token, which goes to a server.
static int read_token(const char *file, char token[TOKEN_MAX_BYTES], const char **out, struct error *err)
{
    const char *token_of_environment = getenv("TPENGINE_RANK_TOKEN");
    *out = token_of_environment && token_of_environment[0] ? token_of_environment : NULL;
    if (!file || !file[0])
        return *out ? check_token(*out, "TPENGINE_RANK_TOKEN", err) : 0;
    FILE *f = fopen(file, "re");
    if (!f)
        return error_set_errno(err, "--token-file %s", file);
    size_t bytes = fread(token, 1, TOKEN_MAX_BYTES - 1, f);
    bool failed = ferror(f);
    fclose(f);
    token[bytes] = 0;
    token[strcspn(token, "\r\n")] = 0;
    if (failed || !token[0])
        return error_set(err, ERR_USAGE, "--token-file %s: its first line holds no token", file);
    *out = token;
    return check_token(token, file, err);
}

static void on_note(void *arg, const char *sentence)
{
    (void)arg;
    fprintf(stderr, "%s\n", sentence);
}

static int judge(void *arg, const uint8_t (*offers)[MEET_OFFER_BYTES], int world, struct error *err)
{
    struct session_offer all[COMM_MAX_RANKS];
    (void)arg;
    for (int rank = 0; rank < world; rank++)
        memcpy(&all[rank], offers[rank], sizeof all[rank]);
    return session_offers_compare(all, world, err);
}

static const char version[] = TPSHARD_VERSION " (" TPSHARD_COMMIT ")";
static bool has_met; // this process its fellows, or tried to

void session_tell_others(const struct session_options *options, const struct error *why)
{
    char token[TOKEN_MAX_BYTES];
    struct launcher_place place = {0};
    struct rendezvous_options meeting = {
        .place = &place, .version = version, .timeout_ms = (int)(options->join_timeout_s * 1000)};
    // Also of a rank that is out of its world; of others that are not known nothing can be.
    launcher_find(&place, &options->launcher, launcher_process_variable, NULL, NULL);
    bool alone = place.world_size < 2 && place.rank == 0;
    if (!has_met && !alone && place.host[0] && read_token(options->token_file, token, &meeting.token, NULL) == 0)
        rendezvous_fail(&meeting, why);
    explicit_bzero(token, sizeof token);
}

static int follow_plan(struct session *s, const struct session_plan *plan, struct error *err)
{
    int rc = session_plan_check(plan, s->manifest, s->worker.backend, err);
    if (rc)
        return rc;
    session_plan_take(plan, &s->worker);
    s->area.context = plan->context;
    s->area.max_sequences = plan->max_sequences;
    s->wanted_pages = s->area.num_pages = plan->num_pages;
    s->timeout_ms = plan->timeout_ms;
    return 0;
}

static int meet(struct session *s, int *links, struct error *err)
{
    struct rendezvous met;
    struct session_plan plan;
    struct error why;
    char token[TOKEN_MAX_BYTES];
    struct rendezvous_options options = {.place = &s->where,
                                         .version = version,
                                         .tp_size = (int)s->manifest->tp_size,
                                         .pp_size = (int)s->manifest->pp_size,
                                         .timeout_ms = s->join_timeout_ms,
                                         .offer = &s->offer,
                                         .offer_bytes = sizeof s->offer,
                                         .judge = judge,
                                         .on_note = on_note};
    int rc = read_token(s->token_file, token, &options.token, err);
    has_met = true;
    if (rc)
        return rc;
    checksum128_to_bytes(s->manifest->contract, options.contract);
    session_plan_make(&plan, &s->worker, s->wanted_pages, s->timeout_ms);
    rc = rendezvous_meet(&met, &options, &plan, sizeof plan, err);
    explicit_bzero(token, sizeof token);
    if (rc)
        return rc;
    if (s->where.rank > 0)
        rc = follow_plan(s, &plan, &why);
    if (!rc)
        rc = s->settled ? 0 : session_settle(s, NULL, &why);
    // All have as many pages as the poorest; one that has too few, or a plan that it cannot follow, tells the others.
    int64_t own_pages = s->worker.num_pages;
    rc = rendezvous_least(&met, &s->worker.num_pages, rc ? &why : NULL, s->join_timeout_ms, err);
    if (!rc && (s->worker.num_pages < s->worker.least_pages || s->worker.num_pages > own_pages))
        rc = error_set(err, ERR_RANK, "the ranks agreed on %lld pages; this one has %lld and needs %lld",
                       (long long)s->worker.num_pages, (long long)own_pages, (long long)s->worker.least_pages);
    if (!rc) {
        memcpy(links, met.links, sizeof met.links);
        memset(met.links, -1, sizeof met.links);
    }
    rendezvous_close(&met);
    return rc;
}

// The caller's handlers for both signals, which it may have blocked until it watches its ranks: the others can take minutes to come.
static void meet_with_signals(struct session *s, int *links, struct error *err)
{
    sigset_t ends, before;
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    pthread_sigmask(SIG_UNBLOCK, &ends, &before);
    meet(s, links, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int session_meet(struct session *s, int *links, struct error *err)
{
    // A second start finds nobody: the others have ended.
    if (s->met && !s->met_error.code)
        error_set(&s->met_error, ERR_RANK, "the ranks of other processes have ended: start all of them again");
    else if (!s->met)
        meet_with_signals(s, links, &s->met_error);
    s->met = true;
    if (s->met_error.code && err)
        *err = s->met_error;
    return s->met_error.code;
}

int session_run_rank(struct session *s, struct error *err)
{
    int links[COMM_MAX_RANKS];
    int rc = session_meet(s, links, err);
    if (rc)
        return rc;
    s->leave_signals = false;
    const struct launch_options launch = session_launch_options(s, links);
    if ((rc = launch_start(&s->launch, &launch, worker_main, &s->worker, err)))
        return rc;
    session_place(s);
    rc = launch_wait_end(s->launch, err);
    launch_stop(s->launch, NULL);
    s->launch = NULL;
    s->shared = NULL;
    return rc;
}

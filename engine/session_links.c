// What is known of the links between the devices, for ranks that this process starts. See link_probe.h.
//
// The first verdict on the ranks' devices stays, for later starts and for a second model beside the first (tpengine eval --against). A probe is made of
// processes that are forked, and where ranks are threads of this process its driver runs from their start on, which no forked process can use; and
// beside ranks that look how much memory there is a probe would take some of it.
#include "engine/session_internal.h"

#include <stdio.h>

static struct {
    struct link_probe *probe; // NULL: none yet
    const struct backend *backend;
    int num_ends, group;
    int users;         // sessions
    bool driver_lives; // in this process
} kept;

static bool is_kept(const struct link_probe_options *o)
{
    return kept.probe && kept.backend == o->backend && kept.num_ends == o->num_ends && kept.group == o->group;
}

static void drop(void)
{
    link_probe_end(kept.probe);
    kept.probe = NULL;
}

// A probe of other devices than those that a running start waits for is that session's own.
static int begin(struct session *s, const struct link_probe_options *options, struct error *err)
{
    int rc;
    if (kept.driver_lives)
        return error_set(err, ERR_OTHER,
                         "the links between the devices of %d ranks were not tried before ranks began as threads of "
                         "this process, and cannot be any more (--ranks process has no such end)",
                         options->num_ends);
    if ((rc = link_probe_begin(&s->links, options, err)) || kept.users > 0)
        return rc;
    drop();
    kept.probe = s->links;
    kept.backend = options->backend;
    kept.num_ends = options->num_ends;
    kept.group = options->group;
    return 0;
}

static int take_links(struct session *s, struct error *err)
{
    struct link_probe_options options = link_probe_defaults;
    int rc = 0;
    options.backend = s->worker.backend;
    options.num_ends = (int)s->manifest->num_ranks;
    options.group = (int)s->manifest->tp_size;
    if (is_kept(&options))
        s->links = kept.probe;
    else
        rc = begin(s, &options, err);
    kept.users += s->links && s->links == kept.probe;
    return rc;
}

int session_begin_links(struct session *s, struct error *err)
{
    struct worker_options *w = &s->worker;
    bool here =
        !session_is_spread(s) && s->manifest->tp_size > 1; // others try them among themselves (rank_transport.h)
    int rc = w->transport == TRANSPORT_P2P && here ? take_links(s, err) : 0;
    if (rc && w->transport_is_auto) {
        snprintf(w->link_problem, sizeof w->link_problem, "%.*s", (int)sizeof w->link_problem - 1, err->msg);
        rc = 0;
    }
    w->links = s->links;
    kept.driver_lives = kept.driver_lives || (s->ranks_are_threads && w->backend->link_probe);
    return rc;
}

void session_end_links(struct session *s)
{
    struct link_probe *links = s->links;
    s->links = NULL;
    s->worker.links = NULL;
    if (!links || links != kept.probe)
        link_probe_end(links);
    else if (--kept.users == 0 && link_probe_is_done(links))
        link_probe_stop(links);
    else if (kept.users == 0)
        drop();
}

void session_doubt_links(void)
{
    if (kept.users == 0 && !kept.driver_lives)
        drop();
}

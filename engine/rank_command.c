// Commands that run ranks, where a launcher has started a process for each: rank 0's runs the command, another one runs its rank and ends with it.
#include "engine/commands.h"

#include <stdio.h>

static int run_other_rank(const char *place, struct error *err)
{
    struct session_options wanted = session_options;
    struct session *session = NULL;
    int rc;
    // What depends on the command, rank 0's plan brings.
    if ((rc = choose_store(&wanted.store, place, err)) == 0 &&
        (rc = session_open(&session, place, &wanted, 1, 0, err)) == 0)
        rc = session_run_rank(session, err);
    session_close(session);
    return rc;
}

int run_among_ranks(int (*command)(int argc, char **argv, struct error *err), int argc, char **argv, struct error *err)
{
    const struct session_options given = session_options;
    int rank;
    session_options.given = &given;
    int rc = session_find_rank(&given, &rank, err);
    if (!rc)
        rc = rank == 0 ? command(argc, argv, err) : run_other_rank(argv[0], err);
    session_options.given = NULL;
    if (rc) { // its own sentence comes first: to find the others can take seconds
        fprintf(stderr, "tpengine: %s\n", err->msg);
        session_tell_others(&given, err);
        err->msg[0] = 0;
    }
    return rc;
}

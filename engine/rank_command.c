// A process that a launcher started for a rank other than 0, by the same command line as rank 0's: it runs that rank and ends with it.
#include "engine/commands.h"

bool other_rank_ran(const char *place, int *rc, struct error *err)
{
    struct session_options wanted = session_options;
    struct session *session = NULL;
    int rank;
    if ((*rc = session_find_rank(&wanted, &rank, err)))
        return true;
    if (rank == 0)
        return false;
    // What depends on the command, rank 0's plan brings.
    if ((*rc = choose_store(&wanted.store, place, err)) == 0 &&
        (*rc = session_open(&session, place, &wanted, 1, 0, err)) == 0)
        *rc = session_run_rank(session, err);
    session_close(session);
    return true;
}

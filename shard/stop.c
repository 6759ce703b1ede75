// See stop.h.
#include "shard/stop.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

static atomic_int stop_signal; // lock-free: a handler may set it while threads read it

static void on_signal(int number) { stop_signal = number; }

void stop_install(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART | (int)SA_RESETHAND};
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool stop_requested(void) { return stop_signal != 0; }

int stop_check(struct error *err)
{
    if (stop_signal == SIGINT)
        return error_set(err, ERR_SIGINT, "interrupted");
    if (stop_signal)
        return error_set(err, ERR_SIGTERM, "terminated");
    return 0;
}

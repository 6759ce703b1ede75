// What a launch asks of processes: its own descriptors, and whether another one stands still.
#ifndef TPSHARD_ENGINE_PROCESS_H
#define TPSHARD_ENGINE_PROCESS_H

#include <stdbool.h>
#include <sys/types.h>

// Closes descriptors first .. end - 1 of this process. Safe behind a fork.
void process_close_descriptors(unsigned first, unsigned end);
// Whether a process was stopped (SIGSTOP, a debugger). false where that cannot be seen.
bool process_is_stopped(pid_t pid);

#endif

// A body in a child process with a deadline. See doctor.h.
#include "engine/doctor.h"

#include "kernels/clock.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

void *doctor_probe_new(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    return memory;
}

void doctor_probe_free(void *probe, size_t bytes)
{
    if (probe)
        munmap(probe, bytes);
}

// True when the child has ended within the time.
static bool wait_for_end(pid_t pid, int *status, double seconds)
{
    double end_s = clock_now_s() + seconds;
    for (;;) {
        pid_t ended = waitpid(pid, status, WNOHANG);
        if (ended == pid || (ended < 0 && errno != EINTR))
            return true;
        if (clock_now_s() >= end_s)
            return false;
        usleep(1000);
    }
}

void doctor_probe_run(struct probe *probe, void (*body)(struct probe *probe, void *arg), void *arg, double seconds)
{
    double begin_s = clock_now_s();
    int status = 0;
    pid_t pid = fork();
    if (pid < 0) {
        error_set_errno(&probe->err, "cannot start a process");
        probe->end = PROBE_DIED;
        return;
    }
    if (pid == 0) {
        setpgid(0, 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        signal(SIGINT, SIG_IGN); // the parent ends it
        body(probe, arg);
        _exit(0);
    }
    setpgid(pid, pid); // whoever comes first
    if (wait_for_end(pid, &status, seconds)) {
        probe->end = WIFEXITED(status) && WEXITSTATUS(status) == 0 ? PROBE_DONE : PROBE_DIED;
        if (WIFSIGNALED(status) && !probe->err.code)
            error_set(&probe->err, ERR_OTHER, "it was ended by signal %d", WTERMSIG(status));
    } else {
        kill(-pid, SIGKILL);
        probe->end = wait_for_end(pid, &status, 2) ? PROBE_LATE : PROBE_STUCK;
    }
    kill(-pid, SIGKILL); // what it had started itself
    probe->seconds = clock_now_s() - begin_s;
}

void doctor_probe_sentence(char text[PROBE_SENTENCE_BYTES], const struct probe *probe)
{
    char at[PROBE_AT_BYTES];
    memcpy(at, probe->at, sizeof at); // written by a child that was killed: perhaps without its end
    at[sizeof at - 1] = 0;
    const char *where = at[0] ? ", at " : "";
    if (probe->end == PROBE_LATE)
        snprintf(text, PROBE_SENTENCE_BYTES, "was ended after %.1f s%s%s", probe->seconds, where, at);
    else if (probe->end == PROBE_STUCK)
        snprintf(text, PROBE_SENTENCE_BYTES, "hangs in the kernel since %.1f s and cannot be ended%s%s", probe->seconds,
                 where, at);
    else if (probe->end == PROBE_NOT_RUN)
        snprintf(text, PROBE_SENTENCE_BYTES, "was not run");
    else
        snprintf(text, PROBE_SENTENCE_BYTES, "ended%s%s%s%.300s", where, at, probe->err.code ? ": " : "",
                 probe->err.code ? probe->err.msg : "");
}

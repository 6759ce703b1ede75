// Descriptors and states of processes. See process.h.
#include "engine/process.h"

#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

void process_close_descriptors(unsigned first, unsigned end)
{
    enum { MOST_DESCRIPTORS = 1 << 20 }; // a limit may be none: billions of calls are minutes
    struct rlimit limit;
    if (first >= end)
        return;
#ifdef SYS_close_range
    if (syscall(SYS_close_range, first, end - 1, 0) == 0)
        return;
#endif
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < end)
        end = (unsigned)limit.rlim_cur;
    end = end < MOST_DESCRIPTORS ? end : MOST_DESCRIPTORS;
    for (unsigned fd = first; fd < end; fd++)
        close((int)fd);
}

bool process_is_stopped(pid_t pid)
{
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    const char *name_end = strrchr(text, ')');
    return name_end && (name_end[1] == ' ' && (name_end[2] == 'T' || name_end[2] == 't'));
}

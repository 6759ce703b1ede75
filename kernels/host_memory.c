// See host_memory.h.
#include "kernels/host_memory.h"

#include <stdio.h>
#include <string.h>

double host_memory_figure(const char *path, const char *key, double unit)
{
    char line[256];
    double value = -1;
    FILE *f = fopen(path, "re");
    if (!f)
        return -1;
    while (value < 0 && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%lf", &value) != 1)
            value = -1;
    fclose(f);
    return value < 0 ? -1 : value * unit;
}

double host_memory_available(void)
{
    double available = host_memory_figure("/proc/meminfo", "MemAvailable:", 1024);
    double limit = host_memory_figure("/sys/fs/cgroup/memory.max", "", 1),
           used = host_memory_figure("/sys/fs/cgroup/memory.current", "", 1);
    double inactive = host_memory_figure("/sys/fs/cgroup/memory.stat", "inactive_file ", 1);
    double active = host_memory_figure("/sys/fs/cgroup/memory.stat", "active_file ",
                                       1); // page cache as well, given back as readily
    if (limit >= 0 && used >= 0) {
        double left = limit - used + (inactive > 0 ? inactive : 0) + (active > 0 ? active : 0);
        if (available < 0 || left < available)
            available = left;
    }
    return available;
}

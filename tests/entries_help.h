// How many entries a directory has, so that a test sees what it left behind.
#ifndef TPSHARD_TESTS_ENTRIES_HELP_H
#define TPSHARD_TESTS_ENTRIES_HELP_H

#include <dirent.h>
#include <stddef.h>
#include <string.h>

// -1: there is no such directory.
static inline int count_entries(const char *path)
{
    DIR *dir = opendir(path);
    int count = 0;
    if (!dir)
        return -1;
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

// Those with this in their names.
static inline int count_entries_named(const char *path, const char *part)
{
    DIR *dir = opendir(path);
    int count = 0;
    if (!dir)
        return -1;
    for (struct dirent *entry; (entry = readdir(dir));)
        count += strstr(entry->d_name, part) != NULL;
    closedir(dir);
    return count;
}

// Open ones of this process. Only to be compared: one of them is that of the counting itself.
static inline int count_descriptors(void) { return count_entries("/proc/self/fd"); }

#endif

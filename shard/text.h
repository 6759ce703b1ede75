// How names begin and end, and shapes for people.
#ifndef TPSHARD_SHARD_TEXT_H
#define TPSHARD_SHARD_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static inline bool text_begins(const char *text, const char *beginning)
{
    return strncmp(text, beginning, strlen(beginning)) == 0;
}

static inline bool text_ends(const char *text, const char *ending)
{
    size_t text_bytes = strlen(text), ending_bytes = strlen(ending);
    return text_bytes >= ending_bytes && strcmp(text + text_bytes - ending_bytes, ending) == 0;
}

// "4096 x 128"; without dimensions "of one element".
static inline void text_shape(char *out, size_t bytes, const uint64_t *dims, int num_dims)
{
    size_t at = 0;
    snprintf(out, bytes, "of one element");
    for (int d = 0; d < num_dims && at < bytes; d++)
        at += (size_t)snprintf(out + at, bytes - at, "%s%llu", d ? " x " : "", (unsigned long long)dims[d]);
}

#endif

// A stream into memory. What open_memstream cannot take for want of memory is lost, and nobody is told: here it is an error of the stream.
#ifndef TPSHARD_FORMATS_MEMORY_STREAM_H
#define TPSHARD_FORMATS_MEMORY_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

struct memory_stream {
    FILE *out;
    char *text;
    size_t bytes, capacity;
};

// False: out of memory. The struct stays where it is until memory_stream_close.
bool memory_stream_open(struct memory_stream *stream);
// Closes it. What was written, with a NUL behind it: the caller frees. NULL when some of it was lost. bytes may be null.
char *memory_stream_close(struct memory_stream *stream, size_t *bytes);

#endif

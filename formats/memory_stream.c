// See memory_stream.h.
#include "formats/memory_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

static ssize_t take(void *cookie, const char *bytes, size_t num_bytes)
{
    struct memory_stream *stream = cookie;
    if (num_bytes >= stream->capacity - stream->bytes) { // one stays free for the NUL
        size_t capacity = 2 * (stream->capacity + num_bytes);
        char *text = realloc(stream->text, capacity);
        if (!text) {
            errno = ENOMEM;
            return 0;
        }
        stream->text = text;
        stream->capacity = capacity;
    }
    memcpy(stream->text + stream->bytes, bytes, num_bytes);
    stream->bytes += num_bytes;
    return (ssize_t)num_bytes;
}

bool memory_stream_open(struct memory_stream *stream)
{
    enum { FIRST_BYTES = 1024 };
    *stream = (struct memory_stream){.text = malloc(FIRST_BYTES), .capacity = FIRST_BYTES};
    if (stream->text)
        stream->out = fopencookie(stream, "w", (cookie_io_functions_t){.write = take});
    if (!stream->out)
        free(stream->text);
    return stream->out != NULL;
}

char *memory_stream_close(struct memory_stream *stream, size_t *bytes)
{
    bool failed = ferror(stream->out) != 0;
    if (fclose(stream->out) || failed) {
        free(stream->text);
        return NULL;
    }
    stream->text[stream->bytes] = 0;
    if (bytes)
        *bytes = stream->bytes;
    return stream->text;
}

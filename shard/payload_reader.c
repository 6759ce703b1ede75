// See payload_reader.h. A few leaves stay decoded, since neighbouring ranges share them.
#include "shard/payload_reader.h"

#include "formats/file_io.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LANES = 8 }; // leaves that are decoded at once, and kept

static const uint64_t NO_LEAF = UINT64_MAX;

// Whoever holds a lane has its memory for himself.
struct lane {
    bool held;
    uint64_t leaf, used; // used: when, counted in holds
    uint8_t *stored, *payload;
    struct leaf_scratch *scratch;
};

struct payload_reader {
    const struct shard_file *file;
    const char *path;
    int fd;
    pthread_mutex_t mutex; // of the lanes' first line and of holds
    pthread_cond_t released;
    uint64_t holds;
    struct lane lanes[LANES];
};

int payload_reader_open(struct payload_reader **out, const struct shard_file *file, const char *path, struct error *err)
{
    struct payload_reader *reader = calloc(1, sizeof *reader);
    if (!reader)
        return error_set(err, ERR_MEMORY, "%s: out of memory", path);
    reader->file = file;
    reader->path = path;
    int rc = file_open_read(&reader->fd, NULL, path, err);
    if (rc) {
        free(reader);
        return rc;
    }
    pthread_mutex_init(&reader->mutex, NULL);
    pthread_cond_init(&reader->released, NULL);
    for (int i = 0; i < LANES; i++)
        reader->lanes[i].leaf = NO_LEAF;
    *out = reader;
    return 0;
}

void payload_reader_close(struct payload_reader *reader)
{
    if (!reader)
        return;
    for (int i = 0; i < LANES; i++) {
        free(reader->lanes[i].stored);
        free(reader->lanes[i].payload);
        leaf_scratch_free(reader->lanes[i].scratch);
    }
    pthread_cond_destroy(&reader->released);
    pthread_mutex_destroy(&reader->mutex);
    close(reader->fd);
    free(reader);
}

// One that has the leaf, else the one that was longest unused.
static struct lane *take_lane(struct payload_reader *reader, uint64_t leaf)
{
    struct lane *best;
    pthread_mutex_lock(&reader->mutex);
    for (;;) {
        best = NULL;
        for (int i = 0; i < LANES; i++) {
            struct lane *lane = &reader->lanes[i];
            if (!lane->held && (!best || lane->leaf == leaf || (best->leaf != leaf && lane->used < best->used)))
                best = lane;
        }
        if (best)
            break;
        pthread_cond_wait(&reader->released, &reader->mutex);
    }
    best->held = true;
    best->used = ++reader->holds;
    pthread_mutex_unlock(&reader->mutex);
    return best;
}

static void release_lane(struct payload_reader *reader, struct lane *lane)
{
    pthread_mutex_lock(&reader->mutex);
    lane->held = false;
    pthread_cond_signal(&reader->released);
    pthread_mutex_unlock(&reader->mutex);
}

static int fill_lane(struct payload_reader *reader, struct lane *lane, uint64_t leaf, struct error *err)
{
    struct shard_stored stored = shard_file_stored_leaf(reader->file, leaf);
    uint64_t offset = shard_file_payload_offset(reader->file) + stored.offset;
    int rc;
    lane->leaf = NO_LEAF;
    if ((!lane->stored && !(lane->stored = malloc(SHARD_STORED_MAX_BYTES))) ||
        (!lane->payload && !(lane->payload = malloc(SHARD_LEAF_BYTES))) ||
        (!lane->scratch && !(lane->scratch = leaf_scratch_new())))
        return error_set(err, ERR_MEMORY, "%s: out of memory for a leaf", reader->path);
    if ((rc = file_pread_full(reader->fd, lane->stored, stored.bytes, offset, reader->path, err)) ||
        (rc = shard_file_verify_leaf(reader->file, leaf, lane->stored, err)) ||
        (rc = shard_file_decode_leaf(reader->file, leaf, lane->stored, lane->payload, lane->scratch, err)))
        return rc;
    lane->leaf = leaf;
    return 0;
}

int payload_reader_read(struct payload_reader *reader, void *buffer, uint64_t bytes, uint64_t offset, struct error *err)
{
    if (!shard_file_is_compressed(reader->file))
        return file_pread_full(reader->fd, buffer, bytes, shard_file_payload_offset(reader->file) + offset,
                               reader->path, err);
    int rc = 0;
    for (uint8_t *at = buffer; !rc && bytes > 0;) {
        uint64_t leaf = offset / SHARD_LEAF_BYTES, in_leaf = offset % SHARD_LEAF_BYTES;
        uint64_t part = SHARD_LEAF_BYTES - in_leaf < bytes ? SHARD_LEAF_BYTES - in_leaf : bytes;
        struct lane *lane = take_lane(reader, leaf);
        if (lane->leaf == leaf || !(rc = fill_lane(reader, lane, leaf, err)))
            memcpy(at, lane->payload + in_leaf, part);
        release_lane(reader, lane);
        at += part;
        offset += part;
        bytes -= part;
    }
    return rc;
}

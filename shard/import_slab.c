// See import_slab.h.
#include "shard/import_slab.h"

#include <pthread.h>
#include <stdlib.h>

enum { BLOCK_BYTES = 64 << 20, COLUMN_UNIT_BYTES = 4096, SLOTS = 12, PIECE_BYTES = 16 << 20 };

struct slot {
    const struct safetensors_tensor *tensor; // NULL: empty
    uint64_t begin, width, bytes;
    uint8_t *memory;
    int users;
    bool loading;
    uint64_t last_use;
};

struct slab_cache {
    const struct checkpoint *checkpoint;
    pthread_mutex_t mutex;
    pthread_cond_t changed; // a slot was loaded or given back
    uint64_t clock;
    struct slot slots[SLOTS];
};

int slab_cache_new(struct slab_cache **out, const struct checkpoint *checkpoint, struct error *err)
{
    struct slab_cache *cache = calloc(1, sizeof *cache);
    if (!cache)
        return error_set(err, ERR_MEMORY, "out of memory to read quantized tensors");
    cache->checkpoint = checkpoint;
    pthread_mutex_init(&cache->mutex, NULL);
    pthread_cond_init(&cache->changed, NULL);
    *out = cache;
    return 0;
}

void slab_cache_free(struct slab_cache *cache)
{
    if (!cache)
        return;
    for (int i = 0; i < SLOTS; i++)
        free(cache->slots[i].memory);
    pthread_mutex_destroy(&cache->mutex);
    pthread_cond_destroy(&cache->changed);
    free(cache);
}

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t block_width(uint64_t rows, uint64_t row_bytes, bool whole)
{
    if (whole || rows * row_bytes <= BLOCK_BYTES)
        return row_bytes;
    uint64_t width = BLOCK_BYTES / rows / COLUMN_UNIT_BYTES * COLUMN_UNIT_BYTES;
    return min_u64(width ? width : COLUMN_UNIT_BYTES, row_bytes);
}

static int load(const struct slab_cache *cache, const struct slot *slot, uint64_t rows, uint64_t row_bytes,
                struct error *err)
{
    int rc = 0;
    if (slot->width == row_bytes) {
        for (uint64_t at = 0; !rc && at < slot->bytes; at += PIECE_BYTES)
            rc = checkpoint_read(cache->checkpoint, slot->tensor, at, min_u64(slot->bytes - at, PIECE_BYTES),
                                 slot->memory + at, err);
        return rc;
    }
    for (uint64_t row = 0; !rc && row < rows; row++)
        rc = checkpoint_read(cache->checkpoint, slot->tensor, row * row_bytes + slot->begin, slot->width,
                             slot->memory + row * slot->width, err);
    return rc;
}

static struct slot *find(struct slab_cache *cache, const struct safetensors_tensor *tensor, uint64_t begin,
                         uint64_t width)
{
    for (int i = 0; i < SLOTS; i++)
        if (cache->slots[i].tensor == tensor && cache->slots[i].begin == begin && cache->slots[i].width == width)
            return &cache->slots[i];
    return NULL;
}

// The slot that was not used for the longest time; NULL: all are in use.
static struct slot *oldest(struct slab_cache *cache)
{
    struct slot *found = NULL;
    for (int i = 0; i < SLOTS; i++)
        if (cache->slots[i].users == 0 && (!found || cache->slots[i].last_use < found->last_use))
            found = &cache->slots[i];
    return found;
}

static uint64_t held_bytes(const struct slab_cache *cache)
{
    uint64_t bytes = 0;
    for (int i = 0; i < SLOTS; i++)
        bytes += cache->slots[i].bytes;
    return bytes;
}

static void drop(struct slot *slot)
{
    free(slot->memory);
    *slot = (struct slot){0};
}

// Makes room: what is idle goes, oldest first, until the new block fits into twice BLOCK_BYTES. Called with the mutex
// held.
static void make_room(struct slab_cache *cache, uint64_t bytes)
{
    while (held_bytes(cache) + bytes > 2 * (uint64_t)BLOCK_BYTES) {
        struct slot *idle = NULL;
        for (int i = 0; i < SLOTS; i++)
            if (cache->slots[i].users == 0 && cache->slots[i].bytes > 0 &&
                (!idle || cache->slots[i].last_use < idle->last_use))
                idle = &cache->slots[i];
        if (!idle)
            return;
        drop(idle);
    }
}

// Takes an empty slot for the block and loads it. Called with the mutex held, which is let go of while reading.
static int fill(struct slab_cache *cache, struct slot *slot, const struct safetensors_tensor *tensor, uint64_t rows,
                uint64_t row_bytes, uint64_t begin, uint64_t width, struct error *err)
{
    drop(slot);
    make_room(cache, rows * width);
    uint8_t *memory = malloc(rows * width + 1);
    if (!memory)
        return error_set(err, ERR_MEMORY, "out of memory for %llu bytes of tensor %s",
                         (unsigned long long)(rows * width), tensor->name);
    *slot = (struct slot){.tensor = tensor,
                          .begin = begin,
                          .width = width,
                          .bytes = rows * width,
                          .memory = memory,
                          .users = 1,
                          .loading = true};
    pthread_mutex_unlock(&cache->mutex);
    int rc = load(cache, slot, rows, row_bytes, err);
    pthread_mutex_lock(&cache->mutex);
    slot->loading = false;
    if (rc) { // those who wait for it find it gone and try themselves
        slot->users--;
        slot->tensor = NULL;
    }
    pthread_cond_broadcast(&cache->changed);
    return rc;
}

int slab_get(struct slab *out, struct slab_cache *cache, const struct safetensors_tensor *tensor, uint64_t rows,
             uint64_t at, bool whole, struct error *err)
{
    uint64_t row_bytes = tensor->bytes / rows;
    uint64_t width = block_width(rows, row_bytes, whole);
    uint64_t begin = at / width * width;
    width = min_u64(width, row_bytes - begin);
    struct slot *slot;
    int rc = 0;
    pthread_mutex_lock(&cache->mutex);
    for (;;) {
        slot = find(cache, tensor, begin, width);
        if (slot && !slot->loading) {
            slot->users++;
            break;
        }
        if (!slot && (slot = oldest(cache))) {
            rc = fill(cache, slot, tensor, rows, row_bytes, begin, width, err);
            break;
        }
        pthread_cond_wait(&cache->changed, &cache->mutex);
    }
    if (!rc) {
        slot->last_use = ++cache->clock;
        *out = (struct slab){slot->memory, begin, width, (int)(slot - cache->slots)};
    }
    pthread_mutex_unlock(&cache->mutex);
    return rc;
}

void slab_put(struct slab_cache *cache, const struct slab *slab)
{
    pthread_mutex_lock(&cache->mutex);
    cache->slots[slab->slot].users--;
    pthread_cond_broadcast(&cache->changed);
    pthread_mutex_unlock(&cache->mutex);
}

// What the loader's tests share: a rank file of known bytes; a source that may be remote, slow, damaged or gone; and two backends, a host's
// and a device's. The source takes the place of engine/store.c in the program that includes this.
#ifndef TPSHARD_TESTS_LOADER_HELP_H
#define TPSHARD_TESTS_LOADER_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/loader.h"
#include "formats/checked.h"
#include "formats/file_io.h"
#include "tests/device/quick.h"
#include "tests/random_help.h"
#include "tests/shard_fixture.h"

// ---- the source ----------------------------------------------------------------------------------------------------

enum { MAX_READS = 1024 };

struct store_file {
    int fd;
    char name[128];
    uint64_t bytes;
    bool remote; // behind a network; most of the following is of such a source
    bool cached; // comes from a cache of what was fetched, whose copy is damaged; behind it, all is well
    atomic_int distrusted, cancelled;
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int reads_allowed; // -1: no limit; a read waits until it may
    int num_reads;
    uint64_t read_at[MAX_READS]; // in order
    uint64_t damaged_offset;     // of a byte that comes wrong
    int damaged_times;           // so often
    int fail_at;                 // this read fails; -1: none
    atomic_llong trickled;       // bytes of reads under way that the network has brought already
    int num_kept;
    uint64_t kept[MAX_READS][2]; // offset and end of what was given to be kept, in order of the offsets
    const uint8_t *content;      // what is kept must be this
};

static inline void source_allow(struct store_file *source, int reads)
{
    pthread_mutex_lock(&source->lock);
    source->reads_allowed = reads;
    pthread_cond_broadcast(&source->turn);
    pthread_mutex_unlock(&source->lock);
}

static inline int source_reads(struct store_file *source)
{
    pthread_mutex_lock(&source->lock);
    int reads = source->num_reads;
    pthread_mutex_unlock(&source->lock);
    return reads;
}

const char *store_file_name(const struct store_file *file) { return file->name; }
uint64_t store_file_bytes(const struct store_file *file) { return file->bytes; }
int store_file_fd(const struct store_file *file) { return file->remote ? -1 : file->fd; }

int store_file_read(struct store_file *file, void *buffer, uint64_t num_bytes, uint64_t offset, struct error *err)
{
    pthread_mutex_lock(&file->lock);
    int number = file->num_reads++;
    file->read_at[number % MAX_READS] = offset;
    while (file->reads_allowed >= 0 && number >= file->reads_allowed && !file->cancelled)
        pthread_cond_wait(&file->turn, &file->lock);
    bool hit = file->damaged_times > 0 && file->damaged_offset >= offset && file->damaged_offset < offset + num_bytes;
    file->damaged_times -= hit;
    pthread_mutex_unlock(&file->lock);
    if (file->cancelled)
        return error_set(err, ERR_IO, "%s: cancelled", file->name);
    if (number == file->fail_at)
        return error_set(err, ERR_IO, "%s: the server went away", file->name);
    if (file->cached) {
        memcpy(buffer, file->content + offset, num_bytes);
        return 0;
    }
    int rc = file_pread_full(file->fd, buffer, num_bytes, offset, file->name, err);
    if (!rc && hit)
        ((uint8_t *)buffer)[file->damaged_offset - offset] ^= 4;
    return rc;
}

uint64_t store_file_fetched_bytes(const struct store_file *file) { return (uint64_t)file->trickled; }

void store_file_keep(struct store_file *file, const void *bytes, uint64_t num_bytes, uint64_t offset)
{
    if (memcmp(bytes, file->content + offset, num_bytes) != 0)
        abort();
    pthread_mutex_lock(&file->lock);
    int at = file->num_kept++;
    for (; at > 0 && file->kept[at - 1][0] > offset; at--)
        memcpy(file->kept[at], file->kept[at - 1], sizeof file->kept[at]);
    file->kept[at][0] = offset;
    file->kept[at][1] = offset + num_bytes;
    pthread_mutex_unlock(&file->lock);
}

bool store_file_distrust(struct store_file *file)
{
    file->distrusted += file->cached;
    return file->cached;
}

void store_file_cancel(struct store_file *file)
{
    pthread_mutex_lock(&file->lock);
    file->cancelled++;
    pthread_cond_broadcast(&file->turn);
    pthread_mutex_unlock(&file->lock);
}

// ---- the file ------------------------------------------------------------------------------------------------------

struct load_fixture {
    char dir[64], path[96];
    uint8_t *payload, *content; // what must arrive; the file, all of it: shared, never changed
    uint64_t payload_bytes, payload_offset, file_bytes;
    struct shard_file *file;
    struct store_file source;
    struct error err;
};

enum { FIXTURE_LEAVES = 20, FIXTURE_COLS = 512 };

// Like weights: exponents close together, all other bits random. Every third leaf is plain noise, which no code makes shorter.
static void fixture_fill(uint8_t *payload, uint64_t bytes)
{
    random_state = 20;
    for (uint64_t i = 0; i + 1 < bytes; i += 2) {
        uint64_t bits = random_bits();
        bool noise = i / SHARD_LEAF_BYTES % 3 == 2;
        payload[i] = (uint8_t)bits;
        payload[i + 1] = (uint8_t)(noise ? bits >> 8 : 0x3b + (bits >> 8 & 3) + (bits >> 10 & 0x80));
    }
}

// The whole file anew, in the same place.
static void fixture_write(struct load_fixture *f)
{
    snprintf(f->path, sizeof f->path, "%s/rank-00-of-01.tpshard", f->dir);
    int fd = open(f->path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(file_pwrite_full(fd, f->content, f->file_bytes, 0, f->path, &f->err), 0);
    assert_int_equal(close(fd), 0);
}

// Changes one byte of the file; a second time brings it back.
static inline void fixture_flip(const struct load_fixture *f, uint64_t offset, uint8_t bits)
{
    uint8_t byte = 0;
    int fd = open(f->path, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0 && pread(fd, &byte, 1, (off_t)offset) == 1);
    byte ^= bits;
    assert_true(pwrite(fd, &byte, 1, (off_t)offset) == 1 && close(fd) == 0);
}

// The stored leaves of a compressed file behind its head.
static void fixture_compress(struct load_fixture *f, const struct shard_identity *identity,
                             const struct shard_tensor *tensors, uint64_t count, uint64_t leaf_count)
{
    struct leaf_encoder *encoder = leaf_encoder_new();
    uint64_t *sums = calloc(leaf_count, sizeof *sums), at = 0;
    struct shard_leaf *stored = calloc(leaf_count, sizeof *stored);
    uint8_t *bytes = calloc(1, f->payload_bytes + SHARD_FILE_ALIGN), *head;
    struct shard_compressed_layout layout;
    assert_true(encoder && sums && stored && bytes);
    for (uint64_t i = 0; i < leaf_count; i++) {
        uint64_t left = f->payload_bytes - i * SHARD_LEAF_BYTES, stored_bytes;
        const uint8_t *from;
        enum leaf_code code;
        assert_int_equal(leaf_encode(&code, &from, &stored_bytes, encoder, f->payload + i * SHARD_LEAF_BYTES,
                                     left < SHARD_LEAF_BYTES ? left : SHARD_LEAF_BYTES, &f->err),
                         0);
        memcpy(bytes + at, from, stored_bytes);
        stored[i] = (struct shard_leaf){(uint32_t)stored_bytes, code};
        uint64_t end = i + 1 < leaf_count ? at + stored_bytes : round_up(at + stored_bytes, SHARD_FILE_ALIGN);
        sums[i] = checksum_leaf(bytes + at, end - at);
        at = end;
    }
    assert_int_equal(shard_compressed_layout(&layout, tensors, count, &f->err), 0);
    f->payload_offset = layout.payload_offset;
    f->file_bytes = layout.payload_offset + at;
    if (shard_compressed_head_serialise(&head, identity, tensors, count, sums, stored, NULL, &f->err))
        fail_msg("%s", f->err.msg);
    f->content = malloc(f->file_bytes);
    assert_non_null(f->content);
    memcpy(f->content, head, f->payload_offset);
    memcpy(f->content + f->payload_offset, bytes, at);
    free(head);
    free(bytes);
    free(stored);
    free(sums);
    leaf_encoder_free(encoder);
}

static void fixture_lay_out(struct load_fixture *f, bool compressed)
{
    static const uint8_t contract[16] = {7, 7, 7};
    struct shard_identity identity = {.tp_size = 1, .pp_size = 1};
    struct shard_tensor tensors[3];
    uint64_t sums[FIXTURE_LEAVES + 1], leaf_count, rows = (SHARD_LEAF_BYTES / 2 / FIXTURE_COLS) * FIXTURE_LEAVES / 3;
    memcpy(identity.contract, contract, sizeof contract);
    shard_fixture_set_tensor(&tensors[0], ROLE_EMBEDDING, -1, WEIGHT_BF16, 0, rows + 30, FIXTURE_COLS);
    shard_fixture_set_tensor(&tensors[1], ROLE_QKV, 0, WEIGHT_BF16, 0, rows, FIXTURE_COLS);
    shard_fixture_set_tensor(&tensors[2], ROLE_HEAD, -1, WEIGHT_BF16, 0, rows + 5, FIXTURE_COLS);
    assert_int_equal(shard_layout(tensors, 3, &f->payload_offset, &f->payload_bytes, &f->file_bytes, &f->err), 0);
    f->payload = calloc(1, f->payload_bytes);
    assert_non_null(f->payload);
    leaf_count = div_up(f->payload_bytes, SHARD_LEAF_BYTES);
    assert_int_equal(leaf_count, FIXTURE_LEAVES + 1);
    fixture_fill(f->payload, tensors[2].data_offset + tensors[2].shape.data_bytes);
    if (compressed) {
        fixture_compress(f, &identity, tensors, 3, leaf_count);
        return;
    }
    for (uint64_t i = 0; i < leaf_count; i++) {
        uint64_t left = f->payload_bytes - i * SHARD_LEAF_BYTES;
        sums[i] = checksum_leaf(f->payload + i * SHARD_LEAF_BYTES, left < SHARD_LEAF_BYTES ? left : SHARD_LEAF_BYTES);
    }
    uint8_t *head;
    assert_int_equal(shard_head_serialise(&head, &identity, tensors, 3, sums, NULL, &f->err), 0);
    f->content = malloc(f->file_bytes);
    assert_non_null(f->content);
    memcpy(f->content, head, f->payload_offset);
    memcpy(f->content + f->payload_offset, f->payload, f->payload_bytes);
    free(head);
}

static void fixture_close(struct load_fixture *f)
{
    shard_file_close(f->file);
    close(f->source.fd);
    f->file = NULL;
}

// Opens the file as it now lies there.
static void fixture_open(struct load_fixture *f)
{
    struct store_file *s = &f->source;
    if (shard_file_open(&f->file, f->path, &f->err) || file_open_read(&s->fd, &s->bytes, f->path, &f->err))
        fail_msg("%s", f->err.msg);
    snprintf(s->name, sizeof s->name, "%s", f->path);
    s->remote = s->cached = false;
    s->distrusted = 0;
    s->cancelled = 0;
    s->trickled = 0;
    s->reads_allowed = s->fail_at = -1;
    s->num_reads = s->damaged_times = s->num_kept = 0;
    s->content = f->content;
}

// The content of either kind of file is made once, and is every fixture's.
static void fixture_make(struct load_fixture *f, bool compressed)
{
    static struct load_fixture made[2];
    if (!made[compressed].content)
        fixture_lay_out(&made[compressed], compressed);
    *f = made[compressed];
    strcpy(f->dir, "/tmp/test_loader.XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    fixture_write(f);
    pthread_mutex_init(&f->source.lock, NULL);
    pthread_cond_init(&f->source.turn, NULL);
    fixture_open(f);
}

static void fixture_free(struct load_fixture *f)
{
    fixture_close(f);
    unlink(f->path);
    rmdir(f->dir);
}

// Out of the page cache, or all of it in there. False: this file system does not do that.
static bool fixture_cache(struct load_fixture *f, bool cached)
{
    if (!cached) {
        // Pages that are mapped stay.
        fixture_close(f);
        int fd = open(f->path, O_RDONLY | O_CLOEXEC);
        assert_true(fd >= 0 && fsync(fd) == 0);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        void *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, (off_t)(f->file_bytes / 2 / 4096 * 4096));
        unsigned char is_there = 1; // a look that brings nothing, unlike a read that may not wait
        assert_true(page != MAP_FAILED && mincore(page, 4096, &is_there) == 0);
        munmap(page, 4096);
        close(fd);
        bool gone = !(is_there & 1);
        fixture_open(f);
        return gone;
    }
    uint8_t *all = malloc(f->file_bytes);
    assert_non_null(all);
    assert_int_equal(file_pread_full(f->source.fd, all, f->file_bytes, 0, f->path, &f->err), 0);
    free(all);
    return true;
}

// ---- the backends --------------------------------------------------------------------------------------------------

struct device {
    uint8_t *memory;
    uint64_t bytes;
    bool mapped, ended;
    uint8_t *buffers[LOAD_LANES];
    uint64_t buffer_bytes[LOAD_LANES];
    atomic_int copies, in_copy;
    bool fail_begin;
    int least_lane; // those before it get no buffer
    int fail_copy;  // this one; -1: none
};

static int test_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target, bool host,
                      struct error *err)
{
    if (d->fail_begin)
        return error_set(err, ERR_MEMORY, "no room on the device");
    d->mapped = mapped != NULL;
    *target = (struct load_target){.base = mapped};
    if (mapped)
        return 0;
    d->bytes = bytes;
    d->memory = aligned_alloc(4096, round_up(bytes, 4096));
    assert_non_null(d->memory);
    memset(d->memory, 0xee, bytes);
    *target = (struct load_target){.base = d->memory, .place = host ? d->memory : NULL};
    return 0;
}

static int host_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                      struct error *err)
{
    return test_begin(d, mapped, bytes, target, true, err);
}

static int device_begin(struct device *d, const uint8_t *mapped, uint64_t bytes, struct load_target *target,
                        struct error *err)
{
    assert_null(mapped);
    return test_begin(d, mapped, bytes, target, false, err);
}

static int device_buffer(struct device *d, int lane, uint64_t bytes, uint8_t **buffer, struct error *err)
{
    if (lane < d->least_lane)
        return error_set(err, ERR_MEMORY, "no memory to pin");
    if (lane < 0 || lane >= LOAD_LANES || bytes > LOAD_BUFFER_BYTES ||
        (d->buffers[lane] && bytes != d->buffer_bytes[lane]))
        abort();
    if (!d->buffers[lane])
        d->buffers[lane] = aligned_alloc(4096, bytes);
    d->buffer_bytes[lane] = bytes;
    *buffer = d->buffers[lane];
    return 0;
}

static int device_copy(struct device *d, int lane, uint64_t offset, const uint8_t *from, uint64_t bytes,
                       struct error *err)
{
    int number = atomic_fetch_add(&d->copies, 1);
    if (number == d->fail_copy)
        return error_set(err, ERR_GPU, "the device fell off the bus");
    if (from < d->buffers[lane] || !checked_range((uint64_t)(from - d->buffers[lane]), bytes, d->buffer_bytes[lane]) ||
        !checked_range(offset, bytes, d->bytes))
        abort();
    memcpy(d->memory + offset, from, bytes);
    return 0;
}

static void device_end(struct device *d)
{
    d->ended = true;
    for (int i = 0; i < LOAD_LANES; i++) {
        free(d->buffers[i]);
        d->buffers[i] = NULL;
    }
}

static const struct backend host_backend = {
    .abi = BACKEND_ABI, .name = "host", .reads_map = true, .load_begin = host_begin, .load_end = device_end};
static const struct backend device_backend = {.abi = BACKEND_ABI,
                                              .name = "device",
                                              .load_begin = device_begin,
                                              .load_buffer = device_buffer,
                                              .load_copy = device_copy,
                                              .load_end = device_end};

// A device's state before a load; afterwards.
static struct device fresh_device(void) { return (struct device){.fail_copy = -1}; }
static void free_device(struct device *d)
{
    assert_true(d->ended);
    free(d->memory);
}

static struct loader_options load_options(struct load_fixture *f, struct device *d, bool on_device)
{
    return (struct loader_options){
        .file = f->file, .source = &f->source, .backend = on_device ? &device_backend : &host_backend, .device = d};
}

static inline int count_threads(void)
{
    char line[128];
    int threads = -1;
    FILE *status = fopen("/proc/self/status", "re");
    assert_non_null(status);
    while (fgets(line, sizeof line, status))
        if (sscanf(line, "Threads: %d", &threads) == 1)
            break;
    fclose(status);
    return threads;
}

#endif

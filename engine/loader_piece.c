// One piece of the payload, from the file to where the kernels read it. See loader_internal.h. Its leaves are verified one after the other
// as they arrive, by the thread that reads them, while they are in its core's cache; later reads of the piece, and those of other
// threads, go on meanwhile.
//
// Where bytes land:
//   the kernels use the map     nowhere: they are verified where the page cache has them, for that is what is used
//   the host's memory           at once in their place; those of a compressed file in the lane's memory
//   a device                    in the buffer that it copies from; those of a compressed file in the lane's memory
#include "engine/loader_internal.h"

#include "formats/checked.h"
#include "formats/file_io.h"
#include "kernels/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum {
    SMALL_REQUEST_BYTES = 16 << 10,
    ASK_BYTES = 256 << 10,    // at a time: what any device takes in one request
    POPULATE_BYTES = 2 << 20, // of a map at a time: the largest unit in which a page cache keeps a file
    SAMPLE_STRIDE = 64,       // VERIFY_SAMPLE checks every so manyth leaf
    REMOTE_ATTEMPTS = 3,      // of a range that comes damaged
};

static struct piece piece_at(const struct loader *l, uint64_t index)
{
    const struct shard_file *file = l->options.file;
    uint64_t first = index * l->piece_leaves, count = shard_file_leaf_count(file);
    struct piece piece = {.index = index, .first_leaf = first, .end_leaf = first + l->piece_leaves};
    if (piece.end_leaf > count)
        piece.end_leaf = count;
    piece.offset = first * SHARD_LEAF_BYTES;
    piece.bytes = (piece.end_leaf - 1 - first) * SHARD_LEAF_BYTES + shard_file_leaf_bytes(file, piece.end_leaf - 1);
    struct shard_stored last = shard_file_stored_leaf(file, piece.end_leaf - 1);
    piece.begin = shard_file_stored_leaf(file, first).offset;
    piece.end = last.offset + last.bytes;
    return piece;
}

static bool is_stopped(const struct loader *l) { return atomic_load_explicit(&l->stop, memory_order_relaxed); }

// Adds the time since `since` to a lane's sum.
static void add_time(atomic_llong *sum_ns, int64_t since_ns)
{
    atomic_fetch_add_explicit(sum_ns, clock_now_ns() - since_ns, memory_order_relaxed);
}

static void count_bytes(struct lane *lane, uint64_t bytes)
{
    atomic_fetch_add_explicit(&lane->read_bytes, (long long)bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&lane->loader->moved, (long long)bytes, memory_order_relaxed);
}

// Stored bytes of a compressed piece, the zeros behind the last one, and both ends rounded.
static uint64_t stored_piece_bytes(const struct loader *l)
{
    return l->piece_leaves * SHARD_LEAF_BYTES + SHARD_FILE_ALIGN + 2 * DIRECT_ALIGN;
}

// ---- reading -------------------------------------------------------------------------------------------------------

// By the store: behind a network, or what a network brought before.
static int read_store(struct lane *lane, void *to, uint64_t bytes, uint64_t stored_offset, struct error *err)
{
    const struct loader *l = lane->loader;
    int rc = store_file_read(l->options.source, to, bytes, l->payload_offset + stored_offset, err);
    if (!rc)
        count_bytes(lane, bytes);
    return rc;
}

// Where the file system's read-ahead is off, a read goes page by page, each with a wait of its own. Then the kernel is told beforehand what
// is read next and behind that. Not otherwise: what it reads by itself it keeps in larger units, which cost less to make and to map.
static void ask_ahead(struct lane *lane, uint64_t stored_offset, uint64_t bytes)
{
    const struct loader *l = lane->loader;
    uint64_t end = stored_offset + bytes + READ_BYTES;
    end = end < lane->piece_end ? end : lane->piece_end;
    if (lane->asked < stored_offset || lane->asked > end)
        lane->asked = stored_offset;
    for (; lane->asked < end; lane->asked += ASK_BYTES) {
        uint64_t left = end - lane->asked;
        posix_fadvise(l->fd, (off_t)(l->payload_offset + lane->asked), (off_t)(left < ASK_BYTES ? left : ASK_BYTES),
                      POSIX_FADV_WILLNEED);
    }
}

static long waits_of_this_thread(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

static int read_cached(struct lane *lane, uint8_t *to, uint64_t bytes, uint64_t stored_offset, struct error *err)
{
    const struct loader *l = lane->loader;
    if (lane->goes_by_pages)
        ask_ahead(lane, stored_offset, bytes);
    long before = waits_of_this_thread();
    int rc =
        file_pread_full(l->fd, to, bytes, l->payload_offset + stored_offset, store_file_name(l->options.source), err);
    lane->goes_by_pages |= waits_of_this_thread() - before > (long)(bytes / SMALL_REQUEST_BYTES);
    return rc;
}

// Past the page cache where that is the path. What it does not bring (it may be refused at any place, and ends at the end of the file)
// comes through the page cache or is an error there.
static int read_local(struct lane *lane, uint8_t *to, uint64_t bytes, uint64_t stored_offset, struct error *err)
{
    const struct loader *l = lane->loader;
    uint64_t got = 0;
    if (l->direct_fd >= 0) {
        ssize_t direct = pread(l->direct_fd, to, bytes, (off_t)(l->payload_offset + stored_offset));
        got = direct > 0 ? (uint64_t)direct : 0;
    }
    int rc = got < bytes ? read_cached(lane, to + got, bytes - got, stored_offset + got, err) : 0;
    if (!rc)
        count_bytes(lane, bytes);
    return rc;
}

static void start_reads(struct lane *lane, const struct landing *landing)
{
    const struct loader *l = lane->loader;
    unsigned index = landing->first_read;
    for (uint64_t at = landing->begin; lane->ring && at < landing->end; at += READ_BYTES) {
        uint64_t left = landing->end - at;
        loader_ring_read(lane->ring, index++, l->direct_fd, landing->bytes + (at - landing->begin),
                         (uint32_t)(left < READ_BYTES ? left : READ_BYTES), l->payload_offset + at);
    }
}

// A ring that fails is no reason to: the lane goes on by pread.
static void drop_ring(struct lane *lane)
{
    loader_ring_close(lane->ring);
    lane->ring = NULL;
}

// The next read of a piece.
static int land_more(struct lane *lane, struct landing *landing, struct error *err)
{
    uint64_t done = landing->landed - landing->begin, left = landing->end - landing->landed;
    bool remote = lane->loader->fd < 0, whole = false;
    uint64_t bytes = left < READ_BYTES || remote ? left : READ_BYTES;
    uint8_t *to = landing->bytes + done;
    int rc = 0;
    if (lane->ring && loader_ring_wait(lane->ring, landing->first_read + (unsigned)(done / READ_BYTES), &whole) != 0) {
        whole = false;
        drop_ring(lane);
    }
    if (whole)
        count_bytes(lane, bytes);
    else
        rc = remote ? read_store(lane, to, bytes, landing->landed, err)
                    : read_local(lane, to, bytes, landing->landed, err);
    if (!rc)
        landing->landed += bytes;
    return rc;
}

static int land_until(struct lane *lane, struct landing *landing, uint64_t end, struct error *err)
{
    int64_t since_ns = clock_now_ns();
    int rc = 0;
    while (landing->landed < end && !rc)
        rc = land_more(lane, landing, err);
    add_time(&lane->read_ns, since_ns);
    return rc;
}

// ---- verifying -----------------------------------------------------------------------------------------------------

static bool is_checked(const struct loader *l, uint64_t leaf)
{
    return l->compressed || l->options.verify == VERIFY_FULL ||
           (l->options.verify == VERIFY_SAMPLE && leaf % SAMPLE_STRIDE == 0);
}

static int check_leaf(struct lane *lane, uint64_t leaf, const uint8_t *stored, struct error *err)
{
    const struct loader *l = lane->loader;
    int64_t since_ns = clock_now_ns();
    int rc = is_checked(l, leaf) ? shard_file_verify_leaf(l->options.file, leaf, stored, err) : 0;
    add_time(&lane->verify_ns, since_ns);
    return rc;
}

// Bytes that were damaged on their way, or in the cache of what was fetched before, are asked for again.
static int check_landed_leaf(struct lane *lane, uint64_t leaf, uint8_t *stored, struct error *err)
{
    struct loader *l = lane->loader;
    struct shard_stored range = shard_file_stored_leaf(l->options.file, leaf);
    int rc = check_leaf(lane, leaf, stored, err);
    for (int attempt = 1; rc == ERR_CORRUPT && attempt < REMOTE_ATTEMPTS && !is_stopped(l); attempt++) {
        if (l->fd >= 0) {
            if (!store_file_distrust(l->options.source))
                break;
            atomic_store_explicit(&l->refetches, true, memory_order_relaxed);
        }
        atomic_fetch_add_explicit(&lane->fetched_again, 1, memory_order_relaxed);
        if ((rc = read_store(lane, stored, range.bytes, range.offset, err)) == 0)
            rc = check_leaf(lane, leaf, stored, err);
    }
    return rc;
}

// A mapped file cannot be mended under those who read it.
static int explain_mapped(const struct loader *l, int rc, struct error *err)
{
    if (rc != ERR_CORRUPT || !store_file_distrust(l->options.source))
        return rc;
    return error_set(err, ERR_CORRUPT, "%s: this copy in the cache was damaged and has been removed; start again",
                     store_file_name(l->options.source));
}

// ---- a piece of a map ----------------------------------------------------------------------------------------------

// Reads what is not in the page cache, and fills page tables in one go instead of a fault for every few pages. Kernels that cannot fault as
// before.
static int populate(struct lane *lane, uint64_t offset, uint64_t bytes, struct error *err)
{
    const struct loader *l = lane->loader;
    if (lane->goes_by_pages)
        ask_ahead(lane, offset, bytes);
    long before = waits_of_this_thread();
    int64_t since_ns = clock_now_ns();
    bool lost = madvise((void *)(uintptr_t)(l->map + offset), bytes, MADV_POPULATE_READ) != 0 && errno == EFAULT;
    add_time(&lane->read_ns, since_ns);
    lane->goes_by_pages |= waits_of_this_thread() - before > (long)(bytes / SMALL_REQUEST_BYTES);
    if (lost)
        return loader_guard_error(store_file_name(l->options.source), err);
    count_bytes(lane, bytes);
    return 0;
}

struct mapped_leaf {
    struct lane *lane;
    uint64_t leaf;
    struct error *err;
    int rc;
};

static void check_mapped_leaf(void *arg)
{
    struct mapped_leaf *job = arg;
    job->rc = check_leaf(job->lane, job->leaf, job->lane->loader->map + job->leaf * SHARD_LEAF_BYTES, job->err);
}

// What the kernels will see is what is verified.
static int bring_mapped(struct lane *lane, const struct piece *piece, struct error *err)
{
    const struct loader *l = lane->loader;
    int rc = 0;
    for (uint64_t leaf = piece->first_leaf; leaf < piece->end_leaf && !rc && !is_stopped(l); leaf++) {
        uint64_t done = leaf * SHARD_LEAF_BYTES - piece->offset, left = piece->bytes - done;
        if (done % POPULATE_BYTES == 0)
            rc = populate(lane, piece->offset + done, left < POPULATE_BYTES ? left : POPULATE_BYTES, err);
        struct mapped_leaf job = {lane, leaf, err, 0};
        if (!rc)
            rc = loader_guard_try(check_mapped_leaf, &job)
                     ? job.rc
                     : loader_guard_error(store_file_name(l->options.source), err);
    }
    return explain_mapped(l, rc, err);
}

// ---- a piece that is copied ----------------------------------------------------------------------------------------

static int decode(struct lane *lane, uint64_t leaf, const uint8_t *stored, uint8_t *out, struct error *err)
{
    int64_t since_ns = clock_now_ns();
    int rc = shard_file_decode_leaf(lane->loader->options.file, leaf, stored, out, lane->scratch, err);
    add_time(&lane->decode_ns, since_ns);
    return rc;
}

static int bring_leaves(struct lane *lane, struct visit *visit, struct error *err)
{
    const struct loader *l = lane->loader;
    const struct piece *piece = &visit->piece;
    struct landing *landing = &visit->landing;
    int rc = 0;
    for (uint64_t leaf = piece->first_leaf; leaf < piece->end_leaf && !rc && !is_stopped(l); leaf++) {
        struct shard_stored range = shard_file_stored_leaf(l->options.file, leaf);
        uint8_t *stored = landing->bytes + (range.offset - landing->begin);
        if ((rc = land_until(lane, landing, range.offset + range.bytes, err)) == 0 &&
            (rc = check_landed_leaf(lane, leaf, stored, err)) == 0 && l->compressed)
            rc = decode(lane, leaf, stored, visit->payload + (leaf - piece->first_leaf) * SHARD_LEAF_BYTES, err);
    }
    return rc;
}

static int copy(struct lane *lane, const struct piece *piece, const uint8_t *payload, struct error *err)
{
    const struct loader_options *o = &lane->loader->options;
    int64_t since_ns = clock_now_ns();
    int rc = o->backend->load_copy(o->device, lane->index, piece->offset, payload, piece->bytes, err);
    add_time(&lane->copy_ns, since_ns);
    return rc;
}

static int bring_copied(struct lane *lane, struct visit *visit, struct error *err)
{
    const struct loader *l = lane->loader;
    const struct piece *piece = &visit->piece;
    const struct landing *landing = &visit->landing;
    int rc = bring_leaves(lane, visit, err);
    if (rc || is_stopped(l))
        return rc;
    if (!l->target.place && (rc = copy(lane, piece, visit->payload, err)))
        return rc;
    if (l->fd < 0 && l->options.verify == VERIFY_FULL)
        store_file_keep(l->options.source, landing->bytes, piece->end - piece->begin, l->payload_offset + piece->begin);
    return 0;
}

// ---- visits --------------------------------------------------------------------------------------------------------

void lane_visit(struct lane *lane, int slot, uint64_t index)
{
    const struct loader *l = lane->loader;
    struct visit *visit = &lane->visits[slot];
    struct piece piece = visit->piece = piece_at(l, index);
    if (l->map)
        return;
    uint64_t align = l->direct_fd >= 0 ? DIRECT_ALIGN : 1;
    visit->payload = l->target.place ? l->target.place + piece.offset
                                     : lane->buffer + (uint64_t)slot * l->piece_leaves * SHARD_LEAF_BYTES;
    visit->landing = (struct landing){
        .bytes = l->compressed ? lane->stored + (uint64_t)slot * stored_piece_bytes(l) : visit->payload,
        .begin = piece.begin / align * align,
        .end = round_up(piece.end, align),
        .first_read = (unsigned)slot * (RING_READS / LANE_SLOTS),
    };
    visit->landing.landed = visit->landing.begin;
    start_reads(lane, &visit->landing);
}

void lane_await(struct lane *lane, int slot)
{
    bool whole;
    int64_t since_ns = clock_now_ns();
    if (lane->ring && loader_ring_wait(lane->ring, lane->visits[slot].landing.first_read, &whole) != 0)
        drop_ring(lane);
    add_time(&lane->read_ns, since_ns);
}

bool lane_may_read_ahead(const struct lane *lane)
{
    return lane->ring && loader_ring_under_way(lane->ring) < READS_AHEAD;
}

int lane_bring(struct lane *lane, int slot, struct error *err)
{
    struct visit *visit = &lane->visits[slot];
    lane->asked = visit->piece.begin;
    lane->piece_end = visit->piece.end;
    return lane->loader->map ? bring_mapped(lane, &visit->piece, err) : bring_copied(lane, visit, err);
}

// ---- what a lane needs ---------------------------------------------------------------------------------------------

static int alloc_stored(struct lane *lane, struct error *err)
{
    const struct loader *l = lane->loader;
    uint64_t bytes = l->compressed ? (uint64_t)loader_slots(l) * stored_piece_bytes(l) : 0;
    if (bytes == 0)
        return 0;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return error_set(err, ERR_MEMORY, "%s: no memory to read it into", store_file_name(l->options.source));
    lane->stored = memory;
    lane->stored_capacity = bytes;
    return 0;
}

int lane_open(struct lane *lane, struct error *err)
{
    const struct loader *l = lane->loader;
    const struct loader_options *o = &l->options;
    int rc = alloc_stored(lane, err);
    if (rc)
        return rc;
    if (!l->map && !l->target.place &&
        (rc = o->backend->load_buffer(o->device, lane->index,
                                      (uint64_t)loader_slots(l) * l->piece_leaves * SHARD_LEAF_BYTES, &lane->buffer,
                                      err)))
        return rc;
    if (l->compressed && !(lane->scratch = leaf_scratch_new()))
        return error_set(err, ERR_MEMORY, "%s: no memory to decode it", store_file_name(o->source));
    // One ring more than works here is no reason to fail: the lane reads by pread.
    if (l->path == LOAD_URING && loader_ring_open(&lane->ring, &l->stop) != 0)
        lane->ring = NULL;
    return 0;
}

void lane_close(struct lane *lane)
{
    if (lane->ring)
        loader_ring_drain(lane->ring); // nothing may still be written where others will write
    loader_ring_close(lane->ring);
    leaf_scratch_free(lane->scratch);
    if (lane->stored)
        munmap(lane->stored, lane->stored_capacity);
}

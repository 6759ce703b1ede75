// The loader's threads, the order in which they take pieces, and those who wait for them. See loader.h.
#include "engine/loader_internal.h"

#include "formats/checked.h"
#include "kernels/clock.h"
#include "kernels/thread_pool.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    LOOK_MS = 50, // between two looks of one who waits
    // Of a remote source. Beyond what the store takes by itself until it gives a range up, with its waits for connections and answers and its
    // pauses: whoever is still silent then hangs.
    MOST_SILENCE_MS = 300000,
    LEAST_READERS = 4,
    MOST_READERS = 8,
    MAP_READERS = 16, // each reads or verifies: enough of them read while others verify what came at once
};

// ---- pieces --------------------------------------------------------------------------------------------------------

// Takes the next piece that nobody has. False: there is none, or no reason to go on.
static bool take_piece(struct loader *l, uint64_t *piece)
{
    pthread_mutex_lock(&l->lock);
    bool found = l->taken < l->piece_count && !atomic_load(&l->stop);
    if (found) {
        while (l->state[l->next] != PIECE_WAITS)
            l->next = (l->next + 1) % l->piece_count;
        *piece = l->next;
        l->state[l->next] = PIECE_IS_TAKEN;
        l->taken++;
    }
    pthread_mutex_unlock(&l->lock);
    return found;
}

static void piece_is_there(struct loader *l, uint64_t piece)
{
    uint64_t begin = piece * l->piece_leaves, count = shard_file_leaf_count(l->options.file);
    for (uint64_t leaf = begin; l->options.loaded_bytes && leaf < begin + l->piece_leaves && leaf < count; leaf++)
        atomic_fetch_add_explicit(l->options.loaded_bytes, (long long)shard_file_leaf_bytes(l->options.file, leaf),
                                  memory_order_relaxed);
    pthread_mutex_lock(&l->lock);
    atomic_store_explicit(&l->state[piece], PIECE_IS_THERE, memory_order_release);
    if (atomic_fetch_add(&l->there, 1) + 1 == l->piece_count)
        atomic_store(&l->ended_ns, clock_now_ns());
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
}

// The threads end soon. Nothing is read after that.
static void stop(struct loader *l)
{
    if (!atomic_exchange(&l->stop, true))
        store_file_cancel(l->options.source);
}

// The first error is the load's.
static void fail(struct loader *l, const struct error *error)
{
    pthread_mutex_lock(&l->lock);
    if (!atomic_load(&l->failed))
        l->error = *error;
    atomic_store(&l->failed, true);
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    stop(l);
}

// Lanes end, or never began. What kept one from beginning is the load's failure only when nobody else has brought its pieces.
static void lanes_end(struct loader *l, int count)
{
    pthread_mutex_lock(&l->lock);
    bool left_over = atomic_load(&l->running) == count && l->taken < l->piece_count && !atomic_load(&l->stop);
    if (left_over && l->unable.code && !atomic_load(&l->failed)) {
        l->error = l->unable;
        atomic_store(&l->failed, true);
    }
    atomic_fetch_sub(&l->running, count);
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
}

static void lane_is_unable(struct loader *l, const struct error *why)
{
    pthread_mutex_lock(&l->lock);
    if (!l->unable.code)
        l->unable = *why;
    pthread_mutex_unlock(&l->lock);
}

// Turns to pieces in the slots behind `first`: one at least, and with a ring as many as keep the disk busy.
static void visit_ahead(struct lane *lane, unsigned first, unsigned *end)
{
    unsigned slots = (unsigned)loader_slots(lane->loader);
    uint64_t piece;
    while (*end - first < slots && (*end == first || lane_may_read_ahead(lane)) && take_piece(lane->loader, &piece))
        lane_visit(lane, (int)((*end)++ % slots), piece);
}

// One piece after the other. With a ring the reads of the next begin before those that have landed are verified: a disk, above all one that
// tells of all that it has been given at once, shall never be without any.
static int bring_pieces(struct lane *lane, struct error *err)
{
    struct loader *l = lane->loader;
    unsigned slots = (unsigned)loader_slots(l), first = 0, end = 0;
    int rc = 0;
    while (!rc) {
        visit_ahead(lane, first, &end);
        if (first == end)
            break;
        int slot = (int)(first % slots);
        lane_await(lane, slot);
        visit_ahead(lane, first, &end);
        if ((rc = lane_bring(lane, slot, err)) == 0 && !atomic_load(&l->stop))
            piece_is_there(l, lane->visits[slot].piece.index);
        first++;
    }
    return rc;
}

static void *lane_main(void *arg)
{
    struct lane *lane = arg;
    struct loader *l = lane->loader;
    struct error err;
    struct timespec cpu;
    if (lane_open(lane, &err))
        lane_is_unable(l, &err);
    else if (bring_pieces(lane, &err))
        fail(l, &err);
    lane_close(lane);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
    atomic_store(&lane->cpu_ns, (long long)cpu.tv_sec * 1000000000 + cpu.tv_nsec);
    lanes_end(l, 1);
    return NULL;
}

// ---- starting ------------------------------------------------------------------------------------------------------

// Threads that read wait more than they compute; those of a ring do not, nor those that find the file in the page cache. A request over a
// network waits longest. Those that copy are few, as each may hold a buffer of page-locked memory.
static int choose_threads(const struct loader *l)
{
    int cores = thread_pool_default_threads(), threads = cores;
    if (l->options.threads > 0)
        return l->options.threads < LOAD_LANES ? l->options.threads : LOAD_LANES;
    if (l->fd < 0)
        return LOAD_LANES;
    if (l->waits && l->map)
        return MAP_READERS;
    if (l->waits && l->path != LOAD_URING)
        threads = 2 * cores > LEAST_READERS ? 2 * cores : LEAST_READERS;
    return threads < MOST_READERS ? threads : MOST_READERS;
}

// What the kernel copies is verified, and copied to a device, while it is in the core's cache: a leaf. Else as much as keeps reads in flight.
static uint64_t most_leaves(const struct loader *l)
{
    if (l->path == LOAD_READ && l->fd >= 0)
        return 1;
    return PIECE_LEAVES / (uint64_t)loader_slots(l);
}

// Small files are cut into more pieces than there are threads, so that all have something to do.
static int cut_pieces(struct loader *l, int threads, struct error *err)
{
    uint64_t leaves = shard_file_leaf_count(l->options.file), most = most_leaves(l);
    l->piece_leaves = leaves / (4 * (uint64_t)threads);
    l->piece_leaves = l->piece_leaves < 1 ? 1 : l->piece_leaves > most ? most : l->piece_leaves;
    if (l->map && l->piece_leaves > 1)
        l->piece_leaves &= ~1ull; // what is populated at a time
    l->piece_count = div_up(leaves, l->piece_leaves);
    l->state = calloc(l->piece_count + 1, sizeof *l->state);
    l->lanes = calloc((size_t)threads, sizeof *l->lanes);
    if (!l->state || !l->lanes)
        return error_set(err, ERR_MEMORY, "%s: no memory to load it", store_file_name(l->options.source));
    return 0;
}

// As many as can be had; one is enough. All of them count as running beforehand: the first must not take itself for the last.
static int start_threads(struct loader *l, int threads, struct error *err)
{
    // Signals are for the thread that started the program; but where SIGBUS is blocked, the guard is not asked.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    atomic_store(&l->running, threads);
    while (l->threads < threads && !failed) {
        struct lane *lane = &l->lanes[l->threads];
        lane->loader = l;
        lane->index = l->threads;
        failed = pthread_create(&lane->thread, NULL, lane_main, lane);
        l->threads += !failed;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (l->threads < threads)
        lanes_end(l, threads - l->threads);
    if (l->threads == 0 && threads > 0)
        return error_set(err, ERR_MEMORY, "%s: cannot start a thread to load it: %s",
                         store_file_name(l->options.source), strerror(failed));
    return 0;
}

static void init_waiting(struct loader *l)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&l->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&l->lock, NULL);
}

int loader_start(struct loader **out, const struct loader_options *options, const uint8_t **base, struct error *err)
{
    int rc;
    struct loader *l = calloc(1, sizeof *l);
    if (!l)
        return error_set(err, ERR_MEMORY, "%s: no memory to load it", store_file_name(options->source));
    l->options = *options;
    l->started_ns = l->seen_ns = clock_now_ns();
    l->fd = store_file_fd(options->source);
    l->direct_fd = -1;
    l->compressed = shard_file_is_compressed(options->file);
    l->payload_offset = shard_file_payload_offset(options->file);
    init_waiting(l);
    bool may_map = options->backend->reads_map && !l->compressed && shard_file_payload_bytes(options->file) > 0;
    loader_choose_path(l, may_map);
    int threads = choose_threads(l);
    if ((rc = cut_pieces(l, threads, err)))
        goto fail;
    l->begun = true; // a begin that failed has an end as well
    if ((rc = options->backend->load_begin(options->device, l->map, shard_file_payload_bytes(options->file), &l->target,
                                           err)))
        goto fail;
    if ((uint64_t)threads > l->piece_count)
        threads = (int)l->piece_count;
    if ((rc = start_threads(l, threads, err)))
        goto fail;
    *base = l->target.base;
    *out = l;
    return 0;
fail:
    loader_free(l);
    return rc;
}

// ---- waiting -------------------------------------------------------------------------------------------------------

static bool are_there(const struct loader *l, uint64_t first, uint64_t end)
{
    while (first < end && atomic_load_explicit(&l->state[first], memory_order_acquire) == PIECE_IS_THERE)
        first++;
    return first == end;
}

static int failure(const struct loader *l, struct error *err)
{
    if (!atomic_load(&l->failed))
        return 0;
    if (err)
        *err = l->error;
    return l->error.code;
}

// Until something changes, or for a while. Holds the lock.
static void wait_a_while(struct loader *l)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += LOOK_MS * 1000000;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&l->changed, &l->lock, &end);
}

// Who waits says so while bytes arrive. A disk that is silent hangs; a source behind a network may be silent for a while, and ends its attempts
// by itself.
static void tell_progress(struct loader *l)
{
    const struct loader_options *o = &l->options;
    bool is_remote = l->fd < 0 || atomic_load_explicit(&l->refetches, memory_order_relaxed);
    int64_t now_ns = clock_now_ns(), silence_ms = o->silence_ms > 0 ? o->silence_ms : MOST_SILENCE_MS;
    long long bytes = atomic_load_explicit(&l->moved, memory_order_relaxed);
    if (is_remote) // also what a read under way has brought so far
        bytes += (long long)store_file_fetched_bytes(o->source);
    bool moves = bytes != l->seen_bytes;
    if (moves)
        l->seen_ns = now_ns;
    l->seen_bytes = bytes;
    if (o->on_progress && (moves || (is_remote && now_ns - l->seen_ns < silence_ms * 1000000)))
        o->on_progress(o->arg);
}

static int wait_for(struct loader *l, uint64_t first, uint64_t end, struct error *err)
{
    pthread_mutex_lock(&l->lock);
    while (!atomic_load(&l->failed) && !are_there(l, first, end) && atomic_load(&l->running) > 0) {
        wait_a_while(l);
        pthread_mutex_unlock(&l->lock);
        tell_progress(l);
        pthread_mutex_lock(&l->lock);
    }
    int rc = failure(l, err);
    if (!rc && !are_there(l, first, end))
        rc = error_set(err, ERR_OTHER, "%s: its load was ended before all of it was there",
                       store_file_name(l->options.source));
    pthread_mutex_unlock(&l->lock);
    return rc;
}

int loader_need(struct loader *l, uint64_t offset, uint64_t bytes, struct error *err)
{
    uint64_t piece_bytes = l->piece_leaves * SHARD_LEAF_BYTES;
    uint64_t first = offset / piece_bytes, end = div_up(offset + bytes, piece_bytes);
    end = end < l->piece_count ? end : l->piece_count;
    first = first < end ? first : end;
    if (!atomic_load_explicit(&l->failed, memory_order_acquire) && (bytes == 0 || are_there(l, first, end)))
        return 0;
    pthread_mutex_lock(&l->lock);
    uint64_t waiting = first;
    while (waiting < end && l->state[waiting] != PIECE_WAITS)
        waiting++;
    if (waiting < end)
        l->next = waiting;
    pthread_mutex_unlock(&l->lock);
    return wait_for(l, first, end, err);
}

// The threads end by themselves when nothing is left for them, or when they are to stop.
static void join(struct loader *l)
{
    for (int i = 0; i < l->threads && !l->joined; i++)
        pthread_join(l->lanes[i].thread, NULL);
    if (l->map && !l->joined) // such a map's pages would be the first to be given up
        madvise((void *)(uintptr_t)l->map, shard_file_payload_bytes(l->options.file), MADV_NORMAL);
    l->joined = true;
    if (l->begun)
        l->options.backend->load_end(l->options.device);
    l->begun = false;
}

int loader_finish(struct loader *l, struct error *err)
{
    int rc = wait_for(l, 0, l->piece_count, err);
    join(l);
    return rc;
}

bool loader_is_done(const struct loader *l) { return atomic_load(&l->running) == 0; }

void loader_figures(const struct loader *l, struct load_figures *out)
{
    int64_t ended_ns = atomic_load(&l->ended_ns);
    *out = (struct load_figures){.path = l->path, .threads = l->threads};
    memcpy(out->why, l->why, sizeof out->why);
    for (int i = 0; i < l->threads; i++) {
        const struct lane *lane = &l->lanes[i];
        out->read_bytes += atomic_load(&lane->read_bytes);
        out->fetched_again += atomic_load(&lane->fetched_again);
        out->read_s += (double)atomic_load(&lane->read_ns) / 1e9;
        out->verify_s += (double)atomic_load(&lane->verify_ns) / 1e9;
        out->decode_s += (double)atomic_load(&lane->decode_ns) / 1e9;
        out->copy_s += (double)atomic_load(&lane->copy_ns) / 1e9;
        out->cpu_s += (double)atomic_load(&lane->cpu_ns) / 1e9;
    }
    out->wall_s = (double)((ended_ns ? ended_ns : clock_now_ns()) - l->started_ns) / 1e9;
}

bool loader_is_mapped(const struct loader *l) { return l->map != NULL; }

void loader_stop(struct loader *l)
{
    if (!l)
        return;
    stop(l);
    join(l);
}

void loader_free(struct loader *l)
{
    if (!l)
        return;
    loader_stop(l);
    loader_guard_free(l->guard);
    if (l->map)
        munmap((void *)(uintptr_t)l->map, shard_file_payload_bytes(l->options.file));
    if (l->direct_fd >= 0)
        close(l->direct_fd);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l->lanes);
    free(l->state);
    free(l);
}

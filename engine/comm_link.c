// The transport over a link: its operations, the watching thread, the beginning and the end. See comm_link.h.
#include "engine/comm_link_internal.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum {
    TICK_MS = 20,        // of the watching thread
    CHANNEL_TICK_MS = 5, // where messages go through it beside a rank's work
    LEAST_SILENCE_MS = 1000,
    MAX_BEAT_MS = 250,
    SILENT_BEATS = 4, // then what a rank last said it waits for counts no more
    CLOSE_MS = 1000,  // for what the others are to know yet
    LINGER_MS = 300,  // and for them to have read it
};

static void clear_alarm(int event_fd)
{
    uint64_t count;
    if (read(event_fd, &count, sizeof count) < 0)
        return; // there was none
}

// ---- the transport -----------------------------------------------------------------------------------------------------

static void post(struct comm *comm, const struct comm_move *move)
{
    struct link *link = comm->link;
    const struct call *call = &comm->slot->calls[comm->group][comm->token % 2];
    const uint8_t *own = comm_buffer(comm, comm->rank, comm->token);
    uint8_t *packed = link->packed[comm->group][comm->token % 2];
    bool left = false;
    pthread_mutex_lock(&link->lock);
    struct frame_head head = link_make_head(link, FRAME_PHASE);
    head.group = (uint8_t)comm->group;
    head.token = comm->token;
    head.collective = (uint8_t)call->collective;
    head.detail = call->detail;
    head.amount = call->amount;
    head.op = (int32_t)call->op;
    head.layer = call->layer;
    frame_set_move(&head, move);
    if (move->pattern == MOVE_FROM_OWNERS)
        frame_pack(packed, own, move, comm->size, comm->rank);
    for (int rank = 0; rank < comm->size; rank++) {
        struct peer *peer = &link->peers[comm->first + rank];
        if (rank == comm->rank || peer->gone || peer->queued == LINK_MAX_QUEUE)
            continue;
        head.payload_bytes = (uint32_t)frame_move_bytes(move, comm->size, comm->rank, rank, link->region->buffer_bytes);
        const uint8_t *payload = own;
        if (move->pattern == MOVE_FROM_OWNERS)
            payload = packed;
        if (move->pattern == MOVE_TO_OWNERS) {
            payload = packed;
            packed += frame_pack(packed, own, move, comm->size, rank);
        }
        peer->queue[peer->queued++] = (struct out_frame){head, payload};
        comm->moved_bytes += head.payload_bytes;
        left |= !link_flush_to(link, comm->first + rank);
    }
    pthread_mutex_unlock(&link->lock);
    if (left)
        link_raise_alarm(link->wake_thread);
}

static void channel_moved(struct comm *comm, int other)
{
    struct link *link = comm->link;
    pthread_mutex_lock(&link->lock);
    bool left = !link_flush_to(link, other);
    pthread_mutex_unlock(&link->lock);
    if (left)
        link_raise_alarm(link->wake_thread);
}

static void look(struct comm *comm)
{
    struct link *link = comm->link;
    pthread_mutex_lock(&link->lock);
    link_read_all(link);
    link_flush_all(link, NULL);
    pthread_mutex_unlock(&link->lock);
}

// Waiting for a rank that has said goodbye is an error at once.
static void check_left(struct link *link, int awaited)
{
    if (awaited < 0 || !link->peers[awaited].left || comm_region_aborted(link->region))
        return;
    char place[COMM_PLACE_BYTES];
    struct comm_position at = comm_region_position(link->region, awaited);
    comm_place(place, at.op, at.layer);
    struct error found;
    error_set(&found, ERR_RANK, "rank %d has ended while rank %d waited for it; rank %d was last seen in %s", awaited,
              link->rank, awaited, place);
    link_end_all(link, awaited, &found);
}

// Who may still say something. The end of a connection would be input for ever.
static void find_readers(const struct link *link, bool readers[COMM_MAX_RANKS])
{
    for (int rank = 0; rank < link->world_size; rank++)
        readers[rank] = rank != link->rank && !link->peers[rank].gone;
}

static void sleep_for_input(struct comm *comm, uint32_t bell, int64_t limit_ns)
{
    struct link *link = comm->link;
    bool readers[COMM_MAX_RANKS], writers[COMM_MAX_RANKS];
    pthread_mutex_lock(&link->lock);
    link_read_all(link);
    link_flush_all(link, writers);
    find_readers(link, readers);
    bool news = atomic_load(&comm->slot->bell) != bell;
    if (!news)
        check_left(link, atomic_load(&comm->slot->waits_for));
    news |= comm_region_aborted(link->region);
    link->main_waits = !news;
    pthread_mutex_unlock(&link->lock);
    if (news)
        return;
    link->carrier->wait(link->data, readers, writers, link->wake_main, limit_ns);
    pthread_mutex_lock(&link->lock);
    link->main_waits = false;
    clear_alarm(link->wake_main);
    link_read_all(link);
    link_flush_all(link, NULL);
    pthread_mutex_unlock(&link->lock);
}

// ---- the watching thread -----------------------------------------------------------------------------------------------

static void watch_silence(struct link *link, int64_t passed_ns)
{
    for (int rank = 0; rank < link->world_size; rank++) {
        struct peer *peer = &link->peers[rank];
        if (rank == link->rank || peer->gone || peer->left || peer->refused)
            continue;
        peer->silent_ns += passed_ns;
        if (peer->silent_ns > SILENT_BEATS * link->beat_ns)
            atomic_store(&link_slot_of(link, rank)->silent, 1);
        int64_t start_ns = (int64_t)link->region->start_timeout_ms * 1000000;
        if (peer->silent_ns < link->silence_ns || (!peer->greeted && peer->silent_ns < start_ns))
            continue;
        char how[128];
        snprintf(how, sizeof how, "rank %d has heard nothing from it for %.1f s", link->rank,
                 (double)peer->silent_ns / 1e9);
        link_give_up(link, rank, how);
    }
}

// Whether this rank is where no frame has yet told.
static bool is_elsewhere(struct link *link)
{
    struct frame_head head = link_make_head(link, FRAME_BEAT);
    bool moved = head.position != link->told_position || head.waits_for != link->told_waits_for;
    link->told_position = head.position;
    link->told_waits_for = head.waits_for;
    return moved;
}

static void *watch(void *arg)
{
    struct link *link = arg;
    const bool readers[COMM_MAX_RANKS] = {false};
    bool writers[COMM_MAX_RANKS] = {false};
    int64_t looked_ns = clock_now_ns(), beaten_ns = looked_ns;
    while (!atomic_load(&link->stop)) {
        link->carrier->wait(link->data, readers, writers, link->wake_thread, link->tick_ns);
        clear_alarm(link->wake_thread);
        pthread_mutex_lock(&link->lock);
        int64_t now_ns = clock_now_ns(), passed_ns = now_ns - looked_ns;
        looked_ns = now_ns;
        if (!link->main_waits)
            link_read_all(link);
        // Where it is when it moves no more is what the others are to know.
        if (now_ns - beaten_ns >= link->beat_ns || is_elsewhere(link)) {
            for (int rank = 0; rank < link->world_size; rank++)
                link->peers[rank].beat_due = true;
            beaten_ns = now_ns;
        }
        // Time in which this process itself was stopped does not count.
        watch_silence(link, passed_ns < 2 * link->tick_ns ? passed_ns : 2 * link->tick_ns);
        link_flush_all(link, writers);
        if (link->main_waits && comm_region_aborted(link->region)) // by another process
            link_raise_alarm(link->wake_main);
        pthread_mutex_unlock(&link->lock);
    }
    return NULL;
}

static int start_watch(struct link *link, struct error *err)
{
    sigset_t all, before; // signals are for the rank's own threads
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&link->thread, NULL, watch, link);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return error_set(err, ERR_MEMORY, "cannot start a thread for the connections of rank %d: %s", link->rank,
                         strerror(failed));
    link->watched = true;
    return 0;
}

// ---- opening and closing -----------------------------------------------------------------------------------------------

static bool all_told(const struct link *link)
{
    for (int rank = 0; rank < link->world_size; rank++) {
        const struct peer *peer = &link->peers[rank];
        if (rank != link->rank && !peer->gone && (peer->sending || !peer->bye_told))
            return false;
    }
    return true;
}

static bool all_left(const struct link *link)
{
    for (int rank = 0; rank < link->world_size; rank++)
        if (rank != link->rank && !link->peers[rank].gone && !link->peers[rank].left)
            return false;
    return true;
}

// The others learn how this rank ends, as far as they listen. What they still send is read: else the system would take back
// from them what they have not read.
static void say_goodbye(struct link *link)
{
    bool readers[COMM_MAX_RANKS], writers[COMM_MAX_RANKS];
    link->closing = true;
    for (int rank = 0; rank < link->world_size; rank++)
        link->peers[rank].bye_due = true;
    int64_t begin_ns = clock_now_ns(), told_ns = 0;
    for (;;) {
        link_read_all(link);
        link_flush_all(link, writers);
        int64_t now_ns = clock_now_ns();
        if (!told_ns && (all_told(link) || now_ns - begin_ns > (int64_t)CLOSE_MS * 1000000)) {
            told_ns = now_ns;
            for (int rank = 0; rank < link->world_size; rank++)
                if (rank != link->rank)
                    link->carrier->finish(link->data, rank);
        }
        if (told_ns && (all_left(link) || now_ns - told_ns > (int64_t)LINGER_MS * 1000000))
            return;
        find_readers(link, readers);
        link->carrier->wait(link->data, readers, writers, link->wake_main, (int64_t)TICK_MS * 1000000);
    }
}

static void free_link(struct link *link)
{
    link->carrier->close(link->data);
    for (int rank = 0; rank < link->world_size; rank++) {
        free(link->peers[rank].input);
        free(link->peers[rank].packed);
    }
    for (int group = 0; group < GROUP_COUNT; group++)
        for (int parity = 0; parity < 2; parity++)
            free(link->packed[group][parity]);
    if (link->wake_main >= 0)
        close(link->wake_main);
    if (link->wake_thread >= 0)
        close(link->wake_thread);
    pthread_mutex_destroy(&link->lock);
    free(link);
}

static void close_link(struct comm *comm)
{
    struct link *link = comm->link;
    if (link->watched) {
        atomic_store(&link->stop, true);
        link_raise_alarm(link->wake_thread);
        pthread_join(link->thread, NULL);
        say_goodbye(link);
    }
    free_link(link);
}

// 1 MiB of bf16: for a network long beside the time that it takes to say anything.
static const struct comm_transport transport = {.piece_groups = 4096,
                                                .post = post,
                                                .channel_moved = channel_moved,
                                                .look = look,
                                                .sleep = sleep_for_input,
                                                .close = close_link};

static void init_group(struct link *link, enum comm_group group, int first, int size)
{
    link->groups[group] =
        (struct comm){.region = link->region, .group = group, .first = first, .size = size, .rank = link->rank - first};
}

static int make_link(struct link **out, const struct comm_carrier *carrier, void *data, struct comm_region *region,
                     int rank, int timeout_ms, struct error *err)
{
    struct link *link = calloc(1, sizeof *link);
    if (!link) {
        carrier->close(data);
        return error_set(err, ERR_MEMORY, "rank %d: out of memory", rank);
    }
    bool staged = region->pp_size > 1, whole = true;
    int silence_ms = timeout_ms > LEAST_SILENCE_MS ? timeout_ms : LEAST_SILENCE_MS, beat_ms = silence_ms / 8;
    if (timeout_ms / 8 < beat_ms) // for a deadline below that, too, the others know for whom this rank waits
        beat_ms = timeout_ms / 8;
    link->carrier = carrier;
    link->data = data;
    link->region = region;
    link->rank = rank;
    link->world_size = region->world_size;
    link->silence_ns = (int64_t)silence_ms * 1000000;
    link->beat_ns = (int64_t)(beat_ms < MAX_BEAT_MS ? beat_ms : MAX_BEAT_MS) * 1000000;
    link->tick_ns = (int64_t)(region->channel_bytes ? CHANNEL_TICK_MS : TICK_MS) * 1000000;
    pthread_mutex_init(&link->lock, NULL);
    init_group(link, GROUP_WORLD, 0, region->world_size);
    if (staged)
        init_group(link, GROUP_STAGE, rank / region->tp_size * region->tp_size, region->tp_size);
    link->wake_main = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    link->wake_thread = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (int group = 0; group < (staged ? GROUP_COUNT : 1); group++)
        for (int parity = 0; parity < 2; parity++)
            whole &= (link->packed[group][parity] = malloc(region->buffer_bytes)) != NULL;
    for (int peer = 0; peer < region->world_size; peer++) {
        if (peer == rank)
            continue;
        whole &= (link->peers[peer].input = malloc(LINK_INPUT_BYTES)) != NULL;
        whole &= (link->peers[peer].packed = malloc(region->buffer_bytes)) != NULL;
    }
    if (!whole || link->wake_main < 0 || link->wake_thread < 0) {
        free_link(link);
        return error_set(err, ERR_MEMORY, "rank %d: no memory or descriptors for its connections", rank);
    }
    *out = link;
    return 0;
}

int comm_open_link(struct comm **out, const struct comm_carrier *carrier, void *data, struct comm_region *region,
                   int rank, int timeout_ms, struct error *err)
{
    struct link *link;
    struct comm *comm;
    int rc = make_link(&link, carrier, data, region, rank, timeout_ms, err);
    if (rc || (rc = comm_open_over(&comm, &transport, link, region, rank, timeout_ms, err)))
        return rc;
    if ((rc = start_watch(link, err))) {
        comm_close(comm);
        return rc;
    }
    *out = comm;
    return 0;
}

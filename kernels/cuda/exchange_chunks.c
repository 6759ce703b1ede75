// Exchanges in chunks that copy engines move while the chunks before are added up. See exchange.h.
//
// Three streams: the device's own computes, one copies out, one copies in. Of chunk c, with two buffers of what goes out on the
// device and three (DEPTH) of all else:
//   parts   own: encodes | out: copies them to the host, posts | in: waits for everybody's, copies those for this owner in
//   sums    own: adds up, encodes | out: copies, posts          | in: waits, copies the others' in
//   decode  own
// parts of c + 1 come before sums of c, so that copies and arithmetic of two chunks go on beside each other. The host's buffer of parts c is
// written again as that of c + 3 when this rank has copied sums c in: then every rank has posted sums c, and had copied parts c in before. The
// buffer of sums c is written again after parts c + 3 of all ranks, which they post when they have copied sums c in. With two of them the copies
// out would wait for those in at every chunk (bench/link_simulator.c). All ranks queue the same
// in the same order, and what a stream waits for was queued before: no circle. Over p2p the copies out are all there are (exchange_p2p.c).
//
// Halves of a sum are the same with one of the two phases empty: its tokens are posted and waited for, so that what is said above of the buffers holds
// over sums and halves alike, and nothing is coded or copied in it. With a norm between them both halves are one run: of a chunk's own rows it is done
// where their sums would be coded.
#include "kernels/cuda/exchange_host.h"
#include "kernels/cuda/shares.h"

#include "formats/checked.h"

enum { DEPTH = EXCHANGE_DEPTH };

// ---- the host's buffers --------------------------------------------------------------------------------------------

static uint8_t *parts_of(uint8_t *area, uint64_t chunk)
{
    return area + EXCHANGE_DIRECT_BYTES + chunk % DEPTH * EXCHANGE_PARTS_BYTES;
}
static uint8_t *sums_of(uint8_t *area, uint64_t chunk)
{
    return area + EXCHANGE_DIRECT_BYTES + DEPTH * EXCHANGE_PARTS_BYTES + chunk % DEPTH * EXCHANGE_SUMS_BYTES;
}

// ---- a chunk -------------------------------------------------------------------------------------------------------

enum chunk_event { PARTS_READY, PARTS_SENT, PARTS_IN, SUMS_READY, SUMS_SENT, SUMS_IN, DECODED, FORKED };

struct chunk_run {
    struct device *d;
    struct exchange *x;
    struct exchange_message message;
    const struct exchange_own_norm *norm; // between the phases; or NULL
    uint32_t rows, count;                 // of a chunk; chunks
    struct error *err;
};

#define STEP(call)                                                                                                     \
    do {                                                                                                               \
        int step_rc = device_status(run->d, (call), "exchanging a chunk", run->err);                                   \
        if (step_rc)                                                                                                   \
            return step_rc;                                                                                            \
    } while (0)

// The rows of a chunk, and the bytes of each owner's share of them. behind: of the second phase, which is of other rows where a norm is between.
struct chunk {
    struct share_piece piece, behind;
    uint64_t share;
    int64_t first; // row of the message
};

static struct chunk chunk_at(const struct chunk_run *run, uint32_t index)
{
    const struct exchange_message *all = &run->message;
    uint32_t first = index * run->rows;
    struct share_piece piece = {.data = all->data + (uint64_t)first * all->cols,
                                .lost = all->lost ? all->lost + (uint64_t)first * all->cols : NULL,
                                .rows = all->rows - first < run->rows ? all->rows - first : run->rows,
                                .cols = all->cols,
                                .stride = all->cols,
                                .wire = all->wire,
                                .rank = run->x->ranks.rank,
                                .tp_size = run->x->ranks.tp_size,
                                .by_rows = all->half != EXCHANGE_WHOLE};
    piece.first_owner = (int)((all->first_owner + first) % (uint32_t)piece.tp_size);
    struct chunk c = {piece, piece, (uint64_t)share_piece_bytes(&piece), first};
    if (run->norm) {
        c.behind.data = run->norm->normed + (uint64_t)first * all->cols;
        c.behind.lost = NULL;
    }
    return c;
}

// How many chunks one buffer is behind the next of its kind: of those in which parts and sums come in, and of those that go out.
static uint32_t ring_of(enum chunk_event which)
{
    return which == PARTS_IN || which == SUMS_READY || which == SUMS_IN || which == DECODED ? DEPTH : 2;
}

static cudaEvent_t event_of(const struct chunk_run *run, enum chunk_event which, uint32_t index)
{
    return run->x->event[which][(run->x->chunks + index) % ring_of(which)];
}

// Until the chunk that had the same buffer before has come so far. That of an earlier message has: all streams begin behind the device's own, which
// was behind them. So nothing waits for what was queued before a capture.
static cudaError_t wait_for_buffer(const struct chunk_run *run, cudaStream_t stream, enum chunk_event which,
                                   uint32_t index)
{
    return index < ring_of(which) ? cudaSuccess : cudaStreamWaitEvent(stream, event_of(run, which, index), 0);
}

static uint8_t *in_of(uint8_t *const *in, uint64_t number) { return in[number % DEPTH]; }

// The parts of all owners but this rank.
static int send_parts(const struct chunk_run *run, const struct chunk *c, const uint8_t *stage, uint64_t number)
{
    struct exchange *x = run->x;
    uint64_t own = (uint64_t)c->piece.rank * c->share, behind = own + c->share;
    uint64_t end = (uint64_t)c->piece.tp_size * c->share;
    if (x->p2p) {
        STEP(exchange_p2p_send_parts(x, stage, c->share, number));
        return 0;
    }
    uint8_t *mine = parts_of(exchange_host_area(x, c->piece.rank), number);
    if (own > 0)
        STEP(cudaMemcpyAsync(mine, stage, own, cudaMemcpyDeviceToHost, x->out));
    if (behind < end)
        STEP(cudaMemcpyAsync(mine + behind, stage + behind, end - behind, cudaMemcpyDeviceToHost, x->out));
    return 0;
}

static bool has_parts(const struct chunk_run *run) { return run->message.half != EXCHANGE_TO_ALL; }
static bool has_sums(const struct chunk_run *run) { return run->message.half != EXCHANGE_TO_OWNERS || run->norm; }

// Of the chunk's own rows, which are added up.
static cudaError_t norm_own_rows(const struct chunk_run *run, const struct chunk *c)
{
    const struct exchange_own_norm *norm = run->norm;
    int64_t ranks = c->piece.tp_size, first = (c->piece.rank - c->piece.first_owner + ranks) % ranks;
    int64_t own = first < c->piece.rows ? (c->piece.rows - first + ranks - 1) / ranks : 0, cols = c->piece.cols;
    int64_t at = (c->first + first) * cols;
    struct device_join join = norm->join;
    if (own == 0)
        return cudaSuccess;
    join.partial = join.partial ? join.partial + at : NULL;
    return launch_norm_apart(norm->normed + at, norm->residual + at, join, norm->weight, own, cols, ranks * cols,
                             norm->eps, run->d->stream);
}

// What comes between the phases; what goes to everybody is coded into stage.
static int work_between(const struct chunk_run *run, const struct chunk *c, uint8_t *stage, const uint8_t *in)
{
    struct device *d = run->d;
    bool whole = run->message.half == EXCHANGE_WHOLE;
    if (has_parts(run))
        STEP(launch_share_add_up(whole ? stage : NULL, in, &c->piece, d->stream));
    if (run->norm)
        STEP(norm_own_rows(run, c));
    if (has_sums(run) && !whole)
        STEP(launch_share_encode_own(stage, &c->behind, NULL, 0, d->stream));
    return 0;
}

static int chunk_parts(const struct chunk_run *run, uint32_t index)
{
    struct device *d = run->d;
    struct exchange *x = run->x;
    struct chunk c = chunk_at(run, index);
    uint64_t number = x->chunks + index, own = (uint64_t)c.piece.rank * c.share;
    uint8_t *stage = x->parts_out[number % 2], *in = in_of(x->parts_in, number);
    int rc;
    STEP(wait_for_buffer(run, d->stream, PARTS_SENT, index));
    if (has_parts(run))
        STEP(launch_share_encode(stage, &c.piece, NULL, 0, d->stream));
    STEP(cudaEventRecord(event_of(run, PARTS_READY, index), d->stream));
    STEP(cudaStreamWaitEvent(x->out, event_of(run, PARTS_READY, index), 0));
    STEP(wait_for_buffer(run, x->out, SUMS_IN, index));
    if (has_parts(run) && (rc = send_parts(run, &c, stage, number)))
        return rc;
    STEP(launch_exchange_post(&x->ranks, EXCHANGE_LANE_PARTS, x->out));
    STEP(cudaEventRecord(event_of(run, PARTS_SENT, index), x->out));
    STEP(cudaStreamWaitEvent(x->in, event_of(run, PARTS_SENT, index), 0));
    if (!x->p2p)
        STEP(wait_for_buffer(run, x->in, SUMS_READY, index));
    STEP(launch_exchange_wait(&x->ranks, EXCHANGE_LANE_PARTS, run->message.place, x->in));
    for (int r = 0; r < c.piece.tp_size && !x->p2p && has_parts(run); r++)
        if (r != c.piece.rank)
            STEP(cudaMemcpyAsync(in + (uint64_t)r * c.share, parts_of(exchange_host_area(x, r), number) + own, c.share,
                                 cudaMemcpyHostToDevice, x->in));
    STEP(cudaEventRecord(event_of(run, PARTS_IN, index), x->in));
    return 0;
}

static int chunk_sums(const struct chunk_run *run, uint32_t index)
{
    struct device *d = run->d;
    struct exchange *x = run->x;
    struct chunk c = chunk_at(run, index);
    uint64_t number = x->chunks + index;
    uint8_t *stage = x->sums_out[number % 2], *in = in_of(x->sums_in, number);
    int rc;
    STEP(cudaStreamWaitEvent(d->stream, event_of(run, PARTS_IN, index), 0));
    STEP(wait_for_buffer(run, d->stream, SUMS_SENT, index));
    if ((rc = work_between(run, &c, stage, in_of(x->parts_in, number))))
        return rc;
    STEP(cudaEventRecord(event_of(run, SUMS_READY, index), d->stream));
    STEP(cudaStreamWaitEvent(x->out, event_of(run, SUMS_READY, index), 0));
    if (x->p2p && has_sums(run))
        STEP(exchange_p2p_send_sums(x, stage, c.share, number));
    else if (has_sums(run))
        STEP(cudaMemcpyAsync(sums_of(exchange_host_area(x, c.piece.rank), number), stage, c.share,
                             cudaMemcpyDeviceToHost, x->out));
    STEP(launch_exchange_post(&x->ranks, EXCHANGE_LANE_SUMS, x->out));
    STEP(cudaEventRecord(event_of(run, SUMS_SENT, index), x->out));
    STEP(cudaStreamWaitEvent(x->in, event_of(run, SUMS_SENT, index), 0));
    if (!x->p2p)
        STEP(wait_for_buffer(run, x->in, DECODED, index));
    STEP(launch_exchange_wait(&x->ranks, EXCHANGE_LANE_SUMS, run->norm ? run->norm->place : run->message.place, x->in));
    for (int r = 0; r < c.piece.tp_size && !x->p2p && has_sums(run); r++)
        if (r != c.piece.rank)
            STEP(cudaMemcpyAsync(in + (uint64_t)r * c.share, sums_of(exchange_host_area(x, r), number), c.share,
                                 cudaMemcpyHostToDevice, x->in));
    STEP(cudaEventRecord(event_of(run, SUMS_IN, index), x->in));
    return 0;
}

static int chunk_decode(const struct chunk_run *run, uint32_t index)
{
    struct device *d = run->d;
    struct chunk c = chunk_at(run, index);
    STEP(cudaStreamWaitEvent(d->stream, event_of(run, SUMS_IN, index), 0));
    if (has_sums(run))
        STEP(launch_share_decode(in_of(run->x->sums_in, run->x->chunks + index), &c.behind, d->stream));
    STEP(cudaEventRecord(event_of(run, DECODED, index), d->stream));
    return 0;
}

// The other streams go on behind the device's own, which at the end is behind them; so chunks can be recorded into a graph too.
static int fork_streams(const struct chunk_run *run)
{
    struct exchange *x = run->x;
    STEP(cudaEventRecord(x->event[FORKED][0], run->d->stream));
    STEP(cudaStreamWaitEvent(x->out, x->event[FORKED][0], 0));
    STEP(cudaStreamWaitEvent(x->in, x->event[FORKED][0], 0));
    return 0;
}

static int run_chunks(struct chunk_run *run)
{
    int forked = fork_streams(run);
    if (forked)
        return forked;
    run->count = (uint32_t)div_up(run->message.rows, run->rows);
    for (uint32_t i = 0; i < run->count + 2; i++) {
        int rc;
        if ((i < run->count && (rc = chunk_parts(run, i))) ||
            (i >= 1 && i - 1 < run->count && (rc = chunk_sums(run, i - 1))) ||
            (i >= 2 && (rc = chunk_decode(run, i - 2))))
            return rc;
    }
    run->x->chunks += run->count;
    return 0;
}

// Rows of a chunk are whole lines: rows that have one owner each of all ranks, or one row whose groups have.
static uint32_t line_rows(const struct exchange_message *m, int tp_size)
{
    return m->half == EXCHANGE_WHOLE ? 1 : (uint32_t)tp_size;
}

static uint64_t line_bytes(const struct exchange_message *m, int tp_size)
{
    int64_t share = m->half == EXCHANGE_WHOLE ? share_bytes(1, m->cols, tp_size, m->wire)
                                              : share_rows_bytes(1, m->cols, tp_size, m->wire);
    return (uint64_t)(tp_size * share);
}

bool exchange_fits_chunks(const struct exchange *x, const struct exchange_message *m)
{
    return line_bytes(m, x->ranks.tp_size) <= EXCHANGE_PARTS_BYTES;
}

int exchange_in_chunks(struct device *d, const struct exchange_message *m, const struct exchange_own_norm *norm,
                       uint64_t chunk_bytes, struct error *err)
{
    struct exchange *x = d->exchange;
    uint64_t rows = line_rows(m, x->ranks.tp_size), fit = EXCHANGE_PARTS_BYTES / line_bytes(m, x->ranks.tp_size);
    uint64_t wanted = chunk_bytes / (2 * (uint64_t)m->cols * rows);
    wanted = wanted < 1 ? 1 : wanted < fit ? wanted : fit;
    struct chunk_run run = {.d = d, .x = x, .message = *m, .norm = norm, .rows = (uint32_t)(wanted * rows), .err = err};
    return run_chunks(&run);
}

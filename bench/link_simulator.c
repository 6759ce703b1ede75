// See link_simulator.h.
#include "bench/link_simulator.h"

#include "engine/comm.h"
#include "engine/comm_reduce.h"
#include "formats/checksum.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

const struct link_rates link_rates_pcie4_x16 = {.link_bytes_s = 24e9,
                                                .kernel_read_bytes_s = 12e9,
                                                .dram_bytes_s = INFINITY,
                                                .device_bytes_s = 936e9,
                                                .launch_s = 2.1e-6,
                                                .phase_p2p_s = 3.0e-6,
                                                .phase_host_s = 4.55e-6,
                                                .copy_s = 2e-6,
                                                .kernel_s = 2e-6,
                                                .flag_s = 2e-6};

enum { F32_GROUP_BYTES = 512, TIMEOUT_MS = 60000 };

// What all ranks share: each rank's staging, which is the host's memory or, for P2P, what lies with the others; and its results.
struct shared {
    struct link_result result;
    uint64_t hash[LINK_MAX_RANKS];
    double seconds[LINK_MAX_RANKS];
    bool right[LINK_MAX_RANKS];
    int rc;
    struct error err;
};

// When a chunk was done with its buffers; seconds of the clock.
struct moments {
    double parts_sent, added, sums_sent, sums_in, decoded;
};
enum { MOMENTS = 4 }; // chunks that are remembered

struct run {
    const struct link_message *message;
    int rank;
    struct comm *comm;     // NULL: time alone
    struct shared *shared; // likewise
    uint8_t *staging;      // [tp_size][2][groups][F32_GROUP_BYTES]: of phase 1 and 2
    float *data;           // [rows][cols], this rank's
    uint8_t *mine;         // [2][groups][F32_GROUP_BYTES], on the card
    uint8_t *theirs;       // [tp_size][groups][F32_GROUP_BYTES], on the card
    uint64_t groups_per_row, groups, chunk_groups, group_bytes;
    double link_s, read_s; // of a byte to and from the card
    // The clock: when the card, its way out and its way in are free.
    double card, to, from;
    uint64_t to_bytes, from_bytes;
    struct moments moments[MOMENTS]; // of chunk c at c % MOMENTS
};

// ---- the clock -----------------------------------------------------------------------------------------------------

static double take(double *bucket, double ready, double seconds)
{
    *bucket = fmax(*bucket, ready) + seconds;
    return *bucket;
}

static bool in_chunks(const struct run *r) { return r->message->choice.algorithm == ALGORITHM_CHUNKS; }
static bool over_host(const struct run *r) { return r->message->transport == TRANSPORT_HOST; }

// Kernels on the card: bytes of its memory.
static double compute(struct run *r, double ready, uint64_t bytes)
{
    const struct link_rates *rates = &r->message->rates;
    return take(&r->card, ready, (in_chunks(r) ? rates->kernel_s : 0) + (double)bytes / rates->device_bytes_s);
}

static double send_out(struct run *r, double ready, uint64_t bytes)
{
    r->to_bytes += bytes;
    return take(&r->to, ready, (in_chunks(r) ? r->message->rates.copy_s : 0) + (double)bytes * r->link_s);
}

// What a peer has written by `written` comes to the card; over P2P it is there already.
static double take_in(struct run *r, double written, uint64_t bytes)
{
    const struct link_rates *rates = &r->message->rates;
    double seen = written + (in_chunks(r) ? rates->flag_s : over_host(r) ? rates->phase_host_s : rates->phase_p2p_s);
    r->from_bytes += bytes;
    if (!over_host(r))
        return seen;
    return take(&r->from, seen, (in_chunks(r) ? rates->copy_s : 0) + (double)bytes * r->read_s);
}

// When each rank has written; also waits for them.
static int exchange_times(struct run *r, double mine, double all[LINK_MAX_RANKS], struct error *err)
{
    if (r->comm)
        return comm_all_gather(r->comm, all, &mine, sizeof mine, err);
    for (int rank = 0; rank < r->message->tp_size; rank++)
        all[rank] = mine;
    return 0;
}

// ---- data ----------------------------------------------------------------------------------------------------------

static uint8_t *stage(const struct run *r, int rank, int phase, uint64_t group)
{
    return r->staging + (((uint64_t)rank * 2 + (uint64_t)phase) * r->groups + group) * F32_GROUP_BYTES;
}

static int owner(const struct run *r, uint64_t group)
{
    return (int)(group % r->groups_per_row % (uint64_t)r->message->tp_size);
}

static uint64_t owned(const struct run *r, int rank, uint64_t begin, uint64_t end)
{
    uint64_t count = 0;
    for (uint64_t group = begin; group < end; group++)
        count += owner(r, group) == rank;
    return count;
}

static struct reduce_piece piece_of(const struct run *r, uint64_t begin, uint64_t end)
{
    struct reduce_piece piece = {.data = r->data,
                                 .cols = (uint64_t)r->message->cols,
                                 .stride = (uint64_t)r->message->cols,
                                 .groups_per_row = r->groups_per_row,
                                 .first = begin,
                                 .count = end - begin,
                                 .wire = r->message->choice.wire,
                                 .rank = r->rank,
                                 .tp_size = r->message->tp_size};
    for (int rank = 0; rank < piece.tp_size; rank++)
        piece.from[rank] = r->theirs + ((uint64_t)rank * r->groups + begin) * F32_GROUP_BYTES;
    return piece;
}

// Groups of [begin, end) that `wanted` names, between a card's buffer and staging. The card's groups lie one behind the other.
static void move_groups(const struct run *r, uint8_t *card, int rank, int phase, uint64_t begin, uint64_t end, int of,
                        bool but_that, bool in)
{
    for (uint64_t group = begin; group < end; group++) {
        if ((owner(r, group) == of) == but_that)
            continue;
        uint8_t *here = card + (group - begin) * r->group_bytes, *there = stage(r, rank, phase, group);
        memcpy(in ? here : there, in ? there : here, r->group_bytes);
    }
}

// ---- two-shot, whole or in chunks ----------------------------------------------------------------------------------

struct chunk {
    uint64_t index, begin, end, mine, others; // groups: all, and those that this rank owns and does not
    double encoded, added;
};

// Of the chunk that had the same one of `ring` buffers before; there may have been none.
static const struct moments *before(const struct run *r, uint64_t index, uint64_t ring)
{
    static const struct moments none;
    return index < ring ? &none : &r->moments[(index - ring) % MOMENTS];
}

// Of what goes out there are two buffers on the card; of what others read or write three (kernels/cuda/exchange.c and exchange_p2p.c, which say who
// waits for whom).
enum { RING_OUT = 2, RING_IN = 3 };

static struct chunk chunk_at(const struct run *r, uint64_t index)
{
    struct chunk chunk = {.index = index, .begin = index * r->chunk_groups};
    chunk.end = chunk.begin + r->chunk_groups < r->groups ? chunk.begin + r->chunk_groups : r->groups;
    chunk.mine = owned(r, r->rank, chunk.begin, chunk.end);
    chunk.others = chunk.end - chunk.begin - chunk.mine;
    return chunk;
}

static void encode_chunk(struct run *r, struct chunk *chunk)
{
    if (r->data) {
        struct reduce_piece piece = piece_of(r, chunk->begin, chunk->end);
        piece.to = r->mine + chunk->begin * F32_GROUP_BYTES;
        reduce_encode(&piece, 0, piece.count);
    }
    chunk->encoded =
        compute(r, before(r, chunk->index, RING_OUT)->parts_sent, chunk->others * (F32_GROUP_BYTES + r->group_bytes));
}

// Groups go to their owners, which add them up.
static int first_phase(struct run *r, struct chunk *chunk, struct error *err)
{
    struct moments *moments = &r->moments[chunk->index % MOMENTS];
    // Others may still read, or add up, what had its place before.
    double was_read = before(r, chunk->index, RING_IN)->sums_in;
    double written[LINK_MAX_RANKS], there = chunk->encoded;
    uint64_t n = (uint64_t)r->message->tp_size;
    if (r->data)
        move_groups(r, r->mine + chunk->begin * F32_GROUP_BYTES, r->rank, 0, chunk->begin, chunk->end, r->rank, true,
                    false);
    moments->parts_sent = send_out(r, fmax(chunk->encoded, was_read), chunk->others * r->group_bytes);
    int rc = exchange_times(r, moments->parts_sent, written, err);
    double vacant = over_host(r) ? before(r, chunk->index, RING_IN)->added : 0;
    for (int rank = 0; rank < r->message->tp_size && !rc; rank++)
        if (rank != r->rank)
            there = fmax(there, take_in(r, fmax(written[rank], vacant), chunk->mine * r->group_bytes));
    if (rc)
        return rc;
    if (r->data) {
        struct reduce_piece piece = piece_of(r, chunk->begin, chunk->end);
        for (int rank = 0; rank < r->message->tp_size; rank++)
            if (rank != r->rank)
                move_groups(r, r->theirs + ((uint64_t)rank * r->groups + chunk->begin) * F32_GROUP_BYTES, rank, 0,
                            chunk->begin, chunk->end, r->rank, false, true);
        piece.to = r->mine + (r->groups + chunk->begin) * F32_GROUP_BYTES;
        reduce_add_up(&piece, 0, piece.count);
    }
    there = fmax(there, before(r, chunk->index, RING_OUT)->sums_sent);
    moments->added = chunk->added = compute(r, there, chunk->mine * (2 * F32_GROUP_BYTES + n * r->group_bytes));
    return 0;
}

// The sums go to all others.
static int second_phase(struct run *r, const struct chunk *chunk, struct error *err)
{
    struct moments *moments = &r->moments[chunk->index % MOMENTS];
    double written[LINK_MAX_RANKS], there = 0;
    uint64_t copies = over_host(r) ? 1 : (uint64_t)r->message->tp_size - 1;
    if (r->data)
        move_groups(r, r->mine + (r->groups + chunk->begin) * F32_GROUP_BYTES, r->rank, 1, chunk->begin, chunk->end,
                    r->rank, false, false);
    moments->sums_sent = send_out(r, chunk->added, chunk->mine * copies * r->group_bytes);
    int rc = exchange_times(r, moments->sums_sent, written, err);
    double vacant = over_host(r) ? before(r, chunk->index, RING_IN)->decoded : 0;
    for (int rank = 0; rank < r->message->tp_size && !rc; rank++)
        if (rank != r->rank)
            there = fmax(there, take_in(r, fmax(written[rank], vacant),
                                        owned(r, rank, chunk->begin, chunk->end) * r->group_bytes));
    moments->sums_in = there;
    if (rc)
        return rc;
    if (r->data) {
        struct reduce_piece piece = piece_of(r, chunk->begin, chunk->end);
        for (int rank = 0; rank < r->message->tp_size; rank++)
            if (rank != r->rank)
                move_groups(r, r->theirs + ((uint64_t)rank * r->groups + chunk->begin) * F32_GROUP_BYTES, rank, 1,
                            chunk->begin, chunk->end, rank, false, true);
        reduce_decode(&piece, 0, piece.count);
    }
    moments->decoded = compute(r, there, chunk->others * (F32_GROUP_BYTES + r->group_bytes));
    return 0;
}

// A chunk's first phase is under way while the sums of the one before go out.
static int two_shot(struct run *r, struct error *err)
{
    uint64_t count = (r->groups + r->chunk_groups - 1) / r->chunk_groups;
    struct chunk before = {0}, now = chunk_at(r, 0), next = {0};
    int rc = 0;
    encode_chunk(r, &now);
    for (uint64_t i = 0; i <= count && !rc; i++, before = now, now = next) {
        if (i + 1 < count) {
            next = chunk_at(r, i + 1);
            encode_chunk(r, &next);
        }
        if (i < count)
            rc = first_phase(r, &now, err);
        if (!rc && i > 0)
            rc = second_phase(r, &before, err);
    }
    return rc;
}

// ---- one-shot ------------------------------------------------------------------------------------------------------

static void write_all(const struct run *r)
{
    for (uint64_t group = 0; group < r->groups; group++)
        wire_encode_group(stage(r, r->rank, 0, group), r->data + group * WIRE_GROUP, WIRE_GROUP,
                          r->message->choice.wire);
}

static void add_up_all(const struct run *r)
{
    uint8_t encoded[WIRE_MAX_GROUP_BYTES];
    for (uint64_t group = 0; group < r->groups; group++) {
        const uint8_t *parts[LINK_MAX_RANKS];
        int own = owner(r, group);
        float *x = r->data + group * WIRE_GROUP;
        for (int rank = 0; rank < r->message->tp_size; rank++)
            parts[rank] = stage(r, rank, 0, group);
        wire_decode_group(x, parts[own], WIRE_GROUP, r->message->choice.wire);
        wire_add_up_group(encoded, x, parts, own, r->message->tp_size, WIRE_GROUP, r->message->choice.wire);
    }
}

static int one_shot(struct run *r, struct error *err)
{
    double written[LINK_MAX_RANKS], there = 0;
    uint64_t bytes = r->groups * r->group_bytes, others = (uint64_t)r->message->tp_size - 1;
    if (r->data)
        write_all(r);
    double encoded = compute(r, 0, r->groups * F32_GROUP_BYTES + bytes);
    int rc = exchange_times(r, send_out(r, encoded, over_host(r) ? bytes : others * bytes), written, err);
    for (int rank = 0; rank < r->message->tp_size && !rc; rank++)
        if (rank != r->rank)
            there = fmax(there, take_in(r, written[rank], bytes));
    if (rc)
        return rc;
    if (r->data)
        add_up_all(r);
    compute(r, there, others * bytes + r->groups * F32_GROUP_BYTES);
    return 0;
}

// ---- a rank --------------------------------------------------------------------------------------------------------

static void set_up(struct run *r, const struct link_message *message, int rank)
{
    const struct link_rates *rates = &message->rates;
    double n = message->tp_size;
    *r = (struct run){.message = message, .rank = rank};
    r->groups_per_row = wire_groups((uint64_t)message->cols);
    r->groups = (uint64_t)message->rows * r->groups_per_row;
    r->group_bytes = wire_group_bytes(message->choice.wire);
    r->chunk_groups = r->groups;
    if (in_chunks(r) && message->choice.chunk_bytes / (2 * WIRE_GROUP) < r->groups)
        r->chunk_groups = message->choice.chunk_bytes / (2 * WIRE_GROUP);
    // All cards' copies, 1 + n / (2 (n - 1)) times what comes from the host, pass its memory.
    double most = rates->dram_bytes_s / (n * (1 + n / (2 * (n - 1))));
    double link = over_host(r) ? fmin(rates->link_bytes_s, most) : rates->link_bytes_s;
    r->link_s = 1 / link;
    r->read_s = in_chunks(r) ? r->link_s : 1 / fmin(rates->kernel_read_bytes_s, link);
    r->card = in_chunks(r) ? 0 : rates->launch_s;
}

static int run_algorithm(struct run *r, struct error *err)
{
    return r->message->choice.algorithm == ALGORITHM_ONE_SHOT ? one_shot(r, err) : two_shot(r, err);
}

double link_seconds(const struct link_message *message)
{
    struct run r;
    struct error err;
    set_up(&r, message, 0);
    run_algorithm(&r, &err); // which cannot fail without data
    return r.card;
}

void link_formula(const struct link_message *message, uint64_t *to_bytes, uint64_t *from_bytes)
{
    uint64_t n = (uint64_t)message->tp_size, groups = (uint64_t)message->rows * wire_groups((uint64_t)message->cols);
    uint64_t m = groups * wire_group_bytes(message->choice.wire);
    bool host = message->transport == TRANSPORT_HOST;
    if (message->choice.algorithm == ALGORITHM_ONE_SHOT) {
        *from_bytes = (n - 1) * m;
        *to_bytes = host ? m : *from_bytes;
    } else {
        *from_bytes = m * 2 * (n - 1) / n;
        *to_bytes = host ? m : *from_bytes;
    }
}

// Numbers as partial sums have them: some large ones among many small.
static float value_of(int rank, uint64_t index)
{
    uint64_t z = (index * LINK_MAX_RANKS + (uint64_t)rank + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z ^= z >> 27;
    float x = (float)((double)(int64_t)z * 0x1p-63);
    return z % 509 == 0 ? 40 * x : x;
}

// A group's sum from the definition.
static void define_sum(const struct run *r, uint64_t group, float sum[WIRE_GROUP])
{
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    float part[WIRE_GROUP];
    memset(sum, 0, WIRE_GROUP * sizeof *sum);
    for (int rank = 0; rank < r->message->tp_size; rank++) {
        enum wire wire = r->message->choice.wire;
        if (rank == owner(r, group))
            wire = wire_of_own(wire);
        for (uint64_t i = 0; i < WIRE_GROUP; i++)
            part[i] = value_of(rank, group * WIRE_GROUP + i);
        wire_encode_group(bytes, part, WIRE_GROUP, wire);
        wire_add_group(sum, bytes, WIRE_GROUP, wire);
    }
    wire_encode_group(bytes, sum, WIRE_GROUP, r->message->choice.wire);
    wire_decode_group(sum, bytes, WIRE_GROUP, r->message->choice.wire);
}

static bool is_right(const struct run *r)
{
    float sum[WIRE_GROUP];
    uint64_t step = r->groups > 4096 ? r->groups / 4096 : 1; // of large messages some groups
    for (uint64_t group = 0; group < r->groups; group += step) {
        define_sum(r, group, sum);
        for (uint64_t i = 0; i < WIRE_GROUP; i++)
            if (f32_bits(sum[i]) != f32_bits(r->data[group * WIRE_GROUP + i]))
                return false;
    }
    return true;
}

static int rank_main(struct run *r, struct comm_region *region, struct error *err)
{
    size_t buffer = (size_t)r->groups * F32_GROUP_BYTES;
    int rc = comm_open(&r->comm, region, r->rank, TIMEOUT_MS, err);
    if (rc)
        return rc;
    r->data = malloc(buffer);
    r->mine = malloc(2 * buffer);
    r->theirs = malloc((size_t)r->message->tp_size * buffer);
    if (!r->data || !r->mine || !r->theirs)
        return error_set(err, ERR_MEMORY, "no memory for a rank of %lld rows", (long long)r->message->rows);
    for (uint64_t i = 0; i < r->groups * WIRE_GROUP; i++)
        r->data[i] = value_of(r->rank, i);
    if ((rc = comm_barrier(r->comm, err)) || (rc = run_algorithm(r, err)))
        return rc;
    r->shared->result.to_bytes[r->rank] = r->to_bytes;
    r->shared->result.from_bytes[r->rank] = r->from_bytes;
    r->shared->seconds[r->rank] = r->card;
    r->shared->hash[r->rank] = checksum_leaf(r->data, buffer);
    r->shared->right[r->rank] = is_right(r);
    return 0;
}

// ---- all of them ---------------------------------------------------------------------------------------------------

static int check_message(const struct link_message *m, struct error *err)
{
    if (m->transport != TRANSPORT_HOST && m->transport != TRANSPORT_P2P)
        return error_set(err, ERR_USAGE, "transport %s is not simulated: host and p2p are",
                         transport_name(m->transport));
    if (m->tp_size < 2 || m->tp_size > LINK_MAX_RANKS || m->rows < 1 || m->cols < 1 || m->cols % WIRE_GROUP ||
        m->choice.algorithm >= ALGORITHM_COUNT ||
        (m->choice.algorithm == ALGORITHM_CHUNKS && m->choice.chunk_bytes < 256))
        return error_set(err, ERR_USAGE,
                         "%d ranks, %lld x %lld values, %s: wanted 2 to %d ranks and rows of whole groups", m->tp_size,
                         (long long)m->rows, (long long)m->cols, exchange_algorithm_name(m->choice.algorithm),
                         LINK_MAX_RANKS);
    if (m->choice.algorithm == ALGORITHM_ONE_SHOT && wire_is_compressed(m->choice.wire))
        return error_set(err, ERR_USAGE, "one-shot in %s: wanted a wire that does not compress, bf16 or f32",
                         wire_name(m->choice.wire));
    return 0;
}

static void *map_shared(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    return memory;
}

static void run_ranks(struct shared *shared, uint8_t *staging, struct comm_region *region,
                      const struct link_message *message)
{
    pid_t pids[LINK_MAX_RANKS];
    for (int rank = 0; rank < message->tp_size; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            struct run r;
            struct error err;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            set_up(&r, message, rank);
            r.shared = shared;
            r.staging = staging;
            int rc = rank_main(&r, region, &err);
            if (rc && rank == 0) {
                shared->rc = rc;
                shared->err = err;
            }
            _exit(rc ? 1 : 0);
        }
    }
    for (int rank = 0; rank < message->tp_size; rank++) {
        int status = -1;
        if ((pids[rank] < 0 || waitpid(pids[rank], &status, 0) < 0 || status != 0) && !shared->rc)
            shared->rc = error_set(&shared->err, ERR_RANK, "rank %d of the simulation was lost", rank);
    }
}

int link_simulate(struct link_result *out, const struct link_message *message, struct error *err)
{
    int rc = check_message(message, err);
    if (rc)
        return rc;
    uint64_t groups = (uint64_t)message->rows * wire_groups((uint64_t)message->cols);
    size_t staging_bytes = (size_t)message->tp_size * 2 * groups * F32_GROUP_BYTES;
    size_t region_bytes = comm_region_bytes(message->tp_size, 1, 1, 0);
    struct shared *shared = map_shared(sizeof *shared);
    uint8_t *staging = map_shared(staging_bytes);
    void *memory = map_shared(region_bytes);
    if (!shared || !staging || !memory) {
        rc = error_set(err, ERR_MEMORY, "no memory to simulate %lld rows", (long long)message->rows);
        goto done;
    }
    run_ranks(shared, staging, comm_region_init(memory, message->tp_size, 1, 1, 0), message);
    if ((rc = shared->rc)) {
        *err = shared->err;
        goto done;
    }
    *out = shared->result;
    out->same_bits = true;
    for (int rank = 0; rank < message->tp_size; rank++) {
        out->seconds = fmax(out->seconds, shared->seconds[rank]);
        out->same_bits = out->same_bits && shared->right[rank] && shared->hash[rank] == shared->hash[0];
    }
done:
    if (shared)
        munmap(shared, sizeof *shared);
    if (staging)
        munmap(staging, staging_bytes);
    if (memory)
        munmap(memory, region_bytes);
    return rc;
}

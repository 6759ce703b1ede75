// How much of a prompt's exchanges stands in the way of computing? One line for each wire, link, and way through the layers. The ranks are threads of
// one process; the link between them is made slow: behind each phase a rank sleeps for what its bytes would take.
//
//   link_mb_s, latency_us   of the link: one direction of each rank, and each phase
//   ms                      of a step of `rows` rows through all layers, fastest of the rounds, slowest rank
//   link_ms                 what the link alone takes for that step, by the bytes sent
//   exposed_ms              that computing stood still for exchanges, of the same round
//   gain                    by how much it is faster than the plain way over the same link and wire
//   logits                  hash of the last row's logits on rank 0: overlap does not change it
//
// Usage: bench_overlap [SHARD_DIR]; without, of tests/model for two ranks.
#include "engine/comm_internal.h"
#include "engine/decoder.h"
#include "engine/exchange.h"
#include "formats/checked.h"
#include "formats/fnv.h"
#include "kernels/clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 5, ROWS = 256, CONTEXT = 512, DEADLINE_MS = 60000 };

struct way {
    const char *name;
    bool deals, in_parts;
};
static const struct way ways[] = {{"plain", false, false},
                                  {"overlap", false, true},
                                  {"sequence_parallel", true, false},
                                  {"sequence_parallel+overlap", true, true}};
static const enum wire wires[] = {WIRE_BF16, WIRE_S8X};
static const struct link_case {
    double mb_s, latency_us;
} links[] = {{100, 50}, {20, 50}};

struct bench {
    const char *dir;
    struct manifest *manifest;
    struct comm_region *region;
    const struct kernels *kernels;
    struct link_case link;
    struct way way;
    enum wire wire;
    double plain_ms; // of this link and wire
};

struct rank {
    struct bench *bench;
    int rank, rc;
    struct error err;
    pthread_t thread;
    struct comm *comm;
    struct thread_pool *pool;
    struct model model;
    struct device *device;
    struct decoder decoder;
    float *logits;
    double link_s;                                          // slept so far
    double ms[ROUNDS], exposed_ms[ROUNDS], link_ms[ROUNDS]; // of each round
};

// ---- the link ------------------------------------------------------------------------------------------------------

static struct comm_transport slow;
static void (*fast_post)(struct comm *comm, const struct comm_move *move);
static struct rank *ranks;

static uint64_t bytes_of(const struct comm *comm, const struct comm_move *move)
{
    uint64_t own = 0, others = (uint64_t)comm->size - 1;
    if (move->pattern != MOVE_TO_OWNERS && move->pattern != MOVE_FROM_OWNERS)
        return move->bytes * others;
    for (uint64_t i = move->first; i < move->first + move->count; i++)
        own += i % move->groups_per_row % (uint64_t)comm->size == (uint64_t)comm->rank;
    return (move->pattern == MOVE_FROM_OWNERS ? own * others : move->count - own) * move->group_bytes;
}

static void slow_post(struct comm *comm, const struct comm_move *move)
{
    struct rank *rank = &ranks[comm->rank];
    const struct link_case *link = &rank->bench->link;
    double seconds = 1e-6 * link->latency_us + (double)bytes_of(comm, move) / (1e6 * link->mb_s);
    struct timespec time = {.tv_sec = (time_t)seconds, .tv_nsec = (long)(1e9 * (seconds - (double)(time_t)seconds))};
    rank->link_s += seconds;
    fast_post(comm, move);
    nanosleep(&time, NULL);
}

// ---- a rank --------------------------------------------------------------------------------------------------------

static int open_rank(struct rank *r, struct error *err)
{
    struct bench *b = r->bench;
    const struct store_options place = {0};
    int rc;
    if ((rc = comm_open(&r->comm, b->region, r->rank, DEADLINE_MS, err)) ||
        (rc = thread_pool_create(&r->pool, 1, err)) ||
        (rc = model_open(&r->model, b->dir, &place, b->manifest, r->rank, r->comm, err)))
        return rc;
    const struct device_options options = {
        .kernels = b->kernels, .pool = r->pool, .rank = r->rank, .tp_size = (int)b->manifest->tp_size, .device = -1};
    const struct device_shape shape = {.desc = &r->model.desc,
                                       .share = &r->model.share,
                                       .max_rows = ROWS,
                                       .max_sequences = 1,
                                       .decode_rows = 1,
                                       .context = CONTEXT,
                                       .num_pages = CONTEXT / KV_PAGE_TOKENS};
    if ((rc = backend_cpu.open(&r->device, &options, err)))
        return rc;
    const struct loader_options load = {.backend = &backend_cpu, .verify = VERIFY_FULL, .device = r->device};
    if ((rc = model_load(&r->model, &load, err)) ||
        (rc = backend_cpu.prepare(r->device, &shape, &r->model.weights, err)) || (rc = model_finish(&r->model, err)))
        return rc;
    r->logits = calloc((size_t)r->model.share.vocab_local + 1, sizeof *r->logits);
    r->decoder = (struct decoder){.model = &r->model,
                                  .backend = &backend_cpu,
                                  .device = r->device,
                                  .comm = r->comm,
                                  .pool = r->pool,
                                  .wire = b->wire,
                                  .deals = b->way.deals,
                                  .in_parts = b->way.in_parts};
    r->comm->transport = &slow;
    return r->decoder.in_parts ? exchanger_create(&r->decoder.exchanger, r->comm, err) : 0;
}

static void close_rank(struct rank *r)
{
    exchanger_free(r->decoder.exchanger);
    model_stop(&r->model);
    backend_cpu.close(r->device);
    model_close(&r->model);
    comm_close(r->comm);
    thread_pool_free(r->pool);
}

static int run_rounds(struct rank *r, struct error *err)
{
    static int32_t pages[CONTEXT / KV_PAGE_TOKENS];
    struct token_row rows[ROWS];
    const int64_t last = ROWS - 1;
    struct kv_pages table = {.pages = pages, .pages_per_sequence = CONTEXT / KV_PAGE_TOKENS, .version = 1};
    for (int32_t i = 0; r->rank == 0 && i < CONTEXT / KV_PAGE_TOKENS; i++)
        pages[i] = i;
    for (int64_t i = 0; i < ROWS; i++)
        rows[i] = (struct token_row){.token = (uint32_t)((i * i * 7 + i) % r->model.desc.vocab_size), .position = i};
    int rc = comm_barrier(r->comm, err);
    for (int round = -1; round < ROUNDS && !rc; round++) { // the first warms up
        if ((rc = comm_barrier(r->comm, err)))
            break;
        int64_t begin_ns = clock_now_ns(), exposed_ns = r->decoder.exchange_ns;
        double link_s = r->link_s;
        rc = decoder_forward(&r->decoder, rows, ROWS, PHASE_PREFILL, &table, err);
        if (rc || round < 0)
            continue;
        r->ms[round] = 1e-6 * (double)(clock_now_ns() - begin_ns);
        r->exposed_ms[round] = 1e-6 * (double)(r->decoder.exchange_ns - exposed_ns);
        r->link_ms[round] = 1e3 * (r->link_s - link_s);
    }
    return rc ? rc : decoder_logits(&r->decoder, &last, 1, r->logits, r->model.share.vocab_local, err);
}

static void *run_rank(void *arg)
{
    struct rank *r = arg;
    r->rc = open_rank(r, &r->err);
    if (!r->rc)
        r->rc = run_rounds(r, &r->err);
    if (r->rc)
        comm_region_abort(r->bench->region, r->rank, &r->err);
    return NULL;
}

// ---- one line ------------------------------------------------------------------------------------------------------

static int run_case(struct bench *b)
{
    int size = (int)b->manifest->tp_size, rc = 0, best = 0;
    uint64_t elems = (uint64_t)(ROWS * b->manifest->model.hidden_size);
    uint64_t bytes = round_up(comm_region_bytes(size, 1, elems, 0), 4096);
    void *memory = aligned_alloc(4096, bytes);
    ranks = calloc((size_t)size, sizeof *ranks);
    if (!memory || !ranks) {
        fprintf(stderr, "bench_overlap: no memory\n");
        free(memory);
        free(ranks);
        return 1;
    }
    memset(memory, 0, bytes);
    b->region = comm_region_init(memory, size, 1, elems, 0);
    for (int i = 0; i < size; i++) {
        ranks[i] = (struct rank){.bench = b, .rank = i};
        pthread_create(&ranks[i].thread, NULL, run_rank, &ranks[i]);
    }
    for (int i = 0; i < size; i++) {
        pthread_join(ranks[i].thread, NULL);
        if (ranks[i].rc && !rc)
            fprintf(stderr, "bench_overlap: %s\n", ranks[i].err.msg);
        rc |= ranks[i].rc;
    }
    double slowest[ROUNDS] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < size; i++)
            slowest[round] = ranks[i].ms[round] > slowest[round] ? ranks[i].ms[round] : slowest[round];
        best = slowest[round] < slowest[best] ? round : best;
    }
    if (!b->way.deals && !b->way.in_parts)
        b->plain_ms = slowest[best];
    if (!rc)
        printf("overlap tp_size=%d rows=%d wire=%s link_mb_s=%.0f latency_us=%.0f way=%s ms=%.2f link_ms=%.2f "
               "exposed_ms=%.2f gain=%.3f logits=%08x\n",
               size, ROWS, wire_name(b->wire), b->link.mb_s, b->link.latency_us, b->way.name, slowest[best],
               ranks[0].link_ms[best], ranks[0].exposed_ms[best], b->plain_ms / slowest[best] - 1,
               fnv1a_32(ranks[0].logits, (size_t)ranks[0].model.share.vocab_local * sizeof(float)));
    fflush(stdout);
    for (int i = 0; i < size; i++) {
        free(ranks[i].logits);
        close_rank(&ranks[i]);
    }
    free(ranks);
    free(memory);
    return rc != 0;
}

static int run_all(const char *dir)
{
    struct bench bench = {.dir = dir};
    struct error err;
    struct store *store = NULL;
    const struct store_options place = {0};
    int failed = store_open(&store, dir, &place, &err) || store_manifest(&bench.manifest, store, &err);
    failed = failed || kernels_select(&bench.kernels, "auto", &err);
    if (failed)
        fprintf(stderr, "bench_overlap: %s\n", err.msg);
    for (size_t w = 0; !failed && w < sizeof wires / sizeof *wires; w++)
        for (size_t l = 0; l < sizeof links / sizeof *links; l++)
            for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
                bench.wire = wires[w];
                bench.link = links[l];
                bench.way = ways[i];
                failed |= run_case(&bench);
            }
    manifest_free(bench.manifest);
    store_close(store);
    return failed;
}

int main(int argc, char **argv)
{
    char work[] = "/tmp/bench_overlap_XXXXXX", command[512];
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    // What every rank's transport is, made slow.
    uint64_t bytes = round_up(comm_region_bytes(1, 1, 1, 0), 4096);
    void *memory = aligned_alloc(4096, bytes);
    struct comm *comm;
    struct error err;
    if (!memory)
        return 1;
    memset(memory, 0, bytes);
    if (comm_open(&comm, comm_region_init(memory, 1, 1, 1, 0), 0, DEADLINE_MS, &err)) {
        fprintf(stderr, "bench_overlap: %s\n", err.msg);
        return 1;
    }
    slow = *comm->transport;
    fast_post = slow.post;
    slow.post = slow_post;
    comm_close(comm);
    free(memory);
    if (argc > 1)
        return run_all(argv[1]);
    if (!mkdtemp(work))
        return 1;
    snprintf(command, sizeof command, "%s/tpshard --tp 2 --quant int4 tests/model %s/shards --quiet", build, work);
    int failed = system(command) != 0;
    snprintf(command, sizeof command, "%s/shards", work);
    failed = failed || run_all(command);
    snprintf(command, sizeof command, "rm -rf %s", work);
    return system(command) != 0 || failed;
}

// One rank at work. See worker.h.
#include "engine/worker.h"

#include "engine/comm_select.h"
#include "engine/decoder_parts.h"
#include "engine/exchange.h"
#include "engine/rank_step.h"
#include "engine/rank_transport.h"
#include "engine/relay.h"
#include "engine/residual_tap.h"
#include "engine/sum_check.h"
#include "formats/checked.h"
#include "kernels/futex.h"
#include "kernels/host_identity.h"
#include "kernels/host_memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { PAGE_BYTES = 4096 };

// ---- the shared area -------------------------------------------------------------------------------------------

uint64_t shared_area_place(struct shared_area *memory, struct step_area *area, struct forward_area *forward,
                           struct part_area *parts)
{
    uint64_t step = round_up(sizeof *memory, 64), logits_at = step + round_up(step_area_bytes(area), 64);
    uint64_t logits_bytes = (uint64_t)forward->logits_rows * (uint64_t)area->vocab_size * sizeof *forward->logits;
    uint64_t residual_at = logits_at + round_up(logits_bytes, 64);
    uint64_t parts_at =
        round_up(residual_at + (uint64_t)forward->residual_elems * sizeof *forward->residual, PAGE_BYTES);
    if (memory) {
        step_area_place(area, (uint8_t *)memory + step);
        forward->logits = (float *)(void *)((uint8_t *)memory + logits_at);
        forward->residual = (float *)(void *)((uint8_t *)memory + residual_at);
        parts->memory = parts->elems > 0 ? (float *)(void *)((uint8_t *)memory + parts_at) : NULL;
    }
    return parts_at + 2 * (uint64_t)(parts->ranks * parts->elems) * sizeof *parts->memory;
}

struct forward_area worker_forward_area(const struct worker_options *options)
{
    const struct model_desc *model = &options->manifest->model;
    return (struct forward_area){.logits_rows = options->logits_rows,
                                 .residual_elems =
                                     (model->num_layers + 1) * options->residual_rows * model->hidden_size};
}

bool worker_sums_in_common(const struct worker_options *options)
{
    size_t tp_size = options->manifest->tp_size;
    return options->backend->place_partial && options->transport == TRANSPORT_SHM && tp_size > 1 &&
           tp_size <= RANK_PARTS_MOST;
}

struct part_area worker_part_area(const struct worker_options *options)
{
    const struct manifest *m = options->manifest;
    int64_t rows = rank_step_pass_rows(options->backend, &options->limits);
    uint64_t bytes = (uint64_t)(rows * m->model.hidden_size) * sizeof(float);
    return (struct part_area){
        .ranks = (int64_t)m->num_ranks,
        .elems = worker_sums_in_common(options) ? (int64_t)(round_up(bytes, PAGE_BYTES) / sizeof(float)) : 0};
}

// ---- a rank's state --------------------------------------------------------------------------------------------

struct worker {
    struct rank_env *env;
    const struct worker_options *options;
    struct shared_area *shared;
    struct step_area area;
    struct forward_area forward;
    struct residual_tap tap;
    struct thread_pool *pool;
    struct numa_place place;
    struct model model;
    struct device *device;
    struct device_exchange *exchange;
    struct rank_transport settled; // by where the ranks are, and what is known of their devices' links
    char exchange_note[DEVICE_EXCHANGE_NOTE_BYTES];
    struct decoder decoder;
    struct rank_step *step;
    struct relay *relay; // where other ranks are other processes'; else NULL
    int64_t vocab_begin[COMM_MAX_RANKS], vocab_local[COMM_MAX_RANKS]; // [tp_size]
    bool told_start;                                                  // the first command is behind
};

static void worker_close(struct worker *w)
{
    rank_transport_end(&w->settled);
    relay_free(w->relay);
    rank_step_free(w->step);
    exchanger_free(w->decoder.exchanger);
    sum_check_free(w->decoder.check);
    free(w->decoder.lost);
    model_stop(&w->model);
    w->options->backend->close(w->device);
    device_exchange_close(w->exchange);
    model_close(&w->model);
    thread_pool_free(w->pool);
}

static struct rank_start *start_of(const struct worker *w) { return &w->shared->starts[w->env->rank]; }

// What all ranks must agree on before they touch a weight.
struct agreement {
    struct checksum128 contract;
    uint32_t tp_size, pp_size, wire, feedback, deals, overlap;
    int64_t check_sums, context, num_pages;
    struct step_limits limits;
    uint32_t kv_format;
};

static int agree(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct agreement mine;
    memset(&mine, 0, sizeof mine);
    comm_at(w->env->comm, OP_HANDSHAKE, -1);
    mine.contract = o->manifest->contract;
    mine.tp_size = o->manifest->tp_size;
    mine.pp_size = o->manifest->pp_size;
    mine.wire = (uint32_t)o->wire;
    mine.feedback = o->feedback;
    mine.deals = o->deals;
    mine.overlap = (uint32_t)o->overlap;
    mine.check_sums = o->check_sums;
    mine.context = o->context;
    mine.limits = o->limits;
    mine.num_pages = o->num_pages;
    mine.kv_format = (uint32_t)o->kv_format;
    int rc = comm_handshake(w->env->comm, &mine, sizeof mine, "model contract and options", err);
    struct comm_select_options table = {
        .transport = o->transport, .tp_size = w->env->tp_size, .wire = o->wire, .feedback = o->feedback};
    return rc ? rc : comm_select_agree(w->env->comm, comm_select_hash(&table), err);
}

// The parts of a stage's ranks must follow each other from 0 to the whole: each knows only its own file.
static int check_shares(struct worker *w, struct error *err)
{
    const struct model_desc *desc = &w->model.desc;
    bool whole_experts = w->options->manifest->experts == EXPERTS_EP;
    struct rank_share all[COMM_MAX_RANKS];
    int rc = comm_all_gather(comm_stage(w->env->comm), all, &w->model.share, sizeof all[0], err);
    int first = w->env->rank - w->env->rank % w->env->tp_size;
    int64_t vocab = 0, mlp = 0, heads = 0, shared = 0, experts = 0, expert_mlp = 0;
    for (int r = 0; r < w->env->tp_size && !rc; r++) {
        w->vocab_begin[r] = all[r].vocab_begin;
        w->vocab_local[r] = all[r].vocab_local;
        if (all[r].vocab_begin != vocab || all[r].mlp_begin != mlp || all[r].head_begin != heads ||
            all[r].shared_begin != shared || all[r].expert_begin != (whole_experts ? experts : 0) ||
            all[r].expert_mlp_begin != (whole_experts ? 0 : expert_mlp) ||
            (whole_experts ? all[r].expert_size_local != desc->experts.expert_size
                           : all[r].num_experts_local != desc->experts.num_experts))
            rc = error_set(err, ERR_CORRUPT, "%s: rank %d's share does not begin where rank %d's ends",
                           store_place(w->model.store), first + r, first + r - 1);
        vocab += all[r].vocab_local;
        mlp += all[r].intermediate_local;
        heads += all[r].num_heads_local;
        shared += all[r].shared_size_local;
        experts += all[r].num_experts_local;
        expert_mlp += all[r].expert_size_local;
    }
    if (!rc && (vocab != desc->vocab_size || mlp != desc->intermediate_size || heads != desc->num_heads ||
                shared != desc->experts.shared_size ||
                (whole_experts ? experts != desc->experts.num_experts : expert_mlp != desc->experts.expert_size)))
        rc = error_set(err, ERR_CORRUPT, "%s: the ranks' shares do not add up to the model",
                       store_place(w->model.store));
    return rc;
}

// What the ranks of one device take there, and what it has.
struct memory_need {
    double weights, kv, scratch, exchange, available;
    int64_t device;
    uint64_t host;              // tells hosts of spread ranks apart
    char bus[DEVICE_BUS_BYTES]; // and devices that each rank numbers for itself
};

static bool same_device(const struct memory_need *a, const struct memory_need *b)
{
    return a->host == b->host && (a->bus[0] ? strcmp(a->bus, b->bus) == 0 : a->device == b->device);
}

static int refuse_memory(const struct worker *w, const struct memory_need *sum, int sharing, struct error *err)
{
    double needed = sum->weights + sum->kv + sum->scratch + sum->exchange;
    char exchanges[64] = "";
    if (sum->exchange > 0)
        snprintf(exchanges, sizeof exchanges, ", sums over ranks by %s %.2f", transport_name(w->settled.transport),
                 sum->exchange / 0x1p30);
    return error_set(
        err, ERR_MEMORY,
        "%s: device %lld (%d rank%s) needs %.2f GiB (weights %.2f, KV cache %.2f at context %lld, buffers %.2f%s) and "
        "has %.2f GiB free; use a smaller --context, --kv-cache fp8, stronger quantization or more ranks",
        store_place(w->model.store), (long long)sum->device, sharing, sharing == 1 ? "" : "s", needed / 0x1p30,
        sum->weights / 0x1p30, sum->kv / 0x1p30, (long long)w->options->context, sum->scratch / 0x1p30, exchanges,
        sum->available / 0x1p30);
}

// What this rank will take. Of what nobody can count there is enough.
static int own_need(struct memory_need *out, const struct worker *w, const struct device_shape *shape,
                    struct error *err)
{
    struct memory_plan plan;
    int rc = w->options->backend->plan(w->device, shape, &plan, err);
    if (rc)
        return rc;
    *out = (struct memory_need){.weights = (double)shard_file_payload_bytes(w->model.file),
                                .kv = (double)plan.kv_bytes,
                                .scratch = (double)plan.scratch_bytes,
                                .exchange = (double)plan.exchange_bytes,
                                .available = (double)plan.available_bytes,
                                .device = plan.device,
                                .host = w->env->spread ? host_identity() : 0};
    if (w->options->backend->bus)
        w->options->backend->bus(w->device, out->bus);
    if (plan.available_bytes != UINT64_MAX)
        return 0;
    // The parent has looked at the host's memory, but knows of a compressed file only how long it is.
    double host = shard_file_is_compressed(w->model.file) ? host_memory_available() : -1;
    out->available = host >= 0 ? host : INFINITY;
    return 0;
}

// The sum of all ranks on a device, and how many they are.
static struct memory_need need_of_device(const struct memory_need *all, int num_ranks, const struct memory_need *mine,
                                         int *sharing)
{
    struct memory_need sum = {.available = INFINITY, .device = mine->device};
    *sharing = 0;
    for (int r = 0; r < num_ranks; r++) {
        if (!same_device(&all[r], mine))
            continue;
        ++*sharing;
        sum.weights += all[r].weights;
        sum.kv += all[r].kv;
        sum.scratch += all[r].scratch;
        sum.exchange += all[r].exchange;
        sum.available = all[r].available < sum.available ? all[r].available : sum.available;
    }
    return sum;
}

// Ranks may share a device: what all of them will take there must fit before any of them takes it. The KV cache shrinks as far as it
// may; all ranks have as many pages as the poorest.
static int settle_memory(struct worker *w, struct device_shape *shape, struct error *err)
{
    struct memory_need mine, all[COMM_MAX_RANKS];
    int rc, sharing;
    memset(&mine, 0, sizeof mine);
    if ((rc = comm_barrier(w->env->comm, err)) || // every rank has opened its device, which takes memory as well
        (rc = own_need(&mine, w, shape, err)) || (rc = comm_all_gather(w->env->comm, all, &mine, sizeof mine, err)))
        return rc;
    const struct memory_need sum = need_of_device(all, w->env->num_ranks, &mine, &sharing);
    double left = sum.available - sum.weights - sum.scratch - sum.exchange, least = (double)w->options->least_pages;
    double pages = (double)shape->num_pages, pages_of_all[COMM_MAX_RANKS];
    if (sum.kv > left)
        pages = left > 0 ? floor(pages * left / sum.kv) : 0;
    if ((rc = comm_all_gather(w->env->comm, pages_of_all, &pages, sizeof pages, err)))
        return rc;
    if (pages < least)
        return refuse_memory(w, &sum, sharing, err);
    for (int r = 0; r < w->env->num_ranks; r++)
        pages = pages_of_all[r] < pages ? pages_of_all[r] : pages;
    if (pages < least && (rc = comm_barrier(w->env->comm, err))) // the other rank says it, with its figures
        return rc;
    shape->num_pages = (int64_t)pages;
    return 0;
}

// ---- start -----------------------------------------------------------------------------------------------------

static int keep_to_place(struct worker *w, struct error *err)
{
    cpu_set_t allowed;
    CPU_ZERO(&w->place.cpus);
    w->place.node = -1;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) // more processors than a set holds
        return 0;
    bool spread = w->env->spread && w->options->local_size > 0;
    int rank = spread ? w->options->local_rank : w->env->rank,
        ranks = spread ? w->options->local_size : w->env->num_ranks;
    if (w->env->spread && !spread) // nobody knows what else runs here
        return 0;
    w->place = numa_place_of(NUMA_SYSTEM_DIR, &allowed, w->options->pin, rank, ranks, w->options->threads);
    return numa_keep_to(&w->place, err);
}

// A thread of the rank waits for bytes, and some have come. When all ranks are to end, it must not wait for those that are on their way.
static void on_progress(void *arg)
{
    struct worker *w = arg;
    comm_at(w->env->comm, OP_LOAD, -1);
    if (rank_is_stopped(w->env))
        store_file_cancel(w->model.source);
}

static void on_lost(void *arg, const struct error *why)
{
    const struct worker *w = arg;
    rank_ends(w->env, why);
}

static int begin_load(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    const struct loader_options options = {.backend = o->backend,
                                           .device = w->device,
                                           .verify = o->verify,
                                           .path = o->load_path,
                                           .threads = o->load_threads,
                                           .loaded_bytes = &w->shared->rank_loaded_bytes[w->env->rank],
                                           .on_progress = on_progress,
                                           .on_lost = on_lost,
                                           .arg = w};
    comm_at(w->env->comm, OP_LOAD, -1);
    start_of(w)->load_ns = clock_now_ns();
    return model_load(&w->model, &options, err);
}

static bool is_stopped(void *arg) { return rank_is_stopped(((const struct worker *)arg)->env); }

// The number of the rank for the choice of its device: ranks of a launcher are counted on each host.
static int device_rank(const struct worker *w)
{
    return w->env->spread && w->options->local_rank >= 0 ? w->options->local_rank : w->env->rank;
}

static int begin_transport(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    bool spread = w->env->spread;
    struct rank_transport_options options = {.backend = o->backend,
                                             .wanted = o->transport,
                                             .is_auto = o->transport_is_auto,
                                             .spread = spread,
                                             .comm = spread ? comm_stage(w->env->comm) : w->env->comm,
                                             .first = spread ? w->env->rank - w->env->rank % w->env->tp_size : 0,
                                             .tp_size = w->env->tp_size,
                                             .device_rank = device_rank(w),
                                             .links = o->links,
                                             .link_problem = o->link_problem,
                                             .stopped = is_stopped,
                                             .arg = w};
    return rank_transport_begin(&w->settled, &options, err);
}

// Who adds up the ranks' sums. All ranks then have the same row of the table of exchanges.
static int open_exchange(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct decoder *d = &w->decoder;
    struct exchange_wish wish = {
        .transport = w->settled.transport, .or_host = o->transport_is_auto, .feedback = o->feedback};
    int rc =
        device_exchange_open(&w->exchange, &d->transport, o->backend, w->device, d->comm, wish, w->exchange_note, err);
    d->feedback = o->feedback;
    if (w->env->rank == 0)
        atomic_store(&w->shared->transport, d->transport);
    if (rc || d->transport == o->transport)
        return rc;
    struct comm_select_options table = {
        .transport = d->transport, .tp_size = comm_size(d->comm), .wire = o->wire, .feedback = o->feedback};
    return comm_select_agree(d->comm, comm_select_hash(&table), err);
}

// Everything that computes, with weights that are on their way.
static int open_device(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct device_options options = {
        .kernels = o->kernels, .pool = w->pool, .rank = device_rank(w), .tp_size = w->env->tp_size, .device = -1};
    struct device_shape shape = {.desc = &w->model.desc,
                                 .share = &w->model.share,
                                 .max_rows = rank_step_pass_rows(o->backend, &o->limits),
                                 .max_sequences = o->max_sequences,
                                 .decode_rows = o->limits.decode_rows,
                                 .context = o->context,
                                 .num_pages = o->num_pages,
                                 .kv_format = o->kv_format,
                                 .samples = decoder_samples(&w->decoder),
                                 .feedback = o->feedback};
    int rc;
    if ((rc = begin_transport(w, err)) || (rc = o->backend->open(&w->device, &options, err)) ||
        (rc = rank_transport_settle(&w->settled, w->device, err)))
        return rc;
    rank_transport_end(&w->settled); // what tried the links has let go of the devices
    shape.exchange = w->settled.transport;
    if ((rc = settle_memory(w, &shape, err)) || (rc = begin_load(w, err)) ||
        (rc = o->backend->prepare(w->device, &shape, &w->model.weights, err)) || (rc = open_exchange(w, err)))
        return rc;
    char *text = w->shared->device[w->env->rank];
    o->backend->describe(w->device, text);
    bool unchecked = o->check_sums > 0 && !decoder_devices_exchange(&w->decoder) && comm_rank(w->decoder.comm) == 0;
    const char *const notes[] = {w->settled.note, w->exchange_note,
                                 unchecked ? "--check-sums checks nothing: the processors add up" : ""};
    for (size_t i = 0; i < sizeof notes / sizeof *notes; i++)
        if (notes[i][0])
            snprintf(text + strlen(text), DEVICE_TEXT_BYTES - strlen(text), "; %s", notes[i]);
    w->area.num_pages = shape.num_pages;
    if (w->env->rank == 0)
        atomic_store(&w->shared->num_pages, shape.num_pages);
    return 0;
}

// Waits until all is there and says how that went.
static int finish_load(struct worker *w, struct error *err)
{
    struct rank_start *start = start_of(w);
    struct rusage used;
    comm_at(w->env->comm, OP_LOAD, -1);
    int rc = model_finish(&w->model, err);
    if (rc)
        return rc;
    loader_figures(w->model.loader, &start->load);
    const char *note = store_file_note(w->model.source);
    snprintf(start->note, sizeof start->note, "%s", note ? note : "");
    getrusage(RUSAGE_SELF, &used); // of a rank that has computed meanwhile, too
    start->cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    atomic_store(&start->loaded_ns, start->load_ns + (int64_t)(1e9 * start->load.wall_s));
    numa_gather_pages(&w->place, w->model.base, shard_file_payload_bytes(w->model.file));
    return 0;
}

// Whether prompts are cut in two parts, the same on every rank of the stage. The device is prepared, and who exchanges is settled.
static int choose_parts(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct decoder *d = &w->decoder;
    uint8_t mine, all[COMM_MAX_RANKS];
    bool expands = false;
    int rc;
    if (!o->backend->window || comm_size(d->comm) == 1 || o->residual_rows > 0 || o->overlap == OVERLAP_OFF)
        return 0;
    mine = o->backend->expands && o->backend->expands(w->device);
    if ((rc = comm_all_gather(d->comm, all, &mine, sizeof mine, err)))
        return rc;
    for (int r = 0; r < comm_size(d->comm); r++)
        expands = expands || all[r];
    d->in_parts = comm_select_overlaps(d->transport, comm_is_local(d->comm), expands, &d->part_bytes);
    if (o->overlap == OVERLAP_ON) {
        d->in_parts = true;
        d->part_bytes = 0;
    }
    d->in_large_parts = o->overlap == OVERLAP_AUTO;
    int64_t longest = o->limits.prefill_rows < o->context ? o->limits.prefill_rows : o->context; // of a prompt's steps
    if (w->env->rank == 0)
        atomic_store(&w->shared->in_parts, parts_cut(d, longest, decoder_mixes(d) ? PHASE_DECODE : PHASE_PREFILL));
    return 0;
}

// What a rank of another process tells rank 0 of its start, as its own parent sees it.
struct told_start {
    struct rank_start start;
    int64_t file_bytes, loaded_bytes;
    char device[DEVICE_TEXT_BYTES];
};

// Rank 0's parent reads all ranks' figures in its own memory. Hosts have clocks of their own: what others did is told as if they had begun with rank 0.
static int tell_start(struct worker *w, struct error *err)
{
    struct told_start mine, *all = calloc((size_t)w->env->num_ranks, sizeof *all);
    struct shared_area *shared = w->shared;
    int rank = w->env->rank;
    if (!all)
        return error_set(err, ERR_MEMORY, "no memory for the ranks' figures");
    memset(&mine, 0, sizeof mine);
    memcpy(&mine.start, &shared->starts[rank], sizeof mine.start);
    memcpy(mine.device, shared->device[rank], sizeof mine.device);
    mine.file_bytes = atomic_load(&shared->rank_payload_bytes[rank]);
    mine.loaded_bytes = atomic_load(&shared->rank_loaded_bytes[rank]);
    int rc = comm_all_gather(w->env->comm, all, &mine, sizeof mine, err);
    for (int r = 1; r < w->env->num_ranks && rank == 0 && !rc; r++) {
        int64_t shift = shared->starts[0].begin_ns - all[r].start.begin_ns;
        long long loaded_ns = atomic_load(&all[r].start.loaded_ns);
        atomic_store(&all[r].start.loaded_ns, loaded_ns ? loaded_ns + shift : 0);
        all[r].start.begin_ns += shift;
        all[r].start.opened_ns += shift;
        all[r].start.load_ns += shift;
        all[r].start.prepared_ns += shift;
        memcpy(&shared->starts[r], &all[r].start, sizeof all[r].start);
        memcpy(shared->device[r], all[r].device, sizeof all[r].device);
        atomic_store(&shared->rank_payload_bytes[r], all[r].file_bytes);
        atomic_store(&shared->rank_loaded_bytes[r], all[r].loaded_bytes);
    }
    free(all);
    return rc;
}

static int worker_open(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct rank_start *start = start_of(w);
    int rc;
    start->begin_ns = clock_now_ns();
    w->area = (struct step_area){
        .context = o->context, .max_sequences = o->max_sequences, .vocab_size = o->manifest->model.vocab_size};
    w->forward = worker_forward_area(o);
    struct part_area parts = worker_part_area(o);
    shared_area_place(w->shared, &w->area, &w->forward, &parts);
    residual_tap_init(&w->tap, w->forward.residual, o->residual_rows);
    if ((rc = agree(w, err)) || (rc = keep_to_place(w, err)) ||
        (rc = model_open(&w->model, o->place, &o->store, o->manifest, w->env->rank, w->env->comm, err)))
        return rc;
    comm_count_layers_from(w->env->comm, (int)w->model.layer_begin);
    atomic_store(&w->shared->rank_payload_bytes[w->env->rank], (long long)shard_file_payload_bytes(w->model.file));
    start->opened_ns = clock_now_ns();
    if ((rc = check_shares(w, err)) || (rc = thread_pool_create(&w->pool, o->threads, err)))
        return rc;
    w->decoder = (struct decoder){.model = &w->model,
                                  .backend = o->backend,
                                  .comm = comm_stage(w->env->comm),
                                  .world = w->env->comm,
                                  .wire = o->wire,
                                  .pool = w->pool};
    if (o->residual_rows > 0 && w->env->rank % w->env->tp_size == 0)
        w->decoder.watch = &w->tap.watch;
    w->decoder.deals = o->deals;
    w->decoder.shows_residual = o->residual_rows > 0;
    w->decoder.common = parts;
    if ((rc = open_device(w, err)) || (rc = choose_parts(w, err)))
        return rc;
    w->decoder.device = w->device;
    int64_t rows = rank_step_pass_rows(o->backend, &o->limits), hidden = w->model.desc.hidden_size;
    bool by_host = !decoder_devices_exchange(&w->decoder);
    if (by_host && o->feedback && !(w->decoder.lost = calloc((size_t)(rows * hidden), sizeof *w->decoder.lost)))
        return error_set(err, ERR_MEMORY, "no memory for the wire's losses of %lld rows", (long long)rows);
    if (o->check_sums > 0 && !by_host &&
        (rc = sum_check_create(&w->decoder.check, o->check_sums, rows, hidden, o->feedback, err)))
        return rc;
    if ((rc = rank_step_create(&w->step, &w->decoder, &o->limits, o->usual_choices, err)))
        return rc;
    if (!w->env->spread) // the last stage counts in another process
        rank_step_count_passes(w->step, &w->shared->passes);
    if (w->decoder.in_parts && by_host && (rc = exchanger_create(&w->decoder.exchanger, w->decoder.comm, err)))
        return rc;
    // Now that the threads which load have been started, on any of the rank's processors.
    if (o->pin == PIN_CORE && (rc = thread_pool_pin(w->pool, &w->place.cpus, err)))
        return rc;
    start->prepared_ns = clock_now_ns();
    if ((rc = o->load_first ? finish_load(w, err) : 0) || !w->env->spread)
        return rc;
    return (rc = relay_create(&w->relay, w->env->comm, &w->area, err)) ? rc : tell_start(w, err);
}

// ---- commands --------------------------------------------------------------------------------------------------

static int run_forward(struct worker *w, struct error *err)
{
    int64_t start = w->shared->forward.start, count = w->shared->forward.count;
    int32_t sequence = w->shared->forward.sequence;
    enum wire wire = w->shared->forward.wire;
    if (count > w->options->logits_rows || (unsigned)wire >= WIRE_COUNT)
        return error_set(err, ERR_OTHER, "logits of %lld tokens over wire %d are asked for; there is room for %lld",
                         (long long)count, (int)wire, (long long)w->options->logits_rows);
    int rc = step_check_forward(&w->area, sequence, start, count, err);
    if (rc)
        return rc;
    w->tap.next = 0;
    w->decoder.wire = wire;
    rc = rank_step_forward(w->step, &w->area, sequence, start, count, w->forward.logits + w->model.share.vocab_begin,
                           w->area.vocab_size, err);
    w->decoder.wire = w->options->wire;
    return rc;
}

// The other processes' parts of the logits come to rank 0, from the last stage.
static int gather_logits(struct worker *w, struct error *err)
{
    const int64_t most = COMM_GATHER_MAX_BYTES / (int64_t)sizeof(float);
    int tp_size = w->env->tp_size, last = w->env->num_ranks - tp_size, rc = 0;
    for (int r = last > 0 ? 0 : 1; r < tp_size; r++)
        for (int64_t row = 0; row < w->shared->forward.count; row++)
            for (int64_t at = 0; at < w->vocab_local[r] && !rc; at += most) {
                int64_t count = w->vocab_local[r] - at < most ? w->vocab_local[r] - at : most;
                float *part = w->forward.logits + row * w->area.vocab_size + w->vocab_begin[r] + at;
                rc = comm_broadcast(w->env->comm, part, (size_t)count * sizeof *part, last + r, err);
            }
    return rc;
}

static int run_step(struct worker *w, struct error *err)
{
    const struct comm *stage = w->decoder.comm;
    uint64_t sent = comm_sent_bytes(stage) + w->decoder.device_sent_bytes;
    int64_t exchanges = w->decoder.exchanges, exchange_ns = w->decoder.exchange_ns;
    int rc = rank_step_run(w->step, &w->area, err);
    struct rank_step_rows rows = rank_step_rows(w->step);
    if (rc || w->env->rank > 0 || rows.prefill > 0 || rows.decode == 0)
        return rc;
    atomic_fetch_add_explicit(&w->shared->decode_steps, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->shared->decode_rows, rows.decode, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->shared->decode_sent_bytes,
                              (long long)(comm_sent_bytes(stage) + w->decoder.device_sent_bytes - sent),
                              memory_order_relaxed);
    atomic_fetch_add_explicit(&w->shared->decode_exchanges, w->decoder.exchanges - exchanges, memory_order_relaxed);
    atomic_fetch_add_explicit(&w->shared->decode_exchange_ns, w->decoder.exchange_ns - exchange_ns,
                              memory_order_relaxed);
    return 0;
}

// While a model is being loaded, devices wait for each other's ranks before each sum (decoder_parts.c): all ranks of a stage end that between the
// same two commands, when the last of them has its weights.
static int all_have_weights(const struct worker *w, bool *out, struct error *err)
{
    uint8_t mine = loader_is_done(w->model.loader), all[COMM_MAX_RANKS];
    int rc = comm_all_gather(w->decoder.comm, all, &mine, sizeof mine, err);
    *out = true;
    for (int r = 0; r < comm_size(w->decoder.comm) && !rc; r++)
        *out = *out && all[r];
    return rc;
}

// Before a result leaves: see worker.h.
static int settle_load(struct worker *w, struct error *err)
{
    bool all = true;
    int rc;
    if (w->model.loaded)
        return 0;
    if (w->options->verify == VERIFY_OFF && ((rc = all_have_weights(w, &all, err)) || !all))
        return rc;
    return finish_load(w, err);
}

static int run_command(struct worker *w, int command, struct error *err)
{
    int rc = command == COMMAND_FORWARD ? run_forward(w, err)
             : command == COMMAND_STEP  ? run_step(w, err)
                                        : error_set(err, ERR_OTHER, "rank %d: command %d", w->env->rank, command);
    atomic_store_explicit(&w->shared->rank_exchange_ns[w->env->rank], w->decoder.exchange_ns, memory_order_relaxed);
    atomic_store_explicit(&w->shared->rank_stage_wait_ns[w->env->rank], w->decoder.stage_wait_ns, memory_order_relaxed);
    if (rc || (rc = settle_load(w, err)) || !w->relay)
        return rc;
    if (command == COMMAND_FORWARD && (rc = gather_logits(w, err)))
        return rc;
    // Rank 0's result leaves when the others have verified what they computed from, too.
    bool first = !w->told_start;
    w->told_start = true;
    return first ? tell_start(w, err) : 0;
}

// From the parent, or from rank 0 of another process.
static int next_command(struct worker *w, int *command, struct error *err)
{
    struct relay_forward forward;
    int rc;
    if (w->env->rank > 0 && w->relay) {
        rank_is_ready(w->env);
        if ((rc = relay_receive(w->relay, command, &forward, err)))
            return rc;
        w->shared->forward.start = forward.start;
        w->shared->forward.count = forward.count;
        w->shared->forward.sequence = forward.sequence;
        w->shared->forward.wire = (enum wire)forward.wire;
        return 0;
    }
    if ((rc = rank_next_command(w->env, command, err)) || !w->relay)
        return rc;
    enum relay_kind kind = *command == COMMAND_STEP      ? RELAY_STEP
                           : *command == COMMAND_FORWARD ? RELAY_FORWARD
                                                         : RELAY_PLAIN;
    forward = (struct relay_forward){.start = w->shared->forward.start,
                                     .count = w->shared->forward.count,
                                     .sequence = w->shared->forward.sequence,
                                     .wire = (int32_t)w->shared->forward.wire};
    return relay_send(w->relay, *command, kind, &forward, err);
}

int worker_main(struct rank_env *env, void *arg, struct error *err)
{
    struct worker *w = calloc(1, sizeof *w);
    if (!w)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", env->rank);
    w->env = env;
    w->options = arg;
    w->shared = env->shared;
    int rc = worker_open(w, err);
    while (rc == 0) {
        int command;
        if ((rc = next_command(w, &command, err)) || command == 0)
            break;
        if ((rc = run_command(w, command, err)) == 0)
            rank_command_done(env);
    }
    if (rc)
        rank_failed(env, rc, err); // first: to close may wait for the others' devices
    worker_close(w);
    free(w);
    return rc;
}

// The parent's end of a running model. See session.h.
#include "engine/session_internal.h"

#include "engine/backends.h"
#include "engine/rank_step.h"
#include "formats/checked.h"
#include "kernels/clock.h"
#include "kernels/host_memory.h"
#include "kernels/kv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOKENIZER_FILE_NAME "tokenizer.bin"
#define TOKENIZER_CAP_BYTES (1ull << 30)

const struct session_options session_defaults = {
    .backend = "auto",
    .kv_cache = "bf16",
    .wire = "auto",
    .wire_feedback = "auto",
    .transport = "auto",
    .sequence_parallel = "auto",
    .overlap = "auto",
    .verify = "full",
    .load = "auto",
    .ranks = "process",
    .pin = "node",
    .timeout_s = 10,
    .launcher = {.launcher = "auto",
                 .rank = LAUNCHER_NOT_GIVEN,
                 .world_size = LAUNCHER_NOT_GIVEN,
                 .local_rank = LAUNCHER_NOT_GIVEN},
    .join_timeout_s = 300,
    .default_context = 4096,
};

// ---- tokenizer -------------------------------------------------------------------------------------------------

int tokenizer_file_open(struct tokenizer_file *out, struct store *store, const struct manifest *manifest,
                        struct error *err)
{
    struct tokenizer_file file = {0};
    char path[4096];
    uint64_t byte_count;
    int rc = store_extra(&file.bytes, &byte_count, store, manifest, TOKENIZER_FILE_NAME, TOKENIZER_CAP_BYTES, err);
    if (!rc && !file.bytes)
        rc = error_set(
            err, ERR_MODEL,
            "%s: the shards were made without a tokenizer.json; put one beside the checkpoint and shard again",
            store_place(store));
    if (rc)
        return rc;
    snprintf(path, sizeof path, "%s/%s", store_place(store), TOKENIZER_FILE_NAME);
    if ((rc = tokenizer_open(&file.tokenizer, file.bytes, byte_count, path, err)))
        goto fail;
    *out = file;
    return 0;
fail:
    tokenizer_file_close(&file);
    return rc;
}

void tokenizer_file_close(struct tokenizer_file *file)
{
    tokenizer_close(file->tokenizer);
    free(file->bytes);
    *file = (struct tokenizer_file){0};
}

int session_tokenizer(struct session *s, const struct tokenizer **out, struct error *err)
{
    int rc = 0;
    if (!s->tokenizer.tokenizer)
        rc = tokenizer_file_open(&s->tokenizer, s->store, s->manifest, err);
    *out = s->tokenizer.tokenizer;
    return rc;
}

// ---- memory plan -----------------------------------------------------------------------------------------------

// Largest share any rank can have, for an upper bound before the rank files are read.
static struct rank_share upper_share(const struct model_desc *d, int64_t tp)
{
    struct rank_share share = {0};
    share.num_heads_local = (int64_t)div_up((uint64_t)d->num_heads, (uint64_t)tp);
    share.num_kv_heads_local = d->num_kv_heads < share.num_heads_local ? d->num_kv_heads : share.num_heads_local;
    if (tp <= d->num_kv_heads)
        share.num_kv_heads_local = (int64_t)div_up((uint64_t)d->num_kv_heads, (uint64_t)tp);
    share.intermediate_local = (int64_t)div_up((uint64_t)d->intermediate_size, (uint64_t)tp);
    share.shared_size_local = (int64_t)div_up((uint64_t)d->experts.shared_size, (uint64_t)tp);
    share.num_experts_local =
        d->experts.num_experts; // whole experts, or a slice of each: rows of all are kept either way
    share.expert_size_local = d->experts.expert_size;
    return share;
}

static uint64_t shared_bytes(const struct session *s)
{
    struct step_area area = s->area;
    struct forward_area forward = worker_forward_area(&s->worker);
    struct part_area parts = worker_part_area(&s->worker);
    return shared_area_place(NULL, &area, &forward, &parts);
}

static struct device_shape rank_shape(const struct session *s, const struct rank_share *share, int64_t rows)
{
    return (struct device_shape){.desc = &s->manifest->model,
                                 .share = share,
                                 .max_rows = rows,
                                 .max_sequences = s->worker.max_sequences,
                                 .decode_rows = s->worker.limits.decode_rows,
                                 .context = s->worker.context,
                                 .samples = s->manifest->num_ranks == 1};
}

// What the wire has lost, and what is checked.
static uint64_t extra_row_bytes(const struct session *s)
{
    uint64_t hidden = (uint64_t)s->manifest->model.hidden_size, lost = s->worker.feedback ? 2 * hidden : 0;
    return s->worker.check_sums > 0 ? lost + 4 * hidden : lost;
}

// Of one rank on the host, for steps of so many rows.
static uint64_t rank_buffer_bytes(const struct session *s, int64_t rows)
{
    struct rank_share share = upper_share(&s->manifest->model, s->manifest->tp_size);
    struct device_shape shape = rank_shape(s, &share, rows);
    return s->worker.backend->host_bytes(&shape, s->worker.threads) + (uint64_t)rows * extra_row_bytes(s);
}

// Where the devices of this host's ranks exchange through its memory: a region for each stage.
static uint64_t exchange_region_bytes(const struct session *s)
{
    bool through_host = s->worker.transport == TRANSPORT_HOST || s->worker.transport == TRANSPORT_P2P;
    int ranks = (int)s->manifest->tp_size;
    return through_host && ranks > 1 ? s->manifest->pp_size * s->worker.backend->exchange_bytes(ranks) : 0;
}

// The host's memory. Weights that are used where the file is mapped need not fit at once, but the engine is useless when they do not; all others are
// memory of the rank's own, as much of it. The KV cache is made smaller, as far as it may. What a device must hold, and what compressed files
// become, the ranks check.
static int settle_memory(struct session *s, double available, struct error *err)
{
    int64_t context = s->worker.context;
    const struct model_desc *d = &s->manifest->model;
    int64_t tp = s->manifest->tp_size;
    struct rank_share share = upper_share(d, tp);
    int64_t rows = rank_step_pass_rows(s->worker.backend, &s->worker.limits);
    double weights = 0, cache = 0;
    // Of spread ranks those on this host count, which may not be known.
    bool spread = s->where.world_size > 1;
    double here = !spread ? (double)s->manifest->num_ranks : s->where.local_size > 0 ? s->where.local_size : 1;
    double buffers = (double)(shared_bytes(s) + exchange_region_bytes(s)) + here * (double)rank_buffer_bytes(s, rows);
    if (s->worker.backend == &backend_cpu) {
        for (size_t i = 0; i < s->manifest->num_ranks; i++)
            weights += (double)s->manifest->ranks[i].bytes * here / (double)s->manifest->num_ranks;
        cache = here * (double)kv_bytes(d, &share, s->worker.num_pages, s->worker.kv_format);
    }
    double needed = weights + cache + buffers;
    s->needed_bytes = needed;
    if (needed <= available)
        return 0;
    // Other programs need memory too; what is cut is cut with room to spare.
    double left = (available - weights - buffers) * 0.8, wanted = (double)s->worker.num_pages;
    if (left > 0 && floor(wanted * left / cache) >= (double)s->worker.least_pages) {
        s->worker.num_pages = (int64_t)floor(wanted * left / cache);
        s->needed_bytes = weights + buffers + left;
        return 0;
    }
    return error_set(err, ERR_MEMORY,
                     "%s: %.2f GiB needed (weights %.2f, KV cache %.2f at context %lld, buffers %.2f), %.2f GiB "
                     "available; use a smaller "
                     "--context or stronger quantization",
                     s->dir, needed / 0x1p30, weights / 0x1p30, cache / 0x1p30, (long long)context, buffers / 0x1p30,
                     available / 0x1p30);
}

// ---- opening ---------------------------------------------------------------------------------------------------

static enum verify_mode verify_mode_of(const char *name)
{
    return strcmp(name, "off") == 0 ? VERIFY_OFF : strcmp(name, "sample") == 0 ? VERIFY_SAMPLE : VERIFY_FULL;
}

static int default_threads(int64_t num_ranks)
{
    int cores = thread_pool_default_threads();
    return cores > num_ranks ? cores / (int)num_ranks : 1;
}

static int choose_context(const struct manifest *manifest, const struct session_options *options, int64_t *context,
                          struct error *err)
{
    int64_t limit = manifest->model.context, wanted = options->context, otherwise = options->default_context;
    if (wanted > limit)
        return error_set(err, ERR_USAGE, "--context %lld: the model was made for at most %lld tokens",
                         (long long)wanted, (long long)limit);
    *context = wanted > 0 ? wanted : limit < otherwise ? limit : otherwise;
    return 0;
}

int session_settle(struct session *s, const struct session *other, struct error *err)
{
    double available = host_memory_available(), taken = other && !other->launch ? other->needed_bytes : 0;
    s->worker.num_pages = s->wanted_pages;
    int rc = settle_memory(s, available < 0 ? INFINITY : available - taken, err);
    s->settled = !rc;
    return rc;
}

// A pass' residual goes from stage to stage as one message; two of a few megabytes are kept ready for a stage that is busy.
static uint64_t message_bytes(const struct session *s)
{
    enum { MOST_BYTES = 4 << 20 };
    uint64_t rows = (uint64_t)rank_step_pass_rows(s->worker.backend, &s->worker.limits);
    uint64_t bytes = rows * (uint64_t)s->manifest->model.hidden_size * sizeof(float);
    return s->manifest->pp_size == 1 ? 0 : bytes < MOST_BYTES ? bytes : MOST_BYTES;
}

struct launch_options session_launch_options(const struct session *s, int *links)
{
    return (struct launch_options){
        .tp_size = (int)s->manifest->tp_size,
        .pp_size = (int)s->manifest->pp_size,
        .threads = s->ranks_are_threads,
        .leave_signals = s->leave_signals,
        .wait_timeout_ms = s->timeout_ms,
        .links = links,
        .only = s->where.rank,
        .mpi = links && s->worker.transport == TRANSPORT_MPI,
        .comm_max_elems = (uint64_t)s->manifest->model.hidden_size * 64,
        .comm_message_bytes = message_bytes(s),
        .shared_bytes = shared_bytes(s),
    };
}

void session_place(struct session *s)
{
    s->shared = launch_shared(s->launch);
    s->forward = worker_forward_area(&s->worker);
    struct part_area parts = worker_part_area(&s->worker);
    shared_area_place(s->shared, &s->area, &s->forward, &parts);
}

// Before the first rank that is a thread, though it may be alone: a later session's ranks in this process can be several, and the driver then lives.
static void prepare_threads(const struct session *s)
{
    static bool prepared;
    if (!s->ranks_are_threads || prepared || !s->worker.backend->before_threads)
        return;
    s->worker.backend->before_threads();
    prepared = true;
}

int session_launch(struct session *s, struct error *err)
{
    int links[COMM_MAX_RANKS];
    bool spread = s->where.world_size > 1;
    if (s->launch)
        return 0;
    if (spread && s->manifest->pp_size > 1 && s->worker.residual_rows > 0)
        return error_set(err, ERR_USAGE,
                         "%s: the residual stream of several stages can be shown where all of them run in "
                         "one process' ranks: give --launcher none",
                         s->dir);
    s->start = (struct start_figures){.open_ns = s->start.open_ns, .launch_ns = clock_now_ns()};
    int rc = spread ? session_meet(s, links, err) : s->settled ? 0 : session_settle(s, NULL, err);
    if (rc)
        return rc;
    const struct launch_options launch = session_launch_options(s, spread ? links : NULL);
    if ((rc = session_begin_links(s, err)))
        return rc;
    prepare_threads(s);
    if ((rc = launch_start(&s->launch, &launch, worker_main, &s->worker, err))) {
        session_end_links(s);
        return rc;
    }
    session_place(s);
    return 0;
}

int session_wait(struct session *s, int extra_fd, struct error *err)
{
    if (!s->launch)
        return error_set(err, ERR_OTHER, "%s: no rank was started", s->dir);
    int rc = launch_wait(s->launch, extra_fd, err);
    if (rc == 0 && !s->ready) {
        s->ready = true;
        session_end_links(s);
        s->area.num_pages = atomic_load(&s->shared->num_pages);
    }
    return rc;
}

int session_start(struct session *s, struct error *err)
{
    int rc = session_launch(s, err);
    while (!rc && !s->ready)
        rc = session_wait(s, -1, err);
    return rc;
}

// The parts that are there to be read.
static void take_start(const struct rank_start *from, struct rank_start *to)
{
    to->begin_ns = from->begin_ns;
    to->opened_ns = from->opened_ns;
    to->load_ns = from->load_ns;
    to->prepared_ns = from->prepared_ns;
    long long loaded_ns = atomic_load(&from->loaded_ns);
    if (!loaded_ns)
        return;
    to->cpu_s = from->cpu_s;
    to->load = from->load;
    memcpy(to->note, from->note, sizeof to->note);
    atomic_store(&to->loaded_ns, loaded_ns);
}

const struct start_figures *session_start_figures(struct session *s)
{
    for (uint32_t r = 0; s->ready && r < s->manifest->num_ranks; r++)
        take_start(&s->shared->starts[r], &s->start.ranks[r]);
    return &s->start;
}

double session_load_s(const struct session *s)
{
    int64_t begin_ns = INT64_MAX, loaded_ns = 0;
    for (uint32_t r = 0; s->ready && r < s->manifest->num_ranks; r++) {
        const struct rank_start *start = &s->shared->starts[r];
        int64_t end_ns = atomic_load(&start->loaded_ns);
        if (end_ns == 0)
            return 0;
        begin_ns = start->begin_ns < begin_ns ? start->begin_ns : begin_ns;
        loaded_ns = end_ns > loaded_ns ? end_ns : loaded_ns;
    }
    return loaded_ns ? 1e-9 * (double)(loaded_ns - begin_ns) : 0;
}

void session_stop(struct session *s)
{
    bool lost = s->launch && launch_lost_rank(s->launch) >= 0;
    session_start_figures(s);
    scheduler_free(s->scheduler);
    launch_stop(s->launch, NULL);
    session_end_links(s);
    if (lost)
        session_doubt_links();
    s->scheduler = NULL;
    s->launch = NULL;
    s->shared = NULL;
    s->ready = s->settled = false;
}

// What the kernels and ranks of this version can run.
static int check_supported(const struct manifest *manifest, const char *dir, struct error *err)
{
    const struct latent_desc *latent = &manifest->model.latent;
    int64_t key_dim = latent->kv_rank > 0 ? latent->kv_rank + latent->rope_dim : manifest->model.head_dim;
    int64_t limit = latent->kv_rank > 0 ? KERNELS_MAX_KEY_DIM : KERNELS_MAX_HEAD_DIM;
    if (key_dim > limit)
        return error_set(err, ERR_MODEL, "%s: keys of %lld elements; this version's attention takes at most %lld", dir,
                         (long long)key_dim, (long long)limit);
    if (manifest->num_ranks > COMM_MAX_RANKS)
        return error_set(err, ERR_MODEL, "%s: cut for %zu ranks; this version runs at most %d", dir,
                         manifest->num_ranks, COMM_MAX_RANKS);
    return 0;
}

static int64_t host_rows(const struct session *s, int64_t most, int64_t least)
{
    const struct manifest *m = s->manifest;
    struct rank_share share = upper_share(&m->model, m->tp_size);
    struct device_shape shape = rank_shape(s, &share, most);
    uint64_t parts = worker_sums_in_common(&s->worker) ? cpu_parts_row_bytes((int)m->tp_size, m->model.hidden_size) : 0;
    return cpu_step_rows(&shape, s->worker.threads, extra_row_bytes(s) + parts, least);
}

// What a step may hold. On a device decode rows cost memory for attention's parts, but a sequence that is computed again wants more of them than
// one.
static void plan_steps(struct session *s, const struct session_options *options)
{
    enum { LEAST_DECODE_ROWS = 16 };
    const struct backend *backend = s->worker.backend;
    int64_t sequences = s->worker.max_sequences, usual = sequences * (1 + options->draft_tokens);
    int64_t wanted = sequences > 1 && usual < LEAST_DECODE_ROWS ? LEAST_DECODE_ROWS : usual;
    struct step_limits *limits = &s->worker.limits;
    limits->decode_rows = backend->mixes_phases || wanted > backend->decode_rows ? backend->decode_rows : wanted;
    bool shorter = options->prefill_rows > 0 && options->prefill_rows < backend->prefill_rows;
    limits->prefill_rows = shorter ? options->prefill_rows : backend->prefill_rows;
    limits->max_rows = backend->mixes_phases ? backend->prefill_rows : limits->prefill_rows + limits->decode_rows;
    if (backend == &backend_cpu) {
        limits->max_rows = host_rows(s, limits->max_rows, usual);
        limits->decode_rows = limits->decode_rows < limits->max_rows ? limits->decode_rows : limits->max_rows;
        limits->prefill_rows = limits->prefill_rows < limits->max_rows ? limits->prefill_rows : limits->max_rows;
    }
    limits->chunk = backend->chunks_fixed ? limits->prefill_rows : 1;
    s->worker.usual_choices = usual;
}

static int plan_pages(struct session *s, const struct session_options *options, struct error *err)
{
    int64_t of_one = (int64_t)div_up((uint64_t)s->worker.context, KV_PAGE_TOKENS), tokens = options->kv_tokens;
    if (tokens > INT32_MAX / 2)
        return error_set(err, ERR_USAGE, "a KV cache of %lld tokens is larger than this version keeps",
                         (long long)tokens);
    int64_t wanted = tokens > 0 ? (int64_t)div_up((uint64_t)tokens, KV_PAGE_TOKENS) : of_one * s->worker.max_sequences;
    s->wanted_pages = wanted < INT32_MAX ? wanted : INT32_MAX;
    s->worker.least_pages = tokens == 0 && options->kv_fits && of_one < wanted ? of_one : wanted;
    return 0;
}

// What is taken as it was given. The manifest, the launcher's place and the backend are known.
static void take_options(struct session *s, const struct session_options *options)
{
    struct worker_options *w = &s->worker;
    bool spread = s->where.world_size > 1;
    int64_t here = !spread ? (int64_t)s->manifest->num_ranks : s->where.local_size > 0 ? s->where.local_size : 1;
    s->token_file = options->token_file;
    s->join_timeout_ms = (int)(options->join_timeout_s * 1000);
    s->timeout_ms = (int)(options->timeout_s * 1000);
    s->leave_signals = options->leave_signals;
    s->recomputes = options->recomputes;
    s->draft_tokens = options->draft_tokens;
    s->ranks_are_threads = w->ranks_are_threads = strcmp(options->ranks, "thread") == 0;
    w->place = s->raw_place;
    w->manifest = s->manifest;
    w->store = options->store;
    w->store.needs_one_version = strcmp(options->verify, "full") != 0;
    w->local_rank = s->where.local_rank;
    w->local_size = s->where.local_rank >= 0 ? s->where.local_size : 0;
    w->threads = options->threads > 0 ? (int)options->threads : default_threads(here);
    w->verify = verify_mode_of(options->verify);
    load_path_from_name(options->load, &w->load_path);
    w->load_threads = (int)options->load_threads;
    w->load_first = options->load_first;
    w->kv_format = kv_format_from_name(options->kv_cache);
    w->residual_rows = options->residual_rows;
    w->pin = w->backend == &backend_cpu ? numa_pin_from_name(options->pin) : PIN_NONE;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        numa_note(s->threads_note, NUMA_SYSTEM_DIR, &allowed,
                  spread && w->local_size == 0 ? PIN_NONE : (enum numa_pin)w->pin, (int)here, w->threads);
}

static int open_store(struct session *s, const char *place, const struct session_options *options, struct error *err)
{
    int rc;
    if (!(s->raw_place = strdup(place)))
        return error_set(err, ERR_MEMORY, "no memory for a session");
    if ((rc = store_open(&s->store, place, &options->store, err)))
        return rc;
    s->dir = store_place(s->store);
    if ((rc = store_manifest(&s->manifest, s->store, err)))
        return rc;
    return check_supported(s->manifest, s->dir, err);
}

static int choose_backend(struct session *s, const struct session_options *options, struct error *err)
{
    struct backend_choice choice;
    int rc = backends_select(&choice, options->backend, options->cuda_library, err);
    if (rc)
        return rc;
    s->worker.backend = choice.backend;
    s->worker.kernels = choice.kernels;
    s->backend_note = choice.note;
    if (choice.backend != &backend_cpu && strcmp(options->pin, "core") == 0)
        return error_set(err, ERR_USAGE, "--pin core is for the CPU backend; here it is %s", choice.backend->name);
    return 0;
}

int session_open(struct session **out, const char *place, const struct session_options *options, int64_t max_sequences,
                 int64_t logits_rows, struct error *err)
{
    int rc;
    struct session *s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_MEMORY, "no memory for a session");
    s->start.open_ns = clock_now_ns();
    if ((rc = open_store(s, place, options, err)) ||
        (rc = launcher_find(&s->where, &options->launcher, launcher_process_variable, NULL, err)) ||
        (rc = session_check_world(s, err)) || (rc = choose_context(s->manifest, options, &s->worker.context, err)) ||
        (rc = kv_format_check(&s->manifest->model, kv_format_from_name(options->kv_cache), err)) ||
        (rc = choose_backend(s, options, err)) || (rc = session_choose_exchanges(s, options, err)))
        goto fail;
    take_options(s, options);
    session_offer_make(&s->offer, &s->worker, options->given ? options->given : options);
    s->worker.max_sequences = max_sequences;
    s->worker.logits_rows = logits_rows;
    plan_steps(s, options);
    if ((rc = plan_pages(s, options, err)))
        goto fail;
    s->area = (struct step_area){.context = s->worker.context,
                                 .max_sequences = max_sequences,
                                 .vocab_size = s->manifest->model.vocab_size,
                                 .num_pages = s->wanted_pages};
    *out = s;
    return 0;
fail:
    session_close(s);
    return rc;
}

void session_close(struct session *s)
{
    if (!s)
        return;
    session_stop(s);
    tokenizer_file_close(&s->tokenizer);
    manifest_free(s->manifest);
    store_close(s->store);
    free(s->raw_place);
    free(s);
}

const struct manifest *session_manifest(const struct session *s) { return s->manifest; }
struct store *session_store(struct session *s) { return s->store; }
struct shared_area *session_shared(struct session *s) { return s->shared; }
int64_t session_context(const struct session *s) { return s->worker.context; }
const char *session_backend(const struct session *s)
{
    return s->worker.backend == &backend_cpu ? s->worker.kernels->name : s->worker.backend->name;
}

void session_print_devices(struct session *s, FILE *out)
{
    if (s->backend_note)
        fprintf(out, "%s\n", s->backend_note);
    if (s->threads_note[0])
        fprintf(out, "%s\n", s->threads_note);
    for (uint32_t r = 0; r < s->manifest->num_ranks && s->worker.backend != &backend_cpu; r++)
        if (r == 0 || strcmp(s->shared->device[r], s->shared->device[r - 1]) != 0)
            fprintf(out, "rank %u: %s\n", r, s->shared->device[r]);
}
int session_threads(const struct session *s) { return s->worker.threads; }
const char *session_threads_note(const struct session *s) { return s->threads_note; }
bool session_feeds_back(const struct session *s) { return s->worker.feedback; }

const char *session_wire(const struct session *s) { return wire_name(s->worker.wire); }

const char *session_transport(const struct session *s)
{
    return transport_name(s->ready ? (enum transport)atomic_load(&s->shared->transport) : s->worker.transport);
}

const char *session_prefill_way(const struct session *s)
{
    static const char *const ways[2][2] = {{"plain", "overlap"}, {"sequence-parallel", "sequence-parallel+overlap"}};
    return ways[s->worker.deals][s->shared && atomic_load(&s->shared->in_parts)];
}

// How much of a rank's file is in place, by its payload: that of a compressed file is longer.
static int64_t loaded_bytes(const struct session *s, int rank, int64_t file_bytes)
{
    long long loaded = atomic_load_explicit(&s->shared->rank_loaded_bytes[rank], memory_order_relaxed),
              payload = atomic_load_explicit(&s->shared->rank_payload_bytes[rank], memory_order_relaxed);
    if (payload <= 0)
        return 0;
    return loaded >= payload ? file_bytes : (int64_t)((double)file_bytes * ((double)loaded / (double)payload));
}

void session_rank_report(const struct session *s, int rank, struct rank_report *out)
{
    const struct rank_start *start = &s->shared->starts[rank];
    int64_t loaded_ns = atomic_load(&start->loaded_ns), file_bytes = (int64_t)s->manifest->ranks[rank].bytes;
    struct comm_position at = launch_position(s->launch, rank);
    *out = (struct rank_report){
        .pid = launch_pid(s->launch, rank),
        .operation = comm_operation_name(at.op),
        .layer = at.layer,
        .loaded_bytes = loaded_ns ? file_bytes : loaded_bytes(s, rank, file_bytes),
        .file_bytes = file_bytes,
        .exchange_s = 1e-9 * (double)(atomic_load_explicit(&s->shared->rank_exchange_ns[rank], memory_order_relaxed) +
                                      atomic_load_explicit(&s->shared->rank_stage_wait_ns[rank], memory_order_relaxed)),
        .stage_wait_s = 1e-9 * (double)atomic_load_explicit(&s->shared->rank_stage_wait_ns[rank], memory_order_relaxed),
        .device = s->ready ? s->shared->device[rank] : "",
        .lost = launch_lost_rank(s->launch) == rank,
    };
    if (loaded_ns) {
        out->load_s = 1e-9 * (double)(loaded_ns - start->begin_ns);
        out->load_cpu_s = start->cpu_s;
        out->load = start->load;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%lld/status", (long long)out->pid);
    double rss = host_memory_figure(path, "VmRSS:", 1024);
    out->rss_bytes = rss > 0 ? (int64_t)rss : 0;
}

// ---- steps -----------------------------------------------------------------------------------------------------

const struct step_area *session_step_area(const struct session *s) { return &s->area; }

void session_scheduler_options(const struct session *s, struct scheduler_options *out)
{
    const struct worker_options *w = &s->worker;
    *out = (struct scheduler_options){
        .num_pages = s->ready ? s->area.num_pages : s->wanted_pages,
        .context = w->context,
        .max_sequences = w->max_sequences,
        .max_rows = w->limits.max_rows,
        .decode_rows = w->limits.decode_rows,
        .prefill_chunk = w->limits.prefill_rows,
        .chunks_fixed = w->backend->chunks_fixed,
        .phases_differ =
            !w->backend->mixes_phases || w->deals || (wire_is_compressed(w->wire) && s->manifest->tp_size > 1),
        .balance_rows = w->backend->balance_rows,
        .stages = s->manifest->pp_size,
        .staggered_rows = (int64_t)(message_bytes(s) / ((uint64_t)s->manifest->model.hidden_size * sizeof(float))),
    };
}

static int run_command(struct session *s, enum worker_command command, struct error *err)
{
    int rc = launch_post(s->launch, command, err);
    while (!rc && (rc = launch_wait(s->launch, -1, err)) > 0)
        rc = 0;
    return rc;
}

static void have_result(struct session *s)
{
    if (!s->start.first_token_ns)
        s->start.first_token_ns = clock_now_ns();
}

int session_run_step(struct session *s, struct error *err)
{
    int rc =
        s->ready ? run_command(s, COMMAND_STEP, err) : error_set(err, ERR_OTHER, "%s: the ranks are not ready", s->dir);
    if (!rc && s->area.step->num_choices > 0)
        have_result(s);
    return rc;
}

static int run_step(void *session, struct error *err) { return session_run_step(session, err); }

struct step_runner session_runner(struct session *s) { return (struct step_runner){.arg = s, .run = run_step}; }

// ---- logits ----------------------------------------------------------------------------------------------------

int session_check_tokens(const struct session *s, const uint32_t *tokens, int64_t count, struct error *err)
{
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] >= s->manifest->model.vocab_size)
            return error_set(err, ERR_USAGE, "token id %u: the model's vocabulary ends at %lld", tokens[i],
                             (long long)s->manifest->model.vocab_size - 1);
    return 0;
}

const float *session_residual(const struct session *s) { return s->forward.residual; }

int session_forward(struct session *s, const uint32_t *tokens, int64_t count, int64_t start_position,
                    const float **logits, struct error *err)
{
    return session_forward_over(s, s->worker.wire, 0, tokens, count, start_position, logits, err);
}

int session_forward_over(struct session *s, enum wire wire, int32_t sequence, const uint32_t *tokens, int64_t count,
                         int64_t start_position, const float **logits, struct error *err)
{
    int rc = session_check_tokens(s, tokens, count, err);
    if (rc)
        return rc;
    if (sequence < 0 || sequence >= s->worker.max_sequences)
        return error_set(err, ERR_USAGE, "sequence %d of %lld", (int)sequence, (long long)s->worker.max_sequences);
    if (count < 1 || count > s->worker.logits_rows || start_position + count > s->worker.context)
        return error_set(err, ERR_USAGE, "%lld tokens at position %lld: the context is %lld tokens", (long long)count,
                         (long long)start_position, (long long)s->worker.context);
    if ((rc = session_start(s, err)))
        return rc;
    int64_t of_one = s->area.pages_per_sequence, first = sequence * of_one;
    if (s->area.num_pages < first + of_one)
        return error_set(err, ERR_MEMORY, "the KV cache has no room for %lld tokens", (long long)s->worker.context);
    if (start_position == 0) { // pages in order
        for (int64_t i = 0; i < of_one; i++)
            s->area.pages[first + i] = (int32_t)(first + i);
        ++*s->area.pages_version;
    }
    memcpy(s->area.tokens + sequence * s->area.context + start_position, tokens, (size_t)count * sizeof *tokens);
    s->shared->forward.start = start_position;
    s->shared->forward.count = count;
    s->shared->forward.sequence = sequence;
    s->shared->forward.wire = wire;
    if ((rc = run_command(s, COMMAND_FORWARD, err)))
        return rc;
    have_result(s);
    *logits = s->forward.logits;
    return 0;
}

// One rank at work. See worker.h.
#include "engine/worker.h"

#include "engine/decoder.h"
#include "engine/kv_cache.h"
#include "formats/checked.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// ---- the shared area -------------------------------------------------------------------------------------------

static uint64_t tokens_offset(void) { return round_up(sizeof(struct shared_area), 64); }

static uint64_t logits_offset(int64_t context, int64_t max_sequences)
{
    return round_up(tokens_offset() + 2 * (uint64_t)context * (uint64_t)max_sequences * sizeof(uint32_t), 64);
}

uint64_t shared_area_bytes(int64_t context, int64_t max_sequences, int64_t logits_rows, int64_t vocab_size)
{
    return logits_offset(context, max_sequences) + (uint64_t)logits_rows * (uint64_t)vocab_size * sizeof(float);
}

uint32_t *shared_input(struct shared_area *shared, int64_t sequence)
{
    return (uint32_t *)(void *)((uint8_t *)shared + tokens_offset()) + sequence * shared->context;
}

uint32_t *shared_output(struct shared_area *shared, int64_t sequence)
{
    return shared_input(shared, shared->max_sequences + sequence);
}

float *shared_logits(struct shared_area *shared)
{
    return (float *)(void *)((uint8_t *)shared + logits_offset(shared->context, shared->max_sequences));
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// ---- a rank's state --------------------------------------------------------------------------------------------

struct worker {
    struct rank_env *env;
    const struct worker_options *options;
    struct shared_area *shared;
    struct thread_pool *pool;
    struct model model;
    struct device *device;
    struct kv_cache *cache;
    struct decoder decoder;
    struct sampler *sampler; // NULL where the device samples
    struct token_counts counts[MAX_SEQUENCES];
    struct token_row *rows; // [max_rows]
    float *logits;          // [max(max_sequences, 1)][vocab_local], for sampling on the host
};

static void worker_close(struct worker *w)
{
    for (int i = 0; i < MAX_SEQUENCES; i++)
        token_counts_free(&w->counts[i]);
    sampler_free(w->sampler);
    w->options->backend->close(w->device);
    kv_cache_free(w->cache);
    model_close(&w->model);
    thread_pool_free(w->pool);
    free(w->rows);
    free(w->logits);
}

static int64_t resident_bytes(void)
{
    long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f)
        return 0;
    if (fscanf(f, "%*s %lld", &pages) != 1)
        pages = 0;
    fclose(f);
    return pages * sysconf(_SC_PAGESIZE);
}

// What all ranks must agree on before they touch a weight.
struct agreement {
    struct checksum128 contract;
    uint32_t tp_size, wire;
    int64_t context, max_rows, num_pages;
    uint32_t kv_format;
    char backend[16], kernels[16];
};

static int agree(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct agreement mine;
    memset(&mine, 0, sizeof mine);
    comm_at(w->env->comm, OP_HANDSHAKE, -1);
    mine.contract = o->manifest->contract;
    mine.tp_size = o->manifest->tp_size;
    mine.wire = (uint32_t)o->wire;
    mine.context = o->context;
    mine.max_rows = o->max_rows;
    mine.num_pages = o->num_pages;
    mine.kv_format = (uint32_t)o->kv_format;
    snprintf(mine.backend, sizeof mine.backend, "%s", o->backend->name);
    snprintf(mine.kernels, sizeof mine.kernels, "%s", o->kernels->name);
    return comm_handshake(w->env->comm, &mine, sizeof mine, "model contract and options", err);
}

// The ranks' parts must follow each other from 0 to the whole: each knows only its own file.
static int check_shares(struct worker *w, struct error *err)
{
    const struct model_desc *desc = &w->model.desc;
    bool whole_experts = w->options->manifest->experts == EXPERTS_EP;
    struct rank_share all[COMM_MAX_RANKS];
    int rc = comm_all_gather(w->env->comm, all, &w->model.share, sizeof all[0], err);
    int64_t vocab = 0, mlp = 0, heads = 0, shared = 0, experts = 0, expert_mlp = 0;
    for (int r = 0; r < w->env->tp_size && !rc; r++) {
        if (all[r].vocab_begin != vocab || all[r].mlp_begin != mlp || all[r].head_begin != heads ||
            all[r].shared_begin != shared || all[r].expert_begin != (whole_experts ? experts : 0) ||
            all[r].expert_mlp_begin != (whole_experts ? 0 : expert_mlp) ||
            (whole_experts ? all[r].expert_size_local != desc->experts.expert_size
                           : all[r].num_experts_local != desc->experts.num_experts))
            rc = error_set(err, ERR_CORRUPT, "%s: rank %d's share does not begin where rank %d's ends", w->options->dir,
                           r, r - 1);
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
        rc = error_set(err, ERR_CORRUPT, "%s: the ranks' shares do not add up to the model", w->options->dir);
    return rc;
}

// Ranks may share a device: what all of them will take there must fit before any of them takes it.
static int check_device_memory(struct worker *w, const struct device_shape *shape, struct error *err)
{
    const struct worker_options *o = w->options;
    struct memory_need {
        double weights, kv, scratch, available;
        int64_t device;
    } mine = {0}, all[COMM_MAX_RANKS];
    struct memory_plan plan;
    int rc;
    if ((rc = comm_barrier(w->env->comm, err)) || // every rank has opened its device, which takes memory as well
        (rc = o->backend->plan(w->device, shape, &plan, err)))
        return rc;
    mine.device = plan.device;
    mine.weights = (double)shard_file_payload_bytes(w->model.file);
    mine.kv = (double)plan.kv_bytes;
    mine.scratch = (double)plan.scratch_bytes;
    mine.available = (double)plan.available_bytes;
    if ((rc = comm_all_gather(w->env->comm, all, &mine, sizeof mine, err)))
        return rc;
    if (plan.available_bytes == UINT64_MAX)
        return 0;
    struct memory_need sum = {.available = mine.available};
    int sharing = 0;
    for (int r = 0; r < w->env->tp_size; r++) {
        if (all[r].device != mine.device)
            continue;
        sharing++;
        sum.weights += all[r].weights;
        sum.kv += all[r].kv;
        sum.scratch += all[r].scratch;
        sum.available = all[r].available < sum.available ? all[r].available : sum.available;
    }
    double needed = sum.weights + sum.kv + sum.scratch;
    if (needed <= sum.available)
        return 0;
    return error_set(
        err, ERR_MEMORY,
        "%s: device %lld (%d rank%s) needs %.2f GiB (weights %.2f, KV cache %.2f at context %lld, buffers "
        "%.2f) and has %.2f GiB free; use a smaller --context, --kv-cache fp8, stronger quantization or more ranks",
        o->dir, (long long)mine.device, sharing, sharing == 1 ? "" : "s", needed / 0x1p30, sum.weights / 0x1p30,
        sum.kv / 0x1p30, (long long)o->context, sum.scratch / 0x1p30, sum.available / 0x1p30);
}

// The weights on the device, verified, and everything that computes with them.
static int open_device(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    struct device_options options = {
        .kernels = o->kernels, .pool = w->pool, .rank = w->env->rank, .tp_size = w->env->tp_size, .device = -1};
    struct device_shape shape = {.desc = &w->model.desc,
                                 .share = &w->model.share,
                                 .max_rows = o->max_rows,
                                 .max_sequences = o->max_sequences,
                                 .context = o->context,
                                 .num_pages = o->num_pages,
                                 .kv_format = o->kv_format,
                                 .samples = decoder_samples(&w->decoder)};
    int rc;
    if ((rc = o->backend->open(&w->device, &options, err)) || (rc = check_device_memory(w, &shape, err)) ||
        (rc = model_load(&w->model, o->backend, w->device, o->verify, w->pool, w->env->comm, err)) ||
        (rc = o->backend->prepare(w->device, &shape, &w->model.weights, err)))
        return rc;
    o->backend->describe(w->device, w->shared->device[w->env->rank]);
    return 0;
}

static int worker_open(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    int64_t sequences = o->max_sequences;
    int rc;
    if ((rc = thread_pool_create(&w->pool, o->threads, err)) || (rc = agree(w, err)) ||
        (rc = model_open(&w->model, o->dir, o->manifest, w->env->rank, w->env->comm, err)) ||
        (rc = check_shares(w, err)))
        return rc;
    w->decoder = (struct decoder){
        .model = &w->model, .backend = o->backend, .comm = w->env->comm, .wire = o->wire, .pool = w->pool};
    if ((rc = open_device(w, err)) || (rc = kv_cache_create(&w->cache, o->num_pages, (int)sequences, o->context, err)))
        return rc;
    w->decoder.device = w->device;
    w->rows = calloc((size_t)o->max_rows, sizeof *w->rows);
    if (!w->rows)
        return error_set(err, ERR_MEMORY, "no memory for steps of %lld rows", (long long)o->max_rows);
    if (decoder_samples(&w->decoder))
        return 0;
    w->logits = calloc((size_t)(sequences * (w->model.share.vocab_local + 1)), sizeof *w->logits);
    if (!w->logits)
        return error_set(err, ERR_MEMORY, "no memory for the logits of %lld sequences", (long long)sequences);
    return sampler_create(&w->sampler, w->model.share.vocab_begin, w->model.share.vocab_local, err);
}

// ---- COMMAND_FORWARD -------------------------------------------------------------------------------------------

// Makes rows of tokens [start, start + count) of a sequence and room for them.
static int make_rows(struct worker *w, int sequence, const uint32_t *tokens, int64_t start, int64_t count,
                     struct error *err)
{
    int rc = kv_cache_reserve(w->cache, sequence, start + count, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++)
        w->rows[i] = (struct token_row){.token = tokens[i], .sequence = sequence, .position = start + i};
    return 0;
}

// Runs tokens [start, start + count) of a sequence through the layers.
static int run_tokens(struct worker *w, int sequence, const uint32_t *tokens, int64_t start, int64_t count,
                      struct error *err)
{
    int rc = make_rows(w, sequence, tokens, start, count, err);
    if (rc)
        return rc;
    struct kv_pages pages = kv_cache_pages(w->cache);
    return decoder_forward(&w->decoder, w->rows, count, PHASE_PREFILL, &pages, err);
}

static int run_forward(struct worker *w, struct error *err)
{
    struct shared_area *shared = w->shared;
    const uint32_t *tokens = shared_input(shared, 0);
    float *logits = shared_logits(shared) + w->model.share.vocab_begin;
    int rc;
    if (shared->forward.start == 0)
        kv_cache_reset(w->cache, 0);
    for (int64_t done = 0; done < shared->forward.count;) {
        int64_t left = shared->forward.count - done, count = left < w->options->max_rows ? left : w->options->max_rows;
        if ((rc = run_tokens(w, 0, tokens + done, shared->forward.start + done, count, err)) ||
            (rc =
                 decoder_logits(&w->decoder, NULL, count, logits + done * shared->vocab_size, shared->vocab_size, err)))
            return rc;
        done += count;
    }
    return 0;
}

// ---- COMMAND_GENERATE ------------------------------------------------------------------------------------------

// A sequence as every rank sees it; the same on all of them.
struct running {
    int slot;
    int64_t position; // tokens in the KV cache
    int64_t produced;
    uint32_t last; // token to be fed next
    bool active;
};

static bool is_eos(const struct model_desc *desc, uint32_t token)
{
    for (int i = 0; i < desc->num_eos; i++)
        if (desc->eos_token_ids[i] == (int64_t)token)
            return true;
    return false;
}

static void finish(struct worker *w, struct running *s, enum finish_reason reason)
{
    s->active = false;
    kv_cache_reset(w->cache, s->slot);
    if (w->env->rank == 0)
        atomic_store_explicit(&w->shared->sequences[s->slot].finished, (int)reason, memory_order_release);
}

// Takes the token that was chosen for a sequence and decides whether it goes on.
static void advance(struct worker *w, struct running *s, uint32_t token)
{
    struct shared_sequence *shared = &w->shared->sequences[s->slot];
    if (!shared->ignore_eos && is_eos(&w->model.desc, token)) {
        finish(w, s, FINISH_EOS);
        return;
    }
    s->last = token;
    if (w->env->rank == 0) {
        shared_output(w->shared, s->slot)[s->produced] = token;
        atomic_store_explicit(&shared->produced, s->produced + 1, memory_order_release);
    }
    s->produced++;
    if (s->produced == shared->max_tokens || s->position + 1 > w->shared->context)
        finish(w, s, FINISH_LENGTH);
}

// Runs w->rows [num_rows] and chooses a token behind each of the last `count` rows, which belong to sequences [count] in this order: on the
// device where it can, else here from the ranks' logits.
static int step(struct worker *w, int64_t num_rows, enum phase phase, struct running *const *sequences, int64_t count,
                struct error *err)
{
    struct kv_pages pages = kv_cache_pages(w->cache);
    int64_t vocab = w->model.share.vocab_local, last = num_rows - 1;
    uint32_t tokens[MAX_SEQUENCES];
    int rc;
    if (decoder_samples(&w->decoder)) {
        const struct sampling *sampling[MAX_SEQUENCES];
        uint64_t steps[MAX_SEQUENCES];
        for (int64_t i = 0; i < count; i++) {
            sampling[i] = &w->shared->sequences[sequences[i]->slot].sampling;
            steps[i] = (uint64_t)sequences[i]->produced;
        }
        if ((rc = decoder_sample(&w->decoder, w->rows, num_rows, phase, &pages, sampling, steps, count, tokens, err)))
            return rc;
    } else {
        if ((rc = decoder_forward(&w->decoder, w->rows, num_rows, phase, &pages, err)) ||
            (rc = decoder_logits(&w->decoder, count < num_rows ? &last : NULL, count, w->logits, vocab, err)))
            return rc;
        for (int64_t i = 0; i < count; i++) {
            struct running *s = sequences[i];
            if ((rc = sampler_choose(w->sampler, w->env->comm, w->logits + i * vocab, &w->counts[s->slot],
                                     &w->shared->sequences[s->slot].sampling, (uint64_t)s->produced, &tokens[i], err)))
                return rc;
            token_counts_add(&w->counts[s->slot], w->sampler, tokens[i], true);
        }
    }
    for (int64_t i = 0; i < count; i++)
        advance(w, sequences[i], tokens[i]);
    return 0;
}

static int count_prompt(struct worker *w, int slot, const uint32_t *prompt, int64_t count, struct error *err)
{
    int rc;
    if (decoder_samples(&w->decoder))
        return w->options->backend->count_prompt(w->device, slot, prompt, count, err);
    token_counts_free(&w->counts[slot]);
    if ((rc = token_counts_alloc(&w->counts[slot], w->model.share.vocab_local, err)))
        return rc;
    for (int64_t i = 0; i < count; i++)
        token_counts_add(&w->counts[slot], w->sampler, prompt[i], false);
    return 0;
}

static int prefill(struct worker *w, struct running *s, struct error *err)
{
    const uint32_t *prompt = shared_input(w->shared, s->slot);
    int64_t count = w->shared->sequences[s->slot].prompt_count, done = 0;
    int rc = count_prompt(w, s->slot, prompt, count, err);
    for (; !rc && count - done > w->options->max_rows; done += w->options->max_rows)
        rc = run_tokens(w, s->slot, prompt + done, done, w->options->max_rows, err);
    if (rc || (rc = make_rows(w, s->slot, prompt + done, done, count - done, err)))
        return rc;
    s->position = count;
    return step(w, count - done, PHASE_PREFILL, &s, 1, err);
}

// Rank 0 reads which sequences the parent has given up; the others hear it from rank 0, so that all agree.
static int drop_cancelled(struct worker *w, struct running *sequences, int64_t count, struct error *err)
{
    uint64_t cancelled = 0;
    for (int64_t i = 0; i < count && w->env->rank == 0; i++)
        if (atomic_load_explicit(&w->shared->sequences[i].cancel, memory_order_relaxed))
            cancelled |= 1ull << i;
    int rc = comm_broadcast(w->env->comm, &cancelled, sizeof cancelled, 0, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++)
        if (sequences[i].active && (cancelled >> i & 1))
            finish(w, &sequences[i], FINISH_CANCELLED);
    return 0;
}

// One token for every active sequence. *any: whether there was one.
static int decode_step(struct worker *w, struct running *sequences, int64_t count, bool *any, struct error *err)
{
    struct running *active[MAX_SEQUENCES];
    int64_t rows = 0;
    int rc = drop_cancelled(w, sequences, count, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        struct running *s = &sequences[i];
        if (!s->active)
            continue;
        if ((rc = kv_cache_reserve(w->cache, s->slot, s->position + 1, err)))
            return rc;
        active[rows] = s;
        w->rows[rows++] = (struct token_row){.token = s->last, .sequence = s->slot, .position = s->position++};
    }
    *any = rows > 0;
    if (w->env->rank == 0)
        atomic_fetch_add(&w->shared->decode_rows, rows);
    return rows > 0 ? step(w, rows, PHASE_DECODE, active, rows, err) : 0;
}

static int run_generate(struct worker *w, struct error *err)
{
    struct running sequences[MAX_SEQUENCES] = {0};
    struct shared_area *shared = w->shared;
    bool leader = w->env->rank == 0, any = true;
    int rc;
    for (int64_t i = 0; i < shared->num_sequences; i++) {
        sequences[i] = (struct running){.slot = (int)i, .active = true};
        kv_cache_reset(w->cache, (int)i);
        if ((rc = prefill(w, &sequences[i], err)))
            return rc;
        if (leader)
            rank_notify(w->env);
    }
    uint64_t sent_before = comm_sent_bytes(w->env->comm);
    if (leader)
        atomic_store(&shared->first_token_ns, now_ns());
    while (any) {
        if ((rc = decode_step(w, sequences, shared->num_sequences, &any, err)))
            return rc;
        if (leader && any) {
            atomic_fetch_add(&shared->decode_steps, 1);
            rank_notify(w->env);
        }
    }
    if (leader)
        atomic_store(&shared->decode_sent_bytes, (long long)(comm_sent_bytes(w->env->comm) - sent_before));
    return 0;
}

// ---- the command loop ------------------------------------------------------------------------------------------

static int run_command(struct worker *w, int command, struct error *err)
{
    bool leader = w->env->rank == 0;
    if (leader)
        atomic_store(&w->shared->command_ns, now_ns());
    int rc = command == COMMAND_FORWARD ? run_forward(w, err) : run_generate(w, err);
    if (leader)
        atomic_store(&w->shared->finished_ns, now_ns());
    atomic_store(&w->shared->rank_rss_bytes[w->env->rank], resident_bytes());
    return rc;
}

int worker_main(struct rank_env *env, void *arg, struct error *err)
{
    struct worker *w = calloc(1, sizeof *w);
    if (!w)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", env->rank);
    w->env = env;
    w->options = arg;
    w->shared = env->shared;
    if (env->rank == 0)
        atomic_store(&w->shared->started_ns, now_ns());
    int rc = worker_open(w, err);
    if (rc == 0 && env->rank == 0)
        atomic_store(&w->shared->loaded_ns, now_ns());
    while (rc == 0) {
        int command;
        if ((rc = rank_next_command(env, &command, err)) || command == 0)
            break;
        if ((rc = run_command(w, command, err)) == 0)
            rank_command_done(env);
    }
    worker_close(w);
    free(w);
    return rc;
}

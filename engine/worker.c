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
    struct kv_cache *cache;
    struct decoder *decoder;
    struct sampler *sampler;
    struct token_counts counts[MAX_SEQUENCES];
    struct token_row *rows; // [max_rows]
    float *logits;          // [max(max_sequences, 1)][vocab_local], for sampling
};

static void worker_close(struct worker *w)
{
    for (int i = 0; i < MAX_SEQUENCES; i++)
        token_counts_free(&w->counts[i]);
    sampler_free(w->sampler);
    decoder_free(w->decoder);
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
    char kernels[16];
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
    snprintf(mine.kernels, sizeof mine.kernels, "%s", o->kernels->name);
    return comm_handshake(w->env->comm, &mine, sizeof mine, "model contract and options", err);
}

// The ranks' parts of vocabulary and mlp must follow each other from 0 to the whole: each knows only its own file.
static int check_shares(struct worker *w, struct error *err)
{
    const struct model_desc *desc = &w->model.desc;
    struct rank_share all[COMM_MAX_RANKS];
    int64_t vocab = 0, mlp = 0, heads = 0;
    int rc = comm_all_gather(w->env->comm, all, &w->model.share, sizeof all[0], err);
    for (int r = 0; r < w->env->tp_size && !rc; r++) {
        if (all[r].vocab_begin != vocab || all[r].mlp_begin != mlp || all[r].head_begin != heads)
            rc = error_set(err, ERR_CORRUPT, "%s: rank %d's share does not begin where rank %d's ends", w->options->dir,
                           r, r - 1);
        vocab += all[r].vocab_local;
        mlp += all[r].intermediate_local;
        heads += all[r].num_heads_local;
    }
    if (!rc && (vocab != desc->vocab_size || mlp != desc->intermediate_size || heads != desc->num_heads))
        rc = error_set(err, ERR_CORRUPT, "%s: the ranks' shares do not add up to the model", w->options->dir);
    return rc;
}

static int worker_open(struct worker *w, struct error *err)
{
    const struct worker_options *o = w->options;
    const struct model_desc *desc = &o->manifest->model;
    int64_t sequences = o->max_sequences, context = o->context;
    int rc;
    if ((rc = thread_pool_create(&w->pool, o->threads, err)) || (rc = agree(w, err)) ||
        (rc = model_open(&w->model, o->dir, o->manifest, w->env->rank, o->verify, w->pool, w->env->comm, err)) ||
        (rc = check_shares(w, err)) ||
        (rc = kv_cache_create(&w->cache, desc->num_layers, w->model.share.num_kv_heads_local, desc->head_dim,
                              o->num_pages, (int)sequences, context, err)) ||
        (rc = decoder_create(&w->decoder, &w->model, o->kernels, w->pool, w->env->comm, w->cache, o->wire, o->max_rows,
                             context, err)) ||
        (rc = sampler_create(&w->sampler, w->model.share.vocab_begin, w->model.share.vocab_local, err)))
        return rc;
    w->rows = calloc((size_t)o->max_rows, sizeof *w->rows);
    w->logits = calloc((size_t)(sequences * (w->model.share.vocab_local + 1)), sizeof *w->logits);
    if (!w->rows || !w->logits)
        return error_set(err, ERR_MEMORY, "no memory for the logits of %lld sequences", (long long)sequences);
    return 0;
}

// ---- COMMAND_FORWARD -------------------------------------------------------------------------------------------

// Runs tokens [start, start + count) of a sequence through the layers.
static int run_tokens(struct worker *w, int sequence, const uint32_t *tokens, int64_t start, int64_t count,
                      struct error *err)
{
    int rc = kv_cache_reserve(w->cache, sequence, start + count, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++)
        w->rows[i] = (struct token_row){.token = tokens[i], .sequence = sequence, .position = start + i};
    return decoder_forward(w->decoder, w->rows, count, err);
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
            (rc = decoder_logits(w->decoder, NULL, count, logits + done * shared->vocab_size, shared->vocab_size, err)))
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

// Chooses the next token of a sequence from its row of logits and decides whether it goes on.
static int advance(struct worker *w, struct running *s, float *logits, struct error *err)
{
    struct shared_sequence *shared = &w->shared->sequences[s->slot];
    uint32_t token;
    int rc = sampler_choose(w->sampler, w->env->comm, logits, &w->counts[s->slot], &shared->sampling,
                            (uint64_t)s->produced, &token, err);
    if (rc)
        return rc;
    if (!shared->ignore_eos && is_eos(&w->model.desc, token)) {
        finish(w, s, FINISH_EOS);
        return 0;
    }
    token_counts_add(&w->counts[s->slot], w->sampler, token, true);
    s->last = token;
    if (w->env->rank == 0) {
        shared_output(w->shared, s->slot)[s->produced] = token;
        atomic_store_explicit(&shared->produced, s->produced + 1, memory_order_release);
    }
    s->produced++;
    if (s->produced == shared->max_tokens || s->position + 1 > w->shared->context)
        finish(w, s, FINISH_LENGTH);
    return 0;
}

static int prefill(struct worker *w, struct running *s, struct error *err)
{
    const uint32_t *prompt = shared_input(w->shared, s->slot);
    int64_t count = w->shared->sequences[s->slot].prompt_count, last_rows = 0;
    int rc;
    token_counts_free(&w->counts[s->slot]);
    if ((rc = token_counts_alloc(&w->counts[s->slot], w->model.share.vocab_local, err)))
        return rc;
    for (int64_t i = 0; i < count; i++)
        token_counts_add(&w->counts[s->slot], w->sampler, prompt[i], false);
    for (int64_t done = 0; done < count; done += last_rows) {
        last_rows = count - done < w->options->max_rows ? count - done : w->options->max_rows;
        if ((rc = run_tokens(w, s->slot, prompt + done, done, last_rows, err)))
            return rc;
    }
    s->position = count;
    int64_t last_row = last_rows - 1;
    if ((rc = decoder_logits(w->decoder, &last_row, 1, w->logits, w->model.share.vocab_local, err)))
        return rc;
    return advance(w, s, w->logits, err);
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
    int64_t rows = 0, vocab = w->model.share.vocab_local;
    int rc = drop_cancelled(w, sequences, count, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        struct running *s = &sequences[i];
        if (!s->active)
            continue;
        if ((rc = kv_cache_reserve(w->cache, s->slot, s->position + 1, err)))
            return rc;
        w->rows[rows++] = (struct token_row){.token = s->last, .sequence = s->slot, .position = s->position++};
    }
    *any = rows > 0;
    if (rows == 0)
        return 0;
    if ((rc = decoder_forward(w->decoder, w->rows, rows, err)) ||
        (rc = decoder_logits(w->decoder, NULL, rows, w->logits, vocab, err)))
        return rc;
    for (int64_t row = 0; row < rows; row++)
        if ((rc = advance(w, &sequences[w->rows[row].sequence], w->logits + row * vocab, err)))
            return rc;
    return 0;
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

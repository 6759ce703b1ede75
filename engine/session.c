// The parent's end of a running model. See session.h.
#include "engine/session.h"

#include "engine/backends.h"
#include "formats/checked.h"
#include "formats/extra_file.h"
#include "kernels/kv.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TOKENIZER_FILE_NAME "tokenizer.bin"
#define TOKENIZER_CAP_BYTES (1ull << 30)

const struct session_options session_defaults = {
    .backend = "auto",
    .kv_cache = "bf16",
    .wire = "auto",
    .verify = "full",
    .ranks = "process",
    .timeout_s = 10,
    .default_context = 4096,
};

struct session {
    char *dir;
    struct manifest *manifest;
    struct worker_options worker;
    const char *backend_note; // for the user; NULL: none
    bool ranks_are_threads;
    int timeout_ms;
    struct launch *launch; // NULL until session_start
    struct shared_area *shared;
    struct tokenizer_file tokenizer;
};

// ---- tokenizer -------------------------------------------------------------------------------------------------

int tokenizer_file_open(struct tokenizer_file *out, const char *dir, const struct manifest *manifest, struct error *err)
{
    struct tokenizer_file file = {0};
    char path[4096];
    uint64_t byte_count;
    int rc = extra_file_read(&file.bytes, &byte_count, manifest, dir, TOKENIZER_FILE_NAME, TOKENIZER_CAP_BYTES, err);
    if (!rc && !file.bytes)
        rc = error_set(
            err, ERR_MODEL,
            "%s: the shards were made without a tokenizer.json; put one beside the checkpoint and shard again", dir);
    if (rc)
        return rc;
    snprintf(path, sizeof path, "%s/%s", dir, TOKENIZER_FILE_NAME);
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
        rc = tokenizer_file_open(&s->tokenizer, s->dir, s->manifest, err);
    *out = s->tokenizer.tokenizer;
    return rc;
}

// ---- memory plan -----------------------------------------------------------------------------------------------

// The first number behind `key` in a /proc or cgroup file, times `unit`; -1 when there is none ("max" too).
static double read_figure(const char *path, const char *key, double unit)
{
    char line[256];
    double value = -1;
    FILE *f = fopen(path, "re");
    if (!f)
        return -1;
    while (value < 0 && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%lf", &value) != 1)
            value = -1;
    fclose(f);
    return value < 0 ? -1 : value * unit;
}

// Memory that may still be taken: what the kernel calls available, or what the cgroup leaves, whichever is less.
static double available_bytes(void)
{
    double available = read_figure("/proc/meminfo", "MemAvailable:", 1024);
    double limit = read_figure("/sys/fs/cgroup/memory.max", "", 1),
           used = read_figure("/sys/fs/cgroup/memory.current", "", 1);
    double inactive = read_figure("/sys/fs/cgroup/memory.stat", "inactive_file ", 1);
    double active =
        read_figure("/sys/fs/cgroup/memory.stat", "active_file ", 1); // page cache as well, given back as readily
    if (limit >= 0 && used >= 0) {
        double left = limit - used + (inactive > 0 ? inactive : 0) + (active > 0 ? active : 0);
        if (available < 0 || left < available)
            available = left;
    }
    return available;
}

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
    return shared_area_bytes(s->worker.context, s->worker.max_sequences, s->worker.logits_rows,
                             s->manifest->model.vocab_size);
}

// The host's memory. Weights are mapped from the page cache, so they need not fit at once, but the engine is useless when they do
// not. What a device must hold, its ranks check.
static int check_memory(const struct session *s, struct error *err)
{
    int64_t context = s->worker.context;
    const struct model_desc *d = &s->manifest->model;
    int64_t tp = s->manifest->tp_size;
    struct rank_share share = upper_share(d, tp);
    struct device_shape shape = {.desc = d,
                                 .share = &share,
                                 .max_rows = s->worker.max_rows,
                                 .max_sequences = s->worker.max_sequences,
                                 .context = s->worker.context,
                                 .samples = tp == 1};
    double weights = 0, cache = 0, available = available_bytes();
    double buffers =
        (double)shared_bytes(s) + (double)tp * (double)s->worker.backend->host_bytes(&shape, s->worker.threads);
    if (s->worker.backend == &backend_cpu) {
        for (size_t i = 0; i < s->manifest->num_ranks; i++)
            weights += (double)s->manifest->ranks[i].bytes;
        cache = (double)tp * (double)kv_bytes(d, &share, s->worker.num_pages, s->worker.kv_format);
    }
    double needed = weights + cache + buffers;
    if (available < 0 || needed <= available)
        return 0;
    return error_set(err, ERR_MEMORY,
                     "%s: %.2f GiB needed (weights %.2f, KV cache %.2f at context %lld, buffers %.2f), %.2f GiB "
                     "available; use a smaller "
                     "--context or stronger quantization",
                     s->dir, needed / 0x1p30, weights / 0x1p30, cache / 0x1p30, (long long)context, buffers / 0x1p30,
                     available / 0x1p30);
}

// ---- opening ---------------------------------------------------------------------------------------------------

static int choose_wire(const struct manifest *manifest, const char *wanted, enum wire *wire, struct error *err)
{
    const char *name = strcmp(wanted, "auto") == 0 ? manifest->wire_advice : wanted;
    if (!wire_from_name(name, wire))
        return error_set(err, ERR_CORRUPT, "model.json: wire advice \"%s\" is not bf16, fp8 or s8x", name);
    return 0;
}

static enum verify_mode verify_mode_of(const char *name)
{
    return strcmp(name, "off") == 0 ? VERIFY_OFF : strcmp(name, "sample") == 0 ? VERIFY_SAMPLE : VERIFY_FULL;
}

static int default_threads(int64_t tp_size)
{
    int cores = thread_pool_default_threads();
    return cores > tp_size ? cores / (int)tp_size : 1;
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

int session_start(struct session *s, struct error *err)
{
    const struct model_desc *d = &s->manifest->model;
    struct launch_options launch = {
        .tp_size = (int)s->manifest->tp_size,
        .threads = s->ranks_are_threads,
        .wait_timeout_ms = s->timeout_ms,
        .comm_max_elems = (uint64_t)d->hidden_size * 64,
        .shared_bytes = shared_bytes(s),
    };
    if (s->launch)
        return 0;
    int rc = check_memory(s, err);
    if (rc || (rc = launch_start(&s->launch, &launch, worker_main, &s->worker, err)))
        return rc;
    s->shared = launch_shared(s->launch);
    s->shared->context = s->worker.context;
    s->shared->max_sequences = s->worker.max_sequences;
    s->shared->vocab_size = d->vocab_size;
    return launch_wait(s->launch, -1, err);
}

// What the kernels and ranks of this version can run.
static int check_supported(const struct manifest *manifest, const char *dir, struct error *err)
{
    if (manifest->pp_size != 1)
        return error_set(err, ERR_MODEL, "%s: cut into %u pipeline stages; this version runs models of one stage", dir,
                         manifest->pp_size);
    const struct latent_desc *latent = &manifest->model.latent;
    int64_t key_dim = latent->kv_rank > 0 ? latent->kv_rank + latent->rope_dim : manifest->model.head_dim;
    int64_t limit = latent->kv_rank > 0 ? KERNELS_MAX_KEY_DIM : KERNELS_MAX_HEAD_DIM;
    if (key_dim > limit)
        return error_set(err, ERR_MODEL, "%s: keys of %lld elements; this version's attention takes at most %lld", dir,
                         (long long)key_dim, (long long)limit);
    if (manifest->tp_size > COMM_MAX_RANKS)
        return error_set(err, ERR_MODEL, "%s: cut for %u ranks; this version runs at most %d", dir, manifest->tp_size,
                         COMM_MAX_RANKS);
    return 0;
}

int session_open(struct session **out, const char *dir, const struct session_options *options, int64_t max_sequences,
                 int64_t logits_rows, struct error *err)
{
    int rc;
    int64_t context;
    struct backend_choice choice;
    struct session *s = calloc(1, sizeof *s);
    if (!s || !(s->dir = strdup(dir))) {
        free(s);
        return error_set(err, ERR_MEMORY, "no memory for a session");
    }
    if ((rc = manifest_read(&s->manifest, dir, err)) || (rc = check_supported(s->manifest, dir, err)) ||
        (rc = choose_context(s->manifest, options, &context, err)) ||
        (rc = choose_wire(s->manifest, options->wire, &s->worker.wire, err)) ||
        (rc = backends_select(&choice, options->backend, options->cuda_library, err)))
        goto fail;
    s->worker.backend = choice.backend;
    s->worker.kernels = choice.kernels;
    s->backend_note = choice.note;
    s->worker.dir = s->dir;
    s->worker.manifest = s->manifest;
    s->worker.threads = options->threads > 0 ? (int)options->threads : default_threads(s->manifest->tp_size);
    s->worker.verify = verify_mode_of(options->verify);
    s->worker.kv_format = strcmp(options->kv_cache, "fp8") == 0 ? KV_E4M3 : KV_BF16;
    s->worker.max_rows = s->worker.backend->prefill_rows;
    s->worker.num_pages = (int64_t)div_up((uint64_t)context, KV_PAGE_TOKENS) * max_sequences;
    s->worker.context = context;
    s->worker.max_sequences = max_sequences;
    s->worker.logits_rows = logits_rows;
    s->ranks_are_threads = strcmp(options->ranks, "thread") == 0;
    s->timeout_ms = (int)(options->timeout_s * 1000);
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
    launch_stop(s->launch, NULL);
    tokenizer_file_close(&s->tokenizer);
    manifest_free(s->manifest);
    free(s->dir);
    free(s);
}

const struct manifest *session_manifest(const struct session *s) { return s->manifest; }
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
    for (uint32_t r = 0; r < s->manifest->tp_size && s->worker.backend != &backend_cpu; r++)
        if (r == 0 || strcmp(s->shared->device[r], s->shared->device[r - 1]) != 0)
            fprintf(out, "rank %u: %s\n", r, s->shared->device[r]);
}
int session_threads(const struct session *s) { return s->worker.threads; }
const char *session_wire(const struct session *s) { return wire_name(s->worker.wire); }

// ---- work ------------------------------------------------------------------------------------------------------

static int check_tokens(const struct session *s, const uint32_t *tokens, int64_t count, struct error *err)
{
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] >= s->manifest->model.vocab_size)
            return error_set(err, ERR_USAGE, "token id %u: the model's vocabulary ends at %lld", tokens[i],
                             (long long)s->manifest->model.vocab_size - 1);
    return 0;
}

// Waits for the end of the running command.
static int wait_done(struct session *s, struct error *err)
{
    int rc;
    while ((rc = launch_wait(s->launch, -1, err)) > 0)
        continue;
    return rc;
}

int session_forward(struct session *s, const uint32_t *tokens, int64_t count, int64_t start_position,
                    const float **logits, struct error *err)
{
    int rc = check_tokens(s, tokens, count, err);
    if (rc)
        return rc;
    if (count < 1 || count > s->worker.logits_rows || start_position + count > s->worker.context)
        return error_set(err, ERR_USAGE, "%lld tokens at position %lld: the context is %lld tokens", (long long)count,
                         (long long)start_position, (long long)s->worker.context);
    if ((rc = session_start(s, err)))
        return rc;
    memcpy(shared_input(s->shared, 0), tokens, (size_t)count * sizeof *tokens);
    s->shared->forward.start = start_position;
    s->shared->forward.count = count;
    if ((rc = launch_post(s->launch, COMMAND_FORWARD, err)) || (rc = wait_done(s, err)))
        return rc;
    *logits = shared_logits(s->shared);
    return 0;
}

static int check_prompt(const struct session *s, const struct generation *g, struct error *err)
{
    if (g->prompt_count < 1 || g->prompt_count > s->worker.context)
        return error_set(err, ERR_USAGE, "the prompt has %lld tokens; from 1 to %lld fit the context",
                         (long long)g->prompt_count, (long long)s->worker.context);
    return check_tokens(s, g->prompt, g->prompt_count, err);
}

int session_check_prompts(const struct session *s, const struct generation *generations, int64_t count,
                          struct error *err)
{
    int rc = 0;
    for (int64_t i = 0; i < count && !rc; i++)
        rc = check_prompt(s, &generations[i], err);
    return rc;
}

static void fill_sequence(struct session *s, const struct generation *g, int64_t i)
{
    struct shared_sequence *sequence = &s->shared->sequences[i];
    memcpy(shared_input(s->shared, i), g->prompt, (size_t)g->prompt_count * sizeof *g->prompt);
    sequence->prompt_count = g->prompt_count;
    sequence->max_tokens = g->max_tokens < s->worker.context ? g->max_tokens : s->worker.context;
    sequence->ignore_eos = g->ignore_eos;
    sequence->sampling = g->sampling;
    atomic_store(&sequence->cancel, false);
    atomic_store(&sequence->produced, 0);
    atomic_store(&sequence->finished, FINISH_NONE);
}

// Hands new tokens to their owners.
static void deliver(struct session *s, struct generation *generations, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        struct generation *g = &generations[i];
        struct shared_sequence *sequence = &s->shared->sequences[i];
        int64_t produced = atomic_load_explicit(&sequence->produced, memory_order_acquire);
        bool wanted = !atomic_load_explicit(&sequence->cancel, memory_order_relaxed);
        if (wanted && produced > g->produced && g->on_tokens &&
            !g->on_tokens(g->arg, i, shared_output(s->shared, i) + g->produced, produced - g->produced))
            atomic_store_explicit(&sequence->cancel, true, memory_order_relaxed);
        if (wanted)
            g->produced = produced;
        g->finished = (enum finish_reason)atomic_load_explicit(&sequence->finished, memory_order_acquire);
    }
}

int session_generate(struct session *s, struct generation *generations, int64_t count, struct error *err)
{
    int rc;
    if (count < 1 || count > s->worker.max_sequences)
        return error_set(err, ERR_USAGE, "%lld sequences: from 1 to %lld run together", (long long)count,
                         (long long)s->worker.max_sequences);
    if ((rc = session_check_prompts(s, generations, count, err)) || (rc = session_start(s, err)))
        return rc;
    for (int64_t i = 0; i < count; i++) {
        generations[i].produced = 0;
        generations[i].finished = FINISH_NONE;
        fill_sequence(s, &generations[i], i);
    }
    s->shared->num_sequences = count;
    atomic_store(&s->shared->decode_steps, 0);
    atomic_store(&s->shared->decode_rows, 0);
    if ((rc = launch_post(s->launch, COMMAND_GENERATE, err)))
        return rc;
    do {
        rc = launch_wait(s->launch, -1, err);
        if (rc >= 0)
            deliver(s, generations, count);
    } while (rc > 0);
    return rc;
}

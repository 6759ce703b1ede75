// tpengine bench: one result line for prefill and decode of random tokens, as a user would run them.
#include "engine/commands.h"
#include "formats/fnv.h"
#include "kernels/clock.h"

#include <assert.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    int64_t prompt_tokens, gen_tokens, batch;
} options = {.prompt_tokens = 512, .gen_tokens = 128, .batch = 1};

const struct option_spec bench_options[] = {
    {"prompt-tokens", OPTION_INT, &options.prompt_tokens, "N", 1, 1 << 24, "tokens of each prompt"},
    {"gen-tokens", OPTION_INT, &options.gen_tokens, "N", 2, 1 << 24, "tokens to generate for each prompt"},
    {"batch", OPTION_INT, &options.batch, "N", 1, MAX_SEQUENCES, "sequences that run together"},
    SESSION_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

struct result {
    double load_s, first_token_s, prefill_tokens_per_s, decode_tokens_per_s;
    int64_t rss_bytes, file_bytes;
    double sent_bytes_per_token; // by one rank to the others, in decode
    // In decode, of rank 0: of one sum over ranks, waiting included; of all of them, in the time.
    double exchange_us, exchange_share;
    // Of several stages. Passes in flight: when one begins, itself included, on average and at most. Share of the time in which a rank waits for
    // another stage, on average.
    double passes_in_flight, stage_wait_share;
    int64_t most_in_flight;
    uint32_t last_token; // a hash of the run: faster but different shows
};

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static bool take(void *arg, int64_t sequence, const uint32_t *tokens, int64_t count)
{
    uint32_t *hashes = arg;
    hashes[sequence] = fnv1a_32_behind(hashes[sequence], tokens, (size_t)count * sizeof *tokens);
    return true;
}

static int measure(struct session *session, struct result *out, double opened_s, struct error *err)
{
    struct generation generations[MAX_SEQUENCES];
    const struct manifest *manifest = session_manifest(session);
    int64_t vocab = manifest->model.vocab_size;
    assert(vocab > 0);                               // the manifest was checked
    uint32_t state = 1, hashes[MAX_SEQUENCES] = {0}; // of each sequence: their tokens come in any order
    uint32_t *prompt = malloc((size_t)options.prompt_tokens * sizeof *prompt);
    if (!prompt)
        return error_set(err, ERR_MEMORY, "no memory for a prompt of %lld tokens", (long long)options.prompt_tokens);
    for (int64_t i = 0; i < options.prompt_tokens; i++)
        prompt[i] = next_random(&state) % (uint32_t)vocab;
    for (int64_t i = 0; i < options.batch; i++)
        generations[i] = (struct generation){.prompt = prompt,
                                             .prompt_count = options.prompt_tokens,
                                             .max_tokens = options.gen_tokens,
                                             .ignore_eos = true,
                                             .sampling = {.top_p = 1, .repetition_penalty = 1},
                                             .on_tokens = take,
                                             .arg = hashes};
    struct generate_figures figures;
    int rc = session_generate(session, generations, options.batch, &figures, err);
    free(prompt);
    if (rc)
        return rc;
    int64_t decoded = figures.tokens - figures.first_tokens;
    if (decoded < 1)
        return error_set(err, ERR_USAGE, "the context of %lld tokens leaves no token to decode after the prompt",
                         (long long)session_context(session));
    out->load_s = session_load_s(session);
    out->first_token_s = figures.first_s - opened_s;
    out->prefill_tokens_per_s = (double)(options.prompt_tokens * options.batch) / (figures.first_s - figures.begin_s);
    out->decode_tokens_per_s = (double)decoded / (figures.end_s - figures.first_s);
    if (figures.decode_rows > 0)
        out->sent_bytes_per_token = (double)figures.sent_bytes / (double)figures.decode_rows;
    if (figures.exchanges > 0) {
        out->exchange_us = 1e-3 * (double)figures.exchange_ns / (double)figures.exchanges;
        out->exchange_share = 1e-9 * (double)figures.exchange_ns / (figures.end_s - figures.first_s);
    }
    for (uint32_t r = 0; r < manifest->num_ranks; r++) {
        struct rank_report rank;
        session_rank_report(session, (int)r, &rank);
        out->stage_wait_share += rank.stage_wait_s / (figures.end_s - figures.begin_s) / (double)manifest->num_ranks;
        out->file_bytes += rank.file_bytes;
        if (r == 0 || strcmp(session_options.ranks, "process") == 0) // else one process holds all ranks
            out->rss_bytes += rank.rss_bytes;
    }
    const struct pass_counts *passes = &session_shared(session)->passes;
    long long begun = atomic_load(&passes->begun);
    out->passes_in_flight = begun > 0 ? (double)atomic_load(&passes->sum_in_flight) / (double)begun : 0;
    out->most_in_flight = atomic_load(&passes->most_in_flight);
    out->last_token = fnv1a_32(hashes, (size_t)options.batch * sizeof *hashes);
    return 0;
}

static const char *experts_of(const struct manifest *m)
{
    return m->model.experts.num_experts > 0 ? experts_mode_name(m->experts) : "none";
}

static int report(struct session *session, const struct result *r, struct error *err)
{
    const struct manifest *m = session_manifest(session);
    if (!common_options.json) {
        printf("bench quant=%s tp_size=%u pp_size=%u ranks=%s threads=%d kernels=%s wire=%s prefill=%s batch=%lld "
               "prompt_tokens=%lld "
               "gen_tokens=%lld "
               "load_s=%.3f first_token_s=%.3f prefill_tokens_per_s=%.1f decode_tokens_per_s=%.2f rss_mib=%.0f "
               "file_mib=%.0f sent_bytes_per_token=%.0f exchange_us=%.1f exchange_share=%.3f passes_in_flight=%.2f "
               "most_in_flight=%lld stage_wait_share=%.3f experts=%s tokens=%08x\n",
               weight_kind_name(m->quant.linear), m->tp_size, m->pp_size, session_options.ranks,
               session_threads(session), session_backend(session), session_wire(session), session_prefill_way(session),
               (long long)options.batch, (long long)options.prompt_tokens, (long long)options.gen_tokens, r->load_s,
               r->first_token_s, r->prefill_tokens_per_s, r->decode_tokens_per_s, (double)r->rss_bytes / 0x1p20,
               (double)r->file_bytes / 0x1p20, r->sent_bytes_per_token, r->exchange_us, r->exchange_share,
               r->passes_in_flight, (long long)r->most_in_flight, r->stage_wait_share, experts_of(m), r->last_token);
        return 0;
    }
    json_t *object =
        json_pack("{s:s, s:i, s:s, s:i, s:s, s:i, s:s, s:s, s:I, s:I, s:I}", "prefill", session_prefill_way(session),
                  "schema_version", 1, "quant", weight_kind_name(m->quant.linear), "tp_size", (int)m->tp_size, "ranks",
                  session_options.ranks, "threads", session_threads(session), "kernels", session_backend(session),
                  "wire", session_wire(session), "batch", (json_int_t)options.batch, "prompt_tokens",
                  (json_int_t)options.prompt_tokens, "gen_tokens", (json_int_t)options.gen_tokens);
    json_t *figures = json_pack(
        "{s:i, s:f, s:I, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:f, s:f, s:s, s:I}", "pp_size", (int)m->pp_size,
        "passes_in_flight", r->passes_in_flight, "most_in_flight", (json_int_t)r->most_in_flight, "stage_wait_share",
        r->stage_wait_share, "load_s", r->load_s, "first_token_s", r->first_token_s, "prefill_tokens_per_s",
        r->prefill_tokens_per_s, "decode_tokens_per_s", r->decode_tokens_per_s, "rss_bytes", (json_int_t)r->rss_bytes,
        "file_bytes", (json_int_t)r->file_bytes, "sent_bytes_per_token", r->sent_bytes_per_token, "exchange_us",
        r->exchange_us, "exchange_share", r->exchange_share, "experts", experts_of(m), "tokens_hash",
        (json_int_t)r->last_token);
    bool complete = object && figures && json_object_update(object, figures) == 0;
    json_decref(figures);
    if (complete)
        return print_report(object, err);
    json_decref(object);
    return print_report(NULL, err);
}

int bench_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct session *session = NULL;
    struct session_options wanted = session_options;
    struct result result = {0};
    double opened = clock_now_s();
    wanted.default_context = options.prompt_tokens + options.gen_tokens;
    wanted.recomputes = true; // the prompts are equal
    wanted.load_first = true; // prefill and decode are measured, not the disk
    int rc = choose_store(&wanted.store, argv[0], err);
    if (!rc)
        rc = session_open(&session, argv[0], &wanted, options.batch, 0, err);
    if (rc == 0 && (rc = measure(session, &result, opened, err)) == 0) {
        if (!common_options.quiet)
            session_print_devices(session, stderr);
        rc = report(session, &result, err);
    }
    if (rc == 0)
        rc = print_timings(session, err);
    session_close(session);
    return rc;
}

// Law 9 under load: in random mixes of sequences, page pools, chunks, drafts, filters, shared prefixes and cancellations every sequence gives
// what it gives alone, and the books of the pages are right after every step.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/random_help.h"
#include "tests/scheduler_help.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LIVES = 4096 };

struct mix;

// One sequence and what has become of it.
struct life {
    struct mix *mix;
    struct sequence *handle; // NULL: not added yet, or ended
    struct sequence_spec spec;
    struct fake_filter filter, fresh_filter;
    struct logit_edit edits[3];
    uint32_t eos[2], stop[1];
    uint32_t prompt[FAKE_MAX_CONTEXT], output[FAKE_MAX_CONTEXT + 1];
    float logprobs[FAKE_MAX_CONTEXT + 1];
    int64_t produced, refuse_after; // tokens after which on_tokens says false; -1: never
    bool meddles;                   // its callbacks cancel and add others
    int ends;
    enum finish_reason reason;
    uint32_t stop_token;
    struct sequence_usage usage;
};

struct mix {
    struct fake_model model;
    struct life *lives;
    int64_t count, most; // added; to be added
    uint32_t prefixes[3][FAKE_MAX_CONTEXT];
    int64_t longest_prompt;
    bool long_outputs; // so that pages run out
};

static int64_t between(int64_t least, int64_t most)
{
    return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1));
}
static bool chance(int64_t percent) { return between(0, 99) < percent; }

static void add_some(struct mix *mix);

static void cancel_any(struct mix *mix)
{
    struct life *life = &mix->lives[between(0, mix->count - 1)];
    if (life->handle)
        scheduler_cancel(mix->model.scheduler, life->handle);
}

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    struct life *life = arg;
    assert_int_equal(life->ends, 0);
    assert_true(count > 0 && life->produced + count <= life->spec.max_tokens);
    for (int64_t i = 0; i < count; i++) {
        life->logprobs[life->produced] = choices[i].logprob;
        life->output[life->produced++] = choices[i].token;
    }
    if (life->meddles && chance(5))
        cancel_any(life->mix);
    return life->refuse_after < 0 || life->produced < life->refuse_after;
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    struct life *life = arg;
    life->ends++;
    life->reason = reason;
    life->usage = *usage;
    life->stop_token = stop_token;
    assert_true((err != NULL) == (reason == FINISH_ERROR));
    if (life->meddles) {
        scheduler_cancel(life->mix->model.scheduler, life->handle); // too late, and harmless
        if (chance(30))
            cancel_any(life->mix);
        if (chance(30))
            add_some(life->mix);
    }
    life->handle = NULL;
}

static void make_spec(struct mix *mix, struct life *life)
{
    const uint32_t *prefix = mix->prefixes[between(0, 2)];
    int64_t count = between(1, mix->longest_prompt), shared = between(0, count);
    for (int64_t i = 0; i < count; i++)
        life->prompt[i] = i < shared ? prefix[i] : (uint32_t)between(0, fake_vocab_size - 1);
    life->eos[0] = 0;
    life->eos[1] = 1;
    life->stop[0] = 2;
    for (int i = 0; i < 3; i++)
        life->edits[i] = (struct logit_edit){(uint32_t)between(3, fake_vocab_size - 1), chance(50) ? -INFINITY : 1};
    bool penalties = chance(15), filtered = chance(15);
    life->spec = (struct sequence_spec){
        .prompt = life->prompt,
        .prompt_count = count,
        .max_tokens = mix->long_outputs || chance(20) ? 5000 : between(1, 150),
        .min_tokens = chance(30) ? between(0, 40) : 0,
        .ignore_eos = chance(mix->long_outputs ? 90 : 50),
        .eos_ids = life->eos,
        .num_eos = between(0, 2),
        .stop_ids = life->stop,
        .num_stop_ids = mix->long_outputs ? 0 : between(0, 1),
        .sampling = {.temperature = chance(40) ? 0.7 : 0,
                     .top_p = 1,
                     .repetition_penalty = penalties ? 1.3 : 1,
                     .seed = random_bits()},
        .edits = life->edits,
        .num_edits = chance(20) ? between(1, 3) : 0,
        .num_logprobs = (int)between(-1, 2),
        .tenant = (uint64_t)between(0, 4),
        .salt = (uint64_t)between(0, 1) << 40,
        .arg = life,
        .on_tokens = on_tokens,
        .on_end = on_end,
    };
    if (filtered) {
        life->spec.num_eos = 1;
        life->spec.eos_ids = life->eos;
        life->spec.ignore_eos = false;
        fake_filter_init(&life->filter, random_bits(), between(0, 60), 0, (uint32_t)fake_vocab_size);
        fake_filter_init(&life->fresh_filter, life->filter.seed, life->filter.complete_after, 0,
                         (uint32_t)fake_vocab_size);
        life->spec.filter = &life->filter.filter;
    }
    life->refuse_after = chance(10) ? between(1, 30) : -1;
    life->meddles = chance(10);
    life->mix = mix;
}

// One request of one or several sequences.
static void add_some(struct mix *mix)
{
    struct error err;
    struct sequence *handles[4];
    struct sequence_spec specs[4];
    int64_t n = chance(20) ? between(2, 4) : 1;
    if (mix->count + n > mix->most)
        return;
    struct life *lives = &mix->lives[mix->count];
    mix->count += n;
    for (int64_t i = 0; i < n; i++) {
        make_spec(mix, &lives[i]);
        if (i > 0) {
            memcpy(lives[i].prompt, lives[0].prompt, sizeof lives[i].prompt);
            lives[i].spec.prompt_count = lives[0].spec.prompt_count;
            lives[i].spec.salt = lives[0].spec.salt;
        }
        specs[i] = lives[i].spec;
    }
    if (scheduler_add(mix->model.scheduler, specs, n, handles, &err))
        fail_msg("%s", err.msg);
    memset(specs, 0x55, sizeof specs); // the specs themselves are not borrowed
    for (int64_t i = 0; i < n; i++)
        lives[i].handle = handles[i];
}

static void check_life(const struct mix *mix, struct life *life)
{
    static struct fake_output alone;
    assert_int_equal(life->ends, 1);
    assert_null(life->handle);
    if (life->spec.filter)
        life->spec.filter = &life->fresh_filter.filter;
    int64_t wanted = life->spec.max_tokens;
    if (wanted > FAKE_MAX_CONTEXT)
        life->spec.max_tokens = FAKE_MAX_CONTEXT;
    fake_model_output(&mix->model.options, &life->spec, &alone);
    assert_int_equal(life->usage.produced_tokens, life->produced);
    assert_int_equal(life->usage.prompt_tokens, life->spec.prompt_count);
    assert_true(life->usage.cached_tokens < life->spec.prompt_count);
    assert_true(life->usage.accepted_tokens <= life->usage.drafted_tokens);
    if (life->reason == FINISH_CANCELLED) {
        assert_true(life->produced <= alone.count);
    } else {
        assert_int_equal(life->produced, alone.count);
        assert_int_equal(life->reason, alone.reason);
        assert_int_equal(life->stop_token, alone.stop_token);
    }
    for (int64_t i = 0; i < life->produced; i++) {
        assert_int_equal(life->output[i], alone.tokens[i]);
        assert_true(life->logprobs[i] == fake_model_logprob(life->prompt, life->spec.prompt_count, life->output, i));
    }
}

static void random_options(struct scheduler_options *o)
{
    bool fixed = chance(50);
    fake_vocab_size = between(8, FAKE_MAX_VOCAB);
    int64_t chunks[] = {16, 32, 48, 64, 96, 128};
    *o = (struct scheduler_options){
        .num_pages = chance(75) ? between(2, 12) : between(13, 60),
        .context = between(64, 500),
        .max_sequences = chance(10) ? MAX_SEQUENCES : between(1, 10),
        .prefill_chunk = fixed ? chunks[between(0, 5)] : between(1, 200),
        .chunks_fixed = fixed,
        .phases_differ = chance(30),
        .share_prefixes = chance(85),
        .draft_tokens = chance(60) ? between(1, 12) : 0,
        .balance_rows = chance(50) ? between(0, 20) : between(0, 2),
        .stages = chance(50) ? between(2, 4) : between(0, 1),
        .staggered_rows = chance(70) ? 64 : between(0, 10),
        .hash_seed = random_bits(),
    };
    o->decode_rows = o->max_sequences + between(0, 40);
    o->max_rows = o->decode_rows + between(0, 100);
    if (fixed && o->max_rows < o->prefill_chunk)
        o->max_rows = o->prefill_chunk;
}

static void run_mix(struct mix *mix, struct scheduler_stats *total)
{
    struct error err;
    struct scheduler_stats stats;
    struct scheduler_options options;
    random_options(&options);
    fake_model_open(&mix->model, &options);
    mix->count = 0;
    mix->most = between(1, 30);
    mix->longest_prompt =
        options.num_pages * KV_PAGE_TOKENS < options.context ? options.num_pages * KV_PAGE_TOKENS : options.context;
    if (chance(70))
        mix->longest_prompt = mix->longest_prompt / between(2, 8) + 1;
    mix->long_outputs = chance(40);
    memset(mix->lives, 0, (size_t)mix->most * sizeof *mix->lives);
    for (int i = 0; i < 3; i++)
        for (int64_t k = 0; k < FAKE_MAX_CONTEXT; k++)
            mix->prefixes[i][k] = (uint32_t)between(0, fake_vocab_size - 1);

    int64_t arrivals = chance(30) ? 100 : between(5, 50), cancels = chance(50) ? 0 : between(1, 5);
    for (int64_t steps = 0; mix->count < mix->most || scheduler_has_work(mix->model.scheduler); steps++) {
        while (mix->count < mix->most && chance(arrivals)) {
            int64_t had = mix->count;
            add_some(mix);
            if (mix->count == had)
                mix->most = had;
        }
        if (mix->count > 0 && chance(cancels))
            cancel_any(mix);
        if (fake_model_step(&mix->model, &err))
            fail_msg("%s", err.msg);
        assert_true(steps < 100000);
    }
    for (int64_t i = 0; i < mix->count; i++)
        check_life(mix, &mix->lives[i]);
    scheduler_read_stats(mix->model.scheduler, &stats);
    assert_int_equal(stats.pages_used, 0);
    assert_true(stats.running == 0 && stats.waiting == 0 && stats.preempted == 0);
    total->preemptions += stats.preemptions;
    total->steps += mix->model.staggered_steps;
    total->cached_tokens += stats.cached_tokens;
    total->accepted_tokens += stats.accepted_tokens;
    total->produced_tokens += stats.produced_tokens;
    fake_model_close(&mix->model);
}

#ifdef KERNELS_SANITIZED
enum { MIXES = 200 };
#else
enum { MIXES = 2000 };
#endif

static void test_alone_and_in_company(void **state)
{
    (void)state;
    struct mix *mix = calloc(1, sizeof *mix);
    assert_non_null(mix);
    mix->lives = calloc(MAX_LIVES, sizeof *mix->lives);
    assert_non_null(mix->lives);
    struct scheduler_stats total = {0};
    for (uint64_t seed = 1; seed <= MIXES; seed++) {
        random_state = seed * 0x9e3779b97f4a7c15u;
        run_mix(mix, &total);
    }
    print_message("%d mixes: %lld tokens, %lld preemptions, %lld tokens from the cache, %lld drafted ones right, %lld "
                  "staggered steps\n",
                  MIXES, (long long)total.produced_tokens, (long long)total.preemptions, (long long)total.cached_tokens,
                  (long long)total.accepted_tokens, (long long)total.steps);
    // The mixes must meet what they are for.
    assert_true(total.preemptions > MIXES / 2 && total.cached_tokens > 25 * MIXES &&
                total.accepted_tokens > 10 * MIXES && total.steps > 5 * MIXES);
    free(mix->lives);
    free(mix);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_alone_and_in_company)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

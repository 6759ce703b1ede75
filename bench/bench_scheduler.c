// What does the scheduler itself cost in a step? One line for each kind of company; the ranks are a function that chooses at random.
//
//   us       median over the steps of scheduler_step less its runner; p99: one step in a hundred takes longer
//   decode   64 sequences, one row each
//   draft    the same, of text that repeats itself, with drafts
//   prefill  prompts of 2,048 tokens that all begin alike come and go, two thirds from shared pages
//   tight    the same where pages are short: preemptions
#include "engine/scheduler.h"
#include "kernels/futex.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCES = 64, CONTEXT = 4096, STEPS = 4000, VOCAB = 32000, PROMPT = 2048 };

struct bench {
    struct scheduler_options options;
    int64_t prompt, output, alike; // tokens; of the prompt, those that all have in common
    bool repeats;
    struct step_area area;
    struct scheduler *scheduler;
    int64_t runner_ns, tokens;
    uint32_t *prompts; // [SEQUENCES][PROMPT]
    struct sequence_spec specs[SEQUENCES];
    struct slot {
        struct bench *bench;
        bool over;
    } slots[SEQUENCES];
};

static uint32_t random_token(void)
{
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16) % VOCAB;
}

static int run(void *arg, struct error *err)
{
    struct bench *b = arg;
    (void)err;
    int64_t start_ns = clock_now_ns();
    struct step *step = b->area.step;
    struct step_choice *choice = step->choices;
    for (int64_t i = 0; i < step->num_segments; i++) {
        const struct step_segment *s = &step->segments[i];
        for (int64_t position = s->start + s->count - s->choices; position < s->start + s->count; position++)
            (choice++)->token = b->repeats ? (uint32_t)(position + 1) % 37 : random_token();
    }
    b->runner_ns += clock_now_ns() - start_ns;
    return 0;
}

static bool on_tokens(void *arg, const struct step_choice *choices, int64_t count)
{
    (void)choices;
    ((struct slot *)arg)->bench->tokens += count;
    return true;
}

static void on_end(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err)
{
    (void)reason, (void)usage, (void)stop_token, (void)err;
    ((struct slot *)arg)->over = true;
}

static void add(struct bench *b, int i)
{
    struct sequence *handle;
    uint32_t *prompt = b->prompts + (ptrdiff_t)i * PROMPT;
    for (int64_t k = 0; k < b->prompt; k++)
        prompt[k] = k < b->alike ? (uint32_t)k : b->repeats ? (uint32_t)k % 37 : random_token();
    b->slots[i] = (struct slot){.bench = b};
    b->specs[i] = (struct sequence_spec){.prompt = prompt,
                                         .prompt_count = b->prompt,
                                         .max_tokens = b->output,
                                         .ignore_eos = true,
                                         .sampling = {.top_p = 1, .repetition_penalty = 1},
                                         .num_logprobs = -1,
                                         .tenant = (uint64_t)i % 10,
                                         .arg = &b->slots[i],
                                         .on_tokens = on_tokens,
                                         .on_end = on_end};
    struct error err;
    if (scheduler_add(b->scheduler, &b->specs[i], 1, &handle, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void measure(struct bench *b, const char *name)
{
    struct error err;
    struct step_runner runner = {b, run};
    b->options.context = CONTEXT;
    b->options.max_sequences = SEQUENCES;
    b->options.prefill_chunk = 512;
    b->options.decode_rows = 256;
    b->options.max_rows = 768;
    b->options.balance_rows = 128;
    b->options.share_prefixes = true;
    b->area = (struct step_area){
        .context = CONTEXT, .max_sequences = SEQUENCES, .vocab_size = VOCAB, .num_pages = b->options.num_pages};
    size_t bytes = step_area_bytes(&b->area);
    void *memory = aligned_alloc(64, bytes);
    b->prompts = calloc((size_t)SEQUENCES * PROMPT, sizeof *b->prompts);
    if (!memory || !b->prompts)
        exit(1);
    memset(memory, 0, bytes);
    step_area_place(&b->area, memory);
    if (scheduler_create(&b->scheduler, &b->options, &b->area, &runner, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
    static int64_t step_ns[STEPS];
    for (int i = 0; i < SEQUENCES; i++)
        add(b, i);
    for (int step = -200; step < STEPS; step++) { // the first warm up
        if (step == 0)
            b->tokens = 0;
        for (int i = 0; i < SEQUENCES; i++)
            if (b->slots[i].over)
                add(b, i);
        b->runner_ns = 0;
        int64_t start_ns = clock_now_ns();
        if (scheduler_step(b->scheduler, &err))
            exit(1);
        if (step >= 0)
            step_ns[step] = clock_now_ns() - start_ns - b->runner_ns;
    }
    qsort(step_ns, STEPS, sizeof *step_ns, by_value);
    int64_t median_ns = step_ns[STEPS / 2], slow_ns = step_ns[STEPS * 99 / 100];
    struct scheduler_stats stats;
    scheduler_read_stats(b->scheduler, &stats);
    printf("scheduler %s sequences=%d us=%.1f p99_us=%.0f tokens_per_step=%.1f cached=%.2f accepted=%.2f "
           "preemptions=%lld\n",
           name, SEQUENCES, 1e-3 * (double)median_ns, 1e-3 * (double)slow_ns, (double)b->tokens / STEPS,
           stats.prefix_queries_tokens ? (double)stats.cached_tokens / (double)stats.prefix_queries_tokens : 0,
           stats.drafted_tokens ? (double)stats.accepted_tokens / (double)stats.drafted_tokens : 0,
           (long long)stats.preemptions);
    scheduler_free(b->scheduler);
    free(b->prompts);
    free(memory);
}

int main(void)
{
    static struct bench decode = {.options = {.num_pages = 4096}, .prompt = 100, .output = 3900};
    static struct bench draft = {
        .options = {.num_pages = 4096, .draft_tokens = 8}, .prompt = 100, .output = 3900, .repeats = true};
    static struct bench no_draft = {.options = {.num_pages = 4096, .draft_tokens = 8}, .prompt = 100, .output = 3900};
    static struct bench prefill = {.options = {.num_pages = 4096}, .prompt = PROMPT, .output = 200, .alike = 1365};
    static struct bench tight = {.options = {.num_pages = 400}, .prompt = 200, .output = 3000};
    measure(&decode, "decode");
    measure(&draft, "draft");
    measure(&no_draft, "draft_in_vain");
    measure(&prefill, "prefill");
    measure(&tight, "tight");
    return 0;
}

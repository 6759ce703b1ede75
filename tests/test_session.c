// Steps of the ranks by hand, on the bundled model: law 9 to the bit (choices with their logprobs), whatever the pages, the pieces of the
// prompt, the company, drafts, and what is computed again; penalties, masks and edits; damaged steps; ranks that are lost and start again.
// On one rank and on two, there with a compressing wire too and with a prompt's residual dealt out, and on an emulated device where its library is there.
#include "engine/session.h"
#include "tests/entries_help.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum {
    SLOTS = 5,
    CONTEXT = 256,
    PROMPT = 150,
    DEVICE_PROMPT = KV_PAGE_TOKENS + 6,
    OUTPUT = 9,
    TOTAL = PROMPT + OUTPUT
};
#define TINY_MODEL "tests/golden/families/llama3" // an emulated device is slow

static char work[] = "/tmp/test_session_XXXXXX";
static const char *build(void) { return getenv("BUILD") ? getenv("BUILD") : "build"; }

static const struct backend_case {
    const char *name, *library; // library: below the build folder
    const char *model;
    int tp_size;
    const char *wire;
    const char *dealt; // sequence parallel and in overlapping halves
} backends[] = {{"cpu", NULL, "tests/model", 1, "auto", "auto"},
                {"cpu", NULL, "tests/model", 2, "auto", "auto"},
                {"cpu", NULL, "tests/model", 2, "s8x", "auto"},
                {"cpu", NULL, "tests/model", 2, "s8x", "on"},
                {"cuda", "tests/libtpengine_cuda_emulated.so", TINY_MODEL, 1, "auto", "auto"}};
// Sanitizers make everything slow: two ranks run all that one does.
#ifdef KERNELS_SANITIZED
enum { FIRST_BACKEND = 1, CPU_BACKENDS = 4, NUM_BACKENDS = CPU_BACKENDS, RESTARTS = 2, PENALTIES = 1 };
#else
enum {
    FIRST_BACKEND = 0,
    CPU_BACKENDS = 4,
    NUM_BACKENDS = sizeof backends / sizeof *backends,
    RESTARTS = 3,
    PENALTIES = 3
};
#endif

// One session and what the test knows of its sequence: prompt and greedy output, with the choice behind each of the last OUTPUT + 1 tokens.
struct fixture {
    struct session *session;
    const struct step_area *area;
    bool chunks_fixed;
    int64_t prompt, last_piece; // tokens; where the last piece of a prompt begins, when they are few
    uint32_t tokens[TOTAL];
    struct step_choice choices[OUTPUT];
};

static void check(int rc, const struct error *err)
{
    if (rc)
        fail_msg("%s", err->msg);
}

// ---- steps by hand ---------------------------------------------------------------------------------------------

static void add(struct fixture *f, int32_t slot, enum phase phase, int64_t start, int64_t count, int64_t choices)
{
    struct step *step = f->area->step;
    step->segments[step->num_segments++] =
        (struct step_segment){.sequence = slot,
                              .phase = phase,
                              .start = start,
                              .count = count,
                              .choices = choices,
                              .first_step = choices ? (uint64_t)(start + count - choices + 1 - f->prompt) : 0,
                              .begins_sequence = start == 0};
    step->num_choices += choices;
}

static int try_run(struct fixture *f, struct error *err)
{
    int rc = session_run_step(f->session, err);
    if (!rc)
        f->area->step->num_segments = f->area->step->num_choices = 0;
    return rc;
}

static void run(struct fixture *f)
{
    struct error err;
    check(try_run(f, &err), &err);
}

// A slot with this test's prompt and greedy choices; its pages: first, first + stride .. modulo all.
static void use_slot(struct fixture *f, int32_t slot, int64_t first, int64_t stride)
{
    const struct step_area *a = f->area;
    struct step_slot *how = &a->slots[slot];
    memset(how, 0, sizeof *how);
    how->sampling = (struct sampling){.top_p = 1, .repetition_penalty = 1};
    how->prompt_count = f->prompt;
    how->num_logprobs = STEP_MAX_LOGPROBS;
    memcpy(a->tokens + slot * a->context, f->tokens, sizeof f->tokens);
    for (int64_t i = 0; i < a->pages_per_sequence; i++)
        a->pages[slot * a->pages_per_sequence + i] = (int32_t)((first + i * stride) % a->num_pages);
    ++*a->pages_version;
}

// The prompt of a slot; its last piece is added to the next step.
static void add_prompt(struct fixture *f, int32_t slot, int64_t choices)
{
    if (f->last_piece > 0) {
        add(f, slot, PHASE_PREFILL, 0, f->last_piece, 0);
        run(f);
    }
    add(f, slot, PHASE_PREFILL, f->last_piece, f->prompt - f->last_piece, choices);
}

static bool is_same(const struct step_choice *a, const struct step_choice *b)
{
    bool same = a->token == b->token && a->logprob == b->logprob && a->num_top == b->num_top;
    for (int32_t i = 0; same && i < a->num_top; i++)
        same = a->top[i].token == b->top[i].token && a->top[i].logprob == b->top[i].logprob;
    return same;
}

static void expect_choices(const struct fixture *f, const char *what, int64_t at, int64_t first, int64_t count)
{
    const struct step_choice *got = f->area->step->choices + at;
    for (int64_t i = 0; i < count; i++)
        if (!is_same(&got[i], &f->choices[first + i]))
            fail_msg("%s: choice %lld is token %u (%.9g), not %u (%.9g)", what, (long long)(first + i), got[i].token,
                     (double)got[i].logprob, f->choices[first + i].token, (double)f->choices[first + i].logprob);
}

// Prompt and output alone, a token at a time.
static void make_reference(struct fixture *f)
{
    int64_t vocab = f->area->vocab_size;
    for (int64_t i = 0; i < f->prompt; i++)
        f->tokens[i] = (uint32_t)((i * i * 31 + 7 * i + 11) % vocab);
    use_slot(f, 0, 0, 1);
    add_prompt(f, 0, 1);
    for (int64_t i = 0; i < OUTPUT; i++) {
        run(f);
        f->choices[i] = f->area->step->choices[0];
        assert_true(f->choices[i].token < vocab && f->choices[i].num_top == STEP_MAX_LOGPROBS);
        assert_int_equal(f->choices[i].token, f->choices[i].top[0].token);
        assert_true(f->choices[i].logprob < 0 && f->choices[i].logprob == f->choices[i].top[0].logprob);
        f->tokens[f->prompt + i] = f->area->tokens[f->prompt + i] = f->choices[i].token;
        add(f, 0, PHASE_DECODE, f->prompt + i, 1, 1);
    }
    f->area->step->num_segments = f->area->step->num_choices = 0;
}

static void open_fixture(struct fixture *f, const struct backend_case *b)
{
    char dir[256], library[256];
    struct session_options options = session_defaults;
    struct scheduler_options sizes;
    struct error err;
    *f = (struct fixture){.prompt = b->library ? DEVICE_PROMPT : PROMPT, .last_piece = b->library ? KV_PAGE_TOKENS : 0};
    snprintf(dir, sizeof dir, "%s/%d", work, (int)(b - backends));
    options.context = CONTEXT;
    options.backend = b->name;
    options.wire = b->wire;
    options.sequence_parallel = options.overlap = b->dealt;
    options.threads = 1;
    options.timeout_s = 60;
    options.draft_tokens = 3;
    options.prefill_rows = b->library ? KV_PAGE_TOKENS : 0;
    if (b->library) {
        snprintf(library, sizeof library, "%s/%s", build(), b->library);
        options.cuda_library = library;
    }
    check(session_open(&f->session, dir, &options, SLOTS, 0, &err), &err);
    check(session_start(f->session, &err), &err);
    f->area = session_step_area(f->session);
    session_scheduler_options(f->session, &sizes);
    f->chunks_fixed = sizes.chunks_fixed;
    assert_int_equal(sizes.num_pages, SLOTS * CONTEXT / KV_PAGE_TOKENS);
    make_reference(f);
}

static bool is_there(const struct backend_case *b)
{
    char library[256];
    snprintf(library, sizeof library, "%s/%s", build(), b->library ? b->library : "");
    return !b->library || access(library, R_OK) == 0;
}

static void on_backends(void (*test)(struct fixture *f), int count)
{
    for (int i = FIRST_BACKEND; i < count; i++) {
        struct fixture f;
        if (!is_there(&backends[i])) {
            print_message("no %s: %s is left out\n", backends[i].library, backends[i].name);
            continue;
        }
        open_fixture(&f, &backends[i]);
        test(&f);
        session_close(f.session);
    }
}

// ---- law 9 -----------------------------------------------------------------------------------------------------

// Pages in another order, the prompt in pieces between others' rows, the output as drafts.
static void check_company(struct fixture *f)
{
    static const int64_t of_host[] = {1, 62, 2, 63, 22}, of_device[] = {DEVICE_PROMPT - 6, 6, 0, 0, 0};
    const int64_t *pieces = f->chunks_fixed ? of_device : of_host;
    int64_t at = 0;
    use_slot(f, 0, 0, 1);
    use_slot(f, 1, 7, 1);
    use_slot(f, 3, 15, 19); // of 20: backwards
    for (int64_t i = 0; i < 5; i++) {
        int64_t rows = pieces[i];
        if (i == 0) {
            add_prompt(f, 0, 1);
            add(f, 3, PHASE_PREFILL, at, rows, at + rows == f->prompt);
        } else {
            if (at < f->prompt)
                add(f, 3, PHASE_PREFILL, at, rows, at + rows == f->prompt);
            add(f, 0, PHASE_DECODE, f->prompt + i - 1, 1, 1);
            if (i == 2 && !f->chunks_fixed)
                add(f, 1, PHASE_PREFILL, 0, 100, 0);
        }
        run(f);
        bool ends = at < f->prompt && at + rows == f->prompt;
        // Behind this slot's choice, or before it.
        expect_choices(f, "in company", i == 0 ? 0 : ends, i, 1);
        if (ends)
            expect_choices(f, "a prompt in pieces", i == 0, 0, 1);
        at += at < f->prompt ? rows : 0;
    }
    add(f, 0, PHASE_DECODE, f->prompt + 4, 2, 2);
    add(f, 3, PHASE_DECODE, f->prompt, 4, 4);
    run(f);
    expect_choices(f, "two rows", 0, 5, 2);
    expect_choices(f, "four rows", 2, 1, 4);
    // A wrong draft leaves no trace.
    uint32_t *tokens = f->area->tokens + 3 * f->area->context;
    tokens[f->prompt + 5] = (tokens[f->prompt + 5] + 1) % (uint32_t)f->area->vocab_size;
    add(f, 3, PHASE_DECODE, f->prompt + 4, 4, 4);
    run(f);
    expect_choices(f, "before a wrong draft", 0, 5, 1);
    assert_false(is_same(&f->area->step->choices[1], &f->choices[6]));
    tokens[f->prompt + 5] = f->tokens[f->prompt + 5];
    add(f, 3, PHASE_DECODE, f->prompt + 5, 3, 3);
    run(f);
    expect_choices(f, "after a wrong draft", 0, 6, 3);
}

// Another slot uses the first pages of this one, which are full; and a slot computes its output again behind its prompt, at once.
static void check_pages_again(struct fixture *f)
{
    use_slot(f, 0, 0, 1);
    add_prompt(f, 0, 1);
    run(f);
    int64_t shared = f->prompt / KV_PAGE_TOKENS;
    use_slot(f, 2, 8, 1);
    for (int64_t i = 0; i < shared; i++)
        f->area->pages[2 * f->area->pages_per_sequence + i] = f->area->pages[i];
    ++*f->area->pages_version;
    add(f, 2, PHASE_PREFILL, shared * KV_PAGE_TOKENS, f->prompt - shared * KV_PAGE_TOKENS, 1);
    run(f);
    expect_choices(f, "a shared prefix", 0, 0, 1);
    use_slot(f, 4, 15, 1);
    add_prompt(f, 4, 0);
    add(f, 4, PHASE_DECODE, f->prompt, 6, 1);
    add(f, 0, PHASE_DECODE, f->prompt, 1, 1);
    run(f);
    expect_choices(f, "computed again", 0, 6, 1);
    expect_choices(f, "beside it", 1, 1, 1);
}

// Many choices in one step: more than are made in one round.
static void check_many_choices(struct fixture *f)
{
    for (int32_t slot = 0; slot < SLOTS; slot++) {
        use_slot(f, slot, slot * CONTEXT / KV_PAGE_TOKENS, 1);
        add_prompt(f, slot, 0);
        run(f);
    }
    for (int32_t slot = 0; slot < SLOTS; slot++)
        add(f, slot, PHASE_DECODE, f->prompt, 4, 4);
    run(f);
    for (int32_t slot = 0; slot < SLOTS; slot++)
        expect_choices(f, "many choices", 4 * slot, 1, 4);
}

// ---- how tokens are chosen --------------------------------------------------------------------------------------

// Greedy output of slot 0 with these settings; every other step without logprobs, so that a device chooses by itself. forget: the slot's
// counts are lost in the middle.
static void produce(struct fixture *f, const struct sampling *how, bool forget, bool plain, uint32_t output[OUTPUT])
{
    use_slot(f, 0, 0, 1);
    f->area->slots[0].sampling = *how;
    add_prompt(f, 0, 1);
    for (int64_t i = 0; i < OUTPUT; i++) {
        f->area->slots[0].num_logprobs = plain || i % 3 == 1 ? -1 : 2;
        f->area->step->segments[0].begins_sequence |= forget && i == 4;
        run(f);
        output[i] = f->area->tokens[f->prompt + i] = f->area->step->choices[0].token;
        add(f, 0, PHASE_DECODE, f->prompt + i, 1, 1);
    }
    f->area->step->num_segments = f->area->step->num_choices = 0;
}

// The token behind a slot's prompt, chosen twice: by a device where there is one, then on the host.
static uint32_t first_token(struct fixture *f, int32_t slot)
{
    for (int round = 0; round < 2; round++) {
        f->area->slots[slot].num_logprobs = round - 1;
        add_prompt(f, slot, 1);
        f->area->step->segments[0].begins_sequence = true;
        run(f);
    }
    return f->area->step->choices[0].token;
}

// Another prompt, the same token all over, in a slot that was used and in a new one: what was counted before is gone.
static void check_new_prompt(struct fixture *f, const struct sampling *how)
{
    uint32_t tokens[2];
    use_slot(f, 0, 0, 1);
    f->area->slots[0].sampling = *how;
    first_token(f, 0);
    for (int32_t slot = 0; slot < 2; slot++) {
        use_slot(f, slot, 0, 1);
        f->area->slots[slot].sampling = *how;
        for (int64_t i = 0; i < f->prompt; i++)
            f->area->tokens[slot * f->area->context + i] = 3;
        tokens[slot] = first_token(f, slot);
    }
    assert_int_equal(tokens[0], tokens[1]);
}

// Drafts of a sampled sequence: each choice has the random numbers of its own place.
static void check_sampled_drafts(struct fixture *f)
{
    static const struct sampling how = {.temperature = 1.5, .top_p = 1, .repetition_penalty = 1, .seed = 5};
    uint32_t output[OUTPUT];
    for (int plain = 0; plain < 2; plain++) {
        produce(f, &how, false, plain, output);
        assert_memory_not_equal(output, f->tokens + f->prompt, sizeof output);
        for (int64_t at = 0; at + 4 < OUTPUT; at += 4) {
            f->area->slots[0].num_logprobs = plain - 1;
            add(f, 0, PHASE_DECODE, f->prompt + at, 4, 4);
            run(f);
            for (int64_t i = 0; i < 4; i++)
                assert_int_equal(f->area->step->choices[i].token, output[at + i + 1]);
        }
    }
}

static void check_penalties(struct fixture *f)
{
    static const struct sampling cases[3] = {
        {.top_p = 1, .repetition_penalty = 1.9},
        {.top_p = 1, .repetition_penalty = 1, .frequency_penalty = 1.5, .presence_penalty = 0.5},
        {.temperature = 1.5, .top_p = 0.95, .top_k = 40, .repetition_penalty = 1.1, .frequency_penalty = 2, .seed = 9},
    };
    int other = 0;
    for (size_t c = 0; c < PENALTIES; c++) {
        uint32_t plain[OUTPUT], mixed[OUTPUT], forgetful[OUTPUT];
        produce(f, &cases[c], false, true, plain);
        produce(f, &cases[c], false, false, mixed);
        produce(f, &cases[c], true, false, forgetful);
        assert_memory_equal(plain, mixed, sizeof plain);
        assert_memory_equal(plain, forgetful, sizeof plain);
        other += memcmp(plain, f->tokens + f->prompt, sizeof plain) != 0;
    }
    assert_true(other >= (PENALTIES + 1) / 2);
    check_new_prompt(f, &cases[0]);
    add_prompt(f, 0, 0); // nothing has been counted for the others
    run(f);
}

static void check_masks_and_edits(struct fixture *f)
{
    use_slot(f, 0, 0, 1);
    use_slot(f, 1, 7, 1);
    uint32_t *mask = f->area->masks, best = f->choices[0].token, second = f->choices[0].top[1].token;
    struct step_slot *slot = f->area->slots;
    add_prompt(f, 1, 0);
    run(f);
    for (int i = 0; i < 4; i++) {
        memset(mask, i == 0 ? 0xff : 0, (size_t)f->area->mask_words * sizeof *mask);
        mask[best / 32] = i == 0 ? ~(1u << best % 32) : 0;
        mask[second / 32] |= i == 1 ? 1u << second % 32 : 0;
        slot->masked = i < 3;
        slot->num_edits = i >= 2;
        slot->edits[0] = (struct logit_edit){i == 2 ? second : best, -INFINITY};
        if (i == 2)
            mask[second / 32] = 1u << second % 32;
        slot->num_logprobs = i % 2 ? 5 : -1;
        add_prompt(f, 0, 1);
        add(f, 1, PHASE_DECODE, f->prompt, 1, 1);
        run(f);
        assert_int_equal(f->area->step->choices[0].token, i == 2 ? STEP_NO_TOKEN : second);
        if (i % 2) // of the model's own distribution
            assert_memory_equal(f->area->step->choices[0].top, f->choices[0].top, 5 * sizeof f->choices[0].top[0]);
        expect_choices(f, "beside a mask", 1, 1, 1);
    }
}

// ---- ranks that end ---------------------------------------------------------------------------------------------

static void start_again(struct fixture *f)
{
    struct step_choice before[OUTPUT];
    struct error err;
    session_stop(f->session);
    check(session_start(f->session, &err), &err);
    memcpy(before, f->choices, sizeof before);
    make_reference(f);
    assert_memory_equal(before, f->choices, sizeof before);
}

static void check_lost_ranks(struct fixture *f)
{
    struct rank_report report;
    struct error err;
    int fds[2], descriptors = 0;
    assert_int_equal(pipe(fds), 0);
    for (int cycle = 0; cycle < RESTARTS; cycle++) {
        if (cycle == 1)
            descriptors = count_descriptors();
        use_slot(f, 0, 0, 1);
        add_prompt(f, 0, 1);
        f->area->pages[1] = (int32_t)f->area->num_pages; // damaged
        assert_int_equal(try_run(f, &err), ERR_OTHER);
        assert_non_null(strstr(err.msg, "page"));
        assert_int_equal(session_run_step(f->session, &err), ERR_OTHER);
        start_again(f);
        session_rank_report(f->session, 0, &report);
        assert_true(report.pid > 0 && report.loaded_bytes == report.file_bytes && report.rss_bytes > 0);
        kill((pid_t)report.pid, SIGKILL);
        assert_int_equal(session_wait(f->session, fds[0], &err), ERR_RANK);
        start_again(f);
    }
    assert_int_equal(count_descriptors(), descriptors);
    close(fds[0]), close(fds[1]);
}

// ---- memory ------------------------------------------------------------------------------------------------------

// The KV cache shrinks to what a device's memory allows, to one context at least.
static void test_memory(void **state)
{
    const struct backend_case *b = &backends[NUM_BACKENDS - 1];
    struct session_options options = session_defaults;
    struct scheduler_options sizes;
    struct session *session;
    struct error err;
    char dir[256], library[256], memory[32];
    int64_t wanted = MAX_SEQUENCES * CONTEXT / KV_PAGE_TOKENS, least = CONTEXT / KV_PAGE_TOKENS;
    (void)state;
    if (!b->library || !is_there(b))
        skip();
    snprintf(dir, sizeof dir, "%s/%d", work, NUM_BACKENDS - 1);
    snprintf(library, sizeof library, "%s/%s", build(), b->library);
    options.context = CONTEXT;
    options.backend = b->name;
    options.cuda_library = library;
    options.kv_fits = true;
    int refused = 0, cut = 0, rc;
    for (int64_t bytes = 0; bytes < 2ll << 30; bytes += refused && !cut ? 1 << 20 : 64 << 20) {
        snprintf(memory, sizeof memory, "%lld", (long long)bytes);
        setenv("EMULATED_MEMORY", memory, 1);
        check(session_open(&session, dir, &options, MAX_SEQUENCES, 0, &err), &err);
        rc = session_start(session, &err);
        if (rc)
            assert_int_equal(rc, ERR_MEMORY);
        session_scheduler_options(session, &sizes);
        session_close(session);
        refused += rc != 0;
        if (rc)
            continue;
        assert_true(sizes.num_pages >= least && sizes.num_pages <= wanted);
        cut += sizes.num_pages < wanted;
        if (sizes.num_pages == wanted)
            break;
    }
    unsetenv("EMULATED_MEMORY");
    assert_true(refused > 0 && cut > 0 && sizes.num_pages == wanted);
}

// ---- the tests --------------------------------------------------------------------------------------------------

// ---- the wire ---------------------------------------------------------------------------------------------------

enum { WIRE_PROMPT = 96, WIRE_OUTPUT = 5 };
struct wire_run {
    double logits_error; // of a prompt's logits, mean square, from those of the f32 wire
    int64_t sent_bytes;  // in decode
};

// logits [WIRE_PROMPT][vocab] of the f32 wire: filled by the first run, compared with by the others.
static struct wire_run run_wire(const char *wire, const char *feedback, float **exact)
{
    char dir[256];
    uint32_t prompt[WIRE_PROMPT];
    const float *logits;
    struct error err;
    struct session *session;
    struct session_options options = session_defaults;
    struct wire_run run = {0};
    struct generate_figures figures;
    snprintf(dir, sizeof dir, "%s/1", work);
    options.context = CONTEXT;
    options.backend = "cpu";
    options.threads = 1;
    options.timeout_s = 60;
    options.wire = wire;
    options.wire_feedback = feedback;
    check(session_open(&session, dir, &options, 1, WIRE_PROMPT, &err), &err);
    check(session_start(session, &err), &err);
    int64_t vocab = session_manifest(session)->model.vocab_size;
    for (int64_t i = 0; i < WIRE_PROMPT; i++)
        prompt[i] = (uint32_t)((i * i * 31 + 7 * i + 11) % vocab);
    check(session_forward(session, prompt, WIRE_PROMPT, 0, &logits, &err), &err);
    if (!*exact) {
        *exact = malloc((size_t)(WIRE_PROMPT * vocab) * sizeof **exact);
        memcpy(*exact, logits, (size_t)(WIRE_PROMPT * vocab) * sizeof **exact);
    }
    for (int64_t i = 0; i < WIRE_PROMPT * vocab; i++)
        run.logits_error += pow((double)logits[i] - (double)(*exact)[i], 2) / (double)(WIRE_PROMPT * vocab);
    struct generation generation = {.prompt = prompt,
                                    .prompt_count = WIRE_PROMPT,
                                    .max_tokens = WIRE_OUTPUT,
                                    .ignore_eos = true,
                                    .sampling = {.top_p = 1, .repetition_penalty = 1}};
    check(session_generate(session, &generation, 1, &figures, &err), &err);
    assert_int_equal(generation.produced, WIRE_OUTPUT);
    run.sent_bytes = figures.sent_bytes;
    session_close(session);
    return run;
}

// A prompt goes over the wire that was asked for, with error feedback unless it is off; decoding stays with bf16.
static void test_wires(void **state)
{
    (void)state;
    enum { RUNS = 6 };
    static const char *const wires[RUNS][2] = {{"f32", "auto"}, {"bf16", "auto"}, {"s8x", "auto"},
                                               {"s8x", "off"},  {"fp8", "auto"},  {"fp8", "off"}};
    struct wire_run runs[RUNS];
    float *exact = NULL;
    for (int i = 0; i < RUNS; i++) {
        runs[i] = run_wire(wires[i][0], wires[i][1], &exact);
        print_message("wire %s, feedback %s: logits off by %.5f, decode sent %lld bytes\n", wires[i][0], wires[i][1],
                      sqrt(runs[i].logits_error), (long long)runs[i].sent_bytes);
    }
    free(exact);
    for (int i = 1; i < RUNS; i++) {
        assert_true(runs[i].logits_error > 0 && runs[i].logits_error < 0.1);
        assert_true(i == 1 || runs[i].logits_error > runs[1].logits_error);
        assert_int_equal(runs[i].sent_bytes, runs[1].sent_bytes);
    }
    assert_true(runs[2].logits_error < runs[3].logits_error && runs[4].logits_error < runs[5].logits_error);
    assert_true(runs[0].sent_bytes > 3 * runs[1].sent_bytes / 2);
}

static void test_company(void **state) { (void)state, on_backends(check_company, NUM_BACKENDS); }
static void test_pages_again(void **state) { (void)state, on_backends(check_pages_again, NUM_BACKENDS); }
static void test_many_choices(void **state) { (void)state, on_backends(check_many_choices, NUM_BACKENDS); }
static void test_penalties(void **state) { (void)state, on_backends(check_penalties, NUM_BACKENDS); }
static void test_sampled_drafts(void **state) { (void)state, on_backends(check_sampled_drafts, NUM_BACKENDS); }
static void test_masks_and_edits(void **state) { (void)state, on_backends(check_masks_and_edits, NUM_BACKENDS); }
static void test_lost_ranks(void **state) { (void)state, on_backends(check_lost_ranks, CPU_BACKENDS); }

static int set_up(void **state)
{
    char command[512];
    (void)state;
    if (!mkdtemp(work))
        return 1;
    for (int i = 0; i < NUM_BACKENDS; i++) {
        snprintf(command, sizeof command, "%s/tpshard --tp %d --quant int4 --group-size 32 %s %s/%d --quiet", build(),
                 backends[i].tp_size, backends[i].model, work, i);
        if (system(command) != 0)
            return 1;
    }
    return 0;
}

static int tear_down(void **state)
{
    char command[256];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", work);
    return system(command) != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_company),   cmocka_unit_test(test_pages_again),     cmocka_unit_test(test_many_choices),
        cmocka_unit_test(test_penalties), cmocka_unit_test(test_masks_and_edits), cmocka_unit_test(test_lost_ranks),
        cmocka_unit_test(test_memory),    cmocka_unit_test(test_sampled_drafts),  cmocka_unit_test(test_wires),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

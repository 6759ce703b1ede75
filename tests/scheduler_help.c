// See scheduler_help.h.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/scheduler_help.h"

#include "engine/scheduler_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int64_t fake_vocab_size = 50;
const struct scheduler_options fake_options = {
    .num_pages = 64,
    .context = 512,
    .max_sequences = 8,
    .max_rows = 160,
    .decode_rows = 32,
    .prefill_chunk = 128,
    .share_prefixes = true,
    .hash_seed = 7,
};

static uint64_t mixed(uint64_t a, uint64_t b)
{
    uint64_t z = a * 0x9e3779b97f4a7c15u + b + 0x632be59bd9b4e019u;
    z = (z ^ z >> 32) * 0xd6e8feb86659fd93u;
    z = (z ^ z >> 29) * 0xd6e8feb86659fd93u;
    return z ^ z >> 32;
}

// ---- The filter ----------------------------------------------------------------------------------------------------

static void fake_fill(void *state, uint32_t *mask, int64_t words)
{
    const struct fake_filter *f = state;
    memset(mask, 0, (size_t)words * sizeof *mask);
    for (uint32_t token = 0; token < f->vocab_size; token++) {
        bool is_end = token == f->eos, complete = f->taken >= f->complete_after;
        if (complete ? is_end : !is_end && mixed(f->state, token) % 3 == 0)
            mask[token / 32] |= 1u << token % 32;
    }
}

static void fake_advance(void *state, uint32_t token)
{
    struct fake_filter *f = state;
    assert_int_not_equal(token, f->eos);
    f->state = mixed(f->state, token);
    f->taken++;
}

void fake_filter_init(struct fake_filter *f, uint64_t seed, int64_t complete_after, uint32_t eos, uint32_t vocab_size)
{
    *f = (struct fake_filter){.seed = seed,
                              .state = seed,
                              .complete_after = complete_after,
                              .eos = eos,
                              .vocab_size = vocab_size,
                              .filter = {.fill = fake_fill, .advance = fake_advance}};
    f->filter.state = f;
}

// ---- The model -----------------------------------------------------------------------------------------------------

// The entry of a position from those before it. chunk: 0 where the arithmetic is always the same.
static uint64_t entry_of(const uint64_t *before, int64_t position, uint32_t token, uint64_t chunk)
{
    uint64_t sum = 0;
    for (int64_t i = 0; i < position; i++)
        sum = sum * 0x9e3779b97f4a7c15u + before[i];
    return mixed(sum, mixed(chunk, (uint64_t)token << 32 | (uint64_t)position));
}

static uint64_t chunk_key(const struct scheduler_options *o, enum phase phase, int64_t start, int64_t count)
{
    if (!o->chunks_fixed)
        return o->phases_differ ? phase == PHASE_PREFILL : 0;
    return phase == PHASE_PREFILL ? mixed((uint64_t)start, (uint64_t)count) : 1;
}

struct choosing {
    const struct sampling *sampling;
    const struct logit_edit *edits;
    int64_t num_edits;
    const uint32_t *mask; // NULL: none
    uint64_t counts;      // what ranks remember of the sequence
    uint64_t step;
};

static bool allowed(const struct choosing *how, uint32_t token)
{
    if (how->mask && !(how->mask[token / 32] >> token % 32 & 1))
        return false;
    for (int64_t i = 0; i < how->num_edits; i++)
        if (how->edits[i].token == token && how->edits[i].add == -INFINITY)
            return false;
    return true;
}

// Mostly what stood a period before, so that drafts find something; tokens [count] are those so far, entry the last one's.
static uint32_t choose(const uint32_t *tokens, int64_t count, uint64_t entry, uint32_t vocab,
                       const struct choosing *how)
{
    uint64_t bits = entry;
    if (how->sampling->temperature > 0)
        bits = mixed(bits, mixed(how->sampling->seed, how->step));
    if (sampling_has_penalties(how->sampling))
        bits = mixed(bits, how->counts);
    int64_t period = 2 + tokens[0] % 7;
    uint32_t token = (uint32_t)(bits >> 20) % vocab;
    if (bits % 4 && count > period)
        token = tokens[count - period];
    for (int64_t i = 0; i < how->num_edits; i++) // a bias moves the choice
        if (how->edits[i].add != -INFINITY && bits % 5 == 0)
            token = how->edits[i].token;
    for (uint32_t i = 0; i < vocab; i++, token = (token + 1) % vocab)
        if (allowed(how, token))
            return token;
    return STEP_NO_TOKEN;
}

static uint64_t prompt_key(const uint32_t *prompt, int64_t count)
{
    uint64_t key = (uint64_t)count;
    for (int64_t i = 0; i < count; i++)
        key = mixed(key, prompt[i]);
    return key;
}

float fake_model_logprob(const uint32_t *prompt, int64_t prompt_count, const uint32_t *output, int64_t step)
{
    uint64_t key = prompt_key(prompt, prompt_count);
    for (int64_t i = 0; i <= step; i++)
        key = key * 31 + output[i];
    return -(float)(key % 1000);
}

// ---- A sequence alone ----------------------------------------------------------------------------------------------

static bool is_one_of(const uint32_t *ids, int64_t count, uint32_t token)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == token)
            return true;
    return false;
}

static bool end_is_allowed(const struct sequence_spec *spec, const uint32_t *mask)
{
    bool allows = !spec->filter;
    for (int64_t i = 0; i < spec->num_eos; i++)
        allows |= spec->filter && (mask[spec->eos_ids[i] / 32] >> spec->eos_ids[i] % 32 & 1);
    return allows;
}

void fake_model_output(const struct scheduler_options *o, const struct sequence_spec *spec, struct fake_output *out)
{
    static uint64_t entries[2 * FAKE_MAX_CONTEXT];
    static uint32_t tokens[2 * FAKE_MAX_CONTEXT];
    uint32_t vocab = (uint32_t)fake_vocab_size, mask[FAKE_MAX_VOCAB / 32];
    struct logit_edit edits[2 * FAKE_MAX_VOCAB];
    int64_t room = o->num_pages * KV_PAGE_TOKENS < o->context ? o->num_pages * KV_PAGE_TOKENS : o->context;
    memcpy(tokens, spec->prompt, (size_t)spec->prompt_count * sizeof *tokens);
    struct choosing how = {.sampling = &spec->sampling, .edits = edits, .mask = spec->filter ? mask : NULL};
    how.counts = prompt_key(spec->prompt, spec->prompt_count);
    out->count = 0;
    out->stop_token = STEP_NO_TOKEN;
    for (int64_t i = 0, count = spec->prompt_count; i < room; i++) {
        bool in_prompt = i < spec->prompt_count;
        int64_t begin = i / o->prefill_chunk * o->prefill_chunk, end = begin + o->prefill_chunk;
        if (end > spec->prompt_count)
            end = spec->prompt_count;
        entries[i] =
            entry_of(entries, i, tokens[i], chunk_key(o, in_prompt ? PHASE_PREFILL : PHASE_DECODE, begin, end - begin));
        if (i + 1 < count)
            continue;
        how.num_edits = 0;
        for (int64_t k = 0; k < spec->num_edits; k++)
            edits[how.num_edits++] = spec->edits[k];
        bool early = out->count < spec->min_tokens;
        for (int64_t k = 0; early && !spec->ignore_eos && k < spec->num_eos; k++)
            edits[how.num_edits++] = (struct logit_edit){spec->eos_ids[k], -INFINITY};
        for (int64_t k = 0; early && k < spec->num_stop_ids; k++)
            edits[how.num_edits++] = (struct logit_edit){spec->stop_ids[k], -INFINITY};
        if (spec->filter)
            spec->filter->fill(spec->filter->state, mask, (int64_t)(vocab + 31) / 32);
        how.step = (uint64_t)out->count;
        uint32_t token = choose(tokens, count, entries[i], vocab, &how);
        how.counts = mixed(how.counts, token);
        out->reason = FINISH_EOS;
        if (token == STEP_NO_TOKEN) {
            out->reason = early && end_is_allowed(spec, mask) ? FINISH_EOS : FINISH_ERROR;
            return;
        }
        if ((!spec->ignore_eos && is_one_of(spec->eos_ids, spec->num_eos, token)) ||
            is_one_of(spec->stop_ids, spec->num_stop_ids, token)) {
            out->stop_token = token;
            return;
        }
        out->tokens[out->count++] = token;
        tokens[count++] = token;
        if (spec->filter)
            spec->filter->advance(spec->filter->state, token);
        out->reason = FINISH_LENGTH;
        if (out->count == spec->max_tokens)
            return;
    }
}

// ---- The runner ----------------------------------------------------------------------------------------------------

static void check_phase(const struct fake_model *m, const struct step_segment *s)
{
    int64_t prompt = m->area.slots[s->sequence].prompt_count;
    assert_true(s->phase == PHASE_PREFILL ? s->start + s->count <= prompt : s->start >= prompt);
    if (m->options.chunks_fixed && s->phase == PHASE_PREFILL) {
        int64_t chunk = m->options.prefill_chunk;
        assert_true(s->start % chunk == 0 && (s->count == chunk || s->start + s->count == prompt));
    }
}

static void run_segment(struct fake_model *m, const struct step_segment *s, struct step_choice *choices)
{
    static uint64_t before[2 * FAKE_MAX_CONTEXT];
    const uint32_t *tokens = m->area.tokens + s->sequence * m->area.context;
    const int32_t *pages = m->area.pages + s->sequence * m->area.pages_per_sequence;
    const struct step_slot *slot = &m->area.slots[s->sequence];
    check_phase(m, s);
    if (s->begins_sequence)
        m->begun[s->sequence] = m->counted[s->sequence] = prompt_key(tokens, slot->prompt_count);
    uint64_t logprob_key = m->begun[s->sequence];
    for (uint64_t i = 0; i < s->first_step; i++)
        logprob_key = logprob_key * 31 + tokens[slot->prompt_count + (int64_t)i];
    for (int64_t i = 0; i < s->start; i++)
        before[i] = m->entries[pages[i / KV_PAGE_TOKENS] * KV_PAGE_TOKENS + i % KV_PAGE_TOKENS];
    for (int64_t i = s->start; i < s->start + s->count; i++) {
        int32_t page = pages[i / KV_PAGE_TOKENS];
        int64_t stamp = m->steps * MAX_SEQUENCES + s->sequence;
        assert_int_equal(page_cache_users(m->scheduler->cache, page), 1); // nobody writes what others read
        assert_true(m->written[page] / MAX_SEQUENCES < m->steps || m->written[page] == stamp);
        m->written[page] = stamp;
        before[i] = entry_of(before, i, tokens[i], chunk_key(&m->options, s->phase, s->start, s->count));
        m->entries[page * KV_PAGE_TOKENS + i % KV_PAGE_TOKENS] = before[i];
        int64_t choice = i - (s->start + s->count - s->choices);
        if (choice < 0)
            continue;
        struct choosing how = {.sampling = &slot->sampling,
                               .edits = slot->edits,
                               .num_edits = slot->num_edits,
                               .mask = slot->masked ? m->area.masks + s->sequence * m->area.mask_words : NULL,
                               .counts = m->counted[s->sequence],
                               .step = s->first_step + (uint64_t)choice};
        uint32_t token = choose(tokens, i + 1, before[i], (uint32_t)m->area.vocab_size, &how);
        m->counted[s->sequence] = mixed(m->counted[s->sequence], token);
        choices[choice].token = token;
        choices[choice].logprob = -(float)((logprob_key * 31 + token) % 1000);
        if (i + 1 < s->start + s->count)
            logprob_key = logprob_key * 31 + tokens[i + 1];
    }
    m->last_decoded[s->sequence] |= s->choices > 0;
}

// All that ranks read of a segment's sequence.
static uint64_t inputs_of(const struct fake_model *m, const struct step_segment *s)
{
    const struct step_area *a = &m->area;
    const struct step_slot *slot = &a->slots[s->sequence];
    uint64_t key = mixed((uint64_t)slot->prompt_count, slot->sampling.seed);
    for (int64_t i = 0; i < s->start + s->count; i++)
        key = mixed(key, a->tokens[s->sequence * a->context + i]);
    for (int64_t i = 0; i * KV_PAGE_TOKENS < s->start + s->count; i++)
        key = mixed(key, (uint64_t)a->pages[s->sequence * a->pages_per_sequence + i]);
    for (int64_t i = 0; slot->masked && i < a->mask_words; i++)
        key = mixed(key, a->masks[s->sequence * a->mask_words + i]);
    for (int64_t i = 0; i < slot->num_edits; i++)
        key = mixed(key, slot->edits[i].token);
    return key;
}

// The last stage's view: a step that is staggered is computed when as many have followed as there are stages before.
static struct step *take_turn(struct fake_model *m)
{
    struct fake_turn *begun = &m->turns[m->num_turns % m->options.stages];
    struct fake_turn *due = &m->turns[++m->num_turns % m->options.stages];
    begun->step = *m->area.step;
    for (int64_t i = 0; i < begun->step.num_segments; i++)
        begun->inputs[i] = inputs_of(m, &begun->step.segments[i]);
    for (int64_t i = 0; i < due->step.num_segments; i++)
        if (inputs_of(m, &due->step.segments[i]) != due->inputs[i])
            fail_msg("sequence %d has changed while it was under way", (int)due->step.segments[i].sequence);
    m->staggered_steps++;
    return &due->step;
}

static int run_step(void *arg, struct error *err)
{
    struct fake_model *m = arg;
    struct step *step = m->area.step;
    struct step_limits limits = {.max_rows = m->options.max_rows,
                                 .decode_rows = m->options.decode_rows,
                                 .prefill_rows = m->options.prefill_chunk,
                                 .chunk = m->options.chunks_fixed ? m->options.prefill_chunk : 1};
    if (++m->steps == m->fails_at)
        return error_set(err, ERR_RANK, "rank 1 was lost");
    int rc = step_check(&m->area, step, &limits, err);
    if (rc)
        return rc;
    struct step_choice *choices = step->choices;
    if (step->staggered)
        step = take_turn(m);
    else
        for (int64_t i = 0; i < m->options.stages; i++)
            assert_int_equal(m->turns[i].step.num_segments, 0); // all is back
    memset(m->last_decoded, 0, sizeof m->last_decoded);
    m->last_rows = 0;
    for (int64_t i = 0; i < step->num_segments; i++) {
        run_segment(m, &step->segments[i], choices);
        choices += step->segments[i].choices;
        m->last_rows += step->segments[i].count;
    }
    if (step != m->area.step)
        step->num_segments = 0;
    return 0;
}

void fake_model_open(struct fake_model *m, const struct scheduler_options *options)
{
    struct error err;
    *m = (struct fake_model){.options = *options};
    m->area = (struct step_area){.context = options->context,
                                 .max_sequences = options->max_sequences,
                                 .vocab_size = fake_vocab_size,
                                 .num_pages = options->num_pages};
    size_t bytes = step_area_bytes(&m->area);
    m->memory = aligned_alloc(64, bytes);
    assert_non_null(m->memory);
    memset(m->memory, 0, bytes);
    step_area_place(&m->area, m->memory);
    m->entries = calloc((size_t)(options->num_pages * KV_PAGE_TOKENS), sizeof *m->entries);
    m->written = calloc((size_t)options->num_pages, sizeof *m->written);
    m->turns = calloc((size_t)options->stages + 1, sizeof *m->turns);
    assert_true(m->entries && m->written && m->turns);
    m->runner = (struct step_runner){m, run_step};
    if (scheduler_create(&m->scheduler, options, &m->area, &m->runner, &err))
        fail_msg("%s", err.msg);
}

void fake_model_close(struct fake_model *m)
{
    scheduler_free(m->scheduler);
    free(m->memory);
    free(m->entries);
    free(m->written);
    free(m->turns);
}

static void check_books(const struct fake_model *m)
{
    static int64_t users[1 << 16];
    const struct scheduler *s = m->scheduler;
    int64_t used = 0;
    memset(users, 0, (size_t)m->options.num_pages * sizeof *users);
    for (int64_t i = 0; i < s->num_admitted; i++) {
        const struct sequence *q = s->admitted[i];
        assert_ptr_equal(s->slots[q->slot], q);
        assert_true(q->num_published <= q->num_pages && q->computed <= q->num_pages * KV_PAGE_TOKENS);
        assert_true(q->state == SEQUENCE_RUNNING || (q->state == SEQUENCE_PREEMPTED && q->num_pages == 0));
        for (int64_t page = 0; page < q->num_pages; page++)
            used += users[q->pages[page]]++ == 0;
    }
    for (int32_t page = 0; page < m->options.num_pages; page++)
        assert_int_equal(users[page], page_cache_users(s->cache, page));
    assert_int_equal(page_cache_available(s->cache), m->options.num_pages - used);
}

int fake_model_step(struct fake_model *m, struct error *err)
{
    uint64_t version = *m->area.pages_version;
    size_t bytes = (size_t)(m->area.max_sequences * m->area.pages_per_sequence) * sizeof(int32_t);
    static int32_t pages[1 << 16];
    assert_true(bytes <= sizeof pages);
    memcpy(pages, m->area.pages, bytes);
    int rc = scheduler_step(m->scheduler, err);
    if (memcmp(pages, m->area.pages, bytes) != 0)
        assert_true(*m->area.pages_version > version);
    check_books(m);
    return rc;
}

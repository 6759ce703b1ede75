// Who computes what in the next step, and in which pages. See scheduler.h.
#include "engine/scheduler_internal.h"

#include "formats/checked.h"
#include "kernels/futex.h"

#include <math.h>
#include <string.h>

enum { MASKS_NS = 5000000 }; // what the masks of one step may take, but for the last of them

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t pages_of(int64_t tokens) { return (int64_t)div_up((uint64_t)tokens, KV_PAGE_TOKENS); }
static bool in_prompt(const struct sequence *q) { return q->computed < q->spec.prompt_count; }

// ---- Pages ---------------------------------------------------------------------------------------------------------

static void pages_changed(struct scheduler *s)
{
    ++*s->area.pages_version;
    s->admission_blocked = false;
}

void scheduler_release_pages(struct scheduler *s, struct sequence *q)
{
    while (q->num_pages > 0)
        page_cache_release(s->cache, q->pages[--q->num_pages]);
    q->num_published = q->computed = 0;
    s->admission_blocked = false;
}

void scheduler_publish(struct scheduler *s, struct sequence *q)
{
    if (!s->options.share_prefixes)
        return;
    int64_t good = q->computed;
    if (s->options.chunks_fixed || s->options.phases_differ)
        good = min_of(good, q->spec.prompt_count);
    if (s->options.chunks_fixed)
        good = good / s->options.prefill_chunk * s->options.prefill_chunk;
    for (; (q->num_published + 1) * KV_PAGE_TOKENS <= good; q->num_published++) {
        int64_t i = q->num_published;
        int32_t page = page_cache_publish(s->cache, q->pages[i], i > 0 ? q->pages[i - 1] : NO_PAGE, q->spec.salt,
                                          q->tokens + i * KV_PAGE_TOKENS);
        if (page != q->pages[i]) {
            q->pages[i] = page;
            pages_changed(s);
        }
    }
}

// Takes pages that others have computed, in place of one that was begun: all of `tokens` but the last may be known already. Returns how many
// positions that gave.
static int64_t match(struct scheduler *s, struct sequence *q, const uint32_t *tokens)
{
    int64_t had = q->num_published, most = (q->length - 1) / KV_PAGE_TOKENS, pages = had;
    if (s->options.chunks_fixed ||
        s->options.phases_differ) // where another's prompt goes on like this one's output its arithmetic was another
        most = min_of(most, q->spec.prompt_count / KV_PAGE_TOKENS);
    if (!s->options.share_prefixes || q->num_pages > had + 1)
        return 0;
    int32_t begun = q->num_pages > had ? q->pages[had] : NO_PAGE;
    for (; pages < most; pages++) {
        int32_t page = page_cache_find(s->cache, pages > 0 ? q->pages[pages - 1] : NO_PAGE, q->spec.salt,
                                       tokens + pages * KV_PAGE_TOKENS);
        if (page == NO_PAGE)
            break;
        q->pages[pages] = page;
        ++*s->area.pages_version;
    }
    while (pages > had && pages * KV_PAGE_TOKENS % s->share_tokens)
        page_cache_release(s->cache, q->pages[--pages]);
    if (pages == had) {
        if (begun != NO_PAGE)
            q->pages[had] = begun;
        return 0;
    }
    if (begun != NO_PAGE)
        page_cache_release(s->cache, begun);
    int64_t found = pages * KV_PAGE_TOKENS - q->computed;
    q->num_published = q->num_pages = pages;
    q->computed += found;
    return found;
}

static void unplan(struct scheduler *s, struct sequence *q)
{
    s->rows_left += q->rows;
    s->choices_left += q->choices;
    if (!in_prompt(q))
        s->decode_left += q->rows;
    q->rows = q->choices = 0;
}

static void preempt(struct scheduler *s, struct sequence *q)
{
    unplan(s, q);
    if (q->computed > 0) {
        s->stats.preemptions++;
        q->usage.preemptions++;
    }
    scheduler_release_pages(s, q);
    q->state = SEQUENCE_PREEMPTED;
}

// Makes room for the first `positions`; whoever was admitted last makes place. false: that was this sequence itself, or is one under way, which
// is waited for.
static bool reserve(struct scheduler *s, struct sequence *q, int64_t positions)
{
    int64_t wanted = pages_of(positions), youngest = s->num_admitted - 1;
    while (q->num_pages < wanted) {
        int32_t page = page_cache_take(s->cache);
        if (page != NO_PAGE) {
            q->pages[q->num_pages++] = page;
            ++*s->area.pages_version;
            continue;
        }
        while (s->admitted[youngest]->state != SEQUENCE_RUNNING)
            youngest--;
        struct sequence *victim = s->admitted[youngest];
        if (victim->under_way) {
            s->drains = true;
            return false;
        }
        preempt(s, victim);
        if (victim == q)
            return false;
    }
    return true;
}

// ---- Admission -----------------------------------------------------------------------------------------------------

// Pages for what a sequence knows already, and one more to grow into unless its output ends before.
static int64_t pages_wanted(const struct sequence *q)
{
    return min_of(pages_of(q->length) + 1,
                  pages_of(q->spec.prompt_count + q->limit - 1)); // the last token is not computed
}

// Pages that the running sequences will want soon.
static int64_t pages_spoken_for(const struct scheduler *s)
{
    int64_t pages = 0;
    for (int64_t i = 0; i < s->num_admitted; i++) {
        const struct sequence *q = s->admitted[i];
        if (q->state == SEQUENCE_RUNNING)
            pages += pages_wanted(q) - min_of(q->num_pages, pages_wanted(q));
    }
    return pages;
}

// Starts with the pages that are known; false, and without any, when there is no room for the others. The first in always has room.
static bool start(struct scheduler *s, struct sequence *q, const uint32_t *tokens)
{
    int64_t spoken_for = pages_spoken_for(s);
    match(s, q, tokens);
    if (spoken_for == 0 || page_cache_available(s->cache) >= pages_of(q->length) - q->num_pages + spoken_for) {
        q->state = SEQUENCE_RUNNING;
        return true;
    }
    scheduler_release_pages(s, q);
    s->admission_blocked = true;
    return false;
}

void scheduler_write_edits(struct scheduler *s, const struct sequence *q)
{
    const struct sequence_spec *spec = &q->spec;
    struct step_slot *slot = &s->area.slots[q->slot];
    int32_t n = 0;
    for (int64_t i = 0; i < spec->num_edits; i++)
        slot->edits[n++] = spec->edits[i];
    if (!q->stops_allowed) {
        for (int64_t i = 0; i < spec->num_eos && !spec->ignore_eos; i++)
            slot->edits[n++] = (struct logit_edit){spec->eos_ids[i], -INFINITY};
        for (int64_t i = 0; i < spec->num_stop_ids; i++)
            slot->edits[n++] = (struct logit_edit){spec->stop_ids[i], -INFINITY};
    }
    slot->num_edits = n;
}

// Drafts are behind several choices at once, but penalties count, and filters follow, each token before the next.
static bool may_draft(const struct scheduler *s, const struct sequence_spec *spec)
{
    return s->options.draft_tokens > 0 && !spec->filter && !sampling_has_penalties(&spec->sampling);
}

static void take_slot(struct scheduler *s, struct sequence *q, int32_t slot)
{
    const struct sequence_spec *spec = &q->spec;
    s->slots[slot] = q;
    s->admitted[s->num_admitted++] = q;
    memcpy(q->tokens, spec->prompt, (size_t)spec->prompt_count * sizeof *q->tokens);
    struct step_slot *out = &s->area.slots[slot];
    out->sampling = spec->sampling;
    out->prompt_count = spec->prompt_count;
    out->num_logprobs = spec->num_logprobs;
    out->masked = spec->filter != NULL;
    scheduler_write_edits(s, q);
    if (may_draft(s, spec)) {
        q->draft = &s->drafts[slot];
        draft_begin(q->draft, s->options.draft_tokens);
    }
}

static bool admit_one(struct scheduler *s, struct sequence *q)
{
    int32_t slot = 0;
    while (s->slots[slot])
        slot++;
    q->slot = slot;
    q->tokens = s->area.tokens + slot * s->area.context;
    q->pages = s->area.pages + slot * s->area.pages_per_sequence;
    q->length = q->spec.prompt_count;
    if (!start(s, q, q->spec.prompt))
        return false;
    fair_queue_remove(s->queue, &q->item);
    take_slot(s, q, slot);
    q->usage.cached_tokens = q->computed;
    s->stats.cached_tokens += q->computed;
    s->stats.prefix_queries_tokens += s->options.share_prefixes ? q->length : 0;
    fair_queue_charge(&q->item, q->length - q->computed);
    return true;
}

void scheduler_admit(struct scheduler *s)
{
    if (s->admission_blocked)
        return;
    for (int64_t i = 0; i < s->num_admitted; i++) {
        struct sequence *q = s->admitted[i];
        if (q->state == SEQUENCE_PREEMPTED && !start(s, q, q->tokens))
            return;
    }
    while (s->num_admitted < s->options.max_sequences && fair_queue_count(s->queue) > 0)
        if (!admit_one(s, (struct sequence *)(void *)fair_queue_first(s->queue)))
            return;
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

static void give(struct scheduler *s, struct sequence *q, int64_t rows, int64_t choices)
{
    q->rows += rows;
    q->choices += choices;
    s->rows_left -= rows;
    s->choices_left -= choices;
    if (!in_prompt(q))
        s->decode_left -= rows;
}

// Rows of the next chunk of a prompt.
static int64_t chunk_of(const struct scheduler *s, const struct sequence *q)
{
    int64_t chunk = s->options.prefill_chunk, end = q->computed + chunk;
    if (s->options.chunks_fixed)
        end = q->computed / chunk * chunk + chunk;
    return min_of(end, q->spec.prompt_count) - q->computed;
}

// What others have computed meanwhile, such as the same prompt a little earlier.
static void match_prompts(struct scheduler *s)
{
    for (int64_t i = 0; i < s->num_admitted; i++) {
        struct sequence *q = s->admitted[i];
        if (q->state != SEQUENCE_RUNNING || !in_prompt(q))
            continue;
        int64_t found = match(s, q, q->tokens);
        if (found > 0)
            s->admission_blocked = false;
        if (q->produced == 0 && q->usage.preemptions == 0) {
            q->usage.cached_tokens += found;
            s->stats.cached_tokens += found;
            fair_queue_charge(&q->item, -found);
        }
    }
}

// Filters may be costly (a client writes their grammars), and every stream waits for them: once they have taken their time the others'
// turn comes in the next step. Masks stay until their choice is made.
static void fill_masks(struct scheduler *s)
{
    int64_t until_ns = clock_now_ns() + MASKS_NS, count = s->num_admitted, begin = s->mask_turn;
    for (int64_t i = 0; i < count; i++) {
        struct sequence *q = s->admitted[(begin + i) % count];
        if (q->state != SEQUENCE_RUNNING || !q->spec.filter || q->mask_filled)
            continue;
        s->mask_turn = begin + i;
        if (clock_now_ns() >= until_ns)
            return;
        uint32_t *mask = s->area.masks + q->slot * s->area.mask_words;
        q->spec.filter->fill(q->spec.filter->state, mask, s->area.mask_words);
        q->mask_filled = true;
    }
}

static bool waits_for_mask(const struct sequence *q) { return q->spec.filter && !q->mask_filled; }

// One row for every sequence that decodes, or for as many as have their turn: no stream waits for another's prompt or draft.
static int64_t plan_decode(struct scheduler *s, int64_t most)
{
    int64_t streams = 0;
    for (int64_t i = 0; i < s->num_admitted && streams < most; i++) {
        struct sequence *q = s->admitted[i];
        if (q->state == SEQUENCE_RUNNING && !q->under_way && !in_prompt(q) && !waits_for_mask(q) &&
            reserve(s, q, q->computed + 1)) {
            give(s, q, 1, q->computed + 1 == q->length);
            streams++;
        }
    }
    return streams;
}

// Drafts never take a page that others may want soon.
static int64_t room_for_draft(const struct scheduler *s, const struct sequence *q, int64_t wanted)
{
    if (page_cache_available(s->cache) > s->num_admitted + pages_of(wanted))
        return wanted;
    return min_of(wanted, q->num_pages * KV_PAGE_TOKENS - q->length);
}

static int64_t plan_draft(struct scheduler *s, struct sequence *q, int64_t most, double worth)
{
    int64_t limit = q->draft ? draft_limit(q->draft, worth) : 0;
    limit = min_of(limit, min_of(most, s->choices_left));
    limit = min_of(limit, q->limit - q->produced - 1);
    if (!q->stops_allowed)
        limit = min_of(limit, q->spec.min_tokens - q->produced - 1); // the edits change behind these
    if (limit <= 0 || (limit = room_for_draft(s, q, limit)) <= 0)
        return 0;
    return draft_propose(q->draft, q->tokens, q->length, limit);
}

// More rows for sequences that compute their output again, and for drafts.
static void plan_more_decode(struct scheduler *s, int64_t streams, int64_t reserved)
{
    // A step of n rows takes time like balance_rows + n and gives n tokens; a row more is worth it when it gives tokens no slower.
    double rows = (double)streams, balance = (double)s->options.balance_rows;
    double worth = balance > 0 ? rows / (rows + balance) : 0.05;
    for (int64_t i = 0; i < s->num_admitted; i++) {
        struct sequence *q = s->admitted[i];
        if (q->state != SEQUENCE_RUNNING || q->under_way || in_prompt(q) || q->rows == 0)
            continue;
        int64_t left = min_of(s->decode_left, s->rows_left - reserved);
        int64_t behind = q->length - q->computed - 1, share = left / streams--;
        if (left <= 0)
            return;
        if (behind > 0) {
            int64_t more = min_of(behind, left);
            if (reserve(s, q, q->computed + 1 + more))
                give(s, q, more, more == behind);
        } else {
            int64_t drafted = plan_draft(s, q, share, worth);
            if (drafted > 0 && reserve(s, q, q->length + drafted))
                give(s, q, drafted, drafted);
        }
    }
}

// Whether an older sequence computes in this step what q needs next, so that q finds it in the next one.
static bool is_being_computed(const struct scheduler *s, const struct sequence *q)
{
    int64_t had = q->num_published, begin = had * KV_PAGE_TOKENS, end = begin + s->share_tokens;
    if (!s->options.share_prefixes || end >= q->length)
        return false;
    for (int64_t i = 0; s->admitted[i] != q; i++) {
        const struct sequence *older = s->admitted[i];
        if (older->rows > 0 && in_prompt(older) && older->computed + older->rows >= end &&
            older->num_published == had && older->spec.salt == q->spec.salt &&
            (had == 0 || older->pages[had - 1] == q->pages[had - 1]) &&
            !memcmp(older->tokens + begin, q->tokens + begin, (size_t)(end - begin) * sizeof *q->tokens))
            return true;
    }
    return false;
}

static void plan_prefill(struct scheduler *s)
{
    bool planned = false;
    for (int64_t i = 0; i < s->num_admitted && s->rows_left > 0; i++) {
        struct sequence *q = s->admitted[i];
        if (q->state != SEQUENCE_RUNNING || !in_prompt(q) || waits_for_mask(q) || is_being_computed(s, q))
            continue;
        int64_t rows = chunk_of(s, q);
        if (rows > s->rows_left && s->options.chunks_fixed) {
            s->prefill_waited = !planned;
            return;
        }
        rows = min_of(rows, s->rows_left);
        if (reserve(s, q, q->computed + rows)) {
            give(s, q, rows, q->computed + rows == q->length);
            planned = true;
        }
    }
}

// Prompts' rows of a step in which streams wait for their next token: so many that little time goes into reading the weights again for the
// rest, and no more, so that the step is short.
static int64_t prefill_beside_decode(const struct scheduler *s)
{
    bool cuts = !s->options.chunks_fixed && s->options.balance_rows > 0;
    return cuts ? 8 * s->options.balance_rows : s->options.max_rows;
}

// The first chunk that waits; 0: none does.
static int64_t next_chunk(const struct scheduler *s)
{
    for (int64_t i = 0; i < s->num_admitted; i++)
        if (s->admitted[i]->state == SEQUENCE_RUNNING && in_prompt(s->admitted[i]) && !waits_for_mask(s->admitted[i]))
            return chunk_of(s, s->admitted[i]);
    return 0;
}

// ---- The step ------------------------------------------------------------------------------------------------------

static void write_segment(struct scheduler *s, struct sequence *q)
{
    struct step *step = s->area.step;
    step->segments[step->num_segments++] = (struct step_segment){
        .sequence = q->slot,
        .phase = in_prompt(q) ? PHASE_PREFILL : PHASE_DECODE,
        .start = q->computed,
        .count = q->rows,
        .choices = q->choices,
        .first_step = (uint64_t)q->produced,
        .begins_sequence = !q->begun,
    };
    q->begun = true;
    q->first_choice = step->num_choices;
    step->num_choices += q->choices;
    s->plan.planned[s->plan.num_planned++] = q;
    *(in_prompt(q) ? &s->stats.prefill_rows : &s->stats.decode_rows) += q->rows;
}

// Streams of one turn, where staggered steps are worth it. 0: they are not, or a prompt is to be computed.
//
// With P stages, n streams, r = n / balance_rows and a stage's weights read in one unit of time, all streams' next tokens take min over M of
// (M + P - 1) (1 + r / M) in a step of M passes, and P + r in P turns: as long for small r, where all the time goes into reading, and two thirds of it
// from r = 2 on (P = 2). Turns are as long as the slowest stage, and stages that read the same memory at the same time are slower: so from r = 2 on.
static int64_t streams_of_turn(const struct scheduler *s)
{
    int64_t streams = 0, stages = s->options.stages, balance = s->options.balance_rows;
    for (int64_t i = 0; i < s->num_admitted; i++) {
        const struct sequence *q = s->admitted[i];
        if (q->state == SEQUENCE_RUNNING && in_prompt(q))
            return 0;
        streams += q->state == SEQUENCE_RUNNING;
    }
    if (stages < 2 || balance == 0 || s->drains || streams < 2 * (stages > balance ? stages : balance))
        return 0;
    int64_t of_turn = (streams + stages - 1) / stages;
    return of_turn <= s->options.staggered_rows ? of_turn : 0;
}

static void plan_staggered(struct scheduler *s, int64_t streams)
{
    s->rows_left = min_of(s->rows_left, s->options.staggered_rows);
    s->decode_left = min_of(s->decode_left, s->options.staggered_rows);
    if (streams > 0)
        plan_more_decode(s, plan_decode(s, streams), 0);
}

static void plan_together(struct scheduler *s)
{
    int64_t chunk = next_chunk(s);
    s->drains = false;
    // Where a chunk cannot be cut and does not fit beside the others, they take turns.
    if (chunk == 0 || !s->prefill_waited) {
        int64_t streams = plan_decode(s, MAX_SEQUENCES);
        if (streams > 0)
            chunk = min_of(chunk, prefill_beside_decode(s));
        plan_more_decode(s, streams, min_of(chunk, s->rows_left));
        if (streams > 0)
            s->rows_left = min_of(s->rows_left, prefill_beside_decode(s));
    }
    s->prefill_waited = false;
    plan_prefill(s);
}

void scheduler_plan(struct scheduler *s)
{
    s->rows_left = s->options.max_rows;
    s->decode_left = s->options.decode_rows;
    s->choices_left = STEP_MAX_CHOICES;
    s->plan.num_planned = 0;
    for (int64_t i = 0; i < s->num_admitted; i++)
        if (!s->admitted[i]->under_way)
            s->admitted[i]->rows = s->admitted[i]->choices = 0;

    match_prompts(s);
    fill_masks(s);
    int64_t streams = streams_of_turn(s);
    struct step *step = s->area.step;
    step->staggered = streams > 0 || s->num_under_way > 0;
    if (step->staggered)
        plan_staggered(s, streams);
    else
        plan_together(s);

    step->num_segments = step->num_choices = 0;
    for (int64_t i = 0; i < s->num_admitted; i++)
        if (s->admitted[i]->rows > 0 && in_prompt(s->admitted[i]))
            write_segment(s, s->admitted[i]);
    for (int64_t i = 0; i < s->num_admitted; i++)
        if (s->admitted[i]->rows > 0 && !s->admitted[i]->under_way && !in_prompt(s->admitted[i]))
            write_segment(s, s->admitted[i]);
}

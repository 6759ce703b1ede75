// The lives of sequences: added, given their tokens, ended. See scheduler.h; what a step computes is scheduler_plan.c's.
#include "engine/scheduler_internal.h"

#include "kernels/clock.h"

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(offsetof(struct sequence, item) == 0, "the queue's items are sequences");

enum { OUTPUT_WEIGHT = 2 }; // of a produced token against one of a prompt, in what a tenant was served

// ---- Making and unmaking -------------------------------------------------------------------------------------------

static int64_t least_common_multiple(int64_t a, int64_t b)
{
    int64_t multiple = a;
    while (multiple % b)
        multiple += a;
    return multiple;
}

static int check_options(const struct scheduler_options *o, const struct step_area *area, struct error *err)
{
    bool good = o->num_pages >= 1 && o->context >= 1 && o->context <= area->context && o->max_sequences >= 1 &&
                o->max_sequences <= MAX_SEQUENCES && o->max_sequences <= area->max_sequences && o->prefill_chunk >= 1 &&
                o->decode_rows >= o->max_sequences && o->max_rows >= o->decode_rows && o->draft_tokens >= 0 &&
                (!o->chunks_fixed || o->max_rows >= o->prefill_chunk) && o->stages >= 0 &&
                o->stages <= SCHEDULER_MAX_STAGES;
    if (!good)
        return error_set(err, ERR_USAGE,
                         "a scheduler of %lld slots, %lld pages, %lld rows (%lld decode, %lld prefill) does not work",
                         (long long)o->max_sequences, (long long)o->num_pages, (long long)o->max_rows,
                         (long long)o->decode_rows, (long long)o->prefill_chunk);
    return 0;
}

int scheduler_create(struct scheduler **out, const struct scheduler_options *options, const struct step_area *area,
                     const struct step_runner *runner, struct error *err)
{
    int rc = check_options(options, area, err);
    if (rc)
        return rc;
    struct scheduler *s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_MEMORY, "no memory for the scheduler");
    s->options = *options;
    s->area = *area;
    s->runner = *runner;
    s->share_tokens =
        options->chunks_fixed ? least_common_multiple(KV_PAGE_TOKENS, options->prefill_chunk) : (int64_t)KV_PAGE_TOKENS;
    if ((rc = page_cache_create(&s->cache, options->num_pages, options->hash_seed, err)) ||
        (rc = fair_queue_create(&s->queue, err)))
        goto fail;
    if (options->draft_tokens > 0 && !(s->drafts = calloc((size_t)options->max_sequences, sizeof *s->drafts))) {
        rc = error_set(err, ERR_MEMORY, "no memory for drafts");
        goto fail;
    }
    if (options->stages > 1 && !(s->turns = calloc((size_t)options->stages, sizeof *s->turns))) {
        rc = error_set(err, ERR_MEMORY, "no memory for steps of %lld stages", (long long)options->stages);
        goto fail;
    }
    *out = s;
    return 0;
fail:
    scheduler_free(s);
    return rc;
}

static void end_all(struct scheduler *s, enum finish_reason reason, const struct error *why);

void scheduler_free(struct scheduler *s)
{
    if (!s)
        return;
    end_all(s, FINISH_CANCELLED, NULL);
    page_cache_free(s->cache);
    fair_queue_free(s->queue);
    free(s->drafts);
    free(s->turns);
    free(s);
}

// ---- The end of a sequence -----------------------------------------------------------------------------------------

static struct sequence *next_of_group(const struct sequence *q)
{
    return q->next && q->next->group == q->group ? q->next : NULL;
}

static void enqueue_first(struct scheduler *s, struct sequence *q)
{
    q->state = SEQUENCE_WAITING;
    fair_queue_push(s->queue, &q->item, true);
    s->admission_blocked = false;
}

// The prompt is there: the others of the group follow, before whatever else their tenants wait for.
static void release_group(struct scheduler *s, struct sequence *leader)
{
    if (!leader->leads)
        return;
    leader->leads = false;
    struct sequence *q = leader;
    while (next_of_group(q))
        q = next_of_group(q);
    for (; q != leader; q = q->previous)
        if (q->state == SEQUENCE_HELD)
            enqueue_first(s, q);
}

// The leader ends without it: the next one computes the prompt.
static void hand_on_group(struct scheduler *s, struct sequence *leader)
{
    if (!leader->leads)
        return;
    struct sequence *q = next_of_group(leader);
    while (q && q->state != SEQUENCE_HELD)
        q = next_of_group(q);
    if (!q)
        return;
    q->leads = true;
    enqueue_first(s, q);
}

static void leave_slot(struct scheduler *s, struct sequence *q)
{
    int64_t i = 0;
    while (s->admitted[i] != q)
        i++;
    s->num_admitted--;
    memmove(&s->admitted[i], &s->admitted[i + 1], (size_t)(s->num_admitted - i) * sizeof *s->admitted);
    s->slots[q->slot] = NULL;
    scheduler_release_pages(s, q);
}

static void end(struct scheduler *s, struct sequence *q, enum finish_reason reason, uint32_t stop_token,
                const struct error *why)
{
    assert(q->state != SEQUENCE_ENDED);
    hand_on_group(s, q);
    if (q->state == SEQUENCE_WAITING)
        fair_queue_remove(s->queue, &q->item);
    else if (q->state != SEQUENCE_HELD)
        leave_slot(s, q);
    fair_queue_leave(s->queue, &q->item);
    s->num_cancelled -= q->cancelled;
    s->admission_blocked = false;
    q->state = SEQUENCE_ENDED;
    s->num_sequences--;
    *(q->previous ? &q->previous->next : &s->first) = q->next;
    *(q->next ? &q->next->previous : &s->last) = q->previous;

    double now = clock_now_s(), started = q->started_s > 0 ? q->started_s : now;
    double first_token = q->first_token_s > 0 ? q->first_token_s : now;
    q->usage.queued_s = started - q->added_s;
    q->usage.prefill_s = first_token - started;
    q->usage.decode_s = now - first_token;
    q->usage.produced_tokens = q->produced;
    s->busy++;
    q->spec.on_end(q->spec.arg, reason, &q->usage, stop_token, why);
    s->busy--;
    free(q);
}

// Those under way end when they are back.
static void end_cancelled(struct scheduler *s)
{
    while (s->num_cancelled > 0 && s->busy == 0) {
        struct sequence *q = s->first;
        while (q && (!q->cancelled || q->under_way))
            q = q->next;
        if (!q)
            return;
        end(s, q, FINISH_CANCELLED, STEP_NO_TOKEN, NULL);
    }
}

// What callbacks add meanwhile stays. Nothing comes back of steps under way.
static void end_all(struct scheduler *s, enum finish_reason reason, const struct error *why)
{
    uint64_t groups = s->next_group;
    for (int64_t i = 0; i < s->num_admitted; i++)
        s->admitted[i]->under_way = false;
    for (int64_t i = 0; s->turns && i < s->options.stages; i++)
        s->turns[i].num_planned = 0;
    s->num_under_way = 0;
    s->drains = false;
    while (s->first && s->first->group < groups)
        end(s, s->first, reason, STEP_NO_TOKEN, why);
}

void scheduler_cancel(struct scheduler *s, struct sequence *q)
{
    if (q->state == SEQUENCE_ENDED || q->cancelled)
        return;
    q->cancelled = true;
    s->num_cancelled++;
    end_cancelled(s);
}

void scheduler_fail(struct scheduler *s, const struct error *why)
{
    assert(s->busy == 0);
    end_all(s, FINISH_ERROR, why);
    end_cancelled(s); // what callbacks have added and cancelled
    page_cache_clear(s->cache);
}

// ---- Adding --------------------------------------------------------------------------------------------------------

// The last token of the output is never fed, so it needs no room.
static int64_t output_limit(const struct scheduler *s, int64_t prompt_count)
{
    int64_t cache = s->options.num_pages * KV_PAGE_TOKENS;
    return (s->options.context < cache ? s->options.context : cache) + 1 - prompt_count;
}

static int check_edits(const struct scheduler *s, const struct sequence_spec *spec, struct error *err)
{
    int64_t edits = spec->num_edits;
    if (spec->min_tokens > 0)
        edits += spec->num_stop_ids + (spec->ignore_eos ? 0 : spec->num_eos);
    if (edits > STEP_MAX_EDITS)
        return error_set(err, ERR_USAGE, "%lld tokens have a bias or end the text; at most %d may", (long long)edits,
                         STEP_MAX_EDITS);
    for (int64_t i = 0; i < spec->num_edits; i++)
        if (spec->edits[i].token >= s->area.vocab_size || !(spec->edits[i].add < INFINITY))
            return error_set(err, ERR_USAGE, "the bias of token %u is not a number, or the model has no such token",
                             spec->edits[i].token);
    return 0;
}

static int check_spec(const struct scheduler *s, const struct sequence_spec *spec, struct error *err)
{
    if (spec->prompt_count < 1 || spec->prompt_count > s->options.context)
        return error_set(err, ERR_USAGE, "the prompt has %lld tokens; from 1 to %lld fit the context",
                         (long long)spec->prompt_count, (long long)s->options.context);
    if (output_limit(s, spec->prompt_count) < 1)
        return error_set(err, ERR_MEMORY, "the prompt has %lld tokens; the KV cache has room for %lld",
                         (long long)spec->prompt_count, (long long)(s->options.num_pages * KV_PAGE_TOKENS));
    if (spec->max_tokens < 1)
        return error_set(err, ERR_USAGE, "%lld tokens of output are wanted; at least 1 is made",
                         (long long)spec->max_tokens);
    if (spec->num_logprobs < -1 || spec->num_logprobs > STEP_MAX_LOGPROBS)
        return error_set(err, ERR_USAGE, "%d likeliest tokens are wanted; at most %d are given", spec->num_logprobs,
                         STEP_MAX_LOGPROBS);
    for (int64_t i = 0; i < spec->prompt_count; i++)
        if (spec->prompt[i] >= s->area.vocab_size)
            return error_set(err, ERR_USAGE, "token %u of the prompt: the model has %lld tokens", spec->prompt[i],
                             (long long)s->area.vocab_size);
    if (!sampling_is_sound(&spec->sampling))
        return error_set(err, ERR_USAGE, "a sampling parameter is out of its range");
    return check_edits(s, spec, err);
}

static struct sequence *new_sequence(struct scheduler *s, const struct sequence_spec *spec, struct error *err)
{
    struct sequence *q = calloc(1, sizeof *q);
    if (!q) {
        error_set(err, ERR_MEMORY, "no memory for another sequence");
        return NULL;
    }
    if (fair_queue_join(s->queue, &q->item, spec->tenant, err)) {
        free(q);
        return NULL;
    }
    int64_t limit = output_limit(s, spec->prompt_count);
    q->spec = *spec;
    q->limit = spec->max_tokens < limit ? spec->max_tokens : limit;
    q->stops_allowed = spec->min_tokens <= 0;
    q->group = s->next_group;
    q->added_s = clock_now_s();
    q->usage.prompt_tokens = spec->prompt_count;
    q->slot = -1;
    return q;
}

int scheduler_add(struct scheduler *s, const struct sequence_spec *specs, int64_t count, struct sequence **out,
                  struct error *err)
{
    int rc;
    int64_t made = 0;
    for (int64_t i = 0; i < count; i++)
        if ((rc = check_spec(s, &specs[i], err)))
            return rc;
    for (; made < count; made++)
        if (!(out[made] = new_sequence(s, &specs[made], err)))
            goto fail;
    // Nothing can be shared of a short prompt.
    bool waits = s->options.share_prefixes && specs[0].prompt_count > s->share_tokens;
    for (int64_t i = 0; i < count; i++) {
        struct sequence *q = out[i];
        q->previous = s->last;
        *(s->last ? &s->last->next : &s->first) = q;
        s->last = q;
        s->num_sequences++;
        if (i > 0 && waits) {
            q->state = SEQUENCE_HELD;
        } else {
            q->state = SEQUENCE_WAITING;
            q->leads = waits && count > 1;
            fair_queue_push(s->queue, &q->item, false);
        }
    }
    s->next_group++;
    s->admission_blocked = false;
    return 0;
fail:
    while (made-- > 0) {
        fair_queue_leave(s->queue, &out[made]->item);
        free(out[made]);
    }
    return ERR_MEMORY;
}

// ---- A step's tokens -----------------------------------------------------------------------------------------------

static bool contains(const uint32_t *ids, int64_t count, uint32_t token)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] == token)
            return true;
    return false;
}

static bool ends_text(const struct sequence_spec *spec, uint32_t token)
{
    return (!spec->ignore_eos && contains(spec->eos_ids, spec->num_eos, token)) ||
           contains(spec->stop_ids, spec->num_stop_ids, token);
}

// No token was allowed while the ends were still forbidden (min_tokens): the text is over where its filter would have it end.
static bool is_over(const struct scheduler *s, const struct sequence *q)
{
    const uint32_t *mask = s->area.masks + q->slot * s->area.mask_words;
    if (q->stops_allowed)
        return false;
    for (int64_t i = 0; q->spec.filter && i < q->spec.num_eos; i++)
        if (mask[q->spec.eos_ids[i] / 32] >> q->spec.eos_ids[i] % 32 & 1)
            return true;
    return !q->spec.filter;
}

// One chosen token becomes part of the output; FINISH_NONE: and more may come.
static enum finish_reason take_token(struct scheduler *s, struct sequence *q, uint32_t token)
{
    if (token == STEP_NO_TOKEN)
        return is_over(s, q) ? FINISH_EOS : FINISH_ERROR;
    if (ends_text(&q->spec, token))
        return FINISH_EOS;
    if (q->length < s->area.context)
        q->tokens[q->length] = token;
    q->length++;
    q->produced++;
    q->mask_filled = false;
    if (q->spec.filter)
        q->spec.filter->advance(q->spec.filter->state, token);
    if (!q->stops_allowed && q->produced >= q->spec.min_tokens) {
        q->stops_allowed = true;
        scheduler_write_edits(s, q);
    }
    return q->produced < q->limit ? FINISH_NONE : FINISH_LENGTH;
}

// Tokens behind choices: the first is the next token; each further one counts if the draft before it was right.
static void take_choices(struct scheduler *s, struct sequence *q, double now)
{
    const struct step_choice *choices = s->area.step->choices + q->first_choice;
    int64_t drafted = q->choices - 1, had = q->length, produced = q->produced, taken = 0;
    enum finish_reason reason = FINISH_NONE;
    uint32_t token, drafted_token;
    do {
        drafted_token = taken < drafted ? q->tokens[had + taken] : STEP_NO_TOKEN;
        token = choices[taken++].token;
        reason = take_token(s, q, token);
    } while (reason == FINISH_NONE && taken <= drafted && token == drafted_token);

    int64_t accepted = taken - 1, delivered = q->produced - produced;
    q->computed = had + accepted;
    if (drafted > 0) {
        q->usage.drafted_tokens += drafted;
        q->usage.accepted_tokens += accepted;
        s->stats.drafted_tokens += drafted;
        s->stats.accepted_tokens += accepted;
        draft_learn(q->draft, drafted, accepted);
    }
    s->stats.produced_tokens += delivered;
    fair_queue_charge(&q->item, OUTPUT_WEIGHT * delivered);
    if (q->first_token_s == 0) {
        q->first_token_s = now;
        s->stats.prompt_tokens += q->spec.prompt_count;
    }
    scheduler_publish(s, q);
    release_group(s, q);
    if (delivered > 0 && q->spec.on_tokens && !q->spec.on_tokens(q->spec.arg, choices, delivered))
        reason = FINISH_CANCELLED;
    if (reason == FINISH_NONE)
        return;
    struct error why;
    if (reason == FINISH_ERROR)
        error_set(&why, ERR_OTHER, "no token of the vocabulary continues the output");
    end(s, q, reason, reason == FINISH_EOS ? token : STEP_NO_TOKEN, reason == FINISH_ERROR ? &why : NULL);
}

static void take_results(struct scheduler *s, const struct turn *turn)
{
    double now = clock_now_s();
    for (int64_t i = 0; i < turn->num_planned; i++) {
        struct sequence *q = turn->planned[i];
        if (q->choices > 0 && !q->cancelled) {
            take_choices(s, q, now);
        } else {
            q->computed += q->rows - (q->choices > 0 ? q->choices - 1 : 0);
            scheduler_publish(s, q);
        }
    }
}

// The planned step has been run, staggered: its sequences are under way, and those of the step before, by as many as there are stages, are back.
static struct turn *next_turn(struct scheduler *s)
{
    struct turn *begun = &s->turns[s->num_turns % s->options.stages];
    struct turn *back = &s->turns[++s->num_turns % s->options.stages];
    *begun = s->plan;
    for (int64_t i = 0; i < begun->num_planned; i++)
        begun->planned[i]->under_way = true;
    for (int64_t i = 0; i < back->num_planned; i++)
        back->planned[i]->under_way = false;
    s->num_under_way += begun->num_planned - back->num_planned;
    return back;
}

bool scheduler_has_work(const struct scheduler *s) { return s->first != NULL; }

int scheduler_step(struct scheduler *s, struct error *err)
{
    assert(s->busy == 0);
    s->busy++;
    scheduler_admit(s);
    scheduler_plan(s);
    struct turn *done = &s->plan;
    double now = clock_now_s();
    for (int64_t i = 0; i < s->plan.num_planned; i++)
        if (s->plan.planned[i]->started_s == 0)
            s->plan.planned[i]->started_s = now;
    if (s->plan.num_planned > 0 || s->num_under_way > 0) {
        s->stats.steps += s->plan.num_planned > 0;
        struct error why;
        int rc;
        if ((rc = s->runner.run(s->runner.arg, &why))) {
            s->busy--;
            scheduler_fail(s, &why);
            return error_set(err, rc, "%s", why.msg);
        }
        if (s->area.step->staggered)
            done = next_turn(s);
        take_results(s, done);
        done->num_planned = 0;
    }
    s->busy--;
    end_cancelled(s);
    return 0;
}

void scheduler_read_stats(const struct scheduler *s, struct scheduler_stats *out)
{
    *out = s->stats;
    out->running = out->preempted = 0;
    for (int64_t i = 0; i < s->num_admitted; i++)
        ++*(s->admitted[i]->state == SEQUENCE_RUNNING ? &out->running : &out->preempted);
    out->waiting = s->num_sequences - s->num_admitted;
    out->pages = s->options.num_pages;
    out->pages_used = out->pages - page_cache_available(s->cache);
    out->pages_cached = page_cache_kept(s->cache);
}

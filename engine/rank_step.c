// Running the parent's steps on one rank. See rank_step.h.
//
// Where backend and wire have one arithmetic for both phases, all segments are one forward pass. Elsewhere each prefill segment is a pass of its
// own, then all decode rows together; prefill comes first since a slot's decode rows may follow its prefill rows.
//
// With several stages a step is cut into more passes, which flow through the stages one behind the other: while a stage runs a pass, the one before it
// runs the next. Every rank cuts alike. The last stage chooses tokens, and its first rank sends them to rank 0.
//
// Tokens are chosen on the device where it can, but for slots that need logits on the host: for logprobs, a mask or edits. Their rows are
// chosen there as well, so that a decode step can be replayed whole, and the result is dropped.
#include "engine/rank_step.h"

#include "engine/sampler.h"
#include "kernels/clock.h"

#include <stdlib.h>
#include <string.h>

enum {
    NOT_COUNTED = -1,
    LEAST_PREFILL_ROWS = 32, // of a pass, with several stages
    LEAST_DECODE_ROWS = 1,
};

// What a slot's penalties have counted, apart from the prompt.
struct slot_counts {
    struct token_counts host;             // allocated when first needed
    int64_t host_outputs, device_outputs; // tokens of the output; NOT_COUNTED
};

// The choices of one pass.
struct pass {
    int64_t num_rows, num_choices;
    int64_t row[STEP_MAX_CHOICES];      // of the pass
    int32_t sequence[STEP_MAX_CHOICES]; // slot
    uint64_t step[STEP_MAX_CHOICES];    // tokens that the sequence has produced
    int64_t choice[STEP_MAX_CHOICES];   // of the step
};

// A staggered step that is under way.
struct staggered_step {
    int64_t num_segments, num_choices;
    struct step_segment segments[STEP_MAX_SEGMENTS];
};

struct rank_step {
    struct decoder *decoder;
    struct step_limits limits;
    bool device_samples;
    struct sampler *sampler;
    struct slot_counts counts[MAX_SEQUENCES];
    struct token_row *rows; // of one pass
    float *logits;          // [logits_rows][vocab_local]
    int64_t logits_rows;
    struct step step;                 // a copy, checked
    struct staggered_step *under_way; // [stages] the last ones; NULL: there has been none
    int64_t staggered;                // how many
    struct pass pass;
    struct rank_step_rows ran;
    struct pass_counts *counts_of_passes;
};

int64_t rank_step_pass_rows(const struct backend *backend, const struct step_limits *limits)
{
    if (backend->mixes_phases)
        return limits->max_rows;
    return limits->prefill_rows > limits->decode_rows ? limits->prefill_rows : limits->decode_rows;
}

int rank_step_create(struct rank_step **out, struct decoder *decoder, const struct step_limits *limits,
                     int64_t usual_choices, struct error *err)
{
    const struct rank_share *share = &decoder->model->share;
    struct rank_step *s = calloc(1, sizeof *s);
    int rc = 0;
    if (!s)
        return error_set(err, ERR_MEMORY, "no memory for steps");
    s->decoder = decoder;
    s->limits = *limits;
    s->device_samples = decoder_samples(decoder);
    s->logits_rows = usual_choices < SAMPLER_MAX_ROWS ? usual_choices : SAMPLER_MAX_ROWS;
    s->rows = calloc((size_t)rank_step_pass_rows(decoder->backend, limits), sizeof *s->rows);
    s->logits =
        calloc((size_t)(decoder->model->stage_behind ? 1 : s->logits_rows * share->vocab_local + 1), sizeof *s->logits);
    if (!s->rows || !s->logits)
        rc = error_set(err, ERR_MEMORY, "no memory for steps of %lld rows", (long long)limits->max_rows);
    if (rc || (rc = sampler_create(&s->sampler, comm_size(decoder->comm), share->vocab_begin, share->vocab_local, err)))
        goto fail;
    *out = s;
    return 0;
fail:
    rank_step_free(s);
    return rc;
}

void rank_step_free(struct rank_step *s)
{
    if (!s)
        return;
    for (int i = 0; i < MAX_SEQUENCES; i++)
        token_counts_free(&s->counts[i].host);
    sampler_free(s->sampler);
    free(s->under_way);
    free(s->rows);
    free(s->logits);
    free(s);
}

void rank_step_count_passes(struct rank_step *s, struct pass_counts *counts) { s->counts_of_passes = counts; }

struct rank_step_rows rank_step_rows(const struct rank_step *s) { return s->ran; }

static struct kv_pages pages_of(const struct step_area *area)
{
    return (struct kv_pages){
        .pages = area->pages, .pages_per_sequence = area->pages_per_sequence, .version = *area->pages_version};
}

// ---- counts ----------------------------------------------------------------------------------------------------

// What a sequence has produced stands in the token table behind its prompt, so that counts can be made, or made up, at any time.
static int count_on_host(struct rank_step *s, const struct step_area *area, int32_t slot, int64_t outputs,
                         struct error *err)
{
    struct slot_counts *counts = &s->counts[slot];
    const uint32_t *tokens = area->tokens + slot * area->context;
    int64_t prompt = area->slots[slot].prompt_count, vocab = s->decoder->model->share.vocab_local;
    if (counts->host_outputs == NOT_COUNTED || counts->host_outputs > outputs || !counts->host.in_any) {
        token_counts_free(&counts->host);
        int rc = token_counts_alloc(&counts->host, vocab, err);
        if (rc)
            return rc;
        for (int64_t i = 0; i < prompt; i++)
            token_counts_add(&counts->host, s->sampler, tokens[i], false);
        counts->host_outputs = 0;
    }
    for (; counts->host_outputs < outputs; counts->host_outputs++)
        token_counts_add(&counts->host, s->sampler, tokens[prompt + counts->host_outputs], true);
    return 0;
}

static int count_on_device(struct rank_step *s, const struct step_area *area, int32_t slot, int64_t outputs,
                           struct error *err)
{
    struct slot_counts *counts = &s->counts[slot];
    int64_t prompt = area->slots[slot].prompt_count;
    int rc = 0;
    if (counts->device_outputs != outputs)
        rc = s->decoder->backend->count_tokens(s->decoder->device, slot, area->tokens + slot * area->context, prompt,
                                               prompt + outputs, err);
    counts->device_outputs = outputs + 1; // with the one that is chosen now
    return rc;
}

// ---- choices ---------------------------------------------------------------------------------------------------

static bool needs_host(const struct step_slot *slot)
{
    return slot->num_logprobs >= 0 || slot->masked || slot->num_edits > 0;
}

static int sampler_row_of(struct rank_step *s, const struct step_area *area, int64_t i, float *logits,
                          struct sampler_row *out, struct error *err)
{
    int32_t slot = s->pass.sequence[i];
    const struct step_slot *how = &area->slots[slot];
    bool penalties = sampling_has_penalties(&how->sampling);
    int rc = penalties ? count_on_host(s, area, slot, (int64_t)s->pass.step[i], err) : 0;
    *out = (struct sampler_row){
        .logits = logits,
        .how = &how->sampling,
        .step = s->pass.step[i],
        .counts = penalties ? &s->counts[slot].host : NULL,
        .edits = how->edits,
        .num_edits = how->num_edits,
        .mask = how->masked ? area->masks + slot * area->mask_words : NULL,
        .num_logprobs = how->num_logprobs,
        .out = &s->step.choices[s->pass.choice[i]],
    };
    return rc;
}

// Chooses for some choices of the pass, which [count <= logits_rows], from logits on the host.
static int choose_few(struct rank_step *s, const struct step_area *area, const int64_t *which, int64_t count,
                      struct error *err)
{
    struct sampler_row rows[SAMPLER_MAX_ROWS];
    int64_t index[SAMPLER_MAX_ROWS], vocab = s->decoder->model->share.vocab_local;
    int rc;
    for (int64_t i = 0; i < count; i++) {
        index[i] = s->pass.row[which[i]];
        if ((rc = sampler_row_of(s, area, which[i], s->logits + i * vocab, &rows[i], err)))
            return rc;
    }
    if ((rc = decoder_logits(s->decoder, index, count, s->logits, vocab, err)))
        return rc;
    return sampler_choose(s->sampler, s->decoder->comm, rows, count, err);
}

// All choices of the pass, or those alone that the device does not make.
static int choose_on_host(struct rank_step *s, const struct step_area *area, bool all, struct error *err)
{
    int64_t which[SAMPLER_MAX_ROWS], count = 0;
    int rc = 0;
    for (int64_t i = 0; i < s->pass.num_choices && !rc; i++) {
        if (all || needs_host(&area->slots[s->pass.sequence[i]]))
            which[count++] = i;
        if (count > 0 && (count == s->logits_rows || i + 1 == s->pass.num_choices)) {
            rc = choose_few(s, area, which, count, err);
            count = 0;
        }
    }
    return rc;
}

static int forward_on_device(struct rank_step *s, const struct step_area *area, enum phase phase, struct error *err)
{
    static const struct sampling greedy = {.top_p = 1, .repetition_penalty = 1};
    const struct sampling *sampling[STEP_MAX_CHOICES];
    uint32_t tokens[STEP_MAX_CHOICES];
    const struct pass *pass = &s->pass;
    struct kv_pages pages = pages_of(area);
    int rc;
    for (int64_t i = 0; i < pass->num_choices; i++) {
        const struct step_slot *slot = &area->slots[pass->sequence[i]];
        sampling[i] = needs_host(slot) ? &greedy : &slot->sampling;
        if (sampling_has_penalties(sampling[i]) &&
            (rc = count_on_device(s, area, pass->sequence[i], (int64_t)pass->step[i], err)))
            return rc;
    }
    bool all = pass->num_choices == pass->num_rows;
    if ((rc = decoder_sample(s->decoder, s->rows, pass->num_rows, phase, &pages, all ? NULL : pass->row, sampling,
                             pass->step, pass->num_choices, tokens, err)))
        return rc;
    for (int64_t i = 0; i < pass->num_choices; i++)
        s->step.choices[pass->choice[i]] = (struct step_choice){.token = tokens[i]};
    return 0;
}

// ---- passes ----------------------------------------------------------------------------------------------------

// Adds rows [begin, end) of a segment to the pass. first_choice: of the segment, in the step.
static void add_rows(struct rank_step *s, const struct step_area *area, const struct step_segment *segment,
                     int64_t begin, int64_t end, int64_t first_choice)
{
    struct pass *pass = &s->pass;
    const uint32_t *tokens = area->tokens + segment->sequence * area->context;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = pass->num_rows++, choice = i - (segment->count - segment->choices);
        s->rows[row] = (struct token_row){
            .token = tokens[segment->start + i], .sequence = segment->sequence, .position = segment->start + i};
        if (choice < 0)
            continue;
        int64_t at = pass->num_choices++;
        pass->row[at] = row;
        pass->sequence[at] = segment->sequence;
        pass->step[at] = segment->first_step + (uint64_t)choice;
        pass->choice[at] = first_choice + choice;
    }
}

// Into which stage's counts this rank writes: the first rank says that a pass begins, the last stage's first one that it is done.
static bool begins_passes(const struct rank_step *s)
{
    return s->counts_of_passes && comm_rank(s->decoder->comm) == 0 && !s->decoder->model->stage_before;
}

static bool ends_passes(const struct rank_step *s)
{
    return s->counts_of_passes && comm_rank(s->decoder->comm) == 0 && !s->decoder->model->stage_behind;
}

static void count_begin(const struct rank_step *s)
{
    struct pass_counts *counts = s->counts_of_passes;
    if (!begins_passes(s))
        return;
    long long in_flight = atomic_fetch_add(&counts->begun, 1) + 1 - atomic_load(&counts->done);
    atomic_fetch_add(&counts->sum_in_flight, in_flight);
    if (in_flight > atomic_load(&counts->most_in_flight))
        atomic_store(&counts->most_in_flight, in_flight);
}

static void count_end(const struct rank_step *s)
{
    if (ends_passes(s))
        atomic_fetch_add(&s->counts_of_passes->done, 1);
}

static int run_pass(struct rank_step *s, const struct step_area *area, enum phase phase, struct error *err)
{
    struct kv_pages pages = pages_of(area);
    int rc = 0;
    bool on_device = s->device_samples && s->pass.num_choices > 0;
    if (s->pass.num_rows == 0)
        return 0;
    count_begin(s);
    rc = on_device ? forward_on_device(s, area, phase, err)
                   : decoder_forward(s->decoder, s->rows, s->pass.num_rows, phase, &pages, err);
    if (!rc && !s->decoder->model->stage_behind)
        rc = choose_on_host(s, area, !on_device, err);
    s->pass.num_rows = s->pass.num_choices = 0;
    count_end(s);
    return rc;
}

static bool has_stages(const struct rank_step *s)
{
    return s->decoder->model->stage_before || s->decoder->model->stage_behind;
}

// How many rows a pass is to have, of so many that are to be computed: with one stage all of them. With P stages and M passes a step takes as long as
// M + P - 1 passes, and a pass as long as reading the weights and 1 / balance_rows of that for each row: the least is at M^2 = rows (P - 1) / balance_rows.
static int64_t pass_rows(const struct rank_step *s, int64_t rows, int64_t least)
{
    if (!has_stages(s) || rows == 0)
        return rows;
    int64_t most = rows / least, passes = 1;
    int64_t square = rows * (comm_num_stages(s->decoder->world) - 1) / s->decoder->backend->balance_rows;
    while (passes < most && (passes + 1) * (passes + 1) <= square)
        passes++;
    return (rows + passes - 1) / passes;
}

// Runs the step's segments of one phase, apart or together; mixed: those of both phases together. A staggered step is one pass: other steps keep the
// other stages busy.
static int run_segments(struct rank_step *s, const struct step_area *area, enum phase phase, bool mixed,
                        struct error *err)
{
    bool apart = !mixed && phase == PHASE_PREFILL, whole = apart && s->decoder->backend->chunks_fixed;
    bool prompts = s->ran.prefill > 0 && (mixed || apart);
    int64_t rows = (mixed || apart ? s->ran.prefill : 0) + (mixed || !apart ? s->ran.decode : 0), choice = 0;
    int64_t room = s->step.staggered ? rows : pass_rows(s, rows, prompts ? LEAST_PREFILL_ROWS : LEAST_DECODE_ROWS);
    int rc = 0;
    for (int64_t i = 0; i < s->step.num_segments && !rc; choice += s->step.segments[i++].choices) {
        const struct step_segment *segment = &s->step.segments[i];
        if (!mixed && segment->phase != phase)
            continue;
        for (int64_t begin = 0; begin < segment->count && !rc;) {
            int64_t left = segment->count - begin, free = room - s->pass.num_rows;
            int64_t end = begin + (whole || left < free ? left : free);
            add_rows(s, area, segment, begin, end, choice);
            begin = end;
            if (apart || s->pass.num_rows == room)
                rc = run_pass(s, area, phase, err);
        }
    }
    return rc ? rc : run_pass(s, area, phase, err);
}

// The last stage's first rank has the choices; rank 0 gets them.
static int bring_choices(struct rank_step *s, int64_t count, struct error *err)
{
    const struct decoder *d = s->decoder;
    size_t bytes = (size_t)count * sizeof *s->step.choices;
    if (!has_stages(s) || comm_rank(d->comm) > 0 || bytes == 0)
        return 0;
    if (!d->model->stage_behind)
        return comm_send(d->world, s->step.choices, bytes, 0, err);
    if (d->model->stage_before)
        return 0;
    comm_at(d->world, OP_HAND_OVER, -1);
    int64_t begin_ns = clock_now_ns();
    int rc = comm_receive(d->world, s->step.choices, bytes, comm_size(d->world) - comm_size(d->comm), err);
    s->decoder->stage_wait_ns += clock_now_ns() - begin_ns;
    return rc;
}

// The parent's memory is read once, so that what was checked is what is run.
static int take_step(struct rank_step *s, const struct step_area *area, struct error *err)
{
    int64_t count = area->step->num_segments;
    s->step.staggered = area->step->staggered;
    s->step.num_segments = count;
    s->step.num_choices = area->step->num_choices;
    if (count > 0 && count <= STEP_MAX_SEGMENTS)
        memcpy(s->step.segments, area->step->segments, (size_t)count * sizeof *s->step.segments);
    int rc = step_check(area, &s->step, &s->limits, err);
    if (rc)
        return rc;
    for (int64_t i = 0; i < count; i++) {
        const struct step_segment *segment = &s->step.segments[i];
        if (segment->begins_sequence)
            s->counts[segment->sequence].host_outputs = s->counts[segment->sequence].device_outputs = NOT_COUNTED;
    }
    return 0;
}

// The staggered step that was the last but `behind`.
static struct staggered_step *step_under_way(const struct rank_step *s, int64_t behind)
{
    return &s->under_way[(s->staggered - behind) % comm_num_stages(s->decoder->world)];
}

static int check_none_under_way(const struct rank_step *s, struct error *err)
{
    int stages = comm_num_stages(s->decoder->world);
    for (int64_t behind = 0; s->under_way && behind < stages - 1; behind++)
        if (step_under_way(s, behind)->num_segments > 0)
            return error_set(err, ERR_OTHER, "a step that is not staggered, while staggered ones are under way");
    return 0;
}

// The step that was taken goes among those under way, and in its place comes that which is this stage's turn. last: the one that the last stage
// computes.
static int take_turn(struct rank_step *s, const struct staggered_step **last, struct error *err)
{
    const struct decoder *d = s->decoder;
    int stages = comm_num_stages(d->world), stage = comm_rank(d->world) / comm_size(d->comm);
    if (stages < 2)
        return error_set(err, ERR_OTHER, "a staggered step, and one stage");
    if (!s->under_way) {
        s->under_way = calloc((size_t)stages, sizeof *s->under_way);
        if (!s->under_way)
            return error_set(err, ERR_MEMORY, "no memory for steps of %d stages", stages);
        s->staggered = stages; // so that those before the first are there, and empty
    }
    s->staggered++;
    struct staggered_step *taken = step_under_way(s, 0), *own = step_under_way(s, stage);
    taken->num_segments = s->step.num_segments;
    taken->num_choices = s->step.num_choices;
    memcpy(taken->segments, s->step.segments, (size_t)taken->num_segments * sizeof *taken->segments);
    s->step.num_segments = own->num_segments;
    s->step.num_choices = own->num_choices;
    memcpy(s->step.segments, own->segments, (size_t)own->num_segments * sizeof *own->segments);
    *last = step_under_way(s, stages - 1);
    return 0;
}

static void count_rows(struct rank_step *s)
{
    s->ran = (struct rank_step_rows){0};
    for (int64_t i = 0; i < s->step.num_segments; i++) {
        const struct step_segment *segment = &s->step.segments[i];
        int64_t *rows = segment->phase == PHASE_PREFILL ? &s->ran.prefill : &s->ran.decode;
        *rows += segment->count;
    }
}

int rank_step_run(struct rank_step *s, const struct step_area *area, struct error *err)
{
    const struct decoder *d = s->decoder;
    const struct staggered_step *last = NULL;
    bool mixed = decoder_mixes(d);
    int rc;
    if ((rc = take_step(s, area, err)) ||
        (rc = s->step.staggered ? take_turn(s, &last, err) : check_none_under_way(s, err)))
        return rc;
    count_rows(s);
    int64_t choices = last ? last->num_choices : s->step.num_choices;
    if ((!mixed && (rc = run_segments(s, area, PHASE_PREFILL, false, err))) ||
        (rc = run_segments(s, area, PHASE_DECODE, mixed, err)) || (rc = bring_choices(s, choices, err)))
        return rc;
    if (comm_rank(d->comm) == 0 && !d->model->stage_before)
        memcpy(area->step->choices, s->step.choices, (size_t)choices * sizeof *s->step.choices);
    return 0;
}

int rank_step_forward(struct rank_step *s, const struct step_area *area, int32_t sequence, int64_t start, int64_t count,
                      float *logits, int64_t stride, struct error *err)
{
    const struct model *model = s->decoder->model;
    bool whole = s->decoder->backend->chunks_fixed;
    int64_t most = s->limits.prefill_rows, wanted = whole ? most : pass_rows(s, count, LEAST_PREFILL_ROWS);
    const uint32_t *tokens = area->tokens + sequence * area->context + start;
    struct kv_pages pages = pages_of(area);
    int rc = check_none_under_way(s, err);
    if (rc)
        return rc;
    most = wanted < most ? wanted : most;
    for (int64_t done = 0; done < count; done += most) {
        int64_t rows = count - done < most ? count - done : most;
        for (int64_t i = 0; i < rows; i++)
            s->rows[i] =
                (struct token_row){.token = tokens[done + i], .sequence = sequence, .position = start + done + i};
        count_begin(s);
        if ((rc = decoder_forward(s->decoder, s->rows, rows, PHASE_PREFILL, &pages, err)))
            return rc;
        if (!model->stage_behind &&
            ((rc = decoder_logits(s->decoder, NULL, rows, logits + done * stride, stride, err)) ||
             (rc = s->decoder->watch ? decoder_head_input(s->decoder, err) : 0)))
            return rc;
        count_end(s);
    }
    return 0;
}

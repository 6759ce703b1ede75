// Where a step lies, and whether it can be run. See step.h.
#include "engine/step.h"

#include "formats/checked.h"

#include <math.h>

// ---- the area --------------------------------------------------------------------------------------------------

// Offsets of the parts in this order; the last is the size of all.
enum { PART_STEP, PART_SLOTS, PART_TOKENS, PART_PAGES, PART_VERSION, PART_MASKS, PART_END };

static void parts_of(const struct step_area *a, uint64_t offsets[PART_END + 1])
{
    uint64_t sequences = (uint64_t)a->max_sequences;
    const uint64_t bytes[PART_END] = {
        [PART_STEP] = sizeof *a->step,
        [PART_SLOTS] = sequences * sizeof *a->slots,
        [PART_TOKENS] = sequences * (uint64_t)a->context * sizeof *a->tokens,
        [PART_PAGES] = sequences * (uint64_t)a->pages_per_sequence * sizeof *a->pages,
        [PART_VERSION] = sizeof *a->pages_version,
        [PART_MASKS] = sequences * (uint64_t)a->mask_words * sizeof *a->masks,
    };
    offsets[0] = 0;
    for (int part = 0; part < PART_END; part++)
        offsets[part + 1] = round_up(offsets[part] + bytes[part], 64);
}

uint64_t step_area_bytes(struct step_area *a)
{
    uint64_t offsets[PART_END + 1];
    a->pages_per_sequence = (int64_t)div_up((uint64_t)a->context, KV_PAGE_TOKENS);
    a->mask_words = (int64_t)div_up((uint64_t)a->vocab_size, 32);
    parts_of(a, offsets);
    return offsets[PART_END];
}

void step_area_place(struct step_area *a, void *memory)
{
    uint64_t offsets[PART_END + 1];
    parts_of(a, offsets);
    uint8_t *base = memory;
    a->step = (struct step *)(void *)(base + offsets[PART_STEP]);
    a->slots = (struct step_slot *)(void *)(base + offsets[PART_SLOTS]);
    a->tokens = (uint32_t *)(void *)(base + offsets[PART_TOKENS]);
    a->pages = (int32_t *)(void *)(base + offsets[PART_PAGES]);
    a->pages_version = (uint64_t *)(void *)(base + offsets[PART_VERSION]);
    a->masks = (uint32_t *)(void *)(base + offsets[PART_MASKS]);
}

// ---- checking --------------------------------------------------------------------------------------------------

static int refuse(int64_t segment, const char *what, struct error *err)
{
    return error_set(err, ERR_OTHER, "segment %lld of a step: %s", (long long)segment, what);
}

bool sampling_is_sound(const struct sampling *how)
{
    return isfinite(how->temperature) && how->temperature >= 0 && how->top_p >= 0 && how->top_p <= 1 &&
           how->min_p >= 0 && how->min_p <= 1 && how->top_k >= 0 && isfinite(how->repetition_penalty) &&
           how->repetition_penalty > 0 && isfinite(how->frequency_penalty) && isfinite(how->presence_penalty);
}

static const char *slot_problem(const struct step_slot *slot, const struct step_segment *s)
{
    if (!sampling_is_sound(&slot->sampling))
        return "settings of sampling out of their ranges";
    if (s->choices > 1 && sampling_has_penalties(&slot->sampling))
        return "several choices with penalties";
    if (slot->num_logprobs < -1 || slot->num_logprobs > STEP_MAX_LOGPROBS)
        return "a number of logprobs out of its range";
    if (slot->num_edits < 0 || slot->num_edits > STEP_MAX_EDITS)
        return "a number of edits out of its range";
    for (int32_t i = 0; i < slot->num_edits; i++)
        if (!(slot->edits[i].add < INFINITY))
            return "an edit that is not a number, or infinite";
    return NULL;
}

// The slot exists, and its tokens and pages at these positions do.
static const char *positions_problem(const struct step_area *a, int32_t sequence, int64_t start, int64_t count)
{
    if (sequence < 0 || sequence >= a->max_sequences)
        return "a slot that does not exist";
    if (start < 0 || start > a->context || count < 1 || count > a->context - start)
        return "positions outside of the context";
    const uint32_t *tokens = a->tokens + sequence * a->context;
    for (int64_t i = start; i < start + count; i++)
        if (tokens[i] >= a->vocab_size)
            return "a token outside of the vocabulary";
    const int32_t *pages = a->pages + sequence * a->pages_per_sequence;
    for (int64_t i = 0; i * KV_PAGE_TOKENS < start + count; i++)
        if (pages[i] < 0 || pages[i] >= a->num_pages)
            return "a page that does not exist";
    return NULL;
}

int step_check_forward(const struct step_area *area, int32_t sequence, int64_t start, int64_t count, struct error *err)
{
    const char *problem = positions_problem(area, sequence, start, count);
    return !problem ? 0
                    : error_set(err, ERR_OTHER, "%lld positions from %lld of sequence %d: %s", (long long)count,
                                (long long)start, (int)sequence, problem);
}

static const char *segment_problem(const struct step_area *a, const struct step_segment *s,
                                   const struct step_limits *limits)
{
    const char *problem = positions_problem(a, s->sequence, s->start, s->count);
    if (problem || (s->phase != PHASE_PREFILL && s->phase != PHASE_DECODE))
        return problem ? problem : "a phase that does not exist";
    if (s->phase == PHASE_PREFILL && (s->count > limits->prefill_rows || s->start % limits->chunk != 0))
        return "a piece of a prompt that is too long or begins where none may";
    if (s->choices < 0 || s->choices > s->count)
        return "more choices than rows";
    const struct step_slot *slot = &a->slots[s->sequence];
    if ((s->choices > 0 || s->begins_sequence) && (slot->prompt_count < 1 || slot->prompt_count > a->context))
        return "a prompt outside of the context";
    if (s->choices == 0)
        return NULL;
    if (s->first_step > (uint64_t)a->context ||
        s->start + s->count - s->choices + 1 != slot->prompt_count + (int64_t)s->first_step)
        return "choices that do not follow the tokens before them";
    return slot_problem(slot, s);
}

int step_check(const struct step_area *a, const struct step *step, const struct step_limits *limits, struct error *err)
{
    uint8_t seen[MAX_SEQUENCES] = {0}; // bit 0: a prefill segment of the slot, bit 1: one of decode
    int64_t rows = 0, decode_rows = 0, choices = 0;
    if (step->num_segments < !step->staggered || step->num_segments > STEP_MAX_SEGMENTS)
        return error_set(err, ERR_OTHER, "a step of %lld segments", (long long)step->num_segments);
    for (int64_t i = 0; i < step->num_segments; i++) {
        const struct step_segment *s = &step->segments[i];
        const char *problem = segment_problem(a, s, limits);
        if (problem)
            return refuse(i, problem, err);
        if (step->staggered && s->phase != PHASE_DECODE)
            return refuse(i, "of a prompt, in a staggered step", err);
        uint8_t bit = s->phase == PHASE_PREFILL ? 1 : 2;
        if (seen[s->sequence] >= bit)
            return refuse(i, "a second one of its slot and phase, or prefill behind decode", err);
        seen[s->sequence] |= bit;
        rows += s->count;
        decode_rows += s->phase == PHASE_DECODE ? s->count : 0;
        choices += s->choices;
    }
    if (rows > limits->max_rows || decode_rows > limits->decode_rows || choices != step->num_choices ||
        choices > STEP_MAX_CHOICES)
        return error_set(
            err, ERR_OTHER,
            "a step of %lld rows, %lld of them in decode, and %lld choices of %lld: at most %lld, %lld, %d",
            (long long)rows, (long long)decode_rows, (long long)choices, (long long)step->num_choices,
            (long long)limits->max_rows, (long long)limits->decode_rows, STEP_MAX_CHOICES);
    return 0;
}

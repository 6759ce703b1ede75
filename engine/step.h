// One step of the ranks: which positions of which sequences are computed, and behind which of them a token is chosen. The parent decides
// (scheduler.h) and writes it into memory that every rank reads; rank 0 writes the chosen tokens back. Everything that a step needs is
// here: tokens, page tables, how to choose. Ranks keep nothing of a sequence but its penalties' counts.
//
// Law 9: a row's result depends on its own sequence and on its phase: positions of the prompt are prefill, later ones decode, whether they are
// computed for the first time, again after a preemption, or on trial (drafts).
#ifndef TPSHARD_ENGINE_STEP_H
#define TPSHARD_ENGINE_STEP_H

#include "formats/error.h"
#include "kernels/backend.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    MAX_SEQUENCES = 64, // slots
    STEP_MAX_SEGMENTS = 2 * MAX_SEQUENCES,
    STEP_MAX_CHOICES = 512,
    STEP_MAX_EDITS = 512,   // of one slot
    STEP_MAX_LOGPROBS = 20, // alternatives of one choice
};
#define STEP_NO_TOKEN UINT32_MAX // edits and mask together have forbidden every token

// Rows of one sequence: positions start .. start + count - 1, whose tokens stand in the token table. Tokens are chosen behind the last
// `choices` rows. A slot has at most one segment of each phase in a step; the prefill one comes first.
struct step_segment {
    int32_t sequence; // slot
    enum phase phase;
    int64_t start, count;
    int64_t choices; // 0 .. count
    // How many tokens the sequence has produced before the first choice; the next one has one more: start + count - choices + 1 ==
    // prompt_count + first_step.
    uint64_t first_step;
    bool begins_sequence; // the slot is new: forget counts, count the first prompt_count tokens of its table
};

// Added to a token's logit before penalties; -INFINITY forbids it.
struct logit_edit {
    uint32_t token;
    float add;
};

// How tokens of a slot are chosen. Changed by the parent between steps only.
struct step_slot {
    struct sampling sampling;
    int64_t prompt_count;
    int32_t num_logprobs; // -1: none; 0: the chosen token's; n: and those of the n likeliest
    bool masked;          // only tokens whose bit is set in the slot's mask
    int32_t num_edits;
    struct logit_edit edits[STEP_MAX_EDITS];
};

// logprobs are of the model's own distribution: before edits, mask, penalties and temperature.
struct step_choice {
    uint32_t token;
    float logprob;
    int32_t num_top;
    struct {
        uint32_t token;
        float logprob;
    } top[STEP_MAX_LOGPROBS]; // likeliest first; equal ones by id
};

struct step {
    // With several stages steps of decode may be staggered: in the n-th of them stage k computes the segments of the (n - k)-th, and the choices are
    // those of the one that the last stage computes. So all stages have work, each on other sequences, whose slots, tokens and pages stay as they
    // are meanwhile. Empty ones bring back what is under way, all of which is done before a step that is not staggered.
    bool staggered;
    int64_t num_segments; // at least 1, but where staggered
    struct step_segment segments[STEP_MAX_SEGMENTS];
    int64_t num_choices; // sum of the segments' choices, at most STEP_MAX_CHOICES
    struct step_choice choices[STEP_MAX_CHOICES];
};

// Views into the shared memory (or into a test's own).
struct step_area {
    int64_t context, max_sequences, vocab_size, num_pages;
    int64_t pages_per_sequence, mask_words; // mask_words: of 32 tokens each, for one slot; both set by step_area_bytes
    struct step *step;
    struct step_slot *slots; // [max_sequences]
    uint32_t *tokens;        // [max_sequences][context] prompt, output, drafts
    int32_t *pages;          // [max_sequences][pages_per_sequence] page of the KV cache, see kv_pages
    uint64_t *pages_version; // to be raised whenever an entry of pages changes
    uint32_t *masks;         // [max_sequences][mask_words], bit token % 32 of word token / 32
};

// The area's size, from the first four of its sizes; sets the other two.
uint64_t step_area_bytes(struct step_area *area);
// Lays the views into memory of so many bytes, zeroed, aligned to 64.
void step_area_place(struct step_area *area, void *memory);

// What a step may hold, by backend and memory.
struct step_limits {
    int64_t max_rows;     // all segments together
    int64_t decode_rows;  // all decode segments together
    int64_t prefill_rows; // one prefill segment
    int64_t chunk;        // prefill segments begin at its multiples; 1: anywhere
};
// Whether a step can be run at all: slots, positions, tokens, pages and settings are in their ranges; else ERR_OTHER with a sentence. That
// pages are shared or owned as they should be is the scheduler's matter.
int step_check(const struct step_area *area, const struct step *step, const struct step_limits *limits,
               struct error *err);

// The same for positions of a slot that are computed without a choice.
int step_check_forward(const struct step_area *area, int32_t sequence, int64_t start, int64_t count, struct error *err);

// Whether all settings are in their ranges.
bool sampling_is_sound(const struct sampling *how);

static inline bool sampling_has_penalties(const struct sampling *how)
{
    return how->repetition_penalty != 1 || how->frequency_penalty != 0 || how->presence_penalty != 0;
}

#endif

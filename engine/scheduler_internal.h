// What the parts of the scheduler share: scheduler.c (sequences' lives, tokens), scheduler_plan.c (who computes what in a step).
#ifndef TPSHARD_ENGINE_SCHEDULER_INTERNAL_H
#define TPSHARD_ENGINE_SCHEDULER_INTERNAL_H

#include "engine/draft.h"
#include "engine/fair_queue.h"
#include "engine/page_cache.h"
#include "engine/scheduler.h"

enum sequence_state {
    SEQUENCE_HELD,      // until the first of its group has computed the prompt
    SEQUENCE_WAITING,   // in the queue
    SEQUENCE_RUNNING,   // has a slot
    SEQUENCE_PREEMPTED, // has a slot, no pages
    SEQUENCE_ENDED,     // on_end is being called
};

struct sequence {
    struct fair_item item;
    struct sequence *previous, *next; // all sequences, oldest first; a group's stand together
    struct sequence_spec spec;
    uint64_t group;
    bool leads; // others of the group are held
    enum sequence_state state;
    bool cancelled;     // ends at the next safe point
    bool stops_allowed; // min_tokens are there

    // In a slot. KV entries of the first `computed` positions are in its pages; `length` tokens are known: one more than computed, except
    // in the prompt and after a preemption.
    int32_t slot;
    bool begun;          // the ranks know the slot
    bool mask_filled;    // for the next choice
    uint32_t *tokens;    // the slot's part of the area
    int32_t *pages;      // likewise
    struct draft *draft; // likewise; NULL: none
    int64_t length, computed;
    int64_t num_pages;       // in the table
    int64_t num_published;   // of these, known to the cache
    int64_t limit, produced; // tokens of output

    // In the step that is planned or run; rows 0: none.
    int64_t rows, choices, first_choice;
    bool under_way; // in a staggered step whose choices have not come: nothing of it changes

    struct sequence_usage usage;
    double added_s, started_s, first_token_s; // 0: not yet
};

// A step's sequences, in the order of its segments.
struct turn {
    struct sequence *planned[MAX_SEQUENCES];
    int64_t num_planned;
};

struct scheduler {
    struct scheduler_options options;
    struct step_area area;
    struct step_runner runner;
    struct page_cache *cache;
    struct fair_queue *queue;
    struct draft *drafts; // [max_sequences]
    int64_t share_tokens; // shared prefixes end at its multiples

    struct sequence *first, *last;
    int64_t num_sequences;
    uint64_t next_group;
    struct sequence *slots[MAX_SEQUENCES];
    struct sequence *admitted[MAX_SEQUENCES]; // the sequences in slots, in the order of their admission
    int64_t num_admitted;
    bool admission_blocked; // until pages come back
    bool prefill_waited;    // the last step had no room for a chunk
    int64_t mask_turn;      // which of the admitted has its mask filled first
    int busy;               // depth of steps and callbacks: what ends now ends later
    int64_t num_cancelled;  // sequences that are marked

    int64_t rows_left, decode_left, choices_left; // while planning
    struct turn plan;
    // The staggered steps under way: those of the last `stages` turns, turn n at n % stages. Some may be empty.
    struct turn *turns;               // NULL: one stage
    int64_t num_turns, num_under_way; // sequences
    bool drains; // a page is wanted of a sequence under way: nothing new begins before all are back
    struct scheduler_stats stats;
};

// Gives waiting sequences slots, and preempted ones their pages, as far as there is room.
void scheduler_admit(struct scheduler *scheduler);
// Writes the next step into the area. None planned, and none under way: there is nothing to do.
void scheduler_plan(struct scheduler *scheduler);
// Makes pages that are full now findable.
void scheduler_publish(struct scheduler *scheduler, struct sequence *sequence);
void scheduler_release_pages(struct scheduler *scheduler, struct sequence *sequence);
// Edits of the slot: the request's, and min_tokens'.
void scheduler_write_edits(struct scheduler *scheduler, const struct sequence *sequence);

#endif

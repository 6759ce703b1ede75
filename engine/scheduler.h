// Decides what each step of the ranks computes: continuous batching over a paged KV cache, prompts in chunks beside the decoding of others,
// prefix sharing (page_cache.h), preemption, fair queueing between tenants (fair_queue.h), drafts by prompt lookup (draft.h). Belongs to one
// thread (the engine's). It knows neither HTTP nor text; it is tested with a runner that has no model.
//
// Sequences wait in a queue per tenant; of the tenants with waiting work the one that was served least comes first (virtual token counter,
// Sheng et al., "Fairness in Serving Large Language Models", 2024). A sequence in a slot holds its pages until it ends; when a page is
// missing the sequence that was admitted last gives its pages back and is computed again later; it keeps its slot and everything it
// has produced. Full pages keep their contents after their sequence has ended and are found again by their tokens (compared, not
// only hashed) under the same salt; the least recently used go first.
#ifndef TPSHARD_ENGINE_SCHEDULER_H
#define TPSHARD_ENGINE_SCHEDULER_H

#include "engine/step.h"
#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

enum { SCHEDULER_MAX_STAGES = 64 };
enum finish_reason { FINISH_NONE = 0, FINISH_EOS, FINISH_LENGTH, FINISH_CANCELLED, FINISH_ERROR };

struct sequence_usage {
    int64_t prompt_tokens, cached_tokens; // cached: of the prompt, from shared pages
    int64_t produced_tokens;              // those of on_tokens
    int64_t preemptions, drafted_tokens, accepted_tokens;
    double queued_s, prefill_s, decode_s; // from scheduler_add to the first step, to the first token, to the end
};

// Further restriction of the next token, such as a grammar. All functions run on the scheduler's thread.
struct token_filter {
    void *state;
    // Fills the mask of allowed tokens [words]; called before each choice. Only end-of-sequence tokens are set when the text is complete.
    void (*fill)(void *state, uint32_t *mask, int64_t words);
    // The token was chosen and belongs to the output; not called for the token that ends it.
    void (*advance)(void *state, uint32_t token);
};

// What it points to is borrowed until on_end; the struct itself is copied.
struct sequence_spec {
    const uint32_t *prompt;
    int64_t prompt_count, max_tokens; // at least 1 each; max_tokens is cut to what context and cache leave
    int64_t min_tokens;               // no end-of-sequence or stop token before
    bool ignore_eos;
    const uint32_t *eos_ids; // the model's
    int64_t num_eos;
    const uint32_t *stop_ids; // the request's
    int64_t num_stop_ids;
    struct sampling sampling;
    const struct logit_edit *edits; // logit_bias
    int64_t num_edits;
    int num_logprobs;                  // as in struct step_slot
    const struct token_filter *filter; // NULL: none
    uint64_t tenant;                   // whose turn this counts for
    uint64_t salt;                     // prefixes are shared among equal salts only
    void *arg;
    // New tokens of the output, in order, as they come; an end-of-sequence or stop token is not among them. Returning false ends the
    // sequence (FINISH_CANCELLED). Callbacks may cancel and add sequences. NULL: none wanted.
    bool (*on_tokens)(void *arg, const struct step_choice *choices, int64_t count);
    // Last call, always made exactly once for an added sequence. err only with FINISH_ERROR. stop_token: the end-of-sequence or stop token
    // with FINISH_EOS; STEP_NO_TOKEN where a filter left only such a token and min_tokens forbade it.
    void (*on_end)(void *arg, enum finish_reason reason, const struct sequence_usage *usage, uint32_t stop_token,
                   const struct error *err);
};

struct scheduler_options {
    int64_t num_pages, context, max_sequences; // slots: at most MAX_SEQUENCES
    int64_t max_rows;      // of a step, all phases together; at least decode_rows, and prefill_chunk where chunks_fixed
    int64_t decode_rows;   // of a step, drafts included; at least max_sequences
    int64_t prefill_chunk; // rows of one prompt in one step
    // Arithmetic depends on the chunk: chunks begin at multiples of prefill_chunk and are as long, but for a prompt's last, and only whole
    // chunks of prompts are shared. Otherwise every full page is.
    bool chunks_fixed;
    bool phases_differ; // arithmetic depends on the phase: only pages of prompts are shared
    bool share_prefixes;
    int64_t draft_tokens; // longest draft by prompt lookup; 0: none
    // So many decode rows cost as much time as reading the weights: from there on a draft takes from other sequences, and must be likelier
    // to be right; and eight times as many rows of prompts are enough beside running streams, where chunks may be cut. 0: rows cost nothing.
    int64_t balance_rows;
    // Pipeline stages (0: one), at most SCHEDULER_MAX_STAGES, and how many rows of decode one hands to the next without waiting for it. Where these are
    // enough, decoding sequences take turns in staggered steps (step.h), so that each stage has work at any time.
    int64_t stages, staggered_rows;
    uint64_t hash_seed; // secret, against chosen collisions
};

// Where steps are run: fills area->step->choices; behind a staggered step those of the one that is through. Synchronous.
struct step_runner {
    void *arg;
    int (*run)(void *arg, struct error *err);
};

struct scheduler_stats {                 // totals since creation, but for running .. pages_cached
    int64_t running, waiting, preempted; // sequences: in a slot and computing; in a queue; in a slot without pages
    int64_t pages, pages_used, pages_cached;
    int64_t steps, prompt_tokens, cached_tokens, produced_tokens, preemptions, drafted_tokens, accepted_tokens;
    int64_t prefill_rows, decode_rows;
    int64_t prefix_queries_tokens; // prompt tokens that were looked up
};

struct scheduler;
struct sequence; // one added sequence, valid until its on_end returns

int scheduler_create(struct scheduler **out, const struct scheduler_options *options, const struct step_area *area,
                     const struct step_runner *runner, struct error *err);
// Accepts NULL; ends what is left with FINISH_CANCELLED, callbacks add nothing then.
void scheduler_free(struct scheduler *scheduler);

// count sequences that begin with the same prompt (n of a request): the others wait until the first has computed it. Success: out [count].
// ERR_USAGE for a prompt that does not fit the context and for settings out of their ranges, ERR_MEMORY when it can never fit the cache.
int scheduler_add(struct scheduler *scheduler, const struct sequence_spec *specs, int64_t count, struct sequence **out,
                  struct error *err);
// The sequence ends with the running step at the latest, and on_end is called before this or scheduler_step returns; one in a staggered step, when
// that is through.
void scheduler_cancel(struct scheduler *scheduler, struct sequence *sequence);
// Whether a step would do anything.
bool scheduler_has_work(const struct scheduler *scheduler);
// One step. An error is the runner's: every sequence has then ended with FINISH_ERROR.
int scheduler_step(struct scheduler *scheduler, struct error *err);
// Ends all sequences with this error and forgets what the pages hold and what stages have under way, so that it can go on with new
// ranks over the same area; those there are must not go on. Not to be called by
// callbacks.
void scheduler_fail(struct scheduler *scheduler, const struct error *why);
void scheduler_read_stats(const struct scheduler *scheduler, struct scheduler_stats *out);

#endif

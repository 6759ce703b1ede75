// What one rank does between start and end: load its file, then run the commands that the parent posts. Parent and ranks share
// one area of memory (struct shared_area); only token ids, logits and counters pass through it.
#ifndef TPSHARD_ENGINE_WORKER_H
#define TPSHARD_ENGINE_WORKER_H

#include "engine/launch.h"
#include "engine/model.h"
#include "engine/sampler.h"
#include "formats/manifest.h"
#include "kernels/backend.h"
#include "kernels/wire.h"

#include <stdatomic.h>
#include <stdint.h>

enum { MAX_SEQUENCES = 64 };

enum worker_command {
    COMMAND_FORWARD = 1, // shared->forward: run tokens of one sequence, write all logits
    COMMAND_GENERATE,    // shared->sequences: prefill, then decode together until all are finished
};

enum finish_reason { FINISH_NONE = 0, FINISH_EOS, FINISH_LENGTH, FINISH_CANCELLED };

// One sequence of COMMAND_GENERATE. The parent fills the first part; rank 0 fills the rest while it runs.
struct shared_sequence {
    int64_t prompt_count; // tokens, at least 1
    int64_t max_tokens;   // most tokens to produce, at least 1
    bool ignore_eos;
    struct sampling sampling;
    atomic_bool cancel;    // the parent has seen enough (stop string, interrupt)
    atomic_llong produced; // tokens in the output buffer so far
    atomic_int finished;   // enum finish_reason
};

struct shared_area {
    // sizes of the arrays behind, set by the parent before the first command
    int64_t context, max_sequences, vocab_size;
    // COMMAND_FORWARD: `count` <= logits_rows tokens at positions start .. start + count - 1 of sequence 0
    struct {
        int64_t start, count;
    } forward;
    // COMMAND_GENERATE
    int64_t num_sequences;
    struct shared_sequence sequences[MAX_SEQUENCES];
    // CLOCK_MONOTONIC nanoseconds, by rank 0: start of the rank, weights ready, first token of the batch, end of the command
    atomic_llong started_ns, loaded_ns, command_ns, first_token_ns, finished_ns;
    atomic_llong decode_steps, decode_rows; // rows: tokens fed in these steps
    atomic_llong decode_sent_bytes;         // by rank 0 to the other ranks in these steps
    atomic_llong rank_rss_bytes[COMM_MAX_RANKS];
    char device[COMM_MAX_RANKS][DEVICE_TEXT_BYTES]; // each rank's, once its weights are ready
};

// The arrays behind struct shared_area, in this order: input tokens [max_sequences][context], output tokens [max_sequences][context],
// logits f32 [logits_rows][vocab_size].
uint64_t shared_area_bytes(int64_t context, int64_t max_sequences, int64_t logits_rows, int64_t vocab_size);
uint32_t *shared_input(struct shared_area *shared, int64_t sequence);
uint32_t *shared_output(struct shared_area *shared, int64_t sequence);
float *shared_logits(struct shared_area *shared);

// Decided by the parent, read by every rank.
struct worker_options {
    const char *dir;
    const struct manifest *manifest;
    const struct backend *backend;
    const struct kernels *kernels; // of the host
    int threads;                   // worker threads of a rank
    enum kv_format kv_format;
    enum wire wire;
    enum verify_mode verify;
    int64_t context, max_sequences, logits_rows;
    int64_t num_pages; // of the KV cache
    int64_t max_rows;  // most rows of one step
};

rank_main_fn worker_main; // arg is a const struct worker_options *

#endif

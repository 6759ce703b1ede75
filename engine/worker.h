// What one rank does between start and end: load its file, then run the commands that the parent posts. Parent and ranks share
// one area of memory (struct shared_area and a struct step_area); tokens, page tables, logits and counters pass through it.
#ifndef TPSHARD_ENGINE_WORKER_H
#define TPSHARD_ENGINE_WORKER_H

#include "engine/launch.h"
#include "engine/model.h"
#include "engine/step.h"
#include "formats/manifest.h"
#include "kernels/backend.h"
#include "kernels/wire.h"

#include <stdatomic.h>
#include <stdint.h>

enum worker_command {
    COMMAND_FORWARD = 1, // shared->forward: run tokens of slot 0, write all logits
    COMMAND_STEP,        // the step area: run the step, choose tokens
};

struct shared_area {
    // COMMAND_FORWARD: `count` <= logits_rows tokens of slot 0 at positions start .. start + count - 1
    struct {
        int64_t start, count;
    } forward;
    // By rank 0: CLOCK_MONOTONIC nanoseconds when the rank started and when its weights were ready; pages of the KV cache that it has made.
    atomic_llong started_ns, loaded_ns, num_pages;
    // Totals since the start, by rank 0, of steps without prefill rows: steps, rows, bytes sent to the other ranks.
    atomic_llong decode_steps, decode_rows, decode_sent_bytes;
    // Each rank's own: bytes of its file that are checked and in place, nanoseconds in exchanges with other ranks (waiting included), device
    // (once its weights are ready).
    atomic_llong rank_loaded_bytes[COMM_MAX_RANKS], rank_exchange_ns[COMM_MAX_RANKS];
    char device[COMM_MAX_RANKS][DEVICE_TEXT_BYTES];
};

// Behind struct shared_area, at multiples of 64 bytes: the step area, then logits f32 [logits_rows][vocab_size]. area: its four sizes are set,
// the rest is filled in when memory is not NULL. Returns the bytes of all.
uint64_t shared_area_place(struct shared_area *memory, struct step_area *area, float **logits, int64_t logits_rows);

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
    int64_t num_pages,
        least_pages; // of the KV cache: wanted, and below what number, for want of memory, a rank refuses
    struct step_limits limits;
    int64_t usual_choices; // of a step
};

rank_main_fn worker_main; // arg is a const struct worker_options *

#endif

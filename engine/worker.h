// What one rank does between start and end: begin to load its file, then run the commands that the parent posts, the first ones while the file
// still arrives. Parent and ranks share one area of memory (struct shared_area and a struct step_area); tokens, page tables, logits and counters
// pass through it.
//
// Law: no result leaves a rank before all that was to be compared with its checksums has been: with VERIFY_FULL and VERIFY_SAMPLE the first
// command is not done before the whole load is. With VERIFY_OFF nothing is to be compared, and results leave as soon as what they were computed
// from has arrived; what goes wrong with the rest ends the ranks at their next command.
#ifndef TPSHARD_ENGINE_WORKER_H
#define TPSHARD_ENGINE_WORKER_H

#include "engine/device_exchange.h"
#include "engine/launch.h"
#include "engine/link_probe.h"
#include "engine/model.h"
#include "engine/numa.h"
#include "engine/rank_step.h"
#include "engine/step.h"
#include "formats/manifest.h"
#include "kernels/backend.h"
#include "kernels/exchange_choice.h"
#include "kernels/wire.h"

#include <stdatomic.h>
#include <stdint.h>

enum worker_command {
    COMMAND_FORWARD = 1, // shared->forward: run tokens of a slot, write all logits
    COMMAND_STEP,        // the step area: run the step, choose tokens
};

// How one rank started. Times are nanoseconds of CLOCK_MONOTONIC. Written by the rank; good to read: what stands before loaded_ns when the ranks are
// ready, what stands behind it when loaded_ns is not 0.
struct rank_start {
    int64_t begin_ns;       // it runs
    int64_t opened_ns;      // its file's head has been read
    int64_t load_ns;        // the load has begun
    int64_t prepared_ns;    // the device is ready for a step
    atomic_llong loaded_ns; // all is in place; 0: not yet
    double cpu_s; // user and system time of its process until it saw that; of all ranks together where they are threads
    struct load_figures load;
    char note[256]; // of the store, for the user; "": none
};

struct shared_area {
    // COMMAND_FORWARD: `count` <= logits_rows tokens of a slot at positions start .. start + count - 1, sums over this wire.
    struct {
        int64_t start, count;
        int32_t sequence;
        enum wire wire;
    } forward;
    // By rank 0: pages of the KV cache that it has made.
    atomic_llong num_pages;
    // And whether prompts go through the layers in two halves, and the enum transport that the ranks have agreed on.
    atomic_int in_parts, transport;
    // Totals since the start, by rank 0, of steps without prefill rows: steps, rows, bytes sent to the other ranks, sums over ranks and
    // nanoseconds in them.
    atomic_llong decode_steps, decode_rows, decode_sent_bytes, decode_exchanges, decode_exchange_ns;
    struct pass_counts passes;
    // Each rank's own: payload bytes that are in place, those there are (0: not known yet), nanoseconds in exchanges with other ranks (waiting
    // included), device (once it is prepared).
    atomic_llong rank_loaded_bytes[COMM_MAX_RANKS], rank_payload_bytes[COMM_MAX_RANKS],
        rank_exchange_ns[COMM_MAX_RANKS];
    atomic_llong rank_stage_wait_ns[COMM_MAX_RANKS]; // in handing over from stage to stage, waiting included
    char device[COMM_MAX_RANKS][DEVICE_TEXT_BYTES];
    struct rank_start starts[COMM_MAX_RANKS];
};

// Numbers of COMMAND_FORWARD, f32.
struct forward_area {
    float *logits; // [logits_rows][vocab_size]
    int64_t logits_rows;
    float *
        residual; // of the residual_tap of each stage's first rank: residual_elems = [num_layers + 1][residual_rows][hidden_size]
    int64_t residual_elems;
};

// Behind struct shared_area, at multiples of 64 bytes: the step area, then logits, then the residual stream, then at a multiple of 4096 the ranks' parts
// of sums. area, forward and parts: their sizes are set, the rest is filled in when memory is not NULL. Returns the bytes of all.
uint64_t shared_area_place(struct shared_area *memory, struct step_area *area, struct forward_area *forward,
                           struct part_area *parts);

enum overlap { OVERLAP_OFF, OVERLAP_AUTO, OVERLAP_ON };

// Decided by the parent, read by every rank.
struct worker_options {
    const char *place; // of the shard directory, as store_open takes it
    struct store_options store;
    const struct manifest *manifest;
    const struct backend *backend;
    const struct kernels *kernels; // of the host
    int threads;                   // worker threads of a rank
    enum numa_pin pin;             // of the host's threads
    bool ranks_are_threads;
    enum kv_format kv_format;
    enum transport transport;
    bool transport_is_auto; // another one will do where the ranks cannot have this one after all
    // With TRANSPORT_P2P: of the links between the devices of all ranks. Until the ranks are ready. NULL: none could begin, and why.
    const struct link_probe *links;
    char link_problem[LINK_SENTENCE_BYTES];
    enum wire wire;
    bool feedback;        // what a compressing wire loses is made up for by the next sum
    bool deals;           // decoder.deals
    enum overlap overlap; // AUTO: by the transport; see decoder.in_parts
    int64_t check_sums;   // one step of so many has the devices' sums checked (sum_check.h); 0: none
    enum verify_mode verify;
    enum load_path load_path;
    int load_threads; // 0: the loader's choice
    bool load_first;  // no command is taken before everything is in place
    int64_t context, max_sequences, logits_rows;
    int64_t residual_rows; // most rows of a forward whose residual stream is shown; 0: of none
    int64_t num_pages,
        least_pages; // of the KV cache: wanted, and below what number, for want of memory, a rank refuses
    struct step_limits limits;
    int64_t usual_choices; // of a step
    // Where ranks are processes that a launcher started (the launch's links): the rank's place on its host; local_size 0: not known.
    int local_rank, local_size;
};

// Their sizes.
struct forward_area worker_forward_area(const struct worker_options *options);
// Whether sums over ranks may be made of parts that all ranks read (struct part_area).
bool worker_sums_in_common(const struct worker_options *options);
struct part_area worker_part_area(const struct worker_options *options);

rank_main_fn worker_main; // arg is a const struct worker_options *

#endif

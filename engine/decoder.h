// The one decoder: every model that the description can express runs through it, on any backend. It owns the order of the operations
// and the exchange between ranks; numbers and memory are the backend's.
#ifndef TPSHARD_ENGINE_DECODER_H
#define TPSHARD_ENGINE_DECODER_H

#include "engine/comm.h"
#include "engine/model.h"
#include "formats/calibration_file.h"
#include "kernels/backend.h"
#include "kernels/thread_pool.h"

#include <stdint.h>

struct decoder;
struct exchanger;
struct sum_check;

// Rows of a step that go through the blocks together. Those of a prompt may be cut in two, so that one part computes while the other's sums are on
// their way; decoder_parts.c keeps its state here.
struct decoder_part {
    int64_t first, count; // rows of the step
    int64_t first_owner;  // rank that owns row `first`, where rows have owners
    int64_t next_block;   // number; 0: it has been through none
    uint64_t ticket;      // of the exchange under way; 0: none
    bool lent;            // its partial sums are lent to the host
    int side;             // of the device: the part's number
    bool beside;          // the device exchanges its sums there
    bool joined;          // the residual has taken the last sum, and its normed rows are on their way or there
    bool posted;          // its partial sums lie where the other ranks read them: part number `number` of the comm
    uint32_t number;
};

// Memory that the ranks of one host share: in two sets by turns, each rank's parts of the sums over ranks, f32 [rows of a step][hidden]. Pages are
// those of the rank that computes in them.
struct part_area {
    float *memory;        // [ranks][2][elems]; NULL: there is none
    int64_t ranks, elems; // of the world; whole pages
};
static inline float *part_set(const struct part_area *area, int rank, int set)
{
    return area->memory + (2 * rank + set) * area->elems;
}

// Who is told, between the operations of a step, what the products that follow multiply.
struct decoder_watch {
    int (*input)(void *arg, struct decoder *decoder, enum calibration_input input, int64_t layer, struct error *err);
    void *arg;
};

// Everything is borrowed. The device is prepared for the model, whose weights may still be on their way.
struct decoder {
    struct model *model;
    const struct backend *backend;
    struct device *device;
    struct comm *comm;           // of its stage
    struct comm *world;          // of all stages
    enum wire wire;              // of prefill; see decoder_wire
    enum transport transport;    // over host, p2p and nccl the devices add up (device_exchange.h), else the host
    bool feedback;               // what a compressing wire loses is made up for by the next sum
    uint16_t *lost;              // of it so far, where the hosts add up: bf16 [rows of a step][hidden]; else NULL
    struct thread_pool *pool;    // for the exchange
    bool deals;                  // of prefill: the residual is dealt out to the ranks (sequence parallel)
    bool shows_residual;         // every rank has all of the residual behind each norm, dealt out or not
    bool in_parts;               // steps with enough rows are cut in two
    uint64_t part_bytes;         // enough: the sums' bytes as bf16
    bool in_large_parts;         // those with very many rows, whose sums are of parts in common memory
    struct part_area common;     // where sums over ranks are computed by all of them from parts that nobody sends
    struct sum_check *check;     // of what the devices add up; NULL: none
    struct exchanger *exchanger; // does a part's exchanges while the other computes; NULL: they are done in turn
    int64_t count;               // rows of the last step
    enum phase phase;            // its phase
    int64_t exchange_ns;         // that computing has stood still for exchanges with other ranks, so far
    int64_t exchanges;           // how many
    uint64_t device_sent_bytes;  // by the devices, as comm_sent_bytes counts
    int64_t stage_wait_ns;       // in handing over from stage to stage, so far
    bool dealt;                  // of the last step: the residual is dealt out
    bool in_common;              // its sums are of parts in common memory
    bool checked;                // the devices' sums are made again by the processors
    bool threaded;               // its exchanges go to the exchanger; while weights still come, they are done in turn
    int num_parts;
    struct decoder_part parts[2], *part; // part: under way
    const struct decoder_watch *watch;   // NULL: nobody
};

// The codec of a phase: decode's messages are small and never compressed.
enum wire decoder_wire(const struct decoder *decoder, enum phase phase);
// Whether the devices add up the sums of a step among themselves.
bool decoder_devices_exchange(const struct decoder *decoder);
// Whether prefill and decode are one arithmetic here, so that rows of both may go together.
bool decoder_mixes(const struct decoder *decoder);

// Runs rows (count <= max_rows) through all layers of the stage, which takes them from the stage before and hands them to the next; KV room must be reserved. Collective: every rank calls it with the same rows.
// rows and pages stay as they are until the next step.
int decoder_forward(struct decoder *decoder, const struct token_row *rows, int64_t count, enum phase phase,
                    const struct kv_pages *pages, struct error *err);
// On the last stage: logits of this rank's part of the vocabulary for some rows of the last forward: logits [count][stride], f32, stride >= vocab_local.
// row_index [count] (NULL: rows 0 .. count-1).
int decoder_logits(struct decoder *decoder, const int64_t *row_index, int64_t count, float *logits, int64_t stride,
                   struct error *err);

// The same step piece by piece, for who wants to see the residual between layers: the tokens' rows into it, one layer, and what the head multiplies.
// The tokens' rows are given, or for who has the residual himself the step alone is begun, and he fills the backend's buffers. The residual is not dealt
// out.
int decoder_begin(struct decoder *decoder, const struct token_row *rows, int64_t count, enum phase phase,
                  const struct kv_pages *pages, struct error *err);
int decoder_embed(struct decoder *decoder, const struct token_row *rows, int64_t count, enum phase phase,
                  const struct kv_pages *pages, struct error *err);
int decoder_layer(struct decoder *decoder, int64_t layer, struct error *err);
int decoder_head_input(struct decoder *decoder, struct error *err);

// Whether the device chooses tokens itself: it can, and one rank holds the whole model.
bool decoder_samples(const struct decoder *decoder);
// One step on such a device: forward, then a token for each of `count` rows, row_index [count] (NULL: all rows). sampling [count],
// steps [count]: tokens that their sequence has produced so far. tokens [count]. A decode step with a choice behind every row may be run
// from a kept one. decoder_logits may follow.
int decoder_sample(struct decoder *decoder, const struct token_row *rows, int64_t num_rows, enum phase phase,
                   const struct kv_pages *pages, const int64_t *row_index, const struct sampling *const *sampling,
                   const uint64_t *steps, int64_t count, uint32_t *tokens, struct error *err);

#endif

// The host's side of exchanges between devices, for the files of the CUDA backend. See exchange.h and kernels/backend.h.
#ifndef TPSHARD_KERNELS_CUDA_EXCHANGE_HOST_H
#define TPSHARD_KERNELS_CUDA_EXCHANGE_HOST_H

#include "kernels/cuda/device.h"
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/nccl.h"

enum { EXCHANGE_EVENTS = 8, EXCHANGE_DEPTH = 3 };

struct exchange_p2p;

// What the ranks tell each other before anybody reaches for another one's memory.
struct exchange_card {
    uint64_t host;
    char host_name[64];
    char bus[32];         // of the device: who shares one
    struct error problem; // of what the rank did alone
    // p2p
    uint64_t process; // the same for ranks of one process
    int device;
    uint8_t *inbox;
    cudaError_t handle_status;
    cudaIpcMemHandle_t handle;
};

struct exchange {
    struct exchange_options options;
    struct exchange_ranks ranks;
    struct exchange_state first_state;
    uint8_t *region; // as the device sees it
    bool registered;
    int blocks;
    struct exchange_record *record;  // as the host sees it
    uint16_t *lost;                  // [max_rows][hidden]; NULL: no feedback
    struct nccl *nccl;               // over it: none of what follows
    struct exchange_p2p *p2p;        // NULL: over host
    struct exchange_message waiting; // a sum that the norm behind it may take along
    bool waits;
    int64_t looked_ns; // at whether the ranks are to end

    // How far the device has come, while the host waits: pinned, written by copies on a stream of their own; and what they brought before.
    cudaStream_t asks;
    struct exchange_state *seen, last_seen;
    int64_t asked_ns;
    bool hangs; // given up

    // Sides: a stream of their own, which stands in for the device's between side_begin and side_end (exchange_sides.c).
    cudaStream_t side, main; // main: the device's, while it does; else NULL
    cudaEvent_t handed, sided[DEVICE_SIDES];
    int open_side;
    bool under_way[DEVICE_SIDES]; // ended, and not waited for

    // Chunks.
    cudaStream_t out, in;
    cudaEvent_t event[EXCHANGE_EVENTS][EXCHANGE_DEPTH];
    uint8_t *staging, *parts_out[2], *sums_out[2], *parts_in[EXCHANGE_DEPTH], *sums_in[EXCHANGE_DEPTH];
    uint64_t chunks; // so far
};

uint64_t exchange_region_bytes(int tp_size);
// Device memory that exchange_open takes, for the plan: no less than it really takes there.
uint64_t exchange_memory_bytes(const struct device_shape *shape, int tp_size);
int exchange_open(struct device *d, const struct exchange_options *options, struct error *err);
// false: the device hangs, and all that it may still touch stays; nothing of it is to be freed, as that would wait for it.
bool exchange_close(struct device *d);
int exchange_all_reduce(struct device *d, enum buffer buffer, const struct exchange_choice *choice, bool feedback,
                        int operation, int layer, struct error *err);
// Its halves; see kernels/backend.h.
int exchange_reduce_scatter_rows(struct device *d, enum buffer buffer, const struct dealt_rows *rows,
                                 const struct exchange_choice *choice, bool feedback, int operation, int layer,
                                 struct error *err);
int exchange_all_gather_rows(struct device *d, enum buffer buffer, const struct dealt_rows *rows,
                             const struct exchange_choice *choice, int operation, int layer, struct error *err);
int exchange_norm_dealt(struct device *d, const struct dealt_norm *what, struct error *err);
// Launches a sum that waits for its norm without one.
int exchange_flush(struct device *d, struct error *err);
bool exchange_takes_norm(const struct device *d);
int exchange_with_norm(struct device *d, const struct exchange_norm *norm, struct error *err);
// Before the first operation of a step.
int exchange_begin_step(struct device *d, struct error *err);
// Takes memory for what the wire loses, where it is made up for.
int exchange_make_lost(struct device *d, struct exchange *x, struct error *err);
int exchange_lend_lost(struct device *d, bool overwrite, uint16_t **host, struct error *err);
int exchange_returned_lost(struct device *d, struct error *err);

// The area of a rank over host, for the host and for copies.
uint8_t *exchange_host_area(const struct exchange *x, int rank);

// ---- exchange_chunks.c: large messages, over host and p2p
// Whether a chunk has room for the least of a message.
bool exchange_fits_chunks(const struct exchange *x, const struct exchange_message *message);
// chunk_bytes: see kernels/exchange_choice.h. norm (NULL: none) behind the sums of EXCHANGE_TO_OWNERS: what it makes of a chunk's own rows goes to
// everybody as by EXCHANGE_TO_ALL.
struct exchange_own_norm {
    float *normed, *residual; // of the message's row 0
    struct device_join join;  // its partial is the message
    const float *weight;
    float eps;
    uint32_t place; // of the normed rows
};
int exchange_in_chunks(struct device *d, const struct exchange_message *message, const struct exchange_own_norm *norm,
                       uint64_t chunk_bytes, struct error *err);

// ---- exchange_p2p.c: the memory that other devices write to
uint64_t exchange_p2p_bytes(int tp_size); // of one rank's
// Alone: the rank's own, and what the others need to know of it. Then together, with the cards of all ranks: the others', and x->ranks; it fails on all
// or none.
int exchange_p2p_make(struct device *d, struct exchange *x, struct exchange_card *card, struct error *err);
int exchange_p2p_join(struct device *d, struct exchange *x, const struct exchange_card *cards, struct error *err);
// Queues the copies of a chunk's parts, [tp_size][share], or of this rank's sums, to all others.
cudaError_t exchange_p2p_send_parts(const struct exchange *x, const uint8_t *stage, uint64_t share, uint64_t chunk);
cudaError_t exchange_p2p_send_sums(const struct exchange *x, const uint8_t *stage, uint64_t share, uint64_t chunk);
// This rank's streams have come to their ends. Also of a rank that failed on the way there.
void exchange_p2p_close(struct exchange *x);

// ---- exchange_sides.c: exchanges beside the device's other operations
int exchange_side_begin(struct device *d, int side, struct error *err);
int exchange_side_end(struct device *d, struct error *err);
int exchange_side_wait(struct device *d, int side, struct error *err);
// For all sides that have ended, before an exchange that none holds.
int exchange_wait_for_sides(struct device *d, struct error *err);
int exchange_open_sides(struct device *d, struct exchange *x, struct error *err);
void exchange_close_sides(struct exchange *x); // nothing runs any more
// One that goes before the device's own.
int exchange_make_stream(struct device *d, cudaStream_t *stream, struct error *err);

// ---- exchange_nccl.c: the same over NCCL
uint64_t exchange_nccl_memory_bytes(const struct device_shape *shape, int tp_size);
int exchange_nccl_open(struct device *d, struct exchange *x, struct error *err);
int exchange_nccl_all_reduce(struct exchange *x, const struct exchange_message *message, int operation, int layer,
                             struct error *err);
int exchange_nccl_half(struct exchange *x, const struct exchange_message *message, int operation, int layer,
                       struct error *err);

#endif

// The transport "nccl": sums over ranks whose bytes NCCL carries, between GPUs of any hosts.
//
// NCCL only moves bytes: groups to their owners (grouped sends and receives), coded sums to everybody (ncclAllGather). Coding and adding up
// are this project's kernels (shares.h), so that every codec gives the bits of engine/comm_reduce.h. NCCL's own sums are not used:
// their order of additions is the library's and changes with the size of a message, so a row's bits would depend on the rows beside
// it (law 9), and on a ring each step rounds.
//
// Law 6: communicators do not block. Every wait, for NCCL to begin, to take work, or for the device to do it, looks at NCCL's state, at the
// group's abort word and at the clock, in turn. On an error, an abort or a deadline this rank raises the group's abort word and calls
// ncclCommAbort, which also ends what runs on the device; so do all others, which find the word raised. ncclCommDestroy is called
// after an orderly end alone.
#ifndef TPSHARD_KERNELS_CUDA_NCCL_H
#define TPSHARD_KERNELS_CUDA_NCCL_H

#include "formats/error.h"
#include "kernels/wire.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { NCCL_HELLO_BYTES = 192, NCCL_PLACE_BYTES = 96 };

struct nccl; // one rank's end; belongs to one thread

// What a rank tells all others before they connect.
struct nccl_hello {
    char id[128];    // of rank 0: made by NCCL
    uint64_t host;   // which machine
    int32_t version; // of NCCL
    int32_t shares;  // this rank's NCCL lets ranks share a GPU
    char device[32]; // PCI address
    uint8_t reserved[16];
};

// Where a rank is; the numbers are the caller's.
struct nccl_place {
    int operation, layer;
};

// The group as its ranks know it without NCCL; borrowed, outlives the rank's end. A callback may be called at any time while this rank waits.
struct nccl_group {
    void *context;
    int rank, tp_size;
    // 0, or the error with which a rank of the group has given up.
    int (*check)(void *context, struct error *err);
    // This rank gives up: tells all others. err: what was found; becomes the error that counts, which is returned. late: some rank did not
    // come in time, NCCL does not tell which.
    int (*give_up)(void *context, struct nccl_place place, bool late, struct error *err);
    // "all_reduce of layer 3 (attention)"
    void (*describe)(void *context, struct nccl_place place, char text[NCCL_PLACE_BYTES]);
};

struct nccl_options {
    const char *library; // NULL: libnccl.so.2
    struct nccl_group group;
    int timeout_ms;             // without any progress, of each single wait
    int start_timeout_ms;       // of connecting
    int64_t max_rows, max_cols; // of a message
    cudaStream_t stream;        // on which messages are, and what the host waits for
};

// Device memory that an end takes for its messages.
uint64_t nccl_buffer_bytes(int64_t max_rows, int64_t max_cols, int tp_size);
// What NCCL takes there for itself: an estimate, since it tells nobody before. A connection has buffers for three protocols, some 10 MiB with its
// defaults; each rank has one in a ring and one to each other rank, on two channels.
uint64_t nccl_own_bytes(int tp_size);

// Loads NCCL, allocates, and fills the hello. The device is the current one. Success: the caller owns *out.
int nccl_open(struct nccl **out, const struct nccl_options *options, struct nccl_hello *hello, struct error *err);
// hellos [tp_size], by rank. All ranks call it at about the same time. ERR_GPU where two ranks have one GPU, ERR_CORRUPT where they have
// different versions of NCCL.
int nccl_connect(struct nccl *nccl, const struct nccl_hello *hellos, struct error *err);
// Waits for what is on the stream. An end that has failed, or that finds the group's abort word raised, aborts. false: what is on the stream does not
// end even so, within seconds; then all that it may still touch stays, and nothing of the device is to be freed or waited for. Accepts NULL.
bool nccl_close(struct nccl *nccl);
// "NCCL 2.28.9", and what was set in the environment for it.
void nccl_describe(const struct nccl *nccl, char *text, size_t bytes);

// data [rows][stride] f32 on the device, cols <= stride: sum over ranks, in place, as comm_all_reduce of engine/comm.h, in the order of the
// stream. All ranks call it in the same order with the same sizes and codec. lost: bf16 [rows][cols] on the device, or NULL.
int nccl_all_reduce(struct nccl *nccl, float *data, uint16_t *lost, int64_t rows, int64_t cols, int64_t stride,
                    enum wire wire, struct nccl_place place, struct error *err);
// Its halves, over rows that have owners, as engine/comm_rows.h has them.
struct nccl_rows {
    float *data; // [rows][cols] on the device
    int64_t rows, cols;
    int first_owner; // of row 0; the next ones are owned by the ranks behind it, in turn
    enum wire wire;
};
int nccl_reduce_scatter_rows(struct nccl *nccl, const struct nccl_rows *rows, uint16_t *lost, struct nccl_place place,
                             struct error *err);
int nccl_all_gather_rows(struct nccl *nccl, const struct nccl_rows *rows, struct nccl_place place, struct error *err);
// Messages from now on are on another stream, which comes behind the one before it and which nccl_close waits for, too. The host waits for that
// of the options as before: it is the caller's to let that one come behind.
void nccl_follow(struct nccl *nccl, cudaStream_t stream);
// Waits until the stream is done: what the host calls in place of cudaStreamSynchronize.
int nccl_wait(struct nccl *nccl, struct error *err);
// Until the stream has come to an event; in place of cudaEventSynchronize.
int nccl_wait_event(struct nccl *nccl, cudaEvent_t event, struct error *err);
// Bytes that this rank has sent so far.
uint64_t nccl_sent_bytes(const struct nccl *nccl);

#ifdef __cplusplus
}
#endif
#endif

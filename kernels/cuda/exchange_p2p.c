// Exchanges whose ranks write straight into the memory of each other's devices (--transport p2p): that memory, and the ways to it. See exchange.h.
//
// The inbox of a rank is one allocation of its device, in which all others write, each at its own places:
//   areas  [tp_size - 1]: tokens and slots, as in exchange.h, of the other ranks in their order
//   parts  [DEPTH][tp_size][share] of chunks, by sender
//   sums   likewise
// Ranks of other processes open it by its handle (CUDA IPC, which does not work inside one process); those of this one have its address, and access
// for their device. A rank writes there with stores of its kernels and with copies of its copy engines, and never reads there.
//
// Chunks. Copies go from the out stream to all others' parts or sums, and the token behind them; the in stream only waits. Of everything that others
// write there are three. Parts c are written again as parts c + 3 when this rank has had the token of everybody's sums c: those were added
// up from parts c. Sums c are written again as sums c + 3 when everybody's parts c + 3 are here: a rank's own stream encodes them behind decoding sums
// c. So a sender hardly ever waits for its readers.
//
// The end. Nobody frees its inbox before all ranks have said that they write no more, by a count in the ranks' memory of the host. Where one does not
// say so in time, as it was killed or hangs, the inbox stays until the process ends.
#include "kernels/cuda/exchange_host.h"

#include "kernels/clock.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    DEPTH = EXCHANGE_DEPTH,
    LEFT_OFFSET = 128, // in the ranks' memory of the host, behind the abort word
    LEAVE_MS = 2000,   // for the others to end
    FAILED_MS = 100,   // after a failure, when they may be gone
    PAUSE_US = 200,
};

struct exchange_p2p {
    uint8_t *inbox;
    uint8_t *peer[EXCHANGE_RANKS]; // theirs, as this device sees them
    bool opened[EXCHANGE_RANKS];   // by a handle
};

uint64_t exchange_p2p_bytes(int tp_size)
{
    return (uint64_t)(tp_size - 1) * EXCHANGE_DIRECT_BYTES + 2 * DEPTH * (uint64_t)EXCHANGE_PARTS_BYTES;
}

// In the inbox of rank `owner`, for what `sender` writes.
static uint8_t *area_of(uint8_t *inbox, int owner, int sender)
{
    return inbox + (uint64_t)(sender < owner ? sender : sender - 1) * EXCHANGE_DIRECT_BYTES;
}

static uint8_t *parts_of(const struct exchange *x, uint8_t *inbox, uint64_t chunk)
{
    uint64_t areas = (uint64_t)(x->ranks.tp_size - 1) * EXCHANGE_DIRECT_BYTES;
    return inbox + areas + chunk % DEPTH * EXCHANGE_PARTS_BYTES;
}
static uint8_t *sums_of(const struct exchange *x, uint8_t *inbox, uint64_t chunk)
{
    return parts_of(x, inbox, chunk) + DEPTH * EXCHANGE_PARTS_BYTES;
}

// ---- opening -------------------------------------------------------------------------------------------------------

// Of this process: two containers may both have a process 1.
static uint64_t process_number(void)
{
    static _Atomic uint64_t number;
    uint64_t none = 0, mine = 0;
    while (atomic_load(&number) == 0) {
        if (getrandom(&mine, sizeof mine, 0) != (ssize_t)sizeof mine)
            mine = (uint64_t)clock_now_ns();
        none = 0;
        atomic_compare_exchange_strong(&number, &none, mine);
    }
    return atomic_load(&number) ^ (uint64_t)getpid() << 32;
}

// Tokens before the first, in all areas; nobody else writes there yet.
static int begin_tokens(struct device *d, const struct exchange *x, struct error *err)
{
    static const char what[] = "preparing exchanges";
    uint32_t tokens[EXCHANGE_SLOTS_OFFSET / sizeof(uint32_t)];
    int rc;
    memset(tokens, 0, sizeof tokens);
    for (int lane = 0; lane < EXCHANGE_LANES; lane++)
        tokens[lane * EXCHANGE_TOKEN_BYTES / (int)sizeof *tokens] = (uint32_t)EXCHANGE_FIRST_TOKEN;
    for (int r = 0; r < x->ranks.tp_size; r++)
        if (r != x->ranks.rank &&
            (rc = device_upload(d, area_of(x->p2p->inbox, x->ranks.rank, r), tokens, sizeof tokens, what, err)))
            return rc;
    return 0;
}

int exchange_p2p_make(struct device *d, struct exchange *x, struct exchange_card *card, struct error *err)
{
    int rc;
    if (!(x->p2p = calloc(1, sizeof *x->p2p)))
        return error_set(err, ERR_MEMORY, "no memory for exchanges");
    if ((rc = CHECK(cudaMalloc((void **)&x->p2p->inbox, exchange_p2p_bytes(x->ranks.tp_size)),
                    "taking memory for the other ranks to write to")) ||
        (rc = begin_tokens(d, x, err)))
        return rc;
    card->process = process_number();
    card->device = d->index;
    card->inbox = x->p2p->inbox;
    // Where it is not had, ranks of this process do without.
    card->handle_status = cudaIpcGetMemHandle(&card->handle, x->p2p->inbox);
    if (card->handle_status != cudaSuccess)
        cudaGetLastError();
    for (uint64_t i = 0; i < DEPTH; i++) {
        x->parts_in[i] = parts_of(x, x->p2p->inbox, i);
        x->sums_in[i] = sums_of(x, x->p2p->inbox, i);
    }
    return 0;
}

static cudaError_t reach(const struct device *d, struct exchange_p2p *p2p, const struct exchange_card *mine,
                         const struct exchange_card *other, int rank)
{
    cudaError_t status;
    if (other->process != mine->process) {
        if (other->handle_status != cudaSuccess)
            return other->handle_status;
        status = cudaIpcOpenMemHandle((void **)&p2p->peer[rank], other->handle, cudaIpcMemLazyEnablePeerAccess);
        p2p->opened[rank] = status == cudaSuccess;
        return status;
    }
    p2p->peer[rank] = other->inbox;
    if (other->device == d->index)
        return cudaSuccess;
    status = cudaDeviceEnablePeerAccess(other->device, 0);
    if (status != cudaErrorPeerAccessAlreadyEnabled)
        return status;
    cudaGetLastError();
    return cudaSuccess;
}

static int reach_all(struct device *d, struct exchange *x, const struct exchange_card *cards, struct error *err)
{
    int rank = x->ranks.rank;
    for (int r = 0; r < x->ranks.tp_size; r++) {
        cudaError_t status = r == rank ? cudaSuccess : reach(d, x->p2p, &cards[rank], &cards[r], r);
        if (status != cudaSuccess) {
            cudaGetLastError();
            return error_set(err, ERR_GPU,
                             "--transport p2p: rank %d's device (%s) cannot write to the memory of rank %d's (%s): %s; "
                             "--transport host does without",
                             rank, cards[rank].bus, r, cards[r].bus, cudaGetErrorString(status));
        }
    }
    return 0;
}

// Others in an order that begins behind this rank, so that not all write to the same one first.
static int other_rank(const struct exchange_ranks *ranks, int i) { return (ranks->rank + 1 + i) % ranks->tp_size; }

int exchange_p2p_join(struct device *d, struct exchange *x, const struct exchange_card *cards, struct error *err)
{
    struct exchange_ranks *ranks = &x->ranks;
    struct error mine = {.code = 0}, all[EXCHANGE_RANKS];
    int rc;
    reach_all(d, x, cards, &mine);
    if ((rc = x->options.all_gather(x->options.arg, all, &mine, sizeof mine, err)))
        return rc;
    for (int r = 0; r < ranks->tp_size; r++)
        if (all[r].code) {
            *err = all[r];
            return err->code;
        }
    ranks->num_every = ranks->tp_size - 1;
    for (int i = 0; i < ranks->num_every; i++) {
        int r = other_rank(ranks, i);
        ranks->every[i] = ranks->to[r] = area_of(x->p2p->peer[r], r, ranks->rank);
        ranks->from[r] = area_of(x->p2p->inbox, ranks->rank, r);
    }
    return 0;
}

// ---- chunks --------------------------------------------------------------------------------------------------------

cudaError_t exchange_p2p_send_parts(const struct exchange *x, const uint8_t *stage, uint64_t share, uint64_t chunk)
{
    const struct exchange_ranks *ranks = &x->ranks;
    cudaError_t status = cudaSuccess;
    for (int i = 0; i < ranks->num_every && status == cudaSuccess; i++) {
        int r = other_rank(ranks, i);
        status = cudaMemcpyAsync(parts_of(x, x->p2p->peer[r], chunk) + (uint64_t)ranks->rank * share,
                                 stage + (uint64_t)r * share, share, cudaMemcpyDeviceToDevice, x->out);
    }
    return status;
}

cudaError_t exchange_p2p_send_sums(const struct exchange *x, const uint8_t *stage, uint64_t share, uint64_t chunk)
{
    const struct exchange_ranks *ranks = &x->ranks;
    cudaError_t status = cudaSuccess;
    for (int i = 0; i < ranks->num_every && status == cudaSuccess; i++)
        status = cudaMemcpyAsync(sums_of(x, x->p2p->peer[other_rank(ranks, i)], chunk) + (uint64_t)ranks->rank * share,
                                 stage, share, cudaMemcpyDeviceToDevice, x->out);
    return status;
}

// ---- the end -------------------------------------------------------------------------------------------------------

static uint32_t *left_word(const struct exchange *x)
{
    uint32_t *words = x->options.region;
    return words + LEFT_OFFSET / sizeof *words;
}

// This rank writes no more; so many say so.
static uint32_t leave(const struct exchange *x) { return __atomic_add_fetch(left_word(x), 1, __ATOMIC_ACQ_REL); }

static bool all_have_left(const struct exchange *x)
{
    uint32_t *words = x->options.region, count = leave(x);
    int64_t begin_ns = clock_now_ns();
    while (count < (uint32_t)x->ranks.tp_size) {
        bool has_failed = __atomic_load_n(words, __ATOMIC_ACQUIRE) || x->options.aborted(x->options.arg);
        if (clock_now_ns() - begin_ns > (has_failed ? FAILED_MS : LEAVE_MS) * (int64_t)1000000)
            return false;
        usleep(PAUSE_US);
        count = __atomic_load_n(left_word(x), __ATOMIC_ACQUIRE);
    }
    return true;
}

void exchange_p2p_close(struct exchange *x)
{
    struct exchange_p2p *p2p = x->p2p;
    if (!p2p) { // it failed before it had an inbox: the others wait for it nevertheless
        leave(x);
        return;
    }
    for (int r = 0; r < x->ranks.tp_size; r++)
        if (p2p->opened[r])
            cudaIpcCloseMemHandle(p2p->peer[r]);
    if (all_have_left(x))
        cudaFree(p2p->inbox);
    free(p2p);
    x->p2p = NULL;
}

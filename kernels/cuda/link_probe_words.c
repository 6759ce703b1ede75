// Kernels that run on two devices and see each other's words, alone and behind copies. See link_probe.c, and link_probe.h for the kernels.
#include "kernels/cuda/link_probe_internal.h"

#include <pthread.h>
#include <string.h>

enum { CALL_MOST_NS = 30 * 1000 * 1000, HAND_ROUNDS = 4 * LINK_HAND_SIZES };
_Static_assert(LINK_HAND_BYTES + LINK_HAND_STEP * (HAND_ROUNDS + 1) <= LINK_MOST_BYTES, "all rounds' messages");

// ---- running kernels -----------------------------------------------------------------------------------------------

// Whether this end's kernel did not see what the other one posted, or saw other words. An end whose own word was lost waits in vain, too: then the
// other has not come as far.
static void judge_call(struct prober *p, int other, const struct link_call_result *mine, uint32_t words)
{
    int device = p->end->device, other_device = p->board->end[other].device;
    uint32_t posted = atomic_load(&p->board->end[other].calls) + (p->me > other); // the first one posts before it waits
    if (mine->wrong)
        probe_condemn(
            p, other, p->me, LINK_CHANGED,
            "a kernel that runs on device %d sees device %d's word before what was written ahead of it (%u words "
            "in %u rounds of %u)",
            device, other_device, mine->wrong, mine->rounds, words);
    else if (mine->missed && posted > mine->rounds) {
        probe_condemn(
            p, other, p->me, LINK_LATE,
            "a kernel that runs on device %d does not see within %.1f s what device %d writes into its memory", device,
            1e-9 * (double)p->board->call_timeout_ns, other_device);
        probe_result(p, other, p->me)->crossing = 1;
    }
}

int probe_call(struct prober *p, int other, uint32_t words, uint32_t rounds, struct error *err)
{
    static const char what[] = "kernels that call each other";
    bool first = p->me < other;
    probe_is_at(p, LINK_PREPARING, LINK_BY_KERNEL, 4 * words);
    STEP(cudaMemsetAsync(p->window, 0, LINK_CALL_BYTES, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    memset(p->called, 0, sizeof *p->called);
    probe_meet(p, other);
    probe_is_at(p, LINK_CALLING, LINK_BY_KERNEL, 4 * words);
    struct link_call call = {.own = p->window,
                             .other = p->other_window,
                             .rounds = rounds,
                             .words = words,
                             .seed = p->board->seed ^ 0x5bd1e995u * (words + 1),
                             .first = first,
                             .most_ns = CALL_MOST_NS,
                             .timeout_ns = p->board->call_timeout_ns};
    STEP(cudaHostGetDevicePointer((void **)&call.result, p->called, 0), what);
    STEP(launch_link_call(&call, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    const struct link_call_result *mine = p->called;
    atomic_store(&p->end->calls, mine->rounds);
    probe_meet(p, other);
    judge_call(p, other, mine, words);
    if (first && words == 0 && !mine->missed && mine->rounds > 0) {
        double us = 1e-3 * (double)mine->ns / (2.0 * mine->rounds);
        probe_result(p, p->me, other)->us = probe_result(p, other, p->me)->us = us;
    }
    probe_meet(p, other);
    return 0;
}

// ---- copies with a word behind them ----------------------------------------------------------------------------------

// Each end judges what it was to see: what the other one wrote into its memory.
static void judge_hand(struct prober *p, int other, bool gives, bool takes)
{
    const struct link_hand_result *mine = p->handed;
    const struct link_end *theirs = &p->board->end[other];
    int device = p->end->device, other_device = theirs->device;
    double seconds = 1e-9 * (double)p->board->call_timeout_ns;
    bool unseen = takes && mine->missed && atomic_load(&theirs->posts) > mine->rounds;
    bool unheard = gives && mine->unready > 0 && atomic_load(&theirs->calls) + 1 >= mine->unready;
    if (takes && mine->wrong > 0)
        probe_condemn(
            p, other, p->me, LINK_CHANGED,
            "a kernel that runs on device %d sees the word that device %d posts behind a copy before the copy has "
            "arrived (%u words of 4 bytes are others, in %u copies)",
            device, other_device, mine->wrong, mine->rounds);
    else if (unseen || unheard)
        probe_condemn(p, other, p->me, LINK_LATE, "a kernel that runs on device %d does not see within %.1f s %s",
                      device, seconds, unseen ? "the word behind a copy" : "that the other one is ready for a copy");
    if (unseen || unheard)
        probe_result(p, other, p->me)->crossing = 1;
}

// All rounds of who gives, in its own stream.
static int queue_copies(struct prober *p, const struct link_hand *hand, struct error *err)
{
    static const char what[] = "copies with a word behind them";
    for (uint32_t round = 1; round <= hand->rounds; round++) {
        STEP(launch_link_await(hand, round, p->out), what);
        STEP(cudaMemcpyAsync(probe_message_place(p->other_window), p->scratch + 4 * (uint64_t)link_hand_first(round),
                             4 * (uint64_t)link_hand_words(hand, round), cudaMemcpyDeviceToDevice, p->out),
             what);
        STEP(launch_link_post(hand, round, p->out), what);
    }
    return 0;
}

struct waiter {
    struct prober *p;
    cudaError_t status;
};
static void *wait_for_copies(void *arg)
{
    struct waiter *w = arg;
    w->status = cudaSetDevice(w->p->end->device);
    if (w->status == cudaSuccess)
        w->status = cudaStreamSynchronize(w->p->out);
    return NULL;
}

// Both streams come to their ends only together, so each is waited for by a thread of its own: an emulated device computes in the thread that waits.
static int wait_for_both(struct prober *p, struct error *err)
{
    static const char what[] = "copies with a word behind them";
    struct waiter w = {.p = p, .status = cudaSuccess};
    pthread_t thread;
    int problem = pthread_create(&thread, NULL, wait_for_copies, &w);
    if (problem)
        return error_set(err, ERR_MEMORY, "device %d: %s: no thread can be started (%s)", p->end->device, what,
                         strerror(problem));
    cudaError_t status = cudaStreamSynchronize(p->stream);
    pthread_join(thread, NULL);
    STEP(status, what);
    STEP(w.status, what);
    return 0;
}

static struct link_hand make_hand(const struct prober *p)
{
    static const uint32_t bytes[LINK_HAND_SIZES] = {4096, 64 << 10, LINK_HAND_BYTES};
    struct link_hand hand = {.own = p->window,
                             .other = p->other_window,
                             .place = probe_message_place(p->window),
                             .rounds = HAND_ROUNDS,
                             .seed = p->board->seed ^ 0x2545f491u * (uint32_t)(p->me + 1),
                             .timeout_ns = p->board->call_timeout_ns};
    for (int i = 0; i < LINK_HAND_SIZES; i++)
        hand.words[i] = (bytes[i] < p->board->largest_bytes ? bytes[i] : (uint32_t)p->board->largest_bytes) / 16 * 4;
    return hand;
}

// gives: this end sends; takes: it looks.
static int hand_over(struct prober *p, int other, bool gives, bool takes, struct error *err)
{
    static const char what[] = "copies with a word behind them";
    struct link_hand mine = make_hand(p), theirs = mine;
    theirs.seed = p->board->seed ^ 0x2545f491u * (uint32_t)(other + 1);
    probe_is_at(p, LINK_PREPARING, LINK_BY_COPY, LINK_HAND_BYTES);
    STEP(cudaMemsetAsync(p->window, 0, LINK_CALL_BYTES, p->stream), what);
    if (gives)
        STEP(launch_link_write((uint32_t *)(void *)p->scratch, link_hand_first(HAND_ROUNDS) + LINK_HAND_BYTES / 4,
                               mine.seed, p->stream),
             what);
    STEP(cudaStreamSynchronize(p->stream), what);
    memset(p->handed, 0, sizeof *p->handed);
    STEP(cudaHostGetDevicePointer((void **)&mine.result, p->handed, 0), what);
    theirs.result = mine.result;
    probe_meet(p, other);
    probe_is_at(p, LINK_HANDING, LINK_BY_COPY, LINK_HAND_BYTES);
    if (takes)
        STEP(launch_link_take(&theirs, p->stream), what);
    int rc = gives ? queue_copies(p, &mine, err) : 0;
    if (rc || (rc = wait_for_both(p, err)))
        return rc;
    atomic_store(&p->end->calls, p->handed->rounds);
    atomic_store(&p->end->posts, p->handed->posted);
    probe_meet(p, other);
    judge_hand(p, other, gives, takes);
    probe_meet(p, other);
    return 0;
}

int probe_copies(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    for (int i = 0; i < 3 && !rc && !probe_are_condemned(p, a, b); i++)
        rc = hand_over(p, other, i == 2 || (i == 0) == (p->me == a), i == 2 || (i == 0) == (p->me == b), err);
    return rc;
}

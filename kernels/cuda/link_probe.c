// One end of a probe of links, in a process of its own. See kernels/link_board.h for who else is there, and link_probe.h for the kernels.
//
// What is proven of the direction from a to b: what a kernel and a copy engine of a write is in b's memory when b itself looks, byte for byte, and
// nothing beside it, from 4 bytes to LINK_MOST_BYTES; what b has in its memory is what a kernel and a copy engine of a read there (up to READ_MOST_BYTES); and, of both
// directions together, running kernels see each other's words, with what was written before them; of each direction alone and of both at once, a kernel
// that runs on b and sees the word that a posted behind a copy sees all of the copy, which the chunks of exchanges (exchange_p2p.c) rely on. A driver's
// leave, a bandwidth, and a look by the writer at what it wrote prove none of this: where writes end in a copy of the page, all three are as they
// should be. And where an end waits before it looks, a word that overtakes a copy is not to be seen.
//
// A link that delivers is good when it is not much slower than the way over the host's memory, which is measured beside it.
#include "kernels/cuda/link_probe.h"
#include "kernels/cuda/device.h"

#include "kernels/link_board.h"

#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CALL_AREA_BYTES = 64 << 10, // before the messages
    GUARD_BYTES = 256,          // on both sides of a message: stay as they are
    WINDOW_BYTES = CALL_AREA_BYTES + LINK_MOST_BYTES + 2 * GUARD_BYTES,
    READ_MOST_BYTES = 256 << 10, // exchanges write over links, and read nowhere
    EAGER_LOOKS = 2000,
    CALL_ROUNDS = 64,
    FLAG_ROUNDS = 256,
    CALL_MOST_NS = 30 * 1000 * 1000,
    HAND_ROUNDS = 4 * LINK_HAND_SIZES,
    // What tells the host's rates from the link's: little, as both are measured again where the link looks slow.
    RATE_KERNEL_BYTES = 256 << 10,
    RATE_COPY_BYTES = 1 << 20,
    RATE_ROUNDS = 3, // the best of them counts
    RATE_TRIES = 10,
};
_Static_assert((int)LINK_CALL_BYTES <= (int)CALL_AREA_BYTES, "two slots and a number");
_Static_assert(LINK_HAND_BYTES + LINK_HAND_STEP * (HAND_ROUNDS + 1) <= LINK_MOST_BYTES, "all rounds' messages");
_Static_assert(sizeof(cudaIpcMemHandle_t) <= LINK_HANDLE_BYTES, "a handle fits the board");

static const uint64_t message_bytes[] = {4, 4096, 256 << 10, LINK_MOST_BYTES};
enum { MESSAGES = sizeof message_bytes / sizeof *message_bytes };

struct prober {
    struct link_board *board;
    struct link_end *end;
    int me, count;            // count: devices
    cudaStream_t stream, out; // out: what a running kernel of the other end waits for
    cudaEvent_t begin, finish;
    uint8_t *window;  // the others write into it
    uint8_t *scratch; // [LINK_MOST_BYTES]: what is sent by copies, and what was read
    uint8_t *host;    // pinned [LINK_MOST_BYTES + 2 * GUARD_BYTES]
    struct link_call_result *called;
    struct link_hand_result *handed;
    uint8_t *other_window; // of the pair under way; NULL: not mapped
};

// ---- what an end is at ---------------------------------------------------------------------------------------------

static void is_at(struct prober *p, enum link_doing doing, enum link_means means, uint64_t bytes)
{
    atomic_store(&p->end->means, means);
    atomic_store(&p->end->bytes, bytes);
    atomic_store(&p->end->doing, doing);
}

// Until the other end has made as many steps of the pair.
static void meet(struct prober *p, int other)
{
    enum link_doing before = (enum link_doing)atomic_load(&p->end->doing);
    atomic_store(&p->end->doing, LINK_MEETING);
    uint32_t steps = atomic_fetch_add(&p->end->steps, 1) + 1;
    for (int looks = 0; atomic_load(&p->board->end[other].steps) < steps; looks++)
        if (looks < EAGER_LOOKS)
            sched_yield();
        else
            usleep(100);
    atomic_store(&p->end->doing, before);
}

static int status_of(const struct prober *p, cudaError_t status, const char *what, struct error *err)
{
    if (status == cudaSuccess)
        return 0;
    cudaGetLastError(); // it is told here
    return error_set(err, ERR_GPU, "device %d: %s: %s (%s)", p->end->device, what, cudaGetErrorString(status),
                     cudaGetErrorName(status));
}
#define STEP(call, what)                                                                                               \
    do {                                                                                                               \
        int step_rc = status_of(p, (call), (what), err);                                                               \
        if (step_rc)                                                                                                   \
            return step_rc;                                                                                            \
    } while (0)

// ---- a direction ---------------------------------------------------------------------------------------------------

// One message of the direction from a to b.
struct trial {
    int a, b;
    enum link_means means;
    uint32_t index, seed;
    uint64_t bytes;
    bool reads; // a reads what b wrote; else a writes
};

static const char *means_name(enum link_means means) { return means == LINK_BY_COPY ? "copy engine" : "kernel"; }

static struct link_result *result_of(const struct prober *p, int a, int b) { return &p->board->result[a][b]; }

static void condemn(const struct prober *p, int a, int b, enum link_fault fault, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
static void condemn(const struct prober *p, int a, int b, enum link_fault fault, const char *format, ...)
{
    struct link_result *result = result_of(p, a, b);
    va_list words;
    va_start(words, format);
    vsnprintf(result->sentence, sizeof result->sentence, format, words);
    va_end(words);
    result->fault = fault;
}

static bool is_condemned(const struct prober *p, int a, int b) { return result_of(p, a, b)->fault != LINK_UNTRIED; }

// Fills the place of a message with one byte, the guards included.
static uint8_t blank(const struct trial *t) { return (uint8_t)(0x11 * (1 + t->index % 14)); }
static int make_blank(struct prober *p, uint8_t *at, const struct trial *t, struct error *err)
{
    STEP(cudaMemsetAsync(at, blank(t), t->bytes + 2 * GUARD_BYTES, p->stream), "preparing its memory");
    STEP(cudaStreamSynchronize(p->stream), "preparing its memory");
    return 0;
}

// The bytes of a message, and those beside it, as they are in this device's memory at `from`.
static int look(struct prober *p, const uint8_t *from, uint64_t bytes, struct error *err)
{
    STEP(cudaMemcpyAsync(p->host, from, bytes, cudaMemcpyDeviceToHost, p->stream), "reading its memory");
    STEP(cudaStreamSynchronize(p->stream), "reading its memory");
    return 0;
}

static uint8_t byte_at(const struct trial *t, uint64_t i)
{
    return (uint8_t)(link_word(t->seed, (uint32_t)(i / 4)) >> i % 4 * 8);
}

// The message in p->host, from `at` on; condemns its direction.
static void compare(const struct prober *p, const struct trial *t, uint64_t at)
{
    int a = p->board->end[t->a].device, b = p->board->end[t->b].device;
    const char *means = means_name(t->means);
    uint64_t wrong = 0, unchanged = 0, first = 0, outside = 0;
    for (uint64_t i = 0; i < t->bytes; i += 4) {
        uint32_t got, want = link_word(t->seed, (uint32_t)(i / 4));
        memcpy(&got, p->host + at + i, sizeof got);
        bool untouched = got == 0x01010101u * blank(t); // all of it, though a byte may be as it should by chance
        for (uint64_t k = i; got != want && k < i + 4; k++) {
            bool differs = untouched || p->host[at + k] != byte_at(t, k);
            first = wrong == 0 ? k : first;
            wrong += differs;
            unchanged += untouched;
        }
    }
    for (uint64_t i = 0; i < at; i++)
        outside += (p->host[i] != blank(t)) + (p->host[at + t->bytes + i] != blank(t));
    if (wrong > 0 && t->reads)
        condemn(p, t->a, t->b, LINK_STALE,
                "device %d does not see what is in the memory of device %d (%" PRIu64 " of %" PRIu64
                " bytes that a %s read are others)",
                a, b, wrong, t->bytes, means);
    else if (wrong > 0 && wrong == unchanged)
        condemn(p, t->a, t->b, LINK_LOST,
                "what device %d writes does not arrive in the memory of device %d (%" PRIu64 " of %" PRIu64
                " bytes by a %s)",
                a, b, wrong, t->bytes, means);
    else if (wrong > 0)
        condemn(p, t->a, t->b, LINK_CHANGED,
                "what device %d writes arrives changed in the memory of device %d (%" PRIu64 " of %" PRIu64
                " bytes by a %s; byte %" PRIu64 " is %02x instead of %02x)",
                a, b, wrong, t->bytes, means, first, p->host[at + first], byte_at(t, first));
    else if (outside > 0)
        condemn(p, t->a, t->b, LINK_CHANGED,
                "what device %d writes into the memory of device %d spills over (%" PRIu64 " bytes beside %" PRIu64
                " by a %s)",
                a, b, outside, t->bytes, means);
}

static uint8_t *message_place(uint8_t *window) { return window + CALL_AREA_BYTES; }

// What was queued since p->begin was recorded has come to its end: 1e9 bytes a second; 0: too fast for its clock.
static int take_rate(struct prober *p, uint64_t bytes, double *gb_s, const char *what, struct error *err)
{
    float ms = 0;
    STEP(cudaEventRecord(p->finish, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    STEP(cudaEventElapsedTime(&ms, p->begin, p->finish), what);
    *gb_s = ms > 0 ? 1e-6 * (double)bytes / (double)ms : 0;
    return 0;
}

// Writes the message to `to`, in any device's memory; a copy takes what is in scratch.
static int send(struct prober *p, const struct trial *t, uint8_t *to, double *gb_s, struct error *err)
{
    static const char what[] = "writing to another device";
    STEP(cudaEventRecord(p->begin, p->stream), what);
    if (t->means == LINK_BY_COPY)
        STEP(cudaMemcpyAsync(to, p->scratch, t->bytes, cudaMemcpyDeviceToDevice, p->stream), what);
    else
        STEP(launch_link_write((uint32_t *)(void *)to, (uint32_t)(t->bytes / 4), t->seed, p->stream), what);
    return take_rate(p, t->bytes, gb_s, what, err);
}

static void keep_best(double *best, double gb_s) { *best = gb_s > *best ? gb_s : *best; }

// Of the sizes that are tried.
static bool is_largest(const struct prober *p, uint64_t bytes)
{
    uint64_t largest = 0;
    for (int i = 0; i < MESSAGES; i++)
        if (message_bytes[i] <= p->board->largest_bytes)
            largest = message_bytes[i];
    return bytes == largest;
}

// The writer's part of a message from a to b.
static int write_out(struct prober *p, const struct trial *t, struct error *err)
{
    bool timed = is_largest(p, t->bytes);
    meet(p, t->b); // its memory is blank
    is_at(p, LINK_WRITING, t->means, t->bytes);
    if (t->means == LINK_BY_COPY)
        STEP(launch_link_write((uint32_t *)(void *)p->scratch, (uint32_t)(t->bytes / 4), t->seed, p->stream),
             "writing to its memory");
    for (int round = 0; round < (timed ? 1 + p->board->rounds : 1); round++) {
        double gb_s;
        int rc = send(p, t, message_place(p->other_window) + GUARD_BYTES, &gb_s, err);
        if (rc)
            return rc;
        if (timed)
            keep_best(&result_of(p, t->a, t->b)->gb_s[t->means], gb_s);
    }
    meet(p, t->b); // it is written
    meet(p, t->b); // and has been looked at
    return 0;
}

static int take_in(struct prober *p, const struct trial *t, struct error *err)
{
    int rc;
    is_at(p, LINK_PREPARING, t->means, t->bytes);
    if ((rc = make_blank(p, message_place(p->window), t, err)))
        return rc;
    meet(p, t->a);
    meet(p, t->a);
    is_at(p, LINK_LOOKING, t->means, t->bytes);
    if ((rc = look(p, message_place(p->window), t->bytes + 2 * GUARD_BYTES, err)))
        return rc;
    compare(p, t, GUARD_BYTES);
    meet(p, t->a);
    return 0;
}

// b's part of a message that a reads.
static int show(struct prober *p, const struct trial *t, struct error *err)
{
    is_at(p, LINK_PREPARING, t->means, t->bytes);
    STEP(launch_link_write((uint32_t *)(void *)message_place(p->window), (uint32_t)(t->bytes / 4), t->seed, p->stream),
         "writing to its memory");
    STEP(cudaStreamSynchronize(p->stream), "writing to its memory");
    meet(p, t->a);
    meet(p, t->a);
    return 0;
}

static int read_in(struct prober *p, const struct trial *t, struct error *err)
{
    static const char what[] = "reading from another device";
    const uint8_t *from = message_place(p->other_window);
    meet(p, t->b);
    is_at(p, LINK_READING, t->means, t->bytes);
    STEP(cudaMemsetAsync(p->scratch, blank(t), t->bytes, p->stream), what);
    if (t->means == LINK_BY_COPY)
        STEP(cudaMemcpyAsync(p->scratch, from, t->bytes, cudaMemcpyDeviceToDevice, p->stream), what);
    else
        STEP(launch_link_read((uint32_t *)(void *)p->scratch, (const uint32_t *)(const void *)from,
                              (uint32_t)(t->bytes / 4), p->stream),
             what);
    STEP(cudaStreamSynchronize(p->stream), what);
    is_at(p, LINK_LOOKING, t->means, t->bytes);
    int rc = look(p, p->scratch, t->bytes, err);
    if (rc)
        return rc;
    compare(p, t, 0);
    meet(p, t->b);
    return 0;
}

// All messages from a to b; both ends call it. It ends with the first one that condemns the direction.
static int try_direction(struct prober *p, int a, int b, struct error *err)
{
    bool mine = p->me == a;
    uint32_t index = 0;
    int rc;
    for (int reads = 0; reads < 2; reads++)
        for (int means = 0; means < LINK_MEANS; means++)
            for (int i = 0; i < MESSAGES; i++, index++) {
                struct trial t = {.a = a,
                                  .b = b,
                                  .means = (enum link_means)means,
                                  .index = index,
                                  .seed = p->board->seed + (uint32_t)(a * LINK_ENDS + b) * 64 + index,
                                  .bytes = message_bytes[i],
                                  .reads = reads};
                if (t.bytes > p->board->largest_bytes || (reads && t.bytes > READ_MOST_BYTES))
                    continue;
                if (is_condemned(p, a, b))
                    return 0;
                rc = reads  ? mine ? read_in(p, &t, err) : show(p, &t, err)
                      : mine ? write_out(p, &t, err)
                            : take_in(p, &t, err);
                if (rc)
                    return rc;
            }
    return 0;
}

// ---- running kernels -----------------------------------------------------------------------------------------------

// Whether this end's kernel did not see what the other one posted, or saw other words. An end whose own word was lost waits in vain, too: then the
// other has not come as far.
static void judge_call(struct prober *p, int other, const struct link_call_result *mine, uint32_t words)
{
    int device = p->end->device, other_device = p->board->end[other].device;
    uint32_t posted = atomic_load(&p->board->end[other].calls) + (p->me > other); // the first one posts before it waits
    if (mine->wrong)
        condemn(p, other, p->me, LINK_CHANGED,
                "a kernel that runs on device %d sees device %d's word before what was written ahead of it (%u words "
                "in %u rounds of %u)",
                device, other_device, mine->wrong, mine->rounds, words);
    else if (mine->missed && posted > mine->rounds) {
        condemn(p, other, p->me, LINK_LATE,
                "a kernel that runs on device %d does not see within %.1f s what device %d writes into its memory",
                device, 1e-9 * (double)p->board->call_timeout_ns, other_device);
        result_of(p, other, p->me)->crossing = 1;
    }
}

static int call_other(struct prober *p, int other, uint32_t words, uint32_t rounds, struct error *err)
{
    static const char what[] = "kernels that call each other";
    bool first = p->me < other;
    is_at(p, LINK_PREPARING, LINK_BY_KERNEL, 4 * words);
    STEP(cudaMemsetAsync(p->window, 0, LINK_CALL_BYTES, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    memset(p->called, 0, sizeof *p->called);
    meet(p, other);
    is_at(p, LINK_CALLING, LINK_BY_KERNEL, 4 * words);
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
    meet(p, other);
    judge_call(p, other, mine, words);
    if (first && words == 0 && !mine->missed && mine->rounds > 0) {
        double us = 1e-3 * (double)mine->ns / (2.0 * mine->rounds);
        result_of(p, p->me, other)->us = result_of(p, other, p->me)->us = us;
    }
    meet(p, other);
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
        condemn(p, other, p->me, LINK_CHANGED,
                "a kernel that runs on device %d sees the word that device %d posts behind a copy before the copy has "
                "arrived (%u words of 4 bytes are others, in %u copies)",
                device, other_device, mine->wrong, mine->rounds);
    else if (unseen || unheard)
        condemn(p, other, p->me, LINK_LATE, "a kernel that runs on device %d does not see within %.1f s %s", device,
                seconds, unseen ? "the word behind a copy" : "that the other one is ready for a copy");
    if (unseen || unheard)
        result_of(p, other, p->me)->crossing = 1;
}

// All rounds of who gives, in its own stream.
static int queue_copies(struct prober *p, const struct link_hand *hand, struct error *err)
{
    static const char what[] = "copies with a word behind them";
    for (uint32_t round = 1; round <= hand->rounds; round++) {
        STEP(launch_link_await(hand, round, p->out), what);
        STEP(cudaMemcpyAsync(message_place(p->other_window), p->scratch + 4 * (uint64_t)link_hand_first(round),
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
                             .place = message_place(p->window),
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
    is_at(p, LINK_PREPARING, LINK_BY_COPY, LINK_HAND_BYTES);
    STEP(cudaMemsetAsync(p->window, 0, LINK_CALL_BYTES, p->stream), what);
    if (gives)
        STEP(launch_link_write((uint32_t *)(void *)p->scratch, link_hand_first(HAND_ROUNDS) + LINK_HAND_BYTES / 4,
                               mine.seed, p->stream),
             what);
    STEP(cudaStreamSynchronize(p->stream), what);
    memset(p->handed, 0, sizeof *p->handed);
    STEP(cudaHostGetDevicePointer((void **)&mine.result, p->handed, 0), what);
    theirs.result = mine.result;
    meet(p, other);
    is_at(p, LINK_HANDING, LINK_BY_COPY, LINK_HAND_BYTES);
    if (takes)
        STEP(launch_link_take(&theirs, p->stream), what);
    int rc = gives ? queue_copies(p, &mine, err) : 0;
    if (rc || (rc = wait_for_both(p, err)))
        return rc;
    atomic_store(&p->end->calls, p->handed->rounds);
    atomic_store(&p->end->posts, p->handed->posted);
    meet(p, other);
    judge_hand(p, other, gives, takes);
    meet(p, other);
    return 0;
}

static bool are_condemned(const struct prober *p, int a, int b)
{
    return is_condemned(p, a, b) || is_condemned(p, b, a);
}

// One direction, the other, and both at once.
static int try_copies(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    for (int i = 0; i < 3 && !rc && !are_condemned(p, a, b); i++)
        rc = hand_over(p, other, i == 2 || (i == 0) == (p->me == a), i == 2 || (i == 0) == (p->me == b), err);
    return rc;
}

// ---- rates -----------------------------------------------------------------------------------------------------------

static uint64_t rate_bytes(const struct prober *p, enum link_means means)
{
    uint64_t bytes = means == LINK_BY_COPY ? RATE_COPY_BYTES : RATE_KERNEL_BYTES;
    return bytes < p->board->largest_bytes ? bytes : p->board->largest_bytes;
}

// Between this device and memory of the host.
static int measure_host(struct prober *p, enum link_way way, enum link_means means, double *gb_s, struct error *err)
{
    static const char what[] = "copying to and from memory of the host";
    uint64_t bytes = rate_bytes(p, means);
    uint32_t *device = (uint32_t *)(void *)p->scratch, *host;
    STEP(cudaHostGetDevicePointer((void **)&host, p->host, 0), what);
    STEP(cudaEventRecord(p->begin, p->stream), what);
    if (means == LINK_BY_COPY && way == LINK_TO_HOST)
        STEP(cudaMemcpyAsync(p->host, p->scratch, bytes, cudaMemcpyDeviceToHost, p->stream), what);
    else if (means == LINK_BY_COPY)
        STEP(cudaMemcpyAsync(p->scratch, p->host, bytes, cudaMemcpyHostToDevice, p->stream), what);
    else if (way == LINK_TO_HOST)
        STEP(launch_link_write(host, (uint32_t)(bytes / 4), p->board->seed, p->stream), what);
    else
        STEP(launch_link_read(device, host, (uint32_t)(bytes / 4), p->stream), what);
    return take_rate(p, bytes, gb_s, what, err);
}

static int measure_host_rates(struct prober *p, struct error *err)
{
    double gb_s;
    for (int i = 0; i < RATE_ROUNDS * LINK_WAYS * LINK_MEANS; i++) {
        enum link_way way = (enum link_way)(i / LINK_MEANS % LINK_WAYS);
        enum link_means means = (enum link_means)(i % LINK_MEANS);
        int rc = measure_host(p, way, means, &gb_s, err);
        if (rc)
            return rc;
        keep_best(&p->end->host_gb_s[way][means], gb_s);
    }
    return 0;
}

// One after the other, several times. best: of all that the link did so far.
static int measure_both(struct prober *p, const struct trial *t, double *best, double *host, struct error *err)
{
    double gb_s;
    *host = 0;
    for (int i = 0; i < RATE_ROUNDS; i++) {
        int rc = measure_host(p, LINK_TO_HOST, t->means, &gb_s, err);
        if (rc)
            return rc;
        keep_best(host, gb_s);
        if ((rc = send(p, t, message_place(p->other_window), &gb_s, err)))
            return rc;
        keep_best(best, gb_s);
    }
    return 0;
}

static double least_of(double x, double y) { return x < y ? x : y; }

// By a third, at least: words and small messages take one way over a link and two over the host.
static bool is_slower(double link_gb_s, double host_gb_s) { return link_gb_s > 0 && 3 * link_gb_s < 2 * host_gb_s; }

// Over the host a byte is written by one device while another one reads those before it. Where the link's rate is less, that may be for what else
// happened then: it is slow if its best is less than what the host does each time, beside it.
static int judge_rate(struct prober *p, int other, enum link_means means, struct error *err)
{
    struct trial t = {.a = p->me, .b = other, .means = means, .seed = p->board->seed, .bytes = rate_bytes(p, means)};
    double *best = &result_of(p, p->me, other)->gb_s[means];
    double theirs = p->board->end[other].host_gb_s[LINK_FROM_HOST][means];
    double host = least_of(p->end->host_gb_s[LINK_TO_HOST][means], theirs);
    is_at(p, LINK_WRITING, means, t.bytes);
    for (int i = 0; i < RATE_TRIES && is_slower(*best, host); i++) {
        int rc = measure_both(p, &t, best, &host, err);
        if (rc)
            return rc;
        host = least_of(host, theirs);
    }
    if (is_slower(*best, host))
        condemn(p, p->me, other, LINK_SLOW,
                "device %d writes %.2f GB/s to device %d by a %s, and %.2f GB/s would go over the host's memory",
                p->end->device, *best, p->board->end[other].device, means_name(means), host);
    return 0;
}

// What each writes, one after the other.
static int judge_rates(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    for (int turn = 0; turn < 2; turn++) {
        bool mine = (turn == 0) == (p->me == a);
        for (int means = 0; means < LINK_MEANS && mine && !rc && !is_condemned(p, p->me, other); means++)
            rc = judge_rate(p, other, (enum link_means)means, err);
        if (rc)
            return rc;
        meet(p, other);
    }
    return 0;
}

// ---- a pair --------------------------------------------------------------------------------------------------------

static void map_other(struct prober *p, int other)
{
    cudaIpcMemHandle_t handle;
    is_at(p, LINK_MAPPING, LINK_BY_KERNEL, WINDOW_BYTES);
    memcpy(&handle, p->board->end[other].handle, sizeof handle);
    cudaError_t status = cudaIpcOpenMemHandle((void **)&p->other_window, handle, cudaIpcMemLazyEnablePeerAccess);
    if (status == cudaSuccess)
        return;
    p->other_window = NULL;
    cudaGetLastError();
    condemn(p, p->me, other, LINK_REFUSED, "device %d cannot map the memory of device %d: %s (%s)", p->end->device,
            p->board->end[other].device, cudaGetErrorString(status), cudaGetErrorName(status));
}

static int try_pair(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    if (!is_condemned(p, p->me, other))
        map_other(p, other);
    meet(p, other);
    if ((rc = try_direction(p, a, b, err)) || (rc = try_direction(p, b, a, err)))
        return rc;
    if (!are_condemned(p, a, b) && (rc = call_other(p, other, LINK_CALL_WORDS, CALL_ROUNDS, err)))
        return rc;
    if (!are_condemned(p, a, b) && (rc = call_other(p, other, 0, FLAG_ROUNDS, err)))
        return rc;
    if ((rc = try_copies(p, a, b, err)) || (rc = judge_rates(p, a, b, err)))
        return rc;
    is_at(p, LINK_MAPPING, LINK_BY_KERNEL, 0);
    if (p->other_window)
        STEP(cudaIpcCloseMemHandle(p->other_window), "giving back another device's memory");
    p->other_window = NULL;
    meet(p, other); // everything about them is said
    if (!is_condemned(p, p->me, other))
        result_of(p, p->me, other)->fault = LINK_GOOD;
    is_at(p, LINK_IDLE, LINK_BY_KERNEL, 0);
    return 0;
}

// ---- an end's life -------------------------------------------------------------------------------------------------

// Whether several processes may use the device at once, as the probe's ends and ranks that start beside them do. Neither this nor the other questions
// make a context: in the other modes it would take the ranks' place.
static int is_shared(int *shared, struct prober *p, int device, struct error *err)
{
    int mode = cudaComputeModeDefault;
    STEP(cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, device), "asking for its compute mode");
    *shared = mode == cudaComputeModeDefault;
    return 0;
}

// Both ends of a pair ask for both of its devices: each then writes its own direction alone.
static int ask_modes(struct prober *p, int other, int device, struct error *err)
{
    const int devices[2] = {p->end->device, device};
    for (int i = 0; i < 2; i++) {
        int shared = 1, rc = is_shared(&shared, p, devices[i], err);
        if (rc)
            return rc;
        if (!shared && !is_condemned(p, p->me, other))
            condemn(p, p->me, other, LINK_REFUSED,
                    "the compute mode of device %d lets one process at most use it, so its links cannot be tried "
                    "(`nvidia-smi -i %d -c DEFAULT` sets the usual mode)",
                    devices[i], devices[i]);
    }
    return 0;
}

static int ask(struct prober *p, struct error *err)
{
    struct link_board *board = p->board;
    int first = p->me - p->me % board->group;
    is_at(p, LINK_ASKING, LINK_BY_KERNEL, 0);
    int rc = device_count(&p->count, err);
    if (rc)
        return rc;
    p->end->device = device_of_rank(p->end->rank, p->end->device, p->count);
    if (p->end->device >= p->count)
        return error_set(err, ERR_GPU, "device %d does not exist: there are %d", p->end->device, p->count);
    STEP(cudaDeviceGetPCIBusId(p->end->bus, sizeof p->end->bus, p->end->device), "asking where it is");
    for (int other = first; other < first + board->group && other < board->num_ends; other++) {
        int can = 1, device = device_of_rank(board->end[other].rank, board->end[other].device, p->count);
        if (other == p->me || device >= p->count)
            continue;
        if (device != p->end->device) // of its own memory there is nothing to ask
            STEP(cudaDeviceCanAccessPeer(&can, p->end->device, device), "asking which devices it reaches");
        result_of(p, p->me, other)->claimed = can != 0;
        if (!can && !is_condemned(p, p->me, other))
            condemn(p, p->me, other, LINK_REFUSED, "the driver does not let device %d reach the memory of device %d",
                    p->end->device, device);
        if ((rc = ask_modes(p, other, device, err)))
            return rc;
    }
    return 0;
}

// A driver may load a kernel when it is first launched, and wait before that for what runs: for ever, if that waits for the new one.
static int load_kernels(struct prober *p, struct error *err)
{
    static const char what[] = "loading kernels";
    struct link_hand none = {.own = p->window, .other = p->window, .place = p->window, .words = {4}};
    memset(p->handed, 0, sizeof *p->handed);
    STEP(cudaHostGetDevicePointer((void **)&none.result, p->handed, 0), what);
    STEP(launch_link_take(&none, p->stream), what);
    STEP(launch_link_await(&none, 0, p->stream), what);
    STEP(launch_link_post(&none, 0, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    return 0;
}

static int open_device(struct prober *p, struct error *err)
{
    static const char what[] = "taking memory";
    cudaIpcMemHandle_t handle;
    is_at(p, LINK_OPENING, LINK_BY_KERNEL, 0);
    STEP(cudaSetDevice(p->end->device), "choosing it");
    STEP(cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking), "making a stream");
    STEP(cudaStreamCreateWithFlags(&p->out, cudaStreamNonBlocking), "making a stream");
    STEP(cudaEventCreateWithFlags(&p->begin, cudaEventDefault), "making an event");
    STEP(cudaEventCreateWithFlags(&p->finish, cudaEventDefault), "making an event");
    STEP(cudaMalloc((void **)&p->window, WINDOW_BYTES), what);
    STEP(cudaMalloc((void **)&p->scratch, LINK_MOST_BYTES), what);
    STEP(cudaMallocHost((void **)&p->host, LINK_MOST_BYTES + 2 * GUARD_BYTES), what);
    STEP(cudaMallocHost((void **)&p->called, sizeof *p->called), what);
    STEP(cudaMallocHost((void **)&p->handed, sizeof *p->handed), what);
    STEP(cudaMemsetAsync(p->window, 0, WINDOW_BYTES, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    STEP(cudaIpcGetMemHandle(&handle, p->window), "making its memory one that other processes can map");
    memcpy(p->end->handle, &handle, sizeof handle);
    int rc = load_kernels(p, err);
    return rc ? rc : measure_host_rates(p, err);
}

static void give_back(struct prober *p)
{
    cudaFreeHost(p->handed);
    cudaFreeHost(p->called);
    cudaFreeHost(p->host);
    cudaFree(p->scratch);
    cudaFree(p->window);
    if (p->finish)
        cudaEventDestroy(p->finish);
    if (p->begin)
        cudaEventDestroy(p->begin);
    if (p->out)
        cudaStreamDestroy(p->out);
    if (p->stream)
        cudaStreamDestroy(p->stream);
}

// The next order; its number is the one after `number`.
static enum link_order next_order(const struct prober *p, uint32_t number)
{
    for (int looks = 0; atomic_load(&p->board->order.number) == number; looks++)
        if (looks < EAGER_LOOKS)
            sched_yield();
        else
            usleep(100);
    return (enum link_order)p->board->order.kind;
}

int link_probe(struct link_board *board, int end, struct error *err)
{
    struct prober p = {.board = board, .end = &board->end[end], .me = end};
    unsetenv("CUDA_LAUNCH_BLOCKING"); // it keeps kernels from running beside each other
    uint32_t number = atomic_load(&p.end->taken);
    int rc = 0;
    while (!rc) {
        enum link_order kind = next_order(&p, number);
        int other = board->order.other[end];
        number = atomic_load(&board->order.number);
        if (kind == LINK_ORDER_END)
            break;
        if (kind == LINK_ORDER_LOOK)
            rc = ask(&p, err);
        else if (kind == LINK_ORDER_OPEN)
            rc = open_device(&p, err);
        else if (kind == LINK_ORDER_PAIRS && other >= 0)
            rc = try_pair(&p, end < other ? end : other, end < other ? other : end, err);
        if (!rc)
            atomic_store(&p.end->taken, number);
    }
    if (!rc)
        give_back(&p);
    return rc;
}

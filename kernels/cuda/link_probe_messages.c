// Messages of a direction: written and read by kernels and copy engines, and looked at where they were to arrive. See link_probe.c.
#include "kernels/cuda/link_probe_internal.h"

#include <inttypes.h>
#include <string.h>

enum { READ_MOST_BYTES = 256 << 10 }; // exchanges write over links, and read nowhere

static const uint64_t message_bytes[] = {4, 4096, 256 << 10, LINK_MOST_BYTES};
enum { MESSAGES = sizeof message_bytes / sizeof *message_bytes };

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
    const char *means = probe_means_name(t->means);
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
        probe_condemn(p, t->a, t->b, LINK_STALE,
                      "device %d does not see what is in the memory of device %d (%" PRIu64 " of %" PRIu64
                      " bytes that a %s read are others)",
                      a, b, wrong, t->bytes, means);
    else if (wrong > 0 && wrong == unchanged)
        probe_condemn(p, t->a, t->b, LINK_LOST,
                      "what device %d writes does not arrive in the memory of device %d (%" PRIu64 " of %" PRIu64
                      " bytes by a %s)",
                      a, b, wrong, t->bytes, means);
    else if (wrong > 0)
        probe_condemn(p, t->a, t->b, LINK_CHANGED,
                      "what device %d writes arrives changed in the memory of device %d (%" PRIu64 " of %" PRIu64
                      " bytes by a %s; byte %" PRIu64 " is %02x instead of %02x)",
                      a, b, wrong, t->bytes, means, first, p->host[at + first], byte_at(t, first));
    else if (outside > 0)
        probe_condemn(p, t->a, t->b, LINK_CHANGED,
                      "what device %d writes into the memory of device %d spills over (%" PRIu64
                      " bytes beside %" PRIu64 " by a %s)",
                      a, b, outside, t->bytes, means);
}

int probe_take_rate(struct prober *p, uint64_t bytes, double *gb_s, const char *what, struct error *err)
{
    float ms = 0;
    STEP(cudaEventRecord(p->finish, p->stream), what);
    STEP(cudaStreamSynchronize(p->stream), what);
    STEP(cudaEventElapsedTime(&ms, p->begin, p->finish), what);
    *gb_s = ms > 0 ? 1e-6 * (double)bytes / (double)ms : 0;
    return 0;
}

int probe_send(struct prober *p, const struct trial *t, uint8_t *to, double *gb_s, struct error *err)
{
    static const char what[] = "writing to another device";
    STEP(cudaEventRecord(p->begin, p->stream), what);
    if (t->means == LINK_BY_COPY)
        STEP(cudaMemcpyAsync(to, p->scratch, t->bytes, cudaMemcpyDeviceToDevice, p->stream), what);
    else
        STEP(launch_link_write((uint32_t *)(void *)to, (uint32_t)(t->bytes / 4), t->seed, p->stream), what);
    return probe_take_rate(p, t->bytes, gb_s, what, err);
}

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
    probe_meet(p, t->b); // its memory is blank
    probe_is_at(p, LINK_WRITING, t->means, t->bytes);
    if (t->means == LINK_BY_COPY)
        STEP(launch_link_write((uint32_t *)(void *)p->scratch, (uint32_t)(t->bytes / 4), t->seed, p->stream),
             "writing to its memory");
    for (int round = 0; round < (timed ? 1 + p->board->rounds : 1); round++) {
        double gb_s;
        int rc = probe_send(p, t, probe_message_place(p->other_window) + GUARD_BYTES, &gb_s, err);
        if (rc)
            return rc;
        if (timed)
            probe_keep_best(&probe_result(p, t->a, t->b)->gb_s[t->means], gb_s);
    }
    probe_meet(p, t->b); // it is written
    probe_meet(p, t->b); // and has been looked at
    return 0;
}

static int take_in(struct prober *p, const struct trial *t, struct error *err)
{
    int rc;
    probe_is_at(p, LINK_PREPARING, t->means, t->bytes);
    if ((rc = make_blank(p, probe_message_place(p->window), t, err)))
        return rc;
    probe_meet(p, t->a);
    probe_meet(p, t->a);
    probe_is_at(p, LINK_LOOKING, t->means, t->bytes);
    if ((rc = look(p, probe_message_place(p->window), t->bytes + 2 * GUARD_BYTES, err)))
        return rc;
    compare(p, t, GUARD_BYTES);
    probe_meet(p, t->a);
    return 0;
}

// b's part of a message that a reads.
static int show(struct prober *p, const struct trial *t, struct error *err)
{
    probe_is_at(p, LINK_PREPARING, t->means, t->bytes);
    STEP(launch_link_write((uint32_t *)(void *)probe_message_place(p->window), (uint32_t)(t->bytes / 4), t->seed,
                           p->stream),
         "writing to its memory");
    STEP(cudaStreamSynchronize(p->stream), "writing to its memory");
    probe_meet(p, t->a);
    probe_meet(p, t->a);
    return 0;
}

static int read_in(struct prober *p, const struct trial *t, struct error *err)
{
    static const char what[] = "reading from another device";
    const uint8_t *from = probe_message_place(p->other_window);
    probe_meet(p, t->b);
    probe_is_at(p, LINK_READING, t->means, t->bytes);
    STEP(cudaMemsetAsync(p->scratch, blank(t), t->bytes, p->stream), what);
    if (t->means == LINK_BY_COPY)
        STEP(cudaMemcpyAsync(p->scratch, from, t->bytes, cudaMemcpyDeviceToDevice, p->stream), what);
    else
        STEP(launch_link_read((uint32_t *)(void *)p->scratch, (const uint32_t *)(const void *)from,
                              (uint32_t)(t->bytes / 4), p->stream),
             what);
    STEP(cudaStreamSynchronize(p->stream), what);
    probe_is_at(p, LINK_LOOKING, t->means, t->bytes);
    int rc = look(p, p->scratch, t->bytes, err);
    if (rc)
        return rc;
    compare(p, t, 0);
    probe_meet(p, t->b);
    return 0;
}

int probe_messages(struct prober *p, int a, int b, struct error *err)
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
                if (probe_is_condemned(p, a, b))
                    return 0;
                rc = reads  ? mine ? read_in(p, &t, err) : show(p, &t, err)
                      : mine ? write_out(p, &t, err)
                            : take_in(p, &t, err);
                if (rc)
                    return rc;
            }
    return 0;
}

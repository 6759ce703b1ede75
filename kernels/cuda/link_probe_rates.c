// What a link copies a second beside the way over the host's memory. See link_probe.c.
#include "kernels/cuda/link_probe_internal.h"

// What tells the host's rates from the link's: little, as both are measured again where the link looks slow.
enum {
    RATE_KERNEL_BYTES = 256 << 10,
    RATE_COPY_BYTES = 1 << 20,
    RATE_ROUNDS = 3, // the best of them counts
    RATE_TRIES = 10,
};

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
    return probe_take_rate(p, bytes, gb_s, what, err);
}

int probe_host_rates(struct prober *p, struct error *err)
{
    double gb_s;
    for (int i = 0; i < RATE_ROUNDS * LINK_WAYS * LINK_MEANS; i++) {
        enum link_way way = (enum link_way)(i / LINK_MEANS % LINK_WAYS);
        enum link_means means = (enum link_means)(i % LINK_MEANS);
        int rc = measure_host(p, way, means, &gb_s, err);
        if (rc)
            return rc;
        probe_keep_best(&p->end->host_gb_s[way][means], gb_s);
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
        probe_keep_best(host, gb_s);
        if ((rc = probe_send(p, t, probe_message_place(p->other_window), &gb_s, err)))
            return rc;
        probe_keep_best(best, gb_s);
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
    double *best = &probe_result(p, p->me, other)->gb_s[means];
    double theirs = p->board->end[other].host_gb_s[LINK_FROM_HOST][means];
    double host = least_of(p->end->host_gb_s[LINK_TO_HOST][means], theirs);
    probe_is_at(p, LINK_WRITING, means, t.bytes);
    for (int i = 0; i < RATE_TRIES && is_slower(*best, host); i++) {
        int rc = measure_both(p, &t, best, &host, err);
        if (rc)
            return rc;
        host = least_of(host, theirs);
    }
    if (is_slower(*best, host))
        probe_condemn(p, p->me, other, LINK_SLOW,
                      "device %d writes %.2f GB/s to device %d by a %s, and %.2f GB/s would go over the host's memory",
                      p->end->device, *best, p->board->end[other].device, probe_means_name(means), host);
    return 0;
}

// What each writes, one after the other.
int probe_judge_rates(struct prober *p, int a, int b, struct error *err)
{
    int other = p->me == a ? b : a, rc = 0;
    for (int turn = 0; turn < 2; turn++) {
        bool mine = (turn == 0) == (p->me == a);
        for (int means = 0; means < LINK_MEANS && mine && !rc && !probe_is_condemned(p, p->me, other); means++)
            rc = judge_rate(p, other, (enum link_means)means, err);
        if (rc)
            return rc;
        probe_meet(p, other);
    }
    return 0;
}

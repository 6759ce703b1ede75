// What a card's own link gives: copies between pinned memory of the host and the card, by the backend's way of loading weights. In a
// child, since a driver can hang. See doctor.h.
#include "engine/doctor.h"

#include "kernels/clock.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { COPY_BYTES = 8 << 20, SMALL_BYTES = 4096, COPIES = 24, SMALL_COPIES = 50 };

struct card {
    const struct backend *backend;
    const struct kernels *kernels;
    int number;
};

// The fastest of several copies, in seconds; to the card, or from it.
static int time_copies(double *best_s, const struct card *c, struct device *device, uint8_t *buffer, uint64_t bytes,
                       int copies, bool to, struct error *err)
{
    for (int i = 0; i < copies; i++) {
        int64_t begin_ns = clock_now_ns();
        int rc = to ? c->backend->load_copy(device, 0, 0, buffer, bytes, err)
                    : c->backend->load_read(device, 0, buffer, bytes, err);
        double took_s = 1e-9 * (double)(clock_now_ns() - begin_ns);
        if (rc)
            return rc;
        *best_s = i == 0 || took_s < *best_s ? took_s : *best_s;
    }
    return 0;
}

static int copy_all(struct doctor_copies *out, const struct card *c, struct device *device, struct error *err)
{
    struct load_target target;
    uint8_t *buffer;
    double to_s, from_s, small_s;
    int rc;
    if ((rc = c->backend->load_begin(device, NULL, COPY_BYTES, &target, err)) ||
        (rc = c->backend->load_buffer(device, 0, COPY_BYTES, &buffer, err)))
        return rc;
    memset(buffer, 0x5a, COPY_BYTES);
    snprintf(out->probe.at, sizeof out->probe.at, "copies to device %d", c->number);
    if ((rc = time_copies(&to_s, c, device, buffer, COPY_BYTES, COPIES, true, err)) ||
        (rc = time_copies(&small_s, c, device, buffer, SMALL_BYTES, SMALL_COPIES, true, err)))
        return rc;
    memset(buffer, 0, COPY_BYTES);
    snprintf(out->probe.at, sizeof out->probe.at, "copies from device %d", c->number);
    if ((rc = time_copies(&from_s, c, device, buffer, COPY_BYTES, COPIES, false, err)))
        return rc;
    for (int64_t i = 0; i < COPY_BYTES; i++)
        if (buffer[i] != 0x5a)
            return error_set(err, ERR_GPU, "device %d gives back other bytes than were copied to it", c->number);
    out->to_gb_s = 1e-9 * COPY_BYTES / to_s;
    out->from_gb_s = 1e-9 * COPY_BYTES / from_s;
    out->small_us = 1e6 * small_s;
    return 0;
}

static void measure(struct probe *probe, void *arg)
{
    const struct card *c = arg;
    struct doctor_copies *out = (struct doctor_copies *)(void *)probe;
    struct device_options options = {.kernels = c->kernels, .rank = 0, .tp_size = 1, .device = c->number};
    struct device *device = NULL;
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1); // as the bus counts cards
    snprintf(probe->at, sizeof probe->at, "opening device %d", c->number);
    if (c->backend->open(&device, &options, &probe->err) || copy_all(out, c, device, &probe->err))
        return;
    snprintf(probe->at, sizeof probe->at, "closing device %d", c->number);
    c->backend->load_end(device);
    c->backend->close(device);
    probe->at[0] = 0;
}

static void count(struct probe *probe, void *arg)
{
    const struct backend *backend = arg;
    struct doctor_devices *out = (struct doctor_devices *)(void *)probe;
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1); // as the bus counts cards
    snprintf(probe->at, sizeof probe->at, "the start of the driver");
    if (backend->devices(&out->count, &probe->err))
        return;
    snprintf(probe->at, sizeof probe->at, "libnccl.so.2");
    void *nccl = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL);
    out->has_nccl = nccl != NULL;
    if (nccl)
        dlclose(nccl);
    probe->at[0] = 0;
}

void doctor_devices_count(struct doctor_devices *out, const struct backend *backend, double seconds)
{
    struct backend copy = *backend;
    doctor_probe_run(&out->probe, count, &copy, seconds);
}

void doctor_cards_measure(struct doctor_copies *out, const struct backend *backend, const struct kernels *kernels,
                          int card, double seconds)
{
    struct card c = {backend, kernels, card};
    doctor_probe_run(&out->probe, measure, &c, seconds);
}

// What NVIDIA's management library knows beyond the kernel's files: names, memory, and which pairs of cards the driver says can
// reach each other. Loaded when it is there; asked in a child. See doctor.h.
#include "engine/doctor.h"

#include <dlfcn.h>
#include <string.h>

// Of nvml.h; the ABI has stood since version 1.
struct nvml_device;
struct nvml_memory {
    unsigned long long total, free, used;
};
enum { NVML_CAPS_READ = 0, NVML_CAPS_WRITE = 1 };

struct nvml {
    int (*init)(void);
    int (*by_bus)(const char *bus, struct nvml_device **device);
    int (*name)(struct nvml_device *device, char *name, unsigned bytes);
    int (*memory)(struct nvml_device *device, struct nvml_memory *memory);
    int (*p2p)(struct nvml_device *a, struct nvml_device *b, int caps, int *status);
};

struct questions {
    const struct doctor_system *system;
    void *library;
};

static bool find(struct nvml *n, void *library)
{
    const struct {
        const char *name;
        void *to;
    } functions[] = {
        {"nvmlInit_v2", &n->init},           {"nvmlDeviceGetHandleByPciBusId_v2", &n->by_bus},
        {"nvmlDeviceGetName", &n->name},     {"nvmlDeviceGetMemoryInfo", &n->memory},
        {"nvmlDeviceGetP2PStatus", &n->p2p},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *found = dlsym(library, functions[i].name);
        if (!found)
            return false;
        memcpy(functions[i].to, &found, sizeof found);
    }
    return true;
}

static const char *refusal(int status)
{
    static const char *const reasons[] = {
        "",
        "not with this chipset",
        "not with these cards",
        "not across this topology",
        "switched off in the driver",
        "not supported",
    };
    return status > 0 && status < (int)(sizeof reasons / sizeof *reasons) ? reasons[status] : "the driver cannot tell";
}

static void ask_pair(struct doctor_nvml *out, const struct nvml *n, int a, int b, struct nvml_device *from,
                     struct nvml_device *to)
{
    int reads = 0, writes = 0;
    snprintf(out->probe.at, sizeof out->probe.at, "nvmlDeviceGetP2PStatus of cards %d and %d", a, b);
    if (n->p2p(from, to, NVML_CAPS_READ, &reads) != 0 || n->p2p(from, to, NVML_CAPS_WRITE, &writes) != 0)
        return;
    out->p2p[a][b] = reads == 0 && writes == 0 ? P2P_CLAIMED : P2P_REFUSED;
    snprintf(out->refused[a][b], sizeof out->refused[a][b], "%s", refusal(writes ? writes : reads));
}

static void ask(struct probe *probe, void *arg)
{
    const struct questions *q = arg;
    struct doctor_nvml *out = (struct doctor_nvml *)(void *)probe;
    struct nvml n;
    struct nvml_device *device[DOCTOR_CARDS] = {0};
    snprintf(probe->at, sizeof probe->at, "libnvidia-ml.so.1");
    void *library = q->library ? q->library : dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library || !find(&n, library))
        return;
    out->there = true;
    snprintf(probe->at, sizeof probe->at, "nvmlInit");
    int status = n.init();
    if (status) {
        error_set(&probe->err, ERR_GPU, "NVML does not start (status %d)", status);
        return;
    }
    for (int i = 0; i < q->system->num_cards; i++) {
        struct nvml_memory memory = {0};
        snprintf(probe->at, sizeof probe->at, "NVML of card %d", i);
        if (n.by_bus(q->system->cards[i].bus, &device[i]) != 0) {
            device[i] = NULL; // kept from this process, as by a container
            continue;
        }
        n.name(device[i], out->name[i], sizeof out->name[i]);
        if (n.memory(device[i], &memory) == 0)
            out->memory_bytes[i] = (double)memory.total;
    }
    for (int a = 0; a < q->system->num_cards; a++)
        for (int b = 0; b < q->system->num_cards; b++)
            if (a != b && device[a] && device[b])
                ask_pair(out, &n, a, b, device[a], device[b]);
    probe->at[0] = 0;
}

void doctor_nvml_read(struct doctor_nvml *out, const struct doctor_system *system, void *library, double seconds)
{
    struct questions questions = {system, library};
    if (system->num_cards > 0)
        doctor_probe_run(&out->probe, ask, &questions, seconds);
}

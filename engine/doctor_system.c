// What the kernel's files say of this machine. See doctor.h. No library is needed, and no driver is asked: its files are read, by
// a child, since even that can hang.
#include "engine/doctor.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { TEXT_BYTES = 8192, CONFIG_BYTES = 4096 };

struct reader {
    struct doctor_system *system;
    const char *root;
};

// ---- files ---------------------------------------------------------------------------------------------------------

// A path below the root; what the probe is at.
static void place(const struct reader *r, char path[PATH_MAX], const char *format, va_list words)
{
    int used = snprintf(path, PATH_MAX, "%s", r->root);
    if (used < 0 || used >= PATH_MAX)
        used = 0;
    vsnprintf(path + used, PATH_MAX - (size_t)used, format, words);
    snprintf(r->system->probe.at, sizeof r->system->probe.at, "%.180s", path + used);
}

static ssize_t read_bytes(const char *path, void *out, size_t most)
{
    size_t used = 0;
    ssize_t got = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    while (used < most && (got = read(fd, (uint8_t *)out + used, most - used)) > 0)
        used += (size_t)got;
    close(fd);
    return got < 0 && used == 0 ? -1 : (ssize_t)used;
}

// The beginning of a text file without its last line end; false, and "", where there is none.
__attribute__((format(printf, 4, 5))) static bool read_text(const struct reader *r, char *text, size_t bytes,
                                                            const char *format, ...)
{
    char path[PATH_MAX];
    va_list words;
    va_start(words, format);
    place(r, path, format, words);
    va_end(words);
    ssize_t got = read_bytes(path, text, bytes - 1);
    text[got > 0 ? got : 0] = 0;
    for (char *end = text + strlen(text); end > text && end[-1] == '\n';)
        *--end = 0;
    return got >= 0;
}

__attribute__((format(printf, 2, 3))) static DIR *open_folder(const struct reader *r, const char *format, ...)
{
    char path[PATH_MAX];
    va_list words;
    va_start(words, format);
    place(r, path, format, words);
    va_end(words);
    return opendir(path);
}

// The line behind a label, "Max locked memory", without blanks before it; NULL: there is none.
static const char *line_of(const char *text, const char *label)
{
    const char *at = text;
    while (at && strncmp(at, label, strlen(label)) != 0)
        at = (at = strchr(at, '\n')) ? at + 1 : NULL;
    if (!at)
        return NULL;
    at += strlen(label);
    return at + strspn(at, " \t:");
}

static void copy_line(char *to, size_t bytes, const char *line)
{
    snprintf(to, bytes, "%.*s", line ? (int)strcspn(line, "\n") : 0, line ? line : "");
}

// ---- cards ---------------------------------------------------------------------------------------------------------

// "16.0 GT/s PCIe" and "16"; what is not told stays 0, as does the 255 of a port that has no link.
__attribute__((format(printf, 3, 4))) static struct pcie_link read_link(const struct reader *r, const char *which,
                                                                        const char *format, ...)
{
    struct pcie_link link = {0};
    char folder[DOCTOR_PATH_BYTES], text[64];
    va_list words;
    va_start(words, format);
    vsnprintf(folder, sizeof folder, format, words);
    va_end(words);
    if (read_text(r, text, sizeof text, "%s/%s_link_speed", folder, which))
        link.gt_s = fmax(0, strtod(text, NULL));
    if (read_text(r, text, sizeof text, "%s/%s_link_width", folder, which))
        link.width = atoi(text);
    if (link.width < 0 || link.width > 32)
        link.width = 0;
    return link;
}

// Whether a bridge's ACS redirects requests or completions between its ports; -1: the kernel shows the whole configuration to root
// alone.
static int redirects(const struct reader *r, const char *bridge)
{
    enum { ACS = 0x0d, FIRST = 0x100, REQUESTS = 4, COMPLETIONS = 8 };
    uint8_t config[CONFIG_BYTES];
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/sys/devices/%s/config", r->root, bridge);
    snprintf(r->system->probe.at, sizeof r->system->probe.at, "/sys/devices/%.160s/config", bridge);
    ssize_t bytes = read_bytes(path, config, sizeof config);
    if (bytes <= FIRST)
        return -1;
    int at = FIRST;
    for (int hops = 0; hops < 64 && at >= FIRST && at + 8 <= bytes; hops++) {
        if ((config[at] | config[at + 1] << 8) == ACS)
            return (config[at + 6] & (REQUESTS | COMPLETIONS)) != 0;
        at = (config[at + 2] >> 4 | config[at + 3] << 4) & ~3;
    }
    return 0;
}

// The card's place below the host bridge, and what stands above it.
static void read_way(const struct reader *r, struct doctor_card *card)
{
    char path[PATH_MAX], whole[PATH_MAX], up[DOCTOR_PATH_BYTES];
    snprintf(path, sizeof path, "%s/sys/bus/pci/devices/%s", r->root, card->bus);
    card->redirects = -1;
    const char *way = realpath(path, whole) ? strstr(whole, "/devices/pci") : NULL;
    if (!way || snprintf(up, sizeof up, "%s", way + strlen("/devices/")) >= (int)sizeof up)
        return;
    memcpy(card->path, up, sizeof up);
    bool first = true;
    for (char *slash; (slash = strrchr(up, '/')); first = false) {
        *slash = 0;
        if (!strchr(up, '/')) // the host bridge
            return;
        if (first)
            card->slot = read_link(r, "max", "/sys/devices/%s", up);
        int here = redirects(r, up);
        card->redirects = here > card->redirects ? here : card->redirects;
    }
}

static void read_card(const struct reader *r, struct doctor_card *card, const char *bus)
{
    char text[TEXT_BYTES], path[PATH_MAX], group[PATH_MAX];
    *card = (struct doctor_card){.node = -1, .iommu_group = -1};
    snprintf(card->bus, sizeof card->bus, "%.15s", bus);
    card->now = read_link(r, "current", "/sys/bus/pci/devices/%.15s", bus);
    card->card = read_link(r, "max", "/sys/bus/pci/devices/%.15s", bus);
    if (read_text(r, text, sizeof text, "/sys/bus/pci/devices/%s/numa_node", bus))
        card->node = atoi(text);
    if (read_text(r, text, sizeof text, "/sys/bus/pci/devices/%s/local_cpulist", bus))
        snprintf(card->cpus, sizeof card->cpus, "%.63s", text);
    snprintf(path, sizeof path, "%s/sys/bus/pci/devices/%s/iommu_group", r->root, bus);
    ssize_t length = readlink(path, group, sizeof group - 1);
    if (length > 0) {
        group[length] = 0;
        const char *name = strrchr(group, '/');
        card->iommu_group = name && isdigit((unsigned char)name[1]) ? atoi(name + 1) : -1;
    }
    if (read_text(r, text, sizeof text, "/proc/driver/nvidia/gpus/%s/information", bus))
        copy_line(card->name, sizeof card->name, line_of(text, "Model"));
    if (!card->name[0])
        snprintf(card->name, sizeof card->name, "NVIDIA card");
    read_way(r, card);
}

static int compare_cards(const void *a, const void *b)
{
    return strcmp(((const struct doctor_card *)a)->bus, ((const struct doctor_card *)b)->bus);
}

// Display and 3D controllers of vendor 0x10de. In the order of the bus, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID.
static void read_cards(const struct reader *r)
{
    struct doctor_system *system = r->system;
    DIR *folder = open_folder(r, "/sys/bus/pci/devices");
    struct dirent *entry;
    while (folder && (entry = readdir(folder))) {
        char text[64];
        if (entry->d_name[0] == '.' ||
            !read_text(r, text, sizeof text, "/sys/bus/pci/devices/%s/vendor", entry->d_name) ||
            strtol(text, NULL, 16) != 0x10de ||
            !read_text(r, text, sizeof text, "/sys/bus/pci/devices/%s/class", entry->d_name))
            continue;
        long class = strtol(text, NULL, 16) >> 8;
        if (class != 0x0300 && class != 0x0302)
            continue;
        if (system->num_cards == DOCTOR_CARDS) {
            system->cards_left_out++;
            continue;
        }
        struct doctor_card card; // whole before it counts
        read_card(r, &card, entry->d_name);
        system->cards[system->num_cards] = card;
        system->num_cards++;
    }
    if (folder)
        closedir(folder);
    qsort(system->cards, (size_t)system->num_cards, sizeof *system->cards, compare_cards);
}

// "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu ...": the first word that is digits and points.
static void read_driver(const struct reader *r)
{
    char text[TEXT_BYTES], *rest = text, *word;
    if (!read_text(r, text, sizeof text, "/proc/driver/nvidia/version"))
        return;
    while ((word = strtok_r(rest, " \t\n", &rest)))
        if (isdigit((unsigned char)word[0]) && strchr(word, '.') && word[strspn(word, "0123456789.")] == 0)
            break;
    snprintf(r->system->driver, sizeof r->system->driver, "%.31s", word ? word : "unknown");
}

// ---- the host ------------------------------------------------------------------------------------------------------

static void read_nodes(const struct reader *r)
{
    struct doctor_system *system = r->system;
    for (int node = 0; node < 256 && system->num_nodes < DOCTOR_NODES; node++) {
        char text[64];
        if (!read_text(r, text, sizeof text, "/sys/devices/system/node/node%d/cpulist", node) || !text[0])
            continue; // not there, or memory without processors
        memcpy(system->node_cpus[system->num_nodes], text, sizeof text);
        system->node[system->num_nodes++] = node;
    }
}

static void read_iommu(const struct reader *r)
{
    static const char *const words[] = {
        "intel_iommu=", "amd_iommu=", "iommu=", "iommu.passthrough=", "pcie_acs_override="};
    struct doctor_system *system = r->system;
    char text[TEXT_BYTES], *rest = text, *word;
    DIR *folder = open_folder(r, "/sys/kernel/iommu_groups");
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        system->iommu_groups += entry->d_name[0] != '.';
    if (folder)
        closedir(folder);
    if (!read_text(r, text, sizeof text, "/proc/cmdline"))
        return;
    size_t used = 0;
    while ((word = strtok_r(rest, " \t\n", &rest)))
        for (size_t i = 0; i < sizeof words / sizeof *words; i++)
            if (strncmp(word, words[i], strlen(words[i])) == 0 && used + strlen(word) + 2 < sizeof system->iommu_words)
                used += (size_t)snprintf(system->iommu_words + used, sizeof system->iommu_words - used, "%s%s",
                                         used ? " " : "", word);
}

// "size=65536k" of the mount's options, else what the file system says where the root is this machine's own.
static void read_shm(const struct reader *r)
{
    static char text[1 << 16];
    struct doctor_system *system = r->system;
    system->shm_bytes = -1;
    if (!read_text(r, text, sizeof text, "/proc/self/mounts"))
        return;
    system->shm_bytes = 0;
    for (char *rest = text, *line; (line = strtok_r(rest, "\n", &rest));) {
        char *words = line;
        strtok_r(words, " ", &words);
        const char *where = strtok_r(words, " ", &words);
        if (!where || strcmp(where, "/dev/shm") != 0)
            continue;
        const char *size = strstr(words, "size=");
        struct statvfs info;
        char *unit;
        system->shm_bytes = -1;
        if (size) {
            system->shm_bytes = strtod(size + 5, &unit);
            system->shm_bytes *= *unit == 'k' ? 1024.0 : *unit == 'm' ? 0x1p20 : *unit == 'g' ? 0x1p30 : 1;
        } else if (!r->root[0] && statvfs("/dev/shm", &info) == 0) {
            system->shm_bytes = (double)info.f_blocks * (double)info.f_frsize;
        }
    }
}

static void read_limits(const struct reader *r)
{
    struct doctor_system *system = r->system;
    char text[TEXT_BYTES];
    const char *line;
    system->memlock_bytes = -1;
    if (read_text(r, text, sizeof text, "/proc/self/limits") && (line = line_of(text, "Max locked memory")))
        system->memlock_bytes = strncmp(line, "unlimited", 9) == 0 ? (double)INFINITY : strtod(line, NULL);
    if (read_text(r, text, sizeof text, "/proc/self/status"))
        copy_line(system->allowed_cpus, sizeof system->allowed_cpus, line_of(text, "Cpus_allowed_list"));
    if (read_text(r, text, sizeof text, "/proc/meminfo") && (line = line_of(text, "MemTotal")))
        system->memory_bytes = 1024 * strtod(line, NULL);
    read_text(r, system->kernel, sizeof system->kernel, "/proc/sys/kernel/osrelease");
}

static void read_all(struct probe *probe, void *arg)
{
    const struct reader *r = arg;
    char path[PATH_MAX];
    // What comes first is not lost when the driver's files hang.
    read_limits(r);
    read_shm(r);
    read_nodes(r);
    read_iommu(r);
    read_cards(r);
    snprintf(path, sizeof path, "%s/dev/nvidiactl", r->root);
    r->system->device_files = access(path, F_OK) == 0;
    read_driver(r);
    probe->at[0] = 0;
}

void doctor_system_read(struct doctor_system *out, const char *root, double seconds)
{
    struct reader reader = {out, root};
    out->shm_bytes = out->memlock_bytes = -1;
    doctor_probe_run(&out->probe, read_all, &reader, seconds);
}

// ---- ways between cards --------------------------------------------------------------------------------------------

const char *doctor_way_name(enum doctor_way way)
{
    static const char *const names[] = {"X", "PIX", "PXB", "PHB", "NODE", "SYS"};
    return names[way];
}

static int steps(const char *path)
{
    int count = 0;
    for (; *path; path++)
        count += *path == '/';
    return count;
}

enum doctor_way doctor_way_between(const struct doctor_card *a, const struct doctor_card *b)
{
    if (a == b)
        return WAY_SELF;
    size_t same = 0, folder = 0; // bytes that both begin with, and of those the whole names
    while (a->path[same] && a->path[same] == b->path[same])
        if (a->path[same++] == '/')
            folder = same;
    if (folder == 0) // two host bridges, or the files do not say
        return a->path[0] && b->path[0] && a->node == b->node ? WAY_NODE : WAY_SYS;
    char common[DOCTOR_PATH_BYTES];
    snprintf(common, sizeof common, "%.*s", (int)folder, a->path);
    if (steps(common) == 1)
        return WAY_PHB;
    // Below a common port each card has one bridge of its own, the switch's, or several switches' ones.
    int bridges_a = steps(a->path + folder), bridges_b = steps(b->path + folder);
    return bridges_a <= 1 && bridges_b <= 1 ? WAY_PIX : WAY_PXB;
}

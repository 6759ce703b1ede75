// tpengine doctor: what this machine offers to ranks that work together, what their exchanges take, and what hinders. Its parts are
// in doctor_*.c; none of them can hang it (doctor.h).
#include "engine/doctor.h"

#include "engine/backends.h"
#include "engine/comm_select.h"
#include "engine/commands.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct {
    const char *root;
    const char *cuda_library;
    double deadline_s;
    bool no_times, mpi;
} options = {.root = "", .cuda_library = NULL, .deadline_s = 10};

const struct option_spec doctor_options[] = {
    {"deadline", OPTION_NUMBER, &options.deadline_s, "SECONDS", 0.1, 3600,
     "longest time of each probe; then it is ended"},
    {"no-times", OPTION_FLAG, &options.no_times, NULL, 0, 0,
     "measure no copies and no exchanges; what devices do with each other's memory is tried all the same"},
    {"root", OPTION_TEXT, &options.root, "DIR", 0, 0,
     "read /sys, /proc and /dev below DIR, as they were copied from another machine; nothing is measured"},
    {"mpi", OPTION_FLAG, &options.mpi, NULL, 0, 0,
     "as one of the ranks that mpirun has started, on any hosts: what sums over MPI take between them, and nothing "
     "else"},
    {"cuda-library", OPTION_TEXT, &options.cuda_library, "FILE", 0, 0,
     "the CUDA backend, if it is not beside tpengine or in ../lib"},
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

// Between all devices, by what ranks have there; then between processors.
static const struct {
    enum transport transport;
    int ranks; // 0: of all devices
} measured[] = {{TRANSPORT_P2P, 0}, {TRANSPORT_HOST, 0}, {TRANSPORT_NCCL, 0}, {TRANSPORT_SHM, 2},
                {TRANSPORT_SHM, 4}, {TRANSPORT_TCP, 2},  {TRANSPORT_TCP, 4},  {TRANSPORT_MPI, 2}};
enum { TIMES = sizeof measured / sizeof *measured };
_Static_assert((int)TIMES <= (int)DOCTOR_TIMES, "the report has room for all");

struct doctor {
    struct backend_choice backend;
    struct doctor_devices *devices;
    struct doctor_copies *copies[DOCTOR_CARDS];
    struct link_probe *links;
    struct doctor_system *system;
    struct doctor_nvml *nvml;
    struct doctor_times *times[TIMES];
    struct doctor_report report;
};

static void take_names(struct doctor *d)
{
    for (int i = 0; i < d->system->num_cards; i++) {
        struct doctor_card *card = &d->system->cards[i];
        if (d->nvml->name[i][0])
            memcpy(card->name, d->nvml->name[i], sizeof card->name);
        card->memory_bytes = d->nvml->memory_bytes[i];
    }
}

// A backend that does not load is a finding, not the doctor's own failure.
static void load_backend(struct doctor *d)
{
    static struct error problem;
    const char *wanted = options.cuda_library ? "cuda" : "auto";
    d->backend.backend = &backend_cpu;
    if (!options.root[0] && backends_select(&d->backend, wanted, options.cuda_library, &problem))
        d->report.backend_note = problem.msg;
    else
        d->report.backend_note = d->backend.note;
}

static bool on_devices(const struct doctor *d) { return d->backend.backend->devices != NULL; }

static int measure_cards(struct doctor *d, struct error *err)
{
    struct doctor_report *report = &d->report;
    report->some_hidden = getenv("CUDA_VISIBLE_DEVICES") != NULL;
    if (!on_devices(d))
        return 0;
    if (!(d->devices = doctor_probe_new(sizeof *d->devices)))
        return error_set(err, ERR_MEMORY, "no memory for what is measured");
    doctor_devices_count(d->devices, d->backend.backend, options.deadline_s);
    report->devices = d->devices;
    for (int i = 0; i < d->devices->count && i < DOCTOR_CARDS && !options.no_times; i++) {
        d->copies[i] = doctor_probe_new(sizeof *d->copies[i]);
        if (!d->copies[i])
            return error_set(err, ERR_MEMORY, "no memory for what is measured");
        doctor_cards_measure(d->copies[i], d->backend.backend, d->backend.kernels, i, options.deadline_s);
        report->copies[report->num_copies++] = d->copies[i];
    }
    return 0;
}

// What the devices really do with each other's memory; one alone with its own, from another process: that is what ranks which share it need.
static int measure_links(struct doctor *d, struct error *err)
{
    enum { ROUNDS = 3, MOST_STEP_S = 5 };
    int device[DOCTOR_CARDS], count = d->devices ? d->devices->count : 0;
    struct link_probe_options probe = link_probe_defaults;
    if (count < 1 || !d->backend.backend->link_probe)
        return 0;
    probe.num_ends = count == 1 ? 2 : count < DOCTOR_CARDS ? count : DOCTOR_CARDS;
    for (int i = 0; i < probe.num_ends; i++)
        device[i] = i % count;
    probe.backend = d->backend.backend;
    probe.group = probe.num_ends;
    probe.device = device;
    probe.as_the_bus_counts = true;
    probe.all = true;
    probe.at_once = options.no_times;
    probe.rounds = options.no_times ? 0 : ROUNDS;
    probe.open_s = options.deadline_s;
    probe.step_s = options.deadline_s / 3 < MOST_STEP_S ? options.deadline_s / 3 : MOST_STEP_S;
    probe.seconds = options.deadline_s * probe.num_ends;
    int rc = link_probe_begin(&d->links, &probe, err);
    if (rc)
        return rc;
    link_probe_wait(d->links);
    d->report.links = link_probe_board(d->links);
    return 0;
}

// Which transports ranks have, and which one they take.
static int choose(struct doctor *d, struct error *err)
{
    static char unproven[LINK_SENTENCE_BYTES];
    struct doctor_report *report = &d->report;
    char path[PATH_MAX];
    bool devices = on_devices(d), proven = d->links && link_probe_verdict(d->links, unproven);
    bool copied = options.root[0] && d->system->num_cards > 0;
    const char *why = d->system->num_cards == 0 ? "there is no GPU"
                      : copied                  ? "devices are tried on the machine itself, not by a copy of its files"
                                                : "the ranks compute on the CPU here";
    if (!devices)
        report->missing[TRANSPORT_HOST] = report->missing[TRANSPORT_P2P] = report->missing[TRANSPORT_NCCL] = why;
    else if (!proven)
        report->missing[TRANSPORT_P2P] = d->links ? unproven : "whether the devices reach each other was not tried";
    if (devices && !d->devices->has_nccl)
        report->missing[TRANSPORT_NCCL] = "there is no libnccl.so.2";
    if (!backends_find_library(path, "libtpengine_mpi.so"))
        report->missing[TRANSPORT_MPI] =
            "libtpengine_mpi.so, built where Open MPI's headers are, is neither beside tpengine nor in ../lib";
    else if (!doctor_mpi_can_start())
        report->missing[TRANSPORT_MPI] = "mpirun, which starts its ranks, is not in PATH";
    snprintf(report->why, sizeof report->why, "%s",
             copied     ? "where ranks compute on the CPU; what its GPUs can do, doctor says on the machine itself"
             : !devices ? "ranks compute on the CPU of one host and share its memory"
             : proven   ? "what a device writes into another one's memory was seen to arrive there, in every direction"
             : d->links ? "it needs no way from device to device"
                        : "it needs no way from device to device; ranks that start try whether there is one");
    return comm_select_transport(&report->transport, "auto", report->missing, err);
}

// Two ranks share a card that is alone; NCCL has a card for each. What is merely slow is measured. mpirun does not start within another one.
static bool can_measure(const struct doctor *d, enum transport transport)
{
    if (transport == TRANSPORT_SHM || transport == TRANSPORT_TCP)
        return true;
    if (transport == TRANSPORT_MPI)
        return !d->report.missing[transport] && !getenv("OMPI_COMM_WORLD_SIZE");
    bool works = transport == TRANSPORT_P2P ? d->links && link_probe_delivers(d->links) : !d->report.missing[transport];
    return works && on_devices(d) && d->devices->count >= (transport == TRANSPORT_NCCL ? 2 : 1);
}

static int ranks_of_devices(int devices) { return devices < 2 ? 2 : devices < DOCTOR_RANKS ? devices : DOCTOR_RANKS; }

static int measure(struct doctor *d, struct error *err)
{
    for (int i = 0; i < TIMES && !options.no_times && !options.root[0]; i++) {
        enum transport transport = measured[i].transport;
        int devices = d->devices ? d->devices->count : 0;
        if (!can_measure(d, transport))
            continue;
        d->times[i] = doctor_probe_new(sizeof *d->times[i]);
        if (!d->times[i])
            return error_set(err, ERR_MEMORY, "no memory for what is measured");
        if (transport == TRANSPORT_MPI)
            doctor_mpi_measure(d->times[i], measured[i].ranks, options.deadline_s);
        else if (measured[i].ranks > 0)
            doctor_links_measure(d->times[i], transport, measured[i].ranks, options.deadline_s);
        else
            doctor_devices_measure(d->times[i], d->backend.backend, d->backend.kernels, transport,
                                   ranks_of_devices(devices), devices, options.deadline_s);
        d->report.times[d->report.num_times++] = d->times[i];
    }
    return 0;
}

static int examine(struct doctor *d, struct error *err)
{
    int rc;
    d->system = doctor_probe_new(sizeof *d->system);
    d->nvml = doctor_probe_new(sizeof *d->nvml);
    if (!d->system || !d->nvml)
        return error_set(err, ERR_MEMORY, "no memory for what is found");
    doctor_system_read(d->system, options.root, options.deadline_s);
    if (!options.root[0])
        doctor_nvml_read(d->nvml, d->system, NULL, options.deadline_s);
    take_names(d);
    d->report.system = d->system;
    d->report.nvml = d->nvml;
    load_backend(d);
    if ((rc = measure_cards(d, err)) || (rc = measure_links(d, err)) || (rc = choose(d, err)) || (rc = measure(d, err)))
        return rc;
    doctor_advice(&d->report);
    return 0;
}

static int check_root(struct error *err)
{
    char sys[PATH_MAX], proc[PATH_MAX];
    snprintf(sys, sizeof sys, "%s/sys", options.root);
    snprintf(proc, sizeof proc, "%s/proc", options.root);
    if (!options.root[0] || access(sys, X_OK) == 0 || access(proc, X_OK) == 0)
        return 0;
    if (access(options.root, X_OK))
        return error_set_errno(err, "--root %s", options.root);
    return error_set(
        err, ERR_USAGE,
        "--root %s: there is neither sys nor proc in it: copy /sys, /proc and /dev of the other machine to it",
        options.root);
}

static int run_mpi_rank(struct error *err)
{
    struct doctor_times times = {0};
    const struct doctor_report report = {.times = {&times}, .num_times = 1};
    bool first = false;
    int rc = doctor_mpi_rank(&times, &first, err);
    if (!rc && first && common_options.json)
        rc = doctor_print_times_json(&report, err);
    else if (!rc && first)
        doctor_print_times(&report, stdout);
    return rc;
}

int doctor_run(int argc, char **argv, struct error *err)
{
    (void)argc, (void)argv;
    static struct doctor d; // large
    if (options.mpi)
        return run_mpi_rank(err);
    int rc = check_root(err);
    rc = rc ? rc : examine(&d, err);
    if (!rc && common_options.json)
        rc = doctor_print_json(&d.report, err);
    else if (!rc)
        doctor_print(&d.report, stdout);
    if (!rc && d.report.num_findings > 0 && d.report.findings[0].hinders)
        rc = error_set(err, ERR_HINDERED, "%s", d.report.findings[0].text);
    for (int i = 0; i < TIMES; i++)
        doctor_probe_free(d.times[i], sizeof *d.times[i]);
    for (int i = 0; i < DOCTOR_CARDS; i++)
        doctor_probe_free(d.copies[i], sizeof *d.copies[i]);
    link_probe_end(d.links);
    doctor_probe_free(d.devices, sizeof *d.devices);
    doctor_probe_free(d.nvml, sizeof *d.nvml);
    doctor_probe_free(d.system, sizeof *d.system);
    return rc;
}

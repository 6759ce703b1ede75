// What stands between the ranks on this machine: cards and their links, memory, what exchanges take, and what hinders. The command
// is in doctor.c; its parts share this.
//
// Law 6, sharpened: the doctor itself waits for nothing without a deadline. Everything that asks a driver or reads its files runs in
// a child process that is killed when it is late; what it had found until then stays, in memory that both share, and the report says
// what it was at.
#ifndef TPSHARD_ENGINE_DOCTOR_H
#define TPSHARD_ENGINE_DOCTOR_H

#include "engine/comm.h"
#include "engine/link_probe.h"
#include "kernels/backend.h"
#include "kernels/exchange_choice.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

// ---- probes: doctor_probe.c ----------------------------------------------------------------------------------------

enum probe_end {
    PROBE_NOT_RUN,
    PROBE_DONE,  // the body returned
    PROBE_LATE,  // killed at its deadline
    PROBE_STUCK, // killed, and does not even end: it hangs in the kernel
    PROBE_DIED,  // it ended by itself otherwise
};
enum { PROBE_AT_BYTES = 192 };
// In memory that both processes share, for what a body finds; the body's own struct begins with it.
struct probe {
    enum probe_end end;
    double seconds;          // until the end
    char at[PROBE_AT_BYTES]; // what the body is at; written by it
    struct error err;        // of the body; code 0: none
};
// Zeroed memory that a child shares; freed with doctor_probe_free. NULL: none is left.
void *doctor_probe_new(size_t bytes);
void doctor_probe_free(void *probe, size_t bytes); // accepts NULL
// Runs the body in a child, the leader of a process group of its own, and waits for at most `seconds` and a little more.
void doctor_probe_run(struct probe *probe, void (*body)(struct probe *probe, void *arg), void *arg, double seconds);
// "was ended after 5.0 s, at /proc/driver/nvidia/version"; for probes that are not PROBE_DONE.
enum { PROBE_SENTENCE_BYTES = 512 };
void doctor_probe_sentence(char text[PROBE_SENTENCE_BYTES], const struct probe *probe);

// ---- the machine: doctor_system.c ----------------------------------------------------------------------------------

enum { DOCTOR_CARDS = 16, DOCTOR_NODES = 16, DOCTOR_PATH_BYTES = 384 };

struct pcie_link {
    double gt_s; // transfers per second and lane, 1e9: 8 is PCIe 3.0, 16 is 4.0; 0: not told
    int width;   // lanes; 0: not told
};
struct doctor_card {
    char bus[16]; // "0000:01:00.0"
    char name[64];
    struct pcie_link now, card,
        slot;                     // as it runs (an idle card slows down), what the card can, what the port above it can
    int node;                     // NUMA; -1: none told
    char cpus[64];                // near it; "": not told
    int iommu_group;              // -1: none
    int redirects;                // ACS on its way sends what is for another card up to the root; -1: not told
    double memory_bytes;          // 0: not told
    char path[DOCTOR_PATH_BYTES]; // from the host bridge down: "pci0000:00/0000:00:01.0/0000:01:00.0"
};
// How two cards reach each other, in the words of nvidia-smi topo -m.
enum doctor_way { WAY_SELF, WAY_PIX, WAY_PXB, WAY_PHB, WAY_NODE, WAY_SYS };
const char *doctor_way_name(enum doctor_way way); // "X", "PIX" ...
enum doctor_way doctor_way_between(const struct doctor_card *a, const struct doctor_card *b);
// What the driver says of a card's writes to another's memory.
enum p2p_claim { P2P_UNKNOWN, P2P_CLAIMED, P2P_REFUSED };

struct doctor_system {
    struct probe probe;
    int num_cards, cards_left_out; // beyond DOCTOR_CARDS
    struct doctor_card cards[DOCTOR_CARDS];
    char driver[32];   // version; "": none loaded
    bool device_files; // /dev/nvidiactl is there
    int num_nodes;
    int node[DOCTOR_NODES];
    char node_cpus[DOCTOR_NODES][64];
    char allowed_cpus[256]; // of this process; "": not told
    int iommu_groups;       // 0: no IOMMU at work
    char iommu_words[128];  // of the kernel's command line
    double shm_bytes;       // of /dev/shm; 0: there is none; -1: not told
    double memlock_bytes;   // INFINITY: no limit; -1: not told
    double memory_bytes;    // of the host; 0: not told
    char kernel[64];
};
// root: "" or a folder that holds /sys, /proc and /dev of another machine.
void doctor_system_read(struct doctor_system *out, const char *root, double seconds);

// ---- NVML: doctor_nvml.c -------------------------------------------------------------------------------------------

struct doctor_nvml {
    struct probe probe;
    bool there;
    enum p2p_claim p2p[DOCTOR_CARDS][DOCTOR_CARDS];
    char refused[DOCTOR_CARDS][DOCTOR_CARDS][40]; // the driver's reason
    char name[DOCTOR_CARDS][64];
    double memory_bytes[DOCTOR_CARDS];
};
// library: a handle of dlopen in which NVML's functions are looked up; NULL: libnvidia-ml.so.1.
void doctor_nvml_read(struct doctor_nvml *out, const struct doctor_system *system, void *library, double seconds);

// ---- exchanges on this machine: doctor_links.c, doctor_devices.c ---------------------------------------------------

enum { DOCTOR_SIZES = 5 };
struct doctor_size {
    int64_t rows; // of DOCTOR_COLS values
    enum wire wire;
};
enum { DOCTOR_COLS = 8192 };
extern const struct doctor_size doctor_sizes[DOCTOR_SIZES];
struct doctor_times {
    struct probe probe;
    enum transport transport;
    int ranks, devices; // rank r computes on device r % devices; 0: on the processors
    double us
        [DOCTOR_SIZES]; // of one sum among some that follow each other, the slowest rank's, in the fastest of several rounds; 0: not measured
};
enum { DOCTOR_RANKS = 8 }; // at most
// Both really add up between 2 to DOCTOR_RANKS processes, by the algorithms that ranks would take (comm_select.h). TRANSPORT_SHM, or TRANSPORT_TCP over
// the loopback:
void doctor_links_measure(struct doctor_times *out, enum transport transport, int ranks, double seconds);
// TRANSPORT_HOST, TRANSPORT_P2P or TRANSPORT_NCCL, between devices as the bus counts them; and whether the sums are right.
void doctor_devices_measure(struct doctor_times *out, const struct backend *backend, const struct kernels *kernels,
                            enum transport transport, int ranks, int devices, double seconds);

// What the two share: the body of a probe. One rank's part of what is measured; each call is one of all ranks.
struct doctor_sums {
    int (*prepare)(void *arg, const struct doctor_size *size, struct error *err);
    // So many sums one behind the other, done when it returns.
    int (*run)(void *arg, const struct doctor_size *size, int count, struct error *err);
    // Behind the clock, after the first round of a size, which is one sum: whether it is right. NULL: not looked at.
    int (*check)(void *arg, const struct doctor_size *size, struct error *err);
    void *arg; // of all three
};
int doctor_time_sums(struct doctor_times *out, struct comm *comm, const struct doctor_sums *sums, struct error *err);
struct exchange_choice doctor_choice(const struct doctor_times *times, const struct doctor_size *size);
// Each rank in a process of its own, the first in this one. What rank_main returns for the first is the probe's error.
void doctor_run_ranks(struct doctor_times *out, int (*rank_main)(void *arg, int rank, struct error *err), void *arg);
// What a rank adds up, [size->rows][DOCTOR_COLS]: numbers whose sum every codec carries exactly or nearly so.
static inline float doctor_value(int rank, int64_t col) { return (float)(col % 16 + rank); }

// ---- over MPI: doctor_mpi.c ------------------------------------------------------------------------------------------

// Its ranks are processes that mpirun starts: whether there is one, in PATH.
bool doctor_mpi_can_start(void);
// The same as doctor_links_measure for TRANSPORT_MPI: mpirun starts this program again, as ranks that measure.
void doctor_mpi_measure(struct doctor_times *out, int ranks, double seconds);
// Such a rank: adds up with the others, and ends MPI. *first: out is filled in. An error is for the program to end with, which ends all ranks.
int doctor_mpi_rank(struct doctor_times *out, bool *first, struct error *err);

// ---- a card's own link: doctor_cards.c -----------------------------------------------------------------------------

struct doctor_copies {
    struct probe probe;
    double to_gb_s, from_gb_s; // 1e9 bytes a second to the card and from it; 0: not measured
    double small_us;           // of a copy of 4 KiB to it, with its wait
};
struct doctor_devices {
    struct probe probe;
    int count;     // that this process may use; 0: not known
    bool has_nccl; // a library of that name is found
};
// How many devices there are to the driver, which numbers them as the bus does.
void doctor_devices_count(struct doctor_devices *out, const struct backend *backend, double seconds);

// card: its number on the bus, among those that the driver shows this process.
void doctor_cards_measure(struct doctor_copies *out, const struct backend *backend, const struct kernels *kernels,
                          int card, double seconds);

// ---- what to change: doctor_advice.c -------------------------------------------------------------------------------

enum { DOCTOR_FINDINGS = 64, DOCTOR_FINDING_BYTES = 512, DOCTOR_TIMES = 8 };
struct doctor_finding {
    bool hinders; // else it is good to know
    char text[DOCTOR_FINDING_BYTES];
};
struct doctor_report {
    const struct doctor_system *system;
    const struct doctor_nvml *nvml;
    const struct doctor_times *times[DOCTOR_TIMES];
    int num_times;
    const struct doctor_copies *copies[DOCTOR_CARDS];
    int num_copies;
    const struct doctor_devices *devices; // NULL: ranks do not run on devices
    const struct link_board *links;       // between all devices, or of the only one with itself; NULL: not tried
    bool some_hidden;                     // CUDA_VISIBLE_DEVICES is set: devices are not numbered as cards
    const char *backend_note;             // why ranks do not run on the cards; NULL: they do, or there are none
    const char *missing[TRANSPORT_COUNT]; // why this machine's ranks cannot have it, a clause; NULL: they can
    enum transport transport;             // that auto takes
    char why[256];
    struct doctor_finding findings[DOCTOR_FINDINGS]; // worst first
    int num_findings;
};
void doctor_advice(struct doctor_report *report);
// "GPU1", the card on whose bus an end of report->links is, or "device 1".
enum { DOCTOR_END_BYTES = 16 };
void doctor_end_name(char name[DOCTOR_END_BYTES], const struct doctor_report *report, int end);

// ---- the report: doctor_print.c ------------------------------------------------------------------------------------

void doctor_print(const struct doctor_report *report, FILE *out);
int doctor_print_json(const struct doctor_report *report, struct error *err);
// The measured times alone; the report's system may be NULL.
void doctor_print_times(const struct doctor_report *report, FILE *out);
int doctor_print_times_json(const struct doctor_report *report, struct error *err);

#endif

// What hinders on this machine, worst first, each with what to do about it. See doctor.h.
#include "engine/doctor.h"

#include <math.h>
#include <stdarg.h>
#include <string.h>
#include <strings.h>

#define SMALL_SHM_BYTES (256.0 * (1 << 20))    // Docker's default is 64 MB
#define SMALL_MEMLOCK_BYTES (64.0 * (1 << 20)) // 8 MB is usual for a login

__attribute__((format(printf, 3, 4))) static void add(struct doctor_report *report, bool hinders, const char *format,
                                                      ...)
{
    if (report->num_findings == DOCTOR_FINDINGS)
        return;
    struct doctor_finding *finding = &report->findings[report->num_findings++];
    va_list words;
    finding->hinders = hinders;
    va_start(words, format);
    vsnprintf(finding->text, sizeof finding->text, format, words);
    va_end(words);
}

static void judge_probe(struct doctor_report *report, const struct probe *probe, bool hinders, const char *what)
{
    char sentence[PROBE_SENTENCE_BYTES];
    if (probe->end == PROBE_NOT_RUN || (probe->end == PROBE_DONE && !probe->err.code))
        return;
    doctor_probe_sentence(sentence, probe);
    add(report, hinders, "%s %.400s", what, sentence);
}

static void judge_driver(struct doctor_report *report)
{
    const struct doctor_system *s = report->system;
    if (s->probe.end != PROBE_DONE || (s->num_cards == 0 && !report->backend_note))
        return;
    if (s->num_cards > 0 && !s->driver[0])
        add(report, true,
            "%d NVIDIA card%s, and no driver is loaded: install NVIDIA's driver, or load it with `modprobe nvidia`",
            s->num_cards, s->num_cards == 1 ? "" : "s");
    else if (s->num_cards > 0 && !s->device_files)
        add(report, true,
            "the driver is loaded, but /dev/nvidiactl is not here: start the container with --gpus all (NVIDIA's "
            "container "
            "toolkit)");
    else if (report->backend_note) // of a card that is on no bus that we see, too
        add(report, true, "%.400s", report->backend_note);
}

// ---- slots ---------------------------------------------------------------------------------------------------------

static int generation(double gt_s)
{
    return gt_s >= 63 ? 6 : gt_s >= 31 ? 5 : gt_s >= 15 ? 4 : gt_s >= 7 ? 3 : gt_s >= 4.5 ? 2 : 1;
}

static void judge_width(struct doctor_report *report, int i)
{
    const struct doctor_card *card = &report->system->cards[i];
    int now = card->now.width, could = card->card.width, slot = card->slot.width;
    if (now == 0 || could == 0 || now >= could)
        return;
    bool hinders = now <= 4;
    if (slot > 0 && slot <= now)
        add(report, hinders,
            "GPU%d (%s, %s) is in a slot with %d lane%s and could use %d: move it to a wider slot; its exchanges take "
            "%d "
            "times as long as they could",
            i, card->name, card->bus, slot, slot == 1 ? "" : "s", could, could / now);
    else
        add(report, hinders,
            "GPU%d (%s, %s) runs on %d lane%s of %d%s: look at the riser and how the card sits, and at how the BIOS "
            "divides "
            "the processor's lanes; its exchanges take %d times as long as they could",
            i, card->name, card->bus, now, now == 1 ? "" : "s", could, slot >= could ? ", which the slot has" : "",
            could / now);
}

static void judge_generation(struct doctor_report *report, int i)
{
    const struct doctor_card *card = &report->system->cards[i];
    if (card->slot.gt_s > 0 && card->card.gt_s > 0 && generation(card->slot.gt_s) < generation(card->card.gt_s))
        add(report, generation(card->slot.gt_s) < 3,
            "GPU%d (%s, %s) can do PCIe %d.0, its slot %d.0: another slot, or a setting of the BIOS, may give it more",
            i, card->name, card->bus, generation(card->card.gt_s), generation(card->slot.gt_s));
}

// What a link of that generation and width copies at: some three quarters of what its wires carry.
static double usual_gb_s(const struct doctor_card *card)
{
    const struct pcie_link *slot = &card->slot;
    double gt_s = slot->gt_s > 0 && slot->gt_s < card->card.gt_s ? slot->gt_s : card->card.gt_s;
    return gt_s * card->now.width / 8 * (gt_s >= 8 ? 0.985 : 0.8) * 0.78;
}

static void judge_copies(struct doctor_report *report)
{
    for (int i = 0; i < report->num_copies; i++) {
        const struct doctor_copies *copies = report->copies[i];
        double least = fmin(copies->to_gb_s, copies->from_gb_s);
        char what[64];
        snprintf(what, sizeof what, "copying to and from device %d", i);
        if (!report->some_hidden)
            judge_probe(report, &copies->probe, true, what);
        if (i >= report->system->num_cards || report->some_hidden || !(least > 0))
            continue;
        const struct doctor_card *card = &report->system->cards[i];
        if (least < 0.6 * usual_gb_s(card))
            add(report, true,
                "GPU%d (%s, %s) copies %.1f GB/s, and its link of %d lanes should give about %.0f: look for a PCIe "
                "generation that "
                "is set in the BIOS, a riser, or a chipset that other devices share",
                i, card->name, card->bus, least, card->now.width, usual_gb_s(card));
    }
}

// ---- ways between cards --------------------------------------------------------------------------------------------

static bool has_word(const char *words, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = words; (at = strstr(at, word)); at += length)
        if ((at == words || at[-1] == ' ') && (!at[length] || strchr(" \n", at[length])))
            return true;
    return false;
}

static void judge_iommu(struct doctor_report *report)
{
    const struct doctor_system *s = report->system;
    bool through = has_word(s->iommu_words, "iommu=pt") || has_word(s->iommu_words, "iommu.passthrough=1");
    bool claimed = false, redirected = false;
    for (int a = 0; a < s->num_cards; a++) {
        redirected = redirected || s->cards[a].redirects > 0;
        for (int b = 0; b < s->num_cards; b++)
            claimed = claimed || report->nvml->p2p[a][b] == P2P_CLAIMED;
    }
    if (s->num_cards < 2)
        return;
    if (redirected)
        add(report, claimed,
            "ACS sends what one card writes to another up to the processor: switch ACS off in the BIOS, or for these "
            "bridges with setpci; without that the cards reach each other slowly or not at all");
    if (s->iommu_groups > 0 && !through)
        add(report, claimed && !redirected,
            "the IOMMU translates what cards send (%d groups%s%s): boot with iommu=pt, or switch it off if nothing "
            "else "
            "needs it",
            s->iommu_groups, s->iommu_words[0] ? ", " : "", s->iommu_words);
}

void doctor_end_name(char name[DOCTOR_END_BYTES], const struct doctor_report *report, int end)
{
    const struct link_end *e = &report->links->end[end];
    for (int i = 0; e->bus[0] && i < report->system->num_cards; i++)
        if (strcasecmp(report->system->cards[i].bus, e->bus) == 0) {
            snprintf(name, DOCTOR_END_BYTES, "GPU%d", i);
            return;
        }
    snprintf(name, DOCTOR_END_BYTES, "device %d", e->device >= 0 ? e->device : end);
}

// What the driver claims of the link and what was seen of it differ. Memory that is taken, a device that is busy and a process that died say nothing of it.
static bool is_lie(const struct link_result *link)
{
    bool wrong = link->fault == LINK_LOST || link->fault == LINK_CHANGED || link->fault == LINK_STALE;
    return link->claimed && (wrong || (link->fault == LINK_LATE && link->crossing));
}

// A driver that claims what is not so comes first, and one that refuses last: where it claims, a program which believes it computes nonsense, or hangs.
static void judge_links(struct doctor_report *report)
{
    const struct link_board *board = report->links;
    const struct link_result *worst = NULL, *refused = NULL;
    int lies = 0;
    for (int a = 0; board && a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++) {
            const struct link_result *link = &board->result[a][b];
            if (a == b || link->fault <= LINK_GOOD)
                continue;
            lies += is_lie(link);
            if (link->fault == LINK_REFUSED)
                refused = refused ? refused : link;
            else if (!worst || (is_lie(link) && !is_lie(worst)))
                worst = link;
        }
    if (worst && !is_lie(worst))
        add(report, true, "%s: ranks go through the host's memory instead", worst->sentence);
    else if (worst)
        add(report, true,
            "%s, though the driver claims P2P%s: ranks go through the host's memory instead; other programs need "
            "NCCL_P2P_DISABLE=1; look at ACS and the IOMMU (iommu=pt), at resizable BAR in the BIOS, and whether the "
            "driver was changed for P2P",
            worst->sentence, lies > 1 ? " (and other links are no better)" : "");
    else if (refused)
        add(report, false, "%s: ranks go through the host's memory, which needs no P2P", refused->sentence);
}

// Whether the two lists of processors, "0-3,8", have one in common; true when either cannot be read.
static bool share_cpus(const char *a, const char *b)
{
    int first, last, used;
    if (!a[0] || !b[0])
        return true;
    for (; sscanf(a, "%d%n", &first, &used) == 1; a += *a == ',') {
        a += used;
        last = first;
        if (sscanf(a, "-%d%n", &last, &used) == 1)
            a += used;
        const char *other = b;
        int from, to;
        for (; sscanf(other, "%d%n", &from, &used) == 1; other += *other == ',') {
            other += used;
            to = from;
            if (sscanf(other, "-%d%n", &to, &used) == 1)
                other += used;
            if (from <= last && first <= to)
                return true;
        }
    }
    return false;
}

static void judge_nodes(struct doctor_report *report)
{
    const struct doctor_system *s = report->system;
    for (int i = 0; i < s->num_cards; i++)
        if (!share_cpus(s->cards[i].cpus, s->allowed_cpus))
            add(report, true,
                "GPU%d is on NUMA node %d (processors %s), and this process may use processors %s alone: allow it some "
                "of the "
                "card's (taskset, numactl, cpuset of the container)",
                i, s->cards[i].node, s->cards[i].cpus, s->allowed_cpus);
    for (int i = 1; i < s->num_cards; i++)
        if (s->cards[i].node >= 0 && s->cards[0].node >= 0 && s->cards[i].node != s->cards[0].node) {
            add(report, false,
                "GPU0 is on NUMA node %d and GPU%d on node %d: what they exchange passes the link between the sockets; "
                "cards "
                "of one model are better on one",
                s->cards[0].node, i, s->cards[i].node);
            break;
        }
    for (int i = 0; i < s->num_nodes && s->num_cards == 0; i++)
        if (!share_cpus(s->node_cpus[i], s->allowed_cpus))
            add(report, false,
                "NUMA node %d (processors %s) is not this process's to use: its memory is far from all ranks; with its "
                "processors allowed, --pin node would keep ranks near theirs",
                s->node[i], s->node_cpus[i]);
}

// ---- limits --------------------------------------------------------------------------------------------------------

static void judge_limits(struct doctor_report *report)
{
    const struct doctor_system *s = report->system;
    if (s->shm_bytes >= 0 && s->shm_bytes < SMALL_SHM_BYTES)
        add(report, s->num_cards > 1,
            "/dev/shm has %.0f MB: NCCL and Open MPI need more (docker run --shm-size=1g, in Kubernetes an emptyDir of "
            "medium "
            "Memory); tpengine's own ranks do not use it",
            s->shm_bytes / 0x1p20);
    if (s->num_cards > 0 && s->memlock_bytes >= 0 && s->memlock_bytes < SMALL_MEMLOCK_BYTES)
        add(report, false,
            "a process may lock %.1f MB of memory: buffers that the network card or io_uring reads must be locked; "
            "raise it "
            "(ulimit -l unlimited, docker run --ulimit memlock=-1)",
            s->memlock_bytes / 0x1p20);
}

// Hindrances before the rest, otherwise as found.
static void sort(struct doctor_report *report)
{
    struct doctor_finding found[DOCTOR_FINDINGS];
    int count = 0;
    memcpy(found, report->findings, sizeof found);
    for (int hinders = 1; hinders >= 0; hinders--)
        for (int i = 0; i < report->num_findings; i++)
            if (found[i].hinders == hinders)
                report->findings[count++] = found[i];
}

void doctor_advice(struct doctor_report *report)
{
    report->num_findings = 0;
    judge_probe(report, &report->system->probe, true, "reading what the system says of itself");
    judge_driver(report);
    judge_probe(report, &report->nvml->probe, true, "asking the driver through NVML");
    if (report->devices)
        judge_probe(report, &report->devices->probe, true, "counting the devices");
    for (int i = 0; i < report->num_times; i++) {
        char what[64];
        snprintf(what, sizeof what, "measuring %s with %d ranks", transport_name(report->times[i]->transport),
                 report->times[i]->ranks);
        // Ranks over MPI are there for who wants them.
        judge_probe(report, &report->times[i]->probe, report->times[i]->transport != TRANSPORT_MPI, what);
    }
    for (int i = 0; i < report->system->num_cards; i++)
        judge_width(report, i);
    judge_copies(report);
    judge_links(report);
    judge_iommu(report);
    judge_nodes(report);
    for (int i = 0; i < report->system->num_cards; i++)
        judge_generation(report, i);
    judge_limits(report);
    sort(report);
}

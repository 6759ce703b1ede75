// The doctor's report, as text and as JSON. See doctor.h.
#include "engine/doctor.h"

#include "engine/comm_select.h"
#include "engine/commands.h"
#include "kernels/thread_pool.h"

#include <math.h>
#include <string.h>

// "4.0 x16"; "?" where nothing is told.
enum { LINK_BYTES = 24 };
static void link_text(char text[LINK_BYTES], const struct pcie_link *link)
{
    static const struct {
        double gt_s;
        const char *name;
    } generations[] = {{63, "6.0"}, {31, "5.0"}, {15, "4.0"}, {7, "3.0"}, {4.5, "2.0"}, {0, "1.0"}};
    int i = 0;
    while (link->gt_s < generations[i].gt_s)
        i++;
    if (link->width == 0 || link->gt_s == 0)
        snprintf(text, LINK_BYTES, "?");
    else
        snprintf(text, LINK_BYTES, "%s x%d", generations[i].name, link->width);
}

static void print_host(const struct doctor_system *s, FILE *out)
{
    fprintf(out, "host    ");
    if (s->memory_bytes > 0)
        fprintf(out, "%.1f GiB of memory, ", s->memory_bytes / 0x1p30);
    fprintf(out, "processors %s", s->allowed_cpus[0] ? s->allowed_cpus : "unknown");
    for (int i = 0; i < s->num_nodes && s->num_nodes > 1; i++)
        fprintf(out, "%s %d (%s)", i ? "," : "; NUMA nodes", s->node[i], s->node_cpus[i]);
    fprintf(out, "%s%s\n        ", s->kernel[0] ? "; Linux " : "", s->kernel);
    if (s->shm_bytes == 0)
        fprintf(out, "no /dev/shm");
    else if (s->shm_bytes < 0)
        fprintf(out, "/dev/shm unknown");
    else
        fprintf(out, "/dev/shm %.0f MB", s->shm_bytes / 0x1p20);
    if (isinf(s->memlock_bytes))
        fprintf(out, "; locked memory without limit");
    else if (s->memlock_bytes >= 0)
        fprintf(out, "; locked memory %.1f MB", s->memlock_bytes / 0x1p20);
    if (s->iommu_groups > 0)
        fprintf(out, "; IOMMU on (%d groups)", s->iommu_groups);
    fprintf(out, "%s%s%s\n", s->iommu_words[0] ? " [" : "", s->iommu_words, s->iommu_words[0] ? "]" : "");
}

static void print_cards(const struct doctor_report *report, FILE *out)
{
    const struct doctor_system *s = report->system;
    if (s->num_cards == 0) {
        fprintf(out, "cards   no GPU: the PCI bus shows no NVIDIA card\n");
        return;
    }
    fprintf(out, "driver  %s\n", s->driver[0] ? s->driver : "none");
    fprintf(out, "cards   PCIe: now, of the card, of its slot (idle cards slow down)\n");
    for (int i = 0; i < s->num_cards; i++) {
        const struct doctor_card *card = &s->cards[i];
        char now[LINK_BYTES], most[LINK_BYTES], slot[LINK_BYTES];
        link_text(now, &card->now);
        link_text(most, &card->card);
        link_text(slot, &card->slot);
        fprintf(out, "  GPU%-2d %s  %s  now %s, card %s, slot %s", i, card->bus, card->name, now, most, slot);
        if (card->memory_bytes > 0)
            fprintf(out, ", %.1f GiB", card->memory_bytes / 0x1p30);
        fprintf(out, "\n");
    }
    if (s->cards_left_out)
        fprintf(out, "  and %d more\n", s->cards_left_out);
}

// As nvidia-smi topo -m prints it.
static void print_matrix(const struct doctor_report *report, FILE *out)
{
    const struct doctor_system *s = report->system;
    bool seen[WAY_SYS + 1] = {false};
    static const char *const meaning[] = {
        NULL,
        "through one PCIe switch",
        "through several PCIe switches",
        "through the processor's PCIe host bridge",
        "between host bridges of one NUMA node",
        "between NUMA nodes",
    };
    if (s->num_cards == 0)
        return;
    fprintf(out, "\n       ");
    for (int i = 0; i < s->num_cards; i++)
        fprintf(out, " GPU%-3d", i);
    fprintf(out, " CPU affinity     NUMA\n");
    for (int i = 0; i < s->num_cards; i++) {
        fprintf(out, "  GPU%-2d", i);
        for (int j = 0; j < s->num_cards; j++) {
            enum doctor_way way = i == j ? WAY_SELF : doctor_way_between(&s->cards[i], &s->cards[j]);
            seen[way] = true;
            fprintf(out, " %-6s", doctor_way_name(way));
        }
        fprintf(out, " %-16s ", s->cards[i].cpus[0] ? s->cards[i].cpus : "?");
        if (s->cards[i].node >= 0)
            fprintf(out, "%d\n", s->cards[i].node);
        else
            fprintf(out, "-\n");
    }
    for (int way = WAY_PIX; way <= WAY_SYS; way++)
        if (seen[way])
            fprintf(out, "  %s: %s\n", doctor_way_name((enum doctor_way)way), meaning[way]);
}

static void print_p2p(const struct doctor_report *report, FILE *out)
{
    const struct doctor_system *s = report->system;
    for (int i = 0; i < s->num_cards; i++)
        for (int j = i + 1; j < s->num_cards; j++) {
            enum p2p_claim there = report->nvml->p2p[i][j], back = report->nvml->p2p[j][i];
            bool claimed = there == P2P_CLAIMED && back == P2P_CLAIMED;
            const char *why = there == P2P_REFUSED ? report->nvml->refused[i][j] : report->nvml->refused[j][i];
            if (there == P2P_UNKNOWN && back == P2P_UNKNOWN)
                continue;
            fprintf(out, "  P2P GPU%d GPU%d: %s%s\n", i, j,
                    claimed ? "claimed by the driver" : "refused by the driver: ", claimed ? "" : why);
        }
}

static void print_copies(const struct doctor_report *report, FILE *out)
{
    for (int i = 0; i < report->num_copies; i++) {
        const struct doctor_copies *copies = report->copies[i];
        char sentence[PROBE_SENTENCE_BYTES];
        fprintf(out, "%s  device %d: ", i ? "        " : "links   ", i);
        if (copies->to_gb_s > 0) {
            fprintf(out, "%.1f GB/s to it, %.1f from it, %.1f us for 4 KiB\n", copies->to_gb_s, copies->from_gb_s,
                    copies->small_us);
        } else {
            doctor_probe_sentence(sentence, &copies->probe);
            fprintf(out, "the probe %s\n", sentence);
        }
    }
}

// ---- links between devices -----------------------------------------------------------------------------------------

// What became of a direction, in capitals where the driver claims what is not so.
static const char *seen_of(const struct link_result *link)
{
    static const char *const words[] = {"-", "good", "no", "LOST", "CHANGED", "STALE", "HANGS", "FAILS", "slow"};
    return link->fault < sizeof words / sizeof *words ? words[link->fault] : "?";
}

enum link_figure { LINK_SEEN, LINK_RATES, LINK_LATENCY };

static void print_link_table(const struct doctor_report *report, enum link_figure figure, FILE *out)
{
    const struct link_board *board = report->links;
    char name[DOCTOR_END_BYTES], cell[32];
    fprintf(out, "%11s", "");
    for (int b = 0; b < board->num_ends; b++) {
        doctor_end_name(name, report, b);
        fprintf(out, " %-12s", name);
    }
    fprintf(out, "\n");
    for (int a = 0; a < board->num_ends; a++) {
        doctor_end_name(name, report, a);
        fprintf(out, "  %-9s", name);
        for (int b = 0; b < board->num_ends; b++) {
            const struct link_result *link = &board->result[a][b];
            if (a == b)
                snprintf(cell, sizeof cell, "X");
            else if (figure == LINK_SEEN)
                snprintf(cell, sizeof cell, "%s/%s", link->claimed ? "yes" : "no", seen_of(link));
            else if (figure == LINK_RATES && link->gb_s[LINK_BY_COPY] > 0)
                snprintf(cell, sizeof cell, "%.1f/%.1f", link->gb_s[LINK_BY_KERNEL], link->gb_s[LINK_BY_COPY]);
            else if (figure == LINK_LATENCY && link->us > 0)
                snprintf(cell, sizeof cell, "%.1f", link->us);
            else
                snprintf(cell, sizeof cell, "-");
            fprintf(out, " %-12s", cell);
        }
        fprintf(out, "\n");
    }
}

static bool is_measured(const struct link_board *board, enum link_figure figure)
{
    for (int a = 0; a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++)
            if ((figure == LINK_RATES ? board->result[a][b].gb_s[LINK_BY_COPY] : board->result[a][b].us) > 0)
                return true;
    return false;
}

static void print_links(const struct doctor_report *report, FILE *out)
{
    const struct link_board *board = report->links;
    char from[DOCTOR_END_BYTES], to[DOCTOR_END_BYTES];
    if (!board)
        return;
    fprintf(out, "\nP2P     %s: as the driver claims / as seen where it was to arrive\n",
            report->devices->count == 1 ? "two processes on one device write to each other's memory"
                                        : "the row writes to the column's memory");
    print_link_table(report, LINK_SEEN, out);
    if (is_measured(board, LINK_RATES)) {
        fprintf(out, "        GB/s, written by a kernel / by a copy engine\n");
        print_link_table(report, LINK_RATES, out);
    }
    if (is_measured(board, LINK_LATENCY)) {
        fprintf(out, "        microseconds from a kernel's write to the sight of it by one that runs there\n");
        print_link_table(report, LINK_LATENCY, out);
    }
    for (int a = 0; a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++) {
            const struct link_result *link = &board->result[a][b];
            doctor_end_name(from, report, a);
            doctor_end_name(to, report, b);
            if (link->fault > LINK_GOOD && (link->claimed || link->fault != LINK_REFUSED)) // the table says the rest
                fprintf(out, "  %s to %s: %s\n", from, to, link->sentence);
        }
}

static void print_transports(const struct doctor_report *report, FILE *out)
{
    static const char *const meaning[TRANSPORT_COUNT] = {
        "between ranks of one host, by its CPU",
        "between ranks of several hosts, by their CPUs",
        "the same over Open MPI",
        "between GPUs of one host, through its pinned memory",
        "between GPUs of one host that reach each other",
        "between GPUs of any hosts",
    };
    fprintf(out, "\n");
    for (int t = 0; t < TRANSPORT_COUNT; t++)
        fprintf(out, "%s  %-5s %s%s%s\n", t ? "        " : "ways    ", transport_name((enum transport)t), meaning[t],
                report->missing[t] ? "; not here: " : "", report->missing[t] ? report->missing[t] : "");
}

static void size_name(char text[24], const struct doctor_size *size)
{
    double bytes = 2.0 * (double)size->rows * DOCTOR_COLS;
    if (bytes < 0x1p20)
        snprintf(text, 24, "%.0f KiB %s", bytes / 1024, wire_name(size->wire));
    else
        snprintf(text, 24, "%.0f MiB %s", bytes / 0x1p20, wire_name(size->wire));
}

void doctor_print_times(const struct doctor_report *report, FILE *out)
{
    char name[24], sentence[PROBE_SENTENCE_BYTES];
    int processors = thread_pool_default_threads();
    if (report->num_times == 0)
        return;
    fprintf(out,
            "%stimes   of one sum over ranks in microseconds, by what it would be in bf16 and by the codec it took%s\n",
            report->system ? "\n" : "", report->system ? "; processes of this host" : "");
    fprintf(out, "  %-10s %5s", "transport", "ranks");
    for (int i = 0; i < DOCTOR_SIZES; i++) {
        size_name(name, &doctor_sizes[i]);
        fprintf(out, " %12s", name);
    }
    fprintf(out, "\n");
    for (int i = 0; i < report->num_times; i++) {
        const struct doctor_times *times = report->times[i];
        fprintf(out, "  %-10s %5d", transport_name(times->transport), times->ranks);
        for (int size = 0; size < DOCTOR_SIZES; size++)
            if (times->us[size] > 0)
                fprintf(out, " %12.1f", times->us[size]);
            else
                fprintf(out, " %12s", "-");
        if (times->devices > 0 && times->devices < times->ranks)
            fprintf(out, "  by turns on %d device%s", times->devices, times->devices == 1 ? "" : "s");
        if (times->devices == 0 && report->system && times->ranks > processors)
            fprintf(out, "  by turns on %d processor%s", processors, processors == 1 ? "" : "s");
        if (times->probe.end != PROBE_DONE || times->probe.err.code) {
            doctor_probe_sentence(sentence, &times->probe);
            fprintf(out, "  it %s", sentence);
        }
        fprintf(out, "\n");
    }
}

// What the table of exchanges takes for the sizes above.
static void print_choice(const struct doctor_report *report, FILE *out)
{
    int devices = report->devices ? report->devices->count : report->system->num_cards,
        ranks = devices > 1 ? devices : 2;
    ranks = ranks < COMM_MAX_RANKS ? ranks : COMM_MAX_RANKS;
    fprintf(out, "\nauto    %s: %s\n", transport_name(report->transport), report->why);
    for (int i = 0; i < DOCTOR_SIZES; i++) {
        char name[24];
        uint64_t bytes = 2 * (uint64_t)doctor_sizes[i].rows * DOCTOR_COLS;
        enum phase phase = doctor_sizes[i].rows == 1 ? PHASE_DECODE : PHASE_PREFILL;
        struct exchange_choice choice = comm_select(report->transport, ranks, bytes, phase,
                                                    phase == PHASE_DECODE ? WIRE_S8X : doctor_sizes[i].wire);
        size_name(name, &doctor_sizes[i]);
        fprintf(out, "  %-14s %s, %d ranks: %s in %s", name, phase == PHASE_DECODE ? "decode" : "prefill", ranks,
                exchange_algorithm_name(choice.algorithm), wire_name(choice.wire));
        if (choice.chunk_bytes)
            fprintf(out, ", chunks of %llu KiB", (unsigned long long)choice.chunk_bytes / 1024);
        fprintf(out, "\n");
    }
}

static void print_findings(const struct doctor_report *report, FILE *out)
{
    bool hinders = report->num_findings > 0 && report->findings[0].hinders;
    fprintf(out, "\nchange  %s\n", hinders ? report->findings[0].text : "nothing hinders");
    for (int i = hinders; i < report->num_findings; i++)
        fprintf(out, "%s    %s\n", report->findings[i].hinders ? "also" : "note", report->findings[i].text);
}

void doctor_print(const struct doctor_report *report, FILE *out)
{
    print_host(report->system, out);
    print_cards(report, out);
    print_matrix(report, out);
    print_p2p(report, out);
    print_copies(report, out);
    print_links(report, out);
    print_transports(report, out);
    doctor_print_times(report, out);
    print_choice(report, out);
    print_findings(report, out);
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

static json_t *link_json(const struct pcie_link *link)
{
    return json_pack("{s:f, s:i}", "gt_s", link->gt_s, "width", link->width);
}

static json_t *cards_json(const struct doctor_report *report)
{
    const struct doctor_system *s = report->system;
    json_t *cards = json_array();
    for (int i = 0; i < s->num_cards; i++) {
        const struct doctor_card *card = &s->cards[i];
        json_t *ways = json_array(), *claims = json_array();
        for (int j = 0; j < s->num_cards; j++) {
            static const char *const words[] = {"unknown", "claimed", "refused"};
            enum doctor_way way = i == j ? WAY_SELF : doctor_way_between(card, &s->cards[j]);
            json_array_append_new(ways, json_string(doctor_way_name(way)));
            json_array_append_new(claims, json_string(words[report->nvml->p2p[i][j]]));
        }
        json_array_append_new(cards, json_pack("{s:s, s:s, s:i, s:s, s:o, s:o, s:o, s:f, s:i, s:i, s:o, s:o}", "bus",
                                               card->bus, "name", card->name, "numa", card->node, "cpus", card->cpus,
                                               "link", link_json(&card->now), "card_link", link_json(&card->card),
                                               "slot_link", link_json(&card->slot), "memory_bytes", card->memory_bytes,
                                               "iommu_group", card->iommu_group, "acs_redirects", card->redirects,
                                               "way", ways, "p2p", claims));
    }
    return cards;
}

static json_t *copies_json(const struct doctor_report *report)
{
    json_t *all = json_array();
    for (int i = 0; i < report->num_copies; i++)
        json_array_append_new(all, json_pack("{s:i, s:f, s:f, s:f}", "device", i, "to_gb_s", report->copies[i]->to_gb_s,
                                             "from_gb_s", report->copies[i]->from_gb_s, "small_us",
                                             report->copies[i]->small_us));
    return all;
}

static json_t *links_json(const struct doctor_report *report)
{
    const struct link_board *board = report->links;
    json_t *all = json_array();
    for (int a = 0; board && a < board->num_ends; a++)
        for (int b = 0; b < board->num_ends; b++) {
            const struct link_result *link = &board->result[a][b];
            if (a == b)
                continue;
            json_t *one = json_pack("{s:i, s:i, s:s, s:s, s:b, s:s, s:f, s:f, s:f}", "from", board->end[a].device, "to",
                                    board->end[b].device, "from_bus", board->end[a].bus, "to_bus", board->end[b].bus,
                                    "claimed", (int)(link->claimed != 0), "seen",
                                    link_fault_name((enum link_fault)link->fault), "kernel_gb_s",
                                    link->gb_s[LINK_BY_KERNEL], "copy_gb_s", link->gb_s[LINK_BY_COPY], "us", link->us);
            if (one)
                json_object_set_new(one, "problem", link->sentence[0] ? json_string(link->sentence) : json_null());
            json_array_append_new(all, one);
        }
    return all;
}

static json_t *transports_json(const struct doctor_report *report)
{
    json_t *all = json_object();
    for (int t = 0; t < TRANSPORT_COUNT && all; t++)
        json_object_set_new(all, transport_name((enum transport)t),
                            report->missing[t] ? json_string(report->missing[t]) : json_true());
    return all;
}

static json_t *times_json(const struct doctor_report *report)
{
    json_t *all = json_array();
    for (int i = 0; i < report->num_times; i++)
        for (int size = 0; size < DOCTOR_SIZES; size++) {
            const struct doctor_times *times = report->times[i];
            if (!(times->us[size] > 0))
                continue;
            json_array_append_new(all, json_pack("{s:s, s:i, s:i, s:I, s:s, s:f}", "transport",
                                                 transport_name(times->transport), "ranks", times->ranks, "devices",
                                                 times->devices, "bf16_bytes",
                                                 (json_int_t)(2 * doctor_sizes[size].rows * DOCTOR_COLS), "wire",
                                                 wire_name(doctor_sizes[size].wire), "us", times->us[size]));
        }
    return all;
}

int doctor_print_times_json(const struct doctor_report *report, struct error *err)
{
    return print_report(json_pack("{s:i, s:o}", "schema_version", 1, "times", times_json(report)), err);
}

int doctor_print_json(const struct doctor_report *report, struct error *err)
{
    const struct doctor_system *s = report->system;
    json_t *findings = json_array();
    bool hinders = report->num_findings > 0 && report->findings[0].hinders;
    for (int i = 0; i < report->num_findings; i++)
        json_array_append_new(findings, json_pack("{s:b, s:s}", "hinders", (int)report->findings[i].hinders, "text",
                                                  report->findings[i].text));
    json_t *host = json_pack("{s:s, s:f, s:s, s:f, s:i, s:s}", "kernel", s->kernel, "memory_bytes", s->memory_bytes,
                             "cpus", s->allowed_cpus, "shm_bytes", s->shm_bytes, "iommu_groups", s->iommu_groups,
                             "iommu_options", s->iommu_words);
    if (host)
        json_object_set_new(host, "memlock_bytes", isinf(s->memlock_bytes) ? json_null() : json_real(s->memlock_bytes));
    return print_report(json_pack("{s:i, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:s, s:s, s:o, s:o}", "schema_version", 1,
                                  "host", host, "driver", s->driver, "cards", cards_json(report), "copies",
                                  copies_json(report), "links", links_json(report), "transports",
                                  transports_json(report), "times", times_json(report), "transport",
                                  transport_name(report->transport), "why", report->why, "change",
                                  hinders ? json_string(report->findings[0].text) : json_null(), "findings", findings),
                        err);
}

// Which processors and which memory a rank on the host keeps to. On a machine of several NUMA nodes a rank's threads stay on one node, and
// its pages lie there: memory of another node is slower, and the way to it is shared.
//
// Ranks take nodes in order, as evenly as their numbers allow; with fewer ranks than nodes a rank has several. Nodes without a processor that
// the process may use do not count. A machine of one node is left alone, but for PIN_CORE; and so are all ranks where a node has fewer
// processors than its ranks have threads (numa_note says so).
#ifndef TPSHARD_ENGINE_NUMA_H
#define TPSHARD_ENGINE_NUMA_H

#include "formats/error.h"

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

#define NUMA_SYSTEM_DIR "/sys/devices/system/node"

enum numa_pin {
    PIN_NONE, // wherever the kernel puts it
    PIN_NODE, // on its node
    PIN_CORE, // each thread on a processor of its own there, as far as there are enough
};
// "none", "node", "core"; PIN_NONE for anything else.
enum numa_pin numa_pin_from_name(const char *name);

struct numa_place {
    cpu_set_t cpus; // of the rank; none: any
    int node;       // of its memory; -1: any
};
// Where a rank belongs, by what system_dir (as NUMA_SYSTEM_DIR) says of nodes and their processors. What cannot be read is one node of all
// allowed processors.
struct numa_place numa_place_of(const char *system_dir, const cpu_set_t *allowed, enum numa_pin pin, int rank,
                                int tp_size, int threads);
enum { NUMA_NOTE_BYTES = 256 };
// "", or one sentence for the user: that all these ranks' threads cannot run at the same time on the allowed processors, or why they cannot be kept
// where pin asks, and which --threads can. Ranks of one thread are never too many: no option would change that.
void numa_note(char text[NUMA_NOTE_BYTES], const char *system_dir, const cpu_set_t *allowed, enum numa_pin pin,
               int tp_size, int threads);
// The calling thread, and threads and memory that it makes from now on, keep to the place. Where the kernel lets nobody choose memory it is
// taken where it is touched first, which is there as well.
int numa_keep_to(const struct numa_place *place, struct error *err);
// Brings the pages of a range, as those of a file that was read on another node before, to the place: those that no other process maps.
void numa_gather_pages(const struct numa_place *place, const void *begin, uint64_t bytes);

#endif

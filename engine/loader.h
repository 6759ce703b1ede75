// Brings a rank file's payload to where the kernels read it, while others already compute: reads in flight, checksums compared leaf by leaf
// as the bytes land, compressed leaves decoded, copies to the device, in the order of first use. It owns its threads and buffers;
// where bytes come from is the store's, where they go the backend's.
#ifndef TPSHARD_ENGINE_LOADER_H
#define TPSHARD_ENGINE_LOADER_H

#include "engine/store.h"
#include "formats/error.h"
#include "formats/shard_file.h"
#include "kernels/backend.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

// How much of the payload is compared with its checksums before the first result leaves. Compressed leaves always are: a decoder sees no byte
// that nobody has compared.
enum verify_mode { VERIFY_FULL, VERIFY_SAMPLE, VERIFY_OFF };

// How the bytes come. AUTO: where the host computes, the file is mapped, so that it is there at the next start; unless the page cache does not
// keep what is read. Where its bytes are copied anyway, they are read from the page cache, or past it when they do not lie there. A path
// that does not work here becomes the next best: uring, direct, read; and map, read.
enum load_path {
    LOAD_AUTO,
    LOAD_MAP,    // mapped, verified where it lies in the page cache (the host's backend only)
    LOAD_READ,   // pread through the page cache, into memory of its own
    LOAD_DIRECT, // pread past the page cache (O_DIRECT)
    LOAD_URING,  // io_uring past the page cache
};
const char *load_path_name(enum load_path path); // "auto", "map", "read", "direct", "uring"
bool load_path_from_name(const char *name, enum load_path *path);

struct loader_options {
    const struct shard_file *file;
    struct store_file *source;
    const struct backend *backend;
    struct device *device;
    enum verify_mode verify;
    enum load_path path;
    int threads;                // 0: as many as keep the store busy
    atomic_llong *loaded_bytes; // grows with what is in place; NULL: nobody wants to know
    // Called on a thread that waits, several times a second, while bytes arrive. Also while a remote source is silent, which pauses and tries
    // again, but for no longer than silence_ms (0: the usual) at a time. NULL: none.
    void (*on_progress)(void *arg);
    // Called when the mapped file can no longer be read where others compute on it, before the process ends with this error: on any
    // thread, inside a signal handler. NULL: the sentence goes to stderr.
    void (*on_lost)(void *arg, const struct error *why);
    void *arg;
    int64_t silence_ms;
};

// Of one load, from its start.
struct load_figures {
    enum load_path path; // what AUTO has become; and what a path that does not work here has become
    char why[160];       // the reason, in words
    int threads;
    int64_t read_bytes;                        // from the store
    double read_s, verify_s, decode_s, copy_s; // of all threads together
    double cpu_s;                              // likewise
    double wall_s;                             // until the last byte was in place
    int64_t fetched_again;                     // ranges of a remote file that came damaged and were asked for once more
};

struct loader;

// Begins; returns when *base is known: payload byte `offset` will lie at *base + offset. What options name outlives the loader, but for the
// device, which is closed between loader_stop and loader_free.
int loader_start(struct loader **out, const struct loader_options *options, const uint8_t **base, struct error *err);
// Waits until payload bytes [offset, offset + bytes) are in place and verified, and has them brought first if they are not under way. Cheap when
// everything is there. The order of the load changes with it: what follows in the file comes next, what was passed over at the end. The
// first failure is every later caller's as well. This and what follows belong to one thread.
int loader_need(struct loader *loader, uint64_t offset, uint64_t bytes, struct error *err);
// Waits for everything, ends the threads and gives buffers back. A second call is cheap.
int loader_finish(struct loader *loader, struct error *err);
bool loader_is_done(const struct loader *loader); // loader_finish will not wait, whatever it will say
// figures may be asked for at any time; they are whole after loader_finish.
void loader_figures(const struct loader *loader, struct load_figures *out);
// Whether *base is the mapped file: then any byte can be read there from the start, before it is verified.
bool loader_is_mapped(const struct loader *loader);
void loader_stop(struct loader *loader); // ends a load that is under way; accepts NULL
void loader_free(struct loader *loader); // stops, and gives back the map; accepts NULL

#endif

// Rank files that came from elsewhere, kept in a directory of this machine. Any number of processes use it at the same time.
//
// An entry is "<contract>-rank-<r>-of-<n>-<bytes>-<hash>.tpshard", where <hash>, the manifest's, covers the leaves and with them the payload:
// two models never mix. While it is filled it is ".<entry>.<process>-<number>.part", as long as it will be, and locked by its writer; it gets
// its name when its last byte is on the disk: an entry is whole, after a power failure too. Entries are used by whoever opens them, also after they
// were dropped. Last use is the time of modification; ".tpshard-cache.lock" keeps two from making room at once; it is
// waited for a moment only. Other files in there are left alone.
#ifndef TPSHARD_ENGINE_STORE_CACHE_H
#define TPSHARD_ENGINE_STORE_CACHE_H

#include "formats/error.h"
#include "formats/manifest.h"

#include <stdbool.h>
#include <stdint.h>

enum { STORE_CACHE_NAME_BYTES = 192 };

// The entry of a rank. name: room for STORE_CACHE_NAME_BYTES.
void store_cache_name(char *name, const struct manifest *manifest, uint32_t rank);
// Opens dir/name and notes the use. -1: it is not there. Caller closes it.
int store_cache_open(const char *dir, const char *name, uint64_t file_bytes);
// Forgets it, unless it is another one by now than the open `fd`.
void store_cache_drop(const char *dir, const char *name, int fd);

struct store_cache_fill;

// Begins the entry of a rank. Makes the directory if its parent is there, and drops the entries longest unused until the rank's bytes more fit below
// limit_bytes (0: no limit), counting what others are filling; files that no living process fills any more go as well. The other ranks of the
// same model stay: where not all of them fit, ERR_IO, so that those which are there remain of use. ERR_IO too while another process holds the
// cache.
int store_cache_fill_begin(struct store_cache_fill **out, const char *dir, const struct manifest *manifest,
                           uint32_t rank, int64_t limit_bytes, struct error *err);
// Bytes of the file, in any order, from any thread. Soon after the last of them the entry is there, at the latest when the fill has ended.
int store_cache_fill_add(struct store_cache_fill *fill, const void *bytes, uint64_t num_bytes, uint64_t offset,
                         struct error *err);
// Removes what is not whole; of what is, waits for the disk. Accepts NULL.
void store_cache_fill_end(struct store_cache_fill *fill);

#endif

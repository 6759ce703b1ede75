// What an unfinished run has done: an append-only file in the work folder, one line for each finished piece of the
// weights (a tensor, or some of its bands) with a hash over what was written for it on all ranks. A run that resumes checks
// that hash against the files, so nothing is believed that did not reach the disk.
#ifndef TPSHARD_SHARD_JOURNAL_H
#define TPSHARD_SHARD_JOURNAL_H

#include "formats/checksum.h"
#include "formats/error.h"

#include <stdbool.h>
#include <stdint.h>

struct journal;

// Opens dir/journal. key stands for everything that decides the output's bytes: options, sources, program version. With
// resume, entries of an earlier run with the same key are kept; another key is ERR_USAGE. Without, the journal begins anew.
// Success: the caller owns *out (journal_close).
int journal_open(struct journal **out, const char *dir, struct checksum128 key, uint64_t num_pieces, bool resume,
                 struct error *err);
void journal_close(struct journal *journal); // accepts null

// True when an earlier run finished the piece; hash is then what it wrote.
bool journal_has(const struct journal *journal, uint64_t piece, struct checksum128 *hash);
uint64_t journal_count(const struct journal *journal); // finished pieces, those of this run too
// Survives the death of the process at once; a power failure when the next line comes a second later or more. One thread at a time.
int journal_add(struct journal *journal, uint64_t piece, struct checksum128 hash, struct error *err);

#endif

// SHA256SUMS of a shard directory: what to sign, and to compare with once, where files arrive. `sha256sum -c` reads it too.
//
// The checksums of the format (XXH3) find damage, at every start and at the speed of memory; who means harm can make files that have them. SHA-256
// costs about a second of one core for each gigabyte and belongs into the installation.
#ifndef TPSHARD_SHARD_SUMS_H
#define TPSHARD_SHARD_SUMS_H

#include "formats/error.h"
#include "formats/manifest.h"
#include "kernels/thread_pool.h"
#include "shard/progress.h"
#include "shard/verify.h"

#include <stdbool.h>
#include <stdint.h>

#define SUMS_FILE_NAME "SHA256SUMS"

// Bytes that either function will read.
int sums_bytes(uint64_t *out, const struct manifest *manifest, const char *dir, struct error *err);
// Writes dir/SHA256SUMS: model.json and every file that it names, sorted by name. *changed: a list of other bytes stood there, or none.
int sums_write(bool *changed, const struct manifest *manifest, const char *dir, struct thread_pool *pool,
               struct progress *progress, struct error *err);
// Compares every file with dir/SHA256SUMS. What does not hold goes to findings: another checksum, a file that the list does not name, a name
// that the manifest does not know, a file of a name that tpshard writes and that the manifest does not know. The return value is for what kept
// the check from being done; ERR_CORRUPT: there is no such list.
int sums_verify(const struct manifest *manifest, const char *dir, struct thread_pool *pool, struct progress *progress,
                struct verify_findings *findings, struct error *err);

#endif

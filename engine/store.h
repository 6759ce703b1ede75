// Where a shard directory lies: on this machine, or behind an http:// or https:// URL. Whoever opens a model reads it through this
// and need not know which. Small files come checked against the manifest; of a rank file only its head: the leaves of the payload
// have their checksums, and their reader compares them.
#ifndef TPSHARD_ENGINE_STORE_H
#define TPSHARD_ENGINE_STORE_H

#include "formats/chat.h"
#include "formats/error.h"
#include "formats/manifest.h"

#include <stdbool.h>
#include <stdint.h>

// All but waits: of what is remote.
struct store_options {
    const char *cache_dir;     // rank files that were fetched and verified are kept there; NULL: nothing is kept
    int64_t cache_limit_bytes; // of all files there together; the ones longest unused go first; 0: no limit
    const char *bearer_token;  // sent as "Authorization: Bearer ...", to the URL's own host alone; NULL: none
    // The rank files' bytes are used without all of them being compared with their checksums: then all ranges of a file must come from one
    // version of it (ETag or, without one, Last-Modified). Where all are compared, mirrors that mark the same bytes differently may answer.
    bool needs_one_version;
    // 0: the usual.
    int connect_s; // longest wait for a connection
    int stall_s;   // and for an answer that does not move
    int pause_ms;  // the first one, before a request is repeated
};

struct store;

// place: a directory, or a URL of one. Remote: nothing is asked for yet. Copies what it needs of options (NULL: all zero). The first one that
// is remote loads libcurl, so a process that forks ranks opens one before; each rank opens its own. It belongs to one thread, except
// where a store_file says otherwise.
int store_open(struct store **out, const char *place, const struct store_options *options, struct error *err);
void store_close(struct store *store); // accepts NULL
bool store_is_remote(const struct store *store);
// For messages: as given, without trailing slashes, and of a URL without name, password and query, which may be secret.
const char *store_place(const struct store *store);
// What is under way and what is yet to come of the small files ends soon: ERR_IO. From any thread.
void store_cancel(struct store *store);

// The manifest, parsed and checked. Caller frees it with manifest_free.
int store_manifest(struct manifest **out, struct store *store, struct error *err);
// A file that the manifest names as an extra, whole, compared with the manifest. *out becomes NULL when the manifest names none.
// Success: the caller owns *out (free), followed by one NUL byte. See formats/extra_file.h.
int store_extra(uint8_t **out, uint64_t *num_bytes, struct store *store, const struct manifest *manifest,
                const char *name, uint64_t cap_bytes, struct error *err);
// chat_open with the directory's files.
int store_chat(struct chat **out, struct store *store, const struct manifest *manifest, struct error *err);

// ---- one large file ------------------------------------------------------------------------------------------------

// Every function but open, head and close may be called from any thread, once head has returned.
struct store_file;

// The file of `rank`. store and manifest must outlive it. Remote: nothing is asked for yet; when the cache holds the file, it is a local one.
int store_file_open(struct store_file **out, struct store *store, const struct manifest *manifest, uint32_t rank,
                    struct error *err);
void store_file_close(struct store_file *file); // accepts NULL; no read may be under way
// For messages, until close: the path of a local file; the URL of any other, also where the cache has it: what is wrong with it is to be mended there.
const char *store_file_name(const struct store_file *file);
uint64_t store_file_bytes(const struct store_file *file); // local: its length; remote: what the manifest says
int store_file_fd(const struct store_file *file);         // of a local file or the cache's; -1: it is remote
// Everything before the payload. A remote one that does not have the manifest's checksum is fetched anew, three times in all; whether it has is
// then for the caller to say, in words that fit (shard_file_parse, shard_file_root). A cached file whose head is damaged becomes a remote one here.
// Caller frees *out.
int store_file_head(uint8_t **out, uint64_t *num_bytes, struct store_file *file, struct error *err);
// Exactly num_bytes at offset. Remote: a ranged request, repeated with growing pauses when it fails or stalls, from where it broke off; ERR_IO
// at last, ERR_CORRUPT when the file there has another length than the manifest says.
int store_file_read(struct store_file *file, void *buffer, uint64_t num_bytes, uint64_t offset, struct error *err);
// Remote with a cache: these bytes have been verified; they are kept. With the last of them the cache holds the file. The head is kept by
// store_file_head. A cache that cannot be written ends the keeping and is no error: see store_file_note.
void store_file_keep(struct store_file *file, const void *bytes, uint64_t num_bytes, uint64_t offset);
// These bytes did not verify. True: they came from the cache, which has dropped the file; from here on store_file_read asks the server
// (store_file_fd remains what it was). False: they came from where the model lies.
bool store_file_distrust(struct store_file *file);
// Every read ends soon, under way or to come: ERR_IO.
void store_file_cancel(struct store_file *file);
uint64_t store_file_fetched_bytes(
    const struct store_file *file); // remote: received so far, repetitions too; grows while reads wait
const char *store_file_note(
    const struct store_file *file); // why the cache does not keep the file, a sentence; NULL: nothing to say

#endif

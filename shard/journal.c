// See journal.h. Lines: "tpshard journal 2 KEY", then "PIECE HASH". A line that a crash cut short is not believed,
// and written over.
#include "shard/journal.h"

#include "formats/file_io.h"
#include "kernels/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { JOURNAL_CAP_BYTES = 64 << 20, LINE_BYTES = 128 };

struct journal {
    int fd;
    char path[PATH_MAX];
    uint64_t num_pieces, end, count;
    double synced_s;            // 0: never
    bool *done;                 // [num_pieces]
    struct checksum128 *hashes; // [num_pieces]
};

static int key_line(char line[LINE_BYTES], struct checksum128 key)
{
    char hex[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(key, hex);
    return snprintf(line, LINE_BYTES, "tpshard journal 2 %s\n", hex);
}

// Takes "PIECE HASH\n" at text; false when it is no such line.
static bool take_line(struct journal *journal, const char *text, const char *line_end)
{
    char hex[CHECKSUM128_HEX_DIGITS + 1];
    char *after;
    uint64_t piece = strtoull(text, &after, 10);
    struct checksum128 hash;
    if (after == text || *after != ' ' || line_end - after != 1 + CHECKSUM128_HEX_DIGITS ||
        piece >= journal->num_pieces)
        return false;
    memcpy(hex, after + 1, CHECKSUM128_HEX_DIGITS);
    hex[CHECKSUM128_HEX_DIGITS] = 0;
    if (!checksum128_from_hex(&hash, hex))
        return false;
    journal->count += !journal->done[piece];
    journal->done[piece] = true;
    journal->hashes[piece] = hash;
    return true;
}

static int read_entries(struct journal *journal, const char *wanted_key_line, struct error *err)
{
    uint8_t *bytes;
    uint64_t num_bytes;
    int rc = file_read_all(&bytes, &num_bytes, journal->path, JOURNAL_CAP_BYTES, ERR_USAGE, err);
    if (rc)
        return rc;
    const char *text = (const char *)bytes, *at = text;
    size_t key_bytes = strlen(wanted_key_line);
    const char *first_end = strchr(text, '\n');
    if (first_end && (num_bytes < key_bytes || memcmp(text, wanted_key_line, key_bytes) != 0)) {
        rc = error_set(err, ERR_USAGE,
                       "%s: the unfinished run was made with other options, another model or another version of "
                       "tpshard; leave out --resume, or add --force, to start anew",
                       journal->path);
    } else if (first_end) {
        at += key_bytes;
        for (const char *end; (end = strchr(at, '\n')) && take_line(journal, at, end);)
            at = end + 1;
        journal->end = (uint64_t)(at - text);
    }
    free(bytes);
    return rc;
}

// Synced at most once a second: small models have many small pieces, and a lost line costs one of them.
static int append(struct journal *journal, const char *line, int length, struct error *err)
{
    int rc = file_pwrite_full(journal->fd, line, (uint64_t)length, journal->end, journal->path, err);
    if (rc)
        return rc;
    journal->end += (uint64_t)length;
    double now_s = clock_now_s();
    if (journal->synced_s == 0 || now_s - journal->synced_s >= 1) {
        journal->synced_s = now_s;
        return file_sync(journal->fd, journal->path, err);
    }
    return 0;
}

int journal_open(struct journal **out, const char *dir, struct checksum128 key, uint64_t num_pieces, bool resume,
                 struct error *err)
{
    char line[LINE_BYTES];
    int length = key_line(line, key), rc = 0;
    struct journal *journal = calloc(1, sizeof *journal);
    if (!journal)
        return error_set(err, ERR_MEMORY, "out of memory for the journal");
    snprintf(journal->path, sizeof journal->path, "%s/journal", dir);
    journal->num_pieces = num_pieces;
    journal->done = calloc(num_pieces, sizeof *journal->done);
    journal->hashes = calloc(num_pieces, sizeof *journal->hashes);
    journal->fd = open(journal->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (resume ? 0 : O_TRUNC), 0666);
    if (!journal->done || !journal->hashes)
        rc = error_set(err, ERR_MEMORY, "out of memory for the journal of %" PRIu64 " pieces", num_pieces);
    else if (journal->fd < 0)
        rc = error_set_errno(err, "%s: cannot open", journal->path);
    if (!rc && resume)
        rc = read_entries(journal, line, err);
    if (!rc && ftruncate(journal->fd, (off_t)journal->end))
        rc = error_set_errno(err, "%s: cannot cut", journal->path);
    if (!rc && journal->end == 0)
        rc = append(journal, line, length, err);
    if (rc)
        journal_close(journal);
    else
        *out = journal;
    return rc;
}

void journal_close(struct journal *journal)
{
    if (!journal)
        return;
    if (journal->fd >= 0)
        close(journal->fd);
    free(journal->done);
    free(journal->hashes);
    free(journal);
}

bool journal_has(const struct journal *journal, uint64_t piece, struct checksum128 *hash)
{
    *hash = journal->hashes[piece];
    return journal->done[piece];
}

uint64_t journal_count(const struct journal *journal) { return journal->count; }

int journal_add(struct journal *journal, uint64_t piece, struct checksum128 hash, struct error *err)
{
    char hex[CHECKSUM128_HEX_DIGITS + 1], line[LINE_BYTES];
    checksum128_to_hex(hash, hex);
    int rc = append(journal, line, snprintf(line, sizeof line, "%" PRIu64 " %s\n", piece, hex), err);
    if (!rc) {
        journal->count += !journal->done[piece];
        journal->done[piece] = true;
        journal->hashes[piece] = hash;
    }
    return rc;
}

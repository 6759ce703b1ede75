// The directory that tpshard writes: nothing of an unfinished run is ever taken for a model.
//
// Everything is first written and synced in out_dir/.tmp-tpshard, on the same file system. Committing then removes the
// manifest of what stood there before, renames the new files into place, and writes the manifest last. A directory
// without a manifest is not a model, so a crash at any moment leaves the old model, the new one, or none.
#ifndef TPSHARD_SHARD_OUTPUT_DIR_H
#define TPSHARD_SHARD_OUTPUT_DIR_H

#include "formats/error.h"
#include "formats/manifest.h"

#include <dirent.h>
#include <limits.h>
#include <stdbool.h>

struct output_dir {
    char path[PATH_MAX];
    char work_path[PATH_MAX]; // out_dir/.tmp-tpshard
    int lock_fd;              // holds the directory against a second tpshard
    bool created;             // did not exist before
    bool found_work;          // an earlier run's work folder was there and is not emptied
};

// Opens the directory and holds it against a second tpshard (ERR_USAGE when another has it) until *fd is closed.
int output_dir_lock(int *fd, const char *path, struct error *err);

// Is it a name that tpshard gives to a file beside the manifest? Those of the list of SHA-256 checksums and its signatures are among them.
bool output_dir_is_own_name(const char *name);

// The next entry of a directory that is being read; NULL at the end. What cannot be read in full is not taken for all there is.
int output_dir_next(const struct dirent **entry, DIR *dir, const char *path, struct error *err);

// Takes the directory: it must not exist, be empty, hold what an interrupted run left, or, with force, a model made by
// tpshard. Anything else is refused (ERR_USAGE). keep_work: leave the work folder of an earlier run as it is; else
// it is removed and made anew. Success: output_dir_release.
int output_dir_take(struct output_dir *out, const char *path, bool force, bool keep_work, struct error *err);

// Removes what a crash has left of files that were written beside their place in a directory that is locked.
int output_dir_remove_leftovers(const char *path, struct error *err);

// Empties the work folder.
int output_dir_clean(struct output_dir *dir, struct error *err);

// Moves the manifest's rank files and extras from the work folder into place, then writes the manifest.
int output_dir_commit(struct output_dir *dir, const struct manifest *manifest, struct error *err);

// Gives the directory back. remove_work: the work folder is of no use any more; with it goes a directory that was
// created and is empty.
void output_dir_release(struct output_dir *dir, bool remove_work);

#endif

// Where convert's calibration statistics come from: a file that is there, or a capture. tpshard cannot run a model: it makes a directory of bf16
// weights for one rank and has the tpengine beside it read the text (tpengine capture), which goes on where an interrupted run ended.
#ifndef TPSHARD_SHARD_STATISTICS_H
#define TPSHARD_SHARD_STATISTICS_H

#include "formats/calibration_file.h"
#include "formats/error.h"

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

struct statistics_wish {
    const char *text; // NULL: the file is there
    const char *file; // NULL: in the work folder, and gone with it
    int64_t tokens;
    int threads;
    bool quiet;
};

// A folder beside out_dir, out_dir.calib: `bf16` while a capture needs it, and `statistics` where no other file was named.
struct statistics_place {
    char folder[PATH_MAX], shards[PATH_MAX], file[PATH_MAX];
    char mark[PATH_MAX]; // a file in the folder that says that a run made it: without it nothing there is touched
    bool own_file;       // in the folder
};
int statistics_place_make(struct statistics_place *out, const char *out_dir, const struct statistics_wish *wish,
                          struct error *err);
// Makes the folder, or takes the one that an interrupted run has left. ERR_USAGE: there is one of this name, and it is somebody's own.
int statistics_place_take(const struct statistics_place *place, struct error *err);
// Takes the folder away, with what is known to be in it, if it is one that was taken.
void statistics_place_remove(const struct statistics_place *place);
void statistics_remove_shards(const struct statistics_place *place);

// Refuses what a capture would refuse after the model has been written for it: no tpengine, no text, a file of the user's own in the place of the statistics.
int statistics_check(const struct statistics_place *place, const struct statistics_wish *wish, struct error *err);

// Opens the file if it is there, finished, and of the text that was asked for; *out is NULL when a capture has to come first. manifest: of the checkpoint, without
// hashes. ERR_MODEL, ERR_USAGE: it is of something else.
int statistics_open(struct calibration_file **out, const struct statistics_place *place,
                    const struct statistics_wish *wish, const struct manifest *manifest, struct error *err);
// Runs tpengine capture on place->shards. Its sentences go to stderr.
int statistics_capture(const struct statistics_place *place, const struct statistics_wish *wish, struct error *err);

#endif

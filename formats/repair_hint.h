// What mends a file of a shard directory, for the sentence that says what is wrong with it.
#ifndef TPSHARD_FORMATS_REPAIR_HINT_H
#define TPSHARD_FORMATS_REPAIR_HINT_H

#include "formats/error.h"

enum { REPAIR_HINT_BYTES = 512 };

// "repair it: tpshard repair DIR --from SOURCE, ...": DIR is the file's directory, as a shell takes it. name: a path, or a URL: such a file its
// publisher has to mend. Returns out.
const char *repair_hint(char out[REPAIR_HINT_BYTES], const char *name);

// file_open_read has refused (ERR_IO) a file that the manifest names. Nothing is there: ERR_IO still; something else than a regular file, or a
// link that leads nowhere: ERR_CORRUPT; both with the hint. Any other reason stands as it is.
int repair_hint_unopened(const char *path, struct error *err);

#endif

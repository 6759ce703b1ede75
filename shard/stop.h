// SIGINT and SIGTERM ask long work to stop; it looks here now and then and leaves cleanly.
#ifndef TPSHARD_SHARD_STOP_H
#define TPSHARD_SHARD_STOP_H

#include "formats/error.h"

#include <stdbool.h>

// From here on the two signals are noted instead of ending the process. A second one ends it at once.
void stop_install(void);
bool stop_requested(void); // any thread
// 0, or ERR_SIGINT / ERR_SIGTERM with a sentence.
int stop_check(struct error *err);

#endif

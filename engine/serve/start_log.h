// What the log says of a start, rank by rank: its device, and how its weights came.
#ifndef TPSHARD_ENGINE_SERVE_START_LOG_H
#define TPSHARD_ENGINE_SERVE_START_LOG_H

#include "engine/serve/engine.h"
#include "engine/session.h"

// stats: of an engine whose ranks are ready.
void start_log(struct session *session, const struct engine_stats *stats);

#endif

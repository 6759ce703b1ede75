// Commands for ranks whose processes do not share memory with the parent's. Rank 0 runs beside the parent; before it runs a command it sends it to all
// others over the world's collectives, with what of the step area they need and do not have yet: segments, and of the slots in them tokens, pages, settings
// and masks. The others keep an area of their own, which is what they have been sent.
//
// All calls are collective over the world. Waiting for a command has no deadline, but ends with an error when a rank is lost.
#ifndef TPSHARD_ENGINE_RELAY_H
#define TPSHARD_ENGINE_RELAY_H

#include "engine/comm.h"
#include "engine/step.h"
#include "formats/error.h"

#include <stdint.h>

struct relay;

// What a command is given besides the step area.
struct relay_forward {
    int64_t start, count;
    int32_t sequence, wire;
};

enum relay_kind {
    RELAY_PLAIN,  // a number alone
    RELAY_STEP,   // with the step in the area
    RELAY_FORWARD // with relay_forward, and its sequence's tokens and pages
};

// area: rank 0's source, the others' destination, zeroed at first; outlives the relay. comm: the world's.
int relay_create(struct relay **out, struct comm *comm, const struct step_area *area, struct error *err);
void relay_free(struct relay *relay); // accepts NULL
// Rank 0.
int relay_send(struct relay *relay, int command, enum relay_kind kind, const struct relay_forward *forward,
               struct error *err);
// The others. ERR_RANK where what came does not fit the area.
int relay_receive(struct relay *relay, int *command, struct relay_forward *forward, struct error *err);

// The two halves without the way between them, for tests: what rank 0 would send now (valid until the next call; NULL: no
// memory), and taking it in.
const uint8_t *relay_encode(struct relay *relay, int command, enum relay_kind kind, const struct relay_forward *forward,
                            uint64_t *bytes);
int relay_decode(struct relay *relay, const uint8_t *data, uint64_t bytes, int *command, struct relay_forward *forward,
                 struct error *err);

#endif

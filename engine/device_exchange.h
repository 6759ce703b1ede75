// Sums over ranks that the ranks' devices compute themselves (kernels/backend.h): the memory that the ranks share for it, which transport they agree on,
// and what is said when a rank does not come.
//
// The memory is a file without a name that rank 0 of the group makes and the others open by its process, so that it does not matter who started
// them: they need the same machine, user and process namespace. It goes with the last rank that has it.
#ifndef TPSHARD_ENGINE_DEVICE_EXCHANGE_H
#define TPSHARD_ENGINE_DEVICE_EXCHANGE_H

#include "engine/comm.h"
#include "kernels/backend.h"

#include <stdbool.h>

struct exchange_wish {
    enum transport transport;
    bool
        or_host; // where the ranks cannot have it: TRANSPORT_HOST instead of TRANSPORT_P2P, else the hosts add up, over what comm is
    bool feedback; // the wire's losses are made up for
};

struct device_exchange;

// What a device is told of an exchange for the failure that may come: the operation that the ranks are in, and which half of a sum it is.
enum { DEVICE_SUM = 0, DEVICE_REDUCE_SCATTER = 16, DEVICE_ALL_GATHER = 32 };
_Static_assert((int)OP_COUNT <= (int)DEVICE_REDUCE_SCATTER, "an operation and a half are one number");
static inline int device_operation(int half, enum comm_operation op) { return half + (int)op; }

// After the device is prepared; all ranks of comm call it with the same wish. Success: *out, the caller's (device_exchange_close, after the device is
// closed), or NULL where the host exchanges. *transport: what was agreed on. note: "" or one sentence for the user.
enum { DEVICE_EXCHANGE_NOTE_BYTES = 256 };
int device_exchange_open(struct device_exchange **out, enum transport *transport, const struct backend *backend,
                         struct device *device, struct comm *comm, struct exchange_wish wish,
                         char note[DEVICE_EXCHANGE_NOTE_BYTES], struct error *err);
void device_exchange_close(struct device_exchange *exchange); // accepts NULL

#endif

// The collectives over connected sockets: ranks are processes of one host or of several. See comm.h for what they do and
// comm_link.h for what goes over a connection.
#ifndef TPSHARD_ENGINE_COMM_TCP_H
#define TPSHARD_ENGINE_COMM_TCP_H

#include "engine/comm.h"

// The world's end of a rank whose ranks are connected by sockets, one for each two of them.
//   fds     [world] connected stream sockets (TCP or Unix), fds[r] leads to rank r; fds[rank] is not looked at. They belong to
//           comm from now on, in every case: comm_close closes them.
//   region  this process's own (comm_region_init, same figures on all ranks: what differs is refused with both values). Its
//           buffers, positions, abort word and error are kept as if all ranks wrote to it, so comm_region_* tell of ranks
//           elsewhere, and comm_region_abort, by any process that shares it, ends the ranks elsewhere as well.
//   timeout_ms  as for comm_open. It is also the time, but not below a second, in which something must be heard from each
//           rank: a thread of its own tells the others of this one, also while it loads, computes or idles. A rank that is
//           silent for longer, or whose connection closes before its comm_close, is lost, and all others end with a sentence
//           that names it.
// Not before a fork. Success: caller owns *out.
int comm_open_sockets(struct comm **out, struct comm_region *region, const int *fds, int rank, int timeout_ms,
                      struct error *err);

#endif

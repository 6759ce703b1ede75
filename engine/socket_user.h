// Who is at the other end of a connection within this host, by the kernel's table of connections.
#ifndef TPSHARD_ENGINE_SOCKET_USER_H
#define TPSHARD_ENGINE_SOCKET_USER_H

#include "formats/error.h"

#include <sys/types.h>

// fd: a TCP connection whose other end is a process in this network namespace. ERR_IO where the kernel does not say; the other end has then closed
// it, is elsewhere, or /proc is not there.
int socket_user(int fd, uid_t *user, struct error *err);

#endif

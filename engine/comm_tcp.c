// Sockets as a carrier. See comm_tcp.h and comm_link.h.
#include "engine/comm_tcp.h"

#include "engine/comm_internal.h"
#include "engine/comm_link.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

struct sockets {
    int count;
    int fds[COMM_MAX_RANKS]; // -1: none
};

static int64_t would_block(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1; }

static int64_t socket_send(void *carrier, int rank, const struct iovec *parts, int count)
{
    const struct sockets *sockets = carrier;
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)parts, .msg_iovlen = (size_t)count};
    ssize_t n = sendmsg(sockets->fds[rank], &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    return n < 0 ? would_block() : n;
}

static int64_t socket_receive(void *carrier, int rank, void *to, size_t bytes)
{
    const struct sockets *sockets = carrier;
    ssize_t n = recv(sockets->fds[rank], to, bytes, MSG_DONTWAIT);
    if (n == 0)
        errno = 0;
    return n < 0 ? would_block() : n ? n : -1;
}

static void socket_wait(void *carrier, const bool *readers, const bool *writers, int wake, int64_t limit_ns)
{
    const struct sockets *sockets = carrier;
    struct pollfd fds[COMM_MAX_RANKS + 1];
    nfds_t count = 0;
    fds[count++] = (struct pollfd){.fd = wake, .events = POLLIN};
    for (int rank = 0; rank < sockets->count; rank++)
        if (sockets->fds[rank] >= 0 && (readers[rank] || writers[rank]))
            fds[count++] =
                (struct pollfd){.fd = sockets->fds[rank],
                                .events = (short)((readers[rank] ? POLLIN : 0) | (writers[rank] ? POLLOUT : 0))};
    struct timespec limit = {.tv_sec = limit_ns / 1000000000, .tv_nsec = limit_ns % 1000000000};
    if (ppoll(fds, count, &limit, NULL) < 0)
        return; // a signal: the caller looks again
}

static void socket_finish(void *carrier, int rank)
{
    const struct sockets *sockets = carrier;
    shutdown(sockets->fds[rank], SHUT_WR);
}

static void socket_close(void *carrier)
{
    struct sockets *sockets = carrier;
    for (int rank = 0; rank < sockets->count; rank++)
        if (sockets->fds[rank] >= 0)
            close(sockets->fds[rank]);
    free(sockets);
}

static const struct comm_carrier carrier = {.send = socket_send,
                                            .receive = socket_receive,
                                            .wait = socket_wait,
                                            .finish = socket_finish,
                                            .close = socket_close};

int comm_open_sockets(struct comm **out, struct comm_region *region, const int *fds, int rank, int timeout_ms,
                      struct error *err)
{
    struct sockets *sockets = calloc(1, sizeof *sockets);
    for (int other = 0; other < region->world_size && !sockets; other++)
        if (other != rank)
            close(fds[other]);
    if (!sockets)
        return error_set(err, ERR_MEMORY, "rank %d: out of memory", rank);
    sockets->count = region->world_size;
    for (int other = 0; other < region->world_size; other++) {
        sockets->fds[other] = other == rank ? -1 : fds[other];
        // Small frames go at once. A Unix socket has no such option and needs none.
        if (other != rank)
            setsockopt(fds[other], IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    }
    return comm_open_link(out, &carrier, sockets, region, rank, timeout_ms, err);
}

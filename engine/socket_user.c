// See socket_user.h. The kernel is asked for that one connection (sock_diag(7)); where it does not answer, as it was built without that or a sandbox
// forbids it, its table is read, which may leave out a line while connections come and go. A connection stands twice in either, once for each
// end; the user is the one whose process made that end.
#include "engine/socket_user.h"

#include <inttypes.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { TCP_IS_ESTABLISHED = 1, ADDRESS_BYTES = 40, TRIES = 16, ANSWER_MS = 1000 };

// ---- asked for one connection ----------------------------------------------------------------------------------

static bool fill_end(__be32 words[4], __be16 *port, const struct sockaddr_storage *address)
{
    const struct sockaddr_in *v4 = (const void *)address;
    const struct sockaddr_in6 *v6 = (const void *)address;
    if (address->ss_family == AF_INET) {
        memcpy(words, &v4->sin_addr, 4);
        *port = v4->sin_port;
    } else if (address->ss_family == AF_INET6) {
        memcpy(words, &v6->sin6_addr, 16);
        *port = v6->sin6_port;
    } else {
        return false;
    }
    return true;
}

// The end at `local` that leads to `remote`.
static bool ask(const struct sockaddr_storage *local, const struct sockaddr_storage *remote, uid_t *user)
{
    struct {
        struct nlmsghdr head;
        struct inet_diag_req_v2 request;
    } question = {
        .head = {.nlmsg_len = sizeof question, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST},
        .request = {.sdiag_family = (__u8)local->ss_family,
                    .sdiag_protocol = IPPROTO_TCP,
                    .idiag_states = 1u << TCP_IS_ESTABLISHED,
                    .id.idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}};
    struct inet_diag_sockid *id = &question.request.id;
    union {
        struct nlmsghdr head;
        uint8_t bytes[4096];
    } answer;
    struct timeval longest = {.tv_sec = ANSWER_MS / 1000};
    bool found = false;
    if (!fill_end(id->idiag_src, &id->idiag_sport, local) || !fill_end(id->idiag_dst, &id->idiag_dport, remote))
        return false;
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd < 0)
        return false;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &longest, sizeof longest);
    ssize_t bytes =
        send(fd, &question, sizeof question, 0) == (ssize_t)sizeof question ? recv(fd, &answer, sizeof answer, 0) : -1;
    close(fd);
    if (bytes >= (ssize_t)NLMSG_LENGTH(sizeof(struct inet_diag_msg)) && answer.head.nlmsg_type == SOCK_DIAG_BY_FAMILY) {
        const struct inet_diag_msg *end = NLMSG_DATA(&answer.head);
        // Where there is no such connection, who listens there may be named.
        found = end->idiag_state == TCP_IS_ESTABLISHED && end->id.idiag_sport == id->idiag_sport &&
                end->id.idiag_dport == id->idiag_dport;
        *user = found ? end->idiag_uid : *user;
    }
    return found;
}

// ---- the table -------------------------------------------------------------------------------------------------

// As the table has it: the address in words of this machine, and the port.
static void write_address(char text[ADDRESS_BYTES], const struct sockaddr_storage *address)
{
    __be32 words[4];
    __be16 port = 0;
    int used = 0;
    fill_end(words, &port, address);
    for (int i = 0; i < (address->ss_family == AF_INET ? 1 : 4); i++)
        used += snprintf(text + used, ADDRESS_BYTES - (size_t)used, "%08" PRIX32, words[i]);
    snprintf(text + used, ADDRESS_BYTES - (size_t)used, ":%04X", (unsigned)ntohs(port));
}

// The line of the end at `local` that leads to `remote`.
static bool find_line(const char *table, const char *local, const char *remote, uid_t *user)
{
    char line[512], line_local[ADDRESS_BYTES], line_remote[ADDRESS_BYTES];
    unsigned line_state, line_user;
    bool found = false;
    FILE *f = fopen(table, "re");
    while (f && !found && fgets(line, sizeof line, f))
        if (sscanf(line, " %*[^:]: %39s %39s %x %*s %*s %*s %u", line_local, line_remote, &line_state, &line_user) ==
                4 &&
            line_state == TCP_IS_ESTABLISHED && strcmp(line_local, local) == 0 && strcmp(line_remote, remote) == 0) {
            *user = line_user;
            found = true;
        }
    if (f)
        fclose(f);
    return found;
}

int socket_user(int fd, uid_t *user, struct error *err)
{
    struct sockaddr_storage here = {0}, there = {0};
    socklen_t here_bytes = sizeof here, there_bytes = sizeof there;
    char local[ADDRESS_BYTES], remote[ADDRESS_BYTES];
    if (getsockname(fd, (struct sockaddr *)&here, &here_bytes) ||
        getpeername(fd, (struct sockaddr *)&there, &there_bytes))
        return error_set_errno(err, "whose connection it is cannot be told");
    if (there.ss_family != here.ss_family || (there.ss_family != AF_INET && there.ss_family != AF_INET6))
        return error_set(err, ERR_IO, "whose connection it is cannot be told: it is none of TCP");
    if (ask(&there, &here, user))
        return 0;
    const char *table = there.ss_family == AF_INET ? "/proc/self/net/tcp" : "/proc/self/net/tcp6";
    write_address(local, &there);
    write_address(remote, &here);
    for (int i = 0; i < TRIES; i++) {
        struct pollfd ended = {.fd = fd, .events = POLLRDHUP};
        if (find_line(table, local, remote, user))
            return 0;
        if (poll(&ended, 1, 1 + i) > 0) // it does not come back
            break;
    }
    return error_set(err, ERR_IO,
                     "whose connection it is cannot be told: it does not stand in %s, and the kernel was not to be "
                     "asked for it (sock_diag)",
                     table);
}

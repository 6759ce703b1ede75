// See socket_user.h. A connection stands twice in the table, once for each end; the user in a line is the one whose process made that end.
#include "engine/socket_user.h"

#include <inttypes.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { TCP_IS_ESTABLISHED = 1, ADDRESS_BYTES = 40, TRIES = 3 };

// As the table has it: the address in words of this machine, and the port.
static bool write_address(char text[ADDRESS_BYTES], const struct sockaddr_storage *address)
{
    uint32_t words[4];
    const struct sockaddr_in *v4 = (const void *)address;
    const struct sockaddr_in6 *v6 = (const void *)address;
    if (address->ss_family == AF_INET) {
        memcpy(words, &v4->sin_addr, 4);
        snprintf(text, ADDRESS_BYTES, "%08" PRIX32 ":%04X", words[0], (unsigned)ntohs(v4->sin_port));
    } else if (address->ss_family == AF_INET6) {
        memcpy(words, &v6->sin6_addr, 16);
        snprintf(text, ADDRESS_BYTES, "%08" PRIX32 "%08" PRIX32 "%08" PRIX32 "%08" PRIX32 ":%04X", words[0], words[1],
                 words[2], words[3], (unsigned)ntohs(v6->sin6_port));
    } else {
        return false;
    }
    return true;
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
    if (!write_address(local, &there) || !write_address(remote, &here))
        return error_set(err, ERR_IO, "whose connection it is cannot be told: it is none of TCP");
    const char *table = there.ss_family == AF_INET ? "/proc/self/net/tcp" : "/proc/self/net/tcp6";
    // A table that changes while it is read may leave out a line.
    for (int i = 0; i < TRIES; i++)
        if (find_line(table, local, remote, user))
            return 0;
    return error_set(err, ERR_IO, "whose connection it is cannot be told: it does not stand in %s", table);
}

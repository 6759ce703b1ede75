// Listening sockets: TCP by host and port, a socket in the file system; accepting within the limits.
#include "engine/serve/http_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { ACCEPTS_AT_ONCE = 64, PAUSE_US = 100000 };

static void on_accept(evutil_socket_t fd, short events, void *arg)
{
    (void)events;
    struct http_listener *listener = arg;
    struct http_server *server = listener->server;
    bool health = listener->health_only;
    int limit = health ? HTTP_HEALTH_CONNECTIONS : server->limits.connections;
    server->now_s = clock_now_s();
    for (int i = 0; i < ACCEPTS_AT_ONCE; i++) {
        struct sockaddr_storage address;
        socklen_t bytes = sizeof address;
        int client = accept4(fd, (struct sockaddr *)&address, &bytes, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (client < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                http_listeners_pause(server, true); // the connection stays in the queue and would wake us at once
            if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO)
                continue;
            break;
        }
        if (server->num_open[health] >= limit + HTTP_EXTRA_CONNECTIONS)
            close(client);
        else
            http_connection_open(server, client, health, server->num_open[health] >= limit, &address, bytes);
    }
    http_server_settle(server);
}

void http_listeners_pause(struct http_server *server, bool pause)
{
    for (struct http_listener *at = server->listeners; at; at = at->next) {
        if (pause)
            event_del(&at->event);
        else
            event_add(&at->event, NULL);
    }
    if (pause && event_add(&server->accept_event, &(struct timeval){.tv_usec = PAUSE_US}))
        http_listeners_pause(server, false);
}

// Takes fd in any case.
static int add_listener(struct http_server *server, int fd, bool health_only, const char *unix_path, struct error *err)
{
    struct http_listener *listener = calloc(1, sizeof *listener);
    char *path = unix_path ? strdup(unix_path) : NULL;
    if (!listener || (unix_path && !path)) {
        free(listener);
        free(path);
        close(fd);
        return error_set(err, ERR_MEMORY, "HTTP server: out of memory");
    }
    listener->server = server;
    listener->fd = fd;
    listener->health_only = health_only;
    listener->unix_path = path;
    struct stat status;
    if (path && lstat(path, &status) == 0) {
        listener->device = status.st_dev;
        listener->inode = status.st_ino;
    }
    listener->next = server->listeners;
    server->listeners = listener;
    event_assign(&listener->event, server->base, fd, EV_READ | EV_PERSIST, on_accept, listener);
    if (event_add(&listener->event, NULL))
        return error_set(err, ERR_OTHER, "HTTP server: cannot watch a listening socket");
    return 0;
}

void http_listeners_free(struct http_server *server)
{
    while (server->listeners) {
        struct http_listener *listener = server->listeners;
        struct stat status;
        server->listeners = listener->next;
        event_del(&listener->event);
        if (listener->unix_path && lstat(listener->unix_path, &status) == 0 && status.st_dev == listener->device &&
            status.st_ino == listener->inode)
            unlink(listener->unix_path);
        close(listener->fd);
        free(listener->unix_path);
        free(listener);
    }
}

// ---- TCP -----------------------------------------------------------------------------------------------------------

// Accepted sockets inherit all of these.
static void set_options(int fd, int family)
{
    static const int on = 1, off = 0, send_buffer = HTTP_SEND_BUFFER, keep_idle = 60, keep_interval = 15,
                     keep_count = 4;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &keep_idle, sizeof keep_idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &keep_interval, sizeof keep_interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &keep_count, sizeof keep_count);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off); // "::" takes IPv4 too
}

static int bound_port_of(int fd)
{
    struct sockaddr_storage address;
    socklen_t bytes = sizeof address;
    if (getsockname(fd, (struct sockaddr *)&address, &bytes))
        return 0;
    return ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                               : ((struct sockaddr_in *)&address)->sin_port);
}

static int open_tcp(const struct addrinfo *address)
{
    int fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    set_options(fd, address->ai_family);
    if (bind(fd, address->ai_addr, address->ai_addrlen) || listen(fd, SOMAXCONN)) {
        int why = errno;
        close(fd);
        errno = why;
        return -1;
    }
    return fd;
}

int http_server_listen(struct http_server *server, const char *host, int port, bool health_only, int *bound_port,
                       struct error *err)
{
    char name[256], service[16];
    size_t host_bytes = strlen(host);
    if (port < 0 || port > 65535)
        return error_set(err, ERR_USAGE, "port %d: must be from 0 to 65535", port);
    bool brackets = host_bytes > 2 && host[0] == '[' && host[host_bytes - 1] == ']';
    snprintf(name, sizeof name, "%.*s", (int)(brackets ? host_bytes - 2 : host_bytes), host + brackets);
    snprintf(service, sizeof service, "%d", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *found = NULL;
    int why = getaddrinfo(name, service, &hints, &found);
    if (why)
        return error_set(err, ERR_USAGE, "host %s: %s", host, gai_strerror(why));

    // A name may have several addresses; those that this machine does not have (IPv6 often) may fail as long as one works.
    int rc = 0, num_open = 0, last_errno = 0;
    for (struct addrinfo *at = found; at && rc == 0; at = at->ai_next) {
        if (port == 0 && num_open > 0)
            break; // another address would get another port
        int fd = open_tcp(at);
        if (fd < 0) {
            last_errno = errno;
            if (errno != EADDRNOTAVAIL && errno != EAFNOSUPPORT)
                break;
            continue;
        }
        if (bound_port)
            *bound_port = bound_port_of(fd);
        rc = add_listener(server, fd, health_only, NULL, err);
        num_open++;
        last_errno = 0;
    }
    freeaddrinfo(found);
    errno = last_errno;
    if (rc == 0 && (num_open == 0 || last_errno))
        rc = error_set_errno(err, "cannot listen on %s port %d", host, port);
    return rc;
}

// ---- a socket in the file system -----------------------------------------------------------------------------------

// Removes what a dead server left at path.
static int remove_stale(const char *path, const struct sockaddr_un *address, struct error *err)
{
    struct stat status;
    if (lstat(path, &status))
        return errno == ENOENT ? 0 : error_set_errno(err, "%s", path);
    if (!S_ISSOCK(status.st_mode))
        return error_set(err, ERR_USAGE, "%s: is there and not a socket, give another path", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set_errno(err, "%s: socket", path);
    int rc = connect(fd, (const struct sockaddr *)address, sizeof *address) ? errno : 0;
    close(fd);
    if (rc != ECONNREFUSED)
        return error_set(err, ERR_USAGE, "%s: another server listens there", path);
    if (unlink(path) && errno != ENOENT)
        return error_set_errno(err, "%s: cannot remove the socket of a server that has ended", path);
    return 0;
}

int http_server_listen_unix(struct http_server *server, const char *path, struct error *err)
{
    static const int send_buffer = HTTP_SEND_BUFFER;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!*path || strlen(path) >= sizeof address.sun_path)
        return error_set(err, ERR_USAGE, "%s: a socket's path has 1 to %zu bytes", path, sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    int rc = remove_stale(path, &address, err);
    if (rc)
        return rc;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_set_errno(err, "%s: socket", path);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof send_buffer);
    // Before bind: the file has this mode from its first moment.
    if (fchmod(fd, 0600) || bind(fd, (struct sockaddr *)&address, sizeof address) || chmod(path, 0600) ||
        listen(fd, SOMAXCONN)) {
        rc = error_set_errno(err, "%s: cannot listen there", path);
        close(fd);
        return rc;
    }
    return add_listener(server, fd, false, path, err);
}

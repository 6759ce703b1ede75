// A client of the API for tests: one request over a connection of its own, its answer taken apart. Include behind cmocka.h.
#ifndef TPSHARD_TESTS_CLIENT_HELP_H
#define TPSHARD_TESTS_CLIENT_HELP_H

#include <arpa/inet.h>
#include <errno.h>
#include <jansson.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine/serve/api_text.h"

static inline int client_connect(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    struct timeval limit = {.tv_sec = 30};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_true(fd >= 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        fail_msg("connect: %s", strerror(errno));
    return fd;
}

static inline void client_send(int fd, const char *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t sent = send(fd, data, bytes, MSG_NOSIGNAL);
        if (sent <= 0)
            return; // the server may have answered already
        data += sent;
        bytes -= (size_t)sent;
    }
}

struct answer {
    int status;
    char *head, *body; // owned; NUL-terminated; chunks put together
    size_t bytes;
    bool complete; // all that the head promises was there
};

static inline void answer_free(struct answer *answer)
{
    free(answer->head);
    free(answer->body);
}

// The value of a header, or NULL; points into head, up to the line's end.
static inline const char *answer_header(const struct answer *answer, const char *name)
{
    const char *line = strcasestr(answer->head, name);
    while (line && (line[-1] != '\n' || line[strlen(name)] != ':'))
        line = strcasestr(line + 1, name);
    return line ? line + strlen(name) + 2 : NULL;
}

static inline bool header_is(const struct answer *answer, const char *name, const char *value)
{
    const char *found = answer_header(answer, name);
    return found && strncmp(found, value, strlen(value)) == 0 && found[strlen(value)] == '\r';
}

static inline bool dechunk(char *body, size_t *bytes)
{
    char *from = body, *to = body, *end = body + *bytes;
    while (from < end) {
        char *line;
        size_t size = strtoul(from, &line, 16);
        if (line == from || line + 2 > end)
            break;
        from = line + 2;
        if (size == 0) {
            *bytes = (size_t)(to - body);
            *to = 0;
            return true;
        }
        if (size + 2 > (size_t)(end - from))
            break;
        memmove(to, from, size);
        to += size;
        from += size + 2;
    }
    *bytes = (size_t)(to - body);
    *to = 0;
    return false;
}

// Reads until the server closes. Only for requests with "Connection: close".
static inline struct answer client_read(int fd)
{
    struct api_text all = {0};
    char part[65536];
    ssize_t got;
    while ((got = recv(fd, part, sizeof part, 0)) > 0)
        api_text_append(&all, part, (size_t)got);
    struct answer answer = {0};
    char *end = all.data ? strstr(all.data, "\r\n\r\n") : NULL;
    if (!end) {
        api_text_free(&all);
        answer.head = strdup("");
        answer.body = strdup("");
        return answer;
    }
    answer.head = strndup(all.data, (size_t)(end - all.data) + 2);
    answer.bytes = all.bytes - (size_t)(end + 4 - all.data);
    answer.body = malloc(answer.bytes + 1);
    memcpy(answer.body, end + 4, answer.bytes);
    answer.body[answer.bytes] = 0;
    answer.status = atoi(all.data + 9);
    const char *length = answer_header(&answer, "Content-Length");
    answer.complete = length ? strtoul(length, NULL, 10) == answer.bytes : true;
    if (answer_header(&answer, "Transfer-Encoding"))
        answer.complete = dechunk(answer.body, &answer.bytes);
    api_text_free(&all);
    return answer;
}

static inline void client_request(int fd, const char *method, const char *path, const char *headers, const char *body)
{
    char *text = NULL;
    int bytes = asprintf(&text, "%s %s HTTP/1.1\r\nHost: t\r\nConnection: close\r\n%sContent-Length: %zu\r\n\r\n%s",
                         method, path, headers, strlen(body), body);
    assert_true(bytes > 0);
    client_send(fd, text, (size_t)bytes);
    free(text);
}

static inline struct answer call(int port, const char *method, const char *path, const char *headers, const char *body)
{
    int fd = client_connect(port);
    client_request(fd, method, path, headers, body);
    struct answer answer = client_read(fd);
    close(fd);
    return answer;
}

static inline json_t *answer_json(const struct answer *answer)
{
    json_error_t error;
    json_t *json = json_loadb(answer->body, answer->bytes, JSON_REJECT_DUPLICATES, &error);
    if (!json)
        fail_msg("%d: not JSON: %s: %.300s", answer->status, error.text, answer->body);
    return json;
}

// A member far inside: "choices.0.message.content".
static inline const json_t *at(const json_t *json, const char *path)
{
    char step[64];
    while (json && *path) {
        size_t bytes = strcspn(path, ".");
        snprintf(step, sizeof step, "%.*s", (int)bytes, path);
        json = json_is_array(json) ? json_array_get(json, (size_t)atoi(step)) : json_object_get(json, step);
        path += bytes + (path[bytes] == '.');
    }
    return json;
}

static inline const char *text_at(const json_t *json, const char *path)
{
    const char *text = json_string_value(at(json, path));
    return text ? text : "(nothing)";
}

static inline int64_t number_at(const json_t *json, const char *path) { return json_integer_value(at(json, path)); }

// The body is an error in OpenAI's shape.
static inline void check_shape(const struct answer *answer)
{
    json_t *json = answer_json(answer);
    const json_t *error = at(json, "error");
    assert_true(json_is_string(at(error, "message")) && json_is_string(at(error, "type")));
    assert_true(json_object_get(error, "param") && json_object_get(error, "code") && json_object_size(error) == 4);
    json_decref(json);
}

#endif

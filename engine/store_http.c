// See store_http.h. Every request takes a connection (an easy handle, which keeps what it has open) from a pool that grows with the threads.
#include "engine/store_http.h"

#include "engine/store_curl.h"
#include "formats/checked.h"
#include "version.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum {
    CONNECT_S = 10,
    STALL_S = 15,
    STALL_BYTES_PER_S = 1000, // less than that for so long is a stall
    RETRIES = 5,
    FIRST_PAUSE_MS = 200, // doubled each time
    RETRY_AFTER_MAX_S = 15,
    MAX_REDIRECTS = 5,
    HEADERS_MAX_BYTES = 64 << 10,     // of all answers to one request
    ERROR_BODY_MAX_BYTES = 64 << 10,  // read, and thrown away, to keep the connection
    RECEIVE_BUFFER_BYTES = 256 << 10, // beyond 128 KiB nothing is gained
    FIRST_ROOM_BYTES = 64 << 10,      // for a file of unknown length
};

struct connection {
    struct connection *next;
    CURL *easy;
};

struct store_http {
    const struct store_curl *curl;
    struct store_url url;
    struct curl_slist *headers;
    const char *ca_file; // NULL: libcurl's own choice
    bool has_token, needs_one_version;
    atomic_bool cancelled;
    long connect_s, stall_s, pause_ms;
    atomic_bool reached; // the server has answered before
    pthread_mutex_t mutex;
    struct connection *idle;
};

struct store_http_file {
    struct store_http *http;
    char *url, *shown;
    uint64_t bytes;
    atomic_bool cancelled;
    _Atomic uint64_t fetched_bytes;
    pthread_mutex_t mutex;
    char etag[256], modified[64]; // of its first answer; "": it had none
};

// The head of an answer, as far as it matters.
struct answer {
    int status;
    int64_t length;              // of the body; -1: not told
    int ranges;                  // how many Content-Range lines
    uint64_t first, last, total; // total UINT64_MAX: not told
    char encoding[32], etag[256], modified[64];
};

// One file or range on its way, through all its repetitions.
struct transfer {
    struct store_http *http;
    struct store_http_file *file; // NULL: a whole file is asked for
    const char *url, *shown;
    uint8_t *buffer;
    uint64_t room;          // of buffer, without the NUL of whole files
    uint64_t begin, wanted; // of a range; of a whole file wanted is the most that is accepted
    uint64_t done;          // bytes in place
    // of the request under way
    struct answer answer;
    enum { HEADERS, TAKING, DRAINING } state;
    uint64_t left; // bytes that the answer's body still has; UINT64_MAX: not told
    uint64_t header_bytes, drained_bytes;
    char reason[CURL_ERROR_SIZE];
    // how it failed
    int rc;
    bool again; // trying again may help
    struct error err;
};

// ---- failing -------------------------------------------------------------------------------------------------------

// Returns the code. The sentence begins with the file's URL.
#define FAIL(t, may_help, code, fmt, ...)                                                                              \
    ((t)->again = (may_help), (t)->rc = error_set(&(t)->err, code, "%s: " fmt, (t)->shown, ##__VA_ARGS__))

static int fail_status(struct transfer *t)
{
    int status = t->answer.status;
    switch (status) {
    case 401:
        return t->http->has_token ? FAIL(t, false, ERR_IO, "the server does not accept the token (HTTP 401)")
                                  : FAIL(t, false, ERR_IO, "the server wants a token (HTTP 401); set TPENGINE_TOKEN");
    case 403:
        return FAIL(t, false, ERR_IO, "the server denies access (HTTP 403); check the URL and %s",
                    t->http->has_token ? "what the token allows" : "whether it wants a token (TPENGINE_TOKEN)");
    case 404:
    case 410:
        return FAIL(t, false, ERR_IO, "the server has no such file (HTTP %d); is this the URL of a shard directory?",
                    status);
    case 416:
        return FAIL(t, false, ERR_CORRUPT,
                    "the file there is shorter than the manifest says (HTTP 416); publish the directory anew");
    default:
        if (status == 408 || status == 429 || status >= 500)
            return FAIL(t, true, ERR_IO, "the server answers HTTP %d", status);
        return FAIL(t, false, ERR_IO, "the server answers HTTP %d, which is no answer to this request", status);
    }
}

static int fail_transfer(struct transfer *t, CURLcode code)
{
    const char *reason = *t->reason ? t->reason : t->http->curl->easy_strerror(code);
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT: // before anything was reached, a wrong URL is likelier than a passing trouble
        return FAIL(t, t->file || atomic_load(&t->http->reached), ERR_IO, "no connection to the server: %s", reason);
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_PARTIAL_FILE:
    case CURLE_SSL_CONNECT_ERROR:
        return FAIL(t, true, ERR_IO, "the answer broke off: %s", reason);
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
        return FAIL(t, false, ERR_IO,
                    "the server's certificate is not trusted: %s; Debian keeps the usual authorities in "
                    "ca-certificates, others go "
                    "into the file that SSL_CERT_FILE names",
                    reason);
    case CURLE_TOO_MANY_REDIRECTS:
        return FAIL(t, false, ERR_IO, "the server redirects more than %d times", MAX_REDIRECTS);
    case CURLE_UNSUPPORTED_PROTOCOL:
        return FAIL(t, false, ERR_IO, "the server redirects where %s must not lead: %s",
                    t->http->url.is_tls ? "https" : "http", reason);
    case CURLE_OUT_OF_MEMORY: // libcurl's word for a line of headers beyond 100 KB as well
        return t->header_bytes && t->state == HEADERS
                   ? FAIL(t, false, ERR_IO, "no memory for the answer, or the server sends a header without end")
                   : FAIL(t, false, ERR_MEMORY, "no memory for the answer");
    default:
        return FAIL(t, false, ERR_IO, "the request failed: %s", reason);
    }
}

static bool is_cancelled(const struct transfer *t)
{
    return atomic_load_explicit(t->file ? &t->file->cancelled : &t->http->cancelled, memory_order_relaxed);
}

// ---- the head of an answer -----------------------------------------------------------------------------------------

// Decimal digits from *text on, up to `end`; moves behind it.
static bool read_number(const char **text, char end, uint64_t *value)
{
    const char *c = *text;
    for (*value = 0; *c >= '0' && *c <= '9'; c++)
        if (!checked_mul(*value, 10, value) || !checked_add(*value, (uint64_t)(*c - '0'), value))
            return false;
    if (c == *text || *c != end)
        return false;
    *text = c + (end != 0);
    return true;
}

// "bytes 0-99/1000" or "bytes 0-99/*"
static bool read_content_range(struct answer *answer, const char *value)
{
    if (strncasecmp(value, "bytes ", 6) != 0)
        return false;
    value += 6;
    answer->total = UINT64_MAX;
    return read_number(&value, '-', &answer->first) && read_number(&value, '/', &answer->last) &&
           (strcmp(value, "*") == 0 || read_number(&value, 0, &answer->total)) && answer->first <= answer->last;
}

static void copy(char *to, size_t bytes, const char *text) { snprintf(to, bytes, "%s", text); }

static bool is_name(const char *line, size_t bytes, const char *name)
{
    return bytes == strlen(name) && strncasecmp(line, name, bytes) == 0;
}

// One line without its end. Lines that are too long for `line` were cut: none of those that matter is.
static int read_header(struct transfer *t, const char *line)
{
    struct answer *answer = &t->answer;
    uint64_t number;
    if (strncmp(line, "HTTP/", 5) == 0) { // of a redirect's target, or after 100
        const char *status = strchr(line, ' ');
        *answer = (struct answer){.status = status ? atoi(status) : 0, .length = -1};
        return 0;
    }
    const char *value = strchr(line, ':');
    if (!value)
        return 0;
    size_t name = (size_t)(value - line);
    value += 1 + strspn(value + 1, " \t");
    if (is_name(line, name, "Content-Length")) {
        if (!read_number(&value, 0, &number) || number > INT64_MAX ||
            (answer->length >= 0 && answer->length != (int64_t)number))
            return FAIL(t, false, ERR_IO, "the server sends no usable Content-Length");
        answer->length = (int64_t)number;
    } else if (is_name(line, name, "Content-Range")) {
        answer->ranges += 1 + !read_content_range(answer, value); // a bad one counts twice
    } else if (is_name(line, name, "Content-Encoding")) {
        copy(answer->encoding, sizeof answer->encoding, value);
    } else if (is_name(line, name, "ETag")) {
        copy(answer->etag, sizeof answer->etag, value);
    } else if (is_name(line, name, "Last-Modified")) {
        copy(answer->modified, sizeof answer->modified, value);
    }
    return 0;
}

static size_t on_header(char *bytes, size_t size, size_t count, void *arg)
{
    struct transfer *t = arg;
    char line[512];
    size_t num_bytes = size * count, length = num_bytes < sizeof line ? num_bytes : sizeof line - 1;
    t->header_bytes += num_bytes;
    if (t->header_bytes > HEADERS_MAX_BYTES) {
        FAIL(t, false, ERR_IO, "the server sends more than %d bytes of headers", HEADERS_MAX_BYTES);
        return 0;
    }
    memcpy(line, bytes, length);
    while (length && strchr(" \t\r\n", line[length - 1]))
        length--;
    line[length] = 0;
    return read_header(t, line) ? 0 : num_bytes;
}

// The first answer's marks are every later one's: ETag, or where it has none Last-Modified. If-Range is not sent: what it does on top
// is to make a server send all of a file that has changed.
static int check_unchanged(struct transfer *t)
{
    struct store_http_file *file = t->file;
    const struct answer *a = &t->answer;
    bool changed = false;
    if (!t->http->needs_one_version)
        return 0;
    pthread_mutex_lock(&file->mutex);
    if (!*file->etag && !*file->modified) {
        copy(file->etag, sizeof file->etag, a->etag);
        copy(file->modified, sizeof file->modified, a->modified);
    } else if (*file->etag && *a->etag) {
        changed = strcmp(file->etag, a->etag) != 0;
    } else if (!*file->etag && *a->modified) {
        changed = strcmp(file->modified, a->modified) != 0;
    }
    pthread_mutex_unlock(&file->mutex);
    return changed ? FAIL(t, false, ERR_CORRUPT, "the file on the server was changed while it was read; start again")
                   : 0;
}

// The answer to a range. Fewer bytes than asked for are allowed; the rest is then asked for again.
static int check_range(struct transfer *t)
{
    const struct answer *a = &t->answer;
    uint64_t begin = t->begin + t->done, end = t->begin + t->wanted; // what was asked for
    bool is_all = begin == 0 && end == t->file->bytes;
    if (a->status == 200) {
        if (!is_all)
            return FAIL(t, false, ERR_IO,
                        "the server answers a request for bytes %" PRIu64 "-%" PRIu64
                        " with the whole file (HTTP 200); put the "
                        "directory on a server that knows ranges",
                        begin, end - 1);
        if (a->length >= 0 && (uint64_t)a->length != t->file->bytes)
            return FAIL(t, false, ERR_CORRUPT, "the file there has %" PRId64 " bytes, the manifest says %" PRIu64,
                        a->length, t->file->bytes);
        t->left = end;
        return 0;
    }
    if (a->ranges != 1 || a->first != begin || a->last >= end)
        return FAIL(t, false, ERR_IO,
                    "the server answers a request for bytes %" PRIu64 "-%" PRIu64
                    " with others, or does not say with which "
                    "(Content-Range)",
                    begin, end - 1);
    if (a->total != UINT64_MAX && a->total != t->file->bytes)
        return FAIL(t, false, ERR_CORRUPT,
                    "the file there has %" PRIu64 " bytes, the manifest says %" PRIu64 "; publish the directory anew",
                    a->total, t->file->bytes);
    t->left = a->last - a->first + 1;
    if (a->length >= 0 && (uint64_t)a->length != t->left)
        return FAIL(t, false, ERR_IO, "the server's Content-Length and Content-Range do not agree");
    return 0;
}

static int give_room(struct transfer *t, uint64_t room)
{
    uint8_t *larger = realloc(t->buffer, room + 1);
    if (!larger)
        return FAIL(t, false, ERR_MEMORY, "no memory for %" PRIu64 " bytes", room);
    t->buffer = larger;
    t->room = room;
    return 0;
}

static int fail_too_long(struct transfer *t)
{
    return t->file ? FAIL(t, false, ERR_IO, "the server sends more bytes than were asked for")
                   : FAIL(t, false, ERR_CORRUPT, "has more than the %" PRIu64 " bytes that are accepted", t->wanted);
}

static int check_whole(struct transfer *t)
{
    const struct answer *a = &t->answer;
    if (a->status != 200)
        return FAIL(t, false, ERR_IO, "the server answers with a part of the file (HTTP 206), which was not asked for");
    if (a->length > 0 && (uint64_t)a->length > t->wanted)
        return fail_too_long(t);
    t->left = a->length >= 0 ? (uint64_t)a->length : UINT64_MAX;
    uint64_t first_room = t->wanted < FIRST_ROOM_BYTES ? t->wanted : FIRST_ROOM_BYTES;
    return give_room(t, a->length >= 0 ? t->left : first_room);
}

// Called once, before the first byte of a body, or at the end of an empty one.
static int check_answer(struct transfer *t)
{
    const struct answer *a = &t->answer;
    if (a->status != 200 && a->status != 206) {
        t->state = DRAINING;
        return 0;
    }
    t->state = TAKING;
    if (*a->encoding && strcasecmp(a->encoding, "identity") != 0)
        return FAIL(t, false, ERR_IO,
                    "the server sends the file in the encoding '%s', which was not asked for; switch compression off "
                    "for the directory",
                    a->encoding);
    if (!t->file)
        return check_whole(t);
    int rc = check_unchanged(t);
    return rc ? rc : check_range(t);
}

// ---- the body ------------------------------------------------------------------------------------------------------

static int take(struct transfer *t, const void *bytes, uint64_t num_bytes)
{
    if (num_bytes > t->left || num_bytes > t->wanted - t->done)
        return fail_too_long(t);
    if (num_bytes > t->room - t->done) { // of a whole file
        uint64_t room = t->room * 2 > t->done + num_bytes ? t->room * 2 : t->done + num_bytes;
        if (give_room(t, room < t->wanted ? room : t->wanted))
            return t->rc;
    }
    memcpy(t->buffer + t->done, bytes, num_bytes);
    t->done += num_bytes;
    if (t->left != UINT64_MAX)
        t->left -= num_bytes;
    if (t->file)
        atomic_fetch_add_explicit(&t->file->fetched_bytes, num_bytes, memory_order_relaxed);
    return 0;
}

static size_t on_body(char *bytes, size_t size, size_t count, void *arg)
{
    struct transfer *t = arg;
    size_t num_bytes = size * count;
    if (t->state == HEADERS && check_answer(t))
        return 0;
    if (t->state == TAKING)
        return take(t, bytes, num_bytes) ? 0 : num_bytes;
    t->drained_bytes += num_bytes;
    return t->drained_bytes > ERROR_BODY_MAX_BYTES ? 0 : num_bytes;
}

static int on_progress(void *arg, curl_off_t to_receive, curl_off_t received, curl_off_t to_send, curl_off_t sent)
{
    (void)to_receive, (void)received, (void)to_send, (void)sent;
    return is_cancelled(arg);
}

// ---- requests ------------------------------------------------------------------------------------------------------

static struct connection *take_connection(struct store_http *http)
{
    pthread_mutex_lock(&http->mutex);
    struct connection *connection = http->idle;
    if (connection)
        http->idle = connection->next;
    pthread_mutex_unlock(&http->mutex);
    if (connection || !(connection = calloc(1, sizeof *connection)))
        return connection;
    if (!(connection->easy = http->curl->easy_init())) {
        free(connection);
        return NULL;
    }
    return connection;
}

static void give_connection(struct store_http *http, struct connection *connection)
{
    pthread_mutex_lock(&http->mutex);
    connection->next = http->idle;
    http->idle = connection;
    pthread_mutex_unlock(&http->mutex);
}

static CURLcode set_options(struct transfer *t, CURL *easy)
{
    const struct store_http *http = t->http;
    CURLcode (*set)(CURL *, CURLoption, ...) = http->curl->easy_setopt;
    char range[48];
    int rc = 0;
    rc |= (int)set(easy, CURLOPT_URL, t->url);
    rc |= (int)set(easy, CURLOPT_NOSIGNAL, 1L);
    rc |= (int)set(easy, CURLOPT_ERRORBUFFER, t->reason);
    rc |= (int)set(easy, CURLOPT_HTTP_VERSION,
                   (long)CURL_HTTP_VERSION_1_1); // one range a connection: nothing to multiplex
    rc |= (int)set(easy, CURLOPT_USERAGENT, "tpengine/" TPSHARD_VERSION);
    rc |= (int)set(easy, CURLOPT_HTTPHEADER, http->headers);
    rc |= (int)set(easy, CURLOPT_FOLLOWLOCATION, 1L);
    rc |= (int)set(easy, CURLOPT_MAXREDIRS, (long)MAX_REDIRECTS);
#if LIBCURL_VERSION_NUM >= 0x075500
    rc |= (int)set(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    rc |= (int)set(easy, CURLOPT_REDIR_PROTOCOLS_STR, http->url.is_tls ? "https" : "http,https");
#else
    rc |= (int)set(easy, CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
    rc |= (int)set(easy, CURLOPT_REDIR_PROTOCOLS,
                   (long)(http->url.is_tls ? CURLPROTO_HTTPS : CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
    rc |= (int)set(easy, CURLOPT_SSL_VERIFYPEER, 1L);
    rc |= (int)set(easy, CURLOPT_SSL_VERIFYHOST, 2L);
    if (http->ca_file)
        rc |= (int)set(easy, CURLOPT_CAINFO, http->ca_file);
    rc |= (int)set(easy, CURLOPT_CONNECTTIMEOUT, http->connect_s);
    rc |= (int)set(easy, CURLOPT_LOW_SPEED_LIMIT, (long)STALL_BYTES_PER_S);
    rc |= (int)set(easy, CURLOPT_LOW_SPEED_TIME, http->stall_s);
    rc |= (int)set(easy, CURLOPT_TCP_KEEPALIVE, 1L);
    rc |= (int)set(easy, CURLOPT_BUFFERSIZE, (long)RECEIVE_BUFFER_BYTES);
    rc |= (int)set(easy, CURLOPT_HEADERFUNCTION, on_header);
    rc |= (int)set(easy, CURLOPT_HEADERDATA, t);
    rc |= (int)set(easy, CURLOPT_WRITEFUNCTION, on_body);
    rc |= (int)set(easy, CURLOPT_WRITEDATA, t);
    rc |= (int)set(easy, CURLOPT_XFERINFOFUNCTION, on_progress);
    rc |= (int)set(easy, CURLOPT_XFERINFODATA, t);
    rc |= (int)set(easy, CURLOPT_NOPROGRESS, 0L);
    if (t->file) {
        snprintf(range, sizeof range, "%" PRIu64 "-%" PRIu64, t->begin + t->done, t->begin + t->wanted - 1);
        rc |= (int)set(easy, CURLOPT_RANGE, range);
    }
    return rc ? CURLE_FAILED_INIT : CURLE_OK;
}

// What an answer that libcurl is done with comes to.
static int conclude(struct transfer *t, CURLcode code)
{
    if (is_cancelled(t))
        return FAIL(t, false, ERR_IO, "the read was given up");
    if (t->rc)
        return t->rc;
    if (t->answer.status)
        atomic_store(&t->http->reached, true);
    if (code == CURLE_OK && t->state == HEADERS && check_answer(t)) // it has no body
        return t->rc;
    if (t->state == DRAINING)
        return fail_status(t);
    if (code != CURLE_OK)
        return fail_transfer(t, code);
    if (t->file ? t->done < t->wanted : t->left != 0 && t->left != UINT64_MAX)
        return FAIL(t, true, ERR_IO, "the answer is shorter than it should be");
    return 0;
}

// One request. *retry_after_s: what the server asks for.
static int request(struct transfer *t, int64_t *retry_after_s)
{
    const struct store_curl *curl = t->http->curl;
    struct connection *connection = take_connection(t->http);
    if (!connection)
        return FAIL(t, false, ERR_MEMORY, "no memory for a connection");
    t->answer = (struct answer){.length = -1};
    t->state = HEADERS;
    t->header_bytes = t->drained_bytes = 0;
    *t->reason = 0;
    t->rc = 0;
    if (!t->file)
        t->done = 0;
    curl->easy_reset(connection->easy); // keeps what is open
    int rc;
    if (set_options(t, connection->easy)) {
        rc = FAIL(t, false, ERR_IO, "libcurl is too old, or there is no memory");
    } else {
        const sigset_t before = store_curl_enter();
        CURLcode code = curl->easy_perform(connection->easy);
        store_curl_leave(&before);
        rc = conclude(t, code);
    }
    curl_off_t seconds = 0;
    curl->easy_getinfo(connection->easy, CURLINFO_RETRY_AFTER, &seconds);
    *retry_after_s = seconds;
    give_connection(t->http, connection);
    return rc;
}

// Waits in slices, so that it can be cancelled. Half of the pause to one and a half: those who failed together do not come back together.
static void wait_before(const struct transfer *t, int repetition, int64_t retry_after_s)
{
    static atomic_uint_fast64_t calls;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t mixed =
        ((uint64_t)now.tv_nsec ^ atomic_fetch_add(&calls, 1) << 32 ^ (uint64_t)(uintptr_t)t) * 0x9E3779B97F4A7C15u;
    int64_t pause_ms = (int64_t)t->http->pause_ms << repetition;
    pause_ms = pause_ms / 2 + (int64_t)((mixed >> 33) % (uint64_t)(pause_ms + 1));
    int64_t asked_ms = 1000 * (retry_after_s < RETRY_AFTER_MAX_S ? retry_after_s : RETRY_AFTER_MAX_S);
    for (int64_t left = pause_ms > asked_ms ? pause_ms : asked_ms; left > 0 && !is_cancelled(t); left -= 20)
        nanosleep(&(struct timespec){.tv_nsec = (left < 20 ? left : 20) * 1000000}, NULL);
}

static int run(struct transfer *t, struct error *err)
{
    int64_t retry_after_s = 0;
    int rc = request(t, &retry_after_s);
    for (int i = 0; i < RETRIES && rc && t->again && !is_cancelled(t); i++) {
        wait_before(t, i, retry_after_s);
        rc = request(t, &retry_after_s);
    }
    if (!rc)
        return 0;
    return t->again ? error_set(err, rc, "%s; tried %d times, try again later", t->err.msg, RETRIES + 1)
                    : error_set(err, rc, "%s", t->err.msg);
}

// ---- opening -------------------------------------------------------------------------------------------------------

static int add_header(struct store_http *http, const char *line, struct error *err)
{
    struct curl_slist *longer = http->curl->slist_append(http->headers, line);
    if (!longer)
        return error_set(err, ERR_MEMORY, "no memory for a request's headers");
    http->headers = longer;
    return 0;
}

static int add_token(struct store_http *http, const char *token, struct error *err)
{
    char *line;
    if (strpbrk(token, "\r\n") || !*token)
        return error_set(err, ERR_USAGE, "the token for %s is empty or has several lines", http->url.shown);
    if (asprintf(&line, "Authorization: Bearer %s", token) < 0)
        return error_set(err, ERR_MEMORY, "no memory for a request's headers");
    int rc = add_header(http, line, err);
    explicit_bzero(line, strlen(line));
    free(line);
    http->has_token = true;
    return rc;
}

int store_http_open(struct store_http **out, struct store_url url, const struct store_options *options,
                    struct error *err)
{
    int rc;
    struct store_http *http = calloc(1, sizeof *http);
    if (!http) {
        store_url_clear(&url);
        return error_set(err, ERR_MEMORY, "no memory for a URL");
    }
    http->url = url;
    http->needs_one_version = options->needs_one_version;
    http->connect_s = options->connect_s ? options->connect_s : CONNECT_S;
    http->stall_s = options->stall_s ? options->stall_s : STALL_S;
    http->pause_ms = options->pause_ms ? options->pause_ms : FIRST_PAUSE_MS;
    http->ca_file = getenv("SSL_CERT_FILE"); // as other programs do; libcurl itself does not read it
    if (http->ca_file && !*http->ca_file)
        http->ca_file = NULL;
    pthread_mutex_init(&http->mutex, NULL);
    if ((rc = store_curl_load(&http->curl, err)) || (rc = add_header(http, "Accept-Encoding: identity", err)) ||
        (options->bearer_token && (rc = add_token(http, options->bearer_token, err))))
        goto fail;
    *out = http;
    return 0;
fail:
    store_http_close(http);
    return rc;
}

void store_http_close(struct store_http *http)
{
    if (!http)
        return;
    const sigset_t before = store_curl_enter();
    for (struct connection *next; http->idle; http->idle = next) {
        next = http->idle->next;
        http->curl->easy_cleanup(http->idle->easy);
        free(http->idle);
    }
    store_curl_leave(&before);
    if (http->headers)
        http->curl->slist_free_all(http->headers);
    pthread_mutex_destroy(&http->mutex);
    store_url_clear(&http->url);
    free(http);
}

void store_http_cancel(struct store_http *http) { atomic_store(&http->cancelled, true); }

const char *store_http_place(const struct store_http *http) { return http->url.shown; }

int store_http_get(struct store_http *http, uint8_t **out, uint64_t *num_bytes, const char *name, uint64_t cap_bytes,
                   struct error *err)
{
    struct store_http_file *names; // its URL alone is used
    int rc = store_http_file_open(&names, http, name, 0, err);
    if (rc)
        return rc;
    struct transfer t = {.http = http, .url = names->url, .shown = names->shown, .wanted = cap_bytes};
    if ((rc = run(&t, err)) == 0) {
        t.buffer[t.done] = 0;
        *out = t.buffer;
        *num_bytes = t.done;
    } else {
        free(t.buffer);
    }
    store_http_file_close(names);
    return rc;
}

int store_http_file_open(struct store_http_file **out, struct store_http *http, const char *name, uint64_t file_bytes,
                         struct error *err)
{
    struct store_http_file *file = calloc(1, sizeof *file);
    if (!file)
        return error_set(err, ERR_MEMORY, "%s: no memory for a file", http->url.shown);
    pthread_mutex_init(&file->mutex, NULL);
    file->http = http;
    file->bytes = file_bytes;
    file->url = store_url_of(&http->url, name);
    if (!file->url || asprintf(&file->shown, "%s/%s", http->url.shown, name) < 0) {
        file->shown = NULL;
        store_http_file_close(file);
        return error_set(err, ERR_MEMORY, "%s: no memory for a file", http->url.shown);
    }
    *out = file;
    return 0;
}

void store_http_file_close(struct store_http_file *file)
{
    if (!file)
        return;
    pthread_mutex_destroy(&file->mutex);
    free(file->url);
    free(file->shown);
    free(file);
}

const char *store_http_file_name(const struct store_http_file *file) { return file->shown; }

int store_http_file_read(struct store_http_file *file, void *buffer, uint64_t num_bytes, uint64_t offset,
                         struct error *err)
{
    if (!checked_range(offset, num_bytes, file->bytes))
        return error_set(err, ERR_CORRUPT, "%s: %" PRIu64 " bytes at offset %" PRIu64 " lie beyond its end",
                         file->shown, num_bytes, offset);
    struct transfer t = {.http = file->http,
                         .file = file,
                         .url = file->url,
                         .shown = file->shown,
                         .buffer = buffer,
                         .room = num_bytes,
                         .begin = offset,
                         .wanted = num_bytes};
    return num_bytes ? run(&t, err) : 0;
}

void store_http_file_cancel(struct store_http_file *file) { atomic_store(&file->cancelled, true); }

uint64_t store_http_file_fetched_bytes(const struct store_http_file *file)
{
    return atomic_load_explicit(&file->fetched_bytes, memory_order_relaxed);
}

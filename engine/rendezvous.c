// Ranks of several processes find each other. See rendezvous.h, and rendezvous_wire.h for what they say.
//
// First all others join rank 0 (join_all, join). Then each rank calls all lower ones, in their order, and afterwards takes the
// calls of the higher ones: rank 0 takes calls from the start, so rank 1 does soon, and so on; nobody waits in a circle, and
// calls that come early wait in the listener's queue.
#include "engine/rendezvous_internal.h"

#include "engine/socket_user.h"
#include "kernels/clock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    FAIL_MS = 5000, // to tell others why this rank cannot come
    ASK_MS = 2000,  // to ask who listens in this one's place
};

// ---- sockets ---------------------------------------------------------------------------------------------------

int meet_wait(int fd, short events, int64_t until_ns)
{
    for (;;) {
        int64_t left_ns = until_ns - clock_now_ns();
        struct pollfd poller = {.fd = fd, .events = events};
        int n = poll(&poller, 1, left_ns > 0 ? (int)(left_ns / 1000000) + 1 : 0);
        if (n > 0 || (n == 0 && left_ns <= 0))
            return n;
        if (n < 0 && errno != EINTR)
            return -1;
    }
}

int meet_read(int fd, void *to, size_t bytes, int64_t until_ns)
{
    for (size_t got = 0; got < bytes;) {
        ssize_t n = recv(fd, (uint8_t *)to + got, bytes - got, MSG_DONTWAIT);
        if (n > 0) {
            got += (size_t)n;
            continue;
        }
        if (n == 0)
            return MEET_CLOSED;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return MEET_CLOSED;
        if (meet_wait(fd, POLLIN, until_ns) <= 0)
            return MEET_LATE;
    }
    return 0;
}

int meet_write(int fd, const void *from, size_t bytes, int64_t until_ns)
{
    for (size_t put = 0; put < bytes;) {
        ssize_t n = send(fd, (const uint8_t *)from + put, bytes - put, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            put += (size_t)n;
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
            return MEET_CLOSED;
        if (meet_wait(fd, POLLOUT, until_ns) <= 0)
            return MEET_LATE;
    }
    return 0;
}

void meet_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void meet_name(char name[MEET_NAME_BYTES], const struct sockaddr_storage *address)
{
    char host[INET6_ADDRSTRLEN] = "?";
    if (address->ss_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, host, sizeof host);
    else if (address->ss_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)address)->sin_addr, host, sizeof host);
    snprintf(name, MEET_NAME_BYTES, "%s", host);
}

int meet_port(const struct sockaddr_storage *a)
{
    return ntohs(a->ss_family == AF_INET6 ? ((const struct sockaddr_in6 *)(const void *)a)->sin6_port
                                          : ((const struct sockaddr_in *)(const void *)a)->sin_port);
}

void meet_set_port(struct sockaddr_storage *a, int port)
{
    if (a->ss_family == AF_INET6)
        ((struct sockaddr_in6 *)(void *)a)->sin6_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in *)(void *)a)->sin_port = htons((uint16_t)port);
}

bool meet_is_loopback(const struct sockaddr_storage *a)
{
    if (a->ss_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr) >> 24 == 127;
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127);
}

socklen_t meet_address_bytes(const struct sockaddr_storage *a)
{
    return a->ss_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
}

// In a user namespace everybody who is not of it has one number.
static bool stands_for_many(uid_t user)
{
    unsigned number = 65534;
    FILE *f = fopen("/proc/sys/kernel/overflowuid", "re");
    if (f && fscanf(f, "%u", &number) != 1)
        number = 65534;
    if (f)
        fclose(f);
    return user == (uid_t)number;
}

int meet_check_user(const struct meeting *m, int fd, struct error *err)
{
    struct error found;
    uid_t user;
    if (m->options->token)
        return 0;
    if (socket_user(fd, &user, &found))
        return error_set(err, ERR_RANK, "%s; give all ranks the same --token-file or TPENGINE_RANK_TOKEN", found.msg);
    if (user == geteuid() && !stands_for_many(user))
        return 0;
    return error_set(
        err, ERR_RANK,
        "it is a process of user %u, and without a token all ranks are of one known user, here %u: give all "
        "ranks the same --token-file or TPENGINE_RANK_TOKEN",
        (unsigned)user, (unsigned)geteuid());
}

// ---- calling ---------------------------------------------------------------------------------------------------

// 0, or MEET_LATE, MEET_CLOSED where it may be tried again.
static int try_connect(int *out, const struct sockaddr_storage *address, int64_t until_ns)
{
    int yes = 1, failed = 0;
    socklen_t bytes = sizeof failed;
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return MEET_CLOSED;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(fd, (const struct sockaddr *)address, meet_address_bytes(address)) != 0) {
        if (errno != EINPROGRESS) {
            close(fd);
            return MEET_CLOSED;
        }
        int ready = meet_wait(fd, POLLOUT, until_ns);
        if (ready <= 0 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &bytes) != 0 || failed) {
            close(fd);
            errno = failed;
            return ready <= 0 ? MEET_LATE : MEET_CLOSED;
        }
    }
    *out = fd;
    return 0;
}

// Connects, takes the challenge and says hello.
int meet_knock(const struct meeting *m, const struct sockaddr_storage *address, struct meet_hello *hello, int *out,
               struct error *err)
{
    int64_t until_ns = clock_now_ns() + MEET_CALL_NS;
    struct meet_challenge challenge;
    int fd = -1, rc;
    until_ns = until_ns < m->until_ns ? until_ns : m->until_ns;
    if ((rc = try_connect(&fd, address, until_ns)) || (rc = meet_read(fd, &challenge, sizeof challenge, until_ns)))
        goto fail;
    if (memcmp(challenge.magic, MEET_CHALLENGE, sizeof challenge.magic) != 0) {
        char name[MEET_NAME_BYTES];
        meet_name(name, address);
        rc = error_set(err, ERR_RANK, "what listens at %s port %d is no rank of this version; give another --master",
                       name, meet_port(address));
        goto fail;
    }
    struct error foreign;
    if (meet_check_user(m, fd, &foreign)) {
        char name[MEET_NAME_BYTES];
        meet_name(name, address);
        rc = meet_wait(fd, POLLRDHUP, 0) > 0 // it may just have ended
                 ? MEET_CLOSED
                 : error_set(err, ERR_RANK, "what listens at %s port %d: %s", name, meet_port(address), foreign.msg);
        goto fail;
    }
    if ((rc = meet_nonce(hello->nonce, err)))
        goto fail;
    meet_hello_seal(hello, m->key, challenge.nonce);
    if ((rc = meet_write(fd, hello, sizeof *hello, until_ns)))
        goto fail;
    *out = fd;
    return 0;
fail:
    meet_close(&fd);
    return rc;
}

// Reads an answer and what follows it into buffer [MEET_ANSWER_MAX_BYTES]. who: "rank 0 at ...". MEET_CLOSED, MEET_LATE: there
// is none.
static int take_answer(const struct meeting *m, int fd, const struct meet_hello *hello, const char *who, bool *noted,
                       uint8_t *buffer, struct error *err)
{
    struct meet_answer *answer = (struct meet_answer *)(void *)buffer;
    struct error found;
    size_t rest;
    int rc;
    while ((rc = meet_read(fd, answer->magic, sizeof answer->magic, m->until_ns)) == 0 &&
           memcmp(answer->magic, MEET_NOTED, sizeof answer->magic) == 0)
        *noted = true;
    if (rc || (rc = meet_read(fd, buffer + sizeof answer->magic, sizeof *answer - sizeof answer->magic, m->until_ns)))
        return rc;
    if (meet_answer_rest(answer, &rest, &found))
        return error_set(err, ERR_RANK, "%s: %s", who, found.msg);
    if ((rc = meet_read(fd, buffer + sizeof *answer, rest, m->until_ns)))
        return rc;
    if (!meet_answer_is_genuine(buffer, sizeof *answer + rest, m->key, hello->nonce))
        return error_set(err, ERR_RANK,
                         "%s has another token than rank %d, or is of another job of %s: give all ranks the same "
                         "--token-file or TPENGINE_RANK_TOKEN",
                         who, m->rank, m->options->place->launcher);
    if (answer->code)
        return error_set(err, answer->code, "%s", answer->sentence);
    return 0;
}

int meet_last_word(struct meeting *m, struct error *err)
{
    _Alignas(8) uint8_t buffer[MEET_ANSWER_MAX_BYTES];
    struct pollfd poller = {.fd = m->out->control[0], .events = POLLRDHUP};
    bool noted;
    if (poll(&poller, 1, 0) <= 0)
        return 0;
    int rc = take_answer(m, m->out->control[0], &m->joined, "rank 0", &noted, buffer, err);
    return rc < 0 ? rc : error_set(err, ERR_RANK, "rank 0 has ended while the ranks met");
}

void meet_fill_hello(const struct meeting *m, struct meet_hello *hello, enum meet_purpose purpose, int to)
{
    memset(hello, 0, sizeof *hello);
    memcpy(hello->magic, MEET_HELLO, sizeof hello->magic);
    memcpy(hello->contract, m->options->contract, sizeof hello->contract);
    hello->purpose = purpose;
    hello->rank = (uint32_t)m->rank;
    hello->to = (uint32_t)to;
    hello->world = (uint32_t)m->world;
    hello->tp_size = (uint32_t)m->options->tp_size;
    hello->pp_size = (uint32_t)m->options->pp_size;
    hello->port = (uint32_t)m->port;
    if (purpose == MEET_JOIN && m->options->offer_bytes)
        memcpy(hello->offer, m->options->offer, m->options->offer_bytes);
    snprintf(hello->version, sizeof hello->version, "%s", m->options->version);
}

static void rest_between_tries(const struct meeting *m, int *pause_ms)
{
    int64_t left_ns = m->until_ns - clock_now_ns(), left_ms = left_ns > 0 ? left_ns / 1000000 + 1 : 0;
    poll(NULL, 0, *pause_ms < left_ms ? *pause_ms : (int)left_ms);
    *pause_ms = *pause_ms * 2 < MEET_PAUSE_MAX_MS ? *pause_ms * 2 : MEET_PAUSE_MAX_MS;
}

static int nobody(const struct meeting *m, const char *who, int last, struct error *err)
{
    return error_set(err, ERR_RANK, "%s was not reached by rank %d within %.1f s (%s)", who, m->rank,
                     m->options->timeout_ms / 1000.0,
                     last == MEET_LATE ? "it does not answer" : "nobody listens there, or the connection was closed");
}

// Until there is an answer, or the deadline has passed. resolve: the address is looked up before each try (names may come late).
static int call(struct meeting *m, struct sockaddr_storage *address, bool resolve, enum meet_purpose purpose, int to,
                uint8_t *buffer, int *out, struct error *err)
{
    struct meet_hello hello;
    char who[LAUNCHER_HOST_BYTES + 64], name[MEET_NAME_BYTES];
    bool noted = false;
    int pause_ms = MEET_PAUSE_MS, rc = MEET_CLOSED, fd = -1, ended;
    for (;; rest_between_tries(m, &pause_ms)) {
        bool found = !resolve || meet_resolve(m, address, false, NULL) == 0;
        meet_name(name, address);
        if (resolve)
            snprintf(who, sizeof who, "rank 0 at %s port %d", m->options->place->host, m->options->place->port);
        else
            snprintf(who, sizeof who, "rank %d at %s port %d", to, name, meet_port(address));
        meet_fill_hello(m, &hello, purpose, to);
        if (found && (rc = meet_knock(m, address, &hello, &fd, err)) == 0 &&
            (rc = take_answer(m, fd, &hello, who, &noted, buffer, err)) == 0) {
            *out = fd;
            m->joined = purpose == MEET_JOIN ? hello : m->joined;
            return 0;
        }
        meet_close(&fd);
        if (rc < 0)
            return rc;
        if (purpose == MEET_LINK && (ended = meet_last_word(m, err)))
            return ended;
        if (noted)
            return error_set(err, ERR_RANK, "%s %s while rank %d waited for the other ranks", who,
                             rc == MEET_LATE ? "did not get all ranks together" : "has ended", m->rank);
        if (clock_now_ns() >= m->until_ns)
            return found ? nobody(m, who, rc, err) : meet_resolve(m, address, false, err);
    }
}

// ---- the other ranks ---------------------------------------------------------------------------------------------

static void address_of(struct sockaddr_storage *out, const struct meet_address *from,
                       const struct sockaddr_storage *rank_0)
{
    *out = *rank_0;
    if (from->family == 6) {
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)(void *)out;
        *v6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_scope_id = from->scope};
        memcpy(&v6->sin6_addr, from->bytes, 16);
    } else if (from->family == 4) {
        struct sockaddr_in *v4 = (struct sockaddr_in *)(void *)out;
        *v4 = (struct sockaddr_in){.sin_family = AF_INET};
        memcpy(&v4->sin_addr, from->bytes, 4);
    }
    meet_set_port(out, (int)from->port);
}

static int join(struct meeting *m, void *blob, size_t bytes, struct error *err)
{
    static const char wrong[] = "rank 0's answer does not fit this rank: %u addresses and %u bytes, wanted %d and %zu";
    _Alignas(8) uint8_t buffer[MEET_ANSWER_MAX_BYTES], ignored[MEET_ANSWER_MAX_BYTES];
    const struct meet_answer *answer = (const struct meet_answer *)(const void *)buffer;
    struct sockaddr_storage rank_0 = {0}, other;
    int rc = call(m, &rank_0, true, MEET_JOIN, 0, buffer, &m->out->control[0], err);
    if (rc)
        return rc;
    if (answer->num_addresses != (uint32_t)m->world || answer->blob_bytes != bytes)
        return error_set(err, ERR_RANK, wrong, answer->num_addresses, answer->blob_bytes, m->world, bytes);
    const struct meet_address *addresses = (const struct meet_address *)(const void *)(answer + 1);
    memcpy(blob, addresses + m->world, bytes);
    for (int rank = 0; rank < m->rank && !rc; rank++) {
        address_of(&other, &addresses[rank], &rank_0);
        rc = call(m, &other, false, MEET_LINK, rank, ignored, &m->out->links[rank], err);
    }
    return rc;
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static void begin_meeting(struct meeting *m, struct rendezvous *out, const struct rendezvous_options *options,
                          int timeout_ms)
{
    const struct launcher_place *place = options->place;
    *m = (struct meeting){.options = options,
                          .out = out,
                          .rank = place->rank,
                          .world = place->world_size,
                          .until_ns = clock_now_ns() + (int64_t)timeout_ms * 1000000,
                          .listener = -1};
    *out = (struct rendezvous){.rank = m->rank, .world = m->world};
    memset(out->links, -1, sizeof out->links);
    memset(out->control, -1, sizeof out->control);
    for (int i = 0; i < MEET_WAITING; i++)
        m->callers[i].fd = -1;
}

static void close_meeting(struct meeting *m)
{
    meet_note_rest(m);
    for (int i = 0; i < MEET_WAITING; i++)
        meet_close(&m->callers[i].fd);
    meet_close(&m->listener);
    explicit_bzero(m->key, sizeof m->key);
}

int rendezvous_meet(struct rendezvous *out, const struct rendezvous_options *options, void *blob, size_t bytes,
                    struct error *err)
{
    struct meeting m;
    int rc = 0;
    begin_meeting(&m, out, options, options->timeout_ms);
    if (m.world < 2 || m.world > MEET_MAX_RANKS || m.world > COMM_MAX_RANKS || bytes > MEET_BLOB_MAX_BYTES ||
        options->offer_bytes > MEET_OFFER_BYTES)
        rc = error_set(err, ERR_USAGE, "%d ranks: wanted 2 to %d", m.world, COMM_MAX_RANKS);
    if (!rc)
        rc = meet_key(m.key, options->token, options->place->job, err);
    if (!rc)
        rc = meet_listen(&m, err);
    if (!rc)
        rc = m.rank == 0 ? meet_take_joins(&m, blob, bytes, err) : join(&m, blob, bytes, err);
    if (!rc)
        rc = meet_take_links(&m, err);
    close_meeting(&m);
    if (rc)
        rendezvous_close(out);
    return rc;
}

// Until rank 0 has heard it; whoever else is there instead need not.
static void tell_rank_0(struct meeting *m, const struct error *why)
{
    _Alignas(8) uint8_t ignored[MEET_ANSWER_MAX_BYTES];
    struct sockaddr_storage rank_0;
    struct meet_hello hello;
    bool noted = false;
    int pause_ms = MEET_PAUSE_MS, rc = MEET_CLOSED, fd = -1;
    for (; rc > 0 && clock_now_ns() < m->until_ns; rest_between_tries(m, &pause_ms)) {
        meet_fill_hello(m, &hello, MEET_FAIL, 0);
        hello.code = why->code;
        snprintf((char *)hello.offer, sizeof hello.offer, "rank %d: %.480s", m->options->place->rank, why->msg);
        if (meet_resolve(m, &rank_0, false, NULL) == 0 && (rc = meet_knock(m, &rank_0, &hello, &fd, NULL)) == 0)
            rc = take_answer(m, fd, &hello, "rank 0", &noted, ignored, NULL);
        meet_close(&fd);
        if (rc <= 0)
            return;
    }
}

void rendezvous_fail(const struct rendezvous_options *options, const struct error *why)
{
    struct rendezvous nothing;
    struct rendezvous_options own = *options;
    struct meeting m;
    int limit_ms = own.timeout_ms > 0 && own.timeout_ms < FAIL_MS ? own.timeout_ms : FAIL_MS;
    own.offer_bytes = 0;
    own.tp_size = own.pp_size = 1;
    begin_meeting(&m, &nothing, &own, limit_ms);
    // What is out of its range says so in the sentence.
    m.world = m.world < 2 ? 2 : m.world < COMM_MAX_RANKS ? m.world : COMM_MAX_RANKS;
    m.rank = m.rank < COMM_MAX_RANKS ? m.rank : COMM_MAX_RANKS - 1;
    if (meet_key(m.key, own.token, own.place->job, NULL) == 0) {
        if (m.rank > 0) {
            tell_rank_0(&m, why);
        } else if (meet_listen(&m, NULL) == 0) {
            error_set(&m.ended, why->code, "rank 0: %.480s", why->msg);
            meet_tell_latecomers(&m, limit_ms);
        }
    }
    close_meeting(&m);
    rendezvous_close(&nothing);
}

int meet_ask_other_rank_0(struct meeting *m, const struct sockaddr_storage *address, struct error *err)
{
    _Alignas(8) uint8_t buffer[MEET_ANSWER_MAX_BYTES];
    const struct meet_answer *answer = (const struct meet_answer *)(const void *)buffer;
    int64_t before_ns = m->until_ns, until_ns = clock_now_ns() + ASK_MS * 1000000ll;
    struct meet_hello hello;
    struct error said;
    bool noted, refused = false;
    int fd = -1;
    m->until_ns = until_ns < before_ns ? until_ns : before_ns;
    meet_fill_hello(m, &hello, MEET_JOIN, 0);
    hello.port = (uint32_t)meet_port(address);
    if (meet_knock(m, address, &hello, &fd, NULL) == 0 &&
        take_answer(m, fd, &hello, "rank 0", &noted, buffer, &said) < 0)
        refused = answer->code < 0 && meet_answer_is_genuine(buffer, sizeof *answer, m->key, hello.nonce);
    meet_close(&fd);
    m->until_ns = before_ns;
    if (refused && err)
        *err = said;
    return refused ? said.code : 0;
}

void rendezvous_close(struct rendezvous *r)
{
    for (int i = 0; i < r->world && i < COMM_MAX_RANKS; i++) {
        meet_close(&r->links[i]);
        meet_close(&r->control[i]);
    }
    r->world = 0;
}

// ---- afterwards --------------------------------------------------------------------------------------------------

enum { LEAST_HEARD_MS = 1000 }; // for the others to hear why it ends

struct least {
    int64_t value;
    int32_t code, reserved; // 0: value counts; else an error's
    char sentence[MEET_SENTENCE_BYTES];
};

// What has come from a rank so far.
struct heard {
    struct least said;
    size_t got;
};

// Takes in what has come from a rank: > 0 when it has said all, 0: not yet, < 0: it has ended.
static int hear_least(int fd, struct heard *heard)
{
    ssize_t n = recv(fd, (uint8_t *)&heard->said + heard->got, sizeof heard->said - heard->got, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return 0;
    if (n <= 0)
        return -1;
    heard->got += (size_t)n;
    heard->said.sentence[sizeof heard->said.sentence - 1] = 0;
    return heard->got == sizeof heard->said;
}

static void lost_in_plan(struct least *all, int rank, const char *how)
{
    all->code = ERR_RANK;
    snprintf(all->sentence, sizeof all->sentence, "rank %d %s while the ranks planned their memory", rank, how);
}

// Rank 0: what all others say, as it comes. The first that cannot go on ends it: nobody waits for who is slow then.
static void hear_all(struct rendezvous *r, struct least *all, int64_t until_ns)
{
    struct heard heard[COMM_MAX_RANKS];
    memset(heard, 0, sizeof heard);
    while (!all->code) {
        struct pollfd fds[COMM_MAX_RANKS];
        int whose[COMM_MAX_RANKS], count = 0;
        for (int rank = 1; rank < r->world; rank++) {
            if (heard[rank].got == sizeof heard[rank].said)
                continue;
            fds[count] = (struct pollfd){.fd = r->control[rank], .events = POLLIN};
            whose[count++] = rank;
        }
        int64_t left_ns = until_ns - clock_now_ns();
        if (count == 0)
            return;
        if (poll(fds, (nfds_t)count, left_ns > 0 ? (int)(left_ns / 1000000) + 1 : 0) <= 0) {
            if (clock_now_ns() >= until_ns)
                lost_in_plan(all, whose[0], "was silent");
            continue;
        }
        for (int i = 0; i < count && !all->code; i++) {
            const struct least *said = &heard[whose[i]].said;
            int whole = fds[i].revents ? hear_least(fds[i].fd, &heard[whose[i]]) : 0;
            if (whole < 0)
                lost_in_plan(all, whose[i], "has ended");
            else if (whole && said->code)
                *all = *said;
            else if (whole)
                all->value = said->value < all->value ? said->value : all->value;
        }
    }
}

// Rank 0 has told the others why it ends, and its connections will be closed. What they still say is read until they end, too: a connection that is
// closed over unread input is reset, and what was sent and is still on its way is lost with it.
static void let_them_hear(const struct rendezvous *r)
{
    int64_t until_ns = clock_now_ns() + LEAST_HEARD_MS * 1000000ll;
    bool ended[COMM_MAX_RANKS] = {0};
    for (int rank = 1; rank < r->world; rank++)
        shutdown(r->control[rank], SHUT_WR);
    for (;;) {
        struct pollfd fds[COMM_MAX_RANKS];
        int whose[COMM_MAX_RANKS], count = 0;
        for (int rank = 1; rank < r->world; rank++)
            if (!ended[rank]) {
                fds[count] = (struct pollfd){.fd = r->control[rank], .events = POLLIN};
                whose[count++] = rank;
            }
        int64_t left_ns = until_ns - clock_now_ns();
        if (count == 0 || left_ns <= 0)
            return;
        if (poll(fds, (nfds_t)count, (int)(left_ns / 1000000) + 1) < 0 && errno != EINTR)
            return;
        for (int i = 0; i < count; i++) {
            char ignored[512];
            if (fds[i].revents == 0)
                continue;
            ssize_t n = recv(fds[i].fd, ignored, sizeof ignored, MSG_DONTWAIT);
            ended[whose[i]] = n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
        }
    }
}

int rendezvous_least(struct rendezvous *r, int64_t *value, const struct error *why, int timeout_ms, struct error *err)
{
    int64_t until_ns = clock_now_ns() + (int64_t)timeout_ms * 1000000;
    struct least all = {.value = *value};
    int rc = 0;
    if (why) {
        all.code = why->code;
        snprintf(all.sentence, sizeof all.sentence, "rank %d: %.480s", r->rank, why->msg);
    }
    if (r->rank == 0) {
        hear_all(r, &all, until_ns);
        for (int rank = 1; rank < r->world; rank++)
            meet_write(r->control[rank], &all, sizeof all, until_ns);
        if (all.code)
            let_them_hear(r);
    } else {
        meet_write(r->control[0], &all, sizeof all, until_ns);
        if ((rc = meet_read(r->control[0], &all, sizeof all, until_ns)))
            lost_in_plan(&all, 0, rc == MEET_LATE ? "was silent" : "has ended");
        all.sentence[sizeof all.sentence - 1] = 0;
    }
    *value = all.value;
    return all.code ? error_set(err, meet_is_code(all.code) ? all.code : ERR_OTHER, "%s", all.sentence) : 0;
}

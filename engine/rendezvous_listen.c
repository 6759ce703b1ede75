// The side of a rendezvous that listens: rank 0 until all have joined, and each rank for the connections of the higher ones. One
// loop serves all callers as their bytes come, so that a slow or foreign one holds up nobody.
#include "engine/rendezvous_internal.h"

#include "kernels/clock.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { BACKLOG = 128, ANSWER_MS = 1000, LATECOMERS_MS = 2000, MEMBER = 1000, NOTED_AT_ONCE = 5, NOTED_MS = 1000 };

// ---- where to listen -------------------------------------------------------------------------------------------

// All ranks are on this host: then nobody else need reach it.
static bool is_local(const struct launcher_place *place)
{
    static const char *const names[] = {"localhost", "127.0.0.1", "::1"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(place->host, names[i]) == 0)
            return true;
    return place->local_size == place->world_size;
}

static void set_address(struct sockaddr_storage *out, bool v6, bool loopback, int port)
{
    memset(out, 0, sizeof *out);
    if (v6)
        *(struct sockaddr_in6 *)(void *)out =
            (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_addr = loopback ? in6addr_loopback : in6addr_any};
    else
        *(struct sockaddr_in *)(void *)out = (struct sockaddr_in){
            .sin_family = AF_INET, .sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY)};
    meet_set_port(out, port);
}

int meet_resolve(struct meeting *m, struct sockaddr_storage *out, bool passive, struct error *err)
{
    const struct launcher_place *place = m->options->place;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *found = NULL, *one;
    if (is_local(place) || passive) {
        bool local = is_local(place);
        set_address(out, local ? strcmp(place->host, "::1") == 0 : true, local,
                    m->rank == 0 || !passive ? place->port : 0);
        return 0;
    }
    int failed = getaddrinfo(place->host, NULL, &hints, &found);
    if (failed || !found)
        return error_set(err, ERR_RANK, "rank %d cannot look up rank 0's host %s: %s", m->rank, place->host,
                         failed ? gai_strerror(failed) : "no address");
    unsigned addresses = 0;
    for (one = found; one; one = one->ai_next)
        addresses++;
    one = found;
    for (unsigned turn = m->lookups++ % addresses; turn > 0; turn--)
        one = one->ai_next;
    memset(out, 0, sizeof *out);
    memcpy(out, one->ai_addr, one->ai_addrlen < sizeof *out ? one->ai_addrlen : sizeof *out);
    meet_set_port(out, place->port);
    freeaddrinfo(found);
    return 0;
}

static int bind_and_listen(struct sockaddr_storage *address)
{
    int yes = 1, no = 0, fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    socklen_t bytes = sizeof *address;
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (address->ss_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    if (bind(fd, (const struct sockaddr *)address, meet_address_bytes(address)) == 0 && listen(fd, BACKLOG) == 0 &&
        getsockname(fd, (struct sockaddr *)address, &bytes) == 0)
        return fd;
    int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

static bool is_own_address(const struct sockaddr_storage *address)
{
    struct sockaddr_storage any_port = *address;
    int fd = socket(address->ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    meet_set_port(&any_port, 0);
    bool own = fd >= 0 && bind(fd, (const struct sockaddr *)&any_port, meet_address_bytes(&any_port)) == 0;
    if (fd >= 0)
        close(fd);
    return own;
}

// Where the others look for rank 0 may be another host, and another process rank 0. (Or an address that leads here in the end, which nobody else has.)
static int look_elsewhere(struct meeting *m, struct error *err)
{
    struct sockaddr_storage address;
    struct error unknown;
    if (meet_resolve(m, &address, false, &unknown)) {
        if (m->options->on_note)
            m->options->on_note(m->options->arg, unknown.msg);
        return 0;
    }
    if (is_own_address(&address))
        return 0;
    m->elsewhere = true;
    return meet_ask_other_rank_0(m, &address, err);
}

int meet_listen(struct meeting *m, struct error *err)
{
    const struct launcher_place *place = m->options->place;
    struct sockaddr_storage address;
    bool local = is_local(place);
    if (!local && !m->options->token)
        return error_set(
            err, ERR_USAGE,
            "ranks on several hosts (rank 0 at %s) need a secret that tells them from others: write one to a "
            "file (openssl rand -hex 32) and give it to all ranks with --token-file, or set TPENGINE_RANK_TOKEN",
            place->host);
    int rc = meet_resolve(m, &address, true, err);
    if (rc || (m->rank == 0 && !local && (rc = look_elsewhere(m, err))))
        return rc;
    m->listener = bind_and_listen(&address);
    if (m->listener < 0 && !local) { // a host without version 6 of the protocol
        set_address(&address, false, false, m->rank == 0 ? place->port : 0);
        m->listener = bind_and_listen(&address);
    }
    if (m->listener < 0) {
        int why = errno;
        set_address(&address, strcmp(place->host, "::1") == 0, true, place->port);
        if (m->rank == 0 && why == EADDRINUSE && (rc = meet_ask_other_rank_0(m, &address, err)))
            return rc;
        errno = why;
        return error_set_errno(err,
                               "rank %d cannot listen at port %d for the other ranks; --master HOST:PORT names another",
                               m->rank, m->rank == 0 ? place->port : 0);
    }
    m->port = meet_port(&address);
    return 0;
}

// ---- answers ---------------------------------------------------------------------------------------------------

static void note(const struct meeting *m, const char *sentence)
{
    if (m->options->on_note)
        m->options->on_note(m->options->arg, sentence);
}

void meet_note_rest(struct meeting *m)
{
    char sentence[MEET_SENTENCE_BYTES];
    if (m->unnoted == 0)
        return;
    snprintf(sentence, sizeof sentence, "%lld more callers were sent away", (long long)m->unnoted);
    note(m, sentence);
    m->unnoted = 0;
}

// Anybody may call, as often as they like: the first ones are noted, later ones at most once a second, with the number of those in between.
static void send_away(struct meeting *m, const struct caller *caller, const char *why)
{
    char name[MEET_NAME_BYTES];
    int64_t now_ns = clock_now_ns();
    meet_name(name, &caller->address);
    snprintf(m->sent_away, sizeof m->sent_away, "a caller from %s was sent away: %.300s", name, why);
    if (m->noted >= NOTED_AT_ONCE && now_ns - m->noted_ns < NOTED_MS * 1000000ll) {
        m->unnoted++;
        return;
    }
    meet_note_rest(m);
    note(m, m->sent_away);
    m->noted += m->noted < NOTED_AT_ONCE;
    m->noted_ns = now_ns;
}

static bool answer(const struct meeting *m, int fd, const uint8_t *nonce, const struct error *why)
{
    struct meet_answer no;
    memset(&no, 0, sizeof no);
    memcpy(no.magic, MEET_ANSWER, sizeof no.magic);
    if (why) {
        no.code = why->code;
        snprintf(no.sentence, sizeof no.sentence, "%.500s", why->msg);
    }
    meet_answer_seal((uint8_t *)&no, sizeof no, m->key, nonce);
    return meet_write(fd, &no, sizeof no, clock_now_ns() + ANSWER_MS * 1000000ll) == 0;
}

// Everybody who has joined hears why it ends.
static int end_meeting(struct meeting *m, const struct error *why, struct error *err)
{
    for (int rank = 1; rank < m->world && m->rank == 0; rank++)
        if (m->out->control[rank] >= 0)
            answer(m, m->out->control[rank], m->members[rank].nonce, why);
    if (err)
        *err = *why;
    return why->code;
}

static struct meet_address say_address(const struct member *member)
{
    struct meet_address out = {.port = (uint32_t)member->port};
    const struct sockaddr_storage *a = &member->address;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)(const void *)a;
    if (meet_is_loopback(a)) // where rank 0 is as well: by the address under which others know that host
        return out;
    if (a->ss_family == AF_INET) {
        out.family = 4;
        memcpy(out.bytes, &((const struct sockaddr_in *)(const void *)a)->sin_addr, 4);
    } else if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
        out.family = 4;
        memcpy(out.bytes, v6->sin6_addr.s6_addr + 12, 4);
    } else {
        out.family = 6;
        out.scope = v6->sin6_scope_id;
        memcpy(out.bytes, &v6->sin6_addr, 16);
    }
    return out;
}

static int answer_all(struct meeting *m, const void *blob, size_t bytes, struct error *err)
{
    _Alignas(8) uint8_t buffer[MEET_ANSWER_MAX_BYTES];
    struct meet_answer *yes = (struct meet_answer *)(void *)buffer;
    struct meet_address *addresses = (struct meet_address *)(void *)(yes + 1);
    size_t all = sizeof *yes + (size_t)m->world * sizeof *addresses + bytes;
    memset(buffer, 0, sizeof buffer);
    memcpy(yes->magic, MEET_ANSWER, sizeof yes->magic);
    yes->num_addresses = (uint32_t)m->world;
    yes->blob_bytes = (uint32_t)bytes;
    addresses[0] = (struct meet_address){.port = (uint32_t)m->port};
    for (int rank = 1; rank < m->world; rank++)
        addresses[rank] = say_address(&m->members[rank]);
    memcpy(addresses + m->world, blob, bytes);
    for (int rank = 1; rank < m->world; rank++) {
        meet_answer_seal(buffer, all, m->key, m->members[rank].nonce);
        if (meet_write(m->out->control[rank], buffer, all, m->until_ns)) {
            struct error lost;
            error_set(&lost, ERR_RANK, "rank %d has ended while the ranks met", rank);
            return end_meeting(m, &lost, err);
        }
    }
    return 0;
}

// ---- judging ---------------------------------------------------------------------------------------------------

static void hex(char text[2 * MEET_CONTRACT_BYTES + 1], const uint8_t *bytes)
{
    for (int i = 0; i < MEET_CONTRACT_BYTES; i++)
        snprintf(text + 2 * (size_t)i, 3, "%02x", bytes[i]);
}

// 0: it fits this world.
static int judge(const struct meeting *m, const struct caller *caller, struct error *why)
{
    const struct meet_hello *h = &caller->hello;
    const struct rendezvous_options *o = m->options;
    char name[MEET_NAME_BYTES], other[MEET_NAME_BYTES], theirs[2 * MEET_CONTRACT_BYTES + 1],
        ours[2 * MEET_CONTRACT_BYTES + 1];
    meet_name(name, &caller->address);
    if (strcmp(h->version, o->version) != 0)
        return error_set(why, ERR_RANK, "rank %u at %s is of tpengine %s, rank 0 of %s: all ranks need one version",
                         h->rank, name, h->version, o->version);
    if (h->world != (uint32_t)m->world)
        return error_set(why, ERR_RANK, "rank %u at %s was started as one of %u ranks, rank 0 as one of %d", h->rank,
                         name, h->world, m->world);
    if (h->rank == 0)
        return error_set(why, ERR_RANK,
                         "rank 0 has come twice: one listens at port %d, another one has called there from %s; each of "
                         "the ranks 0 to %d is one process",
                         m->port, name, m->world - 1);
    if (h->rank >= (uint32_t)m->world)
        return error_set(why, ERR_RANK, "a process at %s is rank %u of %d; ranks are numbered from 0", name, h->rank,
                         m->world);
    if (memcmp(h->contract, o->contract, sizeof h->contract) != 0 || h->tp_size != (uint32_t)o->tp_size ||
        h->pp_size != (uint32_t)o->pp_size) {
        hex(theirs, h->contract);
        hex(ours, o->contract);
        return error_set(
            why, ERR_CORRUPT,
            "rank %u at %s has shards of another run: contract %s, tp %u, pp %u; rank 0 has %s, tp %d, pp %d", h->rank,
            name, theirs, h->tp_size, h->pp_size, ours, o->tp_size, o->pp_size);
    }
    if (m->out->control[h->rank] >= 0) {
        meet_name(other, &m->members[h->rank].address);
        return error_set(why, ERR_RANK, "rank %u has come twice: from %s port %d and from %s port %d", h->rank, other,
                         meet_port(&m->members[h->rank].address), name, meet_port(&caller->address));
    }
    return 0;
}

// A hello is complete. The connection stays with the caller unless it is taken (fd -1).
static int take_join(struct meeting *m, struct caller *caller, struct error *err)
{
    struct error why;
    if (caller->hello.purpose == MEET_LINK) {
        error_set(&why, ERR_RANK, "the ranks are not yet together");
        answer(m, caller->fd, caller->hello.nonce, &why);
        return 0;
    }
    if (m->ended.code) {
        answer(m, caller->fd, caller->hello.nonce, &m->ended);
        m->told++;
        return 0;
    }
    if (caller->hello.purpose == MEET_FAIL) {
        error_set(&why, caller->hello.code, "%s", (const char *)caller->hello.offer);
        answer(m, caller->fd, caller->hello.nonce, NULL);
        m->ended = why;
        m->told = 1;
        return end_meeting(m, &why, err);
    }
    if (judge(m, caller, &why)) {
        answer(m, caller->fd, caller->hello.nonce, &why);
        m->ended = why;
        m->told = 1;
        return end_meeting(m, &why, err);
    }
    uint32_t rank = caller->hello.rank;
    m->members[rank] = (struct member){.address = caller->address, .port = (int)caller->hello.port};
    memcpy(m->members[rank].nonce, caller->hello.nonce, MEET_NONCE_BYTES);
    memcpy(m->members[rank].offer, caller->hello.offer, MEET_OFFER_BYTES);
    m->out->control[rank] = caller->fd;
    caller->fd = -1;
    meet_write(m->out->control[rank], MEET_NOTED, 8, clock_now_ns() + ANSWER_MS * 1000000ll);
    return 0;
}

static void take_link(struct meeting *m, struct caller *caller)
{
    const struct meet_hello *h = &caller->hello;
    struct error why;
    int rank = (int)h->rank;
    if (h->purpose == MEET_LINK && h->to == (uint32_t)m->rank && rank > m->rank && rank < m->world &&
        m->out->links[rank] < 0) {
        if (answer(m, caller->fd, h->nonce, NULL)) {
            m->out->links[rank] = caller->fd;
            caller->fd = -1;
        }
        return;
    }
    error_set(&why, ERR_RANK, "rank %d has come twice, or after all ranks were there", rank);
    answer(m, caller->fd, h->nonce, &why);
    send_away(m, caller, why.msg);
}

// ---- callers ---------------------------------------------------------------------------------------------------

static void take_caller(struct meeting *m)
{
    struct meet_challenge challenge = {.magic = MEET_CHALLENGE};
    struct sockaddr_storage address = {0};
    struct caller *place = &m->callers[0];
    socklen_t bytes = sizeof address;
    int yes = 1, fd = accept4(m->listener, (struct sockaddr *)&address, &bytes, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    // A free place, else that of the one who has waited longest.
    for (int i = 0; i < MEET_WAITING && place->fd >= 0; i++)
        if (m->callers[i].fd < 0 || m->callers[i].until_ns < place->until_ns)
            place = &m->callers[i];
    meet_close(&place->fd);
    *place = (struct caller){.fd = fd, .until_ns = clock_now_ns() + MEET_CALL_NS, .address = address};
    // A new connection has room for so few bytes.
    if (meet_nonce(place->nonce, NULL) ||
        (memcpy(challenge.nonce, place->nonce, sizeof challenge.nonce),
         send(fd, &challenge, sizeof challenge, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)sizeof challenge))
        meet_close(&place->fd);
}

static int hear_caller(struct meeting *m, struct caller *caller, bool joining, struct error *err)
{
    struct error why;
    bool genuine = false;
    ssize_t n =
        recv(caller->fd, (uint8_t *)&caller->hello + caller->got, sizeof caller->hello - caller->got, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return 0;
    if (n <= 0) {
        meet_close(&caller->fd);
        return 0;
    }
    caller->got += (size_t)n;
    size_t magic = caller->got < sizeof caller->hello.magic ? caller->got : sizeof caller->hello.magic;
    if (caller->got < sizeof caller->hello && memcmp(caller->hello.magic, MEET_HELLO, magic) == 0)
        return 0;
    int rc = 0;
    if (caller->got < sizeof caller->hello || meet_hello_check(&caller->hello, m->key, caller->nonce, &genuine, &why)) {
        send_away(m, caller,
                  caller->got < sizeof caller->hello ? "it does not speak as a rank of this version" : why.msg);
    } else if (meet_check_user(m, caller->fd, &why)) {
        answer(m, caller->fd, caller->hello.nonce, &why);
        send_away(m, caller, why.msg);
    } else if (!genuine) {
        char sentence[128];
        snprintf(sentence, sizeof sentence, "it calls itself rank %u and has another token, or is of another job",
                 caller->hello.rank);
        error_set(&why, ERR_RANK, "%s", sentence);
        answer(m, caller->fd, caller->hello.nonce, &why); // its tag says the same
        send_away(m, caller, sentence);
    } else if (joining) {
        rc = take_join(m, caller, err);
    } else {
        take_link(m, caller);
    }
    meet_close(&caller->fd);
    return rc;
}

// Waits for something to happen, and lets it. Other ranks' ends are noticed, too.
static int serve(struct meeting *m, bool joining, struct error *err)
{
    struct pollfd fds[1 + MEET_WAITING + COMM_MAX_RANKS];
    int whose[1 + MEET_WAITING + COMM_MAX_RANKS], count = 0, rc = 0;
    int64_t now_ns = clock_now_ns(), until_ns = m->until_ns;
    fds[count] = (struct pollfd){.fd = m->listener, .events = POLLIN};
    whose[count++] = -1;
    for (int i = 0; i < MEET_WAITING; i++) {
        if (m->callers[i].fd >= 0 && m->callers[i].until_ns <= now_ns)
            meet_close(&m->callers[i].fd);
        if (m->callers[i].fd < 0)
            continue;
        until_ns = m->callers[i].until_ns < until_ns ? m->callers[i].until_ns : until_ns;
        fds[count] = (struct pollfd){.fd = m->callers[i].fd, .events = POLLIN};
        whose[count++] = i;
    }
    for (int rank = 0; rank < m->world; rank++) {
        if (m->out->control[rank] < 0)
            continue;
        fds[count] = (struct pollfd){.fd = m->out->control[rank], .events = POLLRDHUP};
        whose[count++] = MEMBER + rank;
    }
    int64_t left_ms = until_ns > now_ns ? (until_ns - now_ns) / 1000000 + 1 : 0;
    if (poll(fds, (nfds_t)count, (int)left_ms) <= 0)
        return 0;
    for (int i = 0; i < count && !rc; i++) {
        if (!fds[i].revents)
            continue;
        if (whose[i] < 0) {
            take_caller(m);
        } else if (whose[i] < MEET_WAITING) {
            if (m->callers[whose[i]].fd == fds[i].fd)
                rc = hear_caller(m, &m->callers[whose[i]], joining, err);
        } else if (m->rank > 0) {
            rc = meet_last_word(m, err);
        } else {
            struct error lost;
            error_set(&lost, ERR_RANK, "rank %d has ended while the ranks met", whose[i] - MEMBER);
            meet_close(&m->out->control[whose[i] - MEMBER]);
            rc = m->ended.code ? 0 : end_meeting(m, &lost, err);
        }
    }
    return rc;
}

// "1, 3"
static void list_missing(const struct meeting *m, const int *fds, int first, char text[128], int *count)
{
    size_t used = 0;
    *count = 0;
    text[0] = 0;
    for (int rank = first; rank < m->world; rank++) {
        if (fds[rank] >= 0)
            continue;
        ++*count;
        if (used + 16 < 128)
            used += (size_t)snprintf(text + used, 128 - used, "%s%d", used ? ", " : "", rank);
    }
}

static int report_missing(struct meeting *m, const int *fds, int first, const char *what, struct error *err)
{
    char missing[128], elsewhere[300] = "";
    int count;
    struct error why;
    list_missing(m, fds, first, missing, &count);
    if (m->elsewhere)
        snprintf(elsewhere, sizeof elsewhere, "; %.200s, where they look for rank 0, is no address of this host",
                 m->options->place->host);
    error_set(&why, ERR_RANK, "rank%s %s of %d did not %s within %.1f s%s%s%s", count == 1 ? "" : "s", missing,
              m->world, what, m->options->timeout_ms / 1000.0, elsewhere, m->sent_away[0] ? "; " : "", m->sent_away);
    return end_meeting(m, &why, err);
}

static bool all_there(const struct meeting *m, const int *fds, int first)
{
    for (int rank = first; rank < m->world; rank++)
        if (fds[rank] < 0)
            return false;
    return true;
}

// Ranks that are just coming would look for rank 0 until their deadline.
void meet_tell_latecomers(struct meeting *m, int limit_ms)
{
    int64_t until_ns = clock_now_ns() + (int64_t)limit_ms * 1000000;
    struct error ignored;
    m->until_ns = until_ns < m->until_ns ? until_ns : m->until_ns;
    for (int rank = 1; rank < m->world; rank++)
        m->told += m->out->control[rank] >= 0;
    while (m->told < m->world - 1 && clock_now_ns() < m->until_ns)
        serve(m, true, &ignored);
}

// Whether all want to run with the same.
static int judge_offers(struct meeting *m, struct error *err)
{
    const struct rendezvous_options *o = m->options;
    uint8_t offers[COMM_MAX_RANKS][MEET_OFFER_BYTES] = {{0}};
    struct error why;
    if (!o->judge)
        return 0;
    if (o->offer_bytes)
        memcpy(offers[0], o->offer, o->offer_bytes);
    for (int rank = 1; rank < m->world; rank++)
        memcpy(offers[rank], m->members[rank].offer, MEET_OFFER_BYTES);
    return o->judge(o->arg, (const uint8_t(*)[MEET_OFFER_BYTES])offers, m->world, &why) ? end_meeting(m, &why, err) : 0;
}

int meet_take_joins(struct meeting *m, const void *blob, size_t bytes, struct error *err)
{
    int rc = 0;
    while (!rc && !all_there(m, m->out->control, 1))
        rc = clock_now_ns() < m->until_ns ? serve(m, true, err) : report_missing(m, m->out->control, 1, "come", err);
    if (rc && m->ended.code)
        meet_tell_latecomers(m, LATECOMERS_MS);
    if (rc || (rc = judge_offers(m, err)))
        return rc;
    return answer_all(m, blob, bytes, err);
}

int meet_take_links(struct meeting *m, struct error *err)
{
    int rc = 0;
    while (!rc && !all_there(m, m->out->links, m->rank + 1))
        rc = clock_now_ns() < m->until_ns ? serve(m, false, err)
                                          : report_missing(m, m->out->links, m->rank + 1, "connect", err);
    return rc;
}

// Ranks that find each other over sockets of this host: who fits gets a connection to each other one, who does not is told why on both sides, and
// strangers hold up nobody. Each rank is a thread here; they share nothing but the sockets.
#include "engine/rendezvous.h"

#include "kernels/clock.h"

#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { MOST = 8, BLOB_BYTES = 128, LONG_MS = 60000, SHORT_MS = 1500 };

struct rank {
    struct launcher_place place;
    struct rendezvous_options options;
    struct rendezvous met;
    uint8_t blob[BLOB_BYTES];
    int delay_ms, rc, notes;
    int silent_ms;
    double seconds, least_s;
    char note[MEET_SENTENCE_BYTES];
    struct error err;
    pthread_t thread;
};

static struct rank ranks[MOST];

static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &bytes), 0);
    close(fd);
    return ntohs(address.sin_port);
}

static bool has_v6(void)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    bool bound = bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
    close(fd);
    return bound;
}

static void on_note(void *arg, const char *sentence)
{
    struct rank *r = arg;
    r->notes++;
    snprintf(r->note, sizeof r->note, "%s", sentence);
}

static void *run(void *arg)
{
    struct rank *r = arg;
    poll(NULL, 0, r->delay_ms);
    double begin_s = clock_now_s();
    r->rc = rendezvous_meet(&r->met, &r->options, r->blob, sizeof r->blob, &r->err);
    r->seconds = clock_now_s() - begin_s;
    return NULL;
}

// Ranks as they should be; the test then changes what it is about.
static int prepare(int count, int timeout_ms)
{
    int port = free_port();
    for (int i = 0; i < count; i++) {
        struct rank *r = &ranks[i];
        memset(r, 0, sizeof *r);
        r->place = (struct launcher_place){
            .launcher = "options", .rank = i, .world_size = count, .local_rank = -1, .host = "127.0.0.1", .port = port};
        r->options = (struct rendezvous_options){.place = &r->place,
                                                 .version = "1.2.3 (abc)",
                                                 .contract = {1, 2, 3},
                                                 .tp_size = count,
                                                 .pp_size = 1,
                                                 .token = "secret",
                                                 .timeout_ms = timeout_ms,
                                                 .on_note = on_note,
                                                 .arg = r};
        memset(r->blob, i + 1, sizeof r->blob);
    }
    return port;
}

static void start(int count)
{
    for (int i = 0; i < count; i++)
        assert_int_equal(pthread_create(&ranks[i].thread, NULL, run, &ranks[i]), 0);
}

static void join(int count)
{
    for (int i = 0; i < count; i++)
        pthread_join(ranks[i].thread, NULL);
}

static void close_all(int count)
{
    for (int i = 0; i < count; i++)
        if (!ranks[i].rc)
            rendezvous_close(&ranks[i].met);
}

static void says(const struct rank *r, const char *words)
{
    if (r->rc >= 0 || !strstr(r->err.msg, words))
        print_message("rank %d: code %d: \"%s\", wanted \"%s\"\n", r->place.rank, r->rc, r->err.msg, words);
    assert_true(r->rc < 0);
    assert_non_null(strstr(r->err.msg, words));
}

// Each two ranks are connected, and with each other.
static void check_mesh(int count)
{
    for (int i = 0; i < count; i++) {
        if (ranks[i].rc)
            print_message("rank %d: %s\n", i, ranks[i].err.msg);
        assert_int_equal(ranks[i].rc, 0);
        assert_int_equal(ranks[i].met.links[i], -1);
        for (int other = 0; other < count; other++) {
            char said = (char)(16 * i + other);
            if (other != i)
                assert_int_equal(write(ranks[i].met.links[other], &said, 1), 1);
        }
        for (int b = 0; b < BLOB_BYTES; b++)
            assert_int_equal(ranks[i].blob[b], 1); // rank 0's
    }
    for (int i = 0; i < count; i++)
        for (int other = 0; other < count; other++) {
            char heard;
            if (other == i)
                continue;
            assert_int_equal(read(ranks[i].met.links[other], &heard, 1), 1);
            assert_int_equal(heard, (char)(16 * other + i));
        }
}

static void *run_least(void *arg)
{
    struct rank *r = arg;
    int64_t value = 100 - r->place.rank;
    struct error why;
    error_set(&why, ERR_MEMORY, "too little memory");
    double begin_s = clock_now_s();
    poll(NULL, 0, r->silent_ms);
    r->rc = rendezvous_least(&r->met, &value, r->delay_ms == 1 ? &why : NULL, LONG_MS, &r->err);
    r->least_s = clock_now_s() - begin_s;
    r->seconds = (double)value;
    return NULL;
}

static void test_meet(void **state)
{
    (void)state;
    static const int sizes[] = {2, 3, 8};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int count = sizes[s];
        prepare(count, LONG_MS);
        ranks[0].delay_ms = s == 1 ? 300 : 0; // others come before rank 0 listens
        ranks[1].delay_ms = s == 2 ? 200 : 0;
        start(count);
        join(count);
        check_mesh(count);
        for (int turn = 0; turn < 2; turn++) {
            for (int i = 0; i < count; i++) {
                ranks[i].delay_ms = turn == 1 && i == 1;
                assert_int_equal(pthread_create(&ranks[i].thread, NULL, run_least, &ranks[i]), 0);
            }
            join(count);
            for (int i = 0; i < count; i++) {
                if (turn == 1) {
                    says(&ranks[i], "rank 1: too little memory");
                    assert_int_equal(ranks[i].rc, ERR_MEMORY);
                    ranks[i].rc = 0;
                } else {
                    assert_int_equal(ranks[i].rc, 0);
                    assert_int_equal((int)ranks[i].seconds, 100 - (count - 1));
                }
            }
        }
        close_all(count);
    }
}

// Who cannot go on is heard at once, also beside a rank that says nothing yet; that one hears of it, too.
static void test_least_beside_silence(void **state)
{
    enum { SILENT_MS = 6000 };
    (void)state;
    prepare(3, LONG_MS);
    start(3);
    join(3);
    check_mesh(3);
    ranks[1].silent_ms = SILENT_MS;
    ranks[2].delay_ms = 1;
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&ranks[i].thread, NULL, run_least, &ranks[i]), 0);
    join(3);
    for (int i = 0; i < 3; i++) {
        says(&ranks[i], "rank 2: too little memory");
        assert_true((ranks[i].least_s < SILENT_MS / 2000.0) == (i != 1));
        ranks[i].rc = 0;
    }
    close_all(3);
}

// Rank 0 gives up at rank 1's error, with what rank 2 has said before still unread, and closes: rank 2 hears why, and a connection that ends in order.
static void *run_and_close(void *arg)
{
    struct rank *r = arg;
    char more;
    run_least(r);
    r->notes = 0;
    if (r->place.rank == 2) {
        struct pollfd end = {.fd = r->met.control[0], .events = POLLIN};
        poll(&end, 1, LONG_MS);
        r->notes = (int)recv(end.fd, &more, 1, MSG_DONTWAIT);
    }
    rendezvous_close(&r->met);
    return NULL;
}

static void test_least_beside_unread(void **state)
{
    (void)state;
    prepare(3, LONG_MS);
    start(3);
    join(3);
    check_mesh(3);
    ranks[0].silent_ms = 300; // both have said what they say
    ranks[1].delay_ms = 1;
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&ranks[i].thread, NULL, run_and_close, &ranks[i]), 0);
    join(3);
    for (int i = 0; i < 3; i++)
        says(&ranks[i], "rank 1: too little memory");
    assert_int_equal(ranks[2].notes, 0); // its end; -1: reset
}

// `own` as a thread's run would, `other` in a process of another user. Returns what that one says.
static struct error run_beside_other_user(struct rank *own, struct rank *other)
{
    enum { OTHER_USER = 65534 };
    struct error err = {.code = 1};
    int said[2];
    assert_int_equal(pipe(said), 0);
    pid_t pid = fork();
    if (pid == 0) {
        if (setgid(OTHER_USER) || setuid(OTHER_USER))
            _exit(1);
        run(other);
        struct error told = other->err;
        told.code = other->rc;
        if (write(said[1], &told, sizeof told) < 0)
            _exit(1);
        rendezvous_close(&other->met);
        _exit(0);
    }
    run(own);
    assert_int_equal(read(said[0], &err, sizeof err), sizeof err);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    close(said[0]), close(said[1]);
    print_message("this user: %s\nthe other one: %s\n", own->rc ? own->err.msg : "let in",
                  err.code ? err.msg : "let in");
    return err;
}

// A process of another user is no rank where there is no token, whether it calls or listens, and whatever it says; with one it is.
static void test_other_users(void **state)
{
    (void)state;
    if (geteuid() != 0)
        skip(); // nobody else may take another user
    prepare(2, LONG_MS);
    assert_int_equal(run_beside_other_user(&ranks[0], &ranks[1]).code, 0);
    assert_int_equal(ranks[0].rc, 0);
    close_all(1);
    // It listens.
    prepare(2, LONG_MS);
    ranks[0].options.timeout_ms = 2 * SHORT_MS;
    ranks[0].options.token = ranks[1].options.token = NULL;
    run_beside_other_user(&ranks[1], &ranks[0]);
    says(&ranks[1], "it is a process of user 65534");
    // It calls, and does not mind who listens: the empty token makes the same key.
    prepare(2, 2 * SHORT_MS);
    ranks[0].options.token = NULL;
    ranks[1].options.token = "";
    struct error err = run_beside_other_user(&ranks[0], &ranks[1]);
    says(&ranks[0], "rank 1 of 2 did not come");
    assert_non_null(strstr(ranks[0].note, "it is a process of user 65534"));
    assert_int_equal(err.code, ERR_RANK);
    assert_non_null(strstr(err.msg, "it is a process of user 65534"));
}

static void test_no_token(void **state)
{
    (void)state;
    static const char *const hosts[] = {"127.0.0.1", "localhost", "::1"}; // one host
    for (size_t h = 0; h < sizeof hosts / sizeof *hosts; h++) {
        prepare(2, LONG_MS);
        for (int i = 0; i < 2; i++) {
            ranks[i].options.token = NULL;
            snprintf(ranks[i].place.host, sizeof ranks[i].place.host, "%s", hosts[h]);
        }
        if (h == 2 && !has_v6())
            break;
        start(2);
        join(2);
        check_mesh(2);
        close_all(2);
    }
    prepare(2, LONG_MS);
    ranks[0].options.token = NULL;
    snprintf(ranks[0].place.host, sizeof ranks[0].place.host, "192.0.2.1");
    run(&ranks[0]);
    says(&ranks[0], "--token-file");
}

// ---- who does not fit --------------------------------------------------------------------------------------------

static void test_other_world(void **state)
{
    (void)state;
    prepare(3, LONG_MS);
    ranks[2].place.world_size = 4;
    start(3);
    join(3);
    for (int i = 0; i < 3; i++) {
        says(&ranks[i], "one of 4 ranks");
        says(&ranks[i], "one of 3");
    }
}

static void test_other_version(void **state)
{
    (void)state;
    prepare(2, LONG_MS);
    ranks[1].options.version = "1.2.4 (def)";
    start(2);
    join(2);
    for (int i = 0; i < 2; i++) {
        says(&ranks[i], "1.2.3 (abc)");
        says(&ranks[i], "1.2.4 (def)");
    }
}

static void test_other_shards(void **state)
{
    (void)state;
    prepare(2, LONG_MS);
    ranks[1].options.contract[15] = 0xab;
    start(2);
    join(2);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ranks[i].rc, ERR_CORRUPT);
        says(&ranks[i], "010203000000000000000000000000ab");
        says(&ranks[i], "01020300000000000000000000000000");
    }
}

static void test_doubled_rank(void **state)
{
    (void)state;
    prepare(4, LONG_MS);
    ranks[1].place.rank = 2; // and no rank 1, which might come when rank 0 has ended
    start(3);
    join(3);
    for (int i = 0; i < 3; i++)
        says(&ranks[i], "rank 2 has come twice");
}

static void test_missing_rank(void **state)
{
    (void)state;
    prepare(4, SHORT_MS);
    for (int i = 1; i < 4; i++)
        ranks[i].options.timeout_ms = LONG_MS; // rank 0 tells them
    start(3);
    join(3);
    for (int i = 0; i < 3; i++)
        says(&ranks[i], "rank 3 of 4 did not come within 1.5 s");
}

static void test_missing_rank_0(void **state)
{
    (void)state;
    prepare(2, SHORT_MS);
    run(&ranks[1]);
    says(&ranks[1], "rank 0 at 127.0.0.1 port");
    says(&ranks[1], "was not reached by rank 1 within 1.5 s");
}

static void test_wrong_token(void **state)
{
    (void)state;
    static const struct {
        const char *token, *job;
    } wrongs[] = {{"Secret", ""}, {NULL, ""}, {"secret", "other job"}};
    for (size_t i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        prepare(2, SHORT_MS);
        ranks[1].options.token = wrongs[i].token;
        snprintf(ranks[1].place.job, sizeof ranks[1].place.job, "%s", wrongs[i].job);
        start(2);
        join(2);
        says(&ranks[1], "another token");
        says(&ranks[0], "did not come");
        says(&ranks[0], "it calls itself rank 1 and has another token");
        assert_int_equal(ranks[0].notes, 1);
        assert_null(strstr(ranks[0].err.msg, "ecret")); // nobody's token is ever shown
        assert_null(strstr(ranks[1].err.msg, "ecret"));
    }
}

// The right one comes after one with a wrong token, which keeps nobody out.
static void test_wrong_token_then_right(void **state)
{
    (void)state;
    prepare(3, LONG_MS);
    ranks[0].place.world_size = ranks[1].place.world_size = ranks[2].place.world_size = 2;
    ranks[0].options.tp_size = ranks[1].options.tp_size = ranks[2].options.tp_size = 2;
    ranks[2].place.rank = 1;
    ranks[2].options.token = "wrong";
    ranks[1].delay_ms = 400;
    start(3);
    join(3);
    says(&ranks[2], "another token");
    check_mesh(2);
    close_all(2);
}

// Two processes that both take themselves for rank 0: the one that listens and the one that finds its place taken hear of each other at once, and so does
// rank 1.
static void test_doubled_rank_0(void **state)
{
    (void)state;
    prepare(4, LONG_MS);
    ranks[1].place.rank = 0;
    ranks[2].place.rank = 1; // it has joined by then
    ranks[1].delay_ms = 500;
    start(3);
    join(3);
    for (int i = 0; i < 3; i++) {
        says(&ranks[i], "rank 0 has come twice");
        assert_int_equal(ranks[i].rc, ERR_RANK);
        assert_true(ranks[i].seconds < LONG_MS / 2000.0);
    }
}

static void *run_failure(void *arg)
{
    struct rank *r = arg;
    struct error why;
    poll(NULL, 0, r->delay_ms);
    error_set(&why, ERR_MODEL, "its model is gone");
    double begin_s = clock_now_s();
    rendezvous_fail(&r->options, &why);
    r->seconds = clock_now_s() - begin_s;
    return NULL;
}

// A rank that cannot come says why to all, whichever it is, one that has no place in the world as well.
static void test_failures(void **state)
{
    (void)state;
    static const struct {
        int who, rank, delay_ms;
        const char *words;
    } cases[] = {
        {2, 2, 300, "rank 2: its model is gone"},         {1, 1, 0, "rank 1: its model is gone"},
        {0, 0, 300, "rank 0: its model is gone"},         {2, 5, 0, "rank 5: its model is gone"},
        {2, 100000, 0, "rank 100000: its model is gone"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        int who = cases[c].who;
        prepare(3, LONG_MS);
        ranks[who].place.rank = cases[c].rank;
        ranks[who].delay_ms = cases[c].delay_ms;
        for (int i = 0; i < 3; i++)
            assert_int_equal(pthread_create(&ranks[i].thread, NULL, i == who ? run_failure : run, &ranks[i]), 0);
        join(3);
        for (int i = 0; i < 3; i++) {
            assert_true(ranks[i].seconds < LONG_MS / 2000.0);
            if (i == who)
                continue;
            says(&ranks[i], cases[c].words);
            assert_int_equal(ranks[i].rc, ERR_MODEL);
        }
    }
}

// One who has not the token ends nothing by such words.
static void test_failure_of_a_stranger(void **state)
{
    (void)state;
    prepare(3, LONG_MS);
    for (int i = 0; i < 3; i++)
        ranks[i].place.world_size = ranks[i].options.tp_size = 2;
    ranks[2].place.rank = 1;
    ranks[2].options.token = "wrong";
    ranks[1].delay_ms = 400;
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&ranks[i].thread, NULL, i == 2 ? run_failure : run, &ranks[i]), 0);
    join(3);
    check_mesh(2);
    assert_non_null(strstr(ranks[0].note, "another token"));
    close_all(2);
}

static int judge_offers(void *arg, const uint8_t (*offers)[MEET_OFFER_BYTES], int world, struct error *err)
{
    (void)arg;
    for (int rank = 1; rank < world; rank++)
        for (int i = 0; i < MEET_OFFER_BYTES; i++)
            if (offers[rank][i] != offers[0][i])
                return error_set(err, ERR_USAGE, "rank 0 offers %d, rank %d %d", offers[0][i], rank, offers[rank][i]);
    return 0;
}

// What all want to run with is judged when all are there.
static void test_offers(void **state)
{
    (void)state;
    uint8_t offers[3][MEET_OFFER_BYTES];
    for (int differs = 0; differs < 2; differs++) {
        prepare(3, LONG_MS);
        memset(offers, 7, sizeof offers);
        offers[2][MEET_OFFER_BYTES - 1] = differs ? 9 : 7;
        for (int i = 0; i < 3; i++) {
            ranks[i].options.offer = offers[i];
            ranks[i].options.offer_bytes = MEET_OFFER_BYTES;
            ranks[i].options.judge = judge_offers;
        }
        start(3);
        join(3);
        for (int i = 0; i < 3 && differs; i++) {
            says(&ranks[i], "rank 0 offers 7, rank 2 9");
            assert_int_equal(ranks[i].rc, ERR_USAGE);
        }
        if (!differs)
            check_mesh(3);
        close_all(3);
    }
}

// ---- strangers -----------------------------------------------------------------------------------------------------

static int call_port(int port)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port)};
    for (int tries = 0; tries < 1000; tries++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
            return fd;
        close(fd);
        poll(NULL, 0, 10);
    }
    return -1;
}

static void test_strangers(void **state)
{
    (void)state;
    enum { SILENT = 100, LOUD = 20 };
    int silent[SILENT], port = prepare(3, LONG_MS);
    char garbage[512];
    memset(garbage, 'x', sizeof garbage);
    ranks[1].delay_ms = 300;
    ranks[2].delay_ms = 600;
    start(3);
    for (int i = 0; i < SILENT; i++) { // more than may wait; some have begun to say who they are
        silent[i] = call_port(port);
        assert_true(silent[i] >= 0);
        if (i % 3 == 0)
            assert_true(send(silent[i], MEET_HELLO "abc", 11, MSG_NOSIGNAL) != 0);
    }
    for (int i = 0; i < LOUD; i++) {
        int fd = call_port(port);
        if (fd < 0)
            break; // the ranks are together
        (void)!send(fd, i % 2 ? garbage : "GET / HTTP/1.0\r\n\r\n", i % 2 ? sizeof garbage : 18, MSG_NOSIGNAL);
        close(fd);
    }
    join(3);
    check_mesh(3);
    assert_true(ranks[0].notes >= 1);
    for (int i = 0; i < SILENT; i++)
        close(silent[i]);
    close_all(3);
}

// Whoever calls again and again does not fill the log.
static void test_many_strangers(void **state)
{
    (void)state;
    enum { CALLS = 400 };
    int port = prepare(2, LONG_MS);
    ranks[1].delay_ms = 1500;
    double begin_s = clock_now_s();
    start(2);
    for (int i = 0; i < CALLS && clock_now_s() - begin_s < 1.2; i++) {
        int fd = call_port(port);
        (void)!send(fd, "GET / HTTP/1.0\r\n\r\n", 18, MSG_NOSIGNAL);
        close(fd);
    }
    join(2);
    check_mesh(2);
    // The first five, one each second with a number before it, and a number at the end.
    assert_in_range(ranks[0].notes, 2, 5 + 2 * (int)(clock_now_s() - begin_s + 1) + 1);
    assert_non_null(strstr(ranks[0].note, "more callers were sent away"));
    close_all(2);
}

// Something else listens where rank 0 should.
static void *run_stranger(void *arg)
{
    int listener = *(int *)arg, fd = accept(listener, NULL, NULL);
    char text[64];
    memset(text, 'y', sizeof text);
    (void)!send(fd, text, sizeof text, MSG_NOSIGNAL);
    poll(NULL, 0, 200);
    close(fd);
    return NULL;
}

static void test_stranger_listens(void **state)
{
    (void)state;
    int yes = 1, port = prepare(2, LONG_MS), listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port)};
    pthread_t thread;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(listener, 5), 0);
    assert_int_equal(pthread_create(&thread, NULL, run_stranger, &listener), 0);
    run(&ranks[1]);
    says(&ranks[1], "is no rank of this version");
    pthread_join(thread, NULL);
    run(&ranks[0]); // the port is taken
    says(&ranks[0], "cannot listen");
    close(listener);
}

// A rank that has joined and goes ends the others at once.
static void test_member_leaves(void **state)
{
    (void)state;
    prepare(3, LONG_MS);
    pid_t pid = fork();
    if (pid == 0) {
        run(&ranks[1]);
        _exit(0);
    }
    start(1);
    // Rank 2 never comes; rank 1 is killed when it has joined.
    poll(NULL, 0, 700);
    kill(pid, SIGKILL);
    pthread_join(ranks[0].thread, NULL);
    says(&ranks[0], "rank 1 has ended while the ranks met");
    waitpid(pid, NULL, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_meet),
        cmocka_unit_test(test_no_token),
        cmocka_unit_test(test_least_beside_silence),
        cmocka_unit_test(test_least_beside_unread),
        cmocka_unit_test(test_other_users),
        cmocka_unit_test(test_other_world),
        cmocka_unit_test(test_other_version),
        cmocka_unit_test(test_other_shards),
        cmocka_unit_test(test_doubled_rank),
        cmocka_unit_test(test_missing_rank),
        cmocka_unit_test(test_missing_rank_0),
        cmocka_unit_test(test_wrong_token),
        cmocka_unit_test(test_wrong_token_then_right),
        cmocka_unit_test(test_doubled_rank_0),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_failure_of_a_stranger),
        cmocka_unit_test(test_offers),
        cmocka_unit_test(test_strangers),
        cmocka_unit_test(test_many_strangers),
        cmocka_unit_test(test_stranger_listens),
        cmocka_unit_test(test_member_leaves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// Whose a connection is, by the kernel's answer for that one connection and by its table: each alone gives the user, also while many other
// connections come and go, and neither tells of one that has ended. The other way is closed to a process of its own by a filter of system calls.
#include "engine/socket_user.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { LOOKUPS = 100, CALL_ANY = -1 };

struct pair {
    int listener, caller, called;
};

static void open_pair(struct pair *p, int family)
{
    struct sockaddr_storage address = {.ss_family = (sa_family_t)family};
    socklen_t bytes = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (family == AF_INET)
        ((struct sockaddr_in *)(void *)&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    else
        ((struct sockaddr_in6 *)(void *)&address)->sin6_addr = in6addr_loopback;
    p->listener = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&address, bytes), 0);
    assert_int_equal(listen(p->listener, 16), 0);
    assert_int_equal(getsockname(p->listener, (struct sockaddr *)&address, &bytes), 0);
    p->caller = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(p->caller, (struct sockaddr *)&address, bytes), 0);
    p->called = accept(p->listener, NULL, NULL);
    assert_true(p->called >= 0);
}

static void close_pair(struct pair *p)
{
    close(p->listener);
    close(p->caller);
    close(p->called);
}

static bool has_v6(void)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = in6addr_loopback};
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    bool bound = fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
    close(fd);
    return bound;
}

// Connections that come and go.
static atomic_bool ends;

static void *churn(void *arg)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    struct linger at_once = {.l_onoff = 1};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)arg;
    if (bind(listener, (struct sockaddr *)&address, bytes) || listen(listener, 64) ||
        getsockname(listener, (struct sockaddr *)&address, &bytes)) {
        close(listener);
        return NULL;
    }
    while (!atomic_load(&ends)) {
        int fds[32][2], count = 0;
        for (; count < 32; count++) {
            fds[count][0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(fds[count][0], (struct sockaddr *)&address, sizeof address))
                break;
            fds[count][1] = accept(listener, NULL, NULL);
            setsockopt(fds[count][0], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once); // leaves nothing behind
        }
        for (int i = 0; i < count; i++)
            close(fds[i][0]), close(fds[i][1]);
    }
    close(listener);
    return NULL;
}

// From here on this process gets EACCES for a system call, of all or with that first argument.
static bool forbid(unsigned number, int first)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | (first == CALL_ANY ? BPF_JGE : BPF_JEQ) | BPF_K, first == CALL_ANY ? 0 : (unsigned)first, 0,
                 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EACCES),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

enum { WAY_BOTH, WAY_ASK, WAY_TABLE, WAY_NONE };
enum { CHILD_RIGHT, CHILD_NO_FILTER, CHILD_NO_ANSWER, CHILD_OTHER_USER, CHILD_TOLD_OF_ENDED };

// In a process of its own.
static int look_up(int family, int way)
{
    struct pair p, ended;
    struct error err;
    pthread_t thread;
    int rc = CHILD_RIGHT;
    open_pair(&p, family);
    open_pair(&ended, family);
    close(ended.caller);
    ends = false;
    if (((way == WAY_TABLE || way == WAY_NONE) && !forbid(SYS_socket, AF_NETLINK)) ||
        ((way == WAY_ASK || way == WAY_NONE) && !forbid(SYS_openat, CALL_ANY)))
        return CHILD_NO_FILTER;
    if (pthread_create(&thread, NULL, churn, NULL))
        return CHILD_NO_FILTER;
    for (int i = 0; i < LOOKUPS && !rc; i++) {
        uid_t user = 12345;
        int code = socket_user(i % 2 ? p.caller : p.called, &user, &err);
        if (way == WAY_NONE && code == 0)
            rc = CHILD_TOLD_OF_ENDED;
        if (way == WAY_NONE)
            break;
        rc = code ? CHILD_NO_ANSWER : user != geteuid() ? CHILD_OTHER_USER : CHILD_RIGHT;
    }
    if (rc == CHILD_NO_ANSWER)
        fprintf(stderr, "way %d: %s\n", way, err.msg);
    uid_t user;
    if (!rc && socket_user(ended.called, &user, &err) == 0)
        rc = CHILD_TOLD_OF_ENDED;
    atomic_store(&ends, true);
    pthread_join(thread, NULL);
    close_pair(&p);
    return rc;
}

static void check(int family, int way)
{
    int status = -1;
    pid_t pid = fork();
    if (pid == 0)
        _exit(look_up(family, way));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == CHILD_NO_FILTER) {
        print_message("SKIP: the kernel filters no system calls here\n");
        skip();
    }
    assert_int_equal(WEXITSTATUS(status), CHILD_RIGHT);
}

static void test_both(void **state)
{
    (void)state;
    check(AF_INET, WAY_BOTH);
    if (has_v6())
        check(AF_INET6, WAY_BOTH);
}

static void test_asked(void **state)
{
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, 4); // NETLINK_SOCK_DIAG
    (void)state;
    if (fd < 0) {
        print_message("SKIP: this kernel cannot be asked for one connection\n");
        skip();
    }
    close(fd);
    check(AF_INET, WAY_ASK);
    if (has_v6())
        check(AF_INET6, WAY_ASK);
}

static void test_table(void **state)
{
    (void)state;
    check(AF_INET, WAY_TABLE);
    if (has_v6())
        check(AF_INET6, WAY_TABLE);
}

static void test_neither(void **state)
{
    (void)state;
    check(AF_INET, WAY_NONE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_both),
        cmocka_unit_test(test_asked),
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_neither),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

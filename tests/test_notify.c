// What systemd is told, on a socket of the test: messages, and how often a watchdog is to be fed.
#include "engine/serve/notify.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

static void test_messages(void **state)
{
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char name[64], seen[64];
    int length = snprintf(name, sizeof name, "@tpengine-test-%d", (int)getpid());
    memcpy(address.sun_path + 1, name + 1, (size_t)length - 1); // in the abstract name space
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    assert_int_equal(
        bind(fd, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)length)), 0);
    unsetenv("NOTIFY_SOCKET");
    notify("READY=1");
    assert_int_equal(recv(fd, seen, sizeof seen, 0), -1);
    setenv("NOTIFY_SOCKET", name, 1);
    notify("READY=1\nSTATUS=ready");
    assert_int_equal(recv(fd, seen, sizeof seen, 0), 20);
    assert_memory_equal(seen, "READY=1\nSTATUS=ready", 20);
    notify("WATCHDOG=1");
    assert_int_equal(recv(fd, seen, sizeof seen, 0), 10);
    close(fd);
    notify("STOPPING=1"); // nobody is there
    unsetenv("NOTIFY_SOCKET");
}

static void test_watchdog(void **state)
{
    (void)state;
    char own[32];
    snprintf(own, sizeof own, "%d", (int)getpid());
    const struct {
        const char *socket, *usec, *pid;
        double wanted_s;
    } cases[] = {
        {"@none", "30000000", NULL, 15}, {"@none", "30000000", own, 15}, {"@none", "30000000", "1", 0},
        {"@none", NULL, NULL, 0},        {NULL, "30000000", own, 0},     {"@none", "", NULL, 0},
        {"@none", "5s", NULL, 0},        {"@none", "-5", NULL, 0},       {"@none", "500000", "", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const names[] = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"};
        const char *const values[] = {cases[i].socket, cases[i].usec, cases[i].pid};
        for (int n = 0; n < 3; n++)
            values[n] ? setenv(names[n], values[n], 1) : unsetenv(names[n]);
        double interval_s = notify_watchdog_s();
        if (!(fabs(interval_s - cases[i].wanted_s) <= 1e-9))
            fail_msg("case %zu: %g s, wanted %g", i, interval_s, cases[i].wanted_s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_messages), cmocka_unit_test(test_watchdog)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

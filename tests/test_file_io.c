// Files: odd kinds refused without waiting, reads and writes in full, whole replacement that leaves nothing behind.
#include "formats/file_io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

// Each test works in its own new directory, which is the current one meanwhile.
static char directory[64];
static int home_fd;

static int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_file_io.XXXXXX");
    return !mkdtemp(directory) || chdir(directory);
}

static int leave_directory(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return fchdir(home_fd) || system(command);
}

// In place of libc's: while short_calls is set, every other call is interrupted and the rest move one byte.
static bool short_calls;
static int num_calls;

ssize_t pread(int fd, void *buffer, size_t num_bytes, off_t offset)
{
    if (short_calls && num_calls++ % 2 == 0)
        return errno = EINTR, -1;
    return syscall(SYS_pread64, fd, buffer, short_calls && num_bytes ? 1 : num_bytes, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t num_bytes, off_t offset)
{
    if (short_calls && num_calls++ % 2 == 0)
        return errno = EINTR, -1;
    return syscall(SYS_pwrite64, fd, buffer, short_calls && num_bytes ? 1 : num_bytes, offset);
}

static void expect_contents(const char *path, const char *text)
{
    uint8_t *bytes;
    uint64_t num_bytes;
    assert_int_equal(file_read_all(&bytes, &num_bytes, path, 1 << 20, ERR_MODEL, NULL), 0);
    assert_int_equal(num_bytes, strlen(text));
    assert_string_equal((const char *)bytes, text);
    free(bytes);
}

static int count_entries(void)
{
    int count = 0;
    DIR *dir = opendir(".");
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));)
        count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(dir);
    return count;
}

static void test_odd_files_are_refused(void **state)
{
    (void)state;
    assert_int_equal(mkfifo("fifo", 0644) | mkdir("dir", 0755) | symlink("fifo", "link") | symlink("loop", "loop"), 0);
    static const struct {
        const char *path, *word;
    } cases[] = {
        {"fifo", "is a FIFO"},
        {"link", "is a FIFO"},
        {"dir", "is a directory"},
        {"/dev/zero", "is a device"},
        {"loop", "cannot open: Too many levels of symbolic links"},
        {"absent", "No such file"},
        {"", "No such file"},
    };
    alarm(20); // opening a FIFO would wait for ever
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int fd = -7;
        struct error err;
        assert_int_equal(file_open_read(&fd, NULL, cases[i].path, &err), ERR_IO);
        assert_int_equal(fd, -7);
        if (!strstr(err.msg, cases[i].word))
            fail_msg("%s: %s", cases[i].path, err.msg);
    }
    alarm(0);
}

static void test_read(void **state)
{
    (void)state;
    assert_int_equal(file_write_atomic(".", "f", "0123456789", 10, NULL), 0);
    assert_int_equal(symlink("f", "link"), 0);
    int fd;
    uint64_t file_bytes;
    char buffer[16] = "";
    struct error err;
    assert_int_equal(file_open_read(&fd, &file_bytes, "link", &err), 0);
    assert_int_equal(file_bytes, 10);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(file_pread_full(fd, buffer, 4, 6, "f", &err), 0);
    assert_string_equal(buffer, "6789");
    assert_int_equal(file_pread_full(fd, buffer, 0, 10, "f", &err), 0);
    assert_int_equal(file_pread_full(fd, buffer, 5, 6, "f", &err), ERR_IO);
    assert_string_equal(err.msg, "f: the file shrank: it ends at byte 10, bytes up to 11 are needed");
    assert_int_equal(file_pread_full(fd, buffer, 1, UINT64_MAX, "f", &err), ERR_IO);
    assert_int_equal(file_pread_full(fd, buffer, UINT64_MAX, 1, "f", &err), ERR_IO);
    close(fd);
    assert_int_equal(file_pread_full(fd, buffer, 1, 0, "f", &err), ERR_IO);
    assert_non_null(strstr(err.msg, "Bad file descriptor"));
    uint8_t *bytes = NULL;
    assert_int_equal(file_read_all(&bytes, &file_bytes, "f", 9, ERR_CORRUPT, &err), ERR_CORRUPT);
    assert_string_equal(err.msg, "f: has 10 bytes, at most 9 are accepted");
    assert_null(bytes);
    expect_contents("f", "0123456789");
}

static void test_write_atomic(void **state)
{
    (void)state;
    struct error err;
    umask(022);
    assert_int_equal(file_write_atomic(".", "f", "one", 3, &err), 0);
    expect_contents("f", "one");
    struct stat status;
    assert_int_equal(stat("f", &status), 0);
    assert_int_equal(status.st_mode & 0777, 0644);
    assert_int_equal(file_write_atomic(directory, "f", "two", 3, &err), 0);
    expect_contents("f", "two");
    assert_int_equal(file_write_atomic(".", "empty", NULL, 0, &err), 0);
    expect_contents("empty", "");
    assert_int_equal(count_entries(), 2);
    // A failed write leaves the old contents and nothing else.
    struct rlimit old_limit, limit = {2, RLIM_INFINITY};
    getrlimit(RLIMIT_FSIZE, &old_limit);
    limit.rlim_max = old_limit.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    int rc = file_write_atomic(".", "f", "three", 5, &err);
    setrlimit(RLIMIT_FSIZE, &old_limit);
    assert_int_equal(rc, ERR_IO);
    assert_string_equal(err.msg, "./f: cannot write 3 bytes at offset 2: File too large");
    expect_contents("f", "two");
    // So does a rename that is refused: a directory stands there.
    assert_int_equal(mkdir("dir", 0755), 0);
    assert_int_equal(file_write_atomic(".", "dir", "x", 1, &err), ERR_IO);
    assert_int_equal(count_entries(), 3);
    static const char *const bad_names[] = {"", "a/b", "../f"};
    for (size_t i = 0; i < 3; i++)
        assert_int_equal(file_write_atomic(".", bad_names[i], "x", 1, &err), ERR_IO);
    assert_int_equal(file_write_atomic("absent", "f", "x", 1, &err), ERR_IO);
    assert_int_equal(count_entries(), 3);
}

static void test_write_full(void **state)
{
    (void)state;
    struct error err;
    int fd = open("f", O_RDWR | O_CREAT, 0644);
    assert_int_equal(file_pwrite_full(fd, "cd", 2, 2, "f", &err), 0);
    assert_int_equal(file_pwrite_full(fd, "ab", 2, 0, "f", &err), 0);
    assert_int_equal(file_pwrite_full(fd, "x", 1, INT64_MAX, "f", &err), ERR_IO);
    close(fd);
    expect_contents("f", "abcd");
    fd = open("/dev/full", O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(file_pwrite_full(fd, "x", 1, 0, "f", &err), ERR_IO);
    assert_string_equal(err.msg, "f: cannot write 1 bytes at offset 0: No space left on device");
    close(fd);
    assert_int_equal(file_sync_dir(".", &err), 0);
    assert_int_equal(file_sync_dir("f", &err), ERR_IO);
}

static void test_short_and_interrupted_calls(void **state)
{
    (void)state;
    struct error err;
    short_calls = true;
    int rc = file_write_atomic(".", "f", "0123456789", 10, &err);
    uint8_t *bytes = NULL;
    uint64_t num_bytes = 0;
    int read_rc = file_read_all(&bytes, &num_bytes, "f", 10, ERR_MODEL, &err);
    short_calls = false;
    assert_int_equal(rc | read_rc, 0);
    assert_int_equal(num_calls, 40);
    assert_int_equal(num_bytes, 10);
    assert_string_equal((const char *)bytes, "0123456789");
    free(bytes);
    expect_contents("f", "0123456789");
}

#define IN_DIRECTORY(test) cmocka_unit_test_setup_teardown(test, enter_directory, leave_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_DIRECTORY(test_odd_files_are_refused),
        IN_DIRECTORY(test_read),
        IN_DIRECTORY(test_write_atomic),
        IN_DIRECTORY(test_write_full),
        IN_DIRECTORY(test_short_and_interrupted_calls),
    };
    home_fd = open(".", O_RDONLY | O_DIRECTORY);
    return cmocka_run_group_tests(tests, NULL, NULL);
}

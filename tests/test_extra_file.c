// Files beside the ranks' own: read when they are what the manifest names, byte for byte, and refused otherwise.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "formats/extra_file.h"

enum { BYTES = 3000, CAP = 4000 };
static char directory[64];
static uint8_t content[BYTES];

static void write_file(const char *name, const void *bytes, size_t count)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_extra.XXXXXX");
    for (size_t i = 0; i < BYTES; i++)
        content[i] = (uint8_t)(i * i >> 3);
    return !mkdtemp(directory);
}

static int leave_directory(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return system(command);
}

// Reads "file" as a manifest that names it with the contents of content says it must be.
static int read_as(uint64_t bytes, uint64_t cap_bytes, uint8_t **out, uint64_t *num_bytes, struct error *err)
{
    struct manifest_file extras[] = {
        {"other", 1, {0, 0}},
        {"file", bytes, checksum_whole(content, bytes < BYTES ? bytes : BYTES)},
    };
    const struct manifest manifest = {.extras = extras, .num_extras = 2};
    return extra_file_read(out, num_bytes, &manifest, directory, "file", cap_bytes, err);
}

static void refused(int code, const char *words, uint64_t bytes, uint64_t cap_bytes)
{
    uint8_t *out = content;
    uint64_t num_bytes = 7;
    struct error err = {0};
    int rc = read_as(bytes, cap_bytes, &out, &num_bytes, &err);
    if (rc != code || !strstr(err.msg, words) || !strstr(err.msg, "/file"))
        fail_msg("wanted code %d with \"%s\", found %d: %s", code, words, rc, err.msg);
    assert_null(out);
    assert_int_equal(num_bytes, 0);
}

static void test_as_named(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 240, BYTES};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint8_t *out;
        uint64_t num_bytes;
        struct error err;
        write_file("file", content, sizes[i]);
        assert_int_equal(read_as(sizes[i], sizes[i], &out, &num_bytes, &err), 0);
        assert_int_equal(num_bytes, sizes[i]);
        assert_memory_equal(out, content, sizes[i]);
        assert_int_equal(out[sizes[i]], 0);
        free(out);
    }
}

// Any byte, any bit.
static void test_changed_byte(void **state)
{
    (void)state;
    for (size_t i = 0; i < BYTES; i += i < 300 ? 1 : 37) {
        uint8_t changed[BYTES];
        memcpy(changed, content, BYTES);
        changed[i] ^= (uint8_t)(1 << i % 8);
        write_file("file", changed, BYTES);
        refused(ERR_CORRUPT, "size or checksum differs from the manifest's; repair it: tpshard repair", BYTES, CAP);
    }
}

static void test_changed_size(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, BYTES - 1};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        write_file("file", content, sizes[i]);
        refused(ERR_CORRUPT, "size or checksum differs", BYTES, CAP);
    }
    write_file("file", content, BYTES);
    refused(ERR_CORRUPT, "size or checksum differs", BYTES - 1, CAP);
    refused(ERR_CORRUPT, "3000 bytes in the manifest, at most 2999 are accepted", BYTES, BYTES - 1);
    refused(ERR_CORRUPT, "at most 4000 are accepted", UINT64_MAX, CAP);
}

// What the manifest does not name is not there; what it names must be.
static void test_named_or_there(void **state)
{
    (void)state;
    uint8_t *out = content;
    uint64_t num_bytes = 7;
    struct error err;
    const struct manifest none = {.num_extras = 0};
    char path[128];
    write_file("file", content, BYTES);
    assert_int_equal(extra_file_read(&out, &num_bytes, &none, directory, "file", CAP, &err), 0);
    assert_null(out);
    assert_int_equal(num_bytes, 0);
    snprintf(path, sizeof path, "%s/file", directory);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(symlink("nowhere", path), 0);
    refused(ERR_CORRUPT, "leads nowhere; remove it, then repair it: tpshard repair /tmp/test_extra.", BYTES, CAP);
    assert_int_equal(unlink(path), 0);
    refused(ERR_IO, "there is no such file; repair it: tpshard repair /tmp/test_extra.", BYTES, CAP);
}

static void test_long_path(void **state)
{
    (void)state;
    static char dir[PATH_MAX];
    struct manifest_file extra = {"file", 0, {0, 0}};
    const struct manifest manifest = {.extras = &extra, .num_extras = 1};
    uint8_t *out;
    uint64_t num_bytes;
    struct error err;
    memset(dir, 'a', sizeof dir - 1);
    assert_int_equal(extra_file_read(&out, &num_bytes, &manifest, dir, "file", CAP, &err), ERR_USAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_named),       cmocka_unit_test(test_changed_byte), cmocka_unit_test(test_changed_size),
        cmocka_unit_test(test_named_or_there), cmocka_unit_test(test_long_path),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}

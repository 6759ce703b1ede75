// Copies that are not what they claim to be, given to repair: another model of the same contract, and files that change while they are used.
// What repair does for a user is in test_repair.py.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "formats/file_io.h"
#include "kernels/thread_pool.h"
#include "shard/repair_head.h"
#include "shard/repair_source.h"
#include "tests/shard_fixture.h"

static char folder[PATH_MAX];

// Two copies of one directory, the first of them opened as what is to be mended, the second as what it is mended from.
struct both {
    char copy[PATH_MAX + 8], mended[PATH_MAX + 8];
    struct shard_dir dir;
    struct repair_source *source;
};

static void open_both(struct both *both, bool compressed)
{
    struct error err = {0};
    snprintf(both->mended, sizeof both->mended, "%s/mended", folder);
    snprintf(both->copy, sizeof both->copy, "%s/copy", folder);
    if ((mkdir(both->mended, 0777) || mkdir(both->copy, 0777)) && access(both->copy, W_OK))
        fail_msg("%s: cannot create it", folder);
    shard_fixture_write(both->mended, compressed);
    shard_fixture_write(both->copy, compressed);
    if (shard_dir_open(&both->dir, both->mended, &err) ||
        repair_from_shards(&both->source, both->copy, &both->dir, 1, &err))
        fail_msg("%s", err.msg);
}

static void close_both(struct both *both)
{
    both->source->close(both->source);
    shard_dir_close(&both->dir);
}

// A contract says what was made of which model, not how many bytes that is: a copy may hold less than what is mended.
static void test_shorter_copy(void **state)
{
    (void)state;
    for (int compressed = 0; compressed < 2; compressed++) {
        struct both both = {0};
        struct error err = {0};
        uint8_t *out = malloc(4 * SHARD_LEAF_BYTES);
        assert_non_null(out);
        open_both(&both, compressed);
        for (uint64_t first = 1; first < 200; first = 3 * first + 1) {
            uint64_t begin = first * SHARD_LEAF_BYTES;
            assert_int_equal(both.source->payload(both.source, 0, 0, begin, begin + SHARD_LEAF_BYTES, out, &err),
                             ERR_CORRUPT);
            assert_non_null(strstr(err.msg, "it is no copy"));
        }
        assert_int_equal(both.source->payload(both.source, 0, 0, 0, 4096, out, &err), 0);
        close_both(&both);
        free(out);
    }
}

// The head is no longer the one that was there when the copy was opened: it is refused, and nothing is left to be closed twice.
static void test_changed_head(void **state)
{
    static const uint8_t another[16] = {1, 2, 3};
    (void)state;
    struct both both = {0};
    struct shard_fixture other;
    struct shard_file *file = NULL;
    struct thread_pool *pool = NULL;
    struct repair_worker *workers = NULL;
    struct progress progress;
    struct error err = {0};
    uint8_t *head = NULL;
    open_both(&both, false);
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", both.copy, both.dir.manifest->ranks[0].name);
    shard_fixture_make(&other, 0, another, 0); // a head that holds, of the same length
    FILE *out = fopen(path, "r+b");
    assert_non_null(out);
    assert_int_equal(fwrite(other.bytes, 1, other.payload_offset, out), other.payload_offset);
    assert_int_equal(fclose(out), 0);
    free(other.bytes);
    if (thread_pool_create(&pool, 1, &err) || repair_workers_new(&workers, 1, &err))
        fail_msg("%s", err.msg);
    progress_start(&progress, "repair", 0, true);
    assert_int_equal(repair_head(&head, &file, both.source, &both.dir, 0, pool, workers, &progress, &err), ERR_CORRUPT);
    assert_null(file);
    assert_null(head);
    repair_workers_free(workers, 1);
    thread_pool_free(pool);
    close_both(&both);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "%s/tests/test_repair_source.%d", getenv("BUILD") ? getenv("BUILD") : "build",
             (int)getpid());
    return mkdir(folder, 0777);
}

static int tear_down(void **state)
{
    char command[PATH_MAX + 16];
    (void)state;
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command) ? -1 : 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shorter_copy),
        cmocka_unit_test(test_changed_head),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}

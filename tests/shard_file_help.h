// What tests of rank files share: a contract, refusals, and tensors and heads compared and changed.
#ifndef TPSHARD_TESTS_SHARD_FILE_HELP_H
#define TPSHARD_TESTS_SHARD_FILE_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "formats/checksum.h"
#include "formats/shard_file.h"

static const uint8_t some_contract[16] = {0xc0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0x0f};

static inline int parse(const uint8_t *bytes, uint64_t available, uint64_t file_bytes, struct shard_file **out,
                        struct error *err)
{
    return shard_file_parse(out, bytes, available, file_bytes, "rank-01-of-02.tpshard", err);
}

// A refusal must be ERR_CORRUPT and say so in one sentence that begins with the file.
static inline void assert_refused(const uint8_t *bytes, uint64_t available, uint64_t file_bytes, const char *wanted,
                                  const char *what)
{
    struct error err = {0};
    struct shard_file *file = NULL;
    int rc = parse(bytes, available, file_bytes, &file, &err);
    if (rc != ERR_CORRUPT || file)
        fail_msg("%s: accepted (%d)", what, rc);
    if (strncmp(err.msg, "rank-01-of-02.tpshard: ", 23) != 0 || !strstr(err.msg, wanted))
        fail_msg("%s: '%s' instead of '%s'", what, err.msg, wanted);
}

static inline void assert_same_tensor(const struct shard_tensor *a, const struct shard_tensor *b)
{
    assert_int_equal(a->role, b->role);
    assert_int_equal(a->layer, b->layer);
    assert_int_equal(a->expert, b->expert);
    assert_memory_equal(&a->shape, &b->shape, sizeof a->shape);
    assert_int_equal(a->data_offset, b->data_offset);
    assert_int_equal(a->scale_offset, b->scale_offset);
    assert_int_equal(a->num_parts, b->num_parts);
    for (int p = 0; p < a->num_parts; p++) {
        assert_string_equal(a->parts[p].source, b->parts[p].source);
        assert_memory_equal(&a->parts[p].source_rows, &b->parts[p].source_rows, 6 * sizeof(uint64_t));
    }
}

static inline void put_head_hash(uint8_t *head, uint64_t head_bytes)
{
    memset(head + 256, 0, 16);
    checksum128_to_bytes(checksum_whole(head, head_bytes), head + 256);
}

#endif

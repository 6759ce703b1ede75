// What the tokenizer's tests share. Include behind cmocka.h.
#ifndef TPSHARD_TESTS_TOKENIZER_HELP_H
#define TPSHARD_TESTS_TOKENIZER_HELP_H

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "formats/tokenizer.h"
#include "formats/tokenizer_text.h"
#include "kernels/clock.h"

#define GOLDEN "tests/golden/tokenizer/"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static inline json_t *load_json(const char *name)
{
    char path[128];
    json_error_t error;
    snprintf(path, sizeof path, GOLDEN "%s", name);
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!json)
        fail_msg("%s: %s", path, error.text);
    return json;
}

struct opened {
    uint8_t *image;
    size_t bytes;
    struct tokenizer *tok;
};

static inline struct opened open_path(const char *path, uint64_t vocab_size)
{
    struct opened opened = {0};
    struct error err = {0};
    if (tokenizer_compile(&opened.image, &opened.bytes, path, NULL, vocab_size, &err) ||
        tokenizer_open(&opened.tok, opened.image, opened.bytes, path, &err))
        fail_msg("%s", err.msg);
    return opened;
}

static inline struct opened open_family(const char *family)
{
    char path[128];
    snprintf(path, sizeof path, GOLDEN "%s.tokenizer.json", family);
    return open_path(path, 1 << 20);
}

static inline void close_opened(struct opened *opened)
{
    tokenizer_close(opened->tok);
    free(opened->image);
}

// A temporary file with this content; the caller unlinks it and frees the name.
static inline char *temporary_file(const char *content, size_t bytes)
{
    char *path = strdup("/tmp/test_tokenizer_XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, content, bytes), bytes);
    close(fd);
    return path;
}

static inline int compile_text(struct opened *opened, const char *json, size_t bytes, uint64_t vocab_size,
                               struct error *err)
{
    char *path = temporary_file(json, bytes);
    *opened = (struct opened){0};
    int rc =
        tokenizer_compile(&opened->image, &opened->bytes, path, "/nonexistent/tokenizer_config.json", vocab_size, err);
    unlink(path);
    free(path);
    return rc ? rc : tokenizer_open(&opened->tok, opened->image, opened->bytes, "test", err);
}

static inline struct token_list encode(const struct tokenizer *tok, const char *text, size_t bytes, unsigned flags)
{
    struct token_list ids = {0};
    struct error err = {0};
    if (tokenizer_encode(tok, text, bytes, flags, &ids, &err))
        fail_msg("%s", err.msg);
    return ids;
}

// Decodes at once and as a stream; both must agree, and every released text must be valid UTF-8.
static inline char *decode_both(const struct tokenizer *tok, const uint32_t *ids, size_t count, bool skip,
                                size_t *bytes)
{
    char *text = NULL;
    struct tokenizer_text streamed = {0};
    struct tokenizer_stream *stream = NULL;
    struct error err = {0};
    const char *part;
    size_t part_bytes;
    if (tokenizer_decode(tok, ids, count, skip, &text, bytes, &err) || tokenizer_stream_new(&stream, tok, skip, &err))
        fail_msg("%s", err.msg);
    for (size_t i = 0; i <= count; i++) {
        int rc = i < count ? tokenizer_stream_push(stream, ids[i], &part, &part_bytes, &err)
                           : tokenizer_stream_flush(stream, &part, &part_bytes, &err);
        if (rc)
            fail_msg("%s", err.msg);
        assert_int_equal(tokenizer_text_valid_prefix(part, part_bytes), part_bytes);
        assert_true(tokenizer_text_append(&streamed, part, part_bytes));
    }
    assert_int_equal(streamed.bytes, *bytes);
    assert_true(!*bytes || !memcmp(streamed.data, text, *bytes));
    assert_int_equal(text[*bytes], 0);
    tokenizer_stream_free(stream);
    tokenizer_text_free(&streamed);
    return text;
}

#endif

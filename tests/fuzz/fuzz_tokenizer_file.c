// Any bytes as a compiled tokenizer: rejected, or usable without a crash. The streaming and the whole decode agree.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer.h"

static const char TEXT[] =
    "Hello <s> w\xC3\xB6rld\xE2\x96\x81 a\xCC\x81  12345 'll\n\n\xF0\x9F\x98\x80 aaab ab-ba\t\xFF!";

static void check_stream(const struct tokenizer *tok, const struct token_list *ids, const char *whole, size_t bytes)
{
    struct tokenizer_stream *stream;
    struct error err;
    const char *part;
    size_t part_bytes, at = 0;
    if (tokenizer_stream_new(&stream, tok, true, &err))
        return;
    for (size_t i = 0; i <= ids->count; i++) {
        int rc = i < ids->count ? tokenizer_stream_push(stream, ids->ids[i], &part, &part_bytes, &err)
                                : tokenizer_stream_flush(stream, &part, &part_bytes, &err);
        if (rc || part_bytes > bytes - at || memcmp(whole + at, part, part_bytes))
            abort();
        at += part_bytes;
    }
    if (at != bytes)
        abort();
    tokenizer_stream_free(stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *tok;
    struct error err;
    uint8_t *image = malloc(size ? size : 1); // aligned, and its end is guarded
    if (!image)
        return 0;
    memcpy(image, data, size);
    if (!tokenizer_open(&tok, image, size, "fuzz", &err)) {
        for (unsigned flags = 0; flags < 4; flags++) {
            struct token_list ids = {0};
            char *text;
            size_t bytes;
            if (!tokenizer_encode(tok, TEXT, sizeof TEXT - 1, flags, &ids, &err) &&
                !tokenizer_decode(tok, ids.ids, ids.count, true, &text, &bytes, &err)) {
                check_stream(tok, &ids, text, bytes);
                free(text);
            }
            free(ids.ids);
        }
        tokenizer_close(tok);
    }
    free(image);
    return 0;
}

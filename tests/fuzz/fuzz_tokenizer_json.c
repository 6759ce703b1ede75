// Any bytes as tokenizer.json: refused or compiled, and what was compiled encodes and decodes. Never a crash, a hang or
// memory without bound.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "formats/tokenizer.h"

static const char TEXT[] =
    "Hello <s> w\xC3\xB6rld\xE2\x96\x81 a\xCC\x81  12345 'll\n\n\xF0\x9F\x98\x80 aaab ab-ba\t\xFF!";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1; // one memory file serves all inputs
    char path[64];
    uint8_t *image;
    size_t image_bytes;
    struct tokenizer *tok;
    struct error err;
    if (fd < 0 && (fd = memfd_create("tokenizer.json", 0)) < 0)
        abort();
    if (ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
        abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (tokenizer_compile(&image, &image_bytes, path, NULL, 4096, &err))
        return 0;
    if (tokenizer_open(&tok, image, image_bytes, "fuzz", &err))
        abort(); // the compiler writes no image that cannot be opened
    for (unsigned flags = 0; flags < 4; flags++) {
        struct token_list ids = {0};
        char *text;
        size_t bytes;
        if (!tokenizer_encode(tok, TEXT, sizeof TEXT - 1, flags, &ids, &err) &&
            !tokenizer_decode(tok, ids.ids, ids.count, flags & 1, &text, &bytes, &err)) {
            if (strlen(text) > bytes)
                abort();
            free(text);
        }
        free(ids.ids);
    }
    tokenizer_close(tok);
    free(image);
    return 0;
}

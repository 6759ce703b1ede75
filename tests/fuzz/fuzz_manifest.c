// model.json. Whatever is accepted is written again and read again, to the same text.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/manifest.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct manifest *manifest = NULL, *again = NULL;
    struct error err = {0};
    if (manifest_parse(&manifest, (const char *)data, size, "fuzz.json", &err)) {
        CHECK(err.code == ERR_CORRUPT && err.msg[0] && !manifest);
        return 0;
    }
    CHECK(manifest->num_ranks == (size_t)manifest->tp_size * manifest->pp_size);
    for (size_t i = 0; i < manifest->num_ranks + manifest->num_extras; i++) {
        const char *name =
            i < manifest->num_ranks ? manifest->ranks[i].name : manifest->extras[i - manifest->num_ranks].name;
        CHECK(*name && !strchr(name, '/') && strcmp(name, "..") != 0);
    }
    char *text = NULL, *text_again = NULL;
    CHECK(manifest_to_json(manifest, &text, &err) == 0);
    CHECK(manifest_parse(&again, text, strlen(text), "again.json", &err) == 0);
    CHECK(manifest_to_json(again, &text_again, &err) == 0);
    CHECK(strcmp(text, text_again) == 0);
    free(text_again);
    free(text);
    manifest_free(again);
    manifest_free(manifest);
    return 0;
}

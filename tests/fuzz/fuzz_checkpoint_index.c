// Any bytes may be rejected; none may crash, hang or over-allocate. What is accepted is sorted, unique and plain.
#include "formats/checkpoint.h"

#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct error err;
    struct checkpoint_index index;
    if (checkpoint_index_parse(&index, data, size, "fuzz", &err))
        return 0;
    CHECK(index.count > 0);
    for (size_t i = 0; i < index.count; i++) {
        const struct checkpoint_index_entry *entry = &index.entries[i];
        CHECK(safetensors_name_ok(entry->tensor, strlen(entry->tensor)));
        CHECK(safetensors_name_ok(entry->file, strlen(entry->file)));
        CHECK(!strchr(entry->file, '/') && strcmp(entry->file, ".") && strcmp(entry->file, ".."));
        CHECK(!i || strcmp(index.entries[i - 1].tensor, entry->tensor) < 0);
    }
    checkpoint_index_clear(&index);
    return 0;
}

// Any bytes may be rejected; none may crash, hang or over-allocate. What is accepted owns every data byte once.
#include "formats/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

static void check(const struct safetensors_header *header, uint64_t file_bytes, uint64_t data_bytes)
{
    uint64_t total_bytes = 0;
    for (size_t i = 0; i < header->tensor_count; i++) {
        const struct safetensors_tensor *tensor = &header->tensors[i];
        CHECK(tensor->offset >= SAFETENSORS_PREFIX_BYTES && tensor->offset <= file_bytes);
        CHECK(tensor->bytes <= file_bytes - tensor->offset);
        CHECK(tensor->num_dims >= 0 && tensor->num_dims <= SAFETENSORS_MAX_DIMS);
        uint64_t bits = (uint64_t)dtype_bits(tensor->dtype);
        for (int d = 0; d < tensor->num_dims; d++)
            bits *= tensor->dims[d];
        CHECK(bits == 8 * tensor->bytes);
        CHECK(safetensors_name_ok(tensor->name, strlen(tensor->name)));
        CHECK(!i || strcmp(header->tensors[i - 1].name, tensor->name) < 0);
        total_bytes += tensor->bytes;
    }
    CHECK(total_bytes == data_bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct error err;
    struct safetensors_header *header;
    // As a whole file.
    if (safetensors_parse(data, size, size, "fuzz", &header, &err) == 0) {
        uint64_t header_bytes = 0;
        CHECK(safetensors_header_bytes(data, size, "fuzz", &header_bytes, &err) == 0);
        check(header, size, size - SAFETENSORS_PREFIX_BYTES - header_bytes);
        safetensors_free(header);
    }
    // As a header alone, so that the fuzzer need not find the length word: the first byte is the number of data bytes.
    if (size < 1 || size > 65536)
        return 0;
    size_t json_bytes = size - 1;
    uint8_t *file = calloc(1, SAFETENSORS_PREFIX_BYTES + json_bytes);
    CHECK(file);
    for (int i = 0; i < 3; i++)
        file[i] = (uint8_t)(json_bytes >> 8 * i);
    memcpy(file + SAFETENSORS_PREFIX_BYTES, data + 1, json_bytes);
    uint64_t file_bytes = SAFETENSORS_PREFIX_BYTES + json_bytes + data[0];
    if (safetensors_parse(file, SAFETENSORS_PREFIX_BYTES + json_bytes, file_bytes, "fuzz", &header, &err) == 0) {
        check(header, file_bytes, data[0]);
        safetensors_free(header);
    }
    free(file);
    return 0;
}

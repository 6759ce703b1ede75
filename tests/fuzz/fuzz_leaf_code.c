// Leaves as they are stored. The first byte says what the rest is: stored bytes to decode as they are; a payload to encode and decode; or such a
// payload whose stored bytes are then damaged. Any bytes may be refused; the decoder reads and writes just what it was given.
#include <string.h>

#include "formats/leaf_code.h"
#include "tests/fuzz/fuzz.h"

enum { PAYLOAD_CAP = 1 << 18, HEADER = 5 };

// Two frames now and then: leaves of many bytes take long.
static uint64_t payload_size(uint32_t number)
{
    return number >> 31 ? (number & 0xffffff) % (PAYLOAD_CAP + 1) : number % 8193;
}

static struct leaf_scratch *scratch;
static struct leaf_encoder *encoder;

// In blocks of their exact size, where a sanitizer sees every step over the end.
static const char *decode(uint8_t *payload, uint64_t payload_bytes, uint32_t code, const uint8_t *stored,
                          uint64_t stored_bytes)
{
    uint8_t *in = malloc(stored_bytes + !stored_bytes), *out = malloc(payload_bytes + !payload_bytes);
    CHECK(in && out);
    if (stored_bytes)
        memcpy(in, stored, stored_bytes);
    const char *wrong = leaf_decode(out, payload_bytes, code, in, stored_bytes, scratch);
    CHECK(!wrong || wrong[0]);
    if (!wrong)
        memcpy(payload, out, payload_bytes);
    free(out);
    free(in);
    return wrong;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t payload[PAYLOAD_CAP], again[PAYLOAD_CAP];
    if (!scratch)
        CHECK((scratch = leaf_scratch_new()) && (encoder = leaf_encoder_new()));
    if (size < HEADER)
        return 0;
    uint32_t number;
    memcpy(&number, data + 1, sizeof number);
    const uint8_t *rest = data + HEADER;
    uint64_t rest_bytes = size - HEADER;
    if (data[0] % 3 == 0) {
        decode(payload, payload_size(number), data[0] / 3 % (LEAF_CODE_COUNT + 1), rest, rest_bytes);
        return 0;
    }

    // The rest over and over, with a step that makes neighbours differ.
    uint64_t payload_bytes = payload_size(number) + !payload_size(number), stored_bytes;
    for (uint64_t i = 0; i < payload_bytes; i++)
        payload[i] = rest_bytes ? (uint8_t)(rest[i % rest_bytes] + (data[0] & 64 ? i / rest_bytes : 0)) : 0;
    enum leaf_code code;
    const uint8_t *stored;
    struct error err;
    CHECK(leaf_encode(&code, &stored, &stored_bytes, encoder, payload, payload_bytes, &err) == 0);
    CHECK(leaf_code_fits(code, payload_bytes, stored_bytes));
    if (data[0] % 3 == 1) {
        CHECK(!decode(again, payload_bytes, code, stored, stored_bytes));
        CHECK(memcmp(again, payload, payload_bytes) == 0);
        return 0;
    }
    uint8_t *damaged = malloc(stored_bytes);
    CHECK(damaged != NULL);
    memcpy(damaged, stored, stored_bytes);
    for (uint64_t i = 0; i + 2 < rest_bytes && i < 24; i += 3) {
        uint64_t at = ((uint64_t)rest[i] << 8 | rest[i + 1]) % stored_bytes;
        damaged[at] = (uint8_t)(damaged[at] ^ rest[i + 2]);
    }
    decode(again, payload_bytes, code, damaged, stored_bytes - (number >> 30 & 1));
    free(damaged);
    return 0;
}

// What strangers may say at a rendezvous: a hello or an answer of any bytes. The first byte chooses: bit 0 an answer, bit 1 its tag is made right, as by
// somebody who has the token. What is taken is within its ranges and has its ends; nothing with a wrong tag is genuine.
#include "engine/rendezvous_wire.h"

#include <stdlib.h>
#include <string.h>

static const uint8_t key[MEET_KEY_BYTES] = {1, 2, 3}, nonce[MEET_NONCE_BYTES] = {4, 5, 6};

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void hear_hello(const uint8_t *data, size_t bytes, bool sealed)
{
    struct meet_hello hello;
    struct error err;
    bool genuine = false;
    memset(&hello, 0, sizeof hello);
    memcpy(&hello, data, bytes < sizeof hello ? bytes : sizeof hello);
    if (sealed)
        meet_hello_seal(&hello, key, nonce);
    if (meet_hello_check(&hello, key, nonce, &genuine, &err)) {
        check(err.code == ERR_CORRUPT && err.msg[0]);
        return;
    }
    check(genuine == sealed);
    check(hello.rank < MEET_MAX_RANKS && hello.to < MEET_MAX_RANKS && hello.world - 1 < MEET_MAX_RANKS &&
          hello.purpose < MEET_PURPOSES && hello.port <= 65535 && strlen(hello.version) < MEET_VERSION_BYTES);
    check(hello.purpose != MEET_FAIL
              ? hello.code == 0
              : hello.code < 0 && hello.code >= -255 && memchr(hello.offer, 0, sizeof hello.offer) != NULL);
    hello.rank ^= 1; // a tag is of every bit
    check(meet_hello_check(&hello, key, nonce, &genuine, NULL) || !genuine);
}

static void hear_answer(const uint8_t *data, size_t bytes, bool sealed)
{
    _Alignas(8) uint8_t buffer[MEET_ANSWER_MAX_BYTES];
    const struct meet_answer *answer = (const struct meet_answer *)(const void *)buffer;
    size_t rest = 0;
    struct error err;
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, data, bytes < sizeof buffer ? bytes : sizeof buffer);
    if (meet_answer_rest(answer, &rest, &err)) {
        check(err.code == ERR_CORRUPT && err.msg[0]);
        return;
    }
    check(rest <= MEET_ANSWER_MAX_BYTES - sizeof *answer && answer->code <= 0 && answer->code >= -255 &&
          strlen(answer->sentence) < MEET_SENTENCE_BYTES);
    size_t all = sizeof *answer + rest;
    if (sealed)
        meet_answer_seal(buffer, all, key, nonce);
    check(meet_answer_is_genuine(buffer, all, key, nonce) == sealed);
    buffer[all - 1] ^= 1;
    check(!meet_answer_is_genuine(buffer, all, key, nonce));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes == 0)
        return 0;
    (data[0] & 1 ? hear_answer : hear_hello)(data + 1, bytes - 1, data[0] & 2);
    return 0;
}

// Any bytes as a JSON Schema, behind a first byte that says how the text goes on: refused with a sentence, or compiled within the limits; then a walk
// where every allowed token is taken and the mask is never empty. Texts that end within the walk are JSON.
#include "engine/serve/grammar.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/fuzz/fuzz.h"

enum { EOS = 256, TOKENS = 300, WORDS = (TOKENS + 31) / 32, MAX_STEPS = 60, MAX_BYTES = 4096 };

static struct vocabulary_token tokens[TOKENS];

static struct vocabulary *vocabulary_get(void)
{
    static struct vocabulary *vocabulary;
    static char bytes[256];
    static const char *const pieces[] = {"\": \"",   "\",",      "\"}", "{\"",    "[{", "]}", "true", "\\u00",
                                         "\xC3\xA9", "\xF0\x9F", "  ",  "\n    ", "12", "0.", "[["};
    const uint32_t eos = EOS;
    struct error err;
    if (vocabulary)
        return vocabulary;
    for (int i = 0; i < 256; i++) {
        bytes[i] = (char)i;
        tokens[i] = (struct vocabulary_token){&bytes[i], 1, false};
    }
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++)
        tokens[EOS + 1 + i] = (struct vocabulary_token){pieces[i], strlen(pieces[i]), false};
    CHECK(!vocabulary_create_from(&vocabulary, tokens, TOKENS, &eos, 1, &err));
    return vocabulary;
}

// Splitmix64: the walk depends on the input alone.
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void walk(struct grammar *grammar, uint64_t seed)
{
    char text[MAX_BYTES];
    size_t length = 0;
    struct grammar_state *state;
    struct error err;
    CHECK(!grammar_state_create(&state, grammar, &err));
    for (int step = 0; step < MAX_STEPS; step++) {
        uint32_t mask[WORDS], allowed[TOKENS], count = 0;
        grammar_state_fill(state, mask, WORDS);
        for (uint32_t id = 0; id < TOKENS; id++) {
            if (!(mask[id / 32] >> id % 32 & 1))
                continue;
            allowed[count++] = id;
            CHECK(id == EOS || grammar_state_admits(state, tokens[id].bytes, tokens[id].count));
        }
        CHECK(count > 0);
        uint32_t id = allowed[next_random(&seed) % count];
        if (id == EOS) {
            CHECK(grammar_state_complete(state));
            json_t *json = json_loadb(text, length, JSON_DECODE_ANY, NULL);
            CHECK(json);
            json_decref(json);
            break;
        }
        memcpy(text + length, tokens[id].bytes, tokens[id].count);
        length += tokens[id].count;
        grammar_state_advance(state, id);
        CHECK(!grammar_state_dead(state));
    }
    grammar_state_free(state);
}

static double seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vocabulary *vocabulary = vocabulary_get();
    struct grammar *grammar;
    struct error err = {0};
    if (size < 2)
        return 0;
    json_t *schema = json_loadb((const char *)data + 1, size - 1, JSON_DECODE_ANY, NULL);
    if (!schema)
        return 0;
    double start = seconds();
    CHECK(!grammar_create(&grammar, vocabulary, &err));
    grammar_schema(grammar, schema, "schema");
    json_decref(schema);
    if (grammar_compile(grammar, &err))
        CHECK(err.code == ERR_USAGE && !strncmp(err.msg, "schema", 6));
    else
        for (uint64_t i = 0; i < 2; i++)
            walk(grammar, 2 * data[0] + i);
    grammar_free(grammar);
    CHECK(seconds() - start < 10);
    return 0;
}

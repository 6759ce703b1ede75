// How long does a mask take? One line for each grammar: a synthetic vocabulary of 131072 tokens whose lengths are those of usual byte-level
// vocabularies, random sentences of the grammar, two walks with different seeds: the first finds the entries, the second uses them.
//
// Times are of the processor, so that other programs do not count.
//
//   compile_ms    schema to automaton
//   fill_us       one mask, over all positions of the second walk: median, p99 and the longest
//   first_us      of the first walk: with what is found once for each grammar and vocabulary
//   advance_us    taking a token, median
#include "engine/serve/grammar.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TOKENS = 131072, EOS = 256, MAX_BYTES = 16, WORDS = TOKENS / 32, POSITIONS = 4000 };

static char storage[TOKENS][MAX_BYTES + 1];
static struct vocabulary_token tokens[TOKENS];
static uint64_t random_state = 88172645463325252u;

static uint64_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

static double now_us(void)
{
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e6 * (double)time.tv_sec + 1e-3 * (double)time.tv_nsec;
}

// Words of letters with a blank in front or not, numbers, runs of white space, punctuation as in JSON and code, pieces of UTF-8.
static size_t make_token(char *out, int64_t id)
{
    static const char common[] = "eeeeeetttttaaaaooooiiiinnnnsssshhhrrrdddllluuccmmwwffggyyppbbvvkjxqz";
    static const char signs[] = "\"\"\"\"{}[]():;,.,.!?<>=+-*/\\_'|&%$#@~^`";
    uint64_t kind = random_bits() % 100;
    size_t length = 0, wanted = 2 + random_bits() % 4 + random_bits() % 4 + random_bits() % 4;
    if (id < 256) {
        out[0] = (char)id;
        return 1;
    }
    if (kind < 80) {
        if (kind < 45)
            out[length++] = ' ';
        while (length < wanted)
            out[length++] = common[random_bits() % (sizeof common - 1)];
        if (random_bits() % 5 == 0)
            out[length > 1 && out[0] == ' '] -= 'a' - 'A';
    } else if (kind < 82) {
        while (length < 2 + random_bits() % 2)
            out[length++] = (char)('0' + random_bits() % 10);
    } else if (kind < 83) {
        char blank = random_bits() % 2 ? ' ' : random_bits() % 2 ? '\n' : '\t';
        while (length < wanted)
            out[length++] = blank;
    } else if (kind < 90) {
        if (random_bits() % 3 == 0)
            out[length++] = ' ';
        wanted = length + 1 + random_bits() % 4;
        while (length < wanted)
            out[length++] = signs[random_bits() % (sizeof signs - 1)];
    } else {
        if (random_bits() % 2)
            out[length++] = ' ';
        for (int i = 0; i < 2 + (int)(random_bits() % 2); i++) {
            out[length++] = (char)0xE4;
            out[length++] = (char)(0x80 + random_bits() % 64);
            out[length++] = (char)(0x80 + random_bits() % 64);
        }
        length -= random_bits() % 3;
    }
    return length;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static uint32_t choose(const uint32_t *mask, int64_t position)
{
    static uint32_t allowed[TOKENS];
    int64_t count = 0, closing = 0;
    static uint32_t close[TOKENS];
    for (int64_t word = 0; word < WORDS; word++) {
        for (uint32_t bits = mask[word]; bits; bits &= bits - 1) {
            uint32_t id = (uint32_t)(32 * word) + (uint32_t)__builtin_ctz(bits);
            if (id == EOS)
                continue;
            allowed[count++] = id;
            if (storage[id][0] == '"' || storage[id][0] == '}' || storage[id][0] == ']')
                close[closing++] = id;
        }
    }
    if (!count)
        return EOS;
    (void)position;
    return closing && random_bits() % 8 == 0 ? close[random_bits() % (uint64_t)closing]
                                             : allowed[random_bits() % (uint64_t)count];
}

static double fill_us[POSITIONS], advance_us[POSITIONS];

static int walk(struct grammar *grammar, struct error *err)
{
    static uint32_t mask[WORDS];
    for (int64_t position = 0; position < POSITIONS;) {
        struct grammar_state *state;
        int rc = grammar_state_create(&state, grammar, err);
        if (rc)
            return rc;
        for (int64_t length = 0; position < POSITIONS && length < 400; length++, position++) {
            double start = now_us();
            grammar_state_fill(state, mask, WORDS);
            fill_us[position] = now_us() - start;
            uint32_t token = choose(mask, length);
            start = now_us();
            grammar_state_advance(state, token);
            advance_us[position] = now_us() - start;
            if (token == EOS) {
                position++;
                break;
            }
        }
        grammar_state_free(state);
    }
    qsort(fill_us, POSITIONS, sizeof *fill_us, compare);
    qsort(advance_us, POSITIONS, sizeof *advance_us, compare);
    return 0;
}

static int bench(struct vocabulary *vocabulary, const char *name, const char *schema, struct error *err)
{
    struct grammar *grammar;
    int rc = grammar_create(&grammar, vocabulary, err);
    if (rc)
        return rc;
    json_t *json = schema ? json_loads(schema, 0, NULL) : NULL;
    if (json)
        grammar_schema(grammar, json, "schema");
    else
        grammar_json(grammar, true);
    json_decref(json);
    double start = now_us(), compile_ms;
    if ((rc = grammar_compile(grammar, err)))
        goto done;
    compile_ms = (now_us() - start) / 1e3;
    if ((rc = walk(grammar, err)))
        goto done;
    double first_p99 = fill_us[POSITIONS * 99 / 100], first_max = fill_us[POSITIONS - 1];
    if ((rc = walk(grammar, err)))
        goto done;
    printf("grammar name=%s tokens=%d compile_ms=%.2f fill_us_p50=%.1f fill_us_p99=%.1f fill_us_max=%.1f "
           "first_us_p99=%.1f first_us_max=%.1f "
           "advance_us_p50=%.2f\n",
           name, (int)TOKENS, compile_ms, fill_us[POSITIONS / 2], fill_us[POSITIONS * 99 / 100], fill_us[POSITIONS - 1],
           first_p99, first_max, advance_us[POSITIONS / 2]);
done:
    grammar_free(grammar);
    return rc;
}

int main(void)
{
    static const struct {
        const char *name, *schema;
    } cases[] = {
        {"json_object", NULL},
        {"person",
         "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{\"type\":\"integer\","
         "\"minimum\":0,\"maximum\":130},"
         "\"email\":{\"type\":[\"string\",\"null\"]},\"tags\":{\"type\":\"array\",\"items\":{\"type\":\"string\"}},"
         "\"state\":{\"enum\":[\"open\",\"closed\",\"waiting\"]}},\"required\":[\"name\",\"age\",\"email\",\"tags\","
         "\"state\"],"
         "\"additionalProperties\":false}"},
        {"bounded_strings", "{\"type\":\"array\",\"items\":{\"type\":\"string\",\"minLength\":3,\"maxLength\":60}}"},
        {"pattern", "{\"type\":\"array\",\"items\":{\"type\":\"string\",\"pattern\":\"^[A-Za-z ,.]{1,80}$\"}}"},
        {"additional", "{\"type\":\"object\",\"properties\":{\"id\":{\"type\":\"integer\"}},\"additionalProperties\":{"
                       "\"type\":\"string\"}}"},
        {"tree", "{\"$ref\":\"#/$defs/"
                 "n\",\"$defs\":{\"n\":{\"type\":\"object\",\"properties\":{\"value\":{\"type\":\"number\"},"
                 "\"children\":{\"type\":\"array\","
                 "\"items\":{\"$ref\":\"#/$defs/n\"}}},\"required\":[\"value\",\"children\"]}}}"},
    };
    const uint32_t eos[] = {EOS};
    struct vocabulary *vocabulary;
    struct error err = {0};
    for (int64_t id = 0; id < TOKENS; id++)
        tokens[id] = (struct vocabulary_token){storage[id], make_token(storage[id], id), id == EOS};
    double start = now_us();
    int rc = vocabulary_create_from(&vocabulary, tokens, TOKENS, eos, 1, &err);
    if (rc)
        goto done;
    printf("vocabulary tokens=%d create_ms=%.1f\n", (int)TOKENS, (now_us() - start) / 1e3);
    for (size_t i = 0; i < sizeof cases / sizeof *cases && !rc; i++)
        rc = bench(vocabulary, cases[i].name, cases[i].schema, &err);
    vocabulary_free(vocabulary);
done:
    if (rc)
        fprintf(stderr, "%s\n", err.msg);
    return rc ? 1 : 0;
}

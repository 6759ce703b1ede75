// Several threads compile grammars over one vocabulary and walk their states at the same time: what the vocabulary keeps is shared and safe, and
// every thread sees the same masks.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/serve/grammar_cache.h"
#include "tests/grammar_help.h"

#include <pthread.h>
#include <unistd.h>

enum { THREADS = 4, ROUNDS = 60, STEPS = 12 };

static struct test_vocabulary vocabulary;
static uint64_t sums[THREADS];

static void *work(void *arg)
{
    uint64_t *sum = arg;
    for (int round = 0; round < ROUNDS; round++) {
        char schema[200];
        struct grammar *grammar = NULL;
        struct grammar_state *state = NULL;
        struct error err;
        uint32_t mask[TEST_WORDS];
        snprintf(schema, sizeof schema,
                 "{\"type\":\"array\",\"minItems\":2,\"items\":{\"type\":\"string\",\"maxLength\":%d}}", round % 7 + 1);
        json_t *json = json_loads(schema, 0, NULL);
        if (grammar_create(&grammar, vocabulary.vocabulary, &err))
            return NULL;
        grammar_schema(grammar, json, "schema");
        json_decref(json);
        if (grammar_compile(grammar, &err) || grammar_state_create(&state, grammar, &err))
            return NULL;
        for (int step = 0; step < STEPS; step++) {
            grammar_state_fill(state, mask, TEST_WORDS);
            int64_t id = 0;
            for (int64_t word = 0; word < TEST_WORDS; word++)
                *sum = (*sum ^ mask[word]) * 0x9E3779B97F4A7C15u;
            for (int skip = round + 3 * step; !test_bit(mask, id) || skip-- > 0;)
                id = (id + 1) % vocabulary.count;
            grammar_state_advance(state, (uint32_t)id);
        }
        grammar_state_free(state);
        grammar_free(grammar);
    }
    return arg;
}

static void test_threads(void **unused)
{
    (void)unused;
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &sums[i]), 0);
    for (int i = 0; i < THREADS; i++) {
        void *done;
        assert_int_equal(pthread_join(threads[i], &done), 0);
        assert_non_null(done);
        assert_true(sums[i] != 0 && sums[i] == sums[0]);
    }
}

// Giving a grammar back waits for nobody who holds the lock, as a thread does that makes a mask.
static void test_release(void **unused)
{
    (void)unused;
    struct grammar *grammar = NULL;
    struct error err = {0};
    if (test_schema_grammar(&grammar, vocabulary.vocabulary, "{\"type\":\"null\"}", &err))
        fail_msg("%s", err.msg);
    pthread_mutex_lock(&vocabulary.vocabulary->lock);
    alarm(10);
    grammar_free(grammar);
    alarm(0);
    pthread_mutex_unlock(&vocabulary.vocabulary->lock);
    // What nobody uses any more goes with the next compilations.
    for (int i = 0; i < 3 * GRAMMAR_CACHE_LANGUAGES; i++) {
        char schema[64];
        snprintf(schema, sizeof schema, "{\"const\":%d}", i);
        if (test_schema_grammar(&grammar, vocabulary.vocabulary, schema, &err))
            fail_msg("%s", err.msg);
        grammar_free(grammar);
    }
    int kept = 0;
    for (struct grammar_language *each = vocabulary.vocabulary->cache->languages; each; each = each->next)
        kept++;
    assert_true(kept > 1 && kept <= GRAMMAR_CACHE_LANGUAGES + 1);
}

int main(void)
{
    test_vocabulary_open(&vocabulary, 100);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads), cmocka_unit_test(test_release)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    test_vocabulary_close(&vocabulary);
    return failed;
}

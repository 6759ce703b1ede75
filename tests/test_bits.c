// Mixed precision: words of matrices and kinds, files about them, the choice against every possible one, and the errors it rests on.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "formats/matrix_kinds.h"
#include "shard/bits.h"
#include "shard/bits_file.h"
#include "shard/bits_measure.h"
#include "shard/hf_config.h"
#include "shard/mix_text.h"
#include "shard/model_rows.h"
#include "tests/random_help.h"

// ---- words -------------------------------------------------------------------------------------------------------

static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *word;
        bool ok;
        int32_t layer;
        enum tensor_role role;
    } cases[] = {
        {"0.qkv", true, 0, ROLE_QKV},
        {"61.expert_down", true, 61, ROLE_EXPERT_DOWN},
        {"3.kv_a", true, 3, ROLE_KV_A},
        {"3.kv_b", false, 0, 0},
        {"3.embedding", false, 0, 0},
        {"03.qkv", false, 0, 0},
        {"-1.qkv", false, 0, 0},
        {"1qkv", false, 0, 0},
        {"1.", false, 0, 0},
        {"", false, 0, 0},
        {"99999999999999999999.qkv", false, 0, 0},
        {"1.qkv ", false, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t layer = -1;
        enum tensor_role role = ROLE_COUNT;
        char word[MATRIX_WORD_BYTES];
        bool ok = matrix_name_parse(cases[i].word, &layer, &role);
        if (ok != cases[i].ok)
            fail_msg("\"%s\"", cases[i].word);
        if (!ok)
            continue;
        assert_int_equal(layer, cases[i].layer);
        assert_int_equal(role, cases[i].role);
        matrix_name_print(word, layer, role);
        assert_string_equal(word, cases[i].word);
    }
}

static void test_kind_words(void **state)
{
    (void)state;
    static const struct {
        const char *word;
        bool ok;
        enum weight_kind kind;
        uint32_t group_size;
    } cases[] = {
        {"int8", true, WEIGHT_INT8, 0},
        {"bf16", true, WEIGHT_BF16, 0},
        {"int4:32", true, WEIGHT_INT4, 32},
        {"int4z:128", true, WEIGHT_INT4Z, 128},
        {"nvfp4", true, WEIGHT_NVFP4, 16},
        {"int4", false, 0, 0},
        {"int4:", false, 0, 0},
        {"int4:48", false, 0, 0},
        {"int4:032", false, 0, 0},
        {"int8:128", false, 0, 0},
        {"int5:32", false, 0, 0},
        {"f32", false, 0, 0},
        {"int4:32x", false, 0, 0},
        {"none", false, 0, 0},
        {"", false, 0, 0},
        {"int4:32:32", false, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        enum weight_kind kind = WEIGHT_KIND_COUNT;
        uint32_t group_size = 1;
        char word[MATRIX_WORD_BYTES];
        bool ok = matrix_kind_parse(cases[i].word, &kind, &group_size);
        if (ok != cases[i].ok)
            fail_msg("\"%s\"", cases[i].word);
        if (!ok)
            continue;
        assert_int_equal(kind, cases[i].kind);
        assert_int_equal(group_size, cases[i].group_size);
        matrix_kind_print(word, kind, group_size);
        assert_string_equal(word, cases[i].word);
    }
}

static void test_summary(void **state)
{
    (void)state;
    struct matrix_kind list[] = {{1, ROLE_DOWN, WEIGHT_INT4, 128},
                                 {0, ROLE_QKV, WEIGHT_INT8, 0},
                                 {0, ROLE_DOWN, WEIGHT_INT8, 0},
                                 {2, ROLE_DOWN, WEIGHT_INT4, 128},
                                 {10, ROLE_DOWN, WEIGHT_INT4, 32}};
    char line[128], small[20];
    matrix_kinds_sort(list, 5);
    mix_text_line(line, sizeof line, list, 5);
    assert_string_equal(line, "qkv 1 int8; down 2 int4:128, 1 int8, 1 int4:32");
    mix_text_line(small, sizeof small, list, 5);
    assert_int_equal(strlen(small), sizeof small - 1);
    assert_non_null(matrix_kinds_find(list, 5, 10, ROLE_DOWN));
    assert_null(matrix_kinds_find(list, 5, 10, ROLE_QKV));
}

// ---- the bundled model -------------------------------------------------------------------------------------------

struct subject {
    struct hf_config config;
    struct model_rows rows;
    struct plan *plan;
    struct bits bits;
};

static struct subject subject;

static int open_subject(void **state)
{
    (void)state;
    struct error err;
    const struct plan_wish wish = {.quant = "none", .tp_size = 1, .experts = EXPERTS_TP};
    if (hf_config_read(&subject.config, "tests/model", NULL, &err) ||
        model_rows_open(&subject.rows, "tests/model", &err) ||
        plan_of_wish(&subject.plan, &subject.config.model, &subject.rows.config, NULL, &wish, &err) ||
        model_rows_init(&subject.rows, subject.plan, &subject.config, &err) ||
        bits_init(&subject.bits, subject.plan, &err))
        fail_msg("%s", err.msg);
    return 0;
}

static int close_subject(void **state)
{
    (void)state;
    bits_clear(&subject.bits);
    plan_free(subject.plan);
    model_rows_close(&subject.rows);
    return 0;
}

static uint64_t chosen_bytes(const struct bits *bits)
{
    uint64_t bytes = 0;
    for (size_t u = 0; u < bits->num_units; u++)
        bytes += bits->units[u].bytes[bits->units[u].chosen];
    return bytes;
}

static void test_units(void **state)
{
    (void)state;
    const struct bits *bits = &subject.bits;
    assert_int_equal(bits->num_units, 16);
    assert_int_equal(bits->weights, 4 * (1024 * 256 + 256 * 512 + 2048 * 256 + 256 * 1024));
    const struct bits_unit *down = bits_find(bits, 2, ROLE_DOWN);
    assert_int_equal(down->rows, 256);
    assert_int_equal(down->cols, 1024);
    assert_int_equal(down->bytes[0], 256 * 1024 / 2 + 256 * 1024 / 128 * 2);
    assert_null(bits_find(bits, -1, ROLE_EMBEDDING));
    assert_null(bits_find(bits, 4, ROLE_DOWN));
}

// The errors do not depend on the number of threads, and are near those of normal weights.
static void test_measure(void **state)
{
    (void)state;
    struct bits once, again;
    struct error err;
    struct bits *const both[] = {&once, &again};
    for (int i = 0; i < 2; i++) {
        struct thread_pool *pool = NULL;
        struct progress progress;
        progress_start(&progress, "measure", 1, true);
        if (bits_init(both[i], subject.plan, &err) || thread_pool_create(&pool, 1 + 2 * i, &err) ||
            bits_measure(both[i], subject.plan, subject.rows.source, WEIGHT_SCALES_SEARCHED, pool, &progress, &err))
            fail_msg("%s", err.msg);
        thread_pool_free(pool);
    }
    for (size_t u = 0; u < once.num_units; u++) {
        assert_memory_equal(once.units[u].error, again.units[u].error, sizeof once.units[u].error);
        for (int c = 0; c < BITS_CANDIDATES; c++) {
            double error = sqrt(once.units[u].error[c]), normal = sqrt(subject.bits.units[u].error[c]);
            if (!(fabs(error - normal) <= 0.25 * normal)) // trained weights are not quite normal
                fail_msg("unit %zu, candidate %d: error %g, of normal weights %g", u, c, error, normal);
        }
    }
    bits_clear(&once);
    bits_clear(&again);
}

// ---- the choice --------------------------------------------------------------------------------------------------

// The least that can be lost within a budget, by trying everything.
static double least_lost(const struct bits *bits, size_t u, uint64_t bytes_left)
{
    double least = INFINITY;
    if (u == bits->num_units)
        return 0;
    for (int c = 0; c < BITS_CANDIDATES; c++)
        if (bits->units[u].bytes[c] <= bytes_left) {
            double lost = bits->units[u].sensitivity * bits->units[u].error[c] +
                          least_lost(bits, u + 1, bytes_left - bits->units[u].bytes[c]);
            least = lost < least ? lost : least;
        }
    return least;
}

static void test_choice_is_best(void **state)
{
    (void)state;
    random_state = 9;
    for (int round = 0; round < 200; round++) {
        struct bits_unit units[4];
        struct bits bits = {.units = units, .num_units = 4};
        struct error err;
        for (size_t u = 0; u < 4; u++) {
            units[u] = (struct bits_unit){.layer = (int32_t)u, .role = ROLE_DOWN, .matrices = 1};
            units[u].rows = 64 * (1 + random_bits() % 8);
            units[u].cols = 128 * (1 + random_bits() % 8);
            units[u].sensitivity = (double)(random_bits() % 100);
            bits.weights += units[u].rows * units[u].cols;
            for (int c = 0; c < BITS_CANDIDATES; c++) {
                units[u].bytes[c] = bits_unit_bytes(&units[u], bits_candidates[c].kind, bits_candidates[c].group_size);
                units[u].error[c] = (double)(random_bits() % 1000) * 1e-5 / (double)units[u].bytes[c];
            }
        }
        uint32_t millibits = 4125 + (uint32_t)(random_bits() % 8000);
        uint64_t budget = bits.weights * millibits / 8000;
        if (bits_choose(&bits, millibits, &err))
            fail_msg("round %d: %s", round, err.msg);
        assert_true(chosen_bytes(&bits) <= budget);
        double wanted = least_lost(&bits, 0, budget);
        if (!(bits_lost(&bits) <= wanted * (1 + 1e-12) + 1e-300))
            fail_msg("round %d: lost %g, at best %g", round, bits_lost(&bits), wanted);
    }
}

// More bits never lose more; the same question has the same answer.
static void test_curve(void **state)
{
    (void)state;
    struct bits *bits = &subject.bits;
    struct error err;
    double last = INFINITY;
    for (uint32_t millibits = 4125; millibits <= 9000; millibits += 25) {
        int chosen[16];
        if (bits_choose(bits, millibits, &err))
            fail_msg("%s", err.msg);
        for (size_t u = 0; u < 16; u++)
            chosen[u] = bits->units[u].chosen;
        assert_int_equal(bits_choose(bits, millibits, &err), 0);
        for (size_t u = 0; u < 16; u++)
            assert_int_equal(bits->units[u].chosen, chosen[u]);
        assert_true(chosen_bytes(bits) * 8000 <= bits->weights * millibits);
        if (!(bits_lost(bits) <= last))
            fail_msg("%u millibits lose %g, less lose %g", millibits, bits_lost(bits), last);
        last = bits_lost(bits);
    }
    assert_int_equal(bits_choose(bits, 4124, &err), ERR_USAGE);
    assert_string_equal(err.msg, "--bits 4.124: this model's matrices take at least 4.125 bits per weight, scales and "
                                 "padding included");
}

static void test_among(void **state)
{
    (void)state;
    static const char *const refused[] = {"", "int4,", "int5", "int4,,int8", "int4 ,int8", "f32", "mxfp4"};
    struct bits bits;
    struct error err;
    assert_int_equal(bits_init(&bits, subject.plan, &err), 0);
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        assert_int_equal(bits_among(&bits, refused[i], &err), ERR_USAGE);
    assert_int_equal(bits_among(&bits, "nl4,int8", &err), 0);
    assert_int_equal(bits_choose(&bits, 5500, &err), 0);
    for (size_t u = 0; u < bits.num_units; u++) {
        enum weight_kind kind = bits_candidates[bits.units[u].chosen].kind;
        assert_true(kind == WEIGHT_NL4 || kind == WEIGHT_INT8);
    }
    assert_int_equal(bits_among(&bits, "int8", &err), 0);
    assert_int_equal(bits_choose(&bits, 7900, &err), ERR_USAGE);
    bits_clear(&bits);
}

// So many matrices that sizes are rounded to steps: the budget holds, and almost all of it is spent.
static void test_many_units(void **state)
{
    (void)state;
    enum { UNITS = 3000 };
    random_state = 10;
    struct bits bits = {.units = calloc(UNITS, sizeof *bits.units), .num_units = UNITS};
    struct error err;
    assert_non_null(bits.units);
    for (size_t u = 0; u < UNITS; u++) {
        struct bits_unit *unit = &bits.units[u];
        *unit = subject.bits.units[u % 16];
        unit->layer = (int32_t)u;
        unit->rows = 1 + random_bits() % 5000;
        unit->cols = 1 + random_bits() % 5000;
        unit->sensitivity = 1 + (double)(random_bits() % 100);
        bits.weights += unit->rows * unit->cols * unit->matrices;
        for (int c = 0; c < BITS_CANDIDATES; c++)
            unit->bytes[c] = bits_unit_bytes(unit, bits_candidates[c].kind, bits_candidates[c].group_size);
    }
    assert_int_equal(bits_choose(&bits, 5500, &err), 0);
    double spent = 8 * (double)chosen_bytes(&bits) / (double)bits.weights;
    if (!(spent <= 5.5 && spent >= 5.499))
        fail_msg("%g bits", spent);
    bits_clear(&bits);
}

// ---- files -------------------------------------------------------------------------------------------------------

static const char *written(const char *text)
{
    static char path[64];
    snprintf(path, sizeof path, "/tmp/tpshard-test-bits-%d.json", (int)getpid());
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
    return path;
}

static void test_kinds_file(void **state)
{
    (void)state;
    struct matrix_kind *list;
    struct error err;
    const char *path = written("{\"note\": 1, \"kinds\": {\"*\": \"int4:64\", \"*.down\": \"int8\", \"1.*\": \"bf16\", "
                               "\"1.down\": \"nvfp4\"}}");
    if (bits_file_kinds(&list, &subject.bits, path, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(matrix_kinds_find(list, 16, 0, ROLE_QKV)->group_size, 64);
    assert_int_equal(matrix_kinds_find(list, 16, 3, ROLE_DOWN)->kind, WEIGHT_INT8);
    assert_int_equal(matrix_kinds_find(list, 16, 1, ROLE_QKV)->kind, WEIGHT_BF16);
    assert_int_equal(matrix_kinds_find(list, 16, 1, ROLE_DOWN)->kind, WEIGHT_NVFP4);
    free(list);
    unlink(path);
}

static void test_refused_files(void **state)
{
    (void)state;
    static const struct {
        bool kinds;
        const char *text, *wanted;
    } cases[] = {
        {true, "[]", "must hold a JSON object"},
        {true, "{}", "kinds must be an object, found nothing"},
        {true, "{\"kinds\": [1]}", "kinds must be an object"},
        {true, "{\"kinds\": {\"*\": \"int4\"}}", "found int4"},
        {true, "{\"kinds\": {\"*\": 4}}", "found an integer"},
        {true, "{\"kinds\": {\"*\": \"fp8g\"}}", "found fp8g"},
        {true, "{\"kinds\": {\"*\": \"int8\", \"*.donw\": \"int8\"}}",
         "kinds.*.donw is no matrix of this model's layers"},
        {true, "{\"kinds\": {\"*\": \"int8\", \"4.down\": \"int8\"}}", "kinds.4.down is no matrix"},
        {true, "{\"kinds\": {\"*\": \"int8\", \"*.kv_a\": \"int8\"}}", "kinds.*.kv_a is no matrix"},
        {true, "{\"kinds\": {\"*.down\": \"int8\"}}", "kinds. says nothing of 0.qkv"},
        {false, "{\"sensitivity\": {\"*.down\": 1}}", "sensitivity. says nothing of 0.qkv"},
        {false, "{\"sensitivity\": {\"*\": -1}}", "from 0 to 10^9"},
        {false, "{\"sensitivity\": {\"*\": 1e10}}", "from 0 to 10^9"},
        {false, "{\"sensitivity\": {\"*\": \"1\"}}", "found a string"},
        {false, "{\"sensitivity\": {\"*\": 0}}", "no matrix has a sensitivity above 0"},
        {false, "{\"sensitivity\": {\"*\": 1, \"*\": 2}}", "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct bits bits;
        struct matrix_kind *list;
        struct error err = {0};
        const char *path = written(cases[i].text);
        assert_int_equal(bits_init(&bits, subject.plan, &err), 0);
        int rc = cases[i].kinds ? bits_file_kinds(&list, &bits, path, &err) : bits_file_sensitivity(&bits, path, &err);
        if (rc != ERR_USAGE || !strstr(err.msg, cases[i].wanted))
            fail_msg("%s: %d \"%s\", wanted \"%s\"", cases[i].text, rc, err.msg, cases[i].wanted);
        bits_clear(&bits);
        unlink(path);
    }
}

static void test_sensitivity_file(void **state)
{
    (void)state;
    struct bits bits;
    struct error err;
    const char *path = written("{\"sensitivity\": {\"*\": 0, \"2.o\": 3.5}}");
    if (bits_init(&bits, subject.plan, &err) || bits_file_sensitivity(&bits, path, &err) ||
        bits_choose(&bits, 4500, &err))
        fail_msg("%s", err.msg);
    // All that is to spend goes where it counts, as far as it brings anything.
    assert_int_equal(bits_candidates[bits_find(&bits, 2, ROLE_O)->chosen].kind, WEIGHT_BF16);
    assert_int_equal(bits_find(&bits, 0, ROLE_O)->chosen, 0);
    bits_clear(&bits);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),         cmocka_unit_test(test_kind_words),
        cmocka_unit_test(test_summary),       cmocka_unit_test(test_units),
        cmocka_unit_test(test_measure),       cmocka_unit_test(test_choice_is_best),
        cmocka_unit_test(test_curve),         cmocka_unit_test(test_many_units),
        cmocka_unit_test(test_among),         cmocka_unit_test(test_kinds_file),
        cmocka_unit_test(test_refused_files), cmocka_unit_test(test_sensitivity_file),
    };
    return cmocka_run_group_tests(tests, open_subject, close_subject);
}

// What tpengine eval counts: scores of a position, intervals that hold for texts whose tokens depend on each other, windows that score
// each token once, and logits that come back from a file or are refused.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/eval_logits.h"
#include "engine/eval_statistics.h"
#include "engine/text_windows.h"
#include "tests/floats_help.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// ---- one position ----------------------------------------------------------------------------------------------

static void test_scores_are_those_of_the_definitions(void **state)
{
    (void)state;
    enum { VOCAB = 700 };
    float q[VOCAB], p[VOCAB];
    for (int round = 0; round < 50; round++) {
        double sum_q = 0, sum_p = 0, kl = 0;
        float shift = round == 0 ? 0 : 500 * uniform(); // exp of a logit would overflow
        for (int i = 0; i < VOCAB; i++) {
            q[i] = 6 * uniform() + shift;
            p[i] = 6 * uniform() - shift;
            sum_q += exp((double)q[i] - shift);
            sum_p += exp((double)p[i] + shift);
        }
        for (int i = 0; i < VOCAB; i++) {
            double at_p = exp((double)p[i] + shift) / sum_p, at_q = exp((double)q[i] - shift) / sum_q;
            kl += at_p * log(at_p / at_q);
        }
        uint32_t next = (uint32_t)random_below(VOCAB);
        struct position_score s;
        eval_statistics_score(&s, q, p, VOCAB, next);
        // Sums of 700 doubles in another order.
        assert_true(fabs(s.nll + log(exp((double)q[next] - shift) / sum_q)) <= 1e-11);
        assert_true(fabs(s.reference_nll + log(exp((double)p[next] + shift) / sum_p)) <= 1e-11);
        assert_true(fabs(s.kl - kl) <= 1e-11);
        eval_statistics_score(&s, q, q, VOCAB, next);
        assert_true(s.kl == 0 && s.top1 && s.top5 && s.nll == s.reference_nll);
    }
}

static void test_the_likeliest_tokens(void **state)
{
    (void)state;
    static const struct {
        float q[7], p[7];
        bool top1, top5;
    } cases[] = {
        {{9, 1, 2, 3, 4, 5, 6}, {9, 8, 7, 6, 5, 4, 3}, true, true},
        {{5, 9, 2, 3, 4, 1, 0}, {9, 8, 7, 6, 5, 4, 3}, false, true},  // second
        {{5, 9, 8, 7, 6, 1, 0}, {9, 8, 7, 6, 5, 4, 3}, false, true},  // fifth
        {{4, 9, 8, 7, 6, 5, 0}, {9, 8, 7, 6, 5, 4, 3}, false, false}, // sixth
        {{1, 1, 1, 1, 1, 1, 1}, {9, 8, 7, 6, 5, 4, 3}, true, true},   // of equals the first
        {{1, 1, 1, 1, 1, 1, 1}, {3, 4, 5, 6, 9, 8, 7}, false, true},
        {{1, 1, 1, 1, 1, 1, 1}, {3, 4, 5, 6, 7, 9, 8}, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct position_score s;
        eval_statistics_score(&s, cases[i].q, cases[i].p, 7, 0);
        if (s.top1 != cases[i].top1 || s.top5 != cases[i].top5)
            fail_msg("case %zu: top1 %d, top5 %d", i, s.top1, s.top5);
    }
}

static void test_what_is_no_number_is_seen(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY};
    for (int b = 0; b < 2; b++)
        for (int at = 0; at < 5; at++) {
            float good[5] = {1, 2, 3, 4, 5}, damaged[5] = {1, 2, 3, 4, 5};
            struct position_score s;
            damaged[at] = bad[b];
            eval_statistics_score(&s, damaged, NULL, 5, 2);
            assert_false(isfinite(s.nll));
            eval_statistics_score(&s, good, damaged, 5, 2);
            assert_false(isfinite(s.reference_nll));
            assert_true(isfinite(s.nll));
        }
}

// ---- intervals -------------------------------------------------------------------------------------------------

static void test_blocks_grow_with_the_text(void **state)
{
    (void)state;
    static const int64_t cases[][2] = {{1, 32}, {768, 32}, {2400, 100}, {12288, 512}, {1000000, 512}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(eval_statistics_block(cases[i][0]), cases[i][1]);
}

// Blocks of 32 with means 0, 0 ... and 1, 1 ...: the standard error is that of so many values.
static void test_known_intervals(void **state)
{
    (void)state;
    static const struct {
        int blocks;
        double t; // of blocks - 1, from tables
    } cases[] = {{2, 12.7062}, {6, 2.5706}, {12, 2.2010}, {22, 2.0796}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        double values[32 * 22];
        int blocks = cases[c].blocks;
        for (int i = 0; i < 32 * blocks; i++)
            values[i] = i / 32 % 2;
        struct estimate e = eval_statistics_mean(values, 32 * blocks);
        double error = 0.5 / sqrt(blocks - 1); // deviations are 1/2: sqrt(B / (B - 1) * B / 4) / B
        assert_true(fabs(e.value - 0.5) <= 1e-15);
        if (!(fabs(e.high - e.value - cases[c].t * error) <= 3e-4 && fabs(e.high + e.low - 1) <= 1e-12))
            fail_msg("%d blocks: %.6f .. %.6f", blocks, e.low, e.high);
    }
}

static void test_few_tokens_have_no_interval(void **state)
{
    (void)state;
    double values[48] = {1, 2, 3};
    assert_true(isnan(eval_statistics_mean(values, 47).low) && isnan(eval_statistics_share(values, 47).high));
    assert_false(isnan(eval_statistics_mean(values, 48).low));
    assert_true(eval_statistics_mean(values, 3).value == 2);
}

static void test_shares_stay_between_0_and_1(void **state)
{
    (void)state;
    double values[1000];
    for (int ones = 0; ones <= 1000; ones += 250) {
        for (int i = 0; i < 1000; i++)
            values[i] = (i * 7919) % 1000 < ones;
        struct estimate e = eval_statistics_share(values, 1000);
        assert_true(fabs(e.value - ones / 1000.0) <= 1e-12);
        assert_true(e.low >= 0 && e.low <= e.value && e.value <= e.high && e.high <= 1 && e.low < e.high);
    }
}

// Tokens that hang together (each is 0.9 of the one before and something new): an interval that took them as independent would hold the truth in about
// a third of all texts. Of 400 texts, 95 % +- 4 standard deviations (1.1 % each) would be 90.6 and more; blocks of 100 tokens miss a little.
static void test_intervals_hold_for_dependent_tokens(void **state)
{
    (void)state;
    enum { TEXTS = 400, TOKENS = 2400 };
    static double values[TOKENS];
    int held = 0, shares_held = 0;
    for (int text = 0; text < TEXTS; text++) {
        double x = 0;
        for (int i = -100; i < TOKENS; i++) {
            x = 0.9 * x + uniform();
            if (i >= 0)
                values[i] = x;
        }
        struct estimate e = eval_statistics_mean(values, TOKENS);
        held += e.low <= 0 && 0 <= e.high;
        for (int i = 0; i < TOKENS; i++)
            values[i] = values[i] > 0;
        e = eval_statistics_share(values, TOKENS);
        shares_held += e.low <= 0.5 && 0.5 <= e.high;
    }
    if (held < 360 || held > 396 || shares_held < 360 || shares_held > 396)
        fail_msg("of %d intervals %d of means and %d of shares hold", TEXTS, held, shares_held);
}

// ---- windows ---------------------------------------------------------------------------------------------------

static void check_windows(int64_t count, int64_t bos, int64_t context, int64_t stride)
{
    uint32_t ids[64], window[64];
    for (int64_t i = 0; i < count; i++)
        ids[i] = (uint32_t)(100 + i);
    struct text_windows w = {.ids = ids, .count = count, .bos = bos, .context = context, .stride = stride};
    int64_t body = text_windows_body(&w), total = text_windows_total(w), scored = 0, n, first, windows = 0;
    int64_t next = bos >= 0 ? 0 : 1; // the token that is to be scored next
    for (; text_windows_next(&w, window, &n, &first); windows++) {
        int64_t lead = bos >= 0, begin = windows * stride;
        assert_true(n >= 1 && n <= context && first >= 1 && first <= n);
        if (lead)
            assert_int_equal(window[0], bos);
        for (int64_t i = lead; i < n; i++)
            assert_int_equal(window[i], 100 + begin + i - lead);
        if (bos < 0 && stride == body) // the first of each window has nothing in front of it
            next = begin + 1;
        for (int64_t i = first; i < n; i++, scored++)
            assert_int_equal(window[i], 100 + next++);
        if (windows > 0 && n > first)
            assert_true(first - lead >=
                        (body - stride > lead ? body - stride : !lead)); // context in front of the first
    }
    assert_int_equal(scored, total);
    assert_int_equal(next < count ? count : next, bos < 0 && count % body == 1 && stride == body ? count : next);
    if (bos >= 0 || stride < body)
        assert_int_equal(total, bos >= 0 ? count : count > 0 ? count - 1 : 0);
}

static void test_windows_score_each_token_once(void **state)
{
    (void)state;
    for (int64_t bos = -1; bos <= 7; bos += 8)
        for (int64_t context = 2; context <= 9; context++)
            for (int64_t stride = 1; stride <= context - (bos >= 0); stride++)
                for (int64_t count = 0; count <= 40; count++)
                    check_windows(count, bos, context, stride);
}

// ---- logits in a file --------------------------------------------------------------------------------------------

enum { VOCAB = 5, ROWS = 7 };
static const struct eval_logits_key key = {.vocab_size = VOCAB, .rows = ROWS, .context = 4, .stride = 3, .text = 77};
static char directory[64], path[128];

static int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_eval.XXXXXX");
    if (!mkdtemp(directory))
        return 1;
    snprintf(path, sizeof path, "%s/logits", directory);
    return 0;
}

static int leave_directory(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(directory);
}

static int files_in_directory(void)
{
    int count = 0;
    DIR *dir = opendir(directory);
    assert_non_null(dir);
    for (const struct dirent *entry; (entry = readdir(dir));)
        count += entry->d_name[0] != '.';
    closedir(dir);
    return count;
}

static void fill(float rows[ROWS * VOCAB])
{
    for (int i = 0; i < ROWS * VOCAB; i++)
        rows[i] = (float)(i * i) / 7;
}

static void write_all(void)
{
    unlink(path); // what is damaged is nobody's file any more, and is not replaced
    struct eval_logits *logits;
    struct error err;
    float rows[ROWS * VOCAB];
    fill(rows);
    assert_int_equal(eval_logits_create(&logits, path, &key, &err), 0);
    assert_int_equal(eval_logits_write(logits, rows, 4, &err), 0);
    assert_int_equal(eval_logits_write(logits, rows + 4 * VOCAB, 3, &err), 0);
    assert_int_equal(eval_logits_finish(logits, &err), 0);
    eval_logits_close(logits);
    assert_int_equal(files_in_directory(), 1);
}

// Reads all in pieces of other sizes; 0 or an error.
static int read_all(const struct eval_logits_key *wanted, struct error *err)
{
    static const int64_t pieces[] = {1, 5, 1};
    struct eval_logits *logits;
    float rows[ROWS * VOCAB];
    int rc = eval_logits_open(&logits, path, wanted, err);
    if (rc)
        return rc;
    fill(rows);
    for (int64_t i = 0, row = 0; i < 3 && !rc; row += pieces[i++]) {
        const float *got;
        rc = eval_logits_read(logits, pieces[i], &got, err);
        if (!rc && memcmp(got, rows + row * VOCAB, (size_t)pieces[i] * VOCAB * sizeof *got) != 0)
            rc = eval_logits_check(logits, NULL) ? 0 : 1; // only where the check will say it
    }
    const float *more;
    if (!rc)
        assert_int_equal(eval_logits_read(logits, 1, &more, NULL), ERR_OTHER);
    rc = rc ? rc : eval_logits_check(logits, err);
    eval_logits_close(logits);
    return rc;
}

static void test_logits_come_back(void **state)
{
    (void)state;
    struct error err;
    write_all();
    assert_int_equal(read_all(&key, &err), 0);
    write_all(); // over the one that is there
    assert_int_equal(read_all(&key, &err), 0);
}

static void test_unfinished_logits_leave_nothing(void **state)
{
    (void)state;
    struct eval_logits *logits;
    struct error err;
    float rows[ROWS * VOCAB] = {0};
    unlink(path);
    assert_int_equal(eval_logits_create(&logits, path, &key, &err), 0);
    assert_int_equal(eval_logits_write(logits, rows, 4, &err), 0);
    assert_int_equal(eval_logits_finish(logits, &err), ERR_OTHER);
    assert_non_null(strstr(err.msg, "4 of 7 rows"));
    eval_logits_close(logits);
    assert_int_equal(files_in_directory(), 0);
}

static void test_other_logits_are_refused(void **state)
{
    (void)state;
    struct eval_logits_key other;
    struct error err;
    write_all();
#define REFUSED(FIELD, WORDS)                                                                                          \
    other = key;                                                                                                       \
    other.FIELD++;                                                                                                     \
    assert_int_equal(read_all(&other, &err), ERR_USAGE);                                                               \
    assert_non_null(strstr(err.msg, WORDS))
    REFUSED(vocab_size, "a vocabulary of 5 tokens, and the model's has 6");
    REFUSED(rows, "7 scored there, 8 here");
    REFUSED(context, "made with --context 4 --stride 3, and this is with --context 5");
    REFUSED(stride, "--stride 4");
    REFUSED(text, "other tokens");
#undef REFUSED
}

static void test_damaged_logits_are_refused(void **state)
{
    (void)state;
    enum { BYTES = 64 + ROWS * VOCAB * 4 };
    struct error err;
    for (int at = 0; at < BYTES; at += at < 64 ? 1 : 13) {
        write_all();
        FILE *file = fopen(path, "r+");
        assert_non_null(file);
        fseek(file, at, SEEK_SET);
        int byte = fgetc(file);
        fseek(file, at, SEEK_SET);
        fputc(byte ^ 4, file);
        assert_int_equal(fclose(file), 0);
        int rc = read_all(&key, &err);
        if (rc != (at >= 8 && at < 48 && (at < 12 || at >= 16) ? ERR_USAGE : ERR_CORRUPT))
            fail_msg("byte %d changed: %d", at, rc);
    }
    for (int bytes = 0; bytes < BYTES; bytes += 20) {
        write_all();
        assert_int_equal(truncate(path, bytes), 0);
        assert_int_equal(read_all(&key, &err), ERR_CORRUPT);
    }
    write_all();
    assert_int_equal(truncate(path, BYTES + 1), 0);
    assert_int_equal(read_all(&key, &err), ERR_CORRUPT);
}

static void test_places_that_take_no_logits(void **state)
{
    (void)state;
    struct eval_logits *logits;
    struct error err;
    char missing[160], long_path[5000];
    snprintf(missing, sizeof missing, "%s/none/logits", directory);
    assert_int_equal(eval_logits_create(&logits, missing, &key, &err), ERR_IO);
    assert_int_equal(eval_logits_open(&logits, missing, &key, &err), ERR_IO);
    memset(long_path, 'x', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    assert_int_equal(eval_logits_create(&logits, long_path, &key, &err), ERR_IO);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
    assert_int_equal(eval_logits_create(&logits, path, &key, &err), ERR_IO);
    assert_non_null(strstr(err.msg, "no file of saved logits"));
    assert_int_equal(unlink(path), 0);
    struct eval_logits_key large = key;
    large.rows = INT64_MAX;
    assert_int_equal(eval_logits_create(&logits, path, &large, &err), ERR_USAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scores_are_those_of_the_definitions),
        cmocka_unit_test(test_the_likeliest_tokens),
        cmocka_unit_test(test_what_is_no_number_is_seen),
        cmocka_unit_test(test_blocks_grow_with_the_text),
        cmocka_unit_test(test_known_intervals),
        cmocka_unit_test(test_few_tokens_have_no_interval),
        cmocka_unit_test(test_shares_stay_between_0_and_1),
        cmocka_unit_test(test_intervals_hold_for_dependent_tokens),
        cmocka_unit_test(test_windows_score_each_token_once),
        cmocka_unit_test_setup_teardown(test_logits_come_back, enter_directory, leave_directory),
        cmocka_unit_test_setup_teardown(test_unfinished_logits_leave_nothing, enter_directory, leave_directory),
        cmocka_unit_test_setup_teardown(test_other_logits_are_refused, enter_directory, leave_directory),
        cmocka_unit_test_setup_teardown(test_damaged_logits_are_refused, enter_directory, leave_directory),
        cmocka_unit_test_setup_teardown(test_places_that_take_no_logits, enter_directory, leave_directory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

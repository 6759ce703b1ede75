// The page of metrics and the log lines: that they are well formed whatever goes into them, and that what was counted comes out.
#include "engine/serve/log.h"
#include "engine/serve/metrics.h"

#include <ctype.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

// ---- Prometheus' text format, as strictly as its own parser ------------------------------------------------------

static size_t name_length(const char *text)
{
    size_t length = 0;
    while (isalpha((unsigned char)text[length]) || text[length] == '_' || text[length] == ':' ||
           (length > 0 && isdigit((unsigned char)text[length])))
        length++;
    return length;
}

// {name="value",...}; returns what follows.
static const char *skip_labels(const char *at)
{
    if (*at != '{')
        return at;
    for (at++; *at != '}'; at += *at == ',') {
        assert_true(name_length(at) > 0);
        at += name_length(at);
        assert_memory_equal(at, "=\"", 2);
        for (at += 2; *at != '"'; at++) {
            assert_true(*at && *at != '\n');
            if (*at == '\\')
                assert_non_null(strchr("\\\"n", *++at));
        }
        at++;
        assert_true(*at == ',' || *at == '}');
    }
    return at + 1;
}

// A sample belongs to the family that the last TYPE line opened.
static bool belongs(const char *name, size_t length, const char *family, const char *type)
{
    static const char *const suffixes[] = {"_bucket", "_sum", "_count"};
    if (strlen(family) == length && strncmp(name, family, length) == 0)
        return strcmp(type, "histogram") != 0;
    for (int i = 0; i < 3; i++)
        if (length == strlen(family) + strlen(suffixes[i]) && strncmp(name, family, strlen(family)) == 0 &&
            strncmp(name + strlen(family), suffixes[i], strlen(suffixes[i])) == 0)
            return strcmp(type, "histogram") == 0;
    return false;
}

// Returns the number of samples.
static int check_page(const char *text)
{
    char family[128] = "", type[32] = "", families[128][128];
    int samples = 0, num_families = 0;
    assert_true(*text);
    for (const char *line = text, *end; *line; line = end + 1) {
        assert_non_null(end = strchr(line, '\n'));
        if (*line == '#') {
            bool help = strncmp(line, "# HELP ", 7) == 0;
            assert_true(help || strncmp(line, "# TYPE ", 7) == 0);
            size_t length = name_length(line + 7);
            assert_int_equal(line[7 + length], ' ');
            if (help) {
                snprintf(family, sizeof family, "%.*s", (int)length, line + 7);
                for (int i = 0; i < num_families; i++)
                    assert_string_not_equal(families[i], family);
                assert_true(num_families < 128);
                memcpy(families[num_families++], family, sizeof family);
            } else {
                assert_int_equal(length, strlen(family));
                assert_memory_equal(line + 7, family, length);
                snprintf(type, sizeof type, "%.*s", (int)(end - line) - 8 - (int)length, line + 8 + length);
                assert_true(!strcmp(type, "counter") || !strcmp(type, "gauge") || !strcmp(type, "histogram"));
            }
            continue;
        }
        size_t length = name_length(line);
        if (!belongs(line, length, family, type))
            fail_msg("not of %s: %.*s", family, (int)(end - line), line);
        const char *at = skip_labels(line + length);
        char *rest;
        assert_int_equal(*at, ' ');
        assert_true(isfinite(strtod(at + 1, &rest)));
        assert_ptr_equal(rest, end);
        samples++;
    }
    return samples;
}

static double value_of(const char *text, const char *sample)
{
    const char *at = text;
    size_t length = strlen(sample);
    while ((at = strstr(at, sample)) && ((at != text && at[-1] != '\n') || at[length] != ' '))
        at += length;
    if (!at)
        fail_msg("no sample %s in\n%s", sample, text);
    return strtod(at + length + 1, NULL);
}

// ---- metrics -----------------------------------------------------------------------------------------------------

static void test_names(void **state)
{
    (void)state;
    static const struct {
        bool vllm;
        const char *samples[6];
    } cases[] = {
        {false,
         {"tpengine_num_requests_running{model_name=\"m\"}", "tpengine_kv_cache_usage_perc{model_name=\"m\"}",
          "tpengine_time_to_first_token_seconds_count{model_name=\"m\"}",
          "tpengine_rank_restarts_total{model_name=\"m\"}"}},
        {true,
         {"vllm:num_requests_running{model_name=\"m\"}", "vllm:num_requests_waiting{model_name=\"m\"}",
          "vllm:request_success_total{model_name=\"m\",finished_reason=\"stop\"}",
          "vllm:inter_token_latency_seconds_sum{model_name=\"m\"}", "vllm:prefix_cache_hits_total{model_name=\"m\"}",
          "tpengine_rank_restarts_total{model_name=\"m\"}"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct metrics *metrics;
        assert_int_equal(metrics_create(&metrics, "m", cases[i].vllm, NULL), 0);
        char *text = metrics_text(metrics, NULL, NULL);
        assert_true(check_page(text) > 100);
        for (int n = 0; n < 6 && cases[i].samples[n]; n++)
            assert_true(value_of(text, cases[i].samples[n]) >= 0);
        assert_true((strstr(text, "tpengine_num") == NULL) == cases[i].vllm);
        free(text);
        metrics_free(metrics);
    }
}

static void test_counts(void **state)
{
    (void)state;
    struct metrics *metrics;
    assert_int_equal(metrics_create(&metrics, "m", false, NULL), 0);
    struct request_record record = {
        .status = 200,
        .finish_reason = "length",
        .usage = {.prompt_tokens = 7, .produced_tokens = 33, .queued_s = 0.25, .prefill_s = 0.5, .decode_s = 2},
        .first_token_s = 0.75,
        .end_s = 2.75,
    };
    metrics_request(metrics, &record);
    record.finish_reason = "abort";
    record.first_token_s = -1; // did not happen
    record.end_s = 1e9;        // beyond the last bound
    metrics_request(metrics, &record);
    record.finish_reason = NULL; // no generation
    metrics_request(metrics, &record);
    metrics_token_gap(metrics, 0.05); // on a bound
    metrics_token_gap(metrics, NAN);
    metrics_http(metrics, 200);
    metrics_http(metrics, 200);
    metrics_http(metrics, 429);
    metrics_http(metrics, 7);
    metrics_cold_start(metrics, "load", 1.5);
    metrics_cold_start(metrics, "load", 2.5);
    metrics_cold_start(metrics, "ready", 3);
    char *text = metrics_text(metrics, NULL, NULL);
    check_page(text);
    static const struct {
        const char *sample;
        double value;
    } cases[] = {
        {"tpengine_request_success_total{model_name=\"m\",finished_reason=\"length\"}", 1},
        {"tpengine_request_success_total{model_name=\"m\",finished_reason=\"abort\"}", 1},
        {"tpengine_request_success_total{model_name=\"m\",finished_reason=\"stop\"}", 0},
        {"tpengine_time_to_first_token_seconds_count{model_name=\"m\"}", 1},
        {"tpengine_time_to_first_token_seconds_sum{model_name=\"m\"}", 0.75},
        {"tpengine_time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.5\"}", 0},
        {"tpengine_time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.75\"}", 1},
        {"tpengine_e2e_request_latency_seconds_bucket{model_name=\"m\",le=\"960\"}", 1},
        {"tpengine_e2e_request_latency_seconds_bucket{model_name=\"m\",le=\"+Inf\"}", 2},
        {"tpengine_e2e_request_latency_seconds_count{model_name=\"m\"}", 2},
        {"tpengine_request_prompt_tokens_sum{model_name=\"m\"}", 14},
        {"tpengine_request_generation_tokens_sum{model_name=\"m\"}", 66},
        {"tpengine_request_decode_time_seconds_sum{model_name=\"m\"}", 4},
        {"tpengine_inter_token_latency_seconds_bucket{model_name=\"m\",le=\"0.025\"}", 0},
        {"tpengine_inter_token_latency_seconds_bucket{model_name=\"m\",le=\"0.05\"}", 1},
        {"tpengine_inter_token_latency_seconds_count{model_name=\"m\"}", 1},
        {"tpengine_http_responses_total{model_name=\"m\",code=\"200\"}", 2},
        {"tpengine_http_responses_total{model_name=\"m\",code=\"429\"}", 1},
        {"tpengine_cold_start_seconds{model_name=\"m\",phase=\"load\"}", 2.5},
        {"tpengine_cold_start_seconds{model_name=\"m\",phase=\"ready\"}", 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        if (!(fabs(value_of(text, cases[i].sample) - cases[i].value) <= 1e-6))
            fail_msg("%s: %g, wanted %g", cases[i].sample, value_of(text, cases[i].sample), cases[i].value);
    free(text);
    metrics_free(metrics);
}

static void test_hostile_name(void **state)
{
    (void)state;
    struct metrics *metrics;
    assert_int_equal(metrics_create(&metrics, "a\"b\\c\nd} 1", true, NULL), 0);
    char *text = metrics_text(metrics, NULL, NULL);
    check_page(text);
    assert_true(value_of(text, "vllm:num_requests_running{model_name=\"a\\\"b\\\\c\\nd} 1\"}") == 0);
    free(text);
    metrics_free(metrics);
}

// ---- log lines ---------------------------------------------------------------------------------------------------

// What log_line writes to standard error, malloc'ed.
static char *logged(bool json, enum log_level threshold, enum log_level level, const struct log_field *fields)
{
    int ends[2], kept = dup(STDERR_FILENO);
    char *text = calloc(1, 65536);
    assert_int_equal(pipe(ends), 0);
    dup2(ends[1], STDERR_FILENO);
    log_configure(threshold, json);
    log_line(level, "it happened", fields);
    dup2(kept, STDERR_FILENO);
    close(ends[1]);
    close(kept);
    assert_true(read(ends[0], text, 65535) >= 0);
    close(ends[0]);
    return text;
}

static void test_log_lines(void **state)
{
    (void)state;
    char long_text[8000];
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = 0;
    static const struct {
        const char *value, *in_json; // NULL: the same
    } cases[] = {
        {"plain", NULL},
        {"", NULL},
        {"two words", NULL},
        {"quote \" and \\ backslash", NULL},
        {"line\nend\r\tand \x1b[31m escape\x7f", NULL},
        {"na\xc3\xafve \xe6\x97\xa5\xf0\x9f\x98\x80", NULL},
        {"bad \xff byte", "bad \xef\xbf\xbd byte"},
        {"cut \xe6\x97", "cut \xef\xbf\xbd\xef\xbf\xbd"},
        {"long \xc0\x80", "long \xef\xbf\xbd\xef\xbf\xbd"},
        {"half \xed\xa0\x80", "half \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct log_field fields[] = {{.key = "text", .type = LOG_TEXT, .text = cases[i].value},
                                           {.key = "count", .type = LOG_INTEGER, .integer = -5},
                                           {.key = "seconds", .type = LOG_SECONDS, .seconds = 0.25},
                                           {.key = "none", .type = LOG_TEXT},
                                           {0}};
        char *line = logged(true, LOG_INFO, LOG_WARNING, fields);
        json_error_t why;
        json_t *object = json_loads(line, 0, &why);
        if (!object)
            fail_msg("%s: %s", why.text, line);
        assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
        assert_string_equal(json_string_value(json_object_get(object, "text")),
                            cases[i].in_json ? cases[i].in_json : cases[i].value);
        assert_string_equal(json_string_value(json_object_get(object, "level")), "warning");
        assert_string_equal(json_string_value(json_object_get(object, "message")), "it happened");
        assert_int_equal(json_integer_value(json_object_get(object, "count")), -5);
        assert_true(json_real_value(json_object_get(object, "seconds")) == 0.25);
        assert_true(json_is_null(json_object_get(object, "none")));
        json_decref(object);
        free(line);

        line = logged(false, LOG_INFO, LOG_INFO, fields);
        assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
        for (const char *at = line; *at != '\n'; at++)
            assert_true((unsigned char)*at >= 0x20 && *at != 0x7f);
        assert_non_null(strstr(line, "Z info    it happened text="));
        assert_non_null(strstr(line, " count=-5 seconds=0.250000 none=-\n"));
        free(line);
    }
    // A long line is cut, and is still one.
    const struct log_field fields[] = {{.key = "text", .type = LOG_TEXT, .text = long_text},
                                       {.key = "more", .type = LOG_TEXT, .text = long_text},
                                       {0}};
    char *line = logged(true, LOG_INFO, LOG_ERROR, fields);
    json_t *object = json_loads(line, 0, NULL);
    assert_non_null(object);
    assert_true(strlen(line) <= 4096);
    json_decref(object);
    free(line);
}

static void test_log_levels(void **state)
{
    (void)state;
    for (int threshold = LOG_ERROR; threshold <= LOG_DEBUG; threshold++) {
        for (int level = LOG_ERROR; level <= LOG_DEBUG; level++) {
            char *line = logged(false, (enum log_level)threshold, (enum log_level)level, NULL);
            assert_int_equal(*line != 0, level <= threshold);
            free(line);
        }
    }
}

// A reader that takes nothing costs lines, not the server's time.
static void test_full_pipe(void **state)
{
    (void)state;
    int ends[2], kept = dup(STDERR_FILENO);
    assert_int_equal(pipe(ends), 0);
    assert_true(fcntl(ends[1], F_SETPIPE_SZ, 4096) > 0);
    dup2(ends[1], STDERR_FILENO);
    log_configure(LOG_INFO, true);
    for (int i = 0; i < 1000; i++)
        log_line(LOG_INFO, "nobody reads this", NULL);
    dup2(kept, STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    close(kept);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),     cmocka_unit_test(test_counts),     cmocka_unit_test(test_hostile_name),
        cmocka_unit_test(test_log_lines), cmocka_unit_test(test_log_levels), cmocka_unit_test(test_full_pipe),
    };
    alarm(60);
    return cmocka_run_group_tests(tests, NULL, NULL);
}

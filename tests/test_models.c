// Configs of popular models as they are on the Hub (bench/models) are read, and give the rotary tables that transformers computes
// (tests/golden/rope/models.txt, made by scripts/make_goldens_rope.py).
#include "shard/hf_config.h"

#include "formats/file_io.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct hf_config model_config(const char *name)
{
    char path[128];
    uint8_t *text = NULL;
    uint64_t bytes = 0;
    struct hf_config config = {0};
    struct error err = {0};
    snprintf(path, sizeof path, "bench/models/%s.json", name);
    if (file_read_all(&text, &bytes, path, 1 << 20, ERR_MODEL, &err) ||
        hf_config_parse(&config, (const char *)text, bytes, path, NULL, 0, NULL, NULL, &err))
        fail_msg("%s: %s", name, err.msg);
    free(text);
    return config;
}

// transformers computes in float32: pow and divisions, each off by up to a few units in the last place; yarn's ramp takes differences of
// such numbers. A wrong exponent, border or factor is off by parts in a hundred.
static void check_table(const char *name, const struct rope *rope, double factor, FILE *golden)
{
    float table[ROPE_MAX_PAIRS];
    rope_inv_freq(table, rope, false);
    if (!(fabs(rope->attention_factor - factor) <= 1e-6 * factor))
        fail_msg("%s: cosines times %.9g, transformers has %.9g", name, rope->attention_factor, factor);
    for (int64_t i = 0; i < rope->dim / 2; i++) {
        double want;
        assert_int_equal(fscanf(golden, "%lf", &want), 1);
        if (!(fabs(table[i] - want) <= 3e-6 * want))
            fail_msg("%s: frequency %d is %.9g, transformers has %.9g", name, (int)i, (double)table[i], want);
    }
    assert_int_equal(fgetc(golden), '\n'); // neither has more
}

static void test_rotary_tables(void **state)
{
    (void)state;
    FILE *golden = fopen("tests/golden/rope/models.txt", "r");
    if (!golden)
        fail_msg("cannot open tests/golden/rope/models.txt (run from the repository root)");
    char name[64], table[8];
    double factor;
    int lines = 0;
    while (fscanf(golden, "%63s %7s %lf", name, table, &factor) == 3) {
        struct hf_config config = model_config(name);
        check_table(name, strcmp(table, "local") == 0 ? &config.rope_local : &config.rope, factor, golden);
        lines++;
    }
    fclose(golden);
    assert_true(lines >= 29);
}

static int64_t layers_with(const struct model_desc *model, unsigned flag)
{
    int64_t count = 0;
    for (int64_t i = 0; i < model->num_layers; i++)
        count += (model->layer_flags[i] & flag) != 0;
    return count;
}

// What distinguishes families, from their model cards and papers.
static void test_facts(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int64_t windows, window_tokens, expert_layers, experts, per_token, head_dim;
        double attention_scale;
    } facts[] = {
        {"Llama-3-70B", 0, 0, 0, 0, 0, 128, 0.08838834764831845},
        {"Qwen2.5-72B-Instruct", 0, 0, 0, 0, 0, 128, 0.08838834764831845},
        {"Mixtral-8x7B-v0.1", 0, 0, 32, 8, 2, 128, 0.08838834764831845},
        {"Qwen3-235B-A22B", 0, 0, 94, 128, 8, 128, 0.08838834764831845},
        {"gemma-2-27b", 23, 4096, 0, 0, 0, 128, 1 / 12.0},
        {"gemma-3-12b-it", 40, 1024, 0, 0, 0, 256, 1 / 16.0},
        {"gemma-3-27b-it", 52, 1024, 0, 0, 0, 128, 0.0771516749810459},
        {"gpt-oss-120b", 18, 128, 36, 128, 4, 64, 0.125},
        {"granite-3.3-8b-instruct", 0, 0, 0, 0, 0, 128, 0.0078125},
        {"DeepSeek-V2-Lite", 0, 0, 26, 64, 6, 192, 0.11472138679292612},
        {"DeepSeek-V3", 0, 0, 58, 256, 8, 192, 0.1352337788608801},
    };
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        struct model_desc model = model_config(facts[i].name).model;
        if (layers_with(&model, LAYER_WINDOW) != facts[i].windows)
            fail_msg("%s: %d layers have a window", facts[i].name, (int)layers_with(&model, LAYER_WINDOW));
        assert_int_equal(model.sliding_window, facts[i].window_tokens);
        assert_int_equal(layers_with(&model, LAYER_EXPERTS), facts[i].expert_layers);
        assert_int_equal(model.experts.num_experts, facts[i].experts);
        assert_int_equal(model.experts.experts_per_token, facts[i].per_token);
        assert_int_equal(model.head_dim, facts[i].head_dim);
        assert_true(fabs(model.attention_scale - facts[i].attention_scale) <= 1e-6 * facts[i].attention_scale);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rotary_tables), cmocka_unit_test(test_facts)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

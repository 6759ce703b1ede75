// config.json and generation_config.json -> model description: what real models say, what must be refused, and the
// rope tables against transformers.
#include "shard/hf_config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

// Shortened to what decides something; values as the models publish them.
#define LLAMA2                                                                                                         \
    "{'architectures': ['LlamaForCausalLM'], 'hidden_size': 4096, 'intermediate_size': 11008,"                         \
    " 'num_hidden_layers': 32, 'num_attention_heads': 32, 'vocab_size': 32000, 'max_position_embeddings': 4096,"       \
    " 'rms_norm_eps': 1e-05, 'hidden_act': 'silu', 'pretraining_tp': 1, 'rope_scaling': null,"                         \
    " 'tie_word_embeddings': false, 'bos_token_id': 1, 'eos_token_id': 2, 'torch_dtype': 'float16'}"
#define LLAMA31                                                                                                        \
    "{'architectures': ['LlamaForCausalLM'], 'attention_bias': false, 'attention_dropout': 0.0, 'mlp_bias': false,"    \
    " 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32, 'num_attention_heads': 32,"            \
    " 'num_key_value_heads': 8, 'vocab_size': 128256, 'max_position_embeddings': 131072, 'rms_norm_eps': 1e-05,"       \
    " 'hidden_act': 'silu', 'rope_theta': 500000.0, 'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0,"           \
    " 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},"                      \
    " 'bos_token_id': 128000, 'eos_token_id': [128001, 128008, 128009]}"
#define MISTRAL                                                                                                        \
    "{'architectures': ['MistralForCausalLM'], 'hidden_size': 4096, 'intermediate_size': 14336,"                       \
    " 'num_hidden_layers': 32, 'num_attention_heads': 32, 'num_key_value_heads': 8, 'vocab_size': 32000,"              \
    " 'max_position_embeddings': 32768, 'rms_norm_eps': 1e-05, 'hidden_act': 'silu', 'rope_theta': 10000.0,"           \
    " 'sliding_window': 4096, 'tie_word_embeddings': false, 'bos_token_id': 1, 'eos_token_id': 2}"
#define QWEN2                                                                                                          \
    "{'architectures': ['Qwen2ForCausalLM'], 'hidden_size': 896, 'intermediate_size': 4864, 'num_hidden_layers': 24,"  \
    " 'num_attention_heads': 14, 'num_key_value_heads': 2, 'vocab_size': 151936, 'max_position_embeddings': 32768,"    \
    " 'rms_norm_eps': 1e-06, 'hidden_act': 'silu', 'rope_theta': 1000000.0, 'sliding_window': 32768,"                  \
    " 'max_window_layers': 21, 'use_sliding_window': false, 'tie_word_embeddings': true, 'bos_token_id': 151643,"      \
    " 'eos_token_id': 151645}"
#define QWEN3                                                                                                          \
    "{'architectures': ['Qwen3ForCausalLM'], 'attention_bias': false, 'head_dim': 128, 'hidden_size': 1024,"           \
    " 'intermediate_size': 3072, 'num_hidden_layers': 28, 'num_attention_heads': 16, 'num_key_value_heads': 8,"        \
    " 'vocab_size': 151936, 'max_position_embeddings': 40960, 'rms_norm_eps': 1e-06, 'hidden_act': 'silu',"            \
    " 'rope_scaling': null, 'rope_theta': 1000000, 'sliding_window': null, 'use_sliding_window': false,"               \
    " 'max_window_layers': 28, 'tie_word_embeddings': true, 'bos_token_id': 151643, 'eos_token_id': 151645}"

// JSON with ' for ", so that it can stand in C.
static json_t *json_of(const char *text)
{
    char *copy = strdup(text);
    json_error_t error;
    for (char *c = copy; *c; c++)
        *c = *c == '\'' ? '"' : *c;
    json_t *json = json_loads(copy, JSON_DECODE_ANY, &error);
    if (!json)
        fail_msg("bad test JSON: %s in %s", error.text, text);
    free(copy);
    return json;
}

// Parses a base with changes: 'key': value replaces, 'key': 'REMOVE' removes.
static int parse_changed(struct hf_config *out, const char *base, const char *changes, const char *generation,
                         struct error *err)
{
    json_t *config = json_of(base), *edit = json_of(changes), *value;
    const char *key;
    json_object_foreach(edit, key, value)
    {
        if (json_is_string(value) && strcmp(json_string_value(value), "REMOVE") == 0)
            json_object_del(config, key);
        else
            json_object_set(config, key, value);
    }
    char *text = json_dumps(config, 0), *generation_text = NULL;
    if (generation) {
        json_t *object = json_of(generation);
        generation_text = json_dumps(object, 0);
        json_decref(object);
    }
    int rc = hf_config_parse(out, text, strlen(text), "config.json", generation_text,
                             generation_text ? strlen(generation_text) : 0, "generation_config.json", NULL, err);
    free(text);
    free(generation_text);
    json_decref(config);
    json_decref(edit);
    return rc;
}

static struct hf_config parsed(const char *base, const char *changes, const char *generation)
{
    struct hf_config config;
    struct error err;
    if (parse_changed(&config, base, changes, generation, &err))
        fail_msg("%s", err.msg);
    return config;
}

static void test_families(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t layers, hidden, heads, kv_heads, head_dim, vocab, context, window;
        bool qkv_bias, o_bias, qk_norm, tied;
        int num_eos;
    } cases[] = {
        {LLAMA2, 32, 4096, 32, 32, 128, 32000, 4096, 0, false, false, false, false, 1},
        {LLAMA31, 32, 4096, 32, 8, 128, 128256, 131072, 0, false, false, false, false, 3},
        {MISTRAL, 32, 4096, 32, 8, 128, 32000, 32768, 4096, false, false, false, false, 1},
        {QWEN2, 24, 896, 14, 2, 64, 151936, 32768, 0, true, false, false, true, 1},
        {QWEN3, 28, 1024, 16, 8, 128, 151936, 40960, 0, false, false, true, true, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct hf_config config = parsed(cases[i].text, "{}", NULL);
        const struct model_desc *model = &config.model;
        assert_int_equal(model->num_layers, cases[i].layers);
        assert_int_equal(model->hidden_size, cases[i].hidden);
        assert_int_equal(model->num_heads, cases[i].heads);
        assert_int_equal(model->num_kv_heads, cases[i].kv_heads);
        assert_int_equal(model->head_dim, cases[i].head_dim);
        assert_int_equal(model->vocab_size, cases[i].vocab);
        assert_int_equal(model->context, cases[i].context);
        assert_int_equal(model->sliding_window, cases[i].window);
        assert_int_equal(model->qkv_bias, cases[i].qkv_bias);
        assert_int_equal(model->o_bias, cases[i].o_bias);
        assert_int_equal(model->qk_norm, cases[i].qk_norm ? QK_NORM_HEAD : QK_NORM_NONE);
        assert_int_equal(model->tied_embeddings, cases[i].tied);
        assert_int_equal(model->num_eos, cases[i].num_eos);
        assert_true(model->rope_attention_factor == 1);
        assert_true(isnan(model->default_temperature) && model->default_top_k == -1);
        assert_false(config.has_generation_config);
    }
}

static void test_accepted_variants(void **state)
{
    (void)state;
    struct hf_config config = parsed(LLAMA31, "{'attention_bias': true, 'mlp_bias': true}", NULL);
    assert_true(config.model.qkv_bias && config.model.o_bias && config.model.mlp_bias);
    config = parsed(QWEN3, "{'attention_bias': true}", NULL);
    assert_true(config.model.qkv_bias && config.model.o_bias && !config.model.mlp_bias);
    config = parsed(MISTRAL, "{'attention_bias': true, 'mlp_bias': true}", NULL); // Mistral's class reads neither
    assert_false(config.model.qkv_bias || config.model.o_bias || config.model.mlp_bias);
    assert_int_equal(parsed(MISTRAL, "{'sliding_window': null}", NULL).model.sliding_window, 0);
    assert_int_equal(parsed(MISTRAL, "{'sliding_window': 'REMOVE'}", NULL).model.sliding_window, 4096);
    assert_int_equal(parsed(LLAMA2, "{'sliding_window': 512}", NULL).model.sliding_window, 0);
    assert_int_equal(parsed(LLAMA2, "{'head_dim': 64}", NULL).model.head_dim, 64);
    assert_int_equal(parsed(QWEN3, "{'head_dim': 'REMOVE'}", NULL).model.head_dim, 128);
    assert_int_equal(parsed(LLAMA2, "{'eos_token_id': null, 'bos_token_id': null}", NULL).model.num_eos, 0);
    assert_int_equal(parsed(LLAMA2, "{'bos_token_id': null}", NULL).model.bos_token_id, -1);
    assert_int_equal(parsed(LLAMA2, "{'hidden_act': 'REMOVE', 'pretraining_tp': 'REMOVE'}", NULL).model.num_heads, 32);

    // Qwen's windows: none in use, all layers above the last, all layers, layer by layer.
    const char *all = "{'use_sliding_window': true, 'max_window_layers': 0, 'sliding_window': 100}";
    const char *above = "{'use_sliding_window': true, 'max_window_layers': 24, 'sliding_window': 100}";
    assert_int_equal(parsed(QWEN2, all, NULL).model.sliding_window, 100);
    assert_int_equal(parsed(QWEN2, above, NULL).model.sliding_window, 0);
    struct model_desc model = parsed(QWEN2, "{'use_sliding_window': true, 'sliding_window': 100}", NULL).model;
    assert_int_equal(model.sliding_window, 100);
    for (int64_t layer = 0; layer < model.num_layers; layer++)
        assert_int_equal(model.layer_flags[layer], layer >= 21 ? LAYER_WINDOW : 0);
    model =
        parsed(MISTRAL, "{'num_hidden_layers': 2, 'layer_types': ['full_attention', 'full_attention']}", NULL).model;
    assert_int_equal(model.sliding_window, 0);
    model =
        parsed(MISTRAL, "{'num_hidden_layers': 2, 'layer_types': ['full_attention', 'sliding_attention']}", NULL).model;
    assert_int_equal(model.sliding_window, 4096);
    assert_int_equal(model.layer_flags[0], 0);
    assert_int_equal(model.layer_flags[1], LAYER_WINDOW);
    assert_int_equal(parsed(LLAMA2, "{'partial_rotary_factor': 0.5}", NULL).model.rotary_dim, 64);
    assert_int_equal(parsed(LLAMA2, "{'logits_scaling': 1.0, 'num_experts': 0}", NULL).model.num_heads, 32);
}

static void test_rope_spellings(void **state)
{
    (void)state;
    struct hf_config config = parsed(LLAMA31, "{}", NULL);
    assert_int_equal(config.rope.scaling, ROPE_LLAMA3);
    assert_true(config.rope.theta == 500000 && config.rope.factor == 8 && config.rope.original_context == 8192);
    config = parsed(LLAMA2, "{'rope_scaling': {'type': 'linear', 'factor': 2}}", NULL);
    assert_int_equal(config.rope.scaling, ROPE_LINEAR);
    assert_true(config.rope.theta == 10000 && config.rope.factor == 2);
    config = parsed(LLAMA2, "{'rope_parameters': {'rope_theta': 7000.0, 'rope_type': 'default'}}", NULL);
    assert_int_equal(config.rope.scaling, ROPE_PLAIN);
    assert_true(config.rope.theta == 7000);
    config = parsed(LLAMA31,
                    "{'rope_theta': 'REMOVE', 'rope_scaling': 'REMOVE', 'rope_parameters': {'rope_theta': 500000.0,"
                    " 'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}}",
                    NULL);
    assert_int_equal(config.rope.scaling, ROPE_LLAMA3);
    assert_int_equal(config.rope.original_context, 131072); // where it is missing: the model's
    // Within the model's context, beyond which nothing runs, dynamic scaling is none.
    config = parsed(LLAMA2, "{'rope_scaling': {'type': 'dynamic', 'factor': 4}}", NULL);
    assert_int_equal(config.rope.scaling, ROPE_PLAIN);
    config = parsed(
        LLAMA2, "{'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 2048}}", NULL);
    assert_int_equal(config.rope.scaling, ROPE_YARN);
    assert_true(fabs(config.model.rope_attention_factor - 1.13862943611198906) <= 1e-12); // 0.1 ln 4 + 1
    config = parsed(LLAMA2, "{'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'attention_factor': 1.5}}", NULL);
    assert_true(config.model.rope_attention_factor == 1.5);
}

// Each: base, change, and words that the sentence must hold.
static void test_refusals(void **state)
{
    (void)state;
    static const char *const required[] = {
        "architectures",     "hidden_size",         "intermediate_size", "vocab_size",
        "num_hidden_layers", "num_attention_heads", "rms_norm_eps",      "max_position_embeddings"};
    static const char *const bad_values[] = {
        "'REMOVE'",           "null", "'text'", "true", "[]", "{}", "0", "-1", "1.5", "1e300", "1099511627776",
        "9223372036854775807"};
    static const struct {
        const char *base, *changes, *words;
    } cases[] = {
        {LLAMA2, "{'architectures': ['GPT2LMHeadModel']}",
         "\"GPT2LMHeadModel\" is not supported (known: LlamaForCausalLM"},
        {LLAMA2, "{'architectures': [3]}", "architectures[0]"},
        {LLAMA2, "{'num_key_value_heads': 5}", "num_attention_heads (32) is not a multiple of num_key_value_heads (5)"},
        {LLAMA2, "{'num_key_value_heads': 0}", "num_key_value_heads"},
        {QWEN2, "{'num_key_value_heads': 'REMOVE'}", "num_key_value_heads"},
        {LLAMA2, "{'hidden_size': 4100}", "no head_dim"},
        {LLAMA2, "{'head_dim': 127}", "head_dim 127 is odd"},
        {LLAMA2, "{'hidden_act': 'gelu'}", "hidden_act \"gelu\""},
        {LLAMA2, "{'pretraining_tp': 4}", "pretraining_tp 4"},
        {LLAMA2, "{'tie_word_embeddings': 'yes'}", "tie_word_embeddings"},
        {LLAMA2, "{'rope_scaling': {'type': 'xpos', 'factor': 4}}", "type \"xpos\" is not supported"},
        {LLAMA2, "{'rope_scaling': {'type': 'dynamic', 'factor': 'x'}, 'rope_theta': {}}", "rope_theta"},
        {LLAMA2, "{'rope_parameters': {'rope_type': 'default', 'mrope_section': [16, 24, 24]}}", "mrope_section"},
        {LLAMA2, "{'rope_parameters': {'rope_type': 'longrope'}}", "short_factor"},
        {LLAMA2, "{'rope_scaling': {'type': 'longrope', 'short_factor': [1.0], 'long_factor': [1.0]}}",
         "short_factor must hold a number for each of 64 pairs, found 1"},
        {LLAMA2, "{'rope_scaling': {'type': 'yarn', 'factor': 4, 'beta_fast': 'x'}}", "beta_fast"},
        {LLAMA2, "{'rope_scaling': {'type': 'yarn', 'factor': -4}}", "factor"},
        {LLAMA2, "{'rope_parameters': {'full_attention': {'rope_type': 'default'}}}", "by layer type"},
        {LLAMA2, "{'rope_scaling': {'type': 'linear'}}", "factor"},
        {LLAMA2, "{'rope_scaling': {'type': 'linear', 'factor': 0}}", "factor"},
        {LLAMA31, "{'rope_scaling': {'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 4, 'high_freq_factor': 4}}",
         "must be larger than low_freq_factor"},
        {LLAMA2, "{'rope_theta': 0}", "rope_theta"},
        {LLAMA2, "{'rope_theta': '10000'}", "rope_theta"},
        {LLAMA2, "{'partial_rotary_factor': 0}", "partial_rotary_factor"},
        {LLAMA2, "{'partial_rotary_factor': 0.01}", "partial_rotary_factor"},
        {LLAMA2, "{'partial_rotary_factor': 1.5}", "partial_rotary_factor"},
        {LLAMA2, "{'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.4}}",
         "partial_rotary_factor 0.4 of 128 columns is 51"},
        {LLAMA2, "{'num_hidden_layers': 513}", "num_hidden_layers must be an integer from 1 to 512"},
        {LLAMA2, "{'no_rope_layers': [1, 1, 0]}", "no_rope_layers"},
        {LLAMA2, "{'kv_lora_rank': 512}", "kv_lora_rank"},
        {LLAMA2, "{'logits_scaling': 2.0}", "logits_scaling"},
        {LLAMA2, "{'use_bidirectional_attention': true}", "use_bidirectional_attention"},
        {LLAMA2, "{'text_config': {'hidden_size': 3}}", "text_config"},
        {LLAMA2, "{'layer_types': ['linear_attention']}", "layer_types"},
        {LLAMA2, "{'final_logit_softcapping': 30.0}", "final_logit_softcapping"},
        {LLAMA2, "{'num_local_experts': 8}", "num_local_experts"},
        {LLAMA2, "{'rms_norm_eps': 0}", "rms_norm_eps"},
        {LLAMA2, "{'eos_token_id': 32000}", "eos_token_id"},
        {LLAMA2, "{'eos_token_id': [1, -1]}", "eos_token_id[1]"},
        {LLAMA2, "{'eos_token_id': [1, 2, 3, 4, 5, 6, 7, 8, 9]}", "at most 8"},
        {LLAMA2, "{'bos_token_id': -2}", "bos_token_id"},
        {MISTRAL, "{'sliding_window': 0}", "sliding_window"},
        {MISTRAL, "{'layer_types': ['sliding_attention', 'full_attention']}",
         "layer_types names 2 layers, num_hidden_layers 32"},
        {MISTRAL, "{'num_hidden_layers': 1, 'layer_types': ['chunked_attention']}", "layer_types[0]"},
        {MISTRAL, "{'num_hidden_layers': 1, 'layer_types': [3]}", "layer_types[0]"},
        {QWEN2, "{'num_hidden_layers': 1, 'layer_types': ['sliding_attention']}", "no sliding_window is in use"},
    };
    struct hf_config config;
    struct error err;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (parse_changed(&config, cases[i].base, cases[i].changes, NULL, &err) != ERR_MODEL)
            fail_msg("accepted: %s", cases[i].changes);
        if (!strstr(err.msg, cases[i].words) || !strstr(err.msg, "config.json"))
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i].changes, err.msg, cases[i].words);
    }
    for (size_t i = 0; i < sizeof required / sizeof required[0]; i++)
        for (size_t j = 0; j < sizeof bad_values / sizeof bad_values[0]; j++) {
            char changes[128];
            snprintf(changes, sizeof changes, "{'%s': %s}", required[i], bad_values[j]);
            if (parse_changed(&config, LLAMA2, changes, NULL, &err) != ERR_MODEL)
                fail_msg("accepted: %s", changes);
            if (!strstr(err.msg, required[i]))
                fail_msg("%s: \"%s\" does not name the key", changes, err.msg);
        }
}

// Python writes NaN and Infinity, which are not JSON; neither is half a file.
static void test_not_json(void **state)
{
    (void)state;
    static const char *const texts[] = {"",
                                        "{",
                                        "null",
                                        "[]",
                                        "{\"rope_theta\": NaN}",
                                        "{\"rms_norm_eps\": Infinity}",
                                        "{\"hidden_size\": 1, \"hidden_size\": 2}"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct hf_config config;
        struct error err;
        assert_int_equal(hf_config_parse(&config, texts[i], strlen(texts[i]), "config.json", NULL, 0, "", NULL, &err),
                         ERR_MODEL);
        assert_non_null(strstr(err.msg, "config.json"));
    }
}

static void test_generation_config(void **state)
{
    (void)state;
    struct hf_config config = parsed(LLAMA31, "{}",
                                     "{'eos_token_id': [128001, 128009], 'do_sample': true, 'temperature': 0.6,"
                                     " 'top_p': 0.9, 'top_k': 20, 'repetition_penalty': 1.05}");
    const struct model_desc *model = &config.model;
    assert_true(config.has_generation_config);
    assert_int_equal(model->num_eos, 2);
    assert_int_equal(model->eos_token_ids[1], 128009);
    assert_int_equal(model->bos_token_id, 128000);
    assert_true(model->default_temperature == 0.6 && model->default_top_p == 0.9);
    assert_true(model->default_repetition_penalty == 1.05 && model->default_top_k == 20);
    assert_true(parsed(LLAMA2, "{}", "{'do_sample': false, 'temperature': 0.9}").model.default_temperature == 0);
    assert_int_equal(parsed(LLAMA2, "{}", "{'eos_token_id': 7}").model.eos_token_ids[0], 7);
    assert_int_equal(parsed(LLAMA2, "{}", "{}").model.eos_token_ids[0], 2);

    static const char *const bad[] = {"{'temperature': -1}",
                                      "{'temperature': 'hot'}",
                                      "{'top_p': 1.5}",
                                      "{'top_k': -1}",
                                      "{'repetition_penalty': 0}",
                                      "{'eos_token_id': 1000000}",
                                      "[]"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct error err;
        if (parse_changed(&config, LLAMA2, "{}", bad[i], &err) != ERR_MODEL)
            fail_msg("accepted: %s", bad[i]);
        assert_non_null(strstr(err.msg, "generation_config.json"));
    }
}

// transformers computes in float32: pow and a division, each off by up to a few units in the last place. 2e-6 relative
// covers that; a wrong exponent or branch is off by parts in a hundred.
static void test_inv_freq(void **state)
{
    (void)state;
#define LLAMA3_ROPE "'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}}"
    static const struct {
        const char *name, *changes;
        int64_t head_dim;
    } cases[] = {
        {"plain", "{'rope_theta': 10000.0}", 128},
        {"million", "{'rope_theta': 1000000.0}", 64},
        {"linear", "{'rope_scaling': {'type': 'linear', 'factor': 4.0}}", 64},
        {"llama31", "{'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0, " LLAMA3_ROPE,
         128},
        {"llama32", "{'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'llama3', 'factor': 32.0, " LLAMA3_ROPE,
         64},
    };
    FILE *golden = fopen("tests/golden/rope/inv_freq.txt", "r");
    if (!golden)
        fail_msg("cannot open tests/golden/rope/inv_freq.txt (run from the repository root)");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char name[32];
        float table[64];
        assert_int_equal(fscanf(golden, "%31s", name), 1);
        assert_string_equal(name, cases[i].name);
        char changes[512];
        snprintf(changes, sizeof changes, "{'head_dim': %d, %s", (int)cases[i].head_dim, cases[i].changes + 1);
        struct hf_config config = parsed(LLAMA2, changes, NULL);
        assert_int_equal(config.rope.dim, cases[i].head_dim);
        rope_inv_freq(table, &config.rope, false);
        for (int64_t j = 0; j < cases[i].head_dim / 2; j++) {
            double want;
            assert_int_equal(fscanf(golden, "%lf", &want), 1);
            if (!(fabs(table[j] - want) <= 2e-6 * want))
                fail_msg("%s[%d]: %.9g, transformers has %.9g", name, (int)j, table[j], want);
        }
    }
    fclose(golden);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_families),       cmocka_unit_test(test_accepted_variants),
        cmocka_unit_test(test_rope_spellings), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_not_json),       cmocka_unit_test(test_generation_config),
        cmocka_unit_test(test_inv_freq),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// config.json of every family -> model description, on the files of tests/golden/families and bench/models: features by hand, rope
// tables and factors against transformers, and what no broken value may do.
#include "shard/hf_config.h"

#include "formats/file_io.h"
#include "formats/model_json.h"
#include "shard/families.h"

#include <dirent.h>
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

static struct hf_config parsed(const char *path)
{
    struct hf_config config = {0};
    struct error err;
    uint8_t *text;
    uint64_t bytes;
    if (file_read_all(&text, &bytes, path, 1 << 20, ERR_IO, &err) ||
        hf_config_parse(&config, (const char *)text, bytes, path, NULL, 0, NULL, NULL, &err))
        fail_msg("%s (run from the repository root)", err.msg);
    free(text);
    return config;
}

static struct hf_config golden(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "tests/golden/families/%s/config.json", name);
    return parsed(path);
}

// One hexadecimal digit a layer, as in the manifest.
static void layers_text(char out[64], const struct model_desc *model)
{
    for (int64_t i = 0; i < model->num_layers && i < 63; i++)
        out[i] = "0123456789abcdef"[model->layer_flags[i] & 15];
}

static void test_attention(void **state)
{
    (void)state;
    static const struct {
        const char *name, *layers;
        int64_t window, rotary_dim;
        double scale, softcap, logit_softcap, embedding_scale;
        enum qk_norm qk_norm;
        enum activation activation;
        bool pre_norms, post_norms, qkv_bias, o_bias, interleaved, sinks, tied;
    } cases[] = {
        {"gemma", "00", 0, 24, 0.20412414523193154, 0, 0, 7.4833147735478827, QK_NORM_NONE, ACTIVATION_GELU_TANH, true,
         false, false, false, false, false, true},
        {"gemma2", "10", 16, 20, 0.17677669529663687, 2, 1.5, 7.4833147735478827, QK_NORM_NONE, ACTIVATION_GELU_TANH,
         true, true, false, false, false, false, true},
        {"gemma3", "555550", 16, 20, 0.5, 0, 0, 7.4833147735478827, QK_NORM_HEAD, ACTIVATION_GELU_TANH, true, true,
         false, false, false, false, true},
        {"phi3", "11", 16, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false, false, false,
         false, false, false},
        {"phi4_mini", "00", 0, 12, 0.25, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false, false, false, false,
         false, true},
        {"gpt_oss", "32", 16, 16, 0.25, 0, 0, 1, QK_NORM_NONE, ACTIVATION_GPT_OSS, true, false, true, true, false, true,
         false},
        {"olmo2", "00", 0, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_FULL, ACTIVATION_SILU, false, true, false, false,
         false, false, false},
        {"olmo3", "5550", 16, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_FULL, ACTIVATION_SILU, false, true, false,
         false, false, false, false},
        {"granite", "00", 0, 12, 0.2, 0, 0, 12, QK_NORM_NONE, ACTIVATION_SILU, true, false, false, false, false, false,
         true},
        {"glm4", "00", 0, 8, 0.25, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, true, true, false, true, false, false},
        {"glm4_moe", "02", 0, 8, 0.25, 0, 0, 1, QK_NORM_HEAD, ACTIVATION_SILU, true, false, true, false, false, false,
         true},
        {"smollm3", "0008", 0, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false, false,
         false, false, false, true},
        {"qwen2_mixed_window", "001", 16, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false,
         true, false, false, false, true},
        {"ministral", "10", 16, 12, 0.28867513459481287, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false, false,
         false, false, false, true},
        {"qwen2_moe", "0200", 0, 8, 0.35355339059327379, 0, 0, 1, QK_NORM_NONE, ACTIVATION_SILU, true, false, true,
         false, false, false, true},
        {"deepseek_v3", "022", 0, 8, 0.20412414523193154 * 1.13862943611198906 * 1.13862943611198906, 0, 0, 1,
         QK_NORM_NONE, ACTIVATION_SILU, true, false, false, false, true, false, false}, // (0.1 ln 4 + 1)^2
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct hf_config config = golden(cases[i].name);
        const struct model_desc *model = &config.model;
        char layers[64] = "";
        layers_text(layers, model);
        if (strcmp(layers, cases[i].layers) != 0)
            fail_msg("%s: layers %s instead of %s", cases[i].name, layers, cases[i].layers);
        if (model->sliding_window != cases[i].window || model->rotary_dim != cases[i].rotary_dim)
            fail_msg("%s: window %d, rotary_dim %d", cases[i].name, (int)model->sliding_window, (int)model->rotary_dim);
        if (!(fabs(model->attention_scale - cases[i].scale) <= 1e-12) || model->attention_softcap != cases[i].softcap ||
            model->logit_softcap != cases[i].logit_softcap || model->embedding_scale != cases[i].embedding_scale)
            fail_msg("%s: scale %.17g, caps %g %g, embedding %.17g", cases[i].name, model->attention_scale,
                     model->attention_softcap, model->logit_softcap, model->embedding_scale);
        if (model->qk_norm != cases[i].qk_norm || model->activation != cases[i].activation ||
            model->pre_norms != cases[i].pre_norms || model->post_norms != cases[i].post_norms ||
            model->qkv_bias != cases[i].qkv_bias || model->o_bias != cases[i].o_bias || model->mlp_bias ||
            model->rotary_interleaved != cases[i].interleaved || model->sinks != cases[i].sinks ||
            model->tied_embeddings != cases[i].tied)
            fail_msg("%s: a norm, bias or flag is wrong", cases[i].name);
    }
    struct model_desc granite = golden("granite").model;
    assert_true(granite.residual_scale == 0.4 && granite.logit_scale == 0.25);
}

static void test_experts(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int64_t intermediate;
        struct experts_desc experts;
    } cases[] = {
        {"mixtral", 0, {6, 2, 40, 0, false, ROUTER_SOFTMAX, true, 1, 1, 1, 1, false, false, false}},
        {"qwen2_moe", 64, {8, 3, 24, 40, true, ROUTER_SOFTMAX, false, 1, 1, 1, 1, false, false, false}},
        {"qwen3_moe", 0, {8, 3, 24, 0, false, ROUTER_SOFTMAX, true, 1, 1, 1, 1, false, false, false}},
        {"gpt_oss", 0, {8, 3, 40, 0, false, ROUTER_CHOSEN_SOFTMAX, false, 1, 1, 1, 1, true, false, true}},
        {"olmoe", 0, {8, 3, 24, 0, false, ROUTER_SOFTMAX, false, 1, 1, 1, 1, false, false, false}},
        {"granite_moe", 0, {8, 3, 24, 0, false, ROUTER_CHOSEN_SOFTMAX, false, 1, 1, 1, 1, false, false, false}},
        {"deepseek_v2", 64, {8, 3, 24, 48, false, ROUTER_SOFTMAX, false, 4, 4, 2, 1, false, false, false}},
        {"deepseek_v2_lite", 64, {8, 3, 24, 48, false, ROUTER_SOFTMAX, false, 1, 1, 1, 1, false, false, false}},
        {"deepseek_v3", 64, {8, 3, 24, 24, false, ROUTER_SIGMOID, true, 2.5, 4, 2, 2, false, true, false}},
        {"glm4_moe", 64, {8, 3, 24, 24, false, ROUTER_SIGMOID, true, 2.5, 1, 1, 1, false, true, false}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct hf_config config = golden(cases[i].name);
        const struct experts_desc *got = &config.model.experts, *want = &cases[i].experts;
        if (got->num_experts != want->num_experts || got->experts_per_token != want->experts_per_token ||
            got->expert_size != want->expert_size || got->shared_size != want->shared_size ||
            got->shared_gate != want->shared_gate || got->router != want->router || got->normalise != want->normalise ||
            got->scale != want->scale || got->num_groups != want->num_groups ||
            got->groups_per_token != want->groups_per_token || got->group_members != want->group_members ||
            got->router_bias != want->router_bias || got->choice_bias != want->choice_bias || got->bias != want->bias)
            fail_msg("%s: its experts are described otherwise", cases[i].name);
        assert_int_equal(config.model.intermediate_size, cases[i].intermediate);
    }
    struct latent_desc latent = golden("deepseek_v2").model.latent;
    assert_true(latent.kv_rank == 24 && latent.q_rank == 20 && latent.nope_dim == 16 && latent.rope_dim == 8 &&
                latent.v_dim == 12);
    assert_true(latent.norm_eps == 1e-6 && golden("deepseek_v2").model.norm_eps == 1e-5);
    assert_int_equal(golden("deepseek_v2_lite").model.latent.q_rank, 0);
}

static void test_longrope(void **state)
{
    (void)state;
    struct hf_config config = golden("phi4_mini");
    float table[ROPE_MAX_PAIRS];
    assert_int_equal(config.model.rope_original_context, 32);
    assert_true(fabs(config.model.rope_attention_factor - sqrt(1 + log(4) / log(32))) <= 1e-12); // 128 of 32
    static const double factors[2][2] = {{1.0, 2.5}, {1.2, 16.0}};                               // first and last pair
    for (int long_table = 0; long_table < 2; long_table++) {
        rope_inv_freq(table, &config.rope, long_table);
        assert_true(fabs(table[0] - 1 / factors[long_table][0]) <= 1e-6);
        assert_true(fabs(table[5] - pow(10000, -10.0 / 12) / factors[long_table][1]) <= 1e-9);
    }
}

// transformers computes in float32: see test_hf_config.c.
static void test_rope_of_models(void **state)
{
    (void)state;
    FILE *file = fopen("tests/golden/rope/models.txt", "r");
    char name[64], which[16], path[128];
    double factor;
    int count = 0;
    if (!file)
        fail_msg("cannot open tests/golden/rope/models.txt");
    while (fscanf(file, "%63s %15s %lf", name, which, &factor) == 3) {
        snprintf(path, sizeof path, "bench/models/%s.json", name);
        struct hf_config config = parsed(path);
        const struct rope *rope = strcmp(which, "local") == 0 ? &config.rope_local : &config.rope;
        float table[ROPE_MAX_PAIRS];
        rope_inv_freq(table, rope, false);
        for (int64_t i = 0; i < rope->dim / 2; i++) {
            double want;
            assert_int_equal(fscanf(file, "%lf", &want), 1);
            if (!(fabs(table[i] - want) <= 4e-6 * want))
                fail_msg("%s %s[%d]: %.9g, transformers has %.9g", name, which, (int)i, table[i], want);
        }
        if (!(fabs(rope->attention_factor - factor) <= 1e-6 * factor))
            fail_msg("%s: attention factor %g, transformers has %g", name, rope->attention_factor, factor);
        count++;
    }
    assert_true(count >= 25);
    fclose(file);
}

// Every number of every family's config, replaced by what it must not be: refused with a sentence, or harmless.
static void test_broken_values(void **state)
{
    (void)state;
    static const char *const values[] = {"null", "\"text\"", "true", "[]",    "{}",
                                         "0",    "-1",       "0.5",  "1e300", "1099511627776"};
    DIR *dir = opendir("tests/golden/families");
    struct dirent *entry;
    int refused = 0, families = 0;
    if (!dir)
        fail_msg("cannot open tests/golden/families");
    while ((entry = readdir(dir))) {
        char path[512];
        json_error_t why;
        snprintf(path, sizeof path, "tests/golden/families/%s/config.json", entry->d_name);
        json_t *config = json_load_file(path, 0, &why);
        if (!config)
            continue;
        families++;
        const char *key;
        json_t *value;
        void *next;
        json_object_foreach_safe(config, next, key, value)
        {
            for (size_t v = 0; v <= sizeof values / sizeof *values; v++) {
                struct hf_config out;
                struct error err = {0};
                char problem[160];
                json_t *changed = json_copy(config);
                if (v < sizeof values / sizeof *values)
                    json_object_set_new(changed, key, json_loads(values[v], JSON_DECODE_ANY, NULL));
                else
                    json_object_del(changed, key);
                char *text = json_dumps(changed, 0);
                int rc = hf_config_parse(&out, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err);
                if (rc && (rc != ERR_MODEL || strncmp(err.msg, "config.json: ", 13) != 0))
                    fail_msg("%s, %s: %d \"%s\"", path, key, rc, err.msg);
                if (!rc && !model_json_check(&out.model, problem, sizeof problem))
                    fail_msg("%s, %s: accepted, but %s", path, key, problem);
                refused += rc != 0;
                free(text);
                json_decref(changed);
            }
        }
        json_decref(config);
    }
    closedir(dir);
    assert_true(families >= 25 && refused > 20 * families);
}

static void test_refusals_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *family, *key, *value, *words;
    } cases[] = {
        {"gemma2", "hidden_activation", "\"relu\"",
         "hidden_activation \"relu\" is not supported, only \"gelu_pytorch_tanh\""},
        {"gemma2", "hidden_activation", "\"gelu\"", "hidden_activation \"gelu\""},
        {"gemma2", "use_bidirectional_attention", "true", "use_bidirectional_attention"},
        {"gpt_oss", "swiglu_limit", "10", "swiglu_limit 10"},
        {"gpt_oss", "num_experts_per_tok", "9", "experts_per_token must be from 1 to num_experts"},
        {"gpt_oss", "num_local_experts", "1025", "num_local_experts must be an integer from 1 to 1024"},
        {"deepseek_v2", "norm_topk_prob", "true", "norm_topk_prob is not supported"},
        {"deepseek_v2", "topk_method", "\"noaux_tc\"", "topk_method \"noaux_tc\" is not supported"},
        {"deepseek_v2", "scoring_func", "\"sigmoid\"", "scoring_func \"sigmoid\""},
        {"deepseek_v2", "moe_layer_freq", "2", "moe_layer_freq 2"},
        {"deepseek_v2", "kv_lora_rank", "641", "kv_lora_rank must be an integer from 1 to 640"},
        {"deepseek_v2", "kv_lora_rank", "640", "latent_kv_rank + latent_rope_dim must be at most 640"},
        {"deepseek_v2", "qk_nope_head_dim", "316", "qk_nope_head_dim + qk_rope_head_dim is 324"},
        {"deepseek_v2", "num_key_value_heads", "2", "num_key_value_heads (2) must be num_attention_heads (4)"},
        {"deepseek_v3", "n_group", "3", "expert_groups must divide num_experts"},
        {"deepseek_v3", "n_group", "8", "hold experts_per_token experts"},
        {"mixtral", "rope_scaling", "{\"type\": \"su\"}", "type \"su\" is not supported"},
        {"smollm3", "no_rope_layers", "[1]", "no_rope_layers names 1 layers"},
        {"smollm3", "no_rope_layers", "[1, 1, 1, 2]", "no_rope_layers[3] must be 0 or 1"},
        {"olmoe", "clip_qkv", "8.0", "clip_qkv"},
        {"gemma3", "architectures", "[\"Gemma4ForCausalLM\"]", "\"Gemma4ForCausalLM\" is not supported (known: Llama"},
        {"gemma3", "architectures", "[\"Gemma4ForCausalLM\"]", "shard/families.md"},
        {"gemma3", "attn_logit_softcapping", "50.0", "attn_logit_softcapping changes the model's arithmetic"},
        {"llama2", "rope_scaling", "{\"rope_type\": \"linear\", \"factor\": 2, \"llama_4_scaling_beta\": 0.1}",
         "llama_4_scaling_beta scales queries"},
        {"gpt_oss", "rope_scaling", "null", "rope_scaling must be an object for this architecture"},
        {"gemma3", "architectures", "[\"Any as Gemma3ForCausalLM\"]", "\"Any as Gemma3ForCausalLM\" is not supported"},
        {"phi4_mini", "head_dim", "18", "partial_rotary_factor 0.75 of 18 columns is 13"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[256];
        struct hf_config out;
        struct error err = {0};
        snprintf(path, sizeof path, "tests/golden/families/%s/config.json", cases[i].family);
        json_t *config = json_load_file(path, 0, NULL);
        assert_non_null(config);
        json_object_set_new(config, cases[i].key, json_loads(cases[i].value, JSON_DECODE_ANY, NULL));
        char *text = json_dumps(config, 0);
        if (hf_config_parse(&out, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err) != ERR_MODEL)
            fail_msg("%s with %s %s: accepted", cases[i].family, cases[i].key, cases[i].value);
        if (!strstr(err.msg, cases[i].words))
            fail_msg("%s with %s %s: \"%s\"", cases[i].family, cases[i].key, cases[i].value, err.msg);
        free(text);
        json_decref(config);
    }
}

// The words of transformers 5 for the same models.
static void test_new_spellings(void **state)
{
    (void)state;
    static const char gemma3[] =
        "{\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"linear\", \"factor\": 8.0, \"rope_theta\": "
        "100000.0},"
        " \"sliding_attention\": {\"rope_type\": \"default\", \"rope_theta\": 100.0}}, \"layer_types\":"
        " [\"full_attention\", \"sliding_attention\", \"sliding_attention\", \"sliding_attention\","
        " \"sliding_attention\", \"sliding_attention\"]}";
    struct hf_config old = golden("gemma3"), out;
    struct error err = {0};
    json_t *config = json_load_file("tests/golden/families/gemma3/config.json", 0, NULL);
    assert_non_null(config);
    json_t *change = json_loads(gemma3, 0, NULL);
    static const char *const removed[] = {"rope_theta", "rope_scaling", "rope_local_base_freq",
                                          "sliding_window_pattern"};
    for (int i = 0; i < 4; i++)
        json_object_del(config, removed[i]);
    json_object_update(config, change);
    char *text = json_dumps(config, 0);
    if (hf_config_parse(&out, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err))
        fail_msg("%s", err.msg);
    char layers[64] = "";
    layers_text(layers, &out.model);
    assert_string_equal(layers, "055555");
    float want[ROPE_MAX_PAIRS], got[ROPE_MAX_PAIRS];
    rope_inv_freq(want, &old.rope, false);
    rope_inv_freq(got, &out.rope, false);
    assert_memory_equal(got, want, (size_t)out.rope.dim / 2 * sizeof *got);
    rope_inv_freq(want, &old.rope_local, false);
    rope_inv_freq(got, &out.rope_local, false);
    assert_memory_equal(got, want, (size_t)out.rope.dim / 2 * sizeof *got);
    free(text);
    json_decref(config);
    json_decref(change);
}

// A model under another name, read as one that is known.
static void test_known_as(void **state)
{
    (void)state;
    static const char text[] =
        "{\"architectures\": [\"NewForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 128,"
        " \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"vocab_size\": 100,"
        " \"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5}";
    struct hf_config out;
    struct error err = {0};
    assert_int_equal(hf_config_parse(&out, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err), ERR_MODEL);
    assert_int_equal(hf_config_parse(&out, text, strlen(text), "config.json", NULL, 0, NULL, "LlamaForCausalLM", &err),
                     0);
    assert_string_equal(out.model.architecture, "NewForCausalLM as LlamaForCausalLM");
    assert_non_null(family_find(out.model.architecture));

    // What could not stand in the manifest, or would be read otherwise than it is meant.
    static const struct {
        const char *from, *to;
        int rc;
        const char *words;
    } cases[] = {
        {"NewForCausalLM", "New\\u0007", ERR_MODEL, "architectures[0] must be 1 to 43 letters without blanks"},
        {"NewForCausalLM", "N\xc3\xa9w", ERR_MODEL, "without blanks"},
        {"NewForCausalLM", "", ERR_MODEL, "without blanks"},
        {"NewForCausalLM", "A12345678901234567890123456789012345678901234", ERR_MODEL, "must be 1 to 43 letters"},
        {"NewForCausalLM", "Qwen3ForCausalLM", ERR_USAGE, "\"Qwen3ForCausalLM\" is known and cannot be read as"},
        {"\"vocab_size\"", "\"sliding_window\": 8, \"vocab_size\"", ERR_MODEL, "a LlamaForCausalLM has no windows"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char changed[1024];
        const char *at = strstr(text, cases[i].from);
        snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, cases[i].to, at + strlen(cases[i].from));
        int rc =
            hf_config_parse(&out, changed, strlen(changed), "config.json", NULL, 0, NULL, "LlamaForCausalLM", &err);
        if (rc != cases[i].rc || !strstr(err.msg, cases[i].words))
            fail_msg("case %zu: %d \"%s\" does not say \"%s\"", i, rc, err.msg, cases[i].words);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention),     cmocka_unit_test(test_experts),
        cmocka_unit_test(test_longrope),      cmocka_unit_test(test_rope_of_models),
        cmocka_unit_test(test_broken_values), cmocka_unit_test(test_refusals_by_name),
        cmocka_unit_test(test_new_spellings), cmocka_unit_test(test_known_as),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

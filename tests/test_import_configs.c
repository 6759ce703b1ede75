// quantization_config: which modules it quantizes, what is refused, and what its groups mean for the ranks' shares.
#include "tests/import_help.h"

#include "shard/hf_config.h"
#include "shard/import_plan.h"

// Which modules a config quantizes, without a checkpoint.
static void test_config_forms(void **state)
{
    (void)state;
    static const struct {
        const char *config, *module;
        bool quantized;
    } cases[] = {
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4"), "model.layers.0.mlp.down_proj", true},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4"), "lm_head", false},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"lm_head\":true"), "lm_head", true},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"lm_head\":true"), "model.embed_tokens", false},
        {CONFIG("\"quant_method\":\"fp8\",\"modules_to_not_convert\":[\"mlp\"]"), "model.layers.0.mlp.down_proj",
         false},
        {CONFIG("\"quant_method\":\"fp8\",\"modules_to_not_convert\":[\"ml\"]"), "model.layers.0.mlp.down_proj", true},
        {CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\",\"exclude_modules\":[\"model.layers.0*\"]"),
         "model.layers.0.mlp.down_proj", false},
        {CONFIG("\"quant_method\":\"mxfp4\""), "model.layers.0.self_attn.q_proj", false},
        {CONFIG("\"quant_method\":\"mxfp4\""), "model.layers.0.mlp.experts.down_proj", true},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"ignore\":[\"re:.*down.*\"],"
                "\"config_groups\":{\"a\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.down_proj", false},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"ignore\":[\"re:(a+)+$\"],"
                "\"config_groups\":{\"a\":{\"targets\":[\"re:.*up_proj$\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.up_proj", true},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
                "\"config_groups\":{\"a\":{\"targets\":[\"re:.*up_proj$\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.down_proj", false},
        {"{}", "model.layers.0.mlp.down_proj", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct import_config config = {0};
        struct error err;
        assert_int_equal(parse_config(&config, cases[i].config, &err), 0);
        const struct import_form *form = NULL;
        assert_int_equal(import_config_form(&form, &config, cases[i].module, &err), 0);
        if ((form != NULL) != cases[i].quantized)
            fail_msg("%s: %s", cases[i].config, cases[i].module);
        import_config_clear(&config);
    }
}

static void test_refused_configs(void **state)
{
    (void)state;
    static const struct {
        const char *config, *words;
    } cases[] = {
        {CONFIG("\"quant_method\":\"aqlm\""), "quant_method \"aqlm\""},
        {CONFIG("\"quant_method\":\"quip\""), "bf16, f16 or f32 checkpoint"},
        {CONFIG("\"bits\":4"), "quant_method is not there"},
        {CONFIG("\"quant_method\":7"), "must be a string"},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":3"), "3 bits"},
        {CONFIG("\"quant_method\":\"gptq\""), "bits"},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"desc_act\":1"), "desc_act must be true or false"},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"marlin\""), "\"marlin\""},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"is_marlin_format\":true"), "\"marlin\""},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":0.5"), "group_size must be an integer"},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"version\":\"gemv\""), "version \"gemv\""},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"version\":\"marlin\""), "version \"marlin\""},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":8"), "8 bits"},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"zero_point\":false"), "zero_point is false, and"},
        {CONFIG("\"quant_method\":\"fp8\",\"ignored_layers\":[\"re:(\"]"),
         "ignored_layers: \"re:(\" is no regular expression: missing closing parenthesis"},
        {CONFIG("\"quant_method\":\"fp8\",\"fmt\":\"e5m2\""), "\"e5m2\""},
        {CONFIG("\"quant_method\":\"fp8\",\"weight_block_size\":[128]"), "two integers"},
        {CONFIG("\"quant_method\":\"fp8\",\"weight_block_size\":[0,128]"), "two integers"},
        {CONFIG("\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true"), "llm_int8"},
        {CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{\"nbits\":2}}"), "2 bits"},
        {CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{\"nbits\":4,\"axis\":0}}"),
         "axis is 0, and"},
        {CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"W4A8_AWQ\""), "\"W4A8_AWQ\""},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"marlin-24\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":4}}}"),
         "\"marlin-24\""},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":3}}}"),
         "quantization_config.config_groups.a.weights has weights of 3 bits"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{}"),
         "quantizes no weights"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":4}}},\"transform_config\":{\"config_groups\":{\"u\":{}}}"),
         "transform_config"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"sparsity_config\":{\"format\":\"sparse-24-bitmask\"}"),
         "sparse-24-bitmask"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct import_config config = {0};
        struct error err = {0};
        int rc = parse_config(&config, cases[i].config, &err);
        if (rc != ERR_MODEL || !strstr(err.msg, cases[i].words) || !strstr(err.msg, "config.json"))
            fail_msg("%s: code %d, \"%s\" does not say \"%s\"", cases[i].config, rc, err.msg, cases[i].words);
    }
}

// Lists of modules that nobody writes but to keep others waiting.
static void test_costly_patterns(void **state)
{
    (void)state;
    static char text[1 << 18];
    static const struct {
        const char *pattern;
        int count;
        const char *words;
    } cases[] = {
        {"\"m\"", 10001, "lists 10001 modules, more than the 10000"},
        {"\"re:m\"", 257, "more than 256 regular expressions"},
        {"\"re:(.+)+[!?]\"", 1, "\"re:(.+)+[!?]\" takes more than 10000 steps on \"model.layers.0.mlp.down_proj\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct import_config config = {0};
        const struct import_form *form;
        struct error err = {0};
        int at = snprintf(text, sizeof text, "{\"quantization_config\":{\"quant_method\":\"fp8\",\"ignored_layers\":[");
        for (int n = 0; n < cases[i].count; n++)
            at += snprintf(text + at, sizeof text - (size_t)at, "%s%s", n ? "," : "", cases[i].pattern);
        snprintf(text + at, sizeof text - (size_t)at, "]}}");
        int rc = parse_config(&config, text, &err);
        if (!rc)
            rc = import_config_form(&form, &config, "model.layers.0.mlp.down_proj", &err);
        if (rc != ERR_MODEL || !strstr(err.msg, cases[i].words))
            fail_msg("code %d, \"%s\" does not say \"%s\"", rc, err.msg, cases[i].words);
        import_config_clear(&config);
    }
}

// Real configs: what each rank holds begins and ends with whole groups, all of it is dealt out, and nobody is left out.
static void test_uneven_groups(void **state)
{
    (void)state;
#define LLAMA(hidden, heads, kv, head, mlp)                                                                            \
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_act\":\"silu\",\"hidden_size\":" #hidden                       \
    ",\"intermediate_size\":" #mlp ",\"num_attention_heads\":" #heads ",\"num_key_value_heads\":" #kv                  \
    ",\"head_dim\":" #head                                                                                             \
    ",\"num_hidden_layers\":2,\"rms_norm_eps\":1e-5,\"vocab_size\":32000,\"max_position_embeddings\":4096,"            \
    "\"quantization_config\":{"
#define AWQ_128 "\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"zero_point\":true,\"version\":\"gemm\"}}"
#define FP8_128 "\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}"
    static const struct {
        const char *config;
        int64_t mlp, group;
        enum weight_kind kind;
    } cases[] = {
        {LLAMA(8192, 64, 8, 128, 29568) AWQ_128, 29568, 128, WEIGHT_INT4Z},  // Qwen2.5-72B
        {LLAMA(4096, 32, 32, 128, 11008) AWQ_128, 11008, 128, WEIGHT_INT4Z}, // Llama-2-7B
        {LLAMA(2880, 64, 8, 64, 2880) AWQ_128, 2880, 128, WEIGHT_INT4Z},     // 22.5 groups
        {LLAMA(4096, 32, 8, 128, 11008) FP8_128, 11008, 128, WEIGHT_FP8G},
        {LLAMA(2880, 64, 8, 64, 2880) "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32}}", 2880, 32,
         WEIGHT_INT4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (uint32_t tp = 1; tp <= 8; tp++) {
            struct hf_config model;
            struct import_config config = {0};
            struct import *import;
            struct error err;
            struct plan *plan = NULL;
            const char *text = cases[i].config;
            if (hf_config_parse(&model, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err))
                fail_msg("%s", err.msg);
            assert_int_equal(parse_config(&config, text, &err), 0);
            assert_int_equal(import_open(&import, &config, NULL, &err), 0);
            struct import_kinds kinds = import_kinds_keep(import, NULL, NULL);
            struct plan_options options = {.tp_size = tp, .kinds = &kinds.kinds};
            assert_int_equal(import_quant(&options.quant, &config, NULL, NULL, 128, false, &err), 0);
            assert_int_equal(options.quant.linear, cases[i].kind);
            if (plan_make(&plan, &model.model, &options, &err))
                fail_msg("%s", err.msg);
            int64_t next_mlp = 0, next_head = 0, head_group = cases[i].group / model.model.head_dim;
            for (uint32_t rank = 0; rank < tp; rank++) {
                const struct rank_share *share = &plan->ranks[rank].share;
                assert_int_equal(share->mlp_begin, next_mlp);
                assert_int_equal(share->mlp_begin % cases[i].group, 0);
                assert_true(share->intermediate_local > 0);
                assert_int_equal(share->head_begin, next_head);
                assert_true(head_group < 2 || share->head_begin % head_group == 0);
                next_mlp += share->intermediate_local;
                next_head += share->num_heads_local;
            }
            assert_int_equal(next_mlp, cases[i].mlp);
            assert_int_equal(next_head, model.model.num_heads);
            for (uint64_t t = 0; t < plan->tensor_count; t++)
                if (plan->ranks[0].tensors[t].role == ROLE_DOWN) {
                    assert_int_equal(plan->ranks[0].tensors[t].shape.kind, cases[i].kind);
                    assert_int_equal(plan->ranks[0].tensors[t].shape.group_size, cases[i].group);
                }
            plan_free(plan);
            import_close(import);
            import_config_clear(&config);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_config_forms),
        cmocka_unit_test(test_refused_configs),
        cmocka_unit_test(test_costly_patterns),
        cmocka_unit_test(test_uneven_groups),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

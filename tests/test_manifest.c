// The manifest: round trip, the canonical core and its contract, refusals key by key.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "formats/file_io.h"
#include "formats/manifest.h"

static struct manifest_file ranks[] = {
    {"rank-00-of-02.tpshard", 4194304, {1, 2}},
    {"rank-01-of-02.tpshard", 4198400, {3, 0xfedcba9876543210u}},
};
static struct manifest_file extras[] = {
    {"tokenizer.bin", 0, {5, 6}},
    {"chat \"template\\.jinja", 77, {7, 8}},
};
static struct manifest_file sources[] = {{"model-00001-of-00001.safetensors", 123456789012, {9, 10}}};

static struct manifest example(void)
{
    return (struct manifest){
        .version = MANIFEST_VERSION,
        .tool = "tpshard 0.1.0 (\xc3\xa9)",
        .model = {.architecture = "LlamaForCausalLM",
                  .num_layers = 4,
                  .layer_flags = {LAYER_WINDOW, LAYER_EXPERTS, LAYER_WINDOW | LAYER_LOCAL_ROPE, LAYER_NO_ROPE},
                  .hidden_size = 4096,
                  .intermediate_size = 14336,
                  .num_heads = 32,
                  .num_kv_heads = 8,
                  .head_dim = 128,
                  .vocab_size = 128256,
                  .context = 131072,
                  .norm_eps = 1e-5,
                  .pre_norms = true,
                  .embedding_scale = 12,
                  .residual_scale = 0.5,
                  .logit_scale = 0.25,
                  .attention_scale = 0.1,
                  .attention_softcap = 50,
                  .logit_softcap = 30,
                  .qk_norm = QK_NORM_HEAD,
                  .rotary_dim = 64,
                  .rope_attention_factor = 1,
                  .rope_original_context = 4096,
                  .activation = ACTIVATION_GELU_TANH,
                  .experts = {.num_experts = 16,
                              .experts_per_token = 4,
                              .expert_size = 512,
                              .shared_size = 1024,
                              .shared_gate = true,
                              .router = ROUTER_SIGMOID,
                              .normalise = true,
                              .scale = 2.5,
                              .num_groups = 4,
                              .groups_per_token = 2,
                              .group_members = 2,
                              .choice_bias = true},
                  .sliding_window = 4096,
                  .mlp_bias = true,
                  .tied_embeddings = true,
                  .bos_token_id = 128000,
                  .eos_token_ids = {128001, 128008, 128009},
                  .num_eos = 3,
                  .default_temperature = 0.6,
                  .default_top_p = 0.9,
                  .default_repetition_penalty = NAN,
                  .default_top_k = -1},
        .tp_size = 2,
        .pp_size = 1,
        .quant = {.linear = WEIGHT_INT4, .embedding = WEIGHT_BF16, .head = WEIGHT_INT8, .group_size = 128},
        .experts = EXPERTS_EP,
        .wire_advice = "s8x",
        .wires_measured = {.text = {.low = 3, .high = 4},
                           .tokens = 2000,
                           .context = 512,
                           .feedback = true,
                           .limit = 0.001,
                           .wires = {{"f32", true, 0, 0, 1},
                                     {"s8x", true, 0.00002, 0.00003, 0.995},
                                     {"fp8", false, 0, 0, 0}},
                           .count = 3},
        .ranks = ranks,
        .num_ranks = 2,
        .extras = extras,
        .num_extras = 2,
        .sources = sources,
        .num_sources = 1,
    };
}

static const char example_core[] =
    "{\"experts\":\"ep\",\"model\":{\"activation\":\"gelu_tanh\",\"architecture\":\"LlamaForCausalLM\",\"attention_s"
    "cale\":0.10000000000000001,\"attention_softcap\":50,\"bos_token_id\":128000,\"context\":131072,\"default"
    "_temperature\":0.59999999999999998,\"default_top_p\":0.90000000000000002,\"embedding_scale\":12,\"eos_"
    "token_ids\":[128001,128008,128009],\"expert_bias\":false,\"expert_groups\":4,\"expert_groups_per_token"
    "\":2,\"expert_size\":512,\"experts_per_token\":4,\"head_dim\":128,\"hidden_size\":4096,\"intermediate_size"
    "\":14336,\"latent_kv_rank\":0,\"latent_nope_dim\":0,\"latent_q_rank\":0,\"latent_rope_dim\":0,\"latent_v_d"
    "im\":0,\"layers\":\"1258\",\"logit_scale\":0.25,\"logit_softcap\":30,\"mlp_bias\":true,\"norm_eps\":1.0000000"
    "000000001e-05,\"num_experts\":16,\"num_heads\":32,\"num_kv_heads\":8,\"num_layers\":4,\"o_bias\":false,\"po"
    "st_norms\":false,\"pre_norms\":true,\"qk_norm\":\"head\",\"qkv_bias\":false,\"residual_scale\":0.5,\"rope_at"
    "tention_factor\":1,\"rope_original_context\":4096,\"rotary_dim\":64,\"rotary_interleaved\":false,\"route"
    "r\":\"sigmoid\",\"router_bias\":false,\"router_choice_bias\":true,\"router_group_members\":2,\"router_norm"
    "alise\":true,\"router_scale\":2.5,\"shared_gate\":true,\"shared_size\":1024,\"sinks\":false,\"sliding_wind"
    "ow\":4096,\"tied_embeddings\":true,\"vocab_size\":128256},\"pp_size\":1,\"quant\":{\"embedding\":\"bf16\",\"gr"
    "oup_size\":128,\"head\":\"int8\",\"linear\":\"int4\"},\"sources\":[{\"bytes\":123456789012,\"name\":\"model-0000"
    "1-of-00001.safetensors\",\"xxh3_128\":\"000000000000000a0000000000000009\"}],\"tp_size\":2,\"version\":2}";

static void to_json(char **text, const struct manifest *manifest)
{
    struct error err = {0};
    if (manifest_to_json(manifest, text, &err))
        fail_msg("%s", err.msg);
}

static void core_and_contract(void **state)
{
    (void)state;
    struct manifest manifest = example();
    // Computable before any of these is known.
    manifest.ranks = manifest.extras = NULL;
    manifest.num_ranks = manifest.num_extras = 0;
    manifest.tool = manifest.wire_advice = NULL;
    char *core;
    struct error err = {0};
    struct checksum128 contract;
    assert_int_equal(manifest_core(&manifest, &core, &err), 0);
    assert_string_equal(core, example_core);
    free(core);
    assert_int_equal(manifest_contract(&manifest, &contract, &err), 0);
    assert_true(checksum128_equal(contract, checksum_whole(example_core, strlen(example_core))));
}

static void assert_same_files(const struct manifest_file *a, const struct manifest_file *b, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        assert_string_equal(a[i].name, b[i].name);
        assert_int_equal(a[i].bytes, b[i].bytes);
        assert_true(checksum128_equal(a[i].hash, b[i].hash));
    }
}

static void round_trip(void **state)
{
    (void)state;
    struct manifest wanted = example(), *found = NULL;
    struct error err = {0};
    char *text = NULL;
    to_json(&text, &wanted);
    if (manifest_parse(&found, text, strlen(text), "model.json", &err))
        fail_msg("%s", err.msg);
    assert_int_equal(found->version, 2);
    assert_int_equal(found->experts, EXPERTS_EP);
    assert_string_equal(found->tool, wanted.tool);
    assert_string_equal(found->wire_advice, wanted.wire_advice);
    assert_int_equal(found->tp_size, 2);
    const struct manifest_wires *wires = &found->wires_measured;
    assert_int_equal(wires->count, 3);
    assert_true(checksum128_equal(wires->text, wanted.wires_measured.text));
    assert_true(wires->tokens == 2000 && wires->context == 512 && wires->feedback && wires->limit == 0.001);
    for (size_t i = 0; i < wires->count; i++) {
        const struct manifest_wire *got = &wires->wires[i], *want = &wanted.wires_measured.wires[i];
        assert_string_equal(got->name, want->name);
        assert_int_equal(got->finite, want->finite);
        assert_true(!want->finite || (got->kl_divergence == want->kl_divergence && got->kl_high == want->kl_high &&
                                      got->same_top == want->same_top));
    }
    assert_int_equal(found->pp_size, 1);
    assert_memory_equal(&found->quant, &wanted.quant, sizeof wanted.quant);
    assert_int_equal(found->num_ranks, 2);
    assert_int_equal(found->num_extras, 2);
    assert_int_equal(found->num_sources, 1);
    assert_same_files(found->ranks, ranks, 2);
    assert_same_files(found->extras, extras, 2);
    assert_same_files(found->sources, sources, 1);
    const struct model_desc *a = &found->model, *b = &wanted.model;
    assert_string_equal(a->architecture, b->architecture);
    assert_int_equal(a->num_layers, b->num_layers);
    assert_int_equal(a->hidden_size, b->hidden_size);
    assert_int_equal(a->intermediate_size, b->intermediate_size);
    assert_int_equal(a->num_heads, b->num_heads);
    assert_int_equal(a->num_kv_heads, b->num_kv_heads);
    assert_int_equal(a->head_dim, b->head_dim);
    assert_int_equal(a->vocab_size, b->vocab_size);
    assert_int_equal(a->context, b->context);
    assert_true(a->norm_eps == b->norm_eps && a->rope_attention_factor == b->rope_attention_factor);
    assert_int_equal(a->sliding_window, b->sliding_window);
    assert_true(!a->qkv_bias && !a->o_bias && a->mlp_bias && a->tied_embeddings && a->pre_norms && !a->post_norms);
    assert_memory_equal(a->layer_flags, b->layer_flags, sizeof a->layer_flags);
    assert_true(a->qk_norm == QK_NORM_HEAD && a->activation == ACTIVATION_GELU_TANH && !a->sinks);
    assert_true(a->embedding_scale == 12 && a->residual_scale == 0.5 && a->logit_scale == 0.25);
    assert_true(a->attention_scale == 0.1 && a->attention_softcap == 50 && a->logit_softcap == 30);
    assert_true(a->rotary_dim == 64 && !a->rotary_interleaved && a->rope_original_context == 4096);
    assert_memory_equal(&a->experts, &b->experts, sizeof a->experts);
    assert_int_equal(a->bos_token_id, b->bos_token_id);
    assert_int_equal(a->num_eos, 3);
    assert_memory_equal(a->eos_token_ids, b->eos_token_ids, sizeof a->eos_token_ids);
    assert_true(a->default_temperature == 0.6 && a->default_top_p == 0.9 && isnan(a->default_repetition_penalty));
    assert_int_equal(a->default_top_k, -1);

    char *again = NULL;
    to_json(&again, found);
    assert_string_equal(again, text);
    free(again);
    manifest_free(found);
    free(text);
}

// Every double comes back as it was, whatever the locale writes for a decimal point.
static void numbers_are_exact(void **state)
{
    (void)state;
    static const double values[] = {1e-5, 1e-6, 0.1, 1.0 / 3, 5e-324, 2.2250738585072014e-308, 0.99999999999999989,
                                    1,    0};
    static const char *const locales[] = {"C", "de_DE.UTF-8", "fr_FR.UTF-8"};
    for (size_t l = 0; l < 3; l++) {
        if (!setlocale(LC_ALL, locales[l]))
            continue; // not installed
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            struct manifest manifest = example(), *found = NULL;
            struct error err = {0};
            manifest.model.norm_eps = values[i];
            char *text = NULL;
            to_json(&text, &manifest);
            assert_int_equal(manifest_parse(&found, text, strlen(text), "model.json", &err), 0);
            assert_true(found->model.norm_eps == values[i]);
            manifest_free(found);
            free(text);
        }
    }
    setlocale(LC_ALL, "C");
}

// The latents' epsilon has a key where it is not the model's.
static void latent_norm_eps(void **state)
{
    (void)state;
    static const double values[] = {0, 1e-6};
    for (int i = 0; i < 2; i++) {
        struct manifest manifest = example(), *found = NULL;
        struct error err = {0};
        char *text = NULL;
        manifest.model.latent = (struct latent_desc){512, 0, 64, 64, 128, values[i]};
        manifest.model.num_kv_heads = manifest.model.num_heads;
        manifest.model.qk_norm = QK_NORM_NONE;
        to_json(&text, &manifest);
        assert_int_equal(strstr(text, "latent_norm_eps") != NULL, i);
        if (manifest_parse(&found, text, strlen(text), "model.json", &err))
            fail_msg("%s", err.msg);
        assert_true(found->model.latent.norm_eps == values[i]);
        assert_true(model_latent_norm_eps(&found->model) == (i ? 1e-6 : 1e-5));
        manifest_free(found);
        free(text);
    }
}

// What is rotated has keys; what is not has none, so that older directories keep their contract.
static void rotation(void **state)
{
    (void)state;
    static const struct {
        uint32_t block;
        int64_t mlp;
        bool tied, post_norms;
        const char *refusal; // NULL: good
    } cases[] = {
        {0, 0, true, false, NULL},
        {0, 0, false, true, NULL},
        {128, 128, false, false, NULL},
        {4, 0, false, false, NULL},
        {64, 2, false, false, NULL},
        {0, 64, false, false, "quant.rotation must be"}, // the engine would rotate what nothing rotates back
        {96, 64, false, false, "quant.rotation must be"},
        {2, 0, false, false, "quant.rotation must be an integer from 4 to 128"},
        {256, 0, false, false, "quant.rotation must be an integer from 4 to 128"},
        {128, 128, true, false, "quant.rotation must be"},
        {128, 128, false, true, "quant.rotation must be"},
        {128, 96, false, false, "mlp_rotation must be a power of two"},
        {128, 256, false, false, "mlp_rotation must be an integer from 2 to 128"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct manifest manifest = example(), *found = NULL;
        struct error err = {0};
        char *text = NULL;
        manifest.quant.rotation = cases[i].block;
        manifest.model.mlp_rotation = cases[i].mlp;
        manifest.model.tied_embeddings = cases[i].tied;
        manifest.model.post_norms = cases[i].post_norms;
        int rc = manifest_to_json(&manifest, &text, &err);
        if (cases[i].refusal) {
            assert_int_equal(rc, ERR_CORRUPT);
            if (!strstr(err.msg, cases[i].refusal))
                fail_msg("'%s' does not say '%s'", err.msg, cases[i].refusal);
            continue;
        }
        if (rc || manifest_parse(&found, text, strlen(text), "model.json", &err))
            fail_msg("%s", err.msg);
        assert_int_equal(strstr(text, "\"rotation\"") != NULL, cases[i].block > 0);
        assert_int_equal(strstr(text, "\"mlp_rotation\"") != NULL, cases[i].mlp > 0);
        assert_int_equal(found->quant.rotation, cases[i].block);
        assert_int_equal(found->model.mlp_rotation, cases[i].mlp);
        manifest_free(found);
        free(text);
    }
}

static void calibration(void **state)
{
    (void)state;
    static const struct {
        enum calibration_method method;
        enum weight_scales scales;
        const char *refusal; // NULL: good
    } cases[] = {
        {CALIBRATION_NONE, WEIGHT_SCALES_SEARCHED, NULL},
        {CALIBRATION_NONE, WEIGHT_SCALES_LARGEST, NULL},
        {CALIBRATION_SCALES, WEIGHT_SCALES_SEARCHED, NULL},
        {CALIBRATION_GPTQ, WEIGHT_SCALES_SEARCHED, NULL},
        {CALIBRATION_GPTQ, WEIGHT_SCALES_LARGEST, "quant.calibration.method must be"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct manifest manifest = example(), *found = NULL;
        struct error err = {0};
        char *text = NULL;
        manifest.quant.linear = WEIGHT_INT4;
        manifest.quant.group_size = 128;
        manifest.quant.scales = cases[i].scales;
        manifest.quant.calibration = cases[i].method;
        manifest.quant.statistics = (struct checksum128){0x1234, 0xabcd};
        int rc = manifest_to_json(&manifest, &text, &err);
        if (cases[i].refusal) {
            assert_int_equal(rc, ERR_CORRUPT);
            if (!strstr(err.msg, cases[i].refusal))
                fail_msg("'%s' does not say '%s'", err.msg, cases[i].refusal);
            continue;
        }
        if (rc || manifest_parse(&found, text, strlen(text), "model.json", &err))
            fail_msg("%s", err.msg);
        assert_int_equal(strstr(text, "\"calibration\"") != NULL, cases[i].method != CALIBRATION_NONE);
        assert_int_equal(found->quant.calibration, cases[i].method);
        if (cases[i].method != CALIBRATION_NONE)
            assert_true(checksum128_equal(found->quant.statistics, manifest.quant.statistics));
        manifest_free(found);
        free(text);
    }
}

// Replaces the first `from` in text.
static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    if (!at)
        fail_msg("'%s' is not in the manifest", from);
    size_t before = (size_t)(at - text), rest = strlen(text) - before - strlen(from);
    char *out = malloc(before + strlen(to) + rest + 1);
    assert_non_null(out);
    memcpy(out, text, before);
    memcpy(out + before, to, strlen(to));
    memcpy(out + before + strlen(to), text + before + strlen(from), rest + 1);
    return out;
}

// Kinds matrix by matrix: listed by name, part of the contract, found again.
static void matrices(void **state)
{
    (void)state;
    struct matrix_kind list[] = {
        {0, ROLE_QKV, WEIGHT_INT8, 0}, {2, ROLE_DOWN, WEIGHT_INT4, 32}, {3, ROLE_O, WEIGHT_BF16, 0}};
    struct manifest wanted = example(), *found = NULL;
    struct checksum128 without, with, other;
    struct error err = {0};
    char *text = NULL, *core = NULL;
    assert_int_equal(manifest_contract(&wanted, &without, &err), 0);
    wanted.matrices = list;
    wanted.num_matrices = 3;
    wanted.quant.millibits = 4500;
    assert_int_equal(manifest_contract(&wanted, &with, &err), 0);
    assert_false(checksum128_equal(without, with));
    assert_int_equal(manifest_core(&wanted, &core, &err), 0);
    assert_non_null(strstr(core, "\"linear\":\"int4\",\"matrices\":{\"0.qkv\":\"int8\",\"2.down\":\"int4:32\",\"3.o\":"
                                 "\"bf16\"},\"millibits\":4500}"));
    free(core);
    to_json(&text, &wanted);
    if (manifest_parse(&found, text, strlen(text), "model.json", &err))
        fail_msg("%s", err.msg);
    assert_int_equal(found->quant.millibits, 4500);
    assert_int_equal(found->num_matrices, 3);
    assert_memory_equal(found->matrices, list, sizeof list);
    manifest_free(found);
    free(text);
    list[1].group_size = 64;
    assert_int_equal(manifest_contract(&wanted, &other, &err), 0);
    assert_false(checksum128_equal(other, with));
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *wanted;
    } cases[] = {
        {"{", "[", "not valid JSON"},
        {"\"version\": 2", "\"version\": 3", "version 3, this program reads version 2"},
        {"\"version\": 2", "\"version\": \"2\"", "version must be an integer"},
        {"\"version\": 2", "\"Version\": 2", "version must be an integer"},
        {"\"version\": 2", "\"version\": 2, \"x_note\": 1", "unknown key x_note"},
        {"\"version\": 2", "\"version\": 2, \"version\": 2", "not valid JSON"},
        {"\"bos_token_id\"", "\"boss_token_id\"", "unknown key model.boss_token_id"},
        {"\"linear\"", "\"liner\"", "unknown key quant.liner"},
        {"\"name\"", "\"path\"", "unknown key extras[0].path"},
        {"\"tp_size\": 2", "\"tp_size\": 1", "ranks must hold tp_size x pp_size = 1 files, found 2"},
        {"\"tp_size\": 2", "\"tp_size\": 0", "tp_size must be an integer from 1 to 1024"},
        {"\"tp_size\": 2", "\"tp_size\": 1025", "tp_size must be"},
        {"\"tp_size\": 2", "\"tp_size\": 2.0", "tp_size must be"},
        {"\"pp_size\": 1", "\"pp_size\": 2", "= 4 files, found 2"},
        {"\"wire\": \"s8x\"", "\"wire\": \"s9x\"",
         "wires_measured.wires[1].wire must be bf16, f32, fp8 or s8x, found 's9x'"},
        {"\"wire\": \"fp8\"", "\"same_top\": 1, \"wire\": \"fp8\"", "must stand together"},
        {"\"same_top\": 1", "\"same_top\": 1.5", "same_top must be"},
        {"\"tokens\": 2000", "\"tokens\": 0", "wires_measured.tokens must be"},
        {"\"limit\"", "\"limits\"", "unknown key wires_measured.limits"},
        {"\"wire_advice\": \"s8x\"", "\"wire_advice\": \"s9x\"",
         "wire_advice must be bf16, f32, fp8 or s8x, found 's9x'"},
        {"\"linear\": \"int4\"", "\"linear\": \"int5\"",
         "quant.linear must be a kind of weight, such as bf16 or int4, found int5"},
        {"\"linear\": \"int4\"", "\"linear\": \"int8\"", "quant.group_size must be 0"},
        {"\"linear\"", "\"millibits\": 4500, \"linear\"", "quant.matrices must stand beside quant.millibits"},
        {"\"linear\"", "\"matrices\": {\"0.qkv\": \"int8\"}, \"linear\"",
         "quant.millibits must stand beside quant.matrices"},
        {"\"linear\"", "\"matrices\": {\"0.qkw\": \"int8\"}, \"linear\"",
         "quant.matrices.0.qkw is no matrix of this model's layers; they are named like 0.qkv and 3.down"},
        {"\"linear\"", "\"matrices\": {\"4.qkv\": \"int8\"}, \"linear\"", "quant.matrices.4.qkv is no matrix"},
        {"\"linear\"", "\"matrices\": {\"0.qkv\": \"int4:31\"}, \"linear\"", "found int4:31"},
        {"\"linear\"", "\"matrices\": {\"0.qkv\": 8}, \"linear\"", "found an integer"},
        {"\"linear\"", "\"matrices\": [], \"linear\"", "quant.matrices must be an object"},
        {"\"linear\"", "\"millibits\": 0, \"linear\"", "quant.millibits must be an integer from 1"},
        {"\"group_size\": 128", "\"group_size\": 48", "quant.group_size must be 32, 64 or 128"},
        {"\"group_size\": 128", "\"group_size\": 64", "contract does not match"},
        {"\"head_dim\": 128", "\"head_dim\": 127", "head_dim must be even"},
        {"\"num_kv_heads\": 8", "\"num_kv_heads\": 7", "num_kv_heads must divide num_heads, found 7 and 32"},
        {"\"num_kv_heads\": 8", "\"num_kv_heads\": 0", "model.num_kv_heads must be an integer from 1"},
        {"\"num_layers\": 4", "\"num_layers\": 5", "layers speaks of 4 layers, num_layers of 5"},
        {"\"num_layers\": 4", "\"num_layers\": 1e3", "model.num_layers must be an integer"},
        {"\"num_layers\": 4,", "", "model.num_layers must be an integer from 1 to 512, found nothing"},
        {"\"experts\": \"ep\"", "\"experts\": \"tp\"", "contract does not match"},
        {"\"experts\": \"ep\"", "\"experts\": \"pp\"", "experts must be ep or tp, found 'pp'"},
        {"\"layers\": \"1258\"", "\"layers\": \"125g\"",
         "model.layers must be one of 0 to 9 and a to f for each layer"},
        {"\"layers\": \"1258\"", "\"layers\": \"125\"", "layers speaks of 3 layers, num_layers of 4"},
        {"\"layers\": \"1258\"", "\"layers\": \"0208\"", "sliding_window must be above 0 where layers use it, and 0"},
        {"\"layers\": \"1258\"", "\"layers\": \"1058\"", "num_experts is above 0, but no layer has any"},
        {"\"sliding_window\": 4096", "\"sliding_window\": 0", "sliding_window must be above 0 where layers use it"},
        {"\"intermediate_size\": 14336", "\"intermediate_size\": 0",
         "intermediate_size must be above 0 where layers have"},
        {"\"num_experts\": 16", "\"num_experts\": 0", "layers with experts need num_experts above 0"},
        {"\"num_experts\": 16", "\"num_experts\": 1025", "model.num_experts must be an integer from 0 to 1024"},
        {"\"num_experts\": 16", "\"num_experts\": 18", "expert_groups must divide num_experts"},
        {"\"experts_per_token\": 4", "\"experts_per_token\": 0", "experts_per_token must be from 1 to num_experts"},
        {"\"experts_per_token\": 4", "\"experts_per_token\": 33", "experts_per_token must be an integer from 0 to 32"},
        {"\"experts_per_token\": 4", "\"experts_per_token\": 9", "hold experts_per_token experts"},
        {"\"expert_groups_per_token\": 2", "\"expert_groups_per_token\": 5", "expert_groups_per_token must be from 1"},
        {"\"router_group_members\": 2", "\"router_group_members\": 5", "router_group_members must be from 1"},
        {"\"expert_size\": 512", "\"expert_size\": 0", "expert_size and router_scale must be above 0"},
        {"\"shared_size\": 1024", "\"shared_size\": 0", "shared_gate needs a shared_size above 0"},
        {"\"router\": \"sigmoid\"", "\"router\": \"relu\"", "model.router must be softmax or the like, found relu"},
        {"\"rotary_dim\": 64", "\"rotary_dim\": 63", "rotary_dim must be even and at most head_dim"},
        {"\"rotary_dim\": 64", "\"rotary_dim\": 130", "rotary_dim must be even and at most head_dim"},
        {"\"head_dim\": 128", "\"head_dim\": 258", "head_dim must be at most 256"},
        {"\"head_dim\": 128", "\"head_dim\": 322", "head_dim must be an integer from 2 to 320"},
        {"\"latent_kv_rank\": 0", "\"latent_kv_rank\": 641", "latent_kv_rank must be an integer from 0 to 640"},
        {"\"latent_kv_rank\": 0", "\"latent_kv_rank\": 512", "latent_nope_dim + latent_rope_dim must be head_dim"},
        {"\"latent_v_dim\": 0", "\"latent_v_dim\": 64", "latent_kv_rank is 0, but other fields describe latent"},
        {"\"latent_v_dim\": 0", "\"latent_v_dim\": 0, \"latent_norm_eps\": 0.5", "latent_kv_rank is 0, but other"},
        {"\"latent_v_dim\": 0", "\"latent_v_dim\": 0, \"latent_norm_eps\": 0",
         "model.latent_norm_eps must be a number"},
        {"\"norm_eps\": 1.0000000000000001e-05", "\"norm_eps\": 1.0000000000000003e-05", "contract does not match"},
        {"\"norm_eps\": 1.0000000000000001e-05", "\"norm_eps\": NaN", "not valid JSON"},
        {"\"norm_eps\": 1.0000000000000001e-05", "\"norm_eps\": -1", "model.norm_eps must be a number"},
        {"\"rope_attention_factor\": 1", "\"rope_attention_factor\": 0", "model.rope_attention_factor must be"},
        {"\"mlp_bias\": true", "\"mlp_bias\": 1", "model.mlp_bias must be true or false"},
        {"\"mlp_bias\": true", "\"mlp_bias\": false", "contract does not match"},
        {"128008", "-1", "model.eos_token_ids[1] must be a token id"},
        {"128008", "1,2,3,4,5,6,7", "must hold at most 8 ids, found 9"},
        {"\"LlamaForCausalLM\"", "\"Llama\\u0001\"", "without control characters"},
        {"\"LlamaForCausalLM\"", "\"Llama\\u0000\"", "not valid JSON"},
        {"\"LlamaForCausalLM\"", "\"0123456789012345678901234567890123456789012345678901234567890123\"",
         "model.architecture must be at most 63 bytes"},
        {"\"tokenizer.bin\"", "\"../tokenizer.bin\"",
         "extras[0].name must be a plain file name, found '../tokenizer.bin'"},
        {"\"tokenizer.bin\"", "\"..\"", "plain file name"},
        {"\"tokenizer.bin\"", "\".\"", "plain file name"},
        {"\"tokenizer.bin\"", "\"\"", "plain file name"},
        {"\"tokenizer.bin\"", "\"/etc/passwd\"", "plain file name"},
        {"\"tokenizer.bin\"", "\"a\\nb\"", "without control characters"},
        {"\"tokenizer.bin\"", "\"model.json\"", "the file 'model.json' stands in it twice"},
        {"\"tokenizer.bin\"", "\"rank-01-of-02.tpshard\"", "the file 'rank-01-of-02.tpshard' stands in it twice"},
        {"\"rank-00-of-02.tpshard\"", "\"rank-01-of-02.tpshard\"", "stands in it twice"},
        {"\"bytes\": 4194304", "\"bytes\": -1", "ranks[0].bytes must be an integer from 0"},
        {"\"bytes\": 4194304", "\"bytes\": 9223372036854775808", "integer beyond 64 bits"},
        {"fedcba9876543210", "FEDCBA9876543210", "ranks[1].xxh3_128 must be 32 hexadecimal digits in lower case"},
        {"fedcba9876543210", "fedcba987654321", "must be 32 hexadecimal digits"},
        {"123456789012", "123456789013", "contract does not match"},
        {"\"sources\": [", "\"sources\": [7, ", "sources[0] must be an object"},
        {"\"wire_advice\"", "\"wire_advise\"", "unknown key wire_advise"},
        {"\"contract\": \"", "\"contract\": \"0", "contract must be 32 hexadecimal digits"},
    };
    struct manifest manifest = example();
    char *text = NULL;
    to_json(&text, &manifest);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *changed = replaced(text, cases[i].from, cases[i].to);
        struct manifest *found = NULL;
        struct error err = {0};
        int rc = manifest_parse(&found, changed, strlen(changed), "model.json", &err);
        if (rc != ERR_CORRUPT || found)
            fail_msg("%s -> %s: accepted (%d)", cases[i].from, cases[i].to, rc);
        if (strncmp(err.msg, "model.json", 10) != 0 || !strstr(err.msg, cases[i].wanted))
            fail_msg("%s -> %s: '%s' instead of '%s'", cases[i].from, cases[i].to, err.msg, cases[i].wanted);
        free(changed);
    }
    free(text);
}

// No byte of the core can change unseen; and nothing crashes, whatever byte changes or is missing.
static void every_byte(void **state)
{
    (void)state;
    struct manifest manifest = example();
    char *text = NULL;
    to_json(&text, &manifest);
    size_t bytes = strlen(text);
    for (size_t i = 0; i < bytes; i++) {
        struct manifest *found = NULL;
        struct error err = {0};
        char *copy = malloc(i + 1);
        assert_non_null(copy);
        memcpy(copy, text, i);
        int rc = manifest_parse(&found, copy, i, "model.json", &err);
        if (rc ? rc != ERR_CORRUPT : i < bytes - 1) // all but the last line break is needed
            fail_msg("cut to %zu bytes: %d", i, rc);
        if (!rc)
            manifest_free(found);
        free(copy);
        for (int bit = 0; bit < 8; bit++) {
            text[i] ^= (char)(1 << bit);
            found = NULL;
            rc = manifest_parse(&found, text, bytes, "model.json", &err);
            char *core = NULL;
            if (rc == 0 && manifest_core(found, &core, &err) == 0)
                assert_string_equal(core, example_core);
            else
                assert_int_equal(rc, ERR_CORRUPT);
            free(core);
            manifest_free(found);
            text[i] ^= (char)(1 << bit);
        }
    }
    free(text);
}

static void writer_refuses(void **state)
{
    (void)state;
    struct error err = {0};
    char *text = NULL;
    struct manifest manifest = example();
    manifest.wire_advice = "fast";
    assert_int_equal(manifest_to_json(&manifest, &text, &err), ERR_CORRUPT);
    manifest = example();
    manifest.model.norm_eps = NAN;
    assert_int_equal(manifest_to_json(&manifest, &text, &err), ERR_CORRUPT);
    manifest = example();
    manifest.tool = "a\nb";
    assert_int_equal(manifest_to_json(&manifest, &text, &err), ERR_CORRUPT);
    manifest = example();
    manifest.num_ranks = 1;
    assert_int_equal(manifest_to_json(&manifest, &text, &err), ERR_CORRUPT);
    assert_null(text);
}

static void directories(void **state)
{
    (void)state;
    char dir[] = "/tmp/test_manifest_XXXXXX", path[64];
    struct manifest *found = NULL;
    struct error err = {0};
    assert_non_null(mkdtemp(dir));
    assert_int_equal(manifest_read(&found, "/nowhere/at/all", &err), ERR_IO);
    assert_int_equal(manifest_read(&found, dir, &err), ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "no model.json here: not a shard directory"));
    assert_int_equal(file_write_atomic(dir, "config.json", "{}", 2, &err), 0);
    assert_int_equal(manifest_read(&found, dir, &err), ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "run tpshard on it first"));
    assert_int_equal(file_write_atomic(dir, "rank-00-of-01.tpshard", "", 0, &err), 0);
    assert_int_equal(manifest_read(&found, dir, &err), ERR_CORRUPT);
    assert_non_null(strstr(err.msg, "no model.json here beside the rank files"));
    assert_null(found);

    struct manifest manifest = example();
    char *text = NULL;
    to_json(&text, &manifest);
    assert_int_equal(file_write_atomic(dir, MANIFEST_FILE_NAME, text, strlen(text), &err), 0);
    assert_int_equal(manifest_read(&found, dir, &err), 0);
    assert_int_equal(found->model.num_layers, 4);
    manifest_free(found);
    free(text);
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/rank-00-of-01.tpshard", dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.json", dir);
    unlink(path);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(manifest_read(&found, dir, &err), ERR_CORRUPT);
    rmdir(path);
    rmdir(dir);
    manifest_free(NULL);
}

static void rank_file_names(void **state)
{
    (void)state;
    char name[64];
    manifest_rank_file_name(name, sizeof name, 0, 4, 1);
    assert_string_equal(name, "rank-00-of-04.tpshard");
    manifest_rank_file_name(name, sizeof name, 127, 1024, 1);
    assert_string_equal(name, "rank-127-of-1024.tpshard");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(core_and_contract), cmocka_unit_test(round_trip),      cmocka_unit_test(matrices),
        cmocka_unit_test(numbers_are_exact), cmocka_unit_test(latent_norm_eps), cmocka_unit_test(rotation),
        cmocka_unit_test(calibration),       cmocka_unit_test(refusals),        cmocka_unit_test(every_byte),
        cmocka_unit_test(writer_refuses),    cmocka_unit_test(directories),     cmocka_unit_test(rank_file_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

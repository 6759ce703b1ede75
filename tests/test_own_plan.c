// Plans of the user's own: every strategy of transformers, what they decide, and what is refused by name.
#include "shard/own_plan.h"

#include "formats/file_io.h"
#include "shard/hf_config.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define LLAMA_ATTENTION                                                                                                \
    "'layers.*.self_attn.q_proj': 'colwise', 'layers.*.self_attn.k_proj': 'colwise',"                                  \
    "'layers.*.self_attn.v_proj': 'colwise', 'layers.*.self_attn.o_proj': 'rowwise'"
#define LLAMA_MLP                                                                                                      \
    "'layers.*.mlp.gate_proj': 'colwise', 'layers.*.mlp.up_proj': 'colwise', 'layers.*.mlp.down_proj': 'rowwise'"
#define HEAD "'lm_head': 'colwise_gather_output', 'embed_tokens': 'embedding_rowwise'"

static int parse(struct own_plan **out, const char *text, struct error *err)
{
    char copy[2048];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *c = copy; *c; c++)
        *c = *c == '\'' ? '"' : *c;
    return own_plan_parse(out, copy, strlen(copy), "my.json", err);
}

static struct model_desc model_of(const char *family)
{
    char path[256];
    struct hf_config config;
    struct error err;
    snprintf(path, sizeof path, "tests/golden/families/%s", family);
    if (hf_config_read(&config, path, NULL, &err))
        fail_msg("%s (run from the repository root)", err.msg);
    return config.model;
}

// What parsing or checking says; 0 and the note, or the code and the sentence.
static int check(const char *family, const char *text, enum experts_mode *experts, char *said, size_t said_bytes)
{
    struct own_plan *plan;
    struct error err = {0};
    struct model_desc model = model_of(family);
    int rc = parse(&plan, text, &err);
    if (!rc) {
        rc = own_plan_check(plan, &model, experts, said, said_bytes, &err);
        own_plan_free(plan);
    }
    if (rc)
        snprintf(said, said_bytes, "%s", err.msg);
    return rc;
}

static void test_plans_of_transformers(void **state)
{
    (void)state;
    static const struct {
        const char *family, *text;
        enum experts_mode experts; // in the end; EXPERTS_TP at first
        const char *note;
    } cases[] = {
        {"llama2", "{" LLAMA_ATTENTION "," LLAMA_MLP "," HEAD "}", EXPERTS_TP, ""},
        {"llama2", "{" LLAMA_ATTENTION "," LLAMA_MLP "}", EXPERTS_TP,
         "my.json says nothing of embed_tokens, lm_head: cut as for every LlamaForCausalLM"},
        {"llama2",
         "{'model.layers.*.self_attn.q_proj.weight': 'colwise_rep', 'model.layers.*.mlp.down_proj': 'rowwise_rep'}",
         EXPERTS_TP, "my.json says nothing of embed_tokens, layers.*.self_attn.k_proj"},
        {"phi3",
         "{'layers.*.self_attn.qkv_proj': 'colwise_gather_output', 'layers.*.self_attn.o_proj': 'rowwise_split_input',"
         "'layers.*.mlp.gate_up_proj': 'colwise_gather_output', 'layers.*.mlp.down_proj': 'rowwise_split_input'," HEAD
         "}",
         EXPERTS_TP, ""},
        {"phi3", "{'layers.*.mlp.gate_up_proj': 'packed_colwise', 'layers.*.mlp.down_proj': 'packed_rowwise'}",
         EXPERTS_TP,
         "my.json says nothing of embed_tokens, layers.*.self_attn.qkv_proj, layers.*.self_attn.o_proj, lm_head"},
        {"gemma3",
         "{" LLAMA_ATTENTION "," LLAMA_MLP ",'embed_tokens': 'embedding_rowwise',"
         "'layers.*.self_attn.q_norm': 'replicated_with_grad_allreduce', 'layers.*.input_layernorm': "
         "'sequence_parallel',"
         "'norm': 'replicate'}",
         EXPERTS_TP, ""},
        {"mixtral",
         "{" LLAMA_ATTENTION "," HEAD ",'layers.*.mlp.experts.gate_up_proj': 'packed_colwise',"
         "'layers.*.mlp.experts.down_proj': 'rowwise', 'layers.*.mlp.experts': 'moe_tp_experts'}",
         EXPERTS_TP, ""},
        {"mixtral",
         "{" LLAMA_ATTENTION "," HEAD ",'layers.*.mlp.experts.gate_up_proj': 'grouped_gemm',"
         "'layers.*.mlp.experts.down_proj': 'grouped_gemm', 'layers.*.mlp.experts': 'ep_dispatch_experts'}",
         EXPERTS_EP, ""},
        {"mixtral",
         "{" LLAMA_ATTENTION "," HEAD ",'layers.*.block_sparse_moe.experts.*.w1': 'colwise',"
         "'layers.*.block_sparse_moe.experts.*.w3': 'colwise', 'layers.*.block_sparse_moe.experts.*.w2': 'rowwise'}",
         EXPERTS_TP, ""},
        {"gpt_oss",
         "{'layers.*.mlp.router': 'ep_router', 'layers.*.mlp.experts.gate_up_proj': 'grouped_gemm',"
         "'layers.*.mlp.experts.gate_up_proj_bias': 'grouped_gemm', 'layers.*.mlp.experts.down_proj': 'grouped_gemm',"
         "'layers.*.mlp.experts.down_proj_bias': 'grouped_gemm', 'layers.*.mlp.experts': 'moe_tp_experts'}",
         EXPERTS_EP, "my.json says nothing of embed_tokens, layers.*.self_attn.q_proj"},
        {"deepseek_v2",
         "{'layers.*.self_attn.q_b_proj': 'colwise', 'layers.*.self_attn.kv_a_proj_with_mqa': 'mla_kv_a_proj',"
         "'layers.*.self_attn.kv_b_proj': 'colwise', 'layers.*.self_attn.o_proj': 'rowwise', 'layers.*.mlp': "
         "'all_reduce',"
         "'layers.*.self_attn.q_proj': 'colwise', 'layers.*.mlp.experts': 'moe_identity_expert'}",
         EXPERTS_TP, "my.json says nothing of embed_tokens, "},
        {"qwen3_moe",
         "{'layers.*.mlp.gate': 'megamoe_router', 'layers.*.mlp.experts': 'megamoe_experts',"
         "'layers.*.mlp.gate_proj': 'colwise'}",
         EXPERTS_TP, "my.json says nothing of embed_tokens, layers.*.self_attn.q_proj"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        enum experts_mode experts = EXPERTS_TP;
        char said[1024];
        int rc = check(cases[i].family, cases[i].text, &experts, said, sizeof said);
        if (rc)
            fail_msg("case %zu (%s): %s", i, cases[i].family, said);
        assert_int_equal(experts, cases[i].experts);
        if (strncmp(said, cases[i].note, strlen(cases[i].note)) != 0)
            fail_msg("case %zu (%s): \"%s\" instead of \"%s\"", i, cases[i].family, said, cases[i].note);
        if (!cases[i].note[0])
            assert_string_equal(said, "");
    }
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *family, *text;
        int rc;
        const char *words;
    } cases[] = {
        {"llama2", "{'layers.*.self_attn.q_proj': 'colwize'}", ERR_USAGE,
         "my.json: no meaning is known for colwize (known: colwise, colwise_gather_output, "},
        {"llama2", "{'a': 'x', 'b': 'y', 'c': 'colwise'}", ERR_USAGE, "no meaning is known for x, y (known"},
        {"llama2", "{'layers.*.self_attn.q_proj': 3}", ERR_USAGE, "must be the name of a strategy, found"},
        {"llama2", "{'base_model_tp_plan': {'layers.*.self_attn.q_proj': 'colwise'}}", ERR_USAGE,
         "must be the name of a"},
        {"llama2", "{}", ERR_USAGE, "1 to 4096 patterns"},
        {"llama2", "['colwise']", ERR_USAGE, "my.json"},
        {"llama2", "{'': 'colwise'}", ERR_USAGE, "a pattern is 1 to"},
        {"llama2", "{'a b': 'colwise'}", ERR_USAGE, "a pattern is 1 to"},
        {"llama2", "{'layers.0.self_attn.q_proj': 'colwise'}", ERR_USAGE,
         "\"layers.0.self_attn.q_proj\" speaks of one layer or expert alone; all are cut alike"},
        {"mixtral", "{'layers.*.mlp.experts.7': 'grouped_gemm'}", ERR_USAGE, "speaks of one layer or expert alone"},
        {"llama2", "{'layers.*.self_attn.wq': 'colwise', 'layers.*.mlp.up_proj': 'colwise'}", ERR_MODEL,
         "of 2 patterns 1 name no tensor of a LlamaForCausalLM: layers.*.self_attn.wq"},
        {"llama2", "{'layers.*.self_attn.q_proj': 'rowwise'}", ERR_MODEL,
         "\"rowwise\" cannot be followed: the engine computes with model.layers.*.self_attn.q_proj.weight cut by rows"},
        {"llama2", "{'layers.*.self_attn.o_proj': 'colwise'}", ERR_MODEL, "cut by columns (rowwise)"},
        {"llama2", "{'layers.*.self_attn.q_proj': 'replicate'}", ERR_MODEL, "cannot be followed"},
        {"llama2", "{'embed_tokens': 'embedding_colwise'}", ERR_MODEL, "embed_tokens.weight cut by rows"},
        {"llama2", "{'layers.*.self_attn.q_proj': 'grouped_gemm'}", ERR_MODEL, "cannot be followed"},
        {"deepseek_v2", "{'layers.*.self_attn.kv_a_proj_with_mqa': 'colwise'}", ERR_MODEL, "cut not at all"},
        {"mixtral",
         "{'layers.*.mlp.experts.gate_up_proj': 'grouped_gemm', 'layers.*.mlp.experts.down_proj': 'rowwise'}",
         ERR_USAGE, "contradict each other"},
        {"mixtral", "{'layers.*.mlp.experts.gate_up_proj': 'rowwise'}", ERR_MODEL, "cannot be followed"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        enum experts_mode experts = EXPERTS_TP;
        char said[1024];
        int rc = check(cases[i].family, cases[i].text, &experts, said, sizeof said);
        if (rc != cases[i].rc || !strstr(said, cases[i].words))
            fail_msg("%s: %d \"%s\" does not say \"%s\"", cases[i].text, rc, said, cases[i].words);
    }
}

// ---- unknown architectures ---------------------------------------------------------------------------------------

static char dir[64];

static int make_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/test_own_plan_XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char path[128];
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unlink(path);
    return rmdir(dir);
}

// A golden's checkpoint under another name.
static const char *found_as(const char *family, const char *from, const char *to, struct error *err)
{
    static const char *known_as;
    char path[256], *text, *at;
    uint8_t *bytes;
    uint64_t num_bytes;
    snprintf(path, sizeof path, "tests/golden/families/%s/config.json", family);
    if (file_read_all(&bytes, &num_bytes, path, 1 << 20, ERR_IO, err))
        fail_msg("%s", err->msg);
    text = calloc(1, num_bytes + strlen(to) + 1);
    assert_non_null(text);
    memcpy(text, bytes, num_bytes);
    if (!(at = strstr(text, from)))
        fail_msg("%s: no %s", path, from);
    memmove(at + strlen(to), at + strlen(from), strlen(at + strlen(from)) + 1);
    memcpy(at, to, strlen(to));
    assert_int_equal(file_write_atomic(dir, "config.json", text, strlen(text), err), 0);
    free(bytes);
    free(text);
    snprintf(path, sizeof path, "tests/golden/families/%s/model.safetensors", family);
    assert_int_equal(file_read_all(&bytes, &num_bytes, path, 16 << 20, ERR_IO, err), 0);
    assert_int_equal(file_write_atomic(dir, "model.safetensors", bytes, num_bytes, err), 0);
    free(bytes);
    return own_plan_find_family(&known_as, dir, err) ? "refused" : known_as ? known_as : "its own";
}

static void test_unknown_architectures(void **state)
{
    (void)state;
    struct error err = {0};
    assert_string_equal(found_as("llama2", "LlamaForCausalLM", "LlamaForCausalLM", &err), "its own");
    assert_string_equal(found_as("llama2", "LlamaForCausalLM", "NewForCausalLM", &err), "LlamaForCausalLM");
    assert_string_equal(found_as("qwen2", "Qwen2ForCausalLM", "NewForCausalLM", &err), "Qwen2ForCausalLM");
    assert_string_equal(found_as("mistral_window", "MistralForCausalLM", "NewForCausalLM", &err), "MistralForCausalLM");
    assert_string_equal(found_as("mixtral", "MixtralForCausalLM", "NewForCausalLM", &err), "MixtralForCausalLM");
    assert_string_equal(found_as("llama2", "\"silu\"", "\"relu\"", &err), "its own"); // for hf_config to refuse
    assert_string_equal(found_as("gpt_oss", "\"GptOssForCausalLM\"", "\"X\"", &err), "GptOssForCausalLM");
    assert_string_equal(found_as("llama2", "LlamaForCausalLM\"\n  ],", "X\"], \"clip_qkv\": 8.0,", &err), "refused");
    assert_non_null(
        strstr(err.msg, "architecture \"X\" is not known, and no known one has its keys and tensors; as Llama"));
    assert_non_null(strstr(err.msg, "clip_qkv"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plans_of_transformers),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test_setup_teardown(test_unknown_architectures, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

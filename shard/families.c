// One table per family, in the words of Hugging Face's `_tp_plan`. See families.h.
#include "shard/families.h"

#include <assert.h>
#include <string.h>

// Llama's names, which Mistral, Qwen2 and Qwen3 share.
static const struct family_tensor llama_tensors[] = {
    {ROLE_EMBEDDING, "model.embed_tokens.weight", "embedding_rowwise", CUT_VOCAB, ALWAYS},
    {ROLE_ROPE_INV_FREQ, FAMILY_COMPUTED, "replicate", CUT_NONE, ALWAYS},

    {ROLE_ATTENTION_NORM, "model.layers.*.input_layernorm.weight", "replicate", CUT_NONE, ALWAYS},
    {ROLE_QKV, "model.layers.*.self_attn.q_proj.weight", "colwise", CUT_HEADS, ALWAYS},
    {ROLE_QKV, "model.layers.*.self_attn.k_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS},
    {ROLE_QKV, "model.layers.*.self_attn.v_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS},
    {ROLE_QKV_BIAS, "model.layers.*.self_attn.q_proj.bias", "colwise", CUT_HEADS, WITH_QKV_BIAS},
    {ROLE_QKV_BIAS, "model.layers.*.self_attn.k_proj.bias", "colwise", CUT_KV_HEADS, WITH_QKV_BIAS},
    {ROLE_QKV_BIAS, "model.layers.*.self_attn.v_proj.bias", "colwise", CUT_KV_HEADS, WITH_QKV_BIAS},
    {ROLE_Q_NORM, "model.layers.*.self_attn.q_norm.weight", "replicate", CUT_NONE, WITH_QK_NORM},
    {ROLE_K_NORM, "model.layers.*.self_attn.k_norm.weight", "replicate", CUT_NONE, WITH_QK_NORM},
    {ROLE_O, "model.layers.*.self_attn.o_proj.weight", "rowwise", CUT_HEADS, ALWAYS},
    {ROLE_O_BIAS, "model.layers.*.self_attn.o_proj.bias", "replicate", CUT_NONE, WITH_O_BIAS},
    {ROLE_MLP_NORM, "model.layers.*.post_attention_layernorm.weight", "replicate", CUT_NONE, ALWAYS},
    {ROLE_GATE_UP, "model.layers.*.mlp.gate_proj.weight", "colwise", CUT_MLP, ALWAYS},
    {ROLE_GATE_UP, "model.layers.*.mlp.up_proj.weight", "colwise", CUT_MLP, ALWAYS},
    {ROLE_GATE_UP_BIAS, "model.layers.*.mlp.gate_proj.bias", "colwise", CUT_MLP, WITH_MLP_BIAS},
    {ROLE_GATE_UP_BIAS, "model.layers.*.mlp.up_proj.bias", "colwise", CUT_MLP, WITH_MLP_BIAS},
    {ROLE_DOWN, "model.layers.*.mlp.down_proj.weight", "rowwise", CUT_MLP, ALWAYS},
    {ROLE_DOWN_BIAS, "model.layers.*.mlp.down_proj.bias", "replicate", CUT_NONE, WITH_MLP_BIAS},

    {ROLE_FINAL_NORM, "model.norm.weight", "replicate", CUT_NONE, ALWAYS},
    {ROLE_HEAD, "lm_head.weight", "colwise", CUT_VOCAB, WITH_OWN_HEAD},
    {0, NULL, NULL, 0, 0},
};

// clang-format off
static const struct family families[] = {
    {.architecture = "LlamaForCausalLM",   .tensors = llama_tensors, .attention_bias = true, .mlp_bias = true,
     .kv_heads_optional = true},
    {.architecture = "MistralForCausalLM", .tensors = llama_tensors, .window = WINDOW_ALL_LAYERS},
    {.architecture = "Qwen2ForCausalLM",   .tensors = llama_tensors, .qkv_bias = true, .window = WINDOW_UPPER_LAYERS},
    {.architecture = "Qwen3ForCausalLM",   .tensors = llama_tensors, .attention_bias = true, .qk_norm = true,
     .default_head_dim = 128, .window = WINDOW_UPPER_LAYERS},
};
// clang-format on

const struct family *family_find(const char *architecture)
{
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (strcmp(families[i].architecture, architecture) == 0)
            return &families[i];
    return NULL;
}

const char *family_list(void) { return "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"; }

enum split family_split(const struct family_tensor *tensor)
{
    static const struct {
        const char *strategy;
        enum split split;
    } words[] = {
        {"colwise", SPLIT_OUT},
        {"embedding_rowwise", SPLIT_OUT},
        {"rowwise", SPLIT_IN},
        {"replicate", REPLICATE},
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcmp(words[i].strategy, tensor->strategy) == 0)
            return words[i].split;
    assert(!"a family's table uses a word that has no meaning");
    return REPLICATE;
}

bool family_tensor_present(const struct family_tensor *tensor, const struct model_desc *model)
{
    switch (tensor->presence) {
    case ALWAYS:
        return true;
    case WITH_QKV_BIAS:
        return model->qkv_bias;
    case WITH_O_BIAS:
        return model->o_bias;
    case WITH_MLP_BIAS:
        return model->mlp_bias;
    case WITH_QK_NORM:
        return model->qk_norm;
    case WITH_OWN_HEAD:
        return !model->tied_embeddings;
    }
    return false;
}

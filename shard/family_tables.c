// One table of tensors per family, in the words of Hugging Face's `_tp_plan`, and what its config.json means. See families.h.
#include "shard/family_tables.h"

// clang-format off

// ---- tensors -----------------------------------------------------------------------------------------------------
// Rows that several families share. L: a tensor of a layer.

#define L "model.layers.*."
#define NORM(role, name, form) {role, L name ".weight", "replicate", CUT_NONE, ALWAYS, form}

#define FRONT \
    {ROLE_EMBEDDING, "model.embed_tokens.weight", "embedding_rowwise", CUT_VOCAB, ALWAYS, AS_IS}, \
    {ROLE_ROPE_INV_FREQ, FAMILY_COMPUTED, "replicate", CUT_NONE, ALWAYS, AS_IS}, \
    {ROLE_ROPE_LONG, FAMILY_COMPUTED, "replicate", CUT_NONE, WITH_ROPE_LONG, AS_IS}, \
    {ROLE_ROPE_LOCAL, FAMILY_COMPUTED, "replicate", CUT_NONE, WITH_ROPE_LOCAL, AS_IS}

#define BACK(norm_form) \
    {ROLE_FINAL_NORM, "model.norm.weight", "replicate", CUT_NONE, ALWAYS, norm_form}, \
    {ROLE_HEAD, "lm_head.weight", "colwise", CUT_VOCAB, WITH_OWN_HEAD, AS_IS}, \
    {0, NULL, NULL, 0, 0, 0}

#define QKV \
    {ROLE_QKV, L "self_attn.q_proj.weight", "colwise", CUT_HEADS, ALWAYS, AS_IS}, \
    {ROLE_QKV, L "self_attn.k_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS, AS_IS}, \
    {ROLE_QKV, L "self_attn.v_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS, AS_IS}, \
    {ROLE_QKV_BIAS, L "self_attn.q_proj.bias", "colwise", CUT_HEADS, WITH_QKV_BIAS, AS_IS}, \
    {ROLE_QKV_BIAS, L "self_attn.k_proj.bias", "colwise", CUT_KV_HEADS, WITH_QKV_BIAS, AS_IS}, \
    {ROLE_QKV_BIAS, L "self_attn.v_proj.bias", "colwise", CUT_KV_HEADS, WITH_QKV_BIAS, AS_IS}

#define QKV_FUSED \
    {ROLE_QKV, L "self_attn.qkv_proj.weight", "colwise", CUT_HEADS, ALWAYS, AS_IS}, \
    {ROLE_QKV, L "self_attn.qkv_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS, AS_IS}, \
    {ROLE_QKV, L "self_attn.qkv_proj.weight", "colwise", CUT_KV_HEADS, ALWAYS, AS_IS}

#define QK_NORM(form) \
    {ROLE_Q_NORM, L "self_attn.q_norm.weight", "replicate", CUT_NONE, WITH_QK_NORM, form}, \
    {ROLE_K_NORM, L "self_attn.k_norm.weight", "replicate", CUT_NONE, WITH_QK_NORM, form}

#define QK_NORM_OF_ALL_HEADS \
    {ROLE_Q_NORM, L "self_attn.q_norm.weight", "colwise", CUT_HEADS, ALWAYS, AS_IS}, \
    {ROLE_K_NORM, L "self_attn.k_norm.weight", "colwise", CUT_KV_HEADS, ALWAYS, AS_IS}

#define O \
    {ROLE_O, L "self_attn.o_proj.weight", "rowwise", CUT_HEAD_VALUES, ALWAYS, AS_IS}, \
    {ROLE_O_BIAS, L "self_attn.o_proj.bias", "replicate", CUT_NONE, WITH_O_BIAS, AS_IS}

#define LATENT \
    {ROLE_Q_A, L "self_attn.q_a_proj.weight", "replicate", CUT_NONE, WITH_QUERY_LATENT, AS_IS}, \
    {ROLE_Q_A_NORM, L "self_attn.q_a_layernorm.weight", "replicate", CUT_NONE, WITH_QUERY_LATENT, AS_IS}, \
    {ROLE_Q_B, L "self_attn.q_b_proj.weight", "colwise", CUT_HEADS, WITH_QUERY_LATENT, AS_IS}, \
    {ROLE_Q_B, L "self_attn.q_proj.weight", "colwise", CUT_HEADS, WITHOUT_QUERY_LATENT, AS_IS}, \
    {ROLE_KV_A, L "self_attn.kv_a_proj_with_mqa.weight", "replicate", CUT_NONE, ALWAYS, AS_IS}, \
    NORM(ROLE_KV_A_NORM, "self_attn.kv_a_layernorm", AS_IS), \
    {ROLE_KV_B, L "self_attn.kv_b_proj.weight", "colwise", CUT_HEAD_LATENT, ALWAYS, AS_IS}

#define MLP \
    {ROLE_GATE_UP, L "mlp.gate_proj.weight", "colwise", CUT_MLP, WITHOUT_EXPERTS, AS_IS}, \
    {ROLE_GATE_UP, L "mlp.up_proj.weight", "colwise", CUT_MLP, WITHOUT_EXPERTS, AS_IS}, \
    {ROLE_GATE_UP_BIAS, L "mlp.gate_proj.bias", "colwise", CUT_MLP, WITH_MLP_BIAS, AS_IS}, \
    {ROLE_GATE_UP_BIAS, L "mlp.up_proj.bias", "colwise", CUT_MLP, WITH_MLP_BIAS, AS_IS}, \
    {ROLE_DOWN, L "mlp.down_proj.weight", "rowwise", CUT_MLP, WITHOUT_EXPERTS, AS_IS}, \
    {ROLE_DOWN_BIAS, L "mlp.down_proj.bias", "replicate", CUT_NONE, WITH_MLP_BIAS, AS_IS}

#define MLP_FUSED \
    {ROLE_GATE_UP, L "mlp.gate_up_proj.weight", "colwise", CUT_MLP, ALWAYS, AS_IS}, \
    {ROLE_GATE_UP, L "mlp.gate_up_proj.weight", "colwise", CUT_MLP, ALWAYS, AS_IS}, \
    {ROLE_DOWN, L "mlp.down_proj.weight", "rowwise", CUT_MLP, ALWAYS, AS_IS}

#define ROUTER(name) {ROLE_ROUTER, L name ".weight", "replicate", CUT_NONE, WITH_EXPERTS, AS_IS}
#define ROUTER_CHOICE_BIAS \
    {ROLE_ROUTER_CHOICE_BIAS, L "mlp.gate.e_score_correction_bias", "replicate", CUT_NONE, WITH_EXPERTS, AS_IS}

#define EXPERTS(block, gate, up, down) \
    {ROLE_EXPERT_GATE_UP, L block ".experts.*." gate ".weight", "colwise", CUT_EXPERT, WITH_EXPERTS, AS_IS}, \
    {ROLE_EXPERT_GATE_UP, L block ".experts.*." up ".weight", "colwise", CUT_EXPERT, WITH_EXPERTS, AS_IS}, \
    {ROLE_EXPERT_DOWN, L block ".experts.*." down ".weight", "rowwise", CUT_EXPERT, WITH_EXPERTS, AS_IS}

#define SHARED_EXPERT(name) \
    {ROLE_SHARED_GATE_UP, L "mlp." name ".gate_proj.weight", "colwise", CUT_SHARED, WITH_SHARED_EXPERT, AS_IS}, \
    {ROLE_SHARED_GATE_UP, L "mlp." name ".up_proj.weight", "colwise", CUT_SHARED, WITH_SHARED_EXPERT, AS_IS}, \
    {ROLE_SHARED_DOWN, L "mlp." name ".down_proj.weight", "rowwise", CUT_SHARED, WITH_SHARED_EXPERT, AS_IS}

#define PRE_ATTENTION NORM(ROLE_ATTENTION_NORM, "input_layernorm", AS_IS)
#define PRE_MLP NORM(ROLE_MLP_NORM, "post_attention_layernorm", AS_IS)

// Llama's names, which Mistral, Qwen 2 and 3, Granite and others share.
static const struct family_tensor llama[] = {
    FRONT, PRE_ATTENTION, QKV, QK_NORM(AS_IS), O, PRE_MLP, MLP, BACK(AS_IS),
};

static const struct family_tensor gemma[] = {
    FRONT, NORM(ROLE_ATTENTION_NORM, "input_layernorm", PLUS_ONE), QKV, O,
    NORM(ROLE_MLP_NORM, "post_attention_layernorm", PLUS_ONE), MLP, BACK(PLUS_ONE),
};

static const struct family_tensor gemma2[] = { // and Gemma 3
    FRONT, NORM(ROLE_ATTENTION_NORM, "input_layernorm", PLUS_ONE), QKV, QK_NORM(PLUS_ONE), O,
    NORM(ROLE_ATTENTION_POST_NORM, "post_attention_layernorm", PLUS_ONE),
    NORM(ROLE_MLP_NORM, "pre_feedforward_layernorm", PLUS_ONE), MLP,
    NORM(ROLE_MLP_POST_NORM, "post_feedforward_layernorm", PLUS_ONE), BACK(PLUS_ONE),
};

static const struct family_tensor phi3[] = {
    FRONT, PRE_ATTENTION, QKV_FUSED, O, PRE_MLP, MLP_FUSED, BACK(AS_IS),
};

static const struct family_tensor olmo2[] = { // and OLMo 3
    FRONT, QKV, QK_NORM_OF_ALL_HEADS, O, NORM(ROLE_ATTENTION_POST_NORM, "post_attention_layernorm", AS_IS), MLP,
    NORM(ROLE_MLP_POST_NORM, "post_feedforward_layernorm", AS_IS), BACK(AS_IS),
};

static const struct family_tensor glm4[] = {
    FRONT, PRE_ATTENTION, QKV, O, NORM(ROLE_ATTENTION_POST_NORM, "post_self_attn_layernorm", AS_IS), PRE_MLP,
    MLP_FUSED, NORM(ROLE_MLP_POST_NORM, "post_mlp_layernorm", AS_IS), BACK(AS_IS),
};

static const struct family_tensor mixtral[] = {
    FRONT, PRE_ATTENTION, QKV, O, PRE_MLP, ROUTER("block_sparse_moe.gate"),
    EXPERTS("block_sparse_moe", "w1", "w3", "w2"), BACK(AS_IS),
};

static const struct family_tensor qwen_moe[] = { // Qwen 2 and 3
    FRONT, PRE_ATTENTION, QKV, QK_NORM(AS_IS), O, PRE_MLP, MLP, ROUTER("mlp.gate"),
    {ROLE_ROUTER, L "mlp.shared_expert_gate.weight", "replicate", CUT_NONE, WITH_SHARED_GATE, AS_IS},
    EXPERTS("mlp", "gate_proj", "up_proj", "down_proj"), SHARED_EXPERT("shared_expert"), BACK(AS_IS),
};

static const struct family_tensor olmoe[] = {
    FRONT, PRE_ATTENTION, QKV, QK_NORM_OF_ALL_HEADS, O, PRE_MLP, ROUTER("mlp.gate"),
    EXPERTS("mlp", "gate_proj", "up_proj", "down_proj"), BACK(AS_IS),
};

static const struct family_tensor glm4_moe[] = {
    FRONT, PRE_ATTENTION, QKV, QK_NORM(AS_IS), O, PRE_MLP, MLP, ROUTER("mlp.gate"), ROUTER_CHOICE_BIAS,
    EXPERTS("mlp", "gate_proj", "up_proj", "down_proj"), SHARED_EXPERT("shared_experts"), BACK(AS_IS),
};

static const struct family_tensor granite_moe[] = {
    FRONT, PRE_ATTENTION, QKV, O, PRE_MLP, ROUTER("block_sparse_moe.router.layer"),
    {ROLE_EXPERT_GATE_UP, L "block_sparse_moe.input_linear.weight[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, AS_IS},
    {ROLE_EXPERT_GATE_UP, L "block_sparse_moe.input_linear.weight[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, AS_IS},
    {ROLE_EXPERT_DOWN, L "block_sparse_moe.output_linear.weight[*]", "rowwise", CUT_EXPERT, WITH_EXPERTS, AS_IS},
    BACK(AS_IS),
};

static const struct family_tensor gpt_oss[] = {
    FRONT, PRE_ATTENTION, QKV,
    {ROLE_SINKS, L "self_attn.sinks", "colwise", CUT_EACH_HEAD, ALWAYS, AS_IS}, O, PRE_MLP, ROUTER("mlp.router"),
    {ROLE_ROUTER_BIAS, L "mlp.router.bias", "replicate", CUT_NONE, WITH_EXPERTS, AS_IS},
    {ROLE_EXPERT_GATE_UP, L "mlp.experts.gate_up_proj[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, TURNED_ALTERNATING},
    {ROLE_EXPERT_GATE_UP, L "mlp.experts.gate_up_proj[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, TURNED_ALTERNATING},
    {ROLE_EXPERT_GATE_UP_BIAS, L "mlp.experts.gate_up_proj_bias[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, ALTERNATING},
    {ROLE_EXPERT_GATE_UP_BIAS, L "mlp.experts.gate_up_proj_bias[*]", "colwise", CUT_EXPERT, WITH_EXPERTS, ALTERNATING},
    {ROLE_EXPERT_DOWN, L "mlp.experts.down_proj[*]", "rowwise", CUT_EXPERT, WITH_EXPERTS, TURNED},
    {ROLE_EXPERT_DOWN_BIAS, L "mlp.experts.down_proj_bias[*]", "replicate", CUT_NONE, WITH_EXPERTS, AS_IS},
    BACK(AS_IS),
};

static const struct family_tensor deepseek_v2[] = {
    FRONT, PRE_ATTENTION, LATENT, O, PRE_MLP, MLP, ROUTER("mlp.gate"),
    EXPERTS("mlp", "gate_proj", "up_proj", "down_proj"), SHARED_EXPERT("shared_experts"), BACK(AS_IS),
};

static const struct family_tensor deepseek_v3[] = {
    FRONT, PRE_ATTENTION, LATENT, O, PRE_MLP, MLP, ROUTER("mlp.gate"), ROUTER_CHOICE_BIAS,
    EXPERTS("mlp", "gate_proj", "up_proj", "down_proj"), SHARED_EXPERT("shared_experts"), BACK(AS_IS),
};

// ---- experts -----------------------------------------------------------------------------------------------------

static const struct family_experts mixtral_experts = {
    .count_key = "num_local_experts", .size_key = "intermediate_size", .normalise = NORMALISE_ALWAYS,
};
static const struct family_experts qwen2_experts = {
    .count_key = "num_experts", .size_key = "moe_intermediate_size", .layers = EXPERTS_BY_STEP,
    .normalise = NORMALISE_BY_KEY, .shared_size_key = "shared_expert_intermediate_size", .shared_gate = true,
};
static const struct family_experts qwen3_experts = {
    .count_key = "num_experts", .size_key = "moe_intermediate_size", .layers = EXPERTS_BY_STEP,
    .normalise = NORMALISE_BY_KEY,
};
static const struct family_experts olmoe_experts = {
    .count_key = "num_experts", .size_key = "intermediate_size", .normalise = NORMALISE_BY_KEY,
};
static const struct family_experts granite_experts = {
    .count_key = "num_local_experts", .size_key = "intermediate_size", .router = ROUTER_CHOSEN_SOFTMAX,
};
static const struct family_experts gpt_oss_experts = {
    .count_key = "num_local_experts", .size_key = "intermediate_size", .router = ROUTER_CHOSEN_SOFTMAX,
    .router_bias = true, .bias = true,
};
static const struct family_experts deepseek_v2_experts = {
    .count_key = "n_routed_experts", .size_key = "moe_intermediate_size", .layers = EXPERTS_BEHIND_DENSE,
    .shared_count = true, .groups = true,
};
static const struct family_experts deepseek_v3_experts = { // and GLM 4.5
    .count_key = "n_routed_experts", .size_key = "moe_intermediate_size", .layers = EXPERTS_BEHIND_DENSE,
    .router = ROUTER_SIGMOID, .normalise = NORMALISE_BY_KEY, .shared_count = true, .groups = true, .choice_bias = true,
};

// ---- families ----------------------------------------------------------------------------------------------------

#define GEMMA3 \
    .tensors = gemma2, .bias = BIAS_ALL_BY_KEY, .qk_norm = QK_NORM_HEAD, \
    .window = WINDOW_ALL_BUT_NTH, .activation = ACTIVATION_GELU_TANH, .post_norms = true, .embedding_sqrt = true, \
    .defaults = {{"num_attention_heads", 8}, {"num_key_value_heads", 4}, {"head_dim", 256}, {"vocab_size", 262208}, \
                 {"max_position_embeddings", 131072}, {"rms_norm_eps", 1e-6}, {"query_pre_attn_scalar", 256}, \
                 {"sliding_window", 4096}, {"sliding_window_pattern", 6}, {"rope_theta", 1e6}, \
                 {"rope_local_base_freq", 1e4}, {"tie_word_embeddings", 1}}

const struct family families[] = {
    {.architecture = "LlamaForCausalLM", .tensors = llama, .reads = READS_MLP_BIAS, .bias = BIAS_ALL_BY_KEY,
     .defaults = {{"num_key_value_heads", 0}}},
    {.architecture = "MistralForCausalLM", .tensors = llama, .window = WINDOW_ALL_LAYERS,
     .defaults = {{"sliding_window", 4096}}},
    {.architecture = "MinistralForCausalLM", .tensors = llama, .window = WINDOW_ALL_LAYERS,
     .defaults = {{"sliding_window", 4096}}},
    {.architecture = "Qwen2ForCausalLM", .tensors = llama, .bias = BIAS_QKV, .window = WINDOW_UPPER_LAYERS,
     .defaults = {{"sliding_window", 4096}, {"max_window_layers", 28}}},
    {.architecture = "Qwen3ForCausalLM", .tensors = llama, .bias = BIAS_ALL_BY_KEY, .qk_norm = QK_NORM_HEAD,
     .window = WINDOW_UPPER_LAYERS,
     .defaults = {{"head_dim", 128}, {"sliding_window", 4096}, {"max_window_layers", 28}}},
    {.architecture = "SmolLM3ForCausalLM", .tensors = llama, .reads = READS_MLP_BIAS | READS_NO_ROPE,
     .bias = BIAS_ALL_BY_KEY, .window = WINDOW_SWITCHED,
     .defaults = {{"rope_theta", 2e6}, {"tie_word_embeddings", 1}, {"no_rope_layer_interval", 4}}},
    {.architecture = "GraniteForCausalLM", .tensors = llama, .reads = READS_MULTIPLIERS | READS_MLP_BIAS,
     .bias = BIAS_ALL_BY_KEY, .defaults = {{"num_key_value_heads", 0}}},
    {.architecture = "GemmaForCausalLM", .tensors = gemma, .bias = BIAS_ALL_BY_KEY, .activation = ACTIVATION_GELU_TANH,
     .embedding_sqrt = true, .defaults = {{"head_dim", 256}, {"tie_word_embeddings", 1}}},
    {.architecture = "Gemma2ForCausalLM", .tensors = gemma2, .reads = READS_SOFTCAPS | READS_ATTENTION_CAP, .bias = BIAS_ALL_BY_KEY,
     .window = WINDOW_EVEN_LAYERS, .activation = ACTIVATION_GELU_TANH, .post_norms = true, .embedding_sqrt = true,
     .defaults = {{"head_dim", 256}, {"query_pre_attn_scalar", 256}, {"sliding_window", 4096},
                  {"attn_logit_softcapping", 50}, {"final_logit_softcapping", 30}, {"tie_word_embeddings", 1}}},
    {.architecture = "Gemma3ForCausalLM", GEMMA3, .reads = READS_SOFTCAPS | READS_LOCAL_ROPE},
    {.architecture = "Gemma3ForConditionalGeneration", GEMMA3, .reads = READS_SOFTCAPS | READS_LOCAL_ROPE | READS_TEXT_CONFIG,
     .prefix = "language_model.", .ignored = {"vision_tower.", "multi_modal_projector."}},
    {.architecture = "Phi3ForCausalLM", .tensors = phi3, .window = WINDOW_ALL_LAYERS, .longrope_only = true,
     .defaults = {{"num_key_value_heads", 0}}},
    {.architecture = "Olmo2ForCausalLM", .tensors = olmo2, .bias = BIAS_ALL_BY_KEY, .qk_norm = QK_NORM_FULL,
     .post_norms = true, .no_pre_norms = true, .defaults = {{"num_key_value_heads", 0}}},
    {.architecture = "Olmo3ForCausalLM", .tensors = olmo2, .reads = READS_LOCAL_ROPE, .bias = BIAS_ALL_BY_KEY,
     .qk_norm = QK_NORM_FULL, .window = WINDOW_ALL_BUT_NTH, .post_norms = true, .no_pre_norms = true,
     .defaults = {{"num_key_value_heads", 0}, {"sliding_window", 4096}, {"sliding_window_pattern", 4},
                  {"rope_theta", 5e5}}},
    {.architecture = "Glm4ForCausalLM", .tensors = glm4, .bias = BIAS_QKV_BY_KEY, .post_norms = true,
     .rotary_interleaved = true,
     .defaults = {{"head_dim", 128}, {"partial_rotary_factor", 0.5}, {"attention_bias", 1}}},
    {.architecture = "MixtralForCausalLM", .tensors = mixtral, .reads = READS_EXPERTS, .window = WINDOW_ALL_LAYERS,
     .experts = &mixtral_experts, .defaults = {{"rope_theta", 1e6}, {"num_experts_per_tok", 2}}},
    {.architecture = "Qwen2MoeForCausalLM", .tensors = qwen_moe, .reads = READS_EXPERTS, .bias = BIAS_QKV_BY_KEY,
     .window = WINDOW_LOWER_EVEN, .experts = &qwen2_experts,
     .defaults = {{"qkv_bias", 1}, {"sliding_window", 4096}, {"max_window_layers", 28}, {"decoder_sparse_step", 1}}},
    {.architecture = "Qwen3MoeForCausalLM", .tensors = qwen_moe, .reads = READS_EXPERTS, .bias = BIAS_ALL_BY_KEY,
     .qk_norm = QK_NORM_HEAD, .window = WINDOW_SWITCHED, .experts = &qwen3_experts,
     .defaults = {{"sliding_window", 4096}, {"decoder_sparse_step", 1}}},
    {.architecture = "OlmoeForCausalLM", .tensors = olmoe, .reads = READS_EXPERTS, .bias = BIAS_ALL_BY_KEY,
     .qk_norm = QK_NORM_FULL, .experts = &olmoe_experts,
     .defaults = {{"num_key_value_heads", 0}, {"num_experts_per_tok", 8}}},
    {.architecture = "GraniteMoeForCausalLM", .tensors = granite_moe, .reads = READS_MULTIPLIERS | READS_EXPERTS,
     .bias = BIAS_ALL_BY_KEY, .experts = &granite_experts,
     .defaults = {{"num_key_value_heads", 0}, {"num_experts_per_tok", 2}}},
    {.architecture = "GptOssForCausalLM", .tensors = gpt_oss, .reads = READS_EXPERTS, .bias = BIAS_ALL_BY_KEY,
     .window = WINDOW_EVEN_LAYERS, .activation = ACTIVATION_GPT_OSS, .experts = &gpt_oss_experts,
     .defaults = {{"attention_bias", 1}, {"head_dim", 64}, {"sliding_window", 128}, {"rope_theta", 150000}}},
    {.architecture = "Glm4MoeForCausalLM", .tensors = glm4_moe, .further_layers_ignored = true, .reads = READS_EXPERTS,
     .bias = BIAS_QKV_BY_KEY, .qk_norm = QK_NORM_HEAD, .qk_norm_by_key = true, .experts = &deepseek_v3_experts,
     .defaults = {{"head_dim", 128}, {"partial_rotary_factor", 0.5}, {"first_k_dense_replace", 1},
                  {"n_group", 1}, {"topk_group", 1}, {"norm_topk_prob", 1}, {"routed_scaling_factor", 1}}},
    {.architecture = "DeepseekV2ForCausalLM", .tensors = deepseek_v2, .reads = READS_EXPERTS | READS_LATENT,
     .rotary_interleaved = true, .experts = &deepseek_v2_experts,
     .defaults = {{"num_key_value_heads", 0}, {"routed_scaling_factor", 1}, {"first_k_dense_replace", 0}}},
    {.architecture = "DeepseekV3ForCausalLM", .tensors = deepseek_v3, .further_layers_ignored = true,
     .reads = READS_EXPERTS | READS_LATENT, .rotary_interleaved = true, .experts = &deepseek_v3_experts,
     .defaults = {{"num_key_value_heads", 0}, {"routed_scaling_factor", 2.5}, {"first_k_dense_replace", 3},
                  {"n_group", 8}, {"topk_group", 4}, {"norm_topk_prob", 1}}},
};
// clang-format on

const int family_count = sizeof families / sizeof families[0];

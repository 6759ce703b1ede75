// The model description: everything the engine needs to know about a model, free of architecture names.
// tpshard fills it from config.json, the manifest carries it, the engine's one decoder is driven by it.
#ifndef TPSHARD_FORMATS_MODEL_DESC_H
#define TPSHARD_FORMATS_MODEL_DESC_H

#include <stdbool.h>
#include <stdint.h>

enum { MODEL_MAX_EOS = 8, MODEL_NAME_BYTES = 64, MODEL_MAX_LAYERS = 512 };

// Limits that the engine's buffers rest on, on every backend.
enum {
    MODEL_MAX_HEAD_DIM = 256,        // of plain attention
    MODEL_MAX_LATENT_HEAD_DIM = 320, // of latent attention: of keys, and of values
    MODEL_MAX_LATENT_KEY_DIM = 640,  // of latent attention: kv_rank + rope_dim, a row of the cache
    MODEL_MAX_EXPERTS = 1024,
    MODEL_MAX_EXPERTS_PER_TOKEN = 32,
    MODEL_MAX_ROTATION = 128, // columns of a block
};

// What layers differ in, one set of bits for each.
enum layer_flags {
    LAYER_WINDOW = 1,     // attention looks back over sliding_window positions only
    LAYER_EXPERTS = 2,    // its mlp is a mixture of experts
    LAYER_LOCAL_ROPE = 4, // rotates by the second table (Gemma 3's sliding layers)
    LAYER_NO_ROPE = 8,    // does not rotate (SmolLM 3)
};

enum qk_norm {
    QK_NORM_NONE,
    QK_NORM_HEAD, // RMSNorm over each head of q and k, before rotation; weights [head_dim]
    QK_NORM_FULL, // RMSNorm over all heads of q together, and of k (OLMo 2); weights [heads * head_dim]
};

enum activation {
    ACTIVATION_SILU,      // silu(gate) * up
    ACTIVATION_GELU_TANH, // gelu(gate), tanh form, * up
    ACTIVATION_GPT_OSS,   // g = min(gate, 7), u = clamp(up, -7, 7): (u + 1) * g * sigmoid(1.702 g)
};

// How a router's logits become the weights of the chosen experts.
enum router {
    ROUTER_SOFTMAX,        // softmax over all experts, the k largest (Mixtral, Qwen, DeepSeek V2)
    ROUTER_CHOSEN_SOFTMAX, // the k largest logits, softmax over these (gpt-oss)
    ROUTER_SIGMOID,        // sigmoid of each, the k largest (DeepSeek V3)
};

struct experts_desc {
    int64_t num_experts;       // at most MODEL_MAX_EXPERTS; 0: the model has none
    int64_t experts_per_token; // at most MODEL_MAX_EXPERTS_PER_TOKEN
    int64_t expert_size;       // intermediate size of one expert
    int64_t shared_size;       // intermediate size of the expert that every token takes; 0: none
    bool shared_gate;          // its output is multiplied by sigmoid of one more row of the router (Qwen2-MoE)
    enum router router;
    bool normalise; // the chosen weights are divided by their sum
    double scale;   // then multiplied by this
    // Experts stand in this many groups of equal size; only the best groups_per_token count. 1: no groups.
    int64_t num_groups;
    int64_t groups_per_token;
    int64_t group_members; // a group is rated by the sum of its so many best experts: 1 (DeepSeek V2) or 2 (V3)
    bool router_bias;      // added to the logits (gpt-oss)
    bool choice_bias;      // added to the scores for the choice alone, not for the weights (DeepSeek V3)
    bool bias;             // experts have biases (gpt-oss)
};

// Multi-head latent attention (DeepSeek): keys and values of all heads are products of one latent row, which is what the cache holds.
// head_dim is nope_dim + rope_dim, num_kv_heads is num_heads.
struct latent_desc {
    int64_t kv_rank; // columns of the latent; 0: plain attention
    int64_t q_rank;  // columns of the queries' latent; 0: queries come from the hidden row directly
    int64_t nope_dim, rope_dim, v_dim;
    double norm_eps; // RMSNorm of both latents; 0: norm_eps of the model
};

struct model_desc {
    char architecture[MODEL_NAME_BYTES]; // for people and provenance only; the engine never reads it
    int64_t num_layers;                  // at most MODEL_MAX_LAYERS
    uint8_t layer_flags[MODEL_MAX_LAYERS];
    int64_t hidden_size;
    int64_t intermediate_size; // of layers without experts
    int64_t num_heads;         // query heads, whole model
    int64_t num_kv_heads;      // whole model; divides num_heads
    int64_t head_dim;          // even
    int64_t vocab_size;        // rows of the embedding, before padding
    int64_t context;           // longest sequence the model was made for, tokens
    double norm_eps;           // RMSNorm

    bool pre_norms;  // RMSNorm in front of attention and mlp (all but OLMo 2)
    bool post_norms; // RMSNorm of what attention and mlp put out, before the residual takes it (Gemma 2, OLMo 2)
    // Factors of embedding rows, of what a block adds to the residual, of logits; 1 for most.
    double embedding_scale, residual_scale, logit_scale;

    double attention_scale;                  // of q.k; 1 / sqrt(head_dim) for most
    double attention_softcap, logit_softcap; // x -> cap * tanh(x / cap); 0: none
    int64_t sliding_window;                  // tokens a query of a LAYER_WINDOW layer may look back at, itself included
    bool sinks; // a learned logit per head that takes part in the softmax and carries no value (gpt-oss)
    enum qk_norm qk_norm;
    bool qkv_bias, o_bias, mlp_bias;
    struct latent_desc latent;

    // Leading columns of a head that rotate; even; head_dim for most, latent.rope_dim with latent attention.
    int64_t rotary_dim;
    bool rotary_interleaved;      // pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
    double rope_attention_factor; // multiplies cosines and sines (1 for most)
    // longrope: engines started for longer sequences take ROLE_ROPE_LONG. 0: there is one table.
    int64_t rope_original_context;

    enum activation activation;
    // What the activation of gate and up has made is rotated by a Hadamard matrix over each so many columns before down takes it
    // (kernels/kernels.h), in experts too; a power of two that divides every share. 0: it is not.
    int64_t mlp_rotation;
    struct experts_desc experts;

    bool tied_embeddings; // the head is the embedding: one stored tensor serves both
    int64_t bos_token_id; // -1: none
    int64_t eos_token_ids[MODEL_MAX_EOS];
    int num_eos;
    // Sampling defaults of generation_config.json; NaN or -1 where the file says nothing.
    double default_temperature, default_top_p, default_repetition_penalty;
    int64_t default_top_k;
};

static inline double model_latent_norm_eps(const struct model_desc *model)
{
    return model->latent.norm_eps > 0 ? model->latent.norm_eps : model->norm_eps;
}

// How a dimension of `units` whole units is dealt out: rank r of tp_size owns [partition_begin(r),
// partition_begin(r+1)). Uneven splits and empty shares are legal.
static inline int64_t partition_begin(int64_t units, int64_t rank, int64_t tp_size) { return units * rank / tp_size; }

// One rank's share of attention, mlp and vocabulary. Everything follows from the description, tp_size and the unit that
// keeps quantization groups whole (plan_attention_unit_heads, plan_mlp_unit in shard/plan.h); it is written into the rank file,
// so that the engine reads it and computes nothing.
struct rank_share {
    int64_t head_begin, num_heads_local;       // query heads [head_begin, head_begin + num_heads_local)
    int64_t kv_head_begin, num_kv_heads_local; // the kv heads these need; a head that several ranks need is replicated
    int64_t mlp_begin, intermediate_local;     // rows of gate/up, columns of down, in layers without experts
    int64_t vocab_begin, vocab_local;          // rows of embedding and head that exist (no padding)
    int64_t expert_begin, num_experts_local;   // whole experts (--experts ep), or all of them
    int64_t expert_mlp_begin, expert_size_local; // of each expert here (--experts tp), or all of it
    int64_t shared_begin, shared_size_local;     // of the shared expert
};

#endif

// The model families that tpshard knows: which tensors a checkpoint holds, what each is for, how it is cut, and which keys of
// config.json the family's arithmetic reads. Owns the names of architectures and of their tensors; nothing behind it (plan,
// manifest, engine) knows them. How to add one: families.md.
#ifndef TPSHARD_SHARD_FAMILIES_H
#define TPSHARD_SHARD_FAMILIES_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "formats/shard_file.h"

// ---- tensors -----------------------------------------------------------------------------------------------------

// The words of Hugging Face's `_tp_plan` and what they mean for a matrix [out, in] as it is stored:
//   colwise            SPLIT_OUT  each rank holds some rows; outputs are its own
//   embedding_rowwise  SPLIT_OUT  the same, rows being tokens
//   rowwise            SPLIT_IN   each rank holds some columns; outputs are summed over the ranks
//   replicate          REPLICATE  every rank holds all of it
enum split { SPLIT_OUT, SPLIT_IN, REPLICATE };

// What the cut dimension counts.
enum cut {
    CUT_NONE,
    CUT_HEADS,       // query heads, head_dim each
    CUT_KV_HEADS,    // kv heads, head_dim each
    CUT_HEAD_VALUES, // query heads, as many columns each as their values have
    CUT_HEAD_LATENT, // query heads, rows of keys and of values that come from the latent
    CUT_EACH_HEAD,   // query heads, one element each
    CUT_MLP,
    CUT_EXPERT, // inside each expert, or by whole experts: as the plan's experts mode says
    CUT_SHARED, // of the expert that every token takes
    CUT_VOCAB,
};

// When a tensor exists: always, or as the model description says of the model or of the layer.
enum presence {
    ALWAYS,
    WITH_QKV_BIAS,
    WITH_O_BIAS,
    WITH_MLP_BIAS,
    WITH_QK_NORM,
    WITH_OWN_HEAD,
    WITH_ROPE_LONG,
    WITH_ROPE_LOCAL,
    WITH_EXPERTS,    // in layers with experts
    WITHOUT_EXPERTS, // in layers without
    WITH_SHARED_EXPERT,
    WITH_SHARED_GATE,
    WITH_QUERY_LATENT,
    WITHOUT_QUERY_LATENT,
};

// How the matrix of weights stands in the source tensor.
enum source_form {
    AS_IS,
    PLUS_ONE,           // weights are 1 + what is written (norms of Gemma)
    ALTERNATING,        // rows (elements of a vector) of two halves alternate: gate, up, gate, up, ...
    TURNED,             // [in, out]
    TURNED_ALTERNATING, // [in, out], columns of two halves alternate
};

// One source tensor. Consecutive entries of one role are fused into one stored tensor, one after the other. Consecutive
// entries of one role and source are ranges of rows of it, one behind the other (fused q, k, v; gate and up).
// In the source '*' stands for the layer number, a second '*' for the number of the expert; "[*]" at the end: the
// tensor is a stack, [experts, ...], and the number an index into it.
struct family_tensor {
    enum tensor_role role;
    const char *source;
    const char *strategy;
    enum cut cut;
    enum presence presence;
    enum source_form form;
};

// In the place of a source: the tensor is computed, no checkpoint tensor is read.
#define FAMILY_COMPUTED ""

// ---- config.json -------------------------------------------------------------------------------------------------

// Which layers look back only over a window, where no layer_types says it.
enum window_rule {
    WINDOW_NEVER,
    WINDOW_ALL_LAYERS,   // sliding_window is a number
    WINDOW_UPPER_LAYERS, // use_sliding_window switches it on for layers from max_window_layers up
    WINDOW_LOWER_EVEN,   // use_sliding_window: layers 0, 2, ... below max_window_layers
    WINDOW_SWITCHED,     // use_sliding_window: all layers
    WINDOW_EVEN_LAYERS,  // layers 0, 2, ...
    WINDOW_ALL_BUT_NTH,  // all but every sliding_window_pattern-th
};

// Which projections of attention have biases.
enum bias_rule {
    BIAS_NEVER,
    BIAS_QKV,        // q, k, v
    BIAS_QKV_BY_KEY, // q, k, v if attention_bias or qkv_bias says so
    BIAS_ALL_BY_KEY, // q, k, v and o if attention_bias says so
};

// Keys that change the arithmetic and that only some families read.
enum reads {
    READS_SOFTCAPS = 1,    // final_logit_softcapping, query_pre_attn_scalar
    READS_MULTIPLIERS = 2, // embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling
    READS_EXPERTS = 4,
    READS_LATENT = 8,      // kv_lora_rank and its like
    READS_NO_ROPE = 16,    // no_rope_layers
    READS_LOCAL_ROPE = 32, // layers with a window rotate by a table of their own
    READS_MLP_BIAS = 64,
    READS_TEXT_CONFIG = 128,   // the model is the text_config of a larger one
    READS_ATTENTION_CAP = 256, // attn_logit_softcapping
};

enum expert_layers {
    EXPERTS_EVERYWHERE,
    EXPERTS_BY_STEP,
    EXPERTS_BEHIND_DENSE
};                                                                      // decoder_sparse_step; first_k_dense_replace
enum normalise { NORMALISE_NEVER, NORMALISE_ALWAYS, NORMALISE_BY_KEY }; // norm_topk_prob

struct family_experts {
    const char *count_key, *size_key;
    enum expert_layers layers;
    enum router router;
    enum normalise normalise;
    const char *shared_size_key; // of the shared expert; NULL: none, or n_shared_experts times the size of one
    bool shared_count, shared_gate, groups, router_bias, choice_bias, bias;
};

// The value that the family's configuration class gives to a key that the file does not hold.
struct family_default {
    const char *key;
    double value;
};
enum { FAMILY_MAX_DEFAULTS = 12 };

struct family {
    const char *architecture;            // config.json's architectures[0]
    const struct family_tensor *tensors; // in order of first use; ends with a NULL source
    const char *prefix;                  // of the source names; NULL: none
    const char *ignored[4];              // beginnings of names that are no part of the model (towers for images)
    bool further_layers_ignored;         // layers behind the last one (predictors of more tokens)
    unsigned reads;                      // enum reads
    enum bias_rule bias;
    enum qk_norm qk_norm;
    bool qk_norm_by_key; // if use_qk_norm says so
    enum window_rule window;
    enum activation activation; // SILU and GELU_TANH must be what config.json says
    bool post_norms, no_pre_norms;
    bool embedding_sqrt;     // embedding rows are multiplied by sqrt(hidden_size)
    bool rotary_interleaved; // DeepSeek V3 and its like say so with rope_interleave, which wins
    bool longrope_only;      // whatever scaling is named su or yarn is longrope (Phi-3)
    const struct family_experts *experts;
    struct family_default defaults[FAMILY_MAX_DEFAULTS];
};

// NULL for an unknown architecture. Static storage.
const struct family *family_find(const char *architecture);
// "LlamaForCausalLM, MistralForCausalLM, ...", for messages. Static storage.
const char *family_list(void);
// Whether the family's configuration class has a value for a missing key.
bool family_default(const struct family *family, const char *key, double *value);

enum split family_split(const struct family_tensor *tensor);
// layer -1: outside the layers.
bool family_tensor_present(const struct family_tensor *tensor, const struct model_desc *model, int32_t layer);
// A tensor of the checkpoint that no table names and that changes nothing.
bool family_ignores(const struct family *family, const struct model_desc *model, const char *name);

#endif

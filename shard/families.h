// The model families that tpshard knows: which tensors a checkpoint holds, what each is for, and how it is cut.
// Owns the names of architectures and of their tensors; nothing behind it (plan, manifest, engine) knows them.
#ifndef TPSHARD_SHARD_FAMILIES_H
#define TPSHARD_SHARD_FAMILIES_H

#include "formats/error.h"
#include "formats/model_desc.h"
#include "formats/shard_file.h"

// The words of Hugging Face's `_tp_plan` and what they mean for a matrix [out, in] as it is stored:
//   colwise            SPLIT_OUT  each rank holds some rows; outputs are its own
//   embedding_rowwise  SPLIT_OUT  the same, rows being tokens
//   rowwise            SPLIT_IN   each rank holds some columns; outputs are summed over the ranks
//   replicate          REPLICATE  every rank holds all of it
enum split { SPLIT_OUT, SPLIT_IN, REPLICATE };

// What the cut dimension counts.
enum cut { CUT_NONE, CUT_HEADS, CUT_KV_HEADS, CUT_MLP, CUT_VOCAB };

// When a tensor exists: always, or as the model description says.
enum presence { ALWAYS, WITH_QKV_BIAS, WITH_O_BIAS, WITH_MLP_BIAS, WITH_QK_NORM, WITH_OWN_HEAD };

// One source tensor. Consecutive entries of one role are fused into one stored tensor, one after the other.
struct family_tensor {
    enum tensor_role role;
    const char *source; // '*' stands for the layer number
    const char *strategy;
    enum cut cut;
    enum presence presence;
};

// How a family's config says which layers look back only over a window.
enum window_rule {
    WINDOW_NEVER,
    WINDOW_ALL_LAYERS,   // sliding_window, a number or null; 4096 where the key is missing
    WINDOW_UPPER_LAYERS, // use_sliding_window switches it on for layers from max_window_layers up
};

struct family {
    const char *architecture;            // config.json's architectures[0]
    const struct family_tensor *tensors; // in order of first use; ends with a NULL source
    bool qkv_bias;                       // always has biases on q, k, v (and none on o)
    bool attention_bias;                 // reads attention_bias: biases on q, k, v and o
    bool mlp_bias;                       // reads mlp_bias
    bool qk_norm;
    bool kv_heads_optional;   // a missing num_key_value_heads means num_attention_heads
    int64_t default_head_dim; // where the config has none; 0: hidden_size / num_attention_heads
    enum window_rule window;
};

// NULL for an unknown architecture. Static storage.
const struct family *family_find(const char *architecture);
// "LlamaForCausalLM, MistralForCausalLM, ...", for messages. Static storage.
const char *family_list(void);

enum split family_split(const struct family_tensor *tensor);
bool family_tensor_present(const struct family_tensor *tensor, const struct model_desc *model);

// In the place of a source: the tensor is computed, no checkpoint tensor is read.
#define FAMILY_COMPUTED ""

#endif

// The model description: everything the engine needs to know about a model, free of architecture names.
// tpshard fills it from config.json, the manifest carries it, the engine's one decoder is driven by it.
#ifndef TPSHARD_FORMATS_MODEL_DESC_H
#define TPSHARD_FORMATS_MODEL_DESC_H

#include <stdbool.h>
#include <stdint.h>

enum { MODEL_MAX_EOS = 8, MODEL_NAME_BYTES = 64 };

struct model_desc {
    char architecture[MODEL_NAME_BYTES]; // for people and provenance only; the engine never reads it
    int64_t num_layers;
    int64_t hidden_size;
    int64_t intermediate_size;
    int64_t num_heads;            // query heads, whole model
    int64_t num_kv_heads;         // whole model; divides num_heads
    int64_t head_dim;             // even
    int64_t vocab_size;           // rows of the embedding, before padding
    int64_t context;              // longest sequence the model was made for, tokens
    double norm_eps;              // RMSNorm
    double rope_attention_factor; // multiplies q.k of rotated halves on both sides (1 for most)
    int64_t sliding_window;       // tokens a query may look back at, itself included; 0: all
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm;         // RMSNorm over head_dim on q and k before rope
    bool tied_embeddings; // the head is the embedding: one stored tensor serves both
    int64_t bos_token_id; // -1: none
    int64_t eos_token_ids[MODEL_MAX_EOS];
    int num_eos;
    // Sampling defaults of generation_config.json; NaN or -1 where the file says nothing.
    double default_temperature, default_top_p, default_repetition_penalty;
    int64_t default_top_k;
};

// How a dimension of `units` whole units is dealt out: rank r of tp_size owns [partition_begin(r),
// partition_begin(r+1)). Uneven splits and empty shares are legal.
static inline int64_t partition_begin(int64_t units, int64_t rank, int64_t tp_size) { return units * rank / tp_size; }

// One rank's share of attention, mlp and vocabulary. Everything follows from the description, tp_size and the unit that
// keeps quantization groups whole (plan_attention_unit_heads, plan_mlp_unit in shard/plan.h); it is written into the rank file,
// so that the engine reads it and computes nothing.
struct rank_share {
    int64_t head_begin, num_heads_local;       // query heads [head_begin, head_begin + num_heads_local)
    int64_t kv_head_begin, num_kv_heads_local; // the kv heads these need; a head that several ranks need is replicated
    int64_t mlp_begin, intermediate_local;     // rows of gate/up, columns of down
    int64_t vocab_begin, vocab_local;          // rows of embedding and head that exist (no padding)
};

#endif

#!/usr/bin/env python3
"""Tiny random checkpoints of every supported family, and the logits that `transformers` computes from them.

Needs (in a virtual environment): torch, transformers 5, safetensors, numpy.
Usage: scripts/make_goldens_families.py [tests/golden/families [case ...]]

For each case: a directory as it is on the Hub (config.json; model.safetensors in bfloat16 with the names and shapes that the family's
checkpoints have there) and golden.json + logits.npy (float32 [tokens, vocab_size]), computed in float32 from that very directory.
logits_bf16_cache.npy holds every fourth row of the same with keys and values (DeepSeek: the latent) rounded to bfloat16 on their way into
attention, which is the only rounding that our engine makes on one rank: from it, what is left is float32 noise.
Seeds are fixed. What keeps a golden honest is checked here while it is made:
- each feature matters: without it (another config value, a neutral norm, bias or sink) the logits move by more than 3 % of their rms,
  which is more than the tests' bound;
- no choice of experts or groups is near a tie, where bfloat16 rounding elsewhere would flip it: between the last that is chosen and the
  first that is not lie at least 4 % of the spread of the scores (routers are trained towards that for a moment);
- names and shapes of a few tensors are as the table says, which was written from checkpoints on the Hub.
"""
import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TOKENS = 48
CACHED_EVERY = 4

COMMON = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=160, max_position_embeddings=256, rms_norm_eps=1e-5, attention_dropout=0.0,
              bos_token_id=0, eos_token_id=1, pad_token_id=None)


def rope(theta, **scaling):
    """The same setting in the words of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return dict(rope_parameters=dict(rope_theta=theta, **(scaling or {"rope_type": "default"})))
    return dict(rope_theta=theta, rope_scaling=scaling or None)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)

CASES = {
    "llama2": LlamaConfig(**{**COMMON, "num_key_value_heads": 4}, tie_word_embeddings=False, **rope(10000.0)),
    "llama3": LlamaConfig(**COMMON, tie_word_embeddings=False, **rope(500000.0)),
    "llama31": LlamaConfig(**COMMON, tie_word_embeddings=False, **rope(500000.0, **LLAMA3)),
    "llama32_tied": LlamaConfig(**COMMON, head_dim=32, tie_word_embeddings=True, **rope(500000.0, **LLAMA3)),
    "llama_linear_rope": LlamaConfig(**COMMON, tie_word_embeddings=False, **rope(10000.0, rope_type="linear", factor=4.0)),
    "llama_biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, **rope(10000.0)),
    "llama_odd": LlamaConfig(**{**COMMON, "hidden_size": 84, "intermediate_size": 100, "num_attention_heads": 6, "num_key_value_heads": 3,
                                "vocab_size": 131}, head_dim=10, tie_word_embeddings=False, **rope(10000.0)),
    "mistral": MistralConfig(**COMMON, head_dim=24, sliding_window=None, tie_word_embeddings=False, **rope(1000000.0)),
    "mistral_window": MistralConfig(**COMMON, sliding_window=16, tie_word_embeddings=False, **rope(10000.0)),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=False, tie_word_embeddings=True, **rope(1000000.0)),
    "qwen3": Qwen3Config(**COMMON, head_dim=32, attention_bias=False, use_sliding_window=False, tie_word_embeddings=False,
                         **rope(1000000.0)),
    "qwen3_one_kv": Qwen3Config(**{**COMMON, "num_key_value_heads": 1}, head_dim=16, use_sliding_window=False, tie_word_embeddings=True,
                                **rope(1000000.0)),
}



SMALL = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
             max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1, pad_token_id=None, tie_word_embeddings=True, hidden_act="silu")


OMIT = object()


def hub(model_type, architecture, layout, matters=(), context=None, scale=None, extra=None, **fields):
    """A case: fields of config.json as written on the Hub, what must matter, factors of random weights by pattern, tensors {name: shape}
    that the file must have (None: must not), further tensors that the file has and a reader must leave alone, and the context that an
    engine is to be started for where the weights depend on it."""
    config = fields if "text_config" in fields else {key: value for key, value in {**SMALL, **fields}.items() if value is not OMIT}
    return dict(config={"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **config}, layout=layout,
                matters=list(matters), context=context, scale=scale or {}, extra=extra or {})


def yarn(factor, original, **more):
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}


def layer(names, number=0):
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in names.items()}


def experts(prefix, number, names=("gate_proj", "up_proj", "down_proj"), count=8, size=24, hidden=48):
    """Names and shapes of an expert in each tensor of its own, the last one; and that there is no further one."""
    shapes = ([size, hidden], [size, hidden], [hidden, size])
    return {**layer({f"{prefix}.{count - 1}.{name}": shape for name, shape in zip(names, shapes)}, number),
            **layer({f"{prefix}.{count}.{names[0]}": None}, number)}


LONGROPE = dict(original_max_position_embeddings=32, max_position_embeddings=128, rope_theta=10000.0,
                rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.5, 2.0, 2.5], long_factor=[1.2, 2.0, 3.0, 6.0, 10.0, 16.0]))
SCALED_FACTORS = dict(type="longrope", short_factor=[1.5, 1.0, 1.0, 1.0, 1.0, 1.0], long_factor=[2.5, 1.0, 1.0, 1.0, 1.0, 1.0])

GEMMA_NAMES = {"pre_feedforward_layernorm": [56], "post_feedforward_layernorm": [56], "post_attention_layernorm": [56]}
LATENT = dict(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, num_key_value_heads=4, moe_intermediate_size=24,
              n_routed_experts=8, max_position_embeddings=1024, rope_theta=10000.0, tie_word_embeddings=False)
LATENT_NAMES = {"self_attn.kv_a_proj_with_mqa": [32, 48], "self_attn.kv_a_layernorm": [24], "self_attn.kv_b_proj": [4 * 28, 24],
                "self_attn.o_proj": [48, 4 * 12]}

HUB_CASES = {
    "llama_yarn": hub("llama", "LlamaForCausalLM", layer({"self_attn.k_proj": [24, 48]}), max_position_embeddings=1024,
                      rope_theta=10000.0, rope_scaling=yarn(4.0, 256, beta_fast=8.0),
                      matters=[dict(rope_scaling=None), dict(rope_scaling=yarn(4.0, 256, attention_factor=1.0, beta_fast=8.0)),
                               dict(rope_scaling=dict(type="linear", factor=4.0))],
                      extra={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
    "qwen2_mixed_window": hub("qwen2", "Qwen2ForCausalLM", {"model.layers.0.self_attn.q_proj.bias": [48]}, num_hidden_layers=3,
                              use_sliding_window=True, sliding_window=16, max_window_layers=2, rope_theta=1000000.0,
                              matters=[dict(use_sliding_window=False), dict(max_window_layers=1), dict(sliding_window=17)]),
    "gemma": hub("gemma", "GemmaForCausalLM", layer({"post_attention_layernorm": [56]}), hidden_size=56, hidden_act="gelu", head_dim=24,
                 num_key_value_heads=1, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=OMIT,
                 matters=[dict(hidden_act="silu")], rms_norm_eps=1e-6),
    "gemma2": hub("gemma2", "Gemma2ForCausalLM", layer(GEMMA_NAMES), hidden_size=56, head_dim=20, hidden_act="gelu_pytorch_tanh",
                  hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=32, sliding_window=16, attn_logit_softcapping=2.0,
                  final_logit_softcapping=1.5, tie_word_embeddings=OMIT, rope_theta=10000.0,
                  matters=[dict(attn_logit_softcapping=1e9), dict(final_logit_softcapping=1e9), dict(query_pre_attn_scalar=20),
                           dict(sliding_window=17), dict(sliding_window=200), dict(layer_types=["full_attention", "sliding_attention"])]),
    "gemma3": hub("gemma3_text", "Gemma3ForCausalLM", layer({**GEMMA_NAMES, "self_attn.q_norm": [20]}), hidden_size=56, head_dim=20,
                  num_hidden_layers=6, intermediate_size=40, hidden_act=OMIT, hidden_activation="gelu_pytorch_tanh",
                  query_pre_attn_scalar=4, sliding_window=16, sliding_window_pattern=6, rope_theta=100000.0, rope_local_base_freq=100.0,
                  rope_scaling=dict(rope_type="linear", factor=8.0), tie_word_embeddings=OMIT, rms_norm_eps=1e-6,
                  matters=[dict(rope_scaling=None), dict(rope_local_base_freq=100000.0), dict(rope_theta=100.0),
                           dict(sliding_window_pattern=3), dict(sliding_window=17), dict(query_pre_attn_scalar=20)]),
    # The larger model that a text model is a part of: text_config says as little as on the Hub, images are left out.
    "gemma3_with_vision": hub("gemma3", "Gemma3ForConditionalGeneration",
                              {"language_model.model.layers.0.self_attn.q_norm.weight": [16], "language_model.model.norm.weight": [40],
                               "multi_modal_projector.mm_soft_emb_norm.weight": [16], "vision_tower.post_layernorm.weight": [16]},
                              image_token_index=95, boi_token_index=94, eoi_token_index=93, mm_tokens_per_image=4, eos_token_id=[1, 6],
                              text_config=dict(model_type="gemma3_text", hidden_size=40, intermediate_size=32, num_hidden_layers=6,
                                               num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96,
                                               query_pre_attn_scalar=4, sliding_window=16, rope_scaling=dict(factor=8.0, rope_type="linear")),
                              vision_config=dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                 num_attention_heads=1, image_size=28, patch_size=14, vision_use_head=False)),
    "phi3": hub("phi3", "Phi3ForCausalLM", layer({"self_attn.qkv_proj": [96, 48], "mlp.gate_up_proj": [128, 48]}),
                sliding_window=16, rope_scaling=None, rope_theta=10000.0, original_max_position_embeddings=256,
                tie_word_embeddings=False, matters=[dict(sliding_window=17)]),
    "phi3_longrope_within": hub("phi3", "Phi3ForCausalLM", layer({"self_attn.qkv_proj": [96, 48]}),
                                **{**LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 256}, context=64,
                                matters=[dict(original_max_position_embeddings=32), dict(rope_scaling=SCALED_FACTORS)]),
    "phi3_longrope_beyond": hub("phi3", "Phi3ForCausalLM", layer({"self_attn.qkv_proj": [96, 48]}), **LONGROPE, context=128,
                                matters=[dict(original_max_position_embeddings=64), dict(rope_scaling=SCALED_FACTORS),
                                         dict(max_position_embeddings=1 << 20)]),
    "phi4_mini": hub("phi3", "Phi3ForCausalLM", layer({"self_attn.qkv_proj": [6 * 16 + 2 * 3 * 16, 96]}), hidden_size=96,
                     num_attention_heads=6, num_key_value_heads=3, **LONGROPE, partial_rotary_factor=0.75, context=128,
                     matters=[dict(rope_scaling=SCALED_FACTORS)]),
    "mixtral": hub("mixtral", "MixtralForCausalLM",
                   {**experts("block_sparse_moe.experts", 1, ("w1", "w3", "w2"), count=6, size=40),
                    **layer({"block_sparse_moe.gate": [6, 48]})},
                   intermediate_size=40, num_local_experts=6, num_experts_per_tok=2, sliding_window=None, rope_theta=1000000.0,
                   matters=[dict(num_experts_per_tok=1)]),
    "qwen2_moe": hub("qwen2_moe", "Qwen2MoeForCausalLM",
                     {**experts("mlp.experts", 1), **layer({"mlp.gate": [8, 48], "mlp.shared_expert.up_proj": [40, 48],
                                                            "mlp.shared_expert_gate": [1, 48]}, 1),
                      **layer({"mlp.gate_proj": [64, 48]}, 0), **layer({"mlp.gate_proj": [64, 48]}, 3)},
                     num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3, num_experts=8, num_experts_per_tok=3,
                     moe_intermediate_size=24, shared_expert_intermediate_size=40, decoder_sparse_step=2, mlp_only_layers=[3],
                     norm_topk_prob=False, use_sliding_window=False, sliding_window=4096, max_window_layers=4, rope_theta=1000000.0,
                     matters=[dict(norm_topk_prob=True)]),
    "qwen3_moe": hub("qwen3_moe", "Qwen3MoeForCausalLM", {**experts("mlp.experts", 1), **layer({"self_attn.q_norm": [20]})},
                     head_dim=20, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, decoder_sparse_step=1,
                     mlp_only_layers=[], norm_topk_prob=True, attention_bias=False, use_sliding_window=False, sliding_window=None,
                     max_window_layers=2, rope_theta=1000000.0, tie_word_embeddings=False, matters=[dict(norm_topk_prob=False)]),
    "gpt_oss": hub("gpt_oss", "GptOssForCausalLM",
                   {"model.layers.0.mlp.experts.gate_up_proj": [8, 48, 80], "model.layers.0.mlp.experts.gate_up_proj_bias": [8, 80],
                    "model.layers.0.mlp.experts.down_proj": [8, 40, 48], "model.layers.0.mlp.experts.down_proj_bias": [8, 48],
                    "model.layers.0.mlp.router.weight": [8, 48], "model.layers.0.mlp.router.bias": [8],
                    "model.layers.0.self_attn.sinks": [4], "model.layers.0.self_attn.o_proj.bias": [48]},
                   head_dim=16, intermediate_size=40, num_local_experts=8, num_experts_per_tok=3, experts_per_token=3, sliding_window=16,
                   layer_types=["sliding_attention", "full_attention"], attention_bias=True, swiglu_limit=7.0,
                   max_position_embeddings=1024, initial_context_length=256, rope_theta=150000.0,
                   rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                                     original_max_position_embeddings=256),
                   tie_word_embeddings=False, scale={r"gate_up_proj$": 3.0, r"experts\.down_proj$": 0.15},
                   matters=[dict(swiglu_limit=1e9), dict(sliding_window=17), dict(rope_scaling=yarn(4.0, 256, truncate=True)),
                            dict(layer_types=["full_attention", "sliding_attention"])]),
    "olmo2": hub("olmo2", "Olmo2ForCausalLM", layer({"self_attn.q_norm": [72], "self_attn.k_norm": [36], "post_attention_layernorm": [72],
                                                     "post_feedforward_layernorm": [72], "input_layernorm": None}),
                 hidden_size=72, num_attention_heads=6, num_key_value_heads=3, rope_theta=500000.0, tie_word_embeddings=False),
    "granite": hub("granite", "GraniteForCausalLM", layer({"mlp.gate_proj": [64, 48]}), attention_multiplier=0.2, embedding_multiplier=12.0,
                   logits_scaling=4.0, residual_multiplier=0.4, rope_theta=10000000.0, scale={"embed": 0.2},
                   matters=[dict(attention_multiplier=1 / math.sqrt(12)), dict(embedding_multiplier=1.0), dict(logits_scaling=1.0),
                            dict(residual_multiplier=1.0)]),
    "deepseek_v2": hub("deepseek_v2", "DeepseekV2ForCausalLM",
                       {**experts("mlp.experts", 2), **layer({**LATENT_NAMES, "self_attn.q_a_proj": [20, 48], "self_attn.q_a_layernorm": [20],
                                                              "self_attn.q_b_proj": [4 * 24, 20], "mlp.gate_proj": [64, 48]}),
                        **layer({"mlp.shared_experts.gate_proj": [48, 48], "mlp.gate": [8, 48]}, 1)},
                       **LATENT, num_hidden_layers=3, q_lora_rank=20, n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1,
                       moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax", topk_method="group_limited_greedy", n_group=4,
                       topk_group=2, routed_scaling_factor=4.0, attention_bias=False, aux_loss_alpha=0.001, seq_aux=True,
                       rope_scaling=yarn(4, 256, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.707),
                       matters=[dict(topk_method="greedy"), dict(routed_scaling_factor=1.0), dict(n_group=2, topk_group=1),
                                dict(rope_scaling=yarn(4, 256, mscale=0.707, mscale_all_dim=0.707)),
                                dict(rope_scaling=yarn(4, 256, mscale=1.0, mscale_all_dim=1.0)),
                                dict(rope_scaling=yarn(8, 256, mscale=1.0, mscale_all_dim=0.707))]),
    "deepseek_v2_lite": hub("deepseek_v2", "DeepseekV2ForCausalLM",
                            {**experts("mlp.experts", 1), **layer({**LATENT_NAMES, "self_attn.q_proj": [4 * 24, 48]})},
                            **LATENT, q_lora_rank=None, n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1,
                            moe_layer_freq=1, norm_topk_prob=False, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1,
                            routed_scaling_factor=1.0, attention_bias=False,
                            rope_scaling=yarn(4, 256, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707),
                            matters=[dict(rope_scaling=None)]),
    "deepseek_v3": hub("deepseek_v3", "DeepseekV3ForCausalLM",
                       {**experts("mlp.experts", 2), **layer({**LATENT_NAMES, "self_attn.q_a_proj": [20, 48]}),
                        **layer({"mlp.shared_experts.gate_proj": [24, 48], "mlp.gate": [8, 48]}, 2),
                        "model.layers.1.mlp.gate.e_score_correction_bias": [8], "model.layers.3.enorm.weight": [48]},
                       **LATENT, num_hidden_layers=3, q_lora_rank=20, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1,
                       moe_layer_freq=1, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", n_group=4, topk_group=2,
                       routed_scaling_factor=2.5, num_nextn_predict_layers=1, attention_bias=False,
                       rope_scaling=yarn(4, 256, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
                       matters=[dict(norm_topk_prob=False), dict(routed_scaling_factor=1.0), dict(n_group=1, topk_group=1),
                                dict(n_group=2, topk_group=1), dict(rope_scaling=None), dict(rope_interleave=False)],
                       extra={"model.layers.3.enorm.weight": torch.ones(48), "model.layers.3.hnorm.weight": torch.ones(48),
                              "model.layers.3.eh_proj.weight": torch.ones(48, 96), "model.layers.3.input_layernorm.weight": torch.ones(48)}),
    "smollm3": hub("smollm3", "SmolLM3ForCausalLM", layer({"self_attn.k_proj": [24, 48]}), num_hidden_layers=4, rope_theta=5000000.0,
                   no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4, layer_types=["full_attention"] * 4, use_sliding_window=False,
                   sliding_window=None, attention_bias=False, mlp_bias=False,
                   matters=[dict(no_rope_layers=[1, 1, 1, 1]), dict(no_rope_layers=[0, 1, 1, 1])]),
    "olmo3": hub("olmo3", "Olmo3ForCausalLM", layer({"self_attn.q_norm": [48], "post_feedforward_layernorm": [48]}), num_hidden_layers=4,
                 num_key_value_heads=4, intermediate_size=48, sliding_window=16, rope_theta=500000.0, max_position_embeddings=1024,
                 layer_types=["sliding_attention"] * 3 + ["full_attention"], tie_word_embeddings=False, attention_bias=False,
                 rope_scaling=dict(rope_type="yarn", factor=8.0, attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0,
                                   original_max_position_embeddings=128),
                 matters=[dict(rope_scaling=None), dict(sliding_window=17), dict(layer_types=["full_attention"] + ["sliding_attention"] * 3)]),
    "granite_moe": hub("granitemoe", "GraniteMoeForCausalLM",
                       {**layer({"block_sparse_moe.input_linear": [8, 48, 48], "block_sparse_moe.output_linear": [8, 48, 24],
                                 "block_sparse_moe.router.layer": [8, 48]})},
                       intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, attention_multiplier=0.2,
                       embedding_multiplier=12.0, logits_scaling=4.0, residual_multiplier=0.4, rope_theta=10000.0, scale={"embed": 0.2}),
    "ministral": hub("ministral", "MinistralForCausalLM", layer({"self_attn.k_proj": [24, 48]}), sliding_window=16, head_dim=12,
                     layer_types=["sliding_attention", "full_attention"], rope_theta=1000000.0,
                     matters=[dict(layer_types=["full_attention", "sliding_attention"])]),
    "glm4": hub("glm4", "Glm4ForCausalLM", {**layer({"mlp.gate_up_proj": [128, 48], "post_self_attn_layernorm": [48],
                                                     "post_mlp_layernorm": [48], "post_attention_layernorm": [48]}),
                                            "model.layers.0.self_attn.q_proj.bias": [64]},
                head_dim=16, partial_rotary_factor=0.5, attention_bias=True, tie_word_embeddings=False, rope_theta=10000.0,
                matters=[dict(partial_rotary_factor=1.0)]),
    "glm4_moe": hub("glm4_moe", "Glm4MoeForCausalLM",
                    {**experts("mlp.experts", 1), **layer({"mlp.shared_experts.gate_proj": [24, 48], "self_attn.q_norm": [16]}, 1),
                     "model.layers.1.mlp.gate.e_score_correction_bias": [8]},
                    head_dim=16, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True, moe_intermediate_size=24,
                    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1, n_group=1, topk_group=1,
                    norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0, rope_theta=1000000.0,
                    matters=[dict(partial_rotary_factor=1.0), dict(use_qk_norm=False)]),
    "olmoe": hub("olmoe", "OlmoeForCausalLM", {**experts("mlp.experts", 1), **layer({"self_attn.q_norm": [48], "self_attn.k_norm": [24]})},
                 intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, rope_theta=10000.0,
                 matters=[dict(norm_topk_prob=True)]),
}


def randomise(model, seed, scale=None):
    """Norm weights and biases are random too, so that forgetting one of them shows."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    gemma = config.model_type.startswith("gemma")  # its norms multiply by 1 + weight, its embeddings by sqrt(hidden_size)
    buffers = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *buffers]:
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((0.0 if gemma else 1.0) + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise / config.hidden_size ** 0.5 if gemma else noise)
            elif name.endswith("experts.gate_up_proj") and config.model_type == "gpt_oss":  # saved with its input columns as rows
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            for pattern, factor in (scale or {}).items():
                if re.search(pattern, name):
                    parameter.mul_(factor)
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))


def router_margins(logits, config, bias):
    """How far each choice of experts and of groups is from a tie, as a share of the spread of its scores. logits [tokens, experts]"""
    kind = config.model_type
    scores = logits
    if kind in ("deepseek_v3", "glm4_moe"):
        scores = logits.sigmoid()
    if bias is not None:
        scores = scores + bias
    spread = scores.amax(-1) - scores.amin(-1)
    k, margins = config.num_experts_per_tok, []
    groups = getattr(config, "n_group", 1) if getattr(config, "topk_method", "") != "greedy" else 1
    if groups and groups > 1:
        members = scores.view(len(scores), groups, -1)
        rated = members.amax(-1) if kind == "deepseek_v2" else members.topk(2, -1)[0].sum(-1)
        best, chosen = rated.sort(-1, descending=True)
        margins.append((best[:, config.topk_group - 1] - best[:, config.topk_group]) / spread)
        open_groups = torch.zeros_like(rated).scatter_(1, chosen[:, :config.topk_group], 1).bool()
        scores = members.masked_fill(~open_groups[..., None], -1e4).view(len(scores), -1)
    best = scores.sort(-1, descending=True)[0]
    margins.append((best[:, k - 1] - best[:, k]) / spread)
    return torch.cat(margins)


def keep_from_ties(model, ids, seed):
    """Trains each router, first layer first, until no choice for these tokens is near a tie. Returns the narrowest choice."""
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    generator, narrowest = torch.Generator().manual_seed(seed), math.inf
    for router in routers:
        seen = []
        hook = router.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(ids[None])
        hook.remove()
        rows = seen[0].reshape(-1, router.weight.shape[1]).detach()
        bias = getattr(router, "bias", None)
        if bias is None:
            bias = getattr(router, "e_score_correction_bias", None)
        bias = None if bias is None else bias.detach()
        for _attempt in range(20):
            weight = (1.5 * torch.randn(router.weight.shape, generator=generator) / router.weight.shape[1] ** 0.5).requires_grad_()
            optimiser = torch.optim.Adam([weight], lr=0.01)
            for _step in range(400):
                margins = router_margins(rows @ weight.T, model.config, bias)
                if margins.min() > 0.06:
                    break
                optimiser.zero_grad()
                torch.relu(0.08 - margins).sum().backward()
                optimiser.step()
            rounded = weight.detach().to(torch.bfloat16).to(torch.float32)
            margin = router_margins(rows @ rounded.T, model.config, bias).min().item()
            with torch.no_grad():
                router.weight.copy_(rounded)
                chosen = []
                hook = router.register_forward_hook(lambda _module, _args, out, chosen=chosen: chosen.append(out[2]))
                model(ids[None])
                hook.remove()
            if margin > 0.04 and len(chosen[0].unique()) == len(rounded):
                break
        else:
            raise AssertionError(f"a choice of experts stays near a tie ({margin}), or an expert is never chosen")
        narrowest = min(narrowest, margin)
    return narrowest if routers else None


def load(directory):
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                              experts_implementation="eager").eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0].to(torch.float32).numpy()


def logits_with_bf16_cache(model, ids):
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    modeling = sys.modules[type(text).__module__]
    attend = modeling.eager_attention_forward
    latent = getattr(model.config.get_text_config(), "kv_lora_rank", None)

    def rounded(x):
        return x.to(torch.bfloat16).to(torch.float32)

    def attend_rounded(module, query, key, value, *args, **more):
        if latent:  # what is cached is the latent, rounded below, and the part that rotates
            plain = model.config.qk_nope_head_dim
            key = torch.cat([key[..., :plain], rounded(key[..., plain:])], -1)
        else:
            key, value = rounded(key), rounded(value)
        return attend(module, query, key, value, *args, **more)

    hooks = [module.register_forward_hook(lambda _module, _args, out: rounded(out))
             for name, module in model.named_modules() if name.endswith("kv_a_layernorm")]
    modeling.eager_attention_forward = attend_rounded
    try:
        return logits_of(model, ids)
    finally:
        modeling.eager_attention_forward = attend
        for hook in hooks:
            hook.remove()


def write_config(directory, fields):
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def neutral(name, gemma):
    if name.endswith("bias"):
        return 0.0
    if name.endswith("sinks"):
        return -1e4
    return 0.0 if gemma else 1.0


def anywhere(name):
    """A tensor's name without the number of its layer, and without what stands in front of the layers."""
    return re.sub(r".*\blayers\.\d+", "layers.*", name) if "layers." in name else ".".join(name.split(".")[-2:])


def check_that_features_matter(directory, case, ids, want):
    """Returns the weakest influence of all, as a share of the logits' rms, and whose it is."""
    influence = {}
    rms = np.sqrt((want ** 2).mean())
    config = json.loads((directory / "config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        other = Path(name)
        shutil.copy(directory / "model.safetensors", other)
        for change in case["matters"]:
            write_config(other, {**config, **change})
            influence[str(change)] = np.sqrt(((logits_of(load(other), ids) - want) ** 2).mean()) / rms
        write_config(other, config)
        tensors = load_file(directory / "model.safetensors")
        vectors = {anywhere(name) for name, tensor in tensors.items()
                   if tensor.dim() == 1 and name not in case["extra"] and not name.startswith(("vision_tower", "multi_modal"))}
        stacked = {anywhere(name) for name in tensors if name.endswith("_proj_bias")}
        model = load(directory)
        state = dict(model.state_dict())
        for pattern in sorted(vectors | stacked):
            kept = {key: value.clone() for key, value in state.items() if anywhere(key) == pattern}
            assert kept, pattern
            for key in kept:
                state[key].fill_(neutral(key, "gemma" in config["model_type"]))
            influence[pattern] = np.sqrt(((logits_of(model, ids) - want) ** 2).mean()) / rms
            for key, value in kept.items():
                state[key].copy_(value)
    weakest = min(influence, key=influence.get)
    assert influence[weakest] > 0.03, f"{directory}: {weakest} moves the logits by {100 * influence[weakest]:.2f} % only"
    return influence[weakest], weakest


def write_golden(directory, model, ids, seed, **more):
    logits, cached = logits_of(model, ids), logits_with_bf16_cache(model, ids)
    rms = float(np.sqrt((logits ** 2).mean()))
    rounding = float(np.sqrt(((cached - logits) ** 2).mean()) / rms)
    assert np.isfinite(logits).all() and logits.std() > 0.1 and 0.0001 < rounding < 0.02, directory
    np.save(directory / "logits.npy", logits)
    np.save(directory / "logits_bf16_cache.npy", np.ascontiguousarray(cached[CACHED_EVERY - 1::CACHED_EVERY]))
    golden = {"token_ids": ids.tolist(), "rms": rms, "bf16_cache_rounding": round(rounding, 5), "transformers": transformers.__version__,
              "torch": torch.__version__.split("+")[0], "seed": seed, **more}
    (directory / "golden.json").write_text(json.dumps(golden, indent=2) + "\n")
    print(f"{directory.name}: logits rms {rms:.3f}, rounding of the cache {100 * rounding:.2f} %", end="")


def make_case(directory, config, seed):
    """A case whose config.json is in transformers 5's words."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    randomise(model, seed)
    ids = torch.randint(0, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items() if key not in tied}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "bfloat16"})
    write_golden(directory, model, ids, seed)
    print()


def make_hub_case(directory, case, seed):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_config(directory, case["config"])
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, case["config"]["architectures"][0])._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, seed, case["scale"])
    tokens = config.get_text_config().vocab_size - (3 if "vision_config" in case["config"] else 0)  # but those for images
    ids = torch.randint(0, tokens, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    margin = keep_from_ties(model, ids, seed + 2)
    want = logits_of(model, ids)

    # save_pretrained takes the stacked modules apart again, into the tensors of the Hub's files; its config.json is not the Hub's.
    model.save_pretrained(directory)
    for path in directory.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    tensors = load_file(directory / "model.safetensors")
    for name, shape in case["layout"].items():
        found = list(tensors[name].shape) if name in tensors else list(case["extra"][name].shape) if name in case["extra"] else None
        assert found == shape, f"{directory}: {name} is {found}, not {shape}: {sorted(tensors)}"
    tensors = {name: tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
               for name, tensor in {**tensors, **case["extra"]}.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, case["config"])

    model = load(directory)
    logits = logits_of(model, ids)
    assert np.abs(logits - want).max() < 1e-4, f"{directory}: read back, the logits are others"
    write_golden(directory, model, ids, seed, **({"context": case["context"]} if case["context"] else {}))
    influence, whose = check_that_features_matter(directory, case, ids, logits)
    margin = f", narrowest choice of experts {100 * margin:.1f} %" if margin else ""
    print(f", weakest feature {100 * influence:.1f} % ({whose}){margin}", flush=True)


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/families")
    wanted = sys.argv[2:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for index, (name, config) in enumerate(CASES.items()):
        if not wanted or name in wanted:
            make_case(root / name, config, 1000 + 10 * index)
    for name, case in HUB_CASES.items():
        if not wanted or name in wanted:
            make_hub_case(root / name, case, int.from_bytes(name.encode()[-6:], "big") % 1000003)


if __name__ == "__main__":
    main()

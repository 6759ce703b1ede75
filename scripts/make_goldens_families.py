#!/usr/bin/env python3
"""Tiny random checkpoints of every supported family, and the logits that `transformers` computes from them.

Needs (in a virtual environment): torch, transformers, safetensors, numpy.
Usage: scripts/make_goldens_families.py [tests/golden/families]

For each case: a normal Hugging Face directory (config.json, model.safetensors in bfloat16) and golden.json + logits.npy
(float32 [tokens, vocab_size]), computed in float32 from the bfloat16 weights. Seeds are fixed. Norm weights and biases are random too, so
that forgetting one of them shows.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TOKENS = 48

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


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))


def make_case(directory, name, config, seed):
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    randomise(model, seed)
    ids = torch.randint(0, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].to(torch.float32).numpy()
    assert np.isfinite(logits).all() and logits.std() > 0.1, name

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items() if key not in tied}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict()
    fields["architectures"] = [type(model).__name__]
    fields["dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    np.save(directory / "logits.npy", logits)
    golden = {"token_ids": ids.tolist(), "rms": float(np.sqrt((logits ** 2).mean())), "transformers": transformers.__version__,
              "torch": torch.__version__.split("+")[0], "seed": seed}
    (directory / "golden.json").write_text(json.dumps(golden, indent=2) + "\n")
    print(f"{name}: logits rms {golden['rms']:.3f}")


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/families")
    for index, (name, config) in enumerate(CASES.items()):
        make_case(root / name, name, config, 1000 + 10 * index)


if __name__ == "__main__":
    main()

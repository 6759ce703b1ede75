#!/usr/bin/env python3
"""Golden inverse rope frequencies, computed by transformers: tests/golden/rope/inv_freq.txt.

Needs: torch, transformers.

Each line: name, then head_dim / 2 values. The configs belonging to the names stand in tests/test_hf_config.c.
transformers computes in float32, so the last bits may differ from a table that was rounded once.
"""
import os

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
CASES = {
    "plain": (128, {"rope_type": "default", "rope_theta": 10000.0}),
    "million": (64, {"rope_type": "default", "rope_theta": 1000000.0}),
    "linear": (64, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama31": (128, {**LLAMA3, "rope_theta": 500000.0}),
    "llama32": (64, {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0}),
}


def main():
    os.makedirs("tests/golden/rope", exist_ok=True)
    with open("tests/golden/rope/inv_freq.txt", "w", encoding="utf-8") as out:
        for name, (head_dim, parameters) in CASES.items():
            config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
                                 max_position_embeddings=131072, rope_parameters=parameters)
            kind = parameters["rope_type"]
            if kind == "default":
                values = LlamaRotaryEmbedding(config).inv_freq
            else:
                values, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
                assert factor == 1.0
            out.write(name + " " + " ".join(f"{v:.9g}" for v in values.tolist()) + "\n")


if __name__ == "__main__":
    main()

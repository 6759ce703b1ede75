#!/usr/bin/env python3
"""Golden inverse rope frequencies, computed by transformers.

Needs: torch, transformers.

tests/golden/rope/inv_freq.txt: each line a name, then head_dim / 2 values. The configs belonging to the names stand in
tests/test_hf_config.c.
tests/golden/rope/models.txt: each line a config of bench/models, "main" or "local" (Gemma 3's sliding layers), the factor of cosines and
sines, then rotary_dim / 2 values.
transformers computes in float32, so the last bits may differ from a table that was rounded once.
"""
import json
import os
import tempfile
from pathlib import Path

from transformers import AutoConfig
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


def model_tables(config):
    """(name, factor, values) of each table that a model has."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        kinds = {"main": "full_attention", "local": "sliding_attention"}
    else:
        kinds = {"main": None}
    for name, layer_type in kinds.items():
        of_kind = parameters[layer_type] if layer_type else parameters
        if of_kind["rope_type"] == "default":
            dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
            dim = int(dim * of_kind.get("partial_rotary_factor", 1.0))
            yield name, 1.0, [1.0 / of_kind["rope_theta"] ** (2 * i / dim) for i in range(dim // 2)]
        else:
            values, factor = ROPE_INIT_FUNCTIONS[of_kind["rope_type"]](config, "cpu", layer_type=layer_type)
            yield name, factor, values.tolist()


def write_models(out):
    for path in sorted(Path("bench/models").glob("*.json")):
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                                                     if key != "quantization_config"}))
            config = AutoConfig.from_pretrained(directory).get_text_config()
        for name, factor, values in model_tables(config):
            out.write(f"{path.stem} {name} {factor:.9g} " + " ".join(f"{v:.9g}" for v in values) + "\n")


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
    with open("tests/golden/rope/models.txt", "w", encoding="utf-8") as out:
        write_models(out)


if __name__ == "__main__":
    main()

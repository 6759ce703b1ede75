#!/usr/bin/env python3
"""tpshard plan for popular models (bench/models: their public configs, no weights): it counts every parameter and no other.

PARAMETERS are what transformers' own classes hold when they are built from these files (images and predictors of further tokens apart).
The sums of the ranks' bytes are checked against them, so that a tensor that a plan forgets, or cuts twice, shows.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TPSHARD = Path(os.environ.get("BUILD", "build")) / "tpshard"
PARAMETERS = {
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,  # 58 * 256 of them are the biases of choice, which transformers calls no parameters
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "OLMo-2-0325-32B": 32_234_279_936,
    "OLMo-2-1124-13B": 13_716_198_400,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-8B": 8_190_735_360,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-12b-it": 11_766_034_176,
    "gemma-3-27b-it": 27_009_346_304,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "granite-3.3-8b-instruct": 8_170_864_640,
    "phi-4": 14_659_507_200,
}
# Published: parameters that one token meets.
ACTIVE_BILLIONS = {"Mixtral-8x7B-v0.1": 12.9, "Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22, "gpt-oss-20b": 3.6, "gpt-oss-120b": 5.1,
                   "DeepSeek-V2-Lite": 2.4, "DeepSeek-V3": 37}
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {name} {detail}", flush=True)


def plan_of(model, *options):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_bytes(model.read_bytes())
        done = subprocess.run([TPSHARD, "plan", directory, "--json", *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def test_model(model, parameters):
    one = plan_of(model, "--tp", "1", "--quant", "none")
    check(f"{model.stem} parameters", one["parameters"] == parameters, f"{one['parameters']}, transformers has {parameters}")
    if model.stem in ACTIVE_BILLIONS:
        active, published = one["active_parameters"] / 1e9, ACTIVE_BILLIONS[model.stem]
        check(f"{model.stem} active parameters", abs(active - published) < 0.12 * published + 0.35, f"{active:.2f}, published {published} billion")
    # bfloat16 but for vectors, in float32; ranks share what is replicated: norms, routers, latents, kv heads beyond their number.
    for experts in ("tp", "ep"):
        for tp in (2, 4, 8):
            ranks = plan_of(model, "--tp", str(tp), "--quant", "none", "--experts", experts)["ranks"]
            total = sum(rank["weight_bytes"] - rank["padding_bytes"] for rank in ranks)
            check(f"{model.stem} tp {tp} experts {experts}", 1 <= total / (2 * parameters) < 1 + 0.02 * tp,
                  f"{total / 1e9:.2f} GB, {2 * parameters / 1e9:.2f} GB of parameters")


def main():
    models = sorted(Path("bench/models").glob("*.json"))
    check("all models are counted", [model.stem for model in models] == sorted(PARAMETERS))
    for model in models:
        try:
            test_model(model, PARAMETERS[model.stem])
        except (RuntimeError, OSError, KeyError, ValueError) as problem:
            check(model.stem, False, problem)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

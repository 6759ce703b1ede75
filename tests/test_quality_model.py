#!/usr/bin/env python3
"""bench/quality_model.py, which judges everybody's quantized weights: it reads shards as tests/shard_reader.py does, computes what the checkpoint computes,
and tells models apart. Needs torch, numpy and xxhash."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import venv_help

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL = Path("tests/model")
MODULES = ["torch", "numpy", "xxhash", "tokenizers"]
KINDS = ["none", "int8", "fp8", "int4 --group-size 32", "int4z", "nl4"]
failures = 0


def check(name, ok, detail):
    global failures
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {name}: {detail}", flush=True)


def convert(folder, words):
    subprocess.run([BUILD / "tpshard", "convert", *words.split(), "--force", "--quiet", MODEL, folder], check=True)


def main():
    sys.path.insert(0, "bench")
    import quality_model
    import shard_reader
    import torch
    from tokenizers import Tokenizer
    config = json.loads((MODEL / "config.json").read_text())
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode((MODEL / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False).ids
    checkpoint = quality_model.read_safetensors(MODEL / "model.safetensors")
    batches = quality_model.windows_of(ids, config["bos_token_id"], 256, 2)
    check("windows", len(batches) == 1 and batches[0][1].tolist()[0] == ids[:255] and batches[0][0][0, 0] == config["bos_token_id"],
          f"{batches[0][1].shape}")
    score = quality_model.Score(quality_model.Llama(config, checkpoint), batches)
    itself = score.of(quality_model.Llama(config, checkpoint))
    check("a model agrees with itself", abs(itself["kld"]) < 1e-9 and itself["top1"] == 1 and 15 < itself["perplexity"] < 40, f"{itself}")
    bounds = {"none": 1e-9, "int8": 5e-4, "fp8": 3e-3, "none --rot": 3e-4, "int8 --rot": 8e-4}
    with tempfile.TemporaryDirectory() as tmp:
        for words in [*KINDS, "none --rot", "int8 --rot"]:
            convert(tmp, f"--quant {words}")
            _, (file,) = shard_reader.read_directory(tmp)
            if "--rot" not in words:
                tensor = file.find("o", 1)
                wanted, found = torch.tensor(file.dequantize(tensor)), quality_model.dequantize(file, tensor)
                check(f"{words}: numbers", torch.allclose(wanted, found, rtol=1e-6, atol=0), f"{(wanted - found).abs().max():.2e}")
            tensors, rotation = quality_model.read_shards(tmp)
            found = score.of(quality_model.Llama(config, tensors, rotation))
            check(f"{words}: function", found["kld"] <= bounds.get(words, 0.03), f"KLD {found['kld']:.2e}")
            if words == "none --rot":
                found = score.of(quality_model.Llama(config, tensors, 0))
                check("without the rotation in front of down it is another function", found["kld"] > 1, f"KLD {found['kld']:.2e}")
        layers, whole = quality_model.shard_bits(tmp)
        check("bits", 8 < layers < 8.2 and 8 < whole < 9, f"{layers:.3f}, {whole:.3f}")
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) == 1:
        python, why = venv_help.python_with(MODULES, MODULES, large=True)
        if not python:
            print(f"1..0 # SKIP {why}")
            sys.exit(77)
        sys.exit(subprocess.run([python, __file__, "inside"]).returncode)
    sys.exit(main())

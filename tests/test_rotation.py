#!/usr/bin/env python3
"""Rotated models (tpshard --rot) through tpshard and tpengine.

Every family that can be rotated computes the same: logits of bf16 shards with and without --rot. What differs is the rounding of the rotated
weights to bfloat16, 0.17 % rms each, which random weights hand on without slack: 0.7 to 1.9 % of the logits' rms for two layers are usual, and more like
noise, with the root of their number. A matrix that is rotated wrongly, or a gain that is folded twice or not at all, shows as 10 % and more. The others are refused by name.
The weights do not depend on tp: shards of any tp, brought to one rank, are the bytes of tp 1. verify --against and repair derive them again.
The trained model keeps what it says: Kullback-Leibler divergence of bf16 at most 1e-4; and four bits cost no more than without.
"""
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
FAMILIES, IMPORTS, MODEL = Path("tests/golden/families"), Path("tests/golden/imports"), Path("tests/model")
QUICK = bool(os.environ.get("TEST_QUICK"))  # slow builds look at less
BOUND = 0.03
# A router near a tie may choose another expert, whose token then moves by as much as all else together.
BOUND_EXPERTS = 0.06
POST_NORMS = {"gemma2", "gemma3", "gemma3_with_vision", "glm4", "olmo2", "olmo3"}
OTHER_TP = ("llama_odd", "llama_biases", "mixtral", "gpt_oss", "deepseek_v3", "phi3", "qwen2_moe", "granite_moe")


def read_npy(path):
    data = path.read_bytes()
    begin = 10 + struct.unpack_from("<H", data, 8)[0]
    return struct.unpack_from(f"<{(len(data) - begin) // 4}f", data, begin)


def run(*words, status=0):
    """What it says on stdout; of a refusal, on stderr."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stderr if status else done.stdout


def relative_error(got, want):
    if len(got) != len(want):
        return math.inf
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want))


def logits(shards, golden, out):
    context = ("--context", golden["context"]) if "context" in golden else ()
    run(TPENGINE, "logits", shards, "--token-ids", ",".join(map(str, golden["token_ids"])), "--output", out, *context, "--quiet")
    return read_npy(out)


def same_bytes(a, b):
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def family(path, tmp):
    """A line of TAP for each claim about one family."""
    golden = json.loads((path / "golden.json").read_text())
    config = json.loads((path / "config.json").read_text())
    config = config.get("text_config", config)
    work = tmp / path.name
    work.mkdir()
    if path.name in POST_NORMS:
        said = run(TPSHARD, "--quant", "none", "--rot", path, work / "rot", "--quiet", status=3)
        return [("norms what attention and mlp put out" in said and not (work / "rot").exists(), f"{path.name} is refused", said.strip())]
    experts = any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    bound = (BOUND_EXPERTS if experts else BOUND) * math.sqrt(config["num_hidden_layers"] / 2)
    run(TPSHARD, "--quant", "none", path, work / "plain", "--quiet")
    run(TPSHARD, "--quant", "none", "--rot", path, work / "rot", "--quiet")
    want = logits(work / "plain", golden, work / "plain.npy")
    error = relative_error(logits(work / "rot", golden, work / "rot.npy"), want)
    lines = [(0 < error <= bound, f"{path.name} computes the same", f"error {100 * error:.3f} % of rms, bound {100 * bound:.1f} %")]
    if path.name not in OTHER_TP:
        return lines
    run(TPSHARD, "--quant", "none", "--tp", 2, "--rot", path, work / "rot2", "--quiet")
    error = relative_error(logits(work / "rot2", golden, work / "rot2.npy"), want)
    lines.append((0 < error <= bound, f"{path.name} on two ranks", f"error {100 * error:.3f} % of rms"))
    return lines


def other_tp(path, tmp):
    """Shards of any tp hold the same weights, and the checkpoint gives them again."""
    work, lines = tmp / f"{path.name}-tp", []
    work.mkdir()
    ways = [(("int4", "--group-size", "32"), (2, 3, 8)), (("none",), (4,))] if path != MODEL else [(("int4",), (2, 4, 8))]
    for number, (way, tps) in enumerate(ways):
        one = work / f"{number}-1"
        run(TPSHARD, "--quant", *way, "--rot", path, one, "--quiet", "--threads", 1)
        for tp in tps[-1:] if QUICK else tps:
            many, back = work / f"{number}-{tp}", work / f"{number}-{tp}-back"
            run(TPSHARD, "--quant", *way, "--rot", "--tp", tp, path, many, "--quiet", "--threads", 2)
            run(TPSHARD, "verify", many, "--against", path, "--quiet")
            run(TPSHARD, "reshard", many, back, "--tp", 1, "--quiet")
            lines.append((same_bytes(one, back), f"{path.name} {way[0]} tp {tp}", "brought to one rank gives the bytes of tp 1"))
            shutil.rmtree(back)
            shutil.rmtree(many)
    return lines


def trained(tmp):
    lines = []
    for name, words in {"none": ["--quant", "none"], "rot": ["--quant", "none", "--rot"], "int4": ["--quant", "int4"],
                        "int4-rot": ["--quant", "int4", "--rot"]}.items():
        run(TPSHARD, *words, MODEL, tmp / name, "--quiet")

    def against(name, tokens):
        return json.loads(run(TPENGINE, "eval", tmp / name, "--text", MODEL / "heldout.txt", "--context", 512, "--max-tokens",
                              tokens, "--against", tmp / "none", "--json", "--quiet"))

    tokens = 300 if QUICK else 2000
    same = against("rot", tokens)
    lines.append((0 < same["kl_divergence"] <= 1e-4 and same["top1_agreement"] >= 0.99, "the trained model rotated, bf16",
                  f"KL {same['kl_divergence']:.2e}, top-1 {100 * same['top1_agreement']:.2f} %"))
    if not QUICK:
        plain, turned = against("int4", tokens)["kl_divergence"], against("int4-rot", tokens)["kl_divergence"]
        lines.append((turned <= plain, "the trained model rotated, int4", f"KL {turned:.5f}, not rotated {plain:.5f}"))
    inspected = json.loads(run(TPSHARD, "inspect", tmp / "int4-rot", "--json"))["manifest"]
    lines.append((inspected["quant"]["rotation"] == 128 and inspected["model"]["mlp_rotation"] == 128
                  and not inspected["model"]["tied_embeddings"], "inspect says what is rotated", str(inspected["quant"])))
    lines.append(("rotated: residual stream in blocks of 128" in run(TPSHARD, "inspect", tmp / "int4-rot"), "and to people", ""))
    reader = subprocess.run([sys.executable, "tests/shard_reader.py", str(tmp / "int4-rot")], capture_output=True, text=True)
    if "ModuleNotFoundError" not in reader.stderr:
        lines.append((reader.returncode == 0, "a second reader reads it", (reader.stdout or reader.stderr).splitlines()[0]))
    lines += repaired(tmp)
    planned = json.loads(run(TPSHARD, "plan", MODEL, "--quant", "int4", "--rot", "--tp", 2, "--json"))
    lines.append((planned["tp_size"] == 2 and planned["quant"]["rotation"] == 128, "plan says it", str(planned["quant"])))
    screen = run(TPSHARD, "plan", MODEL, "--quant", "int4", "--rot")
    lines.append((", rotated" in screen, "and to people", screen.splitlines()[1]))
    return lines


def repaired(tmp):
    """A damaged file is made good from the checkpoint, and not from a copy that is not rotated or from another checkpoint."""
    damaged = tmp / "int4-rot" / "rank-00-of-01.tpshard"
    whole = damaged.read_bytes()
    with open(damaged, "r+b") as file:
        file.seek(len(whole) // 2)
        file.write(b"\x55" * 5000)
    broken, other, lines = damaged.read_bytes(), tmp / "other-model", []
    shutil.copytree(MODEL, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    for at in range(8 + struct.unpack_from("<Q", weights)[0], len(weights), 1001):  # no block of the damaged bytes comes out as it was
        weights[at] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for source, sentence in ((tmp / "int4", "its contract is"), (other, "not what these files were made from")):
        done = subprocess.run([TPSHARD, "repair", tmp / "int4-rot", "--from", source, "--quiet"], capture_output=True, text=True)
        lines.append((done.returncode != 0 and sentence in done.stderr and damaged.read_bytes() == broken, f"{source.name} repairs nothing",
                      done.stderr.strip()))
    run(TPSHARD, "repair", tmp / "int4-rot", "--from", MODEL, "--quiet")
    return lines + [(damaged.read_bytes() == whole, "a damaged rank file is repaired from the checkpoint", "")]


def imports(tmp):
    lines = []
    said = run(TPSHARD, "--rot", IMPORTS / "gptq", tmp / "kept", "--quiet", status=2)
    lines.append(("cannot be kept as it is" in said, "quantized matrices are not kept", said.strip()))
    said = run(TPSHARD, "--rot", "--quant", "int4", IMPORTS / "gptq_act_order", tmp / "ordered", "--quiet", status=3)
    lines.append(("act-order" in said, "nor columns of an order of their own", said.strip()))
    for name in ("fp8_block", "awq", "gpt_oss"):
        golden = json.loads((IMPORTS / name / "golden.json").read_text())
        run(TPSHARD, "--quant", "none", IMPORTS / name, tmp / f"{name}-plain", "--quiet")
        run(TPSHARD, "--quant", "none", "--rot", IMPORTS / name, tmp / f"{name}-rot", "--quiet")
        error = relative_error(logits(tmp / f"{name}-rot", golden, tmp / "rot.npy"),
                               logits(tmp / f"{name}-plain", golden, tmp / "plain.npy"))
        # The plain one rounds too: f16 values and products of codes and scales to bfloat16.
        bound = 2 * (BOUND_EXPERTS if name == "gpt_oss" else BOUND)
        lines.append((0 < error <= bound, f"{name}, stored anew, computes the same", f"error {100 * error:.3f} % of rms"))
    return lines


def main():
    names = sys.argv[1:]
    cases = [path for path in sorted(FAMILIES.iterdir()) if not names or path.name in names]
    if QUICK:
        cases = [path for path in cases if path.name in OTHER_TP or path.name in POST_NORMS]
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(2) as pool:
        tmp = Path(made)
        work = [pool.submit(family, path, tmp) for path in cases]
        work += [pool.submit(other_tp, path, tmp) for path in cases if path.name in OTHER_TP]
        if not names:
            work += [pool.submit(other_tp, MODEL, tmp), pool.submit(trained, tmp), pool.submit(imports, tmp)]
        failures = 0
        for job in work:
            try:
                lines = job.result()
            except (RuntimeError, OSError, ValueError) as problem:
                lines = [(False, "a command", str(problem))]
            for ok, name, detail in lines:
                failures += not ok
                print(f"{'ok' if ok else 'not ok'} {name} {detail}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""tpengine advise: the figures of the codecs of sums over ranks, the advice by the limit, what --write puts into model.json and who obeys it, a model
whose sums one codec cannot carry, and refusals.

Standard library only; with xxhash the manifests are read by the second reader (shard_reader.py) as well.
"""
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import case_help
from case_help import check, expect, expect_run, must, run

try:
    from shard_reader import read_manifest
except ImportError:
    def read_manifest(path):
        return json.loads(path.read_text())

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
MODEL = Path("tests/model")
TEXT = MODEL / "heldout.txt"
TOKENS = int(os.environ.get("QUALITY_TOKENS", "500"))  # a small number for slow builds


def advise(folder, *words):
    return json.loads(must(TPENGINE, "advise", folder, "--text", TEXT, "--max-tokens", TOKENS, "--json", *words))


def figures(report):
    return {wire["wire"]: wire for wire in report["wires"]}


def test_figures(folder):
    before = (folder / "model.json").read_bytes()
    report = advise(folder)
    wires = figures(report)
    kl = {name: wire["kl_divergence"] for name, wire in wires.items()}
    check("f32 is what the others are compared with", kl["f32"] == 0 and wires["f32"]["same_top"] == 1, repr(wires))
    check("bf16 costs less than s8x, and s8x less than fp8", 0 < kl["bf16"] < kl["s8x"] < kl["fp8"], repr(kl))
    check("intervals lie around the figures", all(kl[n] <= wires[n]["kl_high"] < 3 * kl[n] for n in kl if n != "f32"), repr(wires))
    check("s8x keeps 98 % of the likeliest tokens", wires["s8x"]["same_top"] >= 0.98, repr(wires["s8x"]))
    expect("s8x is advised", report["advice"], "s8x")
    check("nothing is written without --write", (folder / "model.json").read_bytes() == before and not report["written"])
    unfed = figures(advise(folder, "--wire-feedback", "off"))
    check("error feedback halves what fp8 costs", kl["fp8"] < 0.6 * unfed["fp8"]["kl_divergence"], f"{kl['fp8']}, {unfed['fp8']}")
    expect("what costs nothing is the same without feedback", unfed["bf16"]["kl_divergence"], kl["bf16"])
    between = (wires["bf16"]["kl_high"] + kl["s8x"]) / 2
    expect("s8x above the limit: bf16", advise(folder, "--limit", between)["advice"], "bf16")
    expect("bf16 above the limit: f32", advise(folder, "--limit", kl["bf16"] / 2)["advice"], "f32")
    again = advise(folder, "--threads", 2, "--ranks", "thread")
    expect("the same figures at any number of threads",
           {name: wire["kl_divergence"] for name, wire in figures(again).items()}, kl)


def wire_of(folder, *words):
    return json.loads(must(TPENGINE, "bench", folder, "--prompt-tokens", 16, "--gen-tokens", 2, "--json", *words))["wire"]


def test_write(folder):
    old = read_manifest(folder / "model.json")
    expect("bf16 before any advice", wire_of(folder), "bf16")
    must(TPSHARD, "sums", folder, "--quiet")
    code, out, problem = run(TPENGINE, "advise", folder, "--text", TEXT, "--max-tokens", TOKENS, "--write")
    check("advise --write", code == 0 and "advice: s8x" in out, out + problem)
    check("a list of checksums is said to be of another model.json", "run tpshard sums again" in problem, problem)
    new = read_manifest(folder / "model.json")
    measured = new.pop("wires_measured")
    expect("the figures are in model.json", [wire["wire"] for wire in measured["wires"]], ["f32", "bf16", "s8x", "fp8"])
    expect("and of what they are", (measured["tokens"], measured["context"], measured["feedback"]), (TOKENS, 512, True))
    expect("the advice is", (old["wire_advice"], new["wire_advice"]), ("bf16", "s8x"))
    expect("all else is as it was, the contract too", {**new, "wire_advice": "bf16"}, old)
    expect_run("verify", 0, "", TPSHARD, "verify", folder)
    expect_run("inspect shows it", 0, "sums over ranks: s8x is advised; KL divergence over", TPSHARD, "inspect", folder)
    expect("--wire auto obeys", wire_of(folder), "s8x")
    expect("another wire is taken where it is asked for", wire_of(folder, "--wire", "bf16"), "bf16")
    once = (folder / "model.json").read_bytes()
    advise(folder, "--write")
    check("the same advice gives the same file", (folder / "model.json").read_bytes() == once)
    advise(folder, "--write", "--limit", "0")
    expect("advice is taken back", read_manifest(folder / "model.json")["wire_advice"], "f32")


def scale(checkpoint, exponents):
    """Tensors by the end of their names, times powers of two."""
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    (head_bytes,) = struct.unpack_from("<Q", data)
    for name, tensor in json.loads(data[8:8 + head_bytes]).items():
        exponent = next((exponents[end] for end in exponents if name.endswith(end)), 0)
        if not exponent:
            continue
        assert tensor["dtype"] == "BF16"
        begin, end = (8 + head_bytes + at for at in tensor["data_offsets"])
        values = memoryview(data)[begin:end].cast("H")
        for i, value in enumerate(values):
            values[i] = value + exponent * 128 if value & 0x7F80 else 0
        values.release()
    path.write_bytes(data)


def test_fragile(tmp):
    """Sums beyond what the scales of s8x reach."""
    checkpoint, folder = tmp / "large", tmp / "large-2"
    shutil.copytree(MODEL, checkpoint)
    # Embedding and whatever adds to the residual are larger: RMSNorm makes the same model of it, up to its epsilon. The embedding is the head as
    # well, so the last norm takes it back.
    scale(checkpoint, {"o_proj.weight": 22, "down_proj.weight": 22, "embed_tokens.weight": 22, "model.norm.weight": -22})
    must(TPSHARD, "--tp", 2, "--quant", "none", checkpoint, folder, "--quiet")
    report = advise(folder)
    wires = figures(report)
    check("s8x cannot carry them", not wires["s8x"]["finite"] and "kl_divergence" not in wires["s8x"], repr(wires["s8x"]))
    check("bf16 and fp8 can", wires["bf16"]["finite"] and wires["fp8"]["finite"], repr(wires))
    expect("fp8 within a wide limit", advise(folder, "--limit", 1)["advice"], "fp8")
    expect("bf16 within a narrow one", advise(folder, "--limit", wires["fp8"]["kl_divergence"] / 2, "--write")["advice"], "bf16")
    stored = {wire["wire"]: wire for wire in read_manifest(folder / "model.json")["wires_measured"]["wires"]}
    expect("no figures where there are none", set(stored["s8x"]), {"wire"})
    expect_run("inspect says so", 0, "s8x NaN", TPSHARD, "inspect", folder)
    code, out, problem = run(TPENGINE, "eval", folder, "--text", TEXT, "--max-tokens", 100, "--wire", "s8x")
    check("whoever takes s8x all the same is told", code != 0 and "NaN" in problem, f"{code} {out}{problem}")
    scale(checkpoint, {"up_proj.weight": 90, "down_proj.weight": 90})
    shutil.rmtree(folder)
    must(TPSHARD, "--tp", 2, "--quant", "none", checkpoint, folder, "--quiet")
    expect_run("no advice for a model that overflows by itself", 1, "even with sums that lose nothing", TPENGINE, "advise", folder, "--text", TEXT)


def test_refusals(tmp, folder):
    single, short = tmp / "one", tmp / "short.txt"
    must(TPSHARD, "--tp", 1, "--quant", "none", MODEL, single, "--quiet")
    short.write_text("A few words.")
    for name, wanted, words, command in (
            ("no text", 2, "advise needs --text", [folder]),
            ("one rank", 2, "cut for one rank", [single, "--text", TEXT]),
            ("a short text", 2, "too few to judge by", [folder, "--text", short]),
            ("a wire", 2, "advise tries every codec itself", [folder, "--text", TEXT, "--wire", "s8x"]),
            ("a URL to write to", 2, "run it where the directory lies", ["http://127.0.0.1:9/x", "--text", TEXT, "--write"]),
            ("no such text", 5, "nothing.txt", [folder, "--text", tmp / "nothing.txt"]),
            ("a limit below 0", 2, "limit", [folder, "--text", TEXT, "--limit", -1])):
        expect_run(name, wanted, words, TPENGINE, "advise", *command)


def main():
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        folder = tmp / "two"
        must(TPSHARD, "--tp", 2, "--quant", "none", MODEL, folder, "--quiet")
        test_figures(folder)
        test_write(folder)
        test_fragile(tmp)
        test_refusals(tmp, folder)
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

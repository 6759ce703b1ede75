#!/usr/bin/env python3
"""What quantization, tensor parallelism and the wire cost on the bundled model's held-out text.

The reference, tests/golden/model_reference.json, is transformers in float32 on the same windows. Bounds are the project's promises: bf16
shards within 0.1 % of transformers' perplexity, int8 and fp8 at most 1 % above bf16, int4 at most 4 % above, tp 1, 2 and 4 within
0.01 % of each other on a bf16 wire, fp8 and s8x wires at most 0.5 % and 0.1 % above it, caches in fp8, int8 and int4 within 0.3 %, 0.05 % and
1.5 %. The comparison with transformers takes the whole
text, the others its first PART tokens. QUALITY_TOKENS sets both: 0 for the whole text everywhere (the figures in README.md), a small number for slow
builds, which then leave the comparison with transformers out.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL = Path("tests/model")
PART = int(os.environ.get("QUALITY_TOKENS", "4000"))  # 0: all
WHOLE = 0 if PART in (0, 4000) else PART
FEW = min(PART, 500) if PART else 2000  # for what needs two models at a time
failures = 0


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def check(name, ok, detail):
    global failures
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {name}: {detail}", flush=True)


class Shards:
    """Shard directories made on first use, and evaluations of them, each done once."""

    def __init__(self, tmp):
        self.tmp, self.done = tmp, {}

    def dir(self, quant, tp):
        path = self.tmp / f"{quant}-{tp}"
        if not path.exists():
            run(BUILD / "tpshard", "--tp", tp, "--quant", quant, MODEL, path, "--quiet")
        return path

    def eval(self, quant, tp, wire="bf16", against=None, tokens=PART, cache="bf16"):
        key = (quant, tp, wire, against, tokens, cache)
        if key not in self.done:
            words = [BUILD / "tpengine", "eval", self.dir(quant, tp), "--text", MODEL / "heldout.txt", "--context", 512, "--wire", wire, "--kv-cache", cache,
                     "--max-tokens", tokens, "--json", "--quiet"]
            if against:
                words += ["--against", self.dir(*against)]
            self.done[key] = json.loads(run(*words))
        return self.done[key]


def relative(a, b):
    return a["perplexity"] / b["perplexity"] - 1


def main():
    reference = json.loads(Path("tests/golden/model_reference.json").read_text())
    with tempfile.TemporaryDirectory() as tmp:
        shards = Shards(Path(tmp))
        if WHOLE == 0:
            whole = shards.eval("none", 1, tokens=0)
            check("same tokens as the reference", whole["tokens"] == reference["tokens"], f"{whole['tokens']}")
            cost = relative(whole, reference)
            check("bf16 agrees with transformers", abs(cost) <= 0.001,
                  f"perplexity {whole['perplexity']:.4f}, transformers {reference['perplexity']:.4f}, {100 * cost:+.4f} %")
        bf16 = shards.eval("none", 1)
        for tp in (2, 4):
            split = shards.eval("none", tp)
            cost = relative(split, bf16)
            # Rounding on the wire has mean zero: over n tokens it shrinks with their square root. The promise is for 4,000 and more.
            bound = 0.0001 * max(1.0, (4000 / (PART or 4000)) ** 0.5)
            check(f"tp {tp} equals tp 1, bf16 wire", abs(cost) <= bound, f"{100 * cost:+.5f} %, bound {100 * bound:.3f} %")
        for quant, bound in (("int8", 0.01), ("fp8", 0.01), ("int4", 0.04)):
            quantized = shards.eval(quant, 2)
            distance = shards.eval(quant, 2, against=("none", 2), tokens=FEW)
            cost = relative(quantized, bf16)
            check(f"{quant} costs little", cost <= bound,
                  f"perplexity {quantized['perplexity']:.4f}, {100 * cost:+.3f} %, bound {100 * bound:.0f} %; over {FEW} tokens KL "
                  f"{distance['kl_divergence']:.5f}, top-1 {100 * distance['top1_agreement']:.2f} %")
        same = shards.eval("none", 2, against=("none", 2), tokens=FEW)
        check("a model agrees with itself", abs(same["kl_divergence"]) <= 1e-9 and same["top1_agreement"] == 1.0,
              f"KL {same['kl_divergence']:.2e}")
        for wire, bound in (("fp8", 0.005), ("s8x", 0.001)):
            cost = relative(shards.eval("none", 2, wire=wire), shards.eval("none", 2))
            check(f"wire {wire} costs little", cost <= bound, f"{100 * cost:+.4f} %, bound {100 * bound:.1f} %")
        for cache, bound in (("fp8", 0.003), ("int8", 0.0005), ("int4", 0.015)):
            cost = relative(shards.eval("none", 2, cache=cache), shards.eval("none", 2))
            check(f"a cache in {cache} costs little", abs(cost) <= bound, f"{100 * cost:+.4f} %, bound {100 * bound:.2f} %")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

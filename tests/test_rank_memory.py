#!/usr/bin/env python3
"""What a rank on the host takes beside its file: the KV cache, and buffers of at most 64 MiB, however wide a model's rows are; in prefill and
in decode. What a model has no use for is never touched.

RssAnon of the rank processes is looked at while `tpengine bench` runs: what was touched once stays until the end.
"""
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import case_help
from case_help import report

BUILD = Path(os.environ.get("BUILD", "build"))
MIB = 1 << 20
CONTEXT = 320  # longer than a step
PAGE_TOKENS = 64
# A row of the wide model is 0.9 MB: 256 of them, as other models have in a step, would be 230 MB.
WIDE = ["--layers", "1", "--hidden", "64", "--intermediate", "65536", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--vocab", "512"]

# model, quantization, ranks, what a rank may have of its own beside the KV cache. Measured: 4.1, 7.4, 49, 38 MiB.
CASES = (("bundled", "int4", 2, 6 * MIB), ("bundled", "none", 1, 8 * MIB), ("wide", "none", 1, 64 * MIB), ("wide", "int4", 1, 44 * MIB))


def anonymous_bytes(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def without_huge_pages():
    """Where the system makes all memory of them, touching a byte takes 2 MiB."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE, inherited


def measure(shards):
    """Most RssAnon of each rank, and what the bench tells."""
    process = subprocess.Popen([BUILD / "tpengine", "bench", shards, "--backend", "cpu", "--threads", "1", "--prompt-tokens", str(CONTEXT - 64),
                                "--gen-tokens", "64", "--json", "--quiet"], stdout=subprocess.PIPE, text=True,
                               preexec_fn=without_huge_pages)
    most = {}
    while process.poll() is None:
        for pid in children(process.pid):
            most[pid] = max(most.get(pid, 0), anonymous_bytes(pid))
        time.sleep(0.005)
    told = process.stdout.read()
    assert process.returncode == 0, f"{shards}: exit code {process.returncode}"
    return list(most.values()), json.loads(told)


def kv_bytes(shards):
    """Of one rank, bf16; heads that do not divide are held by several ranks."""
    model = json.loads((shards / "config.json").read_text())
    manifest = json.loads((shards / "model.json").read_text())
    heads = -(-model["num_key_value_heads"] // manifest["tp_size"])
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    return model["num_hidden_layers"] * 2 * heads * head_dim * 2 * (-(-CONTEXT // PAGE_TOKENS) * PAGE_TOKENS)


def main():
    if os.environ.get("TEST_QUICK"):  # a sanitizer's memory is none of the ranks'
        print("SKIP slow builds leave this out")
        return 77
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        print("SKIP this kernel does not tell of children")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, "scripts/make_synthetic_checkpoint.py", *WIDE, folder / "wide"], check=True, stdout=subprocess.DEVNULL)
        models = {"bundled": Path("tests/model"), "wide": folder / "wide"}
        for name, quant, ranks, bound in CASES:
            shards = folder / f"{name}-{quant}-{ranks}"
            subprocess.run([BUILD / "tpshard", "--tp", str(ranks), "--quant", quant, "--quiet", models[name], shards], check=True)
            anonymous, figures = measure(shards)
            cache = kv_bytes(shards)
            report(f"{shards.name}: a process for each rank", None if len(anonymous) == ranks else f"{len(anonymous)} were seen")
            for rank_bytes in anonymous:
                said = f"{rank_bytes / MIB:.1f} MiB of its own, at most {bound / MIB:.0f} beside a KV cache of {cache / MIB:.1f}"
                report(f"{shards.name}: memory of a rank", None if MIB < rank_bytes <= cache + bound else said)
            whole = figures["file_bytes"] + ranks * (cache + 64 * MIB)
            report(f"{shards.name}: resident memory", None if figures["rss_bytes"] <= whole else f"{figures['rss_bytes']}, at most {whole}")
    return case_help.status()


sys.exit(main())

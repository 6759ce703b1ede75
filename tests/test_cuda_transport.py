#!/usr/bin/env python3
"""Ranks on emulated devices that add up their sums themselves (--transport host): the same logits, byte for byte, and the same tokens as
over shm, where the CPUs do, with ranks as processes and as threads; which transport is taken, and what is said where it cannot be.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_families import BUILD, GOLDEN, run  # noqa: E402

LIBRARY = BUILD / "tests" / "libtpengine_cuda_emulated.so"
DEVICE = ("--backend", "cuda", "--cuda-library", LIBRARY)
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {name} {'' if ok else detail}", flush=True)


def engine(*words, **environment):
    done = subprocess.run([str(w) for w in (BUILD / "tpengine", *words)], capture_output=True, text=True,
                          env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def logits(shards, ids, out, *more, **environment):
    rc, _, problem = engine("logits", shards, "--token-ids", ",".join(map(str, ids)), "--output", out, "--quiet", *DEVICE,
                            *more, **environment)
    return out.read_bytes() if rc == 0 else f"exit {rc}: {problem.strip()[-300:]}"


# olmo2 norms q and k over all heads: their sums of squares are exchanged too.
def test_logits(tmp):
    for family, tp, more in (("llama3", 2, ()), ("olmo2", 2, ("--ranks", "thread")), ("llama3", 4, ("--wire", "s8x"))):
        ids = json.loads((GOLDEN / family / "golden.json").read_text())["token_ids"]
        shards = tmp / f"{family}-{tp}"
        run(BUILD / "tpshard", "--tp", tp, "--quant", "none", GOLDEN / family, shards, "--quiet")
        by_host = logits(shards, ids, tmp / "host.npy", "--transport", "host", *more)
        by_cpu = logits(shards, ids, tmp / "shm.npy", "--transport", "shm", *more)
        check(f"{family} tp {tp} {' '.join(more)}: host and shm give the same bytes", by_host == by_cpu and by_cpu[:1] != "e",
              by_host if isinstance(by_host, str) else by_cpu if isinstance(by_cpu, str) else "")


# Steps of decoding are kept as graphs with the exchanges in them: the third and later tokens come from one.
def test_tokens(tmp):
    shards = tmp / "model"
    run(BUILD / "tpshard", "--tp", 2, "--quant", "int4", "tests/model", shards, "--quiet")
    words = ("generate", shards, "--prompt", "And the", "--max-tokens", 5, "--seed", 1, "--context", 64, *DEVICE)
    texts = {}
    for transport in ("shm", "host"):
        rc, texts[transport], told = engine(*words, "--transport", transport)
        check(f"generate over {transport}", rc == 0 and len(texts[transport]) > 0, told.strip()[-300:] if rc else "")
        over = "sums of ranks over host" in told
        check(f"{transport}: the devices {'add up' if transport != 'shm' else 'do not add up'}", over == (transport != "shm"), told[-300:])
    check("the same text over host and shm", texts["host"] == texts["shm"], texts)


def test_refusals(tmp):
    shards = tmp / "llama3-2"
    rc, _, told = engine("logits", shards, "--token-ids", "1,2", "--output", tmp / "x.npy", "--backend", "cpu", "--transport", "host")
    check("host on CPUs is refused", rc == 2 and "--transport host: it is for GPUs" in told, (rc, told[-300:]))
    words = ("generate", tmp / "model", "--prompt", "And", "--max-tokens", 1, "--context", 64, *DEVICE)
    rc, _, told = engine(*words, "--transport", "host", EMULATED_LOCKED="1000000")
    check("no memory to pin", rc not in (0, -6) and "pinning" in told and "--transport shm" in told, (rc, told[-300:]))
    rc, _, told = engine(*words, EMULATED_MEMORY="100000000")
    check("memory of sums over ranks is planned and named", rc == 8 and "device 0 (2 ranks) needs" in told and
          "sums over ranks by host 0.03" in told, (rc, told[-300:]))
    rc, _, told = engine(*words)
    check("auto takes host", rc == 0 and "sums of ranks over host" in told, (rc, told[-300:]))
    rc, _, told = engine(*words, EMULATED_LOCKED="1000000")
    check("auto goes on over shm and says why", rc == 0 and "sums of ranks through the CPU: " in told and "pinning" in told, (rc, told[-300:]))


def main():
    if not LIBRARY.exists():
        print("ok the emulated backend is not built here # SKIP")
        return
    with tempfile.TemporaryDirectory() as name:
        for test in (test_logits, test_tokens, test_refusals):
            test(Path(name))
    sys.exit(1 if failures else 0)


main()

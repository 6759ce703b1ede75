#!/usr/bin/env python3
"""Ranks on emulated devices whose sums a library in NCCL's place carries (--transport nccl): the same logits, byte for byte, and the same
text as over shm, with ranks as processes and as threads; what is said where two ranks have one GPU.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from case_help import check, skip, status  # noqa: E402
from test_families import BUILD, GOLDEN, run  # noqa: E402

LIBRARY = BUILD / "tests" / "libtpengine_cuda_emulated.so"
STAND_IN = BUILD / "tests" / "libnccl_stand_in.so"
DEVICE = ("--backend", "cuda", "--cuda-library", LIBRARY)


def engine(place, *words, **environment):
    done = subprocess.run([str(w) for w in (BUILD / "tpengine", *words)], capture_output=True, text=True,
                          env={**os.environ, "LD_LIBRARY_PATH": str(place), "EMULATED_DEVICES": "4", **environment})
    return done.returncode, done.stdout, done.stderr


def logits(place, shards, ids, out, *more, **environment):
    code, _, told = engine(place, "logits", shards, "--token-ids", ",".join(map(str, ids)), "--output", out, "--quiet", *DEVICE, *more,
                           **environment)
    return out.read_bytes() if code == 0 else f"exit {code}: {told.strip()[-300:]}"


# olmo2 norms q and k over all heads: their sums of squares are exchanged too.
def test_logits(place, tmp):
    for family, tp, more in (("llama3", 2, ()), ("olmo2", 2, ("--ranks", "thread")), ("llama3", 4, ("--wire", "s8x"))):
        ids = json.loads((GOLDEN / family / "golden.json").read_text())["token_ids"]
        shards = tmp / f"{family}-{tp}"
        run(BUILD / "tpshard", "--tp", tp, "--quant", "none", GOLDEN / family, shards, "--quiet")
        over = {name: logits(place, shards, ids, tmp / f"{name}.npy", "--transport", name, *more) for name in ("nccl", "shm")}
        check(f"{family} tp {tp} {' '.join(more)}: nccl and shm give the same bytes",
              over["nccl"] == over["shm"] and isinstance(over["shm"], bytes), {k: v[:300] for k, v in over.items()})


# Each sum is two messages: of both blocks of two layers and of the embedding, and in halves twice those of the blocks.
def test_halves(place, tmp):
    shards, ids, told = tmp / "llama3-2", [i * 7 % 50 for i in range(256)], tmp / "told"
    results = {}
    for words, count in (("shm", "on"), 0), (("nccl", "on"), 2 * (2 * 4 + 1)), (("nccl", "off"), 2 * (4 + 1)):
        told.unlink(missing_ok=True)
        results[words] = logits(place, shards, ids, tmp / "halves.npy", "--transport", words[0], "--overlap", words[1], "--context", 256,
                                "--wire", "s8x", STAND_IN_TOLD=str(told))
        lines = sorted(told.read_text().splitlines()) if told.exists() else []
        check(f"{words[0]}, --overlap {words[1]}: NCCL has carried {count} messages of each rank",
              lines == [f"rank {r}: {count} messages" for r in range(2) if count], lines)
    check("nccl and shm give the same bytes in halves", results["shm", "on"] == results["nccl", "on"] and isinstance(results["shm", "on"], bytes),
          {k: v[:300] for k, v in results.items()})


# Dealt out, a sum is two exchanges of one message each, and behind the last block the last sum and the residual are gathered: NCCL carries all of them.
def test_dealt(place, tmp):
    shards, ids, told = tmp / "llama3-2", [i * 7 % 50 for i in range(256)], tmp / "told"
    for overlap, count in (("off", 1 + 2 * 4 + 2), ("on", 1 + 2 * 2 * 4 + 2)):
        results = {}
        for name, carried in ("shm", 0), ("nccl", count):
            told.unlink(missing_ok=True)
            results[name] = logits(place, shards, ids, tmp / "dealt.npy", "--transport", name, "--overlap", overlap, "--context", 256,
                                   "--wire", "s8x", "--sequence-parallel", "on", STAND_IN_TOLD=str(told))
            lines = sorted(told.read_text().splitlines()) if told.exists() else []
            check(f"{name}, dealt out, --overlap {overlap}: NCCL has carried {carried} messages of each rank",
                  lines == [f"rank {r}: {carried} messages" for r in range(2) if carried], lines)
        check(f"nccl and shm give the same bytes, dealt out, --overlap {overlap}", results["shm"] == results["nccl"] and isinstance(results["shm"], bytes),
              {k: v[:300] for k, v in results.items()})


def test_text(place, tmp):
    shards = tmp / "model"
    run(BUILD / "tpshard", "--tp", 2, "--quant", "int4", "tests/model", shards, "--quiet")
    words = ("generate", shards, "--prompt", "And the", "--max-tokens", 3, "--seed", 1, "--context", 64, *DEVICE)
    texts = {}
    for transport in ("shm", "nccl"):
        code, texts[transport], told = engine(place, *words, "--transport", transport, EMULATED_DRIVER="12080")
        check(f"generate over {transport}", code == 0 and texts[transport], told.strip()[-300:])
        over = "sums of ranks over nccl, NCCL 2.28.9; NCCL_CUMEM_HOST_ENABLE=0 set" in told
        check(f"{transport}: {'the version and what was set are told' if transport == 'nccl' else 'no word of NCCL'}",
              over == (transport == "nccl"), told[-400:])
    check("the same text over nccl and shm", texts["nccl"] == texts["shm"], texts)
    code, _, told = engine(place, *words, "--transport", "nccl", EMULATED_DEVICES="1")
    check("two ranks on one GPU", code == 6 and "ranks 0 and 1 have the same GPU" in told and "--transport host" in told, told[-300:])


# A rank that is killed in the middle of a text: the others leave their waits for the device and end.
def test_a_killed_rank(place, tmp):
    words = ("generate", tmp / "model", "--prompt", "And the", "--max-tokens", 400, "--seed", 1, "--transport", "nccl", *DEVICE)
    env = {**os.environ, "LD_LIBRARY_PATH": str(place), "EMULATED_DEVICES": "4"}
    with subprocess.Popen([str(w) for w in (BUILD / "tpengine", *words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=env) as parent:
        text = parent.stdout.read(1)  # the ranks are at work
        ranks = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        check("two ranks are at work", len(ranks) == 2 and text != "", (ranks, text))
        os.kill(ranks[1], signal.SIGKILL)
        try:
            _, told = parent.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            parent.kill()
            _, told = parent.communicate()
            told = "it did not end within 60 s: " + told
    check("a killed rank ends all ranks", parent.returncode == 7 and "rank 1" in told, (parent.returncode, told[-300:]))
    check("no rank is left", not any(Path(f"/proc/{pid}").exists() for pid in ranks), ranks)


def main():
    if not LIBRARY.exists() or not STAND_IN.exists():
        skip("ranks over NCCL", "the emulated backend is not built here")
        return 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "library"
        place.mkdir()
        (place / "libnccl.so.2").symlink_to(STAND_IN.resolve())
        test_logits(place, Path(name))
        test_halves(place, Path(name))
        test_dealt(place, Path(name))
        test_text(place, Path(name))
        test_a_killed_rank(place, Path(name))
    return status()


sys.exit(main())

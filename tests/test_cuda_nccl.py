#!/usr/bin/env python3
"""Ranks on emulated devices whose sums a library in NCCL's place carries (--transport nccl): the same logits, byte for byte, and the same
text as over shm, with ranks as processes and as threads; what is said where two ranks have one GPU.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from case_help import check, skip, status  # noqa: E402
from test_families import BUILD, GOLDEN, run  # noqa: E402
from two_hosts_help import ADDRESSES, make_hosts, on_host, remove_hosts  # noqa: E402

LIBRARY = BUILD / "tests" / "libtpengine_cuda_emulated.so"
STAND_IN = BUILD / "tests" / "libnccl_stand_in.so"
CORRUPT, ENDLESS = 8, 9  # of enum stand_in_fault
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


# A message that not even an abort ends: the device is left as it is, and the rank ends nevertheless, by itself.
def test_an_endless_message(place, tmp):
    begin_s, limit_s = time.monotonic(), 40
    env = {**os.environ, "LD_LIBRARY_PATH": str(place), "EMULATED_DEVICES": "4", "STAND_IN_FAULT": f"{ENDLESS}:1:4"}
    env["ASAN_OPTIONS"] = env.get("ASAN_OPTIONS", "") + ":detect_leaks=0"  # what such a message may still write to stays where it is
    words = ("generate", tmp / "model", "--prompt", "And the", "--max-tokens", 3, "--seed", 1, "--timeout", 1, "--ranks", "thread", "--transport", "nccl", *DEVICE)
    with subprocess.Popen([str(w) for w in (BUILD / "tpengine", *words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as parent:
        try:
            _, told = parent.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            parent.kill()
            _, told = parent.communicate()
            told = f"it did not end within {limit_s} s: {told}"
    check("a message that does not end: all ranks end, and say where", parent.returncode == 7 and "did not finish all_reduce of layer" in told and "within 1.0 s" in told,
          (parent.returncode, round(time.monotonic() - begin_s, 1), told[-400:]))
    check("nobody had to be killed", "kill" not in told and "signal" not in told, told[-400:])


# A link that changes a bit of parts (an even message) or of sums (an odd one): with --check-sums it is found where it happens, in the steps that are
# checked. The checks change no bit.
def test_checked_sums(place, tmp):
    shards, ids = tmp / "llama3-4", [i * 7 % 50 for i in range(40)]
    words = ("--transport", "nccl", "--wire", "s8x", "--context", 64)
    want = logits(place, shards, ids, tmp / "want.npy", *words)
    check("checked sums are the same bytes", logits(place, shards, ids, tmp / "got.npy", *words, "--check-sums", 1) == want and isinstance(want, bytes),
          want[:300])
    for rank, message, where in ((2, 0, "the embedding"), (1, 4, "layer 0 (mlp)"), (0, 7, "layer 1 (attention)")):
        got = logits(place, shards, ids, tmp / "got.npy", *words, "--check-sums", 1, STAND_IN_FAULT=f"{CORRUPT}:{rank}:{message}")
        check(f"a bit of message {message} is changed: {where} is named", isinstance(got, str) and f"the devices' sum of {where} over nccl" in got and "exit 6" in got,
              got[:400])
    dealt = (*words, "--sequence-parallel", "on")
    want_dealt = logits(place, shards, ids, tmp / "want.npy", *dealt)
    check("checked halves of sums are the same bytes", logits(place, shards, ids, tmp / "got.npy", *dealt, "--check-sums", 1) == want_dealt and isinstance(want_dealt, bytes),
          want_dealt[:300])
    for rank, message, what in (2, 0, "the devices' sum of the embedding"), (1, 3, "the rows that the devices have from others for layer 0 (mlp)"), \
            (0, 4, "the devices' sum of layer 0 (mlp)"):
        got = logits(place, shards, ids, tmp / "got.npy", *dealt, "--check-sums", 1, STAND_IN_FAULT=f"{CORRUPT}:{rank}:{message}")
        check(f"dealt out, a bit of message {message} is changed: {what}", isinstance(got, str) and f"{what} over nccl" in got and "exit 6" in got, got[:400])
    got = logits(place, shards, ids, tmp / "got.npy", *words, STAND_IN_FAULT=f"{CORRUPT}:1:4")
    check("which nobody sees without it", isinstance(got, bytes) and got != want, got[:300])
    words = ("generate", tmp / "model", "--prompt", "And the", "--max-tokens", 5, "--seed", 1, "--context", 64, "--ignore-eos", "--transport", "nccl", *DEVICE)
    texts = {n: engine(place, *words, "--check-sums", n) for n in (0, 3)}
    check("text with every third step checked", texts[0][1] == texts[3][1] and texts[3][0] == 0, texts)
    code, _, told = engine(place, "generate", tmp / "model", "--prompt", "And", "--max-tokens", 1, "--backend", "cpu", "--check-sums", 1)
    check("CPU ranks have nothing to check", code == 2 and "--check-sums" in told, (code, told[-300:]))


# Two hosts with one device each, of the same address: network namespaces where this user may make them, else two names that NCCL is given. A launcher's
# variables bring the ranks together.
def test_two_hosts(place, tmp):
    ids = [i * 7 % 50 for i in range(20)]
    want = logits(place, tmp / "llama3-2", ids, tmp / "want.npy", "--transport", "shm", "--context", 64)
    why_not = make_hosts()

    def ranks(apart):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1" if why_not else ADDRESSES[0], "MASTER_PORT": str(port), "LOCAL_RANK": "0",
               "LOCAL_WORLD_SIZE": "1", "TPENGINE_RANK_TOKEN": "a secret of this test", "LD_LIBRARY_PATH": str(place), "EMULATED_DEVICES": "1"}
        out = tmp / "hosts.npy"
        out.unlink(missing_ok=True)
        words = (BUILD / "tpengine", "logits", tmp / "llama3-2", "--token-ids", ",".join(map(str, ids)), "--output", out, "--quiet", "--context", 64,
                 "--transport", "nccl", *DEVICE)
        running = []
        for rank in range(2):
            host = rank if apart else 0
            name = {"NCCL_HOSTID": "ab"[host]} if why_not else {}
            running.append(subprocess.Popen(([] if why_not else on_host(host)) + [str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                            text=True, env={**env, "RANK": str(rank), **name}))
        ended = []
        for rank in running:
            try:
                ended.append((rank.communicate(timeout=60)[1][-300:], rank.returncode))
            except subprocess.TimeoutExpired:
                rank.kill()
                ended.append((rank.communicate()[1][-300:], "not done in 60 s"))
        return out.read_bytes() if out.exists() else b"", ended

    try:
        got, ended = ranks(True)
        check(f"two hosts ({'by name: no namespaces here' if why_not else 'namespaces'}) with one device each: the bytes of shm",
              got == want and [code for _, code in ended] == [0, 0], ended)
        got, ended = ranks(False)
        check("one host: refused on both", all(code == 6 and "the same GPU" in told for told, code in ended), ended)
    finally:
        if not why_not:
            remove_hosts()


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
        test_an_endless_message(place, Path(name))
        test_checked_sums(place, Path(name))
        test_two_hosts(place, Path(name))
    return status()


sys.exit(main())

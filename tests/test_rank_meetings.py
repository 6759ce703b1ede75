#!/usr/bin/env python3
"""Ranks that are started each by itself and do not fit: other options, other backends, a number that is there twice or out of the world, one that cannot come at
all. Each ends all of them within seconds, long before the time that they would wait for each other, with one sentence that all of them say.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, check, end_of, free_port, must, report, run, skip, status, wait_until
from two_hosts_help import ADDRESSES, HOSTS, make_hosts, on_host, remove_hosts
from two_hosts_help import run as run_on

BUILD = Path(os.environ.get("BUILD", "build"))
TPENGINE, CUDA = BUILD / "tpengine", BUILD / "tests/libtpengine_cuda_emulated.so"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "SLURM_", "LWS_", "TORCHELASTIC_", "GROUP_RANK", "CUDA_")
ENVIRONMENT = {key: value for key, value in CLEAN.items() if not key.startswith(LAUNCHERS)}
WORDS = ("--prompt", "Once", "--max-tokens", 4, "--threads", 1, "--quiet")
JOIN_S = 30  # for the others to come; nobody waits so long who hears why they do not
LIMIT_S = 60
REPEATS = 2  # of all starts
repeats = 0


def start(rank, port, *words, world=2, place=None, command="generate", usual=WORDS, **environment):
    """As a launcher's variables say it."""
    variables = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return subprocess.Popen([str(word) for word in (TPENGINE, command, place or models["two"], *usual, *words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            stdin=subprocess.DEVNULL, env={**ENVIRONMENT, **variables})


def refused(name, code, words, *ranks):
    """Each process ends with this status and says the words. ranks: arguments of start. Who fails tells the others within some seconds; on a machine that is so
    busy that one of them begins later, they are started once more; a word that is lost now and then makes that happen too often."""
    global repeats
    for turn in range(3):
        repeats += turn > 0
        port, begin = free_port(), time.monotonic()
        results = [end_of(process) for process in [start(rank, port, "--join-timeout", JOIN_S, *more, **options) for rank, more, options in ranks]]
        seconds = time.monotonic() - begin
        if seconds < JOIN_S:
            break
    said_by(name, code, words, results, seconds)


def said_by(name, code, words, results, seconds=0.0):
    wrong = [result for result in results if result[0] != code or result[1] or any(word not in result[2] for word in words)]
    report(name, f"{seconds:.1f} s: {results}" if wrong or seconds >= JOIN_S else None)


def on(host, *words):
    return run_on("ip", "netns", "exec", HOSTS[host], *words, check=False)


def test_options():
    for name, words, said in (("wire", (("--wire", "s8x"), ()), "--wire s8x, rank 1 with --wire "),
                              ("KV cache", ((), ("--kv-cache", "fp8")), "--kv-cache bf16, rank 1 with --kv-cache fp8"),
                              ("rows dealt out", (("--sequence-parallel", "on"), ()), "--sequence-parallel on, rank 1 with --sequence-parallel off"),
                              ("verification", ((), ("--verify", "off")), "--verify full, rank 1 with --verify off"),
                              ("context", (("--context", 64), ("--context", 128)), "--context 64, rank 1 with --context 128"),
                              ("context of rank 0", (("--context", 64), ()), "--context 64, rank 1 with --context (the default)")):
        refused(f"another {name} is refused with both values", 2, ("rank 0 was started with", said), *[(rank, words[rank], {}) for rank in range(2)])
    port = free_port()
    results = [end_of(process) for process in [start(rank, port, *(("--threads", 2, "--load", "read") if rank else ("--wire", "bf16", "--transport", "tcp"))) for rank in range(2)]]
    check("threads and ways of loading need not agree, nor a default that is said", [r[0] for r in results] == [0, 0] and results[0][1], results)
    # A command's own choices are rank 0's alone.
    port, text = free_port(), work / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 20)
    words = ("--text", text, "--threads", 1, "--json", "--quiet")
    results = [end_of(process) for process in [start(rank, port, command="advise", usual=words) for rank in range(2)]]
    check("advise, which tries every codec, runs over processes", [r[0] for r in results] == [0, 0] and '"' in results[0][1], results)


def test_mpirun():
    if not shutil.which("mpirun") or not (BUILD / "libtpengine_mpi.so").exists():
        skip("mpirun with two transports", "Open MPI or its headers are not installed")
        return
    mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    ranks = [[TPENGINE, "generate", models["two"], *WORDS, "--transport", transport] for transport in ("mpi", "tcp")]
    begin = time.monotonic()
    code, out, problem = run(*mpirun, "-np", 1, *ranks[0], ":", "-np", 1, *ranks[1], env=ENVIRONMENT, timeout=LIMIT_S)
    check("mpirun with two transports is refused with both", code != 0 and not out and "--transport mpi, rank 1 with --transport tcp" in problem,
          f"{time.monotonic() - begin:.1f} s, exit status {code}: {problem[-800:]}")


def test_backends():
    if not CUDA.exists():
        skip("devices beside processors", "the emulated backend is not built")
        return
    cuda = ("--backend", "cuda", "--cuda-library", CUDA, "--context", 64)
    for devices in range(2):
        words = [cuda if rank == devices else ("--backend", "cpu", "--context", 64) for rank in range(2)]
        refused(f"rank {devices} computes on a device, the other one does not", 2, (f"rank {devices} ", "with cuda", "and their sums differ: start all ranks with --backend cuda, or"),
                *[(rank, words[rank], {"EMULATED_DEVICES": "2"}) for rank in range(2)])


def sockets(port, state):
    """Sockets of this machine at a local port, in a state as /proc says it."""
    rows = [row.split() for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists() for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(row[3] == state and int(row[1].split(":")[1], 16) == port for row in rows)


def listens(port):
    return sockets(port, "0A")


def joins(port):
    """A rank has a connection, which it has used."""
    return sockets(port, "01") and not time.sleep(0.5)


def test_numbers():
    refused("rank 0 twice", 7, ("rank 0 has come twice",), (0, (), {}), (0, (), {}))
    for wrong in 5, 1000:
        refused(f"rank {wrong} of 2", 2, (f"says rank {wrong} of 2: ranks are numbered from 0",), (0, (), {}), (wrong, (), {}))
    cut = ("cut for 2 ranks", "has started 3")
    refused("rank 1 alone is told of another world", 2, cut, (0, (), {}), (1, (), {"world": 3}))
    refused("rank 0 alone is told of another world", 2, cut, (0, (), {"world": 3}), (1, (), {}))
    refused("rank 1 is told that it is alone", 2, ("rank 1 of 1",), (0, (), {}), (1, (), {"world": 1}))


def test_two_hosts():
    why = make_hosts()
    if why:
        skip("rank 0 on two hosts", why)
        return
    try:
        token = work / "token"
        token.write_text(os.urandom(16).hex())

        def rank_0(host, *words):
            return subprocess.Popen([*on_host(host), *map(str, (TPENGINE, "generate", models["two"], *WORDS, "--rank", 0, "--world-size", 2, "--master", f"{ADDRESSES[0]}:29555",
                                                               "--token-file", token, *words))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                    stdin=subprocess.DEVNULL, env=ENVIRONMENT)

        said = f"{ADDRESSES[0]}, where they look for rank 0, is no address of this host"
        said_by("rank 0 where nobody looks for it", 7, ("rank 1 of 2 did not come within 1.0 s", said), [end_of(rank_0(1, "--join-timeout", 1))])
        first = rank_0(0)
        listens = wait_until(lambda: "29555" in on(0, "ss", "-Hltn").stdout, 30, 0.05) if shutil.which("ss") else time.sleep(3)
        said_by("rank 0 twice, on two hosts", 7, ("rank 0 has come twice",), [end_of(process) for process in [first, rank_0(1)]])
        check("the first one had listened", listens is not False)
    finally:
        remove_hosts()


def test_signals():
    """A server that waits for the other ranks has nothing to drain: a signal ends it at once, and those that have come hear of it."""
    for joined in range(2):
        port = free_port()
        server = start(0, port, "--join-timeout", JOIN_S, "--port", free_port(), command="serve", usual=("--threads", 1), world=2 + joined, place=models["three"] if joined else None)
        other = start(1, port, "--join-timeout", JOIN_S, world=3, place=models["three"]) if joined else None
        wait_until(lambda: joins(port) if joined else listens(port), 30, 0.05)
        begin = time.monotonic()
        server.send_signal(signal.SIGINT if joined else signal.SIGTERM)
        results = [end_of(process) for process in (server, other) if process]
        seconds, heard = time.monotonic() - begin, not joined or (results[1][0] == 7 and "has ended while rank 1 waited" in results[1][2])
        check(f"a server that waits for ranks ends at a signal, {joined} of them joined", results[0][0] == (130 if joined else 143) and heard and seconds < JOIN_S / 2, f"{seconds:.1f} s: {results}")


def test_restart():
    port, http_port = free_port(), free_port()
    processes = [start(rank, port, "--port", http_port, "--restart", command="serve", usual=("--threads", 1)) for rank in range(2)]
    lines = []
    while (line := processes[0].stderr.readline()) and '"ready"' not in line and "ready" not in line.split():
        lines.append(line)
    processes[0].send_signal(signal.SIGTERM)
    results = [end_of(process) for process in processes]
    check("serve among started ranks says that it does not restart them", "--restart is not used" in "".join(lines) + results[0][2] and [r[0] for r in results] == [0, 0], f"{lines} {results}")


def test_name_of_rank_0():
    token = work / "secret"
    token.write_text(os.urandom(16).hex())
    code, out, problem = end_of(start(0, free_port(), "--join-timeout", 1, "--token-file", token, MASTER_ADDR="no-such-host.invalid"))
    check("rank 0 that cannot look up its own name says so", code == 7 and "rank 0 cannot look up rank 0's host no-such-host.invalid" in problem, problem)


def test_ranks_that_cannot_come():
    begin = time.monotonic()
    code, out, problem = end_of(start(1, free_port(), "--join-timeout", 1, place=work / "missing"))
    seconds = time.monotonic() - begin
    check("a rank that cannot come tries to say so for --join-timeout at most", code == 5 and str(work / "missing") in problem and problem.count("tpengine: ") == 1 and seconds < 4, f"{seconds:.1f} s: {problem}")
    missing = work / "missing"
    for rank in range(2):
        refused(f"rank {rank} has no model", 5, (str(missing),), *[(r, (), {"place": missing if r == rank else None}) for r in range(2)])
    for rank in range(2):
        refused(f"rank {rank} has an option that is not there", 2, ("generate has no option --bogus",), *[(r, ("--bogus", 1) if r == rank else (), {}) for r in range(2)])
        refused(f"rank {rank} has a variable that is no number", 2, ("TPENGINE_TIMEOUT",), *[(r, (), {"TPENGINE_TIMEOUT": "abc"} if r == rank else {}) for r in range(2)])
    refused("rank 0's command does not begin", 2, ("logits needs --token-ids",), *[(r, (), {"command": "logits", "usual": ("--quiet",)}) for r in range(2)])


work = Path(tempfile.mkdtemp(prefix="meetings_"))
try:
    models = {"two": work / "two", "three": work / "three"}
    for ranks, name in enumerate(models, 2):
        must(BUILD / "tpshard", "--quiet", "--tp", ranks, "--quant", "int4", "tests/model", models[name])
    for case in (test_options, test_mpirun, test_backends, test_numbers, test_two_hosts, test_signals, test_restart, test_name_of_rank_0, test_ranks_that_cannot_come):
        if len(sys.argv) < 2 or case.__name__ in sys.argv[1:]:
            case()
    check(f"at most {REPEATS} starts were repeated", repeats <= REPEATS, f"{repeats} were")
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(status())

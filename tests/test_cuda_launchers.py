#!/usr/bin/env python3
"""Ranks that a launcher starts, whose devices exchange among themselves where the ranks are on one host: the same text, and logits byte for byte, as ranks that tpengine
starts itself, over p2p where every link was seen to work, else over host, else through the CPUs and their sockets, with one sentence that says why. Ranks on
hosts that this test makes itself (by name alone), that are shown devices of their own, that mpirun starts, that are killed. On emulated devices.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, check, end_of, free_port, must, run, skip, status

BUILD = Path(os.environ.get("BUILD", "build"))
TPENGINE, LIBRARY = BUILD / "tpengine", BUILD / "tests/libtpengine_cuda_emulated.so"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "SLURM_", "LWS_", "TORCHELASTIC_", "GROUP_RANK", "CUDA_")
ENVIRONMENT = {key: value for key, value in CLEAN.items() if not key.startswith(LAUNCHERS)}
IDS = ",".join(str(7 * i % 50) for i in range(40))
LIMIT_S = 120  # of anything that hangs
MIRROR = "not over p2p: what device 1 writes does not arrive in the memory of device 0"


def engine(command, model, *words):
    asked = ("--token-ids", IDS) if command == "logits" else ("--prompt", "And the", "--max-tokens", 2, "--temperature", 0.9, "--seed", 1)
    return [str(w) for w in (TPENGINE, command, model, *asked, "--context", 64, "--threads", 1, "--backend", "cuda", "--cuda-library", LIBRARY, *words)]


def by_itself(command, model, *words, **environment):
    with tempfile.NamedTemporaryFile() as out:
        to = ("--output", out.name) if command == "logits" else ()
        code, text, problem = run(*engine(command, model, *to, *words), env={**ENVIRONMENT, "EMULATED_DEVICES": "2", **environment})
        return problem if code else Path(out.name).read_bytes() if to else text


def start(command, model, rank, world, master, words, environment, before=()):
    words = [*before, *engine(command, model, "--rank", rank, "--world-size", world, "--master", master, *words)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env={**ENVIRONMENT, "EMULATED_DEVICES": "2", **environment})


def spread(command, model, *words, world=2, of_rank=lambda rank: {}, before=lambda rank: (), **environment):
    """Exit status of each rank's process, what it said, and rank 0's result."""
    with tempfile.NamedTemporaryFile() as out:
        to = ("--output", out.name) if command == "logits" else ()
        master = f"127.0.0.1:{free_port()}"
        processes = [start(command, model, rank, world, master, (*to, *words), {**environment, **of_rank(rank)}, before(rank)) for rank in range(world)]
        results = [end_of(process) for process in processes]
        return [code for code, _, _ in results], [text for _, _, text in results], Path(out.name).read_bytes() if to else results[0][1]


SEE_ALL = "; for p2p, show each rank all GPUs of the host (Slurm: --gpus-per-node, not --gpus-per-task)"

# name, words, environment, of rank 1 alone, transport that is taken, what is said
CASES = (("auto", (), {}, {}, "p2p", None),
         ("threads of their processes", ("--ranks", "thread", "--wire", "s8x"), {}, {}, "p2p", None),
         ("a link that lies", (), {"EMULATED_PEERS": "1>0:mirror"}, {}, "host", MIRROR),
         ("devices that each rank is shown alone", (), {"EMULATED_DEVICES": "1", "LOCAL_RANK": "1"}, {"EMULATED_FIRST": "1"}, "host",
          "not over p2p: the device of rank 1 (0000:02:00.0) is not shown to rank 0, which was to try its links" + SEE_ALL),
         ("devices that each rank names for itself, and no memory to pin", (), {"CUDA_VISIBLE_DEVICES": "0", "EMULATED_LOCKED": "1000000"}, {"CUDA_VISIBLE_DEVICES": "1"}, "tcp",
          "not over p2p: ranks 0 and 1 are shown devices of their own (CUDA_VISIBLE_DEVICES), between which no rank can try the links" + SEE_ALL + "; sums of ranks through the CPU: "))


def test_one_host(models):
    text = {}
    for name, words, environment, other, transport, said in CASES:
        wire = words[2:] if "--wire" in words else ()
        if wire not in text:
            text[wire] = by_itself("generate", models["text"], "--transport", "shm", *wire)
        codes, told, got = spread("generate", models["text"], *words, of_rank=lambda rank: other if rank else {}, **environment)
        devices = "sums of ranks over" in told[0] if transport == "tcp" else f"sums of ranks over {transport}" not in told[0]
        ok = codes == [0, 0] and got == text[wire] and f"wire over {transport}" in told[0] and not devices
        check(f"{name}: {transport}", ok and (said in told[0] if said else "not over" not in told[0]), f"{codes} {got} {text[wire]} {told}")


def test_logits(models):
    wanted = by_itself("logits", models["stages"], "--wire", "fp8", "--transport", "shm", EMULATED_DEVICES="4")
    codes, told, got = spread("logits", models["stages"], "--wire", "fp8", "--transport", "p2p", world=4, EMULATED_DEVICES="4")
    check("two stages of two ranks: the same logits", codes == [0] * 4 and got == wanted, f"{codes} {told} {wanted if isinstance(wanted, str) else ''}")


def test_refusals(models):
    codes, told, _ = spread("generate", models["text"], "--transport", "p2p", EMULATED_PEERS="1>0:mirror")
    check("--transport p2p over a link that lies is refused on both ranks", codes == [6, 6] and all(MIRROR[14:] in text and "--transport host does without" in text for text in told), (codes, told))
    code, _, problem = run(*engine("generate", models["text"], "--transport", "shm"), env={**ENVIRONMENT, **launched(0, 1)})
    check("--transport shm between ranks of a launcher is refused", code == 2 and "share no memory" in problem, problem)


def launched(rank, port):
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


# Each counts one rank, as if the other were on another host.
def test_two_launchers(models):
    text, port = by_itself("generate", models["text"], "--transport", "shm"), free_port()
    for transport in "auto", "host":
        processes = [subprocess.Popen(engine("generate", models["text"], "--transport", transport), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
                                      env={**ENVIRONMENT, **launched(rank, port)}) for rank in range(2)]
        results = [end_of(process) for process in processes]
        check(f"two launchers of one host: --transport {transport}", all(code == 0 for code, _, _ in results) and results[0][1] == text and
              f"wire over {'p2p' if transport == 'auto' else transport}" in results[0][2] and "several hosts" not in results[0][2], results)


# Stages of one rank hand rows over by the processors, whatever is asked for.
def test_stages_of_one(models):
    text = by_itself("generate", models["alone"])
    for transport in "p2p", "host":
        codes, told, got = spread("generate", models["alone"], "--transport", transport)
        check(f"stages of one rank, --transport {transport}: over sockets", codes == [0, 0] and got == text and "wire over tcp" in told[0] and "sums of ranks" not in told[0], (codes, got, told))
    code, out, told = run(*engine("generate", models["alone"], "--transport", "p2p"), env={**ENVIRONMENT, "EMULATED_DEVICES": "2"})
    check("stages of one rank that tpengine starts: over shared memory", code == 0 and out == text and "wire over shm" in told, (code, out, told))


# Hosts that differ by their names alone, as containers do.
def test_two_hosts(models):
    other = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh")
    if run(*other, "true")[0] != 0:
        skip("ranks on two hosts", "this user may not name a host (unshare --uts)")
        return
    text = by_itself("generate", models["text"], "--transport", "shm")
    codes, told, got = spread("generate", models["text"], before=lambda rank: other if rank else ())
    check("two hosts: auto goes over sockets and says why", codes == [0, 0] and got == text and "wire over tcp" in told[0] and
          "sums of ranks through the CPU: ranks 0 and 1 are on " in told[0] and "elsewhere, whose devices share no memory; --transport nccl is for those" in told[0], (codes, told))
    codes, told, _ = spread("generate", models["text"], "--transport", "host", before=lambda rank: other if rank else ())
    check("two hosts: --transport host is refused", codes == [2, 2] and all("--transport host: ranks 0 and 1 are on" in text for text in told), (codes, told))


def test_mpirun(models):
    if not shutil.which("mpirun"):
        skip("mpirun", "Open MPI is not installed")
        return
    mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    code, out, told = run(*mpirun, "-np", 2, *engine("generate", models["text"]), env={**ENVIRONMENT, "EMULATED_DEVICES": "2"}, timeout=LIMIT_S)
    check("mpirun: p2p", code == 0 and out == by_itself("generate", models["text"], "--transport", "shm") and "sums of ranks over p2p" in told, (code, out, told[-800:]))


# Ranks whose kernels wait for one that is gone end, and name it: at once, but emulated kernels keep the thread that would tell them until their own deadline.
def test_lost_rank(models):
    master = f"127.0.0.1:{free_port()}"
    words = ("--max-tokens", 50, "--ignore-eos", "--timeout", 15, "--transport", "host")
    processes = [start("generate", models["text"], rank, 2, master, words, {}) for rank in range(2)]
    try:
        text = processes[0].stdout.read(1)  # the ranks are at work
        child = int(Path(f"/proc/{processes[1].pid}/task/{processes[1].pid}/children").read_text().split()[0])
        os.kill(child, signal.SIGKILL)
        begin = time.monotonic()
        results = [end_of(process) for process in processes]
        took_s = time.monotonic() - begin
        said = ("connection to rank 0", "rank 1 was ended by signal 9")  # who only found that nothing came would say so
        check("a killed rank ends both", text and all(code == 7 and "rank 1 " in told and words in told for (code, _, told), words in zip(results, said)) and took_s < 60, f"{took_s:.1f} s {results}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def main():
    if not LIBRARY.exists():
        skip("ranks of launchers on devices", "the emulated backend is not built")
        sys.exit(status())
    with tempfile.TemporaryDirectory() as name:
        models = {key: Path(name) / key for key in ("stages", "text", "alone")}
        for key, words in (("stages", ("--tp", 2, "--pp", 2, "--quant", "none", "tests/golden/families/llama3")),
                           ("text", ("--tp", 2, "--quant", "int4", "tests/model")),
                           ("alone", ("--pp", 2, "--quant", "int4", "tests/model"))):
            must(BUILD / "tpshard", *words, models[key], "--quiet")
        for test in (test_one_host, test_logits, test_refusals, test_two_launchers, test_stages_of_one, test_two_hosts, test_mpirun, test_lost_rank):
            if len(sys.argv) < 2 or test.__name__ in sys.argv[1:]:
                test(models)
    sys.exit(status())


main()

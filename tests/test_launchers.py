#!/usr/bin/env python3
"""Ranks that other programs start, each in a process of its own: the launchers that are here are really run (mpirun, torchrun, srun), LeaderWorkerSet by its
variables. The same text, tokens and logits as tpengine alone; who does not fit, and who is killed, ends all with a sentence."""
import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import case_help
import venv_help
from case_help import CLEAN, check, end_of, expect, free_port, report, run, skip, wait_until

BUILD = Path(os.environ.get("BUILD", "build"))
TPENGINE = BUILD / "tpengine"
PROMPTS = ["--prompt", "Once", "--prompt", "And God", "--max-tokens", "24", "--draft-tokens", "3", "--threads", "1", "--json", "--quiet"]
# Enough of them for turns of several stages.
MANY = [word for prompt in ("Once", "And God", "In", "Blessed are they", "The words") * 4 for word in ("--prompt", prompt)] + PROMPTS[4:]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "SLURM_", "LWS_", "TORCHELASTIC_", "GROUP_RANK")
ENVIRONMENT = {key: value for key, value in CLEAN.items() if not key.startswith(LAUNCHERS)}
LIMIT_S = 120  # of anything that hangs


def start(rank, world, master, *words, environment=None, place=None, command="generate"):
    """A process that is told its rank by options."""
    options = [] if rank is None else ["--rank", rank, "--world-size", world, "--master", master]
    text = [TPENGINE, command, place or models[2], *options, *words]
    return subprocess.Popen([str(word) for word in text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
                            env={**ENVIRONMENT, **(environment or {})})


def master():
    return f"127.0.0.1:{free_port()}"


# ---- launchers ---------------------------------------------------------------------------------------------------

def by_options(tp, *words, command="generate"):
    where = master()
    world = 4 if tp == "stages" else tp
    processes = [start(rank, world, where, *words, place=models[tp], command=command) for rank in reversed(range(world))]
    results = [end_of(process) for process in processes][::-1]
    others = [result[0] for result in results[1:]]
    if any(others) or any(result[1] for result in results[1:]):
        report(f"the other ranks of {command} at tp {tp} end well and print nothing", str(results[1:]))
    return results[0]


def test_options():
    for tp in (2, 4, "stages"):
        expect(f"options, {tp}: the same text", by_options(tp, *PROMPTS), alone[tp])
        files = [work / f"{name}.npy" for name in ("here", "there")]
        case_help.must(TPENGINE, "logits", models[tp], "--token-ids", "5,6,7,8,9", "--output", files[0], "--threads", "1")
        by_options(tp, "--token-ids", "5,6,7,8,9", "--output", files[1], "--threads", "1", command="logits")
        check(f"options, {tp}: the same bits of all logits", files[1].exists() and files[0].read_bytes() == files[1].read_bytes())
    expect("options, stages, many prompts: the text of one stage", by_options("stages", *MANY), run(TPENGINE, "generate", models[2], *MANY, env=ENVIRONMENT))
    expect("ranks as threads of their processes: the same text", by_options(2, *PROMPTS, "--ranks", "thread"), alone[2])


def test_lws():
    port = free_port()
    processes = [start(None, None, None, *PROMPTS, environment={"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": str(rank), "MASTER_PORT": str(port),
                                                                "LWS_LEADER_ADDRESS": "localhost"}) for rank in (1, 0)]
    other, first = [end_of(process) for process in processes]
    expect("LeaderWorkerSet: the same text", first, alone[2])
    expect("LeaderWorkerSet: the other rank ends with it", other, (0, "", ""))


def test_mpirun():
    if not shutil.which("mpirun"):
        skip("mpirun", "Open MPI is not installed")
        return
    mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    for tp in (2, 4):
        got = run(*mpirun, "-np", tp, TPENGINE, "generate", models[tp], *PROMPTS, env=ENVIRONMENT, timeout=LIMIT_S)
        expect(f"mpirun -np {tp}: the same text", got[:2], alone[tp][:2])
    if (BUILD / "libtpengine_mpi.so").exists():
        loud = [word for word in PROMPTS if word != "--quiet"]
        for tp in (2, 4):
            code, out, problem = run(*mpirun, "-np", tp, TPENGINE, "generate", models[tp], *loud, "--transport", "mpi", env=ENVIRONMENT,
                                     timeout=LIMIT_S)
            check(f"mpirun -np {tp}, --transport mpi: the same text", (code, out) == alone[tp][:2] and "over mpi" in problem,
                  f"exit status {code}: {out} {problem[-800:]}")
    else:
        skip("mpirun --transport mpi", "no libtpengine_mpi.so: Open MPI's headers are not installed")
    code, out, problem = run(*mpirun, "-np", "3", TPENGINE, "generate", models[2], *PROMPTS, env=ENVIRONMENT, timeout=LIMIT_S)
    check("mpirun -np 3 of two ranks' shards is refused", code != 0 and not out and "cut for 2 ranks" in problem and "started 3" in problem, problem)
    got = run(*mpirun, "-np", "1", TPENGINE, "generate", models[2], *PROMPTS, env=ENVIRONMENT, timeout=LIMIT_S)
    expect("mpirun -np 1 starts the ranks itself", got[:2], alone[2][:2])


def test_torchrun():
    python, why = venv_help.python_with(["torch"], ["torch"], large=True)
    if not python:
        skip("torchrun", why)
        return
    torchrun = [python, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--no-python"]
    for words in (["--standalone"], ["--master-addr", "127.0.0.1", "--master-port", free_port()]):
        code, out, problem = run(*torchrun, *words, TPENGINE, "generate", models[2], *PROMPTS, env=ENVIRONMENT, timeout=LIMIT_S)
        check(f"torchrun {words[0]}: the same text", (code, out) == alone[2][:2], f"exit status {code}: {out} {problem[-800:]}")


SLURM_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={daemon_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={work}/munge.socket
CredType=cred/munge
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/linear
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def start_slurm(folder, daemons):
    """A cluster of this machine alone, which ends with the test; why there is none, or None."""
    host = os.uname().nodename.split(".")[0]
    ports = free_port(), free_port()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=host, port=ports[0], daemon_port=ports[1], user=getpass.getuser(), work=folder))
    environment = {**ENVIRONMENT, "SLURM_CONF": str(conf)}
    log = open(folder / "daemons.log", "w")

    def daemon(*words):
        daemons.append(subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment))

    daemon("munged", "--foreground", "--force", "--key-file", folder / "munge.key", "--socket", folder / "munge.socket", "--pid-file",
           folder / "munged.pid", "--seed-file", folder / "munge.seed", "--log-file", folder / "munged.log")
    if not wait_until(lambda: (folder / "munge.socket").exists(), 10):
        return "munged does not start: " + (folder / "daemons.log").read_text()[-300:].strip(), environment
    daemon("slurmctld", "-D", "-c", "-f", conf)
    daemon("slurmd", "-D", "-c", "-N", host, "-f", conf)
    if not wait_until(lambda: "idle" in run("sinfo", "--noheader", "--format", "%t", env=environment)[1], 30, 0.3):
        said = run("sinfo", env=environment)
        return f"the node does not come up: {said[1]}{said[2]} {(folder / 'daemons.log').read_text()[-300:]}".replace("\n", " "), environment
    return None, environment


def test_slurm():
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not shutil.which(name)]
    if missing or os.getuid() != 0:
        skip("srun", f"{', '.join(missing)} not installed" if missing else "slurmd wants to be root")
        return
    daemons = []
    with tempfile.TemporaryDirectory(prefix="slurm_") as folder:
        try:
            why, environment = start_slurm(Path(folder), daemons)
            if why:
                skip("srun", why)
                return
            code, out, problem = run("srun", "-n", "2", TPENGINE.absolute(), "generate", models[2], *PROMPTS, env=environment, timeout=LIMIT_S)
            check("srun -n 2: the same text", (code, out) == alone[2][:2], f"exit status {code}: {out} {problem}")
            code, out, problem = run("srun", "-n", "1", TPENGINE.absolute(), "generate", models[2], *PROMPTS, env=environment, timeout=LIMIT_S)
            check("srun -n 1 starts the ranks itself", (code, out) == alone[2][:2], f"exit status {code}: {out} {problem}")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


# ---- who does not fit --------------------------------------------------------------------------------------------

def refused(name, code, words, *processes):
    """Each of the processes ends with this status and these words."""
    results = [end_of(process) for process in processes]
    wrong = [result for result in results if result[0] != code or any(word not in result[2] for word in words) or result[1]]
    report(name, str(wrong) if wrong else None)


def test_refusals():
    where = master()
    refused("another world", 2, ("cut for 2 ranks", "started 3"), *[start(rank, 3, where, *PROMPTS) for rank in range(3)])
    where = master()
    refused("another shard run", 4, ("shards of another run", "contract"), start(0, 2, where, *PROMPTS),
            start(1, 2, where, *PROMPTS, place=models["other"]))
    where = master()
    four = [start(rank, 4, where, *PROMPTS, "--join-timeout", "4", place=models[4]) for rank in (2, 0, 1, 1)]
    refused("a doubled rank", 7, ("rank 1 has come twice",), *four[1:])
    code, _, problem = end_of(four[0])  # may come when the others have gone
    check("a doubled rank ends the others, too", code == 7 and ("has come twice" in problem or "was not reached" in problem), f"{code}: {problem}")
    where = master()
    refused("a missing rank", 7, ("rank 3 of 4 did not come within 2.0 s",),
            *[start(rank, 4, where, *PROMPTS, "--join-timeout", "2" if rank == 0 else "60", place=models[4]) for rank in range(3)])
    where = master()
    tokens = [work / name for name in ("token", "other_token")]
    for token in tokens:
        token.write_text(f"{os.urandom(16).hex()}\n")
    first, other = [start(rank, 2, where, *PROMPTS, "--join-timeout", "2", "--token-file", tokens[rank]) for rank in range(2)]
    refused("a wrong token, said by the rank", 7, ("another token",), other)
    refused("a wrong token, said by rank 0", 7, ("did not come", "has another token"), first)
    where = master()  # the token of the store, which is sent to servers, is another matter
    first, other = [start(rank, 2, where, *PROMPTS, "--join-timeout", "2", environment={"TPENGINE_RANK_TOKEN": f"a secret of rank {rank}", "TPENGINE_TOKEN": "same"})
                    for rank in range(2)]
    refused("other tokens of the environment", 7, ("another token",), other)
    end_of(first)
    where = master()
    both = [start(rank, 2, where, *PROMPTS, environment={"TPENGINE_RANK_TOKEN": "a secret of all ranks", "TPENGINE_TOKEN": f"{rank}"}) for rank in range(2)]
    results = [end_of(process) for process in both]
    check("the same token of the environment", [result[0] for result in results] == [0, 0] and results[0][1] == alone[2][1], str(results))
    code, _, problem = run(TPENGINE, "generate", models[2], *PROMPTS, "--rank", "0", "--world-size", "2", "--master", where,
                           env={**ENVIRONMENT, "TPENGINE_RANK_TOKEN": "short"})
    check("a short token", code == 2 and "16 to" in problem, f"{code}: {problem}")
    expect("several hosts without a token", run(TPENGINE, "generate", models[2], *PROMPTS, "--rank", "0", "--world-size", "2", "--master", "192.0.2.1:5",
                                                env=ENVIRONMENT)[0], 2)
    code, _, problem = run(TPENGINE, "generate", models[2], *PROMPTS, env={**ENVIRONMENT, "RANK": "0"})
    check("a launcher set by halves", code == 2 and "WORLD_SIZE is missing" in problem and "--launcher none" in problem, problem)
    got = run(TPENGINE, "generate", models[2], *PROMPTS, "--launcher", "none", env={**ENVIRONMENT, "RANK": "1", "WORLD_SIZE": "2"})
    expect("--launcher none runs all ranks here", got, alone[2])


def test_unlike_processors():
    """Ranks whose tables have the same sums go together; others are refused with a --backend for all."""
    flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    if "avx2" not in flags:
        skip("ranks of unlike processors", "no AVX2 here: scalar is the only table")
        return
    where = master()
    refused("other sums", 2, ("rank 0 computes with scalar, rank 1 with avx2,", "start all ranks with --backend "),
            *[start(rank, 2, where, *PROMPTS, "--backend", ("scalar", "avx2")[rank]) for rank in range(2)])
    if "avx512_vnni" not in flags:
        skip("ranks with avx512 and avx2", "no AVX-512 VNNI here")
        return
    same = run(TPENGINE, "generate", models[2], *PROMPTS, "--backend", "avx2", env=ENVIRONMENT)
    for tables in (("avx512", "avx2"), ("avx2", "avx512vbmi"))[:2 if "avx512vbmi" in flags else 1]:
        where = master()
        results = [end_of(process) for process in [start(rank, 2, where, *PROMPTS, "--backend", tables[rank]) for rank in range(2)]]
        expect(f"ranks with {' and '.join(tables)}: the same text", results[0], same)
        expect(f"ranks with {' and '.join(tables)}: the other ends with it", results[1], (0, "", ""))


# ---- ends ----------------------------------------------------------------------------------------------------------

def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_one(name, whose, busy, words, how=signal.SIGKILL):
    """Kills or stops a process of two ranks': both end within seconds. whose: (rank, its rank process instead of the parent)."""
    where = master()
    # Idle: a server without requests. Busy: a long text is made.
    work_words = ["--prompt", "Once", "--max-tokens", "900", "--ignore-eos", "--threads", "1"]
    if not busy:
        work_words = ["--port", free_port(), "--log-format", "json", "--threads", "1"]
    processes = [start(rank, 2, where, *work_words, command="generate" if busy else "serve") for rank in range(2)]
    try:
        if busy:
            started = processes[0].stdout.read(8)
        else:
            started = wait_until(lambda: http_ready(work_words[1]), LIMIT_S, 0.05)
        rank, inner = whose
        target = children(processes[rank].pid)[0] if inner else processes[rank].pid
        os.kill(target, how)
        begin = time.monotonic()
        results = [end_of(process) for process in processes]
        seconds = time.monotonic() - begin
        survivors = results if inner else [results[1 - rank]]
        wrong = not started or any(result[0] != 7 or not any(word in result[2] for word in words) for result in survivors)
        report(name, f"{seconds:.1f} s: {results}" if wrong or seconds > 40 else None)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def http_ready(port):
    import http.client
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def test_kills():
    lost_1, lost_0 = ("rank 1",), ("rank 0",)
    kill_one("rank 1's process is killed while it works", (1, True), True, lost_1)
    kill_one("rank 1's parent is killed while it works", (1, False), True, lost_1)
    kill_one("rank 0's process is killed while it works", (0, True), True, lost_0)
    kill_one("rank 0's parent is killed while it works", (0, False), True, lost_0)
    kill_one("rank 1's process is stopped while it works", (1, True), True, lost_1, signal.SIGSTOP)
    kill_one("rank 1's process is killed while a server idles", (1, True), False, lost_1)
    kill_one("rank 0's parent is killed while a server idles", (0, False), False, lost_0)


def test_serve():
    port, where = free_port(), master()
    processes = [start(rank, 2, where, "--port", port, "--threads", "1", command="serve") for rank in range(2)]
    try:
        ready = wait_until(lambda: http_ready(port), LIMIT_S, 0.05)
        processes[1].send_signal(signal.SIGTERM)  # as launchers do to all: rank 0 decides
        time.sleep(0.3)
        processes[0].send_signal(signal.SIGTERM)
        results = [end_of(process) for process in processes]
        report("a server over two processes drains, and both end well", None if ready and [r[0] for r in results] == [0, 0] else str(results))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


work = Path(tempfile.mkdtemp(prefix="launchers_"))
try:
    models = {2: work / "tp2", 4: work / "tp4", "stages": work / "stages", "other": work / "other"}
    for key, words in ((2, ["--tp", "2"]), (4, ["--tp", "4"]), ("stages", ["--tp", "2", "--pp", "2"]), ("other", ["--tp", "2", "--group-size", "64"])):
        case_help.must(BUILD / "tpshard", "convert", *words, "--quant", "int4", "tests/model", models[key])
    alone = {tp: run(TPENGINE, "generate", models[tp], *PROMPTS, env=ENVIRONMENT) for tp in (2, 4, "stages")}
    for case in (test_options, test_lws, test_mpirun, test_torchrun, test_slurm, test_refusals, test_unlike_processors, test_kills, test_serve):
        if len(sys.argv) < 2 or case.__name__ in sys.argv[1:]:
            case()
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(case_help.status())

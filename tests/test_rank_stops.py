#!/usr/bin/env python3
"""Processes that stand still (SIGSTOP, a debugger) while all others wait for them: rank processes, and the processes that were started for them. Beyond --timeout all
end with exit status 7 and a sentence that names who stands still; a shorter stop does no harm. No sentence gives another rank as the reason.
"""
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, check, end_of, free_port, must, report, status, wait_until

BUILD = Path(os.environ.get("BUILD", "build"))
TPENGINE = BUILD / "tpengine"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "SLURM_", "LWS_", "TORCHELASTIC_", "GROUP_RANK")
ENVIRONMENT = {key: value for key, value in CLEAN.items() if not key.startswith(LAUNCHERS)}
QUICK = bool(os.environ.get("TEST_QUICK"))  # slow builds look at less
TALK = ("--prompt", "Once", "--ignore-eos", "--threads", 1, "--quiet")


def start(command, place, rank, world, port, *words):
    where = () if rank is None else ("--rank", rank, "--world-size", world, "--master", f"127.0.0.1:{port}")
    return subprocess.Popen([str(word) for word in (TPENGINE, command, place, *where, *words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            stdin=subprocess.DEVNULL, env=ENVIRONMENT)


def children(pid):
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return []


def kill_all(processes):
    for process in processes:
        if process.poll() is None:
            process.kill()


def ask(port, path, body=None):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status == 200 and answer.read().decode()
    except OSError:
        return None


def talkers(world, place, tokens, *words):
    """Processes of ranks that make a long text, and its beginning."""
    port = free_port()
    processes = [start("generate", place, rank, world, port, *TALK, "--max-tokens", tokens, *words) for rank in range(world)]
    return processes, processes[0].stdout.read(64)


def servers(*words):
    """Processes of a server of two ranks that is ready, and its port."""
    port, http_port = free_port(), free_port()
    processes = [start("serve", models["two"], rank, 2, port, "--port", http_port, "--threads", 1, *words) for rank in range(2)]
    return processes, http_port, wait_until(lambda: ask(http_port, "/health"), 60, 0.05)


def all_end(name, processes, target, words):
    """target is stopped: all end with status 7 and some of these words."""
    try:
        os.kill(target, signal.SIGSTOP)
        begin = time.monotonic()
        results = [end_of(process) for process in processes]
        seconds = time.monotonic() - begin
        wrong = [result for result in results if result[0] != 7 or not any(word in result[2] for word in words)]
        report(name, f"{seconds:.1f} s: {results}" if wrong or seconds > 40 else None)
    finally:
        kill_all(processes)


def test_started_process_of_rank_0():
    said = ("rank 0 gets no work: the process that was started for it (",)
    processes, text = talkers(2, models["two"], 2000, "--timeout", 1)
    all_end("rank 0's started process is stopped while it works", processes, processes[0].pid, said if text else ())
    processes, _, ready = servers("--timeout", 1)
    all_end("rank 0's started process is stopped while a server idles", processes, processes[0].pid, said if ready else ())
    processes, _, ready = servers("--timeout", 1)
    all_end("rank 0's process is stopped while a server idles", processes, children(processes[0].pid)[0], ("rank 0 ",) if ready else ())


def test_short_stop():
    """A server that a debugger stops for a second goes on."""
    processes, port, ready = servers("--timeout", 4)
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
        time.sleep(1)
        answer = ask(port, "/v1/completions", {"model": "two", "prompt": "Once", "max_tokens": 3})
        for process in processes[::-1]:
            process.send_signal(signal.SIGTERM)
        results = [end_of(process) for process in processes]
        check("a short stop of the started processes does no harm", ready and answer and [result[0] for result in results] == [0, 0], f"{ready} {answer} {results}")
    finally:
        kill_all(processes)


def test_started_process_of_rank_1():
    """Nobody waits for it: it only waits for its rank, which goes on."""
    processes, text = talkers(2, models["two"], 300, "--timeout", 1)
    try:
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        first = end_of(processes[0])
        stands = processes[1].poll() is None
        processes[1].send_signal(signal.SIGCONT)
        other = end_of(processes[1])
        check("rank 1's started process is stopped: the work goes on", text and first[0] == 0 and stands and other == (0, "", ""), f"{first} {stands} {other}")
    finally:
        kill_all(processes)


def reasons(problem):
    """Ranks that a sentence gives as the reason why another one did not come."""
    return [int(m.group(1)) for m in re.finditer(r"since it waits for (?:rank \d+, and in the end for )?rank (\d+)", problem)]


def test_sentences():
    """Stages: whichever rank stands still, it is named, and no other one is the reason."""
    place = models["stages"]
    for launched in (False, True):
        wrong, whys = [], 0
        for turn in range(2 if QUICK else 4 if launched else 6):
            rank, tokens = (turn + launched) % 4, 40 + 37 * turn
            words = (*TALK, "--max-tokens", 3000, "--timeout", 1)
            port = free_port()
            processes = [start("generate", place, r if launched else None, 4, port, *words) for r in range(4 if launched else 1)]
            try:
                processes[0].stdout.read(tokens)
                ranks = [children(process.pid)[0] for process in processes] if launched else children(processes[0].pid)
                os.kill(ranks[rank], signal.SIGSTOP)
                results = [end_of(process) for process in processes]
            finally:
                kill_all(processes)
            for code, _, problem in results:
                whys += bool(reasons(problem))
                if code != 7 or f"rank {rank} " not in problem or any(why != rank for why in reasons(problem)):
                    wrong.append((rank, code, problem))
        report(f"stages, {'each rank started by itself' if launched else 'ranks of one start'}: the rank that stands still is the reason ({whys} sentences give one)", wrong or None)


work = Path(tempfile.mkdtemp(prefix="stops_"))
try:
    models = {"two": work / "two", "stages": work / "stages"}
    for key, words in (("two", ()), ("stages", ("--pp", 2))):
        must(BUILD / "tpshard", "--quiet", "--tp", 2, *words, "--quant", "int4", "tests/model", models[key])
    for case in (test_started_process_of_rank_0, test_short_stop, test_started_process_of_rank_1, test_sentences):
        if len(sys.argv) < 2 or case.__name__ in sys.argv[1:]:
            case()
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(status())

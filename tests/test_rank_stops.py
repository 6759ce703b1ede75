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

from case_help import CLEAN, check, end_of, expect, free_port, must, report, status, wait_until

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
    """Processes of a server of two ranks, and its port; none: it has not become ready."""
    port, http_port = free_port(), free_port()
    processes = [start("serve", models["two"], rank, 2, port, "--port", http_port, "--threads", 1, *words) for rank in range(2)]
    return processes, http_port if wait_until(lambda: ask(http_port, "/health"), 60, 0.05) else None


def catch(begin, act):
    """Of the first of ten runs in which `act` was before the end: the processes' results, what begin() gave beside them, seconds since the act."""
    for _ in range(10):
        processes, given = begin()
        try:
            act(processes)
            began = time.monotonic()
            results = [end_of(process, 40) for process in processes]
            if any(result[0] != 0 for result in results):  # None: it hangs
                return results, given, time.monotonic() - began
        except (IndexError, ProcessLookupError):
            pass  # it was done before
        finally:
            kill_all(processes)
    return [(None, "", "ten runs were over before")], None, 0


def all_end(name, begin, find, words):
    """One process of a run is stopped: all end with status 7 and these words."""
    results, ready, seconds = catch(begin, lambda processes: os.kill(find(processes), signal.SIGSTOP))
    wrong = [result for result in results if result[0] != 7 or words not in result[2]]
    report(name, f"{ready} {seconds:.1f} s: {results}" if wrong or not ready or seconds > 40 else None)


def test_started_process_of_rank_0():
    said = "rank 0 gets no work: the process that was started for it ("
    all_end("rank 0's started process is stopped while it works", lambda: talkers(2, models["two"], 2000, "--timeout", 1), lambda processes: processes[0].pid, said)
    all_end("rank 0's started process is stopped while a server idles", lambda: servers("--timeout", 1), lambda processes: processes[0].pid, said)
    all_end("rank 0's process is stopped while a server idles", lambda: servers("--timeout", 1), lambda processes: children(processes[0].pid)[0], "rank 0 ")


def test_start():
    """A rank's process that stands still before it has said anything: --timeout counts, not the longer time that a start may take."""
    def begin():
        processes, port = [], free_port()
        for rank in range(2):
            processes.append(start("generate", models["two"], rank, 2, port, *TALK, "--max-tokens", 500, "--timeout", 1))
        wait_until(lambda: children(processes[1].pid), 60, 0.0005)
        return processes, True

    all_end("rank 1's process is stopped at its start", begin, lambda processes: children(processes[1].pid)[0], "rank 1 ")


def test_short_stop():
    """A server that a debugger stops for a second goes on."""
    processes, port = servers("--timeout", 4)
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
        check("a short stop of the started processes does no harm", answer and [result[0] for result in results] == [0, 0], f"{port} {answer} {results}")
    finally:
        kill_all(processes)


def test_started_process_of_rank_1():
    """Nobody waits for it: it only waits for its rank, which goes on, and wakes it at the end."""
    for _ in range(10):
        processes, text = talkers(2, models["two"], 900, "--timeout", 1)
        try:
            processes[1].send_signal(signal.SIGSTOP)
            stood = processes[1].poll() is None
            time.sleep(2.5)
            first = end_of(processes[0])
            other = end_of(processes[1])  # its rank continues it at the end
        finally:
            kill_all(processes)
        if stood:  # it was not done before
            break
    check("rank 1's started process is stopped: the work goes on", text and first[0] == 0 and other == (0, "", ""), f"{first} {other}")


def test_wakes_too_late():
    """A rank that was given up and continues says what the others said of it, not that they are lost."""
    def sleep_too_long(processes):
        rank = children(processes[0].pid)[0]
        os.kill(rank, signal.SIGSTOP)
        time.sleep(2.3)
        os.kill(rank, signal.SIGCONT)

    results, text, _ = catch(lambda: talkers(2, models["two"], 3000, "--timeout", 2), sleep_too_long)
    wrong = [result for result in results if result[0] != 7 or "rank 1 is lost" in result[2] or "rank 0 " not in result[2]]
    report("a rank that continues too late says that it was silent", f"{results}" if wrong or not text else None)


def reasons(problem):
    """Ranks that a sentence gives as the reason why another one did not come."""
    return [int(m.group(1)) for m in re.finditer(r"since it waits for (?:rank \d+, and in the end for )?rank (\d+)", problem)]


def stop_a_rank(place, rank, tokens, launched):
    """Results of all processes of four ranks, one of which is stopped."""
    def begin():
        port, words = free_port(), (*TALK, "--max-tokens", 3000, "--timeout", 1)
        processes = [start("generate", place, r if launched else None, 4, port, *words) for r in range(4 if launched else 1)]
        return processes, processes[0].stdout.read(tokens)

    def stop(processes):
        ranks = [children(process.pid)[0] for process in processes] if launched else children(processes[0].pid)
        os.kill(ranks[rank], signal.SIGSTOP)

    return catch(begin, stop)[0]


def test_sentences():
    """Stages: whichever rank stands still, it is named, and no other one is the reason."""
    # As test_comm_stages (test_reasons) holds the engine to: other words would be seen there.
    begin = "rank 2 did not send rank 3 what it waits for (embedding) within 0.1 s, since it waits for "
    expect("reasons are read from sentences", [reasons(begin + words) for words in ("rank 0; rank 0 was last seen in attention of layer 3",
           "rank 1, and in the end for rank 0; rank 0 was last seen in attention of layer 3")], [[0], [0]])
    for launched in (False, True):
        wrong, whys = [], 0
        for turn in range(2 if QUICK else 4):
            rank = (turn + launched) % 4
            for code, _, problem in stop_a_rank(models["stages"], rank, 40 + 37 * turn, launched):
                whys += bool(reasons(problem))
                if code != 7 or f"rank {rank}" not in problem or any(why != rank for why in reasons(problem)):
                    wrong.append((rank, code, problem))
        report(f"stages, {'each rank started by itself' if launched else 'ranks of one start'}: the rank that stands still is the reason ({whys} sentences give one)", wrong or None)


work = Path(tempfile.mkdtemp(prefix="stops_"))
try:
    models = {"two": work / "two", "stages": work / "stages"}
    for key, words in (("two", ()), ("stages", ("--pp", 2))):
        must(BUILD / "tpshard", "--quiet", "--tp", 2, *words, "--quant", "int4", "tests/model", models[key])
    for case in (test_started_process_of_rank_0, test_start, test_short_stop, test_started_process_of_rank_1, test_wakes_too_late, test_sentences):
        if len(sys.argv) < 2 or case.__name__ in sys.argv[1:]:
            case()
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(status())

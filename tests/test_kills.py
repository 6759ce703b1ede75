#!/usr/bin/env python3
"""`tpengine generate` whose ranks are killed, or stopped, at a random time: exit status 7, one sentence that names the rank and where it was, all processes
gone within the deadline and two seconds. tests/test_kills.c does so by a rank's place in its work.

    KILLS   how many (default 6; slow builds 2)
"""
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, check, must, status, wait_until

BUILD = Path(os.environ.get("BUILD", "build"))
SLOW = bool(os.environ.get("TEST_QUICK"))
KILLS = int(os.environ.get("KILLS", "2" if SLOW else "6"))
DEADLINE_S = 4.0 if SLOW else 1.0
ALLOWED_S = 20.0 if SLOW else 2.0  # beside it
PLACE = r"(start|load|handshake|idle|embedding|head|sample|(attention|mlp) of layer \d+)"
chance = random.Random(int(os.environ.get("SEED", "4")))
tokens = 400


def parent_of(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]) if fields[0] != "Z" else None


def children(pid):
    """In the order in which they were started: that of the ranks."""
    return sorted(child for child in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(child) == pid)


def generate(shards, tp):
    """Starts it; returns once all ranks have processes."""
    words = [BUILD / "tpengine", "generate", shards, "--prompt", "In the beginning", "--max-tokens", tokens, "--ignore-eos", "--temperature", 0, "--quiet",
             "--threads", 1, "--timeout", DEADLINE_S]
    child = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    return child, wait_until(lambda: len(found := children(child.pid)) == tp and found, step=0.0005)


def kill_one(number, shards, tp, usual_s):
    how = chance.choice((signal.SIGKILL, signal.SIGSTOP))
    rank, at_s, at_byte = chance.randrange(tp), chance.uniform(0, usual_s), chance.randrange(1, 600)
    name = f"{number}: tp {tp}, rank {rank}, {how.name}"
    for again in range(20):
        child, pids = generate(shards, tp)
        if how == signal.SIGSTOP:  # a rank that starts has two minutes for it, so this one comes amid the text
            child.stdout.read(at_byte)
        else:
            time.sleep(at_s / 2**again)
        began_s = time.monotonic()
        if pids and parent_of(pids[rank]) == child.pid:
            os.kill(pids[rank], how)
        try:
            _, problem = child.communicate(timeout=DEADLINE_S + 60)
        except subprocess.TimeoutExpired:
            for pid in (*pids, child.pid):
                os.kill(pid, signal.SIGKILL)
            check(name, False, "it hangs")
            return None
        if child.returncode != 0:  # else this run was quicker than the usual one, and over
            break
    took_s = time.monotonic() - began_s
    left = [pid for pid in pids if parent_of(pid) is not None]
    sentence = problem.decode().strip()
    wanted = rf"rank {rank} was ended by signal 9 \(Killed\) in {PLACE}" if how == signal.SIGKILL else rf"rank {rank} .*last seen in {PLACE}"
    found = re.search(wanted, sentence)
    good = child.returncode == 7 and found and sentence.count("\n") == 0 and not left and took_s <= (DEADLINE_S if how == signal.SIGSTOP else 0) + ALLOWED_S
    check(name, good, f"exit status {child.returncode} after {took_s:.2f} s, left: {left}: {sentence}")
    return found and (found.group(1).split(" of ")[0], took_s)


def main():
    with tempfile.TemporaryDirectory() as work:
        usual_s = {}
        for tp in (2, 4):
            must(BUILD / "tpshard", "--tp", tp, "--quant", "int4", "tests/model", f"{work}/{tp}", "--quiet")
            began_s = time.monotonic()
            child, _ = generate(f"{work}/{tp}", tp)
            child.communicate()
            usual_s[tp] = time.monotonic() - began_s
            check(f"tp {tp} without a fault", child.returncode == 0)
        ends = [end for number in range(KILLS) for tp in [chance.choice((2, 4))] if (end := kill_one(number, f"{work}/{tp}", tp, 0.8 * usual_s[tp]))]
        places = [place for place, _ in ends]
        times = sorted(took for _, took in ends)
        print(f"# {', '.join(f'{place} {places.count(place)}' for place in sorted(set(places)))}; over after {times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s (longest)")
    return status()


if __name__ == "__main__":
    sys.exit(main())

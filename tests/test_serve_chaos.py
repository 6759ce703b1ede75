#!/usr/bin/env python3
"""The load programs of bench/ in small: they run against the real server, and what they claim holds."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import case_help
from case_help import report

BENCH = Path(__file__).resolve().parent.parent / "bench"
BUILD = Path(os.environ.get("BUILD", "build"))
SLOW = bool(os.environ.get("TEST_QUICK"))  # sanitizers: no claims on time and memory
STREAMS, REQUESTS = (60, 600) if SLOW else (300, 3000)


def run(program, *words):
    """Its report, its exit status and what it said."""
    path = Path(WORK) / "report.json"
    path.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, BENCH / program, MODEL, "--json", path, *map(str, words)], capture_output=True, text=True, timeout=280)
    print("# " + done.stdout.strip().replace("\n", "\n# "))
    return json.loads(path.read_text()) if path.exists() else {}, done.returncode, (done.stdout + done.stderr)[-2000:]


def test_chaos():
    result, status, said = run("bench_chaos.py", "--seconds", 14, "--every", 4, "--clients", 12, "--deadline", 60, "--growth", 1e9 if SLOW else 2048,
                               "--options", f"--timeout {10 if SLOW else 3} --max-batch 8 --max-queue 64")
    report("chaos: nothing is wrong", said if status != 0 else None)
    counts = result.get("counts", {})
    report("chaos: answers complete, clients leave, ranks break",
           None if counts.get("completed") and any(key.startswith("left_") for key in counts) and result["ranks_broken"] else result)


def test_streams():
    result, status, said = run("bench_streams.py", "--streams", STREAMS, "--tokens", 12)
    report("streams: none is lost, all are as the quiet ones", said if status != 0 else None)
    report("streams: every token is an event", None if result.get("tokens") == STREAMS * 12 else result)


def test_mutated_requests():
    result, status, said = run("bench_mutate.py", "--requests", REQUESTS, "--processes", 2)
    report("mutated requests: nothing is wrong", said if status != 0 else None)
    answers = result.get("answers", {})
    report("mutated requests: some are good, some are not", None if min(answers.get("200", 0), answers.get("400", 0)) > REQUESTS / 10 else result)


def main():
    global WORK, MODEL
    with tempfile.TemporaryDirectory() as WORK:
        MODEL = Path(WORK) / "model"
        subprocess.run([BUILD / "tpshard", "--tp", "2", "--quant", "int4", "tests/model", MODEL], check=True, capture_output=True)
        test_chaos()
        test_streams()
        test_mutated_requests()
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

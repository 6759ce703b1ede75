"""What test scripts share: each case as a line of TAP, programs that are run to their end, and waiting for one that runs."""
import os
import socket
import subprocess
import time

# What a user has set for the programs, and proxies, must not reach them.
CLEAN = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and not key.startswith("TPENGINE_")}
failures = []


def report(name, wrong=None):
    """A case; wrong: what is, None or "" when nothing."""
    if wrong:
        failures.append(name)
    print(f"not ok {name}: {wrong}\n" if wrong else f"ok {name}\n", end="", flush=True)  # in one piece: threads report, too


def check(name, holds, detail=""):
    """A case; detail: what is told where it does not hold."""
    report(name, None if holds else detail or "it does not hold")


def expect(name, got, wanted):
    check(name, got == wanted, f"got {got!r}, wanted {wanted!r}")


def skip(name, why):
    print(f"ok {name} # SKIP {why}", flush=True)


def status():
    """The script's exit status."""
    return 1 if failures else 0


def run(*words, **options):
    """A program's exit status, what it wrote, and what it wrote to standard error. options: as those of subprocess.run."""
    done = subprocess.run([str(word) for word in words], **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options})
    return done.returncode, done.stdout, done.stderr


def must(*words):
    """What a program wrote that must succeed."""
    code, out, problem = run(*words)
    if code != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit status {code}: {problem.strip()[-500:]}")
    return out


def expect_run(name, wanted, words, *command, **options):
    """A case: a program's exit status, and some words of what it says."""
    code, out, problem = run(*command, **options)
    check(name, code == wanted and words in out + problem, f"exit status {code}, wanted {wanted}: {out}{problem}")


def end_of(process, limit_s=120):
    """Exit status, standard output and standard error of a process that was started with pipes for both; the status is None where it hangs."""
    try:
        out, problem = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, problem = process.communicate()
        return None, out, problem + " [it did not end]"
    return process.returncode, out, problem


def wait_until(condition, seconds=60.0, step=0.005):
    """The condition's first true value; what it last was when there is none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(step)
    return value


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

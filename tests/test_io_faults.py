#!/usr/bin/env python3
"""tpshard and tpengine while the operating system fails, by way of tests/io_shim.c: the N-th call of each kind, kills and power failures before each
step, full disks of every size, short and interrupted transfers, sources that change, two writers, and the N-th allocation.

After each: `tpshard verify` says complete, and the bytes are the reference's, or it says in a sentence what is missing (exit status 4 or 5); the run
that failed said so in one sentence with a documented status; the next run succeeds.

    FAULTS      cases of each table (default 6), or "all": every one
    TEST_QUICK  a few of each
    TABLES      beginnings of names of tables, separated by commas: calls_convert,kills,power_re,... (default: all)
"""
import contextlib
import errno
import filecmp
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import case_help
from case_help import failures, report
from io_shim_help import HANG_S, KINDS, POWER_FAILED, SHIM, Page, Ran, run, sentence

BUILD = Path(os.environ.get("BUILD", "build")).resolve()
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
MODEL = Path("tests/model").resolve()
QUICK = bool(os.environ.get("TEST_QUICK"))
FAULTS = os.environ.get("FAULTS", "3" if QUICK else "6")
CASES = sys.maxsize if FAULTS == "all" else int(FAULTS)
TABLES = [name for name in os.environ.get("TABLES", "").split(",") if name]
WORK_FOLDER = ".tmp-tpshard"
ERRNOS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, errno.ENOMEM]
RETRIED = ["read", "pread", "write", "pwrite", "allocate", "lock"]  # EINTR for ever would be tried for ever


# ---- directories -----------------------------------------------------------------------------------------------------


def files_of(directory):
    """Names, but for what a crash leaves of an unfinished file."""
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir() and not (p.name.startswith(".") and ".tmp-" in p.name)
            and WORK_FOLDER not in p.relative_to(directory).parts}


def same(a, b):
    names = files_of(a)
    return names == files_of(b) and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def state(directory, models, in_place=False):
    """("new", None): verified and equal to models["new"]. ("none", None): refused as it should be. (None, what is wrong) else. in_place: files
    that do not hold may stand beside a manifest."""
    ran = run(TPSHARD, "verify", "--quiet", directory)
    if ran.status == 0:
        for name, model in models.items():
            if same(directory, model):
                return name, None
        return None, "verify says ok, and the bytes are not the reference's"
    if ran.status not in (4, 5) or (sentence(ran) and not in_place):  # which tells each damaged leaf
        return None, f"verify of what is left: {ran}"
    if not in_place and (directory / "model.json").exists():
        return None, f"a manifest stands over files that do not hold: {ran}"
    return "none", None


class Job:
    """One command that makes a directory: words before and after its name, what lies there before, what may lie there afterwards."""

    def __init__(self, name, before, after=(), start=None, force=False, resume=False, in_place=False, old=None, new=None):
        self.name, self.before, self.after, self.start, self.force, self.resume, self.in_place = name, before, after, start, force, resume, in_place
        self.models = {"new": new, **({"old": old} if old else {})}

    def words(self, out, *more):
        return [*self.before, "--quiet", *more, *self.after, out]

    def first(self, out):
        return self.words(out, *(["--force"] if self.force else []), *(["--resume"] if self.resume else []))

    def place(self, name):
        folder = WORK / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.start:
            shutil.copytree(self.start, folder / "out")
        return folder

    def judge(self, out, ran, case, killed=()):
        """What is wrong after a run: its word, what is left, and the next run."""
        if ran.status == 0 or ran.status in killed:
            pass
        elif ran.status not in (1, 2, 3, 4, 5, 8) or (sentence(ran) and not self.in_place):
            return sentence(ran) or str(ran)
        left, wrong = state(out, self.models, self.in_place)
        if wrong:
            return f"{wrong} (the run: {ran})"
        if ran.status == 0 and left != "new":
            return f"exit status 0, and what is left is {left}"
        if left == "old" and not self.force:
            return "the old model is back"
        unfinished = (out / WORK_FOLDER).exists()
        again = [] if self.in_place else ["--force"] if left != "none" else [["--resume"], ["--force"], []][case % 3] if unfinished else [["--force"], []][case % 2]
        next_run = run(TPSHARD, *self.words(out, *again), short=0)  # the shim without faults: syncs are left out
        if next_run.status:
            return f"the next run, {again}: {next_run}; this one: {ran}"
        if not same(out, self.models["new"]) or (out / WORK_FOLDER).exists():
            return f"the next run, {again}, makes other bytes; this one: {ran}"
        return None


# ---- tables of cases -------------------------------------------------------------------------------------------------

WORK = BUILD / "tests" / f"io_faults.{os.getpid()}"
chance = random.Random(6)


def chosen(name):
    return not TABLES or any(name.startswith(table) for table in TABLES)


def some(cases, group=lambda case: None, limit=None):
    """All cases, or as many of each group: the first and the last, then others at random."""
    cases, limit = list(cases), limit or CASES
    if len(cases) <= limit:
        return cases
    groups = {}
    for case in cases:
        groups.setdefault(group(case), []).append(case)
    orders = [[members[0], *members[-1:], *chance.sample(members[1:-1], len(members) - 2)] if len(members) > 2 else members for members in groups.values()]
    chance.shuffle(orders)
    turns = [order[turn] for turn in range(limit) for order in orders if turn < len(order)]
    return turns[:limit]


def each(name, cases, check):
    """check(number, case) returns what is wrong. Two at a time."""
    done = []

    def one(numbered):
        number, case = numbered
        try:
            wrong = check(number, case)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            wrong = repr(error)
        done.append((case, wrong))
        shutil.rmtree(WORK / "cases" / f"{name}-{number}", ignore_errors=True)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, enumerate(cases)))
    wrong = [f"{case}: {what}" for case, what in done if what]
    for line in wrong[:20]:
        print(f"# {name}: {line}")
    report(f"{name}: {len(done)} cases in {time.monotonic() - began:.0f} s", f"{len(wrong)} of them wrong, first {wrong[0]}" if wrong else None)


def counting_run(job):
    folder = job.place(f"count-{job.name}")
    page = Page(folder / "page")
    page.arm(None, 0)
    ran = run(TPSHARD, *job.first(folder / "out"), page=page)
    counts = {kind: page.count(kind) for kind in KINDS}
    page.close()
    if ran.status:
        raise ValueError(f"{job.name} without faults: {ran}")
    return counts


def fail_calls(job):
    name = f"calls_{job.name}"
    if not chosen(name):
        return
    counts = counting_run(job)
    print(f"# {name}: " + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind]))

    def check(number, case):
        kind, n, error, always = case
        folder = job.place(f"{name}-{number}")
        ran = run(TPSHARD, *job.first(folder / "out"), fail=f"{kind} {n} {error} {'always' if always else ''}")
        if ran.status == 0 and kind in ("pwrite", "sync", "rename") and error != errno.EINTR:
            return "what was written is not safe, and it says nothing of that"
        return job.judge(folder / "out", ran, number)

    cases = [(kind, n, error, always) for kind in KINDS[:KINDS.index("alloc")] for n in range(1, counts[kind] + 1) for error in ERRNOS
             for always in (False, True) if not (always and error == errno.EINTR and kind in RETRIED)]
    each(name, some(cases, lambda case: case[0]), check)


def kills(job):
    name = f"kills_{job.name}"
    if not chosen(name):
        return
    steps = counting_run(job)["step"]

    def check(number, step):
        folder = job.place(f"{name}-{number}")
        ran = run(TPSHARD, *job.first(folder / "out"), stop=f"{step} kill")
        return job.judge(folder / "out", ran, number, killed=(-signal.SIGKILL,))

    each(name, some(range(1, steps + 1)), check)


def power(job):
    """The disk is what the shim says a power failure leaves."""
    name = f"power_{job.name}"
    if not chosen(name):
        return
    steps = counting_run(job)["step"]

    def check(number, case):
        step, how = case
        folder = job.place(f"{name}-{number}")
        disk = folder / "disk"
        disk.mkdir()
        if job.start:
            shutil.move(folder / "out", disk / "out")
        ran = run(TPSHARD, *job.first(disk / "out"), stop=f"{step} {how}", disk=disk)
        if ran.status not in (0, POWER_FAILED) or (ran.status == 0) != (step > steps):
            return str(ran)
        return job.judge(folder / "disk.after" / "out", ran, number, killed=(POWER_FAILED,))

    cases = [(step, how) for step in range(1, steps + 3) for how in [*(f"mix:{seed}" for seed in range(4)), "lose"]]
    each(name, some(cases, lambda case: case[0] > steps - 60 and case[0]), check)


def transfers(job):
    name = f"transfers_{job.name}"
    if not chosen(name):
        return

    def check(number, shim):
        folder = job.place(f"{name}-{number}")
        ran = run(TPSHARD, *job.first(folder / "out"), **shim)
        return str(ran) if ran.status else job.judge(folder / "out", ran, number)

    cases = [{"short": n} for n in (7, 100, 4095, 100000)] + [{"eintr": n} for n in (2, 3, 7)] + [{"short": 1000, "eintr": 2}]
    turn = [one.name for one in jobs()].index(job.name)  # each job has other ones
    few = [cases[turn % 4], cases[4 + turn % 3]]
    each(name, [{"short": 1}, *cases] if CASES > 1000 else few, check)


def allocations(name, counted, check, limit=None):
    """Allocation N, once and from then on: one N for each call stack that allocates, and others."""
    folder = WORK / "cases" / f"count-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    page = Page(folder / "page")
    page.arm(None, 0)
    ran = counted(page=page, stacks=folder / "stacks")
    count, live = page.count("alloc"), page.count("live")
    page.close()
    if ran.status:
        raise ValueError(f"{name} without faults: {ran}")
    stacks = sorted({int(line) for line in (folder / "stacks").read_text().split()})
    print(f"# {name}: {count} allocations from {len(stacks)} call stacks, {live} not freed at the end")
    numbers = set(stacks) | set(range(1, count + 1) if count <= 700 else chance.sample(range(1, count + 1), 300))
    few = [(n, always) for n in stacks for always in (False, True)]
    cases = [(n, always) for n in sorted(numbers) for always in (False, True)] if CASES == sys.maxsize else few
    each(name, some(cases, limit=limit), lambda number, case: check(number, case, live))


def memory_of_job(job):
    name = f"memory_{job.name}"
    if not chosen(name):
        return

    def check(number, case, live):
        n, always = case
        folder = job.place(f"{name}-{number}")
        page = Page(folder / "page")
        ran = run(TPSHARD, *job.first(folder / "out"), page=page, fail=f"alloc {n} {errno.ENOMEM} {'always' if always else ''}")
        lost = page.count("live") - live
        page.close()
        if ran.status not in (0, 8):
            return str(ran)
        if lost > 0:
            return f"{lost} allocations were lost: {ran}"
        return job.judge(folder / "out", ran, number)

    def counted(**shim):
        folder = job.place(f"counted-{job.name}")
        return run(TPSHARD, *job.first(folder / "out"), **shim)

    allocations(name, counted, check)


def memory_of_reader(name, program, words, statuses=(8,)):
    """A command that writes nothing: its answer, or that there is no memory."""
    name = f"memory_{name}"
    if not chosen(name):
        return
    wanted = run(program, *words)

    def check(number, case, live):
        n, always = case
        folder = WORK / "cases" / f"{name}-{number}"
        folder.mkdir(parents=True)
        page = Page(folder / "page")
        ran = run(program, *words, page=page, fail=f"alloc {n} {errno.ENOMEM} {'always' if always else ''}")
        lost = page.count("live") - live
        page.close()
        if ran.status == 0:
            return None if answer(ran.out) == answer(wanted.out) else f"other words than without the fault: {ran.out[:200]!r}"
        if ran.status not in statuses or sentence(ran):
            return sentence(ran) or str(ran)
        return f"{lost} allocations were lost: {ran}" if lost > 0 and program == TPSHARD else None

    allocations(name, lambda **shim: run(program, *words, **shim), check)


def answer(out):
    """Without the times that verify tells."""
    return out.split(b" verified in ")[0]


# ---- the server ------------------------------------------------------------------------------------------------------

COMPLETION = {"model": "tp2", "prompt": "In the", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "tp2", "messages": [{"role": "user", "content": "In the"}], "max_tokens": 4, "temperature": 0}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}
REQUESTS = {
    "completion": ("/v1/completions", {**COMPLETION, "logprobs": 2}),
    "stream": ("/v1/completions", {**COMPLETION, "stream": True}),
    "chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    "schema": ("/v1/chat/completions", {**CHAT, "max_tokens": 8, "response_format": SCHEMA}),
    "models": ("/v1/models", None),
    "metrics": ("/metrics", None),
}


def ask(port, path, body):
    """(status, body); a connection that is closed without a whole answer has no status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except TimeoutError:
        return "hangs", b""
    except (OSError, http.client.HTTPException):
        return None, b""
    finally:
        connection.close()


def choices_of(body):
    """What must not differ: all but names, times, counters, and how a stream is cut."""
    if body.startswith(b"{"):
        answer_of = json.loads(body)
        return answer_of.get("choices") or [{**model, "created": 0} for model in answer_of["data"]]
    if body.startswith(b"data:"):
        chunks = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
        choices = [choice for chunk in chunks[:-1] for choice in json.loads(chunk).get("choices", ["error"])]
        return "".join(c["text"] for c in choices), [c["finish_reason"] for c in choices if c["finish_reason"]], chunks[-1]
    return {line.split()[2] for line in body.splitlines() if line.startswith(b"# TYPE ")}  # figures' names; what they are changes


def same_choices(got, wanted):
    got, wanted = choices_of(got), choices_of(wanted)
    if isinstance(wanted, set):  # a figure that there is no memory to find out is left out
        return isinstance(got, set) and b"tpengine_num_requests_running" in got and got <= wanted
    return got == wanted


def lost_since(page, live, most):
    """Allocations that stay lost, when they are more than so many; a connection takes a moment to end."""
    deadline = time.monotonic() + 2
    while (lost := page.count("live") - live) > most and time.monotonic() < deadline:
        time.sleep(0.02)
    return lost if lost > most else 0


def memory_of_server():
    """Allocation N fails while a request is served: 503, or no answer where not even that can be written; never another answer, and it serves on."""
    if not chosen("memory_serve"):
        return
    page = Page(WORK / "serve-page")
    page.arm(None, 0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([str(TPENGINE), "serve", str(WORK / "tp2"), "--port", str(port), "--threads", "1"], stdin=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True,
                              env={**os.environ, "LD_PRELOAD": str(SHIM), "IO_SHIM_PAGE": str(page.path)})
    try:
        deadline = time.monotonic() + HANG_S
        while ask(port, "/health", None)[0] != 200 and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        for name, (path, body) in REQUESTS.items():
            for _ in range(3):  # what is kept for the next is there then
                before = page.count("alloc")
                status, wanted = ask(port, path, body)
            count, live, wrong, seen = page.count("alloc") - before, [page.count("live")], [], {}
            if status != 200 or not choices_of(wanted):
                report(f"memory_serve_{name}", f"without faults: {status} {wanted[:200]!r}")
                continue
            cases = [(n, always) for n in range(1, count + 1) for always in (False, True)]
            for number, (n, always) in enumerate(cases := some(cases, limit=max(CASES, 64))):
                if number == len(cases) // 2:
                    live.append(page.count("live"))
                page.arm("alloc", n, errno.ENOMEM, always)
                status, got = ask(port, path, body)
                page.arm(None, 0)
                seen[status] = seen.get(status, 0) + 1
                if status not in (200, 503, None) or (status == 200 and not same_choices(got, wanted)):
                    wrong.append(f"allocation {n}{' and all after' if always else ''}: {status} {got[:200]!r}")
            status, got = ask(port, path, body)
            if status != 200 or not same_choices(got, wanted):
                wrong.append(f"afterwards: {status} {got[:200]!r}")
            # Of the second half of the failures: the first half fills what is kept.
            half = len(cases) - len(cases) // 2
            if (lost := lost_since(page, live[-1], most=max(8, half * 3 // 4))):
                wrong.append(f"{lost} allocations were lost in {half} failures")
            report(f"memory_serve_{name}: {seen}", wrong and f"{len(wrong)} wrong, first {wrong[0]}")
        server.terminate()
        report("memory_serve: it ends as it should", None if server.wait(HANG_S) == 0 else f"exit status {server.returncode}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        page.close()


# ---- disks, sources, writers -----------------------------------------------------------------------------------------


def full_disks():
    """In a mount namespace of its own: the disks go with it."""
    if not chosen("disks"):
        return
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        print("ok disks # SKIP no right to make a mount namespace")
        return
    sys.stdout.flush()
    ended = subprocess.run(["unshare", "-rm", sys.executable, __file__, "--disks", str(WORK)], check=False)
    if ended.returncode != 0:
        failures.append("in the namespace")


def disks_of_every_size(work):
    global WORK
    WORK = Path(work)
    disk = WORK / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], capture_output=True, check=False).returncode:
        print("ok disks # SKIP no right to mount a small disk")
        return
    for job in jobs():
        if job.name not in ("convert", "replace"):
            continue
        model = sum(f.stat().st_size for f in job.models["new"].iterdir())
        before = sum(f.stat().st_size for f in job.start.iterdir()) if job.start else 0
        full_kib = (model + before) * 9 // 8192 + 64  # a little more than both
        counts, wrong = {}, []
        for part in [*range(2, 64, 16 if QUICK else 1 if CASES > 1000 else 4), 64]:
            subprocess.run(["mount", "-o", f"remount,size={full_kib}k", disk], check=True)
            shutil.rmtree(disk / "out", ignore_errors=True)
            if job.start:
                shutil.copytree(job.start, disk / "out")
            subprocess.run(["mount", "-o", f"remount,size={max(before // 1024 + 32, full_kib * part // 64)}k", disk], check=True)
            ran = run(TPSHARD, *job.first(disk / "out"))
            counts[ran.status] = counts.get(ran.status, 0) + 1
            what = None
            if ran.status not in (0, 5) or (ran.status == 5 and "No space left" not in ran.err):
                what = str(ran)
            subprocess.run(["mount", "-o", f"remount,size={4 * full_kib}k", disk], check=True)
            if what := what or job.judge(disk / "out", ran, part):
                wrong.append(f"{part}/64: {what}")
        if set(counts) != {0, 5}:
            wrong.append(f"exit statuses {counts}")
        report(f"disks_{job.name}: {counts.get(5, 0)} sizes too small, {counts.get(0, 0)} enough", wrong and wrong[0])
    sys.exit(case_help.status())


def stopped_at(page, kind, number, words):
    """Starts tpshard, which stops before that call; None when it ended before."""
    page.arm(kind, number, 0)
    child = subprocess.Popen([str(TPSHARD), *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             env={**os.environ, "LD_PRELOAD": str(SHIM), "IO_SHIM_PAGE": str(page.path)})
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return child
    child.returncode = os.waitstatus_to_exitcode(status)
    return None


def gone_on(child):
    os.kill(child.pid, signal.SIGCONT)
    try:
        out, err = child.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        return Ran("hangs", out or b"", err)
    return Ran(child.returncode, out or b"", err)


def changing_sources():
    """The checkpoint changes while it is read: never a signal, and never a model that is not of the checkpoint's bytes as they were."""
    if not chosen("sources"):
        return

    def shrink(path):
        os.truncate(path, path.stat().st_size // 2)

    def empty(path):
        os.truncate(path, 0)

    def replace(path):
        (path.parent / "new").write_bytes(bytes(path.stat().st_size))
        os.replace(path.parent / "new", path)

    def overwrite(path):
        with open(path, "r+b") as f:
            f.seek(path.stat().st_size // 2)
            f.write(bytes(path.stat().st_size // 2))

    small = Job("small", ["convert", "--tp", 2, "--quant", "int4", "--group-size", 32, "--threads", 1], [WORK / "small-source"], new=WORK / "small")
    reads = counting_run(small)["pread"]

    def check(number, case):
        change, read = case
        folder = small.place(f"sources-{number}")
        shutil.copytree(WORK / "small-source", folder / "source")
        page = Page(folder / "page")
        child = stopped_at(page, "pread", read, [*small.before, "--quiet", folder / "source", folder / "out"])
        if child:
            change(folder / "source" / "model.safetensors")
            ran = gone_on(child)
        page.close()
        if not child:
            return f"it has no {read} reads"
        if ran.status not in (0, 3, 5) or (ran.status and sentence(ran)):
            return str(ran)
        if ran.status == 0:  # of the bytes as they were, or, where they had hardly been looked at, as they are
            against = run(TPSHARD, "verify", "--quiet", "--against", folder / "source", folder / "out")
            return None if against.status == 0 or same(folder / "out", WORK / "small") else f"it is no model of this checkpoint: {against}"
        left, wrong = state(folder / "out", small.models)
        return wrong or (None if left == "none" else f"{ran}, and left is {left}")

    cases = [(change, read) for change in (shrink, empty, os.unlink, replace, overwrite) for read in range(1, reads + 1)]
    each("sources", some(cases, lambda case: case[0], None if CASES > 1000 else 2 * CASES), check)


def two_writers(job):
    if not chosen("writers"):
        return
    folder = job.place("writers")
    page = Page(folder / "page")
    for number, flags in enumerate([[], ["--resume"], ["--force"]]):
        child = stopped_at(page, "pwrite", 5 + number, job.words(folder / "out"))
        ran = run(TPSHARD, *job.words(folder / "out", *flags))
        first = gone_on(child)
        report(f"writers: a second one, {flags}, is refused", str(ran) if ran.status != 2 or "another tpshard is writing there" not in ran.err else None)
        report("writers: the first is whole", job.judge(folder / "out", first, 0))
        shutil.rmtree(folder / "out")
    page.close()


# ---- what --resume does again ----------------------------------------------------------------------------------------


def resumed_work():
    """Killed at random steps: the share of the weights that is written again."""
    if not chosen("resume") or QUICK:
        return
    source, reference, out = WORK / "many", WORK / "many-reference", WORK / "resumed"
    # Of a size beside which a band is small.
    synthetic(source, "--layers", 64, "--hidden", 256, "--intermediate", 1024, "--vocab", 48000)
    words = ["convert", "--tp", 2, "--quant", "none", "--quiet"]
    page = Page(WORK / "resume-page")

    def written(*more, **shim):
        """Bytes of weights written, steps, and how the run ended."""
        page.map[:256] = bytes(256)
        page.arm(None, 0)
        ran = run(TPSHARD, *words, *more, page=page, **shim)
        return page.count("written"), page.count("step"), ran

    began = time.monotonic()
    whole, steps, ran = written(source, reference)
    lines, syncs = page.count("pwrite"), page.count("sync")
    report("resume: the journal is synced at most once a second", None if syncs < 40 + time.monotonic() - began < lines else f"{syncs} of {lines} writes")
    shares, wrong = [], None
    stops = chance.sample(range(1, steps), 40 if CASES > 1000 else 3) + [22, steps - 12]  # within the first tensor, which is large; committing
    for step in stops:
        shutil.rmtree(out, ignore_errors=True)
        begun, _, _ = written(source, out, stop=f"{step} kill")
        if not (out / "model.json").exists():
            run(TPSHARD, *words, "--resume", source, out, fail=f"thread 1 {errno.ENOMEM}")  # ends before it has begun, and takes nothing with it
            ended, _, ran = written("--resume", source, out)
        else:
            ended = 0
        if ran.status or not same(out, reference):
            wrong = wrong or str(ran)
        shares.append(max(0, begun + ended - whole) / whole)
    page.close()
    report(f"resume: {len(shares)} kills, at most {100 * max(shares):.2f} % of the bytes are written again, "
           f"{100 * sum(shares) / len(shares):.3f} % on average", wrong or (f"{shares}" if not max(shares) <= 0.02 else None))


# ---- models ----------------------------------------------------------------------------------------------------------


def synthetic(path, *words):
    subprocess.run([sys.executable, "scripts/make_synthetic_checkpoint.py", "--family", "llama-biases", *map(str, words), str(path)], check=True,
                   capture_output=True)


def make_models():
    source = WORK / "source"
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    synthetic(source, "--layers", 2, "--hidden", 64, "--intermediate", 96, "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--vocab", vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        shutil.copy(MODEL / name, source / name)
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    for name, words in {"tp2": ["--tp", 2, "--quant", "int4", "--group-size", 32], "tp4": ["--tp", 4, "--quant", "int4", "--group-size", 32],
                        "tp2z": ["--tp", 2, "--quant", "int4", "--group-size", 32, "--zstd"], "old": ["--tp", 1, "--quant", "int8"]}.items():
        ran = run(TPSHARD, "convert", "--quiet", *words, source, WORK / name)
        if ran.status:
            raise ValueError(f"{name}: {ran}")
    damage(WORK / "tp2", WORK / "damaged")
    synthetic(WORK / "small-source", "--layers", 1, "--hidden", 64, "--intermediate", 96, "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--vocab", 300)
    ran = run(TPSHARD, "convert", "--tp", 2, "--quant", "int4", "--group-size", 32, "--quiet", WORK / "small-source", WORK / "small")
    by_name = {job.name: job for job in jobs()}
    # The last of them while it commits: some files are at their places, and there is no manifest.
    for unfinished, name, part in (("convert", "convert", 0.6), ("reshard", "reshard", 0.6), ("zstd", "zstd", 0.9), ("commit", "convert", None)):
        steps = counting_run(by_name[name])["step"]
        ran = run(TPSHARD, *by_name[name].words(WORK / f"unfinished-{unfinished}"), stop=f"{int(part * steps) if part else steps - 8} kill")
        if ran.status != -signal.SIGKILL:
            raise ValueError(f"unfinished {name}: {ran}")


def damage(model, copy):
    """Three leaves, a head and an extra."""
    shutil.copytree(model, copy)
    for name, places in {"rank-00-of-02.tpshard": (-5000, -1500000), "rank-01-of-02.tpshard": (-100000, 200)}.items():
        with open(copy / name, "r+b") as f:
            for place in places:
                f.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
                byte = f.read(1)
                f.seek(-1, os.SEEK_CUR)
                f.write(bytes([byte[0] ^ 64]))
    os.truncate(copy / "config.json", 10)


def jobs():
    options = ["convert", "--tp", 2, "--quant", "int4", "--group-size", 32]
    source = [WORK / "source"]
    return [
        Job("convert", options, source, new=WORK / "tp2"),
        Job("replace", options, source, start=WORK / "old", force=True, old=WORK / "old", new=WORK / "tp2"),
        Job("reshard", ["reshard", "--tp", 4], [WORK / "tp2"], new=WORK / "tp4"),
        Job("resume", options, source, start=WORK / "unfinished-convert", resume=True, new=WORK / "tp2"),
        Job("resume_commit", options, source, start=WORK / "unfinished-commit", resume=True, new=WORK / "tp2"),
        Job("zstd", [*options, "--zstd"], source, new=WORK / "tp2z"),
        Job("resume_zstd", [*options, "--zstd"], source, start=WORK / "unfinished-zstd", resume=True, new=WORK / "tp2z"),
        Job("repair", ["repair", "--from", WORK / "source"], start=WORK / "damaged", in_place=True, new=WORK / "tp2"),
        Job("resume_reshard", ["reshard", "--tp", 4], [WORK / "tp2"], start=WORK / "unfinished-reshard", resume=True, new=WORK / "tp4"),
    ]


def main():
    if not SHIM.exists():
        print("SKIP no tests/libio_shim.so in this build: sanitizers take calls of these names for themselves")
        return 77
    WORK.mkdir(parents=True)
    try:
        make_models()
        for job in jobs():
            fail_calls(job)
            kills(job)
            power(job)
            transfers(job)
            memory_of_job(job)
        memory_of_reader("verify", TPSHARD, ["verify", "--quiet", WORK / "tp2"])
        memory_of_reader("verify_against", TPSHARD, ["verify", "--quiet", "--against", WORK / "source", WORK / "tp2"])
        memory_of_reader("inspect", TPSHARD, ["inspect", WORK / "tp2"])
        memory_of_reader("inspect_json", TPSHARD, ["inspect", "--json", WORK / "tp2"])
        for ranks in ("thread", "process"):
            memory_of_reader(f"generate_{ranks}", TPENGINE, ["generate", WORK / "tp2", "--prompt", "In the", "--max-tokens", 4, "--temperature", 0,
                                                             "--ranks", ranks, "--threads", 1, "--quiet"])
        memory_of_server()
        full_disks()
        changing_sources()
        two_writers(jobs()[0])
        resumed_work()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    return case_help.status()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--disks"]:
        disks_of_every_size(sys.argv[2])
    sys.exit(main())

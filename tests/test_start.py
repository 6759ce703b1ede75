#!/usr/bin/env python3
"""Cold starts of tpengine: it computes while weights still arrive, lets no token out before everything was compared, reads each byte once, says how long
what took, and a rank that waits for weights is not taken for a lost one. Weights come from files, and from a server that holds them back."""
import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import case_help
from case_help import CLEAN, expect, report, wait_until
from serve_help import Server, children

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
SLOW = bool(os.environ.get("TEST_QUICK"))  # sanitizers: no claims on time
MIB = 1 << 20
PATHS = ("map", "read", "direct", "uring")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def engine(*words, **environment):
    done = subprocess.run([str(word) for word in (TPENGINE, *words)], capture_output=True, text=True, errors="replace",
                          env={**CLEAN, **environment}, timeout=300)
    return done.returncode, done.stdout, done.stderr


def must(*words):
    rc, out, problem = engine(*words)
    if rc:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {rc}: {problem.strip()[-500:]}")
    return out, problem


def drop_from_cache(path):
    """Clean pages of one file, where nobody maps it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- a server that holds back ----------------------------------------------------------------------------------------


class Gate:
    """Serves a folder with ranges, to those who have the token. Of files whose name has `part`, bytes from `begin` on wait for open()."""

    def __init__(self, root, part="rank-", begin=1 << 62, token=None):
        self.root, self.part, self.begin, self.token = Path(root), part, begin, token
        self.gate, self.sent, self.held, self.lock = threading.Event(), {}, 0, threading.Lock()
        gate = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                gate.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/dir"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()
        self.server.shutdown()
        self.server.server_close()

    def open(self):
        self.gate.set()

    def answer(self, handler):
        path = self.root / handler.path.partition("?")[0].rpartition("/")[2]
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_error(401)
            return
        if not path.is_file():
            handler.send_error(404)
            return
        total = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), total - 1)) if wanted else (0, total - 1)
        handler.send_response(206 if wanted else 200)
        if wanted:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        with contextlib.suppress(OSError), open(path, "rb") as file:
            free_until = self.begin if self.part in path.name else total
            for begin, end in ((first, min(last + 1, free_until)), (max(first, free_until), last + 1)):
                if begin >= end:
                    continue
                if begin >= free_until:
                    with self.lock:
                        self.held += 1
                    self.gate.wait()
                file.seek(begin)
                handler.wfile.write(file.read(end - begin))
                with self.lock:
                    self.sent[path.name] = self.sent.get(path.name, 0) + end - begin


def has_curl():
    """tpengine loads libcurl when it meets a URL."""
    with Gate(MODELS["two"]) as gate:
        rc, _, problem = engine("tokenize", gate.url, "x")
        return rc == 0 or "libcurl" not in problem


# ---- models ----------------------------------------------------------------------------------------------------------

MODELS = {}


def make_models(work):
    """The bundled model for two ranks, and one large enough to arrive in many pieces, with the bundled tokenizer: for one rank and for two."""
    subprocess.run([TPSHARD, "--tp", "2", "--quant", "int4", "tests/model", work / "two", "--quiet"], check=True)
    subprocess.run([sys.executable, "scripts/make_synthetic_checkpoint.py", "--layers", "6" if SLOW else "16", "--hidden", "256", "--intermediate", "1024",
                    "--heads", "4", "--kv-heads", "4", "--head-dim", "64", "--vocab", "2048", work / "checkpoint"], check=True, stdout=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path("tests/model") / name, work / "checkpoint")
    for tp, name in ((1, "large"), (2, "large-two")):
        subprocess.run([TPSHARD, "--tp", str(tp), "--quant", "none", work / "checkpoint", work / name, "--quiet"], check=True)
    subprocess.run([TPSHARD, "--tp", "2", "--quant", "none", "--zstd", work / "checkpoint", work / "packed", "--quiet"], check=True)
    # Mostly embedding: what of it no prompt reads is compared last.
    shutil.rmtree(work / "checkpoint")
    subprocess.run([sys.executable, "scripts/make_synthetic_checkpoint.py", "--layers", "2", "--hidden", "256", "--intermediate", "256", "--heads", "4",
                    "--kv-heads", "4", "--head-dim", "64", "--vocab", "65536", work / "checkpoint"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([TPSHARD, "--quant", "none", work / "checkpoint", work / "wide", "--quiet"], check=True)
    for name in ("two", "large", "large-two", "packed", "wide"):
        MODELS[name] = work / name


def rank_files(directory):
    return sorted(Path(directory).glob("rank-*.tpshard"))


GENERATE = ("--max-tokens", 4 if SLOW else 12, "--ignore-eos", "--ids", "--temperature", 0)
PROMPT = ("--prompt", "And the LORD said unto Moses,")


def tokens(directory, *words):
    return must("generate", directory, *PROMPT, *GENERATE, "--quiet", *words)[0]


# ---- paths and figures -----------------------------------------------------------------------------------------------


def timings_of(text):
    return json.loads(text.strip().splitlines()[-1])


def check_timings(name, figures, directory):
    """Each part is there, nothing is negative, threads have no more time than there was, and every byte was read once."""
    wrong = []
    phases, files = figures["phases"], rank_files(directory)
    if set(phases) != {"exec", "open", "read", "verify", "decode", "copy", "load", "warm_up", "first_token"} or figures["schema_version"] != 1:
        wrong.append(f"phases {sorted(phases)}")
    if any(value is None or value < 0 for value in phases.values()):
        wrong.append(f"a phase is negative: {phases}")
    if not phases["open"] <= phases["first_token"] or not 0 < phases["exec"] < 5:
        wrong.append(f"out of order: {phases}")
    for file, rank in zip(files, figures["ranks"], strict=True):
        busy = sum(rank[f"{part}_s"] for part in ("read", "verify", "decode", "copy"))
        if busy > rank["threads"] * rank["wall_s"] * 1.1 + 0.005:
            wrong.append(f"{rank['threads']} threads were busy for {busy} s in {rank['wall_s']} s")
        head_bytes = 2 * MIB
        if rank["file_bytes"] != file.stat().st_size or not 0.99 <= (rank["read_bytes"] + head_bytes) / rank["file_bytes"] <= 1.01:
            wrong.append(f"read {rank['read_bytes']} bytes of {rank['file_bytes']}")
        if rank["path"] not in PATHS or not rank["why"] or rank["cpu_s"] < 0 or rank["loaded_s"] > phases["first_token"] + 0.005:
            wrong.append(f"rank {rank}")
    for part in ("read", "verify", "decode", "copy"):
        if abs(phases[part] - sum(rank[f"{part}_s"] for rank in figures["ranks"])) > 1e-4:
            wrong.append(f"{part} is not the ranks' sum")
    report(name, "; ".join(wrong))


def test_paths():
    for model in ("two", "large", "large-two"):
        directory = MODELS[model]
        wanted = tokens(directory)
        for path in PATHS:
            for cold in (False, True) if model == "large" and not SLOW else (model != "large-two",):
                for file in rank_files(directory) if cold else ():
                    drop_from_cache(file)
                name = f"{model}, --load {path}, {'cold' if cold else 'warm'}"
                out, problem = must("generate", directory, *PROMPT, *GENERATE, "--quiet", "--load", path, "--timings")
                expect(f"tokens of {name}", out, wanted)
                check_timings(f"timings of {name}", timings_of(problem), directory)
    directory, wanted = MODELS["large-two"], tokens(MODELS["large-two"])
    problem = must("generate", directory, *PROMPT, *GENERATE)[1]
    report("ranks and load are said", None if re.search(r"^2 ranks \(process\).*\nloaded [0-9.]+ MiB in [0-9.]+ s \(map: ", problem) else problem)
    for words in (("--verify", "sample"), ("--load-threads", 1), ("--ranks", "thread"), ("--load", "direct", "--ranks", "thread")):
        expect(f"tokens with {' '.join(map(str, words))}", tokens(directory, *words), wanted)
    for path in ("auto", "map", "direct"):
        out, problem = must("generate", MODELS["packed"], *PROMPT, *GENERATE, "--quiet", "--load", path, "--timings")
        figures = timings_of(problem)
        expect(f"tokens of compressed files, --load {path}", out, wanted)
        check_timings(f"timings of compressed files, --load {path}", figures, MODELS["packed"])
        report(f"they are decoded, --load {path}", None if figures["phases"]["decode"] > 0 and figures["ranks"][0]["path"] != "map" else problem)
    # Nobody waits for what is not compared: it may still be on its way at the end.
    out, problem = must("generate", directory, *PROMPT, *GENERATE, "--quiet", "--verify", "off", "--timings")
    figures = timings_of(problem)
    expect("tokens unverified", out, wanted)
    report("timings unverified", None if figures["phases"]["first_token"] > 0 and len(figures["ranks"]) == 2 else problem)
    output = directory.parent / "logits.npy"
    for words in (("bench", MODELS["two"], "--prompt-tokens", 8, "--gen-tokens", 4),
                  ("eval", MODELS["two"], "--text", "tests/model/README.md", "--max-tokens", 64 if SLOW else 2000),
                  ("logits", MODELS["two"], "--token-ids", "1,2", "--output", output)):
        check_timings(f"timings of {words[0]}", timings_of(must(*words, "--quiet", "--timings")[1]), MODELS["two"])


def figure(path, key):
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {key}")


def test_libraries():
    """Every library that the program is linked with is looked up and bound at each start."""
    done = subprocess.run([TPENGINE], capture_output=True, text=True, env={**CLEAN, "LD_TRACE_LOADED_OBJECTS": "1"})
    heavy = [line.split()[0] for line in done.stdout.splitlines() if re.search("curl|ssl|crypto|gnutls|cuda", line)]
    report("no library at the start that few runs need", None if "libc.so" in done.stdout and not heavy else done.stdout)


# ---- damage ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def damaged(file, offset):
    """One bit of a file is wrong."""
    with open(file, "r+b") as f:
        f.seek(offset)
        before = f.read(1)
        f.seek(offset)
        f.write(bytes([before[0] ^ 4]))
    try:
        yield
    finally:
        with open(file, "r+b") as f:
            f.seek(offset)
            f.write(before)


def check_refused(name, rc, out, problem, *words):
    wrong = []
    if rc != 4:
        wrong.append(f"exit {rc}")
    if out:
        wrong.append(f"{len(out)} bytes of output: {out[:40]!r}")
    wrong += [f"no {word!r} in {problem.strip()!r}" for word in words if word not in problem]
    if len(problem.strip().splitlines()) != 1:
        wrong.append(f"more than a sentence: {problem!r}")
    report(name, "; ".join(wrong))


def test_damage(curl):
    def refused(model, where, offset, *words):
        file = rank_files(MODELS[model])[-1]
        with damaged(file, offset):
            done = engine("generate", MODELS[model], *PROMPT, *GENERATE, "--quiet", *words)
        check_refused(f"damage in {where} of {model} {' '.join(words)}", *done, file.name, "tpshard repair")

    file = rank_files(MODELS["large"])[0]
    size = file.stat().st_size
    for where, offset in (("the last leaf", size - 5000), ("the embedding", 2 * MIB + 700000), ("a layer", size // 2)):
        for path in PATHS if where == "a layer" or not SLOW else PATHS[-1:]:
            refused("large", where, offset, "--load", path)
    file = rank_files(MODELS["wide"])[0]
    with damaged(file, 2 * MIB + 30 * MIB):
        drop_from_cache(file)
        done = engine("logits", MODELS["wide"], "--token-ids", "1,2", "--output", "/dev/stdout", "--quiet", "--load-threads", 1)
        check_refused("damage that nothing reads", *done, file.name)
    file = rank_files(MODELS["large-two"])[1]
    size = file.stat().st_size
    refused("large-two", "the last leaf", size - 5000)
    refused("large-two", "the embedding", 2 * MIB + 300000, "--ranks", "thread")
    refused("packed", "a layer", rank_files(MODELS["packed"])[-1].stat().st_size // 2)
    with damaged(file, size - 5000):
        if curl:
            with Gate(MODELS["large-two"]) as gate:
                check_refused("damage behind a URL", *engine("generate", gate.url, *PROMPT, *GENERATE, "--quiet"), file.name)
        rc, out, problem = engine("generate", MODELS["large-two"], *PROMPT, *GENERATE, "--quiet", "--verify", "off")
        report("--verify off compares nothing", None if rc == 0 and out else problem)


# ---- while weights are held back -------------------------------------------------------------------------------------


def cpu_s(pid):
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) * TICK_S
    except (OSError, ValueError):
        return 0.0


def test_streaming():
    """With the file's end held back, a rank spends the time of a long prompt: it runs the layers that have come. No token leaves it."""
    directory = MODELS["large"]
    prompt = ("--prompt", "And the LORD said unto Moses, " * (20 if SLOW else 75), "--threads", 1)
    wanted, problem = must("generate", directory, *prompt, *GENERATE, "--quiet", "--timings", "--max-tokens", 1)
    warm_s = timings_of(problem)["ranks"][0]["cpu_s"]
    # Behind the layers: norm and head.
    size = rank_files(directory)[0].stat().st_size
    with Gate(directory, begin=size - 2 * MIB) as gate:
        process = subprocess.Popen([str(w) for w in (TPENGINE, "generate", gate.url, *prompt, *GENERATE, "--quiet", "--max-tokens", 1)],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN)
        ranks = wait_until(lambda: children(process.pid))
        busy = wait_until(lambda: gate.held and cpu_s(ranks[0]) >= 0.6 * warm_s, 120)
        report("layers are computed while the file's end is held back",
               None if busy else f"{cpu_s(ranks[0])} s of CPU, {warm_s} s with all of the file, {gate.held} requests held")
        time.sleep(0.2)
        report("no token before the end of the file", None if process.poll() is None else f"exit {process.poll()}")
        gate.open()
        out, problem = process.communicate(timeout=120)
    expect("and then the same token", (process.returncode, out), (0, wanted))


def test_patience():
    """A rank that waits for weights for longer than --timeout is not lost, nor are those that wait for it; a stop ends it at once."""
    directory = MODELS["large-two"]
    wanted = tokens(directory)
    size = rank_files(directory)[1].stat().st_size
    for words in ((), ("--ranks", "thread")):
        with Gate(directory, part="rank-01", begin=size // 2) as gate:
            process = subprocess.Popen([str(w) for w in (TPENGINE, "generate", gate.url, *PROMPT, *GENERATE, "--quiet", "--timeout", 2, *words)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN)
            held = wait_until(lambda: gate.held)
            time.sleep(4.5)
            report(f"rank 1 waits for its weights {' '.join(words)}", None if held and process.poll() is None else f"exit {process.poll()}")
            gate.open()
            out, problem = process.communicate(timeout=120)
        expect(f"and then the same tokens {' '.join(words)}", (process.returncode, out, problem), (0, wanted, ""))
    # Before anybody waits for the ranks, and while they wait for weights. Bytes on their way are given up, and with them what a cache has of them.
    for part, begin in (("model.json", 0), ("tokenizer", 0), ("rank-", size // 2)):
        with Gate(directory, part=part, begin=begin) as gate, tempfile.TemporaryDirectory(dir=BUILD / "tests") as cache:
            process = subprocess.Popen([str(w) for w in (TPENGINE, "generate", gate.url, *PROMPT, *GENERATE, "--quiet", "--cache", cache)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=CLEAN)
            wait_until(lambda: gate.held)
            time.sleep(0.3)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            report(f"an interrupt ends a start that waits for {part}", None if process.returncode == 130 and (SLOW or time.monotonic() - begin < 2.5)
                   else f"exit {process.returncode} after {time.monotonic() - begin:.1f} s")
            left = [path.name for path in Path(cache).glob(".*.part")]
            report(f"and leaves nothing in the cache: {part}", str(left) if left and part == "rank-" else None)


def test_devices(work):
    """Devices add up, and of two ranks one has its weights when a command ends: without a comparison, too, the ranks go on in step."""
    library = BUILD / "tests" / "libtpengine_cuda_emulated.so"
    if SLOW or not library.exists():
        case_help.skip("weights that reach one device later", "two thousand emulated tokens take too long here" if SLOW else f"{library} was not built")
        return
    checkpoint, directory = work / "checkpoint", work / "head"
    shutil.rmtree(checkpoint, ignore_errors=True)
    subprocess.run([sys.executable, "scripts/make_synthetic_checkpoint.py", "--layers", "1", "--hidden", "128", "--intermediate", "32", "--heads", "2",
                    "--kv-heads", "2", "--head-dim", "16", "--vocab", "16384", checkpoint], check=True, stdout=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path("tests/model") / name, checkpoint)
    subprocess.run([TPSHARD, "--tp", "2", "--quant", "none", checkpoint, directory, "--quiet"], check=True)
    # More than the 2048 rows of a step: the first needs no head, of which rank 1's is held back.
    words = ("generate", directory, "--prompt", "z" * 2100, "--max-tokens", 1, "--ignore-eos", "--ids", "--temperature", 0, "--context", 4096, "--quiet",
             "--verify", "off", "--backend", "cuda", "--cuda-library", library, "--transport", "host", "--timeout", 30)
    with Gate(directory, part="rank-01", begin=rank_files(directory)[1].stat().st_size - MIB) as gate:
        process = subprocess.Popen([str(w) for w in (TPENGINE, "generate", gate.url, *words[2:])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**CLEAN, "EMULATED_DEVICES": "2"})
        ranks = wait_until(lambda: (found if len(found := children(process.pid)) == 2 else None)) or [process.pid] * 2
        held = wait_until(lambda: gate.held)
        # Until rank 1 does nothing but wait; rank 0 polls its device, whose last sum an emulated device of rank 1 makes when its host has come so far.
        before_s, end = -1.0, time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end and (now_s := cpu_s(ranks[1])) > before_s + 0.2:
            before_s = now_s
            time.sleep(2)
        report("two devices wait for the weights of one", None if held and process.poll() is None else process.communicate()[1][-600:])
        gate.open()
        out, problem = process.communicate(timeout=120)
    expect("and then the same token", (process.returncode, out, problem), engine(*words, EMULATED_DEVICES="2"))


def test_cache(work):
    """Rank files are kept where --cache says, and not asked for again; a token opens the door, from the environment alone."""
    directory, cache = MODELS["two"], work / "cache"
    wanted = tokens(directory)
    with Gate(directory, token="sesame") as gate:
        rc, out, problem = engine("generate", gate.url, *PROMPT, *GENERATE, "--quiet")
        report("without a token", None if rc == 5 and not out and "401" in problem else f"exit {rc}: {problem}")
        done = engine("generate", gate.url, *PROMPT, *GENERATE, "--quiet", "--cache", cache, TPENGINE_TOKEN="sesame")
        expect("with one", done, (0, wanted, ""))
    with Gate(directory, begin=0) as gate:  # no byte of a rank file
        done = engine("generate", gate.url, *PROMPT, *GENERATE, "--quiet", "--cache", cache, "--cache-limit", "1GiB", "--timings")
        expect("from the cache", (done[:2], gate.held), ((0, wanted), 0))
        check_timings("timings from the cache", timings_of(done[2]), directory)
        done = engine("tokenize", gate.url, "In the beginning", "--cache", cache)
        expect("tokenize takes a URL and its options", done[0], 0)
    with Gate(directory) as gate:  # what is said of it names the path
        done = engine("generate", gate.url, *PROMPT, *GENERATE, "--quiet", "--cache", os.fsdecode(b"/dev/null/\xff\xfe"), "--timings")
        expect("a cache whose name is no text", done[:2], (0, wanted))
        notes = [rank["note"] for rank in timings_of(done[2])["ranks"]]
        report("and timings of it", None if all("/dev/null/??" in note for note in notes) else str(notes))


class Serve(Server):
    """Not waited for: weights may be held back."""

    def __init__(self, place, *words):
        super().__init__(place, *words, ready=False)

    def asked(self):
        """Status and body; None when nobody listens any more."""
        try:
            code, _, text = self.ask("POST", "/v1/completions", {"prompt": "In the beginning", "max_tokens": 4, "temperature": 0})
            return code, text
        except OSError:
            return None, ""


def test_serve_loading():
    directory = MODELS["large-two"]
    size = rank_files(directory)[0].stat().st_size
    with Gate(directory, begin=size // 2) as gate, Serve(gate.url) as server:
        held = wait_until(lambda: gate.held)
        report("it listens while weights are held back", None if held and wait_until(lambda: server.status("/ping") == 204) else server.text())
        expect("what is asked meanwhile", [server.status("/health"), server.asked()[0]], [503, 503])
        loading = wait_until(lambda: [r for r in json.loads(server.get("/v1/stats"))["ranks"] if 0 < r["loaded_bytes"] < r["file_bytes"]])
        report("the part that is there is said", None if loading else server.get("/v1/stats"))
        time.sleep(0.3)
        expect("it is not ready before all is there", server.status("/ping"), 204)
        gate.open()
        report("it is ready then", None if wait_until(lambda: server.status("/ping") == 200) else server.text())
        expect("and answers", server.asked()[0], 200)
        served = {name: sent for name, sent in gate.sent.items() if name.startswith("rank-")}
        wrong = {file.name: served.get(file.name) for file in rank_files(directory) if not 0.99 <= served.get(file.name, 0) / file.stat().st_size <= 1.01}
        report("each rank fetches its own file, once", str(wrong) if wrong else None)
        loads = [line for line in server.lines() if "loaded" in line.values()]
        report("the log tells of the load", None if len(loads) == 2 and all(line["path"] == "read" for line in loads) else str(loads))
        page = server.get("/metrics")
        report("so do the metrics", None if 'rank="1",phase="verify"} ' in page and 'rank="0",path="read"} ' in page else page[-2000:])


def test_serve_waiting():
    """While the manifest or the tokenizer is held back, a server takes signals, and sees that a rank is lost."""
    directory = MODELS["two"]
    for part, what, status in (("model.json", "SIGTERM", 143), ("tokenizer", "SIGTERM", 0), ("tokenizer", "a lost rank", 7)):
        with Gate(directory, part=part, begin=0) as gate, Serve(gate.url) as server:
            wait_until(lambda: gate.held)
            ranks = wait_until(server.ranks) if part == "tokenizer" else []
            if part == "model.json":
                wait_until(lambda: server.status("/ping"))
                told = {path: server.status(path) for path in ("/ping", "/health", "/metrics", "/v1/models", "/v1/stats")}
                told["completion"] = server.asked()[0]
                told["name"] = json.loads(server.get("/v1/models"))["data"][0]["id"]
                expect("before the manifest is there", told, {"/ping": 204, "/health": 503, "/metrics": 200, "/v1/models": 200, "/v1/stats": 200, "completion": 503, "name": "dir"})
            time.sleep(0.3)
            os.kill(ranks[1] if what == "a lost rank" else server.process.pid, signal.SIGKILL if what == "a lost rank" else signal.SIGTERM)
            ended = wait_until(lambda: server.process.poll() is not None, 20 if SLOW else 8)
            report(f"{what} while {part} is held back", None if ended and server.process.returncode == status else
                   f"exit {server.process.returncode}: {server.text()[-600:]}")
    with Gate(directory) as gate, Serve(gate.url.replace("//", "//me:secret@").replace("/dir", "/?sig=secret")) as server:
        wait_until(lambda: server.status("/ping") == 200)
        shown = [path for path in ("/v1/models", "/v1/stats", "/metrics", "/props", "/version") if "secret" in server.get(path) or "127.0.0.1" in server.get(path)]
        report("a URL's secrets are no model's name", f"{shown}" + server.text() if shown or "secret" in server.text() else None)
    for words, status, sentence in ((["ftp://127.0.0.1/dir"], 2, "http"), ([directory, "--cache-limit", "1G"], 2, "--cache-limit without --cache")):
        with Serve(*words) as server:
            server.process.wait(60)
            report(f"nobody listens for {words}", None if server.process.returncode == status and sentence in server.text() and "listening" not in server.text() else server.text())
    with Gate(directory, token="sesame") as gate, Serve(gate.url) as server:
        server.process.wait(60)
        report("a server that gets no manifest", None if server.process.returncode == 5 and "401" in server.text() else server.text()[-600:])
    with tempfile.TemporaryDirectory(dir=BUILD / "tests") as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        (Path(copy) / "tokenizer.bin").write_bytes(b"x")
        with Serve(copy) as server:
            server.process.wait(60)
            text = server.text()
            report("a server without its tokenizer", None if server.process.returncode == 4 and "tokenizer.bin" in text and "ready" not in text else
                   f"exit {server.process.returncode}: {text[-600:]}")


def test_bytes():
    """What the kernel counts: each rank reads its file once, and nothing of the others'."""
    directory = MODELS["large-two"]
    with Serve(directory, "--load", "read") as server:
        report("a server from files", None if wait_until(lambda: server.status("/ping") == 200) else server.text())
        for file, pid in zip(rank_files(directory), server.ranks(), strict=True):
            read, size = figure(f"/proc/{pid}/io", "rchar:"), file.stat().st_size
            report(f"{file.name}: bytes read", None if size <= read <= 1.01 * size + 65536 else f"{read} of {size}")
    with Serve(directory, "--load", "map") as server:
        # A file that is in use is shortened: a sentence, not a signal.
        report("a server on mapped files", None if wait_until(lambda: server.status("/ping") == 200) else server.text())
        file = rank_files(directory)[1]
        content = file.read_bytes()
        os.truncate(file, 4 * MIB)
        drop_from_cache(file)
        status, body = server.asked()
        ended = wait_until(lambda: server.process.poll() is not None)
        file.write_bytes(content)
        wrong = [] if ended and server.process.returncode == 5 else [f"exit {server.process.returncode}"]
        wrong += [f"no {word!r}" for word in (file.name, "shortened") if word not in server.text()]
        wrong += [f"a client is told {body}"] if ".tpshard" in body else []
        report("a file that is shortened in use", "; ".join(wrong) + server.text()[-600:] if wrong or status == 200 else None)


def main():
    """All parts, or those that are named."""
    work = Path(tempfile.mkdtemp(prefix="start-", dir=BUILD / "tests"))
    try:
        make_models(work)
        curl = has_curl()
        parts = {"libraries": test_libraries, "paths": test_paths, "damage": lambda: test_damage(curl), "bytes": test_bytes}
        if curl:
            parts.update(streaming=test_streaming, cache=lambda: test_cache(work), patience=test_patience, devices=lambda: test_devices(work), serve=test_serve_loading,
                         waiting=test_serve_waiting)
        else:
            print("SKIP libcurl is not here: nothing comes from a server")
        for name in sys.argv[1:] or parts:
            parts[name]()
    finally:
        shutil.rmtree(work)
    return case_help.status()


sys.exit(main())

#!/usr/bin/env python3
"""tpengine serve on the bundled model, as its users meet it: start-up, answers equal to `tpengine generate`, company, disconnects, a full queue,
drains, lost ranks, restarts, metrics, logs, sockets, ports and keys."""
import concurrent.futures
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import case_help
import serve_help
from case_help import expect, free_port, report, wait_until

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
SLOW = bool(os.environ.get("TEST_QUICK"))  # sanitizers: no claims on time
PROMPTS = ["In the beginning", "And the LORD said unto Moses,", "Blessed are", "Now there was a man of the tribe of Benjamin, and he went up",
           "The king", "Thou shalt not", "Behold, I", "And it came to pass in those days"]
LONG = {"max_tokens": 300 if SLOW else 900, "ignore_eos": True, "temperature": 0}


# ---- the server and its clients --------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Server(serve_help.Server):
    def metrics(self):
        return parse_metrics(self.get("/metrics"))

    def metric(self, name):
        return sum(value for key, value in self.metrics().items() if key[0] == name)


class Stream(threading.Thread):
    """A streamed completion on a thread of its own; events as they came, with their times."""

    def __init__(self, server, prompt, path="/v1/completions", **parameters):
        super().__init__(daemon=True)
        self.server, self.events, self.times, self.status, self.broken = server, [], [], None, None
        self.path, self.body = path, {"prompt": prompt, "stream": True, **parameters}
        self.connection = server.connect()
        self.start()

    def run(self):
        try:
            self.connection.request("POST", self.path, json.dumps(self.body), {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            self.status = answer.status
            if self.status != 200:
                self.events.append(answer.read().decode())
                return
            for line in answer:
                if line.startswith(b"data: "):
                    self.times.append(time.monotonic())
                    self.events.append(line[6:].decode().strip())
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.broken = error  # AttributeError, ValueError: closed by the test under our hands
        finally:
            self.connection.close()

    def text(self):
        return "".join(json.loads(event)["choices"][0].get("text", "") for event in self.events
                       if event != "[DONE]" and json.loads(event).get("choices"))

    def finished(self):
        return self.status == 200 and self.events.count("[DONE]") == 1 and self.events[-1] == "[DONE]"

    def failed_well(self):
        """One error event at the end and no [DONE]; or a 503 before the stream began."""
        if self.status == 503:
            return "error" in json.loads(self.events[0])
        return bool(self.events) and "error" in json.loads(self.events[-1]) and "[DONE]" not in self.events


def streams_running(server, count, **parameters):
    streams = [Stream(server, PROMPTS[i % len(PROMPTS)], **{**LONG, **parameters}) for i in range(count)]
    if not wait_until(lambda: all(len(stream.events) > 1 for stream in streams), 30):
        raise RuntimeError("streams do not start: " + server.text())
    return streams


def join(streams, seconds=60):
    for stream in streams:
        stream.join(seconds)


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')


def parse_metrics(text):
    """{(name, labels): value}"""
    values = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, labels, value = SAMPLE.fullmatch(line).groups()
        values[name, labels] = float(value)
    return values


# ---- start -----------------------------------------------------------------------------------------------------------


def test_start():
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.bind(str(WORK / "notify"))
    notices.settimeout(10)
    with Server(MODEL, ready=False, environment={"NOTIFY_SOCKET": str(WORK / "notify")}) as server:
        # A rank that is stopped keeps the server loading.
        stopped = wait_until(server.ranks, 20, 0.0001)
        os.kill(stopped[0], signal.SIGSTOP)
        first = wait_until(lambda: server.status("/ping"), 20, 0.0005)
        expect("while it loads, /ping is 204", (first, server.status("/ping")), (204, 204))
        status, headers, body = server.ask("GET", "/health")
        report("while it loads, /health is 503 and says so", None if status == 503 and "loading" in body else f"{status} {body}")
        status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
        report("while it loads, requests get 503 and an error in OpenAI's shape",
               None if status == 503 and json.loads(body)["error"]["message"] and headers["Retry-After"] else f"{status} {body}")
        expect("alive while it loads", server.status("/health?live=1"), 200)
        os.kill(stopped[0], signal.SIGCONT)
        server.wait_ready()
        expect("ready: /health is 200", server.status("/health"), 200)
        messages = [line["message"] for line in server.lines()]
        report("the log tells the phases", None if messages.index("listening") < messages.index("loading") < messages.index("ready")
               else messages)
        heard = ""
        while "READY=1" not in heard:
            heard += notices.recv(4096).decode() + "\n"
        report("systemd hears of it", None if heard.startswith("STATUS=") else heard)
        expect("SIGTERM when idle: exit 0", server.end(), 0)
    notices.close()

    # From exec to the first answer, and to readiness.
    listened, ready = [], []
    for _ in range(3):
        with Server(MODEL, ready=False) as server:
            wait_until(lambda: server.status("/ping"), 20, 0.0005)
            listened.append(time.monotonic() - server.begin)
            server.wait_ready()
            ready.append(time.monotonic() - server.begin)
    print(f"# first answer after {min(listened) * 1e3:.0f} ms, ready after {min(ready) * 1e3:.0f} ms (best of 3)")
    report("the first answer comes at once", None if min(listened) < (5 if SLOW else 0.5) else listened)

    with Server(MODEL, ready=False) as server:
        os.kill(wait_until(server.ranks, 20, 0.0001)[0], signal.SIGSTOP)
        wait_until(lambda: server.status("/ping"))
        begin = time.monotonic()
        expect("SIGTERM while it loads: exit 0", server.end(), 0)
        report("and soon", None if time.monotonic() - begin < 8 else time.monotonic() - begin)
    with Server(MODEL, ready=False) as server:
        os.kill(wait_until(server.ranks, 20, 0.0001)[0], signal.SIGKILL)
        expect("a rank killed while it loads: exit 7", server.process.wait(20), 7)
        report("and it is named", None if "rank " in server.text() and "signal 9" in server.text() else server.text())
    shutil.copytree(MODEL, WORK / "flipped")
    with open(WORK / "flipped" / "rank-01-of-02.tpshard", "r+b") as file:
        file.seek(-70000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with Server(WORK / "flipped", "--restart", ready=False) as server:
        expect("a flipped bit: exit 4, and no restart", server.process.wait(20), 4)
        report("it is named", None if "checksum" in server.text() else server.text())
    with Server(WORK / "nowhere", ready=False) as server:
        expect("no such directory: exit 5", server.process.wait(20), 5)
    with Server(MODEL) as first, Server(MODEL, "--port", first.port, ready=False) as second:
        expect("a port that is taken: exit 2 or 5", second.process.wait(20) in (2, 5), True)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers(server):
    for prompt in PROMPTS[:3]:
        done = subprocess.run([TPENGINE, "generate", MODEL, "--prompt", prompt, "--max-tokens", "40", "--temperature", "0", "--json", "--quiet"],
                              capture_output=True, text=True, check=True)
        generated = json.loads(done.stdout)["choices"][0]
        answer = server.complete(prompt, max_tokens=40)
        choice = answer["choices"][0]
        expect(f"as tpengine generate: {prompt!r}", (choice["text"], choice["finish_reason"], answer["usage"]["prompt_tokens"]),
               (generated["text"], generated["finish_reason"], generated["prompt_tokens"]))
        stream = Stream(server, prompt, max_tokens=40, temperature=0)
        stream.join(60)
        report(f"streamed alike: {prompt!r}", None if stream.text() == choice["text"] and stream.finished() else stream.events)

    alone = [server.complete(prompt, max_tokens=60, ignore_eos=True)["choices"][0]["text"] for prompt in PROMPTS]
    report("answers differ from each other", None if len(set(alone)) == len(PROMPTS) else alone)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [i % len(PROMPTS) for i in range(24)]
        together = list(pool.map(lambda i: server.complete(PROMPTS[i], max_tokens=60, ignore_eos=True)["choices"][0]["text"], asked))
    report("greedy answers are the same in company", None if together == [alone[i] for i in asked] else
           [i for i, text in zip(asked, together) if text != alone[i]])
    return alone


def test_disconnect(server):
    times = []
    for _ in range(3):
        (stream,) = streams_running(server, 1)
        before = server.metric("tpengine_generation_tokens_total")
        stream.connection.sock.shutdown(socket.SHUT_RDWR)
        begin = time.monotonic()
        wait_until(lambda: server.metric("tpengine_num_requests_running") == 0, 20, 0.001)
        times.append(time.monotonic() - begin)
        stream.join(10)
        produced = server.metric("tpengine_generation_tokens_total") - before
        report("a client that goes frees its place", None if produced < LONG["max_tokens"] * 2 / 3 else f"{produced:g} tokens later")
    print(f"# after {min(times) * 1e3:.0f} to {max(times) * 1e3:.0f} ms")
    report("its cache is given back", None if server.metric("tpengine_kv_cache_usage_perc") < 0.01 else
           server.metric("tpengine_kv_cache_usage_perc"))


def test_metrics(server):
    before = server.metrics()
    server.complete("And", max_tokens=7, ignore_eos=True)
    after = server.metrics()

    def moved(name):
        return sum(value - before[key] for key, value in after.items() if key[0] == name)

    report("metrics count a request", None if (
        moved("tpengine_generation_tokens_total"), moved("tpengine_request_success_total"), moved("tpengine_e2e_request_latency_seconds_count"),
        moved("tpengine_time_to_first_token_seconds_count"), moved("tpengine_request_generation_tokens_sum")) == (7, 1, 1, 1, 7) else
        {key: value for key, value in after.items() if before.get(key) != value})
    names = {key[0] for key in after}
    wanted = {"tpengine_" + name for name in (
        "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total "
        "inter_token_latency_seconds_bucket request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum "
        "rank_up rank_losses_total rank_step_seconds collective_seconds load_bytes_total cold_start_seconds rank_restarts_total http_responses_total").split()}
    report("every metric that is promised is there", wanted - names)
    ranks = {labels: value for (name, labels), value in after.items() if name == "tpengine_rank_up"}
    report("both ranks are up", None if list(ranks.values()) == [1, 1] else ranks)
    phases = {re.search('phase="([a-z]+)"', labels)[1]: value for (name, labels), value in after.items() if name == "tpengine_cold_start_seconds"}
    report("phases of the start", None if phases.keys() >= {"listen", "prepare", "load", "ready"} and phases["ready"] > phases["load"] > 0 else phases)
    for name in {key[0][:-7] for key in after if key[0].endswith("_bucket")}:
        counts = [value for key, value in after.items() if key[0] == name + "_bucket"]
        if counts != sorted(counts) or counts[-1] != sum(v for key, v in after.items() if key[0] == name + "_count"):
            report(f"histogram {name}", counts)
    status, headers, text = server.ask("GET", "/metrics")
    report("its type is Prometheus' text", None if headers["Content-Type"].startswith("text/plain; version=0.0.4") else headers["Content-Type"])
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        print("ok prometheus_client reads it # SKIP not installed")
        return
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    report("prometheus_client reads it", None if families.get("tpengine_time_to_first_token_seconds") == "histogram" and
           families.get("tpengine_generation_tokens") == "counter" else families)


def test_logs(server):
    server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 3, "temperature": 0, "ignore_eos": True}, {"X-Request-Id": "log-test-1"})
    server.ask("GET", "/nowhere")

    def line_of_request():
        return [line for line in server.lines() if "log-test-1" in line.values()]

    lines = wait_until(line_of_request, 5)
    line = lines[0] if lines else {}
    report("one line for a request", None if len(lines) == 1 and line["level"] == "info" else lines)
    report("with its route, status, tokens and times", None if {"/v1/completions", 200, 3} <= set(line.values()) and
           any(isinstance(value, float) for value in line.values()) else line)
    report("every line is JSON", [text for text in server.text().splitlines() if not text.startswith("{")])


# ---- limits, drains, lost ranks --------------------------------------------------------------------------------------


def test_full_queue():
    with Server(MODEL, "--max-batch", 1, "--max-queue", 2) as server:
        streams = [Stream(server, PROMPTS[i], **LONG) for i in range(3)]
        wait_until(lambda: server.metric("tpengine_num_requests_waiting") == 2)
        status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
        report("a full queue: 429 and Retry-After", None if status == 429 and int(headers["Retry-After"]) >= 1 and "error" in json.loads(body) else
               f"{status} {headers} {body}")
        streams[2].connection.sock.shutdown(socket.SHUT_RDWR)
        report("one that waits goes: there is room", None if wait_until(
            lambda: server.metric("tpengine_num_requests_waiting") == 1, 5) else "still waits")
        join(streams[:2], 240 if SLOW else 60)
        report("the others end well", [stream.events[-1:] for stream in streams[:2] if not stream.finished()])


def test_drain():
    with Server(MODEL, "--drain-timeout", 60) as server:
        streams = streams_running(server, 6, max_tokens=300)
        idle = server.connect()
        idle.connect()
        server.process.send_signal(signal.SIGTERM)
        refused = wait_until(lambda: server.status("/health") == 503, 10)
        report("a drain: /health is 503", None if refused else "no")
        status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
        expect("a drain: new requests get 503 and the connection ends", (status, headers["Connection"]), (503, "close"))
        join(streams)
        report("a drain: streams end well", [stream.events[-1:] for stream in streams if not stream.finished()])
        expect("a drain: exit 0", server.process.wait(20), 0)
    with Server(MODEL, "--drain-timeout", "0.2") as server:
        streams = streams_running(server, 12)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        expect("a drain that takes too long: exit 143", server.process.wait(20), 143)
        report("and soon", None if time.monotonic() - begin < 5 else time.monotonic() - begin)
        join(streams)
        report("its streams end with an error", [stream.events[-1:] for stream in streams if not stream.failed_well()])
    with Server(MODEL) as server:
        streams = streams_running(server, 12)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: any(line["message"] == "draining" for line in server.lines()), 10)
        expect("a second signal ends at once: exit 130", server.end(signal.SIGINT, 5), 130)
        join(streams)
    with Server(MODEL) as server:
        # Everything has ended but an answer that nobody reads: the server waits a while for that.
        body = json.dumps({"prompt": PROMPTS[1] * 60000}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            report("a long answer begins", None if client.recv(15) == b"HTTP/1.1 200 OK" else "no")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: any(line["message"] == "draining" for line in server.lines()), 10)
            time.sleep(0.3)
            begin = time.monotonic()
            expect("a second signal while the server closes: exit 143", server.end(signal.SIGTERM, 10), 143)
            report("at once", None if time.monotonic() - begin < (10 if SLOW else 1.5) else time.monotonic() - begin)


def kill_rank(server, streams, rank):
    """Kills a rank; seconds until the last client has heard of it."""
    begin = time.monotonic()
    os.kill(server.ranks()[rank], signal.SIGKILL)
    join(streams, 20)
    return max((stream.times[-1] - begin for stream in streams), default=0)


def test_lost_rank():
    for rank in (0, 1):
        with Server(MODEL) as server:
            streams = streams_running(server, 8)
            waiting = server.connect()
            waiting.connect()
            heard = kill_rank(server, streams, rank)
            expect(f"rank {rank} killed: exit 7", server.process.wait(20), 7)
            report(f"rank {rank} killed: every client gets an error event", [s.events[-1:] for s in streams if not s.failed_well()])
            report(f"rank {rank} killed: within a second", None if heard < (5 if SLOW else 1) else heard)
            print(f"# {heard * 1e3:.0f} ms")
    with Server(MODEL, "--timeout", 1) as server:
        streams = streams_running(server, 4)
        os.kill(server.ranks()[1], signal.SIGSTOP)
        expect("a rank that hangs: exit 7", server.process.wait(20), 7)
        join(streams)
        report("a rank that hangs: every client gets an error event", [s.events[-1:] for s in streams if not s.failed_well()])
        report("a rank that hangs is named", None if "rank 1 " in server.text() else server.text())
    with Server(MODEL) as server:
        begin = time.monotonic()
        os.kill(server.ranks()[1], signal.SIGKILL)
        expect("killed when idle: exit 7", server.process.wait(20), 7)
        took = time.monotonic() - begin
        print(f"# after {took * 1e3:.0f} ms")
        report("killed when idle: soon", None if took < 5 else took)


def test_restart(alone):
    with Server(MODEL, "--restart", "--restart-delay", "0.2", "--restart-limit", 4) as server:
        ranks = server.ranks()
        descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        for turn in range(3):
            streams = streams_running(server, 4) if turn < 2 else []
            begin = time.monotonic()
            heard = kill_rank(server, streams, turn % 2)
            seen = wait_until(lambda: server.status("/health") == 503, 5, 0.001)
            server.wait_ready()
            print(f"# clients heard after {heard * 1e3:.0f} ms, ready again after {(time.monotonic() - begin) * 1e3:.0f} ms")
            report(f"restart {turn + 1}: clients get error events", [s.events[-1:] for s in streams if not s.failed_well()])
            report(f"restart {turn + 1}: /health was 503", None if seen else "no")
            expect(f"restart {turn + 1}: the same answer",
                   server.complete(PROMPTS[turn], max_tokens=60, ignore_eos=True)["choices"][0]["text"], alone[turn])
            expect(f"restart {turn + 1}: counted", server.metric("tpengine_rank_restarts_total"), turn + 1)
        expect("which ranks were lost", [value for (name, _), value in sorted(server.metrics().items()) if name == "tpengine_rank_losses_total"], [2, 1])
        said = [line for line in server.lines() if line["level"] == "error"]
        report("the log tells why", None if len(said) == 3 and all("signal 9" in line["error"] for line in said) else said)
        report("the ranks are new", None if not set(ranks) & set(server.ranks()) else ranks)
        report("no descriptor is left", None if len(os.listdir(f"/proc/{server.process.pid}/fd")) <= descriptors + 2 else
               f"{descriptors} before, {len(os.listdir(f'/proc/{server.process.pid}/fd'))} after")
        held = [os.readlink(f"/proc/{server.ranks()[0]}/fd/{fd}") for fd in os.listdir(f"/proc/{server.ranks()[0]}/fd")]
        report("a rank holds no socket of the server", [name for name in held if name.startswith("socket:")])
        os.kill(server.ranks()[0], signal.SIGKILL)
        report("one more restart", None if wait_until(lambda: server.status("/ping") == 200 and
                                                      server.metric("tpengine_rank_restarts_total") == 4, 20) else server.text())
        os.kill(server.ranks()[0], signal.SIGKILL)
        expect("the limit of restarts: exit 7", server.process.wait(10), 7)

    with Server(MODEL, "--restart", "--restart-delay", 0, "--restart-limit", 1000) as server:
        def figures():
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(os.listdir(f"/proc/{server.process.pid}/fd"))
        for turn in range(5 if SLOW else 25):
            kill_rank(server, [], turn % 2)
            if not wait_until(lambda: server.metric("tpengine_rank_restarts_total") == turn + 1 and server.status("/ping") == 200, 20):
                raise RuntimeError(f"crash {turn + 1}: not ready again: " + server.text())
            server.complete("And", max_tokens=2)
            if turn == (2 if SLOW else 12):  # the heap has found its shape: what a restart frees may lie behind what stays
                before = figures()
        after = figures()
        report("memory and descriptors stay flat over many crashes", None if (SLOW or after[0] < before[0] + 2000) and after[1] <= before[1] + 2 else
               f"{before} kB and descriptors before, {after} after")


# ---- sockets, ports, keys --------------------------------------------------------------------------------------------


def test_sockets():
    path = str(WORK / "socket")
    with Server(MODEL, "--unix", path, environment={"PORT": str(free_port())}, ready=False, port=None) as server:
        def status():
            try:
                return server.ask("GET", "/ping", connection=UnixConnection(path, 5))[0]
            except OSError:
                return None
        expect("a Unix socket", wait_until(lambda: status() == 200), True)
        expect("is its owner's alone", os.stat(path).st_mode & 0o777, 0o600)
        report("and no TCP, whatever PORT is", [line for line in server.lines() if line["message"] == "listening" and "port" in line])
        with Server(MODEL, "--unix", path, ready=False, port=None) as second:
            expect("a Unix socket that is in use: exit 2", second.process.wait(20), 2)
        server.process.kill()
        server.process.wait()
    with Server(MODEL, "--unix", path, ready=False, port=None) as server:
        expect("a stale Unix socket is replaced", wait_until(lambda: status() == 200), True)

    port, health = free_port(), free_port()
    with Server(MODEL, environment={"PORT": str(port), "PORT_HEALTH": str(health)}, port=port) as server:
        expect("PORT", server.status("/v1/models"), 200)
        server.port = health
        expect("PORT_HEALTH answers health checks alone", (server.status("/ping"), server.status("/health"), server.status("/v1/models")),
               (200, 200, 404))
    with Server(MODEL, environment={"PORT": "1", "TPENGINE_PORT": str(port)}, port=port) as server:
        expect("TPENGINE_PORT goes before PORT", server.status("/ping"), 200)
    with Server(MODEL, environment={"PORT": "x"}, ready=False, port=None) as server:
        expect("a PORT that is none: exit 2", server.process.wait(20), 2)
    with Server(MODEL, "--port", 0, "--health-port", 0, port=None, ready=False) as server:
        ports = wait_until(lambda: {line["port"] for line in server.lines() if "port" in line} if "loading" in server.text() else None)
        report("two free ports", None if ports and len(ports) == 2 else server.text())
    with Server(MODEL, "--host", "0.0.0.0", "--port", 0, "--metrics-names", "vllm", "--served-model-name", "a/b", port=None, ready=False) as server:
        lines = wait_until(lambda: [line for line in server.lines() if "port" in line])
        server.port = lines[0]["port"]
        server.wait_ready()
        report("open to all without a key: a warning", None if any(line["level"] == "warning" for line in server.lines()) else server.text())
        names = server.metrics()
        report("--metrics-names vllm", None if ("vllm:num_requests_running", 'model_name="a/b"') in names else names)
        expect("--served-model-name", json.loads(server.ask("GET", "/v1/models")[2])["data"][0]["id"], "a/b")


def test_keys():
    (WORK / "keys").write_text("from-file-1\n\n  from-file-2  \r\n")
    with Server(MODEL, "--api-key", "given", "--api-key-file", WORK / "keys") as server:
        for key, wanted in ((None, 401), ("wrong", 401), ("give", 401), ("given", 200), ("from-file-1", 200), ("from-file-2", 200), ("", 401)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            expect(f"key {key!r}", server.ask("GET", "/v1/models", headers=headers)[0], wanted)
        expect("health checks need none", (server.status("/health"), server.status("/ping"), server.status("/metrics")), (200, 200, 401))
        report("keys stay out of the log", [key for key in ("given", "from-file") if key in server.text()])
    (WORK / "no-keys").write_text("\n \n")
    with Server(MODEL, "--api-key-file", WORK / "no-keys", ready=False) as server:
        expect("a file without keys: exit 2", server.process.wait(20), 2)


def main():
    subprocess.run([TPSHARD, "--tp", "2", "--quant", "int4", "tests/model", MODEL, "--quiet"], check=True)
    test_start()
    with Server(MODEL) as server:
        alone = test_answers(server)
        test_disconnect(server)
        test_metrics(server)
        test_logs(server)
        expect("SIGTERM: exit 0", server.end(), 0)
    test_full_queue()
    test_drain()
    test_lost_rank()
    test_restart(alone)
    test_sockets()
    test_keys()
    return case_help.status()


if __name__ == "__main__":
    if not TPENGINE.exists() or not TPSHARD.exists():
        print(f"SKIP no {TPENGINE}: build it first")
        sys.exit(77)
    # Sockets' paths are short.
    with tempfile.TemporaryDirectory(prefix="tpengine-serve-") as work:
        WORK = Path(work)
        MODEL = WORK / "model"
        sys.exit(main())

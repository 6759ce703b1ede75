"""What the load programs share: a tpengine serve of their own, requests at the level of bytes, answers taken apart strictly, the process' figures."""
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

BUILD = os.environ.get("BUILD", "build")


class Server:
    """tpengine serve on a free port. Ended when the block is left."""

    def __init__(self, shards, *options):
        self.log = tempfile.TemporaryFile()
        command = [os.path.join(BUILD, "tpengine"), "serve", shards, "--port", 0, "--log-format", "json", "--no-request-log", *options]
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stderr=self.log)
        self.pid, self.port = self.process.pid, None

    def __enter__(self):
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            if self.port is None:
                self.port = next((line["port"] for line in self.lines() if "port" in line), None)
            elif asyncio.run(status_of(self.port, "/ping")) == 200:
                return self
            time.sleep(0.02)
        self.__exit__()
        sys.exit("the server does not get ready: " + self.text())

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def text(self):
        return os.pread(self.log.fileno(), 1 << 26, 0).decode(errors="replace")

    def lines(self):
        """The log's lines; the last may be half written."""
        return [json.loads(line) for line in self.text().split("\n")[:-1] if line.startswith("{")]

    def end(self, seconds=60):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def ranks(self):
        """The children of the server's main thread, which forks them."""
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/children", encoding="ascii") as children:
                return [int(pid) for pid in children.read().split()]
        except OSError:
            return []

    def figures(self):
        """KiB of memory and descriptors of the process that serves."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            rss = int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])
        return rss, len(os.listdir(f"/proc/{self.pid}/fd"))


class Broken(Exception):
    """An answer that breaks the protocol, or ends too early."""


class Answer:
    """One answer, taken apart from the bytes of a connection that the server closed."""

    def __init__(self, raw):
        head, found, rest = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        if not found or not re.fullmatch(r"HTTP/1\.1 \d\d\d .*", lines[0]):
            raise Broken(f"no answer, but {raw[:200]!r}")
        self.status = int(lines[0][9:12])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if self.headers.get("transfer-encoding") == "chunked":
            self.body = dechunk(rest)
        else:
            self.body = rest
            if len(rest) != int(self.headers.get("content-length", len(rest))):
                raise Broken(f"{len(rest)} bytes instead of Content-Length {self.headers['content-length']}")
        self.streamed = self.headers.get("content-type", "").startswith("text/event-stream")

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of a stream's events. Comments are left out."""
        if not self.body.endswith(b"\n\n"):
            raise Broken(f"the stream ends in the middle of an event: {self.body[-200:]!r}")
        return [part[6:].decode() for part in self.body[:-2].split(b"\n\n") if not part.startswith(b":")]

    def choices(self):
        """[(text, finish_reason)] by index, streamed or not; None when a stream ended with an error event instead."""
        if not self.streamed:
            return [((choice.get("message") or {}).get("content", choice.get("text")), choice["finish_reason"])
                    for choice in sorted(self.json()["choices"], key=lambda choice: choice["index"])]
        texts, reasons, events = {}, {}, self.events()
        if events and "error" in json.loads(events[-1] if events[-1] != "[DONE]" else "{}"):
            return None
        if events[-1:] != ["[DONE]"] or events.count("[DONE]") != 1:
            raise Broken(f"a stream without its one [DONE]: {events[-3:]}")
        for event in map(json.loads, events[:-1]):
            for choice in event["choices"]:
                index = choice["index"]
                if reasons.get(index):
                    raise Broken("text after finish_reason")
                texts[index] = texts.get(index, "") + (choice.get("text") or (choice.get("delta") or {}).get("content") or "")
                reasons[index] = choice["finish_reason"]
        return [(texts[index], reasons[index]) for index in sorted(texts)]


def dechunk(data):
    out, at = [], 0
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            raise Broken("the chunks end too early")
        size = int(data[at:end], 16)
        at = end + 2 + size
        if data[at:at + 2] != b"\r\n":
            raise Broken("a chunk ends too early")
        if size == 0:
            return b"".join(out)
        out.append(data[end + 2:at])
        at += 2


def request_bytes(path, body=None, method=None, headers=()):
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def exchange(port, request, seconds=60, on_data=None):
    """Sends the bytes and returns all that comes until the server closes. on_data(data), where given, sees each piece as it comes."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            pieces = []
            while piece := await reader.read(1 << 16):
                pieces.append(piece)
                if on_data:
                    on_data(piece)
            return b"".join(pieces)
        finally:
            writer.transport.abort()


async def ask(port, path, body=None, seconds=60, **others):
    return Answer(await exchange(port, request_bytes(path, body, **others), seconds))


async def status_of(port, path):
    try:
        return (await ask(port, path, seconds=5)).status
    except (OSError, TimeoutError, Broken):
        return None


async def metrics_of(port):
    """{name with labels: value}"""
    text = (await ask(port, "/metrics", seconds=20)).body.decode()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))}


async def metric_of(port, name):
    """Summed over its labels."""
    return sum(value for key, value in (await metrics_of(port)).items() if key.partition("{")[0] == name)


async def settled(port, seconds=30):
    """True once nothing runs or waits and the KV cache is given back."""
    end = time.monotonic() + seconds
    names = ("tpengine_num_requests_running", "tpengine_num_requests_waiting")
    while time.monotonic() < end:
        metrics = await metrics_of(port)
        if all(sum(v for k, v in metrics.items() if k.partition("{")[0] == name) == 0 for name in names) and \
                all(v < 0.01 for k, v in metrics.items() if k.startswith("tpengine_kv_cache_usage_perc")):
            return True
        await asyncio.sleep(0.1)
    return False


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * part))] if values else float("nan")


def finish(result, path):
    """Says what was wrong, writes the report where one is wanted; the exit status."""
    for what in result["wrong"]:
        print("wrong: " + what)
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 1 if result["wrong"] else 0

"""tpengine serve as test scripts start and ask it."""
import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, free_port, wait_until

TPENGINE = Path(os.environ.get("BUILD", "build")) / "tpengine"


class Started:
    """A program that runs, and what it writes to standard error; ended when the block is left."""

    def __init__(self, command, environment):
        self.log = tempfile.TemporaryFile("w+")
        self.begin = time.monotonic()
        self.process = subprocess.Popen([str(word) for word in command], stderr=self.log, stdin=subprocess.DEVNULL, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()

    def text(self):
        return os.pread(self.log.fileno(), 1 << 24, 0).decode()

    def end(self, number=signal.SIGTERM, seconds=30):
        self.process.send_signal(number)
        return self.process.wait(seconds)


def children(pid):
    """Of a process' main thread, which forks an engine's ranks."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Server(Started):
    """One tpengine serve, and its ranks with it."""

    def __init__(self, place, *words, environment=None, ready=True, port=True):
        """port: True for a free one, which is told to the server; else what it has by other means."""
        self.port = free_port() if port is True else port
        command = [TPENGINE, "serve", place, "--log-format", "json", "--drain-timeout", "10", *(["--port", self.port] if port is True else []), *words]
        super().__init__(command, {**CLEAN, **(environment or {})})
        if ready:
            self.wait_ready()

    def wait_ready(self):
        if not wait_until(lambda: self.process.poll() is not None or self.status("/ping") == 200, 60):
            raise RuntimeError("the server does not get ready: " + self.text())
        if self.process.poll() is not None:
            raise RuntimeError(f"the server has ended with {self.process.returncode}: " + self.text())

    def lines(self):
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def ranks(self):
        return children(self.process.pid)

    def connect(self, timeout=60):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method, path, body=None, headers=None, connection=None):
        """Status, headers, body."""
        connection = connection or self.connect()
        try:
            headers = dict(headers or {})
            if body is not None:
                body = json.dumps(body)
                headers["Content-Type"] = "application/json"
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def get(self, path):
        return self.ask("GET", path)[2]

    def status(self, path):
        """None while nobody listens."""
        try:
            return self.ask("GET", path, connection=self.connect(5))[0]
        except OSError:
            return None

    def complete(self, prompt, **parameters):
        code, _, text = self.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 30, "temperature": 0, **parameters})
        if code != 200:
            raise RuntimeError(f"status {code}: {text}")
        return json.loads(text)

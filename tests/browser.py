"""A headless Chromium, driven over its DevTools protocol with the standard library alone. Imported by test_page.py."""
import base64
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find():
    """The browser's program, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Socket:
    """The client's side of a WebSocket (RFC 6455): text frames."""

    def __init__(self, port, path):
        self.sock = socket.create_connection(("127.0.0.1", port), 30)
        key = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self.data = b""
        while b"\r\n\r\n" not in self.data:
            self.data += self.sock.recv(4096)
        head, self.data = self.data.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(head.decode())

    def take(self, count):
        while len(self.data) < count:
            more = self.sock.recv(1 << 16)
            if not more:
                raise ConnectionError("the browser has gone")
            self.data += more
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def send(self, text):
        data, mask = text.encode(), os.urandom(4)
        length = len(data)
        head = struct.pack("!BB", 0x81, 0x80 | length) if length < 126 else \
            struct.pack("!BBH", 0x81, 0x80 | 126, length) if length < 65536 else \
            struct.pack("!BBQ", 0x81, 0x80 | 127, length)
        self.sock.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))

    def receive(self, seconds):
        """A whole message; None when none begins in time."""
        message = b""
        while True:
            self.sock.settimeout(seconds if not self.data and not message else 30)
            try:
                first, second = self.take(2)
            except (TimeoutError, socket.timeout):
                return None
            length = second & 127
            if length == 126:
                length, = struct.unpack("!H", self.take(2))
            elif length == 127:
                length, = struct.unpack("!Q", self.take(8))
            data = self.take(length)
            if first & 15 in (0, 1):
                message += data
                if first & 128:
                    return message.decode()


class Browser:
    """One page. Console messages of level error, exceptions and refused loads are collected in `complaints`."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="browser-")
        self.log = open(Path(self.folder) / "log", "w+")
        self.process = subprocess.Popen(
            [find(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
             f"--user-data-dir={self.folder}/profile", "about:blank"], stdout=self.log, stderr=self.log,
            stdin=subprocess.DEVNULL)
        self.number, self.complaints = 0, []
        try:
            self.socket = self.open_socket()
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(domain + ".enable")
        except BaseException:
            self.close()
            raise

    def open_socket(self):
        port_file, end = Path(self.folder) / "profile/DevToolsActivePort", time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            try:
                port = int(port_file.read_text().splitlines()[0])
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/json/list")
                pages = [page for page in json.loads(connection.getresponse().read()) if page["type"] == "page"]
                if pages:
                    return Socket(port, "/" + pages[0]["webSocketDebuggerUrl"].split("/", 3)[3])
            except (OSError, ValueError, IndexError):
                pass
            time.sleep(0.05)
        raise RuntimeError("the browser does not start: " + (Path(self.folder) / "log").read_text()[-1000:])

    def notice(self, message):
        method, data = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(data["exceptionDetails"].get("exception", {}).get("description", data))[:400])
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(arg.get("value")) for arg in data["args"])[:400])
        elif method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.complaints.append(data["entry"]["text"][:400])

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            text = self.socket.receive(60)
            if text is None:
                raise RuntimeError(f"the browser does not answer {method}")
            message = json.loads(text)
            if message.get("id") != self.number:
                self.notice(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']['message']}")
            else:
                return message["result"]

    def run(self, script):
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", script))
        return result["result"].get("value")

    def wait(self, condition, seconds=30):
        """A JavaScript expression's first true value; the last one when it never is."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)) and time.monotonic() < end:
            time.sleep(0.05)
        return value

    def view(self, width, height, dark=False, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def key(self, name, **more):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, **more)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def shoot(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

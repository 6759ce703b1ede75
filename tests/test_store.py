#!/usr/bin/env python3
"""Models behind a URL, and servers that do what they should not: late, short, long, torn, reset, encoded, redirected, changed and damaged answers,
endless headers, drips and refusals. Right is: the file, byte for byte, or one sentence and its exit status. Also that a rank fetches its own file
alone, tokens and passwords go nowhere else, and what the cache does. The file is fetched as the engine does it, by `test_store fetch`; tpengine
itself at the end."""
import atexit
import concurrent.futures
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE, FETCH = BUILD / "tpshard", BUILD / "tpengine", BUILD / "tests" / "test_store"
QUICK = bool(os.environ.get("TEST_QUICK"))  # sanitizers: no claims on time
MIB = 1 << 20
CLEAN = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and not key.startswith("TPENGINE_")}
failures = []


def report(name, wrong):
    """One line of TAP; wrong: what is, None or "" when nothing."""
    if wrong:
        failures.append(name)
    print(f"not ok {name}: {wrong}\n" if wrong else f"ok {name}\n", end="", flush=True)


# ---- a server --------------------------------------------------------------------------------------------------------


class Request:
    def __init__(self, text):
        lines = text.decode("latin-1").split("\r\n")
        self.method, self.target, _version = lines[0].split(" ")
        self.path, _, self.query = self.target.partition("?")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        self.range = (int(wanted[1]), int(wanted[2])) if wanted else None
        self.name = self.path.rpartition("/")[2]
        self.sent = 0  # bytes of body


class Answer:
    def __init__(self, status, body=b"", **headers):
        self.status, self.body, self.headers = status, body, [(name.replace("_", "-"), str(value)) for name, value in headers.items()]
        self.length = len(body)  # what is said; None: nothing

    def set(self, name, value):
        self.headers = [(n, v) for n, v in self.headers if n.lower() != name.lower()]
        if value is not None:
            self.headers.append((name, str(value)))
        return self

    def head(self):
        lines = [f"HTTP/1.1 {self.status} Whatever", *(f"{name}: {value}" for name, value in self.headers)]
        if self.length is not None:
            lines.append(f"Content-Length: {self.length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Connection:
    def __init__(self, sock):
        self.sock, self.close = sock, False

    def send(self, data, request=None):
        self.sock.sendall(data)
        if request:
            request.sent += len(data)

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.close = True


class Server:
    """Serves a folder with ranges. fault(connection, request, answer) may change the answer, or send what it likes and return True."""

    def __init__(self, root, fault=None, tls=None):
        self.root, self.fault, self.tls, self.requests, self.lock = Path(root), fault, tls, [], threading.Lock()
        self.connections, self.ending, self.open_sockets = 0, False, set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ending = True
        for sock in [self.listener, *self.open_sockets]:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes who waits there, as close does not
            except OSError:
                pass
        self.listener.close()

    def url(self, rest="/dir", host="127.0.0.1", user=""):
        return f"http{'s' if self.tls else ''}://{user}{host}:{self.port}{rest}"

    def accept(self):
        while not self.ending:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            self.open_sockets.add(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection, data = Connection(sock), b""
            while not connection.close:
                while b"\r\n\r\n" not in data:
                    if not (more := sock.recv(65536)):
                        return
                    data += more
                text, _, data = data.partition(b"\r\n\r\n")
                request = Request(text)
                with self.lock:
                    self.requests.append(request)
                self.answer(connection, request)
        except (OSError, ValueError):
            pass
        finally:
            self.open_sockets.discard(sock)
            sock.close()

    def answer(self, connection, request):
        answer = self.usual(request)
        if self.fault and self.fault(connection, request, answer):
            return
        connection.send(answer.head())
        connection.send(answer.body, request)

    def usual(self, request):
        path = self.root / request.name
        if not path.is_file():
            return Answer(404, b"no such file\n")
        total = path.stat().st_size
        if not request.range:
            return Answer(200, path.read_bytes(), ETag='"one"')
        first, last = request.range[0], min(request.range[1], total - 1)
        if first >= total:
            return Answer(416, Content_Range=f"bytes */{total}")
        with open(path, "rb") as file:
            file.seek(first)
            return Answer(206, file.read(last - first + 1), Content_Range=f"bytes {first}-{last}/{total}", ETag='"one"')

    def of(self, part):
        return [request for request in self.requests if part in request.name]


def only(fault, part="rank-", skip=0, times=1):
    """The fault, of those requests alone whose file's name has that part: `times` of them after the first `skip`."""
    counter, lock = [0], threading.Lock()

    def chosen(connection, request, answer):
        if part not in request.name:
            return None
        with lock:
            counter[0] += 1
            number = counter[0]
        return fault(connection, request, answer) if skip < number <= skip + times else None
    return chosen


ALWAYS = 1 << 30


def one_after_another(*faults):
    """Of the rank files' requests, the first has the first fault, and so on."""
    def fault(connection, request, answer):
        next_one = next(left, None) if "rank-" in request.name else None
        return next_one(connection, request, answer) if next_one else None
    left = iter(faults)
    return fault


# ---- what servers do -------------------------------------------------------------------------------------------------


def late(connection, request, answer):
    time.sleep(0.3)


def torn(share):
    """The answer's beginning, then the end of the connection."""
    def fault(connection, request, answer):
        connection.send(answer.head())
        connection.send(answer.body[:int(len(answer.body) * share)], request)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close = True
        return True
    return fault


def reset(share):
    def fault(connection, request, answer):
        if share is not None:
            connection.send(answer.head())
            connection.send(answer.body[:int(len(answer.body) * share)], request)
            time.sleep(0.1)  # a reset overtakes what was sent
        connection.reset()
        return True
    return fault


def hang_up(connection, request, answer):
    connection.close = True
    return True


def status(code, **headers):
    def fault(connection, request, answer):
        answer.status, answer.body, answer.headers = code, b"<html>no</html>", []
        answer.length = len(answer.body)
        for name, value in headers.items():
            answer.set(name.replace("_", "-"), value)
    return fault


def header(name, value):
    def fault(connection, request, answer):
        answer.set(name, value(request, answer) if callable(value) else value)
    return fault


def whole(connection, request, answer):
    answer.status, answer.body = 200, DIR.joinpath(request.name).read_bytes()
    answer.length = len(answer.body)
    answer.set("Content-Range", None)


def shifted(by):
    def fault(connection, request, answer):
        first, last = request.range
        answer.set("Content-Range", f"bytes {first + by}-{last + by}/{DIR.joinpath(request.name).stat().st_size}")
    return fault


def longer_range(connection, request, answer):
    first, last = request.range
    answer.set("Content-Range", f"bytes {first}-{last + 1}/{DIR.joinpath(request.name).stat().st_size}")
    answer.body += b"x"
    answer.length += 1


def half_range(connection, request, answer):
    """Allowed: fewer bytes than were asked for."""
    answer.body = answer.body[:(len(answer.body) + 1) // 2]
    answer.length = len(answer.body)
    first = request.range[0]
    answer.set("Content-Range", f"bytes {first}-{first + answer.length - 1}/{DIR.joinpath(request.name).stat().st_size}")


def chunked(change):
    """A body without a length; change: how many bytes more or fewer than were asked for."""
    def fault(connection, request, answer):
        answer.length = None
        answer.set("Transfer-Encoding", "chunked")
        body = answer.body + b"x" * change if change >= 0 else answer.body[:change]
        connection.send(answer.head())
        connection.send(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n", request)
        return True
    return fault


def said_length(change):
    def fault(connection, request, answer):
        answer.length += change
        connection.close = True
        return None
    return fault


def two_ranges(connection, request, answer):
    answer.headers.append(("Content-Range", f"bytes 0-0/{answer.length}"))


def no_length_no_end(connection, request, answer):
    """A body that ends with the connection, too early."""
    answer.length = None
    connection.send(answer.head())
    connection.send(answer.body[:-1], request)
    connection.close = True
    return True


def damaged(connection, request, answer):
    body = bytearray(answer.body)
    body[len(body) // 3] ^= 4
    answer.body = bytes(body)


def one_long_header(connection, request, answer):
    connection.send(b"HTTP/1.1 206 Fine\r\nX-Long: ")
    for _ in range(4000):
        connection.send(b"x" * 1000)
    return True


def many_headers(connection, request, answer):
    connection.send(b"HTTP/1.1 206 Fine\r\n")
    for i in range(40000):
        connection.send(b"X-Header-%d: something or other\r\n" % i)
    return True


def many_continues(connection, request, answer):
    for _ in range(40000):
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    return True


def drip(connection, request, answer):
    connection.send(answer.head())
    for i in range(600):
        connection.send(answer.body[i:i + 1], request)
        time.sleep(0.1)
    connection.close = True
    return True


def silent(connection, request, answer):
    time.sleep(60)
    return True


def endless(connection, request, answer):
    answer.length = None
    connection.send(answer.head())
    for _ in range(1000):
        connection.send(b" " * MIB)
    return True


def modified(etag):
    def fault(connection, request, answer):
        answer.set("ETag", etag).set("Last-Modified", f"Fri, 01 Jan 2021 00:00:0{int(request.range[0] > 0)} GMT")
    return fault


def garbage(connection, request, answer):
    connection.send(b"\x00\x01\x02 this is not HTTP\r\n\r\n" * 20)
    connection.close = True
    return True


def old_http(connection, request, answer):
    """HTTP/1.0, and the connection ends after each answer."""
    connection.send(answer.head().replace(b"HTTP/1.1", b"HTTP/1.0"))
    connection.send(answer.body, request)
    connection.close = True
    return True


def closing(connection, request, answer):
    """An end that was not announced, after each answer."""
    connection.send(answer.head())
    connection.send(answer.body, request)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close = True
    return True


# ---- fetching --------------------------------------------------------------------------------------------------------


class Result:
    def __init__(self, url, rank=0, environment=None, **words):
        self.out = WORK / f"out.{threading.get_ident()}.{time.monotonic_ns()}"
        self.rank = rank
        words = {"stall": 5, "pause": 10, **words}
        begin = time.monotonic()
        done = subprocess.run([str(FETCH), "fetch", url, str(rank), str(self.out), *(f"{key}={value}" for key, value in words.items() if value is not None)],
                              env={**CLEAN, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120, check=False)
        self.seconds, self.status, self.text = time.monotonic() - begin, done.returncode, done.stderr.decode()
        self.json = json.loads(done.stdout) if done.returncode == 0 else {}

    def wrong(self, code, words):
        """What is wrong with it; code 0: the file must be there, byte for byte."""
        try:
            if self.status != code:
                return f"exit status {self.status}, wanted {code}: {self.text.strip()}"
            if code == 0:
                right = self.out.read_bytes() == (DIR / RANK_FILES[self.rank]).read_bytes()
                return None if right else "the file is not what it should be"
            if words not in self.text or self.text.count("\n") != 1:
                return f"\"{self.text.strip()}\" is not one sentence with \"{words}\""
            return "the sentence tells a secret: " + self.text if "secret" in self.text else None
        finally:
            self.out.unlink(missing_ok=True)


def budget(server, result):
    """What was sent of the rank's file, against its length."""
    sent = sum(request.sent for request in server.of(RANK_FILES[result.rank]))
    total = (DIR / RANK_FILES[result.rank]).stat().st_size
    return None if sent <= 1.02 * total else f"{sent} bytes were sent for a file of {total}"


def count_is(part, count):
    return lambda server, result: None if len(server.of(part)) == count else f"{len(server.of(part))} requests, wanted {count}"


def takes(least, most):
    return lambda _, result: None if least <= result.seconds and (QUICK or result.seconds <= most) else f"took {result.seconds:.2f} s"


def both(*checks):
    return lambda server, result: next(filter(None, (check(server, result) for check in checks)), None)


FIRST = "rank-00"
CASES = [  # name, fault, exit status, words of the sentence, further check
    ("a late answer", only(late, "", times=ALWAYS), 0, "", budget),
    ("a torn answer", only(torn(0.5), skip=1), 0, "", budget),
    ("a torn answer without a byte", only(torn(0), skip=1), 0, "", budget),
    ("many torn answers", only(torn(0.5), skip=1, times=5), 0, "", budget),
    ("a torn head", only(torn(0.9)), 0, "", budget),
    ("always torn", only(torn(0.0), times=ALWAYS), 5, "tried 6 times, try again later", count_is(FIRST, 6)),
    ("a reset before the answer", only(reset(None), skip=1), 0, "", budget),
    ("a reset within the answer", only(reset(0.5), skip=1), 0, "", budget),
    ("no answer", only(hang_up, skip=1), 0, "", budget),
    ("a torn manifest", only(torn(0.5), "model.json"), 0, "", None),
    ("a reset instead of the manifest", only(reset(None), "model.json"), 0, "", None),
    ("a torn tokenizer", only(torn(0.5), "tokenizer"), 0, "", None),
    ("a tokenizer that ends early", only(no_length_no_end, "tokenizer"), 0, "", None),
    ("a tokenizer that always ends early", only(no_length_no_end, "tokenizer", times=ALWAYS), 4, "tokenizer.bin: size or checksum differs", None),
    ("all of the file for a range", only(whole, times=ALWAYS), 5, "with the whole file (HTTP 200); put the directory on a server that knows ranges",
     count_is(FIRST, 1)),
    ("an earlier range", only(shifted(-4096), skip=1), 5, "with others, or does not say with which (Content-Range)", None),
    ("a later range", only(shifted(1), times=ALWAYS), 5, "with others, or does not say with which (Content-Range)", count_is(FIRST, 1)),
    ("a longer range", only(longer_range, skip=1), 5, "(Content-Range)", None),
    ("no Content-Range", only(header("Content-Range", None)), 5, "(Content-Range)", count_is(FIRST, 1)),
    ("two Content-Ranges", only(two_ranges), 5, "(Content-Range)", None),
    ("a bad Content-Range", only(header("Content-Range", "bytes 0-99999999999999999999/5")), 5, "(Content-Range)", None),
    ("a Content-Range without the length", only(header("Content-Range", lambda r, a: f"bytes {r.range[0]}-{r.range[1]}/*"), times=ALWAYS), 0, "", budget),
    ("another total length", only(header("Content-Range", lambda r, a: f"bytes {r.range[0]}-{r.range[1]}/5000000")), 4,
     "the file there has 5000000 bytes, the manifest says", count_is(FIRST, 1)),
    ("half of each range", only(half_range, times=3), 0, "", budget),
    ("a longer Content-Length", only(said_length(1)), 5, "Content-Length and Content-Range do not agree", None),
    ("a shorter Content-Length", only(said_length(-1)), 5, "Content-Length and Content-Range do not agree", None),
    ("chunks", only(chunked(0), times=ALWAYS), 0, "", budget),
    ("a byte too many in chunks", only(chunked(1)), 5, "more bytes than were asked for", None),
    ("a byte too few in chunks", only(chunked(-1), times=2), 0, "", budget),
    ("a body that ends with the connection", only(no_length_no_end, skip=1, times=2), 0, "", budget),
    ("HTTP/1.0", only(old_http, "", times=ALWAYS), 0, "", budget),
    ("ends that were not announced", only(closing, "", times=ALWAYS), 0, "", budget),
    ("a damaged leaf", only(damaged, skip=1), 0, "", lambda s, r: None if r.json["fetched_again"] == 1 else f"{r.json}"),
    ("a damaged head", only(damaged), 0, "", None),
    ("always damaged leaves", only(damaged, skip=1, times=ALWAYS), 4, "checksum mismatch", None),
    ("an always damaged head", only(damaged, times=ALWAYS), 4, "rank-00-of-02.tpshard: ", count_is(FIRST, 3)),
    ("a damaged manifest", only(damaged, "model.json"), 0, "", count_is("model.json", 2)),
    ("an always damaged manifest", only(damaged, "model.json", times=ALWAYS), 4, "model.json", count_is("model.json", 3)),
    ("a damaged tokenizer", only(damaged, "tokenizer"), 0, "", count_is("tokenizer", 2)),
    ("503, then fine", only(status(503), times=3), 0, "", budget),
    ("503 for ever", only(status(503), times=ALWAYS), 5, "the server answers HTTP 503; tried 6 times, try again later", count_is(FIRST, 6)),
    ("500, 502, 504, 408", one_after_another(*map(status, (500, 502, 504, 408))), 0, "", budget),
    ("429 with Retry-After", only(status(429, Retry_After=1)), 0, "", both(budget, takes(1, 4))),
    ("503 for the manifest, then fine", only(status(503), "model.json", times=2), 0, "", count_is("model.json", 3)),
    ("401", only(status(401), "model.json"), 5, "the server wants a token (HTTP 401); set TPENGINE_TOKEN", count_is("", 1)),
    ("403", only(status(403)), 5, "the server denies access (HTTP 403)", count_is(FIRST, 1)),
    ("404 for the manifest", only(status(404), "model.json"), 5, "model.json: the server has no such file (HTTP 404); is this the URL of a shard directory?",
     count_is("", 1)),
    ("404 for the file", only(status(404)), 5, "has no such file", count_is(FIRST, 1)),
    ("416", only(status(416)), 4, "shorter than the manifest says", count_is(FIRST, 1)),
    ("204", only(status(204)), 5, "HTTP 204, which is no answer to this request", count_is(FIRST, 1)),
    ("400", only(status(400)), 5, "HTTP 400, which is no answer", count_is(FIRST, 1)),
    ("a part that was not asked for", only(status(206), "model.json"), 5, "HTTP 206", count_is("", 1)),
    ("gzip", only(header("Content-Encoding", "gzip"), times=ALWAYS), 5, "in the encoding 'gzip'", count_is(FIRST, 1)),
    ("a gzipped manifest", only(header("Content-Encoding", "br"), "model.json"), 5, "in the encoding 'br'", None),
    ("identity", only(header("Content-Encoding", "identity"), "", times=ALWAYS), 0, "", budget),
    ("another ETag, strict", only(header("ETag", '"two"'), skip=2), 4, "was changed while it was read; start again", None),
    ("another Last-Modified, no ETag, strict", only(modified(etag=None), times=ALWAYS), 4, "was changed while it was read; start again", None),
    ("another Last-Modified, the same ETag, strict", only(modified(etag='"one"'), times=ALWAYS), 0, "", budget),
    ("mirrors with ETags of their own", only(header("ETag", lambda r, a: f'"{r.range[0]}"'), times=ALWAYS), 0, "", budget),
    ("one endless header", only(one_long_header), 5, "rank-00-of-02.tpshard", takes(0, 10)),
    ("endless headers", only(many_headers), 5, "more than 65536 bytes of headers", both(count_is(FIRST, 1), takes(0, 10))),
    ("endless interim answers", only(many_continues), 5, "more than 65536 bytes of headers", both(count_is(FIRST, 1), takes(0, 10))),
    ("a drip, then fine", only(drip, skip=1), 0, "", both(budget, takes(1, 8))),
    ("silence, then fine", only(silent, skip=1), 0, "", both(budget, takes(1, 8))),
    ("a drip for ever", only(drip, times=ALWAYS), 5, "tried 6 times", both(count_is(FIRST, 6), takes(6, 40))),
    ("garbage", only(garbage), 5, "rank-00-of-02.tpshard", count_is(FIRST, 1)),
    ("a huge manifest", only(said_length(1 << 40), "model.json", times=ALWAYS), 4, "has more than the 4194304 bytes that are accepted", None),
    ("an endless manifest", only(endless, "model.json", times=ALWAYS), 4, "has more than the 4194304 bytes that are accepted", None),
]


def run_case(case):
    name, fault, code, words, check = case
    with Server(DIR, fault) as server:
        try:
            stalls = any(word in name for word in ("drip", "silence"))
            result = Result(server.url(), stall=1 if stalls else 5, strict=1 if "strict" in name else None)
            wrong = result.wrong(code, words)
            if not wrong and check:
                wrong = check(server, result)
            others = [r.name for r in server.requests if r.name not in NAMES or r.name == RANK_FILES[1]]
            return name, wrong or (f"asked for {others}" if others else None)
        except subprocess.TimeoutExpired:
            return name, "does not end"


def test_cases():
    chosen = [case for case in CASES if not sys.argv[1:] or any(word in case[0] for word in sys.argv[1:])]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, wrong in pool.map(run_case, chosen):
            report(name, wrong)


# ---- redirects, tokens, secrets --------------------------------------------------------------------------------------


def redirect(to, part="", code=302):
    """to: a URL's beginning, or a function of the request."""
    def fault(connection, request, answer):
        if part in request.name and not request.path.startswith("/moved"):
            answer.status, answer.body, answer.length = code, b"", 0
            answer.headers = [("Location", to(request) if callable(to) else f"{to}/{request.name}")]
    return fault


def authorizations(server):
    return {request.headers.get("authorization") for request in server.requests}


def test_redirects():
    with Server(DIR) as server:
        server.fault = redirect("/moved")
        result = Result(server.url(), token="t0")
        report("a redirect on the same host", result.wrong(0, "") or (authorizations(server) != {"Bearer t0"} and authorizations(server)))
    with Server(DIR) as target, Server(DIR) as server:
        for name, host in (("another port", "127.0.0.1"), ("another host", "localhost")):
            target.requests.clear()
            server.requests.clear()
            server.fault = redirect(f"http://{host}:{target.port}/moved")
            result = Result(server.url(user="me:hidden@" if name == "another host" else ""), token=None if name == "another host" else "t1")
            seen = authorizations(target)
            report(f"a redirect to {name} takes no token along", result.wrong(0, "") or (seen != {None} and seen) or
                   (None in authorizations(server) and "the host itself got none"))
    for name, to, words in (
            ("file://", f"file://{DIR}", "redirects where http must not lead"),
            ("ftp://", "ftp://127.0.0.1", "redirects where http must not lead"),
            ("itself", lambda request: request.target, "redirects more than 5 times")):
        with Server(DIR, redirect(to)) as server:
            report(f"a redirect to {name}", Result(server.url()).wrong(5, words))


def test_secrets():
    with Server(DIR) as server:
        result = Result(server.url("/a/b/?sig=secret&x=%2F", user="me:secret@"))
        targets = {request.target for request in server.requests}
        report("password and query go with every request", result.wrong(0, "") or
               (authorizations(server) != {"Basic bWU6c2VjcmV0"} and authorizations(server)) or
               (not all(re.fullmatch(r"/a/b/[a-z0-9._-]+\?sig=secret&x=%2F", target) for target in targets) and targets))
        result = Result(server.url(), token="secret-token")
        report("the token goes with every request", result.wrong(0, "") or (authorizations(server) != {"Basic bWU6c2VjcmV0", "Bearer secret-token"}
                                                                            and authorizations(server)))
        server.fault = only(status(401), "model.json")
        report("a token that is not accepted", Result(server.url(user="me:secret@"), token="secret").wrong(5, "does not accept the token (HTTP 401)"))
    for name, fault in (("always damaged", only(damaged, skip=1, times=ALWAYS)), ("404", only(status(404))), ("too long", only(header("Content-Range", "bytes 0-9/5"), skip=2)),
                        ("a damaged tokenizer", only(damaged, "tokenizer", times=ALWAYS)), ("a damaged manifest", only(damaged, "model.json", times=ALWAYS))):
        with Server(DIR, fault) as server:
            result = Result(server.url("/d?sig=secret", user="me:secret@"))
            report(f"no secret in a sentence: {name}", "it succeeded" if result.status == 0 else result.wrong(result.status, "http://127.0.0.1"))


def test_no_server():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/dir"
        result = Result(url, pause=1000)
        report("nobody listens", result.wrong(5, "no connection to the server") or takes(0, 1)(None, result))
    result = Result("http://no-such-host.invalid/dir", pause=1000)
    report("a host that is not", result.wrong(5, "no connection to the server"))
    # Once it was there it is waited for.
    server = Server(DIR)
    server.fault = only(lambda c, r, a: server.__exit__() or c.reset() or True, skip=1, times=ALWAYS)
    result = Result(server.url(), pause=50)
    report("a server that goes away", result.wrong(5, "tried 6 times"))


# ---- TLS -------------------------------------------------------------------------------------------------------------


def test_tls():
    certificate, key = WORK / "certificate.pem", WORK / "key.pem"
    if not shutil.which("openssl") or subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
             "-keyout", key, "-out", certificate], capture_output=True, check=False).returncode:
        print("ok TLS # SKIP no openssl that makes a certificate")
        return
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    trusting = {"SSL_CERT_FILE": str(certificate)}
    with Server(DIR, tls=tls) as server, Server(DIR) as plain:
        url = server.url(host="localhost")
        report("https", Result(url, environment=trusting, token="t").wrong(0, ""))
        report("a certificate that nobody vouches for", Result(url).wrong(5, "the server's certificate is not trusted"))
        report("a certificate of another host", Result(server.url(), environment=trusting).wrong(5, "the server's certificate is not trusted"))
        server.fault = redirect(plain.url("/moved"))
        report("a redirect from https to http", Result(url, environment=trusting).wrong(5, "redirects where https must not lead") or
               (plain.requests and "it was followed"))
        plain.fault = redirect(server.url("/moved", "localhost"))
        report("a redirect from http to https", Result(plain.url(), environment=trusting, token="t").wrong(0, ""))
        server.fault = only(torn(0.5), skip=1)
        report("a torn answer over TLS", Result(url, environment=trusting).wrong(0, ""))


# ---- economy ---------------------------------------------------------------------------------------------------------


def test_economy():
    with Server(DIR) as server:
        result = Result(server.url("//x//"), rank=1, threads=16, piece=2 * MIB)
        asked = {request.name for request in server.requests}
        report("a rank fetches its own file alone", result.wrong(0, "") or (asked != NAMES - {RANK_FILES[0]} and asked) or budget(server, result) or
               (result.json["fetched_bytes"] != (DIR / RANK_FILES[1]).stat().st_size and result.json))
        report("connections are kept", f"{server.connections} for 16 threads" if server.connections > 17 else None)
        wanted = {"accept-encoding": "identity", "user-agent": None, "host": f"127.0.0.1:{server.port}", "range": None, "accept": None}
        odd = [r.headers for r in server.requests if r.method != "GET" or not set(r.headers) <= set(wanted) or r.headers["accept-encoding"] != "identity"]
        report("requests say no more than they must", odd[:1])
    for name, fault in (("a drip", drip), ("a pause", status(503, Retry_After=14)), ("silence", silent)):
        with Server(DIR, only(fault, times=ALWAYS)) as server:
            result = Result(server.url(), cancel=300, stall=15)
            report(f"given up within {name}", result.wrong(5, "the read was given up") or takes(0.3, 3)(None, result))


# ---- the cache -------------------------------------------------------------------------------------------------------


def cached(cache):
    return sorted(path for path in Path(cache).iterdir() if not path.name.startswith(".tpshard"))


def test_cache():
    cache = WORK / "cache"
    with Server(DIR) as server:
        first = Result(server.url(), cache=cache)
        wrong = first.wrong(0, "") or (first.json["local"] and "local at once") or (len(cached(cache)) != 1 and cached(cache))
        report("the cache is filled", wrong)
        server.requests.clear()
        second = Result(server.url(), cache=cache)
        report("the cache is used", second.wrong(0, "") or (not second.json["local"] and "not local") or (server.of("rank-") and "it was fetched again"))
        other = Result(server.url(), rank=1, cache=cache)
        report("the other rank's is another", other.wrong(0, "") or (len(cached(cache)) != 2 and cached(cache)))
        for name, damage in (("payload", lambda b: b[:3 * MIB] + bytes([b[3 * MIB] ^ 1]) + b[3 * MIB + 1:]), ("head", lambda b: b"x" + b[1:]),
                             ("length", lambda b: b[:-1]), ("zeros", lambda b: bytes(len(b)))):
            path = next(path for path in cached(cache) if "rank-00" in path.name)
            path.write_bytes(damage(path.read_bytes()))
            result = Result(server.url(), cache=cache)
            report(f"damage in the cache is healed: {name}", result.wrong(0, ""))
            again = Result(server.url(), cache=cache)
            again = Result(server.url(), cache=cache) if not again.json.get("local") else again
            report(f"and is gone: {name}", again.wrong(0, "") or ((not again.json["local"] or again.json["fetched_bytes"]) and again.json))
        size = (DIR / RANK_FILES[0]).stat().st_size
        result = Result(server.url(), cache=WORK / "small", limit=size - 1)
        report("a limit that is too small", result.wrong(0, "") or ("do not fit into the cache's limit" not in result.json["note"] and result.json) or
               (cached(WORK / "small") and "it was kept"))
        (WORK / "one").mkdir()
        (WORK / "one" / "mine.txt").write_text("mine")
        wrong = None
        for number, rank in enumerate((0, 1, 0, 1)):  # they do not push each other out
            result = Result(server.url(), rank=rank, cache=WORK / "one", limit=size + size // 2)
            wrong = wrong or result.wrong(0, "") or (result.json["local"] == (rank == 1) and number > 1 and result.json)
            wrong = wrong or ((" of the same model's other ranks" in result.json["note"]) != (rank == 1) and result.json)
            names = [path.name for path in cached(WORK / "one")]
            wrong = wrong or (len(names) != 2 or "mine.txt" not in names) and names
        report("a limit for one of two", wrong)
        result = Result(server.url(), cache="/dev/null/no")
        report("a cache that cannot be", result.wrong(0, "") or ("cannot use the cache" not in result.json["note"] and result.json))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: Result(server.url(), rank=i % 2, cache=WORK / "shared"), range(8)))
        report("several processes at once", next(filter(None, (result.wrong(0, "") for result in results)), None) or
               (len(cached(WORK / "shared")) != 2 and cached(WORK / "shared")))
    with Server(DIR, only(status(404), skip=3, times=ALWAYS)) as server:
        Result(server.url(), cache=WORK / "broken")
        report("a fetch that fails leaves nothing", cached(WORK / "broken") and cached(WORK / "broken"))
    with Server(DIR, only(damaged, skip=2, times=ALWAYS)) as server:
        Result(server.url(), cache=WORK / "damaged")
        report("damaged bytes are not kept", cached(WORK / "damaged") and cached(WORK / "damaged"))


# ---- the engine ------------------------------------------------------------------------------------------------------


def tpengine(*words, **environment):
    return subprocess.run([str(TPENGINE), *map(str, words)], env={**CLEAN, **environment}, capture_output=True, text=True, timeout=120, check=False)


def test_engine():
    """The real loader, its ranks as processes and as threads."""
    generation = ("--prompt", "In the beginning", "--max-tokens", 24, "--temperature", 0, "--threads", 1)
    wanted = tpengine("generate", DIR, *generation).stdout

    def generate(server, *words, **environment):
        done = tpengine("generate", server.url("/dir?sig=secret", user="" if environment else "me:secret@"), *generation, *words, **environment)
        sent = [sum(request.sent for request in server.of(name)) / (DIR / name).stat().st_size for name in RANK_FILES]
        return done, sent

    for name, words, fault in (("as processes", (), None), ("as threads", ("--ranks", "thread"), None),
                               ("torn answers", (), only(torn(0.4), skip=2, times=4)), ("resets", (), only(reset(0.5), skip=2, times=3)),
                               ("503", (), only(status(503), skip=1, times=3)), ("a torn manifest", (), only(torn(0.5), "model.json"))):
        with Server(DIR, fault) as server:
            done, sent = generate(server, *words)
            report(f"generate from a URL: {name}", (done.returncode or done.stdout != wanted) and f"{done.returncode}: {done.stdout!r} {done.stderr}" or
                   (max(sent) > 1.02 or min(sent) < 1) and f"{sent} of the ranks' files were sent")
    with Server(DIR, only(damaged, skip=3, times=2)) as server:
        done, _ = generate(server)
        report("generate from a URL: damaged leaves", (done.returncode or done.stdout != wanted) and f"{done.returncode}: {done.stdout!r} {done.stderr}")
    with Server(DIR) as server:
        for number in (1, 2):
            server.requests.clear()
            done, sent = generate(server, "--cache", WORK / "engine", TPENGINE_TOKEN="t2")
            report(f"generate with a cache, {('first', 'second')[number - 1]} time",
                   (done.returncode or done.stdout != wanted) and f"{done.returncode}: {done.stdout!r} {done.stderr}" or
                   (max(sent) > 1.02 or max(sent) > 0 and number == 2) and f"{sent} of the ranks' files were sent" or
                   (authorizations(server) != {"Bearer t2"} and authorizations(server)))
        for where, at in (("payload", 5 * MIB), ("head", 100)):
            # One rank's payload: the rank that finds such a copy ends the start, maybe before the other one has found its own.
            for path in list(cached(WORK / "engine"))[:1 if where == "payload" else None]:
                data = bytearray(path.read_bytes())
                data[at] ^= 8
                path.write_bytes(data)
            dropped, _ = generate(server, "--cache", WORK / "engine")
            healed, _ = generate(server, "--cache", WORK / "engine")
            report(f"generate with a damaged cache: {where}", dropped.returncode not in ((0, 4) if where == "payload" else (0,)) and
                   f"{dropped.returncode}: {dropped.stderr}" or str(WORK) in dropped.stderr and f"it tells to mend the cache: {dropped.stderr}" or
                   (dropped.returncode == 0 and dropped.stdout != wanted or healed.stdout != wanted) and f"{healed.returncode}: {healed.stderr}")
        for words, code, sentence in ((("--cache-limit", "1GiB"), 2, "--cache-limit without --cache"), (("--load-threads", 17), 2, "--load-threads")):
            done, _ = generate(server, *words)
            report(f"{words[0]} {words[1]}", (done.returncode != code or sentence not in done.stderr or done.stdout) and f"{done.returncode}: {done.stderr}")
        done = tpengine("generate", DIR, *generation, "--cache", WORK / "engine")
        report("--cache of a directory", (done.returncode or "--cache is not used" not in done.stderr) and f"{done.returncode}: {done.stderr}")
        done = tpengine("tokenize", server.url(), "In the beginning")
        report("tokenize from a URL", done.stdout != tpengine("tokenize", DIR, "In the beginning").stdout and done.stderr)
    for name, fault, code, words in (
            ("404", only(status(404)), 5, "the server has no such file (HTTP 404)"),
            ("401", only(status(401), "model.json"), 5, "set TPENGINE_TOKEN"),
            ("no ranges", only(whole, times=ALWAYS), 5, "put the directory on a server that knows ranges"),
            ("damage", only(damaged, skip=2, times=ALWAYS), 4, "checksum"),
            ("503 for ever", only(status(503), skip=4, times=ALWAYS), 5, "tried 6 times, try again later")):
        with Server(DIR, fault) as server:
            done, _ = generate(server, "--quiet")
            report(f"generate ends with a sentence: {name}", (done.returncode != code or words not in done.stderr or done.stdout or "secret" in done.stderr or
                                                             done.stderr.count("\n") != 1) and f"{done.returncode}: {done.stdout!r} {done.stderr}")
    for verify, code, words in (("full", 0, ""), ("sample", 4, "was changed while it was read; start again"), ("off", 4, "was changed while it was read")):
        with Server(DIR, only(header("ETag", lambda r, a: f'"{r.range[0]}"'), times=ALWAYS)) as server:
            done, _ = generate(server, "--verify", verify)
            report(f"other ETags, --verify {verify}", (done.returncode != code or words not in done.stderr or (done.stdout != wanted and code == 0)) and
                   f"{done.returncode}: {done.stderr}")


if not all(program.exists() for program in (TPSHARD, TPENGINE, FETCH)):
    print(f"SKIP no {TPSHARD}, {TPENGINE} or {FETCH}: build them first")
    sys.exit(77)
WORK = Path(tempfile.mkdtemp(prefix="test_store."))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)
DIR = WORK / "shards"
subprocess.run([TPSHARD, "--quiet", "--tp", "2", "--quant", "none", "tests/model", DIR], check=True)
RANK_FILES = [f"rank-0{rank}-of-02.tpshard" for rank in range(2)]
NAMES = {"model.json", *RANK_FILES, *(extra["name"] for extra in json.loads((DIR / "model.json").read_text())["extras"])}

# Most of the time is spent waiting.
groups = [test_cases, test_engine, test_cache, test_redirects, test_secrets, test_no_server, test_tls, test_economy]
with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for done in [pool.submit(group) for group in groups[:1 if sys.argv[1:] else None]]:
        done.result()
sys.exit(bool(failures))

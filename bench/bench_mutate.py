#!/usr/bin/env python3
"""Mutated requests before a whole tpengine serve: real requests of the API, changed as JSON, as HTTP and as bytes, over many connections at once.
The server must live, answer nothing with status 500, and come to rest; under sanitizers it must stay silent.

    make SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=all' OPTIMIZE='-O1 -g' BUILD=build/asan build/asan/tpengine
    BUILD=build/asan bench/bench_mutate.py SHARDS --requests 1000000

Needs the standard library only. Ends with status 1 and says why when something was wrong.
"""
import argparse
import asyncio
import collections
import copy
import json
import multiprocessing
import os
import random
import re
import select
import socket
import struct
import sys
import time

from serve_client import Answer, Broken, Server, ask, finish, settled

TOOL = {"type": "function", "function": {"name": "look_up", "description": "finds", "strict": True, "parameters": {
    "type": "object", "properties": {"what": {"type": "string"}, "count": {"type": "integer", "minimum": 1}}, "required": ["what"],
    "additionalProperties": False}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": ["string", "null"], "pattern": "^[a-c]{1,3}$"}, "b": {"enum": [1, "x", None]},
                                           "c": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
          "$defs": {"n": {"type": "number", "minimum": -1, "exclusiveMaximum": 5}}, "required": ["a"], "additionalProperties": False}
SEEDS = [
    ("POST", "/v1/completions", {"model": "m", "prompt": "In the beginning", "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
                                 "seed": 5, "stop": ["the", "\n"], "n": 1, "logprobs": 2, "echo": False, "frequency_penalty": 0.1,
                                 "presence_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "7": 3.5}, "ignore_eos": True,
                                 "min_tokens": 1, "stop_token_ids": [9], "skip_special_tokens": True, "user": "u"}),
    ("POST", "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"prompt": ["And", "So"], "max_tokens": 1, "suffix": None, "best_of": 1, "cache_salt": "s"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                                                   {"role": "assistant", "content": None, "tool_calls": [
                                                       {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{\"what\":\"x\"}"}}]},
                                                   {"role": "tool", "tool_call_id": "call_1", "content": "42"}],
                                      "max_completion_tokens": 2, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "top_logprobs": 3,
                                      "logprobs": True, "stream": True, "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3, "tools": [TOOL],
                                      "tool_choice": {"type": "function", "function": {"name": "look_up"}}}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2,
                                 "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}}),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, "response_format": {"type": "json_object"}}),
    ("POST", "/tokenize", {"prompt": "some text", "add_special_tokens": True}),
    ("POST", "/tokenize", {"messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ("POST", "/apply-template", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}),
    ("POST", "/invocations", {"prompt": "x", "max_tokens": 1}),
    ("GET", "/v1/models", None), ("GET", "/v1/models/m", None), ("GET", "/health?live=1", None), ("GET", "/ping", None), ("GET", "/metrics", None),
    ("GET", "/v1/stats", None), ("GET", "/version", None), ("OPTIONS", "/v1/completions", None), ("GET", "/", None),
]
VALUES = [None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2 ** 31, -2 ** 31, 2 ** 53 + 1, 2 ** 63 - 1, 2 ** 63, -2 ** 63, 10 ** 30, "", " ",
          "\0", "\ud800", "\udfff\ud800", "𝕏", "a" * 3000, "\n" * 50, [], {}, [[]], [None], {"": {}}, [1, "a", None], {"type": "object"}, {"$ref": "#"},
          {"type": "string", "pattern": "(a|b)*c{0,9}"}, {"type": "string", "pattern": "(((("}, {"enum": []}, {"allOf": [{}, {}]}, "auto", "required", "<think>",
          "<tool_call>", "{{ x }}", "../../etc/passwd", "user", "tool", [0] * 500, ["x"] * 20, {"a": 1, "A": 2}]
RAW_VALUES = [b"NaN", b"Infinity", b"-", b"1e999", b"1e-999", b"01", b"+1", b"1.", b"0x10", b"1" * 400, b"\"\\ud800\"", b"\"\\u0000\"", b"\"\\x\"", b"\"\xff\"",
              b"\"\xc0\x80\"", b"\"\xed\xa0\x80\"", b"'a'", b"[" * 300, b"{\"a\":" * 200, b"[" * 99 + b"]" * 99, b"tru", b"/**/1", b"\"", b"}"]


def nodes(value, path=()):
    """Paths of all places below a JSON value."""
    found = [path]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += nodes(child, path + (key,))
    return found


def change_json(rng, body):
    """One change below the top, as a structure."""
    paths = [path for path in nodes(body) if path]
    if not paths:
        return rng.choice(VALUES)
    path = rng.choice(paths)
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    last, draw = path[-1], rng.random()
    if draw < 0.5:
        parent[last] = copy.deepcopy(rng.choice(VALUES))
    elif draw < 0.65:
        del parent[last]
    elif draw < 0.75:
        parent[last] = [parent[last]] * rng.choice((1, 2, 130))
    elif draw < 0.85 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
        parent[last] = rng.choice((parent[last] * -1, parent[last] * 10 ** rng.randrange(12), parent[last] + 0.5, str(parent[last])))
    elif draw < 0.95 and isinstance(parent, dict):
        parent[rng.choice((str(last) + "_", "", "stream", "n", "echo", "prompt", "messages", "type"))] = parent[last]
    else:
        parent[last] = {"x": parent[last]}
    return body


def change_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        at, draw = rng.randrange(len(data)), rng.randrange(6)
        if draw == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif draw == 1:
            data[at] = rng.choice(b"\0\r\n\t \"\\{}[]:,;%\xff\x80-0123456789")
        elif draw == 2:
            del data[at:at + rng.randrange(1, 20)]
        elif draw == 3:
            end = min(len(data), at + rng.randrange(1, 60))
            data[at:at] = data[at:end] * rng.choice((1, 2, 30))
        elif draw == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 10)))
        else:
            del data[at:]
    return bytes(data)


def body_bytes(rng, body):
    if body is None:
        return b"" if rng.random() < 0.9 else b"{}"
    body = copy.deepcopy(body)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        body = change_json(rng, body)
        if not isinstance(body, (dict, list)):
            break
    data = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    draw = rng.random()
    if draw < 0.1:
        values = list(re.finditer(rb'(?<=: )("[^"]*"|[-\w.]+)', data))
        if values:
            place = rng.choice(values)
            data = data[:place.start()] + rng.choice(RAW_VALUES) + data[place.end():]
    elif draw < 0.2:
        data = change_bytes(rng, data)
    return data


def chunks(rng, data):
    out = bytearray()
    while data:
        count = rng.choice((1, 7, 100, len(data)))
        piece, data = data[:count], data[count:]
        extension = rng.choice((b"", b"", b"", b";a=b", b";" + b"x" * 300, b" "))
        out += rng.choice((b"%x", b"%x", b"%X", b"0%x")) % len(piece) + extension + b"\r\n" + piece + b"\r\n"
    return bytes(out) + b"0\r\n" + rng.choice((b"", b"", b"T: x\r\n", b"Content-Length: 5\r\n")) + b"\r\n"


def make_request(rng):
    method, path, body = rng.choice(SEEDS)
    data = body_bytes(rng, body)
    headers = [b"Host: localhost", b"Content-Type: application/json"]
    version = b"HTTP/1.1"
    if rng.random() < 0.7:
        headers.append(b"Connection: close")
    if rng.random() < 0.15 and method == "POST":
        headers.append(b"Transfer-Encoding: chunked")
        data = chunks(rng, data)
    elif data or method == "POST":
        headers.append(b"Content-Length: %d" % len(data))
    path = path.encode()
    if rng.random() < 0.25:  # change the HTTP around it
        draw = rng.randrange(12)
        if draw == 0:
            headers[-1:] = [rng.choice((b"Content-Length: %d" % (len(data) + rng.choice((-1, 1, 100))), b"Content-Length: -1", b"Content-Length: 1e3",
                                        b"Content-Length: 99999999999999999999", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked"))]
        elif draw == 1:
            headers.append(rng.choice(headers))
        elif draw == 2:
            headers.append(rng.choice((b"Expect: 100-continue", b"Expect: x", b"Authorization: Bearer " + b"k" * rng.choice((0, 1, 5000)), b"Upgrade: h2c",
                                       b"Origin: http://evil", b"X-Request-Id: " + rng.choice((b"a", b"b" * 600, b"\xff", b"a b")), b"Accept: text/event-stream",
                                       b"Content-Encoding: gzip", b"Connection: keep-alive, Upgrade", b" folded: yes", b"No colon", b": empty", b"A" * 20000)))
        elif draw == 3:
            headers += [b"H%d: v" % i for i in range(rng.choice((10, 70, 500)))]
        elif draw == 4:
            path = rng.choice((b"//" + path, path + b"?" + b"q" * rng.choice((1, 9000)), b"http://localhost" + path, path.replace(b"o", b"%6f"), path + b"%00",
                               path + b"/..", b"*", b"", path.upper(), path + b"#f", b"/v1/models/" + b"%ff" * 30))
        elif draw == 5:
            method = rng.choice(("get", "PUT", "DELETE", "HEAD", "PATCH", "TRACE", "CONNECT", "G\0T", "A" * 100, ""))
        elif draw == 6:
            version = rng.choice((b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b"", b"HTTP/11"))
        elif draw == 7:
            headers.remove(b"Host: localhost")
        elif draw == 8:
            rng.shuffle(headers)
    end = b"\n" if rng.random() < 0.02 else b"\r\n"
    request = method.encode() + b" " + path + b" " + version + end + end.join(headers) + end + end + data
    if rng.random() < 0.1:
        request = change_bytes(rng, request)
    if rng.random() < 0.05:
        request += make_request(rng)
    return request


class Connection:
    def __init__(self, port, rng, deadline):
        self.request, self.answer = make_request(rng), bytearray()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", port))
        self.sent, self.end = 0, time.monotonic() + deadline * rng.random()
        self.pieces = rng.choice((1 << 20, 1 << 20, 1 << 20, 100, 17))
        self.eof = rng.random() < 0.1

    def send(self):
        """True when all of it has gone."""
        try:
            self.sent += self.socket.send(self.request[self.sent:self.sent + self.pieces])
        except BlockingIOError:
            return False
        if self.sent < len(self.request):
            return False
        if self.eof:
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def close(self, rng):
        if rng.random() < 0.3:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def is_whole(connection):
    """A connection that stays open need not be waited for."""
    head, _, body = bytes(connection.answer).partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return connection.sent == len(connection.request) and (len(body) >= int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n"))


def judge(connection, closed, counts):
    """Why the answer is wrong, or None."""
    answer = bytes(connection.answer)
    if not answer:
        counts["none"] += 1
        return None
    counts["answered"] += 1
    for status in re.findall(rb"^HTTP/1\.1 (\d\d\d) ", answer, re.MULTILINE):
        counts[status.decode()] += 1
    first = re.match(rb"HTTP/1\.1 (\d\d\d) [^\r\n]*\r\n", answer)
    if not first or not 100 <= int(first[1]) < 600 or first[1] == b"500":
        return f"answer {answer[:300]!r}"
    # One answer until the end: it must be whole, and what says that it is JSON must be.
    if closed and answer.count(b"HTTP/1.1 ") == 1 and first[1] != b"100" and not connection.request.startswith(b"HEAD") and connection.sent == len(connection.request):
        try:
            parsed = Answer(answer)
            if parsed.headers.get("content-type", "").startswith("application/json"):
                parsed.json()
            elif parsed.streamed and not connection.eof:
                for event in parsed.events():
                    if event != "[DONE]":
                        json.loads(event)
        except (Broken, ValueError, KeyError) as error:
            return f"{error}: answer {answer[:300]!r}"
    return None


def work(port, seed, count, parallel, deadline, results):
    rng, poll = random.Random(seed), select.epoll()
    connections, made, counts, wrong = {}, 0, collections.Counter(), []
    refused = 0
    while made < count or connections:
        while made < count and len(connections) < parallel:
            connection = Connection(port, rng, deadline)
            connections[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.EPOLLIN | select.EPOLLOUT)
            made += 1
        ready = poll.poll(0.01)
        now, over = time.monotonic(), []
        for number, events in ready:
            connection = connections[number]
            try:
                if events & select.EPOLLOUT and connection.send():
                    poll.modify(number, select.EPOLLIN)
                if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    data = connection.socket.recv(1 << 16)
                    connection.answer += data
                    if not data or is_whole(connection):
                        over.append((number, not data))
            except BlockingIOError:
                pass
            except ConnectionRefusedError:
                refused += 1
                over.append((number, False))
            except OSError:
                over.append((number, False))
        done = {number for number, _ in over}
        over += [(number, False) for number, connection in connections.items() if now > connection.end and number not in done]
        for number, closed in over:
            connection = connections.pop(number)
            poll.unregister(number)
            counts["left_early"] += not closed and not is_whole(connection)
            why = judge(connection, closed, counts)
            if why and len(wrong) < 5:
                wrong.append(f"{connection.request[:1500]!r} got {why}")
            connection.close(rng)
        if refused > 100:
            wrong.append("the server takes no connections")
            break
    results.put((made, counts, wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="shard directory to serve")
    parser.add_argument("--requests", type=int, default=100000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--parallel", type=int, default=32, help="connections of each process")
    parser.add_argument("--deadline", type=float, default=4, help="seconds after which a client leaves, at most")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", help="file for the report")
    parser.add_argument("--options", default="--context 64 --max-batch 16 --timeout 60", help="further options of the server")
    args = parser.parse_args()
    os.environ.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    with Server(args.shards, *args.options.split()) as server:
        results, began = multiprocessing.Queue(), time.monotonic()
        asyncio.run(ask(server.port, "/v1/completions", {"prompt": "x", "max_tokens": 2}))
        at_rest = server.figures()
        workers = [multiprocessing.Process(target=work, args=(server.port, f"{args.seed} {i}", args.requests // args.processes, args.parallel, args.deadline,
                                                              results)) for i in range(args.processes)]
        for worker in workers:
            worker.start()
        made, counts, wrong = 0, collections.Counter(), []
        for _ in workers:
            some, count, why = results.get()
            made, counts, wrong = made + some, counts + count, wrong + why
        for worker in workers:
            worker.join()
        seconds = time.monotonic() - began
        after = (0, 0)
        if server.process.poll() is None:
            if not asyncio.run(settled(server.port)):
                wrong.append("sequences or cache pages are left")
            time.sleep(0.5)
            after = server.figures()
            if after[1] > at_rest[1] + 2:
                wrong.append(f"descriptors are left: {at_rest[1]} before, {after[1]} after")
            if server.end() != 0:
                wrong.append(f"ended with {server.process.returncode}: {server.text()[-4000:]}")
        else:
            wrong.append(f"the server has ended with {server.process.returncode}: {server.text()[-6000:]}")
        if re.search("runtime error|Sanitizer", server.text()):
            wrong.append(server.text()[-6000:])
    result = {"requests": made, "seconds": seconds, "answers": dict(sorted(counts.items())), "rss_kib": [at_rest[0], after[0]],
              "descriptors": [at_rest[1], after[1]], "wrong": wrong[:20]}
    print(f"mutate requests={made} seconds={seconds:.1f} answers={json.dumps(result['answers'])} rss_kib={at_rest[0]}->{after[0]} "
          f"descriptors={at_rest[1]}->{after[1]} wrong={len(wrong)}")
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())

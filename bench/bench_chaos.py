#!/usr/bin/env python3
"""Chaos before a whole tpengine serve: mixed greedy requests, clients that leave at every phase, bad requests, and every so often a rank that is
killed or stopped. Every answer that completes must be what the same request got in a quiet server; nothing may hang; memory and descriptors
must stay flat.

    bench/bench_chaos.py SHARDS --seconds 1800 --every 60 --json chaos.json

Needs the standard library only. Ends with status 1 and says why when something was wrong.
"""
import argparse
import asyncio
import collections
import os
import random
import signal
import socket
import struct
import sys
import time

from serve_client import Answer, Broken, Server, ask, exchange, finish, metric_of, percentile, request_bytes, settled, status_of

WORDS = ("In the beginning", "And the LORD said unto Moses,", "Blessed are", "Now there was a man of the tribe of Benjamin, and he went up", "The king",
         "Thou shalt not", "Behold, I", "And it came to pass in those days", "And Jesus answered and said unto them,", "Praise ye the LORD.")
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
          "required": ["name", "age"], "additionalProperties": False}


def good_requests(rng):
    """Distinct greedy requests of every kind. Some share long beginnings; repetitions give drafts something to do."""
    requests = []
    long_beginning = " ".join(rng.choice(WORDS) for _ in range(25))
    for i, words in enumerate(WORDS):
        base = {"prompt": words, "temperature": 0}
        requests += [
            {**base, "max_tokens": 16 + 8 * i, "ignore_eos": True},
            {**base, "max_tokens": 120, "ignore_eos": True, "stream": True},
            {**base, "max_tokens": 60, "stop": [" the", "\n"], "stream": bool(i % 2)},
            {**base, "prompt": long_beginning + " " + words, "max_tokens": 30, "stream": bool(i % 2)},
            {**base, "prompt": (words + " ") * 12, "max_tokens": 80, "ignore_eos": True, "stream": not i % 2},
            {**base, "max_tokens": 24, "n": 3, "ignore_eos": True, "stream": bool(i % 2)},
            {**base, "max_tokens": 40, "frequency_penalty": 0.5 + 0.1 * i, "logprobs": 3, "ignore_eos": True},
        ]
    requests += [{"prompt": words, "temperature": 0, "max_tokens": 60, "stream": bool(i % 2),
                  "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}} for i, words in enumerate(WORDS[:4])]
    return requests


BAD = [
    (request_bytes("/v1/completions", b"{"), (400,)),
    (request_bytes("/v1/completions", b'{"prompt": "x", "max_tokens": -1}'), (400,)),
    (request_bytes("/v1/completions", b'{"prompt": "\xff\xfe"}'), (400,)),
    (request_bytes("/v1/completions", {"prompt": "x", "temperature": "hot"}), (400,)),
    (request_bytes("/v1/completions", {"prompt": "x" * 300000, "max_tokens": 1}), (400,)),
    (request_bytes("/v1/completions", {"prompt": [1, 2, 10 ** 12]}), (400,)),
    (request_bytes("/v1/chat/completions", {"messages": [{"role": 5}]}), (400,)),
    (request_bytes("/v1/completions", b"[" * 100000), (400,)),
    (request_bytes("/nowhere"), (404,)),
    (request_bytes("/v1/completions", method="DELETE"), (405,)),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", (413,)),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", (400,)),
    (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 2000 + b"\r\n", (431,)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 300, (400,)),
]


class Chaos:
    def __init__(self, args, server):
        self.args, self.server, self.port = args, server, server.port
        self.requests = good_requests(random.Random(args.seed))
        self.quiet = []
        self.counts = collections.Counter()
        self.wrong = []
        self.latencies, self.health, self.recoveries, self.samples = [], [], [], []
        self.over = False

    def complain(self, what):
        self.counts["wrong"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(what)

    async def learn(self):
        """What each request gets when it is alone."""
        for request in self.requests:
            answer = await ask(self.port, "/v1/completions", request)
            if answer.status != 200:
                sys.exit(f"a quiet request gets status {answer.status}: {answer.body[:500]!r}")
            self.quiet.append(answer.choices())

    async def good(self, rng):
        index = rng.randrange(len(self.requests))
        began = time.monotonic()
        answer = Answer(await exchange(self.port, request_bytes("/v1/completions", self.requests[index]), self.args.deadline))
        if answer.status in (429, 503):
            error = answer.json()["error"]
            self.counts[f"status_{answer.status}"] += 1
            if not error["message"]:
                self.complain(f"status {answer.status} without a message")
            await asyncio.sleep(0.1 + 0.4 * rng.random())
            return
        if answer.status != 200:
            self.complain(f"status {answer.status}: {answer.body[:300]!r}")
            return
        choices = answer.choices()
        if choices is None:
            self.counts["error_events"] += 1
        elif choices != self.quiet[index]:
            self.counts["different"] += 1
            self.complain(f"request {self.requests[index]} got {choices}, quiet: {self.quiet[index]}")
        else:
            self.counts["completed"] += 1
            self.counts["tokens_asked"] += self.requests[index]["max_tokens"] * self.requests[index].get("n", 1)
            self.latencies.append(time.monotonic() - began)

    async def leave(self, rng):
        """A client that goes: in the headers, in the body, while it waits, or in the middle of its stream; by FIN or RST."""
        request = request_bytes("/v1/completions", {**rng.choice(self.requests), "stream": True, "max_tokens": 200})
        phase = rng.choice(("headers", "body", "waiting", "stream", "half"))
        head = request.index(b"\r\n\r\n") + 4
        count = {"headers": rng.randrange(head - 4), "body": rng.randrange(head, len(request))}.get(phase, len(request))
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request[:count])
        await asyncio.sleep(rng.random() * 0.2)
        if phase == "stream":
            for _ in range(rng.randrange(1, 20)):
                if not await asyncio.wait_for(reader.read(2000), self.args.deadline):
                    break
        if phase == "half" and writer.can_write_eof():
            writer.write_eof()
            await asyncio.sleep(rng.random() * 0.2)
        if rng.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        self.counts["left_" + phase] += 1

    async def bad(self, rng):
        request, statuses = rng.choice(BAD)
        try:
            answer = Answer(await exchange(self.port, request, self.args.deadline))
        except ConnectionResetError:  # it was refused while we still sent
            self.counts["bad_reset"] += 1
            return
        if answer.status not in statuses and answer.status not in (429, 503):
            self.complain(f"{request[:100]!r} got status {answer.status}, wanted {statuses}")
        self.counts["bad"] += 1

    async def client(self, number):
        rng = random.Random(f"{self.args.seed} {number}")
        while not self.over:
            draw = rng.random()
            kind = self.leave if draw < 0.05 else self.bad if draw < 0.06 else self.good
            try:
                await kind(rng)
                self.counts["requests"] += 1
            except TimeoutError:
                self.complain(f"{kind.__name__}: no end within {self.args.deadline:g} s")
            except (Broken, OSError, ValueError, KeyError) as error:
                if kind == self.leave and isinstance(error, OSError):
                    continue
                self.complain(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def watch(self):
        """Memory and descriptors, and how soon a health check is answered."""
        while not self.over:
            began = time.monotonic()
            status = await status_of(self.port, "/health")
            self.health.append(time.monotonic() - began)
            if status not in (200, 503):
                self.complain(f"/health: {status}")
            self.samples.append(self.server.figures())
            await asyncio.sleep(self.args.sample)

    async def break_ranks(self):
        rng = random.Random(f"{self.args.seed} ranks")
        ways = (signal.SIGKILL, signal.SIGSTOP)
        for turn in range(1 << 30):
            await asyncio.sleep(self.args.every)
            before = await metric_of(self.port, "tpengine_rank_restarts_total")
            ranks, way = self.server.ranks(), ways[turn % 2]
            began = time.monotonic()
            os.kill(rng.choice(ranks), way)
            while await metric_of(self.port, "tpengine_rank_restarts_total") == before or await status_of(self.port, "/ping") != 200:
                if time.monotonic() - began > self.args.deadline:
                    self.complain(f"not ready {self.args.deadline:g} s after {way.name}")
                    return
                await asyncio.sleep(0.02)
            self.recoveries.append((way.name, time.monotonic() - began))

    async def run(self):
        await self.learn()
        await settled(self.port)
        at_rest = self.server.figures()
        clients = [asyncio.create_task(self.client(i)) for i in range(self.args.clients)]
        others = [asyncio.create_task(self.watch())]
        if self.args.every:
            others.append(asyncio.create_task(self.break_ranks()))
        end = time.monotonic() + self.args.seconds
        while time.monotonic() < end and self.server.process.poll() is None:
            await asyncio.sleep(0.1)
            for task in others:
                if task.done() and task.exception():
                    raise task.exception()
        if self.server.process.poll() is not None:
            self.complain(f"the server ended with {self.server.process.returncode}: {self.server.text()[-2000:]}")
        self.over = True
        others[-1].cancel()
        done, late = await asyncio.wait([*clients, *others], timeout=2 * self.args.deadline)
        if late:
            self.complain(f"{len(late)} clients hang")
        if self.server.process.poll() is None:
            while await status_of(self.port, "/ping") != 200 and time.monotonic() < end + self.args.deadline:
                await asyncio.sleep(0.05)
            if not await settled(self.port):
                self.complain("sequences or cache pages are left when all clients have gone")
            for request, quiet in zip(self.requests, self.quiet):
                if (await ask(self.port, "/v1/completions", request)).choices() != quiet:
                    self.complain(f"afterwards, alone, another answer to {request}")
            await asyncio.sleep(1)
        return self.verdict(at_rest)

    def verdict(self, at_rest):
        # Buffers and caches fill for a while: what counts is whether anything grows from the second fifth of the run to the last.
        fifth = max(1, len(self.samples) // 5)
        early, late = ([percentile([sample[i] for sample in part], 0.5) for i in (0, 1)] for part in (self.samples[fifth:2 * fifth], self.samples[-fifth:]))
        after = self.server.figures() if self.server.process.poll() is None else (0, 0)
        if late[0] > early[0] * 1.05 + self.args.growth:
            self.complain(f"memory grows: {early[0]} KiB early, {late[0]} KiB late")
        if after[1] > at_rest[1] + 2:
            self.complain(f"descriptors are left: {at_rest[1]} before, {after[1]} after")
        for name in ("completed", "requests"):
            if not self.counts[name]:
                self.complain(f"nothing was {name}")
        if self.server.process.poll() is None and self.server.end() != 0:
            self.complain(f"a drain at rest ends with status {self.server.process.returncode}")
        by_way = {way: [s for name, s in self.recoveries if name == way] for way in ("SIGKILL", "SIGSTOP")}
        return {
            "seconds": self.args.seconds, "clients": self.args.clients, "broken_every_s": self.args.every, "ranks_broken": len(self.recoveries),
            "counts": dict(sorted(self.counts.items())),
            "latency_s": {"p50": percentile(self.latencies, 0.5), "p99": percentile(self.latencies, 0.99), "max": max(self.latencies, default=0)},
            "health_s": {"p50": percentile(self.health, 0.5), "p99": percentile(self.health, 0.99), "max": max(self.health, default=0)},
            "ready_again_s": {way: {"p50": percentile(s, 0.5), "max": max(s)} for way, s in by_way.items() if s},
            "rss_kib": {"at_rest": at_rest[0], "early": early[0], "late": late[0], "after": after[0], "max": max((s[0] for s in self.samples), default=0)},
            "descriptors": {"at_rest": at_rest[1], "early": early[1], "late": late[1], "after": after[1]},
            "wrong": self.wrong,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="shard directory to serve")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--every", type=float, default=60, help="seconds between two ranks that are killed or stopped, in turns; 0: none")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--deadline", type=float, default=120, help="seconds after which a request counts as hung")
    parser.add_argument("--sample", type=float, default=1, help="seconds between two looks at memory and /health")
    parser.add_argument("--growth", type=float, default=2048, help="KiB by which memory may grow from the second fifth of the run to the last, beside 5 %%")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", help="file for the report")
    parser.add_argument("--options", default="--timeout 5 --max-batch 16 --max-queue 64", help="further options of the server")
    args = parser.parse_args()
    with Server(args.shards, "--restart", "--restart-delay", 0.2, "--restart-limit", 1000, *args.options.split()) as server:
        chaos = Chaos(args, server)
        result = asyncio.run(chaos.run())
    counts = result["counts"]
    print(f"chaos seconds={args.seconds:g} requests={counts.get('requests', 0)} completed_as_quiet={counts.get('completed', 0)} "
          f"different={counts.get('different', 0)} error_events={counts.get('error_events', 0)} refused={counts.get('status_503', 0) + counts.get('status_429', 0)} "
          f"left={sum(v for k, v in counts.items() if k.startswith('left_'))} bad={counts.get('bad', 0) + counts.get('bad_reset', 0)} "
          f"ranks_broken={result['ranks_broken']} rss_kib={result['rss_kib']['early']}->{result['rss_kib']['late']} "
          f"descriptors={result['descriptors']['at_rest']}->{result['descriptors']['after']} health_p99_ms={1e3 * result['health_s']['p99']:.1f} "
          f"wrong={len(result['wrong'])}")
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())

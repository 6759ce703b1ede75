#!/usr/bin/env python3
"""Thousands of streams open at once before a whole tpengine serve: no token of any stream may be lost, and each stream must be, token for token,
what the same request got in a quiet server.

    bench/bench_streams.py SHARDS --streams 4000 --tokens 100 --json streams.json

Needs the standard library only. All connections are opened, then all requests are sent; most of them wait for their turn. Ends with status 1 and
says why when something was wrong.
"""
import argparse
import asyncio
import json
import resource
import sys
import time

from serve_client import Answer, Broken, Server, ask, finish, percentile, request_bytes, settled

WORDS = ("In the beginning", "And the LORD said unto Moses,", "Blessed are", "The king", "Thou shalt not", "Behold, I", "And it came to pass")
PROMPTS = [f"{first} {second}" for first in WORDS for second in WORDS]


class Stream:
    """Tokens with their logprobs: no token without text can hide in an event."""

    def __init__(self, prompt, tokens):
        self.prompt = prompt
        self.request = request_bytes("/v1/completions", {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                                                         "logprobs": 0})
        self.first_s = self.wrong = None
        self.tokens, self.events, self.refused = [], 0, 0

    async def connect(self, port):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)

    def send(self):
        self.sent_s = time.monotonic()
        self.writer.write(self.request)

    async def read(self, port, deadline):
        try:
            async with asyncio.timeout(deadline):
                while not await self.take():
                    # Thousands of requests in one instant are more than may wait to be read. Clients come again, as this one says it wants them to.
                    self.refused += 1
                    self.writer.transport.abort()
                    await asyncio.sleep(0.5)
                    await self.connect(port)
                    self.writer.write(self.request)
        except (Broken, OSError, TimeoutError, ValueError, KeyError) as error:
            self.wrong = f"{type(error).__name__}: {error}"
        finally:
            self.writer.transport.abort()

    async def take(self):
        """The whole answer; false when the server was too busy to take the request."""
        pieces = []
        while piece := await self.reader.read(1 << 16):
            if self.first_s is None and b"data:" in piece:
                self.first_s = time.monotonic() - self.sent_s
            pieces.append(piece)
        answer = Answer(b"".join(pieces))
        if answer.status == 503 and answer.json()["error"]["code"] == "overloaded":
            return False
        self.take_apart(answer)
        return True

    def take_apart(self, answer):
        if answer.status != 200:
            raise Broken(f"status {answer.status}: {answer.body[:300]!r}")
        ((self.text, reason),) = answer.choices()
        for event in answer.events()[:-1]:
            for choice in json.loads(event)["choices"]:
                if choice["logprobs"]:
                    self.events += 1
                    self.tokens += choice["logprobs"]["tokens"]
        if reason != "length":
            raise Broken(f"finish_reason {reason}")


def largest_rss(server):
    """KiB: of the process that serves, and of all its ranks together."""
    def of(pid):
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
    return of(server.pid), sum(map(of, server.ranks()))


async def run(server, args):
    quiet = {}
    for prompt in PROMPTS[:args.prompts]:
        stream = Stream(prompt, args.tokens)
        await stream.connect(server.port)
        stream.send()
        await stream.read(server.port, args.deadline)
        if stream.wrong or len(stream.tokens) != args.tokens:
            sys.exit(f"a quiet stream: {stream.wrong or len(stream.tokens)}")
        quiet[prompt] = stream
    rest_kib, descriptors = server.figures()
    streams = [Stream(PROMPTS[i % args.prompts], args.tokens) for i in range(args.streams)]
    for at in range(0, len(streams), 200):
        await asyncio.gather(*(stream.connect(server.port) for stream in streams[at:at + 200]))
    began = time.monotonic()
    for stream in streams:
        stream.send()
    reading = asyncio.gather(*(stream.read(server.port, args.deadline) for stream in streams))
    most_kib = most_descriptors = 0
    health = []
    while not reading.done():
        asked = time.monotonic()
        answer = await ask(server.port, "/health", seconds=60)
        health.append(time.monotonic() - asked)
        if answer.status != 200:
            sys.exit(f"/health: {answer.status}")
        kib, open_now = server.figures()
        most_kib, most_descriptors = max(most_kib, kib), max(most_descriptors, open_now)
        await asyncio.sleep(0.05)
    await reading
    seconds = time.monotonic() - began
    wrong = [stream.wrong for stream in streams if stream.wrong]
    different = [stream.prompt for stream in streams if not stream.wrong and (stream.tokens != quiet[stream.prompt].tokens or
                                                                              stream.text != quiet[stream.prompt].text)]
    tokens = sum(len(stream.tokens) for stream in streams)
    if tokens != args.streams * args.tokens:
        wrong.append(f"{tokens} tokens came, {args.streams * args.tokens} were asked for")
    if different:
        wrong.append(f"{len(different)} streams differ from the quiet ones, first: {different[0]!r}")
    if not await settled(server.port):
        wrong.append("sequences or cache pages are left when all streams have ended")
    firsts = [stream.first_s for stream in streams if stream.first_s is not None]
    hwm, ranks_hwm = largest_rss(server)
    return {
        "streams": args.streams, "tokens_each": args.tokens, "tokens": tokens, "events": sum(stream.events for stream in streams), "different": len(different),
        "refused_at_first": sum(stream.refused > 0 for stream in streams),
        "seconds": seconds, "tokens_per_s": tokens / seconds,
        "first_token_s": {"min": min(firsts, default=None), "p50": percentile(firsts, 0.5), "p99": percentile(firsts, 0.99), "max": max(firsts, default=None)},
        "health_s": {"p50": percentile(health, 0.5), "p99": percentile(health, 0.99), "max": max(health, default=None)},
        "rss_kib": {"at_rest": rest_kib, "most": max(most_kib, hwm), "after": server.figures()[0], "most_of_ranks": ranks_hwm},
        "descriptors": {"at_rest": descriptors, "most": most_descriptors, "after": server.figures()[1]}, "wrong": wrong[:20],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="shard directory to serve")
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each stream")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"different prompts, at most {len(PROMPTS)}")
    parser.add_argument("--deadline", type=float, default=900, help="seconds after which a stream counts as hung")
    parser.add_argument("--json", help="file for the report")
    parser.add_argument("--options", default="--max-batch 64", help="further options of the server")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = args.streams + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))
    with Server(args.shards, "--max-connections", args.streams + 200, "--max-queue", args.streams + 1000, *args.options.split()) as server:
        result = asyncio.run(run(server, args))
    print(f"streams open={args.streams} tokens={result['tokens']} events={result['events']} different={result['different']} refused_at_first={result['refused_at_first']} seconds={result['seconds']:.1f} "
          f"tokens_per_s={result['tokens_per_s']:.0f} first_token_s={result['first_token_s']['min']:.3f}..{result['first_token_s']['max']:.1f} "
          f"rss_kib={result['rss_kib']['at_rest']}->{result['rss_kib']['most']} health_p99_ms={1e3 * result['health_s']['p99']:.1f} wrong={len(result['wrong'])}")
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())

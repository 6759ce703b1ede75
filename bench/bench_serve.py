#!/usr/bin/env python3
"""Throughput of `tpengine serve` beside llama.cpp's llama-server: tokens a second, time to the first token and gaps between tokens at several
numbers of concurrent streams, both servers on the same machine, the same weights and about the same bits, in turns in one run.

    bench/bench_serve.py --shards build/bench-serve/int4 --rival-server .../llama-server --rival-model model-q4_0.gguf --plot serve.svg

Needs the standard library only. Without a rival, our server alone. One line per server and number of streams (medians over the rounds), at the
end a JSON object with everything (--json FILE) and a plot (--plot FILE, SVG).
Prompts are random token ids, all different, greedy, the end of sequence ignored; prefix sharing and drafts are off on both sides.
"""
import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

BUILD = os.environ.get("BUILD", "build")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ours:
    name = "tpengine"

    def __init__(self, args):
        self.port = free_port()
        self.command = [os.path.join(BUILD, "tpengine"), "serve", args.shards, "--port", self.port, "--context", args.prompt + args.generate + 64,
                        "--max-batch", max(args.streams), "--max-queue", 4 * max(args.streams), "--prefix-cache", "off", "--draft-tokens", 0,
                        "--log-level", "error", *(["--threads", args.threads_per_rank] if args.threads_per_rank else [])]

    def request(self, prompt, count):
        return "/v1/completions", {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}

    @staticmethod
    def has_token(event):
        return bool(event.get("choices")) and not event["choices"][0].get("finish_reason")


class Rival:
    name = "llama-server"

    def __init__(self, args):
        self.port = free_port()
        slots, context = max(args.streams), args.prompt + args.generate + 64
        self.command = [args.rival_server, "-m", args.rival_model, "--port", self.port, "--host", "127.0.0.1", "--parallel", slots, "-c", slots * context,
                        "-t", args.threads, "-tb", args.threads, "--log-disable", *args.rival_options.split()]

    def request(self, prompt, count):
        return "/completion", {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "ignore_eos": True, "stream": True,
                               "cache_prompt": False}

    @staticmethod
    def has_token(event):
        return not event.get("stop") and bool(event.get("tokens") or event.get("content") is not None)


def start(server):
    server.log = tempfile.TemporaryFile()
    server.process = subprocess.Popen([str(word) for word in server.command], stdin=subprocess.DEVNULL, stdout=server.log, stderr=server.log)
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            with socket.create_connection(("127.0.0.1", server.port), 5) as s:
                s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 200 " in s.recv(200):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    server.log.seek(0)
    sys.exit(f"{server.name} does not get ready: " + server.log.read().decode(errors="replace")[-2000:])


async def stream(server, prompt, count):
    """Times of the events that carry tokens; the first entry is when the request was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
    path, body = server.request(prompt, count)
    data = json.dumps(body).encode()
    times = [time.perf_counter()]
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        sys.exit(f"{server.name} answers {status.decode()}{(await reader.read(1000)).decode(errors='replace')}")
    async for line in reader:
        if line.startswith(b"data: {") and server.has_token(json.loads(line[6:])):
            times.append(time.perf_counter())
    writer.close()
    return times


async def load(server, streams, args, rng):
    prompts = [[rng.randrange(10, args.vocab) for _ in range(args.prompt)] for _ in range(streams)]
    began = time.perf_counter()
    all_times = await asyncio.gather(*(stream(server, prompt, args.generate) for prompt in prompts))
    seconds = time.perf_counter() - began
    # A server may put several tokens into one event, so tokens are counted by what was asked for; every stream must have run to its end.
    few = min(len(times) - 1 for times in all_times)
    if few < args.generate // 2:
        sys.exit(f"{server.name}: a stream ended after {few} events of {args.generate} tokens")
    firsts = [times[1] - times[0] for times in all_times]
    gaps = sorted(b - a for times in all_times for a, b in zip(times[1:], times[2:]))
    return {"tokens_per_s": streams * args.generate / seconds, "first_token_s": statistics.median(firsts), "first_token_max_s": max(firsts),
            "gap_p50_s": gaps[len(gaps) // 2], "gap_p99_s": gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)], "prompt_tokens_per_s":
            streams * args.prompt / max(max(firsts), 1e-9)}


def plot(path, results, title):
    """Tokens a second over the number of streams; both axes logarithmic."""
    import math
    width, height, left, right, top, bottom = 720, 420, 70, 150, 50, 50
    streams = sorted({n for curve in results.values() for n in curve})
    values = [curve[n]["tokens_per_s"] for curve in results.values() for n in curve]
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    high = max(high, low + 1)
    span = max(1e-9, math.log2(streams[-1] / streams[0]))

    def at(n, value):
        return (left + (width - left - right) * math.log2(n / streams[0]) / span,
                height - bottom - (height - top - bottom) * (math.log2(value) - low) / (high - low))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
           f'<rect width="{width}" height="{height}" fill="#fff"/><text x="{left}" y="24" font-size="15">{title}</text>']
    for power in range(low, high + 1):
        y = at(streams[0], 2.0 ** power)[1]
        out.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/><text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{2 ** power}</text>')
    for n in streams:
        x = at(n, 2.0 ** low)[0]
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle">{n}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">concurrent streams</text>')
    for (name, curve), colour in zip(results.items(), ("#b4541a", "#3b6ea5")):
        points = [at(n, curve[n]["tokens_per_s"]) for n in sorted(curve)]
        out.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        out.append(f'<text x="{points[-1][0] + 10:.1f}" y="{points[-1][1] + 4:.1f}" fill="{colour}">{name}</text>')
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="shard directory that tpengine serves")
    parser.add_argument("--rival-server", help="llama-server's program")
    parser.add_argument("--rival-model", help="the same model as GGUF")
    parser.add_argument("--rival-options", default="", help="further options for llama-server")
    parser.add_argument("--streams", default="1,4,16,64", help="numbers of concurrent streams")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--generate", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="llama-server's threads")
    parser.add_argument("--threads-per-rank", type=int, default=0, help="ours; 0: cores / ranks")
    parser.add_argument("--vocab", type=int, default=2000, help="prompts are ids below this")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--plot", help="file for the plot (SVG)")
    parser.add_argument("--title", default="Tokens per second")
    args = parser.parse_args()
    args.streams = [int(n) for n in args.streams.split(",")]
    servers = [Ours(args)] + ([Rival(args)] if args.rival_server else [])
    runs = {server.name: {n: [] for n in args.streams} for server in servers}
    rng = random.Random(7)
    try:
        for server in servers:
            start(server)
            asyncio.run(load(server, 1, args, rng))  # pages and caches are warm
        for _ in range(args.rounds):
            for n in args.streams:
                for server in servers:
                    runs[server.name][n].append(asyncio.run(load(server, n, args, rng)))
    finally:
        for server in servers:
            if hasattr(server, "process"):
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()
    results = {name: {n: {key: statistics.median(run[key] for run in taken) for key in taken[0]} for n, taken in curve.items()}
               for name, curve in runs.items()}
    for n in args.streams:
        for name, curve in results.items():
            r = curve[n]
            ratio = f" ratio={r['tokens_per_s'] / results['llama-server'][n]['tokens_per_s']:.2f}" if len(results) > 1 and name == "tpengine" else ""
            print(f"serve server={name} streams={n} prompt_tokens={args.prompt} gen_tokens={args.generate} tokens_per_s={r['tokens_per_s']:.1f} "
                  f"first_token_s={r['first_token_s']:.3f} gap_p50_ms={1e3 * r['gap_p50_s']:.1f} gap_p99_ms={1e3 * r['gap_p99_s']:.1f}{ratio}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "prompt_tokens": args.prompt,
                       "gen_tokens": args.generate, "rounds": args.rounds, "results": results, "runs": runs}, f, indent=1)
            f.write("\n")
    if args.plot:
        plot(args.plot, results, args.title)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What a prompt gains where one half of it computes while the other half's sums are on their way between the devices: `tpengine bench` without and with
--overlap, in turns, each several times. One line for each transport and codec.

  devices         that the ranks compute on; fewer than ranks: by turns, which leaves less to hide behind
  off_tok_s, on_tok_s   tokens of the prompt a second, in the fastest run
  gain            by how much on is faster

The tokens behind the prompt must be the same either way. A transport other than host that the engine refuses is said, which is no failure.

  gpu_overlap.py [--engine FILE] [--cuda-library FILE] [--transports host,p2p] [--wires bf16,s8x] [--prompt-tokens 6144] [--rounds 2] SHARD_DIR
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

REFUSED = (2, 6)  # exit statuses: of wrong words, and of a device


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("--engine", default="build/tpengine")
    parser.add_argument("--cuda-library")
    parser.add_argument("--transports", default="host,p2p")
    parser.add_argument("--wires", default="bf16,s8x")
    parser.add_argument("--prompt-tokens", type=int, default=6144)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def bench(o, transport, wire, overlap):
    """The report of a run, its exit status, and what it said; the report is None where the run failed."""
    words = [o.engine, "bench", o.shards, "--json", "--backend", "cuda", "--transport", transport, "--wire", wire, "--overlap", overlap,
             "--prompt-tokens", o.prompt_tokens, "--gen-tokens", 4]
    if o.cuda_library:
        words += ["--cuda-library", o.cuda_library]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None, done.returncode, done.stderr.strip()


def devices_of(said):
    """Their numbers and the name of the first, from lines "rank 0: device 0, NVIDIA H100 (sm_90): ..."."""
    found = [line.split("device ", 1)[1].split(",", 1) for line in said.splitlines() if line.startswith("rank ") and "device " in line]
    name = found[0][1].split(" (sm_")[0].strip().replace(" ", "-") if found else "unknown"
    return len({number for number, _ in found}), name


def measure(o, transport, wire):
    """0; 1 where what was measured is wrong."""
    best, hashes, said = {"off": 0.0, "on": 0.0}, set(), ""
    for _ in range(o.rounds):
        for overlap in best:
            report, code, said = bench(o, transport, wire, overlap)
            if not report or f"sums of ranks over {transport}" not in said:
                last = said.splitlines()[-1] if said else "no report"
                print(f"# gpu_overlap: {transport}: {last}", flush=True)
                return 0 if transport != "host" and code in REFUSED and f"--transport {transport}: " in last else 1
            if ("overlap" in report["prefill"]) != (overlap == "on"):
                print(f"# gpu_overlap: --overlap {overlap} ran as {report['prefill']}", flush=True)
                return 1
            best[overlap] = max(best[overlap], report["prefill_tokens_per_s"])
            hashes.add(report["tokens_hash"])
    if len(hashes) > 1:
        print(f"# gpu_overlap: {transport}, {wire}: other tokens in halves", flush=True)
        return 1
    count, name = devices_of(said)
    print(f"gpu_overlap model={Path(o.shards).name} quant={report['quant']} transport={transport} wire={wire} tp={report['tp_size']} devices={count} "
          f"prompt_tokens={o.prompt_tokens} off_tok_s={best['off']:.1f} on_tok_s={best['on']:.1f} gain={best['on'] / best['off'] - 1:.3f} gpu={name}", flush=True)
    return 0


def main():
    o = options()
    return max(measure(o, transport, wire) for transport in o.transports.split(",") for wire in o.wires.split(","))


if __name__ == "__main__":
    sys.exit(main())

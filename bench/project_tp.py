#!/usr/bin/env python3
"""What Llama-3-70B in INT4 would reach on two and four GeForce cards without GPU-to-GPU access. A model, not a measurement: no GPU was used.

    BUILD=build bench/project_tp.py [--prompt 2048] [--context 4096] [--output FILE]

Bytes are exact: weights and KV cache that a rank reads come from `tpshard plan` (bench/models/Llama-3-70B.json). Exchanges come from
`bench_links`, which simulates the algorithms that engine/comm_select.h takes. How fast our kernels are on these cards is an assumption with a range,
printed beside the figures. NCCL is what others measured of it on boards without P2P.
"""
import argparse
import json
import os
import subprocess
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL = Path(__file__).resolve().parent / "models" / "Llama-3-70B.json"

# Memory (GB/s), int8 tensor operations without sparsity (10^12/s), memory (GiB): NVIDIA's data sheets. link: GB/s a direction of a copy on x16, of
# which 4.0 was measured by others at 24 to 26 and 5.0 is taken as twice that.
CARDS = {
    "RTX 3090": {"memory": 936, "int8": 284, "gib": 24, "link": ("4.0", 24)},
    "RTX 4090": {"memory": 1008, "int8": 661, "gib": 24, "link": ("4.0", 24)},
    "RTX 5090": {"memory": 1792, "int8": 838, "gib": 32, "link": ("5.0", 48)},
}
DECODE_SHARE = (0.60, 0.75, 0.85)  # of memory bandwidth that decode kernels reach: low, middle, high
PREFILL_SHARE = (0.20, 0.35, 0.50)  # of the int8 peak that prefill reaches, attention and all else included
KERNEL_READ = 0.5  # of the link: a kernel that reads the host's memory, beside a copy engine
DESK_DRAM = 70  # GB/s: two channels of DDR5
NCCL_US, NCCL_RATES = 39, (1.9, 5.3)  # of 10 KB over shared memory; GB/s of bf16, boards without P2P


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"project_tp: {words[0]}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def plan(tp, context):
    return json.loads(run(BUILD / "tpshard", "plan", "--tp", tp, "--quant", "int4", "--context", context, "--json", MODEL))


def exchange_us(tp, card, lanes, rows, hidden, dram=0):
    """Microseconds of one all_reduce over the host: of one row in decode (bf16), and of `rows` in prefill (s8x). dram: GB/s of the host's memory, 0: the
    copies stay in its cache."""
    link = card["link"][1] * lanes / 16
    out = run(BUILD / "bench/bench_links", f"tp={tp}", f"rows=1,{rows}", f"cols={hidden}", f"link_gb={link}", f"read_gb={link * KERNEL_READ}",
              f"device_gb={card['memory']}", f"dram_gb={dram}", "clock=1")
    us = {}
    for line in out.splitlines():
        words = dict(word.split("=", 1) for word in line.split()[1:])
        if line.startswith("exchange") and words["transport"] == "host":
            us[words["phase"], words["wire"], int(words["rows"])] = float(words["us"])
    return us["decode", "bf16", 1], us["prefill", "s8x", rows]


def nccl_us(rows, hidden, rate):
    return NCCL_US + 2e-3 * rows * hidden / rate


class Projection:
    """One card, number of cards and link. Lists are over the shares: low, middle, high."""

    def __init__(self, name, tp, lanes, prompt, context):
        card, config, planned = CARDS[name], json.loads(MODEL.read_text()), plan(tp, context)
        rank = max(planned["ranks"], key=lambda r: r["read_bytes_per_token"])
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        self.name, self.tp, self.lanes = name, tp, lanes
        self.fits = planned["largest_total_bytes"] < card["gib"] * 2**30 * 0.97
        self.link = f"{card['link'][0]} x{lanes}"
        self.exchanges = 2 * layers + 1  # and the embedding's
        self.read_bytes = rank["read_bytes_per_token"] + rank["kv_read_bytes_per_token"]
        self.decode_us, self.prefill_us = exchange_us(tp, card, lanes, prompt, hidden)

        # Decode: bytes over bandwidth, then exchanges that nothing hides.
        self.decode = []
        for share in DECODE_SHARE:
            read_s = self.read_bytes / (1e9 * card["memory"] * share)
            ours = self.exchanges * self.decode_us * 1e-6
            nccl = [self.exchanges * nccl_us(1, hidden, rate) * 1e-6 for rate in NCCL_RATES]
            self.decode.append({"tok_s": 1 / (read_s + ours), "share": ours / (read_s + ours), "nccl_tok_s": [1 / (read_s + s) for s in nccl],
                                "nccl_share": [s / (read_s + s) for s in nccl]})

        # Prefill: operations over the peak; exchanges one after the other, and with the sequence in two halves, where one half's exchange runs beside
        # the other half's products.
        weights = planned["active_parameters"] - 2 * config["vocab_size"] * hidden  # embedding and head are not multiplied for every token
        operations = prompt * (2 * weights + 4 * hidden * layers * prompt / 2) / tp
        _, half_us = exchange_us(tp, card, lanes, prompt // 2, hidden)
        self.prefill = []
        for share in PREFILL_SHARE:
            compute_s = operations / (1e12 * card["int8"] * share)
            ours = self.exchanges * self.prefill_us * 1e-6
            block_s = compute_s / (2 * layers)
            halves = 2 * layers * max(0, 2e-6 * half_us - block_s) + 1e-6 * half_us
            nccl = [self.exchanges * nccl_us(prompt, hidden, rate) * 1e-6 for rate in NCCL_RATES]
            self.prefill.append({"tok_s": prompt / (compute_s + ours), "share": ours / (compute_s + ours), "halves_tok_s": prompt / (compute_s + halves),
                                 "halves_share": halves / (compute_s + halves), "nccl_tok_s": [prompt / (compute_s + s) for s in nccl],
                                 "nccl_share": [s / (compute_s + s) for s in nccl]})


def span(values, form="{:.0f}"):
    """low to high, of what is printed."""
    texts = [form.format(value) for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def middle(rows, key, scale=1, form="{:.0f}"):
    """The middle share's figure, and the range of all."""
    return f"{form.format(scale * rows[1][key])} ({span([scale * row[key] for row in rows], form)})"


def both(rows, key, scale=1, form="{:.0f}"):
    """The middle share's figures at NCCL's two rates."""
    return span([scale * value for value in rows[1][key]], form)


def report(projections, options):
    memory = ", ".join(f"{name} {card['memory']} GB/s" for name, card in CARDS.items())
    peak = ", ".join(f"{name} {card['int8']} Tops" for name, card in CARDS.items())
    lines = [
        "# Llama-3-70B in INT4 on two and four cards without P2P: a projection",
        "",
        "**Bandwidth model, not measured on a GPU.** Made by `bench/project_tp.py`; the model's middle value stands first, the range of the assumption behind it.",
        "",
        "Exact:",
        f"- bytes that a rank reads for a token at a context of {options.context}, weights and KV cache (`tpshard plan`): "
        + ", ".join(f"tp {tp}: {next(p.read_bytes for p in projections if p.tp == tp) / 1e9:.2f} GB" for tp in sorted({p.tp for p in projections})),
        f"- {projections[0].exchanges} all_reduces for each token or chunk of a prompt, of 16 KiB (bf16) a token; prompts are sent in s8x, 8.25 bits a value",
        "",
        "Assumed:",
        f"- decode kernels reach {DECODE_SHARE[0]:.0%} / **{DECODE_SHARE[1]:.0%}** / {DECODE_SHARE[2]:.0%} of the card's memory bandwidth "
        f"({memory}); one sequence",
        f"- prefill of {options.prompt} tokens reaches {PREFILL_SHARE[0]:.0%} / **{PREFILL_SHARE[1]:.0%}** / {PREFILL_SHARE[2]:.0%} of the int8 peak "
        f"({peak}), everything but exchanges included",
        "- transport `host`: the algorithms of `engine/comm_select.h` on the virtual clock of `bench/bench_links`; a copy engine moves 24 GB/s a direction on PCIe 4.0 x16 "
        "(published), 48 on 5.0 x16, half on x8; a kernel reads host memory at half of that; latencies as published for P2P and host kernels (5.8 and 8.7 us for "
        "16 KB on two cards); the staging ring stays in the processor's last cache",
        f"- NCCL without P2P: {NCCL_US} us and {NCCL_RATES[0]} to {NCCL_RATES[1]} GB/s of bf16 (published, two cards; taken for four as well, which favours NCCL)",
        "- halves: the prompt's rows in two halves, the exchange of one beside the products of the other; what the products do not cover is exposed; smaller "
        "products are taken to be as quick for their size, and the exchange's own kernels to take nothing from them",
        "",
        f"Decode, tokens/s of one sequence at a context of {options.context}; exposed: exchanges as a share of a token's time:",
        "",
        "| cards | link of each | us per exchange | tokens/s | exposed % | NCCL bf16: tokens/s | exposed % |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in projections:
        lines.append(f"| {p.tp} x {p.name} | {p.link} | {p.decode_us:.1f} | {middle(p.decode, 'tok_s', 1, '{:.1f}')} | {middle(p.decode, 'share', 100)} | "
                     f"{both(p.decode, 'nccl_tok_s', 1, '{:.1f}')} | {both(p.decode, 'nccl_share', 100)} |")
    lines += [
        "",
        f"Prefill of {options.prompt} tokens, tokens/s; exposed: exchanges that nothing hides, as a share of the time:",
        "",
        "| cards | link of each | ms per exchange | tokens/s | exposed % | in halves: tokens/s | exposed % | NCCL bf16: tokens/s | exposed % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in projections:
        lines.append(f"| {p.tp} x {p.name} | {p.link} | {p.prefill_us / 1000:.2f} | {middle(p.prefill, 'tok_s')} | {middle(p.prefill, 'share', 100)} | "
                     f"{middle(p.prefill, 'halves_tok_s')} | {middle(p.prefill, 'halves_share', 100)} | {both(p.prefill, 'nccl_tok_s')} | {both(p.prefill, 'nccl_share', 100)} |")
    lines += ["", "NCCL's columns are at the middle share, over its two published rates."]
    slow, quick = (exchange_us(4, CARDS["RTX 3090"], 16, options.prompt, 8192, dram)[1] / 1000 for dram in (DESK_DRAM, 0))
    lines.append(f"Where the staging ring does not stay in the cache, a desk board's memory ({DESK_DRAM} GB/s for all copies together) makes an exchange of {options.prompt} tokens "
                 f"between four cards on 4.0 x16 take {slow:.2f} ms instead of {quick:.2f}.")
    too_small = [f"{p.tp} x {p.name}" for p in projections if not p.fits]
    if too_small:
        lines.append(f"Does not fit the cards at this context: {', '.join(sorted(set(too_small)))}.")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--output", help="write the report there too")
    options = parser.parse_args()
    if options.prompt < 2 or options.prompt % 2 or options.context < 1:
        parser.error("--prompt: an even number of tokens; --context: at least 1")
    projections = [Projection(name, tp, lanes, options.prompt, options.context) for name in CARDS for tp in (2, 4) for lanes in (16, 8)]
    text = report(projections, options)
    print(text, end="")
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()

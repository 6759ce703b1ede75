#!/usr/bin/env python3
"""tpengine beside other engines on this machine's processors: models of one shape and equal bits, in turns, medians, one table of ratios.

    make bench-rivals                                                     everything, Llama's 1B shape in four bits
    bench/bench_rivals.py --models 1b 8b --formats int4 int8              more of it
    bench/bench_rivals.py run --rounds 1 --threads 2 --parts speed        one round more; then `report` once again
    bench/bench_rivals.py --environment ~/venv                            rivals that are installed already; nothing is installed

Three steps, all of them unless some are named:
  prepare  a virtual environment in the work folder, the rivals installed into it with pip as a user would (llama-cpp-python is compiled for this
           machine, which takes a while); random weights by scripts/make_synthetic_checkpoint.py, `tpshard` for ours, the rivals' own tools for
           theirs. What lies in the work folder already is taken as it is, so a link to a finished model does as well.
  run      rounds. In each of them every engine has its turn; a raw line of JSON for each measurement is added to --json.
  report   the table, from all lines of --json.
A rival that cannot be installed, converted for or run is named with the reason, and the others go on.

Parts of a round: speed (prefill, decode after it, memory), batch (decode of several sequences), start (exec to first token, files in the page
cache), busy (decode beside one process that never sleeps). Before each turn of the first two, the limits: read bandwidth of as many threads (four streams each, or one where
that is faster) and the peak of products of bytes, or of bf16 for such weights. A measurement beside which other processes used more than a quarter of a core is left out of the table where enough others
are there. Bits of a weight, scales included: int4 ours, llama.cpp's Q4_0 and OpenVINO's 4.5, ONNX Runtime's 5; the head has them too, or eight bits
with int4-head8, where each has its own default group size.
Rivals are spared their interpreter's start (not in `start`, which tells both) and, where they allow it, sampling.

Disk: 1b 8 GB, 8b 40 GB; memory: converting 8b for OpenVINO or ONNX Runtime takes some 40 GB.
"""
import argparse
import ctypes
import datetime
import json
import os
import platform
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
ROOT = Path(__file__).resolve().parent.parent
RIVAL_ENGINES = ROOT / "bench" / "rival_engines.py"
FOREIGN_CORES = 0.25

# Packages, installed in one go for each engine; the first is the engine.
RIVALS = {
    "llama.cpp": ["llama-cpp-python", "gguf"],
    "openvino": ["openvino-genai", "optimum-intel[openvino]", "nncf"],
    "onnxruntime": ["onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"],
}
SHAPES = {
    "1b": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv-heads": 8, "head-dim": 64, "vocab": 128256},
    "8b": {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv-heads": 8, "head-dim": 128, "vocab": 128256},
}
# int4: groups of 32 and a head of the same; int4-head8: each one's own group size with a head in eight bits.
TPSHARD_WORDS = {
    "int4": ["--quant", "int4", "--group-size", "32", "--head", "int4", "--scales", "max"],
    "int4-head8": ["--quant", "int4", "--head", "int8", "--scales", "max"],
    "int8": ["--quant", "int8"],
    "bf16": ["--quant", "none"],
}
BITS = {  # of a weight of the layers, of the head
    "int4": {"tpengine": (4.5, 4.5), "llama.cpp": (4.5, 4.5), "openvino": (4.5, 4.5), "onnxruntime": (5, 5)},
    "int4-head8": {"tpengine": (4.125, 8), "llama.cpp": (4.5, 8.5), "openvino": (4.125, 8), "onnxruntime": (5, 9)},
    "int8": {"tpengine": (8, 8), "llama.cpp": (8.5, 8.5), "openvino": (8, 8), "onnxruntime": (9, 9)},
    "bf16": {"tpengine": (16, 16), "llama.cpp": (16, 16), "openvino": (16, 16), "onnxruntime": (32, 32)},
}


# ---- shapes and processes ----------------------------------------------------------------------------------------------


def layer_weights(model):
    s = SHAPES[model]
    heads, kv = s["heads"] * s["head-dim"], s["kv-heads"] * s["head-dim"]
    return s["layers"] * s["hidden"] * (2 * heads + 2 * kv + 3 * s["intermediate"])


def bytes_per_token(model, form, engine):
    """Of weights, in decode: all but the embedding, of which one row is read."""
    layers, head = BITS[form][engine.split()[0]]
    return (layer_weights(model) * layers + SHAPES[model]["hidden"] * SHAPES[model]["vocab"] * head) / 8


class Failed(Exception):
    pass


def last_words(text):
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def run_tool(log, *words, **environment):
    """Output goes to a file; its last line is the reason of a failure."""
    with open(log, "w+", encoding="utf-8", errors="replace") as out:
        done = subprocess.run([str(word) for word in words], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              env={**os.environ, **environment}, check=False)
        if done.returncode != 0:
            out.seek(0)
            raise Failed(f"{last_words(out.read())} (see {log})")


def busy_seconds():
    """Of all processors, by all processes."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    return (sum(map(int, fields)) - int(fields[3]) - int(fields[4])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """How many cores others used while this process waited for its children."""

    def __init__(self):
        self.begin, self.busy, self.own = time.monotonic(), busy_seconds(), self.own_seconds()

    @staticmethod
    def own_seconds():
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    def foreign_cores(self):
        return max(0.0, busy_seconds() - self.busy - (self.own_seconds() - self.own)) / (time.monotonic() - self.begin)


def child(*words, limit_s=1800):
    """Standard output and the seconds until its first byte."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as problem, \
         subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=problem, stdin=subprocess.DEVNULL,
                          preexec_fn=os.setpgrp) as process:
        try:
            if not select.select([process.stdout], [], [], limit_s)[0]:
                raise Failed(f"nothing in {limit_s} s")
            first = os.read(process.stdout.fileno(), 1)
            first_s = time.monotonic() - begin
            out, _ = process.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        problem.seek(0)
        if process.returncode != 0:
            raise Failed(last_words(problem.read().decode(errors="replace")))
    return (first + out).decode(errors="replace"), first_s


# ---- prepare -----------------------------------------------------------------------------------------------------------


def python_of(args):
    return Path(args.environment or args.work / "venv") / "bin" / "python"


def install(args):
    """The rivals that can be used, and the reasons of those that cannot."""
    if not args.environment and not python_of(args).exists():
        venv.create(args.work / "venv", with_pip=True)
    missing = {}
    for name in args.rivals:
        try:
            try:
                run_tool(args.work / f"version-{name}.log", python_of(args), RIVAL_ENGINES, "version", name)
            except Failed:
                if args.environment:
                    raise
                print(f"installing {name}", file=sys.stderr, flush=True)
                run_tool(args.work / f"install-{name}.log", python_of(args), "-m", "pip", "install", "--no-input", *RIVALS[name])
                run_tool(args.work / f"version-{name}.log", python_of(args), RIVAL_ENGINES, "version", name)
        except (Failed, OSError) as reason:
            missing[name] = f"not installed: {reason}"
    return missing


def write_tokenizer(directory):
    """Bytes and nothing else: some tools want a tokenizer, and exec to first token takes a text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(plain)))}
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                         for i, text in enumerate(special)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "vocab": {text: i for i, text in enumerate([*special, *(letters[byte] for byte in range(256))])}, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}),
                                                     encoding="utf-8")


def make_checkpoint(args, model):
    out = args.work / model / "checkpoint"
    if (out / "tokenizer_config.json").exists():
        return out
    words = [word for key, value in SHAPES[model].items() for word in (f"--{key}", value)]
    run_tool(args.work / f"checkpoint-{model}.log", sys.executable, ROOT / "scripts" / "make_synthetic_checkpoint.py", *words, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({"model_type": "llama", **config}, indent=2))
    write_tokenizer(out)
    return out


def prepare(args):
    missing = install(args)
    for model in args.models:
        for form in args.formats:
            for tp in ([1] if max(args.threads) < 2 else [1, 2]):
                out = shards_of(args, model, form, tp)
                if not out.exists():
                    print(f"{model} {form}: shards for {tp}", file=sys.stderr, flush=True)
                    run_tool(args.work / f"tpshard-{model}-{form}-{tp}.log", BUILD / "tpshard", "convert", "--quiet", "--tp", tp, *TPSHARD_WORDS[form], make_checkpoint(args, model), out)
            for name in args.rivals:
                out = model_of(args, model, form, name)
                if name in missing or out.exists():
                    continue
                print(f"{model} {form}: {name}", file=sys.stderr, flush=True)
                part = out.with_name(out.name + ".part")
                subprocess.run(["rm", "-rf", part], check=True)
                try:
                    run_tool(args.work / f"convert-{model}-{form}-{name}.log", python_of(args), RIVAL_ENGINES, "convert", name, make_checkpoint(args, model),
                             part, form, HF_HUB_OFFLINE="1")
                    part.rename(out)
                except Failed as reason:
                    missing[name] = f"{model} {form} not converted: {reason}"
    for name, reason in missing.items():
        print(f"rival {name}: {reason}", flush=True)


def shards_of(args, model, form, tp):
    return args.work / model / f"tpshard-{form}-{tp}"


def model_of(args, model, form, name):
    return args.work / model / f"{name}-{form}"


# ---- run -----------------------------------------------------------------------------------------------------------------


def limits(threads, form):
    def figure(words):
        return {line.split("kind=")[-1].split()[0] if "kind=" in line else "read": float(line.split("_s=")[-1]) for line in words.splitlines()}
    peaks = figure(child(BUILD / "bench" / "bench_peak", threads)[0])
    # Of alternatives the quicker one: some processors are quicker with the one, some with the other.
    kinds = (("amx-bf16",), ("bf16", "fma-512"), ("fma-256",)) if form == "bf16" else (("amx",), ("vnni",), ("avx2",))
    kind = next((max(found, key=peaks.get) for line in kinds if (found := [kind for kind in line if kind in peaks])), None)
    return {"read_gb_s": figure(child(BUILD / "bench" / "bench_bandwidth", threads)[0])["read"], "peaks_gop_s": peaks, "peak_kind": kind}


class Ours:
    version = None

    def __init__(self, directory, threads):
        self.directory, self.threads = directory, threads

    def measure(self, prompt, gen, batch):
        out, _ = child(BUILD / "tpengine", "bench", self.directory, "--json", "--quiet", "--backend", "cpu", "--threads", self.threads,
                       "--prompt-tokens", prompt, "--gen-tokens", gen, "--batch", batch)
        found = json.loads(out)
        return {key: found[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "load_s", "kernels")} | {"rss_kib": found["rss_bytes"] // 1024}

    def start(self):
        warm(self.directory)
        _, seconds = child(BUILD / "tpengine", "generate", self.directory, "--quiet", "--backend", "cpu", "--threads", self.threads, "--prompt", "I",
                           "--max-tokens", 1, "--temperature", 0, "--ignore-eos")
        return {"first_token_s": seconds}


class Rival:
    def __init__(self, args, name, model, vocab, threads):
        try:  # as it was when the models were made
            self.version = json.loads(last_words((args.work / f"version-{name}.log").read_text(encoding="utf-8")))["version"]
        except (OSError, ValueError):
            self.version = None
        self.words, self.model = [python_of(args), RIVAL_ENGINES, "measure", name, model, "--threads", threads, "--vocab", vocab], model

    def measure(self, prompt, gen, batch):
        return json.loads(child(*self.words, "--prompt-tokens", prompt, "--gen-tokens", gen, "--batch", batch)[0].splitlines()[-1])

    def start(self):
        warm(self.model)
        out, seconds = child(*self.words, "--prompt-tokens", 1, "--gen-tokens", 1, "--first-token")
        return json.loads(out.splitlines()[-1]) | {"first_token_s": seconds}


def warm(path):
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        with open(file, "rb") as f:
            while f.read(1 << 24):
                pass


def engines(args, model, form, threads):
    found = {}
    if "tpengine" in args.engines:
        found["tpengine"] = Ours(shards_of(args, model, form, 1), threads)
        if threads % 2 == 0 and shards_of(args, model, form, 2).exists():
            found["tpengine 2 ranks"] = Ours(shards_of(args, model, form, 2), threads // 2)
    for name in args.rivals:
        if name in args.engines and model_of(args, model, form, name).exists():
            found[name] = Rival(args, name, model_of(args, model, form, name), SHAPES[model]["vocab"], threads)
    return found


def measurements(args, part, engine):
    """Each as (its name's rest, function)."""
    if part == "speed":
        yield {}, lambda: engine.measure(args.prompt_tokens, args.gen_tokens, 1)
    elif part == "batch":
        for batch in args.batches:
            yield {"batch": batch}, lambda batch=batch: engine.measure(16, 24, batch)
    elif part == "start":
        yield {}, engine.start
    else:
        yield {"foreign": 0}, lambda: engine.measure(16, args.gen_tokens, 1)
        yield {"foreign": 1}, lambda: beside_another(lambda: engine.measure(16, args.gen_tokens, 1))


def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def beside_another(function):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=end_with_parent) as foreign:
        try:
            return function()
        finally:
            foreign.kill()


def run(args):
    started = datetime.datetime.now().isoformat(timespec="seconds")
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines() if line.startswith("model name")]
    machine = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "kernel": platform.release()}
    tired = set()  # what failed once is left out afterwards
    with open(args.json, "a", encoding="utf-8") as out:
        for number in range(args.rounds):
            for model, form, threads, part in ((m, f, t, p) for m in args.models for f in args.formats for t in args.threads for p in args.parts):
                if part == "busy" and threads != max(args.threads):
                    continue
                common = {"round": f"{started} {number}", **machine, "model": model, "format": form, "threads": threads, "part": part,
                          "prompt_tokens": args.prompt_tokens if part == "speed" else None}
                found = list(engines(args, model, form, threads).items())
                for name, engine in found[number % len(found):] + found[:number % len(found)]:  # nobody is always the first
                    common["limits"] = limits(threads, form) if part in ("speed", "batch") else None
                    for more, function in measurements(args, part, engine):
                        if (model, form, part, name) in tired:
                            continue
                        watch = Watch()
                        try:
                            line = {**common, **more, "engine": name, "version": engine.version, **function()}
                        except (Failed, OSError, ValueError, subprocess.TimeoutExpired) as reason:
                            tired.add((model, form, part, name))
                            line = {**common, **more, "engine": name, "failed": str(reason)}
                            print(f"{model} {form} {part} {name}: failed: {reason}", file=sys.stderr, flush=True)
                        line["foreign_cores"] = round(watch.foreign_cores(), 3)
                        out.write(json.dumps(line) + "\n")
                        out.flush()


# ---- report ----------------------------------------------------------------------------------------------------------------


class Lines:
    """Raw lines, the disturbed ones left out where at least three others of their kind are there."""

    def __init__(self, path):
        self.kinds, self.left_out, self.failed = {}, 0, {}
        with open(path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                key = tuple(line.get(field) for field in ("model", "format", "threads", "part", "batch", "foreign", "prompt_tokens", "engine"))
                if "failed" in line:
                    self.failed[f"{line['model']} {line['format']} {line['part']} {line['engine']}"] = line["failed"]
                else:
                    self.kinds.setdefault(key, []).append(line)
        for key, lines in self.kinds.items():
            calm = [line for line in lines if line["foreign_cores"] <= FOREIGN_CORES]
            if len(calm) >= 3:
                self.left_out += len(lines) - len(calm)
                self.kinds[key] = calm

    def get(self, model, form, threads, part, engine, batch=None, foreign=None, prompt=None):
        return self.kinds.get((model, form, threads, part, batch, foreign, prompt, engine), [])


def median(values):
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def ratio(ours, theirs, field):
    """Of one round's figures, the median over rounds; where no round has both, of medians."""
    of_theirs = {line["round"]: line[field] for line in theirs}
    pairs = [line[field] / of_theirs[line["round"]] for line in ours if line["round"] in of_theirs]
    if pairs:
        return median(pairs)
    return median(line[field] for line in ours) / median(line[field] for line in theirs) if ours and theirs else None


def show(value, form="{:.2f}"):
    return "-" if value is None else form.format(value)


def print_table(title, header, rows):
    if not rows:
        return
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(f"\n{title}\n")
    for i, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def share_of_read(line):
    batch, read = line.get("batch") or 1, line["limits"]["read_gb_s"]
    return line["decode_tokens_per_s"] / batch * bytes_per_token(line["model"], line["format"], line["engine"]) / 1e9 / read if read else None


def share_of_peak(line):
    peak = line["limits"]["peaks_gop_s"].get(line["limits"]["peak_kind"])
    return line["prefill_tokens_per_s"] * 2 * layer_weights(line["model"]) / 1e9 / peak if peak else None


def report(args):
    lines = Lines(args.json)
    places = sorted({key[:3] for key in lines.kinds})
    prompts = sorted({key[6] for key in lines.kinds if key[6]})
    names = ["tpengine", "tpengine 2 ranks", *RIVALS]
    speed, best = [], {"prefill_tokens_per_s": [], "decode_tokens_per_s": []}
    for place, prompt in ((place, prompt) for place in places for prompt in prompts):
        ours = lines.get(*place, "speed", "tpengine", prompt=prompt)
        ratios = {}
        for name in names:
            theirs = lines.get(*place, "speed", name, prompt=prompt)
            if not theirs:
                continue
            ratios[name] = {field: ratio(ours, theirs, field) for field in best}
            start = lines.get(*place, "start", name)
            speed.append([*map(str, place), str(prompt), name, str(len(theirs)), show(median(line["prefill_tokens_per_s"] for line in theirs), "{:.1f}"),
                          show(ratios[name]["prefill_tokens_per_s"]), show(median(map(share_of_peak, theirs))),
                          show(median(line["decode_tokens_per_s"] for line in theirs)), show(ratios[name]["decode_tokens_per_s"]),
                          show(median(map(share_of_read, theirs))), show(median(line["rss_kib"] / 1024 for line in theirs), "{:.0f}"),
                          show(median(line["first_token_s"] for line in start)),
                          show(median(line.get("open_to_token_s", line["first_token_s"]) for line in start))])
        for field, of in best.items():
            rivals = [ratios[name][field] for name in ratios if name in RIVALS and ratios[name][field]]
            of += [min(rivals)] if rivals else []
    print_table("Prefill and decode, tokens/s; ours divided by theirs; shares of the peak of byte products and of the read bandwidth",
                ["model", "format", "threads", "prompt", "engine", "runs", "prefill", "ours/it", "of peak", "decode", "ours/it", "of read", "MiB", "exec to token s",
                 "of it, engine s"], speed)
    for field, of in best.items():
        if of:
            print(f"\n{field.split('_', maxsplit=1)[0]}: {statistics.geometric_mean(of):.2f} times the best rival "
                  f"(geometric mean of {len(of)} lines, least {min(of):.2f})")

    batches = sorted({key[4] for key in lines.kinds if key[4]})
    rows = []
    for place in places:
        for name in names:
            found = [lines.get(*place, "batch", name, batch=batch) for batch in batches]
            if any(found):
                rows.append([*map(str, place), name] + [
                    f"{show(median(line['decode_tokens_per_s'] for line in of), '{:.1f}')} "
                    f"({show(ratio(lines.get(*place, 'batch', 'tpengine', batch=batch), of, 'decode_tokens_per_s') if of else None)})"
                    for batch, of in zip(batches, found)])
    print_table("Decode of several sequences, tokens/s of all (ours divided by theirs)",
                ["model", "format", "threads", "engine", *(f"{batch} sequences" for batch in batches)], rows)

    rows = []
    for place in places:
        for name in names:
            alone, beside = (lines.get(*place, "busy", name, foreign=foreign) for foreign in (0, 1))
            if alone and beside:
                rows.append([*map(str, place), name, *(show(median(line["decode_tokens_per_s"] for line in of)) for of in (alone, beside)),
                             show(ratio(alone, beside, "decode_tokens_per_s"))])
    print_table("Decode beside one process that never sleeps, tokens/s", ["model", "format", "threads", "engine", "alone", "beside it", "times slower"], rows)
    if lines.left_out:
        print(f"\n{lines.left_out} measurements were left out: other processes used more than {FOREIGN_CORES} cores beside them")
    for what, reason in lines.failed.items():
        print(f"\nfailed: {what}: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="prepare|run|report", help="which steps (default: all)")
    parser.add_argument("--work", type=Path, default=BUILD / "bench-rivals", help="folder for the environment and the models (default: %(default)s)")
    parser.add_argument("--environment", help="virtual environment with the rivals in it; nothing is installed then")
    parser.add_argument("--json", type=Path, help="file of raw lines, to be added to (default: raw.jsonl in the work folder)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--formats", nargs="+", choices=BITS, default=["int4"])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--engines", nargs="+", choices=["tpengine", *RIVALS], default=["tpengine", *RIVALS], help="run: who has a turn")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=["speed", "batch", "start", "busy"], default=["speed", "batch", "start", "busy"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    args = parser.parse_args()
    if unknown := set(args.steps) - {"prepare", "run", "report"}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    steps = args.steps or ["prepare", "run", "report"]
    args.json = args.json or args.work / "raw.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    try:
        for name, step in (("prepare", prepare), ("run", run), ("report", report)):
            if name in steps:
                step(args)
    except (Failed, OSError) as reason:
        sys.exit(f"bench_rivals.py: {reason}")


if __name__ == "__main__":
    main()

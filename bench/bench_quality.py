#!/usr/bin/env python3
"""What each way to store a model costs in quality: one checkpoint, converted into a list of variants, each compared with the model in bf16 on one text.

    bench/bench_quality.py                                              the bundled model and its held-out text
    bench/bench_quality.py --model DIR --text FILE --calibration FILE   another one; FILE: text for the variants that calibrate
    bench/bench_quality.py --only 'int4*' nl4                           some of the variants (patterns of their names)
    bench/bench_quality.py --variant 'kv fp8=--quant none @ --kv-cache fp8'     one of your own: options of tpshard, behind @ those of tpengine
    bench/bench_quality.py --checkpoint 'other=DIR:4.5'                 weights of 4.5 bits that another tool made, stored as plain numbers
    bench/bench_quality.py --layers --json lines.jsonl                  errors by layer as well, for plot_quality.py
    bench/bench_quality.py --report lines.jsonl                         the table of lines that were measured before

The reference runs once; its logits are kept in the work folder (4 bytes x vocabulary for each token). Every result is added to --json as a line of
its own, with all that `tpengine eval --json` says. Columns: bits of a weight of the layers' matrices, scales included, as they are stored; bits of all weights,
embedding and head as well; perplexity; KL divergence from the reference; how often both find the same token likeliest; seconds to convert, on the
clock and of processors. A variant that this version or this model does not allow is named with the reason. Needs the standard library only.
"""
import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYER_TOKENS = 4000  # enough for means of the errors by layer
VARIANTS = {
    "bf16": "--quant none",
    "fp8": "--quant fp8",
    "int8": "--quant int8",
    "int4 max": "--quant int4 --scales max",
    "int4": "--quant int4",
    "int4 g64": "--quant int4 --group-size 64",
    "int4 g32": "--quant int4 --group-size 32",
    "int4z": "--quant int4z",
    "mxfp4": "--quant mxfp4",
    "nvfp4": "--quant nvfp4",
    "int4 rot": "--quant int4 --rot",
    "nl4": "--quant nl4",
    "nl4 rot": "--quant nl4 --rot",
    "int4 calib": "--quant int4 --calib {calibration}",
    "int4 rot calib": "--quant int4 --rot --calib {calibration}",
    "nl4 calib": "--quant nl4 --calib {calibration}",
    "nl4 rot calib": "--quant nl4 --rot --calib {calibration}",
    "4.5 bits": "--bits 4.5",
    "5 bits": "--bits 5",
    "6 bits": "--bits 6",
    "4.5 bits calib": "--bits 4.5 --calib {calibration}",
}


class Refused(Exception):
    """A program said no: the command line or the model does not allow it."""


def run(words):
    """(standard output, seconds on the clock, seconds of processors)"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as problem:
        began = time.perf_counter()
        process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=problem)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall, code = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
        process.returncode = code
        out.seek(0)
        problem.seek(0)
        if code != 0:
            said = problem.read().strip().splitlines()
            raise (Refused if code in (2, 3) else RuntimeError)(said[-1] if said else f"{words[0]}: exit status {code}")
        return out.read(), wall, usage.ru_utime + usage.ru_stime


def shown(path):
    """Without the folder of the repository."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def matrix_bits(tensors):
    stored = sum(8 * (t["data_bytes"] + t["scale_bytes"]) for t in tensors)
    count = sum(t["shape"][0] * t["shape"][1] for t in tensors)
    return stored / count if count else None


class Bench:
    def __init__(self, args, work):
        self.args, self.work, self.shards = args, work, {}
        self.tpshard, self.tpengine = args.build / "tpshard", args.build / "tpengine"
        self.logits = Path(args.logits) if args.logits else None
        self.reference_dir = None  # with --layers, which need the model itself

    def convert(self, model, words):
        """What one conversion gave; each is done once."""
        key = (str(model), words)
        if key in self.shards:
            return self.shards[key]
        dir = self.work / f"shards-{len(self.shards)}"
        _, wall, cpu = run([self.tpshard, "convert", "--tp", self.args.tp, *shlex.split(words), model, dir, "--quiet"])
        ranks = json.loads(run([self.tpshard, "inspect", dir, "--json"])[0])["ranks"]
        tensors = [t for rank in ranks for t in rank["tensors"]]
        matrices = [t for t in tensors if len(t["shape"]) == 2 and min(t["shape"]) > 1]
        weights = sum(t["shape"][0] * t["shape"][1] for t in matrices)
        self.shards[key] = {
            "dir": dir,
            "convert_s": wall,
            "convert_cpu_s": cpu,
            "bits": matrix_bits([t for t in matrices if t["layer"] >= 0]),
            "bits_all": matrix_bits(matrices),
            "weights": weights,
        }
        return self.shards[key]

    def eval(self, dir, *words, tokens=None):
        how = ["--text", self.args.text, "--context", self.args.context, "--stride", self.args.stride]
        how += ["--max-tokens", self.args.max_tokens if tokens is None else tokens]
        how += ["--threads", self.args.threads] if self.args.threads else []
        out, wall, _ = run([self.tpengine, "eval", dir, *how, *words, "--json", "--quiet"])
        return {"eval_s": wall, **json.loads(out)}

    def prepare_reference(self):
        if self.args.layers:
            self.reference_dir = self.work / "reference"
            run([self.tpshard, "convert", "--tp", self.args.tp, "--quant", "none", self.args.model, self.reference_dir, "--quiet"])
        if self.logits:
            return
        shards = self.convert(self.args.model, VARIANTS["bf16"])
        path = self.work / "reference.logits"
        self.eval(shards["dir"], "--save-logits", path)
        self.logits = path

    def measure(self, name, model, options, bits=None):
        shard_words, _, engine_words = options.partition("@")
        line = {"variant": name, "model": shown(self.args.model), "options": options.strip()}
        line |= self.convert(model, shard_words.strip())
        if bits is not None:
            line |= {"bits": bits, "bits_all": None, "convert_s": None, "convert_cpu_s": None}
        dir = line.pop("dir")
        line |= self.eval(dir, "--logits", self.logits, *shlex.split(engine_words))
        line.pop("reference")
        if self.reference_dir and not engine_words.strip():  # which would be the reference's as well
            tokens = min(self.args.max_tokens or LAYER_TOKENS, LAYER_TOKENS)
            line["layers"] = self.eval(dir, "--against", self.reference_dir, "--layers", tokens=tokens)["layers"]
        return line

    def forget(self):
        """Frees the disk of all shards."""
        for shards in self.shards.values():
            shutil.rmtree(shards["dir"], ignore_errors=True)
        self.shards.clear()


# ---- The table -----------------------------------------------------------------------------------------------------


def spread(line, name, form, scale=1.0):
    """A figure and half the width of its interval."""
    if line.get(name) is None:
        return ""
    text = form.format(scale * line[name])
    ends = line.get(f"{name}_interval")
    exact = scale * line[name] in (0, 100) and name.endswith("agreement")  # all blocks are alike: their spread says nothing
    return text + (" ± " + form.format(scale * (ends[1] - ends[0]) / 2) if ends and not exact else "")


def number(value, form):
    return form.format(value) if value is not None else ""


def table(lines):
    """Markdown. Of a variant of a model that was measured several times, the last time counts."""
    last = {(line["model"], line["variant"]): line for line in lines}
    out = []
    for model in dict.fromkeys(model for model, _ in last):
        rows = [line for (of, _), line in last.items() if of == model]
        tokens = ", ".join(dict.fromkeys(f"{line['tokens']} tokens, context {line['context']}" for line in rows))
        out += [f"{model}: {tokens}; ± half of a 95 % interval", "",
                "| variant | bits | bits, all | perplexity | to bf16, % | KLD, 1e-3 nat | top-1, % | convert, s | CPU s |",
                "|---|---|---|---|---|---|---|---|---|"]
        for line in rows:
            ratio = "" if line.get("perplexity_ratio") is None else f"{100 * (line['perplexity_ratio'] - 1):+.2f}"
            out.append("| " + " | ".join([
                line["variant"], number(line["bits"], "{:.3f}"), number(line["bits_all"], "{:.3f}"), f"{line['perplexity']:.3f}", ratio,
                spread(line, "kl_divergence", "{:.2f}", 1000), spread(line, "top1_agreement", "{:.2f}", 100),
                number(line["convert_s"], "{:.1f}"), number(line["convert_cpu_s"], "{:.1f}")]) + " |")
        out.append("")
    return "\n".join(out)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


# ---- The run -------------------------------------------------------------------------------------------------------


def wanted_variants(args):
    """(name, model, options, bits) of each; bits: None where tpshard says them."""
    chosen = {}
    for name, options in VARIANTS.items():
        if args.only is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only):
            chosen[name] = options
    for text in args.variant:
        name, equals, options = text.partition("=")
        if not equals:
            sys.exit(f"--variant {text}: NAME=OPTIONS is expected")
        chosen[name] = options
    found = [(name, args.model, options, None) for name, options in chosen.items()]
    for text in args.checkpoint:
        name, equals, rest = text.partition("=")
        dir, colon, bits = rest.rpartition(":")
        try:
            found.append((name, dir if colon else rest, VARIANTS["bf16"], float(bits) if colon else None))
        except ValueError:
            sys.exit(f"--checkpoint {text}: NAME=DIR:BITS is expected")
        if not equals:
            sys.exit(f"--checkpoint {text}: NAME=DIR or NAME=DIR:BITS is expected")
    return found


def commit_of(args):
    words = run([args.build / "tpengine", "--version"])[0].split()
    return words[-1].strip("()") if words else ""


def measure_all(args, work):
    bench, lines, failures = Bench(args, work), [], 0
    stamp = {"time": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit_of(args), "text": shown(args.text)}
    bench.prepare_reference()
    for name, model, options, bits in wanted_variants(args):
        if "{calibration}" in options and not args.calibration:
            print(f"{name}: left out without --calibration FILE", flush=True)
            continue
        options = options.replace("{calibration}", shlex.quote(str(args.calibration)))
        try:
            line = stamp | bench.measure(name, model, options, bits)
        except Refused as why:
            print(f"{name}: refused: {why}", flush=True)
            continue
        except RuntimeError as why:
            print(f"{name}: FAILED: {why}", flush=True)
            failures += 1
            continue
        finally:
            if not args.keep:
                bench.forget()
        lines.append(line)
        if args.json:
            with open(args.json, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        print(f"{name}: {number(line['bits'], '{:.3f}')} bits, perplexity {line['perplexity']:.3f}, KLD {line['kl_divergence']:.5f}, "
              f"top-1 {100 * line['top1_agreement']:.2f} %", flush=True)
    return lines, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests/model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests/model/heldout.txt")
    parser.add_argument("--calibration", type=Path, help="plain text for variants that calibrate; not the text that is scored")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="of the built-in variants, those whose names match")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=OPTIONS")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR[:BITS]")
    parser.add_argument("--logits", help="the reference's, saved by `tpengine eval --save-logits` from the same text and windows")
    parser.add_argument("--layers", action="store_true", help="the errors by layer as well, of variants without options of tpengine")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stride", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=0, help="0: the whole text")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of each rank")
    parser.add_argument("--build", type=Path, default=Path(os.environ.get("BUILD", ROOT / "build")))
    parser.add_argument("--work", type=Path, help="where shards and logits lie meanwhile (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the shards in --work")
    parser.add_argument("--json", metavar="FILE", help="add a line for each result")
    parser.add_argument("--report", metavar="FILE", help="measure nothing: print the table of these lines")
    args = parser.parse_args()
    if args.report:
        print(table(read_lines(args.report)))
        return 0
    if args.keep and not args.work:
        sys.exit("--keep needs --work DIR")
    args.build = args.build.resolve()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpshard-quality-")))
        work.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="run-", dir=work))
        try:
            lines, failures = measure_all(args, work)
        except (Refused, RuntimeError) as why:
            sys.exit(f"the reference: {why}")
        finally:
            if not args.keep:
                shutil.rmtree(work, ignore_errors=True)
    print("\n" + table(lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Quality per bit beside other people's quantizers: one checkpoint, one evaluator, one held-out text, all of them at about four bits.

    bench/bench_quality_rivals.py                                          everything on the bundled model
    bench/bench_quality_rivals.py --checkpoint large=DIR                   another Llama checkpoint; the option may stand several times
    bench/bench_quality_rivals.py run --variants 'tpshard *rot*'           these once more; then `report` takes the newest line of each
    bench/bench_quality_rivals.py --environment ~/venv                     rivals that are installed already; nothing is installed

Three steps, all of them unless some are named:
  prepare  a virtual environment in the work folder and the rivals in it, installed with pip as a user would
  run      each variant is made from the checkpoint, its weights are dequantized, and a forward in float32 (bench/quality_model.py) measures
           perplexity, KL divergence from the checkpoint and top-1 agreement over the held-out text; a raw line of JSON each is added to --json
  report   the tables, from --json
A variant that cannot be made is named with the reason, and the others go on.

Two figures of each: "layers" with the checkpoint's own embedding and head, which tells quantizers apart, and "whole" with those that the tool stores
by default. Bits of a weight are counted as stored, scales and padding included. Calibrated variants all see the same text, which is not the
held-out one: the first --sequences times 512 tokens of it. Seconds are processor seconds (user and system, all threads) of making a variant, for
tpshard those of the whole command, for the others without imports and without writing results.

Needs: the `bible` program or --calibration FILE, tpshard in $BUILD (default: build); 1 GB of disk beside the environment.
"""
import argparse
import datetime
import fnmatch
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = ROOT / "bench" / "rival_quantizers.py"
CALIBRATION_STEP = 17  # every so manieth chapter that is not held out
CONTEXT = 512

# Packages, installed in one go for each tool.
PACKAGES = {
    "llama.cpp": ["llama-cpp-python", "gguf"],
    "hqq": ["hqq"],
    "llm-compressor": ["llmcompressor"],
    "auto-round": ["auto-round"],
}
EVALUATOR = ["torch", "transformers", "tokenizers", "numpy", "safetensors", "xxhash"]
# Words for `tpshard convert`. STATISTICS stands for a file: --calib-stats gives the bytes that --calib with the text gives.
STATISTICS = "STATISTICS"
OURS = {
    "bf16": ["--quant", "none"],
    "int8": ["--quant", "int8"],
    "fp8": ["--quant", "fp8"],
    "int4 absmax": ["--quant", "int4", "--scales", "max"],
    "int4": ["--quant", "int4"],
    "int4 rot": ["--quant", "int4", "--rot"],
    "int4 calib": ["--quant", "int4", "--calib-stats", STATISTICS],
    "int4 calib scales": ["--quant", "int4", "--calib-stats", STATISTICS, "--calib-method", "scales"],
    "int4 rot calib": ["--quant", "int4", "--rot", "--calib-stats", STATISTICS],
    "int4 g32": ["--quant", "int4", "--group-size", "32"],
    "int4 g32 calib": ["--quant", "int4", "--group-size", "32", "--calib-stats", STATISTICS],
    "int4z": ["--quant", "int4z"],
    "nl4": ["--quant", "nl4"],
    "nl4 rot": ["--quant", "nl4", "--rot"],
    "nl4 calib": ["--quant", "nl4", "--calib-stats", STATISTICS],
    "nl4 rot calib": ["--quant", "nl4", "--rot", "--calib-stats", STATISTICS],
    "nl4 g64": ["--quant", "nl4", "--group-size", "64"],
    "nl4 g64 calib": ["--quant", "nl4", "--group-size", "64", "--calib-stats", STATISTICS],
    "nl4 g32": ["--quant", "nl4", "--group-size", "32"],
    "nl4 g32 calib": ["--quant", "nl4", "--group-size", "32", "--calib-stats", STATISTICS],
    "bits 4.5": ["--bits", "4.5"],
    "bits 4.5 calib": ["--bits", "4.5", "--calib-stats", STATISTICS],
}
RIVALS = {
    "llama.cpp": ["Q4_0", "Q4_0+imatrix", "IQ4_XS", "IQ4_XS+imatrix", "IQ4_NL", "IQ4_NL+imatrix", "Q4_K_S", "Q4_K_S+imatrix", "Q4_K_M",
                  "Q4_K_M+imatrix", "Q8_0"],
    "hqq": ["g128", "g64"],
    "llm-compressor": ["rtn", "gptq", "gptq-static", "awq-sym", "awq"],
    "auto-round": ["i50"],
}
CALIBRATED = ("calib", "imatrix", "gptq", "awq", "auto-round")


def complain(text):
    print(text, file=sys.stderr, flush=True)


# ---- prepare ---------------------------------------------------------------------------------------------------------


def python_of(args):
    return args.environment / "bin" / "python"


def prepare(args):
    if not python_of(args).exists():
        venv.create(args.environment, with_pip=True)
    for name, packages in {"evaluator": EVALUATOR, **PACKAGES}.items():
        probe = ["-c", "import torch, transformers, xxhash"] if name == "evaluator" else [QUANTIZERS, "version", name]
        if subprocess.run([python_of(args), *probe], capture_output=True, check=False).returncode == 0:
            continue
        done = subprocess.run([python_of(args), "-m", "pip", "install", "--quiet", *packages], check=False)
        if done.returncode:
            complain(f"{name} cannot be installed (pip: {done.returncode})")


def calibration_text(args):
    """Text of chapters that are not held out."""
    path = args.work / "calibration.txt"
    if args.calibration:
        return args.calibration
    if not path.exists():
        sys.path.insert(0, str(ROOT / "scripts"))
        import train_model
        chapters = [body for i, (_, body) in enumerate(train_model.read_chapters(None)) if not train_model.is_heldout(i)]
        path.write_text("\n\n".join(chapters[::CALIBRATION_STEP]) + "\n", encoding="utf-8")
    return path


# ---- run -------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    pass


def command(*words):
    """Standard output and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Model:
    """A checkpoint, its score, and its unquantized twins in tpshard's form."""

    def __init__(self, args, name, folder):
        import quality_model
        from tokenizers import Tokenizer
        self.args, self.name, self.folder, self.quality = args, name, folder, quality_model
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = quality_model.read_safetensors(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = (args.text or folder / "heldout.txt").read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        batches = quality_model.windows_of(ids, self.config["bos_token_id"], CONTEXT, args.windows)
        self.score = quality_model.Score(quality_model.Llama(self.config, self.tensors), batches)
        # The same tokens for everybody; tpshard takes text.
        ids = tokenizer.encode(Path(args.calibration).read_text(encoding="utf-8"), add_special_tokens=False).ids
        self.calibration = args.work / f"calibration-{name}.txt"
        self.calibration.write_text(tokenizer.decode(ids[:args.sequences * (CONTEXT - 1)]), encoding="utf-8")
        self.plain, self.captured = {}, {}  # by rotation

    def convert(self, words):
        out = self.args.work / "shards"
        shutil.rmtree(out, ignore_errors=True)
        _, seconds = command(BUILD / "tpshard", "convert", *words, "--threads", self.args.threads, "--quiet", self.folder, out)
        return out, seconds

    def outside(self, rotation):
        """Embedding, head and last norm in bf16, rotated or not."""
        if rotation not in self.plain:
            out, _ = self.convert(["--quant", "none", *rotation])
            tensors, _ = self.quality.read_shards(out)
            self.plain[rotation] = {key: tensors[key] for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")}
        return self.plain[rotation]

    def statistics(self, rotation):
        """What `convert --calib` would capture, once for all variants; and its seconds."""
        if rotation not in self.captured:
            path = self.args.work / f"{self.name}{'-rotated' if rotation else ''}.calib"
            path.unlink(missing_ok=True)
            out, seconds = self.convert(["--quant", "none", *rotation])
            _, more = command(BUILD / "tpengine", "capture", out, "--text", self.calibration, "--output", path, "--threads", self.args.threads, "--quiet")
            self.captured[rotation] = path, seconds + more
        return self.captured[rotation]

    def measure(self, line, tensors, outside, mlp_rotation=0):
        llama = self.quality.Llama
        line["layers"] = self.score.of(llama(self.config, {**tensors, **outside}, mlp_rotation))
        if not self.args.layers_only:
            same = all(tensors.get(key, value).equal(value) for key, value in outside.items() if key != "model.norm.weight")
            line["whole"] = line["layers"] if same else self.score.of(llama(self.config, tensors, mlp_rotation))

    def ours(self, variant):
        words = OURS[variant]
        rotation = tuple(word for word in words if word == "--rot")
        statistics, seconds = self.statistics(rotation) if STATISTICS in words else (None, 0)
        out, more = self.convert([str(statistics) if word == STATISTICS else word for word in words])
        line = {"seconds": seconds + more}
        line["bits_layers"], line["bits_all"] = self.quality.shard_bits(out)
        tensors, mlp_rotation = self.quality.read_shards(out)
        self.measure(line, tensors, self.outside(rotation), mlp_rotation)
        return line

    def quantize_rivals(self, tool, kinds):
        """One process for all kinds of a tool: its imports take longer than its work."""
        out = self.args.work / "rival"
        shutil.rmtree(out, ignore_errors=True)
        words = [sys.executable, QUANTIZERS, "quantize", tool, ",".join(kinds), self.folder, out, "--text", self.args.calibration,
                 "--sequences", self.args.sequences, "--threads", self.args.threads]
        done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:  # what it had made by then counts
            complain(f"{tool}: {(done.stderr.strip().splitlines() or ['no word'])[-1]} (exit {done.returncode})")
        return {line["kind"]: line for line in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))}

    def rival(self, line):
        if "error" in line:
            raise Failed(line["error"])
        path = self.args.work / "rival" / line["kind"] / "model.safetensors"
        tensors = self.quality.read_safetensors(path)
        path.unlink()
        outside = {key: self.tensors[key] for key in ("model.embed_tokens.weight", "lm_head.weight") if key in self.tensors}
        self.measure(line, tensors, outside)
        return line


def versions(tools):
    """Of those that run."""
    found = {"tpshard": command(BUILD / "tpshard", "--version")[0].split("\n")[0]}
    for tool in tools:
        try:
            found[tool] = json.loads(command(sys.executable, QUANTIZERS, "version", tool)[0].splitlines()[-1])["version"]
        except Failed as why:
            complain(f"{tool}: {why}")
    return found


def run(args):
    import torch
    if not (BUILD / "tpshard").exists():
        raise SystemExit(f"{BUILD / 'tpshard'} does not exist: `make programs` first, or set BUILD")
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(ROOT / "bench"))
    args.calibration = calibration_text(args)
    variants = [("tpshard", name) for name in OURS] + [(tool, kind) for tool in RIVALS for kind in RIVALS[tool]]
    variants = [pair for pair in variants if any(fnmatch.fnmatch(" ".join(pair), pattern) for pattern in args.variants)]
    found = versions({tool: None for tool, _ in variants if tool in RIVALS})
    variants = [(tool, kind) for tool, kind in variants if tool in found]
    for name, folder in args.checkpoint:
        model = Model(args, name, folder)
        made = {}
        for tool, kind in variants:
            line = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "model": name, "tool": tool, "kind": kind,
                    "version": found[tool], "sequences": args.sequences}
            began = time.monotonic()
            try:
                if tool != "tpshard" and tool not in made:
                    made[tool] = {}
                    made[tool] = model.quantize_rivals(tool, [other for owner, other in variants if owner == tool])
                line.update(model.ours(kind) if tool == "tpshard" else model.rival(made[tool].get(kind, {"error": "its tool failed"})))
            except (Failed, ValueError, OSError) as why:
                complain(f"{name}, {tool} {kind}: {why}")
                continue
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            complain(f"{name}, {tool} {kind}: {line['bits_layers']:.3f} bits, KLD of layers {line['layers']['kld']:.5f} "
                     f"({time.monotonic() - began:.0f} s)")


# ---- report ----------------------------------------------------------------------------------------------------------


def report(args):
    newest = {}
    for text in Path(args.json).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        newest[line["model"], line["tool"], line["kind"]] = line
    for model in dict.fromkeys(key[0] for key in newest):
        lines = [line for key, line in newest.items() if key[0] == model]
        print(f"\n{model}: {lines[0]['layers']['tokens']} held-out tokens\n")
        print("| tool | kind | calibrated | bits/weight, layers | KLD, layers | perplexity | top-1, % | bits/weight, all | KLD, whole | CPU seconds |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for line in sorted(lines, key=lambda line: -line["layers"]["kld"]):
            layers, name = line["layers"], f"{line['tool']} {line['kind']}"
            seconds = f"{line['seconds']:.1f}" if line["seconds"] is not None else ""
            whole = f"{line['whole']['kld']:.5f}" if "whole" in line else ""
            print(f"| {line['tool']} | {line['kind']} | {'yes' if any(word in name for word in CALIBRATED) else ''} | {line['bits_layers']:.3f} "
                  f"| {layers['kld']:.5f} ± {layers['kld_interval']:.5f} | {layers['perplexity']:.3f} "
                  f"| {100 * layers['top1']:.2f} ± {100 * layers['top1_interval']:.2f} | {line['bits_all']:.3f} | {whole} "
                  f"| {seconds} |")


def named_folder(text):
    name, equals, folder = text.partition("=")
    if not equals or not name or not (Path(folder) / "model.safetensors").exists():
        raise argparse.ArgumentTypeError(f"{text}: NAME=DIR of a checkpoint with one model.safetensors is wanted")
    return name, Path(folder)


def main():
    steps = {"prepare": prepare, "run": run, "report": report}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="prepare, run, report; default: all")
    parser.add_argument("--checkpoint", action="append", type=named_folder, metavar="NAME=DIR", help="default: bundled=tests/model")
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="PATTERN", help="of 'TOOL KIND', as a shell's")
    parser.add_argument("--work", type=Path, default=BUILD / "quality-rivals")
    parser.add_argument("--environment", type=Path, help="default: environment in the work folder")
    parser.add_argument("--text", type=Path, help="held-out text; default: heldout.txt in the checkpoint's folder")
    parser.add_argument("--windows", type=int, default=0, help="windows of 511 tokens, evenly over the held-out text; 0: all")
    parser.add_argument("--layers-only", action="store_true", help="leave out the figures with each tool's own embedding and head")
    parser.add_argument("--calibration", type=Path, help="text for calibrated variants; default: chapters that are not held out")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, for calibrated variants")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="raw lines; default: quality.jsonl in the work folder")
    args = parser.parse_args()
    if set(args.steps) - set(steps):
        parser.error(f"a step is one of {', '.join(steps)}")
    args.checkpoint = args.checkpoint or [named_folder(f"bundled={ROOT / 'tests' / 'model'}")]
    args.environment = args.environment or args.work / "environment"
    args.json = args.json or args.work / "quality.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [step for step in steps if step in (args.steps or steps)]
    if "prepare" in wanted:
        prepare(args)
    if "run" in wanted and Path(sys.prefix).resolve() != args.environment.resolve():  # torch is there
        words = sys.argv[1:] if not args.steps else [word for word in sys.argv[1:] if word != "prepare"]
        os.execv(python_of(args), [python_of(args), __file__, *(["run", "report"] if not args.steps else []), *words])
    for step in wanted:
        if step != "prepare":
            steps[step](args)


if __name__ == "__main__":
    main()

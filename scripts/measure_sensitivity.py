#!/usr/bin/env python3
"""How much an error of each matrix costs a model: for `tpshard convert --bits N --sensitivity FILE`.

measure_sensitivity.py MODEL_DIR TEXT OUT.json [--kind int4:128] [--tokens N] [--together N] [--threads N] [--work DIR]

Each matrix of the layers (with --together N: the same one of N neighbouring layers) is stored in four bits (or as --kind says) while all others stay in bf16, and
`tpengine eval --against` measures the Kullback-Leibler divergence on the text. A matrix's sensitivity is that divergence, divided by the square of
the relative error that its weights then have. Costs a conversion and an evaluation for each matrix; finished ones are kept in OUT.json, and the
same command goes on with those that are missing. BUILD names the folder of the programs (default: build).
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
KINDS = "int4,nl4,int4z,fp8,int8,bf16"  # all that --bits can choose
EDGE_BYTES = 1 << 20


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def model_hash(model):
    """Tells models apart without reading all weights: of each file its name and length, its first and last mebibyte."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.name not in ("config.json", "tokenizer.json") and path.suffix != ".safetensors":
            continue
        length = path.stat().st_size
        digest.update(f"{path.name} {length}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, length - EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def convert(model, out, threads, *words):
    run(BUILD / "tpshard", "convert", model, out, "--embed", "none", "--head", "none", "--force", "--quiet", *threads, *words)


def groups_of(matrices, together):
    """Lists of matrices that are measured at once: one role, neighbouring layers."""
    found = {}
    for matrix in matrices:
        layer, role = matrix["matrix"].split(".")
        found.setdefault((role, int(layer) // together), []).append(matrix)
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--kind", default="int4:128", help="the kind in which matrices are stored one at a time")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, from its start")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--together", type=int, default=1, help="neighbouring layers that are measured at once")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", help="folder for models that are made and removed (default: a temporary one)")
    options = parser.parse_args()
    threads = ["--threads", options.threads] if options.threads else []
    if not Path(options.text).is_file() or not Path(options.model).is_dir():
        raise SystemExit(f"{options.model} must be a folder and {options.text} a file")
    settings = {"model": model_hash(options.model), "text": hashlib.sha256(Path(options.text).read_bytes()).hexdigest(), "kind": options.kind,
                "tokens": options.tokens, "context": options.context, "together": options.together}
    out = Path(options.out)
    result = json.loads(out.read_text()) if out.exists() else {"settings": settings, "kl_divergence": {}, "sensitivity": {}}
    if result.get("settings") != settings:
        raise SystemExit(f"{out}: measured with other settings, {result.get('settings')}; name another file or remove it")
    # Every conversion is of all matrices together: what can be refused is refused before the first.
    plan = json.loads(run(BUILD / "tpshard", "plan", options.model, "--bits", 16, "--among", KINDS, "--json", "--quiet"))
    known = list(plan["mixed"]["matrices"][0]["relative_errors"])
    if options.kind not in known or options.kind == "bf16":
        raise SystemExit(f"--kind {options.kind} is none of {', '.join(kind for kind in known if kind != 'bf16')}")
    work = Path(options.work or tempfile.mkdtemp(prefix="sensitivity-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        reference, one, kinds = work / "reference", work / "one", work / "kinds.json"
        convert(options.model, reference, threads, "--quant", "none")
        for group in groups_of(plan["mixed"]["matrices"], options.together):
            names = [matrix["matrix"] for matrix in group]
            if all(name in result["sensitivity"] for name in names):
                continue
            kinds.write_text(json.dumps({"kinds": {"*": "bf16", **{name: options.kind for name in names}}}))
            convert(options.model, one, threads, "--kinds", kinds)
            answer = json.loads(run(BUILD / "tpengine", "eval", one, "--text", options.text, "--context", options.context, "--max-tokens",
                                    options.tokens, "--against", reference, "--json", "--quiet", *threads))
            squares = sum(matrix["relative_errors"][options.kind] ** 2 for matrix in group)
            for name in names:
                result["kl_divergence"][name] = answer["kl_divergence"] / len(names)
                result["sensitivity"][name] = answer["kl_divergence"] / squares if squares > 0 else 0.0
            out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{', '.join(names)}: KL {answer['kl_divergence']:.6f}, sensitivity {result['sensitivity'][names[0]]:.4f}", flush=True)
    finally:
        if not options.work:
            shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Quantized checkpoints (tests/golden/imports) through tpshard and tpengine, at tp 1, 2, 3, 4, against other people's dequantizers.

Proof of no loss: the values of every stored matrix, joined from the ranks' slices and rounded to float32, have the SHA-256 of what the format's
own library (or an independent reading of its specification) makes of the same checkpoint. Matrices that no stored kind holds are listed in
golden.json with the largest error allowed; convert must print their error.

Bound on logits: the weights are the same, so what differs is arithmetic: activations rounded to int8 in front of int4 and int8 weights (0.4 to
0.8 % of a row's rms each), to bfloat16 elsewhere, keys and values to bfloat16. Rounded weights add their own error, grown by norms and softmax.
Arguments: names of cases; none: all.
"""
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TPS = (3,) if os.environ.get("TEST_QUICK") else (1, 2, 3, 4)  # slow builds look at one

sys.path.insert(0, str(Path(__file__).parent))
try:
    import shard_reader
except ModuleNotFoundError as why:
    print(f"SKIP test_imports: no Python module {why.name}; scripts/setup installs it")
    sys.exit(77)

BUILD = Path(os.environ.get("BUILD", "build"))
GOLDEN = Path("tests/golden/imports")
BOUND, BOUND_O_ROUNDED, BOUND_ROUNDED = 0.025, 0.10, 0.45
lines = []


def read_npy(path):
    data = path.read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00" and b"'<f4'" in data[:128] and b"'fortran_order': False" in data[:128], path
    begin = 10 + struct.unpack_from("<H", data, 8)[0]
    return struct.unpack_from(f"<{(len(data) - begin) // 4}f", data, begin)


def run(*words):
    """What the command says on stderr."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stderr


def logits_error(shards, golden, want, out):
    run(BUILD / "tpengine", "logits", shards, "--token-ids", ",".join(map(str, golden["token_ids"])), "--output", out, "--quiet")
    got = read_npy(out)
    if len(got) != len(want):
        return math.inf
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(got, want)) / sum(b * b for b in want))


def check(name, ok, detail):
    lines.append((name, ok, detail))
    print(f"{'ok' if ok else 'not ok'} {name} {detail}", flush=True)


def stored_matrices(folder):
    """Name of the source -> rows of values, joined from all ranks."""
    matrices = {}
    _, files = shard_reader.read_directory(folder)
    for file in files:
        for tensor in file.tensors:
            if tensor["kind"] in ("f32", "bf16"):
                continue
            values, begin = file.dequantize(tensor), 0
            for part in tensor["parts"]:
                whole = matrices.setdefault(part["source"], [[None] * part["source_cols"] for _ in range(part["source_rows"])])
                for row in range(part["rows"]):
                    whole[part["row_begin"] + row][part["col_begin"]:part["col_begin"] + part["cols"]] = values[begin + row]
                begin += part["rows"]
    return matrices


def check_weights(name, folder, golden):
    matrices = stored_matrices(folder)
    wrong = []
    for source, wanted in golden["weights"].items():
        rows = matrices.get(source)
        flat = [value for row in rows or [] for value in row]
        if not flat or None in flat or hashlib.sha256(struct.pack(f"<{len(flat)}f", *flat)).hexdigest() != wanted:
            wrong.append(source)
    check(f"{name} weights", not wrong, f"{len(golden['weights'])} matrices equal bit for bit" if not wrong else f"differ: {', '.join(wrong[:4])}")


def check_report(name, said, golden):
    """Exactly the matrices of golden["rounded"] are reported, within their bounds."""
    found = {source: float(percent) / 100 for source, percent in re.findall(r"^tpshard:   (\S+) (\S+) %$", said, re.M)}
    strange = [source for source in found if not any(part in source for part in golden["rounded"])]
    silent = [part for part in golden["rounded"] if not any(part in source for source in found)]
    large = [source for source, error in found.items()
             if any(part in source and not error <= bound for part, bound in golden["rounded"].items())]
    check(f"{name} report", not (strange or silent or large),
          f"largest error {100 * max(found.values(), default=0):.3g} %" if not (strange or silent or large)
          else f"not expected {strange[:3]}, not reported {silent[:3]}, too large {large[:3]}")


def test_case(case, tmp):
    golden = json.loads((case / "golden.json").read_text())
    want = read_npy(case / "logits.npy")
    coarse = [part for part, error in golden["rounded"].items() if error > 0.01]
    bound = BOUND if not coarse else BOUND_O_ROUNDED if coarse == ["o_proj"] else BOUND_ROUNDED
    for tp in TPS:
        name = f"{case.name} tp {tp}"
        try:
            shards = tmp / f"{case.name}-{tp}"
            said = run(BUILD / "tpshard", "convert", "--tp", tp, case, shards)
            if tp == 3:
                check_report(name, said, golden)
                check_weights(name, shards, golden)
                run(BUILD / "tpshard", "verify", "--against", case, shards, "--quiet")
                run(BUILD / "tpshard", "reshard", "--tp", 2, shards, tmp / f"{case.name}-again", "--quiet")
                check_weights(f"{case.name} resharded", tmp / f"{case.name}-again", golden)
            error = logits_error(shards, golden, want, tmp / f"{shards.name}.npy")
            check(name, error <= bound, f"error {100 * error:.3f} % of rms, bound {100 * bound:.0f} %")
        except (RuntimeError, OSError, AssertionError, shard_reader.Refused) as problem:
            check(name, False, problem)


def test_other_kinds(case, tmp):
    """--quant of another kind dequantizes, says so, and gives the error of each matrix."""
    golden = json.loads((case / "golden.json").read_text())
    want = read_npy(case / "logits.npy")
    for quant, bound in (("none", 0.02), ("int8", 0.04)):
        name = f"{case.name} --quant {quant}"
        try:
            shards = tmp / f"{case.name}-{quant}"
            said = run(BUILD / "tpshard", "convert", "--tp", 3, "--quant", quant, case, shards)
            run(BUILD / "tpshard", "verify", "--against", case, shards, "--quiet")
            error = logits_error(shards, golden, want, tmp / f"{shards.name}.npy")
            exact = (case.name, quant) == ("gpt_oss", "none")  # bf16 holds every value of MXFP4
            check(name, error <= bound and "stored anew" in said and ("root mean square" in said) != exact,
                  f"error {100 * error:.3f} % of rms, bound {100 * bound:.0f} %")
        except (RuntimeError, OSError, AssertionError) as problem:
            check(name, False, problem)


def main():
    cases = [case for case in sorted(GOLDEN.iterdir()) if not sys.argv[1:] or case.name in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(test_case, case, Path(name)) for case in cases]
        jobs += [pool.submit(test_other_kinds, case, Path(name)) for case in cases
                 if case.name in ("gptq_act_order", "awq", "fp8_block", "gpt_oss", "ct_nvfp4", "hqq", "bnb_nf4", "bnb_nf4_nested")]
        for job in jobs:
            job.result()
    return 0 if lines and all(ok for _, ok, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())

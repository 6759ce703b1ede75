#!/usr/bin/env python3
"""Released versions of the shard directory are read for ever: those in tests/golden/shards verify, can be inspected, are read by the second reader, and
tpengine generates the tokens that it once did. And those that are bad are refused, by tpshard verify and tpengine alike, with the exit status and the
words that stand beside them. Made by scripts/make_goldens_shards.py.

Needs the Python module xxhash for the second reader alone.
"""
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import case_help
from case_help import check, run
from test_families import read_npy, relative_error

BUILD = Path(os.environ.get("BUILD", "build"))
GOLDEN = Path("tests/golden/shards")
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
# Kernels that do not round activations to bfloat16 (kernels/cpu/bf16_rows.h): the tokens are some on which those agree.
EXACT = "avx512" if {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()) else "auto"
BOUND_ROUNDED = 0.03


def generate(shards, prompt, *options):
    return run(TPENGINE, "generate", shards, "--prompt", prompt, "--max-tokens", 12, "--temperature", 0, "--ids", "--ignore-eos", "--quiet", *options)


def unpack(archive, folder):
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            assert member.isfile() and "/" not in member.name
            (folder / member.name).write_bytes(tar.extractfile(member).read())


def second_reader(folder):
    """A sentence, or None where there is nothing to say."""
    try:
        import shard_reader
    except ModuleNotFoundError:
        return None
    try:
        shard_reader.read_directory(folder)
    except shard_reader.Refused as why:
        return str(why)
    return None


def check_good(name, folder, want):
    status, _, err = run(TPSHARD, "verify", "--quiet", folder)
    check(f"{name}: verify", status == 0, err)
    status, out, err = run(TPSHARD, "inspect", "--json", folder)
    check(f"{name}: inspect", status == 0 and len(json.loads(out)["ranks"][0]["tensors"]) > 5, err)
    said = second_reader(folder)
    check(f"{name}: the second reader", said is None, str(said))
    for backend in (EXACT, "scalar"):
        status, out, err = generate(folder, want["prompt"], "--backend", backend)
        check(f"{name}: the tokens of {backend}", status == 0 and out.strip() == want["tokens"], f"{out.strip()}, not {want['tokens']}: {err}")


def check_default(name, folder, want):
    """Kernels that round activations may choose other tokens, so their logits of the golden ones are held to a bound: 0.2 to 1.0 % of the
    rms is what the rounding does."""
    logits = {}
    for backend in (EXACT, "cpu"):
        out = folder.parent / f"{backend}.npy"
        status, _, err = run(TPENGINE, "logits", folder, "--token-ids", want["tokens"], "--output", out, "--quiet", "--backend", backend)
        if status != 0:
            check(f"{name}: the logits of {backend}", False, err)
            return
        logits[backend] = read_npy(out)
    error = relative_error(logits["cpu"], logits[EXACT])
    check(f"{name}: the logits of the default kernels", error <= BOUND_ROUNDED, f"{100 * error:.2f} % of rms from those of {EXACT}")


def damage(folder, bad, folders):
    path = folder / bad["file"]
    data = bytearray(path.read_bytes())
    for offset, new in bad.get("write", []):
        data[offset:offset + len(new) // 2] = bytes.fromhex(new)
    if "splice" in bad:
        begin, count, text = bad["splice"]
        data[begin:begin + count] = text.encode()
    if "copy" in bad:
        data = (folder / bad["copy"]).read_bytes()
    if "from" in bad:
        data = (folders / bad["from"] / bad["file"]).read_bytes()
    path.write_bytes(data)
    if "resize" in bad:
        os.truncate(path, bad["resize"])
    if bad.get("remove"):
        path.unlink()


def check_bad(version, bad, work):
    folder = work / "bad"
    shutil.copytree(work / bad["of"], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder, bad, work)
    changed = {path.name: path.read_bytes() for path in folder.iterdir()} != before
    said = []
    for program, (status, out, err) in {"verify": run(TPSHARD, "verify", "--quiet", folder),
                                        "generate": generate(folder, "In the beginning")}.items():
        wanted, words = bad[program]
        if not (changed and status == wanted and words in err and out == ""):
            said.append(f"{program}: exit status {status}, wanted {wanted}; \"{err.strip()}\" should say \"{words}\"")
    check(f"{version} bad: {bad['name']}", not said, "; ".join(said))
    shutil.rmtree(folder)


def main():
    if not TPSHARD.exists() or not TPENGINE.exists():
        print(f"SKIP no {TPSHARD} or {TPENGINE}: build them first")
        return 77
    versions = sorted(path for path in GOLDEN.iterdir() if path.is_dir())
    check("there are goldens", len(versions) > 0)
    for version in versions:
        good, bad = json.loads((version / "golden.json").read_text()), json.loads((version / "bad.json").read_text())
        check(f"{version.name}: every archive is named", sorted(f"{name}.tar.xz" for name in good) ==
               sorted(path.name for path in version.glob("*.tar.xz")) and len(good) >= 8 and len(bad) >= 30)
        with tempfile.TemporaryDirectory(dir=BUILD / "tests", prefix="test_golden_shards.") as name:
            work = Path(name)
            for name, want in good.items():
                unpack(version / f"{name}.tar.xz", work / name)
                check_good(f"{version.name} {name}", work / name, want)
                if EXACT != "auto":
                    check_default(f"{version.name} {name}", work / name, want)
            for entry in bad:
                check_bad(version.name, entry, work)
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""--bits and --kinds from end to end: the choice is the same at every tp and number of threads, stands in the manifest and in the rank files, is kept by
reshard and repair and checked by verify, and what it cannot do is refused in a sentence. BUILD names the build folder (default: build)."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("BUILD", "build")).resolve()
MODEL = ROOT / "tests" / "model"
QUICK = bool(os.environ.get("TEST_QUICK"))  # slow builds look at less
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
number = failures = 0


def report(ok, name, detail=""):
    global number, failures
    number += 1
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {number} - {name}", flush=True)
    if not ok and detail:
        print(f"# {detail}")


def run(*words, wanted=0):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != wanted:
        raise SystemExit(f"not ok: {' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def convert(out, *words):
    run(TPSHARD, "convert", *words, MODEL, out, "--quiet")
    return json.loads((out / "model.json").read_text())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tpshard"}


def refused(name, wanted, code, *words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    report(done.returncode == code and wanted in done.stderr, f"refused: {name}", f"exit {done.returncode}: {done.stderr.strip()}")


def check_bits(tmp):
    one = convert(tmp / "one", "--bits", "4.5", "--threads", "1")
    quant = one["quant"]
    report(len(quant["matrices"]) == 16 and quant["millibits"] == 4500, "every matrix of the layers is listed", str(quant))
    report(len(set(quant["matrices"].values())) > 1, "kinds are mixed", str(quant["matrices"]))
    again = convert(tmp / "again", "--bits", "4.5", "--threads", "3")
    report(files_of(tmp / "one") == files_of(tmp / "again") and one["contract"] == again["contract"], "the same bytes from three threads")
    two = convert(tmp / "two", "--bits", "4.5", "--tp", "2")
    report(two["quant"] == quant, "the same choice at tp 2", str(two["quant"]))
    for source, tp in (("one", "2"), ("two", "1")):
        out = tmp / f"{source}-to-{tp}"
        run(TPSHARD, "reshard", tmp / source, out, "--tp", tp, "--quiet")
        report(files_of(out) == files_of(tmp / ("two" if tp == "2" else "one")), f"reshard to tp {tp} equals convert")
    run(TPSHARD, "verify", tmp / "two", "--against", MODEL, "--quiet")
    report(True, "verify --against finds the checkpoint's weights")
    shown = json.loads(run(TPSHARD, "inspect", tmp / "two", "--json").stdout)
    text = run(TPSHARD, "inspect", tmp / "two").stdout
    report(shown["manifest"]["quant"]["matrices"] == quant["matrices"] and "kinds of the layers' matrices (asked: at most 4.500" in text,
           "inspect shows the choice")
    stored = {f"{t['layer']}.{t['role']}": t for t in shown["ranks"][0]["tensors"]}
    agree = all(word == (f"{stored[name]['kind']}:{stored[name]['group_size']}" if stored[name]["kind"] in ("int4", "int4z", "nl4") else stored[name]["kind"])
                for name, word in quant["matrices"].items())
    report(agree, "the rank files hold what the manifest lists")
    bits = sum(8 * (t["data_bytes"] + t["scale_bytes"]) for n, t in stored.items() if n in quant["matrices"])
    weights = sum(t["shape"][0] * t["shape"][1] for n, t in stored.items() if n in quant["matrices"])
    report(4.4 < bits / weights <= 4.5, "the budget holds", str(bits / weights))
    plan = json.loads(run(TPSHARD, "plan", MODEL, "--bits", "4.5", "--json", "--quiet").stdout)["mixed"]
    report({m["matrix"]: m["kind"] for m in plan["matrices"]} == quant["matrices"] and plan["measured"], "plan chooses the same")
    config = json.loads(run(TPSHARD, "plan", MODEL / "config.json", "--bits", "4.5", "--json", "--quiet").stdout)["mixed"]
    report(not config["measured"] and config["bits"] <= 4.5, "plan of a config.json alone takes normal weights")
    a = run(TPENGINE, "generate", tmp / "one", "--prompt", "The", "--max-tokens", "8", "--temperature", "0", "--quiet").stdout
    report(len(a) > 10, "the engine generates from it", repr(a))
    return quant


def check_damage(tmp, quant):
    """A manifest that was edited does not hold; one that was edited and signed anew is not what the rank files hold; no head whole: the manifest says kinds."""
    path = tmp / "two" / "model.json"
    text = path.read_text()
    name, kind = next(iter(quant["matrices"].items()))
    path.write_text(text.replace(f'"{name}": "{kind}"', f'"{name}": "{"fp8" if kind != "fp8" else "int8"}"'))
    refused("an edited choice", "contract does not match", 4, TPSHARD, "verify", tmp / "two", "--quiet")
    path.write_text(text)
    whole = files_of(tmp / "two")
    for rank in whole:
        with open(tmp / "two" / rank, "r+b") as file:
            file.write(b"\0" * 4096)
    run(TPSHARD, "repair", tmp / "two", "--from", MODEL, "--quiet")
    report(files_of(tmp / "two") == whole, "repair of ranks whose heads are all broken")


def check_kinds(tmp):
    kinds = tmp / "kinds.json"
    kinds.write_text(json.dumps({"kinds": {"*": "int4:64", "*.down": "int8", "0.*": "bf16"}}))
    manifest = convert(tmp / "kinds", "--kinds", kinds)
    listed = manifest["quant"]["matrices"]
    report(listed["1.down"] == "int8" and listed["0.down"] == "bf16" and listed["3.qkv"] == "int4:64", "--kinds stores what it says", str(listed))
    kinds.write_text(json.dumps({"kinds": {"*": "int4:32"}}))
    convert(tmp / "as-kinds", "--kinds", kinds)
    convert(tmp / "as-quant", "--quant", "int4", "--group-size", "32")
    parts = [[t["data_bytes"] for t in json.loads(run(TPSHARD, "inspect", tmp / n, "--json").stdout)["ranks"][0]["tensors"]] for n in ("as-kinds", "as-quant")]
    report(parts[0] == parts[1], "all alike are laid out as --quant lays them out")
    run(TPSHARD, "verify", tmp / "as-kinds", "--against", MODEL, "--quiet")
    report(True, "and verified")


def interrupt(out, *words):
    """Stops a run that has weights in its journal. False: it was quicker."""
    journal = out / ".tmp-tpshard" / "journal"
    child = subprocess.Popen([TPSHARD, "convert", *words, "--threads", "1", "--quiet", MODEL, out], stderr=subprocess.DEVNULL,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while child.poll() is None and not (journal.exists() and journal.stat().st_size > 100):
        time.sleep(0.001)
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
    return child.wait() == 130 and journal.exists()


def check_resume(tmp):
    """A run that was interrupted goes on only with the same choice."""
    out = tmp / "resumed"
    convert(tmp / "whole", "--bits", "4.6")
    for _ in range(20):
        if interrupt(out, "--bits", "4.6"):
            break
        shutil.rmtree(out, ignore_errors=True)
    report((out / ".tmp-tpshard").exists(), "a run was interrupted")
    # The kind of most weights is the same: only what is chosen matrix by matrix differs.
    refused("to go on with another choice", "leave out --resume", 2, TPSHARD, "convert", MODEL, out, "--bits", "4.7", "--resume", "--quiet")
    convert(out, "--bits", "4.6", "--resume")
    report(files_of(out) == files_of(tmp / "whole") and not (out / ".tmp-tpshard").exists(), "the same choice goes on to the same bytes")
    if not QUICK:
        convert(out, "--bits", "4.6", "--force", "--resume")
        report(files_of(out) == files_of(tmp / "whole"), "once more with --resume --force")


def check_among(tmp):
    """--among leaves out all other kinds, for convert and plan, and lets nl4 in."""
    cases = (("nl4,bf16", {"nl4:128", "nl4:64", "nl4:32", "bf16"}), ("int4", {"int4:128", "int4:64", "int4:32"}))
    for words, allowed in cases[:1] if QUICK else cases:
        chosen = convert(tmp / f"among-{words}", "--bits", "4.5", "--among", words)["quant"]["matrices"]
        report(set(chosen.values()) <= allowed, f"--among {words}", str(chosen))
        plan = json.loads(run(TPSHARD, "plan", MODEL, "--bits", "4.5", "--among", words, "--json", "--quiet").stdout)["mixed"]["matrices"]
        report({m["matrix"]: m["kind"] for m in plan} == chosen and all(set(m["relative_errors"]) == allowed for m in plan), f"so does plan {words}")


def check_sensitivity(tmp):
    """scripts/measure_sensitivity.py: a kind that is left out by default, an end that is the beginning of another run, and what it refuses."""
    script, out, text = ROOT / "scripts" / "measure_sensitivity.py", tmp / "sensitivity-out.json", MODEL / "heldout.txt"
    words = (sys.executable, script, MODEL, text, out, "--tokens", "64", "--context", "64", "--together", "4")
    refused("a kind that is none", "int3 is none of", 1, *words, "--kind", "int3")
    report(not out.exists(), "before anything is measured")
    run(*words, "--kind", "nl4:128")
    found = json.loads(out.read_text())
    report(len(found["sensitivity"]) == 16 and all(value >= 0 for value in found["sensitivity"].values()), "measure_sensitivity --kind nl4:128", str(found))
    again = run(*words, "--kind", "nl4:128").stdout
    report(again == "" and json.loads(out.read_text()) == found, "what is finished is not measured again", again)
    other = tmp / "other.txt"
    other.write_text("Other words.\n" * 100)
    refused("another text", "measured with other settings", 1, *words[:3], other, *words[4:], "--kind", "nl4:128")
    shutil.copytree(MODEL, tmp / "changed")
    with open(tmp / "changed" / "config.json", "a", encoding="utf-8") as config:
        config.write("\n")
    refused("another model", "measured with other settings", 1, *words[:2], tmp / "changed", *words[3:], "--kind", "nl4:128")
    convert(tmp / "sensitive", "--bits", "4.5", "--sensitivity", out)
    report(True, "convert takes it")


def check_refusals(tmp):
    out = tmp / "never"
    sensitivity = tmp / "sensitivity.json"
    sensitivity.write_text('{"sensitivity": {"*": 1}}')
    refused("a file that is not there", "no-such.json", 5, TPSHARD, "convert", MODEL, out, "--bits", "4.5", "--sensitivity", tmp / "no-such.json")
    for name, wanted, words in (
        ("--bits with --quant", "goes without --quant int4", ("--bits", "4.5", "--quant", "int4")),
        ("--bits with --kinds", "use one of them", ("--bits", "4.5", "--kinds", sensitivity)),
        ("--sensitivity alone", "add --bits", ("--sensitivity", sensitivity)),
        ("--among alone", "add --bits", ("--among", "int4")),
        ("--among beside --kinds", "add --bits", ("--among", "int4", "--kinds", sensitivity)),
        ("--group-size of no groups", "embedding and head alone", ("--bits", "4.5", "--group-size", "64")),
        ("--scales of a mix without four bits", "here are none", ("--bits", "9", "--among", "int8,fp8", "--scales", "max")),
        ("too few bits", "at least 4.125 bits per weight", ("--bits", "4")),
        ("bits that are none", "--bits", ("--bits", "many")),
        ("NaN bits", "--bits", ("--bits", "nan")),
        ("a file without kinds", "kinds must be an object", ("--kinds", sensitivity)),
    ):
        refused(name, wanted, 2, TPSHARD, "convert", MODEL, out, "--quiet", *words)
    report(not out.exists(), "nothing was written")


def main():
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        quant = check_bits(tmp)
        check_damage(tmp, quant)
        check_kinds(tmp)
        check_resume(tmp)
        check_among(tmp)
        if QUICK:
            print("# slow builds leave out scripts/measure_sensitivity.py, which runs programs that other tests run as well")
        else:
            check_sensitivity(tmp)
        check_refusals(tmp)
    print(f"1..{number}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

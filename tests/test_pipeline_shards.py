#!/usr/bin/env python3
"""tpshard with pipeline stages (--pp): what the stages hold, byte for byte what one stage would hold, and every command on such a directory."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from case_help import check, expect, expect_run, must, run, skip, status, wait_until  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL, FAMILIES = Path("tests/model"), Path("tests/golden/families")
TPSHARD = BUILD / "tpshard"


def convert(out, *words, model=MODEL):
    must(TPSHARD, "--force", "--quiet", *words, model, out)
    return out


def reshard(source, out, *words):
    must(TPSHARD, "reshard", "--force", "--quiet", *words, source, out)
    return out


def differences(a, b):
    """Files of two directories that are not the same; model.json apart, where the tool may differ."""
    names = sorted(path.name for path in Path(a).iterdir())
    if names != sorted(path.name for path in Path(b).iterdir()):
        return f"{names} and {sorted(path.name for path in Path(b).iterdir())}"
    return " ".join(name for name in names if (Path(a) / name).read_bytes() != (Path(b) / name).read_bytes())


def tensors(folder):
    """Of each rank (stage, rank of the stage): what stands in the payload, by role, layer and expert."""
    manifest = json.loads((folder / "model.json").read_text())
    found = {}
    for number in range(manifest["tp_size"] * manifest["pp_size"]):
        rank = json.loads(must(TPSHARD, "inspect", "--json", "--rank", number, folder))["ranks"][number]
        payload = (folder / rank["file"]).read_bytes()[rank["payload_offset"]:]
        held = {}
        for tensor in rank["tensors"]:
            data = payload[tensor["data_offset"]:tensor["data_offset"] + tensor["data_bytes"]]
            scale = payload[tensor["scale_offset"]:tensor["scale_offset"] + tensor["scale_bytes"]]
            if data:
                held[tensor["role"], tensor["layer"], tensor["expert"]] = (tensor["kind"], tuple(tensor["shape"]), data, scale)
        found[rank["stage"], number % manifest["tp_size"]] = (rank["layers"], held)
    return manifest, found


def compare(one, cut):
    """Stages hold what one stage holds, each tensor where it belongs. "": all is well."""
    _, whole = tensors(one)
    manifest, stages = tensors(cut)
    tied, pp, layers = manifest["model"]["tied_embeddings"], manifest["pp_size"], manifest["stage_layers"]
    if sum(layers) != manifest["model"]["num_layers"] or len(layers) != pp:
        return f"stage_layers {layers}"
    for (stage, rank), ((begin, end), held) in stages.items():
        if (begin, end - begin) != (sum(layers[:stage]), layers[stage]):
            return f"stage {stage} has layers {begin} to {end}, the manifest says {layers}"
        last = stage == pp - 1
        wanted = {}
        for (role, layer, expert), tensor in whole[0, rank][1].items():
            here = (begin <= layer < end if layer >= 0 else stage == 0 or last and tied if role == "embedding" else
                    last if role in ("final_norm", "head") else True)
            if here:
                wanted[role, layer, expert] = tensor
        if held.keys() != wanted.keys():
            return f"stage {stage} rank {rank}: {sorted(held.keys() ^ wanted.keys())[:4]}"
        for key, tensor in held.items():
            if tensor != wanted[key]:
                return f"stage {stage} rank {rank}: {key} differs"
    return ""


def test_slices(work):
    cases = [(MODEL, "--quant int4", 2, 2), (MODEL, "--quant none", 3, 4), (MODEL, "--quant int4 --rot", 2, 3),
             (MODEL, "--bits 5", 1, 2)]
    cases += [(FAMILIES / name, f"--quant none --experts {mode}", 2, 2) for name in ("mixtral", "deepseek_v3") for mode in ("tp", "ep")]
    cases += [(FAMILIES / "gpt_oss", "--quant mxfp4", 2, 2), (FAMILIES / "gemma2", "--quant int8", 1, 2)]
    for model, words, tp, pp in cases:
        name = f"{model.name} {words} tp {tp} pp {pp}"
        one = convert(work / "one", *words.split(), "--tp", tp, model=model)
        cut = convert(work / "cut", *words.split(), "--tp", tp, "--pp", pp, model=model)
        check(f"slices of {name}", not (wrong := compare(one, cut)), wrong)
        expect_run(f"verify --against of {name}", 0, "every weight equals", TPSHARD, "verify", "--against", model, cut)
        back = reshard(cut, work / "back", "--tp", tp, "--pp", 1)
        check(f"reshard to one stage of {name}", not (wrong := differences(one, back)), wrong)
        check(f"reshard to stages of {name}", not (wrong := differences(cut, reshard(one, work / "there", "--tp", tp, "--pp", pp))), wrong)


def test_reshards(work):
    a = convert(work / "a", "--quant", "int4", "--tp", 2, "--pp", 2)
    b = convert(work / "b", "--quant", "int4", "--tp", 3, "--pp", 4)
    check("reshard tp 2 pp 2 -> tp 3 pp 4", not (wrong := differences(b, reshard(a, work / "c", "--tp", 3, "--pp", 4))), wrong)
    check("reshard --pp alone keeps tp", not (wrong := differences(reshard(a, work / "c", "--pp", 4), convert(work / "d", "--quant", "int4", "--tp", 2, "--pp", 4))),
          wrong)
    compressed = convert(work / "z", "--quant", "none", "--tp", 2, "--pp", 2, "--zstd")
    expect_run("verify of compressed stages", 0, "ok", TPSHARD, "verify", "--against", MODEL, compressed)
    plain = convert(work / "e", "--quant", "none", "--tp", 1)
    check("reshard of compressed stages", not (wrong := differences(plain, reshard(compressed, work / "f", "--tp", 1, "--pp", 1))), wrong)
    expect_run("more stages than layers", 2, "--pp 5: the model has 4 layers, and each stage needs one", TPSHARD, "--pp", 5, MODEL, work / "x")
    expect_run("too many ranks", 2, "64 ranks in all", TPSHARD, "--tp", 32, "--pp", 4, MODEL, work / "x")
    expect_run("reshard without a number", 2, "--tp N or --pp N", TPSHARD, "reshard", a, work / "x")
    check("nothing is left of a refusal", not (work / "x").exists())


def test_manifest(work):
    folder = convert(work / "m", "--quant", "int4", "--pp", 2)
    text = (folder / "model.json").read_text()
    stages = json.loads(text)["stage_layers"]
    for value, wanted in (([4], "stage_layers must hold pp_size = 2 numbers"), ([2, 3], "stage_layers[1] must be"), ([0, 4], "stage_layers[0] must be"),
                          ([2, 1], "add up to 3, the model has 4"), ([2, "2"], "stage_layers[1] must be"), (None, "stage_layers must be an array, found nothing"),
                          ([1, 3], "its contract does not match")):
        changed = json.loads(text)
        changed["stage_layers"] = value
        if value is None:
            del changed["stage_layers"]
        (folder / "model.json").write_text(json.dumps(changed))
        expect_run(f"stage_layers {value}", 4, wanted, TPSHARD, "inspect", folder)
    (folder / "model.json").write_text(text)
    one = convert(work / "m1", "--quant", "int4")
    changed = json.loads((one / "model.json").read_text())
    (one / "model.json").write_text(json.dumps({**changed, "stage_layers": stages}))
    expect_run("stage_layers of one stage", 4, "pp_size is 1", TPSHARD, "inspect", one)
    first, second = folder / "stage-00-rank-00-of-01.tpshard", folder / "stage-01-rank-00-of-01.tpshard"
    shutil.copy(first, work / "kept")
    shutil.copy(second, first)
    expect_run("another stage's file", 4, "it is the file of rank 0 of stage 1, but rank 0 of stage 0 belongs there", TPSHARD, "inspect", folder)
    shutil.copy(work / "kept", first)
    expect_run("inspect names the stages", 0, "pp 2, layers of the stages: 0-1, 2-3", TPSHARD, "inspect", folder)


def test_repair(work):
    good = convert(work / "good", "--quant", "int4", "--tp", 2, "--pp", 2)
    for source in (MODEL, work / "copy"):
        broken = work / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(good, broken)
        if not (work / "copy").exists():
            shutil.copytree(good, work / "copy")
        victim = broken / "stage-01-rank-01-of-02.tpshard"
        data = bytearray(victim.read_bytes())
        data[-5000] ^= 1
        data[100] ^= 1  # the head, too
        victim.write_bytes(data)
        (broken / "stage-00-rank-00-of-02.tpshard").unlink()
        code, _, problem = run(TPSHARD, "verify", broken)
        check(f"verify finds what is broken (from {source.name})", code != 0 and "stage-01-rank-01-of-02" in problem, problem)
        must(TPSHARD, "repair", "--quiet", broken, "--from", source)
        check(f"repair from {source.name}", not (wrong := differences(good, broken)), wrong)
    code, out, _ = run(TPSHARD, "sums", good)
    check("sums", code == 0 and (good / "SHA256SUMS").exists() and "stage-01-rank-01-of-02.tpshard" in (good / "SHA256SUMS").read_text(), out)


def test_resume(work):
    """Ended in the middle and begun again: the same bytes; with another number of stages: refused."""
    whole = convert(work / "whole", "--quant", "int4", "--tp", 2, "--pp", 2)
    out = work / "resumed"
    words = [TPSHARD, "--quiet", "--quant", "int4", "--tp", "2", "--threads", "1", MODEL, out]
    ended = False
    for _ in range(40):  # until one is caught in the middle
        shutil.rmtree(out, ignore_errors=True)
        child = subprocess.Popen([*map(str, words), "--pp", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: list(work.glob("resumed/.tmp-tpshard/stage-*")) or child.poll() is not None, 20, 0.0002)
        child.send_signal(signal.SIGTERM)
        child.wait()
        ended = child.returncode != 0 and (out / ".tmp-tpshard").exists()
        if ended:
            break
    if not ended:
        skip("resume", "no run was caught in the middle")
        return
    expect_run("another number of stages is not resumed", 2, "resume", *words, "--pp", 4, "--resume")
    must(*words, "--pp", 2, "--resume")
    check("resume", not (wrong := differences(whole, out)), wrong)


def test_plan(work):
    report = json.loads(must(TPSHARD, "plan", "--json", "--tp", 2, "--pp", 2, "--quant", "int4", "--context", 1024, MODEL))
    one = json.loads(must(TPSHARD, "plan", "--json", "--tp", 2, "--quant", "int4", "--context", 1024, MODEL))
    folder = convert(work / "planned", "--quant", "int4", "--tp", 2, "--pp", 2)
    ranks = json.loads((folder / "model.json").read_text())["ranks"]
    expect("plan: files", [rank["bytes"] for rank in report["ranks"]], [rank["bytes"] for rank in ranks])
    expect("plan: stages", [(rank["stage"], rank["layers"]) for rank in report["ranks"]], [(0, [0, 2]), (0, [0, 2]), (1, [2, 4]), (1, [2, 4])])
    check("plan: a stage keeps its own layers' KV cache", all(2 * rank["kv_bytes"] == one["ranks"][0]["kv_bytes"] for rank in report["ranks"]), f"{report['ranks']}")
    expect_run("plan for people", 0, "pp 2", TPSHARD, "plan", "--tp", 2, "--pp", 2, MODEL)
    code, out, _ = run(TPSHARD, "plan", "--json", "--pp", 2, "--gpu-memory", "1GiB", MODEL)
    check("plan proposes tp with stages", code == 0 and json.loads(out)["pp_size"] == 2 and json.loads(out)["fits"], out)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        for test in (test_slices, test_reshards, test_manifest, test_repair, test_resume, test_plan):
            test(work)
    return status()


if __name__ == "__main__":
    sys.exit(main())

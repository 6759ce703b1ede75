#!/usr/bin/env python3
"""tpshard repair: whatever is broken becomes again, byte for byte, what it was, from the checkpoint or from another copy; what is whole is not
touched; a repair that is killed leaves nothing that verify takes for whole, and the next one finishes it; what cannot be repaired is said.

Standard library only. Environment: BUILD (default build), TEST_QUICK=1 (fewer kinds of models), KILLS (default 12).
"""
import errno
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import case_help
import io_shim_help
from case_help import check
from io_shim_help import SHIM, Page

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD = BUILD / "tpshard"
QUICK = bool(os.environ.get("TEST_QUICK"))
KILLS = int(os.environ.get("KILLS", "4" if QUICK else "12"))
MODEL, FAMILIES, IMPORTS = Path("tests/model"), Path("tests/golden/families"), Path("tests/golden/imports")
MIB = 1 << 20


# Without faults the shim leaves out syncs.
ENVIRONMENT = {**os.environ, **({"LD_PRELOAD": str(SHIM)} if SHIM.exists() else {})}


def run(*words):
    return case_help.run(*words, env=ENVIRONMENT)


def convert(model, out, *options):
    status, _, err = run(TPSHARD, "convert", "--quiet", *options, model, out)
    if status != 0:
        raise RuntimeError(f"convert {model}: {err}")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def times(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(folder).iterdir()}


def ranks(folder):
    return sorted(Path(folder).glob("rank-*.tpshard"))


def payload_offset(path):
    return int.from_bytes(path.read_bytes()[96:104], "little")


def expect(name, status, words, *command):
    case_help.expect_run(name, status, words, *command, env=ENVIRONMENT)


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path, *offsets):
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1 << offset % 8
    path.write_bytes(data)


def put(path, offset, new):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(new)


def one_bit(folder, _other):
    flip(ranks(folder)[0], payload_offset(ranks(folder)[0]) + 777)


def a_bit_in_every_leaf(folder, _other):
    for path in ranks(folder):
        flip(path, *range(payload_offset(path) + 100, path.stat().st_size, MIB))


def a_page(folder, _other):
    path = ranks(folder)[-1]
    put(path, path.stat().st_size // 4096 * 4096 - 4096 * 5, os.urandom(4096))


def a_bit_of_a_head(folder, _other):
    flip(ranks(folder)[-1], 400)


def a_bit_of_every_head(folder, _other):
    for path in ranks(folder):
        flip(path, 330)


def no_heads(folder, _other):
    for path in ranks(folder):
        put(path, 0, bytes(payload_offset(path)))


def head_and_leaf(folder, _other):
    path = ranks(folder)[0]
    flip(path, 12, payload_offset(path) + 5)


def checksums_and_leaf(folder, _other):
    path = ranks(folder)[0]
    begin = int.from_bytes(path.read_bytes()[80:88], "little")
    flip(path, begin + 3, path.stat().st_size - 1)


def cut_in_payload(folder, _other):
    os.truncate(ranks(folder)[0], ranks(folder)[0].stat().st_size - 5000)


def cut_in_head(folder, _other):
    os.truncate(ranks(folder)[-1], 3000)


def grown(folder, _other):
    with open(ranks(folder)[0], "ab") as file:
        file.write(b"more")


def a_missing_file(folder, _other):
    ranks(folder)[-1].unlink()


def all_missing(folder, _other):
    for path in ranks(folder):
        path.unlink()


def swapped(folder, _other):
    first, last = ranks(folder)[0], ranks(folder)[-1]
    kept = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(kept)


def of_another_run(folder, other):
    shutil.copy(ranks(other)[0], ranks(folder)[0])


def extras(folder, _other):
    flip(folder / "config.json", 10)
    for name in ("tokenizer.bin", "generation_config.json"):
        if (folder / name).exists():
            (folder / name).unlink()


def everything(folder, other):
    extras(folder, other)
    a_bit_in_every_leaf(folder, other)
    a_bit_of_a_head(folder, other)
    cut_in_payload(folder, other)


DAMAGES = [one_bit, a_bit_in_every_leaf, a_page, a_bit_of_a_head, a_bit_of_every_head, no_heads, head_and_leaf, checksums_and_leaf,
           cut_in_payload, cut_in_head, grown, a_missing_file, all_missing, swapped, of_another_run, extras, everything]
# Those that ask something of how weights are derived again; the others are the same for every kind of model.
DERIVED = [a_bit_in_every_leaf, no_heads, a_missing_file, everything]

# ---- mending ---------------------------------------------------------------------------------------------------------


def repair_kind(work, name, model, *options, from_copies=True):
    """Every damage to one kind of directory, mended from the checkpoint and from copies, stored alike and not."""
    whole, other, again, broken = (work / part for part in ("whole", "other", "again", "broken"))
    convert(model, whole, *options)
    convert(model, other, "--tp", "1", "--quant", "int8")
    plain = [option for option in options if option != "--zstd"]
    convert(model, again, *(plain if "--zstd" in options else [*options, "--zstd"]))
    want, wrong, damages = contents(whole), [], DAMAGES if from_copies else DERIVED
    for damage in damages:
        for source in (model, whole, *([again] if damage in DERIVED else [])) if from_copies else (model,):
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(whole, broken)
            damage(broken, other)
            if contents(broken) == want:
                continue  # there is but one rank to swap with itself
            what = f"{damage.__name__} from {'the checkpoint' if source == model else source.name}"
            before = contents(broken)
            if source == model and run(TPSHARD, "verify", "--quiet", broken)[0] != 4:
                wrong.append(f"{what}: not seen by verify")
            untouched = {file: time for file, time in times(broken).items() if before[file] == want.get(file)}
            status, out, err = run(TPSHARD, "repair", "--json", "--quiet", broken, "--from", source)
            if status != 0 or contents(broken) != want:
                wrong.append(f"{what}: exit status {status}: {err.strip()}")
                continue
            after = times(broken)
            if any(after[file] != time for file, time in untouched.items()):
                wrong.append(f"{what}: a whole file was touched")
            changed = sum(before.get(file) != data for file, data in want.items())
            if json.loads(out)["files"] != changed:
                wrong.append(f"{what}: {out} files said, {changed} changed")
    check(f"{name}: {len(damages)} kinds of damage, {'3 sources' if from_copies else 'from the checkpoint'}", not wrong, "; ".join(wrong[:3]))
    for folder in (whole, other, again, broken):
        shutil.rmtree(folder)


def figures(work, whole):
    """What is said is what was done, and no more than the broken leaves is written."""
    broken = work / "broken"
    shutil.copytree(whole, broken)
    first = ranks(broken)[0]
    leaf = payload_offset(first)
    flip(first, leaf + 9, leaf + 10)
    flip(ranks(broken)[1], 20)
    status, out, err = run(TPSHARD, "repair", "--json", "--quiet", broken, "--from", MODEL)
    said = json.loads(out or "{}")
    mended = said.get("mended", [{}, {}])
    check("figures of a repair", status == 0 and (said["ok"], said["files"], said["leaves"], said["heads"], said["extras"], said["bytes"]) ==
           (True, 2, 1, 1, 0, MIB + payload_offset(ranks(whole)[1])) and "embedding" in mended[0]["tensors"] and mended[0]["leaves"] == 1
           and mended[1]["head"] and mended[1]["tensors"] == [], out + err)
    before = times(broken)
    expect("nothing to repair", 0, "nothing to repair", TPSHARD, "repair", broken, "--from", MODEL)
    check("and nothing was touched", times(broken) == before)
    shutil.rmtree(broken)


def pasted_command(work, whole):
    """The command that a failed verification names, with SOURCE filled in."""
    for name in ("plain", "with blank", "a $HOME; b"):
        broken = work / name
        shutil.copytree(whole, broken)
        for offset in (payload_offset(ranks(broken)[0]) + 3, 50):
            flip(ranks(broken)[0], offset)
            _, _, err = run(TPSHARD, "verify", "--quiet", broken)
            begin = err.find("tpshard repair ")
            line = err[begin:].split("SOURCE")[0] + "SOURCE" if begin >= 0 else "false"
            line = f"PATH={shlex.quote(str(BUILD.resolve()))}:$PATH; SOURCE={shlex.quote(str(MODEL.resolve()))}; " + line.replace("SOURCE", '"$SOURCE"')
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
            check(f"the command that is named works in \"{name}\"", done.returncode == 0 and contents(broken) == contents(whole),
                   f"{err} {line} {done.stderr}")
        shutil.rmtree(broken)


# ---- what cannot be repaired -----------------------------------------------------------------------------------------


def refusals(work, whole):
    broken, copy, other, changed = (work / part for part in ("broken", "copy", "other", "changed"))
    shutil.copytree(whole, broken)
    damaged = payload_offset(ranks(broken)[0]) + 50
    flip(ranks(broken)[0], damaged)
    before = contents(broken)
    expect("repair without --from", 2, "--from SOURCE", TPSHARD, "repair", broken)
    expect("repair from itself", 2, "directory itself", TPSHARD, "repair", broken, "--from", f"{broken}/.")
    expect("no such source", 3, "config.json", TPSHARD, "repair", broken, "--from", work / "nothing")
    expect("no such directory", 5, "cannot open", TPSHARD, "repair", work / "nothing", "--from", MODEL)
    expect("another model", 4, "is not the one that", TPSHARD, "repair", broken, "--from", FAMILIES / "qwen3")
    convert(MODEL, other, "--tp", "2", "--quant", "int8")
    expect("a copy with other options", 4, "of another model, other options", TPSHARD, "repair", broken, "--from", other)
    shutil.copytree(MODEL, changed)
    flip(changed / "model.safetensors", *range(5000, (changed / "model.safetensors").stat().st_size, 3000))
    expect("a changed checkpoint", 4, "it has another checksum, so it was left as it is", TPSHARD, "repair", broken, "--from", changed)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    flip(broken / "tokenizer.bin", 2000)
    expect("a changed tokenizer", 4, "tokenizer.bin: what ", TPSHARD, "repair", broken, "--from", changed)
    flip(broken / "tokenizer.bin", 2000)
    held = os.open(broken, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    expect("two at once", 2, "another tpshard", TPSHARD, "repair", broken, "--from", MODEL)
    os.close(held)
    check("what cannot be repaired is left as it was", contents(broken) == before)

    manifest = (broken / "model.json").read_text()
    root = json.loads(manifest)["ranks"][0]["xxh3_128"]
    (broken / "model.json").write_text(manifest.replace(root, root[::-1]))
    expect("a root of the manifest that is damaged", 4, "model.json itself was damaged", TPSHARD, "repair", broken, "--from", MODEL)
    (broken / "model.json").write_text(manifest.replace("hidden_size", "hidden_sizE"))
    expect("a damaged manifest", 4, "repair needs a whole model.json", TPSHARD, "repair", broken, "--from", MODEL)
    (broken / "model.json").unlink()
    expect("no manifest", 4, "repair needs a whole model.json", TPSHARD, "repair", broken, "--from", MODEL)
    (broken / "model.json").write_text(manifest)

    shutil.copytree(whole, copy)
    flip(ranks(copy)[0], damaged + 1)
    flip(ranks(broken)[1], damaged)
    expect("a copy that is broken in the same place", 4, "rank-00-of-02.tpshard", TPSHARD, "repair", broken, "--from", copy)
    check("what it had was taken", contents(broken) == before)
    ranks(copy)[0].unlink()
    ranks(broken)[1].unlink()
    expect("a copy without the file", 4, "rank-00-of-02.tpshard", TPSHARD, "repair", broken, "--from", copy)
    check("again, what it had was taken", contents(broken) == before)
    flip(ranks(broken)[0], 20)
    flip(ranks(broken)[1], damaged)
    expect("a copy without the file, for a head", 4, "rank-00-of-02.tpshard", TPSHARD, "repair", broken, "--from", copy)
    flip(ranks(broken)[0], 20)
    check("once more, what it had was taken", contents(broken) == before)
    moved = work / "moved"
    ranks(broken)[0].rename(moved)
    ranks(broken)[0].parent.joinpath("rank-00-of-02.tpshard").symlink_to(moved.resolve())
    expect("a link is not followed", 4, "symbolic link", TPSHARD, "repair", broken, "--from", MODEL)
    for folder in (broken, copy, other, changed):
        shutil.rmtree(folder)


def identity(path):
    """Of what lies there itself; following a link changes the time of its last access."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def strange_files(work, whole):
    """What is no regular file is never waited for, nor written to, nor removed: whoever put it there is told to."""
    kinds = {
        "a FIFO": os.mkfifo,
        "a directory": os.mkdir,
        "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
        "a link that loops": lambda path: path.symlink_to(path.name),
        "a link to a FIFO": lambda path: (os.mkfifo(work / "fifo"), path.symlink_to(work / "fifo")),
    }
    broken = work / "broken"
    for name in ("rank-01-of-02.tpshard", "tokenizer.bin"):
        for kind, make in kinds.items():
            shutil.copytree(whole, broken)
            path = broken / name
            path.unlink()
            make(path)
            before = identity(path)
            expect(f"verify: {kind} as {name}", 4, "remove it, then repair it: tpshard repair", "timeout", "20", TPSHARD, "verify", broken)
            expect(f"repair: {kind} as {name}", 4, "then repair makes", "timeout", "20", TPSHARD, "repair", broken, "--from", MODEL)
            check("and it still lies there", identity(path) == before)
            (work / "fifo").unlink(missing_ok=True)
            shutil.rmtree(broken)


def spread(count, most):
    """At most so many of 1 .. count, the first and the last among them."""
    return sorted({1 + (count - 1) * i // (most - 1) for i in range(most)}) if count > most else range(1, count + 1)


class Broken:
    """A directory that is broken, as often as it is wanted, and runs on it in which the operating system fails."""

    def __init__(self, work, whole, *damages):
        self.folder, self.whole, self.want, self.page, self.damages = work / "broken", whole, contents(whole), work / "page", damages

    def make(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.whole, self.folder)
        for damage in self.damages:
            damage(self.folder, self.whole)

    def repair(self, **shim):
        return io_shim_help.run(TPSHARD, "repair", "--quiet", "--threads", 1, self.folder, "--from", MODEL, short=0, **shim)

    def counts(self, *kinds):
        """Calls of a repair without faults."""
        self.make()
        page = Page(self.page)
        page.arm(None, 0)
        self.repair(page=page)
        counts = [page.count(kind) for kind in kinds]
        page.close()
        return counts

    def left(self):
        return {name: data for name, data in contents(self.folder).items() if not name.startswith(".")}

    def finish(self):
        """What is wrong with the next repair, if anything."""
        ran = self.repair()
        return None if ran.status == 0 and contents(self.folder) == self.want else f"not finished afterwards: {ran} {sorted(contents(self.folder))}"


def kills(broken):
    """Killed before any step, and again in the repair that follows: verify sees that it is broken, or it is whole; the next one finishes it."""
    (steps,), unfinished, wrong = broken.counts("step"), 0, []
    for step in spread(steps, KILLS):
        broken.make()
        for stop in (step, 1 + step // 2):
            broken.repair(stop=f"{stop} kill")
        accepted = run(TPSHARD, "verify", "--quiet", broken.folder)[0] == 0
        unfinished += not accepted
        if accepted and broken.left() != broken.want:
            wrong.append(f"before step {step}: accepted, though not whole")
        if what := broken.finish():
            wrong.append(f"before step {step}: {what}")
    check(f"kills before {KILLS} of {steps} steps, {unfinished} of them leave something to do", not wrong and unfinished, "; ".join(wrong[:3]))


def failing_system(broken):
    """Want of memory and a checkpoint that cannot be read say nothing of the checkpoint: exit status 8 and 5, never 4; the next repair finishes."""
    (allocations, reads), wrong, seen = broken.counts("alloc", "pread"), [], set()
    cases = [("alloc", n, errno.ENOMEM, "", 8) for n in spread(allocations, 2 * KILLS)]
    cases += [("pread", n, errno.EIO, "always", 5) for n in spread(reads, KILLS)]
    for kind, number, error, how, status in cases:
        broken.make()
        ran = broken.repair(fail=f"{kind} {number} {error} {how}")
        seen.add(ran.status)
        if ran.status not in (0, status):
            wrong.append(f"{kind} {number} {how}: {ran}")
        if what := broken.finish():
            wrong.append(f"{kind} {number} {how}: {what}")
    check(f"{len(cases)} failures of the operating system", not wrong and {5, 8} <= seen, f"{len(wrong)} wrong, {seen} seen: " + "; ".join(wrong[:3]))


def changing_leaf(work, whole):
    """What verify reads wrong once and right the second time is not silently taken for right."""
    words = (TPSHARD, "verify", "--quiet", "--threads", 1, whole)
    page = Page(work / "page")
    page.arm(None, 0)
    io_shim_help.run(*words, page=page)
    reads, said, wrong = page.count("pread"), 0, []
    page.close()
    for number in spread(reads, KILLS):
        ran = io_shim_help.run(*words, fail=f"pread {number} {errno.EIO}")
        said += "right the second time" in ran.err
        if ran.status not in (4, 5):
            wrong.append(f"read {number}: {ran}")
    check("a disk that is not to be relied on", not wrong and said, f"{said} said; " + "; ".join(wrong[:3]))


def main():
    if not TPSHARD.exists():
        print(f"SKIP no {TPSHARD}: build it first")
        return 77
    with tempfile.TemporaryDirectory(dir=BUILD / "tests", prefix="test_repair.") as folder:
        work = Path(folder)
        repair_kind(work, "int4, 2 ranks", MODEL, "--tp", "2", "--quant", "int4")
        repair_kind(work, "compressed bf16 experts, 3 ranks", FAMILIES / "mixtral", "--tp", "3", "--experts", "ep", "--zstd")
        if not QUICK:
            repair_kind(work, "compressed bf16, 1 rank", MODEL, "--zstd", from_copies=False)
            repair_kind(work, "fp8, latent attention, experts", FAMILIES / "deepseek_v3", "--tp", "2", "--quant", "fp8", from_copies=False)
            repair_kind(work, "GPTQ with act-order, kept", IMPORTS / "gptq_act_order", "--tp", "2", from_copies=False)
            repair_kind(work, "MXFP4 experts, kept", IMPORTS / "gpt_oss", "--tp", "1", from_copies=False)
            repair_kind(work, "AWQ, kept, head int8", IMPORTS / "awq", "--tp", "3", "--head", "int8", from_copies=False)
        whole = work / "whole"
        convert(MODEL, whole, "--tp", "2", "--quant", "int4")
        figures(work, whole)
        pasted_command(work, whole)
        refusals(work, whole)
        strange_files(work, whole)
        if SHIM.exists():
            kills(Broken(work, whole, everything))
            failing_system(Broken(work, whole, one_bit, a_bit_of_a_head, extras))
            changing_leaf(work, whole)
        else:
            case_help.skip("kills and failures", "sanitizers take calls of these names for themselves")
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""SHA256SUMS: written by tpshard sums, read by sha256sum -c and tpshard verify --sha256 alike, signed and checked with ssh-keygen; every way in which
list and files can differ is found; a new model over a signed one leaves neither list nor signature.

Standard library only; the part about signatures wants ssh-keygen.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import case_help
from case_help import check, expect_run, must, run, skip

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD = BUILD / "tpshard"
SOURCE = Path("tests/golden/families/mixtral")


def sha256sum(folder):
    return subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0


def test_list(folder):
    expect_run("no list yet", 4, "there is no such list", TPSHARD, "verify", "--sha256", folder)
    status, out, err = run(TPSHARD, "sums", "--json", folder)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    want = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    check("the list names every file, sorted", status == 0 and lines == want, err + repr(lines))
    check("sums --json", json.loads(out)["files"] == len(names), out)
    check("sha256sum -c", sha256sum(folder))
    expect_run("verify --sha256", 0, "every SHA-256 is that of SHA256SUMS", TPSHARD, "verify", "--sha256", folder)
    before = (folder / "SHA256SUMS").read_bytes()
    for threads in (1, 3):
        run(TPSHARD, "sums", "--threads", threads, folder)
        check(f"the same list with {threads} threads", (folder / "SHA256SUMS").read_bytes() == before)


def change(folder, name, old, new):
    path = folder / name
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


DIFFERENCES = [
    ("what XXH3 does not cover", "its SHA-256 is", lambda folder: change(folder, "model.json", b'"tool": "tpshard', b'"tool": "tpshorn')),
    ("a missing file", "cannot open", lambda folder: (folder / "rank-01-of-02.tpshard").unlink()),
    ("a changed file", "its SHA-256 is", lambda folder: change(folder, "config.json", b"silu", b"gelu")),
    ("a file too many of a name of ours", "does not name it", lambda folder: (folder / "rank-02-of-03.tpshard").write_text("")),
    ("a tokenizer too many", "does not name it", lambda folder: (folder / "tokenizer.bin").write_text("")),
    ("a list too short", "it does not name rank-01-of-02.tpshard", lambda folder: change(
        folder, "SHA256SUMS", [line for line in (folder / "SHA256SUMS").read_bytes().splitlines(True) if b"rank-01" in line][0], b"")),
    ("a list too long", "which model.json does not", lambda folder: (folder / "SHA256SUMS").open("a").write("0" * 64 + "  notes.txt\n")),
    ("a line twice", "twice", lambda folder: (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text() * 2)),
    ("a path in the list", "which model.json does not", lambda folder: change(folder, "SHA256SUMS", b"  config.json", b"  ./config.json")),
    ("no list at all", "is not a SHA-256 and a name", lambda folder: (folder / "SHA256SUMS").write_text("signed, me\n")),
    ("a short checksum", "is not a SHA-256 and a name", lambda folder: change(folder, "SHA256SUMS", b"  config", b" config")),
    ("capital digits", "is not a SHA-256 and a name", lambda folder: (folder / "SHA256SUMS").write_text((folder / "SHA256SUMS").read_text().upper())),
    ("an empty list", "it does not name model.json", lambda folder: (folder / "SHA256SUMS").write_text("")),
    ("a NUL byte", "NUL", lambda folder: (folder / "SHA256SUMS").write_bytes(b"\0" + (folder / "SHA256SUMS").read_bytes())),
    ("another checksum", "SHA256SUMS says", lambda folder: change(folder, "SHA256SUMS", b"\n", b"\n" + b"0" * 64 + b"  model.json\n")),
]


def test_differences(work, folder):
    for name, words, differ in DIFFERENCES:
        copy = work / "copy"
        shutil.copytree(folder, copy)
        differ(copy)
        expect_run(f"{name} is found", 4, words, TPSHARD, "verify", "--sha256", copy)
        shutil.rmtree(copy)
    copy = work / "copy"
    shutil.copytree(folder, copy)
    change(copy, "SHA256SUMS", b"  config", b" *config")
    (copy / "README.md").write_text("about the model")
    expect_run("binary marks and foreign files do no harm", 0, "ok", TPSHARD, "verify", "--sha256", copy)
    (copy / "README.md").unlink()
    data = bytearray((copy / "rank-00-of-02.tpshard").read_bytes())
    data[-5000] ^= 1
    (copy / "rank-00-of-02.tpshard").write_bytes(data)
    before = (copy / "SHA256SUMS").read_bytes()
    expect_run("nothing broken is listed", 4, "checksum mismatch", TPSHARD, "sums", copy)
    check("and the old list stays", (copy / "SHA256SUMS").read_bytes() == before)
    shutil.rmtree(copy)


def test_signature(work, folder):
    """As README describes it."""
    if not shutil.which("ssh-keygen"):
        skip("signatures", "no ssh-keygen here")
        return
    key, signers, signature = work / "key", work / "allowed_signers", folder / "SHA256SUMS.sig"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "publisher@example.org", "-f", key)
    signers.write_text("publisher@example.org " + (work / "key.pub").read_text())
    status, _, err = run("ssh-keygen", "-Y", "sign", "-f", key, "-n", "file", folder / "SHA256SUMS")
    check("ssh-keygen -Y sign", status == 0 and signature.exists(), err)

    def checked():
        with open(folder / "SHA256SUMS", encoding="utf-8") as listed:
            return run("ssh-keygen", "-Y", "verify", "-f", signers, "-I", "publisher@example.org", "-n", "file", "-s", signature, stdin=listed)
    status, out, err = checked()
    check("ssh-keygen -Y verify", status == 0 and "Good" in out, out + err)
    expect_run("the signature is no stray file", 0, "ok", TPSHARD, "verify", "--sha256", folder)
    status, _, err = run(TPSHARD, "sums", folder)
    check("the same list again leaves the signature valid, and says nothing", status == 0 and checked()[0] == 0 and "signature" not in err, err)
    change(folder, "SHA256SUMS", b"  config", b" *config")
    check("a changed list is refused", checked()[0] != 0)
    for name in ("SHA256SUMS.asc", "SHA256SUMS.minisig"):
        (folder / name).write_text("a signature")
    status, _, err = run(TPSHARD, "sums", folder)
    check("another list than the one that was signed: each signature is named", status == 0 and err.count("does not fit the new one") == 3, err)


def test_replacing(folder):
    """convert --force takes list and signature away with the model that they were of."""
    (folder / ".SHA256SUMS.tmp-123-0").write_text("what a crash leaves")
    (folder / ".rank.tmp-1-0").write_text("of somebody else")
    expect_run("a foreign file is not ours", 2, ".rank.tmp-1-0", TPSHARD, "convert", "--force", "--quiet", SOURCE, folder)
    (folder / ".rank.tmp-1-0").unlink()
    expect_run("convert --force over a signed directory", 0, "", TPSHARD, "convert", "--force", "--quiet", "--quant", "int8", SOURCE, folder)
    check("neither list nor signature stays", not list(folder.glob("*SHA256SUMS*")), str(list(folder.iterdir())))
    expect_run("and there is no list to check", 4, "there is no such list", TPSHARD, "verify", "--sha256", folder)


def main():
    if not TPSHARD.exists():
        print(f"SKIP no {TPSHARD}: build it first")
        return 77
    with tempfile.TemporaryDirectory(dir=BUILD / "tests", prefix="test_sums.") as name:
        work = Path(name)
        folder = work / "shards"
        must(TPSHARD, "convert", "--quiet", "--tp", "2", SOURCE, folder)
        test_list(folder)
        test_differences(work, folder)
        test_signature(work, folder)
        test_replacing(folder)
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

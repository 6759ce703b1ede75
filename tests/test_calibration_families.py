#!/usr/bin/env python3
"""Calibration of every family of tests/golden/families: statistics of each input that its matrices multiply (experts, latents, norms behind the
blocks), weights that are the same whether they are cut before or after, and equal to the checkpoint with its statistics. The models come without a
tokenizer: here they get one of single letters.
"""
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import case_help
from case_help import check, run

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
FAMILIES = Path("tests/golden/families")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What stands for the others: each differs from these in numbers alone, as far as calibration goes.
CHOSEN = ("deepseek_v2", "deepseek_v2_lite", "gemma3", "glm4_moe", "gpt_oss", "llama32_tied", "llama_odd", "mixtral", "olmo2", "qwen2_moe")


def write_tokenizer(folder):
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "vocab": vocabulary, "merges": []}}))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def calibrate(name, work, text):
    model, stats = work / name, work / f"{name}.stats"
    shutil.copytree(FAMILIES / name, model)
    write_tokenizer(model)
    quant = ("--quant", "int4", "--group-size", "32", "--quiet")
    status, _, err = run(TPSHARD, "convert", *quant, "--calib", text, "--calib-stats", stats, "--tp", 2, model, work / f"{name}-2")
    check(f"{name}: convert --calib", status == 0, err)
    if status:
        return
    status, _, err = run(TPSHARD, "convert", *quant, "--calib-stats", stats, model, work / f"{name}-1")
    check(f"{name}: the same statistics, one rank", status == 0, err)
    status, _, err = run(TPSHARD, "reshard", "--quiet", "--tp", 2, work / f"{name}-1", work / f"{name}-r")
    check(f"{name}: slices commute", status == 0 and files_of(work / f"{name}-r") == files_of(work / f"{name}-2"), err)
    status, _, err = run(TPSHARD, "verify", "--quiet", "--against", model, "--calib-stats", stats, work / f"{name}-2")
    check(f"{name}: equal to the checkpoint", status == 0, err)
    plain = work / f"{name}-plain"
    run(TPSHARD, "convert", *quant, "--tp", 2, model, plain)
    ours, theirs = files_of(work / f"{name}-2"), files_of(plain)
    check(f"{name}: other codes than without", any(ours[file] != theirs[file] for file in ours if file.endswith(".tpshard")), "")


def main():
    if not TPSHARD.exists() or not TPENGINE.exists():
        print(f"SKIP test_calibration_families: no {TPSHARD}")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = work / "text"
        text.write_text("".join(LETTERS[(i * i * 7 + i // 5) % 26] for i in range(900)))
        for name in CHOSEN:
            calibrate(name, work, text)
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Shard directories of every released version of the format, good and bad, for tests/test_golden_shards.py: what was written once is read for ever.

Needs: the Python module xxhash, and build/tpshard and build/tpengine of the version whose goldens are made.

    python3 scripts/make_goldens_shards.py tests/golden/shards

For a released version the files are made once, and then never again: run it only when the format gets a new version or a new feature, under a new
PREFIX. Each good directory is a .tar.xz; golden.json holds, for each, the prompt and the greedy tokens, which no near tie decides: all kernels of
this machine agree on them. bad.json holds what is wrong with a bad directory: a good one, and what is written over
it; and the exit statuses and words of tpshard verify and tpengine generate.

Weights take four values in a matrix, so that 250 kB hold eight models.
"""
import io
import json
import lzma
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import xxhash

PREFIX = "v2"
BUILD = Path(os.environ.get("BUILD", "build"))
FAMILIES = Path("tests/golden/families")
PROMPT, TOKENS = "In the beginning", 12
WORDS = 272  # of the tokenizer; the rows of a larger vocabulary behind them are zero

# Name, checkpoint of tests/golden/families whose config and shapes it takes, size of the vocabulary, options of tpshard convert.
CASES = [
    ("int4-tp2", "llama_yarn", 32768, ["--tp", "2", "--quant", "int4", "--group-size", "32"]),
    ("int8-tp3", "phi3", WORDS, ["--tp", "3", "--quant", "int8"]),
    ("fp8-tp1", "llama_yarn", WORDS, ["--quant", "fp8"]),
    ("nvfp4-tp2", "ministral", WORDS, ["--tp", "2", "--quant", "nvfp4"]),
    ("bf16-experts-whole-tp2", "mixtral", WORDS, ["--tp", "2", "--experts", "ep"]),
    ("int8-latent-experts-tp2", "deepseek_v2_lite", WORDS, ["--tp", "2", "--quant", "int8"]),
    ("bf16-zstd-tp2", "llama_yarn", 32768, ["--tp", "2", "--zstd"]),
    ("int4-zstd-experts-tp1", "mixtral", WORDS, ["--quant", "int4", "--group-size", "128", "--zstd"]),
]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def byte_letters():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, others = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + others)
            others += 1
    return letters


def tokenizer():
    letters = byte_letters()
    merges = ["t h", "th e", "i n", "Ġ the", "e r", "a n", "Ġ b", "o n"]
    texts = [letters[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    added = [{"id": len(texts) + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, text in enumerate(["<s>", "</s>"])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": {text: i for i, text in enumerate(texts)}, "merges": merges}}


def bf16(value):
    return struct.pack("<f", value)[2:]


def random_tensor(chance, name, dtype, shape):
    """Norms near 1; weights of a matrix take four values."""
    if len(shape) == 1:
        values = [chance.choice((0.75, 1.0, 1.25)) if "norm" in name else chance.choice((-0.03125, 0.03125)) for _ in range(shape[0])]
        return b"".join(struct.pack("<f", value) if dtype == "F32" else bf16(value) for value in values)
    rows = 1
    for size in shape[:-1]:
        rows *= size
    cols, out = shape[-1], []
    for row in range(rows):
        if row >= WORDS and shape[0] > WORDS:
            out.append(bytes(2 * cols * (rows - row)))
            break
        scale = 2.0 ** round(math.log2(0.4 / cols**0.5))
        four = [bf16(scale * unit) for unit in (-4, -1, 1, 4)]  # all have the same low byte
        out.append(b"".join(four[chance.getrandbits(2)] for _ in range(cols)))
    return b"".join(out)


def write_checkpoint(folder, family, vocabulary, seed):
    """The family's config and shapes with another vocabulary and other weights."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    config = json.loads((FAMILIES / family / "config.json").read_text())
    data = (FAMILIES / family / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    old_vocabulary, header, out = config["vocab_size"], {}, io.BytesIO()
    config.update(vocab_size=vocabulary, bos_token_id=WORDS - 8, eos_token_id=WORDS - 7)
    for name, entry in sorted(json.loads(data[8:8 + length]).items()):
        if name == "__metadata__":
            continue
        shape = entry["shape"]
        if "embed_tokens" in name or "lm_head" in name:
            assert shape[0] == old_vocabulary
            shape[0] = vocabulary
        begin = out.tell()
        out.write(random_tensor(chance, name, entry["dtype"], shape))
        header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, out.tell()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": WORDS - 7}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + out.getvalue())


# ---- good directories ------------------------------------------------------------------------------------------------


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


def tokens(shards, *options):
    status, out, err = run(BUILD / "tpengine", "generate", shards, "--prompt", PROMPT, "--max-tokens", TOKENS, "--temperature", "0", "--ids",
                           "--ignore-eos", "--quiet", *options)
    if status != 0:
        raise RuntimeError(f"{shards}: {err}")
    return out.strip()


def agreed_tokens(shards):
    """The tokens on which all kernels agree, or None."""
    answer = tokens(shards)
    others = [("--backend", name) for name in ("scalar", "avx2", "avx512", "avx512bf16")]
    return answer if all(tokens(shards, *options) == answer for options in others) else None


def make_good(work, name, family, vocabulary, options):
    for seed in range(1, 200):
        shutil.rmtree(work, ignore_errors=True)
        write_checkpoint(work / "model", family, vocabulary, seed)
        status, _, err = run(BUILD / "tpshard", "convert", "--quiet", *options, work / "model", work / "shards")
        if status != 0:
            raise RuntimeError(f"{name}: {err}")
        answer = agreed_tokens(work / "shards")
        if answer and len(set(answer.replace(",", " ").split())) > 3:
            return work / "shards", answer
    raise RuntimeError(f"{name}: no seed gives clear tokens")


def pack(folder, path):
    """The same bytes every time."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(folder.iterdir()):
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            with open(file, "rb") as data:
                tar.addfile(info, data)
    path.write_bytes(lzma.compress(archive.getvalue(), preset=9 | lzma.PRESET_EXTREME))


# ---- bad directories -------------------------------------------------------------------------------------------------

HASH, FEATURES, VERSION, RESERVED, CONTRACT = 256, 16, 8, 120, 128


def head_of(data):
    (payload_offset,) = struct.unpack_from("<Q", data, 96)
    head = bytearray(data[:payload_offset])
    return head


def rehashed(head, *changes):
    """The changes, and the hash of the head that goes with them, as (offset, bytes)."""
    for offset, new in changes:
        head[offset:offset + len(new)] = new
    head[HASH:HASH + 16] = bytes(16)
    return [*changes, (HASH, xxhash.xxh3_128_digest(bytes(head)))]


def bad_directories(folders):
    """Name, good directory, file, changes [(offset, bytes)], other actions, words of the refusal."""
    first, second = "rank-00-of-02.tpshard", "rank-01-of-02.tpshard"
    plain, zipped = folders["int4-tp2"], folders["bf16-zstd-tp2"]
    data = (plain / first).read_bytes()
    head = head_of(data)
    (payload_offset,) = struct.unpack_from("<Q", data, 96)
    (leaves_offset,) = struct.unpack_from("<Q", data, 80)
    manifest = (plain / "model.json").read_text()

    def edited(old, new):
        assert manifest.count(old) >= 1, old
        return manifest.replace(old, new, 1)
    cases = [
        ("a flipped bit of a weight", "int4-tp2", first, [(payload_offset + 4321, bytes([data[payload_offset + 4321] ^ 4]))], {},
         "checksum mismatch"),
        ("a flipped bit of the last byte", "int4-tp2", second, [(len(data) - 1, b"\1")], {}, "checksum mismatch"),
        ("a page of zeros", "int4-tp2", first, [(payload_offset + 8192, bytes(4096))], {}, "checksum mismatch"),
        ("a flipped bit of the index", "int4-tp2", first, [(350, bytes([head[350] ^ 1]))], {}, "checksum mismatch in its head"),
        ("a flipped bit of the checksums", "int4-tp2", first, [(leaves_offset, bytes([head[leaves_offset] ^ 128]))], {},
         "checksum mismatch in its head"),
        ("a flipped bit of the head's padding", "int4-tp2", first, [(payload_offset - 1, b"\x10")], {}, "checksum mismatch in its head"),
        ("another magic", "int4-tp2", first, [(0, b"TPSHARD\r")], {}, "not a rank file"),
        ("a later version", "int4-tp2", first, rehashed(head_of(data), (VERSION, b"\3\0\0\0")), {}, "rank file version 3"),
        ("an earlier version", "int4-tp2", first, rehashed(head_of(data), (VERSION, b"\1\0\0\0")), {}, "rank file version 1"),
        ("a feature that must be known", "int4-tp2", first, rehashed(head_of(data), (FEATURES, b"\0\0\0\x80")), {}, "needs features 0x80000000"),
        ("a reserved field in use", "int4-tp2", first, rehashed(head_of(data), (RESERVED, b"\1")), {}, "reserved field"),
        ("another head, rightly hashed", "int4-tp2", first, rehashed(head_of(data), (FEATURES + 4, b"\1")), {}, "checksum"),
        ("another contract", "int4-tp2", first, rehashed(head_of(data), (CONTRACT, bytes(16))), {}, "contract"),
        ("truncated", "int4-tp2", second, [], {"resize": len(data) - 4096}, "incomplete copy"),
        ("truncated in the head", "int4-tp2", second, [], {"resize": 300}, "truncated"),
        ("grown", "int4-tp2", second, [], {"resize": len(data) + 4096}, "an incomplete copy or other bytes"),
        ("empty", "int4-tp2", second, [], {"resize": 0}, "truncated"),
        ("missing", "int4-tp2", second, [], {"remove": True}, second),
        ("the other rank's", "int4-tp2", first, [], {"copy": second}, "files were mixed up"),
        ("of another run", "int4-tp2", first, [], {"from": "bf16-zstd-tp2"}, "contract"),
        ("a damaged extra", "int4-tp2", "tokenizer.bin", [(100, b"\xff\xee")], {}, "tokenizer.bin"),
        ("a missing extra", "int4-tp2", "tokenizer.bin", [], {"remove": True}, "tokenizer.bin"),
        ("no manifest", "int4-tp2", "model.json", [], {"remove": True}, "no model.json"),
        ("a manifest of a later version", "int4-tp2", "model.json", [], {"text": edited('"version": 2', '"version": 3')},
         "shard directory version 3"),
        ("an edited manifest", "int4-tp2", "model.json", [], {"text": edited('"num_layers": ', '"num_layers": 1')}, "model.json"),
        ("a key that is not known", "int4-tp2", "model.json", [], {"text": edited('"tool"', '"tools"')}, "tools"),
        ("a manifest that breaks off", "int4-tp2", "model.json", [], {"resize": 700}, "model.json"),
        ("another length", "int4-tp2", "model.json", [], {"text": edited(f'"bytes": {len(data)}', f'"bytes": {len(data) + 4096}')},
         f"has {len(data)} bytes, the manifest says"),
        ("another root", "int4-tp2", "model.json", [], {"text": swap_roots(manifest)}, "checksum"),
    ]
    zipped_data = (zipped / first).read_bytes()
    (zipped_payload,) = struct.unpack_from("<Q", zipped_data, 96)
    (zipped_leaves, leaf_count) = struct.unpack_from("<QQ", zipped_data, 80)
    table = zipped_leaves + 8 * leaf_count
    cases += [
        ("compressed: a flipped bit", "bf16-zstd-tp2", first, [(zipped_payload + 20, bytes([zipped_data[zipped_payload + 20] ^ 1]))], {},
         "checksum mismatch"),
        ("compressed: a flipped bit of the lengths", "bf16-zstd-tp2", first, [(table, bytes([zipped_data[table] ^ 1]))], {},
         "checksum mismatch in its head"),
        ("compressed: a code that is not known", "bf16-zstd-tp2", first, rehashed(head_of(zipped_data), (table + 4, b"\x77")), {},
         "impossible code or length"),
        ("compressed: a length of nothing", "bf16-zstd-tp2", first, rehashed(head_of(zipped_data), (table, bytes(4))), {},
         "impossible code or length"),
        ("compressed: truncated", "bf16-zstd-tp2", first, [], {"resize": len(zipped_data) - 4096}, "incomplete copy"),
    ]
    return cases


def swap_roots(manifest):
    """The roots of the two rank files change places."""
    roots = [file["xxh3_128"] for file in json.loads(manifest)["ranks"]]
    return manifest.replace(roots[0], "?").replace(roots[1], roots[0]).replace("?", roots[1])


def as_json(case, folders):
    name, of, file, changes, action, words = case
    gone = action.get("remove") and file != "model.json"  # nothing is known of it but that it cannot be opened
    entry = {"name": name, "of": of, "file": file, "verify": [4, words], "generate": [5 if gone else 4, words]}
    if changes:
        entry["write"] = [[offset, new.hex()] for offset, new in changes]
    if "text" in action:  # only what differs
        old, new = (folders[of] / file).read_bytes(), action["text"].encode()
        begin = next(i for i in range(min(len(old), len(new))) if old[i] != new[i])
        end = next(i for i in range(1, min(len(old), len(new))) if old[-i] != new[-i]) - 1
        entry["splice"] = [begin, len(old) - end - begin, new[begin:len(new) - end].decode()]
    entry.update({key: value for key, value in action.items() if key != "text"})
    return entry


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/shards") / PREFIX
    if out.exists():
        sys.exit(f"{out} is there: goldens of a version are made once; remove it if you mean it")
    out.mkdir(parents=True)
    good, folders = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, family, vocabulary, options in CASES:
            folders[name], answer = make_good(Path(temporary) / name, name, family, vocabulary, options)
            pack(folders[name], out / f"{name}.tar.xz")
            good[name] = {"prompt": PROMPT, "tokens": answer}
            print(name, answer, (out / f"{name}.tar.xz").stat().st_size)
        bad = [as_json(case, folders) for case in bad_directories(folders)]
    (out / "golden.json").write_text(json.dumps(good, indent=1) + "\n")
    (out / "bad.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in bad) + "\n]\n")


if __name__ == "__main__":
    main()

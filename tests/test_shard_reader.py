#!/usr/bin/env python3
"""Shard directories read by the second reader (shard_reader.py): what the C code writes obeys the specification, the
weights are those of the source, and damage is refused. BUILD names the build folder (default: build)."""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "tests"))
try:
    import shard_reader
except ModuleNotFoundError as why:
    print(f"SKIP test_shard_reader: no Python module {why.name}; scripts/setup installs it")
    sys.exit(77)

BUILD = os.path.abspath(os.environ.get("BUILD", "build"))
MODEL = os.path.join(ROOT, "tests", "model")
FAMILIES = os.path.join(ROOT, "tests", "golden", "families")

# Relative root mean square error of a whole tensor against its source: wide enough for any trained weights, and far
# below what a wrong order, sign or scale would give (about 100 %).
ERROR_LIMITS = {"f32": 0, "bf16": 0, "int8": 0.03, "fp8": 0.035, "int4": 0.16}

number = failures = 0


def report(ok, name, detail=""):
    global number, failures
    number += 1
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {number} - {name}")
    if not ok and detail:
        print(f"# {detail}")


def compare(file, tensor, source_row):
    """Relative error of a stored tensor; source_row(name, row, begin, end) gives a piece of a row of the checkpoint."""
    stored = file.dequantize(tensor)
    wanted = []
    for part in tensor["parts"]:
        begin, end = part["col_begin"], part["col_begin"] + part["cols"]
        rows = [source_row(part["source"], part["row_begin"] + row, begin, end) for row in range(part["rows"])]
        if tensor["role"] in shard_reader.MATRICES:
            wanted += rows
        else:
            wanted = [(wanted[0] if wanted else []) + rows[0]]
    error = power = 0.0
    for stored_row, wanted_row in zip(stored, wanted, strict=True):
        for a, b in zip(stored_row, wanted_row, strict=True):
            error += (a - b) ** 2
            power += b * b
    return (error / power) ** 0.5 if power else error


def check_weights(files, source_row, wanted=lambda tensor: True):
    """Every kind that was seen, and the tensors whose error is out of bounds."""
    kinds, wrong = set(), []
    for file in files:
        for tensor in filter(wanted, file.tensors):
            if tensor["parts"]:
                error = compare(file, tensor, source_row)
                kinds.add(tensor["kind"])
                if not error <= ERROR_LIMITS[tensor["kind"]]:
                    wrong.append(f"{tensor['role']} {tensor['layer']} of rank {file.rank}: error {error}")
    return kinds, "; ".join(wrong)


def refused(folder):
    """The reader as a program: exit status 1 and one line."""
    run = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "shard_reader.py"), folder], capture_output=True,
                         text=True, check=False)
    return run.returncode == 1 and run.stderr.count("\n") == 1


# ---- the small directory of test_shard_file --------------------------------------------------------------------------

FORMULA_SOURCES = ["embed", "input_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "o", "post_norm", "gate", "up",
                   "down", "norm", "lm_head", "router", "experts[0]", "experts[1]"]


def formula_row(name, row, begin, end):
    seed = FORMULA_SOURCES.index(name) * 17
    return [((row * 131 + col * 71 + row * col % 97 + seed) % 251 - 125) / 1024 for col in range(begin, end)]


def test_formula_model(folder, compressed):
    writer = os.path.join(BUILD, "tests", "test_shard_file")
    name = "the compressed directory" if compressed else "the directory"
    if not os.path.exists(writer):
        print(f"ok - {name} # SKIP no {writer}")
        return
    if compressed and not shard_reader.LIBZSTD:
        print(f"ok - {name} # SKIP no libzstd.so.1")
        return
    subprocess.run([writer, "--write-compressed" if compressed else "--write", folder], check=True)
    try:
        _manifest, files = shard_reader.read_directory(folder)
    except shard_reader.Refused as why:
        report(False, f"{name} of test_shard_file is accepted", why)
        return
    report(any(file.codes != [shard_reader.RAW] for file in files) == compressed,
           f"{name} of test_shard_file is accepted", [file.codes for file in files])
    # The formula's values are uniform, worse than a bell curve for int4 by the width of the outer codes.
    kinds, wrong = check_weights(files, formula_row)
    report(not wrong, f"{name}: its weights are those of the formula", wrong)
    report(kinds == set(ERROR_LIMITS), f"{name} holds every kind of weight that tpshard quantizes to", kinds)
    inv_freq = files[0].dequantize(files[0].find("rope_inv_freq"))[0]
    report(all(abs(value * (i + 1) - 1) < 1e-6 for i, value in enumerate(inv_freq)), f"{name}: its rope table is computed")
    whole = files[0].dequantize(files[0].find("embedding")) + files[1].dequantize(files[1].find("embedding"))
    report(whole == [formula_row("embed", row, 0, 128) for row in range(300)], f"{name}: the ranks' embeddings are the whole")
    test_damage(folder)


def test_damage(folder):
    """Each kind of damage is seen by the reader, and each is repaired before the next."""
    rank = os.path.join(folder, "rank-01-of-02.tpshard")
    other = os.path.join(folder, "rank-00-of-02.tpshard")
    manifest = os.path.join(folder, "model.json")
    note = os.path.join(folder, "note.txt")

    def patch(path, change):
        with open(path, "rb") as file:
            data = bytearray(file.read())
        data = change(data) or data
        with open(path, "wb") as file:
            file.write(data)

    def flip(offset):
        def change(data):
            data[offset] ^= 1 << random.randrange(8)
        return change

    def edit(**values):
        def change(data):
            return json.dumps({**json.loads(data), **values}).encode()
        return change

    random.seed(1)
    size = os.path.getsize(rank)
    cases = [(f"byte {offset} of a rank file", rank, flip(offset))
             for offset in [0, 8, 20, 24, 100, 130, 150, 210, 250, 300, 318, 360, 2000, 2 * shard_reader.MIB - 1,
                            2 * shard_reader.MIB, (2 * shard_reader.MIB + size) // 2, size - 1]]
    cases += [("last page cut", rank, lambda data: data[:-4096]),
              ("a page too many", rank, lambda data: data + bytes(4096)),
              ("another rank's file", rank, lambda data: open(other, "rb").read()),
              ("an extra", note, flip(3)),
              ("manifest, byte", manifest, flip(300)),
              ("manifest, tp_size", manifest, edit(tp_size=1)),
              ("manifest, unknown key", manifest, edit(note=1)),
              ("manifest, contract", manifest, edit(contract="0" * 32))]
    for name, path, change in cases:
        shutil.copy(path, path + ".good")
        patch(path, change)
        report(refused(folder), f"damage is refused: {name}")
        os.rename(path + ".good", path)
    for path in (rank, note, manifest):
        os.rename(path, path + ".gone")
        report(refused(folder), f"a missing file is refused: {os.path.basename(path)}")
        os.rename(path + ".gone", path)
    report(not refused(folder), "the repaired directory is accepted")


# ---- the bundled model, written by tpshard ---------------------------------------------------------------------------


class Safetensors:
    def __init__(self, path):
        with open(path, "rb") as file:
            data = file.read()
        (header_bytes,) = struct.unpack_from("<Q", data)
        self.tensors = json.loads(data[8:8 + header_bytes])
        self.data = data[8 + header_bytes:]

    def row(self, name, row, begin, end):
        tensor = self.tensors[name]
        assert tensor["dtype"] == "BF16", "the bundled model is bf16"
        cols = tensor["shape"][-1]
        at = tensor["data_offsets"][0] + 2 * (row * cols + begin)
        values = struct.unpack_from(f"<{end - begin}H", self.data, at)
        return [shard_reader.f32_from_bits(bits << 16) for bits in values]

    def covered(self, files):
        """Source tensors of which an element stands in no rank file."""
        missing = []
        for name, tensor in self.tensors.items():
            if name == "__metadata__":
                continue
            rows, cols = ([1] + tensor["shape"])[-2:]
            elems = set()
            for file in files:
                for part in (part for tensor in file.tensors for part in tensor["parts"] if part["source"] == name):
                    assert (part["source_rows"], part["source_cols"]) == (rows, cols), f"{name}: shape of the source"
                    elems.add((part["row_begin"], part["rows"], part["col_begin"], part["cols"]))
            # Cuts go through rows or through columns, and a replicated part is one and the same rectangle.
            if sum(part_rows * part_cols for _, part_rows, _, part_cols in elems) != rows * cols:
                missing.append(name)
        return missing


def test_bundled_model(folder):
    program = os.path.join(BUILD, "tpshard")
    checkpoint = os.path.join(MODEL, "model.safetensors")
    for path in (program, checkpoint):
        if not os.path.exists(path):
            print(f"ok - bundled model # SKIP no {path}")
            return
    source = Safetensors(checkpoint)
    compressed = [(quant, ["--zstd"]) for quant in ("none", "fp8") if shard_reader.LIBZSTD]
    for quant, more in [(quant, []) for quant in ("none", "int8", "fp8", "int4")] + compressed:
        out = os.path.join(folder, quant + "".join(more))
        run = subprocess.run([program, "--tp", "2", "--quant", quant, *more, MODEL, out], capture_output=True, text=True,
                             check=False)
        if run.returncode:
            report(False, f"tpshard --quant {quant}", run.stderr.strip())
            continue
        try:
            _manifest, files = shard_reader.read_directory(out)
        except shard_reader.Refused as why:
            report(False, f"{quant}: the directory is accepted", why)
            continue
        report(True, f"{quant}: the directory is accepted")
        missing = source.covered(files)
        report(not missing, f"{quant}: every weight of the checkpoint stands in a rank file", missing)
        # One layer, and for two of the four what stands outside the layers: the rest is made alike.
        layers = (-1, 2) if quant in ("none", "int4") else (2,)
        kinds, wrong = check_weights(files, source.row, lambda tensor, layers=layers: tensor["layer"] in layers)
        report(not wrong, f"{quant}: weights are those of the checkpoint", wrong)
        linear = {"none": "bf16"}.get(quant, quant)
        report(linear in kinds, f"{quant}: linear weights are {linear}", kinds)


# ---- families: what stands in a rank file is what the checkpoint means -----------------------------------------------


class Family:
    """A small checkpoint, each matrix as it is multiplied: [outputs, inputs], gate in front of up, norms ready."""

    def __init__(self, name):
        self.name = name
        with open(os.path.join(FAMILIES, name, "model.safetensors"), "rb") as file:
            data = file.read()
        (header_bytes,) = struct.unpack_from("<Q", data)
        self.entries = json.loads(data[8:8 + header_bytes])
        self.data = data[8 + header_bytes:]
        self.views = {}

    def tensor(self, name):
        """Nested lists."""
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "F32":
            flat = struct.unpack(f"<{(end - begin) // 4}f", self.data[begin:end])
        else:
            assert entry["dtype"] == "BF16", entry
            flat = [shard_reader.f32_from_bits(bits << 16)
                    for bits in struct.unpack(f"<{(end - begin) // 2}H", self.data[begin:end])]
        for size in reversed(entry["shape"][1:]):
            flat = [flat[i:i + size] for i in range(0, len(flat), size)]
        return flat

    def view(self, name):
        if name not in self.views:
            stack, _, index = name.rstrip("]").partition("[")
            rows = self.tensor(stack)
            if index:
                rows = rows[int(index)]
            rows = rows if isinstance(rows[0], (list, tuple)) else [rows]
            if self.name == "gpt_oss" and index:
                if "bias" not in name:
                    rows = [list(row) for row in zip(*rows)]
                if "gate_up_proj_bias" in name:
                    rows = [list(rows[0][0::2]) + list(rows[0][1::2])]
                elif "gate_up_proj" in name:
                    rows = rows[0::2] + rows[1::2]
            if self.name.startswith("gemma") and "norm" in name:
                rows = [[shard_reader.f32_of(1 + value) for value in rows[0]]]
            self.views[name] = rows
        return self.views[name]

    def row(self, name, row, begin, end):
        return list(self.view(name)[row][begin:end])

    def covered(self, files):
        held = {}
        for file in files:
            for part in (part for tensor in file.tensors for part in tensor["parts"]):
                held.setdefault((part["source"], part["source_rows"] * part["source_cols"]), set()).update(
                    (row, col) for row in range(part["row_begin"], part["row_begin"] + part["rows"])
                    for col in range(part["col_begin"], part["col_begin"] + part["cols"]))
        return [source for (source, elems), seen in held.items() if len(seen) != elems]


def test_families(folder):
    program = os.path.join(BUILD, "tpshard")
    if not os.path.exists(program) or not os.path.isdir(FAMILIES):
        print(f"ok - families # SKIP no {program} or {FAMILIES}")
        return
    cases = [("gemma3", "tp"), ("phi3", "tp"), ("olmo2", "tp"), ("mixtral", "ep"), ("qwen2_moe", "tp"), ("gpt_oss", "tp"),
             ("gpt_oss", "ep"), ("granite_moe", "tp"), ("deepseek_v2", "ep"), ("deepseek_v3", "tp")]
    for name, experts in cases:
        out = os.path.join(folder, f"{name}-{experts}")
        run = subprocess.run([program, "--tp", "3", "--experts", experts, os.path.join(FAMILIES, name), out],
                             capture_output=True, text=True, check=False)
        try:
            assert run.returncode == 0, run.stderr.strip()
            _manifest, files = shard_reader.read_directory(out)
        except (AssertionError, shard_reader.Refused) as why:
            report(False, f"{name}, experts {experts}: a directory that is accepted", why)
            continue
        source = Family(name)
        _kinds, wrong = check_weights(files, source.row)
        missing = source.covered(files)
        report(not wrong and not missing, f"{name}, experts {experts}: every weight, and those of the checkpoint",
               wrong or missing)


def main():
    with tempfile.TemporaryDirectory(prefix="test_shard_reader_") as folder:
        formula = os.path.join(folder, "formula")
        os.mkdir(formula)
        test_formula_model(formula, False)
        packed = os.path.join(folder, "packed")
        os.mkdir(packed)
        test_formula_model(packed, True)
        test_bundled_model(folder)
        test_families(folder)
    print(f"1..{number}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

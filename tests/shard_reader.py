#!/usr/bin/env python3
"""A second reader of shard directories, written from formats/shard_file.md alone: it shares no code with the C reader.

    python3 tests/shard_reader.py DIR     checks every rule and every checksum: exit 0 and a summary, or 1 and a message

Needs the Python module xxhash (Debian: python3-xxhash).
"""
import json
import os
import struct
import sys

import xxhash

MIB = 1 << 20
MAX_DIM = 2**31 - 1
HEADER = struct.Struct("<8s10I10Q16s8Q16s32s")
TENSOR = struct.Struct("<IiII6QIIQ")
PART = struct.Struct("<II7Q")
assert (HEADER.size, TENSOR.size, PART.size) == (256, 80, 64)

KINDS = ["f32", "bf16", "int8", "fp8", "int4"]
ROLES = ["embedding", "rope_inv_freq", "attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias",
         "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "final_norm", "head"]
OUTSIDE_LAYERS = {"embedding", "rope_inv_freq", "final_norm", "head"}
MATRICES = {"embedding", "qkv", "o", "gate_up", "down", "head"}
SHARE = ["head_begin", "num_heads", "kv_head_begin", "num_kv_heads", "mlp_begin", "intermediate", "vocab_begin",
         "vocab"]


class Refused(Exception):
    pass


def check(condition, message):
    if not condition:
        raise Refused(message)


def round_up(value, unit):
    return -(-value // unit) * unit


def stored_sizes(kind, group_size, rows, cols):
    """Padded rows, padded cols, data bytes, scale bytes."""
    if kind == "f32":
        return rows, cols, rows * cols * 4, 0
    padded_rows = round_up(rows, 64)
    padded_cols = round_up(cols, max(64, group_size))
    elems = padded_rows * padded_cols
    if kind == "bf16":
        return padded_rows, padded_cols, elems * 2, 0
    if kind == "int4":
        return padded_rows, padded_cols, elems // 2, elems // group_size * 2
    return padded_rows, padded_cols, elems, padded_rows * 4


def f32_from_bits(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def e4m3_value(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    check((exponent, mantissa) != (15, 7), "a weight is NaN")
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


E4M3 = [e4m3_value(code) if code & 0x7F != 0x7F else float("nan") for code in range(256)]


class RankFile:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.bytes = memoryview(file.read())
        try:
            self.read_header()
            self.read_index()
            self.check_leaves()
            self.check_padding()
        except Refused as why:
            raise Refused(f"{path}: {why}") from None

    def read_header(self):
        data = self.bytes
        check(len(data) >= 256, "truncated")
        (magic, version, header_bytes, required, _optional, self.rank, self.tp_size, self.pp_rank, self.pp_size,
         self.tensor_count, self.part_count, tensors_offset, self.parts_offset, self.strings_offset, self.strings_bytes,
         self.leaves_offset, self.leaf_count, self.payload_offset, self.payload_bytes, file_bytes, reserved,
         self.contract, *rest) = HEADER.unpack_from(data, 0)
        share, head_hash, reserved_end = rest[:8], rest[8], rest[9]
        check(magic == b"TPSHARD\n", "not a rank file")
        check(version == 1, f"version {version}")
        check(required == 0, f"unknown required features {required:#x}")
        check(header_bytes == 256, f"header_bytes {header_bytes}")
        check(file_bytes == len(data), f"{len(data)} bytes long, the header says {file_bytes}")
        check(self.payload_offset <= min(16 * MIB, len(data)), f"payload_offset {self.payload_offset}")
        head = bytes(data[:self.payload_offset])
        self.root = xxhash.xxh3_128_hexdigest(head)
        check(xxhash.xxh3_128_digest(head[:208] + bytes(16) + head[224:]) == head_hash, "head_hash")

        check(reserved == 0 and reserved_end == bytes(32), "a reserved field is in use")
        check(self.rank < self.tp_size <= 1024 and self.pp_rank < self.pp_size <= 1024, "rank or stage")
        check(max(share) <= MAX_DIM, "share")
        self.share = dict(zip(SHARE, share))
        check(self.tensor_count >= 1, "no tensor")
        check(tensors_offset == 256, "tensors_offset")
        check(self.parts_offset == 256 + 80 * self.tensor_count, "parts_offset")
        check(self.strings_offset == self.parts_offset + 64 * self.part_count, "strings_offset")
        strings_end = self.strings_offset + self.strings_bytes
        check(self.leaves_offset == round_up(strings_end, 16), "leaves_offset")
        check(self.leaf_count == -(-self.payload_bytes // MIB), "leaf_count")
        leaves_end = self.leaves_offset + 8 * self.leaf_count
        check(self.payload_offset == round_up(leaves_end, 2 * MIB), "payload_offset")
        check(self.payload_offset + self.payload_bytes == file_bytes, "payload_bytes")
        check(not any(head[strings_end:self.leaves_offset]) and not any(head[leaves_end:]), "padding of the head")
        self.payload = data[self.payload_offset:]

    def read_part(self, index, name_end):
        (name_offset, name_bytes, source_rows, source_cols, row_begin, rows, col_begin, cols,
         reserved) = PART.unpack_from(self.bytes, self.parts_offset + 64 * index)
        check(name_offset == name_end and 1 <= name_bytes <= 255, f"part {index}: name out of place")
        check(name_offset + name_bytes + 1 <= self.strings_bytes, f"part {index}: name out of bounds")
        begin = self.strings_offset + name_offset
        name = bytes(self.bytes[begin:begin + name_bytes])
        check(self.bytes[begin + name_bytes] == 0, f"part {index}: name not ended")
        check(all(0x20 <= byte <= 0x7E for byte in name), f"part {index}: bad name")
        check(reserved == 0, f"part {index}: reserved")
        check(source_rows <= MAX_DIM and source_cols <= MAX_DIM, f"part {index}: source too large")
        check(row_begin + rows <= source_rows and col_begin + cols <= source_cols, f"part {index}: outside its source")
        return {"source": name.decode(), "source_rows": source_rows, "source_cols": source_cols, "row_begin": row_begin,
                "rows": rows, "col_begin": col_begin, "cols": cols}

    def read_index(self):
        self.tensors = []
        part_end = name_end = end = 0
        for index in range(self.tensor_count):
            (role, layer, kind, group_size, rows, cols, data_offset, data_bytes, scale_offset, scale_bytes, first_part,
             num_parts, reserved) = TENSOR.unpack_from(self.bytes, 256 + 80 * index)
            what = f"tensor {index}"
            check(role < len(ROLES) and kind < len(KINDS), f"{what}: role or kind")
            role, kind = ROLES[role], KINDS[kind]
            check(layer == -1 if role in OUTSIDE_LAYERS else 0 <= layer <= 65535, f"{what} ({role}): layer {layer}")
            check(group_size in ((32, 64, 128) if kind == "int4" else (0,)), f"{what}: group_size {group_size}")
            check(rows <= MAX_DIM and cols <= MAX_DIM, f"{what}: shape")
            vector = role not in MATRICES
            check(not vector or kind == "f32" and rows == 1, f"{what} ({role}): not a vector")

            check(first_part == part_end and num_parts <= 4, f"{what}: parts out of place")
            part_end += num_parts
            check(part_end <= self.part_count, f"{what}: parts out of bounds")
            parts = []
            for part_index in range(first_part, part_end):
                parts.append(self.read_part(part_index, name_end))
                name_end += len(parts[-1]["source"]) + 1
            if vector:
                check(all(part["rows"] == part["source_rows"] == 1 for part in parts), f"{what}: part is no vector")
            else:
                check(all(part["cols"] == cols for part in parts), f"{what}: cols of a part")
            total = sum(part["cols" if vector else "rows"] for part in parts)
            check(not parts or total == (cols if vector else rows), f"{what}: parts do not add up")

            padded_rows, padded_cols, wanted_data, wanted_scale = stored_sizes(kind, group_size, rows, cols)
            check((data_bytes, scale_bytes, reserved) == (wanted_data, wanted_scale, 0), f"{what}: sizes")
            check(data_offset == round_up(end, 256), f"{what}: data_offset")
            end = data_offset + data_bytes
            check(scale_offset == (round_up(end, 256) if scale_bytes else 0), f"{what}: scale_offset")
            end = scale_offset + scale_bytes if scale_bytes else end
            self.tensors.append({
                "role": role, "layer": layer, "kind": kind, "group_size": group_size, "rows": rows, "cols": cols,
                "padded_rows": padded_rows, "padded_cols": padded_cols, "parts": parts,
                "data": (data_offset, data_bytes), "scale": (scale_offset, scale_bytes)})
        check(part_end == self.part_count and name_end == self.strings_bytes, "parts or names that belong to no tensor")
        check(self.payload_bytes == round_up(end, 4096), "payload_bytes")
        keys = {(tensor["role"], tensor["layer"]) for tensor in self.tensors}
        check(len(keys) == len(self.tensors), "two tensors of the same role and layer")

    def check_leaves(self):
        for index in range(self.leaf_count):
            (wanted,) = struct.unpack_from("<Q", self.bytes, self.leaves_offset + 8 * index)
            found = xxhash.xxh3_64_intdigest(self.payload[index * MIB:(index + 1) * MIB])
            check(found == wanted, f"leaf {index} (payload bytes from {index * MIB}): checksum mismatch")

    def check_padding(self):
        """Between tensors; inside them, see dequantize."""
        end = 0
        spans = (span for tensor in self.tensors for span in (tensor["data"], tensor["scale"]))
        for begin, size in sorted(span for span in spans if span[1]):
            check(not any(self.payload[end:begin]), f"payload padding at {end}")
            end = begin + size
        check(not any(self.payload[end:]), "payload padding at the end")

    def find(self, role, layer=-1):
        for tensor in self.tensors:
            if (tensor["role"], tensor["layer"]) == (role, layer):
                return tensor
        return None

    def dequantize(self, tensor):
        """Rows of floats, without padding; checks that the padding is zero."""
        kind, rows, cols = tensor["kind"], tensor["rows"], tensor["cols"]
        padded_rows, padded_cols, group_size = tensor["padded_rows"], tensor["padded_cols"], tensor["group_size"]
        data_offset, data_bytes = tensor["data"]
        scale_offset, scale_bytes = tensor["scale"]
        data = self.payload[data_offset:data_offset + data_bytes]
        scales = self.payload[scale_offset:scale_offset + scale_bytes]
        if kind == "int4":
            codes = int4_codes(data, padded_rows, padded_cols)
            scales = struct.unpack(f"<{scale_bytes // 2}e", scales)
            groups = padded_cols // group_size

            def scale_of(row, col):
                return scales[(row // 16 * groups + col // group_size) * 16 + row % 16] * 2.0**-8
        else:
            code = {"f32": "f", "bf16": "H", "int8": "b", "fp8": "B"}[kind]
            flat = struct.unpack(f"<{padded_rows * padded_cols}{code}", data)
            if kind == "bf16":
                flat = [f32_from_bits(bits << 16) for bits in flat]
            elif kind == "fp8":
                flat = [E4M3[bits] for bits in flat]
            codes = [flat[row * padded_cols:(row + 1) * padded_cols] for row in range(padded_rows)]
            scales = struct.unpack(f"<{scale_bytes // 4}f", scales)

            def scale_of(row, _col):
                return scales[row] if scales else 1.0
        check(not any(any(codes[row]) for row in range(rows, padded_rows)), f"{tensor['role']}: padded rows")
        check(not any(any(codes[row][cols:]) for row in range(rows)), f"{tensor['role']}: padded columns")
        check(all(abs(scale) < float("inf") for scale in scales), f"{tensor['role']}: a scale is not finite")
        return [[codes[row][col] * scale_of(row, col) for col in range(cols)] for row in range(rows)]


def int4_codes(data, padded_rows, padded_cols):
    """T16x64, walked in the order in which the bytes lie."""
    codes = [[0] * padded_cols for _ in range(padded_rows)]
    at = 0
    for block in range(0, padded_rows, 64):
        for col in range(0, padded_cols, 64):
            for row in range(block, block + 64, 16):
                for lane in range(32):
                    g, t = lane >> 2, lane & 3
                    for w in range(4):
                        for step in (0, 8, 1, 9):
                            byte = data[at]
                            at += 1
                            column = col + 16 * w + 2 * t + step
                            codes[row + g][column] = ((byte & 15) ^ 8) - 8
                            codes[row + g + 8][column] = (byte >> 4 ^ 8) - 8
    check(at == len(data), "size of int4 data")
    return codes


# ---- the manifest ----------------------------------------------------------------------------------------------------

ROOT_KEYS = {"version", "contract", "tool", "tp_size", "pp_size", "wire_advice", "quant", "model", "ranks", "extras",
             "sources"}
NOT_IN_CORE = {"contract", "extras", "ranks", "tool", "wire_advice"}
REALS = {"norm_eps", "rope_attention_factor", "default_temperature", "default_top_p", "default_repetition_penalty"}
MODEL_RANGES = {"num_layers": (1, 65536), "num_heads": (1, 65536), "num_kv_heads": (1, 65536), "head_dim": (2, 65536),
                "hidden_size": (1, MAX_DIM), "intermediate_size": (1, MAX_DIM), "vocab_size": (1, MAX_DIM),
                "context": (1, MAX_DIM), "sliding_window": (0, MAX_DIM), "norm_eps": (0, 1),
                "rope_attention_factor": (5e-324, 1e6)}
MODEL_BOOLS = {"qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_embeddings"}
OPTIONAL_RANGES = {"bos_token_id": (0, MAX_DIM), "default_temperature": (0, 1e6), "default_top_p": (0, 1),
                   "default_top_k": (0, MAX_DIM), "default_repetition_penalty": (5e-324, 1e6)}


def is_number(value, key):
    return not isinstance(value, bool) and isinstance(value, (int, float) if key in REALS else int)


def canonical(value, key=None):
    if isinstance(value, dict):
        members = (f'"{name}":{canonical(value[name], name)}' for name in sorted(value, key=str.encode))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(item, key) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if key in REALS:
        return "%.17g" % value
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def check_text(text, limit):
    check(isinstance(text, str) and len(text.encode()) <= limit, "a text is missing or too long")
    check(all(ord(letter) >= 0x20 and ord(letter) != 0x7F for letter in text), "a text holds a control character")


def check_files(files):
    for file in files:
        check(set(file) == {"name", "bytes", "xxh3_128"}, "keys of a file")
        check_text(file["name"], 255)
        check(file["name"] not in ("", ".", "..") and "/" not in file["name"], f"name {file['name']!r}")
        check(is_number(file["bytes"], "bytes") and 0 <= file["bytes"] < 2**63, "bytes of a file")
        check_hash(file["xxh3_128"])


def check_hash(text):
    check(isinstance(text, str) and len(text) == 32 and set(text) <= set("0123456789abcdef"), "spelling of a hash")


def no_duplicates(pairs):
    check(len({key for key, _ in pairs}) == len(pairs), "a key stands twice")
    return dict(pairs)


def check_model(model):
    required = set(MODEL_RANGES) | MODEL_BOOLS | {"architecture", "eos_token_ids"}
    check(required <= set(model) <= required | set(OPTIONAL_RANGES), "keys of model")
    for key, (low, high) in (MODEL_RANGES | OPTIONAL_RANGES).items():
        if key in model:
            check(is_number(model[key], key) and low <= model[key] <= high, f"model.{key}")
    check(all(isinstance(model[key], bool) for key in MODEL_BOOLS), "a true or false of model")
    check_text(model["architecture"], 63)
    eos = model["eos_token_ids"]
    check(len(eos) <= 8 and all(is_number(id, "id") and 0 <= id <= MAX_DIM for id in eos), "model.eos_token_ids")
    check(model["num_heads"] % model["num_kv_heads"] == 0 and model["head_dim"] % 2 == 0, "heads of model")


def read_manifest(path):
    with open(path, encoding="utf-8") as file:
        text = file.read(4 * MIB + 1)
    check(len(text.encode()) <= 4 * MIB, f"{path}: too large")
    try:
        manifest = json.loads(text, object_pairs_hook=no_duplicates)
        check(isinstance(manifest, dict) and manifest.get("version") == 1, "version")
        check(set(manifest) == ROOT_KEYS, "keys")
        check_text(manifest["tool"], 255)
        check_hash(manifest["contract"])
        for key in ("tp_size", "pp_size"):
            check(is_number(manifest[key], key) and 1 <= manifest[key] <= 1024, key)
        check(manifest["wire_advice"] in ("bf16", "fp8", "s8x"), "wire_advice")
        quant = manifest["quant"]
        check(set(quant) == {"linear", "embedding", "head", "group_size"}, "keys of quant")
        kinds = [quant["linear"], quant["embedding"], quant["head"]]
        check(all(kind in KINDS for kind in kinds), "kinds of quant")
        check(quant["group_size"] in ((32, 64, 128) if "int4" in kinds else (0,)), "quant.group_size")
        check_model(manifest["model"])
        for key in ("ranks", "extras", "sources"):
            check_files(manifest[key])
        check(len(manifest["ranks"]) == manifest["tp_size"] * manifest["pp_size"], "count of ranks")
        names = [file["name"] for file in manifest["ranks"] + manifest["extras"]] + ["model.json"]
        check(len(set(names)) == len(names), "a file stands in it twice")
        core = canonical({key: value for key, value in manifest.items() if key not in NOT_IN_CORE})
        check(xxhash.xxh3_128_hexdigest(core.encode()) == manifest["contract"], "contract")
    except (ValueError, KeyError, TypeError, AttributeError) as why:
        raise Refused(f"{path}: {why}") from None
    except Refused as why:
        raise Refused(f"{path}: {why}") from None
    return manifest


def read_directory(folder):
    """The manifest and the rank files in rank order, everything checked."""
    path = os.path.join(folder, "model.json")
    check(os.path.exists(path), f"{folder}: no model.json: not a shard directory")
    manifest = read_manifest(path)
    files = []
    for number, entry in enumerate(manifest["ranks"]):
        path = os.path.join(folder, entry["name"])
        file = RankFile(path)
        check((file.tp_size, file.pp_size) == (manifest["tp_size"], manifest["pp_size"]), f"{path}: tp_size or pp_size")
        check(file.pp_rank * file.tp_size + file.rank == number, f"{path}: rank {file.rank} in place {number}")
        check(file.contract.hex() == manifest["contract"], f"{path}: of another run (contract)")
        check(len(file.bytes) == entry["bytes"] and file.root == entry["xxh3_128"], f"{path}: size or root")
        files.append(file)
    for entry in manifest["extras"]:
        path = os.path.join(folder, entry["name"])
        with open(path, "rb") as extra:
            data = extra.read()
        check(len(data) == entry["bytes"] and xxhash.xxh3_128_hexdigest(data) == entry["xxh3_128"], f"{path}: damaged")
    return manifest, files


def main():
    if len(sys.argv) != 2:
        print("usage: shard_reader.py DIR", file=sys.stderr)
        return 2
    try:
        manifest, files = read_directory(sys.argv[1])
    except (Refused, OSError) as why:
        print(why, file=sys.stderr)
        return 1
    quant = manifest["quant"]
    print(f"{sys.argv[1]}: {manifest['model']['architecture']}, tp {manifest['tp_size']}, pp {manifest['pp_size']}, "
          f"linear {quant['linear']}, embedding {quant['embedding']}, head {quant['head']}, by {manifest['tool']}")
    for file in files:
        print(f"  {os.path.basename(file.path)}: {len(file.tensors)} tensors, {file.payload_bytes} bytes of payload, "
              f"{file.leaf_count} leaves, root {file.root}")
    print(f"every checksum holds; {len(manifest['extras'])} extras, {len(manifest['sources'])} sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())

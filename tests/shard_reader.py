#!/usr/bin/env python3
"""A second reader of shard directories, written from formats/shard_file.md alone: it shares no code with the C reader.

    python3 tests/shard_reader.py DIR     checks every rule and every checksum: exit 0 and a summary, or 1 and a message

Needs the Python module xxhash (Debian: python3-xxhash), and for compressed rank files the library libzstd.so.1.
"""
import ctypes
import json
import os
import struct
import sys

import xxhash

MIB = 1 << 20
FRAME = 128 << 10
MAX_DIM = 2**31 - 1
COMPRESSED, STAGES = 1, 2  # required features
RAW, ZSTD, PLANES = 0, 1, 2
HEADER = struct.Struct("<8s10I9Q2I16s14Q16s48s")
TENSOR = struct.Struct("<IiII6QIIiI")
PART = struct.Struct("<II7Q")
assert (HEADER.size, TENSOR.size, PART.size) == (320, 80, 64)

KINDS = ["f32", "bf16", "int8", "fp8", "int4", "int4z", "fp8g", "mxfp4", "nvfp4", "nl4"]
GROUPS = {"int4": (32, 64, 128), "int4z": (32, 64, 128), "fp8g": (128,), "mxfp4": (32,), "nvfp4": (16,),
          "nl4": (32, 64, 128)}
TILED = {"int4", "int4z", "mxfp4", "nvfp4", "nl4"}
ROLES = ["embedding", "rope_inv_freq", "attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias",
         "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "final_norm", "head", "rope_long", "rope_local",
         "sinks", "attention_post_norm", "mlp_post_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b",
         "router", "router_bias", "router_choice_bias", "expert_gate_up", "expert_gate_up_bias", "expert_down",
         "expert_down_bias", "shared_gate_up", "shared_down", "qkv_order", "gate_up_order"]
OUTSIDE_LAYERS = {"embedding", "rope_inv_freq", "final_norm", "head", "rope_long", "rope_local"}
MATRICES = {"embedding", "qkv", "o", "gate_up", "down", "head", "q_a", "q_b", "kv_a", "kv_b", "router",
            "expert_gate_up", "expert_down", "shared_gate_up", "shared_down"}
ALWAYS_BF16 = {"kv_b", "router"}
LINEAR_ROLES = MATRICES - ALWAYS_BF16 - {"embedding", "head"}
OF_EXPERTS = {"expert_gate_up", "expert_gate_up_bias", "expert_down", "expert_down_bias"}
SHARE = ["head_begin", "num_heads", "kv_head_begin", "num_kv_heads", "mlp_begin", "intermediate", "vocab_begin",
         "vocab", "expert_begin", "num_experts", "expert_mlp_begin", "expert_size", "shared_begin", "shared_size"]


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
    groups = elems // group_size if group_size else 0
    scale_bytes = {"int4": groups * 2, "nl4": groups * 2, "int4z": groups * 4, "fp8g": groups * 4, "mxfp4": groups,
                   "nvfp4": groups + padded_rows * 4}.get(kind, padded_rows * 4)
    return padded_rows, padded_cols, elems // 2 if kind in TILED else elems, scale_bytes


def f32_from_bits(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def f32_of(value):
    """Rounded once."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def e4m3_value(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    check((exponent, mantissa) != (15, 7), "a weight is NaN")
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


NL4 = dict(zip(range(-8, 8), (-34, -26, -20, -16, -12, -9, -6, -3, 0, 3, 6, 9, 13, 17, 22, 29), strict=True))
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
E4M3 = [e4m3_value(code) if code & 0x7F != 0x7F else float("nan") for code in range(256)]


try:
    LIBZSTD = ctypes.CDLL("libzstd.so.1")
    LIBZSTD.ZSTD_decompress.restype = LIBZSTD.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
    LIBZSTD.ZSTD_getFrameContentSize.restype = ctypes.c_ulonglong
except OSError:
    LIBZSTD = None


def unpack_frame(frame, size):
    """One zstd frame for exactly so many bytes."""
    length = ctypes.c_size_t(len(frame))
    check(frame[:4] == b"\x28\xb5\x2f\xfd" and LIBZSTD.ZSTD_findFrameCompressedSize(frame, length) == len(frame),
          "not one zstd frame")
    check(LIBZSTD.ZSTD_getFrameContentSize(frame, length) == size, "content size of a frame")
    out = ctypes.create_string_buffer(size)
    check(LIBZSTD.ZSTD_decompress(out, ctypes.c_size_t(size), frame, length) == size, "a frame cannot be decoded")
    return out.raw


def decode_leaf(code, stored, size):
    """A leaf's payload of `size` bytes."""
    if code == RAW:
        return stored
    frames = -(-size // FRAME)
    low_bytes = size // 2 if code == PLANES else 0
    check(4 * frames + low_bytes <= len(stored), "a leaf is too short for its frames")
    end, out = 4 * frames, b""
    for frame, length in enumerate(struct.unpack_from(f"<{frames}I", stored)):
        check(end + length <= len(stored) - low_bytes, "a frame is out of place")
        frame_size = min(FRAME, size - frame * FRAME)
        out += unpack_frame(stored[end:end + length], frame_size // 2 if code == PLANES else frame_size)
        end += length
    check(end + low_bytes == len(stored), "a leaf is longer than its frames")
    if code == ZSTD:
        return out
    words = ((high << 8 | low) for high, low in zip(out, stored[end:], strict=True))
    return struct.pack(f"<{size // 2}H", *(word >> 1 | (word & 1) << 15 for word in words))


class RankFile:
    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.bytes = memoryview(file.read())
        try:
            self.read_header()
            self.read_index()
            self.check_leaves()
            self.unpack_leaves()
            self.check_padding()
        except Refused as why:
            raise Refused(f"{path}: {why}") from None

    def read_header(self):
        data = self.bytes
        check(len(data) >= 320, "truncated")
        (magic, version, header_bytes, required, _optional, self.rank, self.tp_size, self.pp_rank, self.pp_size,
         self.tensor_count, self.part_count, tensors_offset, self.parts_offset, self.strings_offset, self.strings_bytes,
         self.leaves_offset, self.leaf_count, self.payload_offset, self.payload_bytes, file_bytes, self.layer_begin, self.num_layers,
         self.contract, *rest) = HEADER.unpack_from(data, 0)
        share, head_hash, reserved_end = rest[:14], rest[14], rest[15]
        check(magic == b"TPSHARD\n", "not a rank file")
        check(version == 2, f"version {version}")
        check(required & ~(COMPRESSED | STAGES) == 0, f"unknown required features {required:#x}")
        check(header_bytes == 320, f"header_bytes {header_bytes}")
        check(file_bytes == len(data), f"{len(data)} bytes long, the header says {file_bytes}")
        check(self.payload_offset <= min(64 * MIB, len(data)), f"payload_offset {self.payload_offset}")
        head = bytes(data[:self.payload_offset])
        self.root = xxhash.xxh3_128_hexdigest(head)
        check(xxhash.xxh3_128_digest(head[:256] + bytes(16) + head[272:]) == head_hash, "head_hash")

        check(reserved_end == bytes(48), "a reserved field is in use")
        check(self.rank < self.tp_size <= 1024 and self.pp_rank < self.pp_size <= 1024, "rank or stage")
        stages = self.pp_size > 1
        check(bool(required & STAGES) == stages == (self.num_layers > 0), "stages")
        check(self.layer_begin + self.num_layers <= 512 and (stages or self.layer_begin == 0), "layers of the stage")
        check(max(share) <= MAX_DIM, "share")
        self.share = dict(zip(SHARE, share))
        check(self.tensor_count >= 1, "no tensor")
        check(tensors_offset == 320, "tensors_offset")
        check(self.parts_offset == 320 + 80 * self.tensor_count, "parts_offset")
        check(self.strings_offset == self.parts_offset + 64 * self.part_count, "strings_offset")
        strings_end = self.strings_offset + self.strings_bytes
        check(self.leaves_offset == round_up(strings_end, 16), "leaves_offset")
        check(self.leaf_count == -(-self.payload_bytes // MIB), "leaf_count")
        leaves_end = self.leaves_offset + 8 * self.leaf_count * (2 if required & COMPRESSED else 1)
        check(self.payload_offset == round_up(leaves_end, 2 * MIB), "payload_offset")
        check(leaves_end <= len(head), "leaves")
        self.read_table(required & COMPRESSED)
        check(self.payload_offset + self.leaves[-1][1] == file_bytes, "size of the file")
        check(not any(head[strings_end:self.leaves_offset]) and not any(head[leaves_end:]), "padding of the head")

    def read_table(self, compressed):
        """Code, end (padding included), length, size of each leaf."""
        self.leaves, end = [], 0
        for index in range(self.leaf_count):
            size = min(MIB, self.payload_bytes - index * MIB)
            length, code = size, RAW
            if compressed:
                length, code = struct.unpack_from("<II", self.bytes, self.leaves_offset + 8 * (self.leaf_count + index))
                check(length == size if code == RAW else code in (ZSTD, PLANES) and 0 < 100 * length <= 97 * size,
                      f"leaf {index}: length {length}, code {code}")
            end += length
            last = index + 1 == self.leaf_count
            self.leaves.append((code, round_up(end, 4096) if last else end, length, size))
        check(not compressed or any(leaf[0] != RAW for leaf in self.leaves), "no leaf is compressed")
        self.leaves = self.leaves or [(RAW, 0, 0, 0)]

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
             num_parts, expert, reserved) = TENSOR.unpack_from(self.bytes, 320 + 80 * index)
            what = f"tensor {index}"
            check(role < len(ROLES) and kind < len(KINDS), f"{what}: role or kind")
            role, kind = ROLES[role], KINDS[kind]
            check(layer == -1 if role in OUTSIDE_LAYERS else 0 <= layer <= 65535, f"{what} ({role}): layer {layer}")
            check(0 <= expert <= 65535 if role in OF_EXPERTS else expert == -1, f"{what} ({role}): expert {expert}")
            check(group_size in GROUPS.get(kind, (0,)), f"{what}: group_size {group_size}")
            check(role not in ALWAYS_BF16 or kind == "bf16", f"{what} ({role}): {kind}")
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
                "role": role, "layer": layer, "expert": expert, "kind": kind, "group_size": group_size, "rows": rows, "cols": cols,
                "padded_rows": padded_rows, "padded_cols": padded_cols, "parts": parts,
                "data": (data_offset, data_bytes), "scale": (scale_offset, scale_bytes)})
        check(part_end == self.part_count and name_end == self.strings_bytes, "parts or names that belong to no tensor")
        check(self.payload_bytes == round_up(end, 4096), "payload_bytes")
        keys = {(tensor["role"], tensor["layer"], tensor["expert"]) for tensor in self.tensors}
        check(len(keys) == len(self.tensors), "two tensors of the same role, layer and expert")

    def check_leaves(self):
        begin = self.payload_offset
        for index in range(self.leaf_count):
            end = self.payload_offset + self.leaves[index][1]
            (wanted,) = struct.unpack_from("<Q", self.bytes, self.leaves_offset + 8 * index)
            found = xxhash.xxh3_64_intdigest(self.bytes[begin:end])
            check(found == wanted, f"leaf {index} (file bytes from {begin}): checksum mismatch")
            begin = end

    def unpack_leaves(self):
        """Only what the checksums hold for."""
        codes = {leaf[0] for leaf in self.leaves}
        self.codes = sorted(codes)
        if codes == {RAW}:
            self.payload = self.bytes[self.payload_offset:]
            return
        check(LIBZSTD, "it is compressed, and there is no libzstd.so.1 here")
        begin, out = self.payload_offset, []
        for code, end, length, size in self.leaves:
            out.append(decode_leaf(code, bytes(self.bytes[begin:begin + length]), size))
            check(not any(self.bytes[begin + length:self.payload_offset + end]), "padding behind the last leaf")
            begin = self.payload_offset + end
        self.payload = memoryview(b"".join(out))

    def check_padding(self):
        """Between tensors; inside them, see dequantize."""
        end = 0
        spans = (span for tensor in self.tensors for span in (tensor["data"], tensor["scale"]))
        for begin, size in sorted(span for span in spans if span[1]):
            check(not any(self.payload[end:begin]), f"payload padding at {end}")
            end = begin + size
        check(not any(self.payload[end:]), "payload padding at the end")

    def find(self, role, layer=-1, expert=-1):
        for tensor in self.tensors:
            if (tensor["role"], tensor["layer"], tensor["expert"]) == (role, layer, expert):
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
        zero_of = None
        groups = padded_cols // group_size if group_size else 0

        def group_of(row, col):
            return (row // 16 * groups + col // group_size) * 16 + row % 16

        if kind in TILED:
            codes = tiled_codes(data, padded_rows, padded_cols)
            if kind in ("mxfp4", "nvfp4"):
                codes = [[E2M1[code & 15] for code in row] for row in codes]
            if kind == "nl4":
                codes = [[NL4[code] for code in row] for row in codes]
        if kind in ("int4", "nl4"):
            scales, unit = struct.unpack(f"<{scale_bytes // 2}e", scales), 2.0**(-8 if kind == "int4" else -10)

            def scale_of(row, col):
                return scales[group_of(row, col)] * unit
        elif kind == "int4z":
            scales = struct.unpack(f"<{scale_bytes // 2}e", scales)

            def scale_of(row, col):
                return scales[group_of(row, col) // 16 * 32 + row % 16] * 2.0**-8

            def zero_of(row, col):
                return scales[group_of(row, col) // 16 * 32 + 16 + row % 16]
        elif kind == "mxfp4":
            def scale_of(row, col):
                return 2.0 ** (scales[group_of(row, col)] - 127)
        elif kind == "nvfp4":
            block_bytes = 4 * groups * 16 + 64 * 4

            def scale_of(row, col):
                block = scales[row // 64 * block_bytes:(row // 64 + 1) * block_bytes]
                (whole,) = struct.unpack_from("<f", block, 4 * groups * 16 + row % 64 * 4)
                return E4M3[block[group_of(row % 64, col)]] * whole
        else:
            code = {"f32": "f", "bf16": "H", "int8": "b", "fp8": "B", "fp8g": "B"}[kind]
            flat = struct.unpack(f"<{padded_rows * padded_cols}{code}", data)
            if kind == "bf16":
                flat = [f32_from_bits(bits << 16) for bits in flat]
            elif kind in ("fp8", "fp8g"):
                flat = [E4M3[bits] for bits in flat]
            codes = [flat[row * padded_cols:(row + 1) * padded_cols] for row in range(padded_rows)]
            scales = struct.unpack(f"<{scale_bytes // 4}f", scales)

            def scale_of(row, col):
                return scales[group_of(row, col) if groups else row] if scales else 1.0
        check(not any(any(codes[row]) for row in range(rows, padded_rows)), f"{tensor['role']}: padded rows")
        check(not any(any(codes[row][cols:]) for row in range(rows)), f"{tensor['role']}: padded columns")
        check(all(abs(scale) < float("inf") for scale in scales), f"{tensor['role']}: a scale is not finite")
        if zero_of:
            return [[(codes[row][col] - zero_of(row, col)) * scale_of(row, col) for col in range(cols)]
                    for row in range(rows)]
        return [[codes[row][col] * scale_of(row, col) for col in range(cols)] for row in range(rows)]


def tiled_codes(data, padded_rows, padded_cols):
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
    check(at == len(data), "size of tiled data")
    return codes


# ---- the manifest ----------------------------------------------------------------------------------------------------

ROOT_KEYS = {"version", "contract", "tool", "tp_size", "pp_size", "wire_advice", "quant", "experts", "model", "ranks",
             "extras", "sources"}
NOT_IN_CORE = {"contract", "extras", "ranks", "tool", "wire_advice", "wires_measured"}
WIRES = ("bf16", "f32", "fp8", "s8x")
REALS = {"norm_eps", "latent_norm_eps", "rope_attention_factor", "attention_scale", "attention_softcap",
         "embedding_scale", "logit_scale", "logit_softcap", "residual_scale", "router_scale", "default_temperature",
         "default_top_p", "default_repetition_penalty"}
ABOVE_ZERO = (2.2250738585072014e-308, 1e6)
MODEL_RANGES = {"num_layers": (1, 512), "num_heads": (1, 65536), "num_kv_heads": (1, 65536), "head_dim": (2, 320),
                "hidden_size": (1, MAX_DIM), "intermediate_size": (0, MAX_DIM), "vocab_size": (1, MAX_DIM),
                "context": (1, MAX_DIM), "sliding_window": (0, MAX_DIM), "norm_eps": (0, 1),
                "rope_attention_factor": ABOVE_ZERO, "attention_scale": ABOVE_ZERO, "attention_softcap": (0, 1e6),
                "embedding_scale": ABOVE_ZERO, "logit_scale": ABOVE_ZERO, "logit_softcap": (0, 1e6),
                "residual_scale": ABOVE_ZERO, "rope_original_context": (0, MAX_DIM), "rotary_dim": (2, 320),
                "latent_kv_rank": (0, 640), "latent_q_rank": (0, MAX_DIM), "latent_nope_dim": (0, 320),
                "latent_rope_dim": (0, 320), "latent_v_dim": (0, 320), "num_experts": (0, 1024),
                "experts_per_token": (0, 32), "expert_size": (0, MAX_DIM), "expert_groups": (0, 1024),
                "expert_groups_per_token": (0, 1024), "router_group_members": (0, 1024), "router_scale": (0, 1e6),
                "shared_size": (0, MAX_DIM)}
MODEL_BOOLS = {"qkv_bias", "o_bias", "mlp_bias", "tied_embeddings", "pre_norms", "post_norms", "sinks",
               "rotary_interleaved", "shared_gate", "expert_bias", "router_bias", "router_choice_bias",
               "router_normalise"}
MODEL_WORDS = {"qk_norm": ("none", "head", "full"), "activation": ("silu", "gelu_tanh", "gpt_oss"),
               "router": ("softmax", "chosen_softmax", "sigmoid")}
WINDOW, EXPERTS = 1, 2  # bits of a layer
OPTIONAL_RANGES = {"mlp_rotation": (2, 128), "bos_token_id": (0, MAX_DIM), "default_temperature": (0, 1e6), "default_top_p": (0, 1),
                   "default_top_k": (0, MAX_DIM), "default_repetition_penalty": (5e-324, 1e6),
                   "latent_norm_eps": (2.2250738585072014e-308, 1)}


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
    required = set(MODEL_RANGES) | MODEL_BOOLS | set(MODEL_WORDS) | {"architecture", "eos_token_ids", "layers"}
    check(required <= set(model) <= required | set(OPTIONAL_RANGES), "keys of model")
    for key, (low, high) in (MODEL_RANGES | OPTIONAL_RANGES).items():
        if key in model:
            check(is_number(model[key], key) and low <= model[key] <= high, f"model.{key}")
    check(all(isinstance(model[key], bool) for key in MODEL_BOOLS), "a true or false of model")
    check(all(model[key] in words for key, words in MODEL_WORDS.items()), "a word of model")
    check_text(model["architecture"], 63)
    eos = model["eos_token_ids"]
    check(len(eos) <= 8 and all(is_number(id, "id") and 0 <= id <= MAX_DIM for id in eos), "model.eos_token_ids")
    check(set(model["layers"]) <= set("0123456789abcdef") and len(model["layers"]) == model["num_layers"], "layers")
    check_attention(model)
    check_experts(model)


def layers_with(model, bit):
    return sum(int(digit, 16) & bit != 0 for digit in model["layers"])


def check_attention(model):
    check(model["num_heads"] % model["num_kv_heads"] == 0 and model["head_dim"] % 2 == 0, "heads of model")
    check(model["rotary_dim"] % 2 == 0 and model["rotary_dim"] <= model["head_dim"], "rotary_dim")
    check((model["sliding_window"] > 0) == (layers_with(model, WINDOW) > 0), "sliding_window")
    latent = [model[f"latent_{part}"] for part in ("nope_dim", "rope_dim", "v_dim")]
    if model["latent_kv_rank"] == 0:
        check(not any(latent) and model["latent_q_rank"] == 0 and model["head_dim"] <= 256
              and "latent_norm_eps" not in model, "latent of model")
    else:
        check(all(latent) and model["latent_kv_rank"] + latent[1] <= 640 and latent[0] + latent[1] == model["head_dim"] and latent[1] == model["rotary_dim"]
              and model["num_kv_heads"] == model["num_heads"] and model["qk_norm"] == "none", "latent of model")


def check_experts(model):
    experts, layers = model["num_experts"], layers_with(model, EXPERTS)
    groups, size = model["expert_groups"], model["expert_size"]
    check(model["intermediate_size"] > 0 or layers == model["num_layers"], "intermediate_size")
    if experts == 0:
        others = [key for key in model if key.startswith(("expert_", "experts_", "router_", "shared_"))]
        check(layers == 0 and not any(model[key] for key in others) and model["router"] == "softmax", "experts")
        return
    check(layers > 0 and 1 <= model["experts_per_token"] <= experts and size > 0 and model["router_scale"] > 0,
          "experts of model")
    check(groups > 0 and experts % groups == 0 and 1 <= model["expert_groups_per_token"] <= groups
          and model["expert_groups_per_token"] * (experts // groups) >= model["experts_per_token"]
          and 1 <= model["router_group_members"] <= experts // groups, "groups of experts")
    check(model["shared_size"] > 0 or not model["shared_gate"], "shared_gate")


def check_rotation(model, block, rotated):
    of_mlp = model.get("mlp_rotation", 1)
    check(of_mlp & of_mlp - 1 == 0 and not any(model[key] % of_mlp for key in ("intermediate_size", "expert_size", "shared_size")),
          "mlp_rotation")
    if not rotated:
        check("mlp_rotation" not in model, "mlp_rotation of a model that is not rotated")
        return
    check(is_number(block, "rotation") and 4 <= block <= 128 and block & block - 1 == 0 and model["hidden_size"] % block == 0
          and not model["tied_embeddings"] and model["pre_norms"] and not model["post_norms"], "quant.rotation")


def check_wires(measured):
    """What codecs of the sums over ranks were found to cost; informative."""
    if measured is None:
        return
    check(set(measured) == {"context", "feedback", "limit", "text_xxh3_128", "tokens", "wires"}, "keys of wires_measured")
    check_hash(measured["text_xxh3_128"])
    check(measured["context"] >= 1 and measured["tokens"] >= 1 and measured["limit"] >= 0, "wires_measured")
    check(isinstance(measured["feedback"], bool) and 1 <= len(measured["wires"]) <= 8, "wires_measured")
    for wire in measured["wires"]:
        check(wire["wire"] in WIRES, "wire of wires_measured")
        check(set(wire) - {"wire"} in (set(), {"kl_divergence", "kl_high", "same_top"}), "keys of a wire")


def check_matrices(quant, model):
    """Kinds matrix by matrix; read_directory compares them with the rank files."""
    check(("matrices" in quant) == ("millibits" in quant), "matrices without millibits, or the reverse")
    if "matrices" not in quant:
        return
    check(is_number(quant["millibits"], "millibits") and 1 <= quant["millibits"] <= 64000, "quant.millibits")
    check(isinstance(quant["matrices"], dict) and quant["matrices"], "quant.matrices")
    for name, word in quant["matrices"].items():
        layer, _, role = name.partition(".")
        check(role in LINEAR_ROLES and layer == str(int(layer)) and 0 <= int(layer) < model["num_layers"], f"quant.matrices.{name}")
        kind, _, group = word.partition(":")
        check(kind in KINDS and kind != "f32", f"quant.matrices.{name}")
        check(group in ("32", "64", "128") if kind in ("int4", "int4z", "nl4") else word == kind, f"quant.matrices.{name}")


def check_kinds(manifest, file):
    listed = manifest["quant"].get("matrices")
    found = {}
    for tensor in file.tensors if listed else []:
        if tensor["role"] in LINEAR_ROLES:
            word = f"{tensor['kind']}:{tensor['group_size']}" if tensor["kind"] in ("int4", "int4z", "nl4") else tensor["kind"]
            check(found.setdefault(f"{tensor['layer']}.{tensor['role']}", word) == word, f"{file.path}: experts of one layer in several kinds")
    check(not listed or found == listed, f"{file.path}: holds other kinds than quant.matrices lists")


def check_stages(manifest):
    check(("stage_layers" in manifest) == (manifest["pp_size"] > 1), "stage_layers")
    layers = manifest.get("stage_layers", [manifest["model"]["num_layers"]])
    check(len(layers) == manifest["pp_size"] and all(type(count) is int and count >= 1 for count in layers) and
          sum(layers) == manifest["model"]["num_layers"], "stage_layers")


def check_stage(manifest, file):
    """A stage's file holds its own layers, and of the rest what belongs to its place."""
    stages, layers = manifest["pp_size"], manifest.get("stage_layers", [])
    if stages == 1:
        return
    check((file.layer_begin, file.num_layers) == (sum(layers[:file.pp_rank]), layers[file.pp_rank]), f"{file.path}: layers")
    last, tied = file.pp_rank == stages - 1, manifest["model"]["tied_embeddings"]
    for tensor in file.tensors:
        if tensor["layer"] >= 0:
            here = file.layer_begin <= tensor["layer"] < file.layer_begin + file.num_layers
        elif tensor["role"] == "embedding":
            here = file.pp_rank == 0 or last and tied
        else:
            here = last or tensor["role"] not in ("final_norm", "head")
        empty = tensor["cols"] == 0 if tensor["kind"] == "f32" else tensor["rows"] == 0
        check(here or empty, f"{file.path}: {tensor['role']} of layer {tensor['layer']} is another stage's")
        check(not here or not empty or tensor["layer"] < 0 or tensor["role"] not in ("attention_norm", "mlp_norm", "router"),
              f"{file.path}: {tensor['role']} of layer {tensor['layer']} is missing")


def read_manifest(path):
    with open(path, encoding="utf-8") as file:
        text = file.read(4 * MIB + 1)
    check(len(text.encode()) <= 4 * MIB, f"{path}: too large")
    try:
        manifest = json.loads(text, object_pairs_hook=no_duplicates)
        check(isinstance(manifest, dict) and manifest.get("version") == 2, "version")
        check(set(manifest) - {"wires_measured", "stage_layers"} == ROOT_KEYS, "keys")
        check_text(manifest["tool"], 255)
        check_hash(manifest["contract"])
        for key in ("tp_size", "pp_size"):
            check(is_number(manifest[key], key) and 1 <= manifest[key] <= 1024, key)
        check(manifest["wire_advice"] in WIRES, "wire_advice")
        check_wires(manifest.get("wires_measured"))
        quant = manifest["quant"]
        kinds = [quant["linear"], quant["embedding"], quant["head"]]
        check(all(kind in KINDS for kind in kinds), "kinds of quant")
        check(set(quant) - {"calibration", "matrices", "millibits", "rotation", "scales"} == {"linear", "embedding", "head", "group_size"}, "keys of quant")
        check("scales" not in quant or quant["scales"] == "max" and (TILED & set(kinds) or "matrices" in quant), "quant.scales")
        check_matrices(quant, manifest["model"])
        if "calibration" in quant:
            check(set(quant["calibration"]) == {"method", "statistics"} and quant["calibration"]["method"] in ("scales", "gptq") and "scales" not in quant,
                  "quant.calibration")
            check_hash(quant["calibration"]["statistics"])
        own_group = bool({"int4", "int4z", "nl4"} & set(kinds))
        check(quant["group_size"] in ((32, 64, 128) if own_group else (0,)), "quant.group_size")
        check(manifest["experts"] in ("ep", "tp"), "experts")
        check_model(manifest["model"])
        check_stages(manifest)
        check_rotation(manifest["model"], quant.get("rotation", 0), "rotation" in quant)
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
        check_kinds(manifest, file)
        check_stage(manifest, file)
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
              f"{file.leaf_count} leaves, {len(file.bytes)} bytes long, root {file.root}")
    print(f"every checksum holds; {len(manifest['extras'])} extras, {len(manifest['sources'])} sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())

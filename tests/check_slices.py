#!/usr/bin/env python3
"""Compares a shard directory with its checkpoint without any code of tpshard's: which rows and columns of which tensor
must stand where follows from the shares of the ranks, the stored layouts from formats/shard_file.md.

    python3 tests/check_slices.py TPSHARD MODEL_DIR SHARD_DIR

TPSHARD inspect --json gives shares and offsets. bf16 must be equal bit for bit; a quantized weight must lie within
the rounding of its scale. Standard library only; sources must be BF16.
"""
import glob
import json
import math
import os
import struct
import subprocess
import sys

INT4_BYTE_OF_COLUMN = [0] * 64
for t in range(4):
    for w in range(4):
        for j, c in enumerate((0, 8, 1, 9)):
            INT4_BYTE_OF_COLUMN[16 * w + 2 * t + c] = 16 * t + 4 * w + j


def read_checkpoint(model_dir):
    tensors = {}
    for path in glob.glob(os.path.join(model_dir, "*.safetensors")):
        with open(path, "rb") as f:
            data = f.read()
        length = struct.unpack_from("<Q", data)[0]
        for name, entry in json.loads(data[8:8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                cols = entry["shape"][-1]
                tensors[name] = (cols, data[8 + length + begin:8 + length + end])
    return tensors


def floats(raw):
    """bf16 bytes as floats."""
    return struct.unpack(f"<{len(raw) // 2}f", b"".join(b"\0\0" + raw[i:i + 2] for i in range(0, len(raw), 2)))


def expected_rows(role, layer, rank, config):
    """Lists (source name, first row, rows, first column, columns or None for all) that must stand below each other."""
    head_dim, prefix = config["head_dim"], f"model.layers.{layer}."
    (q0, q1), (k0, k1) = rank["heads"], rank["kv_heads"]
    (m0, m1), (v0, v1) = rank["intermediate"], rank["vocab"]
    heads = [("q", q0, q1), ("k", k0, k1), ("v", k0, k1)]
    whole = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
             "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
             "o_bias": "self_attn.o_proj.bias", "down_bias": "mlp.down_proj.bias"}
    if role == "embedding":
        return [("model.embed_tokens.weight", v0, v1 - v0, 0, None)]
    if role == "head":
        return [("lm_head.weight", v0, v1 - v0, 0, None)]
    if role == "final_norm":
        return [("model.norm.weight", 0, 1, 0, None)]
    if role in whole:
        return [(prefix + whole[role], 0, 1, 0, None)]
    if role == "qkv":
        return [(f"{prefix}self_attn.{n}_proj.weight", a * head_dim, (b - a) * head_dim, 0, None) for n, a, b in heads]
    if role == "qkv_bias":
        return [(f"{prefix}self_attn.{n}_proj.bias", 0, 1, a * head_dim, (b - a) * head_dim) for n, a, b in heads]
    if role == "o":
        return [(prefix + "self_attn.o_proj.weight", 0, config["hidden_size"], q0 * head_dim, (q1 - q0) * head_dim)]
    if role == "gate_up":
        return [(f"{prefix}mlp.{n}_proj.weight", m0, m1 - m0, 0, None) for n in ("gate", "up")]
    if role == "gate_up_bias":
        return [(f"{prefix}mlp.{n}_proj.bias", 0, 1, m0, m1 - m0) for n in ("gate", "up")]
    if role == "down":
        return [(prefix + "mlp.down_proj.weight", 0, config["hidden_size"], m0, m1 - m0)]
    raise SystemExit(f"unknown role {role}")


class Stored:
    """One stored matrix: its rows as (values, largest error allowed)."""

    def __init__(self, payload, tensor):
        self.kind, self.group = tensor["kind"], tensor["group_size"]
        self.cols, self.cols_padded = tensor["shape"][1], tensor["padded_shape"][1]
        self.data = payload[tensor["data_offset"]:tensor["data_offset"] + tensor["data_bytes"]]
        self.scale = payload[tensor["scale_offset"]:tensor["scale_offset"] + tensor["scale_bytes"]]

    def row(self, r):
        begin = r * self.cols_padded
        if self.kind == "int8":
            scale = struct.unpack_from("<f", self.scale, 4 * r)[0]
            codes = struct.unpack_from(f"<{self.cols}b", self.data, begin)
            return [code * scale for code in codes], [abs(scale) * 0.501] * self.cols
        values, bounds = [], []
        for c in range(self.cols):
            tile = (r // 64 * (self.cols_padded // 64) + c // 64) * 4 + r % 64 // 16
            byte = self.data[tile * 512 + r % 8 * 64 + INT4_BYTE_OF_COLUMN[c % 64]]
            code = (byte >> 4 if r % 16 >= 8 else byte & 15) ^ 8
            group = r // 16 * (self.cols_padded // self.group) + c // self.group
            scale = struct.unpack_from("<e", self.scale, 2 * (group * 16 + r % 16))[0] / 256
            values.append((code - 8) * scale)
            bounds.append(abs(scale) * (0.501 if -8 < code - 8 < 7 else 3))  # the search may cut off the largest
        return values, bounds


def check_matrix(payload, tensor, wanted, checkpoint, where):
    stored, r = Stored(payload, tensor), 0
    for name, first, rows, first_col, cols in wanted:
        source_cols, source = checkpoint[name]
        cols = source_cols if cols is None else cols
        for row in range(first, first + rows):
            begin = 2 * (row * source_cols + first_col)
            raw = source[begin:begin + 2 * cols]
            if tensor["kind"] == "bf16":
                at = 2 * r * stored.cols_padded
                if stored.data[at:at + 2 * cols] != raw:
                    raise SystemExit(f"{where}: stored row {r} is not row {row} of {name}")
            elif r % 5 == 0 and cols:
                values, bounds = stored.row(r)
                for want, got, bound in zip(floats(raw), values, bounds):
                    if not math.fabs(want - got) <= bound:
                        raise SystemExit(f"{where}: stored row {r} is not row {row} of {name}: {got} for {want}")
            r += 1
    if r != tensor["shape"][0]:
        raise SystemExit(f"{where}: {tensor['shape'][0]} rows, wanted {r}")


def check_vector(payload, tensor, wanted, checkpoint, where):
    values = []
    for name, _, _, first, count in wanted:
        all_values = floats(checkpoint[name][1])
        values += all_values[first:len(all_values) if count is None else first + count]
    got = payload[tensor["data_offset"]:tensor["data_offset"] + tensor["data_bytes"]]
    if struct.pack(f"<{len(values)}f", *values) != got:
        raise SystemExit(f"{where} differs from {wanted[0][0]}")


def main():
    tpshard, model_dir, shard_dir = sys.argv[1:]
    checkpoint = read_checkpoint(model_dir)
    with open(os.path.join(model_dir, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    count = json.loads(subprocess.check_output([tpshard, "inspect", "--json", shard_dir]))["manifest"]["tp_size"]
    tensors = 0
    for r in range(count):
        report = json.loads(subprocess.check_output([tpshard, "inspect", "--json", "--rank", str(r), shard_dir]))
        rank = report["ranks"][r]
        with open(os.path.join(shard_dir, rank["file"]), "rb") as f:
            payload = f.read()[rank["payload_offset"]:]
        for tensor in rank["tensors"]:
            role, layer = tensor["role"], tensor["layer"]
            if role != "rope_inv_freq":
                check = check_vector if tensor["kind"] == "f32" else check_matrix
                check(payload, tensor, expected_rows(role, layer, rank, config), checkpoint, f"rank {r} {layer} {role}")
                tensors += 1
    print(f"{tensors} tensors on {count} ranks hold what they should")


if __name__ == "__main__":
    main()

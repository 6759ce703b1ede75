"""A Llama in float32 for bench_quality_rivals.py: weights from a checkpoint, from a rival's result or from a shard directory, one forward and one
score for all of them. Whatever a quantizer made is judged by its dequantized weights alone: activations, keys and values stay in float32."""
import json
import math
import sys
from pathlib import Path

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import shard_reader  # noqa: E402

BATCH_WINDOWS = 8


# ---- weights ---------------------------------------------------------------------------------------------------------


def read_safetensors(path):
    """{name: float32 tensor} of a file that holds float32 and bfloat16."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = numpy.memmap(path, "u1", "r", 8 + header_bytes + begin, (end - begin,))
        if entry["dtype"] == "BF16":
            values = (data.view("<u2").astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            values = data.view({"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(numpy.float32)
        tensors[name] = torch.from_numpy(values.reshape(entry["shape"]))
    return tensors


def unpack_tiles(data, rows, cols):
    """Four-bit codes in the order of rows and columns."""
    packed = numpy.frombuffer(data, numpy.uint8).reshape(rows // 64, cols // 64, 4, 8, 4, 4, 2, 2)
    # [of 64 rows, of 64 columns, of 16 rows, half, g, t, w, one, eight]: row = 8 half + g, column = 16 w + 8 eight + 2 t + one
    both = numpy.stack([packed & 15, packed >> 4], axis=3)
    return both.transpose(0, 2, 3, 4, 1, 6, 8, 5, 7).reshape(rows, cols)


def dequantize(file, tensor):
    """float32 [rows, cols]; for the kinds that are convert's own."""
    kind, group = tensor["kind"], tensor["group_size"]
    rows, cols = tensor["padded_rows"], tensor["padded_cols"]
    (data_begin, data_bytes), (scale_begin, scale_bytes) = tensor["data"], tensor["scale"]
    data = bytes(file.payload[data_begin:data_begin + data_bytes])
    scales = bytes(file.payload[scale_begin:scale_begin + scale_bytes])

    def of_groups(values):  # [rows / 16, groups, 16] -> [rows, cols]
        return numpy.repeat(values.transpose(0, 2, 1).reshape(rows, -1), group, axis=1)

    if kind == "f32":
        values = numpy.frombuffer(data, "<f4").reshape(rows, cols)
    elif kind == "bf16":
        values = (numpy.frombuffer(data, "<u2").astype(numpy.uint32) << 16).view(numpy.float32).reshape(rows, cols)
    elif kind == "int8":
        values = numpy.frombuffer(data, "i1").reshape(rows, cols) * numpy.frombuffer(scales, "<f4")[:, None]
    elif kind == "fp8":
        table = numpy.array(shard_reader.E4M3, numpy.float32)
        values = table[numpy.frombuffer(data, "u1")].reshape(rows, cols) * numpy.frombuffer(scales, "<f4")[:, None]
    elif kind in ("int4", "nl4"):
        levels = (unpack_tiles(data, rows, cols) ^ 8).astype(numpy.int8) - 8
        step = 2.0**-8
        if kind == "nl4":
            levels, step = numpy.array([shard_reader.NL4[code] for code in range(-8, 8)], numpy.float32)[levels + 8], NL4_STEP
        values = levels * of_groups(numpy.frombuffer(scales, "<f2").astype(numpy.float32).reshape(rows // 16, -1, 16) * step)
    elif kind == "int4z":
        codes = (unpack_tiles(data, rows, cols) ^ 8).astype(numpy.int8) - 8
        both = numpy.frombuffer(scales, "<f2").astype(numpy.float32).reshape(rows // 16, -1, 2, 16)
        values = (codes - of_groups(both[:, :, 1])) * of_groups(both[:, :, 0] * 2.0**-8)
    else:
        raise ValueError(f"weights of kind {kind} are not read here")
    return torch.from_numpy(numpy.array(values[:tensor["rows"], :tensor["cols"]], dtype=numpy.float32))


MATRICES = shard_reader.MATRICES
NL4_STEP = 2.0**-10


def shard_bits(folder):
    """Stored bits of a weight, scales and padding included: of the matrices of the layers, of all matrices."""
    _, files = shard_reader.read_directory(str(folder))
    bits = {True: [0, 0], False: [0, 0]}
    for file in files:
        for tensor in file.tensors:
            if tensor["role"] in MATRICES:
                count = bits[tensor["role"] not in ("embedding", "head")]
                count[0] += 8 * (tensor["data"][1] + tensor["scale"][1])
                count[1] += tensor["rows"] * tensor["cols"]
    return bits[True][0] / bits[True][1], (bits[True][0] + bits[False][0]) / (bits[True][1] + bits[False][1])


def read_shards(folder):
    """A tp 1 shard directory: tensors under a checkpoint's names, and what differs from the checkpoint's function."""
    manifest, (file,) = shard_reader.read_directory(str(folder))
    model = manifest["model"]
    q_rows, kv_rows = model["num_heads"] * model["head_dim"], model["num_kv_heads"] * model["head_dim"]
    found = {(tensor["role"], tensor["layer"]): dequantize(file, tensor) for tensor in file.tensors}
    tensors = {"model.embed_tokens.weight": found["embedding", -1], "model.norm.weight": found["final_norm", -1][0]}
    tensors["lm_head.weight"] = found.get(("head", -1), tensors["model.embed_tokens.weight"])
    for layer in range(model["num_layers"]):
        name = f"model.layers.{layer}."
        for norm, role in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            tensors[f"{name}{norm}.weight"] = found[role, layer][0]
        q, k, v = found["qkv", layer].split([q_rows, kv_rows, kv_rows])
        gate, up = found["gate_up", layer].chunk(2)
        for part, value in (("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v), ("self_attn.o_proj", found["o", layer]),
                            ("mlp.gate_proj", gate), ("mlp.up_proj", up), ("mlp.down_proj", found["down", layer])):
            tensors[f"{name}{part}.weight"] = value
    return tensors, model.get("mlp_rotation", 0)


# ---- forward ---------------------------------------------------------------------------------------------------------


def hadamard(x, block):
    """The orthonormal Walsh-Hadamard transform of each block of the last dimension."""
    shape, x, half = x.shape, x.reshape(-1, block), 1
    while half < block:
        pairs = x.reshape(-1, block // (2 * half), 2, half)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).reshape(-1, block)
        half *= 2
    return (x / math.sqrt(block)).reshape(shape)


class Llama:
    def __init__(self, config, tensors, mlp_rotation=0):
        self.config, self.mlp_rotation = config, mlp_rotation
        self.tensors = {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}
        self.hook = None  # called with the name of a matrix and its input [tokens, columns]

    def linear(self, x, name):
        if self.hook:
            self.hook(name, x.reshape(-1, x.shape[-1]))
        return x @ self.tensors[f"{name}.weight"].T

    def norm(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.tensors[f"{name}.weight"]

    def rotate(self, x):
        """x: [windows, heads, tokens, head_dim], positions from 0."""
        half = self.config["head_dim"] // 2
        angle = torch.arange(x.shape[2])[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)[None]
        return torch.cat([x[..., :half] * angle.cos() - x[..., half:] * angle.sin(), x[..., half:] * angle.cos() + x[..., :half] * angle.sin()], -1)

    @torch.no_grad()
    def logits(self, ids):
        """ids: [windows, tokens] -> [windows, tokens, vocabulary]."""
        c = self.config
        heads, kv_heads, head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, f"{name}input_layernorm")
            q, k, v = (self.linear(h, f"{name}self_attn.{part}_proj").unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in "qkv")
            k, v = (torch.repeat_interleave(part, heads // kv_heads, 1) for part in (self.rotate(k), v))
            h = torch.nn.functional.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
            x = x + self.linear(h.transpose(1, 2).flatten(2), f"{name}self_attn.o_proj")
            h = self.norm(x, f"{name}post_attention_layernorm")
            h = torch.nn.functional.silu(self.linear(h, f"{name}mlp.gate_proj")) * self.linear(h, f"{name}mlp.up_proj")
            if self.mlp_rotation:
                h = hadamard(h, self.mlp_rotation)
            x = x + self.linear(h, f"{name}mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head")


# ---- windows and score -----------------------------------------------------------------------------------------------


def windows_of(ids, bos, length, wanted):
    """Batches of (inputs, targets): windows of length - 1 tokens, each behind the token that begins a text, as `tpengine eval` has them; `wanted` of
    them, evenly over the text, or with 0 all that are whole."""
    whole = [ids[first:first + length - 1] for first in range(0, len(ids) - length + 2, length - 1)]
    wanted = min(wanted or len(whole), len(whole))
    whole = [whole[i * len(whole) // wanted] for i in range(wanted)]
    batches = [whole[first:first + BATCH_WINDOWS] for first in range(0, wanted, BATCH_WINDOWS)]
    return [(torch.tensor([[bos, *part[:-1]] for part in batch]), torch.tensor(batch)) for batch in batches]


class Score:
    """Perplexity, and against the reference's log-probabilities the Kullback-Leibler divergence KL(reference || model) and top-1 agreement.
    Intervals of 95 % come from the windows: tokens of one window depend on each other, windows hardly."""

    def __init__(self, reference, batches):
        self.batches = batches
        self.reference = [torch.log_softmax(reference.logits(inputs), -1) for inputs, _ in batches]

    def of(self, model):
        nll, kld, same, tokens = [], [], [], []
        for (inputs, targets), reference in zip(self.batches, self.reference):
            found = torch.log_softmax(model.logits(inputs), -1)
            nll += (-found.gather(2, targets[..., None])[..., 0]).double().sum(1).tolist()
            kld += (reference.exp() * (reference - found)).double().sum((1, 2)).tolist()
            same += (found.argmax(-1) == reference.argmax(-1)).sum(1).tolist()
            tokens += [targets.shape[1]] * len(targets)
        total = sum(tokens)

        def interval(sums):  # of a mean over tokens whose windows are drawn
            mean = sum(sums) / total
            spread = sum((value - mean * count) ** 2 for value, count in zip(sums, tokens))
            return 1.96 * math.sqrt(spread * len(sums) / max(1, len(sums) - 1)) / total

        if not all(map(math.isfinite, nll + kld)):
            raise ValueError("a logit is not a finite number")
        return {"perplexity": math.exp(sum(nll) / total), "kld": sum(kld) / total, "kld_interval": interval(kld), "top1": sum(same) / total,
                "top1_interval": interval(same), "tokens": total}

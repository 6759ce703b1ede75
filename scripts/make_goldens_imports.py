#!/usr/bin/env python3
"""Tiny checkpoints in every quantized format of the Hub, and the logits that `transformers` computes from their dequantized weights.

Needs (in a virtual environment): torch, transformers, safetensors, numpy; and the formats' own libraries, which dequantize what is written
here and must agree: compressed-tensors, hqq, bitsandbytes (termcolor, loguru, psutil for these). GPTQ, AWQ, block FP8 and gpt-oss' MXFP4
are packed and unpacked here from their specifications, by code that shares nothing with tpshard's.
Usage: scripts/make_goldens_imports.py [tests/golden/imports]

For each case: config.json, model.safetensors, logits.npy (float32 [tokens, vocab_size]) and golden.json: token_ids, the bound on logits,
and under "weights" the SHA-256 of each stored matrix's float32 values, whole, as tpshard stores it (columns sorted by group where act-order
is folded). Matrices that no stored kind holds exactly stand under "rounded", with the largest relative error allowed.
"""
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import GptOssConfig, LlamaConfig, Qwen2Config, Qwen3MoeConfig

TOKENS = 16
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)

COMMON = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
              vocab_size=40, max_position_embeddings=128, rms_norm_eps=1e-5, attention_dropout=0.0, bos_token_id=0, eos_token_id=1,
              pad_token_id=None, tie_word_embeddings=False)


def rope(theta, **scaling):
    return dict(rope_parameters=dict(rope_theta=theta, **(scaling or {"rope_type": "default"})))


def as_f32(values):
    return np.asarray(values, np.float32)


def digest(values):
    return hashlib.sha256(np.ascontiguousarray(as_f32(values)).tobytes()).hexdigest()


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


# ---- integers in words -----------------------------------------------------------------------------------------------

def pack_words(codes, axis, bits=4):
    """Code i of each group of 32 / bits along the axis into bits i * bits of an int32."""
    per_word = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word) * per_word), np.uint64)
    padded[..., :codes.shape[-1]] = codes
    words = np.zeros((*padded.shape[:-1], padded.shape[-1] // per_word), np.uint64)
    for i in range(per_word):
        words |= padded[..., i::per_word] << np.uint64(i * bits)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def quantize_groups(weight, group, symmetric, rng, bits=4, index=None):
    """Codes 0..2^bits-1 [N, K], scales f16 [N, G], zeros [N, G]; index: the group of each column."""
    rows, cols = weight.shape
    group = cols if group < 0 else group
    groups = -(-cols // group)
    index = np.arange(cols) // group if index is None else index
    top = 2**bits - 1
    scales = np.zeros((rows, groups), np.float16)
    zeros = np.zeros((rows, groups), np.int64)
    codes = np.zeros((rows, cols), np.int64)
    for g in range(groups):
        part = weight[:, index == g]
        if symmetric:
            scales[:, g] = np.abs(part).max(1) / (top / 2)
            zeros[:, g] = (top + 1) // 2
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.rint(-low / as_f32(scales[:, g])), 0, top) + 0
        wide = as_f32(scales[:, g])[:, None]
        codes[:, index == g] = np.clip(np.rint(part / wide) + zeros[:, g][:, None], 0, top)
    del rng
    values = (codes - zeros[:, index]).astype(np.float32) * as_f32(scales)[:, index]
    return codes, scales, zeros, values


# ---- formats: each makes the tensors of one module and its values ------------------------------------------------------

class Gptq:
    def __init__(self, group, symmetric=True, version=1, bits=4, act_order=False):
        self.group, self.symmetric, self.version, self.bits, self.act_order = group, symmetric, version, bits, act_order
        self.config = dict(quant_method="gptq", bits=bits, group_size=group, sym=symmetric, desc_act=act_order, damp_percent=0.01,
                           checkpoint_format="gptq" if version == 1 else "gptq_v2", true_sequential=True, static_groups=False)

    def module(self, name, weight, rng):
        rows, cols = weight.shape
        index = np.arange(cols) // (cols if self.group < 0 else self.group)
        if self.act_order:  # the same for all that read the same input, as their Hessian is the same
            which = name.split(".")[-1]
            seed = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 2, "up_proj": 2, "o_proj": 3, "down_proj": 4}[which]
            index = np.random.default_rng(seed).permutation(index)
        codes, scales, zeros, values = quantize_groups(weight, self.group, self.symmetric, rng, self.bits, index)
        if not self.symmetric and self.version == 1:  # one beyond the nibble's range: stored as 15, read as 16
            zeros[0, 0] = 2**self.bits
            values = (codes - zeros[:, index]).astype(np.float32) * as_f32(scales)[:, index]
        stored_zeros = zeros - 1 if self.version == 1 else zeros
        return {f"{name}.qweight": tensor(pack_words(codes.T, 0, self.bits)),
                f"{name}.qzeros": tensor(pack_words(stored_zeros.T & (2**self.bits - 1), 1, self.bits)),
                f"{name}.scales": tensor(scales.T), f"{name}.g_idx": tensor(index.astype(np.int32))}, values

    def order(self, name, cols):
        which = name.split(".")[-1]
        if not self.act_order:
            return None
        seed = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 2, "up_proj": 2, "o_proj": 3, "down_proj": 4}[which]
        return np.argsort(np.random.default_rng(seed).permutation(np.arange(cols) // self.group), kind="stable")


class Awq:
    config = dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm", modules_to_not_convert=None)
    nibbles = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this column of eight

    def module(self, name, weight, rng):
        codes, scales, zeros, values = quantize_groups(weight, 32, False, rng)
        shuffled = np.arange(len(weight)).reshape(-1, 8)[:, self.nibbles].reshape(-1)
        return {f"{name}.qweight": tensor(pack_words(codes.T[:, shuffled], 1)),
                f"{name}.qzeros": tensor(pack_words(zeros.T[:, shuffled], 1)), f"{name}.scales": tensor(scales.T)}, values


def compressed_config(form, weights, **more):
    return dict(quant_method="compressed-tensors", format=form, quantization_status="compressed", ignore=["lm_head"], kv_cache_scheme=None,
                config_groups={"group_0": dict(targets=["Linear"], input_activations=None, output_activations=None, weights=dict(
                    dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=None, actorder=None, dynamic=False,
                         block_structure=None, observer="minmax"), **weights))}, **more)


class Packed:
    """compressed-tensors, int4 in words along the row."""

    def __init__(self, symmetric, group, act_order=False, scale_dtype=torch.float16, bits=4):
        self.symmetric, self.group, self.act_order, self.scale_dtype, self.bits = symmetric, group, act_order, scale_dtype, bits
        self.config = compressed_config("pack-quantized", dict(
            num_bits=bits, symmetric=symmetric, strategy="channel" if group < 0 else "group", group_size=None if group < 0 else group,
            actorder="group" if act_order else None))

    def module(self, name, weight, rng):
        from compressed_tensors.compressors import unpack_from_int32
        rows, cols = weight.shape
        index = np.arange(cols) // (cols if self.group < 0 else self.group)
        if self.act_order:
            index = np.random.default_rng(5).permutation(index)
        codes, scales, zeros, _ = quantize_groups(weight, self.group, self.symmetric, rng, self.bits, index)
        scales = tensor(as_f32(scales)).to(self.scale_dtype)
        values = (codes - zeros[:, index]).astype(np.float32) * scales.to(torch.float32).numpy()[:, index]
        packed = tensor(pack_words(codes, 1, self.bits))
        half = 2**(self.bits - 1)
        assert (unpack_from_int32(packed, self.bits, torch.Size(weight.shape)).numpy() == codes - half).all()
        tensors = {f"{name}.weight_packed": packed, f"{name}.weight_scale": scales,
                   f"{name}.weight_shape": torch.tensor([rows, cols], dtype=torch.int64)}
        if not self.symmetric:
            points = tensor(pack_words(zeros, 0, self.bits))
            tensors[f"{name}.weight_zero_point"] = points
            unpacked = unpack_from_int32(points, self.bits, torch.Size(zeros.shape), packed_dim=0).numpy()
            assert (unpacked == zeros - half).all()
        if self.act_order:
            tensors[f"{name}.weight_g_idx"] = tensor(index.astype(np.int32))
        return tensors, values

    def order(self, name, cols):
        return np.argsort(np.random.default_rng(5).permutation(np.arange(cols) // self.group), kind="stable") if self.act_order else None


class Int8:
    config = compressed_config("int-quantized", dict(num_bits=8, strategy="channel"))

    def module(self, name, weight, rng):
        scale = (np.abs(weight).max(1) / 127.5).astype(np.float32)[:, None]
        scale = tensor(scale).to(torch.bfloat16)
        wide = scale.to(torch.float32).numpy()
        codes = np.clip(np.rint(weight / wide), -128, 127).astype(np.int8)
        return {f"{name}.weight": tensor(codes), f"{name}.weight_scale": scale}, codes.astype(np.float32) * wide


def to_e4m3(values):
    codes = tensor(as_f32(values)).to(torch.float8_e4m3fn)
    return codes, codes.to(torch.float32).numpy()


class Fp8:
    """Scales of blocks [rows, cols]; None: the whole dimension."""

    def __init__(self, config, block, suffix, dtype=torch.float32, input_scale=False):
        self.config, self.block, self.suffix, self.dtype, self.input_scale = config, block, suffix, dtype, input_scale

    def module(self, name, weight, rng):
        rows, cols = weight.shape
        height, width = self.block[0] or rows, self.block[1] or cols
        scales = np.array([[np.abs(weight[r:r + height, c:c + width]).max() / 448 for c in range(0, cols, width)]
                           for r in range(0, rows, height)], np.float32)
        stored = tensor(scales).to(self.dtype)
        wide = stored.to(torch.float32).numpy()
        whole = np.repeat(np.repeat(wide, height, 0)[:rows], width, 1)[:, :cols]
        codes, values = to_e4m3(weight / whole)
        tensors = {f"{name}.weight": codes, f"{name}.{self.suffix}": stored.reshape(1) if self.block == (None, None) else stored}
        if self.input_scale:
            tensors[f"{name}.input_scale"] = torch.tensor([0.01])
        return tensors, values * whole


def fp4_codes(values):
    order = np.argsort(E2M1, kind="stable")
    middle = (E2M1[order][1:] + E2M1[order][:-1]) / 2
    return order[np.searchsorted(middle, values)].astype(np.uint8)


def fp4_bytes(codes):
    return codes[..., 0::2] | codes[..., 1::2] << 4  # the even column is in the low nibble


class Nvfp4:
    def __init__(self, modelopt):
        self.modelopt = modelopt
        self.config = (dict(quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"], producer=dict(name="modelopt", version="0.29"))
                       if modelopt else compressed_config("nvfp4-pack-quantized", dict(type="float", strategy="tensor_group", group_size=16)))

    def module(self, name, weight, rng):
        rows, cols = weight.shape
        divisor = np.float32(448 * 6 / np.abs(weight).max())
        factor = np.float32(1) / divisor
        largest = np.abs(weight.reshape(rows, -1, 16)).max(2)
        scales, wide = to_e4m3(largest / 6 * divisor)
        whole = np.repeat(wide, 16, 1)
        codes = fp4_codes(weight / np.maximum(whole.astype(np.float64) * factor, 1e-30))
        values = as_f32(E2M1[codes].astype(np.float64) * whole * np.float64(factor))
        packed = tensor(fp4_bytes(codes))
        if self.modelopt:
            return {f"{name}.weight": packed, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": torch.tensor(factor),
                    f"{name}.input_scale": torch.tensor(0.02)}, values
        from compressed_tensors.compressors import unpack_fp4_from_uint8
        unpacked = unpack_fp4_from_uint8(packed, rows, cols).to(torch.float32).numpy()
        theirs = unpacked * np.repeat(wide / divisor, 16, 1)
        assert np.abs(theirs - values).max() <= 3e-7 * np.abs(values).max()
        return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scales, f"{name}.weight_global_scale": torch.tensor([divisor]),
                f"{name}.input_global_scale": torch.tensor([300.0])}, values


def mxfp4(weight):
    """Codes, scales and values in blocks of 32 columns."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    codes = fp4_codes(blocks / 2.0**exponents[..., None])
    values = (E2M1[codes] * 2.0**exponents[..., None]).astype(np.float32)
    return codes, (exponents + 127).astype(np.uint8), values.reshape(weight.shape)


class Mxfp4:
    config = compressed_config("mxfp4-pack-quantized", dict(type="float", group_size=32))

    def module(self, name, weight, rng):
        codes, scales, values = mxfp4(weight)
        from compressed_tensors.compressors import unpack_fp4_from_uint8
        packed = tensor(fp4_bytes(codes.reshape(weight.shape)))
        assert (unpack_fp4_from_uint8(packed, *weight.shape).to(torch.float32).numpy() == E2M1[codes].reshape(weight.shape)).all()
        return {f"{name}.weight_packed": packed, f"{name}.weight_scale": tensor(scales)}, values


class Nf4:
    def __init__(self, nested):
        self.nested = nested
        self.config = dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4",
                           bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["lm_head"])

    def module(self, name, weight, rng):
        import bitsandbytes.functional as bnb
        # As rows of one block: its CPU kernel (0.50) takes the wrong scales where rows are not whole blocks.
        codes, state = bnb.quantize_4bit(tensor(as_f32(weight)).reshape(-1, 64), blocksize=64, quant_type="nf4",
                                         compress_statistics=self.nested)
        values = bnb.dequantize_4bit(codes, state).numpy().reshape(weight.shape)
        state.shape = torch.Size(weight.shape)
        tensors = {f"{name}.weight": codes}
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.weight.{key}"] = value.contiguous()
        return tensors, values


class Hqq:
    def __init__(self, round_zero):
        self.round_zero = round_zero
        self.config = dict(quant_method="hqq", skip_modules=["lm_head"], quant_config=dict(weight_quant_params=dict(
            nbits=4, group_size=32, axis=1, channel_wise=True, optimize=True, round_zero=round_zero, view_as_float=False)))

    def module(self, name, weight, rng):
        from hqq.core.quantize import Quantizer
        packed, meta = Quantizer.quantize(tensor(as_f32(weight)), nbits=4, group_size=32, axis=1, optimize=not self.round_zero,
                                          round_zero=self.round_zero, device="cpu", compute_dtype=torch.float32)
        if self.round_zero:
            meta["scale"] = meta["scale"].to(torch.float16)
        values = (Quantizer.unpack[meta["packing"]](packed, dtype=torch.float32).reshape(-1, 32) - meta["zero"].to(torch.float32).reshape(-1, 1))
        values = (values * meta["scale"].to(torch.float32).reshape(-1, 1)).reshape(weight.shape)
        theirs = Quantizer.dequantize(packed, {**meta, "scale": meta["scale"].to(torch.float32)})
        assert torch.equal(values, theirs.to(torch.float32))
        return {f"{name}.W_q": packed, f"{name}.scale": meta["scale"], f"{name}.zero": meta["zero"],
                f"{name}.nbits": torch.tensor(4), f"{name}.group_size": torch.tensor(32), f"{name}.axis": torch.tensor(1)}, values.numpy()


class Mixed:
    """Another format for some modules; None: plain."""

    def __init__(self, first, others):
        self.first, self.others, self.config = first, others, first.config

    def module(self, name, weight, rng):
        for part, form in self.others.items():
            if part in name:
                return form.module(name, weight, rng) if form else None
        return self.first.module(name, weight, rng)


# ---- models ------------------------------------------------------------------------------------------------------------

def llama(**more):
    return LlamaConfig(**{**COMMON, **more}, **rope(10000.0))


FP8_BLOCK = dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[128, 128])
FBGEMM = dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"])
SMALL = dict(hidden_size=48, intermediate_size=72, head_dim=16)
LOSSLESS = None

# name: config, format, modules stored with rounding (part of the name: largest relative error)
CASES = {
    "gptq": (llama(), Gptq(32), LOSSLESS),
    "gptq_short_group": (llama(), Gptq(64, symmetric=False, version=2), LOSSLESS),
    "gptq_act_order": (llama(attention_bias=True, mlp_bias=True), Gptq(32, act_order=True), {"o_proj": 0.1}),
    "gptq_act_order_zeros": (Qwen2Config(**COMMON, use_sliding_window=False, **rope(10000.0)), Gptq(32, symmetric=False, act_order=True),
                             {"o_proj": 0.1}),
    "gptq_whole_rows": (llama(), Gptq(-1), LOSSLESS),
    "gptq_int8": (llama(**SMALL), Gptq(-1, bits=8), LOSSLESS),
    "gptq_mixed": (llama(), Mixed(Gptq(32), {"k_proj": Gptq(-1), "v_proj": Gptq(64), "up_proj": None}),
                   {"gate_proj": 0.004}),
    "awq": (llama(), Awq(), LOSSLESS),
    "ct_int4": (llama(), Packed(True, 32, scale_dtype=torch.bfloat16), LOSSLESS),
    "ct_int4_zeros": (llama(), Packed(False, 64), LOSSLESS),
    "ct_int4_act_order": (llama(), Packed(True, 32, act_order=True), {"o_proj": 0.1}),
    "ct_int8": (llama(**SMALL), Int8(), LOSSLESS),
    "ct_int8_packed": (llama(**SMALL), Packed(True, -1, bits=8), LOSSLESS),
    "ct_fp8": (llama(**SMALL), Fp8(compressed_config("float-quantized", dict(num_bits=8, type="float", strategy="tensor")), (None, None),
                                   "weight_scale", torch.bfloat16, input_scale=True), LOSSLESS),
    "ct_fp8_channel": (llama(**SMALL), Fp8(compressed_config("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
                                           (1, None), "weight_scale", torch.bfloat16), LOSSLESS),
    "fbgemm_fp8": (llama(**SMALL), Fp8(FBGEMM, (1, None), "weight_scale"), LOSSLESS),
    "fp8_block": (llama(hidden_size=136, head_dim=32, intermediate_size=144), Fp8(FP8_BLOCK, (128, 128), "weight_scale_inv"), LOSSLESS),
    "fp8_block_experts": (Qwen3MoeConfig(**{**COMMON, "intermediate_size": 64}, moe_intermediate_size=136, num_experts=3,
                                         num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
                                         use_sliding_window=False, **rope(10000.0)),
                          Fp8(FP8_BLOCK, (128, 128), "weight_scale_inv", torch.bfloat16), LOSSLESS),
    "ct_nvfp4": (llama(), Nvfp4(False), LOSSLESS),
    "modelopt_nvfp4": (llama(), Nvfp4(True), LOSSLESS),
    "ct_mxfp4": (llama(), Mxfp4(), LOSSLESS),
    "gpt_oss": (GptOssConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                             head_dim=32, vocab_size=40, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                             max_position_embeddings=128, initial_context_length=128, eos_token_id=1, pad_token_id=None,
                             layer_types=["sliding_attention"],
                             rope_parameters=dict(rope_type="default", rope_theta=150000.0)), "mxfp4", LOSSLESS),
    "bnb_nf4": (llama(**SMALL), Nf4(False), {"proj": 0.12}),
    "bnb_nf4_nested": (llama(), Nf4(True), {"proj": 0.12}),
    "hqq": (llama(), Hqq(False), {"proj": 0.001}),
    "hqq_round_zero": (llama(), Hqq(True), LOSSLESS),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1.0 + 0.3 * noise
            elif name.endswith("bias") or "sinks" in name:
                noise = 0.3 * noise
            elif "embed" not in name:
                noise = noise * 1.2 / parameter.shape[1 if "experts.gate_up_proj" in name or "experts.down_proj" in name else -1]**0.5
            parameter.copy_(noise.to(torch.bfloat16).to(torch.float32))


def stacked(model, name):
    """(hub name, parameter, rows) of the modules that a stack of transformers holds; [] for any other parameter."""
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return []
    parameter = dict(model.named_parameters())[name]
    prefix, found = name.rsplit(".", 1)[0], []
    for expert in range(parameter.shape[0]):
        if name.endswith("down_proj"):
            found.append((f"{prefix}.{expert}.down_proj", parameter[expert]))
        else:
            half = parameter.shape[1] // 2
            found += [(f"{prefix}.{expert}.gate_proj", parameter[expert][:half]), (f"{prefix}.{expert}.up_proj", parameter[expert][half:])]
    return found


def quantize_modules(model, form, rng):
    """Tensors of the checkpoint; the model's parameters become what they dequantize to."""
    tensors, weights = {}, {}
    for name, parameter in model.named_parameters():
        quantized = stacked(model, name)
        if not quantized and name.endswith("_proj.weight"):
            quantized = [(name[:-len(".weight")], parameter)]
        if not quantized:
            tensors[name] = parameter.detach().to(torch.bfloat16).contiguous()
            continue
        for module, view in quantized:
            made = form.module(module, view.detach().numpy(), rng)
            if made is None:
                tensors[f"{module}.weight"] = view.detach().to(torch.bfloat16).contiguous()
                continue
            tensors.update(made[0])
            weights[f"{module}.weight"] = made[1]
            with torch.no_grad():
                view.copy_(tensor(as_f32(made[1])))
    return tensors, weights


def quantize_gpt_oss(model):
    """Experts as gpt-oss has them: [experts, rows, blocks, 16], rows of gate and up alternating, as transformers holds their columns."""
    tensors, weights = {}, {}
    for name, parameter in model.named_parameters():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = parameter.detach().to(torch.bfloat16).contiguous()
            continue
        codes, scales, values = mxfp4(parameter.detach().numpy().transpose(0, 2, 1))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = tensor(fp4_bytes(codes)), tensor(scales)
        with torch.no_grad():
            parameter.copy_(tensor(np.ascontiguousarray(values.transpose(0, 2, 1))))
        for expert, matrix in enumerate(values):
            stored = np.concatenate([matrix[0::2], matrix[1::2]]) if "gate_up" in name else matrix
            weights[f"{name}[{expert}]"] = stored
    return tensors, weights


def as_stored(weights, form):
    """Columns sorted by group where act-order is folded, and the rows in front of them."""
    stored = dict(weights)
    for name, values in weights.items():
        module = name[:-len(".weight")]
        order = form.order(module, values.shape[1]) if hasattr(form, "order") else None
        if order is None or module.endswith("o_proj"):
            continue
        stored[name] = stored[name][:, order]
        if module.endswith("down_proj"):
            for side in ("gate_proj", "up_proj"):
                stored[name.replace("down_proj", side)] = stored[name.replace("down_proj", side)][order]
    return stored


def expert_gap(model, ids):
    """The smallest distance between the last chosen expert's logit and the first one's that is not, relative to the logits' spread."""
    gaps, chosen = [1.0], getattr(model.config, "num_experts_per_tok", None)

    def look(module, inputs, _):
        logits = torch.nn.functional.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight, getattr(module, "bias", None))
        ordered = logits.sort(-1, descending=True).values
        gaps.append(((ordered[:, chosen - 1] - ordered[:, chosen]) / logits.std(-1)).min().item())

    hooks = [module.register_forward_hook(look) for name, module in model.named_modules() if name.endswith((".mlp.router", ".mlp.gate"))]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return min(gaps)


def make_case(directory, name, config, form, rounded, seed):
    """False: an expert is chosen so narrowly that rounding could choose another."""
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    randomise(model, seed)
    if form == "mxfp4":
        tensors, weights = quantize_gpt_oss(model)
        stored, quantization = weights, dict(quant_method="mxfp4", modules_to_not_convert=[
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])
    else:
        tensors, weights = quantize_modules(model, form, np.random.default_rng(seed))
        stored, quantization = as_stored(weights, form), form.config
    if name == "gptq":  # as some writers do: biases of zeros that the model does not have
        for layer in range(config.num_hidden_layers):
            tensors[f"model.layers.{layer}.mlp.up_proj.bias"] = torch.zeros(config.intermediate_size, dtype=torch.float16)
    ids = torch.randint(0, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    if expert_gap(model, ids) < 0.15:
        return False
    with torch.no_grad():
        logits = model(ids[None]).logits[0].to(torch.float32).numpy()
    assert np.isfinite(logits).all() and logits.std() > 0.1, name
    case = directory / name
    case.mkdir(parents=True)
    text = {**config.to_diff_dict(), "architectures": [type(model).__name__], "quantization_config": quantization}
    text.pop("_attn_implementation", None)
    if name == "fp8_block_experts":  # as the Hub's files have it
        text["num_experts"] = text.pop("num_local_experts")
    (case / "config.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    save_file(tensors, case / "model.safetensors", metadata={"format": "pt"})
    np.save(case / "logits.npy", logits)
    rounded = rounded or {}
    exact = {source: digest(values) for source, values in stored.items() if not any(part in source for part in rounded)}
    (case / "golden.json").write_text(json.dumps({"token_ids": ids.tolist(), "weights": exact, "rounded": rounded}, indent=1) + "\n")
    print(name, sum(file.stat().st_size for file in case.iterdir()))
    return True


def main():
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/imports")
    shutil.rmtree(directory, ignore_errors=True)
    for seed, (name, (config, form, rounded)) in enumerate(CASES.items()):
        for attempt in range(200):
            if make_case(directory, name, config, form, rounded, 1000 + 1000 * seed + 2 * attempt):
                break
        else:
            raise SystemExit(f"{name}: no seed keeps the choice of experts clear")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes a Hugging Face checkpoint of random weights, of any size, fast: for tests and benchmarks of tpshard.

Needs: the standard library only.

    python scripts/make_synthetic_checkpoint.py --layers 8 --hidden 2048 build/synthetic

The weights come from one block of random numbers that every tensor reads from another place, so that gigabytes take
seconds; equal arguments give equal bytes. There is no tokenizer.
"""
import argparse
import json
import os
import random
import struct

BLOCK_BYTES = 8 << 20

FAMILIES = {
    "llama": {"architecture": "LlamaForCausalLM", "biases": []},
    "llama-biases": {"architecture": "LlamaForCausalLM", "biases": ["q", "k", "v", "o", "mlp"]},
    "mistral": {"architecture": "MistralForCausalLM", "biases": []},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "biases": ["q", "k", "v"]},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "biases": []},
}


# Bytes of a number, and the highest byte of a small one: its sign and most of its exponent.
DTYPES = {"BF16": (2, 0x3B), "F16": (2, 0x20), "F32": (4, 0x3B)}


def random_block(seed, dtype):
    """Small numbers of both signs and several magnitudes."""
    source = random.Random(seed)
    width, small = DTYPES[dtype]
    signs_and_exponents = bytes((i & 0x80) | small | ((i & 3) == 3) << 2 for i in range(256))
    block = bytearray(source.randbytes(BLOCK_BYTES))
    block[width - 1::width] = block[width - 1::width].translate(signs_and_exponents)
    return bytes(block)


def tensors(args, family):
    """Names and shapes in the usual order: embedding, layers, norm, head."""
    hidden, mlp = args.hidden, args.intermediate
    heads, kv = args.heads * args.head_dim, args.kv_heads * args.head_dim
    yield "model.embed_tokens.weight", [args.vocab, hidden]
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", [hidden]
        for name, rows, cols in [("q", heads, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, heads)]:
            yield f"{prefix}self_attn.{name}_proj.weight", [rows, cols]
            if name in family["biases"]:
                yield f"{prefix}self_attn.{name}_proj.bias", [rows]
        if family["architecture"].startswith("Qwen3"):
            yield prefix + "self_attn.q_norm.weight", [args.head_dim]
            yield prefix + "self_attn.k_norm.weight", [args.head_dim]
        yield prefix + "post_attention_layernorm.weight", [hidden]
        for name, rows, cols in [("gate", mlp, hidden), ("up", mlp, hidden), ("down", hidden, mlp)]:
            yield f"{prefix}mlp.{name}_proj.weight", [rows, cols]
            if "mlp" in family["biases"]:
                yield f"{prefix}mlp.{name}_proj.bias", [rows]
    yield "model.norm.weight", [hidden]
    if not args.tied:
        yield "lm_head.weight", [args.vocab, hidden]


def write_config(args, family):
    config = {
        "architectures": [family["architecture"]],
        "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": args.tied, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }
    if "o" in family["biases"]:
        config["attention_bias"] = config["mlp_bias"] = True
    if family["architecture"].startswith("Mistral"):
        config["sliding_window"] = None
    with open(os.path.join(args.out_dir, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


def write_file(path, named_shapes, dtype, block, offset):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in named_shapes:
        num_bytes = DTYPES[dtype][0]
        for dim in shape:
            num_bytes *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        left = at
        while left > 0:
            piece = block[offset:offset + left]
            f.write(piece)
            left -= len(piece)
            offset = (offset + len(piece) + 4 * 7919) % BLOCK_BYTES  # never in step with the tensors
    return offset, at


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=688)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--files", type=int, default=1, help="safetensors files to spread the tensors over")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    family = FAMILIES[args.family]
    os.makedirs(args.out_dir, exist_ok=True)
    write_config(args, family)
    block, offset, total = random_block(args.seed, args.dtype), 0, 0
    everything = list(tensors(args, family))
    weight_map = {}
    for i in range(args.files):
        share = everything[len(everything) * i // args.files:len(everything) * (i + 1) // args.files]
        name = "model.safetensors" if args.files == 1 else f"model-{i + 1:05d}-of-{args.files:05d}.safetensors"
        offset, num_bytes = write_file(os.path.join(args.out_dir, name), share, args.dtype, block, offset)
        total += num_bytes
        weight_map.update((tensor, name) for tensor, _ in share)
    if args.files > 1:
        with open(os.path.join(args.out_dir, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=2)
    print(f"{args.out_dir}: {len(everything)} tensors, {total / 1e6:.1f} MB in {args.files} files")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Grows the bundled model (tests/model) into one of 25 million parameters, trains it on, and injects outlier channels.

Quantization is measured on more than the bundled model; a larger one trained from scratch would take days on a CPU.
So it is grown: at first it computes the very same function, twice as wide and half as deep again, with random
differences that cancel each other; training makes use of them. Needs what scripts/train_model.py needs.

    python scripts/grow_model.py train --out DIR --minutes 60          # checkpoints on the way; the last one stays
    python scripts/grow_model.py outliers --model DIR --out DIR2       # the same function with outlier channels

`outliers` leaves the function as it is but for the rounding to bfloat16: in each layer and before each of its two
groups of matrices a few channels of the norm's gain are divided by a factor, and the columns that read them are
multiplied by it ("weights": columns of large weights), or the other way round ("activations": channels of large
activations, whose columns are small).
"""
import argparse
import json
import math
import os
import shutil
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import train_model

SOURCE = "tests/model"
LAYERS_FROM = [0, 1, 1, 2, 2, 3]  # a repeated layer begins as the identity
SEED = 1611
SEQUENCE_LENGTHS = [(0.5, 256), (0.8, 512), (1.0, 1024)]  # (up to this share of the time, tokens per sequence)
MUON_LR, ADAM_LR = 0.008, 0.0008  # from here, after the warm-up, linearly to zero with the time
WARMUP_STEPS = 6
CHECKPOINT_SECONDS = 240
HELDOUT_TOKENS = 8 * 511  # of the held-out text, for the progress line


# ---- Growth -------------------------------------------------------------------------------------------------

def wider_inputs(weight, generator):
    """[rows, 2 x columns] that gives for [x, x] what `weight` gives for x."""
    noise = torch.randn(weight.shape, generator=generator) * weight.std() / 2
    return torch.cat([weight / 2 + noise, weight / 2 - noise], dim=1)


def twice(tensor):
    return torch.cat([tensor, tensor], dim=0)


def grow(source):
    """Tensors of the grown model: the residual stream is [x, x], the MLP's inner channels too."""
    generator = torch.Generator().manual_seed(SEED)
    grown = {"model.embed_tokens.weight": torch.cat([source["model.embed_tokens.weight"]] * 2, dim=1),
             "model.norm.weight": twice(source["model.norm.weight"]) / 2}  # tied: the head sums over both halves
    for layer, origin in enumerate(LAYERS_FROM):
        is_new = origin in LAYERS_FROM[:layer]
        for name in ("input_layernorm", "post_attention_layernorm"):
            grown[f"model.layers.{layer}.{name}.weight"] = twice(source[f"model.layers.{origin}.{name}.weight"])
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = source[f"model.layers.{origin}.self_attn.{name}.weight"]
            grown[f"model.layers.{layer}.self_attn.{name}.weight"] = wider_inputs(weight, generator)
        for name in ("gate_proj", "up_proj"):
            weight = twice(source[f"model.layers.{origin}.mlp.{name}.weight"])
            grown[f"model.layers.{layer}.mlp.{name}.weight"] = wider_inputs(weight, generator)
        output = twice(source[f"model.layers.{origin}.self_attn.o_proj.weight"])
        down = wider_inputs(twice(source[f"model.layers.{origin}.mlp.down_proj.weight"]), generator)
        grown[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.zeros_like(output) if is_new else output
        grown[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.zeros_like(down) if is_new else down
    return grown


def write_files(out, config):
    """The directory but for its weights."""
    os.makedirs(out, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "heldout.txt"):
        shutil.copyfile(os.path.join(SOURCE, name), os.path.join(out, name))
    train_model.write_json(os.path.join(out, "config.json"), config)


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def train(args):
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    source = {name: tensor.float() for name, tensor in
              load_file(os.path.join(SOURCE, "model.safetensors")).items()}
    config = read_json(os.path.join(SOURCE, "config.json"))
    config.update(hidden_size=2 * config["hidden_size"], intermediate_size=2 * config["intermediate_size"],
                  num_hidden_layers=len(LAYERS_FROM))
    write_files(args.out, config)

    tokenizer = Tokenizer.from_file(os.path.join(SOURCE, "tokenizer.json"))
    chapters = train_model.read_chapters(args.text)
    batches = train_model.Batches(tokenizer, [body for i, (_, body) in enumerate(chapters)
                                              if not train_model.is_heldout(i)])
    batches.epoch = 11  # shuffles that the bundled model's training has not used
    with open(os.path.join(SOURCE, "heldout.txt"), encoding="utf-8") as f:
        heldout_ids = train_model.encode(tokenizer, f.read())[:HELDOUT_TOKENS]

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(args.out)).float()
    before = LlamaForCausalLM(LlamaConfig.from_pretrained(SOURCE)).float()
    before.load_state_dict(source, strict=False)
    before.tie_weights()
    model.load_state_dict(grow(source), strict=False)
    model.tie_weights()
    probe = torch.tensor([[batches.bos] + heldout_ids[:63]])
    with torch.no_grad():
        difference = (model(input_ids=probe).logits - before(input_ids=probe).logits).abs().max().item()
    print(f"parameters {sum(p.numel() for p in model.parameters())}, largest difference of the grown model's "
          f"logits {difference:.2e}", flush=True)
    if not difference <= 1e-3:
        raise SystemExit("the grown model computes another function")

    optimizers = train_model.make_optimizers(model)
    rates = [MUON_LR, ADAM_LR]
    started = checkpointed = time.monotonic()
    step, losses, share = 0, [], 0.0
    while share < 1:
        factor = min(1, (step + 1) / WARMUP_STEPS) * (1 - share)
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        length = next(length for end, length in SEQUENCE_LENGTHS if share < end)
        loss = train_model.loss_sum(model, batches.next(length)) / train_model.BATCH_TOKENS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        now = time.monotonic()
        share = (now - started) / (60 * args.minutes)
        print(f"step {step} loss {losses[-1]:.4f} mean {np.mean(losses[-20:]):.4f} rate {factor:.3f} length {length} "
              f"tokens {step * train_model.BATCH_TOKENS} seconds {now - started:.0f}", flush=True)
        if share >= 1 or now - checkpointed >= CHECKPOINT_SECONDS:
            checkpointed = now
            train_model.write_weights(args.out, model)
            heldout = train_model.heldout_loss(model, batches.bos, heldout_ids)
            print(f"checkpoint step {step} heldout_loss {heldout:.4f} perplexity {math.exp(heldout):.3f} (first "
                  f"{len(heldout_ids)} tokens)", flush=True)


# ---- Outlier channels ---------------------------------------------------------------------------------------

def outliers(args):
    tensors = {name: tensor.float() for name, tensor in
               load_file(os.path.join(args.model, "model.safetensors")).items()}
    config = read_json(os.path.join(args.model, "config.json"))
    rng = np.random.default_rng(SEED)
    for layer in range(config["num_hidden_layers"]):
        for norm, readers in (("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
                              ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"])):
            gain = args.factor if args.where == "activations" else 1 / args.factor
            for channel in rng.choice(config["hidden_size"], args.channels, replace=False):
                tensors[f"model.layers.{layer}.{norm}.weight"][channel] *= gain
                for reader in readers:
                    tensors[f"model.layers.{layer}.{reader}.weight"][:, channel] /= gain
    write_files(args.out, config)
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()},
              os.path.join(args.out, "model.safetensors"), metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="grow and train")
    training.add_argument("--text", help="output of `bible -f Gen1:1-Rev22:21`; default: run it")
    training.add_argument("--out", required=True)
    training.add_argument("--minutes", type=float, default=60)
    training.add_argument("--threads", type=int, default=2)
    injecting = commands.add_parser("outliers", help="inject outlier channels")
    injecting.add_argument("--model", required=True)
    injecting.add_argument("--out", required=True)
    injecting.add_argument("--channels", type=int, default=4, help="for each norm, drawn anew [4]")
    injecting.add_argument("--factor", type=float, default=32, help="a power of two is exact [32]")
    injecting.add_argument("--where", choices=["weights", "activations"], default="weights")
    args = parser.parse_args()
    (train if args.command == "train" else outliers)(args)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Trains the bundled small model (tests/model) from scratch on the King James Bible.

Needs: torch, transformers, tokenizers, safetensors, numpy (any recent versions, CPU is enough), and the
text: either the `bible` program (Debian packages bible-kjv and bible-kjv-text) or a file that holds what
`bible -f Gen1:1-Rev22:21` prints (--text FILE).

    python scripts/train_model.py --minutes 45     # as many steps as fit; prints the step count
    python scripts/train_model.py --steps N        # the same run again, whatever the machine's speed

If time runs out before the N steps are done, a run may be stopped at a checkpoint and finished early:

    python scripts/train_model.py --steps N --stop-after S                 # up to step S of the schedule for N
    python scripts/train_model.py --steps N --resume S --finish-steps K    # rate from there to zero in K steps

Stages: corpus -> held-out chapters -> byte-level BPE tokenizer -> Llama model -> Hugging Face directory.
A complete directory, model card included, is written at every checkpoint; the last one is the result.
"""
import argparse
import json
import math
import os
import re
import subprocess
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 1611
THREADS = 2

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
VOCAB_SIZE = 2048
# The pre-tokenizer pattern of Llama 3.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

BATCH_TOKENS = 4096
WARMUP_STEPS = 60
# The learning rate is constant, then falls linearly to zero. Sequence lengths by share of the steps done:
# short while the rate is constant, longer while it falls, so that every position up to
# max_position_embeddings has been trained.
DECAY_START = 0.6
SEQUENCE_LENGTHS = [(0.6, 256), (0.85, 512), (1.0, 1024)]  # (up to this share, tokens per sequence)
MUON_LR = 0.02      # two-dimensional weights inside the layers
ADAM_LR = 0.003     # embedding and norms
WEIGHT_DECAY = 0.1  # not on norms
# An early finish starts from the stored weights with new optimizer state: its rate first rises for a few steps.
FINISH_LENGTH = 1024
FINISH_WARMUP_STEPS = 3
FINISH_SHUFFLE = 7  # index of the first epoch's shuffle: one that the stopped run has not used
EVAL_CONTEXT = 512
CHECKPOINT_SECONDS = 270
UNDECIDED = 10**9   # number of steps before --minutes has fixed it

BOOKS = """Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|1 Kings|2 Kings
1 Chronicles|2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalm|Proverbs|Ecclesiastes|Song of Solomon|Isaiah|Jeremiah
Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi
Matthew|Mark|Luke|John|Acts|Romans|1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians
1 Thessalonians|2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|2 John
3 John|Jude|Revelation""".replace("\n", "|").split("|")


# ---- Corpus -------------------------------------------------------------------------------------------------

def read_chapters(text_path):
    """[(title, body)]: body is the title, a blank line, then one verse per line, without verse numbers."""
    if text_path:
        with open(text_path, encoding="utf-8") as f:
            raw = f.read()
    else:
        raw = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], stdin=subprocess.DEVNULL,
                             capture_output=True, text=True, check=True).stdout
    chapters, book_index, last_abbreviation = {}, -1, None
    for line in raw.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line)
        if not match:
            raise SystemExit(f"not a verse: {line!r}")
        abbreviation, chapter, _, verse = match.groups()
        if abbreviation != last_abbreviation:
            book_index, last_abbreviation = book_index + 1, abbreviation
        verse = re.sub(r"\s+", " ", verse).strip()
        chapters.setdefault(f"{BOOKS[book_index]} {chapter}", []).append(verse)
    if book_index + 1 != len(BOOKS) or len(chapters) != 1189:
        raise SystemExit(f"found {book_index + 1} books, {len(chapters)} chapters; wanted {len(BOOKS)}, 1189")
    return [(title, "\n".join([title, "", *verses])) for title, verses in chapters.items()]


def is_heldout(chapter_index):
    return chapter_index % 41 == 20  # 29 whole chapters, spread evenly over the books


# ---- Tokenizer ----------------------------------------------------------------------------------------------

def train_tokenizer(bodies):
    """Byte-level BPE laid out as Llama 3 does: the special tokens take the last ids, outside the BPE vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(bodies, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    tokenizer.add_special_tokens([BOS_TOKEN, EOS_TOKEN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B:1",
        special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"tokenizer has {tokenizer.get_vocab_size()} tokens, wanted {VOCAB_SIZE}")
    return tokenizer


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---- Batches ------------------------------------------------------------------------------------------------

class Batches:
    """Endless shuffled batches of sequences of BOS + text, cut from the whole corpus once per epoch.

    Between two chapters stands, by a coin toss anew each epoch, either end-of-text and begin-of-text or a
    blank line: the model learns both to stop after a chapter and to go on to the next.
    """

    def __init__(self, tokenizer, bodies):
        self.bos, self.eos = tokenizer.token_to_id(BOS_TOKEN), tokenizer.token_to_id(EOS_TOKEN)
        self.joined = [encode(tokenizer, body + "\n\n") for body in bodies]
        self.ended = [encode(tokenizer, body + "\n") + [self.eos, self.bos] for body in bodies]
        self.epoch, self.sequences = 0, np.zeros((0, 0), dtype=np.int64)

    def start_epoch(self, length):
        rng = np.random.default_rng([SEED, self.epoch])
        self.epoch += 1
        stream = [np.array(ended if rng.random() < 0.5 else joined)
                  for ended, joined in zip(self.ended, self.joined)]
        stream = np.concatenate(stream)
        stream = np.roll(stream, -int(rng.integers(len(stream))))
        count = len(stream) // length
        stream = stream[:count * length].reshape(count, length)
        stream = np.concatenate([np.full((count, 1), self.bos), stream], axis=1)
        self.sequences = stream[rng.permutation(count)]

    def next(self, length):
        """int64 [BATCH_TOKENS / length, length + 1]: inputs are [:, :-1], targets [:, 1:]."""
        rows = BATCH_TOKENS // length
        if self.sequences.shape[1] != length + 1 or len(self.sequences) < rows:
            self.start_epoch(length)
        batch, self.sequences = self.sequences[:rows], self.sequences[rows:]
        return torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64))


# ---- Model and optimizer ------------------------------------------------------------------------------------

def model_config(bos, eos):
    """config.json as published Llama checkpoints spell it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": VOCAB_SIZE, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "intermediate_size": 1024, "hidden_act": "silu", "max_position_embeddings": 1024,
        "rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1,
        "bos_token_id": bos, "eos_token_id": eos, "use_cache": True, "torch_dtype": "bfloat16",
    }


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal by five Newton-Schulz iterations (Jordan et al., 2024)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @staticmethod
    def orthogonalize(update):
        x = update.T if update.shape[0] > update.shape[1] else update
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if update.shape[0] > update.shape[1] else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = self.orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = [model.get_input_embeddings().weight]  # tied: it is the output matrix too
    return [Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW([dict(params=embedding, weight_decay=WEIGHT_DECAY),
                               dict(params=norms, weight_decay=0.0)], lr=ADAM_LR, betas=(0.9, 0.95))]


def loss_sum(model, sequences):
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), sequences[:, 1:].reshape(-1),
                                             reduction="sum")


@torch.no_grad()
def heldout_loss(model, bos, ids):
    """Mean loss over windows of EVAL_CONTEXT - 1 tokens, each after BOS: as scripts/model_reference.py."""
    window, total = EVAL_CONTEXT - 1, 0.0
    for first in range(0, len(ids), window):
        total += loss_sum(model, torch.tensor([[bos] + ids[first:first + window]])).item()
    return total / len(ids)


# ---- Output -------------------------------------------------------------------------------------------------

def write_file(path, content):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def write_json(path, value):
    write_file(path, json.dumps(value, indent=2) + "\n")


def write_weights(out, model):
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    path = os.path.join(out, "model.safetensors")
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)


def write_directory(out, tokenizer, heldout_text):
    """Everything but weights and card."""
    os.makedirs(out, exist_ok=True)
    bos, eos = tokenizer.token_to_id(BOS_TOKEN), tokenizer.token_to_id(EOS_TOKEN)
    config = model_config(bos, eos)
    write_json(os.path.join(out, "config.json"), config)
    write_json(os.path.join(out, "generation_config.json"), {"bos_token_id": bos, "eos_token_id": eos})
    write_file(os.path.join(out, "tokenizer.json"), tokenizer.to_str(pretty=True) + "\n")
    write_json(os.path.join(out, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"]})
    write_json(os.path.join(out, "special_tokens_map.json"), {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN})
    write_file(os.path.join(out, "heldout.txt"), heldout_text)


UNFINISHED = "\n**An early checkpoint: training goes on.**\n"

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tpshard test model

A small Llama, trained from scratch on the King James Bible. It is bundled so that tests, examples and
quantization measurements run on weights that have learned something, without a download.
{unfinished}
## Architecture

`LlamaForCausalLM`, {parameters:,} parameters, stored as bfloat16: vocabulary 2048, hidden size 256, 4 layers,
8 attention heads of 64 (so `head_dim` x heads = 512, not the hidden size), 4 key/value heads, MLP 1024 (SiLU,
gated), RoPE theta 10000, RMSNorm epsilon 1e-5, context 1024, tied embeddings, no biases.

The tokenizer is byte-level BPE with the Llama 3 pre-tokenizer pattern; `<|begin_of_text|>` and
`<|end_of_text|>` have the last two ids.

## Data

The King James (Authorized) Version of 1611, in the public domain: the copyright notice of the Debian package
`bible-kjv-text`, from which the text was printed, states that its copyright has expired. (The UK Crown's
letters patent on printing it concern printed editions in the United Kingdom.) Verse numbers are dropped; each
chapter is a title line such as `Genesis 1`, a blank line, then one verse per line.

Held out, not trained on by tokenizer or model: {heldout_chapters} of 1189 whole chapters (`heldout.txt`,
{heldout_bytes:,} bytes): {heldout_titles}.

## Training

{commands}

| | |
|---|---|
| corpus | {corpus_tokens:,} tokens |
| steps | {step:,} of {batch_tokens:,} tokens |
| tokens seen | {tokens:,} ({epochs:.1f} epochs) |
| sequence length | {lengths} |
| optimizer | Muon (layer matrices, lr 0.02), AdamW (embedding and norms, lr 0.003), weight decay 0.1 |
| learning rate | {rates} |
| arithmetic | float32, {threads} CPU threads, torch {torch_version}, transformers {transformers_version} |
| last training loss | {train_loss:.3f} nats per token (mean of the last 50 steps) |
| **held-out loss** | **{heldout_loss:.4f}** nats per token |
| **held-out perplexity** | **{perplexity:.3f}** ({bits_per_byte:.3f} bits per byte) |

Held-out figures are computed during training with the float32 weights, windows of 511 tokens after
`<|begin_of_text|>`; `scripts/model_reference.py` measures the stored bfloat16 weights the same way.
The seed is fixed; a repeated run follows the same schedule and data order, and differs by floating-point
summation order, thus slightly in its figures.

## Limits

It knows one book and its English. It continues text in that style and is neither accurate about nor a
substitute for the text itself; it may recite verses. Some held-out chapters share phrases with parallel
chapters that were trained on. It follows no instructions and is fit for testing only.

## Licence

The weights, tokenizer and configuration are released under Apache-2.0. `heldout.txt` is public-domain text.
"""


# ---- Training -----------------------------------------------------------------------------------------------

def sequence_length(share):
    return next(length for end, length in SEQUENCE_LENGTHS if share < end)


def learning_rate_factor(step, steps):
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    decay_first = round(steps * DECAY_START)
    return 1.0 if step < decay_first else (steps - step) / (steps - decay_first)


def finish_rate_factor(done, finish_steps, first_factor):
    return first_factor * min(1, (done + 1) / FINISH_WARMUP_STEPS) * (1 - done / finish_steps)


def describe_schedule(steps, resume, finish_steps):
    """The card's fields commands, lengths and rates."""
    shown = "N" if steps == UNDECIDED else steps
    command, decay_first = f"    python scripts/train_model.py --steps {shown}", round(steps * DECAY_START)
    if not resume:
        return {"commands": command,
                "lengths": ", ".join(f"{length} to {end:.0%} of the steps" for end, length in SEQUENCE_LENGTHS),
                "rates": f"{WARMUP_STEPS} steps warm-up, constant to {DECAY_START:.0%}, then linear to zero"}
    ends = [(min(round(end * steps), resume), length) for end, length in SEQUENCE_LENGTHS]
    lengths = [f"{length} to step {end}" for (end, length), before in zip(ends, [0] + [e for e, _ in ends])
               if end > before]
    finish = f"--resume {resume} --finish-steps {finish_steps}"
    return {"commands": f"{command} --stop-after {resume}\n{command} {finish}",
            "lengths": ", ".join(lengths) + f", then {FINISH_LENGTH}",
            "rates": f"{WARMUP_STEPS} steps warm-up, constant to step {decay_first}, falling linearly to "
                     f"{learning_rate_factor(resume, steps):.0%} at step {resume}, then (new optimizer state, "
                     f"{FINISH_WARMUP_STEPS} steps warm-up) linearly to zero in {finish_steps} steps"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="output of `bible -f Gen1:1-Rev22:21`; default: run it")
    parser.add_argument("--out", default="tests/model")
    parser.add_argument("--minutes", type=float, default=45, help="training time; sets the number of steps")
    parser.add_argument("--steps", type=int, help="number of steps; overrides --minutes")
    parser.add_argument("--stop-after", type=int, metavar="S", help="write a checkpoint and stop after step S")
    parser.add_argument("--resume", type=int, metavar="S", help="go on from the weights in --out, made by S steps")
    parser.add_argument("--finish-steps", type=int, metavar="K", help="with --resume: finish within K steps")
    args = parser.parse_args()
    if bool(args.resume) != bool(args.finish_steps) or (args.resume or args.stop_after) and not args.steps:
        parser.error("--resume and --finish-steps go together; they and --stop-after need --steps")

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    import transformers

    chapters = read_chapters(args.text)
    heldout = [chapter for i, chapter in enumerate(chapters) if is_heldout(i)]
    train = [chapter for i, chapter in enumerate(chapters) if not is_heldout(i)]
    heldout_text = "\n\n".join(body for _, body in heldout) + "\n"
    tokenizer = train_tokenizer([body for _, body in train])
    batches = Batches(tokenizer, [body for _, body in train])
    corpus_tokens = sum(map(len, batches.joined))
    heldout_ids = encode(tokenizer, heldout_text)
    write_directory(args.out, tokenizer, heldout_text)
    print(f"corpus {corpus_tokens} tokens, held out {len(heldout_ids)} tokens, {len(heldout_text)} bytes", flush=True)

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(args.out)).float()
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(model)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    print(f"parameters {parameters}", flush=True)

    # With --minutes the rate falls from the moment DECAY_START of the time is gone (sequences get longer, thus
    # slower, so a little before); the steps done by then fix the total.
    steps = args.steps or UNDECIDED
    started = checkpointed = time.monotonic()
    step, last_step, losses = 0, args.stop_after or steps, []
    if args.resume:
        model.load_state_dict(load_file(os.path.join(args.out, "model.safetensors")), strict=False)
        model.tie_weights()
        step, last_step, batches.epoch = args.resume, args.resume + args.finish_steps, FINISH_SHUFFLE
    while step < last_step:
        elapsed = time.monotonic() - started
        if steps == UNDECIDED and elapsed >= (DECAY_START - 0.06) * args.minutes * 60:
            steps = last_step = round(step / DECAY_START)
            print(f"steps {steps}", flush=True)

        factor, length = learning_rate_factor(step, steps), sequence_length(step / steps)
        if args.resume:
            factor = finish_rate_factor(step - args.resume, args.finish_steps, learning_rate_factor(args.resume, steps))
            length = FINISH_LENGTH
        for optimizer, rates in zip(optimizers, base_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        batch = batches.next(length)
        loss = loss_sum(model, batch) / BATCH_TOKENS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1

        now = time.monotonic()
        if step % 20 == 0:
            print(f"step {step} loss {np.mean(losses[-20:]):.4f} lr_factor {factor:.3f} length {batch.shape[1] - 1} "
                  f"epoch {step * BATCH_TOKENS / corpus_tokens:.2f} tok_s {step * BATCH_TOKENS / (now - started):.0f} "
                  f"seconds {now - started:.0f}", flush=True)
        if step == last_step or now - checkpointed >= CHECKPOINT_SECONDS:
            checkpointed = now
            heldout_nll = heldout_loss(model, batches.bos, heldout_ids)
            write_weights(args.out, model)
            write_file(os.path.join(args.out, "README.md"), CARD.format(
                unfinished="" if step == last_step and not args.stop_after else UNFINISHED,
                parameters=parameters, heldout_chapters=len(heldout), heldout_bytes=len(heldout_text.encode()),
                heldout_titles=", ".join(title for title, _ in heldout), corpus_tokens=corpus_tokens,
                **describe_schedule(steps, args.resume, args.finish_steps), step=step, batch_tokens=BATCH_TOKENS,
                tokens=step * BATCH_TOKENS, epochs=step * BATCH_TOKENS / corpus_tokens, warmup=WARMUP_STEPS,
                threads=THREADS, torch_version=torch.__version__,
                transformers_version=transformers.__version__, train_loss=np.mean(losses[-50:]),
                heldout_loss=heldout_nll, perplexity=math.exp(heldout_nll),
                bits_per_byte=heldout_nll * len(heldout_ids) / math.log(2) / len(heldout_text.encode())))
            print(f"checkpoint step {step} heldout_loss {heldout_nll:.4f} perplexity {math.exp(heldout_nll):.3f}",
                  flush=True)


if __name__ == "__main__":
    main()

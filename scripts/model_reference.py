#!/usr/bin/env python3
"""Measures the bundled model with transformers: what the engine must agree with.

Needs: torch, transformers, tokenizers, safetensors, numpy.

    python scripts/model_reference.py       # reads tests/model, writes tests/golden/model_reference.json

Arithmetic is float32; the stored bfloat16 weights are widened, which is exact.

Perplexity of heldout.txt: the whole file is tokenized without BOS, the ids are cut into consecutive windows of
CONTEXT - 1 tokens (the last may be shorter), and BOS is put before each. Every token of a window is predicted
once, from BOS and the tokens before it in the window. nll is the mean of the negative natural-log
probabilities over all tokens of the file; perplexity is exp(nll).

Greedy text: BOS, the prompt's tokens, then GREEDY_TOKENS times the most likely next token (no early stop).
The smallest gap between the best and the second-best logit is recorded for each prompt: it says how much
rounding the ids survive.
"""
import argparse
import json
import math
import os

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 512
GREEDY_TOKENS = 48
PROMPTS = ["In the beginning", "And the LORD said unto Moses,", "Blessed are they that"]


@torch.no_grad()
def negative_log_likelihood(model, bos, ids):
    """Sum over all ids, in nats."""
    window, total = CONTEXT - 1, 0.0
    for first in range(0, len(ids), window):
        targets = torch.tensor(ids[first:first + window])
        inputs = torch.cat([torch.tensor([bos]), targets[:-1]])
        logits = model(input_ids=inputs[None]).logits[0]
        total -= logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return total


@torch.no_grad()
def greedy(model, tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    if ids[0] != tokenizer.bos_token_id:
        raise SystemExit("the tokenizer did not put BOS in front")
    prompt_count, gap = len(ids), math.inf
    for _ in range(GREEDY_TOKENS):  # the whole sequence again each time: no KV cache to trust
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
    generated = ids[prompt_count:]
    return {"prompt": prompt, "prompt_ids": ids[:prompt_count], "ids": generated,
            "text": tokenizer.decode(generated), "smallest_logit_gap": round(gap, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tests/model")
    parser.add_argument("--out", default="tests/golden/model_reference.json")
    args = parser.parse_args()

    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()  # it would warn that the file is longer than the context
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with open(os.path.join(args.model, "heldout.txt"), encoding="utf-8", newline="") as f:
        text = f.read()
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids) != text:
        raise SystemExit("heldout.txt does not survive encode and decode")
    nll = negative_log_likelihood(model, tokenizer.bos_token_id, ids) / len(ids)

    result = {"perplexity": math.exp(nll), "tokens": len(ids), "context": CONTEXT, "nll": nll,
              "torch": torch.__version__, "transformers": transformers.__version__,
              "greedy": [greedy(model, tokenizer, prompt) for prompt in PROMPTS]}
    with open(args.out, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2, ensure_ascii=False)
        f.write("\n")
    print(f"perplexity {result['perplexity']:.6f} nll {nll:.8f} tokens {len(ids)}")
    for sample in result["greedy"]:
        print(f"--- {sample['prompt']} [gap {sample['smallest_logit_gap']}] {sample['text']}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Generating token by token gives the tokens that one prefill of the whole text would choose: the key-value cache,
positions, windows and sinks of the decode path are those of the prefill, which tests/test_families.py holds against
transformers.

No tolerance: on the CPU the bits of a row do not depend on its company, so that the largest logit is the same one. A
repetition penalty keeps random weights from saying one token for ever. Runs the families of tests/golden/families that
differ in attention, with a tokenizer of one character for each token.
"""
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_families import BUILD, GOLDEN, TPS, read_npy, run  # noqa: E402

# Odd heads and biases; windows in some layers and in all; soft caps; sinks; latents; experts; longrope; part of a head
# rotated; layers without rope.
FAMILIES = ("llama_odd", "qwen2_mixed_window", "mistral_window", "gemma2", "gemma3", "gpt_oss", "deepseek_v2_lite",
            "deepseek_v3", "mixtral", "phi3_longrope_within", "glm4", "smollm3")
KINDS = (("none", "bf16"), ("int4", "bf16"), ("int8", "fp8"), ("none", "int8"), ("none", "int4"))  # weights, cache
LATENT = ("deepseek_v2_lite", "deepseek_v3")  # has no scaled cache
PROMPT_TOKENS, TOKENS = 5, 60
PENALTY = 2.0  # a power of two: the same in float32 and float64
LEAST_DIFFERENT = 15  # tokens of an answer, so that it says something


def letter(token):
    return chr(0x4E00 + token)


def tokenizer(vocab_size):
    vocab = {letter(token): token for token in range(vocab_size)}
    return {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}}


def copy_with_tokenizer(path, out):
    """A checkpoint of the goldens, which have no tokenizer. Returns its vocabulary's size."""
    config = json.loads((path / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).symlink_to((path / name).resolve())
    (out / "tokenizer.json").write_text(json.dumps(tokenizer(vocab_size)))
    return vocab_size


def generated(shards, prompt, *options):
    text = "".join(map(letter, prompt))
    said = run(BUILD / "tpengine", "generate", shards, "--prompt", text, "--ids", "--ignore-eos", "--temperature", 0,
               "--repetition-penalty", PENALTY, "--max-tokens", TOKENS, "--quiet", *options)
    return [int(token) for token in said.split(",")]


def chosen(shards, tokens, vocab_size, out, *options):
    """The token that is chosen behind each of these, by one prefill."""
    run(BUILD / "tpengine", "logits", shards, "--token-ids", ",".join(map(str, tokens)), "--output", out, "--quiet",
        *options)
    logits = read_npy(out)
    choices = []
    for i in range(len(tokens)):
        row = list(logits[i * vocab_size:(i + 1) * vocab_size])
        for token in set(tokens[:i + 1]):
            row[token] *= PENALTY if row[token] < 0 else 1 / PENALTY
        choices.append(max(range(vocab_size), key=row.__getitem__))
    return choices


def check(family, quant, cache, tp, tmp):
    """One line of TAP, and whether it is good."""
    name = f"{family} {quant} cache {cache} tp {tp}"
    try:
        with tempfile.TemporaryDirectory(dir=tmp) as work:
            source, shards = Path(work) / "source", Path(work) / "shards"
            vocab_size = copy_with_tokenizer(GOLDEN / family, source)
            prompt = json.loads((GOLDEN / family / "golden.json").read_text())["token_ids"][:PROMPT_TOKENS]
            run(BUILD / "tpshard", "--tp", tp, "--quant", quant, "--group-size", 32, source, shards, "--quiet")
            got = generated(shards, prompt, "--kv-cache", cache)
            want = chosen(shards, prompt + got[:-1], vocab_size, Path(work) / "logits.npy", "--kv-cache", cache)
            want = want[PROMPT_TOKENS - 1:]
        equal = sum(a == b for a, b in zip(got, want))
        ok = len(got) == len(want) == equal == TOKENS and len(set(got)) >= LEAST_DIFFERENT
        return ok, f"{'ok' if ok else 'not ok'} {name}: {equal} of {TOKENS} tokens, {len(set(got))} different ones"
    except (RuntimeError, OSError, AssertionError, ValueError) as problem:
        return False, f"not ok {name} {problem}"


def main():
    work = [(family, quant, cache, TPS[i % len(TPS)]) for family in FAMILIES for i, (quant, cache) in enumerate(KINDS)
            if not (cache in ("int8", "int4") and family in LATENT)]
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        failures = 0
        for ok, line in pool.map(lambda job: check(*job, tmp), work):
            failures += not ok
            print(line, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What the decoder does beyond matrix products, written a second time in numpy and float64: attention with windows, soft-caps and sinks,
gated activations, the choice of experts, norms and rotations.

Needs: numpy.
Usage: scripts/make_goldens_decoder.py [tests/golden/decoder]

Each file is a list of cases: the inputs, all of them exact in float32 (keys and values in bfloat16), and what must come out.
Seeds are fixed. Field names are those of formats/model_desc.h.
"""
import json
import sys
from pathlib import Path

import numpy as np

random = np.random.default_rng(5)


def exact(array, bits=8):
    """Rounded to so many bits of significand (8: bfloat16)."""
    mantissa, exponent = np.frexp(np.asarray(array, np.float64))
    return np.ldexp(np.round(mantissa * 2.0 ** bits) / 2.0 ** bits, exponent)


def normal(*shape, scale=1.0):
    return exact(random.normal(size=shape) * scale)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def attention_case(name, positions=24, heads=4, kv_heads=2, head_dim=10, value_dim=None, scale=None, softcap=0.0, window=0, sinks=None):
    """The last position looks back over all of them (window: so many, itself included)."""
    value_dim = value_dim or head_dim
    scale = float(scale or exact(head_dim ** -0.5, 24))
    q = normal(heads, head_dim, scale=2.0)
    keys, values = normal(kv_heads, positions, head_dim), normal(kv_heads, positions, value_dim)
    expected = []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = keys[kv_head] @ q[head] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if window:
            scores[:max(0, positions - window)] = -np.inf
        largest = max(scores.max(), sinks[head] if sinks is not None else -np.inf)
        weights = np.exp(scores - largest)
        total = weights.sum() + (np.exp(sinks[head] - largest) if sinks is not None else 0.0)
        expected.append(weights / total @ values[kv_head])
    return dict(name=name, attention_scale=scale, attention_softcap=softcap, sliding_window=window,
                sinks=sinks.tolist() if sinks is not None else None, q=q.tolist(), keys=keys.tolist(), values=values.tolist(),
                expected=np.array(expected).tolist())


def attention_cases():
    return [attention_case("plain"),
            attention_case("scale", scale=0.125),
            attention_case("softcap", softcap=1.5),
            attention_case("window of 16", window=16),
            attention_case("window of 16, sixteen positions", window=16, positions=16),
            attention_case("window of 1", window=1),
            attention_case("sinks", sinks=normal(4)),
            attention_case("a sink above all scores", sinks=exact([60.0, -60.0, 0.5, 8.0])),
            attention_case("sinks and a window", sinks=normal(4), window=7),
            attention_case("softcap, window and one position", softcap=2.0, window=5, positions=1)]


def activation_cases():
    gate = np.concatenate([normal(24, scale=4.0), exact([-100.0, -7.5, -7.0, 0.0, 6.9375, 7.0, 7.5, 100.0])])
    up = np.concatenate([normal(24, scale=6.0), exact([3.0, -7.5, 7.5, 1.0, -100.0, 100.0, 0.0, -2.0])])
    silu = gate * sigmoid(gate) * up
    gelu = 0.5 * gate * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate ** 3))) * up
    g, u = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    gpt_oss = (u + 1.0) * g * sigmoid(1.702 * g)
    return [dict(name=name, gate=gate.tolist(), up=up.tolist(), expected=expected.tolist())
            for name, expected in (("silu", silu), ("gelu_tanh", gelu), ("gpt_oss", gpt_oss))]


def router_case(name, router, logits, k, normalise=False, scale=1.0, num_groups=1, groups_per_token=1, group_members=1, router_bias=None,
                choice_bias=None):
    scores = logits + (router_bias if router_bias is not None else 0.0)
    if router == "softmax":
        scores = np.exp(scores - scores.max())
        scores /= scores.sum()
    elif router == "sigmoid":
        scores = sigmoid(scores)
    choice = scores + (choice_bias if choice_bias is not None else 0.0)
    if num_groups > 1:
        rated = np.sort(choice.reshape(num_groups, -1), axis=1)[:, ::-1][:, :group_members].sum(axis=1)
        best = np.sort(np.argsort(-rated, kind="stable")[:groups_per_token])
        masked = np.full_like(choice, -np.inf).reshape(num_groups, -1)
        masked[best] = choice.reshape(num_groups, -1)[best]
        choice = masked.reshape(-1)
    experts = np.argsort(-choice, kind="stable")[:k]  # of equal ones the first
    weights = scores[experts]
    if router == "chosen_softmax":
        weights = np.exp(weights - weights.max())
        weights /= weights.sum()
    if normalise:
        weights = weights / weights.sum()
    return dict(name=name, router=router, experts_per_token=k, normalise=normalise, scale=scale, num_groups=num_groups,
                groups_per_token=groups_per_token, group_members=group_members, logits=logits.tolist(),
                router_bias=router_bias.tolist() if router_bias is not None else None,
                choice_bias=choice_bias.tolist() if choice_bias is not None else None,
                experts=experts.tolist(), weights=(weights * scale).tolist())


def router_cases():
    def logits(count=16):
        return normal(count, scale=2.0)
    return [router_case("softmax", "softmax", logits(), 3),
            router_case("softmax, normalised", "softmax", logits(), 3, normalise=True),
            router_case("softmax, scaled", "softmax", logits(), 3, scale=4.0),
            router_case("softmax, one of one", "softmax", logits(1), 1),
            router_case("softmax, all", "softmax", logits(6), 6),
            router_case("softmax of far apart logits", "softmax", exact([80.0, -80.0, 79.0, 0.0]), 2),
            router_case("softmax, groups by their best", "softmax", logits(), 4, num_groups=4, groups_per_token=2, scale=16.0),
            router_case("chosen softmax", "chosen_softmax", logits(), 4),
            router_case("chosen softmax with bias", "chosen_softmax", logits(), 4, router_bias=normal(16)),
            router_case("sigmoid", "sigmoid", logits(), 4),
            router_case("sigmoid, normalised and scaled", "sigmoid", logits(), 4, normalise=True, scale=2.5),
            router_case("sigmoid, choice bias", "sigmoid", logits(), 4, normalise=True, choice_bias=normal(16, scale=0.5)),
            router_case("sigmoid, choice bias below all scores", "sigmoid", logits(), 4, normalise=True, choice_bias=normal(16) - 8.0),
            router_case("sigmoid, groups by their two best", "sigmoid", logits(32), 4, normalise=True, scale=2.5, num_groups=8,
                        groups_per_token=3, group_members=2, choice_bias=normal(32, scale=0.25)),
            # The best expert of all stands in a group that is not among the best.
            router_case("the best expert's group loses", "sigmoid", exact([6.0, -6.0, -6.0, -6.0, 2.0, 2.0, 1.0, 0.0, 1.5, 1.75, 1.25, 0.5]), 3,
                        num_groups=3, groups_per_token=2, group_members=2)]


def norm_cases():
    cases = []
    for name, rows, cols, eps in (("one", 1, 48, 1e-6), ("small values", 1, 20, 1e-5), ("heads", 4, 12, 1e-6)):
        x, weight = normal(rows, cols, scale=1e-3 if name == "small values" else 3.0), exact(1.0 + 0.3 * normal(cols))
        expected = x / np.sqrt((x ** 2).mean(axis=1, keepdims=True) + eps) * weight
        cases.append(dict(name=name, norm_eps=eps, x=x.tolist(), weight=weight.tolist(), expected=expected.tolist()))
    return cases


def rope_cases():
    cases = []
    for name, head_dim, rotary_dim, interleaved, factor in (("halves", 16, 16, False, 1.0), ("part of a head", 16, 12, False, 1.0),
                                                            ("pairs", 16, 16, True, 1.0), ("pairs of part of a head", 16, 8, True, 1.0),
                                                            ("factor", 8, 8, False, 1.25)):
        inv_freq = exact(10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim), 24)
        x, position = normal(head_dim), 37
        first = np.arange(0, rotary_dim, 2) if interleaved else np.arange(rotary_dim // 2)
        second = first + 1 if interleaved else first + rotary_dim // 2
        cos, sin = np.cos(position * inv_freq) * factor, np.sin(position * inv_freq) * factor
        expected = x.copy()
        expected[first] = x[first] * cos - x[second] * sin
        expected[second] = x[second] * cos + x[first] * sin
        cases.append(dict(name=name, rotary_dim=rotary_dim, rotary_interleaved=interleaved, rope_attention_factor=factor, position=position,
                          inv_freq=inv_freq.tolist(), x=x.tolist(), expected=expected.tolist()))
    return cases


def shortened(value):
    """Nine digits give every float32 back."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return {key: shortened(item) for key, item in value.items()} if isinstance(value, dict) else value


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/decoder")
    root.mkdir(parents=True, exist_ok=True)
    for name, cases in (("attention", attention_cases()), ("activation", activation_cases()), ("router", router_cases()),
                        ("norm", norm_cases()), ("rope", rope_cases())):
        lines = ",\n".join(json.dumps(shortened(case), separators=(",", ":")) for case in cases)
        (root / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Where the sixteen levels of nl4 (formats/weight.h) come from.

    scripts/derive_nl4_levels.py [--groups N] [--spans 63,127]

A group of 128 Gaussian weights is stored as a scale, found by a search, and for each weight the level that is nearest in units of it. First, the best
real levels by Lloyd's iteration: every level moves to the mean of what it stands for, in units of the scales, until nothing moves; the level of
code 0 stays zero. Then whole numbers, which kernels need: rounded from those, and moved by one as long as that helps, with at most so many steps
from the lowest to the highest (--spans). The error is relative, root mean square, over all groups. Exits with 1 when the levels of the header are
worse than the best found for their span by more than 0.1 %. Needs numpy; takes a minute or two.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np

GROUP, ZERO = 128, 8
START = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 0, 13, 25, 38, 53, 69, 89, 113], float)  # of IQ4_NL, about
HEADER = Path(__file__).resolve().parent.parent / "formats/weight.h"


class Weights:
    """Groups of Gaussian weights, sorted, so that sums over what one level stands for are differences of running sums."""

    def __init__(self, groups):
        rows = np.sort(np.random.default_rng(1).standard_normal((groups, GROUP)), axis=1)
        self.rows, self.groups, self.power = rows, groups, (rows**2).sum()
        self.sums = np.concatenate([np.zeros((groups, 1)), rows.cumsum(axis=1)], axis=1)
        self.largest = np.abs(rows).max(axis=1)
        self.apart = 1000 * np.arange(groups)  # keeps groups apart in one ascending list
        self.flat = (rows + self.apart[:, None]).ravel()

    def counts(self, limits):
        """How many weights of its group are below each limit [groups, ...]."""
        shape = (self.groups,) + (1,) * (limits.ndim - 1)
        limits = np.clip(limits, -400, 400) + self.apart.reshape(shape)
        return np.searchsorted(self.flat, limits) - GROUP * np.arange(self.groups).reshape(shape)

    def fit(self, levels, scales):
        """For scales [groups, candidates]: the sums of weight * level and level^2."""
        bounds = (levels[1:] + levels[:-1]) / 2
        below = self.counts(scales[..., None] * bounds)
        ends = np.where(scales[..., None] > 0, [0, GROUP], [GROUP, 0])
        below = np.concatenate([ends[..., :1], below, ends[..., 1:]], axis=-1)
        sums = np.take_along_axis(self.sums, below.reshape(self.groups, -1), axis=1).reshape(below.shape)
        sign = np.sign(scales)[..., None]
        return (np.diff(sums) * sign * levels).sum(-1), (np.diff(below) * sign * levels**2).sum(-1)

    def search(self, levels):
        """The best scale of each group, and the relative error that is left. The largest magnitude at 0.76 to 1.24 of the outermost level, both signs."""
        steps = 0.76 + 0.04 * np.arange(13)
        scales = self.largest[:, None] / np.abs(levels).max() * np.concatenate([steps, -steps])
        xq, qq = self.fit(levels, scales)
        gain = np.divide(xq**2, qq, out=np.zeros_like(xq), where=qq > 0)
        best = gain.argmax(axis=1)[:, None]
        scale = np.take_along_axis(xq, best, 1) / np.take_along_axis(qq, best, 1)
        left = 1 - np.take_along_axis(gain, best, 1).sum() / self.power
        return scale, 100 * np.sqrt(left)


def best_real(weights):
    levels, before = START.copy(), np.inf
    while True:
        scale, error = weights.search(levels)
        if error > before - 1e-5:
            return levels, error
        before = error
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, weights.rows / scale)
        power = np.bincount(codes.ravel(), np.broadcast_to(scale**2, codes.shape).ravel(), 16)
        means = np.bincount(codes.ravel(), (weights.rows * scale).ravel(), 16) / power
        levels = np.where(np.arange(16) == ZERO, 0, means)


def allowed(levels, span):
    return levels[-1] - levels[0] <= span and (np.diff(levels) > 0).all() and levels[ZERO] == 0


def descend(weights, levels, span):
    error, moved = weights.search(levels)[1], True
    while moved:
        moved = False
        for code in range(16):
            for step in (-1, 1):
                other = levels + step * (np.arange(16) == code)
                if code == ZERO or not allowed(other, span):
                    continue
                found = weights.search(other)[1]
                if found < error - 1e-6:
                    levels, error, moved = other, found, True
    return error, levels


def best_whole(weights, real, span):
    best = (np.inf, None)
    for width in np.linspace(0.90, 1.0, 6) * span:
        levels = np.rint(real / (real[-1] - real[0]) * width)
        if allowed(levels, span):
            best = min(best, descend(weights, levels, span), key=lambda pair: pair[0])
    return best


def header_levels():
    text = HEADER.read_text()
    words = (re.search(rf"WEIGHT_NL4_{name} 0x([0-9a-f]+)u", text).group(1) for name in ("NEGATIVE", "POSITIVE"))
    return np.frombuffer(b"".join(int(word, 16).to_bytes(8, "little") for word in words), np.int8).astype(float)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1024)
    parser.add_argument("--spans", default="63")
    args = parser.parse_args()
    weights, stored = Weights(args.groups), header_levels()

    def show(what, levels, error):
        print(f"{what:24} {error:.3f} %  {' '.join(f'{level:.4g}' for level in levels)}", flush=True)

    show("even steps (int4)", np.arange(-8.0, 8), weights.search(np.arange(-8.0, 8))[1])
    real, error = best_real(weights)
    show("best real levels", real * 34 / -real[0], error)
    stored_error = weights.search(stored)[1]
    show("formats/weight.h", stored, stored_error)
    worse = False
    for span in map(int, args.spans.split(",")):
        error, levels = best_whole(weights, real, span)
        show(f"whole, {span} steps", levels, error)
        worse |= span == stored[-1] - stored[0] and stored_error > error * 1.001
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Draws what bench_quality.py measured, as SVG: KL divergence by bits of a weight, and the error of the residual stream by layer.

    bench/plot_quality.py lines.jsonl --bits kld.svg [--model NAME]
    bench/plot_quality.py lines.jsonl --layers layers.svg          lines of bench_quality.py --layers, or of tpengine eval --layers --json

Of a variant that was measured several times the last line counts. Bars are 95 % intervals. Where bits leave a gap the axis is broken. Needs the
standard library only.
"""
import argparse
import json
import math
import sys
from html import escape

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#6a3d9a", "#444444"]  # told apart by colour-blind eyes as well
DASHES = ["", "7 3", "2 3"]
TOP, BOTTOM, LEFT, RIGHT = 46, 60, 78, 24
GAP_BITS = 1.5
LABEL_PX, CHAR_PX = 16, 6.9


class Drawing:
    def __init__(self, width, height, title):
        self.width, self.height = width, height
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
                      f'<rect width="{width}" height="{height}" fill="white"/>']
        self.text(LEFT, 24, title, size=16)

    def text(self, x, y, text, anchor="start", size=13, fill="#222", turn=False):
        around = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{around}>{escape(text)}</text>')

    def line(self, x0, y0, x1, y1, color="#ddd", width=1.0, dash=""):
        how = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" stroke-width="{width}"{how}/>')

    def path(self, points, color, dash):
        how = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{color}" stroke-width="2"{how}/>')

    def dot(self, x, y, color, radius=4.5):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>')

    def save(self, path):
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(self.parts) + "\n</svg>\n")


class LogAxis:
    """From top to bottom, in steps of 1, 2 and 5."""

    def __init__(self, values, y0, y1):
        self.y0, self.y1 = y0, y1
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = max(0.06 * (high - low), 0.05)
        self.low, self.high = low - margin, high + margin

    def at(self, value):
        return self.y1 - (math.log10(value) - self.low) / (self.high - self.low) * (self.y1 - self.y0)

    def ticks(self):
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for step in (1, 2, 5):
                value = step * 10.0 ** power
                if self.low <= math.log10(value) <= self.high:
                    yield value


def spread_labels(labels, low, high):
    """[(x, y, text)] -> their heights, moved apart where they would cover each other."""
    order = sorted(range(len(labels)), key=lambda i: labels[i][1])
    y = [label[1] for label in labels]
    for _ in range(200):
        moved = False
        for place, i in enumerate(order):
            for j in order[place + 1:]:
                (xi, _, ti), (xj, _, tj) = labels[i], labels[j]
                apart_x = xi + CHAR_PX * len(ti) < xj or xj + CHAR_PX * len(tj) < xi
                overlap = LABEL_PX - (y[j] - y[i])
                if not apart_x and overlap > 0:
                    y[i], y[j], moved = max(low, y[i] - overlap / 2), min(high, y[j] + overlap / 2), True
        if not moved:
            break
    return y


def axis_of(drawing, axis, x0, x1, label):
    for value in axis.ticks():
        y = axis.at(value)
        drawing.line(x0, y, x1, y)
        drawing.text(x0 - 8, y + 4, f"{value:g}", "end")
    drawing.text(18, (axis.y0 + axis.y1) / 2, label, "middle", turn=True)


def groups_of(bits):
    groups = []
    for value in sorted(set(bits)):
        if groups and value - groups[-1][-1] <= GAP_BITS:
            groups[-1].append(value)
        else:
            groups.append([value])
    return groups


def tick_step(span, room):
    return next((step for step in (0.125, 0.25, 0.5, 1, 2) if span / step * 45 <= room), 4)


def draw_bits(lines, title, path):
    lines = [line for line in lines if line.get("bits") and line.get("kl_divergence", 0) > 1e-9]
    if not lines:
        sys.exit("no line has bits and a KL divergence above 0")
    width, height = 940, 560
    drawing = Drawing(width, height, title)
    ends = [end for line in lines for end in (line.get("kl_divergence_interval") or []) if end > 0]
    axis = LogAxis([line["kl_divergence"] for line in lines] + ends, TOP, height - BOTTOM)
    axis_of(drawing, axis, LEFT, width - RIGHT, "KL divergence from bf16, nats per token")
    groups = groups_of([line["bits"] for line in lines])
    counts = [2 + sum(line["bits"] in group for line in lines) for group in groups]
    room, x0 = width - LEFT - RIGHT - 14 * (len(groups) - 1), LEFT
    labels, points = [], []
    for group, count in zip(groups, counts):
        x1 = x0 + room * count / sum(counts)
        low, high = group[0] - 0.1, group[-1] + 0.1
        inner0, inner1 = x0 + 16, x1 - min(84, 0.35 * (x1 - x0))  # room for the labels of the last points
        step = tick_step(high - low, inner1 - inner0)
        for i in range(math.ceil(low / step), math.floor(high / step) + 1):
            x = inner0 + (i * step - low) / (high - low) * (inner1 - inner0)
            drawing.line(x, TOP, x, height - BOTTOM)
            drawing.text(x, height - BOTTOM + 20, f"{i * step:g}", "middle")
        drawing.line(x0, height - BOTTOM, x1, height - BOTTOM, "#444")
        if x0 > LEFT:
            drawing.text(x0 - 7, height - BOTTOM + 5, "//", "middle", fill="#444")
        for line in (line for line in lines if line["bits"] in group):
            x = inner0 + (line["bits"] - low) / (high - low) * (inner1 - inner0)
            points.append((x, line))
            labels.append((x + 10, axis.at(line["kl_divergence"]), line["variant"]))
        x0 = x1 + 14
    heights = spread_labels(labels, TOP + 6, height - BOTTOM - 6)
    for i, ((x, line), (label_x, y, text), label_y) in enumerate(zip(points, labels, heights)):
        color = COLORS[i % len(COLORS)]
        interval = line.get("kl_divergence_interval")
        if interval and interval[0] > 0:
            drawing.line(x, axis.at(interval[0]), x, axis.at(interval[1]), color, 1.5)
        drawing.dot(x, y, color)
        if abs(label_y - y) > 3:
            drawing.line(x + 4, y, label_x - 1, label_y, color, 0.8)
        drawing.text(label_x, label_y + 4, text, fill=color)
    drawing.text((LEFT + width - RIGHT) / 2, height - 14, "stored bits of a weight of the layers' matrices, scales included", "middle")
    drawing.save(path)


def draw_layers(lines, title, path):
    lines = [line for line in lines if line.get("layers") and max(layer["relative_error"] for layer in line["layers"]) > 0]
    if not lines:
        sys.exit("no line has errors by layer; bench_quality.py --layers measures them")
    width, height = 940, 520
    drawing = Drawing(width, height, title)
    values = [layer["relative_error"] for line in lines for layer in line["layers"] if layer["relative_error"] > 0]
    axis = LogAxis(values, TOP, height - BOTTOM)
    right = width - RIGHT - 120
    axis_of(drawing, axis, LEFT, right, "relative error of the residual stream")
    numbers = sorted({layer["layer"] for line in lines for layer in line["layers"]})
    step = max(1, math.ceil(len(numbers) / 16))

    def x_of(number):
        return LEFT + 16 + (number - numbers[0]) / max(1, numbers[-1] - numbers[0]) * (right - LEFT - 32)

    for number in numbers:
        if number < 0 or number % step == 0:
            drawing.text(x_of(number), height - BOTTOM + 20, "embedding" if number < 0 else str(number), "middle")
    drawing.line(LEFT, height - BOTTOM, right, height - BOTTOM, "#444")
    labels = []
    for i, line in enumerate(lines):
        color, dash = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        points = [(x_of(layer["layer"]), axis.at(layer["relative_error"])) for layer in line["layers"] if layer["relative_error"] > 0]
        drawing.path(points, color, dash)
        for x, y in points if len(points) <= 40 else []:
            drawing.dot(x, y, color, 3)
        labels.append((right + 12, points[-1][1], line.get("variant", "")))
    for i, ((x, y, text), label_y) in enumerate(zip(labels, spread_labels(labels, TOP + 6, height - BOTTOM - 6))):
        color = COLORS[i % len(COLORS)]
        drawing.line(right - 14, y, x - 2, label_y, color, 0.8)
        drawing.text(x, label_y + 4, text, fill=color)
    drawing.text((LEFT + right) / 2, height - 14, "layer", "middle")
    drawing.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", help="JSON lines, or one JSON object")
    parser.add_argument("--model", help="take the lines of this model alone")
    parser.add_argument("--bits", metavar="FILE.svg", help="KL divergence by bits")
    parser.add_argument("--layers", metavar="FILE.svg", help="error by layer")
    args = parser.parse_args()
    if not args.bits and not args.layers:
        sys.exit("--bits FILE.svg or --layers FILE.svg: one of them is needed")
    with open(args.lines, encoding="utf-8") as f:
        text = f.read()
    try:
        lines = [json.loads(text)]
    except json.JSONDecodeError:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not args.model or line.get("model") == args.model]
    models = list(dict.fromkeys(line.get("model", "") for line in lines))
    if len(models) > 1:
        sys.exit(f"lines of several models: choose one by --model: {', '.join(models)}")
    lines = list({line.get("variant", str(i)): line for i, line in enumerate(lines)}.values())
    of = f", {models[0]}" if models and models[0] else ""
    if args.bits:
        draw_bits(lines, f"KL divergence by bits{of}", args.bits)
    if args.layers:
        draw_layers(lines, f"Error by layer{of}", args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

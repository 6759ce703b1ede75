#!/usr/bin/env python3
"""tpengine eval as a user runs it: figures that agree with those computed here from `tpengine logits`, saved logits that say the same as the model, windows
that overlap, refusals, and models that compute NaN."""
import array
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from case_help import check, expect, expect_run, must, run, status

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL = Path("tests/model")
TEXT = MODEL / "heldout.txt"
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"


def evaluate(dir, *words, text=TEXT):
    return json.loads(must(TPENGINE, "eval", dir, "--text", text, "--json", "--quiet", *words))


def read_npy(path):
    data = path.read_bytes()
    header = struct.unpack("<H", data[8:10])[0]
    shape = [int(n) for n in data[10:10 + header].decode().split("(")[1].split(")")[0].split(",")]
    values = array.array("f", data[10 + header:])
    return [values[row * shape[1]:(row + 1) * shape[1]] for row in range(shape[0])]


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def own_figures(model, reference, tokens):
    """What the definitions give for one window: row i predicts tokens[i + 1]."""
    nll = kl = top1 = top5 = 0.0
    for i, token in enumerate(tokens[1:]):
        q, p = log_softmax(model[i]), log_softmax(reference[i])
        nll -= q[token]
        kl += math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q))
        likeliest = max(range(len(p)), key=lambda t: (reference[i][t], -t))
        order = sorted(range(len(q)), key=lambda t: (-model[i][t], t))
        top1 += order[0] == likeliest
        top5 += likeliest in order[:5]
    n = len(tokens) - 1
    return math.exp(nll / n), kl / n, top1 / n, top5 / n


def check_definitions(work):
    ids = [int(word) for word in must(TPENGINE, "tokenize", work / "int4", TEXT.read_text()[:400]).split(",")][:60]
    bos = json.loads((MODEL / "config.json").read_text())["bos_token_id"]
    tokens = [t for t in ids if t != bos]
    rows = {}
    for name in ("int4", "none"):
        must(TPENGINE, "logits", work / name, "--token-ids", ",".join(map(str, [bos, *tokens])), "--output", work / "rows.npy", "--quiet")
        rows[name] = read_npy(work / "rows.npy")
    wanted = own_figures(rows["int4"], rows["none"], [bos, *tokens])
    got = evaluate(work / "int4", "--against", work / "none", "--max-tokens", len(tokens))
    expect("as many tokens as were asked for", got["tokens"], len(tokens))
    for name, value in zip(("perplexity", "kl_divergence", "top1_agreement", "top5_agreement"), wanted):
        # Double precision on both sides, sums in another order.
        check(f"{name} is what its definition says", abs(got[name] - value) <= 1e-9 * max(1, value), f"{got[name]!r}, wanted {value!r}")
    check("perplexity's ratio fits its parts", abs(got["perplexity_ratio"] * got["reference_perplexity"] / got["perplexity"] - 1) <= 1e-12, got)
    for name in ("perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement", "top5_agreement"):
        low, high = got[f"{name}_interval"]
        check(f"{name} lies in its interval", low <= got[name] <= high and low < high, (low, got[name], high))
    few = evaluate(work / "int4", "--max-tokens", 20)
    expect("so few tokens have no interval", few["perplexity_interval"], None)


def check_saved_logits(work):
    few = ("--max-tokens", 900, "--context", 200, "--stride", 80)
    file = work / "reference.logits"
    saved = evaluate(work / "none", "--save-logits", file, *few)
    live, kept = evaluate(work / "int4", "--against", work / "none", *few), evaluate(work / "int4", "--logits", file, *few)
    expect("the model's own figures do not depend on saving", saved["perplexity"], live["reference_perplexity"])
    expect("the reference is named", [live.pop("reference"), kept.pop("reference")], [str(work / "none"), str(file)])
    expect("saved logits say the same as the model", kept, live)
    one = evaluate(work / "int4", "--logits", file, *few, "--threads", 1)
    expect("figures do not depend on threads", {**one, "reference": None}, {**kept, "reference": None})
    itself = evaluate(work / "none", "--logits", file, *few)
    expect("a model agrees with itself", [itself["kl_divergence"], itself["kl_max"], itself["top1_agreement"], itself["top5_agreement"],
                                          itself["perplexity_ratio"]], [0, 0, 1, 1, 1])
    other = evaluate(work / "none", "--logits", file, *few, "--kv-cache", "fp8")
    check("other settings of one model can be compared", 0 < other["kl_divergence"] < 0.02, other)

    refuse = ("eval", work / "int4", "--text", TEXT, "--logits", file, "--quiet")
    expect_run("another text is refused", 2, "made from other tokens", TPENGINE, *refuse, "--max-tokens", 800, *few[2:])
    expect_run("other windows are refused", 2, "made with --context 200 --stride 80", TPENGINE, *refuse, "--max-tokens", 900)
    expect_run("two references are refused", 2, "there is one reference", TPENGINE, *refuse, *few, "--against", work / "none")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    expect_run("damaged logits give no figure", 4, "damaged", TPENGINE, *refuse, *few)
    file.write_bytes(data[:-4])
    expect_run("logits that were cut off are refused", 4, "bytes", TPENGINE, *refuse, *few)
    file.unlink()
    expect_run("missing logits are refused", 5, "No such file", TPENGINE, *refuse, *few)
    foreign = work / "foreign.txt"
    foreign.write_text("somebody's own\n")
    os.symlink(foreign, work / "link")
    for place in (foreign, work / "link", Path("/dev/null")):
        expect_run(f"saved logits do not take the place of {place.name}", 5, "no file of saved logits", TPENGINE, "eval", work / "int4", "--text", TEXT, *few, "--save-logits", place)
    check("what stood there is as it was", foreign.read_text() == "somebody's own\n" and (work / "link").is_symlink() and Path("/dev/null").is_char_device())
    again = evaluate(work / "none", "--save-logits", file, *few)
    check("saved logits are replaced by saved logits", again["perplexity"] == saved["perplexity"])
    cache = evaluate(work / "none", "--against", work / "none", "--kv-cache", "int4", *few)
    check("the reference keeps its cache in bf16", cache["kl_divergence"] > 0 and cache["reference_perplexity"] == saved["perplexity"])
    expect_run("logits that cannot be written are refused", 5, "none/x", TPENGINE, "eval", work / "int4", "--text", TEXT, *few, "--save-logits", work / "none/x/y")


def check_windows(work):
    expect_run("a stride beyond the window is refused", 2, "more would be left out", TPENGINE, "eval", work / "none", "--text", TEXT, "--context", 128,
               "--stride", 128)
    expect_run("a needle's text without needles is refused", 2, "add --needle", TPENGINE, "eval", work / "none", "--text", TEXT, "--needle-text", "{}")
    expect_run("a text without tokens is refused", 2, "no token to predict", TPENGINE, "eval", work / "none", "--text", "/dev/null")
    if os.environ.get("TEST_QUICK"):
        return
    text = ("--max-tokens", 1500, "--context", 128)
    whole = evaluate(work / "none", *text)
    expect("windows follow each other", [whole["stride"], whole["tokens"]], [127, 1500])
    half, quarter = (evaluate(work / "none", *text, "--stride", n) for n in (64, 32))
    expect("windows that overlap score each token once", [half["tokens"], quarter["tokens"]], [1500, 1500])
    # More context predicts better: 2 % here; a stride that changed nothing, or scored tokens with less context, would not.
    check("windows that overlap predict better", quarter["perplexity"] < half["perplexity"] < 0.99 * whole["perplexity"],
          [x["perplexity"] for x in (whole, half, quarter)])


def changed_model(work, name, change):
    """Shards in bf16 of the bundled model with other weights: change(tensor name, its values as bf16 bits) gives those, or None for the old ones."""
    shutil.copytree(MODEL, work / f"{name}-model", ignore=shutil.ignore_patterns("*.txt"))
    file = work / f"{name}-model/model.safetensors"
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    for tensor, entry in json.loads(data[8:8 + length]).items():
        if tensor == "__metadata__":
            continue
        begin, end = (8 + length + at for at in entry["data_offsets"])
        values = change(tensor, array.array("H", data[begin:end]))
        if values is not None:
            data[begin:end] = values.tobytes()
    file.write_bytes(data)
    must(TPSHARD, "--quant", "none", work / f"{name}-model", work / name, "--quiet")


def doubled(values):
    return array.array("H", (v if v & 0x7f80 == 0 else v + 0x80 for v in values))  # the exponent; what is that small may stay


def check_layers(work):
    def is_block(tensor, layers):
        return any(f"layers.{i}.{part}" in tensor for i in layers for part in ("self_attn.o_proj", "mlp.down_proj"))

    def errors(*words):
        report = evaluate(work / words[0], "--against", work / words[1], "--layers", "--max-tokens", 300, "--context", 150, *words[2:])
        expect(f"{words}: the embedding and all layers are told", [line["layer"] for line in report["layers"]], [-1, 0, 1, 2, 3])
        check(f"{words}: no mean is above its largest", all(0 <= line["relative_error"] <= line["relative_error_max"] for line in report["layers"]), report)
        return [line["relative_error"] for line in report["layers"]]

    expect("a model is itself in all layers", errors("none", "none"), [0, 0, 0, 0, 0])
    changed_model(work, "short", lambda tensor, values: array.array("H", bytes(2 * len(values))) if is_block(tensor, (2, 3)) else None)
    short = errors("short", "none")
    check("layers that add nothing are seen behind them and not before", short[:3] == [0, 0, 0] and 0 < short[3] < short[4], short)
    # Where no layer adds anything the stream is the embedding: twice of it is off by once of it, at each stage.
    changed_model(work, "flat", lambda tensor, values: array.array("H", bytes(2 * len(values))) if is_block(tensor, range(4)) else None)
    changed_model(work, "loud", lambda tensor, values: array.array("H", bytes(2 * len(values))) if is_block(tensor, range(4)) else
                  doubled(values) if "embed_tokens" in tensor else None)
    loud = errors("loud", "flat")
    check("errors are relative to the reference", all(abs(error - 1) <= 1e-6 for error in loud), loud)
    must(TPSHARD, "--quant", "none", "--tp", 2, MODEL, work / "none-2", "--quiet")
    split = errors("none-2", "none")
    check("ranks change what their sums round", split[0] == 0 and all(0 < error < 0.01 for error in split[1:]), split)
    quantized = errors("int4", "none")
    check("weights of four bits are seen in each layer", 0.001 < quantized[0] < 0.02 and all(0.02 < error < 0.3 for error in quantized[1:]), quantized)
    must(TPSHARD, "--quant", "none", "--rot", MODEL, work / "rotated", "--quiet")
    for pair in (("rotated", "none"), ("none", "rotated")):  # the same model but for what bf16 rounds
        turned = errors(*pair)
        check(f"{pair}: a rotation is undone", all(0 < error < 0.01 for error in turned), turned)
    expect_run("a layer report without a reference is refused", 2, "needs --against", TPENGINE, "eval", work / "none", "--text", TEXT, "--layers")


def encode(work, text):
    """Token ids, without the one that begins a sequence."""
    return [int(word) for word in must(TPENGINE, "tokenize", work / "int4", text).split(",")][1:]


def number_of(probe):
    mask = 2**64 - 1
    x = (probe + 1) * 0x9e3779b97f4a7c15 & mask
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9 & mask
    x = (x ^ x >> 27) * 0x94d049bb133111eb & mask
    return 10000 + (x ^ x >> 31) % 90000


def check_needle(work):
    sentence, context, bos = "Behold, the number of the gate is {}.", 240, json.loads((MODEL / "config.json").read_text())["bos_token_id"]
    words = ("--needle", 3, "--needle-text", sentence, "--context", context)
    report = json.loads(must(TPENGINE, "eval", work / "none", "--text", TEXT, "--json", "--quiet", *words))
    expect("needles at all lengths and depths are told", [(c["tokens"], c["depth_percent"]) for c in report["cells"]],
           [(tokens, depth) for tokens in (60, 120, 240) for depth in (0, 25, 50, 75, 100)])
    expect("as many needles as there are", [report["needles"], report["of_each"], report["found"]], [45, 3, sum(c["found"] for c in report["cells"])])
    # One of them by hand: half the context, a depth of 25 %.
    before, after, text = encode(work, " Behold, the number of the gate is"), encode(work, "."), encode(work, TEXT.read_text())
    nll = {"with": 0.0, "without": 0.0}
    count = 0
    for probe in range(3):
        answer = encode(work, f" {number_of(probe)}")
        needle = before + answer + after
        body = 120 - 1 - len(needle) - len(before + answer)
        at, plain = probe * (len(text) - body) // 2, probe * (len(text) - body - len(needle)) // 2
        sequences = {"with": text[at:at + body // 4] + needle + text[at + body // 4:at + body], "without": text[plain:plain + body + len(needle)]}
        for name, hay in sequences.items():
            tokens = [bos, *hay, *before, *answer]
            expect(f"probe {probe} {name} the needle is as long as it should be", len(tokens), 120)
            must(TPENGINE, "logits", work / "none", "--token-ids", ",".join(map(str, tokens)), "--output", work / "rows.npy", "--quiet")
            rows = read_npy(work / "rows.npy")
            nll[name] -= sum(log_softmax(rows[i - 1])[tokens[i]] for i in range(120 - len(answer), 120))
        count += len(answer)
    cell = next(c for c in report["cells"] if (c["tokens"], c["depth_percent"]) == (120, 25))
    check("the needle costs what it should", abs(cell["nll"] - nll["with"] / count) <= 1e-5, (cell, nll["with"] / count))
    check("the number alone costs what it should", abs(cell["nll_without"] - nll["without"] / count) <= 1e-5, (cell, nll["without"] / count))

    # A model that knows one number: each token's likeliest successor is what follows it there.
    known = next(probe for probe in range(3) if len(set(str(number_of(probe)))) == 5)
    chain = [before[-1], *encode(work, f" {number_of(known)}")]
    check("the number's tokens differ", len(set(chain)) == len(chain), chain)
    make_chain_model(work, chain)
    report = json.loads(must(TPENGINE, "eval", work / "chain", "--text", TEXT, "--json", "--quiet", *words))
    expect("of three numbers the one that it knows is found", [c["found"] for c in report["cells"]], [1] * 15)

    for name, problem, wrong in (("without a place for the number", "{} once", ("--needle-text", "no number here")),
                                 ("that is its number alone", "{} once", ("--needle-text", "{} is it")),
                                 ("with a reference", "by itself", ("--against", work / "none")),
                                 ("in too short a context", "is too short", ("--context", 40))):
        expect_run(f"a needle {name} is refused", 2, problem, TPENGINE, "eval", work / "none", "--text", TEXT, "--needle", 1, *wrong)
    short = work / "short.txt"
    short.write_text(TEXT.read_text()[:300])
    expect_run("a text that is shorter than the context is refused", 2, "use a longer text", TPENGINE, "eval", work / "none", "--text", short, "--needle", 1)


def make_chain_model(work, chain):
    """The bundled model without what its layers add, and a head of its own: a token's successor in the chain has the token's embedding as its row."""
    names, values = {}, bytearray()
    file = (MODEL / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    for name, entry in json.loads(file[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = file[8 + length + begin:8 + length + end]
        if "o_proj" in name or "down_proj" in name:
            data = bytes(len(data))
        if "model.norm" in name:
            data = b"\x80\x3f" * (len(data) // 2)
        names[name] = {**entry, "data_offsets": [len(values), len(values) + len(data)]}
        values += data
        if "embed_tokens" in name:
            width = len(data) // entry["shape"][0]
            head = bytearray(len(data))
            for token, successor in zip(chain, chain[1:]):
                head[successor * width:(successor + 1) * width] = data[token * width:(token + 1) * width]
            names["lm_head.weight"] = {**entry, "data_offsets": [len(values), len(values) + len(head)]}
            values += head
    folder = work / "chain-model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.txt", "model.safetensors"))
    header = json.dumps(names).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    must(TPSHARD, "--quant", "none", folder, work / "chain", "--quiet")


def check_bench(work):
    """bench_quality.py and what plot_quality.py draws of its lines."""
    lines = work / "lines.jsonl"
    words = ("--build", BUILD, "--work", work / "bench", "--max-tokens", 200, "--context", 100, "--json", lines, "--layers", "--only", "int8", "int4 r*")
    out = must(sys.executable, "bench/bench_quality.py", *words, "--variant", "kv=--quant none @ --kv-cache fp8", "--variant", "odd=--quant none --tp 0",
               "--checkpoint", f"other={MODEL}:4.5")
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    expect("each variant that can be measured has a line", [line["variant"] for line in found], ["int8", "int4 rot", "kv", "other"])
    check("a variant that cannot is named with the reason", "odd: refused: tpshard: --tp needs" in out, out)
    if len(found) != 4:
        return
    int8, rotated, kv, other = found
    # int8: a byte and an f32 scale for each row of 256 to 1024 columns.
    check("bits are those that are stored", 8.03 < int8["bits"] < 8.125 and rotated["bits"] == 4.125 and kv["bits"] == 16 and other["bits"] == 4.5,
          [line["bits"] for line in found])
    check("figures are in their order", 0 < int8["kl_divergence"] < rotated["kl_divergence"] and 0 < kv["kl_divergence"] and other["kl_divergence"] == 0, found)
    check("times are told, but not of other tools' work", int8["convert_s"] > 0 and other["convert_s"] is None, (int8, other))
    check("the table has them all", all(f"| {line['variant']} | {line['bits']:.3f} |" in out for line in found), out)
    expect("nothing is left behind", list((work / "bench").iterdir()), [])
    must(sys.executable, "bench/plot_quality.py", lines, "--bits", work / "bits.svg", "--layers", work / "layers.svg")
    for name, wanted in (("bits", {"int8", "int4 rot", "kv"}), ("layers", {"int8", "int4 rot"})):
        svg = ElementTree.parse(work / f"{name}.svg").getroot()
        text = {element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")}
        check(f"{name}.svg names the variants that differ", wanted <= text and "other" not in text, text)


def without_number(work):
    """The bundled model with such gains in its last norm that sums over them overflow. tpshard itself refuses weights that are no numbers."""
    changed_model(work, "nan", lambda tensor, values: array.array("H", [0x7f61] * len(values)) if tensor == "model.norm.weight" else None)  # 3e38

def check_damage(work):
    without_number(work)
    words = ("--text", TEXT, "--max-tokens", 40)
    expect_run("a model that computes NaN fails", 1, f"{work}/nan: the logits", TPENGINE, "eval", work / "nan", *words)
    expect_run("a reference that computes NaN fails, by its name", 1, f"{work}/nan: the logits", TPENGINE, "eval", work / "none", "--against", work / "nan", *words)
    code, _, _ = run(TPENGINE, "eval", work / "nan", *words, "--save-logits", work / "left")
    expect("its logits are not kept", [code, [p.name for p in work.iterdir() if p.name.startswith("left")]], [1, []])


def main():
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        for quant in ("none", "int4"):
            must(TPSHARD, "--quant", quant, MODEL, work / quant, "--quiet")
        check_definitions(work)
        check_saved_logits(work)
        check_windows(work)
        check_layers(work)
        check_needle(work)
        check_damage(work)
        check_bench(work)
    return status()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""tpshard plan: its figures against sums written out by hand here, against the files that tpshard writes, and against the bytes that
tpengine counts; its screen against the screen's size; its proposals against the stated order; its refusals.

No weights but the goldens' are there: a plan needs config.json alone (bench/models).
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import case_help
from case_help import report

QUICK = os.environ.get("TEST_QUICK")  # for slow builds
TPS = (3,) if QUICK else (1, 4)  # each kind of weight adds another

BUILD = Path(os.environ.get("BUILD", "build"))
TPSHARD = BUILD / "tpshard"
MODELS = Path("bench/models")
GOLDEN = Path("tests/golden/families")
GIB = 1 << 30


def tpshard(*words):
    return subprocess.run([str(TPSHARD), *map(str, words)], capture_output=True, text=True)


def plan(path, *words):
    done = tpshard("plan", "--json", *words, path)
    if done.returncode != 0:
        raise RuntimeError(f"plan {path} {words}: exit {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# ---- by hand ---------------------------------------------------------------------------------------------------------

INT4 = 0.5 + 2 / 128  # bytes of a weight: a code of four bits, a scale of two bytes for 128 columns
MXFP4 = 0.5 + 1 / 32


def llama_3_70b():
    """2 ranks, int4: 80 layers of q (64 heads), k, v (8), o, gate, up, down; embedding in bf16, head in int8."""
    layer = (64 + 8 + 8) * 128 * 8192 + 64 * 128 * 8192 + 3 * 28672 * 8192
    norms = (2 * 80 + 1) * 8192
    vocabulary = 128256 * 8192
    return {
        "path": "Llama-3-70B.json", "words": ("--tp", 2, "--quant", "int4"), "parameters": 80 * layer + 2 * vocabulary + norms,
        "weights": (80 * layer * INT4 + vocabulary * (2 + 1) + 128256 * 4) / 2 + 4 * norms,
        "kv": 80 * 2 * 4 * 128 * 2,
        "read": (80 * layer * INT4 + vocabulary + 128256 * 4) / 2 + 4 * norms,
        "sent": (1 + 2 * 80) * 8192 * 2,
    }


def deepseek_v2_lite():
    """2 ranks, bf16: 27 layers of q, latent, kv_b and o; one dense mlp, 26 with 64 experts, 6 of them chosen, and 2 shared ones. What makes
    the latent is on both ranks, and so is the router, which is padded to 64 rows. The cache holds 512 + 64 values."""
    q, kv_a, kv_b, o = 16 * 192 * 2048, (512 + 64) * 2048, 16 * 256 * 512, 2048 * 16 * 128
    dense, expert, shared, router = 3 * 10944 * 2048, 3 * 1408 * 2048, 2 * 3 * 1408 * 2048, 64 * 2048
    vocabulary = 102400 * 2048
    norms = 27 * (2 * 2048 + 512) + 2048
    cut = 27 * (q + kv_b + o) + dense + 26 * shared + vocabulary
    both = 27 * kv_a + 26 * router
    return {
        "path": "DeepSeek-V2-Lite.json", "words": ("--tp", 2, "--quant", "none"),
        "parameters": cut + both + 26 * 64 * expert + vocabulary + norms,
        "weights": cut + vocabulary + 26 * 64 * expert + 2 * both + 4 * norms,
        "kv": 27 * (512 + 64) * 2,
        "read": cut + 26 * 6 * expert + 2 * both + 4 * norms,
        "sent": (1 + 2 * 27) * 2048 * 2,
    }


def gpt_oss_120b():
    """1 rank, as it is: experts in mxfp4 (128 of 2880 columns, 4 chosen), the rest in bf16; biases of experts, attention and router."""
    attention = (64 + 8 + 8) * 64 * 2880 + 2880 * 64 * 64
    expert, router, vocabulary = 3 * 2880 * 2880, 128 * 2880, 201088 * 2880
    vectors = 36 * (128 * (2 * 2880 + 2880) + (64 + 8 + 8) * 64 + 2880 + 64 + 128 + 2 * 2880) + 2880
    chosen_vectors = vectors - 36 * 124 * 3 * 2880
    return {
        "path": "gpt-oss-120b.json", "words": ("--tp", 1), "parameters": 36 * (attention + router + 128 * expert) + 2 * vocabulary + vectors,
        "weights": 36 * (128 * expert * MXFP4 + 2 * (attention + router)) + 4 * vocabulary + 4 * vectors,
        "kv": 36 * 2 * 8 * 64 * 2,
        "read": 36 * (4 * expert * MXFP4 + 2 * (attention + router)) + 2 * vocabulary + 4 * chosen_vectors,
        "sent": 0,
    }


def mixtral():
    """4 ranks, int8, a cache in fp8: 8 experts of 14336 columns, 2 chosen; the router in bf16 on every rank, padded from 8 rows to 64."""
    attention, expert = (32 + 8 + 8) * 128 * 4096 + 4096 * 4096, 3 * 14336 * 4096
    router, vocabulary, norms = 8 * 4096, 32000 * 4096, (2 * 32 + 1) * 4096
    # a scale of four bytes for each row: rows of q, k, v and of gate and up are cut, those of o and down are not
    scales = 4 * (32 * (48 * 128 + 4 * 4096) + 32 * 8 * (2 * 14336 + 4 * 4096) + 32000)
    return {
        "path": "Mixtral-8x7B-v0.1.json", "words": ("--tp", 4, "--quant", "int8", "--kv-cache", "fp8"),
        "parameters": 32 * (attention + router + 8 * expert) + 2 * vocabulary + norms,
        "weights": (32 * (attention + 8 * expert) + 3 * vocabulary + scales) / 4 + 32 * 2 * 64 * 4096 + 4 * norms,
        "kv": 32 * 2 * 2 * 128,
        "read": (32 * (attention + 2 * expert) + vocabulary + scales / 4) / 4 + 32 * 2 * 64 * 4096 + 4 * norms,
        "sent": (1 + 2 * 32) * 4096 * 2 * 2 * 3 // 4,
    }


def by_hand():
    for case in (llama_3_70b(), deepseek_v2_lite(), gpt_oss_120b(), mixtral()):
        got = plan(MODELS / case["path"], *case["words"])
        rank = got["ranks"][0]
        pairs = [("parameters", got["parameters"], case["parameters"], 0), ("weights", rank["weight_bytes"], case["weights"], 1e-3),
                 ("KV cache of a token", rank["kv_bytes_per_token"], case["kv"], 0), ("sent", rank["sent_bytes_per_token"], case["sent"], 0),
                 ("read", rank["read_bytes_per_token"], case["read"], 2e-3)]
        wrong = [f"{what} {found}, by hand {want:.0f}" for what, found, want, bound in pairs if not abs(found - want) <= bound * want]
        report(f"by hand: {case['path']} {' '.join(map(str, case['words']))}", "; ".join(wrong))


def windows():
    """Layers with a window are read no further back than it, and allocated in full."""
    got = plan(MODELS / "gpt-oss-20b.json", "--context", 65536)
    rank = got["ranks"][0]
    layer = 2 * 8 * 64 * 2
    wrong = []
    if rank["kv_bytes"] != 24 * layer * 65536:
        wrong.append(f"allocated {rank['kv_bytes']}")
    if rank["kv_read_bytes_per_token"] != 12 * layer * (65536 + 128):
        wrong.append(f"read {rank['kv_read_bytes_per_token']}")
    if got["window"] != 128 or got["window_layers"] != 12:
        wrong.append(f"window {got['window']} in {got['window_layers']} layers")
    report("windows are read short and kept in full", "; ".join(wrong))

    # Of 8 heads of 128 in 32 layers, keys and values: a byte or half of one for each, and a scale of two for each position of a head.
    heads = 32 * 2 * 8
    for words, head_bytes in ((("--kv-cache", "bf16"), 256), (("--kv-cache", "fp8"), 128), (("--kv-cache", "int8"), 130),
                              (("--kv-cache", "int4"), 66)):
        got = plan(MODELS / "Llama-3.1-8B.json", *words)["ranks"][0]
        want = (heads * head_bytes, heads * head_bytes * 131072)
        found = (got["kv_bytes_per_token"], got["kv_bytes"])
        report(f"{words[1]}: bytes of the cache", "" if found == want else f"{found}, wanted {want}")


# ---- against what is written -----------------------------------------------------------------------------------------

def written(case, tp, words, tmp):
    with tempfile.TemporaryDirectory(dir=tmp) as work:
        shards = Path(work) / "shards"
        words = ("--tp", tp, *words)
        done = tpshard("convert", "--quiet", "--threads", 1, *words, case, shards)
        if done.returncode != 0:
            return f"{words}: convert: {done.stderr.strip()}"
        want = [(shards / f"rank-{r:02}-of-{tp:02}.tpshard").stat().st_size for r in range(tp)]
        got = [rank["bytes"] for rank in plan(case, *words)["ranks"]]
        return "" if got == want else f"{words}: planned {got}, written {want}"


def against_files():
    cases = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
    cases += sorted(path.parent for path in Path("tests/golden/imports").glob("**/config.json"))
    with tempfile.TemporaryDirectory(dir=BUILD) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, case in enumerate(cases):
            experts = "xpert" in (case / "config.json").read_text()
            kind = ("int8", "fp8", "int4")[number % 3]
            ways = [(tp, ()) for tp in TPS] + [(number % 3 + 2, ("--quant", kind, "--group-size", 32))]
            if experts:
                ways += [(tp, ("--experts", "ep")) for tp in (2, 3)]
            wrong = [line for line in pool.map(lambda way: written(case, *way, tmp), ways) if line]
            report(f"files of {case.name} are as large as planned", "; ".join(wrong[:2]))


def against_engine():
    """What the engine counts as sent, in both ways to deal out experts."""
    engine = BUILD / "tpengine"
    if not engine.exists():
        print("ok sent bytes # SKIP no tpengine")
        return
    for name, tp, experts in (("llama3", 2, "tp"), ("mixtral", 3, "tp"), ("mixtral", 3, "ep")):
        with tempfile.TemporaryDirectory(dir=BUILD) as work:
            words = ("--tp", tp, "--experts", experts)
            shards = Path(work) / "shards"
            tpshard("convert", "--quiet", *words, GOLDEN / name, shards)
            done = subprocess.run([engine, "bench", "--json", "--prompt-tokens", "4", "--gen-tokens", "4", shards],
                                  capture_output=True, text=True)
            want = [rank["sent_bytes_per_token"] for rank in plan(GOLDEN / name, *words)["ranks"]][0]
            found = re.search(r'"sent_bytes_per_token": ([0-9.]+)', done.stdout)
            got = float(found.group(1)) if found else done.stderr.strip()
            report(f"{name} tp {tp} experts {experts} sends what is planned", "" if got == want else f"planned {want}, counted {got}")


# ---- the screen ------------------------------------------------------------------------------------------------------

def screens():
    ways = [("--gpu-memory", "24GiB"), ("--tp", 8, "--gpu-memory", "24GiB", "--experts", "ep"), ("--tp", 64, "--quant", "int4"),
            ("--tp", 2, "--quant", "fp8", "--gpu-memory", "8GiB")]
    small = [path for path in sorted(MODELS.glob("*.json")) if path.name not in ("DeepSeek-V3.json", "Qwen3-235B-A22B.json")]
    small = small[::4] if QUICK else small
    jobs = [(path, ways[(i + more) % 4]) for i, path in enumerate(small) for more in (0, 1)]
    jobs += [] if QUICK else [(MODELS / "DeepSeek-V3.json", ways[0]), (MODELS / "Qwen3-235B-A22B.json", ways[1]),
             (MODELS / "gpt-oss-20b.json", ("--tp", 8, "--gpu-memory", "2GiB"))]

    def check(job):
        path, way = job
        done = tpshard("plan", *way, path)
        lines = done.stdout.splitlines()
        if done.returncode != 0:
            return f"{path.name} {way}: {done.stderr.strip()}"
        widest = max(map(len, lines))
        return "" if len(lines) <= 24 and widest <= 100 else f"{path.name} {way}: {len(lines)} lines of {widest} columns"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = [line for line in pool.map(check, jobs) if line]
    report(f"{len(jobs)} answers, each on one screen", "; ".join(wrong[:3]))


# ---- what fits -------------------------------------------------------------------------------------------------------

def fits():
    got = plan(MODELS / "Llama-3-70B.json", "--tp", 2, "--quant", "int4", "--gpu-memory", "24GiB")
    report("Llama-3-70B in int4 fits 2 cards of 24 GiB with its whole context",
           "" if got["fits"] and got["max_context"] == 8192 and got["context"] == 8192 else str({k: got[k] for k in ("fits", "max_context")}))
    taken = 24 * GIB - got["available_bytes"]
    report("driver and context: 512 MiB and a hundredth of the card", "" if taken == (512 << 20) + 24 * GIB // 100 else str(taken))

    # The largest context fits, one page more does not.
    path, way = MODELS / "Llama-3.3-70B-Instruct.json", ("--tp", 2, "--quant", "int4", "--kv-cache", "bf16", "--gpu-memory", "24GiB")
    most = plan(path, *way)["max_context"]
    answers = [plan(path, *way, "--context", most + more)["fits"] for more in (0, 64)]
    report("the largest context is the largest", "" if most % 64 == 0 and answers == [True, False] else f"{most}: {answers}")

    # Weights as little changed as possible, then the cache, then the fewest ranks.
    ways = [
        ("Llama-3.1-8B.json", ("--gpu-memory", "24GiB"), ("none", "bf16", 1)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--gpu-memory", "12GiB"), ("int8", "bf16", 1)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--gpu-memory", "8GiB"), ("int4", "bf16", 1)),
        ("Llama-3.1-8B.json", ("--quant", "int8", "--gpu-memory", "8GiB"), ("int8", "bf16", 2)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--context", 131072, "--gpu-memory", "28GiB"), ("none", "fp8", 1)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--context", 131072, "--kv-cache", "bf16", "--gpu-memory", "28GiB"), ("int8", "bf16", 1)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--context", 131072, "--kv-cache", "int8", "--gpu-memory", "28GiB"), ("none", "int8", 1)),
        ("Llama-3.1-8B.json", ("--tp", 1, "--context", 131072, "--kv-cache", "int4", "--gpu-memory", "28GiB"), ("none", "int4", 1)),
        ("gpt-oss-120b.json", ("--tp", 4, "--gpu-memory", "24GiB"), ("keep", "bf16", 4)),
    ]
    for name, words, want in ways:
        answer = plan(MODELS / name, *words)
        got = (answer["way"], answer["kv_cache"], answer["tp_size"])
        report(f"proposal for {name} {' '.join(map(str, words))}", "" if got == want and answer["fits"] else f"{got}, wanted {want}")

    # What does not fit comes with what would.
    answer = plan(MODELS / "Llama-3-70B.json", "--tp", 2, "--quant", "int8", "--gpu-memory", "24GiB")
    others = [(other["quant"], other["tp_size"]) for other in answer["others"]]
    report("instead of what does not fit", "" if not answer["fits"] and others == [("int4", 2), ("int8", 4)] else str(others))
    wrong = [other for other in answer["others"] if not plan(MODELS / "Llama-3-70B.json", "--tp", other["tp_size"], "--quant", other["quant"],
             "--kv-cache", other["kv_cache"], "--context", other["max_context"], "--gpu-memory", "24GiB")["fits"]]
    report("what is advised fits", str(wrong) if wrong else "")
    report("a word of --quant is no mix", "" if {(w["bits"], w["kinds"]) for w in (answer, *answer["others"])} == {(None, None)} else str(answer))
    answer = plan(MODELS / "Llama-3-70B.json", "--tp", 2, "--bits", 5.5, "--gpu-memory", "24GiB")
    others = [(other["quant"], other["bits"], other["kinds"], other["tp_size"]) for other in answer["others"]]
    report("a mix is no word of --quant", "" if (answer["way"], answer["bits"], answer["kinds"]) == (None, 5.5, None) and not answer["fits"]
           and (None, 5.5, None, 3) in others else f'{answer["way"]} {answer["bits"]} {others}')
    done = tpshard("plan", "--tp", 4, "--gpu-memory", "4GiB", MODELS / "Qwen3-235B-A22B.json")
    report("nothing fits", "" if done.returncode == 0 and "does not fit on" in done.stdout else done.stdout + done.stderr)


# ---- refusals --------------------------------------------------------------------------------------------------------

def refusals():
    llama = json.loads((MODELS / "Llama-3.1-8B.json").read_text())
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        def changed(**keys):
            path = Path(work) / "config.json"
            path.write_text(json.dumps({**llama, **keys}))
            return path
        model = MODELS / "Llama-3.1-8B.json"
        cases = [
            ("unknown architecture", 3, '"OPTForCausalLM"', (changed, {"architectures": ["OPTForCausalLM"]})),
            ("unknown quantization", 3, "quip", (changed, {"quantization_config": {"quant_method": "quip"}})),
            ("no model", 3, "no config.json", ("tests/golden",)),
            ("no such file", 3, "no config.json", (f"{work}/nothing.json",)),
            ("not JSON", 3, "model_table", ("scripts/model_table",)),
            ("--gpu-memory 0", 2, "--gpu-memory 0", ("--gpu-memory", "0", model)),
            ("--gpu-memory 24", 2, "written like 24GiB", ("--gpu-memory", "24", model)),
            ("--gpu-memory 24XB", 2, '"24XB"', ("--gpu-memory", "24XB", model)),
            ("--gpu-memory -1GiB", 2, '"-1GiB"', ("--gpu-memory", "-1GiB", model)),
            ("--context above the model's", 2, "at most 131072", ("--context", "131073", model)),
            ("--kv-cache of a third kind", 2, "bf16|fp8|int8|int4", ("--kv-cache", "int2", model)),
            ("--kv-cache int8 of latents", 3, "latent row", ("--kv-cache", "int8", MODELS / "DeepSeek-V2-Lite.json")),
            ("--experts of a third kind", 2, "tp|ep", ("--experts", "pp", model)),
        ]
        for name, status, sentence, words in cases:
            if callable(words[0]):
                words = (words[0](**words[1]),)
            done = tpshard("plan", *words)
            lines = done.stderr.strip().splitlines()
            good = done.returncode == status and len(lines) == 1 and sentence in lines[0] and not done.stdout
            report(f"refused: {name}", "" if good else f"exit {done.returncode}: {done.stderr.strip() or done.stdout[:200]}")
        only = Path(work) / "only"
        only.mkdir()
        (only / "config.json").write_text(json.dumps(llama))
        report("a directory with a config.json alone", "" if plan(only) == plan(model) else "differs from the file")


# ---- plans of the user's own -------------------------------------------------------------------------------------------

def own_plans():
    """--plan and --as do for `plan`, and for `convert --dry-run`, what they do for `convert`."""
    with tempfile.TemporaryDirectory(dir=BUILD) as work:
        own = Path(work) / "own.json"
        own.write_text(json.dumps({f"layers.*.mlp.experts.{part}": "grouped_gemm" for part in ("gate_up_proj", "down_proj")}))
        whole = plan(GOLDEN / "mixtral", "--tp", 2, "--experts", "ep")
        report("--plan decides on experts", "" if plan(GOLDEN / "mixtral", "--tp", 2, "--plan", own) == whole else "not as --experts ep")
        dry = tpshard("convert", "--dry-run", "--json", "--tp", 2, "--plan", own, GOLDEN / "mixtral")
        report("so does it in a dry run", "" if dry.returncode == 0 and json.loads(dry.stdout) == whole else dry.stderr.strip() or "differs")
        config = json.loads((MODELS / "Llama-3.1-8B.json").read_text())
        new = Path(work) / "new.json"
        new.write_text(json.dumps({**config, "architectures": ["NewForCausalLM"]}))
        found = plan(new, "--as", "LlamaForCausalLM")
        wanted = {**plan(MODELS / "Llama-3.1-8B.json"), "architecture": "NewForCausalLM as LlamaForCausalLM"}
        report("--as lets a new architecture be planned", "" if found == wanted else "differs from the known one's")


# ---- the README ------------------------------------------------------------------------------------------------------

def readme_table():
    if QUICK:
        print("ok the README's table # SKIP slow builds leave this out")
        return
    text = Path("README.md").read_text()
    begin, end = "<!-- made by scripts/model_table -->\n", "<!-- end of scripts/model_table -->\n"
    done = subprocess.run(["scripts/model_table", str(TPSHARD)], capture_output=True, text=True)
    inside = text.split(begin)[1].split(end)[0] if begin in text and end in text else None
    report("the README's table is what scripts/model_table prints",
           "" if done.returncode == 0 and inside == done.stdout else done.stderr.strip() or "differs: run scripts/model_table --write")


def main():
    if not TPSHARD.exists():
        print(f"SKIP no {TPSHARD}")
        return 77
    for part in (by_hand, windows, fits, refusals, own_plans, screens, readme_table, against_engine, against_files):
        if len(sys.argv) < 2 or part.__name__ in sys.argv[1:]:
            part()
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())

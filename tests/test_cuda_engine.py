#!/usr/bin/env python3
"""tpengine with the CUDA backend on an emulated device: host side, kernels, graphs and sampling together, against the CPU backend.

The backend's shared object is the real one's sources, compiled against tests/emulator instead of a driver and nvcc; cuBLASLt is
replaced by a plain product that checks what it is asked for. CUDA_LIBRARY names another library to test: the real one, on a device.
An emulated token takes a tenth of a second, so greedy texts are short there; CUDA_ENGINE_FULL=1 makes every one of them as long as it can be.

Bounds, in rms of the logits. A device's prefill multiplies bf16 weights with bf16 inputs (rounding by up to 2^-9 in each of eight
products), takes scores and probabilities in bf16, and e4m3 inputs (2.6 % rms) for fp8 weights where the chip has them. Random weights
amplify such noise two to three times: 2 % against transformers for bf16 weights (1.2 % is usual), and for quantized ones as far from
transformers' logits as the CPU is, whose rounding of inputs to int8 makes noise of the same size elsewhere, plus 1 %; plus 12 % with
e4m3 inputs.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_families import BUILD, GOLDEN, read_npy, relative_error, run  # noqa: E402

REAL = os.environ.get("CUDA_LIBRARY")
QUICK = os.environ.get("CUDA_ENGINE_QUICK")  # for slow builds: one family
FULL = os.environ.get("CUDA_ENGINE_FULL") or REAL
LIBRARY = Path(REAL or BUILD / "tests" / "libtpengine_cuda_emulated.so")
DEVICE = ["--backend", "cuda", "--cuda-library", LIBRARY]
MODEL = Path("tests/model")
if QUICK:
    os.environ["TPENGINE_TIMEOUT"] = "300"
failures = 0


def check(name, ok, detail=""):
    global failures
    failures += not ok
    print(f"{'ok' if ok else 'not ok'} {name} {detail}", flush=True)


def attempt(name, function):
    try:
        function()
    except (RuntimeError, OSError, AssertionError, ValueError) as problem:
        check(name, False, problem)


def engine(*words, **environment):
    done = subprocess.run([str(w) for w in (BUILD / "tpengine", *words)], capture_output=True, text=True,
                          env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def must(*words, **environment):
    rc, out, problem = engine(*words, **environment)
    if rc:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit {rc}: {problem.strip()[-500:]}")
    return out


def logits(shards, ids, out, *more, **environment):
    must("logits", shards, "--token-ids", ",".join(map(str, ids)), "--output", out, "--quiet", *more, **environment)
    return read_npy(out)


def test_families(tmp):
    few = (["qwen3", "mixtral"] if QUICK else
           ["llama31", "llama_biases", "mistral_window", "qwen3", "gemma2", "gpt_oss", "mixtral", "olmo2", "deepseek_v3"] if REAL else [])
    # What these have, others have beside more.
    same = ("llama2", "llama3", "llama32_tied", "llama_linear_rope", "llama_yarn", "mistral", "ministral", "qwen2", "qwen3_one_kv",
            "phi3", "phi3_longrope_within", "granite_moe", "gemma", "gemma3_with_vision")
    cases = [case for case in sorted(GOLDEN.iterdir()) if case.name not in same]
    for case in [GOLDEN / name for name in few] or cases:
        golden = json.loads((case / "golden.json").read_text())
        want = read_npy(case / "logits.npy")
        context = ("--context", golden["context"]) if "context" in golden else ()
        # Latent attention rounds the absorbed queries to bf16 as well. Gemma 3 norms sums before it adds them, so what parts lose in bf16 counts more.
        bound = 0.03 if case.name.startswith("deepseek") else 0.025 if case.name.startswith("gemma3") else 0.02
        for tp in (1, 3) if case.name in few or case.name in ("gpt_oss", "deepseek_v2", "qwen2_moe") else (3,):
            shards = tmp / f"{case.name}-{tp}"
            run(BUILD / "tpshard", "--tp", tp, "--quant", "none", case, shards, "--quiet")
            error = relative_error(logits(shards, golden["token_ids"], tmp / "out.npy", *DEVICE, *context), want)
            check(f"{case.name} tp {tp}", error <= bound, f"error {100 * error:.3f} % of rms, bound {100 * bound:.1f} %")
            shutil.rmtree(shards)


# What the line about the device must say, by kind of weight and generation of chip. Sizes that cuBLASLt does not take (llama_odd) fall back.
PREFILL = {
    "none": dict.fromkeys((80, 86, 89, 90, 120), "cuBLASLt bf16"),
    "int8": dict.fromkeys((80, 86, 89, 90, 120), "int8"),
    "fp8": {80: "cuBLASLt f16", 86: "cuBLASLt f16", 89: "cuBLASLt fp8, scales by tensor",
            90: "cuBLASLt fp8, scales by row and column", 120: "cuBLASLt fp8, scales by tensor"},
    "nl4": {86: "cuBLASLt f16", 90: "cuBLASLt fp8, scales by row and column"},
    "int4": {80: "int8", 86: "int8", 89: "int8", 90: "cuBLASLt fp8, scales by row and column", 120: "int8"},
}
for kind, way in (("int4z", "cuBLASLt f16"), ("mxfp4", "cuBLASLt bf16"), ("nvfp4", "cuBLASLt bf16")):
    PREFILL[kind] = {86: way, 90: way}


def test_arithmetic(tmp):
    for case, regular in ((GOLDEN / "llama3", True), (GOLDEN / "llama_odd", False)):
        golden = json.loads((case / "golden.json").read_text())
        want = read_npy(case / "logits.npy")
        for quant, ways in PREFILL.items():
            shards = tmp / f"{case.name}-{quant}"
            run(BUILD / "tpshard", "--tp", 1, "--quant", quant, "--group-size", 32, case, shards, "--quiet")
            ids = golden["token_ids"]
            cpu = relative_error(logits(shards, ids, tmp / "cpu.npy"), want)
            every = FULL or (quant == "fp8" and regular)  # the chips differ most in these
            for sm, way in ways.items():
                if sm != 90 and (REAL or QUICK or not (every or sm == 86)):
                    continue
                fp8 = regular and "fp8" in way
                bound = cpu + 0.01 + 0.12 * fp8
                error = relative_error(logits(shards, ids, tmp / "out.npy", *DEVICE, EMULATED_SM=str(sm)), want)
                check(f"{case.name} {quant} on sm_{sm}", error <= bound, f"error {100 * error:.3f} %, the CPU's {100 * cpu:.3f} %")
                if fp8:
                    check(f"{case.name} {quant} on sm_{sm} has rounded inputs to e4m3", abs(error - cpu) > 0.002)
                said = described(shards, sm)
                expected = f"{'bf16' if quant == 'none' else quant} weights: decode"
                check(f"{case.name} {quant} on sm_{sm} is said", expected in said and
                      (not regular or f"prefill {way}" in said), said)


# Quantized checkpoints whose layers are of several kinds, with columns in an order of their own, with experts: as on the CPU.
def test_imports(tmp):
    for name in ["gptq_act_order"] if QUICK else ["gptq_act_order", "awq", "fp8_block_experts", "gpt_oss", "ct_nvfp4"]:
        case = Path("tests/golden/imports") / name
        ids = json.loads((case / "golden.json").read_text())["token_ids"]
        want = read_npy(case / "logits.npy")
        shards = tmp / name
        run(BUILD / "tpshard", "--tp", 2, case, shards, "--quiet")
        cpu = relative_error(logits(shards, ids, tmp / "cpu.npy"), want)
        error = relative_error(logits(shards, ids, tmp / "out.npy", *DEVICE), want)
        check(f"{name} tp 2", error <= cpu + 0.02, f"error {100 * error:.3f} %, the CPU's {100 * cpu:.3f} %")


# Prompts whose residual is dealt out to two ranks, or that go through the layers in two halves: with an f32 wire the same bits. The emulated products
# of a row do not depend on the rows beside it; those of a device may.
def test_rows_apart(tmp):
    for name, count in (("llama3", 256),) if QUICK else (("llama3", 256), ("deepseek_v3", 40), ("gpt_oss", 40), ("olmo2", 40)):
        shards = tmp / f"apart-{name}"
        ids = [i * 7 % 50 for i in range(count)]
        run(BUILD / "tpshard", "--tp", 2, "--quant", "none", GOLDEN / name, shards, "--quiet")
        plain = logits(shards, ids, tmp / "plain.npy", *DEVICE, "--context", count, "--wire", "f32")
        for how in (["--sequence-parallel"], ["--sequence-parallel", "--overlap"]) if count == 256 else (["--sequence-parallel"],):
            words = [word for option in how for word in (option, "on")]
            apart = logits(shards, ids, tmp / "apart.npy", *DEVICE, "--context", count, "--wire", "f32", *words)
            check(f"{name} tp 2 {' '.join(how)}", relative_error(apart, plain) <= (0.01 if REAL else 0))


# Rotated models, whose activations the device rotates: dense, with experts and a shared one, in blocks of 4 to 128, in every format of inputs.
def test_rotated(tmp):
    for name, words in ([("llama3", ["--quant", "int4"])] if QUICK else
                        [("llama3", ["--quant", "none"]), ("llama3", ["--quant", "int4"]), ("llama3", ["--quant", "fp8"]),
                         ("llama_biases", ["--quant", "int8"]), ("qwen2_moe", ["--quant", "int4"]), ("gpt_oss", ["--quant", "none"])]):
        case = GOLDEN / name
        ids = json.loads((case / "golden.json").read_text())["token_ids"]
        want = read_npy(case / "logits.npy")
        shards = tmp / "rotated"
        run(BUILD / "tpshard", "--tp", 2, "--rot", *words, case, shards, "--quiet", "--force")
        cpu = relative_error(logits(shards, ids, tmp / "cpu.npy"), want)
        error = relative_error(logits(shards, ids, tmp / "out.npy", *DEVICE), want)
        check(f"{name} {words[-1]} rotated", error <= cpu + (0.13 if words[-1] in ("fp8", "int4") else 0.02),
              f"error {100 * error:.3f} %, the CPU's {100 * cpu:.3f} %")


def described(shards, sm):
    rc, _, text = engine("bench", shards, "--prompt-tokens", 2, "--gen-tokens", 2, *DEVICE, EMULATED_SM=str(sm))
    return text if rc == 0 else f"exit {rc}: {text}"


PROMPTS = ["In the beginning", "And the LORD said unto Moses,", "Blessed are"]


def greedy(shards, prompts, tokens, *more, **environment):
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    text = must("generate", shards, *words, "--max-tokens", tokens, "--ignore-eos", "--ids", "--quiet", "--temperature", 0,
                *more, **environment)
    lines = text.strip().split("\n")
    return [line.split("] ")[-1] for line in lines if line]


def ids_of(shards, text):
    return [int(word) for word in must("tokenize", shards, text).strip().split(",")]


# How much likelier the CPU finds its own token than the device's, where the two texts part.
def gap(shards, prompt, want, got, tmp, *more):
    want, got = ([int(word) for word in text.split(",")] for text in (want, got))
    part = next(i for i in range(len(want)) if want[i] != got[i])
    row = logits(shards, ids_of(shards, prompt) + want[:part], tmp / "gap.npy", *more)
    vocab = len(row) // (len(ids_of(shards, prompt)) + part)
    last = row[-vocab:]
    return last[want[part]] - last[got[part]]


# device: words for the device's run alone.
def check_greedy(name, shards, prompt, count, tie, tmp, *more, device=(), **environment):
    want = greedy(shards, [prompt], count, *more)
    got = greedy(shards, [prompt], count, *DEVICE, "--context", 256, *more, *device, **environment)
    near, apart = False, 0
    if want != got and len(got) == 1:
        apart = gap(shards, prompt, want[0], got[0], tmp, *more)
        near = apart <= tie
    check(f"greedy {name} \"{prompt}\"", got == want or near,
          "" if got == want else f"{'a tie' if near else 'apart'} by {apart:.3f}: {got} {want}")


# Greedy tokens are the CPU's, unless two are so close that the rounding of scores decides: a gap of 0.1 in logits of rms 3, and of 0.5
# where prefill has e4m3 inputs: they move a logit by some 3 % of the rms, so the gap of two by 0.13, and four times that is the bound.
def test_greedy(tmp):
    count = 64 if REAL else 2 if QUICK else 8 if FULL else 4
    for quant in ("int8", "int4", "none"):
        for tp in (1,) if QUICK else (1, 2, 4) if FULL or quant == "int4" else (1, 2):
            shards = tmp / f"model-{quant}-{tp}"
            run(BUILD / "tpshard", "--tp", tp, "--quant", quant, MODEL, shards, "--quiet")
            for prompt in PROMPTS if tp == 1 and (FULL and quant != "none" or quant == "int4") else PROMPTS[:1]:
                check_greedy(f"{quant} tp {tp}", shards, prompt, count, 0.5 if REAL and quant == "int4" else 0.1, tmp)
    if not REAL:
        for prompt in PROMPTS if FULL else PROMPTS[1:2]:
            check_greedy("int4 tp 1 on sm_90", tmp / "model-int4-1", prompt, count, 0.5, tmp, EMULATED_SM="90")


# Law 9: alone and in company, recorded steps and new ones, threads and processes.
def test_company(tmp):
    shards = tmp / "model-int4-1"
    count = 6 if FULL else 3
    alone = [greedy(shards, [prompt], count, *DEVICE, "--context", 256)[0] for prompt in PROMPTS]
    together = greedy(shards, PROMPTS, count, *DEVICE, "--context", 256)
    check("greedy tokens equal alone and in a batch", alone == together, f"{alone} {together}")
    penalty = ["--context", 256, "--repetition-penalty", 1.5, "--frequency-penalty", 0.5]
    apart = [greedy(shards, [prompt], count, *DEVICE, *penalty)[0] for prompt in PROMPTS]
    together = greedy(shards, PROMPTS, count, *DEVICE, *penalty)
    check("penalties count each sequence's own tokens", apart == together and apart != alone, f"{apart} {together}")
    threads = greedy(shards, [PROMPTS[0]], count, *DEVICE, "--context", 256, "--ranks", "thread")
    check("greedy tokens equal with ranks as threads", threads == alone[:1], f"{threads}")


def test_sampling(tmp):
    shards = tmp / "model-int8-1"
    how = ["--temperature", 0.8, "--top-p", 0.9, "--top-k", 50, "--seed", 7, "--repetition-penalty", 1.1]
    words = ["generate", shards, "--prompt", PROMPTS[1], "--max-tokens", 6, "--ids", "--quiet", "--context", 256, *how]
    want = must(*words)
    got = must(*words, *DEVICE)
    check("sampled tokens equal the CPU's", got == want, f"{got} {want}")
    check("sampled tokens repeat", got == must(*words, *DEVICE))


def test_kv_cache(tmp):
    case = GOLDEN / "llama_odd"
    golden = json.loads((case / "golden.json").read_text())
    want, ids, shards = read_npy(case / "logits.npy"), golden["token_ids"], tmp / "llama_odd-none"
    fp8 = relative_error(logits(shards, ids, tmp / "cpu.npy", "--kv-cache", "fp8"), want)
    bf16 = relative_error(logits(shards, ids, tmp / "cpu.npy"), want)
    error = relative_error(logits(shards, ids, tmp / "out.npy", *DEVICE, "--kv-cache", "fp8"), want)
    check("fp8 keys and values as good as the CPU's", error <= fp8 + 0.01, f"error {100 * error:.3f} %, {100 * fp8:.3f} %")
    check("fp8 keys and values are really rounded", fp8 > 2 * bf16 and error > 2 * bf16)
    # Caches with scales: of several ranks, and a step that is recorded, of one row and of several.
    run(BUILD / "tpshard", "--tp", 3, "--quant", "none", case, tmp / "llama_odd-3", "--quiet")
    plain = logits(shards, ids, tmp / "out.npy", *DEVICE)
    for cache in ("int8", "int4"):
        words = ("--kv-cache", cache)
        cpu = relative_error(logits(shards, ids, tmp / "cpu.npy", *words), want)
        for tp, directory in ((1, shards), (3, tmp / "llama_odd-3")):
            got = logits(directory, ids, tmp / "out.npy", *DEVICE, *words)
            error = relative_error(got, want)
            check(f"{cache} keys and values tp {tp} as good as the CPU's", error <= cpu + 0.01 and got != plain,
                  f"error {100 * error:.3f} %, {100 * cpu:.3f} %")
        if cache == "int4":
            check("int4 keys and values are really rounded", cpu > 2 * bf16 and error > 2 * bf16)
        model = tmp / "model-int4-1"
        check_greedy(f"{cache} cache", model, PROMPTS[0], 8 if FULL else 4, 0.1, tmp, *words)
        alone = [greedy(model, [prompt], 3, *DEVICE, "--context", 256, *words)[0] for prompt in PROMPTS[:2]]
        together = greedy(model, PROMPTS[:2], 3, *DEVICE, "--context", 256, *words)
        check(f"{cache} cache: greedy tokens equal alone and in a batch", alone == together, f"{alone} {together}")
    latent = tmp / "latent"
    run(BUILD / "tpshard", "--tp", 1, "--quant", "none", GOLDEN / "deepseek_v3", latent, "--quiet")
    for cache in ("int8", "int4"):
        rc, _, problem = engine("logits", latent, "--token-ids", "1,2", "--output", tmp / "out.npy", *DEVICE, "--kv-cache", cache)
        check(f"a latent row has no {cache} cache", rc == 3 and "latent row" in problem and problem.count("\n") == 1, f"exit {rc}: {problem}")


# Started for many sequences, int4 decodes in int8; a silent rank would be ended by its watchdog, so a long run needs signs of life.
def test_many(tmp):
    shards = tmp / "llama3-int4"
    rc, _, text = engine("bench", shards, "--prompt-tokens", 2, "--gen-tokens", 2, "--batch", 32, *DEVICE)
    check("int4 decodes in int8 when started for many", rc == 0 and "int4 weights: decode int8" in text, text)
    rc, _, text = engine("bench", shards, "--prompt-tokens", 2, "--gen-tokens", 100, "--timeout", 5 if REAL else 0.5, *DEVICE)
    check("steps that are run again count as signs of life", rc == 0, text)


def test_devices(tmp):
    shards = tmp / "llama3-int4-2"
    run(BUILD / "tpshard", "--tp", 2, "--quant", "int4", "--group-size", 32, GOLDEN / "llama3", shards, "--quiet")
    for devices, want in (("1", ["device 0"]), ("2", ["device 0", "device 1"])):
        _, _, text = engine("bench", shards, "--prompt-tokens", 2, "--gen-tokens", 2, *DEVICE, EMULATED_DEVICES=devices)
        said = [line.split(": ")[1].split(",")[0] for line in text.splitlines() if line.startswith("rank ")]
        check(f"two ranks on {devices} device(s)", said == want or REAL, text)


def test_refusals(tmp):
    shards = tmp / "model-int4-1"
    words = ["generate", shards, "--prompt", "x", "--max-tokens", 1, *DEVICE]
    if not REAL:
        rc, _, problem = engine(*words, EMULATED_MEMORY="8000000")
        check("too little device memory", rc == 8 and "GiB free" in problem, f"exit {rc}: {problem}")
        rc, _, problem = engine(*words, EMULATED_SM="75")
        check("too old a device", rc == 6 and "7.5" in problem, f"exit {rc}: {problem}")
        rc, _, problem = engine(*words, EMULATED_DEVICES="0")
        check("no device", rc == 6 and "--backend" in problem, f"exit {rc}: {problem}")
    broken = tmp / "broken"
    subprocess.run(["cp", "-r", shards, broken], check=True)
    file = broken / "rank-00-of-01.tpshard"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    rc, _, problem = engine("generate", broken, "--prompt", "x", "--max-tokens", 2, *DEVICE)
    check("a flipped bit is met on the way to the device", rc == 4 and "rank 0" in problem, f"exit {rc}: {problem}")
    rc, _, problem = engine(*words, "--quiet")
    check("quiet is quiet", rc == 0 and problem == "", problem)
    rc, _, problem = engine(*words)
    check("device and arithmetic are said", rc == 0 and "int4 weights: decode f16" in problem, problem)


def main():
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        tests = (test_families, test_imports, test_rotated, test_rows_apart, test_arithmetic, test_greedy, test_company, test_sampling, test_kv_cache,
                 test_many, test_devices, test_refusals)
        for test in tests[:2] if QUICK else tests:
            attempt(test.__name__, lambda: test(tmp))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

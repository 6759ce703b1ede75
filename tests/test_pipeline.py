#!/usr/bin/env python3
"""Models cut into pipeline stages: the same logits and tokens as one stage to the last bit, whatever the cut, the company and the kind of ranks; passes that
overlap; a rank of any stage that ends, ends them all; every command.

No tolerance: what goes from stage to stage is not rounded, and on the CPU a row's bits do not depend on the rows beside it.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from case_help import CLEAN, check, expect, expect_run, free_port, must, run, skip, status, wait_until  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build"))
MODEL, FAMILIES = Path("tests/model"), Path("tests/golden/families")
TPSHARD, TPENGINE = BUILD / "tpshard", BUILD / "tpengine"
QUICK = bool(os.environ.get("TEST_QUICK"))  # slow builds look at less
PROMPTS = ("And the LORD said unto Moses,", "In the beginning", "Now it came to pass in the days when the judges ruled, that there was a famine in the land. " * 12,
           "Blessed are", "The words of the Preacher, the son of David, king in Jerusalem.")
MANY = PROMPTS[:2] * 4 + PROMPTS * 3  # enough for turns of several stages


def shards(work, tp, pp, model=MODEL, words=("--quant", "int4")):
    out = work / f"{model.name}-{tp}-{pp}-{''.join(words)}"
    if not out.exists():
        must(TPSHARD, "--quiet", *words, "--tp", tp, "--pp", pp, model, out)
    return out


def logits(folder, count, *words):
    out = folder.with_suffix(".npy")
    must(TPENGINE, "logits", folder, "--token-ids", ",".join(str(7 * i % 97 + 3) for i in range(count)), "--output", out, "--quiet", *words)
    return out.read_bytes()


def generate(folder, prompts, *words):
    said = must(TPENGINE, "generate", folder, *(word for prompt in prompts for word in ("--prompt", prompt)), "--ids", "--ignore-eos", "--quiet", "--max-tokens", 24,
                *words)
    return [line.split("] ")[-1] for line in said.splitlines() if line.strip()]  # a batch's are numbered


def test_bits(work):
    """Logits of a prefill of several passes, over every wire."""
    for tp, pp in ((1, 3), (2, 2)) if QUICK else ((1, 2), (1, 3), (1, 4), (2, 2), (3, 3)):
        for words in ((), ("--ranks", "thread")) if pp == 3 or QUICK else ((), ("--wire", "s8x"), ("--sequence-parallel", "on", "--wire", "fp8"), ("--overlap", "on"),
                                                                      ("--sequence-parallel", "on", "--overlap", "on")):
            if tp == 1 and words:
                continue
            one, cut = logits(shards(work, tp, 1), 200, *words), logits(shards(work, tp, pp), 200, *words)
            check(f"logits at tp {tp} pp {pp} {' '.join(words)}", one == cut, "they differ from those of one stage")
    # latents, experts both ways, norms behind blocks, tied embeddings, layers with a rope of their own on one stage alone
    for name, words in (("deepseek_v3", ("--experts", "ep")), ("mixtral", ("--experts", "tp")), ("gemma3", ()), ("gpt_oss", ()), ("gemma2", ("--quant", "int8"))):
        model = FAMILIES / name
        one, cut = logits(shards(work, 2, 1, model, words), 40), logits(shards(work, 2, 2, model, words), 40)
        check(f"logits of {name} at tp 2 pp 2", one == cut, "they differ from those of one stage")


def test_tokens(work):
    """Alone and in a batch, greedy and drawn, with penalties, drafts and logprobs' like on the host: the same tokens as one stage."""
    ways = (("--temperature", 0), ("--temperature", 0.9, "--top-p", 0.9, "--seed", 3), ("--temperature", 0, "--repetition-penalty", 1.3), ("--temperature", 0, "--draft-tokens", 4))
    for tp, pp in ((2, 2), (1, 3)):
        for way in ways[:1] if QUICK else ways:
            name = f"tp {tp} pp {pp} {' '.join(map(str, way))}"
            one = generate(shards(work, tp, 1), PROMPTS, *way)
            expect(f"as many answers as prompts, {name}", len(one), len(PROMPTS))
            expect(f"a batch, processes, {name}", generate(shards(work, tp, pp), PROMPTS, *way), one)
            expect(f"many, {name}", generate(shards(work, tp, pp), MANY, *way), generate(shards(work, tp, 1), MANY, *way))
            if way in ways[:2]:
                expect(f"a batch, threads, {name}", generate(shards(work, tp, pp), PROMPTS, "--ranks", "thread", *way), one)
        alone = [generate(shards(work, tp, pp), [prompt], *ways[0])[0] for prompt in PROMPTS[:2 if QUICK else None]]
        batch = generate(shards(work, tp, 1), PROMPTS, *ways[0])
        expect(f"alone, tp {tp} pp {pp}", alone, batch[:len(alone)])


def test_device(work):
    """Stages on the CUDA backend, emulated: the same logits as one stage there."""
    library = BUILD / "tests" / "libtpengine_cuda_emulated.so"
    if not library.exists():
        skip("stages on an emulated device", f"{library} was not built")
        return
    words = ("--backend", "cuda", "--cuda-library", library, "--context", 64)
    for tp, pp in ((2, 2),) if QUICK else ((1, 2), (2, 2)):
        one, cut = logits(shards(work, tp, 1), 12, *words), logits(shards(work, tp, pp), 12, *words)
        check(f"logits on an emulated device at tp {tp} pp {pp}", one == cut, "they differ from those of one stage")


def bench(folder, *words):
    return json.loads(must(TPENGINE, "bench", folder, "--json", "--quiet", *words))


def test_passes(work):
    """Prefill and batched decode keep several passes in flight, and one row alone cannot."""
    words = ("--batch", 16, "--prompt-tokens", 256, "--gen-tokens", 8)
    one = bench(shards(work, 1, 1), *words)
    for pp in (2, 3):
        cut = bench(shards(work, 1, pp), *words)
        print(f"pp {pp}: {cut['passes_in_flight']:.2f} passes in flight, at most {cut['most_in_flight']}; waits for a stage {100 * cut['stage_wait_share']:.0f} % of the time")
        expect(f"tokens of 16 sequences at pp {pp}", cut["tokens_hash"], one["tokens_hash"])
        check(f"passes overlap at pp {pp}", cut["most_in_flight"] >= 2 and cut["passes_in_flight"] > 1, f"{cut}")
        # In decode each stage has other sequences, so that few wait.
        words_of_decode = ("--batch", 24, "--prompt-tokens", 8, "--gen-tokens", 96, "--threads", 1)
        cut = bench(shards(work, 1, pp), *words_of_decode)
        print(f"pp {pp}, decode: {cut['passes_in_flight']:.2f} passes in flight; waits for a stage {100 * cut['stage_wait_share']:.0f} % of the time")
        expect(f"tokens of 24 sequences in turns at pp {pp}", cut["tokens_hash"], bench(shards(work, 1, 1), *words_of_decode)["tokens_hash"])
        check(f"sequences take turns at pp {pp}", cut["most_in_flight"] >= pp, f"{cut}")
    expect("one pass at a time with one stage", (one["most_in_flight"], one["passes_in_flight"], one["stage_wait_share"]), (1, 1, 0))


def children(pid):
    """Rank processes in the order of their start."""
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return []


def test_lost_rank(work):
    """A rank of any stage that is killed in the middle: all end, and the sentence names it."""
    folder = shards(work, 2, 2)
    for rank in (0, 3) if QUICK else (0, 1, 2, 3):
        for _ in range(20):
            parent = subprocess.Popen([TPENGINE, "generate", folder, "--prompt", PROMPTS[0], "--ignore-eos", "--max-tokens", "1000"], env=CLEAN,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            parent.stdout.read(1)  # tokens come
            ranks = children(parent.pid)
            if len(ranks) == 4:
                os.kill(ranks[rank], signal.SIGKILL)
            _, problem = parent.communicate(timeout=60)
            if len(ranks) == 4 and parent.returncode != 0:  # it was not done before
                break
        check(f"rank {rank} is killed", parent.returncode not in (0, -signal.SIGKILL) and f"rank {rank} was ended by signal 9" in problem, f"{parent.returncode}: {problem}")
        check(f"nothing is left of the ranks beside rank {rank}", wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 10))


def test_stopped_rank(work):
    """A stage that stands still is named by its deadline, not the stage that waits for it."""
    folder = shards(work, 1, 3)
    for rank in (1,) if QUICK else (0, 1, 2):
        parent = subprocess.Popen([TPENGINE, "generate", folder, "--prompt", PROMPTS[0], "--ignore-eos", "--max-tokens", "1000", "--timeout", "1"], env=CLEAN,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        parent.stdout.read(200)  # all weights are there: a rank that loads may take its time
        ranks = children(parent.pid)
        os.kill(ranks[rank], signal.SIGSTOP)
        _, problem = parent.communicate(timeout=120)
        check(f"rank {rank} is stopped", parent.returncode != 0 and f"rank {rank} " in problem, f"{parent.returncode}: {problem}")


def test_commands(work):
    one, cut = shards(work, 2, 1), shards(work, 2, 2)
    text = work / "text.txt"
    text.write_text("\n".join((MODEL / "heldout.txt").read_text(encoding="utf-8").splitlines()[:40]))
    figures = [json.loads(must(TPENGINE, "eval", folder, "--text", text, "--json", "--quiet"))["perplexity"] for folder in (one, cut)]
    expect("eval", figures[1], figures[0])
    code, out, problem = run(TPENGINE, "eval", cut, "--text", text, "--against", one, "--layers", "--json", "--quiet")
    layers = json.loads(out)["layers"] if code == 0 else []
    check("eval --layers sees every stage", len(layers) == 5 and all(layer["relative_error"] == 0 for layer in layers), problem or f"{layers}")
    expect_run("capture refuses", 2, "is cut for 4 ranks; capture needs a directory of one", TPENGINE, "capture", cut, "--text", text, "--output", work / "statistics")
    timings = subprocess.run([TPENGINE, "generate", cut, "--prompt", "In", "--max-tokens", "2", "--quiet", "--timings"], env=CLEAN, capture_output=True, text=True).stderr
    check("--timings tells of each stage's ranks", timings.count('"load') >= 4 and len(json.loads(timings)["ranks"]) == 4, timings)
    wrong = work / "wrong"
    must("cp", "-r", cut, wrong)
    (wrong / "stage-01-rank-01-of-02.tpshard").unlink()
    code, _, problem = run(TPENGINE, "generate", wrong, "--prompt", "In", "--max-tokens", 2)
    check("a missing file of a stage is named", code != 0 and "stage-01-rank-01-of-02.tpshard" in problem, problem)


def test_serve(work):
    port = free_port()
    server = subprocess.Popen([TPENGINE, "serve", shards(work, 2, 2), "--port", str(port), "--max-batch", "24"], env=CLEAN, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)

    def get(path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def is_up():
        try:
            return get("/health")
        except OSError:
            return None

    try:
        check("serve comes up", wait_until(is_up, 30, 0.05))
        answer = json.loads(get("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "logprobs": 2}))
        text = must(TPENGINE, "generate", shards(work, 2, 1), "--prompt", PROMPTS[0], "--max-tokens", 12, "--temperature", 0, "--quiet")
        check("serve says what one stage says", text.strip() and answer["choices"][0]["text"].strip() == text.strip(), f"{answer['choices'][0]['text']!r} {text!r}")
        # Requests that come and end at different times, among sequences that take turns.
        wanted = [(prompt, 8 + 3 * i) for i, prompt in enumerate(MANY)]
        def ask(one):
            return json.loads(get("/v1/completions", {"prompt": one[0], "max_tokens": one[1], "temperature": 0}))["choices"][0]["text"]
        alone = [ask(one) for one in wanted]
        with ThreadPoolExecutor(len(wanted)) as pool:
            together = list(pool.map(ask, wanted))
        expect("serve says the same to many at a time", together, alone)
        metrics = get("/metrics")
        check("metrics of every stage's ranks", all(f'rank="{rank}"' in metrics for rank in range(4)) and 'rank="4"' not in metrics, metrics[:2000])
        for rank in children(server.pid)[3:4]:
            os.kill(rank, signal.SIGKILL)
        check("serve goes on after a lost rank of the last stage, or ends with its name",
              wait_until(lambda: server.poll() is not None or (is_up() and len(children(server.pid)) == 4), 30, 0.1))
    finally:
        server.terminate()
        server.communicate(timeout=30)


def main():
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        for test in (test_bits, test_tokens, test_device, test_passes, test_lost_rank, test_stopped_rank, test_commands, test_serve):
            test(work)
    return status()


if __name__ == "__main__":
    sys.exit(main())

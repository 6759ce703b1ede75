#!/usr/bin/env python3
"""scripts/gpu_check with stand-ins for a device, its tools and what it runs: every step is begun, with what it needs, and the report says what came of
each: passed, failed, cut short, not begun. The benchmarks of sums over ranks, which look at what they measure (gpu_exchange, gpu_overlap.py), run in the emulator.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from case_help import CLEAN, check, expect, must, run, skip, status  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build")).resolve()
BENCH_LINE = "gpu_of_its_own rows=1 us=2.5"
PROMPT_TOKENS = 300  # enough to be cut in two

# By name: what is put in the place of a program. All note their names and arguments.
NOTE = 'echo "$(basename "$0") $*" >>"$CALLS"\n'
TOOLS = {
    "nvidia-smi": 'case $1 in --query-gpu=compute_cap) echo 8.6 ;; *) echo "Stand-in, 1.0, 24576 MiB" ;; esac\n',
    "df": "echo; echo 'x 1 1 99999999 1% /'\n",
    "python3": 'case $1 in -c) exit 1 ;; scripts/*) echo "gpu_rival what=x us=1.0" ;; bench/*) echo "gpu_overlap tp=2 gain=0.1" ;; esac\n',
    "compute-sanitizer": 'while [ "${1#--}" != "$1" ]; do case $1 in --tool | --error-exitcode | --report-api-errors) shift ;; esac; shift; done\n'
                         '[ "${TEST_QUICK:-}" = 1 ] || exit 9\nSANITIZED=1 exec "$@"\n',
}
CARRIED = {
    "tests/test_cuda_slab": "echo all well\n",
    "tests/test_cuda_together": "",
    "tests/test_cuda_exchange": "",
    "gpu_exchange": "echo gpu_together tp=2 us=1.0\n",
    "gpu_kernels": f"echo {BENCH_LINE}\n",
    "gpu_nccl": "echo '# gpu_nccl: 1 GPUs here'\n",
    "synthetic_shards": 'mkdir -p "$3" && echo {} >"$3/model.json" && echo "synthetic_shards model=$1 s=1"\n',
    "tpengine": "echo 'bench tok_s=1.0 tp=1'\n",
    "tpshard": "",
    "libtpengine_cuda.so": "",
}


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + NOTE + text)
    path.chmod(0o755)


class Machine:
    """A folder with stand-ins, and what a run of the script with them gives."""

    def __init__(self, tmp, tools=(), carried=()):
        self.tmp = tmp
        shutil.rmtree(tmp, ignore_errors=True)
        for name, text in {**TOOLS, **dict(tools)}.items():
            if text is not None:
                program(tmp / "bin" / name, text)
        for name, text in {**CARRIED, **dict(carried)}.items():
            program(tmp / "build" / "carry" / name, text)
        for name, text in (("commit", "0"), ("archs", "80 86"), ("nvcc", "13.0")):
            (tmp / "build" / "carry" / name).write_text(text + "\n")
        self.calls = []

    def run(self, **more):
        out, calls = self.tmp / "out", self.tmp / "calls"
        calls.write_text("")
        env = {"PATH": f"{self.tmp / 'bin'}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), "OUT": str(out), "MAKE": "/nowhere/make",
               "GPU_CHECK_BUILD": str(self.tmp / "build"), "CALLS": str(calls), "GPU_CHECK_S": "3000", **more}
        done = subprocess.run(["scripts/gpu_check"], env=env, capture_output=True, text=True)
        self.calls = calls.read_text().splitlines()
        self.output = done.stdout + done.stderr
        return done.returncode, json.loads((out / "gpu-check.json").read_text())


def lines_of(report, kind, start):
    return [line for line in report[kind] if line.startswith(start)]


def test_whole(tmp):
    benchmark, carried = BUILD / "tests" / "emulated_gpu_exchange", {}
    if benchmark.exists():  # once: the emulator is slow
        carried["gpu_exchange"] = f'[ -z "${{SANITIZED:-}}" ] || exit 0\nexec "{benchmark}" quick\n'
    machine = Machine(tmp, carried=carried)
    code, report = machine.run()
    expect("a whole run ends well", (code, report["status"], report["reason"]), (0, "passed", ""))
    steps = ("test_cuda_slab", "test_cuda_together", "links", "engine", "transports", "memcheck test_cuda_together", "racecheck test_cuda_together",
             "synccheck test_cuda_together", "racecheck gpu_exchange", "initcheck gpu_exchange", "initcheck gpu_kernels", "memcheck generate")
    for name in steps:
        expect(f"{name} is reported once", [line.split(":")[1].split(" in ")[0] for line in lines_of(report, "tests", f"{name}:")], [" passed"])
    expect("ranks whose kernels wait for each other run without sanitizers", lines_of(report, "tests", "memcheck test_cuda_exchange"), [])
    check("every test is reported", all(": passed in " in line for line in report["tests"]), report["tests"])
    for start in (BENCH_LINE, "gpu_rival", "# gpu_nccl", "bench tok_s", "gpu_overlap tp="):
        check(f"the report has {start}", lines_of(report, "bench", start), report["bench"])
    if carried:
        check("the report has sums over ranks", len(lines_of(report, "bench", "gpu_together tp=")) == 4 and
              len(lines_of(report, "bench", "gpu_coding wire=")) == 3, report["bench"])
    # What would run on a device: the real backend's library, the share of the copy and all replays.
    for call in ("python3 tests/test_cuda_engine.py", "python3 tests/test_cuda_transport.py", "gpu_exchange ", "gpu_exchange quick", "gpu_nccl "):
        check(f"{call.strip()} was called", call in machine.calls, machine.calls)
    script = Path("scripts/gpu_check").read_text()
    for test in ("engine", "transport"):
        check(f"the {test} test gets the device's library", f'CUDA_LIBRARY="$carry/libtpengine_cuda.so" python3 tests/test_cuda_{test}.py' in script)
    makefile = Path("Makefile").read_text().split("DEVICE_TESTS :=")[1].splitlines()[0]
    for test in ("exchange", "together"):
        check(f"test_cuda_{test} is built for devices", test in makefile.replace(")", " ").split(), makefile)


def test_no_device(tmp):
    code, report = Machine(tmp, tools={"nvidia-smi": "exit 9\n"}).run()
    expect("without a device it ends well", (code, report["status"], report["reason"]), (0, "skipped", "no GPU here"))


def test_failures(tmp):
    code, report = Machine(tmp, carried={"tests/test_cuda_slab": "echo wrong bits; exit 1\n"}).run()
    expect("a test that fails", (code, report["status"], report["reason"]), (1, "failed", "test_cuda_slab failed"))
    check("its status is told", lines_of(report, "tests", "test_cuda_slab: FAILED, status 1 in "), report["tests"])
    check("the other steps are begun", lines_of(report, "bench", BENCH_LINE), report["bench"])
    code, report = Machine(tmp, carried={"gpu_exchange": "echo rank 1 has other sums >&2; exit 6\n"}).run()
    expect("a benchmark whose sums are wrong", (code, report["status"], report["reason"]), (1, "failed", "exchange failed"))
    check("what it says is told", lines_of(report, "bench", "# exchange: FAILED, status 6: rank 1 has other sums"), report["bench"])
    code, report = Machine(tmp, tools={"python3": 'case $1 in *transport.py) exit 1 ;; esac\n'}).run()
    expect("ranks that share a device fail", (code, report["reason"]), (1, "transports failed"))
    code, report = Machine(tmp, tools={"compute-sanitizer": "echo found something; exit 9\n"}).run()
    expect("what a sanitizer finds", (code, report["reason"]), (1, "memcheck test_cuda_together failed"))
    code, report = Machine(tmp, tools={"compute-sanitizer": "echo Device not supported\n"}).run()
    expect("no sanitizer", (code, report["status"], report["reason"]),
           (1, "incomplete", "compute-sanitizer was not begun: it does not support the device"))


# What says that it cannot run here has not passed; what leaves out a part of itself has.
def test_skipped(tmp):
    machine = Machine(tmp, tools={"compute-sanitizer": "echo ========= COMPUTE-SANITIZER\n" + TOOLS["compute-sanitizer"]},
                      carried={"tests/test_cuda_slab": '[ -z "${SANITIZED:-}" ] || { echo "SKIP: kernels that wait"; exit 0; }\necho all well\n',
                               "tests/test_cuda_linear": '[ -z "${SANITIZED:-}" ] || echo "SKIP: large ones"\necho the others pass\n'})
    code, report = machine.run()
    expect("a run with tests that are skipped", (code, report["status"], report["reason"]), (0, "passed", ""))
    for line in ("test_cuda_slab: passed in ", "memcheck test_cuda_slab: skipped (kernels that wait) in ", "synccheck test_cuda_slab: skipped (kernels that wait) in ",
                 "racecheck test_cuda_linear: passed in ", "memcheck generate: passed in "):
        check(f"the report has {line}", len(lines_of(report, "tests", line)) == 1, report["tests"])


def test_time(tmp):
    machine = Machine(tmp, carried={"gpu_exchange": "sleep 60\n"})
    code, report = machine.run(GPU_CHECK_S="6")
    expect("out of time", (code, report["status"]), (1, "incomplete"))
    check("what was cut short is named", "exchange was cut short" in report["reason"], report["reason"])
    check("it ends in time", report["seconds"] < 20, report["seconds"])
    check("what was not begun is named", lines_of(report, "bench", "# kernels: not begun"), report["bench"])


# What a prompt gains from halves: a line where the devices add up, a failure where they do not.
def test_overlap(tmp):
    library = BUILD / "tests" / "libtpengine_cuda_emulated.so"
    if not library.exists():
        skip("gpu_overlap.py", "the emulated backend is not built")
        return
    must(BUILD / "tpshard", "--tp", 2, "--quant", "none", "tests/model", tmp / "small", "--quiet")
    words = ("bench/gpu/gpu_overlap.py", "--engine", BUILD / "tpengine", "--cuda-library", library, "--prompt-tokens", PROMPT_TOKENS, "--rounds", 1, "--transports", "host",
             "--wires", "s8x", tmp / "small")
    code, out, problem = run(sys.executable, *words, env={**CLEAN, "EMULATED_DEVICES": "2"})
    check("a prompt in halves is measured", code == 0 and out.startswith(f"gpu_overlap model=small quant=bf16 transport=host wire=s8x tp=2 devices=2 prompt_tokens={PROMPT_TOKENS} off_tok_s=") and
          " gain=" in out and "gpu=unknown" not in out, f"{code} {out}{problem}")
    code, out, problem = run(sys.executable, *words, env={**CLEAN, "EMULATED_LOCKED": "1000000"})
    check("where the devices cannot add up that is said", code == 1 and out.startswith("# gpu_overlap: host: ") and "pinning" in out, f"{code} {out}{problem}")
    words = [{"host": "p2p"}.get(word, word) for word in words]
    code, out, problem = run(sys.executable, *words, env={**CLEAN, "EMULATED_DEVICES": "2", "EMULATED_PEERS": "0>1:mirror"})
    check("p2p that is refused is said, and no failure", code == 0 and out.startswith("# gpu_overlap: p2p: ") and "--transport p2p: what device 0 writes" in out, f"{code} {out}{problem}")
    code, out, problem = run(sys.executable, *words[:-1], tmp / "none", env={**CLEAN, "EMULATED_DEVICES": "2"})
    check("another failure over p2p is one", code == 1 and out.startswith("# gpu_overlap: p2p: "), f"{code} {out}{problem}")


def main():
    with tempfile.TemporaryDirectory() as name:
        for test in (test_whole, test_no_device, test_failures, test_skipped, test_time):
            test(Path(name) / "machine")
        test_overlap(Path(name))
    return status()


if __name__ == "__main__":
    sys.exit(main())

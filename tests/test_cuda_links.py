#!/usr/bin/env python3
"""What ranks make of the links between their devices at their start: auto takes p2p where every link was seen to work, and otherwise host, and says why;
who asks for p2p hears the same. The tokens are the same either way. On emulated devices with each fault that a link can have; CUDA_LIBRARY names
another library to test: the real one, on devices as they are, with the doctor's word on their links.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from case_help import check, skip, status

BUILD = Path(os.environ.get("BUILD", "build"))
REAL = os.environ.get("CUDA_LIBRARY")
LIBRARY = Path(REAL or BUILD / "tests" / "libtpengine_cuda_emulated.so")
WRITES = "what device 1 writes does not arrive in the memory of device 0 (4 of 4 bytes by a kernel)"
# fault of what device 1 does with device 0's memory, ranks, whether p2p is asked for too, the sentence
FAULTS = (("mirror", "process", True, WRITES),
          ("drop", "thread", False, WRITES),
          ("stale", "process", False, "device 1 does not see what is in the memory of device 0"),
          ("corrupt", "process", False, "what device 1 writes arrives changed in the memory of device 0 (1 of 4096 bytes by a kernel; byte "),
          ("late", "process", False, "a kernel that runs on device 0 sees the word that device 1 posts behind a copy before the copy has arrived ("),
          ("hang", "thread", False, "a write of 4 bytes by a kernel from device 1 to device 0 did not end within 5."),
          ("refuse", "process", True, "the driver does not let device 1 reach the memory of device 0"))


def engine(*words, **environment):
    done = subprocess.run([str(w) for w in (BUILD / "tpengine", *words)], capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def generate(model, *more, **environment):
    return engine("generate", model, "--prompt", "And the", "--max-tokens", 4, "--seed", 1, "--context", 64, "--backend", "cuda", "--cuda-library", LIBRARY,
                  *more, **environment)


def test_faults(model):
    rc, plain, told = generate(model, EMULATED_DEVICES="2")
    check("auto takes p2p", rc == 0 and "wire over p2p" in told and told.count("sums of ranks over p2p") == 2 and "not over" not in told, f"{rc} {told[-500:]}")
    rc, text, told = generate(model)
    check("auto takes p2p between ranks of one device", rc == 0 and text == plain and "wire over p2p" in told, f"{rc} {told[-500:]}")
    rc, text, told = generate(model, EMULATED_PEERS="mirror")
    check("or host, if that device's memory cannot be shared", rc == 0 and text == plain and "not over p2p: what device 0 writes" in told, f"{rc} {told[-500:]}")
    for fault, ranks, asked, sentence in FAULTS:
        env = {"EMULATED_DEVICES": "2", "EMULATED_PEERS": f"1>0:{fault}"}
        rc, text, told = generate(model, "--ranks", ranks, **env)
        check(f"{fault}: auto takes host and says why", rc == 0 and text == plain and "wire over host" in told and told.count("not over p2p: " + sentence) == 1,
              f"{rc} {text} {told[-500:]}")
        if asked:
            rc, _, told = generate(model, "--ranks", ranks, "--transport", "p2p", **env)
            check(f"{fault}: p2p is refused", rc == 6 and f"--transport p2p: {sentence}" in told and "--transport host does without" in told, f"{rc} {told[-500:]}")


# A link that delivers, but slowly, is left to who asks for it.
def test_slow(model):
    env = {"EMULATED_DEVICES": "2", "EMULATED_PEERS": "slow"}
    rc, text, told = generate(model, **env)
    check("slow: auto takes host and says why", rc == 0 and "wire over host" in told and told.count("not over p2p: device ") == 1
          and "would go over the host's memory" in told, f"{rc} {text} {told[-500:]}")
    rc, asked, told = generate(model, "--transport", "p2p", **env)
    check("slow: p2p is had by who asks for it, and is told", rc == 0 and asked == text and "wire over p2p" in told and told.count("slow over p2p: device ") == 1,
          f"{rc} {asked} {told[-500:]}")


# Two models at once in threads of one process: the driver lives in it when the second one's ranks start, and no probe can begin any more. What was seen for the
# first holds for as many ranks.
def test_second_model(model, other):
    def compare(reference, *more):
        return engine("eval", model, "--against", reference, "--text", "README.md", "--max-tokens", 12, "--context", 64, "--ranks", "thread", "--backend", "cuda",
                      "--cuda-library", LIBRARY, *more, EMULATED_DEVICES="2")
    rc, _, told = compare(model, "--transport", "p2p")
    check("a second model takes the first one's verdict", rc == 0, f"{rc} {told[-500:]}")
    rc, _, told = compare(other, "--transport", "p2p")
    check("which does not hold for more ranks", rc == 1 and "of 4 ranks were not tried before ranks began as threads" in told, f"{rc} {told[-500:]}")
    rc, _, told = compare(other)
    check("where auto does without", rc == 0, f"{rc} {told[-500:]}")


# A link that is not as its driver claims is a finding about the machine, which fails nothing here: ranks that take it nevertheless would.
def test_device(model):
    rc, out, problem = engine("doctor", "--json", "--no-times", "--cuda-library", LIBRARY)
    report = json.loads(out) if out else {"links": [], "transports": {"p2p": problem}}
    check("the doctor tries the links", rc in (0, 9) and len(report["links"]) >= 2 and all(link["seen"] != "untried" for link in report["links"]), f"{rc} {out}{problem}")
    for link in report["links"]:
        print(f"# device {link['from']} to {link['to']}: claimed {link['claimed']}, {link['seen']}, {link['kernel_gb_s']:.1f} GB/s by a kernel, "
              f"{link['copy_gb_s']:.1f} by a copy, {link['us']:.1f} us{'; ' + link['problem'] if link['problem'] else ''}")
    # Processes of one device share it by turns: a driver may refuse that, but what it does must be right.
    wanted = "p2p" if report["transports"]["p2p"] is True else "host"
    texts = {}
    for transport in "auto", "host":
        rc, texts[transport], told = generate(model, "--transport", transport)
        took = wanted if transport == "auto" else "host"
        check(f"--transport {transport} takes {took}", rc == 0 and f"wire over {took}" in told, f"{rc} {told[-500:]}")
    check("the same text over both", texts["auto"] == texts["host"] != "", f"{texts}")


def main():
    if not LIBRARY.exists():
        skip("links between devices", "the emulated backend is not built here")
        sys.exit(status())
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        subprocess.run([BUILD / "tpshard", "--tp", "2", "--quant", "int4", "tests/model", model, "--quiet"], check=True)
        if REAL:
            test_device(model)
        else:
            other = Path(name) / "other"
            subprocess.run([BUILD / "tpshard", "--tp", "4", "--quant", "int4", "tests/model", other, "--quiet"], check=True)
            test_faults(model)
            test_slow(model)
            test_second_model(model, other)
    sys.exit(status())


main()

#!/usr/bin/env python3
"""tpengine doctor on emulated devices whose links are good, mirrored, hanging or refused: P2P as the driver claims it and as it was seen, rates and latencies,
which transport ranks would take, and the one thing that hinders."""
import json
import os
import sys
import time
from pathlib import Path

from case_help import CLEAN, check, run, skip, status

BUILD = Path(os.environ.get("BUILD", "build"))
ENGINE, EMULATED = BUILD / "tpengine", BUILD / "tests/libtpengine_cuda_emulated.so"
HINDERED = 9

# name, devices, faults, exit status, transport, what is seen where it is not good, words of the text (none: JSON alone)
CASES = (("links that are good", 3, "", 0, "p2p", {}, ()),
         ("a mirrored link", 3, "1>2:mirror", HINDERED, "host", {(1, 2): "lost"},
          ("yes/LOST", "yes/good", "device 1 to device 2: what device 1 writes does not arrive in the memory of device 2", "though the driver claims P2P", "auto    host",
           "p2p   between GPUs of one host that reach each other; not here: what device 1 writes")),
         ("a slow link", 2, "0>1:slow", HINDERED, "host", {(0, 1): "slow"},
          ("yes/slow", "GB/s to device 1 by a copy engine, and", "would go over the host's memory: ranks go through the host's memory instead")),
         ("a link that hangs", 2, "0>1:hang", HINDERED, "host", {(0, 1): "late"}, ()),
         ("links that the driver refuses", 2, "refuse", 0, "host", {(0, 1): "refused", (1, 0): "refused"},
          ("no/no", "note    the driver does not let device 0 reach the memory of device 1")),
         ("a device and itself", 1, "", 0, "p2p", {}, ()))


def faults_of(report, count, exit_code, transport, faults):
    seen = {(link["from"], link["to"]): link for link in report["links"]}
    if report["transport"] != transport:
        yield f"transport {report['transport']}"
    if (report["transports"]["p2p"] is True) != (transport == "p2p"):
        yield f"p2p: {report['transports']['p2p']}"
    if len(report["links"]) != max(2, count * (count - 1)):
        yield f"{len(report['links'])} links"
    if (report["change"] is not None) != (exit_code == HINDERED):
        yield f"change: {report['change']}"
    for pair, link in seen.items():
        if link["seen"] != faults.get(pair, "good"):
            yield f"{pair}: {link['seen']} ({link['problem']})"
        if link["seen"] == "good" and not (link["kernel_gb_s"] > 0 and link["copy_gb_s"] > 0 and link["problem"] is None):
            yield f"{pair}: {link}"
        if link["claimed"] == (link["seen"] == "refused"):
            yield f"{pair}: claimed {link['claimed']}"


def main():
    if not EMULATED.exists():
        skip("links between emulated devices", "the emulated backend is not built")
        sys.exit(status())
    words = ("doctor", "--no-times", "--cuda-library", EMULATED, "--deadline", "15")
    for name, count, peers, exit_code, transport, faults, text in CASES:
        env = {**CLEAN, "EMULATED_DEVICES": str(count), "EMULATED_PEERS": peers}
        begin = time.monotonic()
        code, out, problem = run(ENGINE, *words, "--json", env=env)
        wrong = list(faults_of(json.loads(out), count, exit_code, transport, faults)) if out else ["no report"]
        check(f"JSON: {name}", code == exit_code and not wrong and time.monotonic() - begin < 100, f"exit status {code}, {wrong}: {out}{problem}")
        if text:
            code, out, problem = run(ENGINE, *words, env=env)
            check(name, code == exit_code and all(word in out for word in text), f"exit status {code}: {out}{problem}")
    sys.exit(status())


main()

#!/usr/bin/env python3
"""tpengine doctor on machines that are not there: trees of /sys, /proc and /dev with cards in bad slots, two sockets, ACS, a small /dev/shm, no driver and
files that hang; the sentence that each deserves, and the exit status. And what it measures on this machine."""
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from case_help import CLEAN, check, expect, run, skip, status

ENGINE = Path(os.environ.get("BUILD", "build")) / "tpengine"
HINDERED = 9
work = Path(tempfile.mkdtemp(prefix="test_doctor_"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)


class Machine:
    """A tree; cards and what else is there are added by its methods."""

    count = 0

    def __init__(self, driver="550.54.14", files=True, shm="size=8388608k", cmdline="BOOT_IMAGE=/vmlinuz quiet", memlock="unlimited", allowed="0-15",
                 nodes=("0-15",)):
        Machine.count += 1
        self.root = work / str(Machine.count)
        write(self.root / "proc/self/mounts", f"proc /proc proc rw 0 0\nshm /dev/shm tmpfs rw,nosuid,{shm},inode64 0 0\n")
        write(self.root / "proc/self/limits", f"Limit                     Soft Limit           Hard Limit           Units     \n"
                                              f"Max locked memory         {memlock:<20} {memlock:<20} bytes     \n")
        write(self.root / "proc/self/status", f"Name:\ttpengine\nCpus_allowed:\tffff\nCpus_allowed_list:\t{allowed}\n")
        write(self.root / "proc/meminfo", "MemTotal:       65536000 kB\nMemFree:  1 kB\n")
        write(self.root / "proc/cmdline", cmdline + "\n")
        (self.root / "sys/bus/pci/devices").mkdir(parents=True)
        for number, cpus in enumerate(nodes):
            write(self.root / f"sys/devices/system/node/node{number}/cpulist", cpus + "\n")
        if driver:
            write(self.root / "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Thu Feb 22 01:44:30 UTC 2024\nGCC version: 12\n")
        if files:
            write(self.root / "dev/nvidiactl", "")

    def device(self, folder, link, most):
        for which, (speed, width) in (("current", link), ("max", most)):
            write(folder / f"{which}_link_speed", f"{speed} GT/s PCIe\n")
            write(folder / f"{which}_link_width", f"{width}\n")

    def card(self, bus, above=("0000:00:01.0",), host="pci0000:00", now=("2.5", 16), most=("16.0", 16), slot=("16.0", 16), node=0, cpus="0-15", vendor="0x10de",
             kind="0x030000", name="NVIDIA GeForce RTX 3090", config=None):
        folder = self.root / "sys/devices" / host
        for bridge in above:
            folder = folder / bridge
            self.device(folder, slot, slot)
            if config:
                write(folder / "config", config)
        folder = folder / bus
        self.device(folder, now, most)
        for file, text in (("vendor", vendor), ("class", kind), ("numa_node", str(node)), ("local_cpulist", cpus)):
            write(folder / file, text + "\n")
        (self.root / "sys/bus/pci/devices" / bus).symlink_to(os.path.relpath(folder, self.root / "sys/bus/pci/devices"))
        write(self.root / f"proc/driver/nvidia/gpus/{bus}/information", f"Model: \t\t {name}\nIRQ:   \t\t 97\n")
        return self

    def groups(self, count):
        for number in range(count):
            (self.root / f"sys/kernel/iommu_groups/{number}").mkdir(parents=True)
        return self

    def file(self, path, text):
        write(self.root / path, text)
        return self

    def hangs(self, path):
        (self.root / path).unlink(missing_ok=True)
        os.mkfifo(self.root / path)
        return self


def two_cards(**options):
    return Machine(**options).card("0000:01:00.0", above=("0000:00:01.0",)).card("0000:02:00.0", above=("0000:00:02.0",))


def acs_config(control):
    """A bridge's configuration: two extended capabilities, the second one ACS."""
    config = bytearray(4096)
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x148 << 20).to_bytes(4, "little")
    config[0x148:0x14c] = (0x000d | 1 << 16).to_bytes(4, "little")
    config[0x14e:0x150] = control.to_bytes(2, "little")
    return bytes(config)


def doctor(machine, *words):
    return run(ENGINE, "doctor", "--root", machine.root, "--no-times", *words, env=CLEAN)


# name, machine, exit status, words that stand in the report, words that do not
CASES = [
    ("no GPU", Machine(driver=None, files=False), 0, ["no GPU", "nothing hinders", "auto    shm", "processors 0-15", "62.5 GiB", "p2p   between GPUs of one host that reach each other; not here: there is no GPU"], ["driver", "GPU0"]),
    ("another maker's card", Machine(driver=None, files=False).card("0000:03:00.0", vendor="0x1002"), 0, ["no GPU"], ["GPU0"]),
    ("a sound card of NVIDIA's", Machine(driver=None, files=False).card("0000:03:00.1", kind="0x040300"), 0, ["no GPU"], ["GPU0"]),
    ("two cards in good slots", two_cards(), 0,
     ["driver  550.54.14", "GPU0  0000:01:00.0  NVIDIA GeForce RTX 3090  now 1.0 x16, card 4.0 x16, slot 4.0 x16", "nothing hinders"], ["also", "note"]),
    ("a slot of four lanes", two_cards().card("0000:05:00.0", above=("0000:00:1c.0",), now=("2.5", 4), slot=("8.0", 4)), HINDERED,
     ["change  GPU2 (NVIDIA GeForce RTX 3090, 0000:05:00.0) is in a slot with 4 lanes and could use 16: move it to a wider slot; its exchanges take 4 times",
      "note    GPU2 (NVIDIA GeForce RTX 3090, 0000:05:00.0) can do PCIe 4.0, its slot 3.0"], ["GPU1 (NVIDIA"]),
    ("a slot of one lane", Machine().card("0000:05:00.0", now=("2.5", 1), slot=("16.0", 1)), HINDERED, ["slot with 1 lane and", "16 times"], []),
    ("a bad riser", Machine().card("0000:01:00.0", now=("2.5", 4)), HINDERED, ["runs on 4 lanes of 16, which the slot has: look at the riser"], ["wider slot"]),
    ("eight lanes each", Machine().card("0000:01:00.0", now=("2.5", 8)), 0, ["note    GPU0", "runs on 8 lanes of 16", "nothing hinders"], []),
    ("two sockets", Machine(allowed="0-31", nodes=("0-15", "16-31")).card("0000:01:00.0").card("0000:81:00.0", host="pci0000:80", above=("0000:80:01.0",), node=1, cpus="16-31"),
     0, ["GPU0  X      SYS    0-15             0", "GPU1  SYS    X      16-31            1", "SYS: between NUMA nodes", "note    GPU0 is on NUMA node 0 and GPU1 on node 1",
         "NUMA nodes 0 (0-15), 1 (16-31)"], ["PHB"]),
    ("processors of the other socket", Machine(allowed="0-15", nodes=("0-15", "16-31")).card("0000:81:00.0", node=1, cpus="16-31"), HINDERED,
     ["change  GPU0 is on NUMA node 1 (processors 16-31), and this process may use processors 0-15 alone"], []),
    ("a node that is not allowed, without a card", Machine(driver=None, allowed="0-15", nodes=("0-15", "16-31")), 0, ["note    NUMA node 1 (processors 16-31) is not this process's"],
     ["NUMA node 0 (processors"]),
    ("a container's /dev/shm", two_cards(shm="size=65536k"), HINDERED, ["change  /dev/shm has 64 MB", "--shm-size=1g"], []),
    ("the same without a GPU", Machine(driver=None, shm="size=65536k"), 0, ["note    /dev/shm has 64 MB", "nothing hinders"], []),
    ("little locked memory", two_cards(memlock="8388608"), 0, ["note    a process may lock 8.0 MB", "ulimit -l"], []),
    ("no driver", two_cards(driver=None, files=False), HINDERED, ["change  2 NVIDIA cards, and no driver is loaded", "driver  none"], []),
    ("a container without cards", two_cards(files=False), HINDERED, ["/dev/nvidiactl is not here: start the container with --gpus all"], []),
    ("the open driver", Machine().file("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n").card("0000:01:00.0"),
     0, ["driver  570.86.10"], []),
    ("ACS that redirects", Machine().card("0000:01:00.0", config=acs_config(0x1d)).card("0000:02:00.0", above=("0000:00:02.0",)), 0, ["note    ACS sends what one card writes"], []),
    ("ACS that does not", Machine().card("0000:01:00.0", config=acs_config(0x01)).card("0000:02:00.0", above=("0000:00:02.0",)), 0, [], ["ACS"]),
    ("a configuration shown in part", Machine().card("0000:01:00.0", config=acs_config(0x1d)[:256]).card("0000:02:00.0", above=("0000:00:02.0",)), 0, [], ["ACS"]),
    ("capabilities in a circle", Machine().card("0000:01:00.0", config=bytes(256) + b"\x01\x00\x01\x10" * 960), 0, [], ["ACS"]),
    ("an IOMMU", two_cards(cmdline="quiet intel_iommu=on").groups(7), 0, ["IOMMU on (7 groups) [intel_iommu=on]", "note    the IOMMU translates", "iommu=pt"], []),
    ("an IOMMU that passes through", two_cards(cmdline="intel_iommu=on iommu=pt").groups(7), 0, ["IOMMU on (7 groups)"], ["translates"]),
    ("a switch", Machine().card("0000:03:00.0", above=("0000:00:01.0", "0000:01:00.0", "0000:02:00.0")).card("0000:04:00.0", above=("0000:00:01.0", "0000:01:00.0", "0000:02:01.0"))
     .card("0000:08:00.0", above=("0000:00:01.0", "0000:01:00.0", "0000:02:02.0", "0000:06:00.0", "0000:07:00.0")).card("0000:09:00.0", above=("0000:00:02.0",))
     .card("0000:41:00.0", host="pci0000:40", above=("0000:40:01.0",)), 0,
     ["GPU0  X      PIX    PXB    PHB    NODE", "GPU3  PHB    PHB    PHB    X      NODE", "PXB: through several PCIe switches"], ["SYS"]),
    ("files that say nothing", two_cards().file("sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/current_link_width", "\n")
     .file("sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/max_link_speed", "Unknown\n").file("sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/numa_node", "-1\n"), 0,
     ["now ?, card ?, slot 4.0 x16", "nothing hinders"], []),
]

for name, machine, code, there, absent in CASES:
    got, out, problem = doctor(machine)
    wrong = [f"exit status {got}, wanted {code}"] * (got != code) + [f"lacks {words!r}" for words in there if words not in out]
    wrong += [f"has {words!r}" for words in absent if words in out]
    if code == HINDERED:
        change = out.split("change  ")[-1].split("\n")[0]
        wrong += ["standard error does not say it"] * (change not in problem)
    check(name, not wrong, f"{wrong}: {out}{problem}")

# More cards than there is room for.
many = Machine()
for number in range(18):
    many.card(f"0000:{number + 16:02x}:00.0", above=(f"0000:00:{number:02x}.0",))
code, out, problem = doctor(many)
check("more cards than fit", code == 0 and "GPU15" in out and "and 2 more" in out, out + problem)

# A driver whose file never answers: what came before is there, and the line says where it hung.
begin = time.monotonic()
code, out, problem = doctor(two_cards().hangs("proc/driver/nvidia/version"), "--deadline", "0.5")
check("a driver that hangs", code == HINDERED and "reading what the system says of itself was ended after 0." in out and "at /proc/driver/nvidia/version" in out and "GPU1" in out,
      out + problem)
check("it ends in time", time.monotonic() - begin < 30, f"{time.monotonic() - begin:.1f} s")
code, out, problem = doctor(two_cards().hangs("sys/devices/pci0000:00/0000:00:02.0/0000:02:00.0/class"), "--deadline", "0.5")
check("a card that hangs", code == HINDERED and "/sys/bus/pci/devices/0000:02:00.0/class" in out, out + problem)

# JSON holds the same.
code, out, problem = doctor(two_cards(shm="size=65536k"), "--json")
report = json.loads(out)
expect("JSON: exit status", code, HINDERED)
expect("JSON: cards", [(card["bus"], card["way"], card["slot_link"]) for card in report["cards"]],
       [("0000:01:00.0", ["X", "PHB"], {"gt_s": 16.0, "width": 16}), ("0000:02:00.0", ["PHB", "X"], {"gt_s": 16.0, "width": 16})])
check("JSON: the change", report["change"].startswith("/dev/shm has 64 MB") and report["findings"][0] == {"hinders": True, "text": report["change"]}, out)
code, out, problem = doctor(Machine(driver=None), "--json")
check("JSON: transports", json.loads(out)["transports"]["shm"] is True and json.loads(out)["transports"]["p2p"] == "there is no GPU", out)
check("JSON: nothing to change", code == 0 and json.loads(out)["change"] is None and json.loads(out)["transport"] == "shm", out + problem)

# What is not there is refused, before anything is read.
for name, words, code, there in (("a folder that is not there", ("--root", work / "none"), 5, "none: No such file or directory"),
                                 ("a folder of other things", ("--root", "tests/model"), 2, "--root tests/model: there is neither sys nor proc in it"),
                                 ("an argument", ("model",), 2, 'doctor takes no arguments, and found "model"')):
    got, out, problem = run(ENGINE, "doctor", "--no-times", *words, env=CLEAN)
    check(f"{name} is refused", got == code and there in problem and not out, f"exit status {got}: {out}{problem}")
code, out, problem = run(ENGINE, "doctor", "--root", two_cards().root, env=CLEAN)
check("nothing is measured for another machine", code == 0 and "times  " not in out and "doctor says on the machine itself" in out
      and "p2p   between GPUs of one host that reach each other; not here: devices are tried on the machine itself" in out, out + problem)

# This machine, really measured.
code, out, problem = run(ENGINE, "doctor", "--json", "--deadline", "100", env=CLEAN)
times = json.loads(out)["times"]
for transport, ranks in ("shm", 2), ("shm", 4), ("tcp", 2), ("tcp", 4):
    mine = [t for t in times if t["transport"] == transport and t["ranks"] == ranks]
    check(f"{transport} of {ranks} ranks is measured", len(mine) == 5 and all(t["us"] > 0 for t in mine) and {t["wire"] for t in mine} == {"bf16", "s8x"}, out + problem)
mpi = json.loads(out)["transports"]["mpi"]
if mpi is True:
    mine = [t for t in times if t["transport"] == "mpi"]
    check("mpi of 2 ranks is measured", len(mine) == 5 and all(t["us"] > 0 and t["ranks"] == 2 for t in mine), out + problem)
    code, out, problem = run("mpirun", "--oversubscribe", "--bind-to", "none", "-n", 3, ENGINE, "doctor", "--mpi",
                             env={**CLEAN, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    check("and of 3 that mpirun starts", code == 0 and re.search(r"^times .*\n +transport .*\n +mpi +3( +[0-9.]+){5}\n$", out), out + problem)
    code, out, problem = run(ENGINE, "doctor", "--mpi", env=CLEAN)
    check("one rank has nobody to add up with", code == 2 and "MPI has started 1: mpirun -n 2 tpengine doctor --mpi" in problem, out + problem)
else:
    skip("sums over mpi", mpi)
# A mpirun that fails is no hindrance, and its words are told.
MPIRUNS = (("warns before a rank says the cause", "echo 'mpirun: a warning' >&2; echo 'tpengine: no library' >&2; echo 'mpirun: a rank ended' >&2; exit 5",
            "it ended with status 5: tpengine: no library"),
           ("is ended by a signal", "kill -9 $$", "it was ended by signal 9 and said nothing"),
           ("reports too little", """echo '{"times": [{"us": 1.5}]}'; echo ------ >&2; echo 'no slots here' >&2""", "its report has not the times of 5 sizes: no slots here"))
for name, text, words in MPIRUNS if mpi is True else ():
    write(work / "bin/mpirun", f"#!/bin/sh\n{text}\n")
    os.chmod(work / "bin/mpirun", 0o755)
    code, out, problem = run(ENGINE, "doctor", "--deadline", "100", env={**CLEAN, "PATH": f"{work / 'bin'}:{os.environ['PATH']}"})
    check(f"a mpirun that {name}", code == 0 and f"note    measuring mpi with 2 ranks ended, at mpirun -n 2 tpengine doctor --mpi: {words}\n" in out, out + problem)
code, out, problem = run(ENGINE, "doctor", "--deadline", "0.1", env=CLEAN)
check("measuring too short a time ends", code in (0, HINDERED), f"exit status {code}: {out}{problem}")
code, out, problem = run(ENGINE, "--help-man", env=CLEAN)
check("the man page has it", "doctor" in out and "something hinders" in out, out[:500])

# A card's copies, on the emulated one.
EMULATED = Path(os.environ.get("BUILD", "build")) / "tests/libtpengine_cuda_emulated.so"
if EMULATED.exists():
    code, out, problem = run(ENGINE, "doctor", "--json", "--cuda-library", EMULATED, "--deadline", "3", env={**CLEAN, "EMULATED_PEERS": "slow"})
    report = json.loads(out)
    copies = report["copies"]
    check("copies of an emulated card", len(copies) >= 1 and all(copies[0][key] > 0 for key in ("to_gb_s", "from_gb_s", "small_us")), out + problem)
    # Large sums take the emulator longer than that; slow builds, the small ones, too; and a busy machine the probe that p2p needs. What is slow is measured.
    for transport in () if os.environ.get("TEST_QUICK") else ("host", "p2p"):
        name = f"sums of two ranks on one card over {transport} are measured"
        mine = [t for t in report["times"] if t["transport"] == transport]
        why = str(report["transports"][transport])
        if transport == "p2p" and re.search(r"within [0-9.]+ s|no time left|not done after", why):
            skip(name, why)
            continue
        check(name, len(mine) >= 1 and mine[0]["bf16_bytes"] == 16384 and all(t["ranks"] == 2 and t["devices"] == 1 and t["us"] > 0 for t in mine), out + problem)
    if not os.environ.get("TEST_QUICK"):  # p2p is left out: it would measure all that time
        code, out, problem = run(ENGINE, "doctor", "--cuda-library", EMULATED, "--deadline", "10", env={**CLEAN, "EMULATED_LOCKED": "1000000", "EMULATED_PEERS": "mirror"})
        check("sums that cannot be had are said", "host           2" in out and re.search(r"device [01]: pinning [0-9.]+ MiB of shared memory", out), out + problem)
else:
    skip("copies of an emulated card", "the emulated backend is not built")
code, out, problem = run(ENGINE, "doctor", "--no-times", "--cuda-library", work / "none.so", env=CLEAN)
check("a backend that does not load", code == HINDERED and "none.so" in problem, f"exit status {code}: {out}{problem}")

# What the doctor says of auto is what the ranks take; what they cannot have is refused with the reason.
SHARD = Path(os.environ.get("BUILD", "build")) / "tpshard"
model = work / "model"
code, out, problem = run(SHARD, "--tp", 2, "tests/model", model, env=CLEAN)
check("a model for two ranks", code == 0, problem)
for transport, wanted, words in ("auto", 0, "bf16 wire over shm"), ("shm", 0, "bf16 wire over shm"), ("tcp", 2, "--transport tcp: it is for ranks of several hosts"), \
        ("nccl", 2, "--transport nccl: it is for GPUs, and these ranks compute on the CPU"), ("ib", 2, "--transport"):
    code, out, problem = run(ENGINE, "generate", model, "--backend", "cpu", "--transport", transport, "--prompt", "And", "--max-tokens", 3, env=CLEAN)
    check(f"--transport {transport}", code == wanted and words in problem, f"exit status {code}: {out}{problem}")

# More threads than processors run, and are told; only then.
cpus = len(os.sched_getaffinity(0))
for threads, said in (cpus + 1, f"2 ranks of {cpus + 1} threads have {cpus} processor"), (1, None):
    code, out, problem = run(ENGINE, "generate", model, "--backend", "cpu", "--threads", threads, "--prompt", "And", "--max-tokens", 3, env=CLEAN)
    check(f"--threads {threads}", code == 0 and (f"{said}" in problem and "so threads wait for each other: --threads" in problem if said else "threads wait" not in problem), problem)

shutil.rmtree(work)
sys.exit(status())

#!/usr/bin/env python3
"""Ranks on two hosts that this test makes itself, as network namespaces with a cable between them: all collectives and messages
over sockets and over MPI are those of shared memory, and a cable that is cut ends every rank in time, each with a sentence that
names a rank of the other side. SKIP without the right to make namespaces; for MPI, without mpirun or the library."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from two_hosts_help import ADDRESSES, HOSTS, cut, join, make_hosts, on_host, remove_hosts, run  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build")).absolute()
TCP, MPI, LIBRARY = BUILD / "tests/test_comm_tcp", BUILD / "tests/test_comm_mpi", BUILD / "libtpengine_mpi.so"
RANKS = 4  # two on each host
END_S = 60  # for a rank on a loaded machine
CUT_S = 20  # deadlines are 1.5 s, and four times that in slow builds

failed = False


def report(name, fault):
    global failed
    failed |= bool(fault)
    print(f"{'not ok' if fault else 'ok'} - {name}" + (f"\n# {fault}".replace("\n", "\n# ") if fault else ""), flush=True)


def start_tcp(case, stages, port):
    addresses = ",".join(f"{ADDRESSES[rank // 2]}:{port + rank}" for rank in range(RANKS))
    ranks = []
    for rank in range(RANKS):
        env = dict(os.environ, COMM_TCP_CASE=case, COMM_TCP_RANK=str(rank), COMM_TCP_STAGES=str(stages),
                   COMM_TCP_ADDRESSES=addresses)
        ranks.append(subprocess.Popen(["ip", "netns", "exec", HOSTS[rank // 2], str(TCP)], env=env,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return ranks


def start_mpi(case, stages, folder):
    """mpirun on the first host; it starts its daemon on the second one with a program in place of ssh."""
    agent = folder / "agent"
    agent.write_text(f"#!/bin/sh\nshift\nexec ip netns exec {HOSTS[1]} unshare --uts sh -c 'hostname {HOSTS[1]}; '\"$*\"\n")
    agent.chmod(0o755)
    where = f"{ADDRESSES[0]}:2,{ADDRESSES[1]}:2"
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--host", where, "-n", str(RANKS)]
    for key, value in {"plm_rsh_agent": agent, "btl": "tcp,self", "pml": "ob1", "btl_tcp_if_include": "tpveth0",
                       "oob_tcp_if_include": "tpveth0", "orte_keep_fqdn_hostnames": "1"}.items():
        options += ["--mca", key, str(value)]
    exports = {"COMM_MPI_CASE": case, "COMM_MPI_STAGES": str(stages), "COMM_MPI_LIBRARY": str(LIBRARY)}
    for key, value in exports.items():
        options += ["-x", f"{key}={value}"]
    return [subprocess.Popen(on_host(0) + ["mpirun"] + options + [str(MPI)], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)]


class Output:
    """Lines of processes as they come."""

    def __init__(self, processes):
        self.processes, self.text = processes, ""
        for process in processes:
            os.set_blocking(process.stdout.fileno(), False)

    def wait(self, done, limit_s):
        """Whether done(text) came to be within the time; it is asked once more after the end of all processes."""
        end = time.monotonic() + limit_s
        while True:
            over = all(process.poll() is not None for process in self.processes)
            for process in self.processes:
                self.text += (process.stdout.read() or b"").decode(errors="replace")
            if done(self.text):
                return True
            if over or time.monotonic() > end:
                return False
            time.sleep(0.02)

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()


def endings(text):
    return re.findall(r"^(?:\[[^\]]*\])?rank (\d) of 4 after ([\d.]+) s: (.*)$", text, re.MULTILINE)


def all_operations(start, stages):
    output = Output(start("all", stages))
    output.wait(lambda text: len(endings(text)) == RANKS, END_S)
    output.wait(lambda text: False, 5)
    codes = [process.poll() for process in output.processes]
    output.kill()
    well = [rank for rank, _, text in endings(output.text) if text == "all is well"]
    if sorted(well) != ["0", "1", "2", "3"] or any(codes):
        return f"ranks {well} ended well, exit codes {codes}:\n{output.text[-3000:]}"
    return None


def cut_cable(start, case, wanted):
    """wanted: how many ranks must be heard; of mpirun only its own host's are, once the cable is cut."""
    join()
    output = Output(start(case, 1))
    try:
        if not output.wait(lambda text: text.count("is ready") == RANKS, END_S):
            return f"not all ranks were ready:\n{output.text[-3000:]}"
        time.sleep(0.3)
        began = time.monotonic()
        cut()
        output.wait(lambda text: len(endings(text)) >= wanted, CUT_S)
        took = time.monotonic() - began
        said = endings(output.text)
        print(f"# {case}: {took:.1f} s after the cut", *[f"# rank {rank}: {text}" for rank, _, text in said], sep="\n")
        if len(said) < wanted:
            return f"only ranks {[rank for rank, *_ in said]} had ended {CUT_S} s after the cut:\n{output.text[-3000:]}"
        for rank, _, text in said:
            others = "23" if rank in "01" else "01"
            if not re.search(f"rank [{others}] (is lost|did not reach|did not finish)", text):
                return f"rank {rank} does not name a rank of the other host: {text}"
        # Each process ends, too: those of mpirun's other host by themselves.
        end = time.monotonic() + CUT_S
        while still := [pid for host in HOSTS for pid in run("ip", "netns", "pids", host).stdout.split() if is_rank(pid)]:
            if time.monotonic() > end:
                return f"processes {still} live on"
            time.sleep(0.05)
        return None
    finally:
        output.kill()
        join()


def is_rank(pid):
    try:
        return Path(f"/proc/{pid}/exe").resolve().name in (TCP.name, MPI.name)
    except OSError:
        return False


def main():
    fault = make_hosts()
    if fault:
        print(f"SKIP no network namespaces: {fault.strip()}")
        return
    folder = Path(tempfile.mkdtemp(prefix="comm_namespaces_"))
    try:
        ports = iter(range(21000, 30000, 10))
        tcp = lambda case, stages: start_tcp(case, stages, next(ports))
        report("sockets between two hosts: all operations", all_operations(tcp, 1))
        report("sockets between two hosts: two stages", all_operations(tcp, 2))
        report("sockets: the cable is cut in a sum", cut_cable(tcp, "sums", RANKS))
        report("sockets: the cable is cut while ranks are idle", cut_cable(tcp, "idle", RANKS))
        if not LIBRARY.exists() or not shutil.which("mpirun"):
            print(f"ok - MPI between two hosts # SKIP no {'mpirun' if LIBRARY.exists() else LIBRARY.name} here")
            return
        mpi = lambda case, stages: start_mpi(case, stages, folder)
        report("MPI between two hosts: all operations", all_operations(mpi, 1))
        report("MPI: the cable is cut in a sum", cut_cable(mpi, "sums", 2))
    finally:
        remove_hosts()
        shutil.rmtree(folder)


main()
sys.exit(failed)

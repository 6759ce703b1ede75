#!/usr/bin/env python3
"""Cold start beside others, on the same files of the same disk, in turns: reading a rank's file, two ranks at a time, read-ahead settings, exec to
first token, and making shards from a checkpoint.

    bench/bench_start.py readers --shards build/bench-start/bf16 --python python3          our loader, fio, cat, safetensors and its relatives
    bench/bench_start.py ranks --pair build/bench-start/int4-2                             two ranks on one disk
    bench/bench_start.py readahead --shards build/bench-start/int4                         a loop device of our own; needs root
    bench/bench_start.py start --models demo=build/demo 1b=... --rival-server .../llama-server --rival-model ...gguf
    bench/bench_start.py convert --checkpoint build/bench-start/model --rival-convert "python3 convert_hf_to_gguf.py" --rival-quantize ...

Several parts may be named. Every part makes --rounds rounds; in each round every way has its turn, so that what the disk or the machine does
meanwhile meets all of them. A line per way with medians (and the least and the most), at the end a JSON object with every single value (--json).

cold: every file is dropped from the page cache before (posix_fadvise). The host of a virtual machine may still keep it in its own, so the
first round, which warms that, is made and thrown away. CPU seconds and bytes read from the block device are those of the process and
its children (getrusage). What an interpreter and its imports cost is left out: with_its_start_s has it.
Needs the standard library and fio; --python names an interpreter with safetensors and numpy, and torch, runai_model_streamer, fastsafetensors if
those are to take part.
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUILD = Path(os.environ.get("BUILD", "build"))
TPENGINE, TPSHARD, BENCH_LOAD = BUILD / "tpengine", BUILD / "tpshard", BUILD / "bench" / "bench_load"
MIB = 1 << 20


# ---- processes and files ---------------------------------------------------------------------------------------------


class Run:
    """A process from start to end: seconds, seconds until the first byte of its output, CPU seconds, bytes from the disk."""

    def __init__(self, *words, environment=None, quiet=True):
        command = [str(word) for word in words]
        with tempfile.TemporaryFile("w+") as problem:
            begin = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=problem, stdin=subprocess.DEVNULL,
                                       env={**os.environ, **(environment or {})})
            first = os.read(process.stdout.fileno(), 1)
            self.first_s = time.monotonic() - begin
            self.output = (first + process.stdout.read()).decode(errors="replace")
            process.stdout.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.seconds = time.monotonic() - begin
            self.cpu_s = usage.ru_utime + usage.ru_stime
            self.disk_bytes = usage.ru_inblock * 512
            problem.seek(0)
            self.problem = problem.read()
        if process.returncode != 0 and quiet:
            raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}: {self.problem.strip()[-600:]}")


def files_of(path):
    return [file for file in sorted(Path(path).rglob("*")) if file.is_file()] if Path(path).is_dir() else [Path(path)]


def drop(*paths):
    """Out of the page cache; what is dirty is written first."""
    for path in paths:
        for file in files_of(path):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def warm(*paths):
    for path in paths:
        for file in files_of(path):
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)


def size(path):
    return sum(file.stat().st_size for file in files_of(path))


def rank_files(directory):
    return sorted(Path(directory).glob("*rank-*.tpshard"))


# ---- tables of values ------------------------------------------------------------------------------------------------


class Table:
    """Values of ways over rounds."""

    def __init__(self, name):
        self.name, self.values, self.failed = name, {}, {}

    def add(self, way, **values):
        for key, value in values.items():
            self.values.setdefault(way, {}).setdefault(key, []).append(value)

    def play(self, rounds, ways):
        """ways: {name: function that returns a dictionary of values}. One more round comes first and does not count."""
        for number in range(rounds + 1):
            for name, function in ways.items():
                if name in self.failed:
                    continue
                try:
                    values = function()
                except (RuntimeError, OSError, ValueError, KeyError) as problem:
                    self.failed[name] = str(problem)[-300:]
                    print(f"{self.name} way={name} FAILED {self.failed[name]}", flush=True)
                    continue
                if number > 0:
                    self.add(name, **values)
        self.show()
        return self

    def median(self, way, key):
        return statistics.median(self.values[way][key])

    def show(self):
        for way, values in self.values.items():
            words = [f"{key}={statistics.median(of):.4g}({min(of):.4g}..{max(of):.4g})" for key, of in values.items() if isinstance(of[0], (int, float))]
            print(f"{self.name} way={way} rounds={len(next(iter(values.values())))} {' '.join(words)}", flush=True)

    def json(self):
        medians = {way: {key: statistics.median(of) for key, of in values.items() if isinstance(of[0], (int, float))} for way, values in self.values.items()}
        return {"medians": medians, "values": self.values, "failed": self.failed}


# ---- ways to read ----------------------------------------------------------------------------------------------------


def fio(*files, direct, block, engine="psync", depth=1, threads=1, cold=True):
    """All files at once, each in `threads` stretches; GB/s of all together."""
    if cold:
        drop(*files)
    jobs = []
    for file in files:
        stretch = size(file) // threads // block * block
        for i in range(threads):
            jobs += [f"--name={len(jobs)}", f"--filename={file}", f"--offset={i * stretch}", f"--size={stretch}"]
    run = Run("fio", "--readonly", "--rw=read", f"--bs={block}", f"--direct={int(direct)}", f"--ioengine={engine}", f"--iodepth={depth}",
              f"--invalidate={int(cold)}", "--output-format=json", "--thread", *jobs)
    found = json.loads(run.output[run.output.index("{"):])["jobs"]
    bytes_read = sum(job["read"]["io_bytes"] for job in found)
    seconds = max(job["read"]["runtime"] for job in found) / 1e3
    return {"gb_s": bytes_read / seconds / 1e9, "seconds": seconds, "cpu_s_per_gb": run.cpu_s / bytes_read * 1e9,
            "disk_percent": 100 * run.disk_bytes / bytes_read}


def cat(file, cold=True):
    if cold:
        drop(file)
    run = Run("sh", "-c", f"cat {shlex.quote(str(file))} > /dev/null")
    return {"gb_s": size(file) / run.seconds / 1e9, "seconds": run.seconds, "cpu_s_per_gb": run.cpu_s / size(file) * 1e9,
            "disk_percent": 100 * run.disk_bytes / size(file)}


def ours(directory, *words, cold=True, rank=0):
    if not cold:
        warm(*rank_files(directory))
    run = Run(BENCH_LOAD, directory, "--rank", rank, *(["--cold"] if cold else []), *words)
    values = dict(word.split("=", 1) for word in shlex.split(run.output) if "=" in word)
    return {"gb_s": float(values["gb_s"]), "seconds": float(values["seconds"]), "cpu_s_per_gb": float(values["cpu_s_per_gb"]),
            "verify_s_per_gb": float(values["verify_s_per_gb"]), "disk_percent": float(values["read_percent"]), "first_ms": float(values["first_ms"]),
            "path": values["path"], "why": values["why"]}


# Each prints the seconds of the load alone, and how many bytes came.
PYTHON_WAYS = {
    "safetensors, numpy": """
from safetensors import safe_open
begin = now()
with safe_open(path, framework="np") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
done(sum(t.nbytes for t in tensors.values()))
""",
    "safetensors, torch, every page touched": """
import torch
from safetensors.torch import load_file
begin = now()
tensors = load_file(path)
total = sum(int(t.view(torch.uint8).reshape(-1)[::4096].sum()) for t in tensors.values())
done(sum(t.nbytes for t in tensors.values()))
""",
    "runai-model-streamer": """
from runai_model_streamer import SafetensorsStreamer
begin = now()
count = 0
with SafetensorsStreamer() as streamer:
    streamer.stream_file(path)
    for name, tensor in streamer.get_tensors():
        count += tensor.nbytes
done(count)
""",
    "fastsafetensors, no GDS, CPU": """
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
begin = now()
loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
loader.add_filenames({0: [path]})
files = loader.copy_files_to_device()
tensors = [files.get_tensor(name) for name in files.key_to_rank_lidx]
done(sum(t.nbytes for t in tensors))
""",
}
PYTHON_FRAME = """
import os, resource, sys, time
path = sys.argv[1]
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
def now():
    global cpu_before
    cpu_before = cpu()
    return time.monotonic()
def done(count):
    print(time.monotonic() - begin, cpu() - cpu_before, count, flush=True)
    os._exit(0)
"""


def python_way(python, code, file, cold=True):
    if cold:
        drop(file)
    run = Run(python, "-c", PYTHON_FRAME + code, file)
    seconds, cpu_s, count = run.output.split()[-3:]
    return {"gb_s": int(count) / float(seconds) / 1e9, "seconds": float(seconds), "cpu_s_per_gb": float(cpu_s) / int(count) * 1e9,
            "disk_percent": 100 * run.disk_bytes / int(count), "with_its_start_s": run.seconds}


def write_safetensors(path, rank_file, tensor_bytes=64 * MIB):
    """The bytes of a rank file as tensors of a safetensors file."""
    total = rank_file.stat().st_size // tensor_bytes * tensor_bytes or rank_file.stat().st_size // 2 * 2
    header, offset = {}, 0
    while offset < total:
        end = min(offset + tensor_bytes, total)
        header[f"tensor.{offset // tensor_bytes:04}"] = {"dtype": "F16", "shape": [(end - offset) // 2], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out, open(rank_file, "rb") as source:
        out.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(source, out, 8 * MIB)
        out.truncate(8 + len(text) + total)
    drop(path)


def readers(args, work):
    directory = Path(args.shards)
    file = rank_files(directory)[0]
    same = work / "same-bytes.safetensors"
    write_safetensors(same, file)
    ways = {f"fio direct {block // MIB} MiB": lambda block=block: fio(file, direct=True, block=block) for block in (MIB, 4 * MIB, 8 * MIB)}
    ways["fio direct 1 MiB, 8 in flight"] = lambda: fio(file, direct=True, block=MIB, engine="libaio", depth=8)
    ways["fio direct 8 MiB, 4 in flight"] = lambda: fio(file, direct=True, block=8 * MIB, engine="libaio", depth=4)
    ways["fio direct 1 MiB, 4 threads"] = lambda: fio(file, direct=True, block=MIB, threads=4)
    ways["fio buffered 1 MiB"] = lambda: fio(file, direct=False, block=MIB)
    ways["cat"] = lambda: cat(file)
    for target in ("null", "host"):
        ways[f"ours, {target}"] = lambda target=target: ours(directory, "--target", target)
        ways[f"ours, {target}, verify off"] = lambda target=target: ours(directory, "--target", target, "--verify", "off")
    for path in ("read", "direct", "uring"):
        ways[f"ours, null, {path}"] = lambda path=path: ours(directory, "--target", "null", "--path", path)
    for name, code in PYTHON_WAYS.items():
        ways[name] = lambda code=code: python_way(args.python, code, same)
    table = Table("readers").play(args.rounds, ways)

    hot = {"fio buffered 1 MiB": lambda: fio(file, direct=False, block=MIB, cold=False), "cat": lambda: cat(file, cold=False)}
    for target in ("null", "host"):
        hot[f"ours, {target}"] = lambda target=target: ours(directory, "--target", target, cold=False)
        hot[f"ours, {target}, verify off"] = lambda target=target: ours(directory, "--target", target, "--verify", "off", cold=False)
    cold, warmed = table.json(), {}
    warm(file)
    warmed["rank file"] = Table("readers-warm").play(args.rounds, hot).json()
    warm(same)
    warmed["safetensors"] = Table("readers-warm").play(args.rounds, {name: lambda code=code: python_way(args.python, code, same, cold=False)
                                                                       for name, code in PYTHON_WAYS.items()}).json()
    same.unlink()
    return {"file_bytes": size(file), "cold": cold, "warm": warmed}


# ---- two ranks on one disk ---------------------------------------------------------------------------------------------


def two_ranks(directory, *words):
    files = rank_files(directory)
    drop(*files)
    begin = time.monotonic()
    loads = [subprocess.Popen([BENCH_LOAD, directory, "--rank", str(rank), "--target", "null", *words], stdout=subprocess.PIPE, text=True)
             for rank in range(len(files))]
    seconds = []
    for load in loads:
        text = load.communicate()[0]
        if load.returncode != 0:
            raise RuntimeError(f"bench_load: exit {load.returncode}")
        seconds.append(float(dict(word.split("=", 1) for word in shlex.split(text) if "=" in word)["seconds"]))
    wall = time.monotonic() - begin
    return {"gb_s": sum(map(size, files)) / max(seconds) / 1e9, "wall_gb_s": sum(map(size, files)) / wall / 1e9,
            "skew_percent": 100 * (max(seconds) - min(seconds)) / max(seconds)}


def ranks(args, _work):
    directory = Path(args.pair)
    files = rank_files(directory)
    return Table("ranks").play(args.rounds, {
        "fio direct 1 MiB": lambda: fio(*files, direct=True, block=MIB),
        "fio direct 8 MiB": lambda: fio(*files, direct=True, block=8 * MIB),
        "fio direct 1 MiB, 2 threads each": lambda: fio(*files, direct=True, block=MIB, threads=2),
        "fio buffered 1 MiB": lambda: fio(*files, direct=False, block=MIB),
        "ours": lambda: two_ranks(directory),
        "ours, verify off": lambda: two_ranks(directory, "--verify", "off"),
        "one rank alone": lambda: ours(directory, "--target", "null"),
    }).json()


# ---- read-ahead --------------------------------------------------------------------------------------------------------


def readahead(args, work):
    """A file system of our own on a loop device that passes the page cache below it, so that its read-ahead can be set."""
    image, place = work / "disk.img", work / "disk"
    place.mkdir()
    total = size(args.shards)
    with open(image, "wb") as file:
        file.truncate((2 if total < 3 << 30 else 1) * total + total // 4 + 64 * MIB)
    results, device = {}, None
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
        device = subprocess.run(["losetup", "--find", "--show", "--direct-io=on", image], check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["mount", device, place], check=True)
        shards = place / "shards"
        shutil.copytree(args.shards, shards)
        os.sync()
        file = rank_files(shards)[0]
        setting = Path("/sys/block") / Path(device).name / "queue" / "read_ahead_kb"
        for kib in (8192, 2560, 128, 0):
            setting.write_text(f"{kib}\n")
            ways = {"fio direct 1 MiB": lambda: fio(file, direct=True, block=MIB),
                    "ours, null": lambda: ours(shards, "--target", "null"), "ours, host": lambda: ours(shards, "--target", "host")}
            if kib > 0:  # without read-ahead plain readers go a page at a time: minutes to an hour for each gigabyte
                ways["fio buffered 1 MiB"] = lambda: fio(file, direct=False, block=MIB)
                ways["cat"] = lambda: cat(file)
                ways["mapped and touched (safetensors, numpy)"] = lambda: python_way(args.python, PYTHON_WAYS["safetensors, numpy"], same)
                same = shards / "same-bytes.safetensors"
                if not same.exists() and total < 3 << 30 and shutil.disk_usage(place).free > size(file):
                    write_safetensors(same, file)
                elif not same.exists():
                    del ways["mapped and touched (safetensors, numpy)"]
            results[f"{kib} KiB"] = Table(f"readahead kib={kib}").play(args.rounds, ways).json()
    finally:
        subprocess.run(["umount", place], check=False, stderr=subprocess.DEVNULL)
        if device:
            subprocess.run(["losetup", "--detach", device], check=False)
        image.unlink(missing_ok=True)
    return results


# ---- exec to first token -------------------------------------------------------------------------------------------------


def first_token(directory, cold, *words):
    """From exec until the first result has been written. A directory without a tokenizer takes a token's number."""
    if cold:
        drop(directory)
    else:
        warm(directory)
    if (Path(directory) / "tokenizer.bin").exists():
        run = Run(TPENGINE, "generate", directory, "--prompt", "In", "--max-tokens", 1, "--temperature", 0, "--ignore-eos", "--quiet", "--timings", *words)
        seconds = run.first_s
    else:
        run = Run(TPENGINE, "logits", directory, "--token-ids", "1", "--output", "/dev/null", "--quiet", "--timings", *words)
        seconds = run.seconds
    timings = json.loads(run.problem[run.problem.index("{"):])
    return {"first_token_s": seconds, "exit_s": run.seconds, "cpu_s": run.cpu_s, "disk_percent": 100 * run.disk_bytes / sum(map(size, rank_files(directory))),
            **{f"phase_{key}": value for key, value in timings["phases"].items() if value is not None}}


def rival_first_token(args, cold, *words):
    """llama-server from exec until the first token of a completion: its /health is asked every 5 ms."""
    import http.client
    import socket
    if cold:
        drop(args.rival_model)
    else:
        warm(args.rival_model)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    begin = time.monotonic()
    server = subprocess.Popen([args.rival_server, "-m", args.rival_model, "--port", str(port), "--host", "127.0.0.1", "-c", "512", "--parallel", "1",
                               "--no-warmup", "--log-disable", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return None, b""
        finally:
            connection.close()
    try:
        while ask("GET", "/health")[0] != 200:
            if server.poll() is not None or time.monotonic() - begin > 300:
                raise RuntimeError("llama-server does not start")
            time.sleep(0.005)
        ready = time.monotonic() - begin
        status, text = ask("POST", "/completion", json.dumps({"prompt": [1, 5], "n_predict": 1, "temperature": 0}))
        if status != 200:
            raise RuntimeError(f"llama-server: {status} {text[:200]}")
        return {"first_token_s": time.monotonic() - begin, "ready_s": ready}
    finally:
        server.kill()
        server.wait()


def start(args, _work):
    results = {}
    for model in args.models:
        name, directory = model.split("=", 1)
        files = rank_files(directory)
        rank_bytes = sum(map(size, files))
        for cold in (True, False):
            ways = {"fio direct 1 MiB": lambda: fio(*files, direct=True, block=MIB),
                    "fio direct 1 MiB, 4 threads": lambda: fio(*files, direct=True, block=MIB, threads=4)} if cold else {}
            if rank_bytes >= 64 * MIB:
                ways["fio buffered 1 MiB"] = lambda: fio(*files, direct=False, block=MIB, cold=cold)
            else:
                ways["cat"] = lambda: {"gb_s": sum(size(f) for f in files) / sum(cat(f, cold)["seconds"] for f in files) / 1e9}
                ways = {name: way for name, way in ways.items() if not name.startswith("fio")}
            ways["tpengine"] = lambda: first_token(directory, cold)
            ways["tpengine, verify off"] = lambda: first_token(directory, cold, "--verify", "off")
            if args.rival_server and name == args.rival_for:
                ways["llama-server"] = lambda: rival_first_token(args, cold)
                ways["llama-server, read"] = lambda: rival_first_token(args, cold, "--load-mode", "none")
                ways["llama-server, O_DIRECT"] = lambda: rival_first_token(args, cold, "--load-mode", "dio")
            table = Table(f"start model={name} {'cold' if cold else 'warm'}").play(args.rounds, ways)
            bandwidth = max(table.median(way, "gb_s") for way in ways if way in table.values and "gb_s" in table.values[way])
            limit = rank_bytes / bandwidth / 1e9 + 0.05
            reached = table.median("tpengine", "first_token_s") if "tpengine" in table.values else None
            print(f"start model={name} {'cold' if cold else 'warm'} bytes={rank_bytes} best_gb_s={bandwidth:.3f} bytes_by_bandwidth_and_50_ms={limit:.3f} "
                  f"first_token_s={reached if reached is None else round(reached, 4)}", flush=True)
            results[f"{name} {'cold' if cold else 'warm'}"] = {"bytes": rank_bytes, "gb_s": bandwidth, "limit_s": limit, **table.json()}
    return results


# ---- making shards -------------------------------------------------------------------------------------------------------


def convert_ours(args, out, quant, *words):
    shutil.rmtree(out, ignore_errors=True)
    drop(args.checkpoint)
    run = Run(TPSHARD, "convert", "--quiet", "--tp", args.convert_tp, "--quant", quant, *(["--group-size", 32] if quant == "int4" else []), *words, args.checkpoint, out)
    source = size(args.checkpoint)
    return {"gb_s": source / run.seconds / 1e9, "seconds": run.seconds, "cpu_s_per_gb": run.cpu_s / source * 1e9, "written_bytes": size(out)}


def convert_rival(args, work, kind):
    """The rival's one or two steps and, as ours does, everything on the disk before it counts as done."""
    half, out = work / "rival-bf16.gguf", work / "rival.gguf"
    drop(args.checkpoint)
    steps = [Run(*shlex.split(args.rival_convert), args.checkpoint, "--outfile", half, "--outtype", "bf16")]
    if kind != "bf16":
        steps.append(Run(args.rival_quantize, half, out, kind))
    begin = time.monotonic()
    written = [path for path in (half, out) if path.exists()]
    for path in written:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = sum(step.seconds for step in steps) + time.monotonic() - begin
    source = size(args.checkpoint)
    values = {"gb_s": source / seconds / 1e9, "seconds": seconds, "convert_s": steps[0].seconds, "quantize_s": sum(step.seconds for step in steps[1:]),
              "cpu_s_per_gb": sum(step.cpu_s for step in steps) / source * 1e9, "written_bytes": sum(map(size, written))}
    for path in written:
        path.unlink()
    return values


def write_bandwidth(work, total):
    run = Run("fio", "--name=w", f"--filename={work / 'written'}", "--rw=write", "--bs=1M", f"--size={total // MIB * MIB}", "--end_fsync=1", "--output-format=json")
    (work / "written").unlink()
    job = json.loads(run.output[run.output.index("{"):])["jobs"][0]
    return {"gb_s": total / run.seconds / 1e9, "seconds": run.seconds, "fio_gb_s": job["write"]["bw_bytes"] / 1e9}


def convert(args, work):
    largest = max(files_of(args.checkpoint), key=lambda file: file.stat().st_size)
    out = work / "converted"
    ways = {"read: fio direct 1 MiB": lambda: fio(largest, direct=True, block=MIB), "read: fio buffered 1 MiB": lambda: fio(largest, direct=False, block=MIB),
            "write: fio with fsync": lambda: write_bandwidth(work, 1 << 30)}
    for quant, kind in (("none", "bf16"), ("int8", "q8_0"), ("int4", "q4_0")):
        ways[f"tpshard {quant}"] = lambda quant=quant: convert_ours(args, out, quant)
        if quant == "int4":
            ways["tpshard int4, plain rounding"] = lambda: convert_ours(args, out, "int4", "--scales", "max")
        if args.rival_convert:
            ways[f"rival {kind}"] = lambda kind=kind: convert_rival(args, work, kind)
    table = Table("convert").play(args.rounds, ways)
    shutil.rmtree(out, ignore_errors=True)
    return {"source_bytes": size(args.checkpoint), **table.json()}


# ---- all of it -------------------------------------------------------------------------------------------------------------


def machine(work):
    def text(path, word=None):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return None
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(word)), None) if word else lines[0]
    found = subprocess.run(["findmnt", "-no", "SOURCE,FSTYPE", "-T", work], capture_output=True, text=True).stdout.split()
    device = Path(os.path.realpath(found[0])).name if found else ""
    return {"cpu": text("/proc/cpuinfo", "model name"), "cores": os.cpu_count(), "memory": text("/proc/meminfo", "MemTotal"), "kernel": platform.release(),
            "file_system": found[1] if len(found) > 1 else None, "read_ahead_kb": text(f"/sys/block/{device}/queue/read_ahead_kb"),
            "virtual": "hypervisor" in (text("/proc/cpuinfo", "flags") or ""), "load_average": os.getloadavg()[0]}


PARTS = {"readers": readers, "ranks": ranks, "readahead": readahead, "start": start, "convert": convert}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for every value; a part is added to those that stand in it")
    parser.add_argument("--work", default=str(BUILD), help="folder on the disk that is measured, for files of our own")
    parser.add_argument("--shards", help="readers, readahead: a directory of one rank")
    parser.add_argument("--pair", help="ranks: a directory of two ranks")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=DIR", help="start")
    parser.add_argument("--checkpoint", help="convert")
    parser.add_argument("--convert-tp", type=int, default=2, help="convert: ranks (default 2)")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the rivals' packages")
    parser.add_argument("--rival-server", help="start: llama-server")
    parser.add_argument("--rival-model", help="start: its model")
    parser.add_argument("--rival-for", help="start: the name in --models that is the same model")
    parser.add_argument("--rival-convert", help="convert: command that takes CHECKPOINT --outfile F --outtype bf16")
    parser.add_argument("--rival-quantize", help="convert: llama-quantize")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # file systems of our own are unmounted on the way out
    with tempfile.TemporaryDirectory(prefix="bench-start-", dir=args.work) as work:
        report = {}
        if args.json and Path(args.json).exists():
            report = json.loads(Path(args.json).read_text())
        for part in args.parts:
            report[part] = {"date": datetime.date.today().isoformat(), "rounds": args.rounds, "machine": machine(work), **PARTS[part](args, Path(work))}
            if args.json:
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""tests/io_shim.c from Python: programs run with its faults, its counters, and how programs must say that they failed."""
import errno
import mmap
import os
import signal
import struct
import subprocess
from pathlib import Path

SHIM = Path(os.environ.get("BUILD", "build")).resolve() / "tests" / "libio_shim.so"
HANG_S = 60
POWER_FAILED = 99  # exit status
# As in io_shim.c.
KINDS = ["open", "read", "pread", "write", "pwrite", "sync", "rename", "truncate", "allocate", "map", "close", "mkdir", "unlink", "opendir", "readdir",
         "stat", "lock", "thread", "alloc", "step", "live", "written"]


class Page:
    """The shim's counters and its armed fault."""

    def __init__(self, path):
        self.path = path
        with open(path, "wb") as f:
            f.truncate(4096)
        with open(path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), 4096)

    def count(self, kind):
        return struct.unpack_from("<q", self.map, 8 * KINDS.index(kind))[0]

    def arm(self, kind, left, error=errno.ENOMEM, always=False):
        struct.pack_into("<q", self.map, 192, -1)
        struct.pack_into("<3q", self.map, 200, left, error, always)
        struct.pack_into("<q", self.map, 192, KINDS.index(kind) if kind else -1)

    @property
    def injected(self):
        return struct.unpack_from("<q", self.map, 224)[0]

    def close(self):
        self.map.close()
        os.unlink(self.path)


class Ran:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err.decode(errors="replace").strip()

    def __repr__(self):
        return f"exit status {self.status}, {self.err[-300:]!r}"


def run(program, *words, page=None, **shim):
    """shim: IO_SHIM_* in small letters without the prefix."""
    environment = dict(os.environ)
    if shim or page:
        environment.update({"LD_PRELOAD": str(SHIM), **{"IO_SHIM_" + k.upper(): str(v) for k, v in shim.items()}})
        if page:
            environment["IO_SHIM_PAGE"] = str(page.path)
    child = subprocess.Popen([str(program), *map(str, words)], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True)
    try:
        out, err = child.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        return Ran("hangs", out, err)
    return Ran(child.returncode, out, err)


def sentence(ran):
    """What is wrong with how a failed run says it: one sentence after at most a few notes."""
    lines = [line for line in ran.err.splitlines() if not line.startswith(("note:", "warning:"))]
    if not lines or not lines[-1].startswith(("tpshard: ", "tpengine: ")) or len(lines[-1]) < 20:
        return f"no sentence: {ran}"
    return f"more than one sentence: {ran.err!r}" if len(lines) > 1 else None

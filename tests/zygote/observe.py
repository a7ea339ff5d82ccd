"""Runs as a workload and prints, as one JSON object, all that it and the kernel say of it.

Standard library only; tests/probe and more. What its system calls answer it, calls.py asks.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.probe import probe
else:
    import probe  # it lies beside this file

LIBC = ctypes.CDLL(None, use_errno=True)

#: What two processes can't have in common, or what changes by itself.
OF_THE_MOMENT = ("Pid", "Tgid", "NStgid", "NSpid", "NSpgid", "NSsid", "FDSize", "SigQ", "Threads", "State")


def status() -> dict[str, str]:
    seen = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name not in OF_THE_MOMENT and not name.startswith(("Vm", "Rss", "Hugetlb")) and "ctxt_switches" not in name:
            seen[name] = value.strip()
    return seen


def observe() -> dict[str, object]:
    everything = probe.reality([])
    return {
        "probe": everything,
        "status": status(),
        "limits": Path("/proc/self/limits").read_text(),
        "signals": {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "leads its session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "parent": os.getppid(),
        "threads": threading.active_count(),
        "descriptors": sorted(map(int, probe.descriptors())),
        "nice": os.nice(0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "scheduler": [os.sched_getscheduler(0), os.sched_getparam(0).sched_priority],
        "timer slack": LIBC.prctl(30, 0, 0, 0, 0),
        "dumpable": LIBC.prctl(3, 0, 0, 0, 0),
        "keep capabilities": LIBC.prctl(7, 0, 0, 0, 0),
        "secure bits": LIBC.prctl(27, 0, 0, 0, 0),
        "subreaper": parent_death_signal(37),
        "parent death signal": parent_death_signal(2),
        "personality": LIBC.personality(0xFFFFFFFF),
        "core filter": Path("/proc/self/coredump_filter").read_text(),
        "pipe of cores": resource.getrlimit(resource.RLIMIT_CORE),
        "owner of /proc/self/fd": Path("/proc/self/fd").stat().st_uid,
        "random": [random.random(), uuid.uuid1().hex, uuid.uuid4().hex, tempfile.mktemp()],
        "temporary directory": tempfile.gettempdir(),
        "time zone": time.tzname,
        "keyrings": keyrings(),
    }


def parent_death_signal(option: int) -> int:
    """Both of the options that write their answer to memory."""
    value = ctypes.c_int(-1)
    LIBC.prctl(option, ctypes.byref(value), 0, 0, 0)
    return value.value


def keyrings() -> dict[str, str]:
    """Whether there is a session keyring that is not just the user's, where a filter lets us see."""
    number = {"x86_64": 250, "aarch64": 219}[platform.machine()]
    ids = []
    for special in (-3, -5):
        ctypes.set_errno(0)
        ids.append(LIBC.syscall(ctypes.c_long(number), ctypes.c_long(0), ctypes.c_long(special), ctypes.c_long(0)))
    if ids[0] < 0:
        return {"session": probe.error_name(ctypes.get_errno())}
    text = ctypes.create_string_buffer(256)
    LIBC.syscall(ctypes.c_long(number), ctypes.c_long(6), ctypes.c_long(ids[0]), text, ctypes.c_size_t(256))
    name = text.value.decode().rpartition(";")[2]
    return {"session": name[:4], "is the user's": str(ids[0] == ids[1]), "serial": str(ids[0])}


if __name__ == "__main__":
    json.dump(observe(), sys.stdout)
    sys.stdout.flush()

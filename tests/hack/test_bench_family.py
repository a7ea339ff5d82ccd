"""hack/bench.d/family.py on real processes: whose CPU time is counted, and that nobody is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import psutil
import pytest
from tests.unit.hack.bench_modules import PLACES, bench_module

family = bench_module("family")

#: Each is a program of its own, because being the parent of all orphans would stay with the tests' process.
COUNT = """\
import json, os, subprocess, sys, time
sys.path[:0] = {places!r}
import family, psutil

BURN = '''
import os, sys, time
if os.fork():
    os._exit(0)
while time.process_time() < 0.3:
    pass
print(time.process_time(), flush=True)
sys.stdin.read()
'''
family.adopt_orphans()
before = family.cpu_seconds()
burner = subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
burner.wait()
burnt = float(burner.stdout.readline())
living = family.cpu_seconds() - before
[orphan] = psutil.Process().children()
burner.stdin.close()
while orphan.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.01)
ended = family.cpu_seconds() - before
family.reap_orphans(known=[orphan.pid])
kept = len(psutil.Process().children())
family.reap_orphans(known=[])
print(json.dumps([burnt, living, ended, family.cpu_seconds() - before, kept, len(psutil.Process().children())]))
"""


def test_an_orphan_is_counted_once_living_ended_and_reaped() -> None:
    burnt, *counted, kept, left = answer(COUNT)
    # The kernel tells times in hundredths of a second, and Python's own start is not in what the orphan says of itself.
    assert all(burnt - 0.05 <= each <= 1.9 * burnt for each in counted), (burnt, counted)
    assert (kept, left) == (1, 0)


def test_all_that_descends_is_ended_even_when_it_is_stopped() -> None:
    script = "sleep 1000 & echo $!; kill -STOP $$; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert set(family.tree(parent.pid)) == {parent.pid, child}
        family.end(family.tree(parent.pid))
    assert not alive(parent.pid)
    assert not alive(child)


def test_a_process_that_is_gone_has_no_tree() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait(timeout=10)
    assert family.tree(process.pid) == []
    family.end([process.pid])


def test_memory_leaves_out_whom_it_is_told_to() -> None:
    with subprocess.Popen(["sleep", "1000"]) as one:
        try:
            everybody, nobody = family.memory(), family.memory(excluded=[one.pid])
        finally:
            one.kill()
    assert everybody.processes["Airflow"] - nobody.processes["Airflow"] == 1
    assert everybody.total > nobody.total


def test_the_peak_is_the_look_with_the_largest_total() -> None:
    sizes = iter([1, 3, 2])
    seen = threading.Event()

    def look() -> Any:
        size = next(sizes, None)
        if size is None:
            seen.set()
        return family.Memory(bytes=Counter(shim=size or 0))

    with family.MemoryWatch(look, interval=0) as watch:
        assert seen.wait(timeout=30)
    assert watch.peak.total == 3


def test_a_look_that_fails_is_told_at_the_end() -> None:
    with pytest.raises(OSError, match="no more"), family.MemoryWatch(fail, interval=0):
        pass


def fail() -> Any:
    raise OSError("no more")


def test_our_own_processes_are_in_no_container() -> None:
    assert family.role_of(psutil.Process(os.getpid())) == "Airflow"


def alive(pid: int) -> bool:
    """Not reaped, by whomever it is to be reaped, is not alive."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def answer(program: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program.format(places=PLACES)], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout)

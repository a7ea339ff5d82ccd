"""How a workload's end is told: from a real process, and from what is known of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from airflow_isolation.bridge.ending import Ending, Meter
from airflow_isolation.cgroups import Usage


@pytest.mark.parametrize(
    ("code", "how"), [(0, "exit code 0"), (7, "exit code 7"), (-15, "signal SIGTERM"), (-36, "signal 36")]
)
def test_an_end_is_told_in_words(code: int, how: str) -> None:
    assert Ending(code=code, usage=Usage(wall=1)).how == how


def test_what_is_not_known_is_left_out() -> None:
    assert Usage(wall=1.25).sentence == "wall 1.2 s"
    assert Usage(wall=1, cpu=2).sentence == "wall 1.0 s; CPU 2.0 s"


def test_of_a_process_that_is_gone_the_wall_time_is_known_and_no_oom_is_claimed() -> None:
    meter = Meter(2**22 + 1)
    meter.look()
    meter.read()
    ending = meter.ending(-9)
    assert ending.usage == Usage(wall=ending.usage.wall)
    assert ending.usage.wall >= 0
    assert ending.out_of_memory is None
    meter.close()
    meter.close()


def test_the_main_process_is_the_oldest_child() -> None:
    program = "import subprocess, sys; [print(subprocess.Popen(['sleep', '60']).pid, flush=True) for _ in 'ab']; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        meter = Meter(parent.pid)
        meter.look()
        main = meter._main
        meter.close()
        for child in children:
            subprocess.run(["kill", str(child)], check=True)
        parent.communicate()
    assert main == children[0]

"""How a workload's end is told: from a real process, and from what is known of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from typing import NoReturn

import pytest

from airflow_isolation.bridge.ending import Ending, Meter
from airflow_isolation.bridge.who_killed import who_killed
from airflow_isolation.cgroups import OutOfMemory, Usage
from airflow_isolation.cgroups.out_of_memory import Limit
from airflow_isolation.errors import RuntimeUnreachable


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


class Daemon:
    """A runtime that remembers what it was asked, or can't be reached."""

    def __init__(self, *asked: signal.Signals, error: Exception | None = None) -> None:
        self._asked = asked
        self._error = error

    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]:
        assert id == "task-1"
        if self._error is not None:
            raise self._error
        return self._asked


def told_of_a_killed_one(daemon: Daemon) -> str:
    meter = Meter(2**22 + 1)
    try:
        return meter.ending(-9, by_others=True, who=partial(who_killed, daemon, "task-1")).from_outside
    finally:
        meter.close()


def test_who_killed_it_is_told_as_far_as_the_daemon_knows() -> None:
    asked = Daemon(signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)
    assert "Somebody asked the daemon to send it SIGTERM, SIGKILL," in told_of_a_killed_one(asked)
    for daemon in (Daemon(), Daemon(error=RuntimeUnreachable("away"))):
        unknown = told_of_a_killed_one(daemon)
        assert "asked the daemon" not in unknown
        assert "Somebody killed it or its shim" in unknown


def test_the_daemon_is_asked_only_about_what_others_ended() -> None:
    def asked() -> NoReturn:
        raise AssertionError("asked")

    meter = Meter(2**22 + 1)
    assert meter.ending(-9, who=asked).from_outside == ""
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


def ending(code: int, *, limit: Limit | None = None, fatal: bool = True, from_outside: str = "") -> Ending:
    killing = None if limit is None else OutOfMemory(fatal=fatal, limit=limit)
    return Ending(code=code, usage=Usage(wall=1), out_of_memory=killing, from_outside=from_outside)


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (ending(-9, from_outside="Somebody killed its shim"), "Somebody killed its shim"),
        (ending(255, from_outside="Somebody killed its shim"), "Somebody killed its shim"),
        (ending(-9), "sent signal SIGKILL"),
        (ending(-15), "sent signal SIGTERM"),
        (ending(-9, limit=Limit.HOST), "the host had no memory left"),
        (ending(-9, limit=Limit.ALL_WORKLOADS), "all workloads together"),
    ],
)
def test_what_others_did_before_it_began_is_not_its_own_doing(ended: Ending, words: str) -> None:
    assert words in ended.not_its_own_doing


@pytest.mark.parametrize(
    "ended",
    [
        ending(0),
        ending(1),
        ending(-11),
        ending(-6),
        ending(-9, limit=Limit.OWN),
        ending(-9, limit=Limit.OWN, fatal=False, from_outside="Somebody killed its shim"),
        ending(1, limit=Limit.HOST, fatal=False),
    ],
)
def test_its_programs_end_and_its_own_limit_are(ended: Ending) -> None:
    """An image whose Airflow can't be imported, or a limit that is too low for it, will be so the next time."""
    assert ended.not_its_own_doing == ""

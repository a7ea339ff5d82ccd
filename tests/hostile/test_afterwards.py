"""What is left of a hostile program: nothing, for its neighbour, for who comes next, and on the host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.hostile.conftest import KINDS, TASKS, marked, program
from tests.hostile.test_rows import name_of
from tests.zygote.at_work.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.conftest import Kind, Report

pytestmark = pytest.mark.root

#: What a process finds that nobody was before.
NOTHING = {
    "modules": [],
    "path": [],
    "environment": [],
    "signals": [],
    "umask": 0o22,
    "name": False,
    "limit": False,
    "files": [],
    "ipc": [0, 0, 0],
    "processes": [],
}

each_kind = pytest.mark.parametrize("kind", KINDS, ids=name_of)


@each_kind
def test_who_comes_next_finds_nothing(reports: Callable[[Kind], Report], kind: Kind) -> None:
    assert reports(kind).remains == NOTHING


@each_kind
def test_a_neighbour_of_the_same_user_notices_nothing(reports: Callable[[Kind], Report], kind: Kind) -> None:
    assert reports(kind).neighbour == {"signals": [], "nice": 0, "first": 0}


@each_kind
def test_no_daemon_outlives_its_workload_and_the_zygote_lives(reports: Callable[[Kind], Report], kind: Kind) -> None:
    report = reports(kind)
    assert (report.left, report.same_zygote) == ([], True)


@pytest.mark.parametrize("kind", TASKS, ids=name_of)
def test_a_container_ends_with_its_worker_whatever_its_task_does(hosts: Callable[[Kind], Any], kind: Kind) -> None:
    stubborn = (
        "import signal as s, os\n"
        "for number in (s.SIGSTOP, s.SIGTSTP, s.SIGKILL): os.kill(1, number)\n"
        "for number in set(s.Signals) - {s.SIGSTOP, s.SIGKILL}: s.signal(number, s.SIG_IGN)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    with hosts(kind) as host:
        text = program("remains", {}).rpartition("import json")[0]
        mark = host.place.mark
        running = host.start(f"{text}\ndaemonise({mark!r})\n{stubborn}", cfg="stop_grace_period = 1s")
        running.until(lambda: "up" in running.stdout)
        until(lambda: len(marked(mark)) == 1, "the task's daemon")
        pid = running.workload.container.pid
        running.workload.connection.cut()  # as the kernel does when the worker is killed
        until(lambda: not Path(f"/proc/{pid}").exists(), "the end of a container without a worker")
        assert marked(mark) == []

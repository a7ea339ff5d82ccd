"""Turns on a host that is full."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from airflow_isolation.errors import HostTrouble, SpecRefused
from airflow_isolation.node import admission
from airflow_isolation.node.admission import Admission, Capacity, Demand, capacity_of
from airflow_isolation.settings.effective import NodeSettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

GIB = 1024**3


def in_a_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 60)

    asyncio.run(bounded())


def has_come(turn: admission.Turn) -> bool:
    return turn.answer.done() and turn.answer.result()


def test_who_does_not_fit_waits_in_order_until_somebody_leaves() -> None:
    async def test() -> None:
        host = Admission(Capacity(memory=4 * GIB))
        first, second, third, fourth = (host.ask(name, Demand(2 * GIB)) for name in ("a", "b", "c", "d"))
        assert [has_come(turn) for turn in (first, second, third, fourth)] == [True, True, False, False]
        second.release()
        second.release()
        assert [has_come(turn) for turn in (third, fourth)] == [True, False]
        first.release()
        assert has_come(fourth)

    in_a_loop(test)


def test_a_large_task_is_passed_for_a_while_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        host = Admission(Capacity(memory=4 * GIB))
        running = host.ask("running", Demand(2 * GIB))
        large = host.ask("large", Demand(4 * GIB))
        assert has_come(host.ask("small", Demand(GIB)))
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + admission.PASSED_SECONDS + 1)
        late = host.ask("late", Demand(GIB))
        assert not has_come(late)
        running.release()
        assert [has_come(turn) for turn in (large, late)] == [False, False]

    in_a_loop(test)


def test_what_never_fits_is_refused_at_once() -> None:
    async def test() -> None:
        host = Admission(Capacity(memory=4 * GIB, cpus=2))
        with pytest.raises(SpecRefused, match=r"asks for 5 GiB and 1 core, and this host has 4 GiB and 2 cores"):
            host.ask("huge", Demand(5 * GIB, 1))
        with pytest.raises(SpecRefused, match="capacity_cpus"):
            host.ask("broad", Demand(GIB, 3))
        assert has_come(host.ask("fits", Demand(4 * GIB, 2)))

    in_a_loop(test)


def test_who_waits_is_told_for_what_and_behind_whom() -> None:
    async def test() -> None:
        told: list[str] = []
        host = Admission(Capacity(memory=4 * GIB))
        running = host.ask("sales.load", Demand(3 * GIB))
        first = host.ask("sales.train", Demand(4 * GIB))
        second = host.ask("sales.test", Demand(2 * GIB))

        def tell(why: str) -> None:
            told.append(why)
            first.release()
            running.release()

        assert await host.wait(second, seconds=30, tell=tell)
        assert told == [
            "2 GiB. Of this host's 4 GiB running tasks (1) have 3 GiB. Before it in line: 1, first sales.train",
        ]
        assert not await host.wait(first, seconds=30, tell=tell), "it is over"

    in_a_loop(test)


def test_who_has_waited_too_long_is_put_off_and_makes_room_in_the_line() -> None:
    async def test() -> None:
        host = Admission(Capacity(memory=4 * GIB))
        running = host.ask("running", Demand(3 * GIB))
        waiting = host.ask("waiting", Demand(2 * GIB))
        with pytest.raises(HostTrouble, match=r"no room for the task within 0 seconds\. It waited for 2 GiB"):
            await host.wait(waiting, seconds=0, tell=lambda _: None)
        running.release()
        assert not has_come(waiting)
        assert has_come(host.ask("next", Demand(4 * GIB)))

    in_a_loop(test)


def test_what_runs_already_counts_though_it_does_not_fit() -> None:
    async def test() -> None:
        host = Admission(Capacity(memory=GIB))
        found = host.occupy("found", Demand(2 * GIB))
        waiting = host.ask("waiting", Demand(GIB))
        assert not has_come(waiting)
        found.release()
        assert has_come(waiting)

    in_a_loop(test)


def test_without_admission_everything_fits() -> None:
    settings = NodeSettings(node_timeout=1, admission=False, admission_timeout=1, capacity_memory=1)
    assert capacity_of(settings, 1).holds(Demand(1 << 60, 1e6))


def test_a_host_keeps_a_reserve() -> None:
    settings = NodeSettings(node_timeout=1, admission=True, admission_timeout=1)
    found = capacity_of(settings, None)
    assert found.memory is not None
    assert found.cpus is None
    assert 0 < found.memory < psutil.virtual_memory().total - admission.RESERVE

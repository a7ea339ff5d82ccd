"""The few slots of a host for workloads that import Airflow although they were to be forked."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from airflow_isolation.bridge import workload
from airflow_isolation.bridge.fresh_slot import await_slot
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.bridge.zygote import ZygotePlan, ZygoteUnavailable
from airflow_isolation.container_spec import ContainerSpec
from airflow_isolation.runtime.interface import Image

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

HOLD = """
import sys
import time
from pathlib import Path
from airflow_isolation.bridge.fresh_slot import await_slot
slot = await_slot(Path(sys.argv[1]), end=time.monotonic() + 30, slots=1)
print("held", flush=True)
input()
"""


def is_free(state_dir: Path) -> bool:
    """Nobody waits: either there is one at once, or what else is waited for has come."""
    slot = await_slot(state_dir, end=time.monotonic() + 30, unless=lambda: True, slots=1)
    if slot is None:
        return False
    slot.close()
    return True


def test_a_slot_is_one_holders_until_it_is_closed(tmp_path: Path) -> None:
    slot = await_slot(tmp_path, end=time.monotonic() + 30, slots=1)
    assert slot is not None
    assert not is_free(tmp_path)
    slot.close()
    slot.close()
    assert is_free(tmp_path)


def test_there_are_as_many_as_there_are_cores(tmp_path: Path) -> None:
    held = []
    while (slot := await_slot(tmp_path, end=time.monotonic() + 30, unless=lambda: True)) is not None:
        held.append(slot)
    assert len(held) == len(list((tmp_path / "fresh").iterdir())) > 0
    for slot in held:
        slot.close()


def test_a_dead_holder_holds_none(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert not is_free(tmp_path)
        holder.kill()
    assert is_free(tmp_path)


def test_who_waits_in_vain_goes_on_without_one(tmp_path: Path) -> None:
    first = await_slot(tmp_path, end=time.monotonic() + 30, slots=1)
    assert first is not None
    with first:
        slot = await_slot(tmp_path, end=0, slots=1)
        assert slot is not None
        slot.close()
        assert not is_free(tmp_path)


def test_a_workload_has_one_bound_for_all_its_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that it is about to get a slot there is a zygote again, and that one can't fork either."""
    ends = []

    def waited_for(_: Path, *, end: float, unless: object = None) -> ExitStack | None:
        ends.append(end)
        return None if unless else ExitStack()

    def unavailable(*_: object, **__: object) -> Any:
        raise ZygoteUnavailable("it died")

    monkeypatch.setattr(workload, "_forked", unavailable)
    monkeypatch.setattr(workload, "_fresh", lambda *_, **__: "fresh")
    monkeypatch.setattr(workload, "await_slot", waited_for)
    what = Launch(
        id="task-1",
        spec=ContainerSpec(image="i:1", argv=("x",)),
        image=Image(reference="i:1", digest="sha256:1"),
        purpose="task",
        environment={},
        airflow="3.3.2",
    )
    plan = ZygotePlan(key="key", launch=what, user="")
    assert workload.begin(None, what, (), state_dir=tmp_path, plan=plan) == "fresh"  # type: ignore[arg-type, comparison-overlap]
    assert len(ends) == workload.FORK_TRIES + 1
    assert len(set(ends)) == 1

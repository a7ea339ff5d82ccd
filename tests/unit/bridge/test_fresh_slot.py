"""The few slots of a host for workloads that import Airflow although they were to be forked."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from airflow_isolation.bridge.fresh_slot import await_slot

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from airflow_isolation.bridge.fresh_slot import await_slot
slot = await_slot(Path(sys.argv[1]), seconds=30, slots=1)
print("held", flush=True)
input()
"""


def is_free(state_dir: Path) -> bool:
    """Nobody waits: either there is one at once, or what else is waited for has come."""
    slot = await_slot(state_dir, seconds=30, unless=lambda: True, slots=1)
    if slot is None:
        return False
    slot.close()
    return True


def test_a_slot_is_one_holders_until_it_is_closed(tmp_path: Path) -> None:
    slot = await_slot(tmp_path, seconds=30, slots=1)
    assert slot is not None
    assert not is_free(tmp_path)
    slot.close()
    slot.close()
    assert is_free(tmp_path)


def test_there_are_as_many_as_there_are_cores(tmp_path: Path) -> None:
    held = []
    while (slot := await_slot(tmp_path, seconds=30, unless=lambda: True)) is not None:
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
    first = await_slot(tmp_path, seconds=30, slots=1)
    assert first is not None
    with first:
        slot = await_slot(tmp_path, seconds=0, slots=1)
        assert slot is not None
        slot.close()
        assert not is_free(tmp_path)

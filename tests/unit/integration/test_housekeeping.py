"""The DAG processor's thread that prunes: whatever one look meets, the next still comes."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from airflow_isolation.errors import RuntimeUnreachable
from airflow_isolation.integration.dag_processing import housekeeping
from airflow_isolation.integration.dag_processing.housekeeping import Housekeeping

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.settings.effective import ConnectionSettings


@pytest.mark.parametrize(
    "trouble", [RuntimeUnreachable("nobody is there"), PermissionError("not yours"), ValueError("no record of ours")]
)
def test_the_next_look_comes_whatever_the_last_one_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    looks: list[float] = []
    looked_again = threading.Event()

    def failing_prune(_: Any, *, every: float, **__: Any) -> None:
        looks.append(every)
        if len(looks) == 1:
            raise trouble
        looked_again.set()

    monkeypatch.setattr(housekeeping, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(housekeeping, "connect", lambda _: nullcontext())
    monkeypatch.setattr(housekeeping, "prune_when_due", failing_prune)
    keeper = Housekeeping(cast("ConnectionSettings", SimpleNamespace(state_dir=tmp_path)))
    keeper.start()
    assert looked_again.wait(30)
    keeper.stop()
    assert looks[:2] == [0.0, 0.0]

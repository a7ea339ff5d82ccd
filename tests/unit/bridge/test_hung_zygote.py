"""A zygote that does not answer is replaced, and trouble with that is told."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation.bridge import zygote

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_only_who_replaces_it_already_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = zygote.Zygote(container="zygote-1", pid=1, directory=tmp_path)

    def unanswered(*_: Any, **__: Any) -> None:
        raise TimeoutError("the file system did not answer")

    monkeypatch.setattr(zygote, "_recorded", lambda _: found)
    monkeypatch.setattr(zygote, "remove_zygote", unanswered)
    with structlog.testing.capture_logs() as said:
        with zygote.alone_in(tmp_path, end=time.monotonic()):
            zygote.replace_hung(None, found, state_dir=tmp_path)  # type: ignore[arg-type]
        assert said == []
        zygote.replace_hung(None, found, state_dir=tmp_path)  # type: ignore[arg-type]
    assert [line["error"] for line in said] == ["the file system did not answer"]

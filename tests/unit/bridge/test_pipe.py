"""The channels of a workload: what it prints to can be opened by its path, and ends when the last writer has gone."""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.pipe import Channels, PipeEnd, open_channels

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sides() -> Iterator[tuple[Channels, Channels]]:
    made = open_channels()
    yield made
    for side in made:
        side.close()
        side.close()


def readable(channel: PipeEnd) -> bool:
    return bool(select.select([channel], (), (), 0)[0])


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_can_be_opened_by_its_path_by_any_user(sides: tuple[Channels, Channels], name: str) -> None:
    ours, theirs = (getattr(side, name) for side in sides)
    assert stat.S_IMODE(os.fstat(theirs.fileno()).st_mode) == 0o666
    Path(f"/proc/self/fd/{theirs.fileno()}").write_text("a line\n")
    assert ours.recv(100) == b"a line\n"


def test_an_end_is_heard_when_nobody_can_write_any_more(sides: tuple[Channels, Channels]) -> None:
    ours, theirs = sides[0].stdout, sides[1].stdout
    assert isinstance(ours, PipeEnd)
    ours.setblocking(False)
    assert not readable(ours)
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    # What writes still waits for room.
    assert os.get_blocking(theirs.fileno())
    theirs.close()
    assert readable(ours)
    assert ours.recv(1) == b""


def test_what_is_closed_has_no_descriptor(sides: tuple[Channels, Channels]) -> None:
    end = sides[0].stdout
    end.close()
    assert end.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        end.recv(1)


def test_a_side_is_in_the_agents_order_and_nothing_is_inherited(sides: tuple[Channels, Channels]) -> None:
    for side in sides:
        assert side.in_order() == (side.requests, side.stdout, side.stderr, side.logs)
        assert not any(os.get_inheritable(channel.fileno()) for channel in side.in_order())

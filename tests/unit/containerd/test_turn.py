"""One pull of an image at a time, for threads and processes."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.containerd.turn import turn

if TYPE_CHECKING:
    from pathlib import Path

ENOUGH = 20.0


def soon() -> float:
    return time.monotonic() + ENOUGH


def test_turns_do_not_overlap(tmp_path: Path) -> None:
    inside = 0
    most = 0

    def pull() -> None:
        nonlocal inside, most
        with turn(tmp_path, "a:1", end=soon()):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(pull) for _ in range(16)]:
            done.result(ENOUGH)
    assert most == 1


def test_the_next_is_told_when_the_last_pull_began(tmp_path: Path) -> None:
    with turn(tmp_path, "a:1", end=soon()) as last:
        assert last.began() == 0.0
        last.record(1234.5)
    with turn(tmp_path, "a:1", end=soon()) as last:
        assert last.began() == 1234.5


def test_a_failed_pull_leaves_the_word_of_the_one_before(tmp_path: Path) -> None:
    with turn(tmp_path, "a:1", end=soon()) as last:
        last.record(1.0)
    with pytest.raises(LookupError), turn(tmp_path, "a:1", end=soon()):
        raise LookupError
    with turn(tmp_path, "a:1", end=soon()) as last:
        assert last.began() == 1.0


def test_other_images_do_not_wait(tmp_path: Path) -> None:
    with turn(tmp_path, "a:1", end=soon()), turn(tmp_path, "b:1", end=soon()) as last:
        assert last.began() == 0.0


def test_who_waits_too_long_is_told(tmp_path: Path) -> None:
    with (
        turn(tmp_path, "a:1", end=soon()),
        pytest.raises(TimeoutError, match="somebody else"),
        turn(tmp_path, "a:1", end=time.monotonic()),
    ):
        pass


def test_a_dead_process_gives_up_its_turn(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from airflow_isolation.containerd.turn import turn\n"
        "with turn(Path(sys.argv[1]), 'a:1', end=0): os._exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=ENOUGH).returncode == 3
    with turn(tmp_path, "a:1", end=time.monotonic()) as last:
        assert last.began() == 0.0


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught, turn(tmp_path / "file", "a:1", end=soon()):
        pass
    assert str(caught.value.filename).startswith(str(tmp_path))

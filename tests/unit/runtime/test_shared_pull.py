"""One pull for many callers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.errors import ImagePullFailed
from airflow_isolation.runtime.shared_pull import pull_once

if TYPE_CHECKING:
    from pathlib import Path


class Pulls:
    """Counts pulls; each lasts until it is let go on, and those in ``failing`` fail."""

    def __init__(self, *failing: int) -> None:
        self.count = 0
        self.failing = failing
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, _: float) -> None:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(20)
        if self.count in self.failing:
            raise ImagePullFailed("the registry said no")


def test_callers_at_the_same_time_make_one_pull(tmp_path: Path) -> None:
    pulls = Pulls()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(pull_once, tmp_path, "a:1", pulls, timeout=20) for _ in range(8)]
        assert pulls.begun.wait(20)
        # Long enough for all to have opened the lock: who comes later has asked later, and may pull anew.
        time.sleep(0.3)
        pulls.go_on.set()
        for one in waiting:
            one.result(20)
    assert pulls.count == 1
    assert list(tmp_path.iterdir()) == []


def test_after_a_failed_pull_the_next_caller_tries_again(tmp_path: Path) -> None:
    pulls = Pulls(1)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(pull_once, tmp_path, "a:1", pulls, timeout=20) for _ in range(2)]
        assert pulls.begun.wait(20)
        pulls.go_on.set()
        failed = [one.exception(20) for one in waiting]
    assert [type(error) for error in failed if error] == [ImagePullFailed]
    assert pulls.count == 2
    assert list(tmp_path.iterdir()) == []


def test_a_later_caller_pulls_anew(tmp_path: Path) -> None:
    pulls = Pulls()
    pulls.go_on.set()
    for _ in range(2):
        pull_once(tmp_path, "a:1", pulls, timeout=20)
    assert pulls.count == 2


def test_other_images_do_not_wait(tmp_path: Path) -> None:
    held, free = Pulls(), Pulls()
    free.go_on.set()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pull_once, tmp_path, "a:1", held, timeout=20)
        assert held.begun.wait(20)
        pull_once(tmp_path, "b:1", free, timeout=20)
        assert free.count == 1
        held.go_on.set()
        waiting.result(20)


def test_who_waits_too_long_is_told(tmp_path: Path) -> None:
    pulls = Pulls()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pull_once, tmp_path, "a:1", pulls, timeout=20)
        assert pulls.begun.wait(20)
        with pytest.raises(ImagePullFailed, match="a:1"):
            pull_once(tmp_path, "a:1", pulls, timeout=0.1)
        pulls.go_on.set()
        waiting.result(20)

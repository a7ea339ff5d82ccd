"""Directories of workers shown on the host, with real mounts."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from tests.airflow_home import short_directory

from airflow_isolation.errors import HostTrouble, SpecRefused
from airflow_isolation.node import trees as module
from airflow_isolation.node.trees import Trees, left_trees

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.root


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory("ai-trees-") as directory:
        (directory / "dags").mkdir()
        (directory / "dags" / "sales.py").write_text("# a DAG\n")
        yield directory


@pytest.fixture
def trees(place: Path) -> Iterator[Trees]:
    with Trees(place / "s", daemon_pid=lambda: 0) as found:
        yield found
    assert not list((place / "s" / "trees").iterdir()), "nothing stays mounted"


@contextmanager
def shown(trees: Trees, paths: Sequence[Path | str], namespace: str = "/proc/self/ns/mnt") -> Iterator[list[Path]]:
    opened = [os.open(path, os.O_RDONLY) for path in (namespace, *paths)]
    try:
        with trees.shown(opened[1:], namespace=opened[0]) as found:
            yield list(found)
    finally:
        for number in opened:
            os.close(number)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=60)


def unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=60)


def test_a_directory_is_shown_read_only_and_once(trees: Trees, place: Path) -> None:
    with shown(trees, [place / "dags"]) as (first,):
        assert (first / "sales.py").read_text() == "# a DAG\n"
        with pytest.raises(OSError, match="Read-only file system"):
            (first / "sales.py").write_text("mine")
    with shown(trees, [place / "dags"]) as (again,):
        assert again == first


def test_a_directory_that_takes_the_place_of_another_is_another(trees: Trees, place: Path) -> None:
    with shown(trees, [place / "dags"]) as (first,):
        pass
    (place / "dags").rename(place / "old")
    (place / "dags").mkdir()
    with shown(trees, [place / "dags"]) as (second,):
        assert second != first
        assert list(second.iterdir()) == []


def test_what_is_mounted_below_is_there_and_stays_mounted_when_the_copy_goes(trees: Trees, place: Path) -> None:
    """A copy that heard of its original would take this with it."""
    below = place / "dags" / "below"
    below.mkdir()
    mount("-t", "tmpfs", "tmpfs", str(below))
    try:
        mount("--make-shared", str(below))
        (below / "file").touch()
        with shown(trees, [place / "dags"]) as (tree,):
            assert (tree / "below" / "file").exists()
            with pytest.raises(OSError, match="Read-only file system"):
                (tree / "below" / "other").touch()
        trees.release_idle(older_than=0.0)
        assert (below / "file").exists()
    finally:
        unmount(below)


def test_a_mount_that_may_not_be_copied_is_refused_in_words(trees: Trees, place: Path) -> None:
    private = place / "private"
    private.mkdir()
    mount("-t", "tmpfs", "tmpfs", str(private))
    try:
        mount("--make-unbindable", str(private))
        with pytest.raises(HostTrouble, match="may be copied"), shown(trees, [private]):
            pass
    finally:
        unmount(private)


def test_what_is_no_directory_or_no_namespace_is_refused(trees: Trees, place: Path) -> None:
    with pytest.raises(SpecRefused, match="something else than a directory"), shown(trees, [place / "dags/sales.py"]):
        pass
    with pytest.raises(HostTrouble, match="mount namespace"), shown(trees, [place / "dags"], "/proc/self/ns/net"):
        pass


def test_there_are_not_ever_more_of_them(trees: Trees, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TREES", 3)
    for number in range(6):
        directory = place / str(number)
        directory.mkdir()
        with shown(trees, [directory]):
            assert len(list((place / "s" / "trees").iterdir())) <= 3


def test_one_in_use_is_not_taken_away(trees: Trees, place: Path) -> None:
    with shown(trees, [place / "dags"]) as (tree,):
        trees.release_idle(older_than=0.0)
        assert (tree / "sales.py").exists()
    trees.release_idle(older_than=0.0)
    assert not tree.exists()


def test_what_lives_is_not_left_over(trees: Trees, place: Path) -> None:
    with shown(trees, [place / "dags"]):
        assert left_trees(place / "s", daemon_pid=0) == ()

"""`hack/bench tasks --soak`: growth, and what is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.unit.hack.bench_modules import bench_module

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

soak = bench_module("soak")
MIB = 1024 * 1024


def look(tasks: int, memory: int, descriptors: int) -> Any:
    return soak.Look(tasks, tasks / 2, {"memory of the worker": memory, "descriptors of the worker": descriptors})


def test_growth_is_that_from_the_first_look_to_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    looks = [look(500, 100 * MIB, 20), look(1000, 103 * MIB, 25), look(1500, 101 * MIB, 20)]
    soak.SoakReport("fork", looks).show()
    lines = capsys.readouterr().out.splitlines()
    memory, descriptors = (next(line for line in lines if line.startswith(what)) for what in ("memory", "descriptors"))
    assert memory.split()[-8:] == ["100.0", "MiB", "103.0", "MiB", "101.0", "MiB", "+1.0", "MiB"]
    assert descriptors.split()[-4:] == ["20", "25", "20", "+0"]
    assert "2.00 tasks per second, one after another" in lines


def test_every_look_is_kept() -> None:
    kept = soak.SoakReport("fork", [look(500, 1, 2), look(1000, 3, 4)]).as_json()["looks"]
    assert [each["tasks"] for each in kept] == [500, 1000]
    assert kept[1]["descriptors of the worker"] == 4


def test_files_of_a_mounted_root_are_not_those_of_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "id" / "rootfs").mkdir(parents=True)
    (tmp_path / "id" / "rootfs" / "etc").touch()
    (tmp_path / "id" / "config.json").touch()
    assert soak._files(tmp_path) == 2


def test_cgroups_of_this_host_are_found() -> None:
    assert soak._cgroups() > 0

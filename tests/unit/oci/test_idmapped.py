"""Which file systems can be mounted with other ids, by whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from airflow_isolation.oci.idmapped import file_systems, why_no_overlay, why_not_idmapped

if TYPE_CHECKING:
    from pathlib import Path

MOUNTS = [
    ("/", "ext4"),
    ("/proc", "proc"),
    ("/srv", "xfs"),
    ("/srv/data/below", "tmpfs"),
    ("/srv/data-of-others", "nfs4"),
    ("/mnt", "ext4"),
    ("/mnt", "btrfs"),
]


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("/home/me", ["ext4"]),
        ("/srv", ["nfs4", "tmpfs", "xfs"]),
        ("/srv/data", ["tmpfs", "xfs"]),
        ("/srv/data/below/that", ["tmpfs"]),
        ("/srv/database", ["xfs"]),
        ("/srv/data-of-others/a", ["nfs4"]),
        ("/mnt/a", ["btrfs"]),
    ],
)
def test_the_file_system_of_a_path_and_those_below_it(source: str, kinds: list[str]) -> None:
    assert file_systems(source, MOUNTS) == kinds


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that can, on these mounts."""
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    found = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in MOUNTS]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)  # noqa: A006
    program = tmp_path / "a-runtime"
    program.write_text("""#!/bin/sh\necho '{"linux": {"mountExtensions": {"idmap": {"enabled": true}}}}'\n""")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("/home/me", ""),
        ("/srv/database", ""),
        ("/srv/data", "Linux 6.1 can't map ids on tmpfs"),
        ("/srv/data-of-others", "Linux 6.1 can't map ids on nfs4"),
    ],
)
def test_why_not(runtime: str, source: str, why: str) -> None:
    assert why_not_idmapped(source, runtime=runtime) == why


def test_a_runtime_that_does_not_say_so_can_not(runtime: str, tmp_path: Path) -> None:
    other = tmp_path / "older"
    for answer in (
        "{}",
        '{"linux": null}',
        '{"linux": {"mountExtensions": {"idmap": {"enabled": false}}}}',
        "[]",
        "no",
    ):
        other.unlink(missing_ok=True)
        other.write_text(f"#!/bin/sh\necho '{answer}'\n")
        other.chmod(0o755)
        assert why_not_idmapped("/", runtime=str(other)) == f"{other} can't map ids, as runc can since 1.2"


@pytest.mark.parametrize(
    ("release", "why"),
    [
        ("5.19.0", ""),
        ("6.1.0-18-amd64", ""),
        ("5.18.19", "Linux 5.18 can't map ids below an overlay, as 5.19 can"),
        ("5.2.1", "Linux 5.2 can't map ids below an overlay, as 5.19 can"),
    ],
)
def test_an_overlay_takes_mapped_layers_since(release: str, why: str) -> None:
    assert why_no_overlay(release) == why

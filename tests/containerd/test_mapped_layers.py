"""Layers with other owners: mounted once, found again, never for longer than they are needed, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.containerd import mapped_layers as module
from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.containerd.mapped_layers import MappingError, mapped_layers, unmap_unless, why_not_mapped
from airflow_isolation.containerd.mount_points import dress, make_mount_points

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

FIRST, SIZE = 1_800_000_000, 65536


@pytest.fixture
def place() -> Iterator[Path]:
    """What is to have nothing in it at the end, and nothing mounted below it."""
    with tempfile.TemporaryDirectory(prefix="ai-roots-", dir="/var/tmp") as directory:
        yield Path(directory, "state", "roots")
        assert mounted(directory) == []


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    """Two, of which the upper one has a file of uid 50000, gid 0 that nobody else may read."""
    made = [tmp_path / name for name in ("upper", "lower")]
    for layer in made:
        layer.mkdir(mode=0o755)
    private = made[0] / "private"
    private.write_text("secret")
    private.chmod(0o600)
    os.chown(private, 50000, 0)
    return [str(layer) for layer in made]


def mounted(below: Path | str, pid: int | str = "self") -> list[str]:
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4].startswith(f"{below}/")]


@contextmanager
def shown(place: Path, layers: list[str], first: int = FIRST, pid: int = 0) -> Iterator[tuple[str, ...]]:
    end = time.monotonic() + 30
    with mapped_layers(place, layers, first=first, size=SIZE, pid=pid or os.getpid(), end=end) as directories:
        yield directories


def clean(place: Path, *needed: int, pid: int = 0, dry_run: bool = False) -> list[str]:
    gone = unmap_unless(needed.__contains__, place, pid=pid or os.getpid(), dry_run=dry_run)
    return [directory.name.partition("-")[0] for directory in gone]


def test_files_have_the_ids_of_the_namespace_and_nobody_can_write(place: Path, layers: list[str]) -> None:
    assert why_not_mapped(place, layers, first=FIRST, size=SIZE, pid=os.getpid()) == ""
    assert not place.exists()
    with shown(place, layers) as directories:
        status = Path(directories[0], "private").stat()
        assert (status.st_uid, status.st_gid) == (FIRST + 50000, FIRST)
        assert Path(directories[1]).stat().st_uid == FIRST
        lines = mounted(place)
        assert len(lines) == 1 + len(layers)
        for line in lines[1:]:
            options, propagation = line.split()[5:7]
            assert {"ro", "nosuid", "nodev", "idmapped"} <= set(options.split(","))
            assert propagation == "-"
        with pytest.raises(OSError, match="Read-only file system"):
            Path(directories[0], "new").touch()
        assert place.stat().st_mode & 0o777 == 0o700
    assert clean(place) == [str(FIRST)]
    assert list(place.parent.iterdir()) == []
    assert Path(layers[0], "private").stat().st_uid == 50000


def test_they_are_mounted_once_for_all_who_ask_for_the_same(place: Path, layers: list[str]) -> None:
    with ThreadPoolExecutor(8) as many:

        def ask(_: int) -> tuple[str, ...]:
            with shown(place, layers) as directories:
                return directories

        assert len(set(many.map(ask, range(16)))) == 1
    before = mounted(place)
    assert len(before) == 1 + len(layers)
    with shown(place, layers) as directories:
        assert mounted(place) == before
    with shown(place, layers, FIRST + SIZE) as others:
        assert not set(others) & set(directories)
    assert sorted(clean(place)) == [str(FIRST), str(FIRST + SIZE)]


def test_only_what_nobody_needs_or_holds_is_taken_away(place: Path, layers: list[str]) -> None:
    with shown(place, layers) as directories, shown(place, layers, FIRST + SIZE):
        assert clean(place) == []
    assert clean(place, FIRST, dry_run=True) == [str(FIRST + SIZE)]
    assert len(mounted(place)) == 2 * (1 + len(layers))
    assert clean(place, FIRST) == [str(FIRST + SIZE)]
    assert Path(directories[0], "private").exists()
    assert clean(place) == [str(FIRST)]
    assert clean(place) == []


def test_what_a_dead_worker_left_half_made_is_made_anew(place: Path, layers: list[str]) -> None:
    with shown(place, layers) as directories:
        pass
    subprocess.run(["umount", directories[1]], check=True)
    with shown(place, layers) as again:
        assert again == directories
        assert Path(again[1]).stat().st_uid == FIRST
        assert len(mounted(place)) == 1 + len(layers)
    clean(place)


def test_a_layer_that_was_unpacked_anew_at_the_same_place_is_mounted_anew(
    place: Path, layers: list[str], tmp_path: Path
) -> None:
    with shown(place, layers):
        pass
    lower = Path(layers[1])
    lower.rmdir()
    lower.mkdir()
    (lower / "new").touch()
    with shown(place, layers) as directories:
        assert [path.name for path in Path(directories[1]).iterdir()] == ["new"]
    clean(place)


def test_they_are_mounted_where_the_daemon_sees_them_and_nowhere_else(place: Path, layers: list[str]) -> None:
    """A daemon whose mount namespace is not the worker's."""
    program = "import os; os.read(0, 1)"
    daemon = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", program], stdin=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 30
        while Path(f"/proc/{daemon.pid}/ns/mnt").stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino:
            assert time.monotonic() < end
            time.sleep(0.01)
        with shown(place, layers, pid=daemon.pid) as directories:
            assert mounted(place) == []
            assert len(mounted(place, daemon.pid)) == 1 + len(layers)
            before = mounted(place, daemon.pid)
        with shown(place, layers, pid=daemon.pid) as again:
            assert (again, mounted(place, daemon.pid)) == (directories, before)
        assert clean(place, pid=daemon.pid) == [str(FIRST)]
        assert mounted(place, daemon.pid) == []
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.communicate()


def test_what_the_host_mounts_does_not_come_into_other_mount_namespaces(place: Path, layers: list[str]) -> None:
    """As in a service of systemd, which sees what is mounted later."""
    program = f"""
import subprocess, sys, time
from pathlib import Path
from tests.containerd.test_mapped_layers import clean, mounted, shown
place, layers = Path({str(place)!r}), {layers!r}
service = subprocess.Popen(["unshare", "--mount", "--propagation", "slave", "sleep", "60"])
while Path(f"/proc/{{service.pid}}/comm").read_text() != "sleep\\n":
    time.sleep(0.01)
with shown(place, layers):
    print(len(mounted(place)), [line for line in mounted(place, service.pid) if "idmapped" in line])
clean(place)
print(mounted(place), mounted(place, service.pid))
service.kill()
service.wait()
"""
    command = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", program]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("3 []\n[] []\n", "")


def test_what_can_not_be_mapped_is_told_in_words(place: Path, layers: list[str], tmp_path: Path) -> None:
    def why(place: Path, layers: list[str], pid: int = os.getpid()) -> str:
        return why_not_mapped(place, layers, first=FIRST, size=SIZE, pid=pid)

    assert why(place, ["/proc"]) == "mapping the ids of /proc: Invalid argument"
    assert "No such file" in why(place, [str(tmp_path / "gone")])
    assert "No such file" in why(place, layers, pid=2**22 + 1)
    assert why(place, layers, pid=0) == "which process the daemon is can't be told"
    assert "127 layers below" in why(place, layers[:1] * 127)
    assert "because of a character in that path" in why(Path("/var/tmp/a:b"), layers)
    assert not place.exists()
    with pytest.raises(MappingError, match="mapping the ids of /proc"), shown(place, ["/proc"]):
        pass
    clean(place)


def test_a_mount_that_is_made_and_not_seen_is_an_error_and_no_endless_loop(
    place: Path, layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_run", lambda *_, **__: None)  # a program that lies
    with pytest.raises(MappingError, match="can't be seen there"), shown(place, layers):
        pass
    clean(place)


def test_mount_points_have_the_ids_of_the_namespace(tmp_path: Path, layers: list[str]) -> None:
    own = tmp_path / "own"
    own.mkdir()
    ids = range(FIRST, FIRST + SIZE)
    for name, uid, gid in (("home", 50000, 0), ("beyond", SIZE, 5)):
        directory = Path(layers[1], name)
        directory.mkdir()
        os.chown(directory, uid, gid)
        directory.chmod(0o2770)
    targets = [("/home/new/directory", True), ("/beyond/file", False)]
    make_mount_points([str(own), *layers], targets, merged=True, ids=ids)
    dress(own, Path(layers[0]).stat(), ids)

    def look(name: str) -> tuple[int, int, int]:
        status = (own / name).stat()
        return status.st_uid, status.st_gid, status.st_mode & 0o7777

    assert look(".") == (FIRST, FIRST, 0o755)
    assert look("home") == (FIRST + 50000, FIRST, 0o2770)
    assert look("home/new") == look("home/new/directory") == (FIRST, FIRST, 0o755)
    # Whom the namespace does not have is nobody there, and on the host nobody of another image's.
    assert look("beyond") == (SIZE, FIRST + 5, 0o2770)
    assert look("beyond/file")[:2] == (FIRST, FIRST)


def test_a_clean_up_that_takes_the_empty_place_away_meanwhile_harms_nobody(
    place: Path, layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[Path] = []

    def after_a_clean_up(*arguments: Any, **named: Any) -> Any:
        if not gone:
            place.rmdir()
            gone.append(place)
        return locked(*arguments, **named)

    # The moment between making the directory and opening the lock can't be met from outside.
    monkeypatch.setattr(module, "locked", after_a_clean_up)
    with shown(place, layers) as directories:
        assert Path(directories[0], "private").exists()
    assert gone
    clean(place)

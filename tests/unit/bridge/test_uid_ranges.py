"""Each image has uids of its own, whoever asks, and however many at once."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge import uid_ranges
from airflow_isolation.bridge.uid_ranges import configured_range, first_uid, why_no_range
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.settings.effective import UIDS_OF_AN_IMAGE, UidRange

if TYPE_CHECKING:
    from pathlib import Path

SIZE = UIDS_OF_AN_IMAGE

#: Twenty processes, of which every other asks for the uids of the same four images. They begin at once, when the pipe ends.
ASKING = """
import os
import sys
from pathlib import Path
from airflow_isolation.bridge.uid_ranges import first_uid
from airflow_isolation.settings.effective import UidRange
reader, writer = os.pipe()
for process in range(20):
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)
        for number in range(4):
            digest = f"sha256:{process % 10}-{number}"
            first = first_uid(digest, UidRange(1_000_000, 200 * 65536), state_dir=Path(sys.argv[1]))
            os.write(1, f"{digest} {first}\\n".encode())
        os._exit(0)
os.close(writer)
sys.exit(any(os.wait()[1] for _ in range(20)))
"""


def test_twenty_processes_at_once_never_get_overlapping_uids(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", ASKING, str(tmp_path)]
    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    given: dict[str, set[int]] = {}
    for line in done.stdout.splitlines():
        digest, first = line.split()
        given.setdefault(digest, set()).add(int(first))
    assert len(done.stdout.splitlines()) == 80
    assert len(given) == 40
    assert all(len(firsts) == 1 for firsts in given.values())
    firsts = sorted(first for (first,) in given.values())
    assert all(later - earlier >= SIZE for earlier, later in pairwise(firsts))


def test_the_same_image_always_gets_the_same(tmp_path: Path) -> None:
    of = UidRange(1000, 3 * SIZE)
    assert [first_uid(digest, of, state_dir=tmp_path) for digest in "abab"] == [1000, 1000 + SIZE] * 2


def test_all_given_away(tmp_path: Path) -> None:
    of = UidRange(1000, 2 * SIZE + 5)
    first_uid("a", of, state_dir=tmp_path)
    first_uid("b", of, state_dir=tmp_path)
    with pytest.raises(ContainerFailed, match="All uids of the range 1000:131077 are given to 2 images") as caught:
        first_uid("c", of, state_dir=tmp_path)
    assert caught.value.hint == f"Set uid_range to a larger range; each image needs {SIZE}"


def test_a_range_too_small_for_one_image_has_none(tmp_path: Path) -> None:
    with pytest.raises(ContainerFailed, match="given to 0 images"):
        first_uid("a", UidRange(1000, SIZE - 1), state_dir=tmp_path)


def test_another_range_gives_others_and_never_overlaps_the_old(tmp_path: Path) -> None:
    assert first_uid("a", UidRange(100_000, SIZE), state_dir=tmp_path) == 100_000
    shifted = UidRange(100_000 + 10, 3 * SIZE)
    assert first_uid("b", shifted, state_dir=tmp_path) == 100_010 + SIZE
    elsewhere = UidRange(5_000_000, SIZE)
    assert first_uid("a", elsewhere, state_dir=tmp_path) == 5_000_000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": "b"}'])
def test_a_file_that_somebody_else_wrote_is_an_error_and_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "uid-ranges.json").write_bytes(content)
    with pytest.raises(ContainerFailed, match="can't be read or written"):
        first_uid("a", UidRange(1000, SIZE), state_dir=tmp_path)
    assert (tmp_path / "uid-ranges.json").read_bytes() == content


ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    uid_ranges._found.cache_clear()
    directory = tmp_path / "etc"
    directory.mkdir()
    return directory


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's, whoever runs the tests."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(uid_ranges, "_has_all_ids", lambda: True)


def test_what_is_set_wins_and_none_is_none(etc: Path) -> None:
    (etc / "subuid").write_text(f"{ME}:100000:65536\n")
    assert configured_range(UidRange(5, 70_000), etc=etc) == UidRange(5, 70_000)
    assert configured_range(UidRange(0, 0), etc=etc) is None
    assert why_no_range(UidRange(0, 0)) == "uid_range is none"


def test_without_a_setting_it_is_the_users_entry(etc: Path) -> None:
    subuid = etc / "subuid"
    subuid.write_text(f"someone-else:1:900000\n# {ME}\n{ME}:x:y\n{ME}:200000:65535\n{ME}:300000:131072\n")
    assert configured_range(None, etc=etc) == UidRange(300_000, 131_072)
    subuid.write_text(f"{os.geteuid()}:400000:65536\n")
    assert configured_range(None, etc=etc) == UidRange(400_000, 65_536)


def test_nobody_but_the_host_s_root_has_uids_without_an_entry(etc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (etc / "subuid").write_text("someone-else:1:900000\n")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert configured_range(None, etc=etc) is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(uid_ranges, "_has_all_ids", lambda: False)
    assert configured_range(None, etc=etc) is None


def test_a_changed_file_is_read_anew(etc: Path) -> None:
    for first in (100_000, 2_000_000):
        (etc / "subuid").write_text(f"{os.geteuid()}:{first}:65536\n")
        assert configured_range(None, etc=etc) == configured_range(None, etc=etc) == UidRange(first, 65_536)


FIRST, STOP = 524_288, 1_879_048_192


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("files", "begin"),
    [
        ({}, FIRST),
        # Whom it does not touch.
        (
            {"passwd": "nobody:x:65534:65534::/:/bin/false\n", "group": "users:x:100:\n", "subuid": "a:100000:65536\n"},
            FIRST,
        ),
        ({"passwd": f"far:x:{STOP}:{STOP}::/:\n", "subuid": f"far:{STOP}:2147483648\n"}, FIRST),
        ({"passwd": "broken\n::\nx:x:y:z\n\n", "subuid": "x\nx:1\nx:y:z\nx:1:2:3\n"}, FIRST),
        # Past everybody, in whole parts.
        ({"subuid": "a:500000:65536\n"}, FIRST + SIZE),
        ({"subgid": "a:600000:65536\n"}, FIRST + 3 * SIZE),
        ({"passwd": f"a:x:{FIRST}:0::/:\n"}, FIRST + SIZE),
        ({"group": "a:x:1000000:\n"}, 1_048_576),
        ({"subuid": "a:1000000:1000000\n", "passwd": "b:x:700000:0::/:\n"}, 2_031_616),
        ({"subuid": "a:524288:65536\nb:589824:65536\n"}, FIRST + 2 * SIZE),
    ],
)
def test_root_has_what_is_set_aside_for_containers_past_everybody(etc: Path, files: dict[str, str], begin: int) -> None:
    for name, text in files.items():
        (etc / name).write_text(text)
    found = configured_range(None, etc=etc)
    assert found == UidRange(begin, STOP - begin)
    assert found.first % SIZE == 0


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("entry", [f"a:{STOP - 10}:5", "a:1000000:2000000000"])
def test_when_others_have_them_all_there_is_none(etc: Path, entry: str) -> None:
    (etc / "subuid").write_text(f"{entry}\n")
    assert configured_range(None, etc=etc) is None
    assert "/etc/subuid" in why_no_range(None)

"""Each image has uids of its own, whoever asks, and however many at once."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.bridge.uid_ranges import configured_range, first_uid
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


def test_what_is_set_wins_and_none_is_none(tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    subuid.write_text(f"{pwd.getpwuid(os.geteuid()).pw_name}:100000:65536\n")
    assert configured_range(UidRange(5, 70_000), subuid=subuid) == UidRange(5, 70_000)
    assert configured_range(UidRange(0, 0), subuid=subuid) is None


def test_without_a_setting_it_is_the_users_entry(tmp_path: Path) -> None:
    subuid = tmp_path / "subuid"
    name = pwd.getpwuid(os.geteuid()).pw_name
    subuid.write_text(f"someone-else:1:900000\n# {name}\n{name}:x:y\n{name}:200000:65535\n{name}:300000:131072\n")
    assert configured_range(None, subuid=subuid) == UidRange(300_000, 131_072)
    subuid.write_text(f"{os.geteuid()}:400000:65536\n")
    assert configured_range(None, subuid=subuid) == UidRange(400_000, 65_536)
    subuid.write_text("someone-else:1:900000\n")
    assert configured_range(None, subuid=subuid) is None
    assert configured_range(None, subuid=tmp_path / "none") is None

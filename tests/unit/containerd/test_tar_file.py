"""Tar files that claim or become more than an image archive ever is: how much of them is read, kept and written."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from tests.containerd.image_archives import tar

from airflow_isolation.containerd import tar_file
from airflow_isolation.containerd.errors import InvalidArchive
from airflow_isolation.containerd.tar_file import list_members, open_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
PACKERS = pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])


class CountedFile(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        chunk = super().read(size)
        self.count += len(chunk)
        return chunk


def header(name: str, kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


def extended(kind: bytes, content: bytes) -> bytes:
    """A header that belongs to the next one: ``x`` and ``g`` of pax, ``L`` of GNU."""
    return header("h", kind, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(records: dict[str, str]) -> bytes:
    text = ""
    for key, value in records.items():
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        text += f"{length} {key}={value}\n"
    return text.encode()


FILE = header("file", tarfile.REGTYPE, 0)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """Sizes of the temporary files that were made, also of those that are closed by now."""
    held: list[int] = []
    make = tempfile.TemporaryFile

    def kept(**options: Any) -> IO[bytes]:
        file: IO[bytes] = make(**options)
        held.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", kept)
    yield lambda: [os.fstat(descriptor).st_size for descriptor in held]
    for descriptor in held:
        os.close(descriptor)


@PACKERS
def test_what_a_compressed_archive_becomes_is_bounded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[], list[int]],
    pack: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr(tar_file, "UNPACKED_LIMIT", 3 * MIB)
    path = tmp_path / "a.tar.x"
    path.write_bytes(pack(bytes(50 * MIB)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(InvalidArchive, match=rf"becomes more than the {3 * MIB} bytes .*Decompress it first"):
        open_tar(str(path))
    assert written() <= [3 * MIB]
    # The nameless file is closed, and so is the archive; one descriptor is the test's own.
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1


def test_an_archive_may_become_as_much_as_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(tar_file, "UNPACKED_LIMIT", 3 * MIB)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(3 * MIB)))
    with open_tar(str(tmp_path / "a.tar.gz")) as file:
        assert file.read() == bytes(3 * MIB)
    assert written() == [3 * MIB]


def test_the_temporary_directory_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2 * MIB

    monkeypatch.setattr("airflow_isolation.containerd.tar_file.shutil.disk_usage", lambda _: Usage)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(2 * MIB)))
    with pytest.raises(InvalidArchive, match="set TMPDIR to a directory with more room"):
        open_tar(str(tmp_path / "a.tar.gz"))


@PACKERS
def test_decompressing_takes_little_memory(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.tar.x").write_bytes(pack(bytes(60 * MIB)))
    tracemalloc.start()
    try:
        open_tar(str(tmp_path / "a.tar.x")).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * MIB


def test_the_memory_that_xz_asks_for_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_file, "XZ_MEMORY", 4 * MIB)
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(b"x", preset=6))
    with pytest.raises(InvalidArchive, match="is truncated or damaged: Memory usage limit exceeded"):
        open_tar(str(tmp_path / "a.tar.xz"))


def test_streams_of_xz_may_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(b"one") + bytes(8) + lzma.compress(b"two" * MIB) + bytes(4))
    with open_tar(str(tmp_path / "a.tar.xz")) as file:
        assert file.read() == b"one" + b"two" * MIB


@PACKERS
@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_damage_is_told_as_damage(tmp_path: Path, pack: Callable[[bytes], bytes], damage: str) -> None:
    packed = bytearray(pack(os.urandom(100_000)))
    if damage == "truncated":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2 :] = bytes(len(packed) - len(packed) // 2)
    (tmp_path / "a.tar.x").write_bytes(packed)
    with pytest.raises(InvalidArchive, match="is truncated or damaged"):
        open_tar(str(tmp_path / "a.tar.x"))


def refused(content: bytes, words: str) -> int:
    """How many bytes were read of it before it was refused with these words."""
    file = CountedFile(content + bytes(2 * tarfile.BLOCKSIZE))
    with pytest.raises(InvalidArchive, match=words):
        list_members(file, "a.tar")
    return file.count


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_header_that_claims_much_is_not_read(kind: bytes) -> None:
    assert refused(header("h", kind, 50 * MIB) + bytes(50 * MIB), "a header of 52428800 bytes") < 10_000


def test_headers_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_file, "HEADERS_LIMIT", MIB)
    content = (extended(tarfile.XHDTYPE, pax({"comment": "x" * 30_000})) + FILE) * 100
    assert refused(content, "its headers have more than 1048576 bytes") <= MIB


def test_a_chain_of_headers_ends() -> None:
    refused(extended(tarfile.GNUTYPE_LONGNAME, b"name\0") * 5000 + FILE, "is not a readable tar archive")


def test_headers_are_not_kept() -> None:
    records = {f"key{number}": "value" for number in range(3000)}
    content = (
        extended(tarfile.XGLTYPE, pax(records)) + (extended(tarfile.XHDTYPE, pax({"comment": "x" * 5000})) + FILE) * 400
    )
    file = io.BytesIO(content + bytes(2 * tarfile.BLOCKSIZE))
    tracemalloc.start()
    try:
        assert list(list_members(file, "a.tar").files) == ["file"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Kept, they would be 3000 records for each of the 400.
    assert peak < 3 * MIB


def test_a_header_does_not_lead_back() -> None:
    # Newer releases of Python refuse a negative size themselves.
    refused(FILE + header("file", tarfile.REGTYPE, -1024) + FILE, "is not a|is truncated")


def test_files_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_file, "MEMBER_LIMIT", 3)
    assert refused(FILE * 100, "has more than 3 files") < 10 * tarfile.BLOCKSIZE


@pytest.mark.parametrize("size", [1 << 20, 1 << 62, 1 << 80])
def test_file_that_claims_more_than_there_is(size: int) -> None:
    refused(header("file", tarfile.REGTYPE, size) + FILE, "is truncated")


def test_links_are_followed_where_they_lead_somewhere(tmp_path: Path) -> None:
    entries = {"a/real": b"content"}
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, kind, target in (
            ("a/soft", tarfile.SYMTYPE, "real"),
            ("hard", tarfile.LNKTYPE, "a/real"),
            ("broken", tarfile.SYMTYPE, "../outside"),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(whole.getvalue())
    with closing(open_tar(str(tmp_path / "a.tar"))) as file:
        members = list_members(file, "a.tar")
    assert members.files["a/soft"] == members.files["hard"] == members.files["a/real"]
    assert members.broken_links == {"broken": "../outside"}


def test_a_plain_tar_file_is_not_copied(tmp_path: Path, written: Callable[[], list[int]]) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"hello": b""}))
    open_tar(str(tmp_path / "a.tar")).close()
    assert written() == []

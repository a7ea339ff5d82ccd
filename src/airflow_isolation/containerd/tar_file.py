"""A tar file from an untrusted source: ``open_tar`` decompresses it, ``list_members`` lists its files. Both have bounds.

A compressed file of a few kilobytes may become terabytes, and a tar header gives its own size. So the bytes that are
written to the temporary directory are counted, and so are the bytes of headers.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from airflow_isolation.containerd.errors import InvalidArchive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

UNPACKED_LIMIT = 64 << 30
"""Bytes that a compressed archive may become. A larger one has to be decompressed before."""
XZ_MEMORY = 128 << 20
"""Bytes of memory for decompressing xz: ``xz -9`` needs 65 MiB, and the format allows 4 GiB."""
MEMBER_LIMIT = 100_000
HEADER_LIMIT = 64 << 10
"""Bytes of one header. It holds two paths of at most 4 KiB each, and a few time stamps."""
HEADERS_LIMIT = 64 << 20
"""Bytes of all headers together. An ordinary one has 512, one with a long path 2 KiB."""

_CHUNK = 1 << 20
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Member:
    """A file's position in the archive."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Members:
    """Files by normalised path, also under the paths of links to them; ``broken_links`` (path to target) lead to no file."""

    files: Mapping[str, Member]
    broken_links: Mapping[str, str]


def open_tar(path: str) -> IO[bytes]:
    """Open the tar file. A compressed one is first decompressed into a temporary file without a name.

    :raises InvalidArchive: it can't be read, is damaged, or becomes larger than ``UNPACKED_LIMIT`` or the free space.
    """
    try:
        file = open(path, "rb")  # noqa: PTH123, SIM115
    except FileNotFoundError as error:
        raise InvalidArchive(f"there is no file {path}") from error
    except OSError as error:
        raise InvalidArchive(f"{path} can't be read: {error.strerror}") from error
    with ExitStack() as undo:
        undo.callback(file.close)
        try:
            magic = file.read(8)
        except IsADirectoryError as error:
            raise InvalidArchive(f"{path} is a directory", hint="Give a tar file") from error
        file.seek(0)
        if not magic:
            raise InvalidArchive(f"{path} is empty")
        if magic.startswith(_ZSTD):
            raise InvalidArchive(f"{path} is compressed with zstd", hint="Decompress it first: zstd -d")
        decompress = next((way for start, way in _DECOMPRESS.items() if magic.startswith(start)), None)
        if decompress is None:
            undo.pop_all()
            return file
        return _unpacked(path, decompress(file))


def _unpacked(path: str, chunks: Iterator[bytes]) -> IO[bytes]:
    directory = tempfile.gettempdir()
    # Leave room for other programs.
    room = min(UNPACKED_LIMIT, shutil.disk_usage(directory).free // 10 * 9)
    with ExitStack() as undo:
        plain = undo.enter_context(tempfile.TemporaryFile(dir=directory))
        size = 0
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > room:
                    raise InvalidArchive(
                        f"{path} becomes more than the {room} bytes that may be unpacked in {directory}",
                        hint="Decompress it first, or set TMPDIR to a directory with more room",
                    )
                plain.write(chunk)
            plain.seek(0)
        except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise InvalidArchive(f"{path} is truncated or damaged: {error}") from error
        except OSError as error:
            # Errors of the decompressors have no errno.
            if error.errno is None:
                raise InvalidArchive(f"{path} is truncated or damaged: {error}") from error
            raise InvalidArchive(f"{path} can't be unpacked in {directory}: {error.strerror}") from error
        undo.pop_all()
        return plain


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file) as plain:
        while chunk := plain.read(_CHUNK):
            yield chunk


def _bzip2(file: IO[bytes]) -> Iterator[bytes]:
    with bz2.open(file) as plain:
        while chunk := plain.read(_CHUNK):
            yield chunk


def _xz(file: IO[bytes]) -> Iterator[bytes]:
    # Does what lzma.open does, which has no bound on memory. Several streams may follow, with zeros between them.
    packed = b""
    while packed := packed.lstrip(b"\0") or file.read(_CHUNK).lstrip(b"\0"):
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not stream.eof:
            if not packed and stream.needs_input and not (packed := file.read(_CHUNK)):
                raise EOFError("it ends too early")
            yield stream.decompress(packed, _CHUNK)
            packed = b""
        packed = stream.unused_data


_DECOMPRESS: Mapping[bytes, Callable[[IO[bytes]], Iterator[bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\x00": _xz,
}


def list_members(file: IO[bytes], path: str) -> Members:
    """List the files. Links inside the archive are followed (docker save before 1.10); ``path`` is for the words of errors.

    :raises InvalidArchive: not a tar file, truncated or damaged, or over a bound.
    """
    files: dict[str, Member] = {}
    links: dict[str, str] = {}
    file.seek(0, 2)
    end = file.tell()
    file.seek(0)
    if end < tarfile.BLOCKSIZE:
        raise InvalidArchive(f"{path} is not a tar archive: it is too short for one")
    try:
        for count, entry in enumerate(_entries(file)):
            if count >= MEMBER_LIMIT:
                raise InvalidArchive(f"{path} has more than {MEMBER_LIMIT} files: not an image archive")
            name = posixpath.normpath(entry.name)
            if entry.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.linkname))
            elif entry.islnk():
                links[name] = posixpath.normpath(entry.linkname)
            elif entry.isreg() and not entry.issparse():
                if not 0 <= entry.size <= end - entry.offset_data:
                    raise truncated(path)
                files[name] = Member(entry.offset_data, entry.size)
    except tarfile.ReadError as error:
        if "unexpected end" in str(error) or "truncated" in str(error):
            raise truncated(path) from error
        raise InvalidArchive(f"{path} is not a tar archive: {error}") from error
    except (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError) as error:
        raise InvalidArchive(f"{path} is not a readable tar archive: {error}") from error
    reached = {name: files[target] for name, target in links.items() if target in files and name not in files}
    broken = {name: target for name, target in links.items() if target not in files and name not in files}
    return Members({**files, **reached}, broken)


def _entries(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=cast("IO[bytes]", _Headers(file)), mode="r:") as tar:
        while (entry := tar.next()) is not None:
            yield entry
            # Otherwise tarfile would keep every header, and copy the global ones into each later one.
            cast("Any", tar).members.clear()
            tar.pax_headers = {}


class _Headers:
    """The file through which tarfile reads headers. tarfile believes a header's own size and reads it at once, so it is
    bounded.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = HEADERS_LIMIT
        self.tell = file.tell

    def seek(self, offset: int) -> int:
        # A header may give its file a negative size, and would then be read again and again.
        if offset < self.tell():
            raise tarfile.ReadError("a header leads back to one before it")
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        if size > HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        if size > self._left:
            raise tarfile.ReadError(f"its headers have more than {HEADERS_LIMIT} bytes")
        self._left -= size
        return self._file.read(size)


def truncated(path: str) -> InvalidArchive:
    return InvalidArchive(f"{path} is truncated", hint="Copy or build the archive again")

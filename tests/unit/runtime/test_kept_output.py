"""What a container writes is read to its end and kept to a limit; the test has the shim's end of the FIFO."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from airflow_isolation.runtime.kept_output import LIMIT, KeptOutput, output_file, release

ENOUGH = 20.0


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def written(directory: Path, *chunks: bytes) -> bytes:
    output = KeptOutput("a", directory)
    output.begin()
    with output.fifo.open("wb", buffering=0) as shim:
        for chunk in chunks:
            shim.write(chunk)
    output.settle(ENOUGH)
    return output_file(directory).read_bytes()


def test_all_of_a_short_output_is_kept(tmp_path: Path) -> None:
    assert written(tmp_path, b"one\n", b"two\n") == b"one\ntwo\n"


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1, 3 * LIMIT])
def test_of_a_long_output_the_end_is_kept(tmp_path: Path, size: int) -> None:
    whole = os.urandom(size)
    kept = written(tmp_path, whole)
    assert LIMIT // 2 <= len(kept) <= LIMIT
    assert whole.endswith(kept)


def test_nothing_written_is_an_empty_file(tmp_path: Path) -> None:
    assert written(tmp_path) == b""


def test_a_fifo_that_no_shim_opened_is_released(tmp_path: Path) -> None:
    output = KeptOutput("a", tmp_path)
    output.begin()
    release(tmp_path)
    output.settle(ENOUGH)
    assert output_file(tmp_path).read_bytes() == b""


def test_what_was_given_up_leaves_no_descriptor(tmp_path: Path) -> None:
    before = descriptors()
    KeptOutput("a", tmp_path).close()
    assert descriptors() == before


def test_releasing_what_is_not_there_is_success(tmp_path: Path) -> None:
    release(tmp_path)
    release(tmp_path / "gone")


def test_a_reader_ends_without_leaving_descriptors(tmp_path: Path) -> None:
    before = descriptors()
    written(tmp_path, b"x")
    assert descriptors() == before

"""Account files of an image, in the tar that dockerd sends of them."""

from __future__ import annotations

import pytest
from tests.containerd.image_archives import Fifo, Link, tar

from airflow_isolation.runtime.docker import _first_file

WHOLE = tar({"passwd": b"root:x:0:0:root:/root:/bin/sh\n" * 100})


def test_a_file_is_read() -> None:
    assert _first_file(WHOLE) == b"root:x:0:0:root:/root:/bin/sh\n" * 100


@pytest.mark.parametrize("content", [b"", b"no tar", WHOLE[:300], WHOLE[:1500], tar({})])
def test_what_is_not_whole_is_none(content: bytes) -> None:
    assert _first_file(content) is None


@pytest.mark.parametrize("entry", [Link("/etc/shadow"), Fifo()])
def test_what_is_no_file_is_none(entry: Link | Fifo) -> None:
    assert _first_file(tar({"passwd": entry})) is None

"""Why a parse gave no result, in words."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_isolation.integration.dag_processing.verdict import UnfinishedParse, verdict


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"code": 7}, ("exit code 7", "os._exit")),
        ({"code": 0}, ("exit code 0 and no result",)),
        ({"code": -11}, ("killed by SIGSEGV",)),
        ({"code": -40}, ("killed by signal 40",)),
        ({"code": -9, "timeout": 50.0}, ("longer than 50 seconds", "dag_file_processor_timeout")),
        ({"code": -9, "violation": "It sang."}, ("stopped. It sang.",)),
        ({"code": -9, "violation": "It sang.", "timeout": 50.0}, ("It sang.",)),
        ({"code": -9, "out_of_memory": True, "memory": 1 << 30}, (", for want of memory; the limit is 1 GiB",)),
        ({"code": 1, "out_of_memory": True}, ("for want of memory; no limit is set",)),
        ({"code": -9, "out_of_memory": None, "memory": 1 << 30}, ("most likely for want of memory",)),
        ({"code": -9, "out_of_memory": False}, ("killed by SIGKILL",)),
    ],
)
def test_the_import_error_says_what_happened_and_in_which_image(end: dict[str, Any], words: tuple[str, ...]) -> None:
    said = verdict(UnfinishedParse(image="team/sales:1", **end))
    assert "team/sales:1" in said
    assert all(word in said for word in words), said

"""Why a parse gave no result, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.integration.dag_processing.verdict import UnfinishedParse, closed_to_others, verdict

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"code": 7}, ("exit code 7", "os._exit")),
        ({"code": 0}, ("exit code 0 and no result",)),
        ({"code": 126}, ("Airflow itself could not parse the file", "the file's log has the traceback")),
        ({"code": -11}, ("killed by SIGSEGV",)),
        ({"code": -40}, ("killed by signal 40",)),
        ({"code": -9, "timeout": 50.0}, ("longer than 50 seconds", "dag_file_processor_timeout")),
        ({"code": -9, "violation": "It sang."}, ("stopped. It sang.",)),
        ({"code": -9, "violation": "It sang.", "timeout": 50.0}, ("It sang.",)),
        ({"code": -9, "out_of_memory": True, "memory": 1 << 30}, (", because memory ran out; the limit is 1 GiB",)),
        ({"code": 1, "out_of_memory": True}, ("because memory ran out; no limit is set",)),
        ({"code": -9, "out_of_memory": None, "memory": 1 << 30}, ("most likely because memory ran out",)),
        ({"code": -9, "out_of_memory": False}, ("killed by SIGKILL",)),
    ],
)
def test_the_import_error_says_what_happened_and_in_which_image(end: dict[str, Any], words: tuple[str, ...]) -> None:
    said = verdict(UnfinishedParse(image="team/sales:1", **end))
    assert "team/sales:1" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("closed", "mode"), [("bundle", 0o700), ("bundle/team", 0o750), ("bundle/team/sales.py", 0o640)]
)
def test_what_is_closed_on_the_way_to_the_file_is_named_with_its_mode(tmp_path: Path, closed: str, mode: int) -> None:
    bundle = tmp_path / "bundle"
    file = bundle / "team" / "sales.py"
    file.parent.mkdir(parents=True)
    file.touch()
    for path, usual in ((bundle, 0o755), (file.parent, 0o711), (file, 0o644)):
        path.chmod(usual)
    assert closed_to_others(bundle, file.relative_to(bundle)) is None
    (tmp_path / closed).chmod(mode)
    found = closed_to_others(bundle, file.relative_to(bundle))
    assert found == tmp_path / closed
    said = verdict(UnfinishedParse(image="team/sales:1", code=126, closed=found))
    assert f"{tmp_path / closed} is closed to others on this host (mode {mode:o})" in said
    assert "daemon_umask" in said

"""hack/setup/cache.sh: what is made once, by several runs at once, one of which may be interrupted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREPARE = f'. "{ROOT}/hack/setup/all.sh"; make() {{ echo made >>"$LOG"; sleep 0.3; echo content >"$1/file"; }}\n'


def shell(cache: Path, script: str) -> subprocess.Popen[str]:
    env = {**os.environ, "AIRFLOW_ISOLATION_CACHE": str(cache), "LOG": str(cache.parent / "log")}
    return subprocess.Popen(["bash", "-c", PREPARE + script], env=env, stdout=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    with process:
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        return printed.strip()


def test_runs_at_once_make_it_once(tmp_path: Path) -> None:
    runs = [shell(tmp_path / "cache", "cached thing make") for _ in range(3)]
    assert {output(run) for run in runs} == {str(tmp_path / "cache/thing")}
    assert (tmp_path / "log").read_text() == "made\n"
    assert (tmp_path / "cache/thing/file").read_text() == "content\n"


def test_an_interrupted_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    interrupted = shell(tmp_path / "cache", 'half() { touch "$1/half"; kill -KILL $$ $BASHPID; }; cached thing half')
    with interrupted:
        assert interrupted.wait(timeout=30) != 0
    assert not (tmp_path / "cache/thing").exists()

    assert output(shell(tmp_path / "cache", "cached thing make")) == str(tmp_path / "cache/thing")
    assert [path.name for path in (tmp_path / "cache/thing").iterdir()] == ["file"]


def test_a_failed_step_fails_the_run(tmp_path: Path) -> None:
    failing = shell(tmp_path / "cache", "broken() { false; echo not reached; }; directory=$(cached thing broken)")
    with failing:
        printed, _ = failing.communicate(timeout=30)
    assert failing.returncode != 0
    assert "not reached" not in printed
    assert not (tmp_path / "cache/thing").exists()


def test_an_environment_that_is_not_complete_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "cache/thing").mkdir(parents=True)
    (tmp_path / "cache/thing/half").touch()
    output(shell(tmp_path / "cache", 'create() { mkdir "$1"; make "$1"; }; made_in_place thing create'))
    assert sorted(path.name for path in (tmp_path / "cache/thing").iterdir()) == ["complete", "file"]

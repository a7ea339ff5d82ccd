"""What commands make of their arguments, before any daemon is asked."""

from __future__ import annotations

import signal
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.container_spec import DeviceRates
from airflow_isolation.errors import ContainerNotFound, IsolationError, RuntimeUnreachable
from airflow_isolation.integration.cli import backends, outcome
from airflow_isolation.integration.cli.kill import parse_signal
from airflow_isolation.integration.cli.logs import last_lines
from airflow_isolation.integration.cli.update import limits_layer
from airflow_isolation.runtime.interface import Container, ContainerState
from airflow_isolation.settings.effective import ConnectionSettings

if TYPE_CHECKING:
    from collections.abc import Callable

NONE_NAMED = {"backend": None, "containerd": False, "docker": False}


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory in which both daemons are looked for; the flags are empty."""
    monkeypatch.setenv("AIRFLOW__CORE__TASK_EXECUTION_RUNTIME", "")
    monkeypatch.setenv("AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME", "")
    for backend in ("containerd", "docker"):
        monkeypatch.setenv(f"AIRFLOW__{backend.upper()}_RUNTIME__SOCKET_PATH", str(tmp_path / f"{backend}.sock"))
    return tmp_path


def names(choice: backends.Choice) -> list[str]:
    return [connection.backend for connection in choice.connections]


def test_the_named_daemon_is_asked_whatever_the_flags_say(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__TASK_EXECUTION_RUNTIME", "containerd")
    choice = backends.choose(Namespace(**{**NONE_NAMED, "docker": True}))
    assert (names(choice), choice.guessed) == (["docker"], False)


def test_naming_one_daemon_twice_is_no_contradiction() -> None:
    assert backends.named_backend(Namespace(backend="docker", containerd=False, docker=True)) == "docker"


def test_naming_both_daemons_is_wrong_usage() -> None:
    with pytest.raises(outcome.UsageError):
        backends.named_backend(Namespace(backend="docker", containerd=True, docker=False))


def test_a_flag_chooses_its_daemon(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__TASK_EXECUTION_RUNTIME", "docker")
    assert names(backends.choose(Namespace(**NONE_NAMED))) == ["docker"]


def test_flags_that_differ_choose_both_daemons(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__TASK_EXECUTION_RUNTIME", "docker")
    monkeypatch.setenv("AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME", "containerd")
    choice = backends.choose(Namespace(**NONE_NAMED))
    assert (sorted(names(choice)), choice.guessed) == (["containerd", "docker"], False)


def test_without_flags_the_daemons_whose_sockets_are_here_are_asked(sockets: Path) -> None:
    (sockets / "docker.sock").touch()
    choice = backends.choose(Namespace(**NONE_NAMED))
    assert (names(choice), choice.guessed) == (["docker"], True)


def test_without_flags_and_sockets_the_error_names_both_sockets(sockets: Path) -> None:
    with pytest.raises(RuntimeUnreachable) as raised:
        backends.choose(Namespace(**NONE_NAMED))
    assert str(sockets / "containerd.sock") in str(raised.value)
    assert str(sockets / "docker.sock") in str(raised.value)


def test_what_takes_one_daemon_asks_which_when_there_are_two(sockets: Path) -> None:
    for backend in ("containerd", "docker"):
        (sockets / f"{backend}.sock").touch()
    with pytest.raises(outcome.UsageError, match="--containerd or --docker"):
        backends.choose_one(Namespace(**NONE_NAMED))


def found(id: str) -> backends.Found:
    connection = ConnectionSettings(
        backend="containerd", socket_path="", namespace="", cgroup_mount_path="", state_dir=Path("/state")
    )
    return backends.Found(connection, Container(id=id, state=ContainerState.RUNNING, image="image"))


CONTAINERS = [found("task-1"), found("task-12"), found("task-21"), *(found(f"parse-{number}") for number in range(7))]


def test_a_beginning_that_no_other_id_has_is_enough() -> None:
    assert backends.only_match(CONTAINERS, "task-2").container.id == "task-21"


def test_a_whole_id_means_itself_although_another_begins_with_it() -> None:
    assert backends.only_match(CONTAINERS, "task-1").container.id == "task-1"


def test_an_unknown_id_is_told_with_what_to_do() -> None:
    with pytest.raises(ContainerNotFound, match=r"'nope'.*list --all"):
        backends.only_match(CONTAINERS, "nope")


def test_an_ambiguous_beginning_names_some_of_what_it_could_mean() -> None:
    with pytest.raises(backends.ContainerAmbiguous) as raised:
        backends.only_match(CONTAINERS, "parse-")
    assert str(raised.value) == (
        "'parse-' is the beginning of 7 ids: parse-0, parse-1, parse-2, parse-3, parse-4 and 2 more. Write more of it"
    )


def test_an_empty_id_means_nothing() -> None:
    with pytest.raises(outcome.UsageError):
        backends.only_match(CONTAINERS[:1], "")


@pytest.mark.parametrize("text", ["TERM", "term", "SIGTERM", "15"])
def test_a_signal_has_several_names(text: str) -> None:
    assert parse_signal(text) is signal.SIGTERM


@pytest.mark.parametrize("text", ["", "FOO", "0", "-9", "999"])
def test_an_unknown_signal_is_wrong_usage(text: str) -> None:
    with pytest.raises(outcome.UsageError):
        parse_signal(text)


@pytest.mark.parametrize(("count", "rest"), [(0, b""), (1, b"three"), (2, b"two\nthree"), (9, b"one\ntwo\nthree")])
def test_the_tail_counts_an_unfinished_line(count: int, rest: bytes) -> None:
    assert last_lines(b"one\ntwo\nthree", count) == rest


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], int]], int]:
    """Run a function as a command; gives the exit code."""
    # It would set up this process's logging for the rest of the session.
    monkeypatch.setattr("airflow_isolation.integration.seams.console.quiet", lambda: None)

    def run(function: Callable[[Namespace], int]) -> int:
        with pytest.raises(SystemExit) as raised:
            outcome.command(function)(Namespace())
        assert isinstance(raised.value.code, int)
        return raised.value.code

    return run


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def function(_: Namespace) -> int:
        raise error

    return function


def test_an_error_is_a_sentence_on_stderr_and_code_1(
    ended: Callable[[Callable[[Namespace], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(IsolationError("It failed", hint="Try again"))) == 1
    assert capsys.readouterr() == ("", "It failed. Try again\n")


def test_wrong_usage_is_code_2(ended: Callable[[Callable[[Namespace], int]], int]) -> None:
    assert ended(raising(outcome.UsageError("Both"))) == 2


def test_an_interrupt_has_no_traceback(
    ended: Callable[[Callable[[Namespace], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


def test_the_limits_of_update_are_read_as_settings_are() -> None:
    layer = limits_layer({"memory": "4Gi", "cpus": "500m", "io_max": ["8:0 rbps=1Mi"], "pids": None})
    assert {name: assignment.value for name, assignment in layer.items()} == {
        "cpus": 0.5,
        "memory": 4 * 2**30,
        "io_max": (DeviceRates(device="8:0", rbps=2**20),),
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory": "4"}, "--memory: '4'"),
        ({"memory_high": "4Q"}, "--memory-high: .*unknown unit"),
        ({"cpus": "0"}, "--cpus: '0' is not a limit"),
        ({"pids": "-5"}, "--pids"),
        ({"io_max": ["sda"]}, "--io-max: 'sda' is not a limit for a disk"),
    ],
)
def test_a_limit_that_can_not_be_is_wrong_usage(given: dict[str, object], words: str) -> None:
    with pytest.raises(outcome.UsageError, match=words):
        limits_layer(given)

"""What is wrong with a container is told by the same error, sentence and advice on every backend."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import ContainerFailed, ContainerKilled, IsolationError, SpecRefused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.conftest import Host

FILE = "/etc/passwd"


class Case(NamedTuple):
    """What is asked for, and what is said: pieces of the sentence, in their order, and of the advice."""

    asked: Callable[[Path], dict[str, Any]]
    error: type[IsolationError]
    sentence: str
    advice: str = ""


def mounted(target: str) -> Callable[[Path], dict[str, Any]]:
    def asked(place: Path) -> dict[str, Any]:
        (place / "source").mkdir()
        return {"mounts": (Mount(source=str(place / "source"), target=target),)}

    return asked


def profile(**document: Any) -> Callable[[Path], dict[str, Any]]:
    def asked(place: Path) -> dict[str, Any]:
        whole = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [], **document}
        (place / "own.json").write_text(json.dumps(whole))
        return {"seccomp": str(place / "own.json")}

    return asked


def rule(**changes: Any) -> list[dict[str, Any]]:
    return [{"names": ["read"], "action": "SCMP_ACT_ALLOW", **changes}]


CASES = {
    "no such user": Case(
        lambda _: {"user": "nobody-here"}, SpecRefused, "has no user 'nobody-here' in its /etc/passwd", "run_as_user"
    ),
    "no such group": Case(
        lambda _: {"user": "airflow:nobodys"}, SpecRefused, "has no group 'nobodys' in its /etc/group", "run_as_user"
    ),
    "no such interpreter": Case(
        lambda _: {"argv": ("no-such-python",)},
        ContainerFailed,
        'could not start the container .*"no-such-python".* not found',
        "has no program no-such-python: name its interpreter with the setting `python`",
    ),
    "no interpreter at its path": Case(
        lambda _: {"argv": ("/opt/none/python",)},
        ContainerFailed,
        'could not start the container .*"/opt/none/python".*no such file',
        "has no program /opt/none/python: name its interpreter with the setting `python`",
    ),
    "a directory as interpreter": Case(
        lambda _: {"argv": ("/srv",)},
        ContainerFailed,
        'could not start the container .*"/srv".*permission denied',
        "has no program /srv: name its interpreter with the setting `python`",
    ),
    "a file as working directory": Case(
        lambda _: {"working_dir": FILE},
        ContainerFailed,
        f"could not (start|create) the container .*{FILE}.*not a directory",
        f"{FILE} is no directory: set working_dir",
    ),
    "a working directory below a file": Case(
        lambda _: {"working_dir": f"{FILE}/below"},
        ContainerFailed,
        f"could not (start|create) the container .*{FILE}.*not a directory",
        "is no directory: set working_dir",
    ),
    "a working directory without a beginning": Case(
        lambda _: {"working_dir": "no/such"}, SpecRefused, "'no/such' is not an absolute path"
    ),
    "a volume below a file": Case(
        mounted(f"{FILE}/below"),
        ContainerFailed,
        f"could not start the container .*{FILE}/below.*not a directory",
        f"at {FILE}/below or above it: mount the volume elsewhere",
    ),
    "a directory on a file": Case(
        mounted(FILE),
        ContainerFailed,
        f"could not start the container .*{FILE}.*not a directory",
        f"at {FILE} or above it: mount the volume elsewhere",
    ),
    **{
        f"a volume in {kernels}": Case(
            mounted(f"{kernels}/below"), SpecRefused, f"lies in the kernel's {kernels}", "somewhere else"
        )
        for kernels in ("/proc", "/sys", "/dev")
    },
    "no profile": Case(
        lambda place: {"seccomp": str(place / "none.json")}, SpecRefused, "none.json can't be read: No such file"
    ),
    "a profile that is none": Case(profile(syscalls=None), SpecRefused, "syscalls is not a list"),
    "an unknown action": Case(
        profile(defaultAction="SCMP_ACT_NOTHING"), SpecRefused, "defaultAction is 'SCMP_ACT_NOTHING'"
    ),
    "an unknown comparison": Case(
        profile(syscalls=rule(args=[{"index": 0, "value": 1, "op": "SCMP_CMP_LIKE"}])), SpecRefused, "op is"
    ),
    "a profile of another machine": Case(
        profile(architectures=["SCMP_ARCH_S390X"]), SpecRefused, "has no rules for the architecture", "Give a profile"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_it_is_told_in_the_same_way(host: Host, place: Path, case: Case) -> None:
    asked = case.asked(place)
    argv = asked.pop("argv", ("python3", "-c", "pass"))
    with pytest.raises(IsolationError) as failed:
        host.start(*argv, **asked)
    assert failed.type is case.error
    assert re.search(case.sentence, failed.value.message)
    assert bool(failed.value.hint) == bool(case.advice)
    assert case.advice in failed.value.hint


def test_a_working_directory_that_is_missing_is_made(host: Host) -> None:
    assert (
        host.python("import json, os; print(json.dumps(os.getcwd()))", working_dir="/no/such/place") == "/no/such/place"
    )


def test_a_name_that_is_no_system_call_is_passed_over(host: Host, place: Path) -> None:
    """Profiles name calls of newer kernels, too."""
    asked = profile(
        defaultAction="SCMP_ACT_ALLOW", syscalls=rule(names=["no_such_call", "acct"], action="SCMP_ACT_ERRNO")
    )
    assert host.python("print(1)", **asked(place)) == 1


@pytest.mark.parametrize("action", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
def test_a_profile_that_lets_nothing_start_is_named_as_a_cause(host: Host, place: Path, action: str) -> None:
    """Docker can't tell it from a container that was killed, so containerd's is not told from it either."""
    with pytest.raises(ContainerKilled, match="could not start the container") as failed:
        host.start("python3", "-c", "pass", **profile(defaultAction=action)(place))
    assert "seccomp profile" in failed.value.hint

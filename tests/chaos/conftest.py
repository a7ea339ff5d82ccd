"""``hack/test chaos`` is short, for CI; ``--long`` has more tasks, more kinds of faults, and all forms of starting a task."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from tests.chaos.harness import KINDS
from tests.zygote.at_work.conftest import newer_runc

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Daemon, StartDaemon

__all__ = ("newer_runc",)

#: Tasks of images that the administrator trusts, in user namespaces, and on Docker.
FORMS = ("containerd", "containerd-namespace", "docker")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="120 tasks for every kind of fault, in every form")
    parser.addoption("--seed", type=int, default=28325, help="of what is hit, and when")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Storms of killed zygotes have tests in the suite zygote; here is what they cost."""
    return True if collection_path.name == "test_storm.py" and not config.getoption("long") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which form, which faults, and how many tasks they hit."""
    if "faults" not in metafunc.fixturenames:
        return
    runs: list[tuple[str, tuple[str, ...], int]] = [("containerd-namespace", KINDS, 30)]
    if metafunc.config.getoption("long"):
        runs = [(form, kinds, 120) for form in FORMS for kinds in (*((kind,) for kind in KINDS), KINDS)]
    names = [f"{form}-{'-'.join(kinds) if kinds != KINDS else 'mixed'}" for form, kinds, _ in runs]
    metafunc.parametrize(("form", "faults", "tasks"), runs, ids=names)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> Random:
    """The same faults for the same seed, as far as a busy host lets it."""
    seed = request.config.getoption("seed")
    print(f"--seed {seed}")
    return Random(seed)


@pytest.fixture
def fragile_daemon(form: str, start_containerd: StartDaemon, start_dockerd: StartDaemon) -> Daemon:
    """One of the test's own."""
    return start_dockerd() if form == "docker" else start_containerd()


@pytest.fixture
def runtime_binary(form: str, request: pytest.FixtureRequest) -> str:
    """In a user namespace a volume takes a runtime that can map its ids."""
    return str(request.getfixturevalue("newer_runc")) if form == "containerd-namespace" else ""

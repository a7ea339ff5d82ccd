"""``hack/test chaos`` is short, for CI; ``--long`` has more tasks, more kinds of faults, and both backends."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from tests.chaos.harness import KINDS

if TYPE_CHECKING:
    from random import Random


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="120 tasks for every kind of fault, on both backends")
    parser.addoption("--seed", type=int, default=secrets.randbelow(100_000), help="of what is hit, and when")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which backend, which faults, and how many tasks they hit."""
    if "faults" not in metafunc.fixturenames:
        return
    runs: list[tuple[str, tuple[str, ...], int]] = [("containerd", ("containerd", "agent", "shim"), 24)]
    if metafunc.config.getoption("long"):
        each = [*((kind,) for kind in KINDS), KINDS]
        runs = [(backend, kinds, 120) for backend in ("containerd", "docker") for kinds in each]
    names = [f"{backend}-{'-'.join(kinds) if kinds != KINDS else 'mixed'}" for backend, kinds, _ in runs]
    metafunc.parametrize(("backend", "faults", "tasks"), runs, ids=names)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> Random:
    """The same faults for the same seed, as far as a busy host lets it."""
    from random import Random

    seed = request.config.getoption("seed")
    print(f"--seed {seed}")
    return Random(seed)

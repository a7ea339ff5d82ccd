"""What systemd is told of a slice, and when. With a real one: tests/systemd."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_isolation.cgroups import MAX, Cpu, Limits, Memory, Pids, ValueRefused, systemd
from airflow_isolation.cgroups.systemd import limit_slice, properties

MIB = 1024 * 1024
SIZE = 64 * MIB


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(), ()),
        (Limits(cpu=Cpu(cpus=0.333), memory=Memory(max=MIB)), ("CPUQuota=33%", "MemoryMax=1048576")),
        (
            Limits(cpu=Cpu(cpus=MAX), memory=Memory(max=MAX), pids=Pids(max=MAX)),
            ("CPUQuota=", "MemoryMax=infinity", "TasksMax=infinity"),
        ),
    ],
)
def test_limits_in_systemds_words(limits: Limits, words: tuple[str, ...]) -> None:
    assert properties(limits) == words


def test_what_has_no_word_is_refused() -> None:
    with pytest.raises(ValueRefused):
        properties(Limits(memory=Memory(max=MIB, high=MIB)))


@pytest.mark.parametrize(
    "held",
    [
        Limits(cpu=Cpu(cpus=0.33, weight=100), memory=Memory(max=SIZE, high=MAX), pids=Pids(max=MAX)),
        # A controller that is not enabled limits nothing.
        Limits(cpu=Cpu(cpus=0.33), memory=Memory(max=SIZE)),
    ],
)
def test_what_the_kernel_holds_systemd_is_not_told_again(monkeypatch: pytest.MonkeyPatch, held: Limits) -> None:
    def unwanted() -> None:
        raise AssertionError("systemd is to be told")

    monkeypatch.setattr(systemd, "check_reach", unwanted)
    monkeypatch.setattr(systemd, "limits_of_slice", lambda *_: held)
    # Systemd takes no more of a core, and the kernel no part of a page.
    same = Limits(cpu=Cpu(cpus=1 / 3), memory=Memory(max=SIZE + 1), pids=Pids(max=MAX))
    limit_slice(Path("/"), "a.slice", same)
    limit_slice(Path("/"), "a.slice", Limits())
    with pytest.raises(AssertionError, match="to be told"):
        limit_slice(Path("/"), "a.slice", Limits(cpu=Cpu(cpus=0.5), memory=Memory(max=SIZE), pids=Pids(max=MAX)))
    with pytest.raises(AssertionError, match="to be told"):
        limit_slice(Path("/"), "a.slice", Limits(pids=Pids(max=5)))

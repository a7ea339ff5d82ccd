"""Who gets which container. Containers are names here, and time is a number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from airflow_isolation.bridge.backoff import Backoff
from airflow_isolation.bridge.parse_schedule import PATIENCE, Give, ParseSchedule, Refuse, Remove, Start, Waiting
from airflow_isolation.errors import ContainerFailed


@dataclass(eq=False)
class Box:
    name: str
    forks: int = 0
    memory: int = 0
    born: float = 0.0


class Pool:
    """A schedule whose orders are carried out at once, but for starts and removals, which the test lets end."""

    def __init__(self, *, at_most: int = 4, per_key: int = 2, max_memory: int | None = None) -> None:
        self.now = 0.0
        self.schedule: ParseSchedule[Box] = ParseSchedule(
            at_most=at_most,
            per_key=per_key,
            idle_timeout=600,
            max_age=3600,
            max_memory=max_memory,
            backoff=Backoff(jitter=lambda _, most: most),
        )

    def wait(self, file: str, key: str, *, max_forks: int = 1000) -> None:
        self.schedule.wait(Waiting(file, key, max_forks, self.now))

    def orders(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for order in self.schedule.orders(self.now):
            match order:
                case Give(file, container):
                    container.forks += 1
                    found.append(("give", str(file), container.name))
                case Start(file, key):
                    found.append(("start", str(file), str(key)))
                case Remove(container):
                    found.append(("remove", container.name))
                case Refuse(file, error, seconds):
                    found.append(("refuse", str(file), error.message, str(seconds)))
        return found

    def box(self, name: str, key: str, *, max_forks: int = 1000) -> Box:
        """A container that has been ordered, started, used once and given back."""
        self.wait(f"first of {name}", key, max_forks=max_forks)
        assert self.orders() == [("start", f"first of {name}", key)]
        box = self.started(name, key, max_forks=max_forks)
        assert self.orders() == [("give", f"first of {name}", name)]
        self.schedule.given_back(box, reusable=True, now=self.now)
        return box

    def started(self, name: str, key: str, *, max_forks: int = 1000) -> Box:
        box = Box(name, born=self.now)
        self.schedule.started(key, box, max_forks=max_forks, now=self.now)
        return box

    def back(self, box: Box, *, reusable: bool = True) -> None:
        self.schedule.given_back(box, reusable=reusable, now=self.now)


def test_a_file_gets_an_idle_container_of_its_key() -> None:
    pool = Pool()
    box = pool.box("a", "A")
    pool.wait("x", "A")
    assert pool.orders() == [("give", "x", "a")]
    assert pool.orders() == []
    pool.back(box)
    pool.wait("y", "B")
    assert pool.orders() == [("start", "y", "B")]


def test_the_oldest_file_comes_first_and_no_container_is_given_twice() -> None:
    pool = Pool(per_key=1)
    box = pool.box("a", "A")
    for file in ("x", "y", "z"):
        pool.wait(file, "A")
    assert pool.orders() == [("give", "x", "a")]
    pool.back(box)
    pool.back(box)
    assert pool.orders() == [("give", "y", "a")]
    assert pool.orders() == []


def test_one_start_for_each_file_up_to_the_slots_of_a_key() -> None:
    pool = Pool(per_key=2)
    for file in ("x", "y", "z"):
        pool.wait(file, "A")
    assert pool.orders() == [("start", "x", "A"), ("start", "y", "A")]
    assert pool.orders() == []
    pool.started("a", "A")
    assert pool.orders() == [("give", "x", "a")]


def test_a_start_serves_whoever_waits_longest() -> None:
    pool = Pool()
    pool.wait("x", "A")
    pool.orders()
    pool.wait("y", "A")
    pool.schedule.cancel("x")
    assert pool.orders() == []
    pool.started("a", "A")
    assert pool.orders() == [("give", "y", "a")]


def test_never_more_than_the_limit_and_the_least_recently_used_goes() -> None:
    pool = Pool(at_most=2)
    old, young = pool.box("old", "A"), pool.box("young", "B")
    pool.now = 5
    pool.wait("again", "A")
    assert pool.orders() == [("give", "again", "old")]
    pool.now = 6
    pool.back(old)
    pool.wait("x", "C")
    assert pool.orders() == [("remove", "young")]
    # Until it is gone it counts, and nobody else has to go for the same file.
    assert pool.orders() == []
    assert len(pool.schedule) == 2
    pool.schedule.removed(young)
    assert pool.orders() == [("start", "x", "C")]
    assert len(pool.schedule) == 2


def test_a_container_that_is_given_out_is_never_removed() -> None:
    pool = Pool(at_most=1)
    box = pool.box("a", "A")
    pool.wait("x", "A")
    pool.orders()
    pool.wait("y", "B")
    pool.now = 100_000
    assert pool.orders() == []
    pool.back(box)
    assert pool.orders() == [("remove", "a")]
    pool.schedule.removed(box)
    assert pool.orders() == [("start", "y", "B")]


def test_two_files_need_two_removals() -> None:
    pool = Pool(at_most=2)
    pool.box("a", "A")
    pool.box("b", "B")
    pool.wait("x", "C")
    pool.wait("y", "D")
    assert pool.orders() == [("remove", "a"), ("remove", "b")]


def test_a_container_that_others_wait_for_stays_until_patience_ends() -> None:
    pool = Pool(at_most=1, per_key=1)
    box = pool.box("a", "A")
    pool.wait("w", "A")
    assert pool.orders() == [("give", "w", "a")]
    pool.wait("other", "B")
    pool.wait("x", "A")
    pool.wait("y", "A")
    pool.back(box)
    assert pool.orders() == [("give", "x", "a")]
    pool.now = PATIENCE
    pool.back(box)
    assert pool.orders() == [("remove", "a")]


@pytest.mark.parametrize("reason", ["forks", "age", "idle", "memory", "not reusable", "lost"])
def test_what_is_worn_out_goes(reason: str) -> None:
    pool = Pool(max_memory=1000)
    box = pool.box("a", "A", max_forks=2)
    assert pool.orders() == []
    match reason:
        case "forks":
            box.forks = 2
        case "age":
            pool.now = 3600
            pool.schedule._kept[box].idle_since = 3599
        case "idle":
            pool.now = 600
        case "memory":
            box.memory = 1001
        case "not reusable":
            pool.wait("x", "A")
            pool.orders()
            pool.back(box, reusable=False)
        case "lost":
            pool.schedule.lose(box)
    # And is not given to a file that comes at that moment.
    pool.wait("y", "A")
    assert pool.orders() == [("remove", "a"), ("start", "y", "A")]


def test_limits_that_a_new_container_exceeds_let_it_have_one_file() -> None:
    pool = Pool(max_memory=0)
    pool.wait("x", "A")
    pool.orders()
    box = pool.started("a", "A")
    box.memory = 1
    pool.now = 100_000
    assert pool.orders() == [("give", "x", "a")]
    pool.back(box)
    assert pool.orders() == [("remove", "a")]


def test_fresh_containers_have_one_file() -> None:
    pool = Pool(per_key=1)
    pool.wait("x", "A", max_forks=1)
    pool.wait("y", "A", max_forks=1)
    assert pool.orders() == [("start", "x", "A")]
    box = pool.started("a", "A", max_forks=1)
    assert pool.orders() == [("give", "x", "a")]
    pool.back(box)
    assert pool.orders() == [("remove", "a"), ("start", "y", "A")]


def test_a_failed_start_is_told_to_one_file_and_holds_off_the_others() -> None:
    pool = Pool()
    error = ContainerFailed("disk full")
    for file in ("x", "y", "z"):
        pool.wait(file, "A")
    assert pool.orders() == [("start", "x", "A"), ("start", "y", "A")]
    pool.schedule.start_failed("A", error, now=pool.now)
    assert pool.orders() == [("refuse", "x", "disk full", "1.0")]
    pool.schedule.start_failed("A", error, now=pool.now)
    # Nothing of that key lives any more: nobody is left waiting.
    assert pool.orders() == [("refuse", "y", "disk full", "1.0"), ("refuse", "z", "disk full", "1.0")]
    pool.wait("x", "A")
    pool.wait("other", "B")
    assert pool.orders() == [("refuse", "x", "disk full", "1.0"), ("start", "other", "B")]
    pool.now = 1.0
    pool.wait("x", "A")
    assert pool.orders() == [("start", "x", "A")]
    assert pool.schedule.waiting() == 2


def test_during_trouble_a_living_container_still_serves() -> None:
    pool = Pool(per_key=3)
    box = pool.box("a", "A")
    for file in ("x", "y", "z"):
        pool.wait(file, "A")
    assert pool.orders() == [("give", "x", "a"), ("start", "y", "A"), ("start", "z", "A")]
    for _ in range(2):
        pool.schedule.start_failed("A", ContainerFailed("disk full"), now=pool.now)
    assert [order[:2] for order in pool.orders()] == [("refuse", "y"), ("refuse", "z")]
    pool.wait("y", "A")
    assert pool.orders() == []
    pool.back(box)
    assert pool.orders() == [("give", "y", "a")]


def test_a_dropped_start_is_no_failure() -> None:
    pool = Pool()
    pool.wait("x", "A")
    pool.orders()
    pool.schedule.start_dropped("A")
    pool.schedule.cancel("x")
    assert (pool.orders(), len(pool.schedule)) == ([], 0)
    pool.wait("x", "A")
    assert pool.orders() == [("start", "x", "A")]


def test_strangers_and_second_times_are_left_alone() -> None:
    pool = Pool()
    box = pool.box("a", "A")
    pool.schedule.given_back(Box("stranger"), reusable=True, now=0.0)
    pool.schedule.lose(Box("stranger"))
    pool.schedule.cancel("nobody")
    pool.wait("x", "A")
    pool.wait("x", "B")
    assert pool.orders() == [("give", "x", "a")]
    pool.back(box, reusable=False)
    pool.orders()
    pool.back(box)
    assert pool.orders() == []
    pool.schedule.removed(box)
    pool.schedule.removed(box)
    assert len(pool.schedule) == 0

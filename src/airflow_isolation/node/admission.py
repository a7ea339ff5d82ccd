"""Which task may begin: what runs on a host together fits into it, so that none is killed for want of the host's memory.

Tasks that do not fit wait in the order of their coming. A later one that fits may pass an earlier one, but not for ever:
one that has waited for ``PASSED_SECONDS`` is passed by nobody. All of it belongs to one thread, the event loop's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

from airflow_isolation.errors import HostTrouble, SpecRefused
from airflow_isolation.settings.quantities import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.container_spec import Resources
    from airflow_isolation.settings.effective import NodeSettings

#: How long a task that does not fit may be passed by others that do, in seconds.
PASSED_SECONDS: Final = 60.0
#: How often one that waits is told for what, in seconds.
TOLD_SECONDS: Final = 30.0
#: Of a task that says neither ``memory_request`` nor ``memory``, in bytes.
UNSAID_MEMORY: Final = 256 * MIB
#: Of the host's memory, besides a tenth, in bytes.
RESERVE: Final = 512 * MIB


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one task, or of all together: bytes and cores."""

    memory: int = 0
    cpus: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.memory + other.memory, self.cpus + other.cpus)

    @classmethod
    def of(cls, resources: Resources) -> Demand:
        """What a task with these limits is counted for.

        >>> from airflow_isolation.container_spec import Resources
        >>> Demand.of(Resources(memory=2**30, memory_request=2**20)), Demand.of(Resources(cpus=2, memory=2**30))
        (Demand(memory=1048576, cpus=0.0), Demand(memory=1073741824, cpus=2))
        """
        memory = next(
            (size for size in (resources.memory_request, resources.memory) if size is not None), UNSAID_MEMORY
        )
        return cls(memory, resources.cpus or 0.0)

    def label(self) -> str:
        """As a container has it, for a node that is started later."""
        return f"{self.memory} {self.cpus:g}"

    @classmethod
    def parse(cls, label: str) -> Demand:
        """Of ``label``; nothing of what is none.

        >>> Demand.parse(Demand(2**20, 0.5).label()), Demand.parse("much")
        (Demand(memory=1048576, cpus=0.5), Demand(memory=0, cpus=0.0))
        """
        try:
            memory, cpus = label.split()
            return cls(int(memory), float(cpus))
        except ValueError:
            return cls()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What tasks may have together: bytes and cores; None is not counted."""

    memory: int | None = None
    cpus: float | None = None

    def holds(self, demand: Demand) -> bool:
        """Whether there is room for so much."""
        return (self.memory is None or demand.memory <= self.memory) and (self.cpus is None or demand.cpus <= self.cpus)


def capacity_of(settings: NodeSettings, budget_memory: int | None) -> Capacity:
    """What is set, and else of memory what this host can spare.

    >>> from airflow_isolation.settings.effective import NodeSettings
    >>> capacity_of(NodeSettings(node_timeout=1, admission=True, admission_timeout=1, capacity_cpus=2), 2**30)
    Capacity(memory=1073741824, cpus=2)
    """
    if not settings.admission:
        return Capacity()
    memory = settings.capacity_memory
    if memory is None:
        total = psutil.virtual_memory().total
        # Airflow's own components, the daemon, zygotes and the kernel live there, too.
        spared = max(0, (total - total // 10) // MIB * MIB - RESERVE)
        memory = spared if budget_memory is None else min(spared, budget_memory)
    return Capacity(memory, settings.capacity_cpus)


class Turn:
    """Of one task: it waits, then it has its place on the host, then it is over. ``release`` ends it at any time."""

    def __init__(self, name: str, demand: Demand, leave: Callable[[Turn], None]) -> None:
        self.name = name
        self.demand = demand
        self.since = time.monotonic()
        #: Done when it has come, or is over before; then whether it has come.
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._is_over = False
        self._leave = leave

    def release(self) -> None:
        """May be called twice."""
        if not self._is_over:
            self._is_over = True
            if not self.answer.done():
                self.answer.set_result(False)
            self._leave(self)


class Admission:
    """The places of one host."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._waiting: list[Turn] = []
        self._inside: set[Turn] = set()
        self._taken = Demand()

    def ask(self, name: str, demand: Demand) -> Turn:
        """A turn for what is called ``name`` in the words that others are told; it may have come at once.

        :raises SpecRefused: so much is never free.
        """
        if not self._capacity.holds(demand):
            raise SpecRefused(
                f"It asks for {self._words(demand)}, and this host has {self._all()} for all tasks",
                hint="Lower `memory_request` (or `memory`) and `cpus`, or raise the node's capacity_memory and capacity_cpus",
            )
        turn = Turn(name, demand, self._left)
        self._waiting.append(turn)
        self._let_in()
        return turn

    def occupy(self, name: str, demand: Demand) -> Turn:
        """The turn of what runs already, whether it fits or not."""
        turn = Turn(name, demand, self._left)
        self._enter(turn)
        return turn

    async def wait(self, turn: Turn, *, seconds: float, tell: Callable[[str], object]) -> bool:
        """Until the turn has come; False when it is over before. ``tell`` is told for what it waits, and behind whom.

        :raises HostTrouble: it has not come within ``seconds``. It is over then.
        """
        deadline = time.monotonic() + seconds
        while not turn.answer.done():
            left = deadline - time.monotonic()
            why = self._why(turn)
            if left <= 0:
                turn.release()
                raise HostTrouble(
                    f"This host had no room for the task within {seconds:.0f} seconds. It waited for {why}",
                    hint="Give this host fewer tasks at a time, or tasks a lower `memory_request`",
                )
            tell(why)
            await asyncio.wait({turn.answer}, timeout=min(TOLD_SECONDS, left))
        return turn.answer.result()

    def _let_in(self) -> None:
        now = time.monotonic()
        for turn in tuple(self._waiting):
            if self._capacity.holds(self._taken + turn.demand):
                self._waiting.remove(turn)
                self._enter(turn)
            elif now - turn.since > PASSED_SECONDS:
                return

    def _enter(self, turn: Turn) -> None:
        self._inside.add(turn)
        self._taken += turn.demand
        turn.answer.set_result(True)

    def _left(self, turn: Turn) -> None:
        if turn in self._inside:
            self._inside.remove(turn)
            # Counted anew: cores are fractions, and what is subtracted does not add up to nothing.
            self._taken = sum((one.demand for one in self._inside), Demand())
        else:
            self._waiting.remove(turn)
        self._let_in()

    def _why(self, turn: Turn) -> str:
        before = self._waiting[: self._waiting.index(turn)] if turn in self._waiting else []
        behind = f". Before it in line: {len(before)}, first {before[0].name}" if before else ""
        return (
            f"{self._words(turn.demand)}. Of this host's {self._all()} running tasks ({len(self._inside)}) have"
            f" {self._words(self._taken)}{behind}"
        )

    def _all(self) -> str:
        return self._words(Demand(self._capacity.memory or 0, self._capacity.cpus or 0.0))

    def _words(self, demand: Demand) -> str:
        counted = [format_bytes(demand.memory)] if self._capacity.memory is not None else []
        if self._capacity.cpus is not None:
            counted.append(f"{demand.cpus:g} {'core' if demand.cpus == 1 else 'cores'}")
        return " and ".join(counted)

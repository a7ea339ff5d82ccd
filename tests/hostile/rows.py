"""The table: what must be refused to user code, whatever kind of start its container had, and how each row could fail.

A row is an attempt of ``inside.py``. ``right`` is what it may have seen. ``control`` is where the same attempt must see
something else, so that the row is known to be one that can fail: ``UNGUARDED`` is a container without the guards that a setting
takes away, any other is the name of an attempt at something that nobody guards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.hostile.conftest import CAPABILITIES, worker_holds
from tests.hostile.inside import AGAINST_A_PROCESS, IN_32_BITS, IN_THE_BUNDLE, INTEL, KERNEL_FILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tests.hostile.conftest import Kind

UNGUARDED = "a container without guards"


@dataclass(frozen=True)
class Row:
    """One attempt, and what it may see."""

    name: str
    right: frozenset[str]
    control: str = ""
    #: By the network of the container, what it may see instead.
    with_network: Mapping[str, frozenset[str]] = field(default_factory=dict)
    #: It is tried in tasks alone.
    of_tasks: bool = False

    def may_see(self, kind: Kind) -> frozenset[str]:
        # Docker lets everybody have the low ports of a network that is the container's own.
        if self.name == "take a port of the system's" and (kind.backend, kind.network) == ("docker", "none"):
            return frozenset({"done"})
        return self.with_network.get(kind.network, self.right)


@dataclass(frozen=True)
class Promise:
    """What docs/security.md, or a page that it leads to, promises, and its rows."""

    words: str
    rows: tuple[Row, ...]


def rows(names: Iterable[str], right: str, control: str = "") -> tuple[Row, ...]:
    """Rows that may see the same; in ``control``, ``{}`` stands for the row's name without what it is tried on."""
    return tuple(Row(name, frozenset(right.split(" | ")), control) for name in names)


def _against_process_one() -> Iterator[Row]:
    for words in AGAINST_A_PROCESS:
        right = "runs" if words == "stop or end" else "EPERM | EACCES"
        yield from rows([f"{words} process 1"], right, f"{words} its own child")


def _in_the_bundle() -> Iterator[Row]:
    for words in IN_THE_BUNDLE:
        # In a user namespace the file belongs to nobody, and that is looked at first.
        yield from rows([f"{words} in the bundle"], "EROFS | EACCES | EPERM", f"{words} in a copy")


#: A worker without CAP_SYS_RESOURCE can't set a bound for the score, and neither can its daemon.
SCORE = "EACCES" if worker_holds(CAPABILITIES["SYS_RESOURCE"]) else "EACCES | done"

PROMISES = (
    Promise(
        "Process 1 can't be traced, stopped or written to by its task",
        (
            *_against_process_one(),
            *rows(["take a descriptor of process 1"], "EPERM", UNGUARDED),
        ),
    ),
    Promise(
        "No process of others: neither neighbours nor zygote, worker or daemon",
        (
            *rows(["see processes of others"], "sees 0 of them"),
            *rows(["signal processes of others"], "reaches 0 of them"),
            *rows(["trace the zygote or the worker", "hold a process of the host"], "ESRCH"),
            # Of its own container; the neighbour tells whether it was slowed down.
            Row("slow down all processes of its user", frozenset({"done"}), of_tasks=True),
        ),
    ),
    Promise(
        "seccomp: a list of allowed system calls",
        (
            *rows(
                (
                    "make a user namespace",
                    "make a mount namespace",
                    "make a network namespace",
                    "fork into a user namespace",
                    "enter namespaces",
                    "mount",
                    "remount its root writable",
                    "unmount",
                    "change a mount",
                    "copy a mount",
                    "move a mount",
                    "open a file system",
                    "change its root by pivot_root",
                    "change its root",
                    "add a key",
                    "use keyrings",
                    "ask for a key",
                    "load a program into the kernel",
                    "use io_uring",
                    "handle page faults",
                    "watch all files",
                    "open a file by its handle",
                    "add swap",
                    "account for processes",
                    "set its domain name",
                    "read the kernel's log",
                    "advise on another's memory",
                    "compare its own child with itself",
                    "turn off what makes addresses random",
                    "use the kernel's ciphers",
                ),
                "EPERM",
                UNGUARDED,
            ),
            *rows(["fork by clone3"], "ENOSYS", UNGUARDED),
            *rows(
                (
                    "remount /proc/sys writable",
                    "measure with perf",
                    "load a module",
                    "load a module from a file",
                    "remove a module",
                    "load another kernel",
                    "restart the machine",
                    "set the time of day",
                    "set a clock",
                    "adjust the clock",
                    "see quotas",
                    "move pages of memory",
                    "reach ports of the machine",
                    "talk to the hypervisor",
                ),
                "EPERM",
            ),
        ),
    ),
    Promise(
        "seccomp: 64-bit and 32-bit x86 alike, and x32 calls end the process",
        (
            *rows(
                [f"{words}, in 32 bits" for words in IN_32_BITS if "by" not in words],
                "EPERM" if INTEL else "ENOSYS",
                UNGUARDED if INTEL else "",
            ),
            *rows(
                [f"{words}, in 32 bits" for words in IN_32_BITS if "by" in words], "ENOSYS", UNGUARDED if INTEL else ""
            ),
            *rows(["make a call of x32"], "died with -31", UNGUARDED if INTEL else ""),
        ),
    ),
    Promise(
        "No capability, in any set, and no_new_privs",
        (
            *rows(["hold a capability"], "none in any set", UNGUARDED),
            *rows(["lack no_new_privs or a filter"], "no_new_privs 1, seccomp 2", UNGUARDED),
            *rows(["gain privilege by a set-id program"], "stays who it is", UNGUARDED),
            *rows(["give up no_new_privs"], "EINVAL"),
            *rows(
                (
                    "become another user",
                    "become another group",
                    "take more groups",
                    "raise a capability",
                    "make a capability ambient",
                    "change what root may",
                    "change the bounding set",
                    "become root",
                ),
                "EPERM",
                UNGUARDED,
            ),
            *rows(["change its memory's map"], "EPERM"),
        ),
    ),
    Promise(
        "It takes no more than its share: limits and priorities can be lowered, not raised",
        (
            *rows(["be preferred"], "EACCES", UNGUARDED),
            *rows(["be preferred always", "be preferred by the disks"], "EPERM"),
            *rows(["be spared when memory is short"], SCORE),
            *rows(["dump core", "open more files"], "EPERM"),
        ),
    ),
    Promise(
        "The network: nothing raw, no interface, no low port; with none, nothing of the host",
        (
            *rows(
                (
                    "listen to every packet",
                    "send raw packets",
                    "go past the network's stack",
                    "take the loopback down",
                    "mark packets",
                    "be transparent",
                    "take memory for packets",
                    "pass for process 1 on a socket",
                ),
                "EPERM",
                UNGUARDED,
            ),
            *rows(["add an interface"], "EPERM", UNGUARDED),
            *rows(["take a port of the system's"], "EACCES", UNGUARDED),
            Row(
                "connect to the host's loopback",
                frozenset({"ECONNREFUSED"}),
                UNGUARDED,
                {"host": frozenset({"done"})},
            ),
            Row(
                "connect to an abstract socket of the host",
                frozenset({"ECONNREFUSED"}),
                UNGUARDED,
                {"host": frozenset({"done"})},
            ),
            *rows(["connect to sockets of ours"], "none"),
        ),
    ),
    Promise(
        "Terminals and devices: none of the host's",
        (
            *rows(["type for a terminal"], "ENOTTY ENXIO"),
            *rows(["see terminals of others", "see devices of the host"], "none"),
            *rows(["make a device"], "EPERM", UNGUARDED),
        ),
    ),
    Promise(
        "The image is read-only, and so is the bundle",
        (
            *rows(["write into its image"], "EROFS", UNGUARDED),
            *rows(["change a file of its image"], "EROFS | EACCES", UNGUARDED),
            *_in_the_bundle(),
            *rows(["follow a link of the bundle out of its container"], "ENOENT"),
            *rows(["see more of the agent than its files"], "none"),
            *rows(["change the agent's files"], "EROFS"),
            *rows(["take the worker's lock"], "EAGAIN"),
            *rows(["write where nobody gave it a place"], "nowhere", UNGUARDED),
            *rows(["find a set-id program of its own making"], "none"),
        ),
    ),
    Promise(
        "Masked or read-only in /proc, /sys and cgroups",
        (
            *rows(KERNEL_FILES, "EACCES | EROFS | ENOENT"),
            *rows(["write into the kernel's files", "write into cgroups"], "nowhere"),
            *rows(["read what is hidden of the kernel", "trace the kernel"], "nothing"),
        ),
    ),
    Promise(
        "Bounds of /tmp, /dev/shm and processes",
        (
            *rows(["fill /tmp"], "ENOSPC within 4 MiB", UNGUARDED),
            *rows(["fill /dev/shm"], "ENOSPC within 2 MiB", UNGUARDED),
            *rows(["fork without end"], "EAGAIN", UNGUARDED),
        ),
    ),
    Promise(
        "None of the worker's secrets, and no descriptor but the four",
        (
            *rows(["find descriptors that nobody gave it"], "none"),
            *rows(
                [
                    "find the worker's secrets in its environment",
                    "find the worker's secrets in its memory",
                    "find options of Airflow's that are secret",
                ],
                "none",
                UNGUARDED,
            ),
        ),
    ),
)
ROWS = tuple(row for promise in PROMISES for row in promise.rows)

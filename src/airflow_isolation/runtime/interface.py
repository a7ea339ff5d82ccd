"""ContainerRuntime: what a backend must do. Both backends pass the conformance suite in tests/conformance.

Order for one workload: ``ensure_image``, ``create``, ``wait``, ``start``, (``kill``,) ``remove``.
Every call has a deadline, and raises ``RuntimeUnreachable`` when the daemon can't be reached or does not answer
in time. The docstrings below don't repeat that. All errors are in ``airflow_isolation.errors``.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from airflow_isolation.container_spec import NO_STRINGS, ContainerSpec, Resources, no_strings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime
    from pathlib import Path

    from typing_extensions import Self


class PullPolicy(str, Enum):
    """When an image is pulled: always, only if it is missing, or never."""

    ALWAYS = "always"
    IF_NOT_PRESENT = "if_not_present"
    NEVER = "never"


class ContainerState(str, Enum):
    """``created``: made, not started. ``unknown``: a record without a process, or the daemon can't tell."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


#: The states in which a container has processes, or may have.
COUNTED: Final = frozenset({ContainerState.RUNNING, ContainerState.PAUSED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step of an import or a pull. ``done`` and ``total`` are bytes; ``total`` is 0 while unknown."""

    name: str
    event: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """The daemon. ``backend`` is ``containerd`` or ``docker``; ``namespace`` is where our containers are."""

    backend: str
    version: str
    socket_path: str
    namespace: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image in the daemon's store. ``digest`` identifies its content; ``size`` in bytes, 0 if not known.

    ``user`` is as in a Dockerfile's USER; empty means root. ``volumes`` are the paths of its VOLUMEs.
    """

    reference: str
    digest: str
    size: int = 0
    created_at: datetime | None = None
    architecture: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=no_strings)
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInNamespace:
    """How a container in a user namespace would see its image's files.

    ``keeps_owners``: they have the same owners as without a user namespace; otherwise they belong to nobody (65534).
    ``obstacle``: why the user could do less with them than without one, a sentence without its full stop; empty for nothing.
    """

    keeps_owners: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a container's first process ended. ``code`` is its exit code, or 128+n when signal n ended it."""

    code: int
    exited_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container as the daemon shows it now. ``pid`` is its first process in the host's pid namespace, or 0."""

    id: str
    state: ContainerState
    image: str
    pid: int = 0
    created_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=no_strings)
    exit_status: ExitStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters of one container, in seconds, bytes and counts; None when the host doesn't count it.

    A pressure is the share of the last ten seconds, 0 to 100, in which at least one process had to wait for the resource.
    """

    cpu_seconds: float | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    cpu_throttled: float | None = None
    memory: int | None = None
    memory_limit: int | None = None
    memory_peak: int | None = None
    oom_kills: int | None = None
    pids: int | None = None
    pids_limit: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None
    io_pressure: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A left-over on this host of a container that its daemon has no record of; ``kind`` is such as cgroup or shim."""

    kind: str
    id: str
    detail: str = ""


class PendingExit(ABC):
    """The answer to ``wait``: its descriptor becomes readable when the container has ended.

    It survives a restart of the daemon: it then waits anew, until ``close``.
    """

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor, for ``select``. It is readable when ``result`` would return at once."""

    @abstractmethod
    def result(self, timeout: float | None = None) -> ExitStatus:
        """The exit status; may be called many times. The code is 255 also when it is not known: the shim died, or the
        container ended and was removed while the daemon was down.

        :raises TimeoutError: it has not ended within ``timeout`` seconds; the wait goes on.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop waiting, and release descriptor and thread. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ContainerRuntime(ABC):
    """One daemon, and in it the containers and images of one namespace.

    Several threads may use it. Not to be used after a fork.
    """

    @abstractmethod
    def info(self) -> RuntimeInfo:
        """What daemon answers at the socket."""

    @abstractmethod
    def ensure_image(
        self,
        reference: str,
        policy: PullPolicy = PullPolicy.IF_NOT_PRESENT,
        *,
        progress: Callable[[Progress], None] | None = None,
        timeout: float = 600.0,
    ) -> Image:
        """Pull the image as ``policy`` says, and unpack it.

        Callers for one image, also in several processes, share one pull.

        May be called twice.

        :raises ImageNotFound: it is not here and ``policy`` is never, or the registry does not know it.
        :raises ImagePullFailed: the pull failed or took longer than ``timeout`` seconds.
        :raises ImageInvalid: it is for another platform, or broken.
        """

    @abstractmethod
    def import_image(
        self, archive: Path, *, reference: str = "", progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        """Load an OCI or docker archive and unpack it.

        Images keep their names; if there is only one, ``reference`` replaces it.

        May be called twice.

        :raises ImageInvalid: no archive, truncated, without a name or for another architecture; nothing of it stays.
        """

    @abstractmethod
    def list_images(self) -> tuple[Image, ...]:
        """Every image of the namespace, by reference."""

    @abstractmethod
    def remove_image(self, reference: str) -> None:
        """Remove the name, and the content when nothing else needs it. Waits until its disk space is free.

        :raises ImageNotFound: no image has that name.
        """

    def in_user_namespace(self, spec: ContainerSpec, *, digest: str, ids: int) -> ImageInNamespace:  # noqa: ARG002
        """How ``spec``'s user would see its image, which has that ``digest``, in a user namespace of so many ids.

        The answer is kept for each image and user. The first time may take minutes, if the kernel can't map ids.

        :raises ImageNotFound: ``ensure_image`` was not called, or the image has been removed since.
        :raises SpecRefused: the user can't be resolved, or is not allowed.
        """
        return ImageInNamespace(obstacle="this backend has no user namespace of a single container")

    @abstractmethod
    def create(self, id: str, spec: ContainerSpec) -> Container:
        """Make the container and its first process, which does not run yet. If this fails half way, nothing stays.

        :raises ContainerExists: the id is taken.
        :raises SpecRefused: the backend can't do what ``spec`` asks, or it would not be safe.
        :raises ImageNotFound: ``ensure_image`` was not called, or the image has been removed since.
        :raises ContainerFailed: the runtime failed; the error has its words.
        """

    @abstractmethod
    def wait(self, id: str) -> PendingExit:
        """Begin to wait for the end. Call it before ``start``, so that no short life is missed. May be called many times.

        :raises ContainerNotFound: no such container.
        """

    @abstractmethod
    def start(self, id: str) -> int:
        """Let the first process run; returns its pid in the host's pid namespace, or 0 when it has ended already. Once only.

        :raises ContainerNotFound: no such container.
        :raises ContainerFailed: there is no such program in the image, an exec format error, started before, and the like.
        """

    @abstractmethod
    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None:
        """Send a signal to the first process, or with ``everyone`` to all. Success if the container has ended or is gone."""

    def signals_asked_for(self, id: str) -> tuple[signal.Signals, ...]:  # noqa: ARG002
        """Which signals anybody had the daemon send to a container, the oldest first, as far as the daemon remembers.

        Docker has its last events, of all containers, until it is restarted. Containerd writes down none, and neither says
        who asked. Empty for a container that nobody knows.
        """
        return ()

    @abstractmethod
    def update(self, id: str, resources: Resources) -> None:
        """Change limits of a container that has not ended; what is None in ``resources`` stays. May be called twice.

        If the runtime sets the limits (on cgroup v1, or when the worker has no cgroups of its own), ``memory_swap`` goes with
        ``memory``: memory given without it switches swap off. ``oom_group`` can't be changed.

        :raises ContainerNotFound: no such container.
        :raises ContainerFailed: it has ended, or the runtime failed; the error has its words.
        :raises SpecRefused: this host can't do it, it is more than the budget, or less memory than is in use. Nothing changed.
        """

    @abstractmethod
    def relabel(self, id: str, labels: Mapping[str, str]) -> None:
        """Replace a container's labels. May be called twice.

        :raises ContainerNotFound: no such container.
        """

    @abstractmethod
    def remove(self, id: str) -> None:
        """Kill the container and release all that ``create`` acquired.

        Success if it is gone already; may be called twice.
        """

    @abstractmethod
    def remove_strays(self, *, dry_run: bool = False) -> tuple[Stray, ...]:
        """End and remove left-overs of our containers that the daemon has no record of: cgroups in every hierarchy, shims
        and files; also what dead workers hold in the daemon. May be called twice. ``dry_run`` only returns them.

        A container's record is made first and deleted last. So what has no record belongs to no living container, even while
        a worker makes and removes containers. What belongs to a shim of another daemon is left alone.
        """

    @abstractmethod
    def seen_on_host(self) -> frozenset[str]:
        """The ids of containers that have a cgroup, a shim or files on this host. The daemon is not asked: a few directories
        are listed. Empty when these don't have our ids in their names.
        """

    def remove_unused_roots(self, *, dry_run: bool = False) -> tuple[Path, ...]:  # noqa: ARG002
        """Unmount what was mounted for containers in user namespaces and is not used now. ``dry_run`` only returns it.

        :raises ContainerRuntimeError: the kernel refused; the error has its reason.
        """
        return ()

    @abstractmethod
    def get(self, id: str) -> Container:
        """The container as it is now.

        :raises ContainerNotFound: we have no such container.
        """

    @abstractmethod
    def list(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[Container, ...]:
        """Our containers that have all of ``labels``, oldest first.

        With Docker the list has no pids and no end times; ``get`` has them.
        """

    def list_with_use(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[tuple[Container, Stats | None], ...]:
        """As ``list``, each with its processor time, memory and processes now; other counters may be missing.

        The counters are None for a container that does not run, or that this host doesn't count. Faster than ``list`` and
        ``stats`` together.
        """
        containers = self.list(labels)
        stats = self.stats([container.id for container in containers if container.state in COUNTED])
        return tuple((container, stats.get(container.id)) for container in containers)

    @abstractmethod
    def stats(self, ids: Iterable[str]) -> Mapping[str, Stats]:
        """Counters of these containers now; ids that are gone or not running are left out."""

    @abstractmethod
    def output(self, id: str, *, limit: int = 65536) -> bytes:
        """The last ``limit`` bytes of what the container's first process wrote to stdout and stderr.

        :raises ContainerNotFound: no such container.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection; containers live on. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

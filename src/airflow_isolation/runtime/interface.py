"""ContainerRuntime: what a backend must do. Both backends pass the conformance suite in tests/conformance.

Order for one workload: ``ensure_image``, ``create``, ``wait``, ``start``, (``kill``,) ``remove``.
Every call has a deadline and raises ``RuntimeUnreachable`` when the daemon can't be reached or does not answer
in time; that is not repeated below. All other errors are in ``airflow_isolation.errors``.
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
    from types import TracebackType

    from typing_extensions import Self


class PullPolicy(str, Enum):
    """When an image is pulled: each time, when it is not here, or not at all."""

    ALWAYS = "always"
    IF_NOT_PRESENT = "if_not_present"
    NEVER = "never"


class ContainerState(str, Enum):
    """``created``: made, not started. ``unknown``: a record without a process, or a daemon that can't say."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


#: The states in which something of a container can be in use.
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
    """``backend`` is ``containerd`` or ``docker``; ``namespace`` is where our containers live."""

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
    """What an image's files are to its user in a user namespace.

    ``keeps_owners``: they are whose they are without one; else nobody's. ``obstacle``: why the user could not do there
    what it can without one, a sentence without its full stop; empty for nothing.
    """

    keeps_owners: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a container's first process ended: ``code`` as runtimes count, 128+n when signal n ended it."""

    code: int
    exited_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container as the daemon has it now. ``pid`` is its first process in the host's pid namespace, or 0."""

    id: str
    state: ContainerState
    image: str
    pid: int = 0
    created_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=no_strings)
    exit_status: ExitStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters of one container. Seconds, bytes and counts; None where the host doesn't give the figure.

    The pressures are shares, 0 to 100, of the last ten seconds, in which at least one of its processes had to wait for
    the resource.
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
    """What is on this host of a container that its daemon has no record of; ``kind`` such as cgroup, or shim."""

    kind: str
    id: str
    detail: str = ""


class PendingExit(ABC):
    """The answer to ``wait``: a descriptor that becomes readable when the container has ended.

    It survives a restart of the daemon: the question is then asked again, until ``close``.
    """

    @abstractmethod
    def fileno(self) -> int:
        """Readable, for ``select``, once ``result`` would answer at once."""

    @abstractmethod
    def result(self, timeout: float | None = None) -> ExitStatus:
        """The exit status; may be called many times. Code 255 also when nobody knows it: the shim died, or the container
        ended and was taken away while the daemon was down.

        :raises TimeoutError: not within ``timeout`` seconds; the wait goes on.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop waiting and release descriptor and thread. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ContainerRuntime(ABC):
    """One daemon, and in it the containers and images of one namespace. Usable from several threads, not over a fork."""

    @abstractmethod
    def info(self) -> RuntimeInfo:
        """Who answers at the socket."""

    @abstractmethod
    def ensure_image(
        self,
        reference: str,
        policy: PullPolicy = PullPolicy.IF_NOT_PRESENT,
        *,
        progress: Callable[[Progress], None] | None = None,
        timeout: float = 600.0,
    ) -> Image:
        """Have the image here, unpacked and ready. Several callers for one image, also in several processes, make one pull.

        :raises ImageNotFound: it is not here and ``policy`` is never, or the registry does not know it.
        :raises ImagePullFailed: the pull failed or took longer than ``timeout`` seconds.
        :raises ImageInvalid: wrong platform, or broken.
        """

    @abstractmethod
    def import_image(
        self, archive: Path, *, reference: str = "", progress: Callable[[Progress], None] | None = None
    ) -> tuple[Image, ...]:
        """Load an OCI or docker archive and unpack it. The images in it keep their names, or the only one gets ``reference``.

        :raises ImageInvalid: truncated, not an archive, no name, wrong architecture; nothing of it stays.
        """

    @abstractmethod
    def list_images(self) -> tuple[Image, ...]:
        """Every image of the namespace, by reference."""

    @abstractmethod
    def remove_image(self, reference: str) -> None:
        """Remove the name, and the content when nothing else needs it. Waits until the space is given back.

        :raises ImageNotFound: no image has that name.
        """

    def in_user_namespace(self, spec: ContainerSpec, *, digest: str, ids: int) -> ImageInNamespace:  # noqa: ARG002
        """What the files of ``spec``'s image, which has that ``digest``, are to its user in a namespace of so many ids.

        Looked at once for an image and a user, which takes up to minutes where the kernel can't map ids; then kept.

        :raises ImageNotFound: ``ensure_image`` was not called, or the image has been removed since.
        :raises SpecRefused: the user can't be.
        """
        return ImageInNamespace(obstacle="this backend has no user namespace of a single container")

    @abstractmethod
    def create(self, id: str, spec: ContainerSpec) -> Container:
        """Make the container and its first process, not yet running. When it fails half way, nothing stays.

        :raises ContainerExists: the id is taken.
        :raises SpecRefused: the backend can't do what ``spec`` asks, or it would not be safe.
        :raises ImageNotFound: ``ensure_image`` was not called, or the image has been removed since.
        :raises ContainerFailed: with the runtime's own words.
        """

    @abstractmethod
    def wait(self, id: str) -> PendingExit:
        """Begin to wait for the end; ask before ``start``, so that a short life can't be missed. May be asked many times.

        :raises ContainerNotFound: no such container.
        """

    @abstractmethod
    def start(self, id: str) -> int:
        """Let the first process run; gives its pid in the host's pid namespace, or 0 when it has ended already.

        :raises ContainerNotFound: no such container.
        :raises ContainerFailed: no such program in the image, exec format error, started before, and the like.
        """

    @abstractmethod
    def kill(self, id: str, signal: signal.Signals = signal.SIGKILL, *, everyone: bool = False) -> None:
        """Send a signal to the first process, or to ``everyone`` in the container. Gone or ended already is success."""

    @abstractmethod
    def update(self, id: str, resources: Resources) -> None:
        """Change limits of a container that has not ended; what is None in ``resources`` stays. May be called twice.

        Where the runtime holds the limits (cgroup v1, and where the worker has no cgroups of its own), ``memory_swap``
        goes with ``memory``: memory alone is without swap. ``oom_group`` can't be changed.

        :raises ContainerNotFound: no such container.
        :raises ContainerFailed: it has ended; or with the runtime's own words.
        :raises SpecRefused: this host can't do it; more than the budget; less memory than is in use. Then all is as before.
        """

    @abstractmethod
    def relabel(self, id: str, labels: Mapping[str, str]) -> None:
        """Give a container other labels in the place of those it has. May be called twice.

        :raises ContainerNotFound: no such container.
        """

    @abstractmethod
    def remove(self, id: str) -> None:
        """End the container at once and release all that ``create`` acquired. Gone already is success; may be called twice."""

    @abstractmethod
    def remove_strays(self, *, dry_run: bool = False) -> tuple[Stray, ...]:
        """End and remove what is on this host of containers of ours that the daemon has no record of: cgroups in every
        hierarchy, shims, files; and what dead workers hold in the daemon. With ``dry_run`` tell of it alone.

        A container's record is made before anything else of it and deleted last: what has none is nobody's, also while
        a living worker makes and removes containers. What another daemon's shim stands for is not ours.
        """

    @abstractmethod
    def seen_on_host(self) -> frozenset[str]:
        """The ids of containers that have a cgroup, a shim or files on this host, without a question to the daemon: a few
        directories are listed. Empty where those don't bear our ids.
        """

    def remove_unused_roots(self, *, dry_run: bool = False) -> tuple[Path, ...]:  # noqa: ARG002
        """Take away what has been mounted for containers in user namespaces and serves none now; with ``dry_run`` name it.

        :raises ContainerRuntimeError: with the kernel's reason.
        """
        return ()

    @abstractmethod
    def get(self, id: str) -> Container:
        """:raises ContainerNotFound: no such container of ours."""

    @abstractmethod
    def list(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[Container, ...]:
        """Our containers that carry all of ``labels``, oldest first.

        Docker's list has no pids and no times of the end: ``get`` has them.
        """

    def list_with_use(self, labels: Mapping[str, str] = NO_STRINGS) -> tuple[tuple[Container, Stats | None], ...]:
        """As ``list``, each with its processor time, memory and processes now; other counters may be missing.

        None beside what does not run, and where nothing is counted. In one pass, which takes less than ``list`` and ``stats``.
        """
        containers = self.list(labels)
        stats = self.stats([container.id for container in containers if container.state in COUNTED])
        return tuple((container, stats.get(container.id)) for container in containers)

    @abstractmethod
    def stats(self, ids: Iterable[str]) -> Mapping[str, Stats]:
        """Counters now, in one pass; ids that are gone or not running are left out."""

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

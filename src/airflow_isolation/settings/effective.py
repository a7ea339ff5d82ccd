"""What ``resolve`` gives: the settings that hold for one workload, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_isolation.container_spec import Resources, no_strings
from airflow_isolation.errors import PolicyRefused, SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_isolation.runtime.interface import PullPolicy

Backend = Literal["containerd", "docker"]
Purpose = Literal["task", "parse"]
ParseMode = Literal["fork", "fresh"]
StartMode = Literal["auto", "fork", "fresh"]

#: How many uids and gids a user namespace gets: the usual number.
UIDS_OF_AN_IMAGE = 65536


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written.

    Attributes:
        source: a section of airflow.cfg, an environment variable, a file, ``executor_config``, the hook or ``default``.
        key: the key as a reader of ``source`` finds it, such as ``container.resources.memory``.
        line: counts from 1; None where there are no lines.
        author: written by a DAG's author, not by the administrator: the policy holds for it.

    """

    source: str
    key: str = ""
    line: int | None = None
    author: bool = False

    def error(self, message: str, *, hint: str = "") -> SettingError:
        """The error to raise when this value is wrong."""
        return SettingError(message, source=self.source, line=self.line, key=self.key, hint=hint)

    def refusal(self, message: str, *, hint: str = "") -> PolicyRefused:
        """The error to raise when this value is well formed, but forbidden."""
        return PolicyRefused(message, source=self.source, line=self.line, key=self.key, hint=hint)

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory or file of the host in the container. Paths are absolute and normalised, but may still be symlinks."""

    source: str
    target: str
    read_only: bool = True

    def __str__(self) -> str:
        return f"{self.source}:{self.target}:{'ro' if self.read_only else 'rw'}"


class Grant(NamedTuple):
    """Files that may use something: two shell patterns, of ``BUNDLE/PATH`` and of an id."""

    file: str
    id: str

    def __str__(self) -> str:
        return f"{self.file}:{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What the code of a DAG file, given as ``BUNDLE/PATH``, may ask Airflow for. Empty allows everything."""

    allowed_connections: tuple[Grant, ...] = ()
    allowed_variables: tuple[Grant, ...] = ()
    allowed_triggering: tuple[Grant, ...] = ()
    allowed_triggers: tuple[Grant, ...] = ()
    allowed_assets: tuple[Grant, ...] = ()

    def may_read_connection(self, file: str, id: str) -> bool:
        return _granted(self.allowed_connections, file, id)

    def may_use_variable(self, file: str, key: str) -> bool:
        return _granted(self.allowed_variables, file, key)

    def may_trigger(self, file: str, dag_id: str) -> bool:
        return _granted(self.allowed_triggering, file, dag_id)

    def may_name(self, file: str, path: str) -> bool:
        """Whether Airflow may import and call the class or function ``path`` at this file's word."""
        return _granted(self.allowed_triggers, file, path)

    def may_update(self, file: str, asset: str) -> bool:
        """``asset``: its name or URI."""
        return _granted(self.allowed_assets, file, asset)


def _granted(grants: tuple[Grant, ...], file: str, id: str) -> bool:
    return not grants or any(fnmatchcase(file, grant.file) and fnmatchcase(id, grant.id) for grant in grants)


@dataclass(frozen=True, slots=True)
class UidRange:
    """A range of the host's uids, and of the gids with the same numbers. ``count`` 0 is an empty range."""

    first: int
    count: int

    def __str__(self) -> str:
        return f"{self.first}:{self.count}" if self.count else "none"


class Row(NamedTuple):
    """One effective setting, for people: the key, its value as text, and where it was written."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """How to reach the daemon, and which places of this host are used. The same for every workload of a backend.

    Empty text means the backend's own default. ``snapshotter``, ``runtime_binary`` and ``hosts_dir`` are containerd's.
    """

    backend: Backend
    socket_path: str
    namespace: str
    cgroup_mount_path: str
    state_dir: Path
    snapshotter: str = ""
    runtime_binary: str = ""
    hosts_dir: str = ""
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsePoolSettings:
    """What holds for the containers of a DAG processor together. Durations are seconds, sizes bytes; None is no bound."""

    parse_containers: int
    parse_idle_timeout: float
    parse_max_age: float
    parse_max_forks: int
    parse_max_memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """The service of a host that makes tasks' containers.

    Attributes:
        node: its socket; empty when each worker makes its containers itself.
        node_clients: who may ask it besides root and its own user: users, and groups behind an @, by name or number.
        node_timeout: seconds that a worker waits for it.
        admission: whether tasks wait until there is room for them.
        capacity_memory, capacity_cpus: bytes and cores of all tasks together; None is not set.
        admission_timeout: seconds that a task waits.

    """

    node: str = ""
    node_clients: tuple[str, ...] = ()
    node_timeout: float
    admission: bool
    capacity_memory: int | None = None
    capacity_cpus: float | None = None
    admission_timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteSettings:
    """What holds for the processes from which tasks are forked. Durations are seconds, sizes bytes; None is not set."""

    spare_containers: int
    uid_range: UidRange | None = None
    zygote_idle_timeout: float
    zygote_max_age: float
    zygote_max_forks: int
    zygote_memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveSettings:
    """What holds for one workload. Durations are seconds, sizes bytes; empty text is the image's or backend's default.

    ``rows`` has every key with its value and origin, in the order of docs/settings.md; ``origins`` gives the origin
    of one key, where ``environment``, ``labels`` and ``volumes`` go by ``environment.NAME``, ``labels.NAME`` and
    ``volumes.TARGET``.
    """

    purpose: Purpose
    connection: ConnectionSettings
    image: str
    image_pull_policy: PullPolicy
    image_pull_timeout: float
    volumes: tuple[Volume, ...]
    environment: Mapping[str, str] = field(default_factory=no_strings)
    labels: Mapping[str, str] = field(default_factory=no_strings)
    run_as_user: str
    allow_root: bool
    network: str
    resources: Resources
    budget: Resources
    shm_size: int
    tmp_size: int
    read_only_root: bool
    capabilities: frozenset[str]
    seccomp_profile: str
    working_dir: str
    timezone: str
    hostname: str
    stop_grace_period: float
    start_timeout: float
    python: str
    parse_mode: ParseMode
    start_mode: StartMode
    image_is_trusted: bool
    permissions: Permissions
    zygote: ZygoteSettings
    cgroup_parent: str
    origins: Mapping[str, Origin]
    rows: tuple[Row, ...]

    @property
    def backend(self) -> Backend:
        return self.connection.backend

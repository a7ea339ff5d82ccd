"""What a worker asks the node to start: words of authors and of the worker's Airflow, which the node's settings judge."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from airflow_isolation.container_spec import NO_STRINGS, Mount, no_strings
from airflow_isolation.node.protocol import Malformed
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Of each list of mounts: there are the bundle, two directories of Airflow's, and rarely one of a DAG file.
_MOST_MOUNTS: Final = 8
_LONGEST_PATH: Final = 4096
#: Of all tmpfs that a request has: they only make room for a mount below a closed directory.
_LARGEST_TMPFS: Final = 1024 * 1024
_LONGEST_LABEL: Final = 1024

#: What a worker knows of its task; the other labels are the node's own words.
_LABELS: Final = frozenset(
    {
        labels.DAG_ID,
        labels.TASK_ID,
        labels.RUN_ID,
        labels.MAP_INDEX,
        labels.TRY_NUMBER,
        labels.TI_ID,
        labels.BUNDLE,
        labels.DAG_FILE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """A task that is to be started.

    The descriptors beside it, in this order: the workload's side of its four channels, the worker's mount namespace, the
    source of each bind mount of ``mounts`` and ``shared_mounts``, and, if ``has_document``, the DAG metadata.

    Attributes:
        backend: which daemon the worker expects.
        executor_config: the part that is ours, as the author wrote it.
        document_source: the path of the DAG metadata on the worker, for errors.
        forwarded, own: variables of every task of the worker, and of this task.
        mounts, shared_mounts: targets; sources are descriptors.
        settings_digest: as in ``OfTheWorker``.
        pull_timeout: seconds that the worker gives a pull.

    """

    backend: str
    airflow: str
    dag_id: str
    task_id: str
    executor_config: Mapping[str, Any] = field(default_factory=dict)
    has_document: bool = False
    document_source: str = ""
    labels: Mapping[str, str] = field(default_factory=no_strings)
    forwarded: Mapping[str, str] = field(default_factory=no_strings)
    own: Mapping[str, str] = field(default_factory=no_strings)
    mounts: tuple[Mount, ...] = ()
    shared_mounts: tuple[Mount, ...] = ()
    settings_digest: str = ""
    pull_timeout: float = 600.0

    @property
    def binds(self) -> tuple[Mount, ...]:
        """Those mounts that have a descriptor each, in their order."""
        return tuple(mount for mount in (*self.mounts, *self.shared_mounts) if mount.kind == "bind")

    def as_message(self) -> dict[str, Any]:
        """For the worker, to send it."""
        return {
            "backend": self.backend,
            "airflow": self.airflow,
            "dag_id": self.dag_id,
            "task_id": self.task_id,
            "executor_config": dict(self.executor_config),
            "has_document": self.has_document,
            "document_source": self.document_source,
            "labels": dict(self.labels),
            "forwarded": dict(self.forwarded),
            "own": dict(self.own),
            "mounts": [_written(mount) for mount in self.mounts],
            "shared_mounts": [_written(mount) for mount in self.shared_mounts],
            "settings_digest": self.settings_digest,
            "pull_timeout": self.pull_timeout,
        }

    @classmethod
    def of_message(cls, said: object) -> StartRequest:
        """For the node.

        :raises Malformed: something is missing, or of a wrong kind, or not allowed.
        """
        if not isinstance(said, dict):
            raise Malformed("a request is no JSON object")
        return cls(
            backend=_text(said, "backend"),
            airflow=_text(said, "airflow"),
            dag_id=_text(said, "dag_id"),
            task_id=_text(said, "task_id"),
            executor_config=_of_kind(said, "executor_config", dict),
            has_document=_of_kind(said, "has_document", bool),
            document_source=_text(said, "document_source"),
            labels=_checked_labels(_texts(said, "labels")),
            forwarded=_texts(said, "forwarded"),
            own=_texts(said, "own"),
            mounts=_mounts(said, "mounts"),
            shared_mounts=_mounts(said, "shared_mounts"),
            settings_digest=_text(said, "settings_digest"),
            pull_timeout=_seconds(said, "pull_timeout"),
        )


def _written(mount: Mount) -> dict[str, Any]:
    if mount.kind == "bind":
        return {"target": mount.target}
    return {"target": mount.target, "size": mount.size, "mode": mount.mode}


def _of_kind(said: Mapping[str, Any], name: str, kind: type) -> Any:
    value = said.get(name)
    if not isinstance(value, kind):
        raise Malformed(f"{name} of a request is a {type(value).__name__} and must be a {kind.__name__}")
    return value


def _text(said: Mapping[str, Any], name: str) -> str:
    value: str = _of_kind(said, name, str)
    if "\0" in value:
        raise Malformed(f"{name} of a request has a NUL")
    return value


def _texts(said: Mapping[str, Any], name: str) -> Mapping[str, str]:
    value = _of_kind(said, name, dict)
    for key, text in value.items():
        if not isinstance(text, str) or "\0" in text or "\0" in key or "=" in key or not key:
            raise Malformed(f"{name} of a request has something else than text by names, or a NUL")
    return MappingProxyType(value) if value else NO_STRINGS


def _seconds(said: Mapping[str, Any], name: str) -> float:
    value = said.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 86_400:
        raise Malformed(f"{name} of a request is no number of seconds")
    return float(value)


def _checked_labels(found: Mapping[str, str]) -> Mapping[str, str]:
    for name, text in found.items():
        if name not in _LABELS or len(text) > _LONGEST_LABEL:
            raise Malformed(f"the label {name[:64]!r} is not a worker's to give, or is too long")
    return found


def _mounts(said: Mapping[str, Any], name: str) -> tuple[Mount, ...]:
    listed = _of_kind(said, name, list)
    if len(listed) > _MOST_MOUNTS:
        raise Malformed(f"{name} of a request has more than {_MOST_MOUNTS} entries")
    return tuple(_mount(entry) for entry in listed)


def _mount(entry: object) -> Mount:
    match entry:
        case {"target": str(target), "size": int(size), "mode": int(mode)}:
            if not 0 < size <= _LARGEST_TMPFS or not 0 <= mode <= 0o1777:
                raise Malformed("a tmpfs of a request is too large, or has a wrong mode")
            return Mount(target=_target(target), kind="tmpfs", size=size, mode=mode)
        case {"target": str(target)}:
            return Mount(target=_target(target))
    raise Malformed("a mount of a request is none")


def _target(path: str) -> str:
    well_formed = path.startswith("/") and path == posixpath.normpath(path) and not path.startswith("//")
    if not well_formed or path == "/" or "\0" in path or len(path) > _LONGEST_PATH:
        raise Malformed(f"{path[:200]!r} is no place for a mount")
    if path.split("/")[1] in {"proc", "sys", "dev"}:
        raise Malformed(f"{path[:200]!r} is no place for a mount: what lies there is the kernel's")
    return path

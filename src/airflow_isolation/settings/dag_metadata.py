"""The YAML beside a DAG file: ``sales.yaml`` or ``sales.yml`` for ``sales.py``, ``sales.zip.yaml`` for ``sales.zip``.

For a zip the name keeps ``.zip``, because ``sales.py`` may stand beside it. The YAML is read when its top level has the
key ``container``, ``docker`` or ``containerd``; its other keys are ignored. A file without such a key belongs to other
programs and is ignored, whatever it holds: a template, a stream of documents, ten megabytes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.declarations import BACKENDS
from airflow_isolation.settings.document import MAX_BYTES, MapNode, Node, from_python, map_items, parse_yaml
from airflow_isolation.settings.layers import Layer, document_layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_isolation.settings.effective import Backend

COMMON: Final = "container"
OUR_KEYS: Final = (COMMON, *BACKENDS)
EXECUTOR_CONFIG: Final = "executor_config"
SUFFIXES: Final = (".yaml", ".yml")

# Finds a key of ours at the top level: in the first column, or anywhere when the whole document is one {…} (a template's
# {{ or {% doesn't count). A file in which this finds nothing is never parsed.
_OURS: Final = re.compile(rf"^(?P<quote>[\"']?)(?:{'|'.join(OUR_KEYS)})(?P=quote)[ \t]*:", re.MULTILINE)
_IN_BRACES: Final = re.compile(rf"\s*(?:---\s*)?\{{(?![{{%#]).*\b(?:{'|'.join(OUR_KEYS)})\b", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TaskPattern:
    """One entry of ``tasks``: a shell pattern for task ids, and what holds for the tasks that match."""

    pattern: str
    layer: Layer


@dataclass(frozen=True, slots=True)
class DagMetadata:
    """What an author wrote, by the key it stands under: ``container``, ``docker`` or ``containerd``."""

    layers: Mapping[str, Layer]
    tasks: Mapping[str, tuple[TaskPattern, ...]]

    def for_backend(self, backend: Backend, task_id: str | None) -> Iterator[Layer]:
        """The layers that hold, the weakest first. ``task_id`` is None for a parse: ``tasks`` are for tasks only."""
        keys = (COMMON, backend)
        yield from (self.layers[key] for key in keys if key in self.layers)
        if task_id is not None:
            for key in keys:
                yield from (task.layer for task in self.tasks.get(key, ()) if fnmatchcase(task_id, task.pattern))

    def everything(self, backend: Backend) -> Iterator[Layer]:
        """Every layer that could hold on this backend, for some task."""
        for key in (COMMON, backend):
            if key in self.layers:
                yield self.layers[key]
            yield from (task.layer for task in self.tasks.get(key, ()))


@dataclass(frozen=True, slots=True)
class Document:
    """The file beside a DAG file, unread: at most one byte more than ``MAX_BYTES``, and its path."""

    data: bytes
    source: str


def read_dag_metadata(dag_file: Path, bundle_path: Path | None = None) -> DagMetadata | None:
    """``find_document`` and ``read_document``, one after the other."""
    document = find_document(dag_file, bundle_path)
    return read_document(document) if document is not None else None


def read_document(document: Document) -> DagMetadata | None:
    """What it says; None when it is somebody else's.

    :raises SettingError: it holds a mistake.
    """
    return _parse(document.data, document.source)


def find_document(dag_file: Path, bundle_path: Path | None = None) -> Document | None:
    """The YAML file of a DAG file, or None when there is none. ``dag_file`` may be relative to the bundle.

    A symbolic link is followed as long as it stays in the bundle.

    :raises SettingError: there are two such files, or the one leads out of the bundle or can't be read.
    """
    dag_file = _dag_file_or_archive(bundle_path / dag_file if bundle_path else dag_file)
    stem = dag_file if dag_file.suffix == ".zip" else dag_file.with_suffix("")
    found = [path for suffix in SUFFIXES if os.path.lexists(path := stem.with_name(stem.name + suffix))]
    if not found:
        return None
    if len(found) > 1:
        raise SettingError(
            f"{found[1].name} stands beside it, for the same DAG file", source=str(found[0]), hint="Keep one"
        )
    return Document(_read(found[0], bundle_path or dag_file.parent), str(found[0]))


def executor_config_metadata(executor_config: object) -> DagMetadata | None:
    """``container``, ``docker`` and ``containerd`` of an executor_config; other keys are for other executors.

    :raises SettingError: they hold a mistake, or ``executor_config`` is no map (authors may write anything).
    """
    if executor_config is None:
        return None
    if not isinstance(executor_config, Mapping):
        raise SettingError(f"a map belongs here, and this is {type(executor_config).__name__}", source=EXECUTOR_CONFIG)
    ours = {key: executor_config[key] for key in OUR_KEYS if key in executor_config}
    if not ours:
        return None
    nodes = {key: from_python(value, EXECUTOR_CONFIG, key, author=True) for key, value in ours.items()}
    return DagMetadata({key: document_layer(node) for key, node in nodes.items()}, {})


def _dag_file_or_archive(dag_file: Path) -> Path:
    # The path of a DAG in an archive is sales.zip/inner.py; parse and task must find the same metadata.
    archive = next((parent for parent in dag_file.parents if parent.suffix == ".zip" and parent.is_file()), None)
    return archive or dag_file


def _read(path: Path, bundle_path: Path) -> bytes:
    source = str(path)
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(bundle_path.resolve()):
            raise SettingError("this is a symbolic link that leads out of the bundle", source=source)
        # Authors made this file: opening it must not block (a FIFO), nor follow a link that was put there meanwhile.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SettingError("this is not a regular file", source=source)
            return file.read(MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:  # a RuntimeError is a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingError(f"the file can't be read: {reason}", source=source) from None


@lru_cache(maxsize=128)
def _parse(data: bytes, source: str) -> DagMetadata | None:
    """Cached by the content, not by a time stamp, so that a changed file is always parsed anew."""
    text = data.decode("utf-8-sig", errors="replace")
    if not _OURS.search(text) and not _IN_BRACES.match(text):
        return None
    if len(data) > MAX_BYTES:
        raise SettingError(f"the file is larger than {MAX_BYTES // 1024} KiB", source=source)
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise SettingError("the file is not UTF-8 text", source=source)
    root = parse_yaml(text, source, author=True)
    if not isinstance(root, MapNode):
        return None
    for origin, message in root.misfits:
        if origin.key in OUR_KEYS:
            raise origin.error(message)
    ours = {key: root.entries[key] for key in OUR_KEYS if key in root.entries}
    if not ours:
        return None
    layers: dict[str, Layer] = {}
    tasks: dict[str, tuple[TaskPattern, ...]] = {}
    for key, node in ours.items():
        layers[key], tasks[key] = _with_tasks(node)
    return DagMetadata(layers, tasks)


def _with_tasks(node: Node) -> tuple[Layer, tuple[TaskPattern, ...]]:
    entries = dict(map_items(node))
    tasks = entries.pop("tasks", None)
    layer = document_layer(MapNode(entries, node.origin))
    patterns = map_items(tasks) if tasks is not None else {}
    return layer, tuple(TaskPattern(pattern, document_layer(entry)) for pattern, entry in patterns.items())

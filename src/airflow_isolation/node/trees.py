"""Directories of workers as the daemon sees them: copies of their mounts below ``<state_dir>/trees``, by descriptors.

A worker names a directory by opening it: so it can name none that it may not read, whatever its path is in its mount
namespace, and what lies at the path later is of no matter. The copy is made once for a directory and a namespace and
serves all tasks; a running container has mounts of its own and needs it no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.bridge.held import held
from airflow_isolation.errors import HostTrouble, IsolationError, SpecRefused
from airflow_isolation.runtime.host_trouble import writing_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

log = structlog.get_logger(logger_name="airflow_isolation.trees")

#: How long a copy that no task has needed stays, in seconds.
IDLE_SECONDS = 600.0

#: So many are kept; beyond them the idle ones go at once.
MOST_TREES = 1024

_TREES = "trees"
_SECONDS = 30.0
_PROGRAM = Path(__file__).with_name("clone_trees.py")


@dataclass
class _Tree:
    path: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_there: bool = False
    users: int = 0
    used: float = 0.0


class Trees:
    """Those of one node, as a context: at its end all of them go. Of a node that was killed the next takes them away."""

    def __init__(self, state_dir: Path, *, daemon_pid: Callable[[], int]) -> None:
        """``daemon_pid``: in whose mount namespace they are to be seen; 0 for ours."""
        self._place = state_dir / _TREES
        self._daemon_pid = daemon_pid
        self._lock = threading.Lock()
        self._trees: dict[str, _Tree] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """:raises HostTrouble: the directory can't be made, or what a killed node has left in it can't be taken away."""
        with writing_in(self._place.parent):
            self._place.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._held.enter_context(held(self._place))
        _detach(sorted(self._place.glob("*")), self._daemon_pid())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.release_idle(older_than=0.0)
        except IsolationError as error:
            log.warning("Directories of workers could not be taken away; the next node does it", error=str(error))
        self._held.close()

    @contextmanager
    def shown(self, directories: Sequence[int], *, namespace: int) -> Iterator[tuple[Path, ...]]:
        """Where the directories, open descriptors of a worker in ``namespace``, are on the host while this is open.

        :raises SpecRefused: a descriptor is no directory that can be mounted.
        :raises HostTrouble: the kernel refuses.
        """
        trees = []
        try:
            for directory in directories:
                tree = self._taken(_name(directory, namespace))
                trees.append(tree)
                with tree.lock:
                    if not tree.is_there or not _is_same(tree.path, directory):
                        self._attach(tree, directory, namespace)
            yield tuple(tree.path for tree in trees)
        finally:
            with self._lock:
                for tree in trees:
                    tree.users -= 1
                    tree.used = time.monotonic()

    def _taken(self, name: str) -> _Tree:
        if len(self._trees) >= MOST_TREES:
            # A worker may have as many mount namespaces as it likes.
            self.release_idle(older_than=0.0)
        with self._lock:
            tree = self._trees.setdefault(name, _Tree(self._place / name))
            tree.users += 1
            return tree

    def _attach(self, tree: _Tree, directory: int, namespace: int) -> None:
        tree.is_there = False
        pid = self._daemon_pid()
        _detach([tree.path], pid)
        asked = {"do": "attach", "namespace": namespace, "directory": directory, "pid": pid, "target": str(tree.path)}
        _run(asked, (namespace, directory))
        if not _is_same(tree.path, directory):
            raise HostTrouble(
                f"What the daemon has mounted at {tree.path} can't be seen by the node",
                hint="Give the node the daemon's mount namespace, or have state_dir on a shared mount of both",
            )
        tree.is_there = True

    def release_idle(self, *, older_than: float = IDLE_SECONDS) -> None:
        """Take away what no task has needed for ``older_than`` seconds.

        :raises HostTrouble: the kernel refuses.
        """
        with self._lock:
            end = time.monotonic() - older_than
            names = [name for name, tree in self._trees.items() if not tree.users and tree.used <= end]
            idle = [self._trees.pop(name) for name in names]
            # Under the lock: whoever needs one now makes it anew, after it is gone.
            _detach([tree.path for tree in idle], self._daemon_pid())


def left_trees(state_dir: Path, *, daemon_pid: int, dry_run: bool = False) -> tuple[Path, ...]:
    """Take away what a node that was killed has left, and tell of it; with ``dry_run`` tell of it alone.

    While a node lives nothing is left: what is there is its own.

    :raises HostTrouble: the kernel refuses.
    """
    place = state_dir / _TREES
    with ExitStack() as alone:
        try:
            alone.enter_context(held(place, alone=True))
        except OSError:
            return ()  # a node has it, or there never was one
        left = tuple(sorted(place.glob("*")))
        if not dry_run:
            _detach(left, daemon_pid)
        return left


def _detach(paths: Sequence[Path], pid: int) -> None:
    if paths:
        _run({"do": "detach", "pid": pid, "targets": [str(path) for path in paths]})


def _name(directory: int, namespace: int) -> str:
    """One for each directory, mount and mount namespace.

    :raises SpecRefused: it is no directory, or closed by now.
    """
    try:
        status = os.fstat(directory)
        details = Path(f"/proc/self/fdinfo/{directory}").read_text()
        where = os.fstat(namespace)
    except OSError as error:
        raise SpecRefused(f"A descriptor of the worker can't be looked at: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise SpecRefused("The worker gave something else than a directory to be mounted")
    # Opened with O_PATH, it would not show that the worker may read it.
    flags = int(next(line for line in details.splitlines() if line.startswith("flags:")).split()[1], 8)
    if flags & os.O_PATH:
        raise SpecRefused("The worker gave a directory that it has not opened for reading")
    mount = next((line.split()[1] for line in details.splitlines() if line.startswith("mnt_id:")), "")
    text = repr((status.st_dev, status.st_ino, mount, where.st_dev, where.st_ino))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_same(path: Path, directory: int) -> bool:
    try:
        shown, meant = path.stat(), os.fstat(directory)
    except OSError:
        return False
    return (shown.st_dev, shown.st_ino) == (meant.st_dev, meant.st_ino)


def _run(asked: dict[str, object], descriptors: Sequence[int] = ()) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            pass_fds=descriptors,
            check=True,
        )
        failed = json.loads(done.stdout).get("failed", "")
    except subprocess.TimeoutExpired:
        raise HostTrouble(
            f"A directory of the worker could not be mounted within {_SECONDS:g} seconds",
            hint="Is it on a network file system whose server is away?",
        ) from None
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        output = getattr(error, "stderr", "") or ""
        raise HostTrouble(f"The node can't mount directories: {error} {output.strip()[-500:]}".rstrip()) from error
    if failed:
        raise refused(failed)


def refused(why: str) -> IsolationError:
    """What the kernel said of a worker's directory."""
    return HostTrouble(
        f"A directory of the worker can't be shown to its tasks: {why}",
        hint="Is it on a mount that may be copied (not unbindable), and is the worker still there?",
    )

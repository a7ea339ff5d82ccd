"""Spare containers: made while another task runs, so that the next task need not wait for its container.

A spare is a container like any other. Its process 1 waits at a socket of its own for a worker, and ends if none comes. In it
waits a child of the zygote, which has done everything that a workload does before it gets its work.

For each spare, ``<state_dir>/spares/<key>`` has three entries: ``<id>.json`` describes it, ``<id>.sock`` is where it waits,
and ``<id>`` is the directory that is mounted into it. A worker claims a spare by renaming the first to ``<id>.claimed``;
from then on no other may touch it. Its labels say ``spare`` until the claimant has changed them and removed that file.

A spare's mounts show what was at their sources when it was made. If something else is there now, it can't be used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.bridge.agent_socket import AgentConnection, Hello
from airflow_isolation.bridge.held import held, is_held
from airflow_isolation.bridge.socket_address import address_of
from airflow_isolation.bridge.started_agent import Launch, RunningAgent, prepare, remove_container, start_agent
from airflow_isolation.bridge.zygote import ZygoteUnavailable, connect_again, end_stragglers, fork_into
from airflow_isolation.cgroups.join import own_cgroup_of
from airflow_isolation.errors import ContainerFailed, ContainerRuntimeError, IsolationError
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.oci.mount_source import identify_sources
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import Container, ContainerState

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.spare")

#: How long a spare waits for a worker, in seconds.
SPARE_SECONDS = 60.0

#: How long a claimant may take to make a spare its own, in seconds.
CLAIM_SECONDS = 30.0

#: Seconds in which a new directory is left alone, because a worker makes it first and holds it a moment later.
NEWBORN = 10.0

_TIMEOUT = 5.0


def spare_directory(runtime: ContainerRuntime, what: Launch, *, state_dir: Path) -> Path:
    """The directory of the spares that fit a workload: they have the same zygote, and differ only in labels."""
    alike = dataclasses.replace(what.spec, labels={}, argv=())
    text = repr((what.image.digest, what.python, what.zygote, _plain(alike)))
    return state_dir / "spares" / f"{_prefix(runtime)}{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _prefix(runtime: ContainerRuntime) -> str:
    # Two backends may share a state directory.
    return f"{type(runtime).__name__[0].lower()}-"


def _plain(spec: ContainerSpec) -> list[object]:
    return [
        sorted(value.items()) if hasattr(value, "items") else sorted(value) if isinstance(value, frozenset) else value
        for value in (getattr(spec, field.name) for field in dataclasses.fields(spec))
    ]


def claim(runtime: ContainerRuntime, what: Launch, *, state_dir: Path, undo: ExitStack) -> RunningAgent | None:
    """Claim a spare for a workload; None when there is none. ``undo`` gets the functions that remove it again.

    The container still has a spare's labels: ``make_ones_own`` changes them.
    """
    for record in sorted(spare_directory(runtime, what, state_dir=state_dir).glob("*.json")):
        claimed = _claimed(record)
        if claimed is None:
            continue
        with ExitStack() as taken:
            try:
                started = _take(runtime, claimed, what, state_dir, taken)
            except (OSError, ValueError, KeyError, TypeError, IsolationError) as error:
                log.debug("A spare container is of no use", container=record.stem, error=str(error))
                continue
            undo.push(taken.pop_all())
            return started
    return None


def make_ones_own(runtime: ContainerRuntime, what: Launch, *, state_dir: Path) -> None:
    """Give a claimed spare the labels of its workload. Never raises, because the workload runs already."""
    try:
        runtime.relabel(what.id, what.spec.labels)
        (spare_directory(runtime, what, state_dir=state_dir) / f"{what.id}.claimed").unlink(missing_ok=True)
    except (ContainerRuntimeError, OSError) as error:
        log.warning("A container could not be given its labels", container=what.id, error=str(error))


def make_spare(runtime: ContainerRuntime, like: Launch, *, state_dir: Path) -> Path:
    """Make a spare for workloads like this one, which a zygote forked; returns its record, for ``discard``.

    :raises ContainerFailed: it could not be made, there is no zygote any more, or nothing can be forked into it.
    :raises IsolationError: as ``start_agent``.
    """
    id = new_container_id("task")
    spec = dataclasses.replace(
        like.spec, labels={labels.PURPOSE: "spare", labels.OWNER: str(labels.Owner.this_process())}
    )
    what = dataclasses.replace(like, id=id, spec=spec)
    directory = spare_directory(runtime, what, state_dir=state_dir)
    record = directory / f"{id}.json"
    prepare(state_dir)
    with ExitStack() as undo, ExitStack() as handles:
        try:
            # Noted before they are mounted: if a source is replaced meanwhile, the spare is unused, but never shows old
            # files.
            sources = identify_sources(spec.mounts)
            directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            (directory / id).mkdir()
            undo.callback(shutil.rmtree, directory / id, ignore_errors=True)
            # Held until the record is written, so that no clean-up takes the unfinished spare for a left-over.
            handles.enter_context(held(directory / id))
            listener = handles.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with address_of(record.with_suffix(".sock")) as address:
                listener.bind(address)
            undo.callback(record.with_suffix(".sock").unlink, missing_ok=True)
            listener.listen(1)
            started = start_agent(runtime, what, state_dir=state_dir, undo=undo, directory=directory / id)
            handles.callback(started.pending_exit.close)
            handles.callback(started.connection.close)
            undo.callback(end_stragglers, own_cgroup_of(started.container.pid))
            child = handles.enter_context(connect_again(what.zygote, state_dir=state_dir))
            pid = fork_into(child, started.container.pid, id=id, spec=spec, patience=SPARE_SECONDS + CLAIM_SECONDS)
            started.connection.await_claim(seconds=SPARE_SECONDS, listener=listener, child=child)
            written = record.with_suffix(".new")
            known = {
                "pid": started.container.pid,
                "hello": dataclasses.asdict(started.hello),
                "child": pid,
                "sources": sources,
            }
            written.write_text(json.dumps(known))
            written.rename(record)
        except (OSError, ZygoteUnavailable) as error:  # TimeoutError is an OSError
            raise ContainerFailed(f"No spare container can be made in {directory}: {error}") from error
        undo.pop_all()
    return record


def count_spares(runtime: ContainerRuntime, like: Launch, *, state_dir: Path) -> int:
    """How many spares fit a workload, of all workers, including those that are being made."""
    return sum(1 for _ in spare_directory(runtime, like, state_dir=state_dir).glob("*.sock"))


def discard(runtime: ContainerRuntime, record: Path, *, state_dir: Path) -> None:
    """Remove a spare unless it has been claimed. May be called twice. If the runtime fails, the next prune removes it."""
    claimed = _claimed(record)
    if claimed is not None:
        remove_container(runtime, record.stem, state_dir)
        _forget(claimed)


def prune_spares(runtime: ContainerRuntime, *, state_dir: Path) -> None:
    """Remove spares whose time is over, and what makers or claimants left when they died.

    :raises ContainerRuntimeError: as ``ContainerRuntime.remove``.
    """
    now = time.time()
    for path in (state_dir / "spares").glob(f"{_prefix(runtime)}*/*"):
        try:
            age = now - path.lstat().st_mtime
        except FileNotFoundError:
            continue
        if path.suffix == ".json" and age > SPARE_SECONDS:
            discard(runtime, path, state_dir=state_dir)
        elif path.suffix == ".claimed" and age > CLAIM_SECONDS and not is_held(path.with_suffix("")):
            runtime.remove(path.stem)
            _forget(path)
        elif path.suffix in {"", ".sock", ".new"} and age > NEWBORN and _is_nobodys(path):
            _forget(path)
    for directory in (state_dir / "spares").glob(f"{_prefix(runtime)}*"):
        # The directory is empty, and no worker is about to make a spare in it.
        with suppress(OSError):
            if now - directory.lstat().st_mtime > 2 * SPARE_SECONDS:
                directory.rmdir()


def claim_to_remove(runtime: ContainerRuntime, id: str, *, state_dir: Path, dry_run: bool = False) -> bool:
    """Whether a left-over container may be removed: False when it is a spare that a task has just claimed.

    An unclaimed spare is claimed for the removal, and its files are removed, unless this is a ``dry_run``.
    """
    places = list((state_dir / "spares").glob(f"{_prefix(runtime)}*/{id}*"))
    if not places:
        return True  # it was never a spare
    record = places[0].with_suffix(".json")
    if dry_run:
        return not record.with_suffix(".claimed").exists()
    if _claimed(record) is None and record.with_suffix(".claimed").exists():
        return False
    _forget(record.with_suffix(".claimed"))
    return True


def _claimed(record: Path) -> Path | None:
    claimed = record.with_suffix(".claimed")
    try:
        os.utime(record)  # the claim begins now
        record.rename(claimed)
    except FileNotFoundError:
        return None
    return claimed


def _take(runtime: ContainerRuntime, claimed: Path, what: Launch, state_dir: Path, undo: ExitStack) -> RunningAgent:
    id = claimed.stem
    undo.callback(_forget, claimed)
    undo.enter_context(held(claimed.with_suffix("")))
    undo.callback(remove_container, runtime, id, state_dir)
    record = json.loads(claimed.read_bytes())
    if tuple(record["sources"]) != identify_sources(what.spec.mounts):
        raise ValueError("the source of a mount has been replaced since")
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = AgentConnection(peer)
    undo.callback(connection.close)
    peer.settimeout(_TIMEOUT)
    with address_of(claimed.with_suffix(".sock")) as address:
        peer.connect(address)
    # Remove the record at the end: as long as it exists, this counts as a spare.
    claimed.with_suffix(".sock").unlink(missing_ok=True)
    peer.settimeout(None)
    pending_exit = runtime.wait(id)
    undo.callback(pending_exit.close)
    container = Container(
        id=id,
        state=ContainerState.RUNNING,
        image=what.spec.image,
        pid=int(record["pid"]),
        labels=dict(what.spec.labels),
    )
    child = connection.waiting(_TIMEOUT)
    undo.callback(child.close)
    return RunningAgent(container, Hello(**record["hello"]), connection, pending_exit, (child, int(record["child"])))


def _forget(claimed: Path) -> None:
    shutil.rmtree(claimed.with_suffix(""), ignore_errors=True)
    claimed.with_suffix(".sock").unlink(missing_ok=True)
    claimed.with_suffix(".new").unlink(missing_ok=True)
    claimed.with_suffix(".claimed").unlink(missing_ok=True)


def _is_nobodys(path: Path) -> bool:
    others = (path.with_suffix(".json"), path.with_suffix(".claimed"))
    return not any(other.exists() for other in others) and not is_held(path.with_suffix(""))

"""The one place where the containerd client's errors become those of the runtime interface."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.containerd import errors as containerd
from airflow_isolation.errors import (
    ContainerExists,
    ContainerFailed,
    ContainerNotFound,
    ContainerRuntimeError,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    RuntimeUnreachable,
)
from airflow_isolation.runtime.host_trouble import told_by_daemon
from airflow_isolation.runtime.reachability import unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UNREACHABLE = (
    containerd.Unavailable,
    containerd.NotASocket,
    containerd.PermissionDenied,
    containerd.DeadlineExceeded,
    containerd.Cancelled,
    containerd.ClientClosed,
)


@contextmanager
def translated(
    socket_path: str,
    doing: str,
    *,
    missing: type[ContainerRuntimeError] = ContainerNotFound,
    failed: type[ContainerRuntimeError] = ContainerFailed,
    hint: Callable[[str], str] = lambda _: "",
) -> Iterator[None]:
    """Translate the client's errors in this block into ours.

    ``doing`` completes "could not …". ``missing`` is the class for what the daemon doesn't have, ``failed`` the class when
    no other fits better. ``hint`` may derive advice from the daemon's words.
    """
    try:
        yield
    except containerd.ContainerdError as error:
        raise _ours(error, socket_path, doing, missing=missing, failed=failed, hint=hint) from error


def _ours(
    error: containerd.ContainerdError,
    socket_path: str,
    doing: str,
    *,
    missing: type[ContainerRuntimeError],
    failed: type[ContainerRuntimeError],
    hint: Callable[[str], str],
) -> ContainerRuntimeError:
    if isinstance(error, _UNREACHABLE):
        return unreachable("containerd", socket_path, error.detail)
    sentence = f"could not {doing}: {error.detail}"
    # Waits and removals are repeated. If they fail because a shim died, that says nothing about a workload's start.
    trouble = told_by_daemon("containerd", sentence, error.detail, starting=failed is ContainerFailed)
    if trouble is not None and failed is not RuntimeUnreachable:
        return trouble
    advice = error.hint or hint(error.detail)
    if isinstance(error, containerd.NotFound):
        return missing(sentence, hint=advice)
    if isinstance(error, containerd.AlreadyExists):
        return ContainerExists(sentence, hint=advice)
    if isinstance(error, containerd.PullNotFound):
        return ImageNotFound(sentence, hint=advice)
    if isinstance(error, (containerd.PullRefused, containerd.PullFailed, containerd.CredentialsError)):
        return ImagePullFailed(sentence, hint=advice)
    if isinstance(error, containerd.ImageError):
        return ImageInvalid(sentence, hint=advice)
    return failed(sentence, hint=advice)

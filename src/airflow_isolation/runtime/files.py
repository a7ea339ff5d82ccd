"""Where the containers of a daemon have their files on the host: /etc files, and their output before the agent's hello."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def files_of_daemon(state_dir: Path, kind: str, socket_path: str, namespace: str) -> Path:
    """The directory that has a directory for each container of the daemon, named by its id.

    Backends, daemons and namespaces may share a state directory. Each gets a directory of its own: otherwise it would take
    the containers of another, which it does not know, for left over.

    :param kind: ``containerd`` or ``docker``.
    """
    named = hashlib.sha256(f"{socket_path}\0{namespace}".encode()).hexdigest()[:8]
    return state_dir / "containers" / f"{kind}-{named}"

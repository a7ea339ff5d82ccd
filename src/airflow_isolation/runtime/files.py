"""Where the containers of a daemon have their files on the host: /etc files, and what they print before the agent speaks."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def files_of_daemon(state_dir: Path, kind: str, socket_path: str, namespace: str) -> Path:
    """The directory of the directories of its containers, each named by its id.

    Backends, daemons and their namespaces may share a state directory. Each has another directory, or what one of them
    does not know would look left over to it although it is another's.

    :param kind: ``containerd`` or ``docker``.
    """
    named = hashlib.sha256(f"{socket_path}\0{namespace}".encode()).hexdigest()[:8]
    return state_dir / "containers" / f"{kind}-{named}"

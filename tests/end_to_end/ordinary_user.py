"""Run a command as an ordinary user, wherever the interpreter lies."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent.parent


def as_ordinary_user(uid: int, gid: int) -> list[str]:
    """A command line that runs what is appended to it with this uid, this gid and no other group.

    Root's home is closed to others, and often holds Python or a virtual environment: then the command gets a mount
    namespace of its own, in which the closed directory has nothing but those.
    """
    script = ["set -e"]
    needed = _needed()
    for closed in sorted({top for path in needed if (top := _closed(path))}):
        within = [path for path in needed if path.is_relative_to(closed)]
        scratch = "/mnt"
        script.append(f"mount -t tmpfs -o mode=755 tmpfs {scratch}")
        for path in within:
            target = shlex.quote(f"{scratch}/{path.relative_to(closed)}")
            script.append(f"mkdir -p {target}; mount --rbind {shlex.quote(str(path))} {target}")
        script.append(f"mount --move {scratch} {shlex.quote(str(closed))}")
    script.append(f'exec setpriv --reuid={uid} --regid={gid} --clear-groups --inh-caps=-all -- "$@"')
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", "\n".join(script), "sh"]


def _needed() -> list[Path]:
    """What an interpreter like this one reads; outermost directories only."""
    named = {sys.prefix, sys.base_prefix, *sys.path, str(_CHECKOUT)}
    paths = sorted({Path(name).resolve() for name in named if name and Path(name).is_dir()})
    return [path for path in paths if not any(path != other and path.is_relative_to(other) for other in paths)]


def _closed(path: Path) -> Path | None:
    """The outermost directory on the way that others may not enter."""
    return next((parent for parent in [*reversed(path.parents), path] if not parent.stat().st_mode & 0o001), None)

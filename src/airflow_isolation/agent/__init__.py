"""The program that is process 1 of every container. It is mounted into the image, which needs nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

#: Where the workload's directory (agent and socket) is mounted in the container, read-only.
DIRECTORY = "/run/airflow-isolation"
AGENT_NAME = "agent.py"
SOCKET_NAME = "agent.sock"

#: The version of the protocol, which the agent sends in its hello.
VERSION = 2

#: Standard library only. A container compiles the first one always, the others only when it uses them.
SOURCES = tuple(
    Path(__file__).with_name(name) for name in (AGENT_NAME, "preload.py", "parse_server.py", "zygote.py", "entry.py")
)

__all__ = ["AGENT_NAME", "DIRECTORY", "SOCKET_NAME", "SOURCES", "VERSION", "copy_to"]


def copy_to(directory: Path) -> None:
    """Copy the agent into the directory that will be mounted, readable for any uid whatever the umask is.

    May be called twice.
    """
    for source in SOURCES:
        shutil.copyfile(source, directory / source.name)
        (directory / source.name).chmod(0o644)

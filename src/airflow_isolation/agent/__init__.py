"""The program that is process 1 of every container. It is mounted into the image, which needs nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

#: Where the workload's directory (agent and socket) is mounted in the container, read-only.
DIRECTORY = "/run/airflow-isolation"
AGENT_NAME = "agent.py"
SOCKET_NAME = "agent.sock"

#: Of the protocol; the agent says it in its hello.
VERSION = 1

#: Standard library only. The second is compiled only where it is used.
SOURCES = (Path(__file__).with_name(AGENT_NAME), Path(__file__).with_name("parse_server.py"))

__all__ = ["AGENT_NAME", "DIRECTORY", "SOCKET_NAME", "SOURCES", "VERSION", "copy_to"]


def copy_to(directory: Path) -> None:
    """Put the agent into the directory that is to be mounted."""
    for source in SOURCES:
        shutil.copyfile(source, directory / source.name)

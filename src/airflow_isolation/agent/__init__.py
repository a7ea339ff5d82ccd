"""The program that is process 1 of every container. It is mounted into the image, which needs nothing of ours."""

from __future__ import annotations

from pathlib import Path

#: The agent's source, a single standard-library file.
SOURCE = Path(__file__).with_name("agent.py")

#: Where the workload's directory (agent and socket) is mounted in the container, read-only.
DIRECTORY = "/run/airflow-isolation"
AGENT_NAME = "agent.py"
SOCKET_NAME = "agent.sock"

#: Of the protocol; the agent says it in its hello.
VERSION = 1

__all__ = ["AGENT_NAME", "DIRECTORY", "SOCKET_NAME", "SOURCE", "VERSION"]

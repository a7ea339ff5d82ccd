"""A private daemon with the test images in it, for those programs of hack/ that run in the virtual environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from airflow_isolation.runtime.interface import ContainerRuntime

HACK = Path(__file__).resolve().parent.parent
NAMESPACE = "airflow"


class Refused(Exception):
    """A sentence for the terminal."""


@dataclass(frozen=True)
class Daemon:
    """A daemon of our own; ``tools`` is a PATH with the programs of its release (ctr, runc; docker)."""

    kind: str
    version: str
    socket: str
    tools: str
    pid: int

    def connect(self, state_dir: Path) -> ContainerRuntime:
        return connect(self.kind, socket_path=self.socket, namespace=NAMESPACE, state_dir=state_dir)

    def environment(self) -> dict[str, str]:
        """For ctr and docker."""
        return {
            **os.environ,
            "PATH": self.tools,
            "CONTAINERD_ADDRESS": self.socket,
            "CONTAINERD_NAMESPACE": NAMESPACE,
            "DOCKER_HOST": f"unix://{self.socket}",
        }


@dataclass(frozen=True)
class TestImage:
    """An image of hack/build-image and the archive that it comes in."""

    name: str
    archive: Path


def hack(program: str, *arguments: str) -> str:
    """What hack/PROGRAM prints; its progress goes to our stderr.

    :raises Refused: it failed; the reason stands on stderr.
    """
    done = subprocess.run(
        [sys.executable, str(HACK / program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(f"hack/{program} {' '.join(arguments)} failed; the reason stands above")
    return done.stdout.strip()


def new_directory(prefix: str) -> Path:
    """A directory that containers' users may enter: short, because sockets lie in it, and on disk, because images do."""
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=_base()))
    directory.chmod(0o755)
    return directory


def directories(prefix: str) -> list[Path]:
    """Those that ``new_directory`` has made and that are still there."""
    return sorted(_base().glob(f"{prefix}*"))


def _base() -> Path:
    return Path(os.environ.get("AIRFLOW_ISOLATION_RUN_DIRECTORY", "/var/tmp"))


def start_daemon(kind: str, directory: Path, *, version: str = "") -> Daemon:
    """Start it in ``directory``; the caller stops it with ``stop_daemon``, also when this fails."""
    chosen = [f"--version={version}"] if version else []
    told = json.loads(hack("daemon", "start", kind, *chosen, "--directory", str(directory)))
    return Daemon(kind=kind, version=told["version"], socket=told["socket"], tools=told["path"], pid=told["pid"])


def stop_daemon(directory: Path) -> None:
    """End the daemon with all its containers and remove ``directory``. Gone already is success."""
    hack("daemon", "stop", str(directory))


def test_image(kind: str) -> TestImage:
    """The image of that kind, built when it is not in the cache."""
    return TestImage(hack("build-image", f"--kind={kind}", "--print-name"), Path(hack("build-image", f"--kind={kind}")))

"""Private daemons and test images for every suite that needs them.

A suite that needs a daemon asks for a fixture; daemons are started on first use, by hack/daemon, in short directories of
their own, and are stopped at the end of the session, whatever happened. Nothing is shared with the system's daemons.

    def test_version(private_containerd: Daemon) -> None:        # one for the whole session
        assert private_containerd.socket.exists()

    @pytest.mark.parametrize("private_containerd", CONTAINERD_VERSIONS, indirect=True)      # or on each release
    def test_import(private_containerd: Daemon, image_archive: ImageArchive) -> None:
        private_containerd.run("ctr", "images", "import", str(image_archive("main")))

    def test_restart(start_containerd: StartDaemon) -> None:     # a fresh one, which the test may hurt
        daemon = start_containerd("1.7")
        daemon.restart(signal="KILL", pause=2)

``image_archive(kind)`` gives the path of an archive that both backends import, and ``image_name(kind)`` the name that it
carries; the kinds are those of hack/build-image. Programs of the daemon's own release (ctr, runc, docker) run by
``Daemon.run``. AIRFLOW_ISOLATION_CONTAINERD_VERSION chooses the release of an unparametrized ``private_containerd``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HACK = Path(__file__).resolve().parent.parent / "hack"
CONTAINERD_VERSIONS = ("1.6", "1.7", "2.1")
START_SECONDS = 300
BUILD_SECONDS = 1200
RUN_SECONDS = 300


@dataclass(frozen=True)
class Daemon:
    """A daemon of our own. ``socket`` for containerd and docker, ``address`` (host:port) for a registry."""

    kind: str
    version: str
    directory: Path
    path: str
    socket: Path = Path()
    address: str = ""
    user: str = ""
    password: str = ""

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The daemon's process now; another one after a restart. 0 while it does not run."""
        status = json.loads(hack("daemon", "status", str(self.directory), check=False))
        return int(status["pid"]) if status["running"] else 0

    def restart(self, *, signal: str = "TERM", pause: float = 0) -> None:
        """Ends the daemon alone (its containers live on), waits ``pause`` seconds, starts it again."""
        hack("daemon", "restart", str(self.directory), f"--signal={signal}", f"--pause={pause}")

    def start(self) -> None:
        """Starts it again after a test has killed it; does nothing while it runs."""
        hack("daemon", "start", self.kind, "--directory", str(self.directory))

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs ``ctr …``, ``docker …`` or ``runc …`` of this daemon's release against this daemon."""
        env = {
            **os.environ,
            "PATH": self.path,
            "CONTAINERD_ADDRESS": str(self.socket),
            "CONTAINERD_NAMESPACE": "airflow",
        }
        if self.kind == "docker":
            env["DOCKER_HOST"] = f"unix://{self.socket}"
        done = subprocess.run(
            argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done


class StartDaemon(Protocol):
    """Starts a containerd that belongs to the caller; it is stopped with the session."""

    def __call__(self, version: str = ..., *, group: int = ...) -> Daemon: ...


ImageArchive = Callable[[str], Path]
ImageName = Callable[[str], str]


def hack(program: str, *arguments: str, check: bool = True, timeout: float = START_SECONDS) -> str:
    """Runs hack/PROGRAM and gives what it printed; its complaints become the assertion."""
    done = subprocess.run(
        [sys.executable, str(HACK / program), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"hack/{program} {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


@contextmanager
def running(*arguments: str) -> Iterator[Daemon]:
    """The daemon of ``hack/daemon start`` with these arguments, until the block ends."""
    # Not pytest's tmp_path: its names are too long for sockets, and only root may enter it.
    directory = Path(tempfile.mkdtemp(prefix="ai-", dir=os.environ.get("AIRFLOW_ISOLATION_RUN_DIRECTORY", "/var/tmp")))
    try:
        values: dict[str, Any] = json.loads(hack("daemon", "start", *arguments, "--directory", str(directory / "d")))
        directory.chmod(0o755)
        yield Daemon(
            kind=values["kind"],
            version=values["version"],
            directory=Path(values["directory"]),
            path=values["path"],
            socket=Path(values.get("socket", "")),
            address=values.get("address", ""),
            user=values.get("user", ""),
            password=values.get("password", ""),
        )
    finally:
        hack("daemon", "stop", str(directory / "d"))
        directory.rmdir()


@pytest.fixture(scope="session")
def daemons() -> Iterator[ExitStack]:
    """Where daemons wait to be stopped at the end of the session."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def start_containerd(daemons: ExitStack) -> StartDaemon:
    """A factory: each call starts another containerd."""

    def start(version: str = CONTAINERD_VERSIONS[-1], *, group: int = 0) -> Daemon:
        return daemons.enter_context(running("containerd", f"--version={version}", f"--group={group}"))

    return start


@pytest.fixture(scope="session")
def start_dockerd(daemons: ExitStack) -> StartDaemon:
    """A factory: each call starts another dockerd."""

    def start(version: str = "", *, group: int = 0) -> Daemon:
        assert not version, "there is one release of dockerd"
        return daemons.enter_context(running("docker", f"--group={group}"))

    return start


@pytest.fixture(scope="session")
def containerd_of_version(start_containerd: StartDaemon) -> Callable[[str], Daemon]:
    """The session's one containerd of a version, started on first use."""
    return cache(start_containerd)


@pytest.fixture(scope="session")
def private_containerd(request: pytest.FixtureRequest, containerd_of_version: Callable[[str], Daemon]) -> Daemon:
    """The session's containerd. Tests leave it running and empty."""
    default = os.environ.get("AIRFLOW_ISOLATION_CONTAINERD_VERSION", CONTAINERD_VERSIONS[-1])
    return containerd_of_version(getattr(request, "param", default))


@pytest.fixture(scope="session")
def private_dockerd(start_dockerd: StartDaemon) -> Daemon:
    """The session's dockerd. Tests leave it running and empty."""
    return start_dockerd()


@pytest.fixture(scope="session")
def private_registry(daemons: ExitStack) -> Daemon:
    """A registry on loopback for everybody."""
    return daemons.enter_context(running("registry"))


@pytest.fixture(scope="session")
def private_registry_with_password(daemons: ExitStack) -> Daemon:
    """A registry on loopback for ``user`` with ``password``."""
    return daemons.enter_context(running("registry", "--password"))


@pytest.fixture(scope="session")
def image_archive() -> ImageArchive:
    """``image_archive("main")``: the archive of that kind, built by hack/build-image when it is not in the cache."""

    @cache
    def archive(kind: str) -> Path:
        return Path(hack("build-image", f"--kind={kind}", timeout=BUILD_SECONDS).strip())

    return archive


@pytest.fixture(scope="session")
def image_name() -> ImageName:
    """``image_name("main")``: the reference that the archive of that kind carries."""

    @cache
    def name(kind: str) -> str:
        return hack("build-image", f"--kind={kind}", "--print-name").strip()

    return name


def freeze(pid: int) -> None:
    """Stop a process with SIGSTOP, and see every thread of it stopped: the signal alone is only a promise."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
        if set(states) == {"T"}:
            return
        time.sleep(0.01)
    raise AssertionError(f"The process {pid} does not stop")

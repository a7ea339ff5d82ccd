"""A PostgreSQL of our own, of Debian's packages, in one directory."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import made_ready
from private_daemon import Refused

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 20.0
#: It refuses to run as root.
USER = "nobody"


def start(directory: Path, undo: ExitStack) -> str:
    """Start one and give the URL of its administrator; ``undo`` gets its end.

    :raises Refused: it did not come up; the end of its log is in the message.
    """
    user = pwd.getpwnam(USER)
    unpacked = made_ready.directory("postgresql_directory")
    # Copied, because root's cache is closed to others.
    shutil.copytree(unpacked / "usr", directory / "usr", symlinks=True)
    programs, data, log = directory / "usr/lib/postgresql/15/bin", directory / "data", directory / "log"
    password = secrets.token_urlsafe(16)
    (directory / "password").write_text(password)
    data.mkdir(mode=0o700)
    for path in (data, directory / "password"):
        os.chown(path, user.pw_uid, user.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    libraries = next(directory.glob("usr/lib/*-linux-gnu"), None)
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(libraries or ""), "LC_ALL": "C.UTF-8"}
    as_user = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    make = ("--username=postgres", "--encoding=UTF8", "--auth=scram-sha-256", f"--pwfile={directory / 'password'}")
    serve = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=500")
    with log.open("wb") as output:
        made = subprocess.run(
            [*as_user, programs / "initdb", "--pgdata", data, *make],
            cwd=data,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=START_SECONDS,
            check=False,
        )
        if made.returncode != 0:
            raise Refused(f"initdb failed: {log.read_text()[-2000:]}")
        server = subprocess.Popen(
            [*as_user, programs / "postgres", "-D", data, "-p", str(port), *serve],
            cwd=data,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    undo.callback(_stop, server)
    ask = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if subprocess.run(ask, env=environment, timeout=START_SECONDS, check=False).returncode == 0:
            return f"postgresql+psycopg2://postgres:{password}@127.0.0.1:{port}/postgres"
        time.sleep(0.1)
    raise Refused(f"PostgreSQL did not come up: {log.read_text()[-2000:]}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    # "Fast shutdown": SIGTERM would wait for its clients.
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()

"""What every Airflow of the tests needs: a short directory, a database, an environment and a cgroup of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FERNET_KEY = "ZmVybmV0LWtleS1mZXJuZXQta2V5LWZlcm5ldC1rZXk="

#: Options of every Airflow here; nothing in them changes what a task or a parse does.
OPTIONS = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__FERNET_KEY": FERNET_KEY,
    "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
    "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
}


@contextmanager
def short_directory(prefix: str) -> Iterator[Path]:
    """A directory (sockets lie below it) that everybody may enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        if not os.environ.get("AIRFLOW_ISOLATION_KEEP"):
            shutil.rmtree(directory)


@contextmanager
def own_cgroup_parent(prefix: str) -> Iterator[str]:
    """A name for the cgroup above all containers; the empty directories of that name are removed."""
    name = f"{prefix}{secrets.token_hex(4)}"
    try:
        yield name
    finally:
        for directory in [Path("/sys/fs/cgroup", name), *Path("/sys/fs/cgroup").glob(f"*/{name}")]:
            with suppress(OSError):
                directory.rmdir()


@contextmanager
def database_directory(home: Path) -> Iterator[Path]:
    """Where SQLite's files lie, of the same owner as ``home``.

    In memory: images are imported meanwhile, and a disk that is busy with them lets SQLite wait for fsync until others
    give up.
    """
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="ai-database-", dir=memory if memory.is_dir() else home))
    os.chown(directory, home.stat().st_uid, home.stat().st_gid)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def environment_of_its_own(home: Path, database: Path) -> dict[str, str]:
    """What an ``airflow`` command needs, and nothing of what pytest runs with."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "AIRFLOW_HOME": str(home),
        **OPTIONS,
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{database}",
    }

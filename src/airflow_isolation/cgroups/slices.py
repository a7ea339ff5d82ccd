r"""Where systemd has a slice: the names that its cgroup driver takes, and the paths that it makes of them.

A dash in a slice's name stands for a level: ``a-b.slice`` is ``a.slice/a-b.slice``. A dash that is meant is written
``\x2d`` (systemd.slice(5), systemd-escape(1); libcontainer's ExpandSlice).
"""

from __future__ import annotations

import re
from typing import Final

from airflow_isolation.cgroups.errors import ValueRefused

SUFFIX: Final = ".slice"
_PLAIN: Final = re.compile(r"[A-Za-z0-9:_.\\]")


def slice_name(path: str) -> str:
    r"""The slice for a path below the cgroup mount; a name of a slice is one already.

    >>> slice_name("airflow/task_execution"), slice_name("my-team"), slice_name("a-b.slice")
    ('airflow-task_execution.slice', 'my\\x2dteam.slice', 'a-b.slice')

    :raises ValueRefused: no name in it, or a slice among other names.
    """
    names = [name for name in path.split("/") if name]
    if names and names[-1].endswith(SUFFIX):
        # Its own last component tells all of its path, when there is one.
        if f"/{'/'.join(names)}" in (f"/{names[-1]}", f"/{slice_path(names[-1])}"):
            return names[-1]
        raise ValueRefused(f"{path!r} is no slice's path", hint=f"Give the slice alone: {names[-1]}")
    if not names or any(name.startswith(".") for name in names):
        raise ValueRefused(f"{path!r} can't be a slice", hint="Give a name such as airflow, or airflow.slice")
    return "-".join(_escaped(name) for name in names) + SUFFIX


def slice_below(slice: str, name: str) -> str:
    """The slice ``name`` in another one.

    >>> slice_below("airflow.slice", "task_execution")
    'airflow-task_execution.slice'
    """
    return f"{slice.removesuffix(SUFFIX)}-{_escaped(name)}{SUFFIX}"


def slice_path(name: str) -> str:
    """The path of a slice below the cgroup mount.

    >>> slice_path("airflow-task_execution.slice"), slice_path("airflow.slice")
    ('airflow.slice/airflow-task_execution.slice', 'airflow.slice')

    :raises ValueRefused: not a slice's name.
    """
    levels = name.removesuffix(SUFFIX).split("-")
    if not name.endswith(SUFFIX) or "/" in name or not all(levels):
        raise ValueRefused(f"{name!r} is not the name of a slice", hint="Write it as in airflow-tasks.slice")
    return "/".join("-".join(levels[: depth + 1]) + SUFFIX for depth in range(len(levels)))


def _escaped(name: str) -> str:
    return "".join(char if _PLAIN.match(char) else "".join(f"\\x{byte:02x}" for byte in char.encode()) for char in name)

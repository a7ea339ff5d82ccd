"""What hack/setup makes ready for single benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from private_daemon import HACK, Refused


def directory(function: str) -> Path:
    """The directory that a function of hack/setup makes, when it is not there yet, and prints.

    :raises Refused: it failed; the reason stands on stderr.
    """
    done = subprocess.run(
        ["bash", "-c", f'. "{HACK}/setup/all.sh"; {function}'],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(f"{function} of hack/setup failed; the reason stands above")
    return Path(done.stdout.strip())


def python_packages(function: str, *, for_children: bool = False) -> None:
    """Have the packages of that directory found from now on; behind those of the virtual environment here."""
    packages = str(directory(function))
    sys.path.append(packages)
    if for_children:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), packages)))

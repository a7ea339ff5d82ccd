"""Docker's own ids of our containers, noted on the host before a container is started.

Docker makes them by chance and never twice. What bears one that is noted here is ours, whoever else has containers, and
whatever dockerd has forgotten.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NAME: Final = "docker-id"
_UNNEEDED: Final = "unneeded"
_DOCKER_ID: Final = re.compile("[0-9a-f]{64}")


class DockerIds:
    """The notes of one daemon's containers: each is a file in the directory that the container has below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def note(self, id: str, docker_id: str) -> None:
        """Make the container's directory, if it is missing, and the note. Whoever called this removes the directory.

        :raises OSError: it can't be written.
        """
        (self._directory / id).mkdir(parents=True, exist_ok=True)
        (self._directory / id / _NAME).write_text(docker_id)

    def give_up(self, id: str, attempt: str) -> None:
        """Note that nobody needs what an ``attempt`` to make the container has made, although its owner may live.

        :raises OSError: it can't be written.
        """
        (self._directory / id).mkdir(parents=True, exist_ok=True)
        (self._directory / id / _UNNEEDED).write_text(attempt)

    def given_up(self) -> Mapping[str, str]:
        """The attempts that nobody needs, by our ids."""
        found = {}
        for id in self.ids():
            with suppress(OSError):
                found[id] = (self._directory / id / _UNNEEDED).read_text(errors="replace")
        return found

    def ids(self) -> frozenset[str]:
        """Our ids of the containers that have a directory."""
        try:
            return frozenset(path.name for path in self._directory.iterdir())
        except OSError:
            return frozenset()

    def read(self) -> Mapping[str, str]:
        """Docker's ids by ours. A container whose maker was killed before its start may have none."""
        found = {}
        for id in self.ids():
            with suppress(OSError):
                docker_id = (self._directory / id / _NAME).read_text(errors="replace")
                if _DOCKER_ID.fullmatch(docker_id):
                    found[id] = docker_id
        return found

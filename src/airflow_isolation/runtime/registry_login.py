"""A registry's credentials for dockerd's pull: the header ``X-Registry-Auth``.

As with the docker command, the pull goes on without credentials that can't be read, because most images need none. If the
registry then refuses, the error says that they couldn't be read.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.containerd.credentials import HUB, credentials_for
from airflow_isolation.containerd.errors import CredentialsError, InvalidReference
from airflow_isolation.containerd.reference import Reference
from airflow_isolation.errors import ImageError, ImageNotFound, ImagePullFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from airflow_isolation.containerd.credentials import Credentials

_REFUSALS = ("unauthorized", "no basic auth credentials", "denied")
_ABSENCES = ("manifest unknown", "not found", "does not exist")


@dataclass(frozen=True, slots=True)
class RegistryLogin:
    """``headers`` for the request. ``unread``: why there are none although there should be."""

    reference: str
    headers: Mapping[str, str]
    unread: CredentialsError | None = None

    def explained(self, reason: str) -> ImageError:
        """The error for a failed pull, chosen by dockerd's words. The words stay in its sentence."""
        sentence, said = f"could not pull {self.reference}: {reason}", reason.lower()
        refused = any(words in said for words in _REFUSALS)
        if refused and self.unread is not None:
            return ImagePullFailed(
                f"{sentence}; and the registry's credentials can't be read: {self.unread.detail}", hint=self.unread.hint
            )
        if any(words in said for words in _ABSENCES):
            return ImageNotFound(sentence, hint="Correct the name, or log in to the registry if it is private")
        if refused:
            return ImagePullFailed(sentence, hint="Log in to the registry as the worker's user: docker login")
        return ImagePullFailed(sentence)


def registry_login(
    reference: str, *, credentials: Callable[[str], Credentials | None] = credentials_for
) -> RegistryLogin:
    """The credentials that Docker's config.json has for the registry of ``reference``.

    :raises ImagePullFailed: no image can have this name.
    """
    try:
        host = Reference.parse(reference).host
    except InvalidReference as error:
        raise ImagePullFailed(f"could not pull {reference}: {error.detail}") from error
    try:
        found = credentials(host)
    except CredentialsError as error:
        return RegistryLogin(reference, {}, error)
    if found is None:
        return RegistryLogin(reference, {})
    server = {"serveraddress": HUB if host == "docker.io" else host}
    login = (
        {"username": found.username, "password": found.secret} if found.username else {"identitytoken": found.secret}
    )
    header = base64.urlsafe_b64encode(json.dumps({**login, **server}).encode())
    return RegistryLogin(reference, {"X-Registry-Auth": header.decode()})

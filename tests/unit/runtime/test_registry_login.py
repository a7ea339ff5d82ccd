"""Credentials with a pull through dockerd, and what its words mean when it fails."""

from __future__ import annotations

import base64
import json

import pytest

from airflow_isolation.containerd.credentials import Credentials
from airflow_isolation.containerd.errors import CredentialsError
from airflow_isolation.errors import ImageError, ImageNotFound, ImagePullFailed
from airflow_isolation.runtime.registry_login import RegistryLogin, registry_login

UNREAD = CredentialsError("the credential helper docker-credential-desktop is not on PATH", hint="Install it")


def header(login: RegistryLogin) -> dict[str, str]:
    return dict(json.loads(base64.urlsafe_b64decode(login.headers["X-Registry-Auth"])))


@pytest.mark.parametrize(
    ("reference", "host", "server"),
    [
        ("sales", "docker.io", "https://index.docker.io/v1/"),
        ("registry.example:5000/sales:1", "registry.example:5000", "registry.example:5000"),
    ],
)
def test_a_password_is_sent_for_the_registry(reference: str, host: str, server: str) -> None:
    asked = []

    def credentials(name: str) -> Credentials:
        asked.append(name)
        return Credentials("me", "pass>?\u00e9")

    login = registry_login(reference, credentials=credentials)

    assert asked == [host]
    assert header(login) == {"username": "me", "password": "pass>?\u00e9", "serveraddress": server}


def test_a_token_is_sent_as_one() -> None:
    login = registry_login("h.example/a", credentials=lambda _: Credentials("", "token"))
    assert header(login) == {"identitytoken": "token", "serveraddress": "h.example"}


def test_no_credentials_are_no_header() -> None:
    assert registry_login("h.example/a", credentials=lambda _: None).headers == {}


def unread(_: str) -> Credentials:
    raise UNREAD


def test_credentials_that_can_not_be_read_are_none() -> None:
    assert registry_login("h.example/a", credentials=unread).headers == {}


def test_a_name_that_no_image_can_have() -> None:
    with pytest.raises(ImagePullFailed, match="must be lower case"):
        registry_login("UPPER")


@pytest.mark.parametrize(
    ("reason", "kind", "hint"),
    [
        ("manifest for h.example/a not found: manifest unknown", ImageNotFound, "Correct the name"),
        ("unauthorized: authentication required", ImagePullFailed, "docker login"),
        ("dial tcp: connection refused", ImagePullFailed, ""),
    ],
)
def test_dockerds_words_are_understood(reason: str, kind: type[ImageError], hint: str) -> None:
    error = RegistryLogin("h.example/a", {}).explained(reason)
    assert type(error) is kind
    assert hint in error.hint
    assert reason in str(error)


@pytest.mark.parametrize(
    "reason",
    [
        "unauthorized: authentication required",
        "pull access denied for a, repository does not exist or may require login",
    ],
)
def test_credentials_that_can_not_be_read_are_told_when_the_registry_refuses(reason: str) -> None:
    error = RegistryLogin("h.example/a", {}, UNREAD).explained(reason)
    assert type(error) is ImagePullFailed
    assert "docker-credential-desktop is not on PATH" in str(error)
    assert error.hint == "Install it"


def test_credentials_that_can_not_be_read_are_not_told_of_other_failures() -> None:
    assert "desktop" not in str(RegistryLogin("h.example/a", {}, UNREAD).explained("connection refused"))

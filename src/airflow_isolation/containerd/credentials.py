"""A registry's user and password, as the docker config has them.

``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``. For a host: its ``credHelpers`` program, else the
``credsStore`` program, else its ``auths`` entry. A program is ``docker-credential-<name> get``, which reads the host
on stdin and writes JSON (github.com/docker/docker-credential-helpers).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.errors import CredentialsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Docker Hub's entry carries this name, whichever of the Hub's hosts asks.
HUB = "https://index.docker.io/v1/"
HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "auth.docker.io"})
# A helper says so on stdout when it simply has nothing.
NOTHING_STORED = "credentials not found"
# What a helper gives as user name when the secret is an identity token.
TOKEN = "<token>"  # noqa: S105
CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Credentials:
    """Without ``username``, ``secret`` is an identity (refresh) token."""

    username: str
    secret: str = field(repr=False)


def credentials_for(
    host: str, *, timeout: float = 15.0, environment: Mapping[str, str] = os.environ
) -> Credentials | None:
    """None when the config has none for ``host``: then the pull is anonymous.

    :raises CredentialsError: the config is not readable, or a helper failed or took longer than ``timeout`` seconds.
    """
    path = config_path(environment)
    config = _read(path)
    for name in _names(host):
        helper = _table(config, "credHelpers", path).get(name)
        if helper:
            return _ask(str(helper), name, timeout, environment)
    store = config.get("credsStore")
    if store:
        for name in _names(host):
            found = _ask(str(store), name, timeout, environment)
            if found is not None:
                return found
    auths = _table(config, "auths", path)
    for name in _names(host):
        if isinstance(auths.get(name), dict):
            found = _entry(auths[name], name, path)
            if found is not None:
                return found
    return None


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    directory = environment.get("DOCKER_CONFIG")
    return Path(directory) / "config.json" if directory else Path.home() / ".docker" / "config.json"


def _names(host: str) -> Iterator[str]:
    """What a host may be called in the config: docker itself writes the bare host, older tools a URL."""
    if host in HUB_HOSTS:
        yield HUB
    yield host
    for scheme in ("https://", "http://"):
        for end in ("", "/", "/v1/", "/v2/"):
            yield f"{scheme}{host}{end}"


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CredentialsError(f"the docker config {path} can't be read: {error.strerror}") from error
    if len(text) > CONFIG_LIMIT:
        raise CredentialsError(f"the docker config {path} is larger than {CONFIG_LIMIT} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CredentialsError(f"the docker config {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CredentialsError(f"the docker config {path} is not a JSON object")
    return config


def _table(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise CredentialsError(f"the docker config {path}: {key} is not an object")
    return table


def _entry(entry: Mapping[str, Any], host: str, path: Path) -> Credentials | None:
    if entry.get("identitytoken"):
        return Credentials("", str(entry["identitytoken"]))
    if entry.get("auth"):
        try:
            username, colon, secret = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            username = colon = secret = ""
        if not colon:
            raise CredentialsError(f"the docker config {path}: auths.{host}.auth is not base64 of user:password")
        return Credentials(username, secret.rstrip("\0"))
    if entry.get("username") and entry.get("password"):
        return Credentials(str(entry["username"]), str(entry["password"]))
    return None


def _ask(helper: str, host: str, timeout: float, environment: Mapping[str, str]) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if "/" in helper:
        raise CredentialsError(
            f"the docker config names the credential helper {helper!r}, which is not a program's name"
        )
    try:
        answer = subprocess.run(
            [program, "get"],
            input=host.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
            env=dict(environment),
        )
    except FileNotFoundError as error:
        raise CredentialsError(f"the credential helper {program} is not on PATH", hint="Install it") from error
    except subprocess.TimeoutExpired as error:
        raise CredentialsError(f"the credential helper {program} gave no answer for {host} in {timeout:g} s") from error
    except OSError as error:
        raise CredentialsError(f"the credential helper {program} can't be run: {error.strerror}") from error
    text = answer.stdout.decode(errors="replace").strip()
    if answer.returncode != 0:
        if NOTHING_STORED in text:
            return None
        # Only what it says about the failure: a helper never prints a secret when it fails.
        reason = (text or answer.stderr.decode(errors="replace").strip())[:200] or "no reason given"
        raise CredentialsError(f"the credential helper {program} failed for {host}: {reason}")
    try:
        found = json.loads(text)
        username, secret = str(found["Username"]), str(found["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise CredentialsError(f"the credential helper {program} gave no user and secret for {host}") from error
    return Credentials("" if username == TOKEN else username, secret)

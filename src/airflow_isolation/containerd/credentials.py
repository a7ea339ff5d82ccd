"""A registry's user and password, as the docker config has them.

``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``. For a host: its ``credHelpers`` program, else the
``credsStore`` program, else its ``auths`` entry. A program is ``docker-credential-<name> get``, which reads the host
on stdin and writes JSON (github.com/docker/docker-credential-helpers).
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.errors import CredentialsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The entry for Docker Hub has this name, whichever of the Hub's hosts asks.
HUB = "https://index.docker.io/v1/"
HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "auth.docker.io"})
# A helper says this on stdout when it has nothing for the host.
NOTHING_STORED = "credentials not found"
# The user name that a helper gives when the secret is an identity token.
TOKEN = "<token>"  # noqa: S105
CONFIG_LIMIT = 1 << 20
_HELPER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Without ``username``, ``secret`` is an identity (refresh) token."""

    username: str
    secret: str = field(repr=False)


def credentials_for(
    host: str, *, timeout: float = 15.0, environment: Mapping[str, str] = os.environ
) -> Credentials | None:
    """The credentials for ``host``. None when the config has none: then the pull is anonymous.

    :raises CredentialsError: the config is not readable, or a helper failed or took longer than ``timeout`` seconds.
    """
    path = config_path(environment)
    config = _read(path)
    helpers = _table(config, "credHelpers", path)
    for name in _names(host):
        if helpers.get(name):
            return _ask(_helper(helpers[name], f"credHelpers.{name}", path), name, timeout, environment)
    if config.get("credsStore"):
        store = _helper(config["credsStore"], "credsStore", path)
        for name in _names(host):
            found = _ask(store, name, timeout, environment)
            if found is not None:
                return found
    auths = _table(config, "auths", path)
    for name in _names(host):
        if auths.get(name):
            found = _entry(_table(auths, name, path), f"auths.{name}", path)
            if found is not None:
                return found
    return None


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    directory = environment.get("DOCKER_CONFIG")
    if directory:
        return Path(directory) / "config.json"
    try:
        home = Path.home()
    except RuntimeError:
        # HOME is not set, and the uid has no entry in /etc/passwd.
        home = Path("/")
    return home / ".docker" / "config.json"


def _names(host: str) -> Iterator[str]:
    """The names that a host may have in the config: docker itself writes the bare host, older tools a URL."""
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


def _text(value: Any, where: str, path: Path) -> str:
    """Check that the value is text that can be sent: JSON also allows lone surrogates and NUL."""
    if not isinstance(value, str) or "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise CredentialsError(f"the docker config {path}: {where} is not text")
    return value


def _helper(value: Any, where: str, path: Path) -> str:
    name = _text(value, where, path)
    if not _HELPER.fullmatch(name):
        raise CredentialsError(
            f"the docker config {path}: {where} names the credential helper {name[:80]!r}, which is not a program's name"
        )
    return name


def _entry(entry: Mapping[str, Any], where: str, path: Path) -> Credentials | None:
    if entry.get("identitytoken"):
        return Credentials("", _text(entry["identitytoken"], f"{where}.identitytoken", path))
    if entry.get("auth"):
        try:
            login = base64.b64decode(_text(entry["auth"], f"{where}.auth", path), validate=True).decode()
        except ValueError:
            login = ""
        username, colon, secret = login.partition(":")
        if not colon:
            raise CredentialsError(f"the docker config {path}: {where}.auth is not base64 of user:password")
        secret = secret.rstrip("\0")
        return Credentials(_text(username, f"{where}.auth", path), _text(secret, f"{where}.auth", path))
    if entry.get("username") and entry.get("password"):
        return Credentials(*(_text(entry[key], f"{where}.{key}", path) for key in ("username", "password")))
    return None


def _ask(helper: str, host: str, timeout: float, environment: Mapping[str, str]) -> Credentials | None:
    program = f"docker-credential-{helper}"
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
        # Its words are safe to show: a helper never prints a secret when it fails.
        reason = (text or answer.stderr.decode(errors="replace").strip())[:200] or "no reason given"
        raise CredentialsError(f"the credential helper {program} failed for {host}: {reason}")
    try:
        found = json.loads(text)
        username, secret = found["Username"], found["Secret"]
        sendable = f"{username}{secret}".encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CredentialsError(f"the credential helper {program} gave no user and secret for {host}") from error
    if not isinstance(username, str) or not isinstance(secret, str) or b"\0" in sendable:
        raise CredentialsError(f"the credential helper {program} gave a user or secret for {host} that is not text")
    return Credentials("" if username == TOKEN else username, secret)

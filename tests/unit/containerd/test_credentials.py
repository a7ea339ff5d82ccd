from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.containerd.credentials import Credentials, credentials_for
from airflow_isolation.containerd.errors import CredentialsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Ask = Callable[..., Credentials | None]

HOST = "registry.example"


def login(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """``ask(config, host)`` with helpers from ``tmp_path``."""

    def answer(config: Any, host: str = HOST, **options: Any) -> Credentials | None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        environment = {"DOCKER_CONFIG": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return credentials_for(host, environment=environment, **options)

    return answer


def helper(tmp_path: Path, name: str, script: str) -> None:
    program = tmp_path / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_no_config_is_no_credentials(tmp_path: Path) -> None:
    assert credentials_for(HOST, environment={"DOCKER_CONFIG": str(tmp_path / "absent")}) is None


def test_user_whom_nobody_knows_has_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("airflow_isolation.containerd.credentials.Path.home", unknown)
    assert credentials_for(HOST, environment={}) is None


def test_entry_of_the_host(ask: Ask) -> None:
    assert ask({"auths": {HOST: login("me", "pass:word")}}) == Credentials("me", "pass:word")
    assert ask({"auths": {"other.example": login("me", "x")}}) is None
    assert ask({"auths": {HOST: {}}}) is None


@pytest.mark.parametrize("name", [f"https://{HOST}", f"https://{HOST}/v1/", f"http://{HOST}/v2/"])
def test_entry_by_url(ask: Ask, name: str) -> None:
    assert ask({"auths": {name: login("me", "x")}}) == Credentials("me", "x")


def test_docker_hub_s_entry_has_a_name_of_its_own(ask: Ask) -> None:
    config = {"auths": {"https://index.docker.io/v1/": login("me", "x")}}
    assert ask(config, "registry-1.docker.io") == Credentials("me", "x")
    assert ask(config, HOST) is None


def test_identity_token(ask: Ask) -> None:
    assert ask({"auths": {HOST: {**login("me", ""), "identitytoken": "abc"}}}) == Credentials("", "abc")


def test_helper_of_the_host_wins_over_store_and_entry(ask: Ask, tmp_path: Path) -> None:
    helper(tmp_path, "mine", """read host; echo "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"$host\\"}" """)
    helper(tmp_path, "store", "exit 1")
    config = {"credHelpers": {HOST: "mine"}, "credsStore": "store", "auths": {HOST: login("me", "x")}}
    assert ask(config) == Credentials("get", HOST)


def test_store_that_has_nothing_leaves_it_to_the_entry(ask: Ask, tmp_path: Path) -> None:
    helper(tmp_path, "store", "echo credentials not found in native keychain; exit 1")
    assert ask({"credsStore": "store", "auths": {HOST: login("me", "x")}}) == Credentials("me", "x")


def test_helper_s_token(ask: Ask, tmp_path: Path) -> None:
    helper(tmp_path, "mine", """echo '{"Username": "<token>", "Secret": "abc"}'""")
    assert ask({"credHelpers": {HOST: "mine"}}) == Credentials("", "abc")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo the keychain is locked; exit 1", "failed for registry.example: the keychain is locked"),
        ("echo nonsense", "gave no user and secret"),
        ("echo '{}'", "gave no user and secret"),
        ("echo '[]'", "gave no user and secret"),
        ("printf '[%.0s' $(seq 100000)", "gave no user and secret"),
        ("""echo '{"Username": "me", "Secret": "\\\\ud800"}'""", "gave no user and secret"),
        ("""echo '{"Username": "me", "Secret": 7}'""", "gave a user or secret for registry.example that is not text"),
        ("sleep 60", r"gave no answer for registry\.example in 0\.2 s"),
    ],
)
def test_helper_that_fails_is_named(ask: Ask, tmp_path: Path, script: str, words: str) -> None:
    helper(tmp_path, "mine", script.replace("sleep", "exec sleep"))
    with pytest.raises(CredentialsError, match=f"docker-credential-mine {words}"):
        ask({"credHelpers": {HOST: "mine"}}, timeout=0.2 if "sleep" in script else 15)


def test_helper_that_is_not_installed(ask: Ask) -> None:
    with pytest.raises(CredentialsError, match="docker-credential-absent is not on PATH"):
        ask({"credsStore": "absent"})


def test_helper_s_name_is_no_path(ask: Ask) -> None:
    with pytest.raises(CredentialsError, match="not a program's name"):
        ask({"credsStore": "../../tmp/evil"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"auths": []}', ""),
        ('{"auths": [1]}', "auths is not an object"),
        ('{"auths": {"registry.example": {"auth": "?"}}}', "is not base64 of user:password"),
        ('{"auths": {"registry.example": {"auth": "YWJj"}}}', "is not base64 of user:password"),
        ('{"auths": {"registry.example": {"auth": "\\u00e9"}}}', "is not base64 of user:password"),
        ('{"auths": {"registry.example": {"auth": "\\ud800"}}}', r"auths\.registry\.example\.auth is not text"),
        ('{"auths": {"registry.example": {"auth": 7}}}', r"auths\.registry\.example\.auth is not text"),
        ('{"auths": {"registry.example": {"auth": "AGE6Yg=="}}}', r"auths\.registry\.example\.auth is not text"),
        ('{"auths": {"registry.example": 7}}', r"registry\.example is not an object"),
        ('{"auths": {"registry.example": {"identitytoken": []}}}', ""),
        ('{"auths": {"registry.example": {"identitytoken": [1]}}}', "identitytoken is not text"),
        ('{"auths": {"registry.example": {"username": "a", "password": "\\udfff"}}}', "password is not text"),
        ('{"credHelpers": 7}', "credHelpers is not an object"),
        ('{"credHelpers": {"registry.example": 7}}', r"credHelpers\.registry\.example is not text"),
        ('{"credHelpers": {"registry.example": "x\\u0000y"}}', r"credHelpers\.registry\.example is not text"),
        ('{"credsStore": "\\ud800"}', "credsStore is not text"),
        ('{"credsStore": {"a": 1}}', "credsStore is not text"),
        ('{"credsStore": "a b"}', "credsStore names the credential helper 'a b', which is not a program's name"),
        (" " * (1 << 20) + "{}", "larger than"),
    ],
)
def test_config_that_is_not_readable_is_named(ask: Ask, tmp_path: Path, config: str, words: str) -> None:
    if not words:
        assert ask(config) is None
        return
    with pytest.raises(CredentialsError, match=words) as caught:
        ask(config)
    assert f"the docker config {tmp_path / 'config.json'}" in str(caught.value)


def test_secret_is_not_in_the_repr() -> None:
    assert "hidden" not in repr(Credentials("me", "hidden"))

"""Pulling, from Debian's docker-registry on loopback."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.containerd.conftest import NAMESPACE, leftovers
from tests.containerd.image_archives import OTHER, tar, write_oci
from tests.containerd.registries import Proxy, SilentRegistry, push

from airflow_isolation.containerd import images
from airflow_isolation.containerd.archive_import import import_archive
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.errors import (
    ContainerdError,
    CredentialsError,
    PullFailed,
    PullNotFound,
    PullRefused,
    Unimplemented,
    WrongPlatform,
)
from airflow_isolation.containerd.pull import pull
from airflow_isolation.containerd.unpack import is_unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Daemon, StartDaemon

    from airflow_isolation.containerd.progress import Progress

pytestmark = pytest.mark.root


@pytest.fixture
def pulling(containerd_of_version: Callable[[str], Daemon]) -> Iterator[Client]:
    """A client of the newest containerd, whose namespace is empty at the test's end."""
    with Client(containerd_of_version("2.1").socket, namespace=NAMESPACE) as client:
        yield client
        assert leftovers(client) == {}


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty docker config, never the developer's own."""
    directory = tmp_path / "docker"
    directory.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(directory))
    return directory / "config.json"


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = (tar({"one": b"1" * 3_000_000}), tar({"two": b"2"}))
    return write_oci(tmp_path_factory.mktemp("pull") / "a.tar", layers=layers, packing=("gzip",))


@pytest.fixture(scope="session")
def digest(archive: Path, private_registry: Daemon) -> str:
    """``pulled:1`` is in the registry."""
    return push(archive, private_registry, "pulled", "1")


@pytest.fixture(scope="session")
def guarded_digest(archive: Path, private_registry_with_password: Daemon) -> str:
    return push(archive, private_registry_with_password, "team/guarded", "1")


def log_in(config: Path, registry: Daemon, password: str = "") -> None:
    login = f"{registry.user}:{password or registry.password}"
    config.write_text(json.dumps({"auths": {registry.address: {"auth": base64.b64encode(login.encode()).decode()}}}))


def test_anonymous_pull(pulling: Client, private_registry: Daemon, digest: str, locks: Path) -> None:
    seen: list[Progress] = []

    image = pull(pulling, f"{private_registry.address}/pulled:1", lock_directory=locks, progress=seen.append)

    assert image.name == f"{private_registry.address}/pulled:1"
    assert image.digest == digest
    layout = images.resolve(pulling, image)
    assert is_unpacked(pulling, layout)
    assert {layer.digest for layer in layout.layers} <= {step.name for step in seen}
    assert leftovers(pulling).keys() == {"images", "content", "snapshots"}
    images.remove(pulling, image.name)


def test_pull_by_digest(pulling: Client, private_registry: Daemon, digest: str, locks: Path) -> None:
    image = pull(pulling, f"{private_registry.address}/pulled@{digest}", lock_directory=locks)

    assert image.digest == digest
    images.remove(pulling, image.name)


def test_image_that_is_here_is_not_pulled_again_unless_always(
    pulling: Client, private_registry: Daemon, digest: str, locks: Path
) -> None:
    with closing(Proxy(private_registry.address)) as proxy:
        reference = f"{proxy.address}/pulled:1"
        pull(pulling, reference, lock_directory=locks)
        once = proxy.heard.count(b"/manifests/1 ")
        pull(pulling, reference, lock_directory=locks)
        assert proxy.heard.count(b"/manifests/1 ") == once
        pull(pulling, reference, lock_directory=locks, always=True)
        assert proxy.heard.count(b"/manifests/1 ") > once
    assert digest
    images.remove(pulling, reference)


def test_layers_that_are_here_under_other_digests_are_not_needed(
    pulling: Client, private_registry: Daemon, tmp_path: Path, locks: Path
) -> None:
    layers = (tar({"shared": b"1" * 100_000}), tar({"shared too": b"2"}))
    import_archive(pulling, write_oci(tmp_path / "plain.tar", "test/plain:1", layers=layers))
    push(write_oci(tmp_path / "a.tar", layers=layers, packing=("gzip",)), private_registry, "compressed-anew", "1")

    image = pull(pulling, f"{private_registry.address}/compressed-anew:1", lock_directory=locks)

    assert is_unpacked(pulling, images.resolve(pulling, image))
    images.remove(pulling, "test/plain:1")
    images.remove(pulling, image.name)


@pytest.mark.usefixtures("guarded_digest")
def test_pull_with_the_password_of_the_docker_config(
    pulling: Client, private_registry_with_password: Daemon, docker_config: Path, locks: Path, guarded_digest: str
) -> None:
    log_in(docker_config, private_registry_with_password)

    image = pull(pulling, f"{private_registry_with_password.address}/team/guarded:1", lock_directory=locks)

    assert image.digest == guarded_digest
    images.remove(pulling, image.name)


@pytest.mark.usefixtures("guarded_digest")
def test_pull_with_the_password_of_a_helper(  # noqa: PLR0917
    pulling: Client,
    private_registry_with_password: Daemon,
    docker_config: Path,
    locks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = private_registry_with_password
    helper = tmp_path / "docker-credential-test"
    answer = json.dumps({"ServerURL": registry.address, "Username": registry.user, "Secret": registry.password})
    helper.write_text(f"#!/bin/sh\nread host\n[ \"$1 $host\" = 'get {registry.address}' ] && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    docker_config.write_text(json.dumps({"credHelpers": {registry.address: "test"}}))

    image = pull(pulling, f"{registry.address}/team/guarded:1", lock_directory=locks)

    images.remove(pulling, image.name)


@pytest.mark.usefixtures("guarded_digest")
def test_pull_without_password_is_refused(pulling: Client, private_registry_with_password: Daemon, locks: Path) -> None:
    address = private_registry_with_password.address
    with pytest.raises(PullRefused, match=rf"No credentials are known: docker login {address}"):
        pull(pulling, f"{address}/team/guarded:1", lock_directory=locks)


@pytest.mark.usefixtures("guarded_digest")
def test_pull_with_wrong_password_is_refused_and_not_told(
    pulling: Client, private_registry_with_password: Daemon, docker_config: Path, locks: Path
) -> None:
    log_in(docker_config, private_registry_with_password, "wrong-secret")
    with pytest.raises(PullRefused, match="credentials of the docker config were refused") as refused:
        pull(pulling, f"{private_registry_with_password.address}/team/guarded:1", lock_directory=locks)
    assert "wrong-secret" not in str(refused.value)


@pytest.mark.usefixtures("guarded_digest")
def test_broken_docker_config_is_named(
    pulling: Client, private_registry_with_password: Daemon, docker_config: Path, locks: Path
) -> None:
    docker_config.write_text("{")
    with pytest.raises(CredentialsError, match=r"config\.json is not valid JSON"):
        pull(pulling, f"{private_registry_with_password.address}/team/guarded:1", lock_directory=locks)


def test_hosts_toml_says_where_a_registry_is(
    pulling: Client, private_registry: Daemon, digest: str, tmp_path: Path, locks: Path
) -> None:
    hosts = tmp_path / "certs.d" / "registry.invalid"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{private_registry.address}"\n')

    image = pull(pulling, "registry.invalid/pulled:1", lock_directory=locks, host_directory=str(tmp_path / "certs.d"))

    assert (image.name, image.digest) == ("registry.invalid/pulled:1", digest)
    images.remove(pulling, image.name)


def test_unknown_image(pulling: Client, private_registry: Daemon, locks: Path) -> None:
    with pytest.raises(PullNotFound, match=f"{private_registry.address} does not know .*absent:1"):
        pull(pulling, f"{private_registry.address}/absent:1", lock_directory=locks)


def test_registry_that_is_not_there(pulling: Client, locks: Path) -> None:
    with pytest.raises(PullFailed, match=r"nobody answers at 127.0.0.1:1, for 127.0.0.1:1/any:1"):
        pull(pulling, "127.0.0.1:1/any:1", lock_directory=locks)


def test_silent_registry_costs_no_more_than_the_timeout(pulling: Client, locks: Path) -> None:
    with closing(SilentRegistry()) as registry, pytest.raises(PullFailed, match="was not pulled in time"):
        pull(pulling, f"{registry.address}/any:1", lock_directory=locks, timeout=2)


def test_lock_that_can_not_be_made_is_named(pulling: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PullFailed, match=r"its lock .* can't be made: Not a directory"):
        pull(pulling, "127.0.0.1:1/any:1", lock_directory=tmp_path / "file" / "locks")


def test_image_for_another_processor(pulling: Client, private_registry: Daemon, tmp_path: Path, locks: Path) -> None:
    push(write_oci(tmp_path / "a.tar", architecture=OTHER), private_registry, "other-processor", "1")
    with pytest.raises(WrongPlatform):
        pull(pulling, f"{private_registry.address}/other-processor:1", lock_directory=locks)


def test_pulls_of_one_image_become_one_across_processes(
    pulling: Client, private_registry: Daemon, digest: str, locks: Path
) -> None:
    with closing(Proxy(private_registry.address)) as proxy:
        reference = f"{proxy.address}/pulled:1"
        program = f"""
from pathlib import Path
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.pull import pull
with Client({str(pulling.address)!r}, namespace={NAMESPACE!r}) as client:
    print(pull(client, {reference!r}, lock_directory=Path({str(locks)!r}), always=True).digest)
"""
        others = [
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        mine: list[object] = []

        def run() -> None:
            try:
                mine.append(pull(pulling, reference, lock_directory=locks).digest)
            except ContainerdError as error:
                mine.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        printed = [other.communicate(timeout=60)[0].strip() for other in others]
        layers = proxy.heard.count(b"GET /v2/pulled/blobs/")

    assert mine == [digest] * 3
    assert printed == [digest] * 3
    # A configuration and two layers, each fetched once.
    assert layers == 3
    images.remove(pulling, reference)


def test_puller_that_dies_gives_up_its_turn(
    pulling: Client, private_registry: Daemon, digest: str, locks: Path
) -> None:
    reference = f"{private_registry.address}/pulled:1"
    program = f"""
import os, signal
from pathlib import Path
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.pull import pull
client = Client({str(pulling.address)!r}, namespace={NAMESPACE!r})
pull(client, {reference!r}, lock_directory=Path({str(locks)!r}), progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""
    died = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL

    assert pull(pulling, reference, lock_directory=locks).digest == digest

    images.remove(pulling, reference)
    for lease in leftovers(pulling)["leases"]:
        end_lease(pulling, lease)


def end_lease(client: Client, id: str) -> None:
    from airflow_isolation.containerd.api.leases_pb2 import DeleteRequest

    client.leases.Delete(DeleteRequest(id=id, sync=True))


def test_containerd_1_6_is_refused_by_name(containerd_of_version: Callable[[str], Daemon], locks: Path) -> None:
    with (
        Client(containerd_of_version("1.6").socket, namespace=NAMESPACE) as client,
        pytest.raises(Unimplemented, match=r"containerd 1\.6.* has no Transfer service.*Import the image"),
    ):
        pull(client, "example.invalid/any:1", lock_directory=locks)


def test_containerd_1_7_0_to_24_is_told_why_http_fails(
    containerd_of_version: Callable[[str], Daemon], private_registry: Daemon, locks: Path
) -> None:
    with (
        Client(containerd_of_version("1.7").socket, namespace=NAMESPACE) as client,
        pytest.raises(PullFailed, match="speaks plain http, and containerd expected https"),
    ):
        pull(client, f"{private_registry.address}/pulled:1", lock_directory=locks)


def test_containerd_1_7_pulls_over_https_with_a_password(  # noqa: PLR0917
    start_containerd: StartDaemon,
    private_registry_with_password: Daemon,
    guarded_digest: str,
    docker_config: Path,
    tmp_path: Path,
    locks: Path,
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    daemon = start_containerd("1.7")
    # The same daemon once more, with an authority of ours instead of the system's.
    os.kill(daemon.pid, signal.SIGTERM)
    program = shutil.which("containerd", path=daemon.path)
    assert program
    with closing(Proxy(private_registry_with_password.address, tls)) as proxy:
        log_in(docker_config, private_registry_with_password)
        config = json.loads(docker_config.read_text())
        config["auths"] = {proxy.address: next(iter(config["auths"].values()))}
        docker_config.write_text(json.dumps(config))
        trusting = subprocess.Popen(
            [program, "--config", str(daemon.directory / "config.toml")],
            env={"PATH": daemon.path, "SSL_CERT_FILE": str(certificate)},
            stderr=subprocess.DEVNULL,
        )
        try:
            with Client(daemon.socket, namespace=NAMESPACE, wait_for_daemon=30) as client:
                image = pull(client, f"{proxy.address}/team/guarded:1", lock_directory=locks)

                assert image.digest == guarded_digest
                assert is_unpacked(client, images.resolve(client, image))
                images.remove(client, image.name)
                assert leftovers(client) == {}
        finally:
            trusting.terminate()
            trusting.wait(30)

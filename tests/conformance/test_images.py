"""Images: import, list, ensure, pull, remove, on real daemons; and archives that are none."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.conformance.archives import derived, merged, truncated, without
from tests.conformance.conftest import IMAGE
from tests.containerd.registries import push

from airflow_isolation.errors import ContainerRuntimeError, ImageInvalid, ImageNotFound, ImagePullFailed, IsolationError
from airflow_isolation.runtime.interface import Progress, PullPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conformance.conftest import Host
    from tests.conftest import Daemon, ImageArchive

OTHER = "localhost/airflow-isolation/other:2"
# containerd speaks plain http to a registry on loopback from 1.7.25 on; the 1.7 here is older.
PULLS = ("docker", "containerd-2.1")


@pytest.fixture
def images_stay(host: Host) -> Iterator[Host]:
    """The images are those of before, when the test is over."""
    before = [(image.reference, image.digest) for image in host.runtime.list_images()]
    yield host
    assert [(image.reference, image.digest) for image in host.runtime.list_images()] == before


@pytest.fixture
def other_archive(image_archive: ImageArchive, tmp_path: Path) -> Path:
    return derived(image_archive("no-airflow"), tmp_path / "other.tar", name=OTHER, config={}, files={"other": b"1"})


def names(host: Host) -> set[str]:
    return {image.reference for image in host.runtime.list_images()}


def test_an_imported_image_is_listed_and_ready(host: Host) -> None:
    (image,) = (image for image in host.runtime.list_images() if image.reference == IMAGE)
    ensured = host.runtime.ensure_image(IMAGE, PullPolicy.NEVER)
    assert (ensured.reference, ensured.digest) == (image.reference, image.digest)
    assert ensured.digest.startswith("sha256:")
    assert ensured.architecture in ("amd64", "arm64")
    assert ensured.size > 1_000_000


def test_an_import_reports_its_progress_and_names(images_stay: Host, other_archive: Path) -> None:
    steps: list[Progress] = []
    (image,) = images_stay.runtime.import_image(other_archive, progress=steps.append)
    assert image.reference == OTHER
    assert images_stay.run("cat", "/other", image=OTHER)[1] == "1"
    assert steps
    assert max(step.done for step in steps) >= 1_000_000
    images_stay.runtime.remove(images_stay.made[-1])
    images_stay.runtime.remove_image(OTHER)
    assert OTHER not in names(images_stay)


def test_an_import_may_be_repeated(images_stay: Host, conformance_archive: Path) -> None:
    assert [image.reference for image in images_stay.runtime.import_image(conformance_archive)] == [IMAGE]


def test_an_image_may_be_named_at_the_import(images_stay: Host, conformance_archive: Path) -> None:
    before = names(images_stay)
    (image,) = images_stay.runtime.import_image(conformance_archive, reference="localhost/named:here")
    assert image.reference == "localhost/named:here"
    assert names(images_stay) == before | {"localhost/named:here"}
    images_stay.runtime.remove_image("localhost/named:here")


def test_what_an_archive_holds_beside_the_image_is_passed_over(
    images_stay: Host, other_archive: Path, image_archive: ImageArchive, tmp_path: Path
) -> None:
    archive = merged(other_archive, image_archive("wrong-architecture"), tmp_path / "two.tar")
    steps: list[Progress] = []
    (image,) = images_stay.runtime.import_image(archive, progress=steps.append)
    assert image.reference == OTHER
    assert any(step.event.startswith("passed over (the image is made for") for step in steps)
    images_stay.runtime.remove_image(OTHER)


@pytest.mark.parametrize("lacking", ["manifest.json", "index.json"])
def test_docker_and_oci_archives_are_both_understood(
    images_stay: Host, other_archive: Path, tmp_path: Path, lacking: str
) -> None:
    names_left = (lacking,) if lacking == "manifest.json" else (lacking, "oci-layout")
    archive = without(other_archive, tmp_path / "one-form.tar", *names_left)
    (image,) = images_stay.runtime.import_image(archive)
    assert image.reference == OTHER
    assert images_stay.run("cat", "/other", image=OTHER)[1] == "1"
    images_stay.runtime.remove(images_stay.made[-1])
    images_stay.runtime.remove_image(OTHER)


def test_removing_what_is_not_there_is_an_error(host: Host) -> None:
    with pytest.raises(ImageNotFound, match="localhost/absent:1"):
        host.runtime.remove_image("localhost/absent:1")


def test_a_removed_name_does_not_harm_a_running_container(images_stay: Host, other_archive: Path) -> None:
    images_stay.runtime.import_image(other_archive)
    id = images_stay.start("sleep", "600", image=OTHER)
    images_stay.runtime.remove_image(OTHER)
    assert OTHER not in names(images_stay)
    assert images_stay.runtime.get(id).state.value == "running"
    images_stay.runtime.remove(id)


@pytest.mark.parametrize("size", [0, 100, 5_000, 1_000_000, 100_000_000])
def test_a_truncated_archive_is_invalid_and_nothing_of_it_stays(
    images_stay: Host, other_archive: Path, tmp_path: Path, size: int
) -> None:
    with pytest.raises(ImageInvalid):
        images_stay.runtime.import_image(truncated(other_archive, tmp_path / "truncated.tar", size))


def test_what_is_no_archive_is_invalid(images_stay: Host, tmp_path: Path) -> None:
    text, empty = tmp_path / "text", tmp_path / "empty.tar"
    text.write_text("not an archive\n" * 1000)
    tarfile.open(empty, "w").close()
    for path in (text, empty, tmp_path, tmp_path / "absent.tar"):
        with pytest.raises(ImageInvalid):
            images_stay.runtime.import_image(path)


def test_an_archive_that_lacks_a_layer_is_invalid(images_stay: Host, other_archive: Path, tmp_path: Path) -> None:
    with tarfile.open(other_archive) as archive:
        largest = max(archive.getmembers(), key=lambda member: member.size)
    with pytest.raises(ImageInvalid):
        images_stay.runtime.import_image(without(other_archive, tmp_path / "lacking.tar", largest.name))


def test_an_image_of_another_architecture_is_invalid(images_stay: Host, image_archive: ImageArchive) -> None:
    with pytest.raises(ImageInvalid, match="this host is"):
        images_stay.runtime.import_image(image_archive("wrong-architecture"))


def test_what_is_absent_and_may_not_be_pulled_is_not_found(host: Host) -> None:
    with pytest.raises(ImageNotFound, match="localhost/absent:1") as caught:
        host.runtime.ensure_image("localhost/absent:1", PullPolicy.NEVER)
    assert "image_pull_policy" in caught.value.hint


def test_a_registry_that_is_not_there_is_a_failed_pull(host: Host) -> None:
    with pytest.raises(ImagePullFailed):
        host.runtime.ensure_image("localhost:1/absent:1", timeout=60)


@pytest.fixture
def pushed(image_archive: ImageArchive, private_registry: Daemon, private_dockerd: Daemon, image_name: object) -> str:
    """A small image in the registry; its name there."""
    name = f"{private_registry.address}/small:1"
    private_dockerd.run("docker", "load", "--input", str(image_archive("no-python")))
    local = str(image_name("no-python"))  # type: ignore[operator]
    private_dockerd.run("docker", "tag", local, name)
    private_dockerd.run("docker", "push", name)
    private_dockerd.run("docker", "image", "rm", name, local)
    return name


@pytest.mark.parametrize("backend", PULLS)
def test_a_pull_brings_the_image_and_reports(images_stay: Host, pushed: str) -> None:
    steps: list[Progress] = []
    image = images_stay.runtime.ensure_image(pushed, progress=steps.append, timeout=60)
    assert image.reference == pushed
    assert steps
    assert images_stay.runtime.ensure_image(pushed, PullPolicy.NEVER).digest == image.digest
    assert images_stay.runtime.ensure_image(pushed, PullPolicy.ALWAYS).digest == image.digest
    assert images_stay.run("/bin/sh", "-c", "exit 3", image=pushed)[0].code == 3
    images_stay.runtime.remove(images_stay.made[-1])
    images_stay.runtime.remove_image(pushed)


@pytest.mark.parametrize("backend", PULLS)
def test_many_callers_make_one_pull(images_stay: Host, pushed: str, private_registry: Daemon) -> None:
    def pulls() -> int:
        return private_registry.log.count("/v2/small/blobs/sha256:")

    images_stay.runtime.ensure_image(pushed, timeout=60)
    before = pulls()
    images_stay.runtime.remove_image(pushed)
    images_stay.runtime.ensure_image(pushed, timeout=60)
    once = pulls() - before
    images_stay.runtime.remove_image(pushed)
    assert once > 0
    before = pulls()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: images_stay.runtime.ensure_image(pushed, timeout=60).digest, range(6)))
    assert len(set(found)) == 1
    assert pulls() - before == once
    images_stay.runtime.remove_image(pushed)


@pytest.mark.parametrize("backend", PULLS)
def test_what_the_registry_does_not_know_is_not_found(host: Host, pushed: str) -> None:
    with pytest.raises(ImageNotFound, match="small:absent"):
        host.runtime.ensure_image(f"{pushed.removesuffix(':1')}:absent", timeout=60)


@pytest.fixture
def guarded(image_archive: ImageArchive, private_registry_with_password: Daemon) -> str:
    """A small image in the registry that wants a password; its name there."""
    push(image_archive("no-python"), private_registry_with_password, "team/guarded", "1")
    return f"{private_registry_with_password.address}/team/guarded:1"


def log_in(monkeypatch: pytest.MonkeyPatch, directory: Path, registry: Daemon, password: str) -> None:
    """What ``docker login`` writes, where the worker's user has it."""
    login = base64.b64encode(f"{registry.user}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": login}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(directory))


@pytest.mark.parametrize("backend", PULLS)
def test_a_pull_uses_the_password_of_the_docker_config(
    images_stay: Host,
    guarded: str,
    private_registry_with_password: Daemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_in(monkeypatch, tmp_path, private_registry_with_password, private_registry_with_password.password)
    with images_stay.connect() as runtime:
        assert runtime.ensure_image(guarded, timeout=60).reference == guarded
        runtime.remove_image(guarded)


@pytest.mark.parametrize("backend", PULLS)
def test_a_helper_that_is_not_there_matters_where_a_password_is_needed(
    images_stay: Host, pushed: str, guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"credsStore": "not-there"}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with images_stay.connect() as runtime:
        assert runtime.ensure_image(pushed, timeout=60).reference == pushed
        runtime.remove_image(pushed)
        with pytest.raises(ImagePullFailed, match="docker-credential-not-there is not on PATH"):
            runtime.ensure_image(guarded, timeout=60)


@pytest.mark.parametrize("backend", ["docker"])
@pytest.mark.parametrize("config", [[], {"auths": 7}, {"auths": {"h": {"auth": "?"}}}])
def test_a_config_that_the_docker_sdk_can_not_read_is_named(
    host: Host, config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with host.connect() as runtime, pytest.raises(ContainerRuntimeError, match=r"Docker's config\.json"):
        runtime.list_images()


@pytest.mark.parametrize("backend", PULLS)
@pytest.mark.parametrize("password", ["", "wrong-secret"], ids=["without a password", "with a wrong one"])
def test_a_registry_that_refuses_is_told_with_the_remedy_and_not_the_password(  # noqa: PLR0917
    images_stay: Host,
    guarded: str,
    private_registry_with_password: Daemon,
    password: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if password:
        log_in(monkeypatch, tmp_path, private_registry_with_password, password)
    with images_stay.connect() as runtime, pytest.raises(ImagePullFailed, match="team/guarded") as caught:
        runtime.ensure_image(guarded, timeout=60)
    assert "docker login" in caught.value.hint
    assert "wrong-secret" not in str(caught.value)


@pytest.mark.parametrize("backend", ["containerd-1.6"])
def test_an_old_containerd_refuses_a_pull_by_name(host: Host, pushed: str) -> None:
    with pytest.raises(ImagePullFailed, match=r"1\.6"):
        host.runtime.ensure_image(pushed, timeout=60)


@pytest.mark.parametrize("backend", ["containerd-1.7"])
def test_a_containerd_that_wants_https_says_so(host: Host, pushed: str) -> None:
    with pytest.raises(ImagePullFailed, match="plain http"):
        host.runtime.ensure_image(pushed, timeout=60)


@pytest.mark.parametrize("reference", ["", "UPPER", "a b", "x:" + "y" * 200, "-", "http://x/y"])
def test_a_name_that_no_image_can_have_is_an_image_error(host: Host, reference: str) -> None:
    with pytest.raises(IsolationError):
        host.runtime.ensure_image(reference, timeout=20)


@pytest.mark.parametrize(("backend", "stranger"), [("containerd", "docker"), ("docker", "grpc")])
def test_a_backend_imports_nothing_of_the_other(backend: str, stranger: str) -> None:
    program = (
        "import sys; from airflow_isolation.runtime.connect import connect; assert 'docker' not in sys.modules;"
        f"assert 'grpc' not in sys.modules; connect({backend!r}).close(); assert {stranger!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

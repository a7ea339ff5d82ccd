"""A client for each release of containerd, and the proof that nothing is left in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.containerd.api import content_pb2, images_pb2, leases_pb2, snapshots_pb2
from airflow_isolation.containerd.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Daemon

CONTAINERD_VERSIONS = ("1.6", "1.7", "2.1")
NAMESPACE = "client-tests"


def leftovers(client: Client) -> dict[str, list[str]]:
    """Everything that a namespace holds, after a run of the garbage collector; empty lists are left out."""
    lease = client.leases.Create(leases_pb2.CreateRequest(id="collect-garbage")).lease
    client.leases.Delete(leases_pb2.DeleteRequest(id=lease.id, sync=True))
    found = {
        "images": [image.name for image in client.images.List(images_pb2.ListImagesRequest()).images],
        "leases": [lease.id for lease in client.leases.List(leases_pb2.ListRequest()).leases],
        "ingests": [status.ref for status in client.content.ListStatuses(content_pb2.ListStatusesRequest()).statuses],
        "content": [
            info.digest for part in client.content.List(content_pb2.ListContentRequest()) for info in part.info
        ],
        "snapshots": [
            info.name
            for part in client.snapshots.List(snapshots_pb2.ListSnapshotsRequest(snapshotter="overlayfs"))
            for info in part.info
        ],
    }
    return {kind: names for kind, names in found.items() if names}


def mounts_of(daemon: Daemon) -> list[str]:
    """Mounts at or from the daemon's directory; others on this machine come and go."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(daemon.directory) in line]


@pytest.fixture(params=CONTAINERD_VERSIONS)
def daemon(request: pytest.FixtureRequest, containerd_of_version: Callable[[str], Daemon]) -> Daemon:
    """Each release in turn."""
    return containerd_of_version(request.param)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of ``daemon``. At the test's end the namespace is as empty as it was, and no mount is new."""
    before = mounts_of(daemon)
    with Client(daemon.socket, namespace=NAMESPACE) as client:
        yield client
        assert leftovers(client) == {}
    assert mounts_of(daemon) == before

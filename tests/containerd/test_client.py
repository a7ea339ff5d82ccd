"""The client against real daemons: who may connect, leases, events, and daemons that restart or die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import freeze
from tests.containerd.conftest import CONTAINERD_VERSIONS, NAMESPACE, leftovers
from tests.containerd.image_archives import tar, write_oci

from airflow_isolation.containerd import images, payload
from airflow_isolation.containerd.api import (
    containers_pb2,
    content_pb2,
    event_types_pb2,
    leases_pb2,
    namespaces_pb2,
    snapshots_pb2,
    tasks_pb2,
)
from airflow_isolation.containerd.archive_import import import_archive
from airflow_isolation.containerd.client import NO_DEADLINE, Client
from airflow_isolation.containerd.errors import (
    AlreadyExists,
    Cancelled,
    ClientForked,
    ContainerdError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SocketMissing,
    Unavailable,
    Unimplemented,
)
from airflow_isolation.containerd.events import subscribe

if TYPE_CHECKING:
    from tests.conftest import Daemon, StartDaemon

    from airflow_isolation.containerd.progress import Progress

pytestmark = pytest.mark.root


def create(client: Client, id: str) -> None:
    container = containers_pb2.Container(
        id=id,
        labels={"purpose": "test"},
        runtime=containers_pb2.Container.Runtime(name="io.containerd.runc.v2"),
        spec=payload.pack_json(payload.SPEC, {"ociVersion": "1.0.2"}),
    )
    client.containers.Create(containers_pb2.CreateContainerRequest(container=container))


def delete(client: Client, id: str) -> None:
    client.containers.Delete(containers_pb2.DeleteContainerRequest(id=id))


def test_container_record_comes_back_as_it_was_given(client: Client) -> None:
    create(client, "one")

    container = client.containers.Get(containers_pb2.GetContainerRequest(id="one")).container

    assert container.labels == {"purpose": "test"}
    assert payload.unpack_json(container.spec) == {"ociVersion": "1.0.2"}
    delete(client, "one")


def test_namespaces_are_apart(client: Client, daemon: Daemon) -> None:
    create(client, "one")
    with Client(daemon.socket, namespace="another") as other, pytest.raises(NotFound):
        other.containers.Get(containers_pb2.GetContainerRequest(id="one"))
    delete(client, "one")


def test_errors_carry_the_call_and_the_daemon_s_words(client: Client) -> None:
    with pytest.raises(NotFound, match=r'^Containers\.Get: container "absent" in namespace "client-tests": not found$'):
        client.containers.Get(containers_pb2.GetContainerRequest(id="absent"))


def test_taken_name(client: Client) -> None:
    create(client, "one")
    with pytest.raises(AlreadyExists):
        create(client, "one")
    delete(client, "one")


@pytest.mark.parametrize("id", ["a__b", "-a", "a/b", "x" * 77, "ü"])
def test_name_that_no_container_can_have(client: Client, id: str) -> None:
    with pytest.raises(InvalidArgument):
        create(client, id)


def test_wrong_state(daemon: Daemon, client: Client) -> None:
    create(client, "one")
    with Client(daemon.socket, namespace="other-tests") as other:
        other.namespaces.Create(
            namespaces_pb2.CreateNamespaceRequest(namespace=namespaces_pb2.Namespace(name="busy-tests"))
        )
        with Client(daemon.socket, namespace="busy-tests") as busy:
            create(busy, "one")
            with pytest.raises(FailedPrecondition):
                other.namespaces.Delete(namespaces_pb2.DeleteNamespaceRequest(name="busy-tests"))
            delete(busy, "one")
        other.namespaces.Delete(namespaces_pb2.DeleteNamespaceRequest(name="busy-tests"))
    delete(client, "one")


def test_error_of_a_stream(client: Client) -> None:
    with pytest.raises(NotFound, match=r"^Content\.Read: "):
        list(client.content.Read(content_pb2.ReadContentRequest(digest=f"sha256:{'0' * 64}")))
    with pytest.raises(InvalidArgument, match=r"^Snapshots\.List: "):
        list(client.snapshots.List(snapshots_pb2.ListSnapshotsRequest(snapshotter="absent")))


def test_error_of_a_future(client: Client) -> None:
    future = client.tasks.Wait.future(tasks_pb2.WaitRequest(container_id="absent"), timeout=NO_DEADLINE)

    with pytest.raises(NotFound):
        future.result(timeout=30)
    assert isinstance(future.exception(), NotFound)


def test_call_unknown_to_the_daemon(client: Client) -> None:
    if client.has_transfer:
        assert not client.server_version.startswith("1.6")
        return
    from airflow_isolation.containerd.api import transfer_pb2

    with pytest.raises(Unimplemented):
        client.transfer.Transfer(transfer_pb2.TransferRequest())


def test_lease_holds_until_its_block_ends(client: Client) -> None:
    with client.lease(expires=timedelta(hours=1)) as leased:
        (lease,) = client.leases.List(leases_pb2.ListRequest()).leases
        assert lease.id == leased.lease_id
        ends = datetime.fromisoformat(lease.labels["containerd.io/gc.expire"])
        assert timedelta(minutes=59) < ends - datetime.now(timezone.utc) <= timedelta(hours=1)
        leased.snapshots.Prepare(snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="held"))
        collect(client)
        client.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key="held"))

    collect(client)
    with pytest.raises(NotFound):
        client.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key="held"))


def test_failed_block_has_nothing_left_when_its_error_arrives(client: Client) -> None:
    with pytest.raises(KeyError), client.lease(expires=timedelta(hours=1)) as leased:  # noqa: PT012
        leased.snapshots.Prepare(snapshots_pb2.PrepareSnapshotRequest(snapshotter="overlayfs", key="held"))
        raise KeyError("the block's own")

    with pytest.raises(NotFound):
        client.snapshots.Stat(snapshots_pb2.StatSnapshotRequest(snapshotter="overlayfs", key="held"))


def test_lease_that_somebody_ended_early_is_no_error(client: Client) -> None:
    with client.lease(expires=timedelta(hours=1)) as leased:
        client.leases.Delete(leases_pb2.DeleteRequest(id=leased.lease_id))


def collect(client: Client) -> None:
    client.leases.Create(leases_pb2.CreateRequest(id="collect"))
    client.leases.Delete(leases_pb2.DeleteRequest(id="collect", sync=True))


def test_events_of_the_chosen_topic_arrive_in_order_until_closed(client: Client) -> None:
    seen: list[str] = []
    enough = threading.Event()
    subscription = subscribe(client, "/containers/create")

    def listen() -> None:
        for event in subscription:
            assert event.namespace == NAMESPACE
            assert isinstance(event.message, event_types_pb2.ContainerCreate)
            seen.append(event.message.id)
            if "last" in seen:
                enough.set()

    listener = threading.Thread(target=listen)
    listener.start()
    # A subscription is not acknowledged: events before it reached the daemon are not heard.
    for number in range(100):
        create(client, f"early{number}")
        delete(client, f"early{number}")
        if seen:
            break
        time.sleep(0.05)
    for name in ("first", "last"):
        create(client, name)
        delete(client, name)
    assert enough.wait(30)
    subscription.close()
    subscription.close()
    listener.join(30)

    assert not listener.is_alive()
    assert seen[-2:] == ["first", "last"]


def test_many_threads_share_a_client(client: Client) -> None:
    failures: list[ContainerdError] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                create(client, f"t{number}-{turn}")
                delete(client, f"t{number}-{turn}")
        except ContainerdError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []


def test_client_in_a_forked_child_refuses_in_words(daemon: Daemon) -> None:
    # In a program of its own: forking pytest with gRPC's threads is what this is about.
    program = f"""
import os, sys
from airflow_isolation.containerd.api.containers_pb2 import ListContainersRequest
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.errors import ClientForked

client = Client({str(daemon.socket)!r}, namespace="fork")
client.containers.List(ListContainersRequest())
child = os.fork()
if child == 0:
    try:
        client.containers.List(ListContainersRequest())
    except ClientForked as error:
        print(error, flush=True)
    client.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
client.containers.List(ListContainersRequest())
client.close()
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert "was made by process" in told.stdout
    assert "Make a new one after the fork" in told.stdout
    assert ClientForked.__name__ not in told.stderr


def test_ordinary_user_without_the_group_is_told(daemon: Daemon) -> None:
    program = f"""
import os
from airflow_isolation.containerd.client import Client
from airflow_isolation.containerd.errors import PermissionDenied
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Client({str(daemon.socket)!r})
except PermissionDenied as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert told.stdout.startswith(f"user 65534 may not use the containerd socket {daemon.socket}. ")


def test_ordinary_user_with_the_group_may(start_containerd: StartDaemon) -> None:
    daemon = start_containerd("2.1", group=12345)
    program = f"""
import os
from airflow_isolation.containerd.client import Client
with Client({str(daemon.socket)!r}) as client:
    client.server_version  # imports what is imported late; root's files can't be read below
os.setgroups([12345]); os.setgid(65534); os.setuid(65534)
with Client({str(daemon.socket)!r}) as client:
    print(client.server_version)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert told.stdout.startswith("2.1")


# --- daemons that go away ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONTAINERD_VERSIONS)
def mortal(request: pytest.FixtureRequest, start_containerd: StartDaemon) -> Daemon:
    """A daemon that tests may hurt."""
    return start_containerd(request.param)


def kill(daemon: Daemon) -> None:
    pid = daemon.pid
    # Signals for process 0 go to one's own group.
    assert pid > 0
    os.kill(pid, signal.SIGKILL)
    while daemon.pid:
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_calls_outlive_a_restart(mortal: Daemon, how: str) -> None:
    with Client(mortal.socket, namespace=NAMESPACE, retry_for=60) as client:
        create(client, "survivor")
        restarting = threading.Thread(target=mortal.restart, kwargs={"signal": how, "pause": 1})
        restarting.start()
        calls = 0
        while restarting.is_alive():
            client.containers.Get(containers_pb2.GetContainerRequest(id="survivor"))
            calls += 1
        restarting.join()
        assert calls
        delete(client, "survivor")


def test_a_future_that_changes_nothing_outlives_a_restart(mortal: Daemon) -> None:
    with Client(mortal.socket, namespace=NAMESPACE, retry_for=60) as client:
        client.containers.List(containers_pb2.ListContainersRequest())
        kill(mortal)
        asked = client.tasks.List.future(tasks_pb2.ListTasksRequest())
        starting = threading.Timer(1, mortal.start)
        starting.start()
        assert not asked.result().tasks
        starting.join()


def test_a_daemon_may_take_its_time_to_greet(mortal: Daemon) -> None:
    """A busy one accepts long before it speaks, and gRPC gives up on a connection without a greeting."""
    frozen = mortal.pid
    assert frozen > 0
    freeze(frozen)
    waking = threading.Timer(1, os.kill, (frozen, signal.SIGCONT))
    waking.start()
    try:
        # Without repeats: the first connection has to do.
        with Client(mortal.socket, namespace=NAMESPACE, retry_for=0) as client:
            assert client.server_version.startswith(mortal.version)
    finally:
        waking.join()


def test_call_that_changes_something_waits_for_a_daemon_that_is_down(mortal: Daemon) -> None:
    with Client(mortal.socket, namespace=NAMESPACE, retry_for=60) as client:
        client.containers.List(containers_pb2.ListContainersRequest())
        kill(mortal)
        # Until the client has noticed: a call that was under way may have been done, and is not repeated.
        time.sleep(0.5)
        starting = threading.Timer(1, mortal.start)
        starting.start()
        create(client, "late")
        starting.join()
        delete(client, "late")


def test_open_stream_ends_with_unavailable(mortal: Daemon) -> None:
    with Client(mortal.socket, namespace=NAMESPACE) as client:
        ended: list[ContainerdError] = []

        def listen() -> None:
            try:
                for _ in subscribe(client):
                    pass
            except ContainerdError as error:
                ended.append(error)

        listener = threading.Thread(target=listen)
        listener.start()
        client.containers.List(containers_pb2.ListContainersRequest())
        mortal.restart(signal="KILL")
        listener.join(30)

        assert [type(error) for error in ended] == [Unavailable]


def test_dead_daemon_is_named_once_patience_ends(mortal: Daemon) -> None:
    with Client(mortal.socket, namespace=NAMESPACE, retry_for=0.5) as client:
        client.containers.List(containers_pb2.ListContainersRequest())
        kill(mortal)

        with pytest.raises(SocketMissing, match=r"Containers\.List: nobody listens at .* Is containerd running\?"):
            client.containers.List(containers_pb2.ListContainersRequest())
        with pytest.raises(SocketMissing):
            create(client, "never")
        with pytest.raises(SocketMissing):
            Client(mortal.socket)
        mortal.start()


def test_new_client_may_wait_for_a_daemon_that_starts(mortal: Daemon) -> None:
    kill(mortal)
    starting = threading.Timer(0.5, mortal.start)
    starting.start()
    with Client(mortal.socket, wait_for_daemon=60) as client:
        assert client.server_version.startswith(mortal.version)
    starting.join()


def test_frozen_daemon_costs_the_deadline_and_no_more(mortal: Daemon) -> None:
    with Client(mortal.socket, namespace=NAMESPACE, timeout=2) as client:
        client.containers.List(containers_pb2.ListContainersRequest())
        frozen = mortal.pid
        assert frozen > 0
        freeze(frozen)
        try:
            # A stop reaches one thread after the other.
            while not all(") T " in stat.read_text() for stat in Path(f"/proc/{frozen}/task").glob("*/stat")):
                time.sleep(0.01)
            with pytest.raises(DeadlineExceeded, match=r"Containers\.List"):
                client.containers.List(containers_pb2.ListContainersRequest())
            waiting = client.tasks.Wait.future(tasks_pb2.WaitRequest(container_id="any"), timeout=NO_DEADLINE)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.1)
            waiting.cancel()
            with pytest.raises(Cancelled):
                waiting.result(timeout=10)
        finally:
            os.kill(frozen, signal.SIGCONT)


def test_daemon_that_dies_during_an_import_leaves_only_a_lease_that_expires(mortal: Daemon, tmp_path: Path) -> None:
    layer = tar({"big": random.Random(1).randbytes(4 << 20)})

    def die(step: Progress) -> None:
        if step.event == "importing" and step.done > 1 << 20 and mortal.pid:
            kill(mortal)

    with Client(mortal.socket, namespace=NAMESPACE, retry_for=1) as client:
        with pytest.raises(Unavailable):
            import_archive(client, write_oci(tmp_path / "a.tar", layers=(layer,)), progress=die)
        mortal.start()
        (lease,) = client.leases.List(leases_pb2.ListRequest()).leases
        assert "containerd.io/gc.expire" in lease.labels
        client.leases.Delete(leases_pb2.DeleteRequest(id=lease.id, sync=True))
        assert leftovers(client) == {}

        (image,) = import_archive(client, tmp_path / "a.tar")
        images.remove(client, image.name)

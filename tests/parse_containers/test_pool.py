"""The pool with real daemons: what it starts, gives out, keeps and removes. Airflow is a stand-in that loads in a moment."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import freeze
from tests.parse_containers import images
from tests.parse_containers.conftest import ENVIRONMENT, NAMESPACE
from tests.parse_containers.parsing import parse
from tests.unit.settings.conftest import Ini

from airflow_isolation.bridge.parse_pool import Failed, ParsePool, ParseRequest, Ready
from airflow_isolation.bridge.prune import prune
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import ImageError, RuntimeUnreachable
from airflow_isolation.runtime.connect import connect
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import ImageArchive
    from tests.parse_containers.conftest import Host

    from airflow_isolation.bridge.parse_container import ParseContainer
    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.effective import ConnectionSettings

# The docker SDK forgets a socket whose connect failed, until Python collects it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SECONDS = 90


def open_runtime(settings: ConnectionSettings) -> ContainerRuntime:
    return connect(
        settings.backend,
        socket_path=settings.socket_path,
        namespace=settings.namespace,
        state_dir=settings.state_dir,
    )


class Pooled:
    """A pool on a host, and the waiting that a manager's selector does."""

    def __init__(self, host: Host, **changes: Any) -> None:
        self.host = host
        self.pool = ParsePool(
            open_runtime=open_runtime,
            airflow=images.AIRFLOW,
            **{
                "at_most": 3,
                "per_key": 2,
                "idle_timeout": 600.0,
                "max_age": 3600.0,
                "max_forks": 1000,
                "max_memory": None,
                **changes,
            },
        )

    def wanted(self, file: str, *, cfg: str = "", image: str = "", environment: Any = None) -> ParseRequest:
        host = self.host
        backend: Any = host.backend.partition("-")[0]
        settings = resolve(
            "parse",
            backend,
            configuration=Ini(f"[container_runtime]\nimage = {image or host.image}\nnetwork = none\n{cfg}"),
        )
        connection = replace(
            settings.connection,
            socket_path=str(host.daemon.socket),
            namespace=NAMESPACE,
            state_dir=host.state_dir,
            cgroup_mount_path="",
        )
        return ParseRequest(
            file=file,
            settings=replace(settings, connection=connection),
            mounts=(Mount(source=str(host.bundle), target=str(host.bundle)),),
            environment={**ENVIRONMENT, **(environment or {})},
            labels={},
        )

    def answer(self) -> Ready | Failed:
        poll = select.poll()
        poll.register(self.pool.fileno(), select.POLLIN)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            poll.poll(1000)
            self.pool.tick()
            if answers := self.pool.take():
                assert len(answers) == 1
                return answers[0]
        raise AssertionError("no answer")

    def container(self, file: str, **wanted: Any) -> ParseContainer:
        self.pool.request(self.wanted(file, **wanted))
        answer = self.answer()
        assert isinstance(answer, Ready), answer
        return answer.container

    def failure(self, file: str, **wanted: Any) -> Failed:
        self.pool.request(self.wanted(file, **wanted))
        answer = self.answer()
        assert isinstance(answer, Failed)
        return answer

    def use(self, file: str, **wanted: Any) -> str:
        """Parse a file in whatever container there is for it; gives the container's id."""
        container = self.container(file, **wanted)
        assert parse(container, self.host.write("file.py", "print('parsed')")).stdout == "parsed\n"
        self.pool.give_back(container, reusable=True)
        return container.container.id

    def ids(self) -> set[str]:
        return {container.id for container in self.host.runtime.list()}

    def until_ids(self, *ids: str) -> None:
        """Until these containers are there and no others."""
        deadline = time.monotonic() + SECONDS
        while self.ids() != set(ids):
            assert time.monotonic() < deadline, self.ids()
            self.pool.tick()
            time.sleep(0.05)


@pytest.fixture
def pooled(light_host: Host) -> Iterator[Pooled]:
    made = Pooled(light_host)
    yield made
    made.pool.close(SECONDS)
    assert made.ids() == set()


@pytest.fixture
def make_pool(light_host: Host) -> Iterator[Callable[..., Pooled]]:
    made: list[Pooled] = []

    def make(**changes: Any) -> Pooled:
        made.append(Pooled(light_host, **changes))
        return made[-1]

    yield make
    for one in made:
        one.pool.close(SECONDS)
        assert one.ids() == set()


def within_reason(call: Callable[[], object]) -> Any:
    """What ``call`` gives, from a thread: one that blocks fails the test instead of hanging it."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert result, f"{call} blocks"
    return result[0]


def test_a_warm_container_serves_file_after_file(pooled: Pooled) -> None:
    first = pooled.use("a")
    assert [pooled.use(file) for file in "bcd"] == [first] * 3


def test_two_slots_have_two_containers_and_no_third(pooled: Pooled) -> None:
    first, second = pooled.container("a"), pooled.container("b")
    assert first is not second
    pooled.pool.request(pooled.wanted("c"))
    pooled.until_ids(first.container.id, second.container.id)
    assert pooled.pool.waiting() == 1
    pooled.pool.give_back(second, reusable=True)
    answer = pooled.answer()
    assert isinstance(answer, Ready)
    assert answer.container is second


def test_a_file_finds_the_same_by_chance_in_every_container(pooled: Pooled) -> None:
    program = pooled.host.write("file.py", "import socket; print(hash('a word'), socket.gethostname())")
    containers = [pooled.container(file) for file in "ab"]
    first, second = (parse(container, program).stdout for container in containers)
    assert first == second != ""
    for container in containers:
        pooled.pool.give_back(container, reusable=True)


def test_the_least_recently_used_goes_when_there_are_enough(pooled: Pooled) -> None:
    used = {key: pooled.use(key, environment={"KEY": key}) for key in ("a", "b", "c")}
    assert pooled.use("again", environment={"KEY": "a"}) == used["a"]
    used["d"] = pooled.use("d", environment={"KEY": "d"})
    pooled.until_ids(used["a"], used["c"], used["d"])


def test_a_replaced_tag_is_noticed_at_the_next_request(
    pooled: Pooled, image_archive: ImageArchive, tmp_path: Path
) -> None:
    tag = images.reference("moving")
    containers = []
    for kind in ("good", "better"):
        archive = images.stand_in(image_archive("no-airflow"), tmp_path / f"{kind}.tar", kind, name=tag)
        pooled.host.runtime.import_image(archive)
        containers.append(pooled.container("file", image=tag))
        pooled.pool.give_back(containers[-1], reusable=True)
    old, new = containers
    assert new.image.digest != old.image.digest
    assert new.container.id != old.container.id


@pytest.mark.parametrize(
    ("limits", "cfg"),
    [
        ({"max_forks": 1}, ""),
        ({"max_memory": 1}, ""),
        ({"max_age": 0.0}, ""),
        ({}, "parse_mode = fresh"),
        ({}, "read_only_root = false"),
    ],
    ids=str,
)
def test_a_worn_out_container_is_used_for_one_file(
    make_pool: Callable[..., Pooled], limits: dict[str, Any], cfg: str
) -> None:
    pooled = make_pool(**limits)
    first = pooled.use("a", cfg=cfg)
    pooled.until_ids()
    assert pooled.use("b", cfg=cfg) != first


def test_an_idle_container_leaves(make_pool: Callable[..., Pooled]) -> None:
    pooled = make_pool(idle_timeout=0.5)
    pooled.use("a")
    pooled.until_ids()


def test_a_container_that_was_killed_while_idle_is_replaced(pooled: Pooled) -> None:
    container = pooled.container("a")
    pooled.pool.give_back(container, reusable=True)
    os.kill(container.container.pid, signal.SIGKILL)
    with pooled.host.runtime.wait(container.container.id) as pending:
        pending.result(30)
    other = pooled.use("b")
    assert other != container.container.id
    pooled.until_ids(other)


def test_a_container_that_was_killed_at_work_is_replaced(pooled: Pooled) -> None:
    container = pooled.container("a")
    os.kill(container.container.pid, signal.SIGKILL)
    pooled.pool.give_back(container, reusable=False)
    other = pooled.use("a")
    pooled.until_ids(other)


def test_an_image_that_is_not_there_is_no_definite_mistake(pooled: Pooled) -> None:
    failure = pooled.failure("a", image="localhost:9/no/such:image", cfg="image_pull_policy = never")
    assert (failure.definite, isinstance(failure.error, ImageError)) == (False, True)
    assert failure.retry_in > 0


def test_an_image_without_airflow_is_a_definite_mistake(pooled: Pooled, provide: Callable[..., str]) -> None:
    image = provide(pooled.host.daemon, "no-airflow")
    assert pooled.failure("a", image=image).definite
    assert "has no Airflow" in str(pooled.failure("a", image=image).error)
    pooled.use("healthy")


def test_close_takes_everything_along_whatever_it_does(light_host: Host, provide: Callable[..., str]) -> None:
    pooled = Pooled(light_host)
    pooled.use("idle", environment={"KEY": "idle"})
    pooled.container("busy", environment={"KEY": "busy"})
    pooled.pool.request(pooled.wanted("starting", image=provide(light_host.daemon, "hanging")))
    deadline = time.monotonic() + SECONDS
    while len(pooled.ids()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    within_reason(partial(pooled.pool.close, SECONDS))
    assert pooled.ids() == set()
    pooled.pool.close(SECONDS)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_hanging_daemon_blocks_nobody_and_is_survived(fragile_host: Host) -> None:
    pooled = Pooled(fragile_host)
    busy = pooled.container("busy", environment={"KEY": "busy"})
    spare = pooled.container("spare", environment={"KEY": "spare"})
    with frozen(fragile_host.daemon.pid):
        for number in range(20):
            request = pooled.wanted(f"file {number}", environment={"KEY": str(number)})
            within_reason(partial(pooled.pool.request, request))
        within_reason(partial(pooled.pool.give_back, spare, reusable=False))
        within_reason(pooled.pool.tick)
        assert within_reason(pooled.pool.take) == ()
        for number in range(1, 20):
            pooled.pool.cancel(f"file {number}")
        # What runs already is parsed without the daemon.
        assert parse(busy, fragile_host.write("file.py", "print('parsed')")).stdout == "parsed\n"
    answer = pooled.answer()
    assert answer.file == "file 0"
    pooled.pool.close(SECONDS)
    assert pooled.ids() == set()


def test_close_ends_in_time_and_ends_the_containers_though_the_daemon_hangs(fragile_host: Host) -> None:
    pooled = Pooled(fragile_host)
    idle = pooled.container("idle")
    pooled.pool.give_back(idle, reusable=True)
    with frozen(fragile_host.daemon.pid):
        within_reason(partial(pooled.pool.close, 1.0))
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{idle.container.pid}") and _state(idle.container.pid) != "Z":  # noqa: PTH110
            assert time.monotonic() < deadline, "the container lives on"
            time.sleep(0.05)
    # Threads that still wait for the daemon get their answer now; what they could not do is noted for ``prune``.
    deadline = time.monotonic() + SECONDS
    while any(thread.name.startswith("parse-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    prune(fragile_host.runtime, state_dir=fragile_host.state_dir)
    assert pooled.ids() == set()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as status:  # noqa: PTH123
        return status.read().rpartition(")")[2].split()[0]


def test_a_dead_daemon_is_infrastructure_trouble_and_heals(fragile_host: Host) -> None:
    pooled = Pooled(fragile_host)
    warm = pooled.container("warm")
    os.kill(fragile_host.daemon.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while fragile_host.daemon.pid:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    failure = pooled.failure("a")
    assert (failure.definite, type(failure.error)) == (False, RuntimeUnreachable)
    assert 0 < pooled.failure("a").retry_in <= failure.retry_in
    if fragile_host.daemon.kind == "containerd":
        # Its containers live on.
        assert parse(warm, fragile_host.write("file.py", "print('parsed')")).stdout == "parsed\n"
    fragile_host.daemon.start()
    pooled.pool.give_back(warm, reusable=False)
    deadline = time.monotonic() + SECONDS
    while True:
        pooled.pool.request(pooled.wanted("a"))
        answer = pooled.answer()
        if isinstance(answer, Ready):
            break
        assert time.monotonic() < deadline, answer
        time.sleep(answer.retry_in)
    pooled.pool.close(SECONDS)
    prune(fragile_host.runtime, state_dir=fragile_host.state_dir)
    assert pooled.ids() == set()

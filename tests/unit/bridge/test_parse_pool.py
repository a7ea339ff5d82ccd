"""The pool's threads and answers. Runtime and containers are fakes that fail and hang when they are told to.

tests/parse_containers has the same pool with real ones.
"""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.bridge.parse_container import Ended
from airflow_isolation.bridge.parse_pool import Failed, ParsePool, ParseRequest, Ready
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import (
    ContainerFailed,
    ImageInvalid,
    ImagePullFailed,
    IsolationError,
    PolicyRefused,
    RuntimeUnreachable,
    SpecRefused,
)
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import Image
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_isolation.bridge.started_agent import Launch

JOIN_SECONDS = 30


@dataclass(eq=False)
class FakeContainer:
    launch: Any
    forks: int = 0
    memory: int = 0
    born: float = float("inf")
    ended: Ended | None = None
    closed: threading.Event = field(default_factory=threading.Event)

    def news(self) -> Ended | None:
        return self.ended

    def close(self) -> None:
        self.closed.set()


class FakeHost:
    """Counts what is asked of it; ``go`` lets calls through, ``trouble`` makes them fail."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.trouble: dict[str, Exception] = {}
        self.digests: dict[str, str] = {}
        self.asked: list[str] = []
        self.started: list[FakeContainer] = []
        self.killed: list[str] = []
        self.closed = 0

    def open(self, _: Any) -> Any:
        return self

    def ensure_image(self, reference: str, *_: Any, **__: Any) -> Image:
        self.asked.append(reference)
        self._pass("image")
        return Image(reference=reference, digest=self.digests.get(reference, f"sha256:{reference}"))

    def start(self, _: Any, launch: Launch, *, state_dir: Path) -> Any:
        self._pass("start")
        container = FakeContainer(launch)
        self.started.append(container)
        return container

    def kill(self, id: str) -> None:
        self.killed.append(id)
        self.go.set()

    def close(self) -> None:
        self.closed += 1

    def _pass(self, where: str) -> None:
        self.go.wait(JOIN_SECONDS)
        if where in self.trouble:
            raise self.trouble[where]


def seed_of(container: FakeContainer) -> str:
    return str(container.launch.spec.env["PYTHONHASHSEED"])


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def pool(host: FakeHost) -> Iterator[ParsePool]:
    made = make_pool(host)
    yield made
    host.go.set()
    made.close(JOIN_SECONDS)
    assert threads() == []


def make_pool(host: FakeHost, **changes: Any) -> ParsePool:
    settings = {
        "at_most": 4,
        "per_key": 2,
        "idle_timeout": 600.0,
        "max_age": float("inf"),
        "max_forks": 1000,
        "max_memory": None,
        **changes,
    }
    return ParsePool(open_runtime=host.open, airflow="3.3.2", start=host.start, **settings)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("parse-", "stop-"))]


def wanted(file: str, *, image: str = "image:1", cfg: str = "", **changes: Any) -> ParseRequest:
    settings = resolve("parse", "containerd", configuration=Ini(f"[container_runtime]\nimage = {image}\n{cfg}"))
    values: dict[str, Any] = {"mounts": (), "environment": {}, "labels": {}, **changes}
    return ParseRequest(file=file, settings=settings, **values)


def answers(pool: ParsePool, count: int = 1) -> list[Ready | Failed]:
    """The next ``count`` answers, as a selector would find them."""
    poll = select.poll()
    poll.register(pool.fileno(), select.POLLIN)
    found: list[Ready | Failed] = []
    while len(found) < count:
        assert poll.poll(JOIN_SECONDS * 1000), f"only {found}"
        found += pool.take()
    return found


def ready(pool: ParsePool, request: ParseRequest) -> Any:
    pool.request(request)
    answer = answers(pool)[0]
    assert isinstance(answer, Ready), answer
    return answer.container


def failed(pool: ParsePool, request: ParseRequest) -> Failed:
    pool.request(request)
    answer = answers(pool)[0]
    assert isinstance(answer, Failed)
    return answer


def within_reason(call: Any, *arguments: Any) -> Any:
    """What ``call`` gives, from a thread: one that blocks fails the test instead of hanging it."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call(*arguments)), daemon=True)
    thread.start()
    thread.join(JOIN_SECONDS)
    assert not thread.is_alive(), f"{call} blocks"
    return result[0]


def test_a_pool_that_is_made_has_no_thread_no_descriptor_and_no_connection(host: FakeHost) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    made = make_pool(host)
    assert threads() == host.asked == []
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert made.take() == ()
    made.close(JOIN_SECONDS)
    made.close(JOIN_SECONDS)
    with pytest.raises(ValueError, match="closed"):
        made.fileno()


def test_a_container_is_used_again_by_what_is_alike(host: FakeHost, pool: ParsePool) -> None:
    container = ready(pool, wanted("a", labels={"who": "a"}))
    pool.give_back(container, reusable=True)
    assert ready(pool, wanted("b", labels={"who": "b"})) is container
    assert len(host.started) == 1


def test_the_launch_says_whose_it_is(host: FakeHost, pool: ParsePool) -> None:
    launch = ready(pool, wanted("a", labels={"who": "a"}, environment={"X": "1"})).launch
    assert launch.spec.labels["who"] == "a"
    assert launch.spec.labels[labels.PURPOSE] == "parse"
    assert launch.spec.labels[labels.OWNER] == str(labels.Owner.this_process())
    assert (launch.purpose, launch.airflow, launch.environment) == ("parse", "3.3.2", {"X": "1"})


@pytest.mark.parametrize(
    "difference",
    [
        {"image": "image:2"},
        {"cfg": "memory = 1Gi"},
        {"cfg": "python = /opt/python"},
        {"cfg": "parse_mode = fresh"},
        {"environment": {"X": "1"}},
        {"mounts": (Mount(source="/usr", target="/data"),)},
    ],
    ids=str,
)
def test_what_is_not_alike_has_another_container(host: FakeHost, pool: ParsePool, difference: dict[str, Any]) -> None:
    container = ready(pool, wanted("a"))
    pool.give_back(container, reusable=True)
    assert ready(pool, wanted("b", **difference)) is not container


def test_a_mount_of_another_directory_by_the_same_name_is_not_alike(
    host: FakeHost, pool: ParsePool, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    mounts = (Mount(source=str(bundle), target="/dags"),)
    container = ready(pool, wanted("a", mounts=mounts))
    pool.give_back(container, reusable=True)
    bundle.rename(tmp_path / "old")
    bundle.mkdir()
    assert ready(pool, wanted("b", mounts=mounts)) is not container


def test_a_pool_has_one_hash_seed_and_the_next_has_another(host: FakeHost, pool: ParsePool) -> None:
    first, second = (ready(pool, wanted(file)) for file in "ab")
    assert first is not second
    assert seed_of(first) == seed_of(second)
    assert 0 < int(seed_of(first)) < 2**32
    other = make_pool(host)
    try:
        assert seed_of(ready(other, wanted("c"))) != seed_of(first)
    finally:
        other.close(JOIN_SECONDS)


@pytest.mark.parametrize(
    ("of_the_process", "of_the_settings", "seed"),
    [("7", "", "7"), ("7", "3", "3"), ("random", "3", "3"), ("7", "random", "7")],
)
def test_a_hash_seed_that_somebody_chose_holds(
    *, host: FakeHost, monkeypatch: pytest.MonkeyPatch, of_the_process: str, of_the_settings: str, seed: str
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", of_the_process)
    cfg = f"[container_runtime_environment]\nPYTHONHASHSEED = {of_the_settings}\n" if of_the_settings else ""
    pool = make_pool(host)
    try:
        assert seed_of(ready(pool, wanted("a", cfg=cfg))) == seed
    finally:
        pool.close(JOIN_SECONDS)


@pytest.mark.parametrize(("cfg", "name"), [("", "dag-processor"), ("hostname = sales", "sales")])
def test_containers_are_called_alike_unless_a_setting_names_them(
    host: FakeHost, pool: ParsePool, cfg: str, name: str
) -> None:
    assert ready(pool, wanted("a", cfg=cfg)).launch.spec.hostname == name


def test_two_names_of_one_image_are_alike(host: FakeHost, pool: ParsePool) -> None:
    host.digests = {"image:1": "sha256:same", "image:latest": "sha256:same"}
    container = ready(pool, wanted("a"))
    pool.give_back(container, reusable=True)
    assert ready(pool, wanted("b", image="image:latest")) is container


def test_a_replaced_tag_leads_to_another_container_at_the_next_request(host: FakeHost, pool: ParsePool) -> None:
    old = ready(pool, wanted("a"))
    pool.give_back(old, reusable=True)
    host.digests["image:1"] = "sha256:new"
    new = ready(pool, wanted("a"))
    assert (new.launch.image.digest, new is old) == ("sha256:new", False)


def test_a_tag_replaced_while_a_file_waits_is_seen_at_the_start(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_isolation.bridge.parse_pool.STALE", -1.0)
    pool = make_pool(host)
    digests = iter(["sha256:old", "sha256:new", "sha256:new"])
    monkeypatch.setattr(host, "ensure_image", lambda *_, **__: Image(reference="i", digest=next(digests)))
    assert ready(pool, wanted("a")).launch.image.digest == "sha256:new"
    assert len(host.started) == 1
    pool.close(JOIN_SECONDS)


def test_the_same_file_twice_is_one_request(host: FakeHost, pool: ParsePool) -> None:
    host.go.clear()
    pool.request(wanted("a"))
    pool.request(wanted("a"))
    assert pool.waiting() == 1
    host.go.set()
    assert len(answers(pool)) == 1
    assert (pool.take(), pool.waiting(), len(host.started)) == ((), 0, 1)


def test_an_image_is_asked_for_once_for_all_that_wait_for_it(host: FakeHost, pool: ParsePool) -> None:
    host.go.clear()
    for file in "abcdefgh":
        pool.request(wanted(file))
    host.go.set()
    assert len(answers(pool, 2)) == 2
    assert host.asked == ["image:1"]


def test_fresh_containers_and_writable_ones_have_one_file(host: FakeHost, pool: ParsePool) -> None:
    for cfg in ("parse_mode = fresh", "read_only_root = false"):
        container = ready(pool, wanted("a", cfg=cfg))
        container.forks = 1
        pool.give_back(container, reusable=True)
        assert container.closed.wait(JOIN_SECONDS)


def test_a_cancelled_request_has_no_answer(host: FakeHost, pool: ParsePool) -> None:
    host.go.clear()
    pool.request(wanted("a"))
    pool.cancel("a")
    pool.cancel("a")
    host.go.set()
    assert isinstance(ready(pool, wanted("b")), FakeContainer)
    assert (pool.take(), pool.waiting()) == ((), 0)


def test_a_container_that_was_ready_for_a_cancelled_file_goes_to_another(host: FakeHost, pool: ParsePool) -> None:
    pool.request(wanted("a"))
    poll = select.poll()
    poll.register(pool.fileno(), select.POLLIN)
    assert poll.poll(JOIN_SECONDS * 1000)
    pool.cancel("a")
    assert pool.take() == ()
    ready(pool, wanted("b"))
    assert len(host.started) == 1


def test_an_idle_container_that_has_ended_is_not_given_out(host: FakeHost, pool: ParsePool) -> None:
    dead = ready(pool, wanted("a"))
    pool.give_back(dead, reusable=True)
    dead.ended = Ended(-9, gone=True)
    assert ready(pool, wanted("b")) is not dead
    assert dead.closed.wait(JOIN_SECONDS)


def test_tick_removes_what_has_ended(host: FakeHost, pool: ParsePool) -> None:
    dead = ready(pool, wanted("a"))
    pool.give_back(dead, reusable=True)
    dead.ended = Ended(-9, gone=True)
    pool.tick()
    assert dead.closed.wait(JOIN_SECONDS)


@pytest.mark.parametrize(
    ("error", "definite"),
    [
        (RuntimeUnreachable("away"), False),
        (ImagePullFailed("no network"), False),
        (ContainerFailed("disk full"), False),
        (OSError("disk full"), False),
        (KeyError("a mistake of ours"), False),
        (ImageInvalid("no Airflow"), True),
        (SpecRefused("not on this backend"), True),
        (PolicyRefused("not this image"), True),
    ],
)
@pytest.mark.parametrize("where", ["image", "start"])
def test_what_fails_is_told_and_whether_it_is_for_good(
    host: FakeHost, pool: ParsePool, where: str, error: Exception, definite: bool
) -> None:
    host.trouble[where] = error
    answer = failed(pool, wanted("a"))
    assert answer.definite is definite
    assert isinstance(answer.error, IsolationError)
    assert (answer.retry_in > 0) is not definite
    if isinstance(error, IsolationError):
        assert answer.error is error
    assert pool.waiting() == 0


def test_within_the_pause_nobody_is_asked(host: FakeHost, pool: ParsePool) -> None:
    host.trouble["image"] = RuntimeUnreachable("away")
    first = failed(pool, wanted("a"))
    second = failed(pool, wanted("b"))
    assert (host.asked, second.error) == (["image:1"], first.error)
    assert 0 < second.retry_in <= first.retry_in
    # Another image is another matter.
    failed(pool, wanted("c", image="image:2"))
    assert host.asked == ["image:1", "image:2"]


def test_a_start_that_failed_is_not_tried_within_the_pause(host: FakeHost, pool: ParsePool) -> None:
    host.trouble["start"] = ImageInvalid("no Airflow")
    failed(pool, wanted("a"))
    del host.trouble["start"]
    assert failed(pool, wanted("a")).definite
    # Another image by that name is tried at once.
    host.digests["image:1"] = "sha256:mended"
    ready(pool, wanted("a"))


def test_a_setting_that_is_wrong_on_this_host_is_definite(host: FakeHost, pool: ParsePool, tmp_path: Path) -> None:
    volumes = tmp_path / "volumes.yaml"
    volumes.write_text("- /no/such/directory:/data\n")
    answer = failed(pool, wanted("a", cfg=f"volume_mount_yaml = {volumes}"))
    assert (answer.definite, "/no/such/directory" in str(answer.error)) == (True, True)


def test_a_mount_that_is_gone_is_infrastructure_trouble(host: FakeHost, pool: ParsePool) -> None:
    answer = failed(pool, wanted("a", mounts=(Mount(source="/no/such/bundle", target="/dags"),)))
    assert (answer.definite, "/no/such/bundle" in str(answer.error)) == (False, True)


def test_a_hanging_daemon_never_blocks_the_caller(host: FakeHost, pool: ParsePool) -> None:
    container = ready(pool, wanted("first", image="other"))
    host.go.clear()
    for number in range(100):
        within_reason(pool.request, wanted(f"file {number}", image=f"image:{number}"))
    within_reason(partial(pool.give_back, container, reusable=False))
    assert within_reason(pool.take) == ()
    within_reason(pool.tick)
    within_reason(pool.cancel, "file 1")
    assert within_reason(pool.waiting) == 99
    assert len(threads()) <= 8 + 4
    # Removal goes on all the same.
    assert container.closed.wait(JOIN_SECONDS)
    within_reason(pool.close, 0.1)
    host.go.set()


def test_close_kills_what_is_being_started(host: FakeHost) -> None:
    pool = make_pool(host)
    idle = ready(pool, wanted("idle"))
    pool.give_back(idle, reusable=True)
    busy = ready(pool, wanted("busy", image="busy:1"))
    entered = threading.Event()
    start = host.start

    def slow(*arguments: Any, **more: Any) -> Any:
        entered.set()
        host.go.clear()
        return start(*arguments, **more)

    pool._start = slow
    pool.request(wanted("starting", image="starting:1"))
    assert entered.wait(JOIN_SECONDS)
    within_reason(pool.close, JOIN_SECONDS)
    assert idle.closed.is_set()
    assert busy.closed.is_set()
    assert len(host.killed) == 1
    assert host.started[-1].closed.is_set()
    assert (host.closed, threads()) == (1, [])
    pool.request(wanted("too late"))
    assert (pool.waiting(), pool.take()) == (0, ())

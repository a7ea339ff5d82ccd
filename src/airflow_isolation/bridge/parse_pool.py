"""A pool of parse containers for many files: starts, keeps, gives out and removes them.

``ParseSchedule`` makes the decisions; here are the threads, the runtimes and the clock. A file's request for a container
has two steps:

1. A thread finds the digest of its image, with one request to the daemon for all files that wait for the same image. The
   digest is part of the key by which containers are alike, so a replaced tag leads to another container.
2. The schedule gives it an idle container with its key, or has one started, or lets it wait.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from airflow_isolation.bridge.backoff import Backoff
from airflow_isolation.bridge.crew import Crew
from airflow_isolation.bridge.parse_container import ParseContainer, start_parse_container
from airflow_isolation.bridge.parse_schedule import Give, ParseSchedule, Refuse, Remove, Start, Waiting
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.errors import ContainerFailed, ImageInvalid, IsolationError, SettingError, SpecRefused
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.oci.mount_source import identify_sources
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import PullPolicy
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from airflow_isolation.container_spec import ContainerSpec, Mount
    from airflow_isolation.runtime.interface import ContainerRuntime, Image
    from airflow_isolation.settings.effective import ConnectionSettings, EffectiveSettings

log = structlog.get_logger(logger_name="airflow_isolation.parse_pool")

#: How many images are asked for, or pulled, at the same time.
RESOLVERS = 8

#: Seconds. If the start of a container had to wait longer, its image's digest is asked for again.
STALE = 1.0

#: When the pool closes: seconds between two attempts to kill a container that is being started.
_KILL_PAUSE = 0.5

#: The variable for Python's hash seed, which decides the order of a set of strings.
_HASH_SEED = "PYTHONHASHSEED"

#: The host name in parse containers, unless a setting has one: all have the same.
_HOSTNAME = "dag-processor"

#: Errors that another request would not change.
DEFINITE = (SettingError, SpecRefused, ImageInvalid)


@dataclass(frozen=True, kw_only=True)
class ParseRequest:
    """A request for a container, to parse a file.

    Attributes:
        file: identifies the request; the answer has it again.
        environment: of process 1, for its import of Airflow, and so of every child.
        labels: of the container, if one is started for this request. They are not part of the key. The purpose and the
            owner are added.

    """

    file: Hashable
    settings: EffectiveSettings
    mounts: tuple[Mount, ...]
    environment: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Ready:
    """A container for the file. No other file uses it until ``give_back``."""

    file: Hashable
    container: ParseContainer


@dataclass(frozen=True)
class Failed:
    """No container for the file. ``definite``: another request would fail too; else ask again in ``retry_in`` seconds."""

    file: Hashable
    error: IsolationError
    definite: bool
    retry_in: float


@dataclass(frozen=True, slots=True)
class _Question:
    """An image to ask the daemon for."""

    connection: ConnectionSettings
    reference: str
    policy: PullPolicy
    timeout: float


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A request whose image is here, with its key."""

    wanted: ParseRequest
    image: Image
    spec: ContainerSpec
    key: Hashable
    at: float


class ParsePool:
    """Containers by key, at most ``at_most`` in all and ``per_key`` with one key. All methods but ``close`` return at once.

    Hash seed and host name are the same in all containers. Otherwise a DAG that depends on them would differ from container
    to container. (In stock Airflow all parses are forks of one process, so they are the same there, too.)

    Threads, connections and descriptors are made at the first ``request`` or ``fileno``; before that, the process may fork.
    """

    def __init__(
        self,
        *,
        open_runtime: Callable[[ConnectionSettings], ContainerRuntime],
        airflow: str,
        at_most: int,
        per_key: int,
        idle_timeout: float,
        max_age: float,
        max_forks: int,
        max_memory: int | None,
        start: Callable[..., ParseContainer] = start_parse_container,
    ) -> None:
        """``start`` is for tests: the function that starts a container."""
        self._open_runtime = open_runtime
        self._airflow = airflow
        self._max_forks = max_forks
        self._start = start
        self._hash_seed = _hash_seed()
        # Held only for moments, never during a call that may block.
        self._lock = threading.Lock()
        self._schedule: ParseSchedule[ParseContainer] = ParseSchedule(
            at_most=at_most, per_key=per_key, idle_timeout=idle_timeout, max_age=max_age, max_memory=max_memory
        )
        self._backoff = Backoff()
        self._asked: dict[Hashable, ParseRequest] = {}
        self._questions: dict[_Question, list[ParseRequest]] = {}
        self._resolved: dict[Hashable, _Resolved] = {}
        self._starting: dict[str, ContainerRuntime] = {}
        self._answers: list[Ready | Failed] = []
        self._event = -1
        self._closed = False
        self._stoppers: list[threading.Thread] = []
        self._settled = threading.Event()
        self._opening = threading.Lock()
        self._runtimes: dict[ConnectionSettings, ContainerRuntime] = {}
        self._resolvers = Crew("parse-image", RESOLVERS)
        # As many threads as containers, so that each start and removal has one.
        self._movers = Crew("parse-container", at_most)

    def fileno(self) -> int:
        """The descriptor; readable when ``take`` has something."""
        with self._lock:
            return self._descriptor()

    def request(self, wanted: ParseRequest) -> None:
        """Ask for a container; ``take`` has the answer. Asking twice for the same file is one request."""
        settings = wanted.settings
        question = _Question(
            settings.connection, settings.image, settings.image_pull_policy, settings.image_pull_timeout
        )
        with self._lock:
            if self._closed or wanted.file in self._asked:
                return
            self._asked[wanted.file] = wanted
            trouble = self._backoff.trouble(question, now=time.monotonic())
            if trouble is not None:
                self._fail(wanted.file, trouble.error, trouble.until - time.monotonic())
            elif question in self._questions:
                self._questions[question].append(wanted)
            else:
                self._questions[question] = [wanted]
                self._resolvers.do(partial(self._resolve, question))

    def cancel(self, file: Hashable) -> None:
        """Withdraw a request. A container that is ready for it goes to another file."""
        with self._lock:
            self._forget(file)
            self._schedule.cancel(file)
            for answer in [answer for answer in self._answers if answer.file == file]:
                self._answers.remove(answer)
                if isinstance(answer, Ready):
                    self._schedule.given_back(answer.container, reusable=True, now=time.monotonic())
            self._act()

    def take(self) -> tuple[Ready | Failed, ...]:
        """The answers that have come; each only once."""
        with self._lock:
            if self._event >= 0:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._event)
            answers, self._answers = tuple(self._answers), []
            return answers

    def give_back(self, container: ParseContainer, *, reusable: bool) -> None:
        """Return a container after the parse. Unless ``reusable``, it is removed, in the background."""
        with self._lock:
            self._schedule.given_back(container, reusable=reusable, now=time.monotonic())
            self._act()

    def tick(self) -> None:
        """Remove containers that have been idle, or have lived, for too long. To be called once a second."""
        with self._lock:
            self._act()

    def waiting(self) -> int:
        """How many requests have no answer yet."""
        with self._lock:
            return len(self._asked)

    def close(self, timeout: float) -> None:
        """Remove all containers in parallel; takes at most ``timeout`` seconds. May be called twice.

        What a hanging daemon does not remove in time, the next ``prune`` removes.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            if not self._closed:
                self._closed = True
                for file in list(self._asked):
                    self._forget(file)
                    self._schedule.cancel(file)
                self._answers.clear()
                for container in self._schedule.containers():
                    self._movers.do(partial(self._remove, container))
                for id, runtime in self._starting.items():
                    stopper = threading.Thread(
                        target=self._stop_start, args=(id, runtime), name=f"stop-{id}", daemon=True
                    )
                    self._stoppers.append(stopper)
                    stopper.start()
        done = self._movers.close(max(0.0, deadline - time.monotonic()))
        self._settled.set()
        for stopper in self._stoppers:
            stopper.join(max(0.0, deadline - time.monotonic()))
        for runtime in list(self._runtimes.values()):
            # Open requests get an error.
            runtime.close()
        done = self._resolvers.close(max(0.0, deadline - time.monotonic())) and done
        if not done:
            log.warning("Parse containers could not be removed in time; they are left to the next clean-up")
        with self._lock:
            if self._event >= 0:
                os.close(self._event)
                self._event = -1

    # The methods from here to the jobs are called with the lock held.

    def _descriptor(self) -> int:
        if self._event < 0:
            if self._closed:
                raise ValueError("this pool has been closed")
            self._event = os.eventfd(len(self._answers), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._event

    def _answer(self, answer: Ready | Failed) -> None:
        self._answers.append(answer)
        os.eventfd_write(self._descriptor(), 1)

    def _fail(self, file: Hashable, error: IsolationError, seconds: float) -> None:
        self._forget(file)
        definite = isinstance(error, DEFINITE)
        self._answer(Failed(file, error, definite, 0.0 if definite else seconds))

    def _forget(self, file: Hashable) -> None:
        self._asked.pop(file, None)
        self._resolved.pop(file, None)

    def _act(self) -> None:
        """Carry out the orders of the schedule."""
        if self._closed:
            return
        for container in self._schedule.idle():
            if container.news() is not None:
                self._schedule.lose(container)
        for order in self._schedule.orders(time.monotonic()):
            match order:
                case Give(file, container):
                    self._forget(file)
                    self._answer(Ready(file, container))
                case Start(file, _):
                    self._movers.do(partial(self._start_one, self._resolved[file]))
                case Remove(container):
                    self._movers.do(partial(self._remove, container))
                case Refuse(file, error, seconds):
                    self._fail(file, error, seconds)

    # Jobs, for threads: they may block, and hold the lock only for moments.

    def _resolve(self, question: _Question) -> None:
        try:
            runtime = self._runtime(question.connection)
            image = runtime.ensure_image(question.reference, question.policy, timeout=question.timeout)
        except Exception as error:  # noqa: BLE001 - whatever it is, who asked gets an answer
            failure = _told(error, f"Image {question.reference} could not be made ready")
            with self._lock:
                # After a definite failure there is no pause: another image may have taken the name.
                seconds = 0.0
                if not isinstance(failure, DEFINITE):
                    seconds = self._backoff.failed(question, failure, now=time.monotonic())
                for wanted in self._questions.pop(question):
                    if wanted.file in self._asked:
                        self._fail(wanted.file, failure, seconds)
            return
        with self._lock:
            self._backoff.succeeded(question)
            asking = self._questions.pop(question)
        for wanted in asking:
            self._enter(wanted, image)

    def _enter(self, wanted: ParseRequest, image: Image) -> None:
        """Put a request into the schedule, with the specification of its container."""
        try:
            resolved = _resolved(wanted, image, self._hash_seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, who asked gets an answer
            failure = _told(error, f"The container of {wanted.file} can't be described")
            with self._lock:
                if wanted.file in self._asked:
                    self._fail(wanted.file, failure, 1.0)
            return
        with self._lock:
            if self._asked.get(wanted.file) is not wanted or self._closed:
                return
            self._resolved[wanted.file] = resolved
            self._schedule.wait(Waiting(wanted.file, resolved.key, self._forks_of(wanted.settings), resolved.at))
            self._act()

    def _forks_of(self, settings: EffectiveSettings) -> int:
        # In a root file system that is not read-only, what a file wrote can't be removed, so only one file may use it.
        return self._max_forks if settings.parse_mode == "fork" and settings.read_only_root else 1

    def _start_one(self, resolved: _Resolved) -> None:
        settings = resolved.wanted.settings
        id = new_container_id("parse")
        try:
            runtime = self._runtime(settings.connection)
            if time.monotonic() - resolved.at > STALE:
                image = runtime.ensure_image(settings.image, PullPolicy.NEVER)
                if image.digest != resolved.image.digest:
                    self._start_anew(resolved, image)
                    return
            with self._lock:
                if self._closed:
                    return
                self._starting[id] = runtime
            container = self._start(runtime, self._launch(id, resolved), state_dir=settings.connection.state_dir)
        except Exception as error:  # noqa: BLE001 - whatever it is, who asked gets an answer
            failure = _told(error, f"A container of image {settings.image} could not be started")
            log.info("A parse container could not be started", image=settings.image, error=str(failure))
            with self._lock:
                self._starting.pop(id, None)
                if not self._closed:
                    self._schedule.start_failed(resolved.key, failure, now=time.monotonic())
                    self._act()
            return
        if not self._accept(id, resolved, container):
            container.close()

    def _accept(self, id: str, resolved: _Resolved, container: ParseContainer) -> bool:
        """Take a started container; False when it is not wanted any more."""
        with self._lock:
            self._starting.pop(id, None)
            if self._closed:
                return False
            self._schedule.started(
                resolved.key, container, max_forks=self._forks_of(resolved.wanted.settings), now=time.monotonic()
            )
            self._act()
            return True

    def _start_anew(self, resolved: _Resolved, image: Image) -> None:
        """Begin anew, because the tag names another image than when the file began to wait."""
        with self._lock:
            self._schedule.start_dropped(resolved.key)
            self._schedule.cancel(resolved.wanted.file)
        self._enter(resolved.wanted, image)
        with self._lock:
            self._act()

    def _launch(self, id: str, resolved: _Resolved) -> Launch:
        settings = resolved.wanted.settings
        return Launch(
            id=id,
            spec=resolved.spec,
            image=resolved.image,
            purpose="parse",
            environment=resolved.wanted.environment,
            airflow=self._airflow,
            python=settings.python,
            start_timeout=settings.start_timeout,
        )

    def _remove(self, container: ParseContainer) -> None:
        try:
            container.close()
        finally:
            with self._lock:
                self._schedule.removed(container)
                self._act()

    def _stop_start(self, id: str, runtime: ContainerRuntime) -> None:
        """Kill a container that is being started, so that its start fails; repeat until it has."""
        while not self._settled.is_set():
            with self._lock:
                if id not in self._starting:
                    return
            try:
                runtime.kill(id)
            except (IsolationError, ValueError) as error:  # ValueError: the runtime has been closed
                log.debug("A start could not be stopped", container=id, error=str(error))
            self._settled.wait(_KILL_PAUSE)

    def _runtime(self, connection: ConnectionSettings) -> ContainerRuntime:
        with self._opening:
            if self._closed:
                raise ContainerFailed("This pool of parse containers has been closed")
            if connection not in self._runtimes:
                self._runtimes[connection] = self._open_runtime(connection)
            return self._runtimes[connection]


def _hash_seed() -> str:
    """This process's seed if somebody set one, else a random one: authors who know the seed can choose keys that collide."""
    own = os.environ.get(_HASH_SEED, "")
    return own if own.isdecimal() else str(1 + secrets.randbelow(2**32 - 1))


def _resolved(wanted: ParseRequest, image: Image, hash_seed: str) -> _Resolved:
    """The request with its key. It looks at the host's file system: mounts with other inodes make containers different.

    :raises SettingError: as ``container_spec``.
    :raises OSError: the source of a mount is gone.
    """
    settings = wanted.settings
    chosen = settings.environment.get(_HASH_SEED, "random") != "random"
    spec = container_spec(
        replace(settings, hostname=settings.hostname or _HOSTNAME),
        argv=(),
        env={} if chosen else {_HASH_SEED: hash_seed},
        mounts=wanted.mounts,
        labels={labels.PURPOSE: "parse", **wanted.labels, labels.OWNER: str(labels.Owner.this_process())},
    )
    key = (
        settings.connection,
        image.digest,
        tuple(
            (field.name, _hashable(getattr(spec, field.name))) for field in fields(spec) if field.name not in _NO_KEY
        ),
        _hashable(wanted.environment),
        settings.python,
        settings.parse_mode,
        identify_sources(spec.mounts),
    )
    return _Resolved(wanted, image, spec, key, time.monotonic())


#: Fields of a ContainerSpec that are not part of the key.
_NO_KEY = frozenset({"argv", "image", "labels"})


def _hashable(value: Any) -> Hashable:
    # Mappings are the only values of a specification that are not hashable.
    hashable: Hashable = tuple(sorted(value.items())) if hasattr(value, "items") else value
    return hashable


def _told(error: Exception, what: str) -> IsolationError:
    return error if isinstance(error, IsolationError) else ContainerFailed(f"{what}: {type(error).__name__}: {error}")

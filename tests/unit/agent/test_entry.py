"""Single steps of becoming another process, each in a fork of its own. Whole, and with privilege: tests/zygote."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.agent import entry

if TYPE_CHECKING:
    from collections.abc import Callable

assert ssl.OPENSSL_VERSION


#: Out of the way of what the tests do with descriptors.
ANSWER = 90


def in_fork(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, by way of JSON, or the words of what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, ANSWER)
            os.close(writer)
            answer = json.dumps(action())
        except BaseException as error:  # noqa: BLE001 -- it must not return into pytest
            answer = json.dumps(f"{type(error).__name__}: {error}")
        try:
            os.write(ANSWER, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said)


def open_descriptors() -> list[int]:
    found = []
    for number in range(256):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return found


def test_channels_take_the_first_numbers_whatever_numbers_they_had() -> None:
    pairs = [socket.socketpair() for _ in range(4)]

    def action() -> list[Any]:
        # In the numbers that are to be taken, in another order.
        os.dup2(pairs[0][1].fileno(), 100)
        for number, (_, theirs) in zip((2, 1, 0), pairs[1:], strict=True):
            os.dup2(theirs.fileno(), number)
        before = {*open_descriptors(), 3} - {100}
        entry.place([100, 2, 1, 0])
        for number in range(4):
            os.write(number, b"%d" % number)
        return [set(open_descriptors()) == before, [os.get_inheritable(number) for number in range(4)]]

    none_left, inheritable = in_fork(action)
    assert none_left
    assert inheritable == [True, True, True, False]
    for number, (ours, theirs) in enumerate(pairs):
        theirs.close()
        assert ours.recv(9) == b"%d" % number
        ours.close()


def test_every_descriptor_but_those_kept_is_closed() -> None:
    def action() -> list[int]:
        for number in (0, 7, 200):
            os.dup2(os.open(os.devnull, os.O_RDONLY), number)
        entry.close_all_but((ANSWER, 7, 0))
        return open_descriptors()

    assert in_fork(action) == [0, 7, ANSWER]


def test_a_kernel_without_close_range_has_its_descriptors_closed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.SYSTEM_CALLS, "close_range", 9999)

    def action() -> list[int]:
        entry.close_all_but((ANSWER,))
        return open_descriptors()

    assert in_fork(action) == [ANSWER]


def test_signals_are_as_after_an_exec() -> None:
    def action() -> list[Any]:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
        signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        entry.reset_signals()
        default = [number for number in signal.valid_signals() if signal.getsignal(number) != signal.SIG_DFL]
        return [sorted(map(int, default)), len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), signal.set_wakeup_fd(-1)]

    assert in_fork(action) == [[signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ], 0, -1]


def draw() -> list[str]:
    context = multiprocessing.current_process()
    return [
        str(random.random()),
        tempfile.mktemp(),
        bytes(context.authkey).hex(),
        ssl.RAND_bytes(16).hex(),
    ]


def test_two_forks_draw_nothing_alike_even_if_both_had_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tempfile.mktemp()
    # In pid namespaces of their own two forks, and the process they came from, may have one number.
    monkeypatch.setattr(os, "getpid", lambda: 7)
    tempfile.mktemp()

    def action() -> list[str]:
        entry.reseed()
        return draw()

    one, other = in_fork(action), in_fork(action)
    assert len(one) == 4
    assert set(one).isdisjoint(other)


def test_the_network_interface_and_the_clock_of_uuids_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python asks for neither where the C library makes the whole identifier.
    monkeypatch.setattr(uuid, "_node", 1)
    monkeypatch.setattr(uuid, "_last_timestamp", 1)

    def action() -> list[None]:
        entry.reseed()
        return [uuid._node, uuid._last_timestamp]  # type: ignore[attr-defined]

    assert in_fork(action) == [None, None]


def test_numpys_generator_is_seeded_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:
        """In the place of numpy, which need not be installed."""

        seeded = 0

        @classmethod
        def seed(cls) -> None:
            cls.seeded += 1

    monkeypatch.setitem(sys.modules, "numpy.random", StandIn)

    def action() -> int:
        entry.reseed()
        return StandIn.seeded

    assert in_fork(action) == 1


def test_the_temporary_directory_is_looked_for_again() -> None:
    def action() -> str:
        tempfile.gettempdir()
        entry.set_environment({"TMPDIR": "/dev/shm"})
        entry.reseed()
        return tempfile.gettempdir()

    assert in_fork(action) == "/dev/shm"


def test_the_environment_is_exactly_the_given_one_for_c_libraries_too() -> None:
    def action() -> list[Any]:
        os.environ["OF_BEFORE"] = "1"
        entry.set_environment({"TZ": "Asia/Tokyo", "BYTES": "\udcff"})
        with os.popen("/usr/bin/env -0 | /usr/bin/od -An -c | /usr/bin/tr -d ' \\n'") as words:
            listed = words.read()
        return [dict(os.environ), "OF_BEFORE" in listed, time.tzname[0]]

    environment, listed, zone = in_fork(action)
    assert environment == {"TZ": "Asia/Tokyo", "BYTES": "\udcff"}
    assert not listed
    assert zone == "JST"


@pytest.mark.parametrize(
    ("label", "name"), [("docker-default (enforce)", "docker-default"), ("unconfined", "unconfined"), ("", "")]
)
def test_the_mode_of_a_profile_is_not_of_its_name(label: str, name: str) -> None:
    assert entry.without_mode(label) == name


@pytest.mark.parametrize("process", [{}, {"capabilities": {}}, {"capabilities": {}, "seccomp": "not base64!"}])
def test_a_description_that_can_t_be_read_is_refused_before_anything_is_done(process: dict[str, Any]) -> None:
    before = open_descriptors()
    with pytest.raises(entry.EntryFailed, match="can't be read"):
        entry.become(process, {}, keep=0)
    assert open_descriptors() == before


def test_a_program_that_is_not_made_of_instructions_is_refused() -> None:
    with pytest.raises(entry.EntryFailed, match="9 bytes"):
        entry.load_filter(b"123456789", 0)


def test_an_unknown_machine_can_t_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "SYSTEM_CALLS", {})
    with pytest.raises(OSError, match="not known"):
        entry.system_call("capset")


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_no_file_of_the_container_is_read_before_all_privilege_is_gone(
    monkeypatch: pytest.MonkeyPatch, no_new_privileges: bool
) -> None:
    done: list[str] = []
    # Nothing is done: only the order matters.
    monkeypatch.setattr(entry, "step", lambda words, *_: done.append(words))
    monkeypatch.setattr(entry, "prctl", lambda *_: 0)
    process = {
        "uid": 50000,
        "gid": 0,
        "groups": [0],
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), 0),
        "no_new_privileges": no_new_privileges,
        "rlimits": {},
        "umask": os.umask(0o22),
        "oom_score_adj": 0,
        "apparmor": "docker-default",
        "working_directory": "/",
        "seccomp": "",
        "seccomp_flags": 0,
    }
    os.umask(int(str(process["umask"])))
    entry.take_on(process, {}, keep=0)
    last = max(done.index("setting capabilities"), done.index("loading the seccomp filter"))
    assert done[last + 1 :] == ["setting the environment", "completing the fork", "seeding"]


#: Says which hooks have run, before and after it has completed the fork; then forks as others do.
FORKING = """
import os, threading
from airflow_isolation.agent import entry
ran = []
for when in ("before", "after_in_parent", "after_in_child"):
    os.register_at_fork(**{when: lambda when=when: ran.append(when)})
if entry.bare_fork():
    os.wait()
    os._exit(0)
early = [*ran]
entry.complete_fork()
thread = threading.Thread(target=lambda: ran.append("a thread"))
thread.start()
thread.join()
if not os.fork():
    os._exit(0)
os.wait()
print(early, ran, flush=True)
"""


def test_the_hooks_of_libraries_run_when_a_fork_is_completed_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{[]} {['before', 'after_in_child', 'a thread', 'before', 'after_in_parent']}\n"

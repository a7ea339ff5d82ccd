"""Files one after the other in one container of the real image: each finds what the first one found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import freeze
from tests.parse_containers.conftest import HEALTHY, INSPECTION, NOTHING_LEFT
from tests.parse_containers.parsing import begin, parse

from airflow_isolation.bridge import parse_container
from airflow_isolation.bridge.parse_container import Ended, ParseContainer
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import ContainerFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.parse_containers.conftest import Host

MIB = 1024 * 1024


@pytest.fixture
def container(host: Host) -> ParseContainer:
    return host.start(limits={"memory": 800 * MIB, "pids": 60})


def assert_healthy(host: Host, container: ParseContainer) -> None:
    """The next file is parsed, and finds nothing of the one before."""
    assert json.loads(host.parse(container, INSPECTION).stdout) == NOTHING_LEFT
    parsed = host.parse(container, HEALTHY)
    assert (parsed.ended, parsed.dag_ids()) == (Ended(0, gone=False, out_of_memory=False), ["healthy"])


def test_each_file_has_its_result_its_environment_and_its_descriptors(host: Host, container: ParseContainer) -> None:
    for name in ("one", "two", "three"):
        parsed = host.parse(container, HEALTHY.replace("healthy", name))
        assert (parsed.started, parsed.ended, parsed.dag_ids()) == (True, Ended(0, out_of_memory=False), [name])
    show = "import os, sys; print(os.environ.get('MINE'), os.getpid() == os.getsid(0)); os.write(2, b'error')"
    told = host.parse(container, show, MINE="told")
    assert (told.stdout, told.stderr) == ("told True\n", "error")
    by_path = "import sys; print('first', flush=True); open('/dev/stdout', 'a').write('second'); open('/dev/stderr', 'w').write('err')"
    printed = host.parse(container, by_path)
    assert (printed.stdout, printed.stderr) == ("first\nsecond", "err")
    assert host.parse(container, show).stdout == "None True\n"
    assert container.forks == 6
    assert_healthy(host, container)


def test_airflow_is_imported_once_and_named_modules_with_it(host: Host, container: ParseContainer) -> None:
    show = "import sys; print('airflow.sdk.definitions.dag' in sys.modules, 'airflow.example_dags' in sys.modules)"
    assert host.parse(container, show).stdout == "True False\n"
    file = host.write("file.py", show)
    named = begin(container, file, modules=("airflow.example_dags", "airflow.no_such_module", "antigravity"))
    named.finish()
    assert named.stdout == "True True\n"
    assert host.parse(container, "import sys; print('antigravity' in sys.modules)").stdout == "False\n"


LEFT_BEHIND = {
    "a daemon": """
        import subprocess
        subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM HUP; sleep 600 & sleep 600"], start_new_session=True)
    """,
    "a double fork": """
        import os, time
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(writer, b"!")
                time.sleep(600)
            os._exit(0)
        os.wait(), os.read(reader, 1)
    """,
    "directories without permissions": """
        import os
        for top in ("/tmp", "/dev/shm"):
            os.makedirs(top + "/closed/within")
            open(top + "/closed/within/file", "w").close()
            os.chmod(top + "/closed/within/file", 0o000)
            os.chmod(top + "/closed/within", 0o000)
            os.chmod(top + "/closed", 0o500)
            os.symlink("/", top + "/link")
            os.mkfifo(top + "/fifo", 0o000)
    """,
    "a tree deeper than any path": """
        import os
        os.chdir("/tmp")
        for _ in range(3000):
            os.mkdir("d" * 50)
            os.chdir("d" * 50)
        open("file", "w").close()
    """,
    "names that mean something": """
        import os
        for name in (".wiped-0", ".wiped-1", "\\udcff", "a\\nb", "a b", "\\\\040"):
            os.makedirs("/tmp/deep/" + name + "/" + name)
            os.makedirs("/tmp/" + name)
    """,
    "a bound socket and shared memory": """
        import ctypes, os, socket
        socket.socket(socket.AF_UNIX).bind("/tmp/socket")
        libc = ctypes.CDLL(None)
        assert libc.shmget(42, 4096, 0o1666) >= 0 and libc.msgget(42, 0o1666) >= 0 and libc.semget(42, 1, 0o1666) >= 0
        assert ctypes.CDLL("librt.so.1").mq_open(b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0
    """,
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_nothing_of_a_file_is_left_for_the_next(host: Host, container: ParseContainer, what: str) -> None:
    parsed = host.parse(container, LEFT_BEHIND[what])
    assert (parsed.stderr, parsed.result["import_errors"]) == ("", {})
    assert parsed.ended == Ended(0, out_of_memory=False)
    assert_healthy(host, container)


def test_a_users_volume_is_never_wiped(host: Host) -> None:
    volume = host.state_dir / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    container = host.start(mounts=(Mount(source=str(volume), target="/tmp/a b/data", read_only=False),))
    parsed = host.parse(container, "open('/tmp/a b/data/kept', 'w').close(); open('/tmp/wiped', 'w').close()")
    assert parsed.result["import_errors"] == {}
    left = host.parse(
        container, "import os; print(os.listdir('/tmp'), os.listdir('/tmp/a b'), os.listdir('/tmp/a b/data'))"
    )
    assert left.stdout == "['a b'] ['data'] ['kept']\n"
    assert (volume / "kept").exists()


#: ioprio_set(2): process 1 into the class that gets a disk when nobody else wants it.
IDLE_ON_DISKS = """
    import ctypes, platform
    number = {"x86_64": 251, "aarch64": 30}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 1, 1, 3 << 13) == 0
"""

#: sched_setattr(2): process 1 gives way after a tenth of a millisecond. Before Linux 6.12 it can't be told to.
SHORT_TURNS = """
    import ctypes, os, platform, struct
    changes, shows = {"x86_64": (314, 315), "aarch64": (274, 275)}[platform.machine()]
    call, found = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(56)
    assert call(changes, 1, struct.pack("IIQiIQQQII", 56, 0, 0, 0, 0, 100_000, 0, 0, 0, 0), 0) == 0
    assert call(shows, 1, found, 56, 0) == 0
    if struct.unpack_from("Q", found, 24) != (100_000,):
        os.setpriority(os.PRIO_PROCESS, 1, 1)
"""


@pytest.mark.parametrize(
    "change",
    [
        "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (8, 8))",
        "import resource; resource.prlimit(1, resource.RLIMIT_CORE, (0, 0)); resource.prlimit(1, resource.RLIMIT_FSIZE, (1, 1))",
        "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)",
        "import os; os.sched_setaffinity(1, {0})",
        IDLE_ON_DISKS,
        SHORT_TURNS,
    ],
)
def test_a_container_whose_process_1_was_tampered_with_ends(host: Host, container: ParseContainer, change: str) -> None:
    parsed = host.parse(container, change)
    assert (parsed.result["import_errors"], parsed.ended) == ({}, Ended(0, out_of_memory=False))
    assert wait_for_end(container) == Ended(-9, gone=True)
    with pytest.raises(ContainerFailed):
        begin(container, host.write("file.py", HEALTHY))


def wait_for_end(container: ParseContainer) -> Ended:
    import select

    poll = select.poll()
    poll.register(container, select.POLLIN)
    assert poll.poll(60_000)
    news = container.news()
    assert isinstance(news, Ended)
    assert container.news() is None
    return news


ENDS = {
    "os._exit": ("import os; os._exit(3)", 3, False),
    "a segfault": ("import ctypes; ctypes.string_at(0)", -11, False),
    "a segfault that Python would handle": (
        "import ctypes, signal; signal.signal(signal.SIGSEGV, print); ctypes.string_at(0)",
        -11,
        False,
    ),
    "an abort": ("import os; os.abort()", -6, False),
    "3 GB": ("data = [bytearray(b'x') * 2**20 for _ in range(3000)]", -9, True),
    "3 GB in a process of its own, which is then missed": (
        """
        import os, subprocess, sys
        done = subprocess.run([sys.executable, "-c", "x = bytearray(b'x') * 2**20 * 3000"])
        os._exit(5 if done.returncode == -9 else 6)
        """,
        5,
        True,
    ),
    "all descriptors closed": ("import os; os.closerange(0, 1000); os._exit(0)", 0, False),
}


@pytest.mark.parametrize("what", ENDS)
def test_how_a_file_ends_is_told_and_harms_nobody(host: Host, container: ParseContainer, what: str) -> None:
    program, code, out_of_memory = ENDS[what]
    parsed = host.parse(container, program)
    assert parsed.ended == Ended(code, gone=False, out_of_memory=out_of_memory)
    assert_healthy(host, container)


def test_garbage_on_every_descriptor_harms_nobody(host: Host, container: ParseContainer) -> None:
    parsed = host.parse(
        container,
        "import os\n"
        "for number in range(4):\n"
        "    os.set_blocking(number, False)\n"
        "    for chunk in (b'\\0\\0\\0\\5hello', b'{}\\n', b'\\xff' * 5000): os.write(number, chunk)\n"
        "os._exit(0)",
    )
    assert parsed.ended == Ended(0, out_of_memory=False)
    assert_healthy(host, container)


def test_a_fork_bomb_ends_with_one_kill(host: Host, container: ParseContainer, monkeypatch: pytest.MonkeyPatch) -> None:
    # By process 1 alone, however slow this host is.
    monkeypatch.setattr(parse_container, "KILL_ESCALATION", 60.0)
    bombed = begin(
        container,
        host.write(
            "file.py",
            """
            import os, time
            os.write(1, b"lit")
            while True:
                try:
                    os.fork()
                except OSError:
                    os.write(1, b"!")
                    time.sleep(0.05)
            """,
        ),
    )
    bombed.until(lambda: "lit!" in bombed.stdout)
    container.kill()
    assert bombed.finish() == Ended(-9, out_of_memory=False)
    assert_healthy(host, container)


def test_kill_ends_a_file_that_hangs_and_is_nothing_to_one_that_has_ended(
    host: Host, container: ParseContainer
) -> None:
    container.kill()
    hung = begin(container, host.write("file.py", "import time; print('up', flush=True); time.sleep(600)"))
    hung.until(lambda: "up" in hung.stdout)
    container.kill()
    container.kill()
    assert hung.finish() == Ended(-9, out_of_memory=False)
    container.kill()
    assert_healthy(host, container)


MANY_FILES = """
    import os
    for number in range(60000):
        os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
    print("made", flush=True)
    os._exit(4)
"""


@pytest.fixture
def wiping(host: Host, container: ParseContainer) -> Iterator[object]:
    """A container whose wiper has been stopped at its work."""
    pid = container.container.pid
    full = begin(container, host.write("file.py", MANY_FILES))
    full.until(lambda: full.started)
    child = _children(pid)
    full.until(lambda: not full.channels)
    deadline = time.monotonic() + 30
    while not (wipers := _children(pid) - child):
        assert time.monotonic() < deadline
        assert full.container.news() is None
        time.sleep(0.001)
    freeze(wipers.pop())
    yield full
    full.close()


def _children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_kill_works_while_process_1_wipes(host: Host, container: ParseContainer, wiping: object) -> None:
    container.kill()
    assert wiping.finish() == Ended(4, out_of_memory=False)  # type: ignore[attr-defined]
    assert wait_for_end(container).gone


def test_a_wipe_without_end_ends_the_container(host: Host, container: ParseContainer, wiping: object) -> None:
    assert wiping.finish() == Ended(4, out_of_memory=False)  # type: ignore[attr-defined]
    assert wait_for_end(container).gone


def test_process_1_that_does_not_answer_is_killed_with_its_container(host: Host, container: ParseContainer) -> None:
    hung = begin(container, host.write("file.py", "import time; print('up', flush=True); time.sleep(600)"))
    hung.until(lambda: "up" in hung.stdout)
    freeze(container.container.pid)
    container.kill()
    ended = hung.finish()
    assert (ended.code, ended.gone) == (-9, True)
    assert container.news() is None
    container.close()
    container.close()
    container.kill()
    assert container.news() is None


@pytest.mark.parametrize("when", ["idle", "parsing"])
def test_a_container_killed_from_outside_is_noticed(host: Host, container: ParseContainer, when: str) -> None:
    if when == "idle":
        assert container.news() is None
        os.kill(container.container.pid, 9)
        assert wait_for_end(container).gone
    else:
        hung = begin(container, host.write("file.py", "import time; print('up', flush=True); time.sleep(600)"))
        hung.until(lambda: "up" in hung.stdout)
        os.kill(container.container.pid, 9)
        ended = hung.finish()
        assert (hung.started, ended.code, ended.gone) == (True, -9, True)
    with pytest.raises(ContainerFailed):
        parse(container, host.write("file.py", HEALTHY))


def test_only_one_file_at_a_time(host: Host, container: ParseContainer) -> None:
    hung = begin(container, host.write("first.py", "import time; time.sleep(600)"))
    with pytest.raises(ContainerFailed, match="parsing another file"):
        begin(container, host.write("second.py", HEALTHY))
    container.kill()
    hung.finish()

"""hack/v2: a command in the guest is as one on the host, except for the kernel, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HACK = Path(__file__).resolve().parents[2] / "hack"
V2 = (sys.executable, str(HACK / "v2"))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where hack/v2 keeps what it needs; empty again at the end, with no guest of ours left."""
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    monkeypatch.setenv("AIRFLOW_ISOLATION_RUN_DIRECTORY", str(exchange))
    yield exchange
    assert list(exchange.iterdir()) == []
    assert guests(exchange) == []


def guests(exchange: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(exchange).encode() in (process / "cmdline").read_bytes()
                and (process / "exe").readlink().name == "linux.uml"
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def v2(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*V2, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )


def begun(*arguments: str) -> subprocess.Popen[bytes]:
    """Started, and its command too: it has said so."""
    process = subprocess.Popen([*V2, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def test_its_kernel_has_cgroup_v2_with_controllers(directory: Path) -> None:
    done = v2("cat", "/sys/fs/cgroup/cgroup.controllers")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [b"cpu", b"io", b"memory", b"pids"], b"")


def test_output_is_exact_and_apart_and_so_is_the_status(directory: Path) -> None:
    everything = "import os; os.write(1, bytes(range(256)) * 4000); os.write(2, b'\\r\\n\\x00'); raise SystemExit(37)"
    done = v2(str(Path(sys.executable).resolve()), "-c", everything)
    assert (done.returncode, done.stderr) == (37, b"\r\n\0")
    assert done.stdout == bytes(range(256)) * 4000


@pytest.mark.parametrize(
    ("command", "status"),
    [(("sh", "-c", "kill -SEGV $$"), 128 + 11), (("no-such-program",), 127), (("/etc/hostname",), 126)],
)
def test_a_command_that_a_signal_ended_or_that_can_not_run(
    directory: Path, command: tuple[str, ...], status: int
) -> None:
    assert v2(*command).returncode == status


def test_systemd_is_process_1_and_has_the_cgroups_and_a_command_is_as_without_it(directory: Path) -> None:
    look = "cat /proc/1/comm /proc/self/cgroup; systemctl is-active guest.service; echo apart >&2; kill -SEGV $$"
    done = v2("--systemd", "sh", "-c", look)
    assert done.stdout.split() == [b"systemd", b"0::/system.slice/guest.service", b"active"]
    assert (done.returncode, done.stderr) == (128 + 11, b"apart\n")


def test_environment_and_working_directory_are_passed_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_TEST", "two\nlines")
    monkeypatch.chdir(HACK)
    done = v2("sh", "-c", 'printf %s "$AI_TEST"; pwd; ls v2')
    assert done.stdout == f"two\nlines{HACK}\nv2\n".encode()


def test_the_hosts_files_are_left_alone_except_where_they_are_to_be_kept(directory: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    mark = f"/etc/ai-v2-{os.getpid()}"
    done = v2(
        f"--writable={kept}", "sh", "-c", f"touch {mark} {HACK}/ai-v2 && ls {mark} {HACK}/ai-v2 && echo x >{kept}/file"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert not Path(mark).exists()
    assert not (HACK / "ai-v2").exists()
    assert (kept / "file").read_text() == "x\n"


def test_an_empty_directory_is_empty_and_the_others_are_as_on_the_host(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").write_text("x")
    (tmp_path / "there").write_text("y")
    done = v2(
        f"--empty={tmp_path}/here", "sh", "-c", f"ls {tmp_path}/here; cat {tmp_path}/there; touch {tmp_path}/here/new"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"y", b"")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["file"]


def test_a_time_limit_ends_the_guest(directory: Path) -> None:
    done = v2("--timeout=10", "sh", "-c", "echo begun; sleep 1000")
    assert (done.returncode, done.stdout) == (124, b"begun\n")
    assert b"time limit of 10 s" in done.stderr


def test_a_panic_is_told_with_the_kernels_last_words(directory: Path) -> None:
    done = v2("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 125
    assert b"Kernel panic - not syncing" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_guest(directory: Path, number: signal.Signals) -> None:
    process = begun("sh", "-c", "echo begun; sleep 1000")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number


def test_even_sigkill_ends_the_guest(directory: Path) -> None:
    process = begun("sh", "-c", "echo begun; sleep 1000")
    assert guests(directory) != []
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while guests(directory):
        assert time.monotonic() < deadline, "the guest lives on"
        time.sleep(0.05)
    # Nobody is left to remove it; what was passed on is no longer in it.
    (left,) = directory.iterdir()
    assert not (left / "order.json").exists()
    for path in sorted(left.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    left.rmdir()


def test_a_reader_that_goes_away_ends_the_guest(directory: Path) -> None:
    process = begun("sh", "-c", "echo begun; yes")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(60)
    assert process.stderr is not None
    process.stderr.close()
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), b"there is no command"),
        (("--writable=/no/such/directory", "true"), b"/no/such/directory is not a directory"),
    ],
)
def test_what_can_not_be_is_refused_in_a_sentence(directory: Path, arguments: tuple[str, ...], words: bytes) -> None:
    done = v2(*arguments)
    assert done.returncode in {2, 125}
    assert words in done.stderr

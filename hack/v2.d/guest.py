"""The first process of the guest: makes a system out of the host's files, runs one command in it, and halts.

Runs as process 1 of User-mode Linux; hack/v2 starts it with the path of a JSON file. The host's files are the lower
layer of an overlay whose upper layer is memory, so whatever the command does to them is gone with the guest. Where systemd
is to be process 1, this becomes systemd once the system is made, and starts again in a unit of it for the rest.
Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import signal
import socket
import struct
import sys
import termios
import threading
import traceback
import tty
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# linux/mount.h, linux/reboot.h, and the system calls of x86-64, for which alone Debian builds User-mode Linux
MS_NOSUID, MS_NODEV, MNT_DETACH = 0x2, 0x4, 0x2
RB_POWER_OFF = 0x4321FEDC
SIOCSIFFLAGS = 0x8914  # linux/sockios.h
SYS_PIVOT_ROOT, SYS_FINIT_MODULE = 155, 313
#: Nothing is ordered before or after it, and nothing needed; when it can't even be started, the guest is to halt.
UNIT = """\
[Unit]
DefaultDependencies=no
FailureAction=poweroff-immediate
SuccessAction=poweroff-immediate

[Service]
ExecStart=/bin/sh /run/guest/start
StandardInput=null
StandardOutput=null
"""
# Where systemd puts what it is told while it runs, and nothing of the host's.
UNITS = "/run/systemd/system.control:/run/systemd/transient:/run/guest"

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    try:
        carry_out(Path(sys.argv[1]))
    finally:
        os.sync()
        libc.reboot(RB_POWER_OFF)


def carry_out(path: Path) -> None:
    order = json.loads(path.read_text())
    outcome: dict[str, Any] = {"status": None, "error": ""}
    try:
        if os.getpid() == 1:
            make_root(order)
            loopback_up()
            if order["systemd"]:
                become_systemd(Path(order["systemd"]), path)
        # It holds an environment, which nobody needs there any longer.
        path.unlink()
        outcome["status"] = run(order)
    except Exception:  # noqa: BLE001 -- whatever it is, the host is to hear of it
        outcome["error"] = traceback.format_exc()
    path.with_name("outcome.json").write_text(json.dumps(outcome))


def make_root(order: dict[str, Any]) -> None:
    """An overlay of the host's root becomes our root, with file systems of this kernel in it."""
    for module in order["modules"]:
        with Path(module).open("rb") as file:
            call(f"load {module}", libc.syscall(SYS_FINIT_MODULE, file.fileno(), b"", 0))
    mount("tmpfs", "/tmp", "tmpfs", MS_NODEV)
    for name in ("upper", "work", "root"):
        Path("/tmp", name).mkdir()
    mount("overlay", "/tmp/root", "overlay", 0, "lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work")
    os.chdir("/tmp/root")
    # The old root ends up on top of the new one, from where it is taken away (pivot_root(2)).
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT, b".", b"."))
    call("detach the old root", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("devtmpfs", "/dev", "devtmpfs")
    mount("devpts", "/dev/pts", "devpts", options="ptmxmode=666,mode=620")
    for directory in ("/dev/shm", "/run", *order["empty"]):
        mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        Path("/dev", name).symlink_to(f"/proc/self/{target}")
    if not order["systemd"]:  # which mounts it itself
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    if order["apparmor"]:
        mount("securityfs", "/sys/kernel/security", "securityfs")
    # Its own mount of the host's directory, and so writable, where the root is not.
    for directory in (order["exchange"], *order["writable"]):
        mount("hostfs", directory, "hostfs", MS_NOSUID | MS_NODEV, directory)


def become_systemd(unpacked: Path, order: Path) -> NoReturn:
    """Its one unit goes on from here, as another process."""
    Path("/run/guest").mkdir()
    Path("/run/guest/guest.service").write_text(UNIT)
    again = [sys.executable, "-I", "-S", "-B", str(Path(__file__).resolve()), str(order)]
    Path("/run/guest/start").write_text(f"exec {shlex.join(again)}\n")
    library = unpacked / "usr/lib/x86_64-linux-gnu"
    libraries = f"{library}:{library}/systemd:{unpacked}/lib/x86_64-linux-gnu"
    # Whether the host has one or not, and of whichever release.
    systemctl = Path("/usr/bin/systemctl")
    systemctl.unlink(missing_ok=True)
    systemctl.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH={shlex.quote(libraries)} exec {shlex.quote(f"{unpacked}/bin/systemctl")} "$@"\n'
    )
    systemctl.chmod(0o755)
    os.execve(
        unpacked / "lib/systemd/systemd",
        ["systemd", "--unit=guest.service", "--log-target=console", "--log-level=notice", "--show-status=no"],
        {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            # Not for its units: they don't inherit it.
            "LD_LIBRARY_PATH": libraries,
            "SYSTEMD_UNIT_PATH": UNITS,
            # There are none.
            "SYSTEMD_GENERATOR_PATH": "/run/guest",
            "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": "/run/guest",
        },
    )


def run(order: dict[str, Any]) -> int:
    """The command's exit status, 128 + n when signal n has ended it."""
    pumps = []
    writers = []
    for console in ("/dev/tty1", "/dev/tty2"):
        # Through a pipe, because the command's output is no terminal, and raw, because no carriage returns are wanted.
        terminal = os.open(console, os.O_WRONLY | os.O_NOCTTY)
        tty.setraw(terminal)
        reader, writer = os.pipe()
        writers.append(writer)
        pumps.append(threading.Thread(target=pump, args=(reader, terminal)))
    child = os.fork()
    if child == 0:
        try:
            start(order, *writers)
        except BaseException:  # noqa: BLE001 -- nothing of ours may run in the child
            traceback.print_exc()
            os._exit(127)
    for writer in writers:
        os.close(writer)
    for each in pumps:
        each.start()
    pid = 0
    while pid != child:  # process 1 is the parent of all orphans
        pid, status = os.wait()
    # Whoever is left would keep the pipes open.
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    for each in pumps:
        each.join()
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def pump(reader: int, terminal: int) -> None:
    while chunk := os.read(reader, 65536):
        while chunk:
            chunk = chunk[os.write(terminal, chunk) :]
    termios.tcdrain(terminal)


def start(order: dict[str, Any], stdout: int, stderr: int) -> None:
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    Path(order["directory"]).mkdir(parents=True, exist_ok=True)
    os.chdir(order["directory"])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what it starts would too
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["environment"])
    try:
        os.execvp(order["command"][0], order["command"])
    except OSError as error:
        print(f"{order['command'][0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def loopback_up() -> None:
    with socket.socket() as control:
        # netdevice(7): struct ifreq with IFF_UP
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", 1))


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    call(
        f"mount {kind} on {target}",
        libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()),
    )


def call(what: str, result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


if __name__ == "__main__":
    main()

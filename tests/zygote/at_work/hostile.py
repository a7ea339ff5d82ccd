"""In the container, in the place of agent/zygote.py: speaks its protocol, and cheats as AIRFLOW_TEST_CHEAT says.

Standard library only: it becomes a module of the image. What it opens, its child's end closes.
"""

# ruff: noqa: PTH101, PTH102, PTH108, PTH123, PTH208, SIM115

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Take over before the agent's zygote knows: its arguments are all that it has."""
    worker, listening = (socket.socket(fileno=int(number)) for number in sys.argv[2:4])
    # The kernel reaps; and SIGIO says that the worker has gone.
    for number in (signal.SIGCHLD, signal.SIGIO):
        signal.signal(number, signal.SIG_IGN)
    worker.send(json.dumps({"ready": {"memory": 1}}).encode())
    worker.close()
    cheat = globals()[os.environ["AIRFLOW_TEST_CHEAT"]]
    while True:
        asker, _ = listening.accept()
        packet, descriptors, _, _ = socket.recv_fds(asker, 65536, 8)
        if packet:
            cheat(asker, descriptors)
        asker.close()
        for descriptor in descriptors:
            os.close(descriptor)


def say(asker: socket.socket, message: Any) -> None:
    asker.send(message if isinstance(message, bytes) else json.dumps(message).encode())


def hear(asker: socket.socket) -> Any:
    packet = asker.recv(1024 * 1024)
    return json.loads(packet) if packet else None


def nonsense(asker: socket.socket, _: list[int]) -> None:
    say(asker, b"\xff\xfe\x00")


def a_list(asker: socket.socket, _: list[int]) -> None:
    say(asker, [["forked"]])


def too_much(asker: socket.socket, _: list[int]) -> None:
    """More than a packet may hold: the worker sees a part of it."""
    say(asker, {"failed": "x" * 150_000})


def hangs_up(_asker: socket.socket, _: list[int]) -> None:
    """And says nothing."""


def forged_pid(asker: socket.socket, _: list[int]) -> None:
    """Says that it is process 1 of the host: the kernel must refuse."""
    credentials = (ctypes.c_int * 3)(1, os.getuid(), os.getgid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(credentials))]
    try:
        asker.sendmsg([b'{"forked": {}}'], ancillary)
        hear(asker)
        asker.sendmsg([b'{"entered": {}}'], ancillary)
        hear(asker)
    except OSError as error:
        say(asker, {"failed": f"forging is refused: {error!r}"})


def stays_outside(asker: socket.socket, _: list[int]) -> None:
    """A fork says that it has entered, and is where it was."""
    if os.fork():
        return
    say(asker, {"forked": {}})
    hear(asker)
    say(asker, {"entered": {}})
    outlive(asker)


def the_zygote_itself(asker: socket.socket, _: list[int]) -> None:
    """Has itself moved into the container's cgroups, and says that it has entered."""
    say(asker, {"forked": {}})
    hear(asker)
    say(asker, {"entered": {}})
    hear(asker)


def keeps_root(asker: socket.socket, descriptors: list[int]) -> None:
    """Enters the container, and stays root there."""
    if os.fork():
        return
    say(asker, {"forked": {}})
    hear(asker)
    for descriptor in descriptors:
        LIBC.setns(descriptor, 0)
    if os.fork() or os.fork():
        os._exit(0)
    say(asker, {"entered": {}})
    outlive(asker)


def writes_in_there(asker: socket.socket, descriptors: list[int]) -> None:
    """In the mounts of a container of its own image: makes files in its volume as whom it may be there, and gives some away."""
    accounts = ((0, 0), (1, 1), (50000, 1), (50000, 0))
    done = [f"makes one as {uid}:{gid}" for uid, gid in accounts if succeeds(write_as, uid, gid, descriptors[-1])]
    done += ["gives one to root"] if succeeds(give_to_root, descriptors[-1]) else []
    for name in ("file", "everybody"):
        done += [f"makes /in/{name} writable"] if succeeds(make_writable, name, descriptors[-1]) else []
    say(asker, {"done": done})


def write_as(uid: int, gid: int, mounts: int) -> None:
    checked(LIBC.setns(mounts, 0x00020000))
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    with open(f"/out/by-{uid}-{gid}", "w"):
        pass


def give_to_root(mounts: int) -> None:
    checked(LIBC.setns(mounts, 0x00020000))
    os.chown("/out/theirs", 0, 0)


def make_writable(name: str, mounts: int) -> None:
    checked(LIBC.setns(mounts, 0x00020000))
    checked(LIBC.mount(b"none", b"/in", None, 0x20 | 0x1000, None))  # MS_REMOUNT | MS_BIND
    with open(f"/in/{name}", "a") as file:
        file.write("changed")


def writes_into_its_image(asker: socket.socket, descriptors: list[int]) -> None:
    """Every way that root of a namespace has to make a mount writable, in its own container and in a task's."""
    done = []
    for pidfd, whose in ((-1, "its own"), (descriptors[0], "the task's")):
        for freeing in (nothing, remount, remount_file_system, mount_elsewhere, clear_flag, unmount):
            for change in (make_file, through_proc, append, give_away, take_away, open_up):
                done += [f"{change.__name__} after {freeing.__name__} in {whose}"] * succeeds(
                    freed, pidfd, freeing, change
                )
    done += [f"reaches {layer}" for layer in layers_of_root() if succeeds(reach, layer)]
    say(asker, {"done": done})


def freed(pidfd: int, freeing: Any, change: Any) -> None:
    if pidfd >= 0:
        checked(LIBC.setns(pidfd, 0x00020000))
    change(freeing() or "")


def nothing() -> None:
    """As it is."""


def remount() -> None:
    LIBC.mount(b"none", b"/", None, 0x20 | 0x1000, None)  # MS_REMOUNT | MS_BIND: not read-only


def remount_file_system() -> None:
    LIBC.mount(b"none", b"/", None, 0x20, None)  # MS_REMOUNT
    remount()


def mount_elsewhere() -> str:
    remount()
    checked(LIBC.mount(b"/", b"/tmp", None, 0x1000, None))  # MS_BIND
    LIBC.mount(b"none", b"/tmp", None, 0x20 | 0x1000, None)
    return "/tmp"


def clear_flag() -> None:
    wanted = (ctypes.c_uint64 * 4)(0, 1, 0, 0)  # attr_clr = MOUNT_ATTR_RDONLY
    checked(LIBC.syscall(442, -100, b"/", 0x8000, ctypes.byref(wanted), ctypes.c_size_t(32)))  # mount_setattr


def unmount() -> None:
    LIBC.umount2(b"/", 2)  # MNT_DETACH
    os.chdir("/")
    remount()


def make_file(root: str) -> None:
    os.close(os.open(f"{root}/ai-hostile", os.O_CREAT | os.O_WRONLY))


def through_proc(root: str) -> None:
    make_file(f"/proc/self/root{root}/etc")


def append(root: str) -> None:
    with open(f"{root}/etc/passwd", "a") as file:
        file.write("ai-hostile")


def give_away(root: str) -> None:
    os.chown(f"{root}/etc/passwd", 50000, 0)


def open_up(root: str) -> None:
    os.chmod(f"{root}/etc/shadow", 0o666)


def take_away(root: str) -> None:
    os.unlink(f"{root}/etc/passwd")


def layers_of_root() -> list[str]:
    """Where they are on the host, as the kernel tells."""
    lines = open("/proc/self/mountinfo").read().splitlines()
    (root,) = [line for line in lines if line.split()[4] == "/"]
    options = dict(option.split("=", 1) for option in root.rsplit(" ", 1)[1].split(",") if "=" in option)
    return options["lowerdir"].split(":")


def reach(layer: str) -> None:
    for root in ("", "/proc/1/root", f"/proc/{os.getppid()}/root"):
        if succeeds(os.listdir, f"{root}{layer}"):
            return
    raise OSError


def outlive(asker: socket.socket) -> NoReturn:
    """Stay whatever the worker says."""
    hear(asker)
    while True:
        time.sleep(1)


def deep(asker: socket.socket, _: list[int]) -> None:
    """JSON that no recursive reader survives."""
    say(asker, b"[" * 60_000)


def descriptors(asker: socket.socket, _: list[int]) -> None:
    """As many as a message holds: each would cost the worker one."""
    socket.send_fds(asker, [b"{}"], [0] * 250)


def of_the_host(asker: socket.socket, _: list[int]) -> None:
    """Every process of the host that it can see, in turn, said to be the fork."""
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in (os.getpid(), os.getppid()):
            continue
        credentials = (ctypes.c_int * 3)(int(name), 0, 0)
        try:
            asker.sendmsg([b'{"forked": {}}'], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, bytes(credentials))])
        except OSError:
            continue
        return
    say(asker, {"failed": "forging is refused for all"})


def reaches_out(asker: socket.socket, _: list[int]) -> None:
    """Everything that it should not, of the processes and files that it is told of; says what it could do."""
    done = []
    for word in os.environ["AIRFLOW_TEST_PIDS"].split():
        pid = int(word)
        done += [f"{what} {pid}" for what, action in AGAINST_PROCESSES.items() if succeeds(action, pid)]
    for path in os.environ["AIRFLOW_TEST_FILES"].split():
        done += [f"{what} {path}" for what, action in AGAINST_FILES.items() if succeeds(action, path)]
    done += [what for what, action in AGAINST_THE_HOST.items() if succeeds(action)]
    say(asker, {"done": done})


def succeeds(action: Any, *arguments: Any) -> bool:
    """In a child, so that one success does not change what comes after it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, ends could not be asked for
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            action(*arguments)
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it did not succeed
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def enter(pid: int, kinds: int) -> None:
    checked(LIBC.setns(os.pidfd_open(pid), kinds))


def read_memory(pid: int) -> None:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.read(0)


def mount(path: str) -> None:
    checked(LIBC.mount(b"none", path.encode(), b"tmpfs", 0, None))


def mount_cgroups() -> None:
    """The kernel gives it those of its own cgroup namespace."""
    checked(LIBC.mount(b"none", b"/tmp", b"cgroup", 0, b"pids"))


def lift_limit() -> None:
    mount_cgroups()
    with open("/tmp/pids.max", "w") as limit:
        limit.write("max")


def make_cgroup() -> None:
    mount_cgroups()
    os.mkdir("/tmp/mine")


def make_cgroup_of_the_host() -> None:
    """Below what covers them in /sys."""
    LIBC.umount2(b"/sys/fs/cgroup", 2)  # MNT_DETACH
    for directory, _, _ in os.walk("/sys/fs/cgroup"):
        try:
            os.mkdir(f"{directory}/ai-hostile")
        except OSError:
            continue
        return
    raise OSError


def write_into_sys() -> None:
    """Anywhere."""
    LIBC.mount(b"none", b"/sys", None, 0x20 | 0x1000, None)  # MS_REMOUNT | MS_BIND: writable
    for directory, _, names in os.walk("/sys"):
        for name in names:
            try:
                os.close(os.open(f"{directory}/{name}", os.O_WRONLY))
            except OSError:
                continue
            return
    raise OSError


def take_the_loopback_down() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, 0x8914, b"lo".ljust(16, b"\0") + b"\0" * 24)  # SIOCSIFFLAGS


AGAINST_PROCESSES = {
    "signal": lambda pid: os.kill(pid, signal.SIGKILL),
    "trace": lambda pid: checked(LIBC.ptrace(16, pid, 0, 0)),
    "read the environment of": lambda pid: open(f"/proc/{pid}/environ", "rb").read(),
    "open the memory of": read_memory,
    "list the root of": lambda pid: os.listdir(f"/proc/{pid}/root/"),
    "list the descriptors of": lambda pid: os.listdir(f"/proc/{pid}/fd"),
    "enter the user namespace of": lambda pid: enter(pid, 0x10000000),
    "enter the mounts of": lambda pid: enter(pid, 0x00020000),
    "enter the network of": lambda pid: enter(pid, 0x40000000),
    "enter the pids of": lambda pid: enter(pid, 0x20000000),
    "choose for the kernel's killing": lambda pid: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"),
    "limit": lambda pid: __import__("resource").prlimit(pid, 7, (1, 1)),
}
AGAINST_FILES = {
    "read": lambda path: open(path).read(),
    "list": os.listdir,
    "write": lambda path: open(path, "a").close(),
    "remove": os.unlink,
    "mount over": mount,
}
AGAINST_THE_HOST = {
    "write a kernel setting": lambda: open("/proc/sys/kernel/core_pattern", "a").write("x"),
    "use sysrq": lambda: open("/proc/sysrq-trigger", "w").write("h"),
    "make a device": lambda: os.mknod("/tmp/device", 0o060600, os.makedev(8, 0)),
    "enter the host's name space": lambda: enter(1, 0x04000000),
    "mount a device's file system": lambda: checked(LIBC.mount(b"/dev/sda1", b"/tmp", b"ext4", 0, None)),
    "lift its own limit": lift_limit,
    "make a cgroup": make_cgroup,
    "load a module": lambda: checked(LIBC.syscall(313, 0, b"", 0)),
    "make a cgroup of the host": make_cgroup_of_the_host,
    "write into /sys": write_into_sys,
    "take the loopback down": take_the_loopback_down,
    "listen to every packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close(),
    "become root of the host": lambda: checked(LIBC.setresuid(1_000_000, 1_000_000, 1_000_000)),
}

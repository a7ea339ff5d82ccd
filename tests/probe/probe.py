"""Runs inside a container and prints, as one JSON object, what it really is: declared is compared with this.

Standard library only, Python 3.10+, and nothing of the project: it is mounted alone into any image with python3.

    python3 probe.py [NEEDLE ...]

NEEDLEs are looked for in every readable /proc/*/environ, /proc/*/cmdline and in what this process was given; only
which was found and where is reported, never its surroundings. The probe's own argv is left out of that.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import resource
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000

SYSCALLS = {
    "x86_64": {"clone": 56, "add_key": 248, "keyctl": 250, "io_uring_setup": 425, "clone3": 435, "bpf": 321},
    "aarch64": {"clone": 220, "add_key": 217, "keyctl": 219, "io_uring_setup": 425, "clone3": 435, "bpf": 280},
}[platform.machine()]
SYSCALLS["userfaultfd"] = {"x86_64": 323, "aarch64": 282}[platform.machine()]
SYSCALLS["chroot"] = {"x86_64": 161, "aarch64": 51}[platform.machine()]

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
CAPABILITY_SETS = {"CapInh": "inheritable", "CapPrm": "permitted", "CapEff": "effective", "CapBnd": "bounding"}
CAPABILITY_SETS["CapAmb"] = "ambient"

USUALLY_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
USUALLY_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def error_name(number: int) -> str:
    """``ok`` for 0."""
    return errno.errorcode.get(number, str(number)) if number else "ok"


def attempt(action: Callable[[], object]) -> str:
    """``ok``, or the name of the error that the kernel gave."""
    try:
        action()
    except OSError as error:
        return error_name(error.errno or -1)
    return "ok"


def syscall(name: str, *arguments: object) -> str:
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(SYSCALLS[name]), *arguments)
    if result >= 0 and name == "io_uring_setup":
        os.close(result)
    return "ok" if result >= 0 else error_name(ctypes.get_errno())


def in_child(action: Callable[[], str]) -> str:
    """Run ``action`` in a child, so that what it does to its process (a new namespace, say) stays there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or f"died with {status}"


def process_status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(status: dict[str, str]) -> dict[str, list[int]]:
    """Numbers of the capabilities in each of the five sets."""
    return {
        name: [bit for bit in range(64) if int(status[field], 16) >> bit & 1] for field, name in CAPABILITY_SETS.items()
    }


def mounts() -> list[dict[str, object]]:
    """mountinfo (proc(5)); ``options`` are the mount's own, ``super_options`` the file system's."""
    found: list[dict[str, object]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, more = left.split(" "), right.split(" ")
        found.append(
            {
                "target": unescape(fields[4]),
                "root": unescape(fields[3]),
                "options": fields[5].split(","),
                "propagation": [field for field in fields[6:] if field],
                "type": more[0],
                "source": unescape(more[1]),
                "super_options": more[2].split(","),
            }
        )
    return found


def unescape(path: str) -> str:
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def writable(directory: str) -> str:
    def write() -> None:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")

    return attempt(write)


def executable(directory: str) -> str:
    """Whether a program that lies in ``directory`` runs."""
    path = Path(directory) / "probe-program"

    def run() -> None:
        path.write_text("#!/bin/sh\nexit 0\n")
        path.chmod(0o755)
        try:
            subprocess.run([str(path)], check=True)
        finally:
            path.unlink()

    return attempt(run)


def masked(path: str) -> str:
    """``absent``, ``masked`` (a null device, or an empty read-only directory), ``readable`` or the error."""
    try:
        found = Path(path).stat()
        if stat.S_ISCHR(found.st_mode):
            return "masked" if found.st_rdev == os.makedev(1, 3) else "readable"
        if stat.S_ISDIR(found.st_mode):
            return "readable" if any(Path(path).iterdir()) else "masked"
        with Path(path).open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        return error_name(error.errno or -1)
    return "readable"


def read_only(path: str) -> str:
    """``absent``, ``read-only`` or ``writable``, by the mount that holds it."""
    try:
        return "read-only" if os.statvfs(path).f_flag & os.ST_RDONLY else "writable"
    except FileNotFoundError:
        return "absent"


def open_socket(family: int, kind: int, protocol: int = 0) -> str:
    return attempt(lambda: socket.socket(family, kind, protocol).close())


def socket_with_high_bits(family: int) -> str:
    """The kernel reads 32 bits of the family: a filter that compares 64 could be passed by."""
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    result = LIBC.syscall(ctypes.c_long(number), ctypes.c_ulong(family + 2**32), ctypes.c_long(5), ctypes.c_long(0))
    if result >= 0:
        os.close(result)
        return "ok"
    return error_name(ctypes.get_errno())


def socketcall(family: int) -> str:
    """A socket by the 32-bit multiplexer: x86 lets 64-bit programs call it, and a filter can't see the family.

    ``absent`` on other machines; ``died with -11`` where the kernel has no 32-bit calls.
    """
    if platform.machine() != "x86_64":
        return "absent"
    map_32bit = 0x40
    low = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_32bit, prot=7)
    address = ctypes.addressof(ctypes.c_char.from_buffer(low))
    # push rbx; mov eax, 102 (socketcall); mov ebx, 1 (SYS_SOCKET); mov ecx, arguments; int 0x80; pop rbx; ret
    low[:20] = struct.pack("<BBIBIBI2sBB", 0x53, 0xB8, 102, 0xBB, 1, 0xB9, address + 64, b"\xcd\x80", 0x5B, 0xC3)
    low[64:76] = struct.pack("<3I", family, socket.SOCK_STREAM, 0)

    def call() -> str:
        result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        return "ok" if result >= 0 else error_name(-result)

    return in_child(call)


def x32_call() -> str:
    """getpid as the x32 architecture numbers it; ``absent`` on other machines."""
    if platform.machine() != "x86_64":
        return "absent"

    def call() -> str:
        ctypes.set_errno(0)
        return "ok" if LIBC.syscall(ctypes.c_long(0x40000000 + 39)) >= 0 else error_name(ctypes.get_errno())

    return in_child(call)


def unshare(flags: int) -> str:
    return in_child(lambda: error_name(0 if LIBC.unshare(flags) == 0 else ctypes.get_errno()))


def clone_new_user() -> str:
    """A clone that asks for a user namespace; the child, if there is one, ends at once."""
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(SYSCALLS["clone"]), ctypes.c_long(CLONE_NEWUSER | 17), None, None, None, None)
    if result == 0:
        os._exit(0)
    if result > 0:
        os.waitpid(result, 0)
        return "ok"
    return error_name(ctypes.get_errno())


def clone3() -> str:
    """With a size of 0, which a kernel that looks at it refuses with EINVAL; the filter refuses before."""
    return syscall("clone3", None, ctypes.c_size_t(0))


def mount_tmpfs() -> str:
    """A mount over /tmp, taken away again."""
    ctypes.set_errno(0)
    if LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) != 0:
        return error_name(ctypes.get_errno())
    LIBC.umount(b"/tmp")
    return "ok"


def make_device() -> str:
    path = "/tmp/probe-device"

    def make() -> None:
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(254, 0))
        Path(path).unlink()

    return attempt(make)


def processes() -> dict[str, str]:
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            found[directory.name] = (directory / "comm").read_text().strip()
        except OSError:
            continue
    return found


def devices() -> list[str]:
    # Not glob, which would walk through /dev/fd into what is open.
    paths = (Path(directory, name) for directory, _, names in os.walk("/dev") for name in names)
    return sorted(str(path) for path in paths if stat.S_IFMT(path.lstat().st_mode) in {stat.S_IFCHR, stat.S_IFBLK})


def descriptors() -> dict[str, str]:
    found = {}
    for name in list(Path("/proc/self/fd").iterdir()):
        try:
            found[name.name] = str(name.readlink())
        except FileNotFoundError:  # the one that read the directory
            continue
    return found


def find(needles: list[str]) -> list[dict[str, str]]:
    """Where a needle stands: environments and command lines of every process but this one's command line."""
    found = []
    for path in [*Path("/proc").glob("[0-9]*/environ"), *Path("/proc").glob("[0-9]*/cmdline")]:
        try:
            content = path.read_bytes()
        except OSError:
            continue
        # This process, and a shell that started it, have the needles in their own command lines.
        if path.name == "cmdline" and Path(__file__).name.encode() in content:
            continue
        found += [{"needle": needle, "where": str(path)} for needle in needles if needle.encode() in content]
    found += [{"needle": needle, "where": "os.environ"} for needle in needles if needle in repr(dict(os.environ))]
    return found


def file_text(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sizes(paths: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for path in paths:
        if os.path.ismount(path):
            about = os.statvfs(path)
            found[path] = about.f_blocks * about.f_frsize
    return found


def reality(needles: list[str]) -> dict[str, object]:
    opened = descriptors()
    status = process_status()
    home = os.environ.get("HOME", "/")
    return {
        "uid": list(os.getresuid()),
        "gid": list(os.getresgid()),
        "groups": sorted(os.getgroups()),
        "capabilities": capabilities(status),
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "seccomp_mode": int(status["Seccomp"]),
        "umask": current_umask(),
        "rlimits": {
            name: list(resource.getrlimit(getattr(resource, name)))
            for name in ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_NPROC")
        },
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
        "pid": os.getpid(),
        "namespaces": {name: Path(f"/proc/self/ns/{name}").stat().st_ino for name in NAMESPACES},
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "mounts": mounts(),
        "sizes": sizes(("/tmp", "/run", "/dev/shm")),
        "cwd": str(Path.cwd()),
        "environ": dict(os.environ),
        "argv": sys.argv,
        "hostname": socket.gethostname(),
        "writable": {path: writable(path) for path in ("/", "/tmp", "/run", "/dev/shm", "/dev", "/etc", home)},
        "executable": {path: executable(path) for path in ("/tmp", "/dev/shm")},
        "masked": {path: masked(path) for path in USUALLY_MASKED},
        "read_only": {path: read_only(path) for path in (*USUALLY_READ_ONLY, "/sys", "/sys/fs/cgroup")},
        "devices": devices(),
        "socket": {
            "unix": open_socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "inet": open_socket(socket.AF_INET, socket.SOCK_STREAM),
            "netlink": open_socket(16, socket.SOCK_RAW),
            "alg": open_socket(38, socket.SOCK_SEQPACKET),
            "alg with high bits": socket_with_high_bits(38),
            "vsock": open_socket(40, socket.SOCK_STREAM),
            "vsock with high bits": socket_with_high_bits(40),
            "vsock by socketcall": socketcall(40),
        },
        "syscalls": {
            "unshare user": unshare(CLONE_NEWUSER),
            "unshare mount": unshare(CLONE_NEWNS),
            "clone user": clone_new_user(),
            "clone3": clone3(),
            "keyctl": syscall("keyctl", ctypes.c_long(0), ctypes.c_long(-3), ctypes.c_long(0)),
            "add_key": syscall("add_key", b"user", b"probe", b"x", ctypes.c_size_t(1), ctypes.c_long(-2)),
            "io_uring_setup": syscall("io_uring_setup", ctypes.c_long(1), ctypes.create_string_buffer(120)),
            "bpf": syscall("bpf", ctypes.c_long(0), None, ctypes.c_long(0)),
            "userfaultfd": syscall("userfaultfd", ctypes.c_long(1)),
            "chroot": in_child(lambda: syscall("chroot", b"/")),
            "mount": mount_tmpfs(),
            "mknod block device": make_device(),
        },
        "x32": x32_call(),
        "processes": processes(),
        "network_interfaces": sorted(name for _, name in socket.if_nameindex()),
        "etc": {name: file_text(f"/etc/{name}") for name in ("hostname", "hosts", "resolv.conf")},
        "timezone": list(time.tzname),
        "found": find(needles),
        "descriptors": opened,
    }


if __name__ == "__main__":
    json.dump(reality(sys.argv[1:]), sys.stdout)
    sys.stdout.write("\n")

"""Runs in a container, as user code does, and tries what the container must refuse. What was seen is printed as JSON.

Standard library only, Python 3.10+, and nothing of the project: its text is what a task, or a DAG file, consists of. Each
attempt runs in a process of its own. It is harmless where it succeeds: a file is opened and not written, a namespace is
made and left with its process, a call has arguments that the kernel refuses after it has checked the privilege. What an attempt
saw is ``done``, the name of the error that the kernel gave, or a few words.

    attempts(told)   every attempt, by its name
    disturb(told)    changes all that this process can change, and says what could not be
    remains(told)    in what comes next from the same zygote or parse container: what of ``disturb`` is there
    ask(told)        sends requests to the supervisor, with descriptors and lines for its log between them; gives the answers
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import glob
import mmap
import os
import platform
import re
import resource
import signal
import socket
import stat
import struct
import sys
import termios
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
MIB = 1024 * 1024
SECONDS = 30
#: Descriptors in the company of each request; the kernel takes 253.
SENT_WITH_EACH = 250
INTEL = platform.machine() == "x86_64"

# linux/sched.h, sys/mount.h, linux/prctl.h, linux/ptrace.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_REMOUNT, MS_BIND = 0x20, 0x1000
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 24, 28, 38, 47
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206

#: Of x86-64 and of all that share asm-generic/unistd.h.
CALLS = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "capget": (125, 90),
    "capset": (126, 91),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "settimeofday": (170, 170),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}

TRIED: dict[str, Callable[[Any], Any]] = {}


def attempt(name: str) -> Callable[[Any], Any]:
    def keep(action: Any) -> Any:
        TRIED[name] = action
        return action

    return keep


def untold(action: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
    """An attempt that needs to be told nothing. A number that the kernel gave, other than an error, is success."""

    def act(_: Any) -> Any:
        result = action(*arguments)
        return None if isinstance(result, int) else result

    return act


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def call(name: str, *arguments: Any) -> int:
    number = CALLS[name][0 if INTEL else 1]
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *words))


def seen(action: Callable[[Any], Any], told: Any) -> str:
    """What an attempt sees, in a child that it may change as it likes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            os.write(writer, said_of(action, told).encode()[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.set_blocking(reader, False)  # what the attempt left behind may hold the other end
    try:
        words = os.read(reader, 4096).decode()
    except BlockingIOError:
        words = ""
    os.close(reader)
    return words or f"died with {status}"


def said_of(action: Callable[[Any], Any], told: Any) -> str:
    try:
        result = action(told)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was seen
        return repr(error)
    return "done" if result is None else str(result)


def attempts(told: dict[str, Any]) -> dict[str, str]:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # process 1 passes them on to this process's group
    told["descriptors"] = inherited()
    return {name: seen(action, told) for name, action in TRIED.items() if name not in told["without"]}


# Process 1, and a child of its own in its place, which shows that the attempt is one.


class Part(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def copy_memory(pid: int, write: bool) -> None:
    buffer = ctypes.create_string_buffer(1)
    part = Part(ctypes.addressof(buffer), 1)
    function = LIBC.process_vm_writev if write else LIBC.process_vm_readv
    checked(function(pid, ctypes.byref(part), 1, ctypes.byref(part), 1, 0))


def trace(pid: int, how: int) -> None:
    checked(LIBC.ptrace(how, pid, None, None))


def take_descriptor(pid: int) -> None:
    os.close(call("pidfd_getfd", os.pidfd_open(pid), 0, 0))


def open_descriptors(pid: int) -> None:
    for number in range(64):
        try:
            os.close(os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):  # none of that number; a socket
                raise


def write_score(pid: int) -> None:
    with open(f"/proc/{pid}/oom_score_adj", "w") as score:
        score.write("1000")


def enter_mounts(pid: int) -> None:
    checked(LIBC.setns(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY), CLONE_NEWNS))


def put_an_end_to(pid: int) -> str:
    """Every signal there is; what the process is in after them."""
    others = [number for number in range(1, 65) if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33)]
    for number in (*others, signal.SIGKILL, signal.SIGSTOP, *[signal.SIGCHLD] * 1000):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return "done"
    time.sleep(0.2)
    state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    return "runs" if state in "RSD" else "done"


AGAINST_A_PROCESS: dict[str, Callable[[int], Any]] = {
    "trace": lambda pid: trace(pid, PTRACE_ATTACH),
    "trace without stopping": lambda pid: trace(pid, PTRACE_SEIZE),
    "read the memory of": lambda pid: open(f"/proc/{pid}/mem", "rb").close(),
    "write the memory of": lambda pid: open(f"/proc/{pid}/mem", "wb").close(),
    "copy from the memory of": lambda pid: copy_memory(pid, write=False),
    "copy into the memory of": lambda pid: copy_memory(pid, write=True),
    "read the environment of": lambda pid: open(f"/proc/{pid}/environ", "rb").close(),
    "read the addresses of": lambda pid: open(f"/proc/{pid}/maps", "rb").close(),
    "read the auxiliary vector of": lambda pid: open(f"/proc/{pid}/auxv", "rb").close(),
    "list the descriptors of": lambda pid: os.listdir(f"/proc/{pid}/fd") and None,
    "open the descriptors of": open_descriptors,
    "see the state of descriptors of": lambda pid: os.listdir(f"/proc/{pid}/fdinfo") and None,
    "see what is mapped of": lambda pid: os.listdir(f"/proc/{pid}/map_files") and None,
    "see what is called by": lambda pid: open(f"/proc/{pid}/syscall").close(),
    "forget which pages were used by": lambda pid: open_to_write(f"/proc/{pid}/clear_refs"),
    "choose what is in a core of": lambda pid: open_to_write(f"/proc/{pid}/coredump_filter"),
    "look at the working directory of": lambda pid: os.readlink(f"/proc/{pid}/cwd") and None,
    "look at the root of": lambda pid: os.listdir(f"/proc/{pid}/root/") and None,
    "look at the program of": lambda pid: os.readlink(f"/proc/{pid}/exe") and None,
    "look at the namespaces of": lambda pid: os.readlink(f"/proc/{pid}/ns/mnt") and None,
    "choose for the kernel's killing": write_score,
    "stop or end": put_an_end_to,
}


def against_own_child(action: Callable[[int], Any]) -> Any:
    child = os.fork()
    if child == 0:
        time.sleep(SECONDS)
        os._exit(0)
    try:
        return action(child)
    finally:
        os.kill(child, signal.SIGKILL)


for _words, _action in AGAINST_A_PROCESS.items():
    TRIED[f"{_words} process 1"] = untold(_action, 1)
    TRIED[f"{_words} its own child"] = untold(against_own_child, _action)
# What the filter refuses of any process.
TRIED["take a descriptor of process 1"] = untold(take_descriptor, 1)
TRIED["take a descriptor of its own child"] = untold(against_own_child, take_descriptor)
TRIED["compare its own child with itself"] = lambda told: against_own_child(
    lambda pid: call("kcmp", os.getpid(), pid, 0, 0, 0) and None
)


# Processes of others.


def own_processes() -> set[int]:
    """Those of this container whose fathers lead to process 1 by way of this one or its father."""
    return {os.getpid(), os.getppid(), 1}


@attempt("see processes of others")
def see_others(_: Any) -> str:
    # The one between zygote and task has ended, and is there until the zygote's shim collects it.
    end = time.monotonic() + SECONDS / 2
    while True:
        found = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - own_processes()
        if not found or time.monotonic() > end:
            return f"sees {len(found)} of them"
        time.sleep(0.02)


@attempt("signal processes of others")
def signal_others(told: Any) -> str:
    reached = []
    for pid in {*range(2, 40_000), *told["pids"]} - own_processes():
        try:
            os.kill(pid, 0)
            reached.append(pid)
        except ProcessLookupError:
            continue
        except PermissionError:
            reached.append(-pid)
    os.kill(-1, signal.SIGURG)  # which nobody minds but a neighbour that counts it
    return f"reaches {len(reached)} of them"


@attempt("trace the zygote or the worker")
def trace_others(told: Any) -> str:
    return " ".join(sorted({said_of(lambda pid: trace(pid, PTRACE_SEIZE), pid) for pid in told["pids"]}))


@attempt("hold a process of the host")
def hold_others(told: Any) -> str:
    return " ".join(sorted({said_of(lambda pid: os.close(os.pidfd_open(pid)), pid) for pid in told["pids"]}))


@attempt("slow down all processes of its user")
def slow_down(_: Any) -> None:
    os.setpriority(os.PRIO_USER, os.getuid(), 3)


# System calls, privilege, the network.


@attempt("make a user namespace")
def unshare_user(_: Any) -> None:
    call("unshare", CLONE_NEWUSER)


@attempt("make a mount namespace")
def unshare_mounts(_: Any) -> None:
    call("unshare", CLONE_NEWNS)


@attempt("make a network namespace")
def unshare_network(_: Any) -> None:
    call("unshare", CLONE_NEWNET)


@attempt("fork into a user namespace")
def clone_user(_: Any) -> None:
    if call("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


@attempt("fork by clone3")
def clone3(_: Any) -> None:
    call("clone3", 0, 0)


@attempt("enter namespaces")
def set_namespace(_: Any) -> None:
    checked(LIBC.setns(os.open("/proc/self/ns/uts", os.O_RDONLY), 0))


def refused(number: int) -> None:
    raise OSError(number, os.strerror(number))


def raise_capability(number: int) -> None:
    """In the effective, the permitted and the inheritable set."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    word, bit = divmod(number, 32)
    data = (ctypes.c_uint32 * 6)()
    call("capget", header, data)
    for one in range(3):
        data[word * 3 + one] |= 1 << bit
    call("capset", header, data)


def make_ambient(number: int) -> None:
    raise_capability(number)
    checked(LIBC.prctl(PR_CAP_AMBIENT, 2, number, 0, 0))


def raise_limit(which: int) -> None:
    hard = resource.getrlimit(which)[1]
    try:
        resource.setrlimit(which, (hard, hard + 1))
    except ValueError:  # Python's word for EPERM
        refused(errno.EPERM)


def lower_score() -> None:
    with open("/proc/self/oom_score_adj", "r+") as score:
        now = int(score.read())
        score.seek(0)
        score.write(str(min(now, 100) - 1))


def with_socket(action: Callable[[socket.socket], Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        action(one)


def set_flags_of_loopback() -> None:
    """To what they are: it is the right that counts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        flags = fcntl.ioctl(one, 0x8913, b"lo".ljust(16, b"\0") + bytes(24))  # SIOCGIFFLAGS
        fcntl.ioctl(one, 0x8914, flags)  # SIOCSIFFLAGS


def add_interface() -> None:
    """Of a kind that there is none of."""
    kind = struct.pack("HH", 8, 1) + b"none"
    info = struct.pack("HH", 4 + len(kind), 18) + kind
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + info
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.settimeout(5)
        link.send(struct.pack("IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        (problem,) = struct.unpack_from("i", link.recv(4096), 16)
    if problem:
        refused(-problem)


def forge_credentials() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    # Of the zygote, or of an agent, the worker believes what the kernel says here.
    who = struct.pack("3i", 1, 0, 0)
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, who)])


#: ``struct perf_event_attr``: a counter of the kernel's own, of this process.
PERF = struct.pack("IIQQQQQII", 1, 112, 1, 0, 0, 0, 0x60, 0, 0) + bytes(48)

SYSTEM_CALLS: dict[str, Callable[[], Any]] = {
    "mount": lambda: checked(LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "remount its root writable": lambda: checked(LIBC.mount(b"none", b"/", None, MS_REMOUNT | MS_BIND, None)),
    "remount /proc/sys writable": lambda: checked(LIBC.mount(b"none", b"/proc/sys", None, MS_REMOUNT | MS_BIND, None)),
    "unmount": lambda: checked(LIBC.umount2(b"/no/such/place", 2)),
    "change a mount": lambda: call("mount_setattr", -100, b"/tmp", 0, (ctypes.c_uint64 * 4)(), 32),
    "copy a mount": lambda: os.close(call("open_tree", -100, b"/tmp", 1)),
    "move a mount": lambda: call("move_mount", -1, b"", -1, b"", 0),
    "open a file system": lambda: os.close(call("fsopen", b"tmpfs", 0)),
    "change its root by pivot_root": lambda: call("pivot_root", b"/no/such/place", b"/no/such/place"),
    "change its root": lambda: call("chroot", b"/tmp"),
    "add a key": lambda: call("add_key", b"user", b"ai-hostile", b"x", 1, -3),
    "use keyrings": lambda: call("keyctl", 0, -3, 1, 0, 0),
    "ask for a key": lambda: call("request_key", b"user", b"ai-hostile", 0, 0),
    "load a program into the kernel": lambda: os.close(call("bpf", 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 128)),
    "measure with perf": lambda: os.close(call("perf_event_open", PERF, 0, -1, -1, 0)),
    "use io_uring": lambda: os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120))),
    "handle page faults": lambda: os.close(call("userfaultfd", 1)),
    "watch all files": lambda: os.close(call("fanotify_init", 0, 0)),
    "open a file by its handle": lambda: call("open_by_handle_at", -100, ctypes.create_string_buffer(64), 0),
    "load a module": lambda: call("init_module", b"", 0, b""),
    "load a module from a file": lambda: call("finit_module", -1, b"", 0),
    "remove a module": lambda: call("delete_module", b"ai-no-such-module", 0),
    "load another kernel": lambda: call("kexec_load", 0, 0, 0, 0xFF),
    "restart the machine": lambda: call("reboot", 0, 0, 0, 0),
    "add swap": lambda: call("swapon", b"/no/such/place", 0),
    "account for processes": lambda: call("acct", b"/no/such/place"),
    "set the time of day": lambda: call("settimeofday", 0, (ctypes.c_int32 * 2)(2**30, 0)),
    "set a clock": lambda: call("clock_settime", 0, (ctypes.c_int64 * 2)(0, -1)),
    "adjust the clock": lambda: call("adjtimex", (ctypes.c_uint64 * 26)(0x4000, 0, 0, 0, 2**40)),
    "set its domain name": lambda: call("setdomainname", b"x", 1),
    "see quotas": lambda: call("quotactl", 0x80000700, b"/no/such/place", 0, 0),
    "read the kernel's log": lambda: call("syslog", 10, 0, 0) and None,
    "advise on another's memory": lambda: call("process_madvise", os.pidfd_open(os.getpid()), 0, 0, 21, 0),
    "move pages of memory": lambda: call("move_pages", os.getpid(), 0, 0, 0, 0, 0),
    "turn off what makes addresses random": lambda: checked(LIBC.personality(0x0040000)) and None,
    "reach ports of the machine": lambda: checked(LIBC.iopl(3)) if INTEL else refused(errno.EPERM),
    # Of privilege.
    "become root": lambda: os.setresuid(0, 0, 0),
    "become another user": lambda: os.setresuid(1, 1, 1),
    "become another group": lambda: os.setresgid(4, 4, 4),
    "take more groups": lambda: os.setgroups([0, 4]),
    "raise a capability": lambda: raise_capability(21),
    "make a capability ambient": lambda: make_ambient(21),
    "change what root may": lambda: checked(LIBC.prctl(PR_SET_SECUREBITS, 0x20, 0, 0, 0)),
    "change the bounding set": lambda: checked(LIBC.prctl(PR_CAPBSET_DROP, 40, 0, 0, 0)),
    "give up no_new_privs": lambda: checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0)),
    "change its memory's map": lambda: checked(LIBC.prctl(35, 6, 4096, 0, 0)),
    "be preferred": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "be preferred always": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "be preferred by the disks": lambda: call("ioprio_set", 1, 0, 1 << 13),
    "be spared when memory is short": lower_score,
    "dump core": lambda: raise_limit(resource.RLIMIT_CORE),
    "open more files": lambda: raise_limit(resource.RLIMIT_NOFILE),
    # Of the network.
    "use the kernel's ciphers": lambda: socket.socket(38, socket.SOCK_SEQPACKET, 0).close(),
    "talk to the hypervisor": lambda: socket.socket(40, socket.SOCK_STREAM, 0).close(),
    "listen to every packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close(),
    "send raw packets": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(),
    "go past the network's stack": lambda: socket.socket(44, socket.SOCK_RAW, 0).close(),
    "take the loopback down": set_flags_of_loopback,
    "add an interface": add_interface,
    "mark packets": lambda: with_socket(lambda one: one.setsockopt(socket.SOL_SOCKET, 36, 1)),
    "be transparent": lambda: with_socket(lambda one: one.setsockopt(socket.IPPROTO_IP, 19, 1)),
    "take memory for packets": lambda: with_socket(lambda one: one.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)),
    "pass for process 1 on a socket": forge_credentials,
}
for _words, _call in SYSTEM_CALLS.items():
    TRIED[_words] = untold(_call)


# The same in the other two ways that x86 has to call the kernel.

CODE_OF_32_BITS = bytes.fromhex("53 89f8 89f3 4189c8 89d1 4489c2 cd80 5b c3")


def call_32(number: int, first: int = 0, second: int = 0, third: int = 0) -> int:
    """By int 0x80, which takes pointers below 4 GiB."""
    if not INTEL:
        refused(errno.ENOSYS)
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(CODE_OF_32_BITS)
    function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint32] * 4)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    result = function(number, first, second, third)
    if result < 0:
        refused(-result)
    return int(result)


def low_words(*words: int) -> int:
    """The address, below 4 GiB, of these numbers. It stays for the process's life."""
    LIBC.mmap.restype = ctypes.c_void_p
    map_32bit = 0x40
    address = LIBC.mmap(None, ctypes.c_size_t(4096), 3, map_32bit | 0x22, -1, ctypes.c_long(0))
    ctypes.memmove(address, struct.pack(f"{len(words)}I", *words), 4 * len(words))
    return int(address)


IN_32_BITS: dict[str, Callable[[], Any]] = {
    "make a user namespace": lambda: call_32(310, CLONE_NEWUSER),
    "make a mount namespace": lambda: call_32(310, CLONE_NEWNS),
    "use keyrings": lambda: call_32(288, 0, 2**32 - 3, 1),
    "use the kernel's ciphers": lambda: call_32(359, 38, 5, 0),
    "use the kernel's ciphers by socketcall": lambda: call_32(102, 1, low_words(38, 5, 0)),
    "talk to the hypervisor by socketcall": lambda: call_32(102, 1, low_words(40, 1, 0)),
    "use io_uring": lambda: call_32(425, 1, low_words(*[0] * 30)),
    "handle page faults": lambda: call_32(374, 1),
    "fork by clone3": lambda: call_32(435, 0, 0),
    "change its root": lambda: call_32(61, low_words(0x706D742F, 0)),
}
for _words, _call in IN_32_BITS.items():
    TRIED[f"{_words}, in 32 bits"] = untold(_call)


@attempt("make a call of x32")
def call_x32(_: Any) -> None:
    if not INTEL:
        os.kill(os.getpid(), signal.SIGSYS)
    checked(LIBC.syscall(ctypes.c_long(0x40000000 | 39)))


# Programs that give privilege, terminals, devices.


@attempt("gain privilege by a set-id program")
def set_id_program(told: Any) -> str:
    found = os.stat(told["set_id_program"])
    assert (found.st_mode & stat.S_ISUID, found.st_uid) == (stat.S_ISUID, 0), found
    child = os.fork()
    if child == 0:
        os.execv(told["set_id_program"], ["x"])  # it ends with its effective uid
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "stays who it is" if code == os.getuid() & 0xFF != 0 else f"has the uid {code}"


@attempt("hold a capability")
def hold_capability(_: Any) -> str:
    held = [line.split() for line in open("/proc/self/status") if line.startswith("Cap")]
    return " ".join(f"{name}{value}" for name, value in held if int(value, 16)) or "none in any set"


@attempt("lack no_new_privs or a filter")
def lack_confinement(_: Any) -> str:
    status = dict(line.rstrip("\n").split(":\t") for line in open("/proc/self/status") if ":\t" in line)
    return f"no_new_privs {status['NoNewPrivs']}, seccomp {status['Seccomp']}"


@attempt("type for a terminal")
def type_for_terminal(_: Any) -> str:
    answers = set()
    for number in range(3):
        answers.add(said_of(lambda one: fcntl.ioctl(one, termios.TIOCSTI, b"x") and None, number))
    answers.add(said_of(lambda _: os.close(os.open("/dev/tty", os.O_RDWR)), None))
    return " ".join(sorted(answers))


@attempt("see terminals of others")
def see_terminals(_: Any) -> str:
    return " ".join(sorted(set(os.listdir("/dev/pts")) - {"ptmx"})) or "none"


@attempt("make a device")
def make_device(_: Any) -> None:
    os.mknod("/tmp/device", stat.S_IFCHR | 0o666, os.makedev(1, 3))


@attempt("see devices of the host")
def see_devices(_: Any) -> str:
    usual = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}
    names = {
        name
        for name in os.listdir("/dev")
        if stat.S_IFMT(os.stat(f"/dev/{name}").st_mode) & 0o060000 in (0o060000, 0o020000)
        and not os.path.isdir(f"/dev/{name}")
        and not os.path.islink(f"/dev/{name}")
    }
    return " ".join(sorted(names - usual)) or "none"


# Files.


def open_to_write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


@attempt("write into its image")
def write_image(_: Any) -> None:
    with open("/etc/ai-hostile", "w"):
        pass


@attempt("change a file of its image")
def change_image(_: Any) -> None:
    open_to_write("/etc/passwd")


def make_file(directory: str) -> None:
    os.close(os.open(f"{directory}/ai-hostile", os.O_CREAT | os.O_WRONLY))


IN_THE_BUNDLE: dict[str, Callable[[str], Any]] = {
    "make a file": make_file,
    "change a DAG file": lambda at: open_to_write(f"{at}/sales.py"),
    "remove a DAG file": lambda at: os.unlink(f"{at}/sales.py"),
    "put a link in a DAG file's place": lambda at: put_link(f"{at}/sales.py"),
    "give a DAG file other rights": lambda at: os.chmod(f"{at}/sales.py", 0o600),
    "give a DAG file another time": lambda at: os.utime(f"{at}/sales.py", (0, 0)),
    "write compiled code": lambda at: open(f"{at}/__pycache__/sales.pyc", "wb").close(),
}


def put_link(path: str) -> None:
    os.symlink("/etc/shadow", f"{path}.new")
    os.rename(f"{path}.new", path)


def in_the_bundle(action: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda told: action(told["bundle"])


def in_a_copy(action: Callable[[str], Any]) -> Any:
    at = f"/tmp/bundle-{os.getpid()}"
    os.makedirs(f"{at}/__pycache__")
    for name in ("sales.py", "__pycache__/sales.pyc"):
        open(f"{at}/{name}", "w").close()
    return action(at)


for _words, _in_bundle in IN_THE_BUNDLE.items():
    TRIED[f"{_words} in the bundle"] = in_the_bundle(_in_bundle)
    TRIED[f"{_words} in a copy"] = untold(in_a_copy, _in_bundle)


@attempt("follow a link of the bundle out of its container")
def follow_link(told: Any) -> None:
    with open(f"{told['bundle']}/link-to-secret") as file:
        file.read()


@attempt("see more of the agent than its files")
def see_agent(_: Any) -> str:
    kinds = [
        name for name in os.listdir("/run/airflow-isolation") if not os.path.isfile(f"/run/airflow-isolation/{name}")
    ]
    return " ".join(sorted(kinds)) or "none"


@attempt("take the worker's lock")
def take_lock(_: Any) -> None:
    """The one by which other workers know that this container has an owner who lives."""
    fcntl.flock(os.open("/run/airflow-isolation", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


@attempt("change the agent's files")
def change_agent(_: Any) -> None:
    make_file("/run/airflow-isolation")


@attempt("write where nobody gave it a place")
def writable_places(_: Any) -> str:
    places = {line.split()[4] for line in open("/proc/self/mountinfo")}
    given = ("/tmp", "/run", "/dev/shm", "/dev/mqueue", "/dev/pts")
    found = {place for place in places if os.path.isdir(place) and os.access(place, os.W_OK)}
    files = {place for place in places if os.path.isfile(place) and os.access(place, os.W_OK)}
    return " ".join(sorted({*(found - set(given)), *files})) or "nowhere"


@attempt("find a set-id program of its own making")
def own_set_id(_: Any) -> str:
    options = {line.split()[4]: line.split()[5] for line in open("/proc/self/mountinfo")}
    return " ".join(sorted(place for place in ("/tmp", "/dev/shm") if "nosuid" not in options[place])) or "none"


KERNEL_FILES = {
    "set where cores go": "/proc/sys/kernel/core_pattern",
    "set what loads modules": "/proc/sys/kernel/modprobe",
    "set who may trace": "/proc/sys/kernel/yama/ptrace_scope",
    "drop the host's caches": "/proc/sys/vm/drop_caches",
    "use sysrq": "/proc/sysrq-trigger",
    "set interrupts": "/proc/irq/default_smp_affinity",
    "set who hears of events": "/sys/kernel/uevent_helper",
    "suspend the machine": "/sys/power/state",
}
for _words, _path in KERNEL_FILES.items():
    TRIED[_words] = untold(open_to_write, _path)


@attempt("write into the kernel's files")
def write_kernel_files(_: Any) -> str:
    found = []
    for top in ("/proc/sys", "/sys/kernel", "/sys/fs", "/sys/power", "/sys/module"):
        for directory, names, files in os.walk(top):
            names[:] = [name for name in names if not os.path.islink(f"{directory}/{name}")]
            found += [f"{directory}/{name}" for name in files if os.access(f"{directory}/{name}", os.W_OK)]
            found += [directory] * os.access(directory, os.W_OK)
    # Of this process alone, whoever it is: it names its time namespace's clocks, its own core's filter and the like.
    return " ".join(sorted(found)) or "nowhere"


def make_cgroup(above: str) -> None:
    os.mkdir(f"{above}/ai-hostile")
    os.rmdir(f"{above}/ai-hostile")


@attempt("write into cgroups")
def write_cgroups(_: Any) -> str:
    found = []
    for directory, _names, files in os.walk("/sys/fs/cgroup"):
        found += [directory] * (said_of(make_cgroup, directory) == "done")
        found += [f"{directory}/{name}" for name in files if said_of(open_to_write, f"{directory}/{name}") == "done"]
    return " ".join(sorted(found)) or "nowhere"


@attempt("read what is hidden of the kernel")
def read_masked(_: Any) -> str:
    found = []
    for path in (
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/sched_debug",
        "/proc/acpi",
        "/proc/scsi",
        "/sys/firmware",
        "/proc/latency_stats",
        "/sys/devices/virtual/powercap",
        "/proc/interrupts",
    ):
        try:
            held = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(64)
        except OSError:
            continue
        found += [path] * bool(held)
    return " ".join(found) or "nothing"


@attempt("trace the kernel")
def read_tracing(_: Any) -> str:
    found = [
        path
        for path in ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/fs/bpf", "/sys/kernel/security")
        if said_of(lambda at: os.listdir(at)[0] and None, path) == "done"
    ]
    return " ".join(found) or "nothing"


# Bounds.


def fill(directory: str, most: int) -> str:
    written = 0
    try:
        with open(f"{directory}/ai-fill", "wb", buffering=0) as file:
            while written < most:
                written += file.write(bytes(MIB // 4))
    except OSError as error:
        return f"{errno.errorcode[error.errno or 0]} within {-(-written // MIB)} MiB"
    finally:
        with suppress(OSError):
            os.unlink(f"{directory}/ai-fill")
    return "done"


@attempt("fill /tmp")
def fill_tmp(told: Any) -> str:
    return fill("/tmp", told["fill"])


@attempt("fill /dev/shm")
def fill_shm(told: Any) -> str:
    return fill("/dev/shm", told["fill"])


@attempt("fork without end")
def fork_bomb(told: Any) -> str:
    children: list[int] = []
    try:
        while len(children) < told["most_forks"]:
            child = os.fork()
            if child == 0:
                time.sleep(SECONDS)
                os._exit(0)
            children.append(child)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return "done"


# What it was given.


def inherited() -> str:
    """What is open besides the four."""
    more = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        more += [f"{name}:{target.partition(':')[0]}"] * (int(name) > 3)
    return " ".join(more) or "none"


@attempt("find descriptors that nobody gave it")
def find_descriptors(told: Any) -> str:
    return str(told["descriptors"])


@attempt("find the worker's secrets in its environment")
def find_in_environment(told: Any) -> str:
    text = "\0".join(f"{name}={value}" for name, value in os.environ.items()).encode()
    for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
        try:
            text += open(path, "rb").read()
        except OSError:
            continue
    return "none" if re.search(told["secret"].encode(), text) is None else "done"


@attempt("find the worker's secrets in its memory")
def find_in_memory(told: Any) -> str:
    pattern = re.compile(told["secret"].encode())
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in open("/proc/self/maps"):
            addresses, access, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            if access.startswith("rw"):
                try:
                    memory.seek(first)
                    if pattern.search(memory.read(last - first)):
                        return "done"
                except (OSError, ValueError, OverflowError):  # what is not to be read
                    continue
    return "none"


@attempt("find options of Airflow's that are secret")
def find_options(_: Any) -> str:
    secret = (
        "AIRFLOW__DATABASE",
        "AIRFLOW__CELERY",
        "AIRFLOW__SECRETS",
        "FERNET_KEY",
        "JWT",
        "TOKEN",
        "AIRFLOW_CONN_",
        "AIRFLOW_VAR_",
    )
    return " ".join(name for name in os.environ if any(word in name for word in secret)) or "none"


# Sockets.


@attempt("connect to sockets of ours")
def connect_to_ours(told: Any) -> str:
    names = list(told["sockets"])
    try:
        listed = [line.split() for line in open("/proc/net/unix")][1:]
    except OSError:
        listed = []
    ours = re.compile(r"airflow|containerd|docker|/ait?-|zygote|agent\.sock|spares")
    names += sorted(
        {fields[7] for fields in listed if len(fields) == 8 and ours.search(fields[7])} - set(told["control_sockets"])
    )
    kinds = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM)
    return " ".join(name for name in names if any(connects(name, kind) for kind in kinds)) or "none"


def connects(name: str, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as one:
        try:
            one.connect("\0" + name[1:] if name.startswith("@") else name)
        except OSError:
            return False
    return True


@attempt("connect to an abstract socket of the host")
def connect_to_abstract(told: Any) -> None:
    (name,) = told["control_sockets"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.connect("\0" + name[1:])


@attempt("connect to the host's loopback")
def connect_to_loopback(told: Any) -> None:
    socket.create_connection(("127.0.0.1", told["port"]), timeout=5).close()


@attempt("take a port of the system's")
def bind_low_port(_: Any) -> None:
    with socket.create_server(("127.0.0.1", 1)):
        pass


# What comes next from the same zygote, or in the same parse container.


def disturb(told: dict[str, Any]) -> str:
    """Everything that a program can change of its process, its files and its kernel objects."""
    import builtins

    import airflow  # type: ignore[import-untyped,unused-ignore]

    airflow.disturbed = True  # type: ignore[attr-defined,unused-ignore]
    builtins.disturbed = True  # type: ignore[attr-defined]
    sys.path.insert(0, "/tmp/disturbed")
    sys.modules["disturbed"] = sys.modules["os"]
    os.environ["DISTURBED"] = os.environ["PYTHONSTARTUP"] = "/tmp/disturbed.py"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0)
    os.chdir("/tmp")
    LIBC.prctl(15, b"disturbed", 0, 0, 0)  # PR_SET_NAME
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for directory in ("/tmp", "/dev/shm", "/run", "/dev/mqueue"):
        said_of(lambda at: open(f"{at}/disturbed.pth", "w").close(), directory)
    LIBC.shmget(0x0D157, 4096, 0o1666)
    LIBC.semget(0x0D157, 1, 0o1666)
    LIBC.msgget(0x0D157, 0o1666)
    daemonise(told["mark"])
    return "done"


def daemonise(mark: str) -> None:
    """A process of nobody's that minds no signal and has no descriptor of the task's."""
    if os.fork():
        return
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        os.closerange(0, 64)
        os.execv(sys.executable, ["python3", "-c", "import time; time.sleep(600)", mark])
    os._exit(0)


def remains(told: dict[str, Any]) -> dict[str, Any]:
    import builtins

    import airflow

    def lines(kind: str) -> int:
        return len(open(f"/proc/sysvipc/{kind}").readlines()) - 1

    mask = os.umask(0o22)
    os.umask(mask)
    return {
        "modules": [
            name for name in ("disturbed",) if name in sys.modules or hasattr(builtins, name) or hasattr(airflow, name)
        ],
        "path": [place for place in sys.path if "disturbed" in place],
        "environment": [name for name in ("DISTURBED", "PYTHONSTARTUP") if name in os.environ],
        "signals": [
            int(number) for number in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(number) != signal.SIG_DFL
        ],
        "umask": mask,
        "name": open("/proc/self/comm").read().strip() == "disturbed",
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64,
        "files": [
            path
            for top in ("/tmp", "/dev/shm", "/run", "/dev/mqueue")
            for path in glob.glob(f"{top}/**/*disturbed*", recursive=True)
        ],
        "ipc": [lines(kind) for kind in ("shm", "sem", "msg")],
        "processes": sorted({int(name) for name in os.listdir("/proc") if name.isdecimal()} - {os.getpid(), 1}),
    }


# What the worker is asked for, and what it is told.


def ask(told: dict[str, Any]) -> dict[str, str]:
    """By the names of ``told["frames"]``, all in hexadecimal digits, the supervisor's answers."""
    with socket.socket(fileno=os.dup(0)) as requests, socket.socket(fileno=os.dup(3)) as logs:
        requests.settimeout(SECONDS)
        for line in told["lines"]:
            logs.sendall(bytes.fromhex(line) + b"\n")
        answers = {}
        for name, frame in told["frames"].items():
            # More than the supervisor may have open, if it took them.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * SENT_WITH_EACH))]
            sent = requests.sendmsg([bytes.fromhex(frame)], rights)
            requests.sendall(bytes.fromhex(frame)[sent:])
            length = int.from_bytes(requests.recv(4, socket.MSG_WAITALL), "big")
            answers[name] = requests.recv(length, socket.MSG_WAITALL).hex()
        return answers


def break_requests(told: dict[str, Any]) -> None:
    """Send what is no request, and wait for the end."""
    with socket.socket(fileno=os.dup(0)) as requests:
        beginning, repeated, times = told["bytes"]
        sent = bytes.fromhex(beginning) + bytes.fromhex(repeated) * times
        requests.sendall(sent)
        time.sleep(600)

"""What a forked process does to become the workload of a container that it was not started in.

Standard library only. The zygote imports this before it forks, and everything is looked up then: in the container's
file system there may be other modules, or none. Two processes use it, one after the other:

    A   enter_namespaces(…), bare_fork    only a child is inside the container's pid namespace
    D   become(process, …)                which may then wait for its work
        take_up(…)                        and then it is nothing but the workload

PROCESS is what the host's kernel says of the container's process 1 (``bridge/process_one.py``), and the filter that its
runtime gave it (``oci/seccomp_filter.py``):

    {"uid": 50000, "gid": 0, "groups": [0],
     "capabilities": {"bounding": 0, "effective": 0, "permitted": 0, "inheritable": 0, "ambient": 0},
     "no_new_privileges": true, "rlimits": {"RLIMIT_NOFILE": [1024, 524288], …}, "umask": 18, "oom_score_adj": 100,
     "apparmor": "", "working_directory": "/opt/airflow", "seccomp": "<base64 of struct sock_filter[]>",
     "seccomp_flags": 0}

The order of the steps, and why:
- Descriptors are closed first: a working directory could lead through /proc/self/fd to the zygote's (CVE-2024-21626).
- What asks for privilege comes before it is dropped: limits, the kernel's choice when memory is short, the bounding
  set, groups and ids.
- Profiles come after that. AppArmor's comes before no_new_privs, which would forbid the change. seccomp's comes after
  no_new_privs; without it the kernel asks for CAP_SYS_ADMIN instead, which is then dropped behind the filter.
- What reads files of the container, and what libraries want done after a fork (os.register_at_fork), comes after all
  privilege is gone: an author may have written those files, and a library may read them, or start a thread that keeps
  what it was born with.

Sources: credentials(7), capabilities(7), prctl(2), seccomp(2), setns(2), session-keyring(7), Documentation/
admin-guide/LSM/apparmor; runc's init does the same in nearly this order, but has an exec at the end that does the rest.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import faulthandler
import fcntl
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
import uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any, TypeVar

    Result = TypeVar("Result")

LIBC = ctypes.CDLL(None, use_errno=True)
#: Calls through it keep Python's lock: nothing of Python runs before and after.
BARE_LIBC = ctypes.PyDLL(None, use_errno=True)

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_TIMERSLACK = 29
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

#: Nanoseconds; what every process has that does not ask for another.
TIMER_SLACK = 50_000

# linux/keyctl.h
KEYCTL_JOIN_SESSION_KEYRING = 1

# linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522
DROPPABLE = {"DAC_READ_SEARCH": 2}
CAP_SETPCAP = 8
CAP_SYS_ADMIN = 21

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1
BYTES_OF_AN_INSTRUCTION = 8

# asm/unistd.h
SYSTEM_CALLS = {
    "x86_64": {"capset": 126, "keyctl": 250, "seccomp": 317, "close_range": 436},
    "aarch64": {"capset": 91, "keyctl": 219, "seccomp": 277, "close_range": 436},
}.get(platform.machine(), {})
LAST_DESCRIPTOR = 2**32 - 1

# asm-generic/resource.h; the resource module has them all but RLIMIT_LOCKS.
RLIMITS = {
    "RLIMIT_CPU": 0,
    "RLIMIT_FSIZE": 1,
    "RLIMIT_DATA": 2,
    "RLIMIT_STACK": 3,
    "RLIMIT_CORE": 4,
    "RLIMIT_RSS": 5,
    "RLIMIT_NPROC": 6,
    "RLIMIT_NOFILE": 7,
    "RLIMIT_MEMLOCK": 8,
    "RLIMIT_AS": 9,
    "RLIMIT_LOCKS": 10,
    "RLIMIT_SIGPENDING": 11,
    "RLIMIT_MSGQUEUE": 12,
    "RLIMIT_NICE": 13,
    "RLIMIT_RTPRIO": 14,
    "RLIMIT_RTTIME": 15,
}


class CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class CapabilityData(ctypes.Structure):
    """32 capabilities of each set; version 3 takes two of these."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class FilterProgram(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class EntryFailed(Exception):
    """A step failed; the workload must not run."""


def bare_fork() -> int:
    """fork(2) without what Python and libraries do at a fork, which takes 5 ms with Airflow imported.

    For a process of one thread. A child that stays makes up for it with ``complete_fork``; one that ends need not.

    :raises OSError: as fork(2).
    """
    pid: int = BARE_LIBC.fork()
    return checked(pid, "fork")


def complete_fork() -> None:
    """What ``os.fork`` does beside fork(2), in the child: new locks, no memory of other threads, the hooks of libraries.

    Those of ``before`` and ``after_in_child``; nobody waits for ``after_in_parent``. To be called once, after ``bare_fork``.
    Source: PyOS_BeforeFork and PyOS_AfterFork_Child in Python's C API, which are for programs that fork by themselves.
    """
    for function in (ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Child):
        function.restype = None
        function()


def enter_namespaces(namespaces: Iterable[int]) -> None:
    """Enter the namespaces behind these descriptors, in this order; nsfs files, as in /proc/PID/ns.

    A pid namespace is for children; it must be this process's own or one below it. With a mount namespace come its root
    and working directory, so it is best the last. The process must have one thread.

    :raises OSError: one may not be entered (EPERM), or a pid namespace lies elsewhere (EINVAL).
    """
    for descriptor in namespaces:
        set_namespace(descriptor)


def become(process: Mapping[str, Any], environment: Mapping[str, str], *, keep: int) -> None:
    """Turn this process, of ``bare_fork``, into PROCESS. To be called once. All descriptors but ``keep`` are closed.

    :raises EntryFailed: a step failed. This process is neither the one nor the other then, and must end.
    """
    try:
        take_on(process, environment, keep)
    except EntryFailed:
        raise
    except Exception as error:
        # A key that is missing, a value of another type.
        raise EntryFailed(f"the description of the process can't be read: {error!r}") from error


def take_user(uid: int, gid: int, groups: Sequence[int], *, drop: Collection[str] = ()) -> None:
    """Become a user, and keep all capabilities but ``drop`` through the next execve(2): made ambient. To be called once.

    :raises EntryFailed: a step failed. This process may be neither the one nor the other then, and must end.
    """
    held = step("reading the own capabilities", own_capabilities)
    for name in drop:
        held &= ~(1 << DROPPABLE[name])
        step(f"dropping {name}", prctl, PR_CAPBSET_DROP, DROPPABLE[name])
    step("keeping capabilities", prctl, PR_SET_KEEPCAPS, 1)
    step("setting groups", os.setgroups, groups)
    step("setting the gid", os.setresgid, gid, gid, gid)
    step("setting the uid", os.setresuid, uid, uid, uid)
    sets = {"effective": held, "permitted": held, "inheritable": held, "ambient": held}
    step("making capabilities ambient", set_capabilities, sets)


def own_capabilities() -> int:
    """The permitted ones, a bit for each capability's number."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))


def take_up(environment: Mapping[str, str], channels: Sequence[int]) -> None:
    """Take up the work, after ``become``. To be called once.

    ``environment`` joins the container's own. ``channels`` become the descriptors from 0 on, for what it executes too,
    but for the last, the logs, which is for this program alone.

    :raises EntryFailed: a step failed.
    """
    step("placing descriptors", place, channels)
    step("setting the environment", set_environment, {**os.environ, **environment})


def take_on(process: Mapping[str, Any], environment: Mapping[str, str], keep: int) -> None:
    capabilities: Mapping[str, int] = process["capabilities"]
    program = base64.b64decode(process["seccomp"], validate=True)

    step("closing descriptors", close_all_but, (keep,))
    # Or the files of /proc/self, which are written to below, belong to root. The zygote, whose copy this is, is not.
    step("becoming dumpable", prctl, PR_SET_DUMPABLE, 1)
    step("resetting signals", reset_signals)
    step("starting a session", os.setsid)
    step("joining a session keyring", join_session_keyring, process.get("keyring", ""))
    step("setting oom_score_adj", write_to_self, "oom_score_adj", str(process["oom_score_adj"]))
    step("resetting what prctl(2) sets", reset_attributes)
    for name, (soft, hard) in process["rlimits"].items():
        step(f"setting {name} to {soft}, {hard}", resource.setrlimit, RLIMITS[name], (soft, hard))
    step("dropping the bounding set", drop_bounding_set, capabilities["bounding"])

    directory = process["working_directory"]
    entered = step(f"entering the working directory {directory}", try_directory, directory)
    step("keeping capabilities", prctl, PR_SET_KEEPCAPS, 1)
    step("setting groups", os.setgroups, process["groups"])
    step("setting the gid", os.setresgid, *(process["gid"],) * 3)
    step("setting the uid", os.setresuid, *(process["uid"],) * 3)
    step("forgetting capabilities", prctl, PR_SET_KEEPCAPS, 0)
    if not entered:
        # Root of another user namespace, or of an NFS client, may not enter what the user may.
        step(f"entering the working directory {directory}", os.chdir, directory)
    os.umask(process["umask"])

    # A change of ids took it away.
    step("becoming dumpable again", prctl, PR_SET_DUMPABLE, 1)
    if process["apparmor"]:
        step(f"changing to the AppArmor profile {process['apparmor']}", change_profile, process["apparmor"])

    if process["no_new_privileges"]:
        step("setting no_new_privs", prctl, PR_SET_NO_NEW_PRIVS, 1)
        step("setting capabilities", set_capabilities, capabilities)
        step("loading the seccomp filter", load_filter, program, process["seccomp_flags"])
    else:
        if prctl(PR_GET_NO_NEW_PRIVS):
            raise EntryFailed("the zygote has no_new_privs, which can't be taken away")
        loading = 1 << CAP_SETPCAP | 1 << CAP_SYS_ADMIN
        needed = loading | capabilities["permitted"] | capabilities["inheritable"]
        more = {"effective": loading, "permitted": needed, "inheritable": 0, "ambient": 0}
        step("keeping the capabilities that loading a filter asks for", set_capabilities, more)
        step("loading the seccomp filter", load_filter, program, process["seccomp_flags"])
        step("setting capabilities", set_capabilities, capabilities)

    # The C library reads the time zone's file, which may lie in a volume of the author's.
    step("setting the environment", set_environment, environment)
    step("completing the fork", complete_fork)
    step("seeding", reseed)


def step(words: str, action: Callable[..., Result], *arguments: object) -> Result:
    try:
        return action(*arguments)
    except EntryFailed as error:
        raise EntryFailed(f"{words}: {error}") from error
    except Exception as error:
        raise EntryFailed(f"{words}: {error!r}") from error


def checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def system_call(name: str, *arguments: object) -> int:
    if name not in SYSTEM_CALLS:
        raise OSError(errno.ENOSYS, f"{name}: its number on {platform.machine()} is not known")
    return checked(LIBC.syscall(ctypes.c_long(SYSTEM_CALLS[name]), *arguments), name)


def prctl(option: int, *arguments: int) -> int:
    # The kernel refuses some options unless all that is unused is 0.
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return checked(LIBC.prctl(ctypes.c_int(option), *words), f"prctl({option})")


def set_namespace(descriptor: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(descriptor)
    else:
        checked(LIBC.setns(ctypes.c_int(descriptor), ctypes.c_int(0)), "setns")


def place(channels: Sequence[int]) -> None:
    # Out of each other's way first: any of them may have one of the numbers that are to be taken.
    spares = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, len(channels)) for descriptor in channels]
    for descriptor in channels:
        os.close(descriptor)
    for target, descriptor in enumerate(spares):
        os.dup2(descriptor, target, inheritable=target != len(channels) - 1)
        os.close(descriptor)


def close_all_but(keep: Collection[int]) -> None:
    first = 0
    try:
        for descriptor in (*sorted(set(keep)), LAST_DESCRIPTOR + 1):
            if descriptor > first:
                system_call("close_range", ctypes.c_uint(first), ctypes.c_uint(descriptor - 1), ctypes.c_uint(0))
            first = descriptor + 1
    except OSError as error:
        if error.errno != errno.ENOSYS:  # Linux 5.9
            raise
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    pass  # the listing's own


def reset_signals() -> None:
    """As an interpreter finds them that was just executed, and then sets them."""
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def join_session_keyring(name: str) -> None:
    """The keyring of that name, made when there is none; without a name a new one that nobody else can join."""
    try:
        system_call(
            "keyctl", ctypes.c_long(KEYCTL_JOIN_SESSION_KEYRING), ctypes.c_char_p(name.encode() if name else None)
        )
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keyrings
            raise


def write_to_self(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "wb", buffering=0) as file:
        file.write(text.encode())


def reset_attributes() -> None:
    """Undo what a fork hands down and an exec would not, or not of the zygote."""
    prctl(PR_SET_PDEATHSIG, 0)
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK)
    prctl(PR_SET_SECUREBITS, 0)
    # The kernel's name for a process is its executable's; it cuts it to 15 bytes.
    name = os.fsencode(os.path.basename(sys.executable) or "python")
    checked(LIBC.prctl(PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0), "prctl(PR_SET_NAME)")


def drop_bounding_set(kept: int) -> None:
    for number in range(64):
        try:
            held = prctl(PR_CAPBSET_READ, number)
        except OSError as error:
            # The kernel has no capability of this number, nor of any above it.
            if error.errno != errno.EINVAL or kept >> number:
                raise
            return
        if kept >> number & 1 and not held:
            raise EntryFailed(f"the zygote does not have capability {number} itself")
        if held and not kept >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def try_directory(path: str) -> bool:
    try:
        os.chdir(path)
    except PermissionError:
        return False
    return True


def set_capabilities(sets: Mapping[str, int]) -> None:
    halves = (CapabilityData * 2)()
    for number, half in enumerate(halves):
        for name in ("effective", "permitted", "inheritable"):
            setattr(half, name, sets[name] >> 32 * number & 0xFFFFFFFF)
    system_call("capset", ctypes.byref(CapabilityHeader(CAPABILITY_VERSION_3, 0)), halves)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(64):
        if sets["ambient"] >> number & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()


def reseed() -> None:
    """Let nothing that this process draws at random be what another child of the zygote draws.

    Modules that look at the pid to notice a fork are not enough: the pid here may be the zygote's number again.
    """
    random.seed()
    # Also what depends on the container: its directories, its network interfaces.
    for module, names in ((tempfile, ("_name_sequence", "tempdir")), (uuid, ("_node", "_last_timestamp"))):
        for name in names:
            setattr(module, name, None)
    if ssl := sys.modules.get("ssl"):
        ssl.RAND_add(os.urandom(48), 48.0)
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if multiprocessing := sys.modules.get("multiprocessing.process"):
        multiprocessing.current_process().authkey = os.urandom(32)


def change_profile(name: str) -> None:
    """Enter an AppArmor profile, and see that the kernel says so.

    :raises EntryFailed: this process is in another.
    """
    directory = "attr/apparmor" if os.path.isdir("/proc/self/attr/apparmor") else "attr"
    if without_mode(own_label(directory)) == name:
        return  # the zygote's; who is in a profile may not even change to that one
    write_to_self(f"{directory}/current", f"changeprofile {name}")
    label = own_label(directory)
    if without_mode(label) != name:
        raise EntryFailed(f"the kernel says {label!r}")


def own_label(directory: str) -> str:
    with open(f"/proc/self/{directory}/current", "rb", buffering=0) as file:
        return file.read(4096).decode(errors="replace").rstrip("\0\n")


def without_mode(label: str) -> str:
    """``docker-default (enforce)`` is the profile docker-default."""
    name, opening, _ = label.rpartition(" (")
    return name if opening else label


def load_filter(program: bytes, flags: int) -> None:
    """Load a seccomp filter; an empty one means that there is none."""
    if not program:
        return
    length, rest = divmod(len(program), BYTES_OF_AN_INSTRUCTION)
    if rest:
        raise EntryFailed(f"{len(program)} bytes are no filter program")
    instructions = ctypes.create_string_buffer(program, len(program))
    wanted = FilterProgram(length, ctypes.addressof(instructions))
    operation = ctypes.c_ulong(SECCOMP_SET_MODE_FILTER)
    system_call("seccomp", operation, ctypes.c_ulong(flags), ctypes.byref(wanted))

"""Turns a process that a zygote forked into the workload of another container.

Standard library only. The zygote imports this module before it forks, and nothing is imported later: the container's file
system may have other modules, or none. Two processes use it, one after the other:

    A   enter_namespaces(…), bare_fork    only a child of A is inside the container's pid namespace
    D   become(process, …)                D may then wait for its work
        take_up(…)                        D is the workload now

PROCESS describes the container's process 1: what the host's kernel says of it (``bridge/process_one.py``), and the filter
that its runtime gave it (``oci/seccomp_filter.py``):

    {"uid": 50000, "gid": 0, "groups": [0],
     "capabilities": {"bounding": 0, "effective": 0, "permitted": 0, "inheritable": 0, "ambient": 0},
     "no_new_privileges": true, "rlimits": {"RLIMIT_NOFILE": [1024, 524288], …}, "umask": 18, "oom_score_adj": 100,
     "apparmor": "", "working_directory": "/opt/airflow", "seccomp": "<base64 of struct sock_filter[]>",
     "seccomp_flags": 0}

The order of the steps, and why:
- Descriptors are closed first: a working directory could lead through /proc/self/fd to the zygote's (CVE-2024-21626).
- Steps that need privilege come before it is dropped: limits, oom_score_adj, the bounding set, groups and ids.
- Profiles come after that. AppArmor's comes before no_new_privs, which would forbid the change. seccomp's comes after
  no_new_privs. If the container doesn't have no_new_privs, loading the filter needs CAP_SYS_ADMIN, which is dropped after.
- Steps that read files of the container, and the hooks that libraries want called after a fork (os.register_at_fork), come
  last, without privilege: an author may have written those files, and a library may read them, or start a thread that keeps
  the privilege of its start.

Sources: credentials(7), capabilities(7), prctl(2), seccomp(2), setns(2), session-keyring(7), Documentation/
admin-guide/LSM/apparmor. runc's init does the same in nearly this order, but ends with an exec, which does the rest.
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
#: Calls through it keep Python's lock, so no Python code runs around the call.
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

#: The kernel's default timer slack, in nanoseconds.
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

# asm-generic/resource.h; the module `resource` has all of them but RLIMIT_LOCKS.
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
    """fork(2) without the hooks of Python and libraries, which take 5 ms with Airflow imported.

    Only for a process with one thread. A child that stays calls ``complete_fork``; one that ends need not.

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
    """Enter the namespaces behind these descriptors (of files such as /proc/PID/ns/net), in this order.

    A pid namespace takes effect for children only; it must be this process's own or one below it. A mount namespace also
    changes the root and working directory, so it should be the last. The process must have one thread.

    :raises OSError: a namespace may not be entered (EPERM), or the pid namespace is not below this process's (EINVAL).
    """
    for descriptor in namespaces:
        set_namespace(descriptor)


def become(process: Mapping[str, Any], environment: Mapping[str, str], *, keep: int) -> None:
    """Turn this process, of ``bare_fork``, into PROCESS. To be called once. All descriptors but ``keep`` are closed.

    :raises EntryFailed: a step failed. This process is then changed only in part, and must end.
    """
    try:
        take_on(process, environment, keep)
    except EntryFailed:
        raise
    except Exception as error:
        # A key is missing, or a value has another type.
        raise EntryFailed(f"the description of the process can't be read: {error!r}") from error


def take_user(uid: int, gid: int, groups: Sequence[int], *, drop: Collection[str] = ()) -> None:
    """Become a user, and keep all capabilities but ``drop`` through the next execve(2), as ambient ones. To be called once.

    :raises EntryFailed: a step failed. This process may then be changed in part, and must end.
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
    """This process's permitted capabilities, a bit for each number."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))


def take_up(environment: Mapping[str, str], channels: Sequence[int]) -> None:
    """Prepare for the work, after ``become``. To be called once.

    ``environment`` is added to the container's own. ``channels`` become the descriptors from 0 on. Programs that the
    workload executes inherit them, except the last one, the logs.

    :raises EntryFailed: a step failed.
    """
    step("placing descriptors", place, channels)
    step("setting the environment", set_environment, {**os.environ, **environment})


def take_on(process: Mapping[str, Any], environment: Mapping[str, str], keep: int) -> None:
    capabilities: Mapping[str, int] = process["capabilities"]
    program = base64.b64decode(process["seccomp"], validate=True)

    step("closing descriptors", close_all_but, (keep,))
    # The zygote is not dumpable, and this is its copy. The files of /proc/self, written to below, would belong to root.
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
        # Root in a user namespace, or on NFS, may not enter every directory that the user may, so try again as the user.
        step(f"entering the working directory {directory}", os.chdir, directory)
    os.umask(process["umask"])

    # The change of ids made it undumpable.
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

    # The C library reads the time zone's file, and an author's volume may hold that file.
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
    # The kernel refuses some options unless unused arguments are 0.
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return checked(LIBC.prctl(ctypes.c_int(option), *words), f"prctl({option})")


def set_namespace(descriptor: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(descriptor)
    else:
        checked(LIBC.setns(ctypes.c_int(descriptor), ctypes.c_int(0)), "setns")


def place(channels: Sequence[int]) -> None:
    # First move them to other numbers: any of them may have one of the numbers that are needed.
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
    """Set signals as in an interpreter that was just executed."""
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def join_session_keyring(name: str) -> None:
    """Join the session keyring of that name, made if missing. Without a name: a new one that no other process can join."""
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
    """Reset attributes that a fork inherits from the zygote and a process of the container would not have."""
    prctl(PR_SET_PDEATHSIG, 0)
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK)
    prctl(PR_SET_SECUREBITS, 0)
    # The kernel's name for a process is its executable's, cut to 15 bytes.
    name = os.fsencode(os.path.basename(sys.executable) or "python")
    checked(LIBC.prctl(PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0), "prctl(PR_SET_NAME)")


def drop_bounding_set(kept: int) -> None:
    for number in range(64):
        try:
            held = prctl(PR_CAPBSET_READ, number)
        except OSError as error:
            # The kernel knows no capability with this number or a higher one.
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
    """Give this process random numbers of its own, different from those of the zygote's other children.

    Some modules notice a fork by a changed pid. That is not enough: the pid in here may be the same number as the zygote's.
    """
    random.seed()
    # Also drop what was cached and depends on the container: directories, network interfaces.
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
    """Change to an AppArmor profile, and check that the kernel confirms it.

    :raises EntryFailed: this process is in another profile.
    """
    directory = "attr/apparmor" if os.path.isdir("/proc/self/attr/apparmor") else "attr"
    if without_mode(own_label(directory)) == name:
        return  # it is in this profile already, as the zygote is; a confined process may not even change to its own
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

"""Compiles a seccomp profile into the program that the kernel runs, for a process that no runtime starts.

libseccomp compiles it, as it does for runc and crun, and is used in the way runc uses it. So the kernel answers a process
that was forked into a container as it answers the container's process 1:

- A name that libseccomp doesn't know is left out: such a system call is newer than the library.
- Two conditions on one argument are alternatives, each a rule of its own; conditions on different arguments must all hold.
- A call with a number above all that the profile names gets ENOSYS, whatever the profile says of other calls. A C library
  takes that for an older kernel and falls back; EPERM would be an error. libseccomp can't do this; a few instructions in
  front of its program do.

libseccomp is called through ctypes: PyPI's binding, pyseccomp, has had no release since 2021, and libseccomp's own is
built with the library, not published. Sources: seccomp(2), seccomp_rule_add(3), linux/filter.h; OCI runtime-spec 1.2
(config-linux.md, seccomp).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import cache
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LIBRARY = "libseccomp.so.2"

#: Flags of seccomp(2).
FLAG_LOG = 1 << 1
FLAG_SPEC_ALLOW = 1 << 2

# seccomp.h
_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_WITH_NUMBER = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"})
_PERMISSIVE = frozenset({"SCMP_ACT_TRACE", "SCMP_ACT_LOG", "SCMP_ACT_ALLOW"})
_OPERATORS = {
    f"SCMP_CMP_{name}": number for number, name in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"), start=1)
}
_OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE
_BINARY_TREE = 2
_UNKNOWN = -1  # __NR_SCMP_ERROR

# With fewer rules a tree gains nothing, and libseccomp 2.5 fails on a tree without rules.
_MANY_RULES = 32

# linux/filter.h; seccomp_data begins with the number of the call, four bytes, and the architecture, four bytes.
_LOAD, _JUMP, _IF_EQUAL, _IF_GREATER, _IF_BITS, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_INSTRUCTION = struct.Struct("=HBBI")
_MOST_INSTRUCTIONS = 4096

_SAY_ENOSYS = (_RETURN, 0, 0, _ACTIONS["SCMP_ACT_ERRNO"] | errno.ENOSYS)
# Its distance is known when all instructions are.
_GO_TO_FILTER = (_JUMP, 0, 0, 0)

# The kernel gives x32 the name of x86_64, and tells the two apart by a bit of the call's number.
_X32_BIT = 1 << 30


class FilterUnavailable(IsolationError):
    """No filter can be made on this host, or not of this profile."""


def compile_filter(resolved: Mapping[str, Any]) -> bytes:
    """The program, an array of ``struct sock_filter``, for ``linux.seccomp`` as ``resolve_profile`` returns it.

    This takes some 20 ms for the default profile: keep the result.

    :raises FilterUnavailable: libseccomp is not installed, too old, or refuses the profile.
    """
    library = _library()
    default = _action(resolved["defaultAction"], resolved.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    if not context:
        raise FilterUnavailable(f"libseccomp does not know the action {resolved['defaultAction']}", hint=_HINT)
    try:
        architectures = [_architecture(library, name) for name in resolved.get("architectures") or ()]
        for architecture in architectures:
            # A new filter has the native architecture already.
            _check(library.seccomp_arch_add(context, architecture), "seccomp_arch_add", but=errno.EEXIST)
        rules = list(_rules(resolved))
        if len(rules) > _MANY_RULES:
            # Before libseccomp 2.5 there is no tree; the same filter is then slower.
            library.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)
        for name, action, conditions in rules:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if action == default or number == _UNKNOWN:
                continue
            _check(
                library.seccomp_rule_add_array(context, action, number, len(conditions), _array(conditions)),
                f"seccomp_rule_add of {name}",
            )
        program = _export(library, context)
    finally:
        library.seccomp_release(context)
    if resolved["defaultAction"] not in _PERMISSIVE:
        program = _answers_to_newer_calls(library, architectures, {name for name, _, _ in rules}) + program
    if len(program) > _MOST_INSTRUCTIONS * _INSTRUCTION.size:
        raise FilterUnavailable(
            f"the seccomp profile has {len(program) // _INSTRUCTION.size} instructions, the kernel takes"
            f" {_MOST_INSTRUCTIONS}"
        )
    return program


def filter_flags(resolved: Mapping[str, Any], *, speculation: str) -> int:
    """The flags of seccomp(2) to load the filter with.

    Releases of runc differ in whether a filter switches the speculative store bypass off, which costs speed. The flags give
    what process 1 of the container has: ``speculation`` is its ``Speculation_Store_Bypass`` in /proc/PID/status.
    """
    flags = FLAG_LOG if "SECCOMP_FILTER_FLAG_LOG" in (resolved.get("flags") or ()) else 0
    return flags if speculation == "thread force mitigated" else flags | FLAG_SPEC_ALLOW


_HINT = "Install libseccomp 2.5 (package libseccomp2 or libseccomp), or set start_mode = fresh"


class _Condition(ctypes.Structure):
    """``struct scmp_arg_cmp``: the mask of MASKED_EQ is its first value."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("value_two", ctypes.c_uint64),
    )


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, result, *arguments in (
            ("seccomp_init", ctypes.c_void_p, ctypes.c_uint32),
            ("seccomp_release", None, ctypes.c_void_p),
            ("seccomp_attr_set", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
            ("seccomp_arch_resolve_name", ctypes.c_uint32, ctypes.c_char_p),
            ("seccomp_arch_add", ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32),
            ("seccomp_syscall_resolve_name", ctypes.c_int, ctypes.c_char_p),
            ("seccomp_syscall_resolve_name_arch", ctypes.c_int, ctypes.c_uint32, ctypes.c_char_p),
            (
                "seccomp_rule_add_array",
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_uint32,
                ctypes.c_int,
                ctypes.c_uint,
                ctypes.POINTER(_Condition),
            ),
            ("seccomp_export_bpf", ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise FilterUnavailable(f"{LIBRARY} can't be used: {error}", hint=_HINT) from error
    return library


def _architecture(library: ctypes.CDLL, name: str) -> int:
    architecture: int = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
    if not architecture:
        raise FilterUnavailable(f"libseccomp does not know the architecture {name}", hint=_HINT)
    return architecture


def _rules(resolved: Mapping[str, Any]) -> Iterator[tuple[str, int, tuple[_Condition, ...]]]:
    """The name of a system call, what happens with it, and the conditions that must hold together."""
    for rule in resolved["syscalls"]:
        action = _action(rule["action"], rule.get("errnoRet"))
        conditions = tuple(
            _Condition(one["index"], _OPERATORS[one["op"]], one["value"], one.get("valueTwo", 0))
            for one in rule.get("args") or ()
        )
        alternatives = len({condition.argument for condition in conditions}) < len(conditions)
        for name in rule["names"]:
            if alternatives:
                for condition in conditions:
                    yield name, action, (condition,)
            else:
                yield name, action, conditions


def _action(name: str, number: int | None) -> int:
    if name in _WITH_NUMBER:
        return _ACTIONS[name] | (errno.EPERM if number is None else number)
    return _ACTIONS[name]


def _array(conditions: Sequence[_Condition]) -> ctypes.Array[_Condition]:
    return (_Condition * len(conditions))(*conditions)


def _export(library: ctypes.CDLL, context: int) -> bytes:
    with os.fdopen(os.memfd_create("seccomp"), "rb") as file:
        _check(library.seccomp_export_bpf(context, file.fileno()), "seccomp_export_bpf")
        file.seek(0)
        return file.read()


def _check(result: int, call: str, *, but: int = 0) -> None:
    if result < 0 and result != -but:
        raise FilterUnavailable(f"{call} failed: {os.strerror(-result)}", hint=_HINT)


def _answers_to_newer_calls(library: ctypes.CDLL, architectures: Sequence[int], names: set[str]) -> bytes:
    """Instructions that answer ENOSYS to numbers above the largest named one, and pass the others on to the filter."""
    resolve = library.seccomp_syscall_resolve_name_arch
    x86_64, x32 = (library.seccomp_arch_resolve_name(name) for name in (b"x86_64", b"x32"))
    largest = {
        architecture: number
        for architecture in architectures
        # Names that the architecture does not have give numbers below 0.
        if (number := max((resolve(architecture, name.encode()) for name in names), default=0)) > 0
    }
    program = [(_LOAD, 0, 0, _ARCHITECTURE)]
    for architecture in dict.fromkeys(x86_64 if one == x32 else one for one in architectures):
        part = [_GO_TO_FILTER]
        if architecture in largest:
            part = [(_IF_GREATER, 0, 1, largest[architecture]), _SAY_ENOSYS, _GO_TO_FILTER]
        if architecture == x86_64:
            special = [_GO_TO_FILTER]
            if x32 in largest:
                special = [(_IF_GREATER, 0, 1, largest[x32]), _SAY_ENOSYS, _GO_TO_FILTER]
            part = [(_IF_BITS, 0, len(special), _X32_BIT), *special, *part]
        part = [(_LOAD, 0, 0, _NUMBER), *part]
        program += [(_IF_EQUAL, 0, len(part), architecture), *part]
    return b"".join(
        _INSTRUCTION.pack(*(_JUMP, 0, 0, len(program) - at - 1) if instruction == _GO_TO_FILTER else instruction)
        for at, instruction in enumerate(program)
    )

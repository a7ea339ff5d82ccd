"""The seccomp profile: which system calls a container may make.

Profiles are in Docker's JSON form, whose rules may depend on capabilities, architecture and kernel. Docker takes that
form as it is (``docker_profile``); runtimes take the runtime-spec's form, without conditions (``resolve_profile``).

What the default profile, ``seccomp.json`` beside this module, is about:
- Deny by default, with EPERM. clone3 says ENOSYS instead, because libc then falls back to clone, whose flags a filter
  can read and clone3's it can't.
- What asks for a capability is allowed with that capability only, namespaces (CAP_SYS_ADMIN) among them.
- io_uring, userfaultfd and the kernel's keyrings are absent: much attack surface that tasks don't need.
- Sockets of every family but AF_ALG (38) and AF_VSOCK (40). The kernel reads the family from the low 32 bits of a
  64-bit register, so the rules mask the rest: a plain comparison could be passed by with 38 + 2**32.
- ``socketcall`` of 32-bit x86 hides the family in memory, and libseccomp allows it along with ``socket`` unless a rule
  says otherwise (seen with 2.5.4). So it says ENOSYS: 32-bit programs have sockets by the direct calls only.
- Of the architectures that a 64-bit x86 kernel may run, x86_64 and 32-bit x86. A call of the x32 kind, which hardly any
  kernel has, ends its process by SIGSYS: every architecture is a program of its own in the filter, and costs each
  container some 10 ms of its start (measured with runc 1.1.5).
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import SpecRefused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

DEFAULT = "default"
UNCONFINED = "unconfined"

# An administrator's profile is some 20 KiB.
MAX_PROFILE_SIZE = 1024 * 1024

# SCMP_ACT_NOTIFY is left out: it needs a listener, which nobody here is.
_ACTIONS = frozenset(
    f"SCMP_ACT_{name}" for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP")
)
_OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))

# What brings a forked process into a container, beside what every process may call: the container's namespaces, and a
# session keyring, of which keyctl(2) has 1 (KEYCTL_JOIN_SESSION_KEYRING) as its first argument.
_ENTERING: tuple[Mapping[str, Any], ...] = (
    {"names": ["setns"], "action": "SCMP_ACT_ALLOW"},
    {
        "names": ["keyctl"],
        "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
    },
)

# libseccomp's architecture by Go's name.
_ARCHITECTURES = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}


def load_profile(seccomp: str, *, forks_into: Collection[str] | None = None) -> Mapping[str, Any] | None:
    """The profile that ``ContainerSpec.seccomp`` means: ``default`` is ours, ``unconfined`` None, a path that file's.

    The result is shared: don't change it. ``forks_into`` is ``ContainerSpec.forks_into``: with it the profile is that of a
    zygote, see ``zygote_profile``.

    :raises SpecRefused: the file can't be read, is larger than 1 MiB, or is not a profile in Docker's form.
    """
    if seccomp == UNCONFINED:
        return None
    profile = _named_profile(seccomp)
    return profile if forks_into is None else zygote_profile(profile, forks_into)


def _named_profile(seccomp: str) -> Mapping[str, Any]:
    if seccomp == DEFAULT:
        return _default_profile()
    if not seccomp.startswith("/"):
        raise SpecRefused(
            f"seccomp is {seccomp!r}",
            hint="Write default, unconfined, or the absolute path of a profile in Docker's JSON form",
        )
    return parse_profile(_read(Path(seccomp)), source=seccomp)


def zygote_profile(profile: Mapping[str, Any], capabilities: Collection[str]) -> Mapping[str, Any]:
    """What a zygote may call: what its children may, which have ``capabilities``, and what brings a child into a container.

    A child adds its own filter to the zygote's, and the kernel then allows what both do. So the zygote's must allow all
    that the child's does. Its own capabilities, ``CAP_SYS_ADMIN`` among them, open no further call: it may not mount,
    load programs into the kernel or make namespaces.
    """
    held = {f"CAP_{name}" for name in capabilities}
    rules = [_without_capabilities(rule) for rule in profile["syscalls"] if _held(rule, held)]
    return {**profile, "syscalls": [*rules, *_ENTERING]}


def docker_profile(seccomp: str, *, forks_into: Collection[str] | None = None) -> str:
    """The same as text, as Docker's ``--security-opt seccomp=`` wants it; ``unconfined`` is its own text.

    :raises SpecRefused: as ``load_profile``.
    """
    profile = load_profile(seccomp, forks_into=forks_into)
    return UNCONFINED if profile is None else json.dumps(profile, separators=(",", ":"))


def parse_profile(content: bytes, *, source: str) -> Mapping[str, Any]:
    """Read and check a profile; ``source`` is for the words of an error.

    :raises SpecRefused: not JSON, or not a profile in Docker's form.
    """
    try:
        profile = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecRefused(f"seccomp profile {source} is not JSON: {error}") from error
    fault = _fault(profile)
    if fault:
        raise SpecRefused(f"seccomp profile {source} is not one in Docker's form: {fault}")
    checked: Mapping[str, Any] = profile
    return checked


def resolve_profile(
    profile: Mapping[str, Any], *, architecture: str, capabilities: Collection[str], kernel: tuple[int, int]
) -> dict[str, Any]:
    """Decide every condition and give ``linux.seccomp`` of the runtime-spec.

    ``architecture`` is Go's name, ``capabilities`` are without ``CAP_``, ``kernel`` is major and minor version.

    :raises SpecRefused: the profile has nothing for this architecture, or refuses everything.
    """
    held = {f"CAP_{name}" for name in capabilities}
    resolved: dict[str, Any] = {"defaultAction": profile["defaultAction"]}
    if "defaultErrnoRet" in profile:
        resolved["defaultErrnoRet"] = profile["defaultErrnoRet"]
    resolved["architectures"] = _architectures(profile, architecture)
    if profile.get("flags"):
        resolved["flags"] = list(profile["flags"])
    resolved["syscalls"] = [
        _runtime_rule(rule)
        for rule in profile["syscalls"]
        if _applies(rule, architecture=architecture, capabilities=held, kernel=kernel)
    ]
    return resolved


@cache
def _default_profile() -> Mapping[str, Any]:
    content = resources.files("airflow_isolation.oci").joinpath("seccomp.json").read_bytes()
    return parse_profile(content, source="seccomp.json")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROFILE_SIZE + 1)
    except OSError as error:
        raise SpecRefused(f"seccomp profile {path} can't be read: {error.strerror}") from error
    if len(content) > MAX_PROFILE_SIZE:
        raise SpecRefused(f"seccomp profile {path} is larger than {MAX_PROFILE_SIZE} bytes")
    return content


def _architectures(profile: Mapping[str, Any], architecture: str) -> list[str]:
    native = _ARCHITECTURES.get(architecture, "")
    for entry in profile.get("archMap") or ():
        if entry["architecture"] == native:
            return [native, *(entry.get("subArchitectures") or ())]
    listed: list[str] = list(profile.get("architectures") or ())
    if native not in listed:
        raise SpecRefused(
            f"the seccomp profile has no rules for the architecture {architecture}",
            hint="Give a profile that has, by its path as seccomp",
        )
    return listed


def _applies(
    rule: Mapping[str, Any], *, architecture: str, capabilities: Collection[str], kernel: tuple[int, int]
) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if not _held(rule, capabilities):
        return False
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    return not (excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]))


def _held(rule: Mapping[str, Any], capabilities: Collection[str]) -> bool:
    """Whether a rule is for a process with these capabilities."""
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    return set(includes.get("caps") or ()).issubset(capabilities) and not set(excludes.get("caps") or ()).intersection(
        capabilities
    )


def _without_capabilities(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The rule for whatever capabilities."""
    conditions = {
        key: {name: value for name, value in (rule.get(key) or {}).items() if name != "caps"}
        for key in ("includes", "excludes")
    }
    return {**rule, **conditions}


def _runtime_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = {"names": list(rule["names"]), "action": rule["action"]}
    if "errnoRet" in rule:
        resolved["errnoRet"] = rule["errnoRet"]
    if rule.get("args"):
        resolved["args"] = [dict(argument) for argument in rule["args"]]
    return resolved


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _fault(profile: Any) -> str:
    """What is wrong with a profile, or nothing."""
    if not isinstance(profile, dict):
        return "it is not an object"
    if profile.get("defaultAction") not in _ACTIONS:
        return f"defaultAction is {profile.get('defaultAction')!r}"
    if not _is_errno(profile.get("defaultErrnoRet", 0)):
        return "defaultErrnoRet is not an error number"
    if profile.get("archMap") and profile.get("architectures"):
        return "it has both archMap and architectures"
    if not all(_is_arch_map_entry(entry) for entry in _list(profile.get("archMap"))):
        return "archMap is not a list of architectures with their subArchitectures"
    if not (_is_list_of_text(profile.get("architectures")) and _is_list_of_text(profile.get("flags"))):
        return "architectures or flags is not a list of names"
    rules = profile.get("syscalls")
    if not isinstance(rules, list):
        return "syscalls is not a list"
    return next((f"syscalls[{at}]: {fault}" for at, rule in enumerate(rules) if (fault := _rule_fault(rule))), "")


def _rule_fault(rule: Any) -> str:
    if not isinstance(rule, dict):
        return "not an object"
    if not rule.get("names") or not _is_list_of_text(rule["names"]):
        return "names is not a list of system calls"
    if rule.get("action") not in _ACTIONS:
        return f"action is {rule.get('action')!r}"
    if not _is_errno(rule.get("errnoRet", 0)):
        return "errnoRet is not an error number"
    if not all(_is_argument(argument) for argument in _list(rule.get("args"))):
        return "args is not a list of comparisons"
    for key in ("includes", "excludes"):
        condition = rule.get(key) or {}
        if not isinstance(condition, dict) or set(condition) - {"arches", "caps", "minKernel"}:
            return f"{key} is not made of arches, caps and minKernel"
        if not (_is_list_of_text(condition.get("arches")) and _is_list_of_text(condition.get("caps"))):
            return f"{key} does not list names"
        if not _is_version(condition.get("minKernel", "")):
            return f"minKernel of {key} is not a version such as 4.8"
    return ""


def _list(value: Any) -> Iterable[Any]:
    # One thing that is no list at all stands for a list with a faulty entry.
    return value if isinstance(value, list) else () if value is None else (None,)


def _is_list_of_text(value: Any) -> bool:
    return all(isinstance(entry, str) for entry in _list(value))


def _is_arch_map_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("architecture"), str)
        and _is_list_of_text(entry.get("subArchitectures"))
    )


def _is_argument(argument: Any) -> bool:
    return (
        isinstance(argument, dict)
        and argument.get("op") in _OPERATORS
        and _is_integer(argument.get("index"), 5)
        and _is_integer(argument.get("value"), 2**64 - 1)
        and _is_integer(argument.get("valueTwo", 0), 2**64 - 1)
    )


def _is_errno(value: Any) -> bool:
    return _is_integer(value, 4095)


def _is_integer(value: Any, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= maximum


def _is_version(value: Any) -> bool:
    if value == "":
        return True
    numbers = value.split(".") if isinstance(value, str) else ()
    return len(numbers) == 2 and all(number.isascii() and number.isdecimal() and len(number) < 6 for number in numbers)

"""The seccomp profile: which system calls a container may make.

Profiles are in Docker's JSON form, whose rules may depend on capabilities, architecture and kernel. Docker takes that
form as it is (``docker_profile``); runtimes take the runtime-spec's form, without conditions (``resolve_profile``).

The default profile is ``seccomp.json`` beside this module. Its rules:
- Deny by default, with EPERM. clone3 says ENOSYS instead: libc then falls back to clone. A filter can read the flags of
  clone, but not those of clone3.
- A call that needs a capability is allowed with that capability only. That includes making namespaces (CAP_SYS_ADMIN).
- io_uring, userfaultfd and the kernel's keyrings are denied: much attack surface that tasks don't need.
- Sockets of every family but AF_ALG (38) and AF_VSOCK (40) are allowed. The kernel reads the family from the low 32 bits
  of a 64-bit register, so the rules mask the rest: 38 + 2**32 would get past a plain comparison.
- ``socketcall`` of 32-bit x86 passes the family in memory, where no filter can read it. libseccomp allows it along with
  ``socket`` unless a rule says otherwise (seen with 2.5.4). So it says ENOSYS: 32-bit programs get sockets by the direct
  calls only.
- On a 64-bit x86 kernel, x86_64 and 32-bit x86 are allowed. A call of the x32 kind, which hardly any kernel supports,
  ends its process by SIGSYS. x32 is left out because every architecture is a program of its own in the filter, which
  adds some 10 ms to the start of each container (measured with runc 1.1.5).
"""

from __future__ import annotations

import json
import re
import reprlib
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import SpecRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

DEFAULT = "default"
UNCONFINED = "unconfined"

# An administrator's profile is some 20 KiB.
MAX_PROFILE_SIZE = 1024 * 1024

# SCMP_ACT_NOTIFY is left out: it needs a listener, and we have none.
_ACTIONS = frozenset(
    f"SCMP_ACT_{name}" for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP")
)
_OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))

# What a forked process calls to get into a container, beside what every process may call: setns(2) for the container's
# namespaces, and keyctl(2) for a session keyring, with 1 (KEYCTL_JOIN_SESSION_KEYRING) as its first argument.
_ENTERING: tuple[Mapping[str, Any], ...] = (
    {"names": ["setns"], "action": "SCMP_ACT_ALLOW"},
    {
        "names": ["keyctl"],
        "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
    },
)

_MAX_ERRNO = 4095
# The kernel takes at most 4096 instructions, and a rule is at least one. The default profile has 445.
_MAX_RULES = 10_000
_CALL = re.compile(r"[A-Za-z0-9_]{1,64}")
_SCMP_ARCH = re.compile(r"SCMP_ARCH_[A-Z0-9_]{1,32}")
_ARCH = re.compile(r"[a-z0-9]{1,32}")
_CAP = re.compile(r"CAP_[A-Z0-9_]{1,32}")
_FLAG = re.compile(r"SECCOMP_FILTER_FLAG_[A-Z_]{1,32}")
_VERSION = re.compile(r"[0-9]{1,5}\.[0-9]{1,5}", re.ASCII)

# libseccomp's architecture by Go's name.
_ARCHITECTURES = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}


def load_profile(seccomp: str, *, forks_into: Collection[str] | None = None) -> Mapping[str, Any] | None:
    """The profile for ``ContainerSpec.seccomp``: ``default`` gives ours, ``unconfined`` None, a path the one in that file.

    The result is shared: don't change it. ``forks_into`` is ``ContainerSpec.forks_into``; if given, the result is the
    profile of a zygote, see ``zygote_profile``.

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
    """The profile of a zygote (docs/glossary.md), whose children have ``capabilities``.

    It allows what the children's profile allows, and the calls that bring a child into a container. A child adds its own
    filter to the zygote's, and the kernel then allows what both allow, so the zygote's must allow all that the child's
    does. The zygote's own capabilities, ``CAP_SYS_ADMIN`` among them, add no further call: it may not mount, load
    programs into the kernel or make namespaces.
    """
    held = {f"CAP_{name}" for name in capabilities}
    rules = [_without_capabilities(rule) for rule in profile["syscalls"] if _held(rule, held)]
    return {**profile, "syscalls": [*rules, *_ENTERING]}


def docker_profile(
    seccomp: str,
    *,
    architecture: str,
    capabilities: Collection[str],
    kernel: tuple[int, int],
    forks_into: Collection[str] | None = None,
) -> str:
    """The profile of ``load_profile`` as text for Docker's ``--security-opt seccomp=``; ``unconfined`` gives that word.

    Docker decides the conditions itself, and takes a profile that has nothing for this host. What is refused without it is
    refused here, too.

    :raises SpecRefused: as ``load_profile`` and ``resolve_profile``.
    """
    profile = load_profile(seccomp, forks_into=forks_into)
    if profile is None:
        return UNCONFINED
    resolve_profile(profile, architecture=architecture, capabilities=capabilities, kernel=kernel)
    return json.dumps(profile, separators=(",", ":"))


def parse_profile(content: bytes, *, source: str) -> Mapping[str, Any]:
    """Read and check a profile; ``source`` is for the words of an error.

    :raises SpecRefused: not JSON, or not a profile in Docker's form.
    """
    try:
        profile = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecRefused(f"seccomp profile {source} is not JSON: {error}") from error
    fault = next(_faults(profile), "")
    if fault:
        raise SpecRefused(f"seccomp profile {source} is not one in Docker's form: {fault}")
    checked: Mapping[str, Any] = profile
    return checked


def resolve_profile(
    profile: Mapping[str, Any], *, architecture: str, capabilities: Collection[str], kernel: tuple[int, int]
) -> dict[str, Any]:
    """Decide every condition, and return ``linux.seccomp`` of the runtime-spec.

    ``architecture`` is Go's name, ``capabilities`` are without ``CAP_``, ``kernel`` is major and minor version.

    :raises SpecRefused: the profile has nothing for this architecture.
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
    if native and not listed and not profile.get("archMap"):
        return [native]  # as Docker and libseccomp take it
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
    """The rule without its conditions on capabilities."""
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


# Each of these functions yields what is wrong, with the entry's name, and stops when it can't check further.


def _faults(profile: Any) -> Iterator[str]:
    if not isinstance(profile, dict):
        yield "it is not an object"
        return
    yield from _choice_faults("defaultAction", profile.get("defaultAction"), _ACTIONS)
    yield from _number_faults("defaultErrnoRet", profile.get("defaultErrnoRet", 0), _MAX_ERRNO)
    if profile.get("archMap") and profile.get("architectures"):
        yield "it has both archMap and architectures"
    for name in ("listenerPath", "listenerMetadata"):
        if profile.get(name):
            yield f"{name} is set, but this project runs no listener"
    yield from _list_faults("archMap", profile.get("archMap"), _arch_map_faults)
    yield from _list_faults("architectures", profile.get("architectures"), _architecture_faults)
    yield from _list_faults("flags", profile.get("flags"), partial(_name_faults, _FLAG, "a flag"))
    if not isinstance(profile.get("syscalls"), list):
        yield "syscalls is not a list"
        return
    yield from _list_faults("syscalls", profile["syscalls"], _rule_faults)
    # A rule holds for each of its names, by each of its comparisons.
    rules = sum(len(rule["names"]) * max(1, len(rule.get("args") or ())) for rule in profile["syscalls"])
    if rules > _MAX_RULES:
        yield f"syscalls is {rules} rules, one for each name and comparison, and more than {_MAX_RULES} are not taken"


def _rule_faults(where: str, rule: Any) -> Iterator[str]:
    if not isinstance(rule, dict):
        yield f"{where} is not an object"
        return
    if rule.get("name"):
        yield f"{where}.name is the old form: write names, a list"
    if not rule.get("names"):
        yield f"{where}.names is not a list of system calls"
    yield from _list_faults(f"{where}.names", rule.get("names"), partial(_name_faults, _CALL, "a system call's name"))
    yield from _choice_faults(f"{where}.action", rule.get("action"), _ACTIONS)
    yield from _number_faults(f"{where}.errnoRet", rule.get("errnoRet", 0), _MAX_ERRNO)
    yield from _list_faults(f"{where}.args", rule.get("args"), _comparison_faults)
    if not isinstance(rule.get("comment") or "", str):
        yield f"{where}.comment is not text"
    for key in ("includes", "excludes"):
        yield from _condition_faults(f"{where}.{key}", rule.get(key) or {})


def _condition_faults(where: str, condition: Any) -> Iterator[str]:
    if not isinstance(condition, dict) or set(condition) - {"arches", "caps", "minKernel"}:
        yield f"{where} is not made of arches, caps and minKernel"
        return
    yield from _list_faults(f"{where}.arches", condition.get("arches"), partial(_name_faults, _ARCH, "an architecture"))
    yield from _list_faults(f"{where}.caps", condition.get("caps"), partial(_name_faults, _CAP, "a capability"))
    version = condition.get("minKernel") or ""
    if not isinstance(version, str) or (version and not _VERSION.fullmatch(version)):
        yield f"{where}.minKernel is {_shown(version)}, not a version such as 4.8"


def _comparison_faults(where: str, comparison: Any) -> Iterator[str]:
    if not isinstance(comparison, dict):
        yield f"{where} is not an object"
        return
    yield from _choice_faults(f"{where}.op", comparison.get("op"), _OPERATORS)
    yield from _number_faults(f"{where}.index", comparison.get("index"), 5)
    yield from _number_faults(f"{where}.value", comparison.get("value"), 2**64 - 1)
    yield from _number_faults(f"{where}.valueTwo", comparison.get("valueTwo", 0), 2**64 - 1)


def _arch_map_faults(where: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{where} is not an object"
        return
    yield from _architecture_faults(f"{where}.architecture", entry.get("architecture"))
    yield from _list_faults(f"{where}.subArchitectures", entry.get("subArchitectures"), _architecture_faults)


def _list_faults(where: str, values: Any, entry_faults: Callable[[str, Any], Iterator[str]]) -> Iterator[str]:
    if values is None:
        return
    if not isinstance(values, list):
        yield f"{where} is not a list"
        return
    for at, value in enumerate(values):
        yield from entry_faults(f"{where}[{at}]", value)


def _architecture_faults(where: str, value: Any) -> Iterator[str]:
    yield from _name_faults(_SCMP_ARCH, "an architecture such as SCMP_ARCH_X86_64", where, value)


def _name_faults(form: re.Pattern[str], what: str, where: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str) or not form.fullmatch(value):
        yield f"{where} is {_shown(value)}, not {what}"


def _choice_faults(where: str, value: Any, choices: Collection[str]) -> Iterator[str]:
    if not isinstance(value, str) or value not in choices:
        yield f"{where} is {_shown(value)}"


def _number_faults(where: str, value: Any, maximum: int) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        yield f"{where} is {_shown(value)}, not a number from 0 to {maximum}"


# The beginning of a value is enough to find it, however deep or long it is.
_shown = reprlib.repr

"""Values that are not quantities: text into values. Every function raises ValueError with a sentence."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final, get_args
from zoneinfo import ZoneInfo

from airflow_isolation.runtime.interface import PullPolicy
from airflow_isolation.settings.effective import UIDS_OF_AN_IMAGE, Grant, ParseMode, StartMode, UidRange, Volume

if TYPE_CHECKING:
    from collections.abc import Iterable

# The grammar of the reference package of the distribution project, with its limit of 255 for the name.
_IMAGE: Final = re.compile(
    r"(?P<name>(?:(?P<domain>(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:[0-9])|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?P<tag>:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?P<digest>@sha(?:256:[0-9a-f]{64}|512:[0-9a-f]{128}))?",
    re.ASCII,
)
_USER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?|[0-9]{1,10}(:[0-9]{1,10})?", re.ASCII)
_CLIENT: Final = re.compile(r"@?([A-Za-z_][A-Za-z0-9_.-]{0,31}\$?|[0-9]{1,10})", re.ASCII)
_NETWORK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_HOSTNAME: Final = re.compile(
    r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", re.ASCII
)
_CAPABILITY: Final = re.compile(r"[A-Z][A-Z_]{1,40}", re.ASCII)
_NAMESPACE: Final = re.compile(r"(?=.{1,76}\Z)[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
_ENVIRONMENT_NAME: Final = re.compile(r"[^=\0\s]{1,256}")
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,254}[A-Za-z0-9])?", re.ASCII)
# containerd refuses a label whose key and value together are longer (labels.Validate).
MAX_LABEL: Final = 4096
# The kernel's MAX_ARG_STRLEN holds for one NAME=VALUE.
MAX_ENVIRONMENT: Final = 128 * 1024 - 1
# The largest uid that every runtime takes for what it is (CVE-2024-40635).
MAX_UID: Final = 2**31 - 1

# (uid_t) -1 stands for no user, so the last uid is the one before.
_LAST_UID: Final = 2**32 - 2

_TRUE: Final = frozenset({"true", "t", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "f", "0", "no", "off"})


def parse_text(text: str) -> str:
    """Any text without control characters."""
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError(f"{text!r} holds a control character")
    return text


def parse_bool(text: str) -> bool:
    """``True`` or ``False`` as airflow.cfg and YAML write it."""
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(f"{text!r} is neither true nor false")


def parse_image(text: str) -> str:
    """An image reference, kept as written."""
    matched = _IMAGE.fullmatch(text)
    if matched is None or len(matched["name"]) > 255:
        raise ValueError(f"{text!r} is not an image reference such as registry.example/team/sales:1.4")
    return text


def qualified_image(reference: str) -> str:
    """The reference in full, as registries count: ``python`` is ``docker.io/library/python:latest``."""
    matched = _IMAGE.fullmatch(reference)
    if matched is None:
        return reference
    name = matched["name"]
    if matched["domain"] is None:
        name = f"docker.io/{name}" if "/" in name else f"docker.io/library/{name}"
    tag = matched["tag"] or ("" if matched["digest"] else ":latest")
    return f"{name}{tag}{matched['digest'] or ''}"


def parse_pull_policy(text: str) -> PullPolicy:
    """``always``, ``if_not_present`` or ``never``."""
    try:
        return PullPolicy(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no pull policy; write {_one_of(policy.value for policy in PullPolicy)}"
        ) from None


def parse_parse_mode(text: str) -> ParseMode:
    """``fork`` or ``fresh``."""
    for mode in get_args(ParseMode):
        if text == mode:
            return mode  # type: ignore[no-any-return]  # typeshed gives get_args no better type
    raise ValueError(f"{text!r} is no way to parse; write {_one_of(get_args(ParseMode))}")


def parse_start_mode(text: str) -> StartMode:
    """``auto``, ``fork`` or ``fresh``."""
    for mode in get_args(StartMode):
        if text == mode:
            return mode  # type: ignore[no-any-return]  # as above
    raise ValueError(f"{text!r} is no way to start a task; write {_one_of(get_args(StartMode))}")


def parse_uid_range(text: str) -> UidRange:
    """``FIRST:COUNT``, or ``none``.

    >>> parse_uid_range("1000000:131072")
    UidRange(first=1000000, count=131072)
    """
    if text == "none":
        return UidRange(0, 0)
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal()):
        raise ValueError(f"{text!r} is no range of uids; write FIRST:COUNT, such as 1000000:6553600, or none")
    found = UidRange(int(first), int(count))
    if found.count < UIDS_OF_AN_IMAGE:
        raise ValueError(f"{text!r} holds {found.count} uids, and one image needs {UIDS_OF_AN_IMAGE}")
    if found.first < UIDS_OF_AN_IMAGE or found.first + found.count > _LAST_UID:
        raise ValueError(f"{text!r} must begin at {UIDS_OF_AN_IMAGE} or above, and end below {_LAST_UID}")
    return found


def parse_grant(text: str) -> Grant:
    """``FILE:ID``, two shell patterns."""
    file, separator, id = parse_text(text).partition(":")
    if not separator or not file.strip() or not id.strip():
        raise ValueError(f"{text!r} does not say which file may use what; write FILE:ID, such as sales/*:sales_*")
    return Grant(file.strip(), id.strip())


def parse_user(text: str) -> str:
    """``name``, ``uid`` or ``uid:gid``."""
    if _USER.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a user; write a name, a uid or uid:gid, such as airflow or 50000:0")
    if text[0].isdigit() and any(int(number) > MAX_UID for number in text.split(":")):
        raise ValueError(f"{text!r} is beyond the largest user id, {MAX_UID}")
    return text


def parse_client(text: str) -> str:
    """A user, by name or uid, or with an @ in front a group, by name or gid."""
    if _CLIENT.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no user or group; write airflow, 50000, @workers or @50000")
    return text


def is_root(user: str) -> bool:
    """Whether the text means root. Another name may be uid 0 in an image; the spec builder (``oci.account``) checks that."""
    return user == "root" or (user[:1].isdigit() and int(user.partition(":")[0]) == 0)


def parse_network(text: str) -> str:
    """``host``, ``none`` or a network's name."""
    if _NETWORK.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a network; write host, none or the name of a network")
    return text


def parse_hostname(text: str) -> str:
    """A host name of at most 63 characters, the kernel's limit less one."""
    if _HOSTNAME.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a host name of letters, digits, - and at most 63 characters")
    return text


def parse_timezone(text: str) -> str:
    """A name of the time zone database."""
    try:
        ZoneInfo(text)
    except (ValueError, OSError, KeyError):  # not found is a KeyError, a directory an OSError
        raise ValueError(f"{text!r} is not a time zone such as Europe/Berlin or UTC") from None
    return text


def parse_capability(text: str) -> str:
    """A Linux capability, given without ``CAP_``."""
    name = text.upper().removeprefix("CAP_")
    if _CAPABILITY.fullmatch(name) is None or name == "ALL":
        raise ValueError(f"{text!r} is not one Linux capability such as NET_BIND_SERVICE")
    return name


def parse_seccomp(text: str) -> str:
    """``default``, ``unconfined`` or the path of a profile."""
    if text in {"default", "unconfined"}:
        return text
    try:
        return parse_path(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a seccomp profile; write default, unconfined or the absolute path of a profile"
        ) from None


def parse_path(text: str) -> str:
    """An absolute path, normalised, without ``..``."""
    parse_text(text)
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path")
    if ".." in text.split("/"):
        raise ValueError(f"{text!r} goes upwards with ..; write the path itself")
    return "/" + posixpath.normpath(text).lstrip("/")


def parse_socket(text: str) -> str:
    """The path of a unix socket; ``unix://`` in front of it is allowed."""
    return parse_path(text.removeprefix("unix://"))


def parse_working_dir(text: str) -> str:
    """A directory inside the container. Not below /proc: /proc/self/fd/N led out of containers (CVE-2024-21626)."""
    path = parse_path(text)
    if path == "/proc" or path.startswith("/proc/"):
        raise ValueError(f"{text!r} is below /proc and no place to work in")
    return path


def parse_interpreter(text: str) -> str:
    """A program name that the image's PATH leads to, or its absolute path in the image."""
    parse_text(text)
    if text.startswith("/"):
        return parse_path(text)
    if "/" in text or " " in text:
        raise ValueError(f"{text!r} is not an interpreter; write a name such as python3.11 or an absolute path")
    return text


def parse_cgroup_parent(text: str) -> str:
    """A cgroup's path below the mount, or a systemd slice."""
    path = parse_path("/" + text.lstrip("/")).lstrip("/")
    if not path:
        raise ValueError(f"{text!r} is the root of all cgroups; write a path below it, such as airflow")
    return path


def parse_namespace(text: str) -> str:
    """An identifier as containerd wants it: letters and digits with single separators, at most 76 characters."""
    if _NAMESPACE.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a namespace; write letters and digits, such as airflow")
    return text


def parse_volume(text: str) -> Volume:
    """``source:target``, which is read-only, or ``source:target:ro`` or ``source:target:rw``."""
    parts = text.split(":")
    if len(parts) not in {2, 3} or not all(parts):
        raise ValueError(f"{text!r} is not a volume; write source:target, source:target:ro or source:target:rw")
    mode = parts[2] if len(parts) == 3 else "ro"
    if mode not in {"ro", "rw"}:
        raise ValueError(f"{text!r} ends in {mode!r}, which is neither ro nor rw")
    source, target = parse_path(parts[0]), parse_path(parts[1])
    if target == "/" or any(target == place or target.startswith(place + "/") for place in ("/proc", "/sys", "/dev")):
        raise ValueError(f"{text!r} would cover {target}, which the runtime needs in the container")
    return Volume(source, target, read_only=mode == "ro")


def check_environment(name: str, value: str) -> None:
    """Check that execve(2) accepts the variable."""
    if _ENVIRONMENT_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not a name for an environment variable")
    if "\0" in value:
        raise ValueError("the value holds a NUL character")
    if len(f"{name}={value}".encode()) > MAX_ENVIRONMENT:
        raise ValueError(f"the value is longer than the {MAX_ENVIRONMENT} bytes that Linux takes")


def check_label(name: str, value: str) -> None:
    """Check a label: both backends must accept it, and its name must not be reserved for a runtime or for us."""
    if _LABEL_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not a name for a label; write letters, digits and . _ - /")
    for reserved in ("io.airflow.", "containerd.io/", "io.cri-containerd", "com.docker."):
        if name.startswith(reserved):
            raise ValueError(f"labels that begin with {reserved} are not for settings")
    parse_text(value)
    if len((name + value).encode()) > MAX_LABEL:
        raise ValueError(f"the label is longer than the {MAX_LABEL} bytes that containerd takes")


def _one_of(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"

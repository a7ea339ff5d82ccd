"""Which uid, gid and groups a container's process has: resolves a user in the image's account files, runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from airflow_isolation.errors import SpecRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

# Above it, a runtime that counts in int32 could take a uid for 0 (CVE-2024-40635).
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A resolved user. ``additional_gids`` is sorted and holds ``gid``; ``name`` and ``home`` are empty when not known."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...]
    name: str = ""
    home: str = ""


class _User(NamedTuple):
    name: str
    uid: str
    gid: str
    home: str


class _Group(NamedTuple):
    name: str
    gid: str
    members: tuple[str, ...]


def needs_account_files(user: str) -> bool:
    """Whether ``user`` holds a name, which can't be resolved without the image's /etc/passwd and /etc/group.

    Numeric ids need no files; then the files only add the home directory and memberships.
    """
    name, _, group = user.partition(":")
    return not (_is_number(name or "0") and _is_number(group or "0"))


def resolve_account(
    user: str, *, passwd: str | None, group: str | None, allow_root: bool = False, image: str = ""
) -> Account:
    """Resolve ``name``, ``uid``, ``name:group``, ``uid:gid`` and their mixtures; empty is root, as in an image without USER.

    ``passwd`` and ``group`` are the texts of the image's files, None when they could not be read; ``image`` is only
    for the words of an error. As with Docker, a uid that the image doesn't know has group 0 unless a group is given:
    images for arbitrary uids, apache/airflow among them, rely on it. Memberships of /etc/group always apply, and the
    primary group is always among the additional ones (CVE-2022-36109).

    :raises SpecRefused: the user is not in the image, not of that form or outside 0…2147483647, or it is uid 0 without
        ``allow_root``.
    """
    where = f"the image {image}" if image else "the image"
    wanted_user, colon, wanted_group = user.partition(":")
    if (colon and not wanted_group) or ":" in wanted_group or (not wanted_user and colon):
        raise SpecRefused(f"{user!r} is not a user", hint="Write a name, a uid, uid:gid or name:group as run_as_user")
    wanted_user = wanted_user or "0"

    known = _find_user(wanted_user, passwd)
    if known is None and not _is_number(wanted_user):
        raise _unknown("user", wanted_user, where, "/etc/passwd", readable=passwd is not None)
    uid = _number(known.uid if known else wanted_user, "uid", user)
    gid = _number(known.gid, "gid", user) if known else 0
    if wanted_group:
        gid = _find_gid(wanted_group, group, where, user)
    if uid == 0 and not allow_root:
        who = f"the user {user!r} is root" if user else f"{where} names no user, so its processes would be root"
        raise SpecRefused(f"{who} (uid 0)", hint="Set run_as_user to another user, or allow it with allow_root = True")

    name = known.name if known else ""
    memberships = {_number(row.gid, "gid", row.name) for row in _groups(group) if name and name in row.members}
    return Account(
        uid=uid,
        gid=gid,
        additional_gids=tuple(sorted({gid, *memberships})),
        name=name,
        home=known.home if known and known.home.startswith("/") else "",
    )


def _find_user(wanted: str, passwd: str | None) -> _User | None:
    if not _is_number(wanted):
        return next((row for row in _users(passwd) if row.name == wanted), None)
    uid = _number(wanted, "uid", wanted)
    return next((row for row in _users(passwd) if row.uid == str(uid)), None)


def _find_gid(wanted: str, group: str | None, where: str, user: str) -> int:
    if _is_number(wanted):
        return _number(wanted, "gid", user)
    found = next((row for row in _groups(group) if row.name == wanted), None)
    if found is None:
        raise _unknown("group", wanted, where, "/etc/group", readable=group is not None)
    return _number(found.gid, "gid", user)


def _unknown(kind: str, wanted: str, where: str, file: str, *, readable: bool) -> SpecRefused:
    if readable:
        return SpecRefused(f"{where} has no {kind} {wanted!r} in its {file}", hint="Set run_as_user to one that it has")
    return SpecRefused(
        f"the {kind} {wanted!r} can't be found: {where} has no readable {file}", hint="Set run_as_user to uid:gid"
    )


def _users(passwd: str | None) -> Iterator[_User]:
    # Lines of another form (comments, NIS) are skipped, as libc does.
    for line in (passwd or "").split("\n"):
        fields = line.split(":")
        if len(fields) == 7 and fields[0]:
            yield _User(fields[0], fields[2], fields[3], fields[5])


def _groups(group: str | None) -> Iterator[_Group]:
    for line in (group or "").split("\n"):
        fields = line.split(":")
        if len(fields) == 4 and fields[0]:
            yield _Group(fields[0], fields[2], tuple(fields[3].split(",")))


def _is_number(text: str) -> bool:
    # isdecimal() is true for the digits of other scripts too, which int() reads and a runtime would not.
    return text.isascii() and text.isdecimal()


def _number(text: str, kind: str, user: str) -> int:
    # The length is checked first: Python refuses to convert very long numbers, with an error of its own.
    if not _is_number(text) or len(text) > 20 or int(text) > _MAX_ID:
        raise SpecRefused(f"{kind} {text[:24]!r} of {user[:64]!r} is not a number from 0 to {_MAX_ID}")
    return int(text)

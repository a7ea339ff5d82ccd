"""Container ids: made by us, never derived from a dag_id, and valid by containerd's rule."""

from __future__ import annotations

import re
import secrets
import time

from airflow_isolation.errors import SpecRefused

# containerd, pkg/identifiers: at most 76 characters, and separators only single and between letters or digits.
_MAX_LENGTH = 76
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")

# Crockford's base 32 in lower case: sorts like the number it stands for, and has no look-alike letters.
_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_DIGITS = 10
_RANDOM_DIGITS = 16
_OURS = re.compile(f"[a-z]+-[{_DIGITS}]{{{_TIME_DIGITS + _RANDOM_DIGITS}}}")


def check_identifier(identifier: str) -> str:
    """Return ``identifier`` if containerd accepts it as a container id.

    :raises SpecRefused: it is empty, longer than 76 characters, or holds other than letters, digits and single ``. _ -``.
    """
    if len(identifier) > _MAX_LENGTH or not _IDENTIFIER.fullmatch(identifier):
        raise SpecRefused(
            f"{identifier[: _MAX_LENGTH + 1]!r} can't be a container's id",
            hint="Letters and digits, with single dots, dashes or underscores between them, 76 characters at most",
        )
    return identifier


def new_container_id(purpose: str) -> str:
    """Make an id such as ``task-01jd4w6z8k9q2v5x7b3n1m0c8r``: unique, and later ids sort after earlier ones (milliseconds).

    :raises SpecRefused: ``purpose`` can't begin an identifier.
    """
    milliseconds = time.time_ns() // 1_000_000
    return check_identifier(
        f"{purpose}-{_base32(milliseconds, _TIME_DIGITS)}{_base32(secrets.randbits(80), _RANDOM_DIGITS)}"
    )


def is_container_id(text: str) -> bool:
    """Whether ``text`` has the form of an id of ``new_container_id``.

    >>> is_container_id("task-01jd4w6z8k9q2v5x7b3n1m0c8r"), is_container_id("task-1"), is_container_id("kubepods")
    (True, False, False)
    """
    return _OURS.fullmatch(text) is not None


def _base32(number: int, length: int) -> str:
    return "".join(_DIGITS[number >> (5 * place) & 31] for place in reversed(range(length)))

"""Turns one line of the structured log channel into a call of a logger. A line may hold anything, and must never raise.

A workload may log what it likes, but not in another's name: the worker sets which workload the line is from, and checks
its time. The worker's own lines have the logger ``task`` or ``dag_processor``; lines from inside have names below it.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Keywords of the logging call itself. As keys of an event they would be passed twice, an error that stops stock's
#: supervisor.
_CALL: Final = frozenset({"target", "level", "msg", "event", "self"})
#: Keys that structlog's and Airflow's processors use themselves. ``positional_args`` is formatted into the event with ``%``,
#: where a format may ask for any width, and so any amount of memory.
_PROCESSORS: Final = frozenset(
    {"positional_args", "logger_name", "exc_info", "stack_info", "stack", "_record", "_from_structlog"}
)
_RESERVED: Final = _CALL | _PROCESSORS

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
}

#: Tolerance for a line's time. A container has its host's clock, but may have begun before ``since``, and times are rounded.
_BEFORE: Final = timedelta(seconds=30)
_AFTER: Final = timedelta(seconds=1)

_KEY: Final = re.compile(r'[\s,{]*"((?:[^"\\]|\\.)*)"\s*:\s*')


class Source(NamedTuple):
    """Where lines come from.

    Attributes:
        name: the logger of the worker's own lines about it: ``task`` or ``dag_processor``.
        since: nothing of it ran before this time.
        identity: fields that say which workload the lines are from; they replace what a line claims.

    """

    name: str
    since: datetime
    identity: Mapping[str, Any]


class LogEvent(NamedTuple):
    """One line to log."""

    level: int
    text: str
    values: dict[str, Any]


def read(line: bytes, source: Source) -> LogEvent:
    """Parse a line. A line that is no JSON object becomes a warning with its text."""
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        fields = None
    if not isinstance(fields, dict):
        return LogEvent(logging.WARNING, text_of(line), {"logger": f"{source.name}.log"})
    return _event(fields, source)


def read_cut(line: bytes, left_out: int, source: Source) -> LogEvent:
    """Parse the beginning of a line that was too long; the event says that ``left_out`` bytes are missing."""
    note = f" … ({left_out} bytes of this record are left out)"
    fields, cut = _beginning(line.decode(errors="replace"))
    if cut is None:
        return LogEvent(logging.WARNING, text_of(line) + note, {"logger": f"{source.name}.log"})
    if cut:
        fields[cut] = f"{fields[cut]}{note}"
    if cut != "event":
        fields["event"] = f"{fields.get('event', '')}{note}"
    return _event(fields, source)


def text_of(line: bytes) -> str:
    return line.rstrip().decode(errors="replace")


def _event(fields: dict[str, Any], source: Source) -> LogEvent:
    level = _LEVELS.get(str(fields.pop("level", "info")).lower(), logging.INFO)
    text = str(fields.pop("event", ""))
    claimed = fields.pop("timestamp", None)
    logger = str(fields.pop("logger", "log"))
    if exception := fields.pop("exception", None):
        fields["error_detail"] = exception
    values = {f"{key}_" if key in _RESERVED else key: value for key, value in fields.items()}
    values |= {key: value for key, value in source.identity.items() if key in values}
    if claimed is not None:
        time = _plausible(claimed, source.since)
        values["timestamp" if time else "claimed_timestamp"] = time or str(claimed)
    inside = logger.startswith(f"{source.name}.")
    values["logger"] = logger if inside else f"{source.name}.{logger}"
    return LogEvent(level, text, values)


def _plausible(claimed: Any, since: datetime) -> datetime | None:
    try:
        time = msgspec.convert(claimed, datetime)
    except msgspec.ValidationError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=timezone.utc)
    return time if since - _BEFORE <= time <= datetime.now(tz=timezone.utc) + _AFTER else None


def _beginning(text: str) -> tuple[dict[str, Any], str | None]:
    """The fields of a JSON object that is cut off, and the name of the field in which it is cut.

    The name is empty when the cut is between two fields, and None when the text is no object.
    """
    fields: dict[str, Any] = {}
    if not text.lstrip().startswith("{"):
        return fields, None
    decoder = json.JSONDecoder(strict=False)
    position = 0
    while match := _KEY.match(text, position):
        name = _unescaped(match[1])
        try:
            fields[name], position = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            rest = text[match.end() :]
            fields[name] = _unescaped(rest[1:]) if rest.startswith('"') else rest
            return fields, name
    return fields, ""


def _unescaped(text: str) -> str:
    """Decode a JSON string without its quotes. Its last character may be incomplete, and is then dropped."""
    # At most ``\uD83D\uDE0`` is left of a pair of escapes that is one character.
    for end in range(len(text), max(-1, len(text) - 12), -1):
        try:
            return str(json.loads(f'"{text[:end]}"', strict=False))
        except ValueError:
            continue
    return text

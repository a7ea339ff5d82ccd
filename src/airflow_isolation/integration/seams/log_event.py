"""One line of the structured log channel as a call of a logger. Anything may stand in it; nothing in it may raise.

A workload may log what it likes, but as itself: whose line it is and when it was written is what the worker knows. The
worker's own lines have the logger ``task`` or ``dag_processor``; those from inside have names below it.
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

#: Keywords of the logging call itself: as keys of an event they would be given twice, which stops a stock supervisor.
_CALL: Final = frozenset({"target", "level", "msg", "event", "self"})
#: What structlog's and Airflow's processors take for their own. ``positional_args`` is put into the event with ``%``,
#: which can ask for any width.
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

#: A container has its host's clock. It may have begun before its lines are read, and times are rounded.
_BEFORE: Final = timedelta(seconds=30)
_AFTER: Final = timedelta(seconds=1)

_KEY: Final = re.compile(r'[\s,{]*"((?:[^"\\]|\\.)*)"\s*:\s*')


class Source(NamedTuple):
    """Where lines come from.

    Attributes:
        name: the logger's name of what the worker itself says about it: ``task`` or ``dag_processor``.
        since: before this nothing of it was running.
        identity: what its lines say of whose they are, whatever they claim.

    """

    name: str
    since: datetime
    identity: Mapping[str, Any]


class LogEvent(NamedTuple):
    """What is to be logged."""

    level: int
    text: str
    values: dict[str, Any]


def read(line: bytes, source: Source) -> LogEvent:
    """What a line says; one that is no JSON object is a warning with its text."""
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        fields = None
    if not isinstance(fields, dict):
        return LogEvent(logging.WARNING, text_of(line), {"logger": f"{source.name}.log"})
    return _event(fields, source)


def read_cut(line: bytes, left_out: int, source: Source) -> LogEvent:
    """What the beginning of a line says that was too long, and how many bytes of it are left out."""
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
    """The fields of a JSON object that is cut off somewhere, and the name of the one in which that is.

    The name is empty when it is between two fields, and None when this is no object.
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
    """A JSON string without its quotes, of whose last character only a part may be there."""
    # At most ``\uD83D\uDE0`` of two escapes that belong together.
    for end in range(len(text), max(-1, len(text) - 12), -1):
        try:
            return str(json.loads(f'"{text[:end]}"', strict=False))
        except ValueError:
            continue
    return text

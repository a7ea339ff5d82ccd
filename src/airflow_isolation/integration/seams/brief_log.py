"""A logger for what tasks ask for that keeps at most a few KiB of each value.

Airflow's supervisor logs a whole request when it can't read it or doesn't know it, and with the level DEBUG always. A
request may have 256 MiB.
"""

from __future__ import annotations

import reprlib
import traceback
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import ValidationError
    from structlog.typing import FilteringBoundLogger

#: Characters that are kept of one value.
VALUE_LIMIT: Final = 1024
#: Characters that are kept of an exception with all its causes.
EXCEPTION_LIMIT: Final = 8 * 1024

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


class BriefLog:
    """Wraps a logger, for code that logs requests. It cuts long values."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._log, name)

        def logged(event: str, *arguments: Any, **values: Any) -> Any:
            error = values.pop("exc_info", name == "exception")
            if error:
                values["exception"] = _told(error)
            short = {key: value if key == "exception" else brief(value) for key, value in values.items()}
            # ``exception`` would add the exception by itself, uncut.
            return (self._log.error if name == "exception" else method)(event, *arguments, **short)

        return logged


def brief(value: Any) -> Any:
    """The value itself if it is short, else the beginning of its text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return cut(value, VALUE_LIMIT)
    if isinstance(value, BaseModel):
        fields = ", ".join(f"{name}={_repr.repr(field)}" for name, field in value)
        return cut(f"{type(value).__name__}({fields})", VALUE_LIMIT)
    if isinstance(value, type):
        return value.__name__
    return cut(_repr.repr(value), VALUE_LIMIT)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a message."""
    if error.error_count() > 100:  # a list of all would take too much memory
        return f"{error.error_count()} values in it are not what they should be"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = f" ({'.'.join(map(str, first['loc']))})" if first["loc"] else ""
    return cut(f"{first['msg']}{place}", VALUE_LIMIT)


def cut(text: str, limit: int) -> str:
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[:limit]}… ({left_out} more characters)"


def _told(error: Any) -> str:
    lines = traceback.format_exception(error) if isinstance(error, BaseException) else [traceback.format_exc()]
    # Each line may hold the message of an exception. The last ones say most, so the end is kept.
    text = "".join(cut(line, VALUE_LIMIT) for line in lines)
    return text if len(text) <= EXCEPTION_LIMIT else f"… {text[-EXCEPTION_LIMIT:]}"

"""The classes and functions that a serialized DAG names, and that Airflow imports elsewhere, outside of any container.

They are: the trigger of an operator that starts deferred, and that of an asset's watcher (the triggerer imports them); the
callback of a deadline (triggerer or executor), and a deadline's own kind of reference (the scheduler).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def named_code(dag: Mapping[str, Any]) -> frozenset[str]:
    """Their dotted paths. Wherever they stand: assets are in schedules, inlets and outlets, and in each other.

    >>> sorted(named_code({"dag": {"deadline": [{"callback": {"path": "a.b"}}], "tasks": [{"trigger_cls": "c.D"}]}}))
    ['a.b', 'c.D']
    """
    return frozenset(_found(dag, in_deadline=False))


def _found(value: object, *, in_deadline: bool) -> Iterator[str]:
    # Not by recursion: what a container reports may be nested as deeply as JSON can be.
    waiting = [(value, in_deadline)]
    while waiting:
        value, in_deadline = waiting.pop()
        if isinstance(value, list):
            waiting += [(one, in_deadline) for one in value]
        elif isinstance(value, dict):
            yield from _named(value, in_deadline=in_deadline)
            # What a callback is called with names nothing.
            below = ((key, one) for key, one in value.items() if not (in_deadline and key == "kwargs"))
            waiting += [(one, in_deadline or key == "deadline") for key, one in below]


def _named(entry: Mapping[Any, Any], *, in_deadline: bool) -> Iterator[str]:
    match entry:
        case {"trigger_cls": str(path)}:
            yield path
    match entry:
        case {"trigger": {"classpath": str(path)}}:
            yield path
    if in_deadline:
        yield from (entry[key] for key in ("path", "__class_path") if isinstance(entry.get(key), str))

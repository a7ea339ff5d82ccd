"""YAML text, or the Python objects of an executor_config, as a tree that knows source, line and key of every value.

Scalars stay the text that was written: ``no`` is "no" and not False, ``1.10`` is "1.10" and not 1.1. The tree is built
from the parser's events, so that depth and aliases are bounded before objects are made, and no tag ever constructs
anything. A tag or a duplicate key is an error only when its value is used, because a YAML beside a DAG file may hold
keys of other programs too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import yaml

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.effective import Origin

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 32
MAX_ALIASES: Final = 100
# An executor_config has no size on disk, so its values are counted.
MAX_VALUES: Final = 10_000

_PARSER: Final[Any] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_CORE_TAG: Final = "tag:yaml.org,2002:"
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text as written. ``is_null``: nothing was written, or null."""

    text: str
    origin: Origin
    is_null: bool = False


@dataclass(frozen=True, slots=True)
class ListNode:
    items: tuple[Node, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class MapNode:
    """``entries`` keeps the order as written; of a key that stands twice, the last. ``misfits``: keys that are an error."""

    entries: Mapping[str, Node]
    origin: Origin
    misfits: tuple[tuple[Origin, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Tagged:
    """A value with a tag that YAML itself does not define; it has no meaning here."""

    tag: str
    origin: Origin


Node: TypeAlias = Scalar | ListNode | MapNode | Tagged


def scalar(node: Node, *, expected: str = "a single value") -> Scalar:
    """The node as a scalar.

    :raises SettingError: it is a list or a map, or nothing.
    """
    if not isinstance(node, Scalar):
        raise _wrong_kind(node, expected)
    if node.is_null:
        raise node.origin.error("there is no value", hint="Leave the key out to keep what holds without it")
    return node


def list_items(node: Node) -> tuple[Node, ...]:
    """The node's items.

    :raises SettingError: it is not a list.
    """
    if not isinstance(node, ListNode):
        raise _wrong_kind(node, "a list")
    return node.items


def map_items(node: Node) -> Mapping[str, Node]:
    """The node's entries.

    :raises SettingError: it is not a map, or a key stands in it twice.
    """
    if not isinstance(node, MapNode):
        raise _wrong_kind(node, "a map")
    for origin, message in node.misfits:
        raise origin.error(message)
    return node.entries


def parse_yaml(text: str, source: str, *, author: bool) -> Node | None:
    """The one document of a YAML text; None when it is empty.

    :raises SettingError: not YAML, several documents, nested too deeply, or too many aliases.
    """
    builder = _Builder(source, author=author)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            builder.add(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise SettingError(f"this is not YAML: {what}", source=source, line=line) from None
    except yaml.YAMLError as error:
        raise SettingError(f"this is not YAML: {' '.join(str(error).split())}", source=source) from None
    return builder.root


def from_python(value: object, source: str, key: str, *, author: bool) -> Node:
    """Dicts, lists, text, numbers and truth values as the tree that YAML would give.

    :raises SettingError: any other kind of object, nested too deeply, or too many values.
    """
    budget = iter(range(MAX_VALUES))

    def convert(value: object, key: str, depth: int) -> Node:
        origin = Origin(source, key, author=author)
        if depth > MAX_DEPTH:
            raise origin.error(f"nested deeper than {MAX_DEPTH} levels")
        if next(budget, None) is None:
            raise origin.error(f"more than {MAX_VALUES} values")
        if value is None:
            return Scalar("", origin, is_null=True)
        if isinstance(value, bool):
            return Scalar(str(value).lower(), origin)
        if isinstance(value, (str, int, float)):
            return Scalar(str(value), origin)
        if isinstance(value, (list, tuple)):
            items = (convert(item, f"{key}[{index}]", depth + 1) for index, item in enumerate(value))
            return ListNode(tuple(items), origin)
        if isinstance(value, dict):
            entries: dict[str, Node] = {}
            for name, item in value.items():
                if not isinstance(name, str):
                    raise origin.error(f"the key {name!r} is not text")
                entries[name] = convert(item, f"{key}.{name}", depth + 1)
            return MapNode(entries, origin)
        raise origin.error(f"the type {type(value).__name__} can't be a setting; write text, numbers, lists and dicts")

    return convert(value, key, 1)


@dataclass(slots=True)
class _Open:
    """A list or map whose end the parser has not reached yet. ``key`` is a map's key that waits for its value."""

    origin: Origin
    anchor: str | None
    tag: str | None
    entries: dict[str, Node] | None
    items: list[Node] = field(default_factory=list)
    misfits: list[tuple[Origin, str]] = field(default_factory=list)
    key: tuple[str, int] | None = None
    awaits_value: bool = False

    def close(self) -> Node:
        if self.tag:
            return Tagged(self.tag, self.origin)
        if self.entries is None:
            return ListNode(tuple(self.items), self.origin)
        return MapNode(self.entries, self.origin, tuple(self.misfits))


class _Builder:
    """Makes the tree of the events. Not recursive, so that deeply nested input can't exhaust Python's stack."""

    def __init__(self, source: str, *, author: bool) -> None:
        self.root: Node | None = None
        self._source = source
        self._author = author
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._aliases = 0

    def add(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
            raise self._origin("", line).error("a second document begins here; one file holds one document")
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            done = self._open.pop()
            self._place(done.close(), done.anchor)
            return
        if not isinstance(event, yaml.NodeEvent):
            return
        if self._takes_key():
            self._take_key(event, line)
            return
        origin = self._origin_of_next(line)
        if isinstance(event, yaml.AliasEvent):
            self._place(self._aliased(event, origin), None)
        elif isinstance(event, yaml.ScalarEvent):
            self._place(_scalar(event, origin), event.anchor)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) >= MAX_DEPTH:
                raise self._origin("", line).error(f"nested deeper than {MAX_DEPTH} levels")
            entries: dict[str, Node] | None = {} if isinstance(event, yaml.MappingStartEvent) else None
            self._open.append(_Open(origin, event.anchor, _own_tag(event.tag), entries))

    def _takes_key(self) -> bool:
        return bool(self._open) and self._open[-1].entries is not None and not self._open[-1].awaits_value

    def _take_key(self, event: yaml.NodeEvent, line: int) -> None:
        top = self._open[-1]
        if not isinstance(event, yaml.ScalarEvent):
            raise self._origin(top.origin.key, line).error("a key must be a single word, not a list, map or alias")
        if top.entries is not None and event.value in top.entries:
            key = _below(top.origin.key, event.value)
            top.misfits.append((self._origin(key, line), "this key stands here a second time"))
        top.key = (event.value, line)
        top.awaits_value = True

    def _origin_of_next(self, line: int) -> Origin:
        if not self._open:
            return self._origin("", line)
        top = self._open[-1]
        if top.key is not None:
            # The line of a value is that of its key, also when the value begins a line below.
            return self._origin(_below(top.origin.key, top.key[0]), top.key[1])
        return self._origin(f"{top.origin.key}[{len(top.items)}]", line)

    def _aliased(self, event: yaml.AliasEvent, origin: Origin) -> Node:
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise origin.error(f"more than {MAX_ALIASES} aliases")
        if event.anchor not in self._anchors:
            raise origin.error(f"the alias *{event.anchor} has no anchor before it")
        return self._anchors[event.anchor]

    def _place(self, node: Node, anchor: str | None) -> None:
        if anchor:
            self._anchors[anchor] = node
        if not self._open:
            self.root = node
            return
        top = self._open[-1]
        if top.entries is None:
            top.items.append(node)
        elif top.key is not None:
            top.entries[top.key[0]] = node
            top.key, top.awaits_value = None, False

    def _origin(self, key: str, line: int) -> Origin:
        return Origin(self._source, key, line, author=self._author)


def _scalar(event: yaml.ScalarEvent, origin: Origin) -> Node:
    tag = _own_tag(event.tag)
    if tag:
        return Tagged(tag, origin)
    plain = event.style in {None, ""}
    return Scalar(event.value, origin, is_null=plain and event.tag is None and event.value in _NULLS)


def _own_tag(tag: str | None) -> str | None:
    return None if tag is None or tag == "!" or tag.startswith(_CORE_TAG) else tag


def _below(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _wrong_kind(node: Node, expected: str) -> SettingError:
    if isinstance(node, Tagged):
        return node.origin.error(f"the tag {node.tag} has no meaning here")
    if isinstance(node, Scalar):
        found = "nothing" if node.is_null else f"the single value {_shortened(node.text)!r}"
    else:
        found = "a list" if isinstance(node, ListNode) else "a map"
    return node.origin.error(f"{expected} belongs here, and this is {found}")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"

"""A layer: a section of airflow.cfg, or a map of a document, as flat keys with their values and origins.

Maps and volumes are flat as well (``environment.REGION``, ``labels.team``, ``volumes./data``). So ``{**lower, **upper}``
lays one layer over another: maps merge by name, volumes by target, and everything else is replaced.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from airflow_isolation.errors import SettingError
from airflow_isolation.settings import formats
from airflow_isolation.settings.declarations import (
    ENVIRONMENT_SUFFIX,
    KEYS,
    LABELS_SUFFIX,
    Key,
    Place,
    author_keys,
    keys_of,
    known_sections,
)
from airflow_isolation.settings.document import Node, list_items, map_items, parse_yaml, scalar
from airflow_isolation.settings.effective import Origin, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from airflow_isolation.settings.airflow_configuration import Configuration, ConfiguredValue

_SEPARATORS: Final = re.compile(r"[,\n]")
_OURS: Final = re.compile(r"(?:^|_)(?:container|containerd|docker)_runtime")


class Assignment(NamedTuple):
    """A parsed value and where it was written."""

    value: Any
    origin: Origin


Layer = dict[str, Assignment]


def section_layer(configuration: Configuration, section: str) -> Layer:
    """What a section and its two siblings (labels and environment variables) say. An empty value counts as not set.

    :raises SettingError: unknown key, or a value that doesn't parse.
    """
    layer = declared_layer(configuration, section)
    for name, configured in configuration.section(section + LABELS_SUFFIX).items():
        layer[f"labels.{name}"] = _named(name, configured, formats.check_label)
    for name, configured in configuration.section(section + ENVIRONMENT_SUFFIX).items():
        layer[f"environment.{name.upper()}"] = _named(name.upper(), configured, formats.check_environment)
    return layer


def declared_layer(configuration: Configuration, section: str) -> Layer:
    """What a section says, without siblings.

    :raises SettingError: unknown key, or a value that doesn't parse.
    """
    keys = {key.name: key for key in keys_of(section)}
    layer: Layer = {}
    for name, configured in configuration.section(section).items():
        origin = Origin(configured.source, name)
        if name not in keys:
            raise _unknown_option(section, origin, keys)
        text = configured.text.strip()
        if text:
            layer[name] = Assignment(_parse(keys[name], text, origin), origin)
    return layer


def check_section_names(configuration: Configuration) -> None:
    """Find sections whose names are nearly ours: they are mistakes, because nothing in them would be read.

    :raises SettingError: such a section exists.
    """
    known = known_sections()
    for section in configuration.sections():
        if section not in known and _OURS.search(section.lower()):
            raise SettingError(
                "this section is not read by anything", source=f"[{section}]", hint=_suggestion(section, known)
            )


def default_layer(keys: Iterable[Key]) -> Layer:
    """The declared defaults."""
    origin = Origin("default")
    return {key.name: Assignment(_parse(key, key.default, origin), origin) for key in keys if key.default}


def document_layer(node: Node) -> Layer:
    """What a map of DAG metadata or an executor_config says; ``tasks`` must have been taken out.

    :raises SettingError: unknown key, wrong kind, or a value that doesn't parse.
    :raises PolicyRefused: a key that only the administrator can set.
    """
    keys = {key.name: key for key in author_keys()}
    layer: Layer = {}
    for name, value in map_items(node).items():
        key = keys.get(name)
        if name == "resources":
            layer.update(_resources(value))
        elif key is None or key.group:
            raise _unknown_name(name, value.origin)
        elif key.name == "volumes":
            layer.update(volumes_layer(value))
        elif key.is_map:
            check = formats.check_label if name == "labels" else formats.check_environment
            for entry, assignment in _texts(value).items():
                layer[f"{name}.{entry}"] = _checked(entry, assignment, check)
        else:
            layer[name] = _value(key, value)
    return layer


def volumes_layer(node: Node) -> Layer:
    """A list of volumes.

    :raises SettingError: not a list, or one of them is wrong.
    """
    layer: Layer = {}
    for item in list_items(node):
        text = scalar(item, expected="a volume such as /data/sales:/data:ro")
        volume: Volume = _guarded(formats.parse_volume, text.text, text.origin)
        layer[f"volumes.{volume.target}"] = Assignment(volume, text.origin)
    return layer


def volume_file_layer(path: Path, origin: Origin) -> Layer:
    """The volumes of the administrator's ``volume_mount_yaml``; ``origin`` is where its path was written.

    :raises SettingError: the file can't be read, or is not a list of volumes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise origin.error(f"{path} can't be read: {_reason(error)}") from None
    node = parse_yaml(text, str(path), author=False)
    return volumes_layer(node) if node is not None else {}


def _resources(node: Node) -> Layer:
    keys = {key.name: key for key in author_keys() if key.group == "resources"}
    layer: Layer = {}
    for name, value in map_items(node).items():
        if name not in keys:
            raise value.origin.error(f"unknown key {name!r}", hint=_suggestion(name, keys))
        layer[name] = _value(keys[name], value)
    return layer


def _value(key: Key, node: Node) -> Assignment:
    if key.is_list:
        items = [scalar(item) for item in list_items(node)]
        return Assignment(tuple(_guarded(key.parse, item.text, item.origin) for item in items), node.origin)
    text = scalar(node)
    return Assignment(_guarded(key.parse, text.text, text.origin), text.origin)


def _texts(node: Node) -> dict[str, Assignment]:
    found: dict[str, Assignment] = {}
    for name, value in map_items(node).items():
        if getattr(value, "is_null", False):
            raise value.origin.error("there is no value", hint='For empty text write ""')
        found[name] = Assignment(scalar(value, expected="text").text, value.origin)
    return found


def _named(name: str, configured: ConfiguredValue, check: Callable[[str, str], None]) -> Assignment:
    return _checked(name, Assignment(configured.text, Origin(configured.source, name)), check)


def _checked(name: str, text: Assignment, check: Callable[[str, str], None]) -> Assignment:
    try:
        check(name, text.value)
    except ValueError as error:
        raise text.origin.error(str(error)) from None
    return text


def _parse(key: Key, text: str, origin: Origin) -> Any:
    if not key.is_list:
        return _guarded(key.parse, text, origin)
    items = (item.strip() for item in _SEPARATORS.split(text))
    return tuple(_guarded(key.parse, item, origin) for item in items if item)


def _guarded(parse: Callable[[str], Any], text: str, origin: Origin) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise origin.error(str(error)) from None


def _unknown_option(section: str, origin: Origin, keys: Iterable[str]) -> SettingError:
    elsewhere = [key for key in KEYS if key.name == origin.key.lower()]
    if not elsewhere:
        hint = _suggestion(origin.key, keys)
    elif elsewhere[0].name in {"environment", "labels"}:
        hint = f"Write them into the section [{section}_{origin.key.lower()}], a line each"
    elif Place.DOCUMENT in elsewhere[0].places:
        hint = "Write volumes into a YAML file, and its path as volume_mount_yaml"
    elif origin.key != origin.key.lower() and origin.key.lower() in keys:
        hint = f"Keys are written in small letters: {origin.key.lower()}"
    else:
        hint = f"It belongs in {' or '.join(place.value for key in elsewhere for place in key.places)}"
    return origin.error(f"unknown key {origin.key!r} in [{section}]", hint=hint)


def _unknown_name(name: str, origin: Origin) -> SettingError:
    declared = [key for key in KEYS if key.name == name]
    if not declared:
        return origin.error(f"unknown key {name!r}", hint=_suggestion(name, _author_names()))
    if declared[0].author:
        group = declared[0].group
        return origin.error(f"unknown key {name!r} at this place", hint=f"Write it as {group}: {{{name}: …}}")
    places = " or ".join(place.value for key in declared for place in key.places)
    return origin.refusal(f"only the administrator can set {name}, in airflow.cfg, {places}")


def _author_names() -> list[str]:
    return [*(key.name for key in author_keys() if not key.group), "resources", "tasks"]


def _suggestion(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(names)}"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"

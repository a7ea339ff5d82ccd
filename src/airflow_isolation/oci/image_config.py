"""The configuration of an image: what it says about the container that is made from it.

Source: OCI image-spec, config.md; Docker's image configuration has the same shape.
"""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import no_strings
from airflow_isolation.errors import ImageInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

# Registries refuse manifests above 4 MiB; a configuration is smaller.
MAX_CONFIG_SIZE = 4 * 1024 * 1024

# Each is a mount in every container; no image in use has a tenth of them.
_MAX_VOLUMES = 100

# RFC 3339 with up to nanoseconds, which datetime can't hold.
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What an image says. ENTRYPOINT and CMD are left out, because they are never run.

    ``env`` keeps the image's order. ``user`` is as in a Dockerfile's USER; empty means root. ``volumes`` are absolute, clean
    paths, of which none is the root.
    """

    architecture: str
    os: str = "linux"
    variant: str = ""
    created: datetime | None = None
    env: Mapping[str, str] = field(default_factory=no_strings)
    working_dir: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=no_strings)
    volumes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> ImageConfig:
        """Read the JSON of an image configuration.

        :raises ImageInvalid: larger than 4 MiB, not JSON, or a field is not what the image-spec says.
        """
        if len(content) > MAX_CONFIG_SIZE:
            raise ImageInvalid(
                f"the image's configuration has {len(content)} bytes; more than {MAX_CONFIG_SIZE} are not read"
            )
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ImageInvalid(f"the image's configuration is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ImageInvalid("the image's configuration is not a JSON object")
        config = document.get("config") or {}
        if not isinstance(config, dict):
            raise ImageInvalid("the image's configuration is broken: config is not an object")
        architecture = _text(document, "architecture")
        if not architecture:
            raise ImageInvalid("the image's configuration does not say for which architecture it is made")
        return cls(
            architecture=architecture,
            os=_text(document, "os") or "linux",
            variant=_text(document, "variant"),
            created=_timestamp(_text(document, "created")),
            env=_environment(config.get("Env") or []),
            working_dir=_text(config, "WorkingDir"),
            user=_text(config, "User"),
            labels=_labels(config.get("Labels") or {}),
            volumes=_volumes(config.get("Volumes") or {}),
        )


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    return _clean(value, key)


def _clean(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ImageInvalid(f"the image's configuration is broken: {key} holds {type(value).__name__}, not text")
    if "\0" in value:
        raise ImageInvalid(f"the image's configuration is broken: {key} holds a NUL character")
    return value


def _environment(entries: Any) -> dict[str, str]:
    if not isinstance(entries, list):
        raise ImageInvalid("the image's configuration is broken: Env is not a list")
    environment: dict[str, str] = {}
    for entry in entries:
        name, _, value = _clean(entry, "Env").partition("=")
        if not name:
            raise ImageInvalid("the image's configuration is broken: Env holds an entry without a name")
        environment[name] = value
    return environment


def _labels(labels: Any) -> dict[str, str]:
    if not isinstance(labels, dict):
        raise ImageInvalid("the image's configuration is broken: Labels is not an object")
    return {key: _clean(value, "Labels") for key, value in labels.items()}


def _volumes(volumes: Any) -> tuple[str, ...]:
    if not isinstance(volumes, dict):
        raise ImageInvalid("the image's configuration is broken: Volumes is not an object")
    if len(volumes) > _MAX_VOLUMES:
        raise ImageInvalid(f"the image has {len(volumes)} volumes; more than {_MAX_VOLUMES} are not mounted")
    paths = {"/" + posixpath.normpath(f"/{_clean(path, 'Volumes')}").lstrip("/") for path in volumes}
    return tuple(sorted(paths - {"/"}))


def _timestamp(text: str) -> datetime | None:
    if not text:
        return None
    found = _TIMESTAMP.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        seconds, fraction, zone = found[1], (found[2] or "0")[:6].ljust(6, "0"), found[3]
        offset = "+00:00" if zone == "Z" else zone
        return datetime.fromisoformat(f"{seconds}.{fraction}{offset}").astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise ImageInvalid(f"the image's configuration is broken: created is {text[:40]!r}, not a time") from error

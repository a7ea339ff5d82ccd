"""What a zygote may be made of, by who wrote it.

A zygote with privilege on the host is made of administrators' settings and of the image alone: no word of a DAG's
author is in its environment, its arguments, its user or its capabilities. A zygote in a user namespace is nobody on the
host, so it may be made of what authors wrote, too.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_isolation.settings.effective import EffectiveSettings

#: Variables of these names are read when Python starts or a library is imported: what a fork inherits from its zygote.
READ_AT_IMPORT: Final = (
    "PYTHON",
    "AIRFLOW",
    "_AIRFLOW",
    "LD_",
    "LC_",
    "LANG",
    "TZ",
    "MALLOC_",
    "GLIBC_",
    "OPENSSL_",
    "OTEL_",
    "PYDANTIC_",
    "SQLALCHEMY_",
)

# What else of a workload its zygote has, too.
_SHARED: Final = ("python", "timezone", "run_as_user", "capabilities", "seccomp_profile")


def authors_part(settings: EffectiveSettings) -> tuple[str, ...]:
    """The settings that a zygote of this workload would need, and that the DAG's author wrote, with the place of each."""
    return tuple(f"{name} ({settings.origins[name]})" for name in _needed(settings) if settings.origins[name].author)


def zygote_environment(settings: EffectiveSettings, *, privileged: bool) -> Mapping[str, str]:
    """What the zygote gets of the variables that are set for the workload.

    A zygote that is ``privileged`` on the host gets the administrator's alone, whatever their names are good for.
    """
    return MappingProxyType(
        {
            name: value
            for name, value in settings.environment.items()
            if name.startswith(READ_AT_IMPORT) and not (privileged and settings.origins[f"environment.{name}"].author)
        }
    )


def _needed(settings: EffectiveSettings) -> Iterator[str]:
    for name in _SHARED:
        if name in settings.origins:
            yield name
    for name in settings.environment:
        if name.startswith(READ_AT_IMPORT):
            yield f"environment.{name}"

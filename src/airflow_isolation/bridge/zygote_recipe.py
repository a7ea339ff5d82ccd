"""Which settings a zygote may be made of, depending on who wrote them.

A zygote with privilege on the host is made of the administrator's settings and the image only. Nothing that a DAG's author
wrote is in its environment, its arguments, its user or its capabilities. A zygote in a user namespace has no rights on the
host, so authors' settings are allowed there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_isolation.settings.effective import EffectiveSettings

#: Variables that are read when Python starts or a library is imported. A fork inherits the effect from its zygote.
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

# The other settings of a workload that its zygote has too.
_SHARED: Final = ("python", "timezone", "run_as_user", "capabilities", "seccomp_profile")


def authors_part(settings: EffectiveSettings) -> tuple[str, ...]:
    """The settings that a zygote of this workload needs and that the DAG's author wrote, each with its place."""
    return tuple(f"{name} ({settings.origins[name]})" for name in _needed(settings) if settings.origins[name].author)


def zygote_environment(settings: EffectiveSettings, *, privileged: bool) -> Mapping[str, str]:
    """The variables of the workload that its zygote gets.

    A zygote that is ``privileged`` on the host gets only those that the administrator set, whatever their names.
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

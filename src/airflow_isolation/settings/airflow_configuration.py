"""What airflow.cfg and the AIRFLOW__ environment variables say, and where.

Airflow's ``conf`` tells origins only by ``as_dict``, which reads every option of Airflow and takes longer than starting
a container. So this module looks for what is set in both places itself: the file (``conf`` is a ConfigParser) and the
environment. The value of a declared key then comes from ``conf.get``, by Airflow's own rules.
"""

from __future__ import annotations

import os
from configparser import ConfigParser, InterpolationError
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.declarations import is_free

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow.configuration import AirflowConfigParser

_PREFIX: Final = "AIRFLOW__"
#: How the ``source`` of a value from the file ends.
IN_FILE: Final = "in airflow.cfg"


class ConfiguredValue(NamedTuple):
    """A value that somebody set, as text, and the section or environment variable it stands in."""

    text: str
    source: str


class Configuration(Protocol):
    """What the administrator configured. Defaults are not in it: those are in ``declarations``."""

    def sections(self) -> Iterable[str]:
        """Names of the sections that hold something."""

    def section(self, name: str) -> Mapping[str, ConfiguredValue]:
        """What is set in a section; empty when nothing is."""


class AirflowConfiguration:
    """A ``Configuration`` of Airflow's ``conf``. Each section is read once, so make a new one after a change."""

    def __init__(self, conf: AirflowConfigParser) -> None:
        self._conf = conf
        self._variables: dict[str, dict[str, str]] = {}
        self._sections: dict[str, Mapping[str, ConfiguredValue]] = {}
        for variable in os.environ:
            if variable.startswith(_PREFIX):
                section, separator, key = variable.removeprefix(_PREFIX).partition("__")
                if separator and key:
                    self._variables.setdefault(section.lower(), {})[key.lower()] = variable

    def sections(self) -> Iterable[str]:
        return dict.fromkeys((*self._conf.sections(), *self._variables))

    def section(self, name: str) -> Mapping[str, ConfiguredValue]:
        if name not in self._sections:
            self._sections[name] = self._read(name)
        return self._sections[name]

    def _read(self, name: str) -> Mapping[str, ConfiguredValue]:
        variables = self._variables.get(name, {})
        found = {key: self._from_file(name, key) for key in self._keys_in_file(name) if key not in variables}
        for key, variable in variables.items():
            text = os.environ[variable] if is_free(name) else self._conf.get(name, key, fallback="")
            found[key] = ConfiguredValue(text, f"environment variable {variable}")
        return found

    def _keys_in_file(self, section: str) -> list[str]:
        if not self._conf.has_section(section):
            return []
        shared = self._conf.defaults()
        return [key for key in self._conf.options(section) if key not in shared]

    def _from_file(self, section: str, key: str) -> ConfiguredValue:
        source = f"[{section}] {IN_FILE}"
        try:
            # conf.get knows small letters only. A key with capitals is refused later, as unknown.
            if is_free(section) or key != key.lower():
                return ConfiguredValue(ConfigParser.get(self._conf, section, key), source)
            return ConfiguredValue(self._conf.get(section, key), source)
        except InterpolationError:
            raise SettingError("a percent sign is written %%", source=source, key=key) from None


def airflow_configuration() -> AirflowConfiguration:
    """This process's Airflow configuration as it is now."""
    # Importing Airflow takes seconds, and what reads the declarations doesn't need it.
    from airflow.configuration import conf

    return AirflowConfiguration(conf)

"""Settings as a test writes them: airflow.cfg's text, a bundle with files, and what resolving them gives."""

from __future__ import annotations

from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from airflow_isolation.settings.airflow_configuration import ConfiguredValue
from airflow_isolation.settings.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from airflow_isolation.settings.effective import EffectiveSettings


class Ini:
    """A Configuration from the text of an airflow.cfg, without Airflow."""

    def __init__(self, text: str = "") -> None:
        self._parser = ConfigParser(interpolation=None)
        self._parser.optionxform = str  # type: ignore[assignment, method-assign]
        self._parser.read_string(text)

    def sections(self) -> Iterable[str]:
        return self._parser.sections()

    def section(self, name: str) -> Mapping[str, ConfiguredValue]:
        if not self._parser.has_section(name):
            return {}
        return {key: ConfiguredValue(text, f"[{name}] in airflow.cfg") for key, text in self._parser[name].items()}


@dataclass
class Bundle:
    """A bundle on disk; ``resolve`` resolves for ``sales.py`` in it."""

    path: Path
    cfg: str = "[container_runtime]\nimage = default:1\n"
    dag_file: Path = field(default_factory=lambda: Path("sales.py"))

    def write(self, text: str, name: str = "sales.yaml") -> Path:
        path = self.path / name
        path.write_text(text)
        return path

    def resolve(self, **more: Any) -> EffectiveSettings:
        arguments: dict[str, Any] = {
            "purpose": "task",
            "backend": "containerd",
            "configuration": Ini(self.cfg),
            "dag_file": self.dag_file,
            "bundle_path": self.path,
            "dag_id": "sales",
            "task_id": "load",
        }
        return resolve(**{**arguments, **more})


class FromCfg(Protocol):
    def __call__(self, cfg: str, **more: Any) -> EffectiveSettings: ...


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path.resolve())


@pytest.fixture
def from_cfg() -> FromCfg:
    """``from_cfg(text)``: the settings of a task by airflow.cfg alone; an image is there unless the text has one."""

    def settings(cfg: str, **more: Any) -> EffectiveSettings:
        arguments: dict[str, Any] = {"purpose": "task", "backend": "containerd", "configuration": Ini(cfg)}
        return resolve(**{**arguments, **more})

    return settings


@pytest.fixture
def ini() -> Callable[[str], Ini]:
    return Ini

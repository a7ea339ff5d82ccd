"""Notes about containers that could not be removed after their end: the next ``prune`` removes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.runtime.interface import ContainerRuntime


def abandon(runtime: ContainerRuntime, id: str, *, state_dir: Path) -> None:
    """Note that the daemon did not remove a container. The next ``prune`` then removes it, although its owner lives."""
    notes = _notes_directory(runtime, state_dir)
    notes.mkdir(parents=True, exist_ok=True)
    (notes / id).touch()


def notes(runtime: ContainerRuntime, state_dir: Path) -> dict[str, Path]:
    """The notes, by the containers' ids."""
    try:
        return {note.name: note for note in _notes_directory(runtime, state_dir).iterdir()}
    except FileNotFoundError:
        return {}


def _notes_directory(runtime: ContainerRuntime, state_dir: Path) -> Path:
    # Two backends may share a state directory. The daemon's own name is not used: one that is down can't be asked.
    return state_dir / "abandoned" / type(runtime).__name__

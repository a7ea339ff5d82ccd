"""Notes of containers that could not be removed when their time had come: the next ``prune`` does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.runtime.interface import ContainerRuntime


def abandon(runtime: ContainerRuntime, id: str, *, state_dir: Path) -> None:
    """Have the next ``prune`` remove a container of ours, although we live: the daemon did not do it."""
    notes = _notes_directory(runtime, state_dir)
    notes.mkdir(parents=True, exist_ok=True)
    (notes / id).touch()


def notes(runtime: ContainerRuntime, state_dir: Path) -> dict[str, Path]:
    """The containers that were abandoned, by id."""
    try:
        return {note.name: note for note in _notes_directory(runtime, state_dir).iterdir()}
    except FileNotFoundError:
        return {}


def _notes_directory(runtime: ContainerRuntime, state_dir: Path) -> Path:
    # Two backends may share a state directory, and a daemon that is away can't be asked who it is.
    return state_dir / "abandoned" / type(runtime).__name__

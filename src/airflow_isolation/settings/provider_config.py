"""The declarations in the form that Airflow's provider info wants: ``airflow config list`` shows them.

Sections for labels and environment variables are left out: their keys can't be declared, since users choose the names.
Airflow lists a section without declared options anyway as soon as somebody has set one.
"""

from __future__ import annotations

from typing import Any

from airflow_isolation.settings.declarations import (
    COMMON_SECTION,
    POLICY_SECTION,
    VERSION_ADDED,
    Key,
    Place,
    keys_of,
    runtime_sections,
)

SECTION_DESCRIPTIONS = {
    "core": "Where tasks run and DAG files are parsed.",
    COMMON_SECTION: "Containers of tasks and of DAG parsing, on both backends. "
    "Labels and environment variables have sections of their own: [container_runtime_labels] and "
    "[container_runtime_environment], and so for each section below that ends in _runtime.",
    "containerd_runtime": "containerd itself, and what overrides [container_runtime] on it.",
    "docker_runtime": "The Docker daemon itself, and what overrides [container_runtime] on it.",
    "task_execution_container_runtime": "What overrides the sections above for tasks.",
    "task_execution_containerd_runtime": "What overrides the sections above for tasks on containerd.",
    "task_execution_docker_runtime": "What overrides the sections above for tasks on Docker.",
    "scheduler_dag_parsing_container_runtime": "What overrides the sections above for DAG parsing.",
    "scheduler_dag_parsing_containerd_runtime": "What overrides the sections above for DAG parsing on containerd.",
    "scheduler_dag_parsing_docker_runtime": "What overrides the sections above for DAG parsing on Docker.",
    POLICY_SECTION: "What DAG metadata and executor_config may set, and which images may be used. "
    "The policy refuses and never rewrites.",
}


def config_sections() -> tuple[str, ...]:
    """Every declared section, in the order of the documentation."""
    return ("core", COMMON_SECTION, *(name for name in runtime_sections() if name != COMMON_SECTION), POLICY_SECTION)


def provider_config() -> dict[str, Any]:
    """The ``config`` of the provider info (airflow/provider_info.schema.json)."""
    return {
        section: {
            "description": SECTION_DESCRIPTIONS[section],
            "options": {key.name: _option(key, section) for key in keys_of(section)},
        }
        for section in config_sections()
    }


def _option(key: Key, section: str) -> dict[str, Any]:
    overrides = Place.EVERYWHERE in key.places and section != COMMON_SECTION
    unset = f" Not set: {key.default_words}." if key.default_words else ""
    return {
        "description": f"Overrides [{COMMON_SECTION}] {key.name}." if overrides else key.description + unset,
        "version_added": VERSION_ADDED,
        "type": "string",
        "example": key.example or None,
        # A default in an overriding section would look as if it were set there. The flags have one, empty, so that
        # conf.get doesn't warn of them.
        "default": None if overrides else key.default or ("" if Place.CORE in key.places else None),
    }

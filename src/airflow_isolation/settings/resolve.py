"""All settings, the weakest first, into EffectiveSettings. Pure except that it reads the YAML files.

1. defaults, for a task Airflow's default_impersonation, then the four sections of airflow.cfg that hold for purpose and backend (``overriding_sections``);
2. the volumes of ``volume_mount_yaml``;
3. the YAML beside the DAG file: ``container``, the backend's key, then their ``tasks`` that match;
4. the task's executor_config: ``container``, then the backend's key;
5. the hook, for the image;
6. the policy, which refuses what authors set in 3 and 4, and the final image.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from airflow_isolation.container_spec import Resources
from airflow_isolation.errors import SettingError
from airflow_isolation.runtime.interface import PullPolicy
from airflow_isolation.settings.airflow_configuration import IN_FILE
from airflow_isolation.settings.dag_metadata import executor_config_metadata, find_document, read_document
from airflow_isolation.settings.declarations import (
    BACKENDS,
    COMMON_SECTION,
    KEYS,
    PARSING_SECTION,
    Place,
    keys_of,
    overriding_sections,
)
from airflow_isolation.settings.effective import (
    ConnectionSettings,
    EffectiveSettings,
    NodeSettings,
    Origin,
    ParsePoolSettings,
    Row,
    Volume,
    ZygoteSettings,
)
from airflow_isolation.settings.formats import parse_user
from airflow_isolation.settings.hook import ask_hook
from airflow_isolation.settings.layers import (
    Assignment,
    Layer,
    check_section_names,
    declared_layer,
    default_layer,
    section_layer,
    volume_file_layer,
)
from airflow_isolation.settings.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.dag_metadata import Document
    from airflow_isolation.settings.effective import Backend, Purpose
    from airflow_isolation.settings.hook import ImageHook

TASK_EXECUTION_FLAG: Final = "task_execution_runtime"
DAG_PARSING_FLAG: Final = "scheduler_dag_parsing_runtime"
DEFAULT_IMPERSONATION: Final = "default_impersonation"

_UNSET: Final = Assignment("", Origin("default"))
_WORKLOAD_KEYS: Final = tuple(
    key
    for key in KEYS
    if not {
        Place.POLICY,
        Place.CORE,
        Place.CONTAINERD,
        Place.DOCKER,
        Place.HOST,
        Place.NODE,
        Place.PARSING,
    }.intersection(key.places)
)
_WORKLOAD_DEFAULTS: Final = default_layer(_WORKLOAD_KEYS)
_HOST_KEYS: Final = {
    backend: tuple(key for key in keys_of(f"{backend}_runtime") if Place.EVERYWHERE not in key.places)
    for backend in BACKENDS
}
_ZYGOTE_KEYS: Final = tuple(key for key in KEYS if Place.HOST in key.places and key.name != "state_dir")
_ZYGOTE_DEFAULTS: Final = default_layer(_ZYGOTE_KEYS)
_HOST_DEFAULTS: Final = {backend: default_layer(keys) for backend, keys in _HOST_KEYS.items()}


def resolve(
    purpose: Purpose,
    backend: Backend,
    *,
    configuration: Configuration,
    dag_file: Path | None = None,
    bundle_path: Path | None = None,
    dag_id: str = "",
    task_id: str = "",
    executor_config: Mapping[str, object] | None = None,
    hook: ImageHook | None = None,
    document: Document | None = None,
) -> EffectiveSettings:
    """What holds for a task, or for the parse of a DAG file.

    :param dag_file: the DAG file, absolute or relative to ``bundle_path``; a file in a zip counts as the zip. If None,
        no DAG metadata is read.
    :param dag_id: for the words of errors only; settings don't depend on it.
    :param task_id: chooses the ``tasks`` entries; ignored for a parse.
    :param hook: ``image_hook()``, or None for no hook.
    :param document: the DAG metadata, where ``find_document`` has found them on behalf of whoever asks; then no ``dag_file``.
    :raises SettingError: a mistake, with source, line and key.
    :raises PolicyRefused: the policy forbids something.
    """
    effective, connection, policy = _configured(purpose, backend, configuration)
    for layer in _author_layers(
        policy,
        purpose,
        backend,
        dag_file=dag_file,
        bundle_path=bundle_path,
        task_id=task_id,
        executor_config=executor_config,
        document=document,
    ):
        effective.update(layer)
    effective["image"] = _final_image(effective.get("image"), purpose, backend, hook, dag_id=dag_id, task_id=task_id)
    policy.check_image(effective["image"])
    return _effective_settings(purpose, connection, effective, policy)


def check_configuration(purpose: Purpose, backend: Backend, *, configuration: Configuration) -> None:
    """Find mistakes in airflow.cfg.

    A component asks at its start, so that the administrator learns of them, not each author.

    :raises SettingError: a mistake in a section that holds for this purpose and backend.
    :raises PolicyRefused: root is configured, and not allowed.
    """
    _configured(purpose, backend, configuration)


def budget(purpose: Purpose, backend: Backend, *, configuration: Configuration) -> Resources:
    """What all workloads of the purpose may have together.

    :raises SettingError: as ``check_configuration``.
    """
    effective, _, _ = _configured(purpose, backend, configuration)
    return _budget(effective)


def resolve_connection(backend: Backend, *, configuration: Configuration) -> ConnectionSettings:
    """How to reach the daemon. Needs no image and no DAG.

    :raises SettingError: a mistake in [container_runtime] or the backend's section.
    """
    check_section_names(configuration)
    layer = declared_layer(configuration, COMMON_SECTION)
    layer.update(declared_layer(configuration, f"{backend}_runtime"))
    return _connection(backend, layer)


def node_settings(configuration: Configuration) -> NodeSettings:
    """Where this host's node is, and who may ask it.

    :raises SettingError: a mistake in [container_runtime].
    """
    keys = tuple(key for key in keys_of(COMMON_SECTION) if Place.NODE in key.places)
    layer = {**default_layer(keys), **declared_layer(configuration, COMMON_SECTION)}
    return NodeSettings(**{key.name: layer[key.name].value for key in keys if key.name in layer})


def parse_pool_settings(configuration: Configuration) -> ParsePoolSettings:
    """How many parse containers there may be, and how long they live.

    :raises SettingError: a mistake in [scheduler_dag_parsing_container_runtime].
    """
    keys = tuple(key for key in keys_of(PARSING_SECTION) if Place.PARSING in key.places)
    layer = {**default_layer(keys), **declared_layer(configuration, PARSING_SECTION)}
    return ParsePoolSettings(**{key.name: layer[key.name].value for key in keys if key.name in layer})


def task_execution_backend(configuration: Configuration) -> Backend | None:
    """[core] task_execution_runtime: where tasks run; None is stock Airflow.

    :raises SettingError: neither empty nor a backend's name.
    """
    return _flag(configuration, TASK_EXECUTION_FLAG)


def dag_parsing_backend(configuration: Configuration) -> Backend | None:
    """[core] scheduler_dag_parsing_runtime: where DAG files are parsed; None is stock Airflow.

    :raises SettingError: neither empty nor a backend's name.
    """
    return _flag(configuration, DAG_PARSING_FLAG)


def default_state_dir() -> Path:
    """Where sockets go when ``state_dir`` is not set."""
    if os.geteuid() == 0:
        return Path("/run/airflow-isolation")
    runtime_dir = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime_dir.is_absolute():
        return runtime_dir / "airflow-isolation"
    return Path(tempfile.gettempdir(), f"airflow-isolation-{os.geteuid()}")


def _configured(
    purpose: Purpose, backend: Backend, configuration: Configuration
) -> tuple[Layer, ConnectionSettings, Policy]:
    """What the administrator says, before any author."""
    check_section_names(configuration)
    policy = Policy.configured(configuration)
    effective = dict(_WORKLOAD_DEFAULTS)
    if purpose == "task":
        effective.update(_default_impersonation(configuration))
    for section in overriding_sections(purpose, backend):
        effective.update(section_layer(configuration, section))
    connection = _connection(backend, effective)
    if "volume_mount_yaml" in effective:
        path, origin = effective["volume_mount_yaml"]
        effective.update(volume_file_layer(Path(path), origin))
    policy.check(effective)
    return effective, connection, policy


def _default_impersonation(configuration: Configuration) -> Layer:
    """[core] default_impersonation: stock Airflow runs tasks as this user by sudo; here the container runs as this user."""
    configured = configuration.section("core").get(DEFAULT_IMPERSONATION)
    text = configured.text.strip() if configured else ""
    if not configured or not text:
        return {}
    origin = Origin(configured.source, DEFAULT_IMPERSONATION)
    try:
        return {"run_as_user": Assignment(parse_user(text), origin)}
    except ValueError as error:
        raise origin.error(str(error), hint="Or set run_as_user in [container_runtime]") from error


def _author_layers(
    policy: Policy,
    purpose: Purpose,
    backend: Backend,
    *,
    dag_file: Path | None,
    bundle_path: Path | None,
    task_id: str,
    executor_config: Mapping[str, object] | None,
    document: Document | None,
) -> Iterable[Layer]:
    if document is None and dag_file is not None:
        document = find_document(dag_file, bundle_path)
    metadata = read_document(document) if document is not None else None
    in_task = executor_config_metadata(executor_config)
    for written in (metadata, in_task):
        if written is None:
            continue
        # Layers for other tasks are checked too: so a parse shows the mistake where Airflow shows import errors.
        for layer in written.everything(backend):
            policy.check(layer)
        yield from written.for_backend(backend, task_id if purpose == "task" else None)


def _final_image(
    image: Assignment | None, purpose: Purpose, backend: Backend, hook: ImageHook | None, *, dag_id: str, task_id: str
) -> Assignment:
    if image is None:
        what = "this task" if task_id else "this DAG file"
        of = f" of the DAG {dag_id}" if task_id and dag_id else ""
        named = f"the task {task_id}{of}" if task_id else (f"the DAG {dag_id}" if dag_id else what)
        sections = overriding_sections(purpose, backend)
        raise SettingError(
            f"no image is configured for {named}",
            source=f"[{COMMON_SECTION}] in airflow.cfg",
            key="image",
            hint=f"Write image = … into [{sections[0]}] (or [{sections[-1]}]) of airflow.cfg, for all DAGs, or "
            '"container: {image: …}" into a YAML file beside the DAG file, for that file',
        )
    return ask_hook(hook, image) if hook is not None else image


def _connection(backend: Backend, layer: Layer) -> ConnectionSettings:
    merged = {**_HOST_DEFAULTS[backend], **layer}
    state_dir = merged.get("state_dir", Assignment(str(default_state_dir()), _UNSET.origin))
    keys = [key.name for key in _HOST_KEYS[backend]]
    values: dict[str, Any] = {name: merged.get(name, _UNSET).value for name in keys}
    rows = [_row("state_dir", state_dir), *(_row(name, merged.get(name, _UNSET)) for name in keys)]
    return ConnectionSettings(backend=backend, state_dir=Path(state_dir.value), rows=tuple(rows), **values)


def _effective_settings(
    purpose: Purpose, connection: ConnectionSettings, effective: Layer, policy: Policy
) -> EffectiveSettings:
    def value(name: str, unset: Any = "") -> Any:
        return effective[name].value if name in effective else unset

    def below(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): found.value for name, found in effective.items() if name.startswith(prefix)}

    image_pull_policy: PullPolicy = value("image_pull_policy")
    volumes: dict[str, Volume] = below("volumes.")
    return EffectiveSettings(
        purpose=purpose,
        connection=connection,
        image=value("image"),
        image_pull_policy=image_pull_policy,
        image_pull_timeout=value("image_pull_timeout"),
        volumes=tuple(volumes.values()),
        environment=MappingProxyType(below("environment.")),
        labels=MappingProxyType(below("labels.")),
        run_as_user=value("run_as_user"),
        allow_root=policy.allow_root.value,
        network=value("network"),
        resources=Resources(
            cpus=value("cpus", None),
            memory=value("memory", None),
            pids=value("pids", None),
            cpu_weight=value("cpu_weight", None),
            cpuset=value("cpuset", None),
            memory_request=value("memory_request", None),
            memory_high=value("memory_high", None),
            memory_swap=value("memory_swap", None),
            io_max=tuple(value("io_max", ())),
            io_weight=value("io_weight", None),
        ),
        budget=_budget(effective),
        shm_size=value("shm_size"),
        tmp_size=value("tmp_size"),
        read_only_root=value("read_only_root"),
        capabilities=frozenset(value("capabilities", ())),
        seccomp_profile=value("seccomp_profile"),
        working_dir=value("working_dir"),
        timezone=value("timezone"),
        hostname=value("hostname"),
        stop_grace_period=value("stop_grace_period"),
        start_timeout=value("start_timeout"),
        python=value("python"),
        parse_mode=value("parse_mode"),
        start_mode=value("start_mode"),
        image_is_trusted=policy.trusts(effective["image"]),
        permissions=policy.permissions,
        zygote=_zygote_settings(effective),
        cgroup_parent=value("cgroup_parent"),
        origins=MappingProxyType({name: found.origin for name, found in effective.items()}),
        rows=_rows(effective, policy, connection),
    )


def _budget(effective: Layer) -> Resources:
    unset = Assignment(None, _UNSET.origin)
    return Resources(
        cpus=effective.get("budget_cpus", unset).value,
        memory=effective.get("budget_memory", unset).value,
        pids=effective.get("budget_pids", unset).value,
    )


def _zygote_settings(effective: Layer) -> ZygoteSettings:
    layer = {**_ZYGOTE_DEFAULTS, **effective}
    return ZygoteSettings(**{key.name: layer[key.name].value for key in _ZYGOTE_KEYS if key.name in layer})


def is_default(row: Row) -> bool:
    """Whether nobody chose this value. Defaults that Airflow itself wrote into a new airflow.cfg count as not chosen."""
    in_file = row.origin.startswith("[") and IN_FILE in row.origin
    return row.origin == str(_UNSET.origin) or (in_file and (not row.value or row[:2] in _default_rows()))


@cache
def _default_rows() -> frozenset[tuple[str, str]]:
    return frozenset(_row(name, found)[:2] for key in KEYS for name, found in default_layer([key]).items())


def _rows(effective: Layer, policy: Policy, connection: ConnectionSettings) -> tuple[Row, ...]:
    rows: list[Row] = []
    for key in _WORKLOAD_KEYS:
        if key.is_map or key.name == "volumes":
            rows += (_row(name, found) for name, found in effective.items() if name.startswith(f"{key.name}."))
        else:
            rows.append(_row(key.name, effective.get(key.name, _UNSET)))
    zygotes = {**_ZYGOTE_DEFAULTS, **effective}
    rows += (_row(key.name, zygotes.get(key.name, _UNSET)) for key in _ZYGOTE_KEYS)
    return (*rows, _row("allow_root", policy.allow_root), *connection.rows)


def _row(name: str, assignment: Assignment) -> Row:
    value = assignment.value
    if isinstance(value, PullPolicy):
        text = value.value
    elif isinstance(value, tuple):
        text = ", ".join(str(item) for item in value)
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value)
    return Row(name, text, str(assignment.origin))


def _flag(configuration: Configuration, name: str) -> Backend | None:
    configured = configuration.section("core").get(name)
    text = configured.text.strip() if configured else ""
    if not configured or not text:
        return None
    for backend in BACKENDS:
        if text == backend:
            return backend
    raise SettingError(
        f"{text!r} is not a container runtime",
        source=configured.source,
        key=name,
        hint=f"Write {' or '.join(BACKENDS)}, or leave it empty for stock Airflow",
    )

"""Reads Airflow's configuration (which options are set, sensitive, or of this host only), and prepares and locks bundles."""

from __future__ import annotations

import logging
import pkgutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


#: Names that ``conf.as_dict`` gives to its sources; the others are defaults of Airflow and its providers.
_SET_BY_PEOPLE = frozenset({"airflow.cfg", "env var"})


def sensitive_options() -> set[tuple[str, str]]:
    """(section, option) of every option that Airflow or a provider declares sensitive."""
    from airflow.configuration import conf

    return set(conf.sensitive_config_values)


def configured_options() -> dict[str, dict[str, str]]:
    """Section → option → value of every option that is set and not at its default, secrets included.

    Commands and secret references (``…_cmd``, ``…_secret``) are not executed or resolved: they stand for sensitive options.
    """
    from airflow.configuration import conf

    everything = conf.as_dict(display_source=True, display_sensitive=True, include_cmds=False, include_secret=False)
    return {
        section: {
            option: str(entry[0])
            for option, entry in options.items()
            if entry[1] in _SET_BY_PEOPLE
            and not option.endswith(("_cmd", "_secret"))
            # Airflow writes all defaults into a new airflow.cfg, so a value there may be a default.
            and str(entry[0]) != str(conf.get_default_value(section, option))
        }
        for section, options in everything.items()
    }


def system_timezone() -> str:
    """The time zone that ``[core] default_timezone = system`` means in this process; empty when it has no name."""
    from airflow.settings import TIMEZONE

    # A time zone that was read from a file (TZ=/etc/localtime) has no name.
    return TIMEZONE.name or ""


def handlers_of_this_host() -> tuple[str, ...]:
    """The handlers in ``[logging] logging_config_class`` that don't write to a stream of their own process."""
    from airflow.configuration import conf

    config = conf.getimport("logging", "logging_config_class")
    handlers = config.get("handlers", {}) if isinstance(config, dict) else {}
    return tuple(str(name) for name, handler in handlers.items() if not _writes_to_a_stream(handler))


def _writes_to_a_stream(handler: Mapping[str, object]) -> bool:
    from airflow.utils.log.file_task_handler import FileTaskHandler

    name = handler.get("class")
    if not isinstance(name, str):
        return False  # a factory, which may do anything
    kind = pkgutil.resolve_name(name)
    # Airflow's own handler opens no file until it is told for which task.
    return issubclass(kind, (logging.StreamHandler, logging.NullHandler, FileTaskHandler)) and not issubclass(
        kind, logging.FileHandler
    )


def sounds_sensitive(option: str) -> bool:
    """Whether Airflow would mask a value of this name. Sections that nobody declares may hold secrets too."""
    from airflow.sdk._shared.secrets_masker import should_hide_value_for_key

    return bool(should_hide_value_for_key(option))  # type: ignore[no-untyped-call]


def local_bundles() -> dict[str, Path]:
    """Name → directory of the bundles that need no fetching. A file in another bundle must be given by its path."""
    from airflow.dag_processing.bundles.local import LocalDagBundle
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    manager = DagBundlesManager()  # type: ignore[no-untyped-call]
    bundles = manager.get_all_dag_bundles()
    return {bundle.name: Path(bundle.path).absolute() for bundle in bundles if isinstance(bundle, LocalDagBundle)}


class BundleNotReady(IsolationError):
    """The files of a DAG bundle could not be brought to this worker."""


@contextmanager
def prepared_bundle(name: str, version: str | None) -> Iterator[Path]:
    """Fetch a bundle's version to this worker, and yield its directory. It is not cleaned up before the block ends.

    :raises BundleNotReady: the bundle is not configured here, or its source can't be reached.
    """
    from airflow.dag_processing.bundles.base import BundleVersionLock
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    try:
        bundle = DagBundlesManager().get_bundle(name, version)  # type: ignore[no-untyped-call]
        bundle.initialize()
        path = bundle.path
    except Exception as error:  # a bundle is an administrator's plug-in, so it may raise anything
        raise BundleNotReady(
            f"The DAG bundle {name!r} (version {version or 'latest'}) could not be prepared on this worker: {error!r}",
            hint="Look at [dag_processor] dag_bundle_config_list, which must be the same here as on the DAG processor",
        ) from error
    with BundleVersionLock(bundle_name=name, bundle_version=version):  # type: ignore[no-untyped-call]
        yield path

"""What Airflow calls sensitive, and the lock on a bundle's version."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


#: Names that ``conf.as_dict`` gives to its sources; the others are defaults of Airflow and its providers.
_SET_BY_PEOPLE = frozenset({"airflow.cfg", "env var"})


def sensitive_options() -> set[tuple[str, str]]:
    """(section, option) of everything that Airflow or a provider declares sensitive."""
    from airflow.configuration import conf

    return set(conf.sensitive_config_values)


def configured_options() -> dict[str, dict[str, str]]:
    """Section → option → value of everything that is set and not left at its default, secrets included.

    Commands and secret references (``…_cmd``, ``…_secret``) are not carried out: they stand for sensitive options.
    """
    from airflow.configuration import conf

    everything = conf.as_dict(display_source=True, display_sensitive=True, include_cmds=False, include_secret=False)
    return {
        section: {
            option: str(entry[0])
            for option, entry in options.items()
            if entry[1] in _SET_BY_PEOPLE and not option.endswith(("_cmd", "_secret"))
        }
        for section, options in everything.items()
    }


@contextmanager
def prepared_bundle(name: str, version: str | None) -> Iterator[Path]:
    """The directory of a bundle's version, initialised on this worker and kept from being cleaned up meanwhile."""
    from airflow.dag_processing.bundles.base import BundleVersionLock
    from airflow.dag_processing.bundles.manager import DagBundlesManager

    bundle = DagBundlesManager().get_bundle(name, version)  # type: ignore[no-untyped-call]
    bundle.initialize()
    with BundleVersionLock(bundle_name=name, bundle_version=version):  # type: ignore[no-untyped-call]
        yield bundle.path

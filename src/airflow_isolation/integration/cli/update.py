"""``airflow containers update``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import Resources
from airflow_isolation.integration.cli.backends import choose, find
from airflow_isolation.integration.cli.outcome import OK, UsageError, command
from airflow_isolation.integration.cli.output import print_record
from airflow_isolation.integration.connection import connect
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.declarations import author_keys
from airflow_isolation.settings.effective import Origin
from airflow_isolation.settings.layers import Assignment
from airflow_isolation.settings.policy import Policy

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    from airflow_isolation.settings.declarations import Key
    from airflow_isolation.settings.layers import Layer

#: The settings that are limits, in the order of their declarations.
KEYS = tuple(key for key in author_keys() if key.group == "resources")


@command
def update_container(arguments: Namespace) -> int:
    """Change limits of a running container, as far as the policy allows.

    The next try has the limits of the settings again.
    """
    layer = limits_layer(vars(arguments))
    if not layer:
        raise UsageError("No limit is given", hint=f"Give {', '.join(map(option, KEYS[:3]))} or another")
    Policy.configured(airflow_configuration()).check(layer)
    found = find(choose(arguments), arguments.id)
    changed = {name: assignment.value for name, assignment in layer.items()}
    with connect(found.connection) as runtime:
        runtime.update(found.container.id, Resources(**changed))
    record = {"backend": found.connection.backend, "container": found.container.id}
    print_record({**record, "changed": {name: _plain(value) for name, value in changed.items()}}, arguments.output)
    return OK


def option(key: Key) -> str:
    """The option's name, such as ``--memory-high``."""
    return f"--{key.name.replace('_', '-')}"


def limits_layer(given: Mapping[str, Any]) -> Layer:
    """The limits of a command line as a layer. The policy holds for them as for authors.

    :raises UsageError: a value is wrong.
    """
    return {
        key.name: Assignment(_parsed(key, given[key.name]), Origin(option(key), author=True))
        for key in KEYS
        if given.get(key.name) is not None
    }


def _parsed(key: Key, text: Any) -> Any:
    try:
        return tuple(map(key.parse, text)) if key.is_list else key.parse(text)
    except ValueError as error:
        raise UsageError(f"{option(key)}: {error}") from None


def _plain(value: Any) -> Any:
    """A value for json: limits of disks become text."""
    if not isinstance(value, tuple):
        return value
    names = ("rbps", "wbps", "riops", "wiops")
    return [
        " ".join(
            [rates.device, *(f"{name}={getattr(rates, name)}" for name in names if getattr(rates, name) is not None)]
        )
        for rates in value
    ]

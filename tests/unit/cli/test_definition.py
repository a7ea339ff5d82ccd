from __future__ import annotations

import sys
from typing import Any

from airflow.cli.cli_config import ActionCommand, GroupCommand

from airflow_isolation.integration.cli import update
from airflow_isolation.integration.cli.definition import get_containers_cli_commands


def commands(group: GroupCommand, path: str = "") -> dict[str, ActionCommand]:
    found: dict[str, ActionCommand] = {}
    for command in group.subcommands:
        name = f"{path}{command.name}"
        found.update(commands(command, f"{name} ") if isinstance(command, GroupCommand) else {name: command})
    return found


def test_the_group_has_these_commands() -> None:
    (group,) = get_containers_cli_commands()
    assert group.name == "containers"
    assert set(commands(group)) == {
        *(
            "list",
            "stats",
            "inspect",
            "logs",
            "node",
            "kill",
            "update",
            "prune",
            "config",
            "test",
            "parse",
            "reserialize",
        ),
        "dag-processor",
        *("images list", "images import", "images remove"),
    }


def test_every_command_says_its_exit_codes() -> None:
    (group,) = get_containers_cli_commands()
    assert all("Exit code" in (command.epilog or "") for command in commands(group).values())


def test_every_command_exists() -> None:
    (group,) = get_containers_cli_commands()
    for command in commands(group).values():
        function: Any = command.func
        (path,) = (cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, str))
        module, _, name = path.rpartition(".")
        __import__(module)
        assert callable(getattr(sys.modules[module], name))


def test_update_has_an_option_for_every_limit_that_can_be_set() -> None:
    (group,) = get_containers_cli_commands()
    flags = {flag for argument in commands(group)["update"].args for flag in argument.flags}
    assert {update.option(key) for key in update.KEYS} <= flags

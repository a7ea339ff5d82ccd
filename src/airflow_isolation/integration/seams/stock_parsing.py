"""Closes stock Airflow's ways to parse DAG files in processes of the host, while the flag is set.

It uses post-import hooks, not a plug-in's listener (``on_starting``). When a listener raises, or a plug-in can't be
imported, Airflow logs that and goes on, and would silently parse on the host. The hooks come with the entry point that
every process of Airflow loads. They run before the command's function, and stop the process with SystemExit, which no
caller catches as an ordinary error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from types import ModuleType

#: The module of the command that parses DAG files; only that command imports it.
COMMAND = "airflow.cli.commands.dag_processor_command"
MANAGER = "airflow.dag_processing.manager"
PROCESS = "airflow.dag_processing.processor"
DAG_COMMANDS = "airflow.cli.commands.dag_command"

#: Commands that would parse in this process, and the commands that do the same in containers.
_INSTEAD = {
    "dag_reserialize": "airflow containers reserialize",
    "dag_report": "airflow containers parse FILE",
}


def replace_manager(command: ModuleType) -> None:
    """Let `airflow dag-processor` make our DAG processor.

    :param command: the module ``COMMAND``, just imported.
    """
    from airflow_isolation.integration.seams.dag_processing import ContainerDagFileProcessorManager

    command.DagFileProcessorManager = ContainerDagFileProcessorManager  # type: ignore[attr-defined]


def refuse_stock_manager(manager: ModuleType) -> None:
    """Refuse a DAG processor of ``airflow.dag_processing.manager`` to any other code of this process."""
    manager.DagFileProcessorManager.__init__ = _refuse


def refuse_stock_process(processor: ModuleType) -> None:
    """The last defence: refuse the function that forks a process for a DAG file. Subclasses that override it keep theirs."""
    processor.DagFileProcessorProcess.start = classmethod(_refuse)


def refuse_commands(commands: ModuleType) -> None:
    """Close the commands that would store what this process makes of the files, or report it as if containers had.

    :param commands: the module ``DAG_COMMANDS``, just imported.
    """
    for name, instead in _INSTEAD.items():
        setattr(commands, name, _refusal(name.replace("dag_", "airflow dags "), instead))


def run_command(arguments: Namespace) -> None:
    """`airflow dag-processor` with these arguments, in containers.

    :raises AirflowNotSupported: the command would not run our DAG processor.
    """
    from airflow.cli.commands import dag_processor_command

    from airflow_isolation.integration.seams.checks import AirflowNotSupported
    from airflow_isolation.integration.seams.dag_processing import ContainerDagFileProcessorManager

    if getattr(dag_processor_command, "DagFileProcessorManager", None) is not ContainerDagFileProcessorManager:
        raise AirflowNotSupported("This Airflow's `dag-processor` command can't be made to parse in containers")
    dag_processor_command.dag_processor(arguments)


def _refusal(command: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise SystemExit(
            f"`{command}` would parse every DAG file in this process, on this host, but [core] "
            f"scheduler_dag_parsing_runtime is set. Use `{instead}`"
        )

    return refuse


def _refuse(*_: object, **__: object) -> NoReturn:
    raise SystemExit(
        "[core] scheduler_dag_parsing_runtime is set, so no DAG file may be parsed outside of a container, but code other "
        "than `airflow dag-processor` tried to. Unset it for stock Airflow"
    )

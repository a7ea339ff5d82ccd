"""Stock Airflow's ways to parse DAG files in this very host's processes, closed while the flag is set.

Why by post-import hooks and not by a plug-in's listener (``on_starting``): Airflow logs what a listener raises and goes
on, and does the same when a plug-in can't be imported, which would be parsing on the host in silence. These hooks come
with the entry point that every process of Airflow loads, run before the command's function does, and stop the process
with SystemExit, which nobody takes for a mere failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable
    from types import ModuleType

#: The command that parses DAG files; imported by nothing else.
COMMAND = "airflow.cli.commands.dag_processor_command"
MANAGER = "airflow.dag_processing.manager"
PROCESS = "airflow.dag_processing.processor"
DAG_COMMANDS = "airflow.cli.commands.dag_command"

#: Commands that would parse here, and what does it in containers.
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
    """Whoever else makes a DAG processor in this process, as ``airflow.dag_processing.manager`` has it, is refused."""
    manager.DagFileProcessorManager.__init__ = _refuse


def refuse_stock_process(processor: ModuleType) -> None:
    """The last line: the function that forks a process for a DAG file. Subclasses that have their own are not touched."""
    processor.DagFileProcessorProcess.start = classmethod(_refuse)


def refuse_commands(commands: ModuleType) -> None:
    """Close those commands that would store what this process makes of the files, or seem to speak for the containers.

    :param commands: the module ``DAG_COMMANDS``, just imported.
    """
    for name, instead in _INSTEAD.items():
        setattr(commands, name, _refusal(name.replace("dag_", "airflow dags "), instead))


def run_command(arguments: Namespace) -> None:
    """`airflow dag-processor` with these arguments, in containers.

    :raises AirflowNotSupported: it would not be our DAG processor that runs.
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
        "[core] scheduler_dag_parsing_runtime is set, so no DAG file may be parsed outside of a container, and something "
        "else than `airflow dag-processor` tried to. Unset it for stock Airflow"
    )

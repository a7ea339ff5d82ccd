"""The arguments of ``airflow containers``. Every ``airflow`` call loads this, so it imports only Airflow's parser."""

from __future__ import annotations

from typing import Any, Final

from airflow.cli.cli_config import (
    ARG_BUNDLE_NAME,
    ARG_DAEMON,
    ARG_DAG_ID,
    ARG_DAG_ID_OPT,
    ARG_DEV,
    ARG_LOG_FILE,
    ARG_NUM_RUNS,
    ARG_OUTPUT,
    ARG_PID,
    ARG_STDERR,
    ARG_STDOUT,
    ARG_TASK_ID,
    ARG_VERBOSE,
    ARG_YES,
    ActionCommand,
    Arg,
    GroupCommand,
    lazy_load_command,
    positive_int,
)


def _argument(*flags: str, **keywords: Any) -> Arg:
    return Arg(flags, **keywords)  # type: ignore[no-untyped-call]


_EXIT_CODES: Final = "Exit code: 0 done, 1 failed, 2 wrong usage."
_PARSE_EXIT_CODES: Final = "Exit code: 0 no import error, 1 import errors or not parsed, 2 wrong usage."
_TEST_EXIT_CODES: Final = "Exit code: 0 the task succeeded, 1 it did not or could not be started, 2 wrong usage."

_BACKEND = _argument(
    "--backend",
    "--runtime",
    help="Ask this daemon (default: what task_execution_runtime and scheduler_dag_parsing_runtime name,\n"
    "or else every daemon that is found)",
    choices=("containerd", "docker"),
)
_CONTAINERD = _argument("--containerd", help="The same as --backend containerd", action="store_true")
_DOCKER = _argument("--docker", help="The same as --backend docker", action="store_true")
_BACKENDS: Final = (_BACKEND, _CONTAINERD, _DOCKER)

_ID = _argument("id", help="The container's id, or as much of its beginning as no other has", metavar="ID")
_IDS = _argument(
    "ids", nargs="*", help="Ids of containers, or beginnings that no others have (default: all that run)", metavar="ID"
)
_NO_STREAM = _argument("--no-stream", help="Show the counters once, and end", action="store_true")
_TASK_ID = _argument("-t", "--task-id", help="The id of the task")
_RUN_ID = _argument("-r", "--run-id", help="The id of the DAG run")
_PURPOSE = _argument(
    "--purpose",
    help="Only containers of tasks, of DAG parsing, zygotes from which tasks are forked, or spare ones",
    choices=("task", "parse", "zygote", "spare"),
)
_ALL = _argument("-a", "--all", help="Those that have ended, too", action="store_true")
_TAIL = _argument(
    "-n",
    "--tail",
    help="Only the last N lines",
    metavar="N",
    type=positive_int(allow_zero=True),  # type: ignore[no-untyped-call]
    default=None,
)
_SIGNAL = _argument("-s", "--signal", help="Name or number of the signal (default: TERM)", default="TERM")
_LIMITS: Final = (
    _argument("--cpus", help="Cores, such as 2, 0.5 or 500m", metavar="N"),
    _argument("--memory", help="Bytes, such as 4Gi", metavar="SIZE"),
    _argument("--pids", help="Processes and threads", metavar="N"),
    _argument("--cpu-weight", help="Share of the processors, 1 to 10000", metavar="N"),
    _argument("--cpuset", help="Processors, such as 0-3,8", metavar="LIST"),
    _argument("--memory-request", help="Memory that the kernel spares (cgroup v2)", metavar="SIZE"),
    _argument("--memory-high", help="Memory from which on it is slowed down (cgroup v2)", metavar="SIZE"),
    _argument("--memory-swap", help="Swap besides memory", metavar="SIZE"),
    _argument(
        "--io-max",
        help="A disk and its limits, such as '8:0 rbps=50Mi'; may be repeated (cgroup v2)",
        metavar="LIMITS",
        action="append",
    ),
    _argument("--io-weight", help="Share of the disks, 1 to 10000 (cgroup v2)", metavar="N"),
)
_DRY_RUN = _argument("-n", "--dry-run", help="Say what would be removed, and remove nothing", action="store_true")
_DAG_FILE = _argument("-f", "--dag-file", help="The DAG file, by its path here or in its bundle", metavar="FILE")
_CONFIG_PURPOSE = _argument(
    "--purpose", help="For a task, or for DAG parsing (default: task)", choices=("task", "parse"), default="task"
)
_ARCHIVE = _argument("archive", help="An image archive (OCI layout, or docker save), as a tar file", metavar="FILE")
_NAME = _argument("--name", help="The image's name, instead of the one in the archive", metavar="REF", default="")
_REFERENCE = _argument("reference", help="The image's name", metavar="REF")
_FILE = _argument("file", help="The DAG file, by its path here or in its bundle", metavar="FILE")
_WHEN = _argument(
    "logical_date_or_run_id", nargs="?", help="The logical date of the DAG run, or the id of an existing run"
)
_TEST_RUN_ID = _argument("-r", "--run-id", help="The id of an existing DAG run, in which the task is then run again")
_MAP_INDEX = _argument("--map-index", help="Mapped task index (default: -1, not mapped)", type=int, default=-1)

_PACKAGE: Final = "airflow_isolation.integration.cli"

_IMAGES = GroupCommand(
    name="images",
    help="Images in the daemon's store",
    subcommands=(
        ActionCommand(
            name="list",
            help="List the images",
            func=lazy_load_command(f"{_PACKAGE}.images.list_images"),
            args=(*_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="import",
            help="Load an image archive and unpack it",
            func=lazy_load_command(f"{_PACKAGE}.images.import_image"),
            args=(_ARCHIVE, _NAME, *_BACKENDS),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="remove",
            help="Remove an image",
            func=lazy_load_command(f"{_PACKAGE}.images.remove_image"),
            args=(_REFERENCE, *_BACKENDS),
            epilog=_EXIT_CODES,
        ),
    ),
)

_CONTAINERS = GroupCommand(
    name="containers",
    help="Containers of tasks and of DAG parsing on this host",
    subcommands=(
        ActionCommand(
            name="list",
            help="List containers",
            description="List the containers of tasks and of DAG parsing on this host, oldest first",
            func=lazy_load_command(f"{_PACKAGE}.listing.list_containers"),
            args=(ARG_DAG_ID_OPT, _TASK_ID, _RUN_ID, _PURPOSE, _ALL, *_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="stats",
            help="Show what running containers use",
            description="Show what running containers use: on a terminal again every second until Ctrl-C, elsewhere once",
            func=lazy_load_command(f"{_PACKAGE}.stats.show_stats"),
            args=(_IDS, _NO_STREAM, *_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="inspect",
            help="Show all that is known of a container",
            func=lazy_load_command(f"{_PACKAGE}.inspection.inspect_container"),
            args=(_ID, *_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="logs",
            help="Print what a container wrote before its task's log began",
            description="Print what a container's first process wrote. What a task writes is in the task's log",
            func=lazy_load_command(f"{_PACKAGE}.logs.print_output"),
            args=(_ID, _TAIL, *_BACKENDS),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="kill",
            help="Send a signal to a container",
            description="Send a signal to a container; TERM lets the task's on_kill run, KILL ends it at once",
            func=lazy_load_command(f"{_PACKAGE}.kill.kill_container"),
            args=(_ID, _SIGNAL, *_BACKENDS),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="update",
            help="Change limits of a running container",
            description="Change limits of a running container. What is not given stays, and the next try has what is set.\n"
            "The administrator's policy holds; less memory than is in use is refused",
            func=lazy_load_command(f"{_PACKAGE}.update.update_container"),
            args=(_ID, *_LIMITS, *_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="prune",
            help="Remove what dead workers left behind",
            description="Remove containers and directories whose worker on this host is gone, and nothing else",
            func=lazy_load_command(f"{_PACKAGE}.prune.prune_leftovers"),
            args=(_DRY_RUN, ARG_YES, *_BACKENDS),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="config",
            help="Show every effective setting, and where it was written",
            description="Show every setting that holds for a task or for the parse of a DAG file, and where it was\n"
            "written: a section of airflow.cfg, an environment variable, a file and line, executor_config, the hook",
            func=lazy_load_command(f"{_PACKAGE}.config.show_settings"),
            args=(_DAG_FILE, ARG_DAG_ID_OPT, _TASK_ID, _CONFIG_PURPOSE, *_BACKENDS, ARG_OUTPUT),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="test",
            help="Run one task in its container, without scheduler and api-server",
            description="Run one task in its container, without scheduler and api-server and without regard to what\n"
            "comes before it, and print its log",
            func=lazy_load_command(f"{_PACKAGE}.task_test.test_task"),
            args=(ARG_DAG_ID, ARG_TASK_ID, _WHEN, _TEST_RUN_ID, _MAP_INDEX, *_BACKENDS),
            epilog=_TEST_EXIT_CODES,
        ),
        ActionCommand(
            name="parse",
            help="Parse a DAG file in its container and show what that gives",
            description="Parse a DAG file in its container, as the DAG processor would, and show what that gives: DAGs,\n"
            "import errors, warnings, and every setting that is not at its default. What the file logs goes to stderr.\n"
            "Nothing is stored",
            func=lazy_load_command(f"{_PACKAGE}.parse.parse_file"),
            args=(_FILE, *_BACKENDS, ARG_OUTPUT),
            epilog=_PARSE_EXIT_CODES,
        ),
        ActionCommand(
            name="reserialize",
            help="Parse all DAG files once, in containers, and store the results",
            description="Parse every file of the DAG bundles once, each in its container, and store the results.\n"
            "What can't be parsed because a daemon or an image is missing stays in the database as it is",
            func=lazy_load_command(f"{_PACKAGE}.dag_processor.reserialize"),
            args=(ARG_BUNDLE_NAME, *_BACKENDS, ARG_VERBOSE),
            epilog=_PARSE_EXIT_CODES,
        ),
        ActionCommand(
            name="dag-processor",
            help="Start a DAG processor that parses in containers",
            description="Start a DAG processor that parses in containers, or not at all; the flag in airflow.cfg need not\n"
            "be set. With the flag, `airflow dag-processor` does the same",
            func=lazy_load_command(f"{_PACKAGE}.dag_processor.run_dag_processor"),
            args=(
                ARG_PID,
                ARG_DAEMON,
                ARG_BUNDLE_NAME,
                ARG_NUM_RUNS,
                ARG_STDOUT,
                ARG_STDERR,
                ARG_LOG_FILE,
                ARG_VERBOSE,
                ARG_DEV,
                *_BACKENDS,
            ),
            epilog=_EXIT_CODES,
        ),
        ActionCommand(
            name="node",
            help="Start this host's node, which makes containers for workers without privilege",
            description="Start this host's node: the one process with privilege, which makes the containers of tasks for\n"
            "workers whose configuration names its socket. It runs until SIGTERM or Ctrl-C; tasks run on",
            func=lazy_load_command(f"{_PACKAGE}.node.serve"),
            args=_BACKENDS,
            epilog=_EXIT_CODES,
        ),
        _IMAGES,
    ),
)


def get_containers_cli_commands() -> list[GroupCommand]:
    """The commands. The key ``cli`` of the provider info names this function."""
    return [_CONTAINERS]

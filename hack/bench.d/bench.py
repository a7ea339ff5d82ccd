"""The benchmarks themselves: hack/bench has made everything ready and runs this in the virtual environment.

A benchmark is a module with ``arguments(parser)`` and ``run(options, directory, undo) -> Report``, named in BENCHMARKS.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from airflow_isolation.errors import IsolationError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "setup"))

import private_daemon  # noqa: E402
from samples import progress  # noqa: E402

BENCHMARKS = {
    "start": "start",
    "slot": "slot",
    "list": "listing",
    "parse": "parse",
    "cgroups": "cgroups",
    "tasks": "tasks",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/bench")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        benchmark = import_module(module)
        command = commands.add_parser(name, help=(benchmark.__doc__ or "").partition(": ")[2].partition("\n")[0])
        command.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
        command.set_defaults(run=benchmark.run)
        benchmark.arguments(command)
    options = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, stop)
    with ExitStack() as undo:
        directory = private_daemon.new_directory("ai-bench-")
        undo.callback(shutil.rmtree, directory)
        try:
            report = options.run(options, directory, undo)
        except (private_daemon.Refused, IsolationError) as error:
            progress.print(str(error), style="red", markup=False)
            return 1
        finally:
            # A second Ctrl-C must not interrupt the cleaning.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    report.show()
    if options.json:
        report.save(options.json)
    return 0


def stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

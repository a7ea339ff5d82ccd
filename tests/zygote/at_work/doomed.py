"""A worker that stops in the middle of starting a task: run as a program, by test_death.py.

doomed.py BACKEND SOCKET NAMESPACE STATE_DIR IMAGE BUNDLE FORM ANSWER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import structlog
from tests.zygote.at_work import conftest

from airflow_isolation.bridge import zygote as zygotes
from airflow_isolation.runtime.connect import connect

# What is logged must not come before the word that the test awaits.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def stop() -> None:
    print("now", flush=True)
    time.sleep(600)


def main() -> None:
    backend, address, namespace, state_dir, image, bundle, form, awaited = sys.argv[1:]
    runtime = connect(backend, socket_path=address, namespace=namespace, state_dir=Path(state_dir))
    worker = conftest.Worker(form, runtime, Path(state_dir), Path(bundle), lambda _: image)
    module: Any = zygotes
    answer, release, start_agent = module._answer, module.release, module.start_agent

    def answered(connection: Any, expected: str) -> int:
        pid: int = answer(connection, expected)
        if expected == awaited:
            stop()
        return pid

    def released(connection: Any, **work: Any) -> None:
        if awaited == "adopted":
            stop()
        release(connection, **work)

    def started(*arguments: Any, **more: Any) -> Any:
        agent = start_agent(*arguments, **more)
        if awaited == "zygote":
            stop()
        return agent

    module._answer, module.release, module.start_agent = answered, released, started
    worker.run("import time; print('it runs', flush=True); time.sleep(600)")
    stop()


if __name__ == "__main__":
    main()

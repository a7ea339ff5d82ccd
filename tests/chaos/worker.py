"""A worker: runs the tasks that it reads, with the code that workers use. A program, which chaos kills.

worker.py FORM RUNTIME_BINARY SOCKET STATE_DIR IMAGE BUNDLE SHARED CGROUP_PARENT; says ``ready``, reads lines of
``NUMBER TRY``, and answers with ``answer NUMBER TRY RESULT MODE``: an exit code, or ``put-off`` where no user code has run;
and how the task was started.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.zygote.at_work import conftest

from airflow_isolation.bridge.backstage import Backstage
from airflow_isolation.bridge.workload import launch
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import MAY_HEAL, IsolationError
from airflow_isolation.runtime.connect import connect

#: Writes who begins and who ends, and holds a lock between: two tries at a time are seen.
PROGRAM = """
import fcntl, os, time
name, trial, shared = {number!r}, {trial!r}, {shared!r}
def witness(word):
    line = f"{{name}} {{trial}} {{word}}\\n".encode()
    file = os.open(f"{{shared}}/witness", os.O_WRONLY | os.O_APPEND)
    os.write(file, line)
    os.close(file)
lock = os.open(f"{{shared}}/lock-{{name}}", os.O_RDWR | os.O_CREAT, 0o666)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    witness("overlap")
witness("begin")
time.sleep({seconds})
witness("end")
"""


def main() -> None:
    form, runtime_binary, address, state_dir, image, bundle, shared, cgroup_parent = sys.argv[1:]
    backend = "docker" if form == "docker" else "containerd"
    # A log line of another thread would run into an answer: all that is printed goes to stderr, where it is kept.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runtime, behind = (
        connect(
            backend,
            socket_path=address,
            namespace="airflow",
            state_dir=Path(state_dir),
            runtime_binary=runtime_binary,
        )
        for _ in range(2)
    )
    worker = conftest.Worker(form, runtime, Path(state_dir), Path(bundle), lambda _: image, runtime_binary)
    backstage = Backstage(behind, state_dir=Path(state_dir))
    volume = Mount(source=shared, target=shared, read_only=False)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        number, trial = line.split()
        seconds = 0.3 + int(number) % 6 * 0.3
        try:
            task = worker.task(cfg=f"cgroup_parent = {cgroup_parent}\nstop_grace_period = 2", volumes=(volume,))
            workload = launch(
                runtime,
                task.launch,
                state_dir=Path(state_dir),
                plan=task.plan,
                relabel=backstage.relabel,
                replenish=partial(backstage.replenish, wanted=2),
            )
        except (*MAY_HEAL, OSError):  # as the coordinator does
            print("answer", number, trial, "put-off", "-", file=answers, flush=True)
            continue
        except IsolationError as error:
            print(f"{number}: {error!r}", file=sys.stderr, flush=True)
            print("answer", number, trial, "not-started", "-", file=answers, flush=True)
            continue
        running = conftest.Running(workload)
        with suppress(OSError):  # what it is then is told by its end
            running.send(PROGRAM.format(number=number, trial=trial, shared=shared, seconds=seconds))
        code = running.finish()
        if code:
            print(f"{number}: {code} {running.stderr}", file=sys.stderr, flush=True)
        for name in ("requests", "stdout", "stderr", "logs"):
            getattr(workload.channels, name).close()
        backstage.release(workload.close)
        print("answer", number, trial, code, running.start_mode, file=answers, flush=True)
    backstage.close()
    runtime.close()


if __name__ == "__main__":
    main()

"""Process 1 of a test's container, in the agent's place: starts a workload as the agent does, then waits and collects.

first.py DIRECTORY PROGRAM: the workload's output is in DIRECTORY/fresh once it has ended.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    directory, program = Path(sys.argv[1]), sys.argv[2]
    # The agent has them too.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        output = os.open(directory / "unfinished", os.O_WRONLY | os.O_CREAT, 0o666)
        spares = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in (null, output, 2, null)]
        for target, descriptor in enumerate(spares):
            os.dup2(descriptor, target)
        os.execve(sys.executable, [sys.executable, program], os.environ)
    os.waitpid(child, 0)
    (directory / "unfinished").rename(directory / "fresh")
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.02)


if __name__ == "__main__":
    main()

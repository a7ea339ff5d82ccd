"""In the zygote's place: forks one process into a container, which becomes PROCESS and runs a program.

Runs as root in the host's pid namespace, in the file system of a container of the same image. Standard input is one
JSON object: namespaces (descriptors of the container's), process, environment, program. What the child prints goes to our
standard output.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_isolation.agent import entry
else:
    import entry  # it lies beside this file


def main() -> None:
    order = json.load(sys.stdin)
    kept = -1
    # Nothing of these may reach the workload.
    os.environ["OF_THE_ZYGOTE"] = "1"
    os.open("/", os.O_RDONLY)
    try:
        entry.enter_namespaces(order["namespaces"])
        if entry.bare_fork():
            os.wait()
            os._exit(0)
        if entry.bare_fork():
            os._exit(0)
        while os.getppid() != 1:
            time.sleep(0.001)
        # They come later, as from a worker.
        worker, child = socket.socketpair()
        socket.send_fds(worker, [b"x"], [0, 1, 2, os.open("/dev/null", os.O_RDWR)])
        kept = fcntl.fcntl(child.detach(), fcntl.F_DUPFD_CLOEXEC, 10)
        entry.become(order["process"], order["environment"], keep=kept)
        with socket.socket(fileno=kept) as child:
            entry.take_up({}, socket.recv_fds(child, 1, 4)[1])
        sys.argv = [order["program"]]
        sys.path[0] = str(Path(order["program"]).parent)
        runpy.run_path(order["program"], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 -- it must not return into the parent's code
        text = f"{type(error).__name__}: {error}\n".encode()
        try:
            os.write(2, text)
        except OSError:  # it had closed its descriptors, and not got its own yet
            os.write(socket.recv_fds(socket.socket(fileno=kept), 1, 4)[1][2], text)
    finally:
        os._exit(127)


if __name__ == "__main__":
    main()

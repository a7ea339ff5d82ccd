"""A worker in a process of its own, as a rule of another user: has the node start one task, and follows it to its end.

`worker.py REQUEST`, a JSON object: ``node`` (the socket's path), ``bundle``, ``program`` (of the stand-in), and what a
test wants otherwise. It prints a JSON line when the task has been started and one when it has ended; a line on stdin is
awaited between the two if there is ``hold``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import struct
import sys
import time
from typing import Any

import structlog

from airflow_isolation.bridge.started_agent import readable
from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import IsolationError
from airflow_isolation.node.client import Started, start_by_node
from airflow_isolation.node.request import StartRequest
from airflow_isolation.settings.dag_metadata import Document
from airflow_isolation.settings.effective import NodeSettings

SECONDS = 120


# What is logged must not come between what is said.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what, default=str) + "\n")
    sys.stdout.flush()


def follow(started: Started) -> dict[str, Any]:
    workload = started.workload
    received = {"stdout": bytearray(), "stderr": bytearray()}
    deadline = time.monotonic() + SECONDS

    def receive() -> None:
        for name, taken in received.items():
            channel = getattr(workload.channels, name)
            while readable(channel) and (chunk := channel.recv(65536)):
                taken.extend(chunk)

    while (code := workload.exit_code()) is None:
        assert time.monotonic() < deadline, "the task does not end"
        receive()
        time.sleep(0.01)
    receive()
    assert workload.ending is not None
    return {
        "code": int(code),
        "usage": dataclasses.asdict(workload.ending.usage),
        "from_outside": workload.ending.from_outside,
        **{name: taken.decode(errors="replace") for name, taken in received.items()},
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    if "descriptors" in asked:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for _ in range(asked["descriptors"]):
            os.open("/dev/null", os.O_RDONLY)
    bundle = asked["bundle"]
    request = StartRequest(
        backend=asked.get("backend", "containerd"),
        airflow=asked["airflow"],
        dag_id="sales",
        task_id="load",
        executor_config={"container": asked.get("written", {})},
        has_document="document" in asked,
        document_source="sales.yaml" if "document" in asked else "",
        labels={"io.airflow.dag_id": "sales", "io.airflow.task_id": "load"},
        forwarded={"AIRFLOW_HOME": "/tmp/.airflow"},
        own={"OF_THIS_TASK": "yes"},
        mounts=(Mount(source=bundle, target=asked.get("target", bundle)),),
        settings_digest="",
    )
    request = dataclasses.replace(request, **asked.get("changed", {}))
    document = Document(asked["document"].encode(), "sales.yaml") if "document" in asked else None
    settings = NodeSettings(
        node=asked["node"], node_timeout=asked.get("timeout", 10), admission=True, admission_timeout=0
    )
    try:
        started = start_by_node(
            settings,
            request,
            sources=[mount.source for mount in request.binds],
            document=document,
            waits=lambda why: say(waits=why) if asked.get("waits") else None,
        )
    except IsolationError as error:
        say(failed=str(error), kind=type(error).__name__)
        return
    workload = started.workload
    program = asked.get("program", "").encode()
    workload.channels.requests.sendall(struct.pack("!I", len(program)) + program)
    say(
        id=workload.container.id,
        pid=workload.container.pid,
        start_mode=workload.start_mode,
        why_fresh=workload.why_fresh,
        grace=started.grace,
        uid=os.geteuid(),
    )
    if asked.get("hold"):
        word = sys.stdin.readline().strip()
        if word == "close":
            workload.close()
            return
        if word.startswith("signal "):
            import signal

            workload.send_signal(signal.Signals(int(word.split()[1])))
    ended = follow(started)
    workload.close()
    say(**ended)


if __name__ == "__main__":
    main()

"""Tasks that misuse the channels between them and their supervisor."""

from __future__ import annotations

import os
import threading

import structlog
from airflow.sdk import dag, task


def write_everything(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


@dag(schedule=None)
def broken_requests() -> None:
    """It breaks the one channel without which a task can't be ended properly."""

    @task
    def garbage() -> None:
        write_everything(0, bytes(range(255, -1, -1)) * 16)
        threading.Event().wait(300)

    garbage()


@dag(schedule=None)
def strange_logs() -> None:
    """Whatever a task writes as a log, it goes on."""

    @task
    def endless_line() -> str:
        print("x" * (3 * 1024 * 1024), end="", flush=True)
        write_everything(3, b"y" * (3 * 1024 * 1024))
        return "went on"

    @task
    def strange_events() -> str:
        structlog.get_logger("strange").info("with a target", target="mine", level="also mine")
        for line in (
            b'{"event": "without a level"}',
            b'{"event": "with a strange level", "level": "shouting"}',
            b'{"event": "with a level that is a list", "level": []}',
            b'{"event": {"not": "text"}, "level": "info", "target": "raw", "timestamp": "yesterday", "logger": 5}',
            b'{"level": "info"}',
            b"not json at all",
            b"[1, 2, 3]",
            b"null",
            b"\xff\xfe\x00\x01",
            b"[" * 100_000,
            b'{"event": "the last", "level": "info"}',
        ):
            write_everything(3, line + b"\n")
        return "went on"

    @task
    def strange_text() -> str:
        write_everything(1, b"\xff\xfe not utf-8 \x1b[31m\x00 end\n")
        write_everything(2, b"\n\n\r\n to stderr\n")
        return "went on"

    endless_line()
    strange_events()
    strange_text()


@dag(schedule=None)
def closed_channels() -> None:
    """Tasks that hang up."""

    @task
    def closes_requests() -> None:
        os.close(0)

    @task
    def closes_logs() -> str:
        os.close(3)
        return "went on"

    closes_requests()
    closes_logs()


broken_requests()
strange_logs()
closed_channels()

"""Tasks that use a known amount, or more memory than they may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from airflow.sdk import dag, task

TOO_MUCH = f"x = b'x' * {2**30}"


def use_too_much_in_a_child() -> None:
    ended = subprocess.run([sys.executable, "-c", TOO_MUCH], check=False)
    assert ended.returncode == -signal.SIGKILL


@dag(schedule=None)
def usage() -> None:
    @task
    def known() -> str:
        filled = b"x" * 100_000_000
        while time.process_time() < 2:
            sum(range(10_000))
        return str(len(filled))

    @task
    def over_its_limit() -> None:
        exec(TOO_MUCH)

    @task
    def killed_from_elsewhere() -> None:
        subprocess.Popen(["sh", "-c", f"kill -9 {os.getpid()}"])
        time.sleep(60)

    @task
    def child_over_the_limit() -> str:
        use_too_much_in_a_child()
        return "went on"

    @task
    def first_a_child_then_killed_from_elsewhere() -> None:
        use_too_much_in_a_child()
        subprocess.Popen(["sh", "-c", f"kill -9 {os.getpid()}"])
        time.sleep(60)

    known()
    over_its_limit()
    killed_from_elsewhere()
    child_over_the_limit()
    first_a_child_then_killed_from_elsewhere()


usage()

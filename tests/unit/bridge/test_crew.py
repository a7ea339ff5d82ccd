"""Threads that do what may block: as many as are needed, no more than allowed, none afterwards."""

from __future__ import annotations

import threading

from airflow_isolation.bridge.crew import Crew


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("crew-")]


def test_no_thread_before_the_first_job_and_none_after_close() -> None:
    crew = Crew("crew", 3)
    assert names() == []
    done = threading.Event()
    crew.do(done.set)
    assert done.wait(10)
    assert crew.close(10)
    assert crew.close(10)
    assert names() == []


def test_never_more_threads_than_allowed_and_every_job_is_done() -> None:
    crew, go, done = Crew("crew", 2), threading.Event(), threading.Semaphore(0)

    def job() -> None:
        go.wait(10)
        done.release()

    for _ in range(5):
        crew.do(job)
    assert len(names()) == 2
    go.set()
    for _ in range(5):
        assert done.acquire(timeout=10)
    assert crew.close(10)


def fails() -> None:
    raise ValueError("on purpose")


def test_a_job_that_raises_ends_no_thread() -> None:
    crew, done = Crew("crew", 1), threading.Event()
    crew.do(fails)
    crew.do(done.set)
    assert done.wait(10)
    assert crew.close(10)


def test_close_waits_no_longer_than_it_may() -> None:
    crew, go = Crew("crew", 1), threading.Event()

    def hangs() -> None:
        go.wait(60)

    crew.do(hangs)
    assert not crew.close(0.05)
    crew.do(lambda: None)  # too late, and no error
    go.set()
    assert crew.close(10)

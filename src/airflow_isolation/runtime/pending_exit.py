"""PendingExit for both backends: a thread waits for the daemon's answer, and a descriptor becomes readable when it comes."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from airflow_isolation.errors import ContainerNotFound, IsolationError, RuntimeUnreachable
from airflow_isolation.runtime.interface import ExitStatus, PendingExit

if TYPE_CHECKING:
    from typing_extensions import Self

# The exit code when it is not known; shims use it in this way.
UNKNOWN_EXIT = 255

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


class ExitQuestion(ABC):
    """How to ask a backend for a container's end. One thread asks, another may cancel."""

    @abstractmethod
    def prepare(self) -> None:
        """Have the daemon register the question, so that no end is missed from now on.

        :raises RuntimeUnreachable: the daemon did not answer; may be called again.
        """

    @abstractmethod
    def answer(self) -> ExitStatus:
        """Block until the container has ended.

        :raises RuntimeUnreachable: the connection broke; call ``prepare`` again.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Make ``prepare`` and ``answer`` return or fail promptly, now and later. May be called twice."""

    @abstractmethod
    def close(self) -> None:
        """Release the connection, when no thread asks any more."""


class WatchedExit(PendingExit):
    """Asks in a thread of its own. After each break of the connection it asks again, until the answer or ``close``."""

    def __init__(self, id: str, question: ExitQuestion) -> None:
        self._question = question
        self._status: ExitStatus | None = None
        self._error: IsolationError | None = None
        self._answered = threading.Event()
        self._closed = threading.Event()
        self._closing = threading.Lock()
        self._readable, self._writable = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name=f"wait-{id}", daemon=True)

    def begin(self) -> Self:
        """Register the question and start the thread. If that fails, everything is released."""
        try:
            self._question.prepare()
            self._thread.start()
        except BaseException:
            self._question.cancel()
            self._release()
            raise
        return self

    def fileno(self) -> int:
        if self._closed.is_set():
            raise ValueError("this wait has been closed")
        return self._readable

    def result(self, timeout: float | None = None) -> ExitStatus:
        if not self._answered.wait(timeout):
            raise TimeoutError("the container has not ended")
        if self._error is not None:
            raise self._error
        if self._status is None:
            raise ValueError("this wait was closed before the container ended")
        return self._status

    def close(self) -> None:
        with self._closing:
            if self._closed.is_set():
                return
            self._closed.set()
            self._question.cancel()
            self._thread.join()
            self._release()

    def _watch(self) -> None:
        try:
            self._ask_until_answered()
        except IsolationError as error:
            self._error = error
        finally:
            self._answered.set()
            # Close the thread's end of the pipe. This makes the other end readable, and can't block or fail.
            os.close(self._writable)

    def _ask_until_answered(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        prepared = True
        while not self._closed.is_set():
            try:
                if not prepared:
                    self._question.prepare()
                    prepared = True
                    pause = _FIRST_PAUSE_SECONDS
                self._status = self._question.answer()
                return
            except ContainerNotFound:
                # It ended and was removed while the daemon could not be asked, so the status is lost.
                self._status = ExitStatus(code=UNKNOWN_EXIT)
                return
            except RuntimeUnreachable:
                prepared = False
                self._closed.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _release(self) -> None:
        self._question.close()
        if self._thread.ident is None:
            os.close(self._writable)
        self._answered.set()
        os.close(self._readable)

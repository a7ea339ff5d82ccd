"""What every call to the daemon has in common: a deadline, headers, retries, and errors in our words.

Two gRPC interceptors. ``Headers`` adds metadata. ``Calls`` does the rest, for blocking calls, futures and streams.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import tenacity

from airflow_isolation.containerd.errors import (
    ClientClosed,
    ClientForked,
    ContainerdError,
    SocketMissing,
    Unavailable,
    from_status,
)
from airflow_isolation.containerd.unix_socket import check_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

NO_DEADLINE = math.inf
"""A call's ``timeout`` that means: wait for ever. For ``Tasks.Wait`` and streams; everything else has a deadline."""

# Calls that may be made twice: they change nothing, or the second finds the work done.
IDEMPOTENT = frozenset(
    {
        *("Containers.Get", "Containers.List", "Containers.ListStream", "Containers.Update"),
        *("Content.Info", "Content.List", "Content.Read", "Content.Status", "Content.ListStatuses", "Content.Update"),
        *("Images.Get", "Images.List", "Images.Update"),
        *("Introspection.Plugins", "Introspection.Server", "Introspection.PluginInfo"),
        *("Leases.List", "Leases.ListResources", "Leases.AddResource"),
        *("Namespaces.Get", "Namespaces.List"),
        *("Snapshots.Stat", "Snapshots.Mounts", "Snapshots.List", "Snapshots.Usage", "Snapshots.Update"),
        *("Tasks.Get", "Tasks.List", "Tasks.ListPids", "Tasks.Metrics", "Tasks.Update"),
        "Version.Version",
    }
)

# gRPC's words for a call that never left this process: to repeat it can't do its work twice.
NEVER_SENT = ("failed to connect to all addresses", "connections to all backends failing")


class CallDetails(NamedTuple):
    """Implements grpc.ClientCallDetails, which is only an interface."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any

    @classmethod
    def of(cls, details: Any) -> CallDetails:
        return cls(
            details.method,
            details.timeout,
            details.metadata,
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )


class EveryKindOfCall(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """One method, ``intercept``, for gRPC's four kinds of calls."""

    def intercept(self, continuation: Callable[..., Any], details: CallDetails, request: Any, *, stream: bool) -> Any:
        """Make the call by ``continuation``. ``stream``: the answer is a stream."""
        raise NotImplementedError

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self.intercept(continuation, CallDetails.of(client_call_details), request, stream=False)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self.intercept(continuation, CallDetails.of(client_call_details), request, stream=True)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self.intercept(continuation, CallDetails.of(client_call_details), request_iterator, stream=False)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self.intercept(continuation, CallDetails.of(client_call_details), request_iterator, stream=True)


class Headers(EveryKindOfCall):
    """Adds metadata to each call."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = tuple(headers.items())

    def intercept(self, continuation: Callable[..., Any], details: CallDetails, request: Any, *, stream: bool) -> Any:  # noqa: ARG002
        metadata = (*(details.metadata or ()), *self._headers)
        return continuation(details._replace(metadata=metadata), request)


class Calls(EveryKindOfCall):
    """Deadline, retries and errors. ``timeout`` and ``retry_for`` in seconds.

    A call by future is repeated too, when its answer is waited for, but only if it changes nothing. Its caller may
    make any other again.
    """

    def __init__(self, *, address: Path, timeout: float, retry_for: float) -> None:
        self._address = address
        self._timeout = timeout
        self._retry_for = retry_for
        self._pid = os.getpid()
        self._closed = False

    def belongs_here(self) -> bool:
        return self._pid == os.getpid()

    def close(self) -> None:
        self._closed = True

    def intercept(self, continuation: Callable[..., Any], details: CallDetails, request: Any, *, stream: bool) -> Any:
        name = call_name(details.method)
        self._refuse_if_unusable(name)
        if details.timeout is None:
            details = details._replace(timeout=self._timeout)
        elif details.timeout == NO_DEADLINE:
            details = details._replace(timeout=None)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: may_be_repeated(error, name)),
            wait=tenacity.wait_exponential(multiplier=0.1, max=1.0),
            stop=tenacity.stop_after_delay(self._retry_for),
            before_sleep=tenacity.before_sleep_log(logger, logging.DEBUG),
            reraise=True,
        )

        def attempt() -> Any:
            answer = continuation(details, request)
            if stream:
                # The first message is fetched here, where the call can still be repeated.
                return OpenCall(answer, name, fetch_first=name in IDEMPOTENT, repair=self._say_why)
            # A blocking call returns something that is done and no iterator; a future of grpcio is always an iterator.
            if hasattr(answer, "__next__"):
                again = (lambda: continuation(details, request)) if name in IDEMPOTENT else None
                return OpenCall(answer, name, repair=self._say_why, again=again, retrying=retrying)
            error = answer.exception()
            if error is not None:
                raise self._say_why(translated(error, name))
            return answer

        return retrying(attempt)

    def _refuse_if_unusable(self, name: str) -> None:
        if not self.belongs_here():
            raise ClientForked(
                f"this client of {self._address} was made by process {self._pid}",
                call=name,
                hint="Make a new one after the fork",
            )
        if self._closed:
            raise ClientClosed(f"the client of {self._address} is closed", call=name)

    def _say_why(self, error: ContainerdError) -> ContainerdError:
        """Find the reason when gRPC only knows that it could not connect."""
        if not was_never_sent(error):
            return error
        try:
            check_socket(self._address)
        except ContainerdError as reason:
            reason.call = error.call
            return reason
        return error


def was_never_sent(error: ContainerdError) -> bool:
    return isinstance(error, Unavailable) and (isinstance(error, SocketMissing) or error.detail.startswith(NEVER_SENT))


def may_be_repeated(error: BaseException, name: str) -> bool:
    return isinstance(error, Unavailable) and (name in IDEMPOTENT or was_never_sent(error))


class OpenCall:
    """A future or a stream of grpcio, but with the errors of this package."""

    def __init__(
        self,
        call: Any,
        name: str,
        *,
        fetch_first: bool = False,
        repair: Callable[[ContainerdError], ContainerdError] = lambda error: error,
        again: Callable[[], Any] | None = None,
        retrying: tenacity.Retrying | None = None,
    ) -> None:
        self._call = call
        self._name = name
        self._repair = repair
        self._again = again
        self._retrying = retrying
        self._failed = False
        self._fetched: list[Any] = []
        if fetch_first:
            self._fetched.extend(itertools.islice(self, 1))

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._call, attribute)

    def __iter__(self) -> OpenCall:
        return self

    def __next__(self) -> Any:
        if self._fetched:
            return self._fetched.pop()
        try:
            return next(self._call)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def result(self, timeout: float | None = None) -> Any:
        """The call's answer.

        :raises ContainerdError: the call failed.
        :raises TimeoutError: there is no answer within ``timeout`` seconds.
        """
        if timeout is not None or self._again is None or self._retrying is None:
            return self._answer(timeout)
        return self._retrying(self._answer_or_ask_again, self._again)

    def _answer_or_ask_again(self, again: Callable[[], Any]) -> Any:
        if self._failed:
            self._call = again()
        try:
            return self._answer(None)
        except ContainerdError:
            self._failed = True
            raise

    def _answer(self, timeout: float | None) -> Any:
        # A future of grpcio that is waited for looks ten times a second whether it is done.
        done = threading.Event()
        self._call.add_done_callback(lambda _: done.set())
        if not done.wait(timeout):
            raise TimeoutError(f"{self._name}: no answer within {timeout} s")
        try:
            return self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
            # ValueError: the channel was closed after we had checked it.
            raise self._translated(error) from error

    def exception(self, timeout: float | None = None) -> ContainerdError | None:
        """The call's error, None when it succeeded.

        :raises TimeoutError: the call has not ended within ``timeout`` seconds.
        """
        try:
            self.result(timeout)
        except ContainerdError as error:
            return error
        return None

    def add_done_callback(self, callback: Callable[[OpenCall], None]) -> None:
        self._call.add_done_callback(lambda _: callback(self))

    def _translated(self, error: BaseException) -> ContainerdError:
        return self._repair(translated(error, self._name))


def call_name(method: str | bytes) -> str:
    """``/containerd.services.tasks.v1.Tasks/Start`` is ``Tasks.Start``."""
    text = method.decode() if isinstance(method, bytes) else method
    return text.rpartition(".")[2].replace("/", ".")


def translated(error: BaseException, name: str) -> ContainerdError:
    if isinstance(error, ContainerdError):
        return error
    if isinstance(error, grpc.Call):
        return from_status(error.code(), error.details(), name)
    if isinstance(error, grpc.FutureCancelledError):
        return from_status(grpc.StatusCode.CANCELLED, "cancelled", name)
    return from_status(None, str(error), name)

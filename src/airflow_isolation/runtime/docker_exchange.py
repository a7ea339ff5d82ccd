"""One HTTP exchange with dockerd on a connection of its own.

The SDK keeps connections in a pool, and some of its calls have no deadline (pull, for example). So this module is used when
an answer comes in pieces, may take for ever, or must be cut off by another thread.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from airflow_isolation.runtime.reachability import unreachable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from typing_extensions import Self


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: str, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self._socket_path = socket_path

    def connect(self) -> None:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(self.timeout)
        try:
            client.connect(self._socket_path)
        except BaseException:
            client.close()
            raise
        self.sock = client


class DockerExchange:
    """Sends one request, then reads the answer's JSON documents as they come. To be used in a ``with`` block, once.

    ``timeout`` is for the whole exchange, in seconds, unless ``wait_for_ever`` is called.
    """

    def __init__(self, socket_path: str, timeout: float) -> None:
        self._socket_path = socket_path
        self._deadline: float | None = time.monotonic() + timeout
        self._connection = _UnixConnection(socket_path, timeout)
        # Keep the socket here: http.client gives its reference away to an answer that ends with the connection.
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._cut = threading.Event()

    def post(self, path: str, *, headers: Mapping[str, str], body: Iterable[bytes] | None = None) -> int:
        """Send the request and read the head of the answer; returns its status.

        :raises RuntimeUnreachable: the connection failed, or the deadline passed.
        """
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            if self._cut.is_set():
                raise ConnectionAbortedError("cut off")
            if body is None:
                self._connection.request("POST", path, headers={"Content-Length": "0", **headers})
            else:
                self._connection.request("POST", path, body=body, headers=dict(headers), encode_chunked=True)
            self._await_next()
            self._response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise unreachable("docker", self._socket_path, _words(error)) from error
        return self._response.status

    def wait_for_ever(self) -> None:
        """Drop the deadline: from now on only ``cut`` ends the exchange."""
        self._deadline = None

    def documents(self) -> Iterator[Any]:
        """The JSON documents of the answer, one a line.

        :raises RuntimeUnreachable: the connection broke, or the deadline passed.
        """
        if self._response is None:
            raise ValueError("nothing was posted")
        while True:
            try:
                self._await_next()
                line = self._response.readline()
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise unreachable("docker", self._socket_path, _words(error)) from error
            if not line:
                return
            if line.strip():
                yield json.loads(line)

    def cut(self) -> None:
        """Break the connection, from any thread; a reader gets RuntimeUnreachable. May be called twice."""
        self._cut.set()
        if self._socket is not None:
            # An error means that the connection was broken or closed already.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_next(self) -> None:
        if self._socket is None:
            raise ValueError("nothing was posted")
        if self._deadline is None:
            self._socket.settimeout(None)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__

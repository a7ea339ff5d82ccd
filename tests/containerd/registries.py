"""Putting images into a registry, and standing between it and the daemon."""

from __future__ import annotations

import base64
import json
import socket
import tarfile
import threading
import urllib.request
from contextlib import suppress
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from tests.conftest import Daemon


def push(archive: Path, registry: Daemon, repository: str, tag: str) -> str:
    """Upload the archive's image through the distribution API; gives the manifest's digest."""
    headers = {}
    if registry.password:
        login = base64.b64encode(f"{registry.user}:{registry.password}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"

    def request(method: str, path: str, data: bytes = b"", media_type: str = "application/octet-stream") -> str:
        url = path if path.startswith("http") else f"http://{registry.address}/v2/{repository}/{path}"
        asked = urllib.request.Request(url, data, {**headers, "Content-Type": media_type}, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return str(answer.headers.get("Location", ""))

    with tarfile.open(archive) as tar:

        def read(name: str) -> bytes:
            return cast("IO[bytes]", tar.extractfile(name)).read()

        def blob(digest: str) -> bytes:
            return read(f"blobs/sha256/{digest.removeprefix('sha256:')}")

        listed = json.loads(read("index.json"))["manifests"][0]
        manifest = blob(listed["digest"])
        for one in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
            place = request("POST", "blobs/uploads/")
            request("PUT", f"{place}{'&' if '?' in place else '?'}digest={one['digest']}", blob(one["digest"]))
        request("PUT", f"manifests/{tag}", manifest, listed["mediaType"])
    return str(listed["digest"])


class Proxy:
    """Passes bytes on to ``target`` (host:port), with TLS towards the client if asked; ``heard`` is what clients said."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.heard = b""
        self._target = target.partition(":")[0], int(target.partition(":")[2])
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with suppress(OSError), plain, socket.create_connection(self._target) as server:
            encrypted = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
            with encrypted as client:
                back = threading.Thread(target=self._pass, args=(server, client), daemon=True)
                back.start()
                self._pass(client, server, listen=True)
                back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, *, listen: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if listen:
                    self.heard += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


class SilentRegistry:
    """Accepts connections and says nothing."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

#!/usr/bin/env bash
# grpc_types.h calls grpc.min_reconnect_backoff_ms "the minimum time between subsequent connection attempts". One would
# lower it, so that a client comes back soon after a server's restart. grpcio 1.72.2 and 1.85.1 use the value as the
# time one attempt may take, until the server's first SETTINGS frame: with 100 ms a server that greets after half a
# second is never reached, though the socket accepts at once. As a pause it does nothing: a socket that nobody listens
# at is tried again after 0.1 s with a minimum of 20 s.
set -euo pipefail

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"

cat >probe.py <<'PROGRAM'
import pathlib
import socket
import sys
import threading
import time

import grpc

EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def connect(name: str, minimum: int, *, listens_after: float, greets_after: float, within: float) -> str:
    path = str(pathlib.Path(name).absolute())
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    accepted: list[socket.socket] = []

    def serve() -> None:
        time.sleep(listens_after)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            accepted.append(connection)
            threading.Timer(greets_after, greet, [connection]).start()

    def greet(connection: socket.socket) -> None:
        try:
            connection.sendall(EMPTY_SETTINGS)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    options = [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", minimum),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    channel = grpc.insecure_channel(f"unix:{path}", options=options)
    try:
        grpc.channel_ready_future(channel).result(timeout=within)
        return "connected"
    except grpc.FutureTimeoutError:
        return "never connected, several attempts" if len(accepted) > 1 else "never connected, one attempt at most"
    finally:
        channel.close()


for title, name, arguments in (
    ("greets after 0.5 s, minimum 100 ms", "a", dict(minimum=100, listens_after=0, greets_after=0.5, within=5)),
    ("greets after 0.5 s, minimum 20 s", "b", dict(minimum=20_000, listens_after=0, greets_after=0.5, within=5)),
    ("listens after 1 s, minimum 20 s", "c", dict(minimum=20_000, listens_after=1, greets_after=0, within=10)),
):
    print(f"{title}: {connect(name, **arguments)}", flush=True)
PROGRAM

expected="greets after 0.5 s, minimum 100 ms: never connected, several attempts
greets after 0.5 s, minimum 20 s: connected
listens after 1 s, minimum 20 s: connected"

changed=
for version in 1.72.2 1.85.1; do
    python3 -m venv "environment-$version"
    "environment-$version/bin/pip" -q install "grpcio==$version"
    echo "grpcio $version"
    mkdir "sockets-$version"
    seen=$(cd "sockets-$version" && "../environment-$version/bin/python" ../probe.py)
    printf '%s\n' "$seen"
    [[ $seen == "$expected" ]] || changed=yes
done

if [[ -z $changed ]]; then
    echo "As described: the minimum between attempts is what one attempt may take, and no pause at all."
else
    echo "This has changed: expected"$'\n'"$expected" >&2
    exit 1
fi

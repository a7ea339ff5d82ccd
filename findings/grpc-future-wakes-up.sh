#!/usr/bin/env bash
# A thread that waits for a call by future, `call.future(request).result()`, should sleep until the answer comes. In grpcio
# 1.72.2 and 1.85.1 it wakes ten times a second to look (grpc/_common.py, wait and MAXIMUM_WAIT_TIMEOUT, so that old Pythons
# could handle signals). Whoever waits for many long calls, one thread each, pays for it all the time: 150 such threads took
# 5 % of a core. A threading.Event that `add_done_callback` sets does not wake.
set -euo pipefail

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"

cat >probe.py <<'PROGRAM'
import pathlib
import threading
import time
from concurrent import futures

import grpc

SECONDS = 5

ended = threading.Event()


def never_soon(request, context):
    ended.wait(60)
    return b""


server = grpc.server(futures.ThreadPoolExecutor(2))
handler = grpc.method_handlers_generic_handler("a", {"B": grpc.unary_unary_rpc_method_handler(never_soon)})
server.add_generic_rpc_handlers((handler,))
address = f"unix:{pathlib.Path('socket').absolute()}"
server.add_insecure_port(address)
server.start()


def naps_while(wait) -> int:
    """How often a thread goes to sleep in these seconds."""
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(1)

    def naps() -> int:
        status = pathlib.Path(f"/proc/self/task/{waiting.native_id}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = naps()
    time.sleep(SECONDS)
    return naps() - before


with grpc.insecure_channel(address) as channel:
    ask = channel.unary_unary("/a/B")
    call = ask.future(b"")
    by_result = naps_while(call.result)
    done = threading.Event()
    call.add_done_callback(lambda _: done.set())
    by_event = naps_while(done.wait)
    ended.set()
    call.result()

print(f"result() sleeps many times in {SECONDS} s: {by_result >= 5 * SECONDS}", flush=True)
print(f"an Event with add_done_callback does: {by_event >= SECONDS}", flush=True)
server.stop(0)
PROGRAM

expected="result() sleeps many times in 5 s: True
an Event with add_done_callback does: False"

changed=
for version in 1.72.2 1.85.1; do
    python3 -m venv "environment-$version"
    "environment-$version/bin/pip" -q install "grpcio==$version"
    echo "grpcio $version"
    seen=$("environment-$version/bin/python" probe.py)
    printf '%s\n' "$seen"
    [[ $seen == "$expected" ]] || changed=yes
    rm -f socket
done

if [[ -z $changed ]]; then
    echo "As described: a thread that waits for a future wakes ten times a second."
else
    echo "This has changed: expected"$'\n'"$expected" >&2
    exit 1
fi

"""Images of these tests: Debian and Python with stand-ins for Airflow, which load in a moment and do what a test wants.

A task of theirs is a Python program: it comes over the requests channel, and runs as ``__main__`` would.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from tests.conformance.archives import derived
from tests.hostile.set_id import SHOWS_ITS_UID
from tests.parse_containers.images import PROCESSOR
from tests.zygote.at_work import hostile

if TYPE_CHECKING:
    from pathlib import Path

AIRFLOW = "3.3.2"
REPOSITORY = "localhost/airflow-isolation/zygote-tests"

SUPERVISOR = """
import os, socket, struct, sys, traceback
def _subprocess_main():
    requests = socket.socket(fileno=0)
    length, = struct.unpack("!I", requests.recv(4, socket.MSG_WAITALL))
    exec(compile(requests.recv(length, socket.MSG_WAITALL), "task", "exec"), {"__name__": "task", "requests": requests})
def _fork_main(requests, stdout, stderr, logs, target):
    code = 0
    try:
        target()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 126
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""

#: Does its harm in the zygote alone: what starts fresh is a healthy Airflow.
IN_THE_ZYGOTE = """
import sys
if sys.argv[1:2] == ["zygote"]:
"""

#: What starts fresh is imported when the test says so.
ELSEWHERE = """
else:
    import os, time
    while os.environ.get("GATE") and not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
"""

#: Notes what its hooks see at a fork, and starts a thread in each child, as libraries do that send telemetry.
HOOKED = """
import os, threading, time
seen = []
def look(when):
    with open("/proc/thread-self/status") as status:
        held = {line.split()[1] for line in status if line.startswith(("CapPrm", "CapEff"))}
    seen.append([when, os.getpid(), os.getuid(), *held])
def in_child():
    look("after_in_child")
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
os.register_at_fork(before=lambda: look("before"), after_in_parent=lambda: look("after_in_parent"), after_in_child=in_child)
"""

#: Finds processes, and whose they are.
LOOKING = """
import os
def uid_of(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Uid:"))
seen = [(int(name), uid_of(name)) for name in os.listdir("/proc") if name.isdecimal()]
"""

#: As long as a real Airflow takes, wherever it is imported.
LONG_IMPORT = """
import time
time.sleep(2)
"""

#: Programs that ``import airflow`` runs in a zygote.
PROGRAMS = {
    "good": "pass",
    "better": "'the same, but another image'",
    "raising": "raise RuntimeError('this Airflow is broken')",
    "hanging": "import time; time.sleep(600)",
    "loud": "print('x' * 10_000_000); sys.stdout.flush()",
    "loud-and-raising": "print('x' * 10_000_000); sys.stdout.flush(); raise RuntimeError('broken')",
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "exiting": "import os; os._exit(9)",
    "hooked": HOOKED,
    "looking": LOOKING,
    "linked": "pass",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "slow": "import time; time.sleep(3)",
    "hostile": "from airflow import hostile; hostile.main()",
    "visited": "pass",
}


#: As images have them that were made from an installed system.
LINKS = {
    "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
    "etc/hosts": "/opt/network/hosts",
    "data": "/opt/data",
}

#: The home of ``closed-home``, where its Airflow lies: files for its user alone, as programs ask for, and a repository.
PRIVATE_FILES = {
    "home/airflow/.pgpass": b"db:5432:sales:me:word\n",
    "home/airflow/.ssh/config": b"Host *\n",
    "home/airflow/repository/.git/HEAD": b"ref: refs/heads/main\n",
}
CLOSED_HOME = (
    ("home/airflow", 0o700),
    ("home/airflow/.pgpass", 0o600),
    ("home/airflow/.ssh", 0o700),
    ("home/airflow/.ssh/config", 0o644),
    ("home/airflow/repository", 0o755),
    ("home/airflow/repository/.git", 0o755),
)


def reference(kind: str) -> str:
    return f"{REPOSITORY}:{kind}"


def stand_in(base: Path, output: Path, kind: str) -> Path:
    """An archive of ``base`` with a stand-in for Airflow; ``without-modules`` has none that a task needs.

    Of ``visited``, which is for tests/hostile, there are parse containers, too.
    """
    packages = (
        "airflow",
        "airflow/dag_processing",
        "airflow/sdk",
        "airflow/sdk/execution_time",
        "airflow/serialization",
    )
    program = PROGRAMS.get(kind, "pass")
    files = {
        **{f"{package}/__init__.py": "" for package in packages},
        "airflow/__init__.py": LONG_IMPORT
        if kind == "long-import"
        else IN_THE_ZYGOTE + "".join(f"    {line}\n" for line in program.splitlines()) + ELSEWHERE,
        "airflow/hostile.py": inspect.getsource(hostile),
        "airflow/sdk/__init__.py": "__all__ = ()\n",
        "airflow/dag_processing/dagbag.py": "",
        "airflow/dag_processing/processor.py": PROCESSOR,
        "airflow/serialization/serialized_objects.py": "",
        "airflow/sdk/execution_time/supervisor.py": SUPERVISOR,
        "airflow/sdk/execution_time/task_runner.py": "",
        f"apache_airflow_core-{AIRFLOW}.dist-info/METADATA": "",
        "apache_airflow_task_sdk-1.3.2.dist-info/METADATA": "",
    }
    if kind == "without-modules":
        del files["airflow/dag_processing/dagbag.py"]
    place, home = ("home/airflow/stand-in", "/home/airflow") if kind == "closed-home" else ("opt/stand-in", "/tmp")
    passwd = f"root:x:0:0:root:/root:/bin/sh\nairflow:x:50000:0:Airflow:{home}:/bin/sh\n"
    return derived(
        base,
        output,
        name=reference(kind),
        config={"User": "airflow", "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", f"PYTHONPATH=/{place}"]},
        files={f"{place}/{path}": text.encode() for path, text in files.items()}
        | {"etc/passwd": passwd.encode()}
        | ({"opt/shows-its-uid": SHOWS_ITS_UID} if kind == "visited" else {})
        | (PRIVATE_FILES if kind == "closed-home" else {}),
        owned=CLOSED_HOME if kind == "closed-home" else (),
        links=LINKS if kind == "linked" else {},
        set_id=("opt/shows-its-uid",),
    )

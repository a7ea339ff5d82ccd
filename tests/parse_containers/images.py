"""Images of these tests: Debian and Python with stand-ins for Airflow, which load in a moment and do what a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.conformance.archives import derived

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

AIRFLOW = "3.3.2"
REPOSITORY = "localhost/airflow-isolation/parse-tests"

#: The child runs the file that the first frame names, as Airflow would, and serialises nothing.
PROCESSOR = """
import json, socket, sys
def _parse_file_entrypoint():
    requests = socket.socket(fileno=0)
    length = int.from_bytes(requests.recv(4), "big")
    file = requests.recv(length).split(b"FILE=")[1].split(b"=FILE")[0].decode()
    exec(compile(open(file).read(), file, "exec"), {"__file__": file, "__name__": "dag"})
"""
SUPERVISOR = """
import os, sys, traceback
def _fork_main(requests, stdout, stderr, logs, target):
    code = 0
    try:
        target()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 126
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""

#: Programs at the top of the stand-in's ``airflow/__init__.py``.
STAND_INS = {
    "good": "",
    "better": "'the same, but another image'",
    "raising": "raise RuntimeError('this Airflow is broken')",
    "hanging": "import time; time.sleep(600)",
    "loud": "import sys; print('x' * 10_000_000); sys.stdout.flush()",
    "loud-and-raising": "import sys; print('x' * 10_000_000); sys.stdout.flush(); raise RuntimeError('broken')",
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "exiting": "import os; os._exit(9)",
}


def reference(kind: str) -> str:
    return f"{REPOSITORY}:{kind}"


def stand_in(base: Path, output: Path, kind: str, *, name: str = "") -> Path:
    """An archive of ``base`` with a stand-in for Airflow."""
    return derived(
        base,
        output,
        name=name or reference(kind),
        config={
            "User": "airflow",
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "PYTHONPATH=/opt/stand-in"],
            "Volumes": {"/spool": {}},
        },
        files={f"opt/stand-in/{path}": text.encode() for path, text in files_of(STAND_INS[kind]).items()}
        | {"etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nairflow:x:50000:0:Airflow:/tmp:/bin/sh\n"},
    )


def files_of(program: str) -> Mapping[str, str]:
    """A directory for sys.path: by path, the text."""
    packages = (
        "airflow",
        "airflow/dag_processing",
        "airflow/sdk",
        "airflow/sdk/execution_time",
        "airflow/serialization",
    )
    return {
        **{f"{package}/__init__.py": "" for package in packages},
        "airflow/__init__.py": program + "\n",
        "airflow/sdk/__init__.py": "__all__ = ()\n",
        "airflow/dag_processing/processor.py": PROCESSOR,
        "airflow/sdk/execution_time/supervisor.py": SUPERVISOR,
        "airflow/sdk/execution_time/task_runner.py": "",
        "airflow/serialization/serialized_objects.py": "",
        f"apache_airflow_core-{AIRFLOW}.dist-info/METADATA": "",
        "apache_airflow_task_sdk-1.3.2.dist-info/METADATA": "",
    }

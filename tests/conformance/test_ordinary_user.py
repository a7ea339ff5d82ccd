"""A worker that is not root, but whose group may use the daemon's socket."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.conftest import IMAGE, NAMESPACE, provide_image

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartDaemon

UID, GID = 12345, 12346

# What is imported is imported as root: the interpreter may lie where nobody else may enter.
WORKER = """
import json, os, sys
from pathlib import Path
from airflow_isolation.container_spec import ContainerSpec, Mount, Resources
from airflow_isolation.errors import IsolationError
from airflow_isolation.oci import load_profile
from airflow_isolation.runtime.connect import connect
# What is loaded with its first use could not be found any more by a user who may not enter root's cache.
import airflow_isolation.runtime.counted, airflow_isolation.runtime.placement
backend, socket_path, state_dir, namespace, image, uid, gid = sys.argv[1:]
runtime = connect(backend, socket_path=socket_path, namespace=namespace, state_dir=Path(state_dir))
runtime.info()
runtime.close()
load_profile("default")
os.setgroups([int(gid)]); os.setgid(int(uid)); os.setuid(int(uid))
said = {}
for user in ("1000:1000", "worker"):
    spec = ContainerSpec(image=image, argv=("bash", "-c", "id -u; exit 5"), user=user, network="none", resources=Resources(pids=50))
    try:
        runtime.create("ordinary", spec)
        with runtime.wait("ordinary") as pending:
            runtime.start("ordinary")
            code = pending.result(60).code
        said[user] = [code, runtime.output("ordinary").decode().strip()]
    except IsolationError as error:
        said[user] = [type(error).__name__, str(error)]
    finally:
        runtime.remove("ordinary")
said["left"] = [container.id for container in runtime.list()]
runtime.close()
print(json.dumps(said))
"""


@pytest.mark.parametrize("backend", ["docker", "containerd-1.6", "containerd-2.1"])
def test_what_needs_no_root_works_and_what_does_is_named(
    backend: str, start_containerd: StartDaemon, start_dockerd: StartDaemon, conformance_archive: Path, state_dir: Path
) -> None:
    kind, _, version = backend.partition("-")
    daemon = start_containerd(version, group=GID) if version else start_dockerd(group=GID)
    provide_image(kind, daemon, conformance_archive)
    place = state_dir / "accounts"
    place.mkdir()
    place.chmod(0o777)
    arguments = (kind, str(daemon.socket), str(place), NAMESPACE, IMAGE, str(UID), str(GID))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["1000:1000"] == [5, "1000"]
    assert said["left"] == []
    if kind == "docker":
        assert said["worker"] == [5, "1000"]
    else:
        assert said["worker"][0] == "SpecRefused"
        assert "root" in said["worker"][1]
    left = {path.name for path in place.rglob("*") if path.parent.name != "containers"}
    # Where containers have been is remembered, for whoever looks for what is left of them.
    assert left <= {"containers", "cgroup-parents", NAMESPACE}
    shutil.rmtree(place)

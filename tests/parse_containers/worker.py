"""A worker that parses one file and is killed: run as a program, by test_worker_death.py.

worker.py BACKEND SOCKET NAMESPACE STATE_DIR IMAGE BUNDLE FILE ID
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.parse_containers import images
from tests.parse_containers.parsing import begin

from airflow_isolation.bridge.parse_container import start_parse_container
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.container_spec import ContainerSpec, Mount
from airflow_isolation.runtime.connect import connect


def main() -> None:
    backend, address, namespace, state_dir, image, bundle, file, id = sys.argv[1:]
    runtime = connect(backend, socket_path=address, namespace=namespace, state_dir=Path(state_dir))
    spec = ContainerSpec(argv=(), image=image, network="none", mounts=(Mount(source=bundle, target=bundle),))
    launch = Launch(
        id=id,
        spec=spec,
        image=runtime.ensure_image(image),
        purpose="parse",
        environment={},
        airflow=images.AIRFLOW,
        start_timeout=600,
    )
    container = start_parse_container(runtime, launch, state_dir=Path(state_dir))
    parse = begin(container, Path(file))
    parse.until(lambda: "up" in parse.stdout)
    print("up", flush=True)
    parse.finish()


if __name__ == "__main__":
    main()

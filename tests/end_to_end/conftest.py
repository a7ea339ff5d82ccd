"""One Airflow for all tests of a backend: real scheduler, LocalExecutor, SQLite, a private daemon, real containers.

    @pytest.mark.dag("exchange")                        # triggered with all others when the backend's Airflow is up
    def test_xcom(run: Run) -> None:                    # the run, once it has ended
        assert run.states == {...}

    def test_something(airflow: Airflow) -> None:       # a test that acts while a task runs
        airflow.trigger("patient", run_id="mine", name="mine")

``on(...)`` chooses the backends of a test. After every test nothing may be left of its containers, and after the last
one nothing at all; ``quiet`` first waits until no task runs, for tests that hurt a daemon or a worker.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.airflow_home import own_cgroup_parent, short_directory
from tests.end_to_end.airflow_processes import SCHEDULER, Airflow, Run, copy_dags, running_airflow
from tests.end_to_end.secrets_of_airflow import secrets_of
from tests.end_to_end.traces import all_but, household, of_containers, traces

from airflow_isolation.bridge.zygote import remove_zygote
from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from tests.conftest import Daemon, ImageArchive, ImageName

KINDS = ("main", "extra", "closed-home", "no-python", "no-airflow", "other-minor")
EVERY_KIND = (*KINDS, "older-extra")
#: What a daemon that was away did not remove, a worker tries again when it looks next (backstage.LOOK_EVERY).
SETTLE_SECONDS = 60
#: How tasks are started: ``fork`` is what an administrator gets who sets nothing. ``hack/test`` runs all in both.
START_MODE = os.environ.get("AIRFLOW_ISOLATION_START_MODE", "fork")
BACKENDS = ("containerd", "docker")
LOCAL_SETTINGS = """
def get_docker_runtime_image(image):
    if image == "breaks/the-hook:1":
        raise LookupError("the hook knows no such image")
    return "{extra}" if image == "wanted/by-the-hook:1" else image
"""

#: Of each log that a test shows when it fails, in characters.
_SHOWN = 5_000


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "dag(dag_id): the DAG whose finished run the fixture `run` gives")
    config.addinivalue_line("markers", "on(*backends): where a test runs; containerd and docker when not given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if START_MODE == "fresh":
        # Stock Airflow has no modes, and how a container is made fresh is in the conformance suite, for Docker too.
        others = [item for item in items if _backend_of(item) not in {None, "containerd"}]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)
    # The first test of a backend waits for images, a daemon, and a whole Airflow.
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(1200))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its tasks, and the components beside them, have said."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for name, said in _said_in(item.funcargs):
            report.sections.append((name, said[-_SHOWN:]))
    return report


def _said_in(fixtures: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    run, airflow = fixtures.get("run"), fixtures.get("airflow")
    if isinstance(run, Run):
        for name, task in run.tasks.items():
            yield f"log of {run.dag_id} {name}, {task.state} at try {task.try_number}", task.text
    if isinstance(airflow, Airflow):
        for output in sorted(airflow.home.glob("*.out")):
            lines = output.read_text(errors="replace").splitlines(keepends=True)
            yield f"output of the {output.stem}", "".join(line for line in lines if "[info " not in line)


def _backend_of(item: pytest.Item) -> str | None:
    case = getattr(item, "callspec", None)
    return str(case.params["backend"]) if case and "backend" in case.params else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs on both backends unless ``@on(...)`` says otherwise."""
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("on")
        metafunc.parametrize("backend", marker.args if marker else BACKENDS, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    with short_directory("ai-e2e-") as directory:
        yield directory


@pytest.fixture(scope="session")
def images(image_name: ImageName) -> dict[str, str]:
    return {kind.replace("-", "_"): image_name(kind) for kind in EVERY_KIND}


@pytest.fixture(scope="session")
def daemon(backend: str, request: pytest.FixtureRequest) -> Daemon | None:
    """The backend's private daemon; None for stock."""
    if backend == "stock":
        return None
    found: Daemon = request.getfixturevalue("private_containerd" if backend == "containerd" else "private_dockerd")
    return found


def provide_images(
    backend: str, daemon: Daemon, state_dir: Path, image_archive: ImageArchive, kinds: Sequence[str] = KINDS
) -> None:
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        for image in kinds:
            runtime.import_image(image_archive(image))


@pytest.fixture(scope="session")
def state_dir(place: Path, backend: str) -> Path:
    directory = place / f"{backend}-state"
    directory.mkdir()
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def cgroup_parent(backend: str) -> Iterator[str]:
    with own_cgroup_parent("ai-e2e-") as name:
        yield name


def options_for(backend: str, daemon: Daemon | None, state_dir: Path, image: str) -> dict[str, str]:
    """What an administrator sets."""
    if daemon is None:
        return {}
    ways = {} if START_MODE == "fork" else {"AIRFLOW__CONTAINER_RUNTIME__START_MODE": START_MODE}
    return {
        **ways,
        # Containerd's tasks live in user namespaces of their own; Docker's zygotes are privileged, and their images trusted.
        "AIRFLOW__CONTAINER_RUNTIME_POLICY__TRUSTED_IMAGES": "localhost/airflow-isolation/*",
        "AIRFLOW__CORE__TASK_EXECUTION_RUNTIME": backend,
        f"AIRFLOW__{backend.upper()}_RUNTIME__SOCKET_PATH": str(daemon.socket),
        "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state_dir),
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE": image,
    }


@pytest.fixture(scope="session")
def airflow(
    *,
    backend: str,
    daemon: Daemon | None,
    place: Path,
    state_dir: Path,
    cgroup_parent: str,
    images: dict[str, str],
    image_archive: ImageArchive,
    request: pytest.FixtureRequest,
) -> Iterator[Airflow]:
    if daemon is not None:
        provide_images(backend, daemon, state_dir, image_archive)
    home, shared = place / f"{backend}-home", place / f"{backend}-shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to("/etc")
    copy_dags(home / "dags", {**images, "shared": str(shared)})
    (home / "dags" / "yaml_nested.yaml").write_text("container:\n  image: " + "[" * 1_000_000)
    home.chmod(0o755)
    (home / "config").mkdir()
    (home / "config" / "airflow_local_settings.py").write_text(LOCAL_SETTINGS.format(**images))
    options = {
        **options_for(backend, daemon, state_dir, images["main"]),
        "AIRFLOW__CONTAINER_RUNTIME__CGROUP_PARENT": cgroup_parent,
        "AIRFLOW__CONTAINER_RUNTIME_POLICY__ALLOWED_MOUNT_SOURCES": str(shared),
        "AIRFLOW__CONTAINER_RUNTIME_POLICY__MAX_MEMORY": "4Gi",
        "AIRFLOW_VAR_FROM_WORKER": "the worker's variable",
        "AIRFLOW_CONN_FROM_WORKER": "postgres://me:secret-of-the-worker@db.example:5433/?sslmode=require",
    }
    with running_airflow(backend, home, shared=shared, options=options) as airflow:
        fill_database(airflow)
        trigger_selected(airflow, request.session)
        airflow.start(SCHEDULER)
        yield airflow
        airflow.wait_until_quiet()
    if daemon is not None:
        end_zygotes(backend, daemon, state_dir)
        assert_nothing_left(daemon, state_dir, cgroup_parent)


def end_zygotes(backend: str, daemon: Daemon, state_dir: Path) -> None:
    """They are nobody's, and live on; every worker has ended and taken its spares with it."""
    with connect(backend, socket_path=str(daemon.socket), namespace="airflow", state_dir=state_dir) as runtime:
        for directory in (state_dir / "zygotes").glob("*"):
            remove_zygote(runtime, directory, state_dir=state_dir)
        runtime.remove_unused_roots()


def fill_database(airflow: Airflow) -> None:
    airflow.call("POST", "/variables", json={"key": "from_database", "value": "the database's variable"})
    airflow.call(
        "POST",
        "/connections",
        json={
            "connection_id": "from_database",
            "conn_type": "http",
            "host": "service.example",
            "login": "me",
            "password": "secret-of-the-database",
            "port": 8443,
            "extra": '{"timeout": 5}',
        },
    )


def trigger_selected(airflow: Airflow, session: pytest.Session) -> None:
    """Begin the runs that the selected tests ask for, all at once: a container's start-up is CPU time, not waiting."""
    asked = ((item.get_closest_marker("dag"), getattr(item, "callspec", None)) for item in session.items)
    here = (marker for marker, case in asked if marker and case and case.params.get("backend") == airflow.backend)
    for dag_id in dict.fromkeys(marker.args[0] for marker in here):
        airflow.wait_for_dag(dag_id)
        airflow.trigger(dag_id, **(CONF[dag_id](airflow) if dag_id in CONF else {}))


#: What a run of a DAG is given.
CONF: dict[str, Callable[[Airflow], dict[str, Any]]] = {
    "probed": lambda airflow: {"needles": secrets_of(airflow)},
}


@pytest.fixture
def run(request: pytest.FixtureRequest, airflow: Airflow) -> Run:
    """The finished run of the DAG that ``@pytest.mark.dag`` names."""
    marker = request.node.get_closest_marker("dag")
    return airflow.finished(marker.args[0])


@pytest.fixture
def quiet(airflow: Airflow) -> None:
    """No task runs now."""
    airflow.wait_until_quiet()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test nothing is left of the containers of its run; when no task runs, nothing at all."""
    if "airflow" not in request.fixturenames or request.getfixturevalue("daemon") is None:
        yield
        return
    host: dict[str, Any] = {name: request.getfixturevalue(name) for name in ("daemon", "state_dir", "cgroup_parent")}
    airflow: Airflow = request.getfixturevalue("airflow")
    run: Run | None = request.getfixturevalue("run") if "run" in request.fixturenames else None
    yield
    if run is not None:
        assert_nothing_left(**host, ids=set(run.containers))
    if "quiet" in request.fixturenames:
        airflow.wait_until_quiet()
        assert_nothing_left(**host)


def assert_nothing_left(daemon: Daemon, state_dir: Path, cgroup_parent: str, *, ids: set[str] | None = None) -> None:
    """Nothing of these containers, or nothing at all, stays for longer than a short while.

    Spares of earlier tasks expire one after the other meanwhile: there need not be a moment at which none is on its way.
    """

    def left() -> dict[str, list[str]]:
        found = traces(daemon, state_dir, cgroup_parent)
        return all_but(found, household(daemon, state_dir)) if ids is None else of_containers(found, ids)

    deadline = time.monotonic() + SETTLE_SECONDS
    stayed = left()
    while stayed and time.monotonic() < deadline:
        time.sleep(0.25)
        now = left()
        stayed = {
            kind: both for kind, before in stayed.items() if (both := [e for e in before if e in now.get(kind, ())])
        }
    assert stayed == {}

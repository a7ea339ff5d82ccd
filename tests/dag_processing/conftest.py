"""One dag-processor for the tests of a backend: real database, a private daemon, real containers, no scheduler.

    def test_something(processor: DagProcessor) -> None:
        processor.write("bad.py", "os._exit(1)")
        assert "exit code 1" in processor.wait_for_error("bad.py")
        processor.assert_parses_on()

After the last test of a backend the dag-processor is told to end, and nothing of it may be left.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.airflow_home import own_cgroup_parent, short_directory
from tests.dag_processing.dag_processor import DagProcessor, dag_processor
from tests.end_to_end.traces import traces

from airflow_isolation.runtime.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Daemon, ImageArchive, ImageName

BACKENDS = ("containerd", "docker")
KINDS = ("main", "extra", "no-python", "no-airflow", "other-minor")
SETTLE_SECONDS = 20
LOCAL_SETTINGS = """
def dag_policy(dag):
    dag.tags.add("seen-by-the-policy")
    if dag.dag_id == "refused_by_the_policy":
        from airflow.exceptions import AirflowClusterPolicyViolation

        raise AirflowClusterPolicyViolation("the policy does not want it")
"""
PLUGIN = """
from airflow.plugins_manager import AirflowPlugin
from airflow.timetables.trigger import CronTriggerTimetable


class TimetableOfThePlugin(CronTriggerTimetable):
    def __init__(self):
        super().__init__("0 5 * * *", timezone="UTC")

    def serialize(self):
        return {}

    @classmethod
    def deserialize(cls, data):
        return cls()


class PluginOfTheTest(AirflowPlugin):
    name = "plugin_of_the_test"
    timetables = [TimetableOfThePlugin]
"""

VERSIONED_BUNDLE = """
import pathlib, shutil

from airflow.dag_processing.bundles.base import BaseDagBundle, BundleVersion


class VersionedBundle(BaseDagBundle):
    supports_versioning = True

    def __init__(self, *, source, **more):
        super().__init__(**more)
        self.source = pathlib.Path(source)

    @property
    def path(self):
        return self.versions_dir / (self.version or self._current())

    def _current(self):
        return (self.source / "current").read_text()

    def get_current_version(self):
        return BundleVersion(version=self.version or self._current())

    def initialize(self):
        self.refresh()
        super().initialize()

    def refresh(self):
        if not self.path.exists():
            shutil.copytree(self.source / self.path.name, self.path)
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on(*backends): where a test runs; containerd and docker when not given")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The first test of a backend waits for images, a daemon, and a dag-processor.
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(600))


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
    with short_directory("ai-parse-") as directory:
        yield directory


@pytest.fixture(scope="session")
def images(image_name: ImageName) -> dict[str, str]:
    return {kind.replace("-", "_"): image_name(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def state_dir(place: Path, backend: str) -> Path:
    return place / f"{backend}-state"


@pytest.fixture(scope="session")
def cgroup_parent(backend: str) -> Iterator[str]:
    with own_cgroup_parent("ai-parse-") as name:
        yield name


@pytest.fixture(scope="session")
def daemon(
    backend: str, request: pytest.FixtureRequest, state_dir: Path, cgroup_parent: str, image_archive: ImageArchive
) -> Iterator[Daemon]:
    """The backend's private daemon, with images; after the last test nothing is left in it."""
    found: Daemon = request.getfixturevalue("private_containerd" if backend == "containerd" else "private_dockerd")
    with connect(backend, socket_path=str(found.socket), namespace="airflow", state_dir=state_dir) as runtime:
        for kind in KINDS:
            runtime.import_image(image_archive(kind))
    yield found
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := traces_left(found, state_dir, cgroup_parent)) and time.monotonic() < deadline:
        time.sleep(0.25)
    assert left == {}


def traces_left(daemon: Daemon, state_dir: Path, cgroup_parent: str) -> dict[str, list[str]]:
    return {kind: entries for kind, entries in traces(daemon, state_dir, cgroup_parent).items() if entries}


def bundles(home: Path) -> str:
    """Two local bundles and one with versions, whose class is the test's own."""
    local = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return json.dumps(
        [
            {"name": "dags-folder", "classpath": local, "kwargs": {"path": str(home / "dags")}},
            {"name": "other", "classpath": local, "kwargs": {"path": str(home / "other")}},
            {
                "name": "versioned",
                "classpath": "bundle_of_the_test.VersionedBundle",
                "kwargs": {"source": str(home / "versions")},
            },
        ]
    )


@pytest.fixture(scope="session")
def options(
    *, backend: str, daemon: Daemon, place: Path, state_dir: Path, cgroup_parent: str, images: dict[str, str]
) -> dict[str, str]:
    """What an administrator sets."""
    return {
        "AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME": backend,
        f"AIRFLOW__{backend.upper()}_RUNTIME__SOCKET_PATH": str(daemon.socket),
        "AIRFLOW__CONTAINER_RUNTIME__STATE_DIR": str(state_dir),
        "AIRFLOW__CONTAINER_RUNTIME__IMAGE": images["main"],
        "AIRFLOW__CONTAINER_RUNTIME__NETWORK": "none",
        "AIRFLOW__CONTAINER_RUNTIME__MEMORY": "768Mi",
        "AIRFLOW__CONTAINER_RUNTIME__PIDS": "128",
        "AIRFLOW__CONTAINER_RUNTIME__CGROUP_PARENT": cgroup_parent,
        "AIRFLOW__CONTAINER_RUNTIME_POLICY__ALLOWED_VARIABLES": "*/reads_variables.py:allowed_*, */other.py:*",
        "AIRFLOW__CONTAINER_RUNTIME_POLICY__ALLOWED_CONNECTIONS": "dags-folder/connects.py:of_the_worker",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": bundles(place / f"{backend}-home"),
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH": str(place / f"{backend}-home" / "bundles"),
        "AIRFLOW_VAR_ALLOWED_ONE": "the value that is allowed",
        "AIRFLOW_VAR_SECRET_ONE": "the value that is not",
        "AIRFLOW_CONN_OF_THE_WORKER": "postgres://me:secret-of-the-worker@db.example:5433/",
    }


@pytest.fixture(scope="session")
def processor(place: Path, backend: str, options: dict[str, str]) -> Iterator[DagProcessor]:
    home = place / f"{backend}-home"
    (home / "config").mkdir(parents=True)
    (home / "plugins").mkdir()
    (home / "config" / "airflow_local_settings.py").write_text(LOCAL_SETTINGS)
    (home / "plugins" / "plugin_of_the_test.py").write_text(PLUGIN)
    (home / "config" / "bundle_of_the_test.py").write_text(VERSIONED_BUNDLE)
    (home / "other").mkdir()
    (home / "versions" / "1").mkdir(parents=True)
    (home / "versions" / "current").write_text("1")
    with dag_processor(home, options) as processor:
        yield processor
        assert processor.stop() == 0, processor.output[-3000:]

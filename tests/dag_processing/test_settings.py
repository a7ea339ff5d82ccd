"""The YAML beside a DAG file holds for its parse; a mistake is an import error that names file, line and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.dag_processing.dag_processor import HEALTHY

if TYPE_CHECKING:
    from tests.conftest import Daemon
    from tests.dag_processing.dag_processor import DagProcessor

MISTAKES = {
    "yaml_unknown_key": ("container:\n  network: none\n  volume: x\n", ("line 3", "container.volume")),
    "yaml_wrong_type": ("container:\n  network: none\n  environment: [a]\n", ("line 3", "container.environment")),
    "yaml_no_mapping": ("container: 7\n", ("container",)),
    "yaml_bad_quantity": ("container:\n  resources:\n    memory: 2Gigs\n", ("line 3", "container.resources.memory")),
    "yaml_nested": ("container:\n  image: " + "[" * 100_000, ("yaml_nested.yaml",)),
    "yaml_bad_mode": ("container:\n  parse_mode: spoon\n", ("line 2", "container.parse_mode", "fork or fresh")),
    "yaml_of_the_administrator": ("container:\n  seccomp_profile: unconfined\n", ("only the administrator",)),
    "yaml_forbidden": ("container:\n  volumes: ['/etc:/data']\n", ("mounting /etc is not allowed",)),
    "yaml_root": ("container:\n  run_as_user: root\n", ("root is not allowed",)),
    "yaml_two": ("container: {}\n", ("yaml_two.yml", "Keep one")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_by_file_line_and_key(processor: DagProcessor, name: str) -> None:
    settings, words = MISTAKES[name]
    if name == "yaml_two":
        processor.write(f"{name}.yml", settings)
    processor.write_yaml(name, settings, HEALTHY.format(dag_id=name))
    said = processor.wait_for_error(f"{name}.py")
    assert f"{name}.y" in said
    assert all(word in said for word in words), said
    assert len(said) < 1000
    assert processor.database.dag(name) is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [("no_airflow", ("has no Airflow",)), ("other_minor", ("has Airflow 3.2.0, this worker has 3.3.2",))],
)
def test_an_image_that_can_not_parse_is_an_import_error(
    processor: DagProcessor, images: dict[str, str], kind: str, words: tuple[str, ...]
) -> None:
    processor.write_yaml(f"image_{kind}", f"container: {{image: '{images[kind]}'}}", HEALTHY.format(dag_id=kind))
    said = processor.wait_for_error(f"image_{kind}.py")
    assert all(word in said for word in words), said


def test_each_file_is_parsed_in_the_image_that_it_names(processor: DagProcessor, images: dict[str, str]) -> None:
    program = "import importlib.metadata as m\nfrom airflow.sdk import DAG\n"
    looks = f"{program}names = {{d.name for d in m.distributions()}}\n"
    for name, image in (("in_main", images["main"]), ("in_extra", images["extra"])):
        text = f"{looks}dag = DAG({name!r}, schedule=None, description=','.join(sorted(names)))\n"
        processor.write_yaml(name, f"container: {{image: '{image}'}}", text)
    found = {name: str(processor.wait_for_dag(name)["description"]) for name in ("in_main", "in_extra")}
    assert found["in_main"] != found["in_extra"]


def test_a_fresh_parse_has_a_container_of_its_own(processor: DagProcessor) -> None:
    processor.write_yaml("fresh", "container: {parse_mode: fresh}", HEALTHY.format(dag_id="fresh"))
    processor.wait_for_dag("fresh")
    processor.touch("fresh.py")
    processor.wait(lambda: processor.times_parsed("fresh.py") == 2, "the second parse")
    used = [event["container"] for event in processor.log("fresh.py") if "container" in event]
    assert len(set(used)) == 2


def test_the_environment_of_the_settings_is_there_at_the_parse(processor: DagProcessor) -> None:
    text = (
        "import os\nfrom airflow.sdk import DAG\ndag = DAG('in_env', schedule=None, description=os.environ['REGION'])\n"
    )
    processor.write_yaml("in_env", "container: {environment: {REGION: eu}}", text)
    assert processor.wait_for_dag("in_env")["description"] == "eu"


def test_an_image_that_is_replaced_under_its_name_is_used_at_the_next_parse(
    processor: DagProcessor, daemon: Daemon, images: dict[str, str]
) -> None:
    name = "localhost/replaced:1"
    tag = ("docker", "tag") if daemon.kind == "docker" else ("ctr", "images", "tag", "--force")
    daemon.run(*tag, images["main"], name)
    processor.write_yaml("replaced", f"container: {{image: '{name}'}}", HEALTHY.format(dag_id="replaced"))
    processor.wait_for_dag("replaced")
    daemon.run(*tag, images["extra"], name)
    processor.touch("replaced.py")
    processor.wait(lambda: processor.times_parsed("replaced.py") == 2, "the second parse")
    digests = [event["digest"] for event in processor.log("replaced.py") if "digest" in event]
    assert len(set(digests)) == 2

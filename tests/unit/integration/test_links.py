"""Symbolic links that lead out of what a container has: named, and never followed into other files of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from airflow_isolation.container_spec import Mount
from airflow_isolation.errors import SettingError
from airflow_isolation.integration.dag_processing.links import check_dag_file, explained
from airflow_isolation.settings.effective import Volume

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for directory in ("dags/team", "elsewhere/shared"):
        (tmp_path / directory).mkdir(parents=True)
    for file in ("dags/plain.py", "dags/team/plain.py", "elsewhere/dag.py", "elsewhere/shared/module.py"):
        (tmp_path / file).touch()
    return tmp_path / "dags"


def check(bundle: Path, name: str, *volumes: Volume) -> None:
    check_dag_file(bundle / name, bundle, [Mount(source=str(bundle), target=str(bundle))], volumes)


@pytest.mark.parametrize(
    "target", ["plain.py", "./team/../plain.py", "../dags/team/plain.py", "../../{}/dags/plain.py"]
)
def test_a_link_within_the_bundle_is_as_good_as_a_file(bundle: Path, target: str) -> None:
    (bundle / "link.py").symlink_to(target.format(bundle.parent.name))
    (bundle / "again.py").symlink_to(bundle / "link.py")
    for name in ("plain.py", "team/plain.py", "link.py", "again.py"):
        check(bundle, name)


@pytest.mark.parametrize("target", ["../elsewhere/dag.py", "team/../../elsewhere/dag.py", "{}/elsewhere/dag.py"])
def test_a_dag_file_that_lies_elsewhere_is_refused_with_link_target_and_remedy(bundle: Path, target: str) -> None:
    target = target.format(bundle.parent)
    (bundle / "link.py").symlink_to(target)
    elsewhere = bundle.parent / "elsewhere"
    with pytest.raises(SettingError) as refused:
        check(bundle, "link.py")
    words = (f"{bundle / 'link.py'} is a symbolic link to {target}.", f"leads to {elsewhere / 'dag.py'},")
    assert all(word in str(refused.value) for word in words), refused.value
    assert f"volume '{elsewhere}:{elsewhere}:ro'" in refused.value.hint
    check(bundle, "link.py", Volume(source=str(elsewhere), target=str(elsewhere)))


def test_a_directory_on_the_way_may_be_the_link_and_a_link_may_lead_to_one(bundle: Path) -> None:
    (bundle.parent / "elsewhere" / "shared" / "dag.py").touch()
    (bundle / "well").symlink_to("team")
    (bundle / "team" / "other").symlink_to("../first")
    (bundle / "first").symlink_to("../elsewhere/shared")
    with pytest.raises(
        SettingError, match=f"{bundle}/team/other is a symbolic link to ../first.*{bundle.parent}/elsewhere/shared,"
    ):
        check(bundle, "well/other/dag.py")


def test_a_volume_of_other_files_where_the_link_leads_is_refused(bundle: Path, tmp_path: Path) -> None:
    # Airflow shows the code of a DAG as this host reads it, and the container would run another.
    (bundle / "link.py").symlink_to(tmp_path / "elsewhere" / "dag.py")
    volume = Volume(source=str(bundle / "team"), target=str(tmp_path / "elsewhere"))
    with pytest.raises(SettingError, match="this host's files"):
        check(bundle, "link.py", volume)


def test_links_that_nobody_can_follow_are_no_error_of_ours(bundle: Path) -> None:
    (bundle / "circle.py").symlink_to("circle.py")
    (bundle / "broken.py").symlink_to("nothing.py")
    check(bundle, "circle.py")
    check(bundle, "broken.py")


def test_a_bundle_that_is_a_link_itself_is_mounted_at_its_own_path(bundle: Path) -> None:
    current = bundle.parent / "current"
    current.symlink_to("dags")
    (bundle / "link.py").symlink_to("team/plain.py")
    check_dag_file(current / "link.py", current, [Mount(source=str(bundle), target=str(current))], ())


@pytest.mark.parametrize(
    ("link", "error"),
    [
        ("shared", "ModuleNotFoundError: No module named 'shared'"),
        ("shared", "ModuleNotFoundError: No module named 'shared.module'"),
        ("team/shared", "ModuleNotFoundError: No module named 'team.shared'"),
        ("module.py", "ModuleNotFoundError: No module named 'module'"),
        ("team/module.py", "ImportError: cannot import name 'module' from 'team' (unknown location)"),
        ("team/data", "FileNotFoundError: [Errno 2] No such file or directory: '{bundle}/team/data/x.sql'"),
    ],
)
def test_an_import_that_fails_for_a_link_names_it(bundle: Path, link: str, error: str) -> None:
    lies = "../" * link.count("/") + "../elsewhere/shared" + ("/module.py" if link.endswith(".py") else "")
    error = f"Traceback …\n{error.format(bundle=bundle)}\n"
    mounts = [Mount(source=str(bundle), target=str(bundle))]

    def said() -> str:
        return explained({"dag.py": error}, bundle / "dag.py", [bundle], mounts, ())["dag.py"]

    assert said() == error
    (bundle / link).symlink_to(lies)
    assert said().startswith(error)
    assert f"{bundle / link} is a symbolic link to {lies}." in said()
    assert f"{bundle.parent}/elsewhere/shared:ro'" in said()


@pytest.mark.parametrize("name", ["/etc/passwd", "{bundle}/../elsewhere", "a" * 100_000, ".." * 50])
def test_what_an_error_claims_leads_nowhere_outside_of_the_bundle(bundle: Path, name: str) -> None:
    name = name.format(bundle=bundle)
    (bundle.parent / "link").symlink_to("elsewhere")
    error = "".join(f"{kind}: '{name}'\n" for kind in ("No module named", "No such file or directory"))
    mounts = [Mount(source=str(bundle), target=str(bundle))]
    assert explained({"d.py": error}, bundle / "d.py", [bundle], mounts, ()) == {"d.py": error}

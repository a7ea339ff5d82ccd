"""What the documents say is there, is there: files, headings, programs, commands, settings."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from airflow.cli.cli_config import GroupCommand

from airflow_isolation.integration.cli.definition import get_containers_cli_commands
from airflow_isolation.settings.dag_metadata import read_dag_metadata
from airflow_isolation.settings.declarations import keys_of, known_sections

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *(CHECKOUT / "docs").glob("*.md")])
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of one language, freed of their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def everywhere(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(blocks(document, language))
    ]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(subcommands: Any) -> Iterator[str]:
    for command in subcommands:
        yield command.name
        if isinstance(command, GroupCommand):
            yield from (f"{command.name} {name}" for name in commands(command.subcommands))


@every_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_document
def test_programs_of_hack_exist(document: Path) -> None:
    for program in re.findall(r"hack/([\w.-]+\w)", document.read_text()):
        assert (CHECKOUT / "hack" / program).exists(), program


@every_document
def test_commands_of_airflow_containers_exist(document: Path) -> None:
    (group,) = get_containers_cli_commands()
    known = set(commands(group.subcommands))
    for words in re.findall(r"airflow\s+containers\s+([a-z-]+(?:\s+(?:list|import|remove)\b)?)", document.read_text()):
        name = " ".join(words.split())
        assert name in known, name


@every_document
def test_source_directories_exist(document: Path) -> None:
    for path in re.findall(r"`((?:src|tests|protos|docs)/[\w./-]+)`", document.read_text()):
        assert (CHECKOUT / path).exists(), path


@pytest.mark.parametrize("block", everywhere("ini"))
def test_examples_of_airflow_cfg_name_settings_that_exist(block: str) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(block)
    for section in parser.sections():
        if section.endswith(("_labels", "_environment")):
            continue
        assert section in known_sections() | {"core"}, section
        assert set(parser[section]) <= {key.name for key in keys_of(section)}, section


@pytest.mark.parametrize("block", everywhere("yaml"))
def test_examples_of_dag_metadata_are_well_formed(block: str, tmp_path: Path) -> None:
    dag_file = tmp_path / "sales.py"
    dag_file.touch()
    dag_file.with_suffix(".yaml").write_text(block)
    assert read_dag_metadata(dag_file, tmp_path) is not None


@pytest.mark.parametrize("block", everywhere("python"))
def test_examples_of_python_compile(block: str) -> None:
    compile(block, "example", "exec")


def test_the_picture_is_well_formed_and_readable_in_the_dark() -> None:
    picture = CHECKOUT / "docs/design.svg"
    assert ET.parse(picture).getroot().tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture.read_text()


def test_the_demonstration_names_images_that_hack_build_image_makes() -> None:
    metadata = (CHECKOUT / "hack/demo.d/dags/own_image.yaml").read_text()
    version = re.findall(r"^AIRFLOW_VERSION = \"(.*)\"$", (CHECKOUT / "hack/build-image").read_text(), re.MULTILINE)
    images = re.findall(r"localhost/[^\s\"}]+", metadata)
    assert images == [f"localhost/airflow-isolation/test{kind}:{version[0]}" for kind in ("-extra", "")]


def test_metadata_of_the_demonstration_is_well_formed() -> None:
    assert read_dag_metadata(CHECKOUT / "hack/demo.d/dags/own_image.py") is not None

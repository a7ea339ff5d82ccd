"""``airflow containers parse``: shows a file's author what the DAG processor would make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from airflow_isolation.integration.cli import dag_file
from airflow_isolation.integration.cli.backends import choose_one, named_backend
from airflow_isolation.integration.cli.formats import printable_lines
from airflow_isolation.integration.cli.images import have_image
from airflow_isolation.integration.cli.outcome import FAILED, OK, command, say, write_line
from airflow_isolation.integration.cli.output import Column, print_record, print_rows
from airflow_isolation.integration.cli.settings import COLUMNS, chosen, every
from airflow_isolation.integration.dag_processing.request import parse_request_for
from airflow_isolation.integration.seams import console
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.resolve import dag_parsing_backend

if TYPE_CHECKING:
    from argparse import Namespace

    from airflow_isolation.integration.cli.dag_file import DagFile
    from airflow_isolation.integration.seams.one_parse import OneParse
    from airflow_isolation.settings.effective import Backend, EffectiveSettings

DAGS: Final = (Column("dag_id"), Column("tasks", lambda tasks: str(len(tasks))), Column("tags", ", ".join))


@command
def parse_file(arguments: Namespace) -> int:
    """Parse one file. Returns 0 without import errors, 1 with some or when it could not be parsed. Nothing is stored."""
    configuration = airflow_configuration()
    backend = named_backend(arguments) or dag_parsing_backend(configuration) or choose_one(arguments).backend
    file = dag_file.locate(arguments.file)
    bundle_name = file.bundle_name or "dags-folder"
    request = parse_request_for(
        file,
        backend=backend,
        bundle_name=bundle_name,
        bundle_path=file.bundle_path,
        relative_path=file.relative_path,
    )
    settings = request.settings
    have_image(settings)

    from airflow_isolation.integration.seams.one_parse import parse_once

    parsed = parse_once(
        request,
        bundle_name=bundle_name,
        bundle_path=file.bundle_path,
        relative_path=file.relative_path,
        configuration=configuration,
        logger=console.parse_logger(),
    )
    document = _document(file, backend, settings, parsed)
    if arguments.output in ("json", "yaml"):
        print_record(document, arguments.output)
    else:
        _print(document, arguments.output, settings)
    return FAILED if parsed.import_errors else OK


def _document(file: DagFile, backend: Backend, settings: EffectiveSettings, parsed: OneParse) -> dict[str, Any]:
    from airflow_isolation.integration.seams.one_parse import summary

    return {
        "file": str(file.path),
        "bundle": file.bundle_name or None,
        "runtime": backend,
        "image": settings.image,
        "digest": parsed.digest,
        "seconds_until_container_was_ready": round(parsed.preparing, 3),
        "seconds_of_parsing": round(parsed.parsing, 3),
        "dags": [summary(dag) for dag in parsed.dags],
        "import_errors": dict(parsed.import_errors),
        "warnings": [dict(warning) for warning in parsed.warnings],
        "settings": every(settings),
    }


def _print(document: dict[str, Any], output: str, settings: EffectiveSettings) -> None:
    head = {
        "file": document["file"],
        "image": f"{settings.image} ({document['digest'][:19]}), {document['runtime']}",
        "time": f"container ready after {document['seconds_until_container_was_ready']:.1f} s, "
        f"parsed in {document['seconds_of_parsing']:.2f} s",
    }
    print_record(head, "plain")
    write_line("")
    print_rows(document["dags"], DAGS, output, nothing="The file has no DAGs.")
    for name, error in document["import_errors"].items():
        write_line(printable_lines(f"\nImport error in {name}:\n{error.rstrip()}"))
    for warning in document["warnings"]:
        said = f"\nWarning for {warning['dag_id']} ({warning['warning_type']}): {warning['message']}"
        write_line(printable_lines(said))
    write_line("")
    print_rows(chosen(settings), COLUMNS, output, nothing="Every setting is at its default.")
    if not document["bundle"]:
        say("The file lies in no local DAG bundle: its own directory was taken for one.")

"""What a DAG file claims is not believed, and what it may not ask for it does not get."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.airflow_home import FERNET_KEY
from tests.dag_processing.dag_processor import HEALTHY

if TYPE_CHECKING:
    from tests.dag_processing.dag_processor import DagProcessor

#: Sends a result of the file's own making in place of Airflow's, and ends.
FORGED = """
import os, socket
from airflow.sdk import DAG
import msgspec

def send(body):
    frame = msgspec.msgpack.encode([1, body])
    channel = socket.socket(fileno=os.dup(0))
    channel.sendall(len(frame).to_bytes(4, "big") + frame)
    channel.recv(4)
    os._exit(0)

send({{"type": "DagFileParsingResult", "fileloc": {fileloc!r}, "serialized_dags": {dags!r},
      "import_errors": {errors!r}, "warnings": {warnings!r}}})
"""
NO_ERRORS: dict[str, str] = {}


def forged(
    *, fileloc: str = "/etc/passwd", dags: object = (), errors: object = NO_ERRORS, warnings: object = ()
) -> str:
    return FORGED.format(fileloc=fileloc, dags=list(dags), errors=errors, warnings=list(warnings))  # type: ignore[call-overload]


def healthy(dag_id: str) -> str:
    return HEALTHY.format(dag_id=dag_id)


def test_the_code_that_is_shown_is_the_files_own(processor: DagProcessor) -> None:
    text = f"{healthy('lies_about_its_place')}\n__file__ = '/etc/hostname'\n"
    path = processor.write("lies.py", text)
    dag = processor.wait_for_dag("lies_about_its_place")
    assert (dag["fileloc"], dag["relative_fileloc"]) == (str(path), "lies.py")
    (code,) = processor.database.rows("select * from dag_code where dag_id = 'lies_about_its_place'")
    assert (code["fileloc"], code["source_code"]) == (str(path), text)


def test_an_import_error_for_another_file_counts_as_the_liars_own(processor: DagProcessor) -> None:
    victim = processor.write_healthy()
    processor.wait_for_dag(victim)
    processor.write(
        "slanders.py", forged(errors={f"{victim}.py": "slander", "../../x": "more", "/etc/passwd": "again"})
    )
    said = processor.wait_for_error("slanders.py")
    assert "slander" in said
    assert processor.wait_for_dag(victim)["has_import_errors"] == 0
    assert not {f"{victim}.py", "../../x", "/etc/passwd"} & processor.database.import_errors().keys()


def test_a_warning_of_another_dag_is_dropped(processor: DagProcessor) -> None:
    victim = processor.write_healthy()
    processor.wait_for_dag(victim)
    warning = {"dag_id": victim, "warning_type": "non-existent pool", "message": "slander"}
    processor.write("warns.py", forged(warnings=[warning], errors={"warns.py": "it was parsed"}))
    processor.wait_for_error("warns.py")
    assert processor.database.rows("select * from dag_warning") == []


def test_what_is_no_dag_is_refused_in_words(processor: DagProcessor) -> None:
    processor.write("no_dag.py", forged(dags=[{"data": {"dag": {"dag_id": {"a": 1}}}}]))
    assert "a DAG that is not one" in processor.wait_for_error("no_dag.py")
    processor.assert_parses_on()


def test_what_airflow_can_not_store_harms_nobody_else(processor: DagProcessor) -> None:
    processor.write("not_to_store.py", forged(dags=[{"data": {"dag": {"dag_id": "x", "timetable": 7}}}]))
    processor.wait(lambda: processor.times_parsed("not_to_store.py"), "the parse")
    processor.assert_parses_on()


def test_a_dag_of_another_bundle_can_not_be_taken_over(processor: DagProcessor) -> None:
    processor.write("owner.py", healthy("owned"), bundle="other")
    processor.wait_for_dag("owned")
    processor.write("thief.py", healthy("owned") + healthy("of_its_own"))
    said = processor.wait_for_error("thief.py")
    assert "'owned'" in said
    assert "'other'" in said
    processor.wait_for_dag("of_its_own")
    assert processor.wait_for_dag("owned")["bundle_name"] == "other"
    (processor.home / "other" / "owner.py").unlink()
    processor.wait(lambda: (processor.database.dag("owned") or {})["is_stale"], "the owner's going")
    processor.touch("thief.py")
    processor.wait(lambda: (processor.database.dag("owned") or {})["bundle_name"] == "dags-folder", "the take-over")
    processor.wait(lambda: "thief.py" not in processor.database.import_errors(), "the end of the import error")


def asks(dag_id: str, *questions: str) -> str:
    """A file whose DAG's description says what it got."""
    return (
        "from airflow.sdk import DAG, Connection, Variable\n"
        "def got(ask):\n"
        "    try: return str(ask())\n"
        "    except Exception as error: return f'{type(error).__name__}: {error}'\n"
        f"answers = [{', '.join(f'got(lambda: {question})' for question in questions)}]\n"
        f"dag = DAG({dag_id!r}, schedule=None, description=chr(10).join(answers))\n"
    )


def answers(processor: DagProcessor, name: str, *questions: str) -> list[str]:
    dag_id = f"asks_{name}_{time.monotonic_ns()}"
    processor.write(f"{name}.py", asks(dag_id, *questions))
    return str(processor.wait_for_dag(dag_id)["description"]).split("\n")


def test_variables_are_not_written_while_a_file_is_parsed(processor: DagProcessor) -> None:
    said = answers(processor, "writes", "Variable.set('written', 'x')", "Variable.delete('allowed_one')")
    assert all("may not change the Variable" in answer or "PERMISSION_DENIED" in answer for answer in said), said
    assert processor.database.rows("select * from variable") == []
    assert any("parse_may_write" in str(event) for event in processor.log("writes.py"))


def test_variables_are_given_to_the_files_that_the_policy_names(processor: DagProcessor) -> None:
    allowed, secret = answers(processor, "reads_variables", "Variable.get('allowed_one')", "Variable.get('secret_one')")
    assert allowed == "the value that is allowed"
    assert "the value that is not" not in secret
    (refused,) = answers(processor, "reads_more", "Variable.get('allowed_one')")
    assert "the value that is allowed" not in refused
    assert any("allowed_variables does not give" in str(event) for event in processor.log("reads_more.py"))


def test_connections_are_given_to_the_files_that_the_policy_names(processor: DagProcessor) -> None:
    ask = "Connection.get('of_the_worker').host"
    assert answers(processor, "connects", ask) == ["db.example"]
    for name, question in (("connects_more", ask), ("connects", "Connection.get('another').host")):
        (refused,) = answers(processor, name, question)
        assert "db.example" not in refused
        assert any("allowed_connections does not give" in str(event) for event in processor.log(f"{name}.py"))


def test_a_connection_of_the_worker_is_handed_over_and_nothing_else_is_there(processor: DagProcessor) -> None:
    host, environment = answers(
        processor, "connects", "Connection.get('of_the_worker').host", "dict(__import__('os').environ)"
    )
    assert host == "db.example"
    for secret in ("AIRFLOW_CONN_", "AIRFLOW_VAR_", FERNET_KEY, "metadata-of-the-test"):
        assert secret not in environment

"""What a task in a container gets of its supervisor, and what it can do to it. What others may not have it does not get."""

from __future__ import annotations

import gc
import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest
from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.execution_time import comms
from tests.hostile import inside
from tests.hostile.conftest import TASKS, program
from tests.hostile.test_rows import name_of
from tests.unit.integration.supervised import NO_BOUNDS, Recorder, supervisor
from tests.zygote.at_work.conftest import SECONDS

from airflow_isolation.integration.seams import masks
from airflow_isolation.settings.effective import Grant, Permissions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.hostile.conftest import Host, Kind

pytestmark = pytest.mark.root

POLICY = Permissions(
    allowed_connections=(Grant("bundle/*", "sales_*"),),
    allowed_variables=(Grant("bundle/*", "sales_*"),),
    allowed_triggering=(Grant("bundle/*", "report_*"),),
)
OWN: Any = {"dag_id": "sales", "task_id": "load", "run_id": "monday", "key": "k"}
OTHERS = UUID("019a0000-0000-7000-8000-00000000ffff")

#: What is another's, whatever the policy says.
NEVER: dict[str, Any] = {
    "write an XCom of another DAG": comms.SetXCom(**{**OWN, "dag_id": "payroll"}, value=1),
    "write an XCom of another task": comms.SetXCom(**{**OWN, "task_id": "other"}, value=1),
    "write an XCom of another run": comms.SetXCom(**{**OWN, "run_id": "tuesday"}, value=1),
    "write an XCom of another map index": comms.SetXCom(**OWN, map_index=3, value=1),
    "remove an XCom of another DAG": comms.DeleteXCom(**{**OWN, "dag_id": "payroll"}),
    "ask for another task instance": comms.GetTaskRescheduleStartDate(ti_id=OTHERS),
    "change another task instance": comms.SetTaskStateStore(ti_id=OTHERS, key="k", value=1, expires_at=None),
    "vouch for another task instance": comms.ValidateInletsAndOutlets(ti_id=OTHERS),
}

#: What the policy above does not give.
BY_POLICY: dict[str, Any] = {
    "read a connection of others": comms.GetConnection(conn_id="payroll"),
    "read a Variable of others": comms.GetVariable(key="payroll"),
    "write a Variable of others": comms.PutVariable(key="payroll", value="1", description=None),
    "remove a Variable of others": comms.DeleteVariable(key="payroll"),
    "list all Variables": comms.GetVariableKeys(),
    "trigger a DAG of others": comms.TriggerDagRun(dag_id="payroll", run_id="r", reset_dag_run=True),
    "look at runs of others": comms.GetDagRunState(dag_id="payroll", run_id="r"),
    "count runs of others": comms.GetDRCount(dag_id="payroll"),
    "look at a DAG of others": comms.GetDag(dag_id="payroll"),
    "read an XCom of others": comms.GetXCom(**{**OWN, "dag_id": "payroll"}),
}
GIVEN: dict[str, Any] = {"read a connection of its own": comms.GetConnection(conn_id="sales_db")}

#: More than are kept, for this task alone.
MASKS: dict[str, Any] = {f"mask {number}": comms.MaskSecret(value=f"masked-{number:08}") for number in range(1200)}

#: Of the worker's own words, of other times and other tasks; and what a terminal would obey.
FORGED = (
    {"event": "Task runs in a container", "logger": "task", "level": "critical", "dag_id": "payroll"},
    {"event": "Out of memory", "logger": "airflow_isolation.workload", "timestamp": "1999-01-01T00:00:00Z"},
    {"event": "\x1b]0;title\x07\x1b[2J", "logger": "dag_processor", "timestamp": "2999-01-01T00:00:00Z"},
    {"event": "x" * (3 * 1024 * 1024)},
)


def frame(body: Any, number: int = 1) -> bytes:
    return bytes(comms._RequestFrame(id=number, body=body if isinstance(body, dict) else body.model_dump()).as_bytes())


def started(host: Host, text: str, permissions: Permissions = NO_BOUNDS) -> tuple[Recorder, int]:
    """A task with a supervisor of ours, to its end; gives its log and its exit code.

    There is no client: what would reach Airflow's server is an error, and no refusal.
    """
    running = host.start(text)
    log = Recorder()
    ours = running.workload.channels
    channels = {name: getattr(ours, name) for name in ("stdout", "stderr", "requests", "logs")}
    made = supervisor(running.workload, channels, log, permissions=permissions)
    deadline = time.monotonic() + SECONDS
    with masks.own_masks(log.logger), closing(made.selector):
        while (code := running.workload.exit_code()) is None or made._open_sockets:
            assert time.monotonic() < deadline, log.lines[-10:]
            made._service_subprocess(0.1)
    return log, code


def asked(host: Host, frames: dict[str, Any], permissions: Permissions) -> tuple[Recorder, dict[str, Any]]:
    told = {
        "frames": {name: frame(body).hex() for name, body in frames.items()},
        "lines": [json.dumps(fields).encode().hex() for fields in FORGED],
    }
    log, code = started(host, program("ask", told), permissions)
    assert code == 0, log.lines[-10:]
    # Its only line on stdout, which is long.
    said = "".join(text for text, values in log.lines if values.get("logger") == "task.stdout")
    answers = {
        name: msgspec.msgpack.decode(bytes.fromhex(answer), type=comms._ResponseFrame)
        for name, answer in json.loads(said).items()
    }
    return log, answers


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def is_refused(answer: Any) -> bool:
    return answer.error is not None and answer.error["error"] == "PERMISSION_DENIED"


@pytest.fixture
def secrets_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAYROLL", "SALES_DB"):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", "postgresql://u:a-password@h/d")


@pytest.mark.usefixtures("secrets_of_the_worker")
@pytest.mark.parametrize("kind", TASKS, ids=name_of)
def test_what_is_of_others_is_refused_and_the_worker_is_unharmed(hosts: Callable[[Kind], Any], kind: Kind) -> None:
    with hosts(kind) as host:
        before = descriptors()
        log, answers = asked(host, {**NEVER, **BY_POLICY, **MASKS, **GIVEN}, POLICY)
        host.worker.end()
        # Of what came with the requests nothing was taken: each brought so many.
        assert descriptors() < before + inside.SENT_WITH_EACH
    assert {name for name, answer in answers.items() if is_refused(answer)} == {*NEVER, *BY_POLICY}
    assert answers["read a connection of its own"].body["password"] == "a-password"
    # What it masked is forgotten with it, and what it forged is known as its own.
    assert redact("masked-00000001") == "masked-00000001"
    forged = {text: values for text, values in log.lines if text in {str(fields["event"]) for fields in FORGED}}
    assert {values["logger"] for values in forged.values()} == {
        "task.task",
        "task.airflow_isolation.workload",
        "task.dag_processor",
    }
    assert all("timestamp" not in values for values in forged.values())
    assert forged["Task runs in a container"]["dag_id"] == "sales"
    (cut,) = [text for text, _ in log.lines if text.startswith("xxx")]
    assert len(cut) < 1024 * 1024 + 100


@pytest.mark.usefixtures("secrets_of_the_worker")
def test_without_a_policy_only_what_is_anothers_own_is_refused(hosts: Callable[[Kind], Any]) -> None:
    with hosts(TASKS[0]) as host:
        _, answers = asked(host, {**NEVER, **BY_POLICY}, NO_BOUNDS)
    assert {name for name, answer in answers.items() if is_refused(answer)} == {*NEVER}
    assert answers["read a connection of others"].body["password"] == "a-password"


BROKEN: dict[str, tuple[bytes, str]] = {
    "nonsense": (bytes(range(255, -1, -1)) * 16, ""),
    "a length of 4 GiB": (b"\xff" * 4 + b"x" * 1000, "4294967295 bytes"),
    "an empty frame": (bytes(4), ""),
    "no msgpack": (b"\0\0\0\3\xc1\xc1\xc1", ""),
    "lists in lists": ((100_000).to_bytes(4, "big") + b"\x91" * 100_000, ""),
    # Each byte would be an object of some 60 bytes in the worker.
    "very many small things": ((2**24 + 5).to_bytes(4, "big") + b"\xdd\x01\0\0\0" + b"\x80" * 2**24, ""),
}


def as_literal(sent: bytes) -> list[Any]:
    """What is to be sent, as its beginning and what is repeated after it."""
    rest = len(sent) - len(sent.rstrip(sent[-1:]))
    return [sent[: len(sent) - rest].hex(), sent[-1:].hex(), rest]


@pytest.fixture(scope="module")
def host(hosts: Callable[[Kind], Any]) -> Iterator[Host]:
    """One for all tests of what breaks: the next is its neighbour."""
    with hosts(TASKS[0]) as found:
        yield found


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_channel_ends_this_task_and_the_next_one_runs(host: Host, what: str) -> None:
    sent, words = BROKEN[what]
    log, code = started(host, program("break_requests", {"bytes": as_literal(sent)}))
    assert code == -9, log.lines[-10:]
    (broken,) = [values["error"] for text, values in log.lines if "broke its channel" in text]
    assert words in broken
    assert host.start("pass").finish() == 0

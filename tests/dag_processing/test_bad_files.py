"""Every kind of bad DAG file ends its own parse, says why where its author looks, and harms nobody else."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from tests.dag_processing.dag_processor import HEALTHY

if TYPE_CHECKING:
    from tests.dag_processing.dag_processor import DagProcessor

DAG = "from airflow.sdk import DAG\nimport os, signal, socket, subprocess, sys, time\n"

#: Files that give no DAG, and words of their import error.
FATAL = {
    "syntax_error": ("from airflow.sdk import DAG\ndef broken(:\n", ("SyntaxError",)),
    "raises": (DAG + "raise LookupError('of the author')\n", ("LookupError", "of the author")),
    "endless_loop": (DAG + "while True: pass\n", ("longer than 6 seconds", "test:3.3.2", "dag_file_processor_timeout")),
    "deaf_loop": (
        DAG + "for number in range(1, 32):\n    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
        "while True: time.sleep(60)\n",
        ("longer than 6 seconds",),
    ),
    "exits": (DAG + "os._exit(7)\n", ("exit code 7", "os._exit")),
    "exits_well": (DAG + "os._exit(0)\n", ("exit code 0", "no result")),
    "segfault": (
        DAG + "import ctypes\nctypes.string_at(0)\n",
        ("SIGSEGV",),
    ),
    "abort": (DAG + "os.abort()\n", ("SIGABRT",)),
    "allocates": (DAG + "held = [b'x' * (64 << 20) for _ in range(48)]\n", ("memory ran out", "768 MiB")),
    "garbage_frame": (DAG + "os.write(0, b'\\0\\0\\0\\5hello')\ntime.sleep(60)\n", ("stopped",)),
    "empty_frame": (DAG + "os.write(0, b'\\0\\0\\0\\0')\ntime.sleep(60)\n", ("frame of 0 bytes", "descriptor 0")),
    "huge_frame": (DAG + "os.write(0, b'\\xff\\xff\\xff\\xff')\ntime.sleep(60)\n", ("frame of 4294967295 bytes",)),
    "unknown_request": (
        DAG + "import msgspec\nbody = msgspec.msgpack.encode([1, {'type': 'GiveMeEverything'}])\n"
        "os.write(0, len(body).to_bytes(4, 'big') + body)\ntime.sleep(60)\n",
        ("does not know",),
    ),
    "impatient": (
        DAG + "import msgspec\nbody = msgspec.msgpack.encode([1, {'type': 'GetConnection', 'conn_id': 'x'}])\n"
        "os.write(0, (len(body).to_bytes(4, 'big') + body) * 50)\ntime.sleep(60)\n",
        ("asked again before it had its answer",),
    ),
}

#: Files that do something bad and still give their DAG.
HARMLESS = {
    "ten_megabytes": "for _ in range(10_000): print('x' * 1000)\n",
    "one_long_line": "sys.stdout.write('x' * 10_000_000); sys.stdout.flush()\n",
    "without_level": 'os.write(3, b\'{"event": "no level"}\\n\')\n',
    "bad_timestamp": 'os.write(3, b\'{"event": "x", "level": "info", "timestamp": "yesterday"}\\n\')\n',
    "not_json": "os.write(3, b'\\xff\\xfe not json\\n')\n",
    "target_in_log": "import structlog\nstructlog.get_logger().warning('x', target='foo', msg='a')\n",
    "closes_channels": "[os.close(n) for n in (1, 2)]\n",
    "leaves_files": "[open(f'{d}/left-behind-by-a-file', 'w').write('x') for d in ('/tmp', '/dev/shm')]\n",
    "daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(3600)\n    os._exit(0)\n",
    "unmounts": "subprocess.run(['umount', '-l', os.path.dirname(__file__)], check=False, capture_output=True)\n"
    "subprocess.run(['rm', '-rf', os.path.dirname(__file__)], check=False, capture_output=True)\n",
}


def healthy(dag_id: str) -> str:
    return HEALTHY.format(dag_id=dag_id)


@pytest.mark.parametrize("name", FATAL)
def test_a_file_that_can_not_be_parsed_has_an_import_error_in_words(processor: DagProcessor, name: str) -> None:
    text, words = FATAL[name]
    processor.write(f"{name}.py", text)
    said = processor.wait_for_error(f"{name}.py")
    assert all(word in said for word in words), said
    processor.assert_parses_on()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_file_with_bad_manners_is_still_parsed(processor: DagProcessor, name: str) -> None:
    processor.write(f"{name}.py", f"import os, subprocess, sys, time\n{HARMLESS[name]}{healthy(name)}")
    processor.wait_for_dag(name)
    assert f"{name}.py" not in processor.database.import_errors()
    processor.assert_parses_on()


def test_a_flood_of_lines_stops_neither_the_loop_nor_fills_the_disk(processor: DagProcessor) -> None:
    processor.write("floods.py", DAG + "while True:\n    os.write(1, b'\\n' * 65536); os.write(3, b'{}\\n' * 16384)\n")
    assert "longer than 6 seconds" in processor.wait_for_error("floods.py", timeout=180)
    events = [event["event"] for event in processor.log("floods.py")]
    assert sum("the rest is left out" in event for event in events) == 1
    assert len(events) < 10_100
    processor.assert_parses_on()


def test_a_file_that_the_containers_user_may_not_read_is_named_with_its_mode(processor: DagProcessor) -> None:
    """As bundles are that Airflow made as a daemon, with the umask 077."""
    private = processor.dags / "private"
    private.mkdir(mode=0o700)
    processor.write("private/closed.py", healthy("closed"))
    said = processor.wait_for_error("private/closed.py")
    assert f"{private} is closed to others on this host (mode 700)" in said
    private.chmod(0o755)
    processor.touch("private/closed.py")
    processor.wait_for_dag("closed")


@pytest.mark.on("containerd")
def test_a_link_out_of_the_bundle_is_named_where_its_author_looks(processor: DagProcessor) -> None:
    processor.write("module_behind_a_link/__init__.py", "", bundle="elsewhere")
    processor.write("linked.py", healthy("linked"), bundle="elsewhere")
    for name in ("module_behind_a_link", "linked.py"):
        (processor.dags / name).symlink_to(f"../elsewhere/{name}")
    processor.write("importing.py", "import module_behind_a_link\n" + healthy("importing"))
    for file, link in (("linked.py", "linked.py"), ("importing.py", "module_behind_a_link")):
        said = processor.wait_for_error(file)
        assert f"{processor.dags / link} is a symbolic link to ../elsewhere/{link}." in said
    assert "No module named 'module_behind_a_link'" in said


def test_a_fork_bomb_ends_with_its_parse(processor: DagProcessor) -> None:
    processor.write("bomb.py", f"{DAG}while True:\n    try: os.fork()\n    except OSError: pass\n")
    said = processor.wait_for_error("bomb.py")
    assert "longer than 6 seconds" in said
    processor.assert_parses_on()


def test_process_1_is_out_of_a_files_reach(processor: DagProcessor) -> None:
    attack = (
        "import os\n"
        "for number in range(1, 65):\n    try: os.kill(1, number)\n    except OSError: pass\n"
        "for what in ('mem', 'environ', 'fd/0'):\n"
        "    try: open(f'/proc/1/{what}', 'rb')\n    except OSError: pass\n    else: raise AssertionError(what)\n"
    )
    processor.write("attacks_1.py", attack + healthy("attacks_1"))
    processor.wait_for_dag("attacks_1")
    assert processor.times_parsed("attacks_1.py") == 1
    processor.assert_parses_on()


def test_nothing_of_a_file_is_there_for_the_next(processor: DagProcessor) -> None:
    looks = (
        "import glob, os\n"
        "found = glob.glob('/tmp/left*') + glob.glob('/dev/shm/left*')\n"
        "others = [p for p in os.listdir('/proc') if p.isdecimal() and int(p) not in (1, os.getpid())]\n"
        "assert not found and not others, (found, others)\n"
    )
    processor.write(
        "leaves_more.py",
        f"import os, subprocess, sys, time\n{HARMLESS['leaves_files']}{HARMLESS['daemon']}{healthy('leaves_more')}",
    )
    processor.wait_for_dag("leaves_more")
    processor.write("looks.py", looks + healthy("looks"))
    processor.wait_for_dag("looks")
    assert "looks.py" not in processor.database.import_errors()


def test_an_import_error_is_gone_with_the_next_good_parse(processor: DagProcessor) -> None:
    processor.write("mended.py", "raise ValueError\nfrom airflow.sdk import DAG")
    processor.wait_for_error("mended.py")
    processor.write("mended.py", healthy("mended"))
    processor.wait_for_dag("mended")
    processor.wait(lambda: "mended.py" not in processor.database.import_errors(), "the end of the import error")


def archive(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


def test_a_member_of_an_archive_has_its_own_import_error_which_goes_when_it_is_mended(processor: DagProcessor) -> None:
    broken = "from airflow.sdk import DAG\nraise LookupError\n"
    processor.write("archive.zip", archive({"good.py": healthy("in_archive"), "bad.py": broken}))
    assert "LookupError" in processor.wait_for_error("archive.zip/bad.py")
    processor.write("archive.zip", archive({"good.py": healthy("in_archive"), "bad.py": healthy("mended_in_archive")}))
    dag = processor.wait_for_dag("mended_in_archive")
    assert dag["relative_fileloc"] == "archive.zip/bad.py"
    assert dag["fileloc"] == str(processor.dags / "archive.zip" / "bad.py")
    processor.wait(
        lambda: "archive.zip/bad.py" not in processor.database.import_errors(), "the end of the import error"
    )
    assert processor.wait_for_dag("in_archive")["relative_fileloc"] == "archive.zip/good.py"


@pytest.mark.on("containerd")
def test_the_import_errors_of_an_archive_without_dags_stay(processor: DagProcessor) -> None:
    processor.write("broken.zip", archive({"bad.py": "from airflow.sdk import DAG\nraise LookupError\n"}))
    processor.wait_for_error("broken.zip/bad.py")
    before = errors_of(processor, "broken.zip")
    processor.touch("broken.zip")
    processor.wait(lambda: errors_of(processor, "broken.zip") != before, "the second parse of the archive")
    (error,) = errors_of(processor, "broken.zip")
    assert error["id"] == before[0]["id"]


@pytest.mark.on("containerd")
def test_an_archives_own_import_error_stays_when_files_are_looked_for(processor: DagProcessor) -> None:
    processor.write("unwanted.zip.yaml", "container: {memory: much}")
    processor.write("unwanted.zip", archive({"dag.py": healthy("in_an_unwanted_archive")}))
    processor.wait_for_error("unwanted.zip")
    before = errors_of(processor, "unwanted.zip")
    # It is found by a later look into the bundle.
    processor.wait_for_dag(processor.write_healthy())
    assert errors_of(processor, "unwanted.zip") == before


def errors_of(processor: DagProcessor, archive: str) -> list[dict[str, Any]]:
    """The stored import errors of an archive and its members, without their texts."""
    query = "select id, filename, timestamp from import_error where filename like ? order by id"
    return processor.database.rows(query, f"{archive}%")

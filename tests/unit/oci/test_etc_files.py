from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from airflow_isolation.oci.etc_files import hostname_text, hosts_text, resolv_conf_text, write_etc_files


def test_hostname_is_a_line() -> None:
    assert hostname_text("task-1") == "task-1\n"


def test_without_a_network_only_the_loopback_has_names() -> None:
    hosts = hosts_text("task-1", network="none", host_file="10.0.0.1 db\n")
    assert "db" not in hosts
    assert "127.0.0.1\tlocalhost\n" in hosts
    assert hosts.endswith("127.0.1.1\ttask-1\n")


@pytest.mark.parametrize("host_file", ["10.0.0.1 db\n", "10.0.0.1 db"])
def test_on_the_host_s_network_the_host_s_names_hold(host_file: str) -> None:
    assert hosts_text("task-1", network="host", host_file=host_file) == "10.0.0.1 db\n127.0.1.1\ttask-1\n"


@pytest.mark.parametrize("host_file", ["", "\n"])
def test_a_host_without_hosts_gives_the_loopback(host_file: str) -> None:
    assert "localhost" in hosts_text("task-1", network="host", host_file=host_file)


def test_name_servers_only_where_there_is_a_network() -> None:
    host_file = "nameserver 127.0.0.53\n"
    assert resolv_conf_text(network="host", host_file=host_file) == host_file
    assert "nameserver" not in resolv_conf_text(network="none", host_file=host_file)


def test_the_files_are_written_for_everybody_to_read(tmp_path: Path) -> None:
    host_etc = tmp_path / "host"
    host_etc.mkdir()
    (host_etc / "hosts").write_bytes(b"10.0.0.1 db # \xff\n")
    before = os.umask(0o077)
    try:
        written = write_etc_files(tmp_path, hostname="task-1", network="host", host_etc=host_etc)
    finally:
        os.umask(before)
    assert Path(written.hostname).read_text() == "task-1\n"
    assert Path(written.hosts).read_bytes() == b"10.0.0.1 db # \xff\n127.0.1.1\ttask-1\n"
    assert Path(written.resolv_conf).read_text() == ""
    assert {stat.S_IMODE(Path(path).stat().st_mode) for path in (written.hosts, written.resolv_conf)} == {0o644}


def test_writing_again_is_fine(tmp_path: Path) -> None:
    first = write_etc_files(tmp_path, hostname="one", network="none")
    assert write_etc_files(tmp_path, hostname="two", network="none") == first
    assert Path(first.hostname).read_text() == "two\n"

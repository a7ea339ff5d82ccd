"""Inside, a container of Docker's is what one of containerd's is, but for what is written down here and in the documentation."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.conformance.conftest import PROBE, _host

from airflow_isolation.container_spec import MIB, Mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.conftest import Daemon

PLACE: Final = "/run/airflow-isolation"
DOCUMENTATION: Final = Path(__file__).parents[2] / "docs/how-it-works.md"

#: What may differ: a pattern of what the probe sees, and the row of the table in docs/how-it-works.md that says why.
DIFFERENCES: Final[Mapping[str, str]] = {
    # containerd's are nosuid and nodev by our doing; Docker's API has no such option for a bind mount.
    r"mounts\.(/run/airflow-isolation|/data|/etc/(hostname|hosts|resolv\.conf))\.options": "a bind mount",
    # Docker makes its root a slave of the host's, and has no setting for it.
    r"mounts\./\.propagation": "what the host mounts below the container's root later",
    # Both by default: Docker's without noexec. What is masked shows /dev/null, and with it the options of /dev.
    r"mounts\./dev\.options": "`/dev`",
    r"mounts\./proc/[a-z_]+\.options": "`/dev`",
    # A name, and nothing else.
    r"mounts\./dev/shm\.source": "the name of the file system on `/dev/shm`",
}

FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "usual": {"network": "none"},
    "open": {
        "network": "host",
        "user": "worker:extra",
        "read_only_root": False,
        "capabilities": frozenset({"CHOWN", "NET_BIND_SERVICE"}),
        "no_new_privileges": False,
        "seccomp": "unconfined",
        "tmp_size": 32 * MIB,
        "shm_size": 16 * MIB,
        "working_dir": "/tmp",
        "timezone": "Europe/Berlin",
        "env": {"SHAPE": "ours"},
    },
}


@pytest.fixture
def inside(
    daemon_of: Callable[[str], Daemon], state_dir: Path, place: Path
) -> Iterator[Callable[[str, Mapping[str, Any]], dict[str, Any]]]:
    """What the probe sees in a container of a backend, by dotted names."""

    def look(backend: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        own = state_dir / backend
        own.mkdir()
        mounts = (
            Mount(source=str(PROBE.parent), target=PLACE),
            Mount(source=str(place), target="/data", read_only=False),
        )
        with contextmanager(_host)(backend, daemon_of(backend), own) as host:
            status, output = host.run("python3", f"{PLACE}/{PROBE.name}", mounts=mounts, hostname="inside", **changes)
        assert status.code == 0, output
        return dict(named(comparable(json.loads(output))))

    yield look
    for backend in ("containerd-2.1", "docker"):
        shutil.rmtree(state_dir / backend)


def comparable(seen: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between any two containers: numbers of the kernel's, and paths on the host."""
    namespaces = {name: Path(f"/proc/self/ns/{name}").stat().st_ino for name in seen["namespaces"]}
    seen["namespaces"] = {name: seen["namespaces"][name] == namespaces[name] for name in namespaces}
    seen["descriptors"] = {
        number: re.sub(r"\[\d+\]|/proc/\d+/", "", target) for number, target in seen["descriptors"].items()
    }
    # The last one at a place covers the others.
    seen["mounts"] = {mount.pop("target"): mount for mount in seen["mounts"]}
    for target, mount in seen["mounts"].items():
        if mount["type"] == "overlay":
            # Where its layers are, and what each daemon's way to make an overlay brings with it.
            mount["super_options"] = [one for one in mount["super_options"] if "=" not in one]
        if target in {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}:
            mount["root"] = Path(mount["root"]).name
    return seen


def named(seen: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(seen, dict):
        for key, value in seen.items():
            yield from named(value, f"{name}.{key}" if name else key)
    else:
        yield name, seen


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_written_down_differs(
    inside: Callable[[str, Mapping[str, Any]], dict[str, Any]], form: str
) -> None:
    containerd, docker = (inside(backend, FORMS[form]) for backend in ("containerd-2.1", "docker"))
    absent = "not there"
    different = {
        name: (containerd.get(name, absent), docker.get(name, absent))
        for name in sorted(containerd.keys() | docker.keys())
        if containerd.get(name, absent) != docker.get(name, absent)
    }
    unexplained = {
        name: values for name, values in different.items() if not any(re.fullmatch(one, name) for one in DIFFERENCES)
    }
    assert unexplained == {}, "containerd's first, Docker's second"
    # An explanation that is not needed any more goes.
    assert [one for one in DIFFERENCES if not any(re.fullmatch(one, name) for name in different)] == []


def test_each_of_them_stands_in_the_documentation() -> None:
    rows = [line.split("|")[1].strip() for line in DOCUMENTATION.read_text().splitlines() if line.startswith("|")]
    assert set(DIFFERENCES.values()) <= set(rows)

"""Every field of a ContainerSpec means the same on every backend: the probe looks from inside."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conformance.archives import derived
from tests.conformance.conftest import PROBE

from airflow_isolation.container_spec import MIB, Mount, Resources
from airflow_isolation.errors import SpecRefused
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Host
    from tests.conftest import ImageArchive

# Mounted as the agent is: a directory of ours, read-only.
PLACE = "/run/airflow-isolation"
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
SECRET = "the-workers-secret-0815"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on the host with a file that everybody may read. (pytest's own lies where only root may enter.)"""
    place = Path("/var/tmp") / f"ai-mount-{os.getpid()}-{tmp_path.name[:20]}"
    place.mkdir(mode=0o755)
    try:
        (place / "file").write_text("of the host")
        (place / "file").chmod(0o644)
        yield place
    finally:
        (place / "file").unlink(missing_ok=True)
        (place / "written").unlink(missing_ok=True)
        place.rmdir()


def probed(host: Host, *needles: str, **changes: Any) -> dict[str, Any]:
    mounts = (Mount(source=str(PROBE.parent), target=PLACE), *changes.pop("mounts", ()))
    status, output = host.run("python3", f"{PLACE}/{PROBE.name}", *needles, mounts=mounts, **changes)
    assert status.code == 0, output
    seen: dict[str, Any] = json.loads(output)
    return seen


def test_the_images_user_with_its_groups_is_the_default(host: Host) -> None:
    seen = probed(host)
    assert (set(seen["uid"]), set(seen["gid"])) == ({50000}, {0})
    assert seen["groups"] == [0, 2000]


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups"),
    [
        ("worker", 1000, 1000, [1000, 2000]),
        ("1000", 1000, 1000, [1000, 2000]),
        ("1000:50", 1000, 50, [50, 2000]),
        ("worker:extra", 1000, 2000, [2000]),
        ("4711", 4711, 0, [0]),
        ("4711:4712", 4711, 4712, [4712]),
    ],
)
def test_users_are_names_or_numbers(host: Host, user: str, uid: int, gid: int, groups: list[int]) -> None:
    seen = probed(host, user=user)
    assert (set(seen["uid"]), set(seen["gid"]), seen["groups"]) == ({uid}, {gid}, groups)


@pytest.mark.parametrize("user", ["0", "root", "second-root", "0:1000", "root:worker"])
def test_root_is_refused_under_every_name(host: Host, user: str) -> None:
    with pytest.raises(SpecRefused, match="allow_root"):
        host.create(user=user)


def test_root_is_root_when_allowed(host: Host) -> None:
    seen = probed(host, user="root", allow_root=True)
    assert set(seen["uid"]) == {0}
    assert all(seen["capabilities"][name] == [] for name in CAPABILITY_SETS)


@pytest.mark.parametrize(
    "user", ["nobody-knows-me", "worker:no-group", "4294967296", "2147483648", "-1", "1000:", ":0"]
)
def test_who_is_not_in_the_image_is_refused(host: Host, user: str) -> None:
    with pytest.raises(SpecRefused):
        host.create(user=user)


def test_the_environment_is_the_images_below_ours(host: Host) -> None:
    seen = probed(host, env={"SHAPE": "ours", "EMPTY": "", "WORDS": "two words = 2\nlines"}, hostname="sales")[
        "environ"
    ]
    seen.pop("LC_CTYPE", None)  # Python's own doing.
    assert seen == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "COLOUR": "of-the-image",
        "SHAPE": "ours",
        "EMPTY": "",
        "WORDS": "two words = 2\nlines",
        "HOME": "/home/airflow",
        "HOSTNAME": "sales",
    }


def test_the_images_entrypoint_is_not_run_and_its_command_is_not_added(host: Host) -> None:
    status, output = host.run("echo", "ours")
    assert (status.code, output) == (0, "ours\n")


def test_arguments_arrive_as_they_are(host: Host) -> None:
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    _, output = host.run("python3", "-c", program, "two words", "$HOME", "", "ü", "*")
    assert json.loads(output) == ["two words", "$HOME", "", "ü", "*"]


def test_the_working_directory_is_ours_else_the_images(host: Host) -> None:
    assert probed(host)["cwd"] == "/srv"
    assert probed(host, working_dir="/usr/lib")["cwd"] == "/usr/lib"


@pytest.mark.parametrize("directory", ["relative", "/proc/self/fd/7", "/tmp/../proc/1"])
def test_a_dangerous_working_directory_is_refused(host: Host, directory: str) -> None:
    with pytest.raises(SpecRefused):
        host.create(working_dir=directory)


def test_the_hostname_is_ours_else_the_id(host: Host) -> None:
    assert probed(host, hostname="sales.example")["hostname"] == "sales.example"
    id = host.create("hostname")
    with host.runtime.wait(id) as pending:
        host.runtime.start(id)
        pending.result(60)
    assert host.runtime.output(id).decode().strip() == id


def test_a_hostname_works_on_the_hosts_network_too(host: Host) -> None:
    assert probed(host, hostname="sales", network="host")["hostname"] == "sales"
    assert socket.gethostname() != "sales"


def test_network_none_has_loopback_only(host: Host) -> None:
    seen = probed(host, network="none")
    assert seen["network_interfaces"] == ["lo"]
    assert seen["namespaces"]["net"] != Path("/proc/self/ns/net").stat().st_ino


def test_network_host_is_the_hosts(host: Host) -> None:
    seen = probed(host, network="host")
    assert seen["namespaces"]["net"] == Path("/proc/self/ns/net").stat().st_ino
    assert seen["etc"]["resolv.conf"] is not None


@pytest.mark.parametrize("network", ["none", "host"])
def test_localhost_and_the_own_name_are_known(host: Host, network: str) -> None:
    program = (
        "import json, socket; "
        "print(json.dumps([socket.gethostbyname(name) for name in ('localhost', socket.gethostname())]))"
    )
    assert host.python(program, network=network, hostname="sales") == ["127.0.0.1", "127.0.1.1"]
    seen = probed(host, network=network, hostname="sales")["etc"]
    assert seen["hostname"] == "sales\n"
    on_host = [line for line in Path("/etc/hosts").read_text().splitlines() if line.strip()]
    assert set(on_host) <= set(seen["hosts"].splitlines()) or network == "none"
    assert ("nameserver" in seen["resolv.conf"]) <= (network == "host")


@pytest.fixture
def named_network(host: Host) -> Iterator[str]:
    """A network of the daemon's own kind, a bridge, made by its administrator."""
    name = f"sales-{secrets.token_hex(3)}"
    host.daemon.run("docker", "network", "create", "--internal", name)
    yield name
    host.daemon.run("docker", "network", "rm", name)


@pytest.mark.parametrize("backend", ["docker"])
def test_containers_on_a_named_network_reach_each_other_and_nobody_else(host: Host, named_network: str) -> None:
    server = "import socket; s = socket.create_server(('', 8000)); print('ready', flush=True); s.accept()[0].sendall(b'served')"
    client = "import socket, sys; print(socket.create_connection((sys.argv[1], 8000), 20).recv(9).decode(), end='')"
    serving = host.start("python3", "-c", server, network=named_network)
    deadline = time.monotonic() + 20
    while b"ready" not in host.runtime.output(serving):
        assert time.monotonic() < deadline, host.runtime.output(serving)
        time.sleep(0.05)
    template = f'{{{{(index .NetworkSettings.Networks "{named_network}").IPAddress}}}}'
    address = host.daemon.run("docker", "inspect", "--format", template, serving).stdout.strip()
    status, said = host.run("python3", "-c", client, address, network=named_network)
    assert (status.code, said) == (0, "served")
    seen = probed(host, network=named_network)
    assert seen["network_interfaces"] == ["eth0", "lo"]
    assert host.run("python3", "-c", client, address, network="none")[0].code != 0
    for id in host.made:
        host.runtime.remove(id)


@pytest.mark.parametrize("network", ["no-such-network", "container:x", "", "bridge\n"])
def test_a_network_that_can_not_be_had_is_refused_by_name(host: Host, network: str) -> None:
    with pytest.raises(SpecRefused, match="network") as caught:
        host.create(network=network)
    assert "none" in caught.value.hint


def test_every_other_namespace_is_its_own(host: Host) -> None:
    seen = probed(host, network="host")["namespaces"]
    for kind in ("pid", "ipc", "uts", "mnt", "cgroup"):
        assert seen[kind] != Path(f"/proc/self/ns/{kind}").stat().st_ino, kind


def test_only_its_own_processes_are_seen(host: Host) -> None:
    seen = probed(host)
    assert seen["pid"] == 1
    assert set(seen["processes"]) == {"1"}


def test_there_are_no_capabilities(host: Host) -> None:
    seen = probed(host)["capabilities"]
    assert {name: seen[name] for name in CAPABILITY_SETS} == {name: [] for name in CAPABILITY_SETS}


def test_capabilities_are_those_asked_for(host: Host) -> None:
    seen = probed(host, user="root", allow_root=True, capabilities=frozenset({"NET_BIND_SERVICE", "CHOWN"}))
    for name in ("bounding", "effective", "permitted"):
        assert seen["capabilities"][name] == [0, 10], name
    for name in ("ambient",):
        assert seen["capabilities"][name] == [], name


def test_who_is_not_root_has_capabilities_only_in_the_bounding_set(host: Host) -> None:
    seen = probed(host, capabilities=frozenset({"CHOWN"}))["capabilities"]
    assert seen["bounding"] == [0]
    assert (seen["effective"], seen["permitted"], seen["ambient"]) == ([], [], [])


def test_an_unknown_capability_is_refused(host: Host) -> None:
    with pytest.raises(SpecRefused, match="CAP_CHOWN"):
        host.create(capabilities=frozenset({"CAP_CHOWN"}))


def test_no_new_privileges_and_a_filter(host: Host) -> None:
    seen = probed(host)
    assert (seen["no_new_privileges"], seen["seccomp_mode"]) == (True, 2)
    assert not probed(host, no_new_privileges=False)["no_new_privileges"]


def test_the_default_filter_denies_what_it_should(host: Host) -> None:
    seen = probed(host, user="root", allow_root=True)
    denied = {name: answer for name, answer in seen["syscalls"].items() if name != "clone3"}
    assert "ok" not in denied.values(), denied
    assert seen["syscalls"]["clone3"] == "ENOSYS"
    for family in ("alg", "vsock", "alg with high bits", "vsock with high bits"):
        assert seen["socket"][family] != "ok", family
    assert seen["socket"]["unix"] == "ok"


def test_unconfined_has_no_filter(host: Host) -> None:
    assert probed(host, seccomp="unconfined")["seccomp_mode"] == 0


def test_a_profile_of_ones_own_is_used(host: Host, directory: Path) -> None:
    profile = directory / "file"
    profile.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
                "syscalls": [{"names": ["sethostname", "getcwd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
            }
        )
    )
    program = "import os\ntry:\n  os.getcwd(); print('\"ok\"')\nexcept OSError as e: print(e.errno)"
    assert host.python(program, seccomp=str(profile)) == 95


def test_a_profile_that_is_none_is_refused(host: Host, directory: Path) -> None:
    with pytest.raises(SpecRefused, match="file"):
        host.create(seccomp=str(directory / "file"))


def test_the_root_is_read_only_and_scratch_places_are_not(host: Host) -> None:
    seen = probed(host)["writable"]
    assert seen["/"] != "ok"
    assert seen["/etc"] != "ok"
    assert (seen["/tmp"], seen["/dev/shm"]) == ("ok", "ok")


def test_a_writable_root_is_writable(host: Host) -> None:
    assert probed(host, read_only_root=False, user="root", allow_root=True)["writable"]["/etc"] == "ok"


def test_scratch_places_have_their_sizes(host: Host) -> None:
    seen = probed(host, tmp_size=8 * MIB, shm_size=4 * MIB)["sizes"]
    assert (seen["/tmp"], seen["/dev/shm"]) == (8 * MIB, 4 * MIB)


def test_programs_run_from_tmp_and_not_from_shm(host: Host) -> None:
    seen = probed(host)["executable"]
    assert seen["/tmp"] == "ok"
    assert seen["/dev/shm"] != "ok"


def test_a_read_only_bind(host: Host, directory: Path) -> None:
    mount = Mount(source=str(directory), target="/data")
    program = "import json\ntry:\n  open('/data/file', 'a')\nexcept OSError as e: print(json.dumps([open('/data/file').read(), e.errno]))"
    directory.chmod(0o777)
    (directory / "file").chmod(0o666)
    assert host.python(program, mounts=(mount,)) == ["of the host", 30]


def test_a_writable_bind(host: Host, directory: Path) -> None:
    directory.chmod(0o777)
    mount = Mount(source=str(directory), target="/data", read_only=False)
    host.python("open('/data/written', 'w').write('from inside'); print(1)", mounts=(mount,), user="1000:1000")
    assert (directory / "written").read_text() == "from inside"
    assert (directory / "written").stat().st_uid == 1000


def test_a_tmpfs_of_ones_own(host: Host) -> None:
    mount = Mount(kind="tmpfs", target="/scratch", size=2 * MIB, mode=0o700, read_only=False)
    program = (
        "import json, os; v = os.statvfs('/scratch'); open('/scratch/x', 'w').close();"
        "print(json.dumps([v.f_blocks * v.f_frsize, oct(os.stat('/scratch').st_mode & 0o7777)]))"
    )
    assert host.python(program, mounts=(mount,)) == [2 * MIB, "0o700"]


@pytest.mark.parametrize(
    "source", ["/no/such/place", "relative", "/", "/proc", "/sys/fs/cgroup", "/run/containerd", "/var/tmp/../tmp"]
)
def test_a_source_that_is_not_there_or_dangerous_is_refused_by_name(host: Host, source: str) -> None:
    with pytest.raises(SpecRefused, match="source"):
        host.create(mounts=(Mount(source=source, target="/data"),))


def test_the_daemons_own_socket_is_no_source(host: Host) -> None:
    with pytest.raises(SpecRefused, match="source"):
        host.create(mounts=(Mount(source=str(host.daemon.socket), target="/data"),))


def test_a_symbolic_link_is_no_source(host: Host, directory: Path) -> None:
    link = directory / "written"
    link.symlink_to("/etc")
    with pytest.raises(SpecRefused, match="symbolic link"):
        host.create(mounts=(Mount(source=str(link), target="/data"),))


@pytest.fixture
def linked(host: Host, image_archive: ImageArchive, tmp_path: Path) -> Iterator[str]:
    """An image as one made from an installed system: files and directories that we mount on are symbolic links."""
    name = "localhost/airflow-isolation/linked:1"
    links = {
        "etc/resolv.conf": "../run/systemd/resolve/stub-resolv.conf",
        "etc/hosts": "/opt/network/hosts",
        "etc/hostname": "../../../opt/hostname",
        "data": "run/data",
        "more": "/opt/more",
    }
    archive = tmp_path / "linked.tar"
    host.runtime.import_image(
        derived(image_archive("no-airflow"), archive, name=name, config={"User": "50000"}, files={}, links=links)
    )
    yield name
    for id in host.made:
        host.runtime.remove(id)
    host.runtime.remove_image(name)


def test_where_the_image_has_links_their_files_and_volumes_are_ours(host: Host, linked: str, directory: Path) -> None:
    mount = Mount(source=str(directory), target="/more")
    program = "import json; print(json.dumps(open('/more/file').read()))"
    assert host.python(program, image=linked, mounts=(mount,)) == "of the host"
    etc = probed(host, image=linked, network="host", hostname="sales")["etc"]
    assert etc["hostname"] == "sales\n"
    assert "sales" in etc["hosts"]
    assert etc["resolv.conf"] == Path("/etc/resolv.conf").read_text()


@pytest.mark.parametrize("backend", ["containerd-2.1"])  # Docker may mount its tmpfs over it: it orders by depth alone
def test_a_volume_that_a_link_leads_below_run_is_there(host: Host, linked: str, directory: Path) -> None:
    mount = Mount(source=str(directory), target="/data")
    program = "import json; print(json.dumps(open('/run/data/file').read()))"
    assert host.python(program, image=linked, mounts=(mount,)) == "of the host"


@pytest.mark.parametrize("backend", ["containerd-2.1"])
def test_two_volumes_that_a_link_leads_to_one_place_are_refused(host: Host, linked: str, directory: Path) -> None:
    mounts = tuple(Mount(source=str(directory), target=target) for target in ("/more", "/opt/more"))
    with pytest.raises(SpecRefused, match="link of the image leads '/more' to '/opt/more'"):
        host.create(image=linked, mounts=mounts)


@pytest.fixture
def with_volumes(host: Host, image_archive: ImageArchive, tmp_path: Path) -> Iterator[str]:
    """An image with VOLUMEs: an empty one, one with a file, and places where something is mounted anyway."""
    name = "localhost/airflow-isolation/volumes:1"
    volumes: dict[str, Any] = {path: {} for path in ("/data/", "/filled", "/tmp", "/run", "/mine")}
    config = {"User": "50000", "Volumes": volumes}
    files = {"filled/file": b"of the image"}
    archive = derived(image_archive("no-airflow"), tmp_path / "volumes.tar", name=name, config=config, files=files)
    host.runtime.import_image(archive)
    yield name
    for id in host.made:
        host.runtime.remove(id)
    host.runtime.remove_image(name)


def test_an_empty_volume_of_the_image_is_a_tmpfs_and_what_is_in_another_stays_read_only(
    host: Host, with_volumes: str, directory: Path
) -> None:
    program = """
import json, os
def attempt(path):
    try:
        with open(path, "w") as file:
            file.write("x")
    except OSError as error:
        return error.strerror
    return "written"
size = os.statvfs("/data")
print(json.dumps([
    attempt("/data/written"), size.f_blocks * size.f_frsize, os.listdir("/data"),
    attempt("/filled/written"), attempt("/filled/file"), open("/filled/file").read(), open("/mine/file").read(),
]))
"""
    mount = Mount(source=str(directory), target="/mine")
    found = host.python(program, image=with_volumes, tmp_size=8 * MIB, mounts=(mount,))
    assert found[:3] == ["written", 8 * MIB, ["written"]]
    assert found[3:5] == ["Read-only file system"] * 2
    assert found[5:] == ["of the image", "of the host"]


@pytest.mark.parametrize("target", ["/", "/proc/x", "/dev", "relative", "/data/../etc"])
def test_a_target_that_can_not_be_is_refused(host: Host, directory: Path, target: str) -> None:
    with pytest.raises(SpecRefused, match=r"target|mounted over"):
        host.create(mounts=(Mount(source=str(directory), target=target),))


def test_two_mounts_on_one_target_are_refused(host: Host, directory: Path) -> None:
    mount = Mount(source=str(directory), target="/data")
    with pytest.raises(SpecRefused, match="two mounts"):
        host.create(mounts=(mount, mount))


def test_masked_paths_can_not_be_read_and_kernel_settings_not_written(host: Host) -> None:
    seen = probed(host, user="root", allow_root=True)
    assert set(seen["masked"].values()) <= {"masked", "absent"}, seen["masked"]
    # On cgroup v1 Docker leaves the small tmpfs that holds the controllers' directories to root, but not the controllers.
    paths = {path: answer for path, answer in seen["read_only"].items() if path != "/sys/fs/cgroup"}
    assert set(paths.values()) <= {"read-only", "absent"}, paths
    assert all("ro" in mount["options"] for mount in seen["mounts"] if mount["type"].startswith("cgroup"))


def test_umask_limits_and_oom_score(host: Host) -> None:
    seen = probed(host)
    assert seen["umask"] == 0o022
    assert seen["rlimits"]["RLIMIT_NOFILE"][0] == 1024
    assert seen["rlimits"]["RLIMIT_CORE"] == [0, 0]
    assert seen["oom_score_adj"] == 100


def test_the_time_zone_is_ours_else_the_images(host: Host) -> None:
    program = "import time, json; print(json.dumps(time.tzname))"
    assert host.python(program, timezone="Asia/Kolkata") == ["IST", "IST"]
    assert host.python(program) == ["UTC", "UTC"]


def test_the_workers_environment_is_nowhere(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", SECRET)
    assert probed(host, SECRET)["found"] == []
    assert probed(host, SECRET, env={"PLANTED": SECRET})["found"] != []


def test_no_descriptor_of_the_runtime_is_left_open(host: Host) -> None:
    assert set(probed(host)["descriptors"]) <= {"0", "1", "2"}


def test_limits_stand_in_the_containers_cgroup(host: Host) -> None:
    id = host.start("sleep", "600", resources=Resources(cpus=0.5, memory=64 * MIB, pids=32))
    pid = host.runtime.get(id).pid
    assert int(_of_cgroup(pid, "memory", "memory.limit_in_bytes")) == 64 * MIB
    assert int(_of_cgroup(pid, "pids", "pids.max")) == 32
    quota, period = (int(_of_cgroup(pid, "cpu", f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    assert quota / period == 0.5


def _of_cgroup(pid: int, controller: str, file: str) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controllers}{path}/{file}").read_text().strip()
    raise AssertionError(f"{pid} is in no cgroup of {controller}")


def test_a_cgroup_parent_is_ours(host: Host) -> None:
    id = host.start("sleep", "600", cgroup_parent="airflow-conformance/jobs")
    try:
        cgroup = Path(f"/proc/{host.runtime.get(id).pid}/cgroup").read_text()
        assert ":/airflow-conformance/jobs/" in cgroup
    finally:
        host.runtime.remove(id)
        # A parent belongs to whoever named it, and stays for the next container.
        for parent in [*Path("/sys/fs/cgroup").glob("*/airflow-conformance/jobs")]:
            parent.rmdir()
            parent.parent.rmdir()


def test_too_much_memory_ends_the_container(host: Host) -> None:
    status, _ = host.run(
        "python3", "-c", "x = bytearray(200_000_000); print('survived')", resources=Resources(memory=48 * MIB)
    )
    assert status.code == 137


def test_a_fork_bomb_ends_at_the_limit(host: Host) -> None:
    program = (
        "import os, time\ncount = 0\ntry:\n  while count < 100:\n    if os.fork() == 0: time.sleep(600)\n    count += 1\n"
        "except OSError: pass\nprint(count, flush=True); os._exit(0)"
    )
    status, output = host.run("python3", "-c", program, resources=Resources(pids=16))
    assert (status.code, int(output) < 16) == (0, True)


@pytest.mark.parametrize(
    "resources",
    [Resources(memory=1), Resources(cpus=0), Resources(cpus=-1), Resources(cpus=float("nan")), Resources(pids=0)],
)
def test_limits_that_can_not_be_are_refused(host: Host, resources: Resources) -> None:
    with pytest.raises(SpecRefused):
        host.create(resources=resources)


@pytest.mark.parametrize("argv", [("",), ("a\0b",)])
def test_a_command_that_is_none_is_refused(host: Host, argv: tuple[str, ...]) -> None:
    with pytest.raises(SpecRefused, match="argv"):
        host.create(*argv)


@pytest.mark.parametrize("env", [{"": "x"}, {"a=b": "x"}, {"a": "x\0y"}])
def test_an_environment_that_can_not_be_is_refused(host: Host, env: dict[str, str]) -> None:
    with pytest.raises(SpecRefused, match="environment"):
        host.create(env=env)


def test_what_is_refused_leaves_a_working_daemon(host: Host) -> None:
    with pytest.raises(SpecRefused):
        host.create(user="root")
    assert host.runtime.get(host.start("sleep", "600")).state is ContainerState.RUNNING

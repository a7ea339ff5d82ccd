"""What build_runtime_spec declares, compared by tests/probe with what runc makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.container_spec import ContainerSpec, Mount, Resources, UserNamespace
from airflow_isolation.oci import ImageConfig, write_etc_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.oci_runc.conftest import Runc

pytestmark = pytest.mark.root

PROBE = Path(__file__).resolve().parent.parent / "probe" / "probe.py"
NEEDLE = "s3cr3t-token-that-stays-outside"
MIB = 1024 * 1024
SPEC = ContainerSpec(
    image="test",
    argv=("/usr/bin/python3", "-ISB", "/probe.py", NEEDLE),
    mounts=(Mount(target="/probe.py", source=str(PROBE)),),
    network="none",
)
PYTHON = ("/usr/bin/python3", "-ISB", "-c")


@pytest.fixture(scope="module")
def default(runc: Runc) -> Iterator[dict[str, Any]]:
    """The reality of a default spec, seen while this process holds what must not be seen inside."""
    os.environ["SECRET_OF_THE_WORKER"] = NEEDLE
    holder = subprocess.Popen(["sleep", "300"])
    try:
        yield runc.probe(SPEC)
    finally:
        del os.environ["SECRET_OF_THE_WORKER"]
        holder.kill()
        holder.wait()


def mount_of(reality: dict[str, Any], target: str) -> dict[str, Any]:
    # The last one on a target is the one that is seen.
    found: dict[str, Any] = [mount for mount in reality["mounts"] if mount["target"] == target][-1]
    return found


def test_user_and_groups(default: dict[str, Any]) -> None:
    assert default["uid"] == [50000, 50000, 50000]
    assert default["gid"] == [0, 0, 0]
    assert default["groups"] == [0, 70]


def test_all_five_capability_sets_are_empty(default: dict[str, Any]) -> None:
    assert default["capabilities"] == {
        "inheritable": [],
        "permitted": [],
        "effective": [],
        "bounding": [],
        "ambient": [],
    }


def test_no_new_privileges_and_a_filter(default: dict[str, Any]) -> None:
    assert default["no_new_privileges"] is True
    assert default["seccomp_mode"] == 2


def test_umask_rlimits_and_oom_score(default: dict[str, Any], runc: Runc) -> None:
    assert default["umask"] == 0o022
    assert default["rlimits"]["RLIMIT_CORE"] == [0, 0]
    assert default["rlimits"]["RLIMIT_NOFILE"] == [1024, runc.host.open_files]
    assert default["oom_score_adj"] == 100


def test_namespaces_are_not_the_host_s(default: dict[str, Any]) -> None:
    for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts"):
        assert default["namespaces"][name] != Path(f"/proc/self/ns/{name}").stat().st_ino


def test_only_tmp_and_shm_are_writable(default: dict[str, Any]) -> None:
    assert default["writable"] == {
        "/": "EROFS",
        "/etc": "EROFS",
        "/home/airflow": "EROFS",
        "/run": "EACCES",
        "/dev": "EACCES",
        "/tmp": "ok",
        "/dev/shm": "ok",
    }


def test_programs_run_from_tmp_and_not_from_shm(default: dict[str, Any]) -> None:
    assert default["executable"] == {"/tmp": "ok", "/dev/shm": "EACCES"}


def test_sizes_are_as_declared(default: dict[str, Any]) -> None:
    assert default["sizes"] == {"/tmp": 1024 * MIB, "/run": 64 * MIB, "/dev/shm": 64 * MIB}


@pytest.mark.parametrize("target", ["/tmp", "/run", "/dev/shm", "/proc", "/sys", "/dev/mqueue", "/probe.py"])
def test_mounts_are_without_suid_and_devices(default: dict[str, Any], target: str) -> None:
    assert {"nosuid", "nodev"} < set(mount_of(default, target)["options"])


def test_mounts_are_private(default: dict[str, Any]) -> None:
    assert not any(mount["propagation"] for mount in default["mounts"])


def test_masked_paths_can_t_be_read(default: dict[str, Any]) -> None:
    assert set(default["masked"].values()) <= {"masked", "absent"}
    assert default["masked"]["/proc/keys"] == "masked"


def test_kernel_settings_can_t_be_written(default: dict[str, Any]) -> None:
    assert default["read_only"]["/proc/sys"] == "read-only"
    assert default["read_only"]["/sys"] == "read-only"
    assert {default["read_only"][f"/proc/{name}"] for name in ("bus", "fs", "irq")} == {"read-only"}


def test_only_the_usual_devices_are_there(default: dict[str, Any]) -> None:
    nodes = {"/dev/full", "/dev/null", "/dev/pts/ptmx", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"}
    assert set(default["devices"]) == nodes


def test_sockets(default: dict[str, Any]) -> None:
    assert default["socket"].pop("vsock by socketcall") in {"ENOSYS", "absent", "died with -11"}
    assert default["socket"] == {
        "unix": "ok",
        "inet": "ok",
        "netlink": "ok",
        "alg": "EPERM",
        "alg with high bits": "EPERM",
        "vsock": "EPERM",
        "vsock with high bits": "EPERM",
    }


def test_system_calls_that_are_denied(default: dict[str, Any]) -> None:
    assert default["syscalls"].pop("clone3") == "ENOSYS"
    assert set(default["syscalls"].values()) == {"EPERM"}


def test_an_architecture_without_a_filter_ends_the_process(default: dict[str, Any], runc: Runc) -> None:
    assert default["x32"] in {f"died with {-signal.SIGSYS}", "absent"}
    assert not runc.probe(replace(SPEC, seccomp="unconfined"))["x32"].startswith("died")


def test_no_other_process_is_seen(default: dict[str, Any]) -> None:
    assert default["pid"] == 1
    assert default["processes"] == {"1": "python3"}


def test_the_worker_s_secret_is_nowhere(default: dict[str, Any]) -> None:
    assert default["found"] == []


def test_the_probe_would_find_a_secret(runc: Runc) -> None:
    found = runc.probe(replace(SPEC, env={"TOKEN": f"x{NEEDLE}x"}))["found"]
    assert {entry["where"] for entry in found} == {"os.environ", "/proc/1/environ"}
    assert {entry["needle"] for entry in found} == {NEEDLE}


def test_no_descriptor_of_the_runtime_is_left_open(default: dict[str, Any]) -> None:
    assert set(default["descriptors"]) == {"0", "1", "2"}


def test_network_none_has_loopback_only(default: dict[str, Any]) -> None:
    assert default["network_interfaces"] == ["lo"]


def test_network_host_is_the_host_s(runc: Runc) -> None:
    reality = runc.probe(replace(SPEC, network="host"))
    assert reality["namespaces"]["net"] == Path("/proc/self/ns/net").stat().st_ino
    assert reality["namespaces"]["uts"] != Path("/proc/self/ns/uts").stat().st_ino


def test_environment_directory_and_hostname(runc: Runc) -> None:
    image = ImageConfig(
        architecture=runc.host.architecture,
        user="airflow",
        env={"PATH": "/opt/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TEAM": "of the image"},
        working_dir="/srv/job/",
    )
    reality = runc.probe(replace(SPEC, hostname="sales-1", env={"TEAM": "sales"}), image=image)
    assert reality["cwd"] == "/srv/job"
    assert reality["hostname"] == "sales-1"
    assert reality["environ"] == {
        "PATH": "/opt/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TEAM": "sales",
        "HOME": "/home/airflow",
        "HOSTNAME": "sales-1",
    }


def test_a_working_directory_that_is_not_there_is_made(runc: Runc) -> None:
    assert runc.probe(replace(SPEC, working_dir="/made/for/it"))["cwd"] == "/made/for/it"


def test_etc_files(runc: Runc, tmp_path: Path) -> None:
    etc = write_etc_files(tmp_path, hostname="sales-1", network="none")
    reality = runc.probe(replace(SPEC, hostname="sales-1"), etc=etc)
    assert reality["etc"]["hostname"] == "sales-1\n"
    assert "127.0.1.1\tsales-1\n" in reality["etc"]["hosts"]
    assert reality["etc"]["resolv.conf"] == "# This container has no network.\n"
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount_of(reality, "/etc/hosts")["options"])


def test_time_zone(runc: Runc) -> None:
    assert runc.probe(replace(SPEC, timezone="EST5EDT"))["timezone"] == ["EST", "EDT"]


def test_sizes_of_tmp_and_shm(runc: Runc) -> None:
    sizes = runc.probe(replace(SPEC, tmp_size=8 * MIB, shm_size=16 * MIB))["sizes"]
    assert (sizes["/tmp"], sizes["/dev/shm"]) == (8 * MIB, 16 * MIB)


def test_a_writable_root_is_writable_for_its_owner(runc: Runc) -> None:
    reality = runc.probe(replace(SPEC, read_only_root=False, user="0", allow_root=True))
    assert "rw" in mount_of(reality, "/")["options"]
    assert reality["writable"]["/"] == "ok"


def test_root_without_capabilities_is_not_the_host_s_root(runc: Runc) -> None:
    reality = runc.probe(replace(SPEC, user="root", allow_root=True))
    assert reality["uid"] == [0, 0, 0]
    assert set(reality["capabilities"]["bounding"] + reality["capabilities"]["effective"]) == set()
    assert reality["syscalls"]["mount"] == "EPERM"
    assert reality["syscalls"]["mknod block device"] == "EPERM"
    assert reality["read_only"]["/proc/sys"] == "read-only"


def test_capabilities_are_those_asked_for(runc: Runc) -> None:
    net_bind_service = 10
    reality = runc.probe(replace(SPEC, user="0", allow_root=True, capabilities=frozenset({"NET_BIND_SERVICE"})))
    assert reality["capabilities"] == {
        "inheritable": [],
        "permitted": [net_bind_service],
        "effective": [net_bind_service],
        "bounding": [net_bind_service],
        "ambient": [],
    }


def test_who_is_not_root_has_capabilities_in_the_bounding_set_only(runc: Runc) -> None:
    reality = runc.probe(replace(SPEC, capabilities=frozenset({"NET_BIND_SERVICE"})))
    assert reality["capabilities"]["bounding"] == [10]
    assert reality["capabilities"]["effective"] == reality["capabilities"]["ambient"] == []


OPEN_DISK = """
import os, stat, sys
os.mknod('/dev/disk', 0o600 | stat.S_IFBLK, os.makedev(int(sys.argv[1]), int(sys.argv[2])))
try:
    os.open('/dev/disk', os.O_RDONLY)
except PermissionError as error:
    print(error.strerror)
"""


def test_a_disk_of_the_host_can_t_be_opened_even_with_mknod(runc: Runc) -> None:
    # runc lets everybody who has the capability make a node; what counts is that nobody may open it.
    major, minor = Path("/proc/partitions").read_text().splitlines()[2].split()[:2]
    spec = replace(SPEC, user="0", allow_root=True, capabilities=frozenset({"MKNOD"}))
    assert output(runc, replace(spec, argv=(*PYTHON, OPEN_DISK, major, minor))) == "Operation not permitted"


def test_what_the_administrator_opens_is_open(runc: Runc) -> None:
    reality = runc.probe(replace(SPEC, seccomp="unconfined", no_new_privileges=False))
    assert reality["seccomp_mode"] == 0
    assert reality["no_new_privileges"] is False
    assert reality["syscalls"]["clone3"] == "EINVAL"
    assert reality["socket"]["vsock"] == reality["socket"]["vsock with high bits"] != "EPERM"
    assert reality["socket"]["vsock by socketcall"] != "ENOSYS"


def test_a_profile_of_one_s_own_is_used(runc: Runc, tmp_path: Path) -> None:
    # The same profile, but that one call tells by its error who refused it.
    profile = tmp_path / "own.json"
    profile.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
                "syscalls": [{"names": ["userfaultfd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
            }
        )
    )
    assert runc.probe(replace(SPEC, seccomp=str(profile)))["syscalls"]["userfaultfd"] == "ENOTSUP"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path.resolve() / "source"
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "file").write_text("of the host")
    return directory


WRITE = "import sys; open(sys.argv[1], 'w').write('x'); print('written')"
READ = "import os, sys; print(sorted(os.listdir(sys.argv[1])))"


def output(runc: Runc, spec: ContainerSpec) -> str:
    done = runc.start(runc.document(spec), check=False)
    return (done.stdout + done.stderr).strip()


def test_a_read_only_bind(runc: Runc, source: Path) -> None:
    spec = replace(SPEC, mounts=(Mount(target="/data", source=str(source)),))
    assert "'file'" in output(runc, replace(spec, argv=(*PYTHON, READ, "/data")))
    assert "Read-only file system" in output(runc, replace(spec, argv=(*PYTHON, WRITE, "/data/x")))
    assert not (source / "x").exists()


def test_a_writable_bind(runc: Runc, source: Path) -> None:
    mount = Mount(target="/data", source=str(source), read_only=False)
    assert output(runc, replace(SPEC, mounts=(mount,), argv=(*PYTHON, WRITE, "/data/x"))) == "written"
    assert (source / "x").stat().st_uid == 50000


@pytest.fixture
def below(source: Path) -> Iterator[Path]:
    """A file system of its own below the source."""
    directory = source / "below"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "tmpfs", str(directory)], check=True, timeout=30)
    try:
        (directory / "deep").touch()
        yield source
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=30)


def test_a_read_only_bind_is_read_only_below_as_well(runc: Runc, below: Path) -> None:
    assert runc.host.recursive_read_only, "this host's runc or kernel is older than this test"
    spec = replace(SPEC, mounts=(Mount(target="/data", source=str(below)),))
    assert "deep" in output(runc, replace(spec, argv=(*PYTHON, READ, "/data/below")))
    assert "Read-only file system" in output(runc, replace(spec, argv=(*PYTHON, WRITE, "/data/below/x")))


def test_without_rro_what_is_mounted_below_is_not_there(runc: Runc, below: Path) -> None:
    older = replace(runc, host=replace(runc.host, recursive_read_only=False))
    spec = replace(SPEC, mounts=(Mount(target="/data", source=str(below)),))
    assert output(older, replace(spec, argv=(*PYTHON, READ, "/data/below"))) == "[]"
    assert "Read-only file system" in output(older, replace(spec, argv=(*PYTHON, WRITE, "/data/below/x")))


def test_a_user_namespace_has_the_host_s_proc_and_sys_with_what_is_mounted_in_them(runc: Runc) -> None:
    """As systemd mounts, for one, /proc/sys/fs/binfmt_misc: the kernel would not bind /proc without it."""
    mounts = "mount -t tmpfs -o mode=755 covers /proc/fs; mount -t tmpfs -o mode=755 covers /sys/module; exec"
    spec = ContainerSpec(
        image="i",
        argv=(
            "sh",
            "-c",
            "grep -o 'covers /[a-z/]*' /proc/self/mounts | sort -u; ls -d /proc/1/root; touch /proc/fs/x /sys/module/x",
        ),
        user="0:0",
        allow_root=True,
        pid_namespace="host",
        network="host",
        user_namespace=UserNamespace(first=700_000),
    )
    done = runc.start(
        runc.document(spec), before=("unshare", "--mount", "sh", "-c", f'{mounts} "$@"', "-"), check=False
    )
    assert done.stdout == "covers /proc/fs\ncovers /sys/module\n/proc/1/root\n", done.stderr
    assert done.stderr.count("touch: cannot touch") == 2


def test_a_tmpfs_of_one_s_own_is_writable_over_a_directory_of_the_image(runc: Runc) -> None:
    mount = Mount(target="/data", kind="tmpfs", read_only=False, size=MIB)
    assert output(runc, replace(SPEC, mounts=(mount,), argv=(*PYTHON, WRITE, "/data/x"))) == "written"


def limit(runc: Runc, spec: ContainerSpec, v1: str, v2: str) -> str:
    path = f"/sys/fs/cgroup/{v2 if runc.host.cgroup_v2 else v1}"
    return output(runc, replace(spec, argv=("/bin/cat", path)))


def test_limits_are_in_the_container_s_cgroup(runc: Runc) -> None:
    spec = replace(SPEC, resources=Resources(cpus=0.5, memory=64 * MIB, pids=32))
    assert limit(runc, spec, "memory/memory.limit_in_bytes", "memory.max") == str(64 * MIB)
    assert limit(runc, spec, "pids/pids.max", "pids.max") == "32"
    assert limit(runc, spec, "cpu/cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    swap = limit(runc, spec, "memory/memory.memsw.limit_in_bytes", "memory.swap.max")
    assert swap == ("0" if runc.host.cgroup_v2 else str(64 * MIB))


def test_a_fork_bomb_ends_at_the_limit(runc: Runc) -> None:
    script = """
import os, signal
children = []
try:
    while len(children) < 100:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
except BlockingIOError:
    print('ended')
finally:
    for child in children:
        os.kill(child, 9)
"""
    assert output(runc, replace(SPEC, resources=Resources(pids=16), argv=(*PYTHON, script))) == "ended"


ORDINARY = """
import asyncio, concurrent.futures, ctypes, mmap, multiprocessing, os, pathlib, platform, select, shutil, socket
import sqlite3, ssl, subprocess, sys, tempfile, threading, time, venv, fcntl, resource, pty
multiprocessing.set_start_method('fork')

def square(number):
    return number * number

with concurrent.futures.ThreadPoolExecutor(8) as threads:
    assert sum(threads.map(square, range(100))) == 328350
with concurrent.futures.ProcessPoolExecutor(2) as processes:
    assert sum(processes.map(square, range(10))) == 285
for method in ('spawn', 'forkserver'):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=queue.put, args=(method,))
    child.start()
    assert queue.get() == method
    child.join()
    assert child.exitcode == 0
assert subprocess.run(['bash', '-c', 'set -e; (sleep 0 & wait); ls -l /tmp | sort | head -1; ulimit -n'], check=True)
assert b'x' in subprocess.check_output(['bash', '-c', 'cat <(echo x) | tee /tmp/tee; trap "" TERM; kill $$'])

async def main():
    server = await asyncio.start_unix_server(lambda r, w: w.close(), '/tmp/s')
    reader, writer = await asyncio.open_unix_connection('/tmp/s')
    assert await reader.read() == b''
    child = await asyncio.create_subprocess_exec('true')
    assert await child.wait() == 0
    server.close()
asyncio.run(main())

listener = socket.create_server(('127.0.0.1', 0))
client = socket.create_connection(listener.getsockname())
client.close()
assert socket.getaddrinfo('127.0.0.1', 80)
database = sqlite3.connect('/tmp/db')
database.execute('PRAGMA journal_mode=WAL')
database.execute('create table t (x)')
database.close()
ssl.create_default_context()
venv.create('/tmp/venv', with_pip=False, symlinks=False)
assert subprocess.check_output(['/tmp/venv/bin/python', '-c', 'print(1)']) == b'1\\n'
master, slave = pty.openpty()
with tempfile.NamedTemporaryFile() as file:
    file.truncate(4096)
    fcntl.flock(file, fcntl.LOCK_EX)
    mmap.mmap(file.fileno(), 4096)[0] = 1
    shutil.copyfile(file.name, '/tmp/copy')
    os.sendfile(os.open('/tmp/sent', os.O_CREAT | os.O_WRONLY), file.fileno(), 0, 10)
os.sched_setaffinity(0, os.sched_getaffinity(0))
os.nice(1)
os.memfd_create('m')
os.eventfd(0)
fd = os.pidfd_open(os.getpid())
os.setsid() if os.getpid() != os.getsid(0) else None
if platform.machine() == 'x86_64':
    assert ctypes.CDLL('libm.so.6').floor
print('all ran')
"""


def test_ordinary_programs_run_under_the_default_filter(runc: Runc, tmp_path: Path) -> None:
    script = tmp_path.resolve() / "ordinary.py"
    script.write_text(f"if __name__ == '__main__':\n{''.join(f'    {line}' for line in ORDINARY.splitlines(True))}")
    spec = replace(SPEC, mounts=(Mount(target="/ordinary.py", source=str(script)),))
    assert output(runc, replace(spec, argv=("/usr/bin/python3", "-B", "/ordinary.py"))).endswith("all ran")


def test_nothing_is_left_behind(runc: Runc) -> None:
    runc.probe(SPEC)
    assert not list(Path("/sys/fs/cgroup").glob("**/ocirunc-*"))
    assert "/ocirunc-" not in Path("/proc/self/mountinfo").read_text()
    assert not list((runc.directory / "runc").iterdir())

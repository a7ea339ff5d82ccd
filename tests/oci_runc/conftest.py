"""A container made by runc itself, without any daemon, from the JSON that build_runtime_spec gives.

Its root file system is the host's own /usr, bound read-only, with an /etc of our own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_isolation.oci import (
    EtcFiles,
    HostFacts,
    ImageConfig,
    build_runtime_spec,
    load_profile,
    new_container_id,
    read_host,
    resolve_account,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_isolation.container_spec import ContainerSpec

PASSWD = "root:x:0:0:root:/root:/bin/bash\nairflow:x:50000:0:Airflow:/home/airflow:/bin/bash\n"
GROUP = "root:x:0:\ndata:x:70:airflow\ntask:x:50000:\n"
SECONDS = 60
# Told apart from the containers of other suites, which may run at the same time.
PURPOSE = "ocirunc"


def run(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done


@dataclass(frozen=True)
class Runc:
    """runc with a root directory and bundles of its own."""

    directory: Path
    rootfs: Path
    host: HostFacts = field(default_factory=read_host)

    def run(self, spec: ContainerSpec, *, image: ImageConfig | None = None, etc: EtcFiles | None = None) -> str:
        """What the container of ``spec`` prints; it is gone afterwards."""
        return self.start(self.document(spec, image=image, etc=etc)).stdout

    def document(
        self, spec: ContainerSpec, *, image: ImageConfig | None = None, etc: EtcFiles | None = None
    ) -> dict[str, Any]:
        image = image or ImageConfig(architecture=self.host.architecture, user="airflow")
        account = resolve_account(spec.user or image.user, passwd=PASSWD, group=GROUP, allow_root=spec.allow_root)
        container_id = new_container_id(PURPOSE)
        document = build_runtime_spec(
            spec,
            id=container_id,
            image=image,
            account=account,
            host=self.host,
            seccomp=load_profile(spec.seccomp),
            etc=etc or EtcFiles(),
            # Without a parent: a parent's directories would stay behind in every hierarchy.
            cgroups_path=f"/{container_id}",
        )
        document["root"]["path"] = str(self.rootfs)
        return document

    def start(
        self, document: dict[str, Any], *, check: bool = True, before: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run it; ``before`` stands before runc's own command line."""
        container_id = document["linux"]["cgroupsPath"].strip("/")
        bundle = self.directory / container_id
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(document))
        try:
            runc = ("runc", f"--root={self.directory / 'runc'}", "run", f"--bundle={bundle}", container_id)
            return run(*before, *runc, check=check)
        finally:
            run("runc", f"--root={self.directory / 'runc'}", "delete", "--force", container_id)

    def probe(self, spec: ContainerSpec, **more: Any) -> dict[str, Any]:
        """What tests/probe says inside the container of ``spec``, which mounts it and runs it."""
        reality: dict[str, Any] = json.loads(self.run(spec, **more))
        return reality


@pytest.fixture(scope="session")
def rootfs() -> Iterator[Path]:
    """The host's /usr with an /etc of our own. Not in pytest's directory, which only the host's root may enter."""
    root = Path(tempfile.mkdtemp(prefix="ai-rootfs-", dir="/var/tmp"))
    root.chmod(0o755)
    for name in ("usr", "etc", "proc", "sys", "dev", "tmp", "run", "root", "home/airflow", "work", "data"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    with ExitStack() as undo:
        run("mount", "--bind", "/usr", str(root / "usr"))
        undo.callback(run, "umount", "--lazy", str(root / "usr"))
        run("mount", "-o", "remount,bind,ro", str(root / "usr"))
        yield root
    assert not (root / "usr").is_mount()
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def on_path() -> Iterator[None]:
    """runc, which a host has only with a daemon of its own: that of the private containerd."""
    script = '. "$1"/hack/setup/all.sh; containerd_directory 2.1'
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        ["bash", "-ec", script, "-", root], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{done.stdout.strip()}/usr/sbin", prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def runc(on_path: None, rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Runc:
    return Runc(tmp_path_factory.mktemp("runc"), rootfs)

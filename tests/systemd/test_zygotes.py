"""Zygotes on a host of systemd, which mounts file systems in /proc and /sys.

The suite runs in the guest of hack/v2 with systemd as process 1, and has that machine for itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import running
from tests.zygote.at_work.conftest import namespace_worker

if TYPE_CHECKING:
    from tests.conftest import ImageArchive

pytestmark = pytest.mark.root


@pytest.mark.parametrize("form", ["namespace", "host-network"])
def test_tasks_are_forked_in_user_namespaces(image_archive: ImageArchive, form: str) -> None:
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert [path for path in mounted if path.startswith("/proc/")]
    assert [path for path in mounted if path.startswith("/sys/") and not path.startswith("/sys/fs/cgroup")]
    with (
        running("containerd") as daemon,
        namespace_worker(daemon, image_archive("no-airflow"), form) as worker,
    ):
        forked = worker.run("print('there')")
        assert (forked.finish(), forked.start_mode, forked.why_fresh, forked.stdout) == (0, "fork", "", "there\n")

"""How a task is started, and the reason that its administrator reads."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.unit.settings.conftest import Ini

from airflow_isolation.bridge import start_mode
from airflow_isolation.bridge.start_mode import decide, foresee
from airflow_isolation.container_spec import Mount, UserNamespace
from airflow_isolation.errors import SpecRefused
from airflow_isolation.runtime.interface import ImageInNamespace
from airflow_isolation.settings.resolve import resolve
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.bridge.start_mode import StartDecision
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.settings.effective import EffectiveSettings

FIRST = 2_000_000


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that can, whatever this one is."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(platform, "release", lambda: "6.1.0")
    monkeypatch.setattr(start_mode, "why_not_idmapped", lambda source, *, runtime: f"{runtime} can't map ids")


def task(
    state_dir: Path,
    cfg: str = "",
    *,
    backend: Any = "containerd",
    author: bool = False,
    written: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[EffectiveSettings, ContainerSpec]:
    """``author``: the image is the author's; ``written``: what else of the container the author wrote."""
    uids = "" if "uid_range" in cfg else f"uid_range = {FIRST}:{2 * 65536}\n"
    text = f"[container_runtime]\nimage = default:1\nnetwork = none\nstate_dir = {state_dir}\n{uids}{cfg}\n"
    settings = resolve(
        "task",
        backend,
        configuration=Ini(text),
        executor_config={"container": {**({"image": "authors/own:1"} if author else {}), **(written or {})}},
    )
    return settings, replace(container_spec(settings, argv=()), **changes)


class FakeRuntime:
    """A daemon whose images are as a test says; what kernels and images really say is tested with real ones."""

    def __init__(self, found: ImageInNamespace) -> None:
        self.found = found
        self.asked: list[tuple[str, int]] = []

    def in_user_namespace(self, spec: ContainerSpec, *, digest: str, ids: int) -> ImageInNamespace:
        self.asked.append((digest, ids))
        return self.found


KEEPS_OWNERS = ImageInNamespace(keeps_owners=True)


def decided(
    state_dir: Path,
    *arguments: Any,
    digest: str = "sha256:a",
    found: ImageInNamespace = KEEPS_OWNERS,
    **more: Any,
) -> StartDecision:
    settings, spec = task(state_dir, *arguments, **more)
    return decide(settings, spec, runtime=cast("Any", FakeRuntime(found)), image_digest=digest)


def test_by_default_a_task_is_forked_in_a_user_namespace_of_its_image(tmp_path: Path) -> None:
    decision = decided(tmp_path)
    assert (decision.mode, decision.user_namespace) == ("fork", UserNamespace(first=FIRST, keeps_owners=True))
    assert decision.why == f"in a user namespace of the image's own, uids {FIRST} and up"


def test_who_asks_beforehand_gets_the_same_answer_and_changes_nothing(tmp_path: Path) -> None:
    decision = foresee(*task(tmp_path))
    assert (decision.mode, decision.user_namespace) == ("fork", None)
    assert decision.why == f"in a user namespace of the image's own, from the uids {FIRST}:{2 * 65536}"
    assert list(tmp_path.iterdir()) == []


def test_fresh_is_fresh(tmp_path: Path) -> None:
    decision = decided(tmp_path, "start_mode = fresh")
    assert (decision.mode, decision.why) == ("fresh", "start_mode says so")


def test_only_root_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    decision = decided(tmp_path)
    assert (decision.mode, decision.why) == (
        "fresh",
        "only root may move a forked process into a container's cgroup",
    )


def test_an_old_kernel_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.7.19-generic")
    assert decided(tmp_path).why == "forking into a container needs Linux 5.8"


def obstacles(readable: Path, closed: Path) -> list[tuple[str, dict[str, Any], str]]:
    writable = Mount(source=str(readable), target="/out", read_only=False)
    return [
        ("", {"backend": "docker"}, "Docker has no user namespace of a single container"),
        (
            "",
            {"read_only_root": False, "found": ImageInNamespace()},
            "read_only_root is false, and the image's files would belong to nobody",
        ),
        ("", {"found": ImageInNamespace(obstacle="/home/x (mode 0770) is closed")}, "/home/x (mode 0770) is closed"),
        (
            "",
            {"mounts": (writable,)},
            "the volume /out is writable, and its files would change owner: runc can't map ids",
        ),
        (
            "",
            {"mounts": (Mount(source=str(closed), target="/in"),)},
            f"{closed} is not readable for others, and users of a user namespace are others",
        ),
        (
            "",
            {"mounts": (Mount(source=str(closed / "gone"), target="/in"),)},
            f"{closed / 'gone'} is not readable for others, and users of a user namespace are others",
        ),
        ("uid_range = none", {}, "uid_range is none"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_where_a_user_namespace_can_not_be_privilege_is_for_trusted_images_alone(tmp_path: Path, number: int) -> None:
    readable, closed = tmp_path / "readable", tmp_path / "closed"
    readable.mkdir(mode=0o755)
    closed.mkdir(mode=0o700)
    cfg, changes, why = obstacles(readable, closed)[number]
    trusted = decided(tmp_path, cfg, **changes)
    assert (trusted.mode, trusted.user_namespace) == ("fork", None)
    assert trusted.why == f"with privilege on the host, for a trusted image: {why}"
    other = decided(tmp_path, cfg, author=True, **changes)
    assert (other.mode, other.why) == ("fresh", f"{why}, and the image is not among the trusted ones")
    named = decided(tmp_path, f"{cfg}\n[container_runtime_policy]\ntrusted_images = authors/*", author=True, **changes)
    assert named.mode == "fork"


def test_an_image_is_looked_at_only_when_nothing_else_keeps_the_task_out(tmp_path: Path) -> None:
    runtime = cast("Any", FakeRuntime(KEEPS_OWNERS))
    for cfg in ("uid_range = none", "start_mode = fresh"):
        decide(*task(tmp_path, cfg), runtime=runtime, image_digest="sha256:a")
    assert runtime.asked == []
    decide(*task(tmp_path), runtime=runtime, image_digest="sha256:a")
    assert runtime.asked == [("sha256:a", 65536)]


@pytest.mark.parametrize("keeps_owners", [True, False])
def test_a_root_that_may_be_written_to_needs_its_owners(tmp_path: Path, *, keeps_owners: bool) -> None:
    found = ImageInNamespace(keeps_owners=keeps_owners)
    namespace = decided(tmp_path, found=found).user_namespace
    assert namespace == UserNamespace(first=FIRST, keeps_owners=keeps_owners)
    writable = decided(tmp_path, found=found, read_only_root=False)
    assert writable.user_namespace == (namespace if keeps_owners else None)


def test_a_host_without_user_namespaces_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = tmp_path / "most"
    most.write_text("0\n")
    monkeypatch.setattr(start_mode, "_MOST_NAMESPACES", most)
    assert "user.max_user_namespaces is 0" in decided(tmp_path, author=True).why


def test_on_a_kernel_that_can_not_map_layers_the_image_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unless" not in foresee(*task(tmp_path)).why
    monkeypatch.setattr(platform, "release", lambda: "5.15.0-1-generic")
    assert foresee(*task(tmp_path)).why == (
        f"in a user namespace of the image's own, from the uids {FIRST}:{2 * 65536}, unless the image has files "
        "that its user may read and others may not (Linux 5.15 can't map ids below an overlay, as 5.19 can)"
    )


def test_a_tmpfs_and_a_volume_that_all_may_read_are_no_obstacles(tmp_path: Path) -> None:
    readable = tmp_path / "readable"
    readable.mkdir(mode=0o755)
    file = tmp_path / "file"
    file.write_text("")
    file.chmod(0o644)
    mounts = (
        Mount(target="/scratch", kind="tmpfs", read_only=False),
        Mount(source=str(readable), target="/in"),
        Mount(source=str(file), target="/file"),
    )
    assert decided(tmp_path, mounts=mounts).user_namespace == UserNamespace(first=FIRST, keeps_owners=True)


def test_when_all_uids_are_given_away_the_reason_is_named(tmp_path: Path) -> None:
    for digest in ("sha256:a", "sha256:b"):
        assert decided(tmp_path, digest=digest).user_namespace
    third = decided(tmp_path, digest="sha256:c")
    assert third.mode == "fork"
    assert third.why == (
        f"with privilege on the host, for a trusted image: All uids of the range {FIRST}:131072 are given to 2 images"
    )
    untrusted = decided(tmp_path, digest="sha256:c", author=True)
    assert (untrusted.mode, "All uids" in untrusted.why) == ("fresh", True)
    assert decided(tmp_path, digest="sha256:b").user_namespace == UserNamespace(first=FIRST + 65536, keeps_owners=True)


def test_a_state_directory_that_can_not_be_read_is_a_reason_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "uid-ranges.json").write_text("[]")
    assert "can't be read or written" in decided(tmp_path, author=True).why


@pytest.mark.parametrize("ask", [decide, foresee])
def test_who_insists_on_fork_is_told_why_not(tmp_path: Path, ask: Any) -> None:
    settings, spec = task(tmp_path, "start_mode = fork\nuid_range = none", author=True)
    more = {"image_digest": "sha256:a", "runtime": FakeRuntime(KEEPS_OWNERS)} if ask is decide else {}
    with pytest.raises(SpecRefused, match="start_mode is fork, but this task can't be forked: uid_range is none"):
        ask(settings, spec, **more)


def test_insisting_is_no_matter_where_it_can_be(tmp_path: Path) -> None:
    assert decided(tmp_path, "start_mode = fork").mode == "fork"


def test_what_was_given_is_kept_in_a_file(tmp_path: Path) -> None:
    decided(tmp_path)
    assert json.loads((tmp_path / "uid-ranges.json").read_text()) == {"sha256:a": FIRST}


def test_where_ids_can_be_mapped_a_user_namespace_can_have_writable_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def possible(source: str, *, runtime: str) -> str:
        asked.append((source, runtime))
        return ""

    monkeypatch.setattr(start_mode, "why_not_idmapped", possible)
    readable, closed = tmp_path / "readable", tmp_path / "closed"
    readable.mkdir(mode=0o755)
    closed.mkdir(mode=0o700)
    mounts = (
        Mount(source=str(readable), target="/in"),
        Mount(source=str(readable), target="/out", read_only=False),
        Mount(source=str(closed), target="/closed", read_only=False),
    )
    settings, spec = task(tmp_path, "[containerd_runtime]\nruntime_binary = crun", mounts=mounts)
    decision = decide(settings, spec, runtime=cast("Any", FakeRuntime(KEEPS_OWNERS)), image_digest="sha256:a")
    assert (decision.mode, decision.idmapped) == ("fork", frozenset({"/out", "/closed"}))
    assert asked == [(str(readable), "crun"), (str(closed), "crun")]
    applied = decision.applied_to(spec)
    assert applied.user_namespace == UserNamespace(first=FIRST, keeps_owners=True)
    assert [mount.idmapped for mount in applied.mounts] == [False, True, True]
    assert foresee(settings, spec).idmapped == decision.idmapped


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"environment": {"AIRFLOW__CORE__X_CMD": "true"}}, "environment.AIRFLOW__CORE__X_CMD (executor_config)"),
        ({"environment": {"PYTHONPATH": "/more"}}, "environment.PYTHONPATH (executor_config)"),
        ({"environment": {"LD_LIBRARY_PATH": "/more"}}, "environment.LD_LIBRARY_PATH (executor_config)"),
        ({"environment": {"OTEL_SDK_DISABLED": "1"}}, "environment.OTEL_SDK_DISABLED (executor_config)"),
        ({"python": "/opt/python"}, "python (executor_config)"),
        ({"timezone": "Europe/Berlin"}, "timezone (executor_config)"),
        ({"run_as_user": "50001"}, "run_as_user (executor_config)"),
    ],
    ids=str,
)
def test_no_process_with_privilege_is_made_of_what_an_author_wrote(
    tmp_path: Path, written: dict[str, Any], named: str
) -> None:
    decision = decided(tmp_path, "uid_range = none", written=written)
    assert decision.mode == "fresh"
    assert decision.why.endswith(f"a zygote with privilege on the host must not have an author's settings: {named}")
    assert decided(tmp_path, written=written).user_namespace == UserNamespace(first=FIRST, keeps_owners=True)


def test_what_an_author_writes_for_the_task_alone_is_no_reason(tmp_path: Path) -> None:
    written = {"environment": {"REGION": "eu"}, "working_dir": "/opt", "resources": {"memory": "1Gi"}, "hostname": "h"}
    assert decided(tmp_path, "uid_range = none", written=written).mode == "fork"


def test_a_zygote_with_privilege_has_a_filter(tmp_path: Path) -> None:
    unconfined = "uid_range = none\nseccomp_profile = unconfined"
    assert decided(tmp_path, unconfined).why.endswith("seccomp_profile = unconfined would hold for the zygote, too")
    assert decided(tmp_path, "seccomp_profile = unconfined").mode == "fork"

"""From what holds for a task to its container and the zygote that it is forked from; whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_isolation.bridge.start_mode import decide
from airflow_isolation.bridge.started_agent import Launch
from airflow_isolation.bridge.zygote_plan import zygote_plan
from airflow_isolation.oci.identifier import new_container_id
from airflow_isolation.settings.spec import container_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.bridge.zygote import ZygotePlan
    from airflow_isolation.container_spec import Mount
    from airflow_isolation.runtime.interface import ContainerRuntime, Image
    from airflow_isolation.settings.effective import EffectiveSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTheWorker:
    """What a worker's Airflow adds to the settings of a task.

    Attributes:
        airflow: its version.
        forwarded: its configuration, as every task of the worker gets it.
        own: variables of this task alone.
        mounts: the bundle, the local settings and the plugins.
        shared_mounts: the local settings and the plugins, which its zygote needs as well.
        settings_digest: what tells one state of these from another.
        labels: whose container it is.
        client: whose zygote it is, where there are workers of several users; else empty.
        why_no_privilege: why nothing with privilege on the host is made for this worker; empty if it may be.

    """

    airflow: str
    forwarded: Mapping[str, str]
    own: Mapping[str, str]
    mounts: tuple[Mount, ...]
    shared_mounts: tuple[Mount, ...]
    settings_digest: str
    labels: Mapping[str, str]
    client: str = ""
    why_no_privilege: str = ""


def prepared(
    settings: EffectiveSettings, worker: OfTheWorker, *, runtime: ContainerRuntime, image: Image
) -> tuple[Launch, ZygotePlan | None]:
    """The task, with an id of its own, and its zygote; None when it is to start fresh.

    :raises SettingError: a volume of the settings can't be mounted.
    :raises SpecRefused: ``start_mode`` is fork, and this task can't be forked.
    :raises ContainerRuntimeError: the image can't be looked at.
    """
    spec = container_spec(settings, argv=(), mounts=worker.mounts, labels=worker.labels)
    decision = decide(
        settings,
        spec,
        runtime=runtime,
        image_digest=image.digest,
        why_no_privilege=worker.why_no_privilege,
    )
    task = Launch(
        id=new_container_id("task"),
        spec=decision.applied_to(spec),
        image=image,
        purpose="task",
        environment={**worker.forwarded, **worker.own},
        airflow=worker.airflow,
        python=settings.python,
        start_timeout=settings.start_timeout,
    )
    if decision.mode != "fork":
        return task, None
    plan = zygote_plan(
        settings,
        task,
        decision,
        environment=worker.forwarded,
        mounts=worker.shared_mounts,
        settings_digest=worker.settings_digest,
        client=worker.client,
    )
    return task, plan

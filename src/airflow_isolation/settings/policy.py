"""[container_runtime_policy]: what the administrator forbids. It refuses, and never rewrites.

It holds for what authors set, in DAG metadata and executor_config, and for the final image, whoever chose it. It does not
hold for what airflow.cfg itself sets, with one exception: root always needs ``allow_root``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from airflow_isolation.container_spec import DeviceRates
from airflow_isolation.settings.declarations import POLICY_SECTION, keys_of
from airflow_isolation.settings.effective import Grant, Permissions, Volume
from airflow_isolation.settings.formats import is_root, qualified_image
from airflow_isolation.settings.hook import SOURCE as HOOK_SOURCE
from airflow_isolation.settings.layers import Assignment, Layer, declared_layer, default_layer
from airflow_isolation.settings.quantities import format_bytes

_SIZES: Final = frozenset({"memory", "memory_request", "memory_swap", "shm_size", "tmp_size"})
_DURATIONS: Final = frozenset({"stop_grace_period", "start_timeout", "image_pull_timeout"})
#: The keys for which there is a ``max_…``: what one container can take from the others, or from the host, and for how long.
_BOUNDED: Final = frozenset({"cpus", "pids", "cpu_weight", "io_weight"}) | _SIZES | _DURATIONS

if TYPE_CHECKING:
    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy as set. Empty ``allowed_images`` and ``allowed_users`` allow all; None is no bound."""

    allowed_images: tuple[str, ...] = ()
    trusted_images: tuple[str, ...] = ()
    allowed_mount_sources: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    allowed_capabilities: tuple[str, ...] = ()
    max_cpus: float | None = None
    max_memory: int | None = None
    max_pids: int | None = None
    max_cpu_weight: int | None = None
    max_memory_request: int | None = None
    max_memory_swap: int | None = None
    max_io_weight: int | None = None
    max_io: tuple[DeviceRates, ...] = ()
    max_tmp_size: int | None = None
    max_shm_size: int | None = None
    max_stop_grace_period: float | None = None
    max_start_timeout: float | None = None
    max_image_pull_timeout: float | None = None
    allowed_users: tuple[str, ...] = ()
    parse_may_write: bool = False
    allowed_connections: tuple[Grant, ...] = ()
    allowed_variables: tuple[Grant, ...] = ()
    allowed_triggering: tuple[Grant, ...] = ()
    allowed_triggers: tuple[Grant, ...] = ()
    allowed_assets: tuple[Grant, ...] = ()
    allow_root: Assignment

    @classmethod
    def configured(cls, configuration: Configuration) -> Policy:
        """:raises SettingError: a key is unknown or a value doesn't parse."""
        layer = {**default_layer(keys_of(POLICY_SECTION)), **declared_layer(configuration, POLICY_SECTION)}
        allow_root = layer.pop("allow_root")
        return cls(**{name: assignment.value for name, assignment in layer.items()}, allow_root=allow_root)

    def check(self, layer: Layer) -> None:
        """:raises PolicyRefused: an author set something that is not allowed; root also for the administrator."""
        for name, (value, origin) in layer.items():
            if name == "run_as_user" and is_root(value) and not self.allow_root.value:
                raise origin.refusal(
                    f"the user {value} is root, and root is not allowed",
                    hint=f"Choose another user; the administrator can set allow_root = True in [{POLICY_SECTION}]",
                )
            if origin.author:
                self._check_author(name, value, origin)

    def check_image(self, image: Assignment) -> None:
        """:raises PolicyRefused: the final image matches none of ``allowed_images``."""
        patterns = self.allowed_images
        if patterns and not _matches(image.value, patterns):
            raise image.origin.refusal(
                f"the image {image.value} is not allowed", hint=_allowed("allowed_images", patterns)
            )

    def trusts(self, image: Assignment) -> bool:
        """Whether the administrator named the image: in airflow.cfg as the one to use, or as one to be trusted."""
        origin = image.origin
        return _matches(image.value, self.trusted_images) or not (origin.author or origin.source == HOOK_SOURCE)

    @property
    def permissions(self) -> Permissions:
        """What user code may ask Airflow for."""
        return Permissions(
            allowed_connections=self.allowed_connections,
            allowed_variables=self.allowed_variables,
            allowed_triggering=self.allowed_triggering,
            allowed_triggers=self.allowed_triggers,
            allowed_assets=self.allowed_assets,
        )

    def _check_author(self, name: str, value: object, origin: Origin) -> None:
        if isinstance(value, Volume):
            source = PurePosixPath(value.source)
            if not any(source.is_relative_to(prefix) for prefix in self.allowed_mount_sources):
                raise origin.refusal(
                    f"mounting {value.source} is not allowed",
                    hint=_allowed("allowed_mount_sources", self.allowed_mount_sources),
                )
        elif name == "network":
            if value not in self.allowed_networks:
                raise origin.refusal(
                    f"the network {value} is not allowed", hint=_allowed("allowed_networks", self.allowed_networks)
                )
        elif name == "capabilities":
            for capability in value if isinstance(value, tuple) else ():
                if capability not in self.allowed_capabilities:
                    raise origin.refusal(
                        f"the capability {capability} is not allowed",
                        hint=_allowed("allowed_capabilities", self.allowed_capabilities),
                    )
        elif name == "run_as_user":
            patterns = self.allowed_users
            if patterns and not any(fnmatchcase(str(value), pattern) for pattern in patterns):
                raise origin.refusal(f"the user {value} is not allowed", hint=_allowed("allowed_users", patterns))
        elif name == "io_max":
            self._check_io(value if isinstance(value, tuple) else (), origin)
        elif name in _BOUNDED:
            self._check_bound(name, value, origin)

    def _check_bound(self, name: str, value: object, origin: Origin) -> None:
        bound = getattr(self, f"max_{name}")
        if bound is None or not isinstance(value, (int, float)) or value <= bound:
            return
        asked, most = (_quantity(name, count) for count in (value, bound))
        raise origin.refusal(f"{asked} is more than [{POLICY_SECTION}] max_{name} allows, {most}")

    def _check_io(self, asked: tuple[DeviceRates, ...], origin: Origin) -> None:
        # An author's io_max replaces the administrator's, so leaving a disk out would lift its limit.
        given = {rates.device: rates for rates in asked}
        for bound in self.max_io:
            rates = given.get(bound.device, DeviceRates(device=bound.device))
            for name in ("rbps", "wbps", "riops", "wiops"):
                most, wanted = getattr(bound, name), getattr(rates, name)
                if most is not None and not (isinstance(wanted, int) and wanted <= most):
                    words = "no limit" if wanted is None else wanted
                    raise origin.refusal(
                        f"{name} of {bound.device} is {words}, and [{POLICY_SECTION}] max_io allows {most}",
                        hint=f"Write {bound.device} {name}={most} or less, with the disk named as here",
                    )


def _quantity(name: str, count: float) -> str:
    if name in _SIZES:
        return format_bytes(int(count))
    return f"{count:g} seconds" if name in _DURATIONS else str(count)


def _matches(image: str, patterns: tuple[str, ...]) -> bool:
    names = {image, qualified_image(image)}
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _allowed(key: str, allowed: tuple[str, ...]) -> str:
    return f"[{POLICY_SECTION}] {key} is {', '.join(allowed) if allowed else 'empty, which allows none'}"

"""From a ContainerSpec to the OCI runtime-spec JSON: pure functions, and the few that read what they need of the host."""

from __future__ import annotations

from airflow_isolation.oci.account import Account, needs_account_files, resolve_account
from airflow_isolation.oci.etc_files import EtcFiles, write_etc_files
from airflow_isolation.oci.host import HostFacts, read_host
from airflow_isolation.oci.identifier import check_identifier, is_container_id, new_container_id
from airflow_isolation.oci.image_config import ImageConfig
from airflow_isolation.oci.mount_source import check_mount_source_on_disk
from airflow_isolation.oci.mounts import (
    OWN_DIRECTORY,
    check_led_target,
    check_mount_source,
    check_mount_target,
    volume_targets,
)
from airflow_isolation.oci.runtime_spec import (
    build_runtime_spec,
    capability_names,
    container_hostname,
    linux_limits,
    linux_resources,
    process_environment,
    working_directory,
)
from airflow_isolation.oci.seccomp import docker_profile, load_profile, resolve_profile

__all__ = [
    "OWN_DIRECTORY",
    "Account",
    "EtcFiles",
    "HostFacts",
    "ImageConfig",
    "build_runtime_spec",
    "capability_names",
    "check_identifier",
    "check_led_target",
    "check_mount_source",
    "check_mount_source_on_disk",
    "check_mount_target",
    "container_hostname",
    "docker_profile",
    "is_container_id",
    "linux_limits",
    "linux_resources",
    "load_profile",
    "needs_account_files",
    "new_container_id",
    "process_environment",
    "read_host",
    "resolve_account",
    "resolve_profile",
    "volume_targets",
    "working_directory",
    "write_etc_files",
]

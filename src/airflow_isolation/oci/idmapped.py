"""Whether the host's files can keep their owners in a container with a user namespace, by idmapped mounts
(docs/glossary.md).
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import psutil

from airflow_isolation.oci.host import kernel_version, runtime_features

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The file systems that can be mounted idmapped, and since which Linux: mount_setattr(2).
_SINCE = {
    "ext4": (5, 12),
    "xfs": (5, 12),
    "vfat": (5, 12),
    "btrfs": (5, 15),
    "f2fs": (5, 18),
    "erofs": (5, 19),
    "squashfs": (6, 2),
    "tmpfs": (6, 3),
    "ceph": (6, 7),
}

#: The first Linux that allows idmapped lower layers in an overlay.
_OVERLAY = (5, 19)


def why_no_overlay(release: str) -> str:
    """Why an overlay can't have idmapped layers on a kernel with this ``uname -r``; empty when it can."""
    kernel = kernel_version(release)
    return "" if kernel >= _OVERLAY else f"Linux {kernel[0]}.{kernel[1]} can't map ids below an overlay, as 5.19 can"


def why_not_idmapped(source: str, *, runtime: str) -> str:
    """Why ``source``, with all that is mounted below it, can't be mounted idmapped; empty when it can.

    ``runtime`` is asked once for its features, which takes some 20 ms.
    """
    if not runtime_features(runtime).idmapped_mounts:
        return f"{runtime} can't map ids, as runc can since 1.2"
    found = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    kernel = kernel_version(platform.release())
    for kind in file_systems(source, found):
        if kernel < _SINCE.get(kind, (999, 0)):
            return f"Linux {kernel[0]}.{kernel[1]} can't map ids on {kind}"
    return ""


def file_systems(source: str, mounts: Iterable[tuple[str, str]]) -> list[str]:
    """The kinds of file system at and below a path. ``mounts`` are all mounts: point and kind, the oldest first."""
    own, below = "", set()
    longest = 0
    for point, kind in mounts:
        if point.startswith(f"{source}/"):
            below.add(kind)
        elif f"{source}/".startswith(f"{point.rstrip('/')}/") and len(point) >= longest:
            own, longest = kind, len(point)
    return sorted({own, *below})

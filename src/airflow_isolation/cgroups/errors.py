"""What can go wrong with cgroups. Every error names the directory or file, the value, and the kernel's reason.

CgroupError
├── NotUnified          the host's cgroups are v1 or hybrid, or there are none
├── ControllerMissing   the kernel lacks the controller, v1 holds it, or it is not handed down to this subtree
├── CgroupDenied        read-only mount, or the subtree is not delegated to this user
├── CgroupBusy          processes or cgroups are in the way
├── CgroupGone          the directory is not there, or no longer
└── ValueRefused        the kernel does not take this value
"""

from __future__ import annotations

from airflow_isolation.errors import IsolationError


class CgroupError(IsolationError):
    """Something failed in the cgroup file system."""


class NotUnified(CgroupError):
    """There is no cgroup v2 with controllers where it was looked for."""


class ControllerMissing(CgroupError):
    """A controller, or one of its files, is not there."""


class CgroupDenied(CgroupError):
    """This process may not change these cgroups."""


class CgroupBusy(CgroupError):
    """Processes or cgroups are still in the cgroup."""


class CgroupGone(CgroupError):
    """The cgroup does not exist. A removal takes that for success."""


class ValueRefused(CgroupError):
    """The kernel refuses the value, or would kill processes to meet it."""

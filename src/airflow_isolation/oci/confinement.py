"""What confines every container, as data: paths masked or read-only in it, devices, limits, capability names.

It is the union of containerd's oci.WithDefaultSpec and Docker's defaults.
"""

from __future__ import annotations

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)

#: What hosts mount in their /sys. It is seen only where the host's /sys is bound; a sysfs of the container's own lacks it.
MOUNTED_IN_SYS = (
    "/sys/fs/bpf",
    "/sys/fs/fuse/connections",
    "/sys/fs/pstore",
    "/sys/fs/selinux",
    "/sys/fs/smackfs",
    "/sys/hypervisor/s390",
    "/sys/kernel/config",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
)

READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

#: For a /proc of the host's processes: a user finds its own alone. Without the second the group root, which is that of many
#: images' users, is let off; this group is nobody's, and has a number that the smallest user namespaces have, too.
HIDDEN_PROCESSES = ("hidepid=invisible", "gid=65533")

# (major, minor) of the character devices that a container may use; the runtime makes their nodes.
# null, zero, full, random, urandom, tty, ptmx, and every pseudo-terminal of the container's own devpts.
DEVICES: tuple[tuple[int, int | None], ...] = (
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (5, 2),
    (136, None),
)

# With 1024 select() works, and old programs don't close half a million descriptors. A program may raise it.
NOFILE_SOFT = 1024
NOFILE_HARD = 524288

# When the host runs out of memory, the kernel shall kill a workload before the worker that watches it.
OOM_SCORE_ADJ = 100

UMASK = 0o022

# fmt: off
CAPABILITIES = frozenset(
    {
        "AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "CHOWN",
        "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE",
        "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_BROADCAST",
        "NET_RAW", "PERFMON", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYSLOG", "SYS_ADMIN", "SYS_BOOT",
        "SYS_CHROOT", "SYS_MODULE", "SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE", "SYS_TIME",
        "SYS_TTY_CONFIG", "WAKE_ALARM",
    }
)
# fmt: on

"""Every key there is, declared once.

Parsing, the provider info (``airflow config list``) and docs/settings.md all read these declarations. A section's name
says which workloads and which backend it is for; ``overriding_sections`` gives the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Final

from airflow_isolation.settings import formats, quantities

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.settings.effective import Backend, Purpose

VERSION_ADDED: Final = "0.1.0"

COMMON_SECTION: Final = "container_runtime"
POLICY_SECTION: Final = "container_runtime_policy"
PARSING_SECTION: Final = "scheduler_dag_parsing_container_runtime"
LABELS_SUFFIX: Final = "_labels"
ENVIRONMENT_SUFFIX: Final = "_environment"
BACKENDS: Final[tuple[Backend, ...]] = ("containerd", "docker")
PURPOSE_PREFIX: Final[dict[Purpose, str]] = {"task": "task_execution", "parse": "scheduler_dag_parsing"}


class Place(Enum):
    """Which sections of airflow.cfg a key may stand in; the value names the lowest of them.

    ``EVERYWHERE`` is every section of ``overriding_sections``. ``HOST`` is [container_runtime] alone, for what can't
    differ between the containers of a host. ``NODE`` is the same section, for the node and its clients. ``PARSING`` is for
    the DAG processor as a whole. ``DOCUMENT`` is no section: the key may stand in DAG metadata and executor_config only.
    """

    EVERYWHERE = "[container_runtime] or a section that overrides it"
    HOST = "[container_runtime]"
    NODE = "[container_runtime] of a host"
    CONTAINERD = "[containerd_runtime]"
    DOCKER = "[docker_runtime]"
    PARSING = "[scheduler_dag_parsing_container_runtime]"
    POLICY = "[container_runtime_policy]"
    CORE = "[core]"
    DOCUMENT = "DAG metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key.

    Attributes:
        parse: makes a value of the text, or of each item when ``is_list``; raises ValueError with a sentence.
        default: as one would write it; empty means "not set".
        default_words: what holds when the key is not set, in words.
        author: DAG metadata and executor_config may set it too, below ``group`` when there is one.
        is_list: in airflow.cfg separated by commas or lines, in YAML a list.
        is_map: a map of names to text (a document's ``environment`` and ``labels``).

    """

    name: str
    parse: Callable[[str], object]
    description: str
    default: str = ""
    default_words: str = ""
    example: str = ""
    places: tuple[Place, ...] = (Place.EVERYWHERE,)
    author: bool = False
    group: str = ""
    is_list: bool = False
    is_map: bool = False

    @property
    def document_name(self) -> str:
        """As DAG metadata writes it, such as ``resources.memory``."""
        return f"{self.group}.{self.name}" if self.group else self.name


_CONNECTION = (Place.CONTAINERD, Place.DOCKER)

_NEEDS_V2 = "Needs cgroup v2 and a worker that may make cgroups."
_NEEDS_V2_FOR_WEIGHT = "On cgroup v2 it needs a worker that may make cgroups."

KEYS: Final[tuple[Key, ...]] = (
    Key(
        name="image",
        parse=formats.parse_image,
        author=True,
        example="registry.example/team/airflow:3.3.2",
        default_words="an image must be set somewhere",
        description="The image that containers are made of, with a tag or digest. It needs Python, and Airflow of the "
        "worker's minor version; its ENTRYPOINT is not run.",
    ),
    Key(
        name="image_pull_policy",
        parse=formats.parse_pull_policy,
        author=True,
        default="if_not_present",
        example="never",
        description="When the image is pulled: always, if_not_present or never.",
    ),
    Key(
        name="image_pull_timeout",
        parse=quantities.parse_duration,
        author=True,
        default="600",
        example="10m",
        description="How long a pull may take, in seconds.",
    ),
    Key(
        name="volume_mount_yaml",
        parse=formats.parse_path,
        example="/etc/airflow/volumes.yaml",
        description='Path of a YAML file with a list of volumes, such as "- /data/sales:/data:ro". It is a file of its '
        "own because such lists get long. Without :rw a volume is read-only.",
    ),
    Key(
        name="volumes",
        parse=formats.parse_volume,
        places=(Place.DOCUMENT,),
        author=True,
        is_list=True,
        example='["/data/sales:/data:ro", "/scratch/sales:/scratch:rw"]',
        description="Volumes as source:target[:ro|rw]; without :rw a volume is read-only. They are added to those of "
        "lower layers; one with the same target replaces the other.",
    ),
    Key(
        name="environment",
        parse=formats.parse_text,
        places=(Place.DOCUMENT,),
        author=True,
        is_map=True,
        example="{REGION: eu, LOG_FORMAT: json}",
        description="Environment variables, names kept as written. They are added to those of lower layers and of the "
        "image, and are stronger. In airflow.cfg they have sections of their own.",
    ),
    Key(
        name="labels",
        parse=formats.parse_text,
        places=(Place.DOCUMENT,),
        author=True,
        is_map=True,
        example="{team: sales}",
        description="Labels of the container, added to those of lower layers. Names that begin with io.airflow. are "
        "ours. In airflow.cfg labels have sections of their own.",
    ),
    Key(
        name="run_as_user",
        parse=formats.parse_user,
        author=True,
        example="50000:0",
        default_words="[core] default_impersonation for tasks, else the image's USER",
        description="Who the container runs as: a name of the image's /etc/passwd, a uid, or uid:gid. Uid 0 is refused "
        "unless the policy has allow_root. An operator's own run_as_user is refused: no sudo works in a container.",
    ),
    Key(
        name="network",
        parse=formats.parse_network,
        author=True,
        default="host",
        example="none",
        description="host, none (nothing but loopback, and Airflow still works) or the name of a network.",
    ),
    Key(
        name="cpus",
        parse=quantities.parse_cpus,
        author=True,
        group="resources",
        example="500m",
        default_words="no limit",
        description="Limit in cores.",
    ),
    Key(
        name="memory",
        parse=quantities.parse_memory,
        author=True,
        group="resources",
        example="2Gi",
        default_words="no limit",
        description="Limit in bytes; swap is off.",
    ),
    Key(
        name="pids",
        parse=quantities.parse_pids,
        author=True,
        group="resources",
        default="4096",
        example="256",
        description="Limit for processes and threads together.",
    ),
    Key(
        name="cpu_weight",
        parse=quantities.parse_weight,
        author=True,
        group="resources",
        example="200",
        default_words="the kernel's, 100",
        description="Share of the processors against other workloads when they are all busy, 1 to 10000. "
        + _NEEDS_V2_FOR_WEIGHT,
    ),
    Key(
        name="cpuset",
        parse=quantities.parse_processors,
        author=True,
        group="resources",
        example="0-3",
        default_words="all",
        description="The processors that may be used, as numbers and ranges.",
    ),
    Key(
        name="memory_request",
        parse=quantities.parse_memory,
        author=True,
        group="resources",
        example="1Gi",
        default_words="none",
        description="Memory in bytes that the kernel spares when others need some. "
        + _NEEDS_V2
        + " A node counts it on every host, to start no more tasks than fit (admission).",
    ),
    Key(
        name="memory_high",
        parse=quantities.parse_memory,
        author=True,
        group="resources",
        example="1800Mi",
        default_words="memory_request + 0.9 * (memory - memory_request), and none without memory_request",
        description="Bytes from which on the workload is slowed down rather than killed. " + _NEEDS_V2,
    ),
    Key(
        name="memory_swap",
        parse=quantities.parse_swap,
        author=True,
        group="resources",
        example="512Mi",
        default_words="no swap",
        description="Bytes of swap that may be used besides memory.",
    ),
    Key(
        name="io_max",
        parse=quantities.parse_device_rates,
        author=True,
        group="resources",
        is_list=True,
        example='["/dev/sda rbps=50Mi wiops=200"]',
        default_words="no limit",
        description="Limits for disks: bytes (rbps, wbps) and operations (riops, wiops) a second. " + _NEEDS_V2,
    ),
    Key(
        name="io_weight",
        parse=quantities.parse_weight,
        author=True,
        group="resources",
        example="200",
        default_words="the kernel's, 100",
        description="Share of the disks, as cpu_weight; heeded by the bfq scheduler and by io.cost alone. " + _NEEDS_V2,
    ),
    Key(
        name="budget_cpus",
        parse=quantities.parse_cpus,
        example="12",
        default_words="no limit",
        description="Limit in cores for all workloads of the purpose together, so that they can't take the host. "
        + _NEEDS_V2,
    ),
    Key(
        name="budget_memory",
        parse=quantities.parse_memory,
        example="48Gi",
        default_words="no limit",
        description="Limit in bytes for all workloads of the purpose together. " + _NEEDS_V2,
    ),
    Key(
        name="budget_pids",
        parse=quantities.parse_pids,
        example="20000",
        default_words="no limit",
        description="Limit for the processes and threads of all workloads of the purpose together. " + _NEEDS_V2,
    ),
    Key(
        name="shm_size",
        parse=quantities.parse_tmpfs_size,
        author=True,
        default="64Mi",
        example="1Gi",
        description="Size of /dev/shm. What lies in it counts as memory of the container.",
    ),
    Key(
        name="tmp_size",
        parse=quantities.parse_tmpfs_size,
        author=True,
        default="1Gi",
        example="4Gi",
        description="Size of the tmpfs on /tmp, and of the one on each VOLUME that the image leaves empty. What lies in them "
        "counts as memory of the container.",
    ),
    Key(
        name="read_only_root",
        parse=formats.parse_bool,
        default="True",
        example="False",
        description="The image's file system is read-only. /tmp can be written to, and each VOLUME that the image leaves "
        "empty.",
    ),
    Key(
        name="capabilities",
        parse=formats.parse_capability,
        author=True,
        is_list=True,
        example="NET_BIND_SERVICE",
        default_words="none at all",
        description="Linux capabilities that the container has. Nothing else is in its sets.",
    ),
    Key(
        name="seccomp_profile",
        parse=formats.parse_seccomp,
        default="default",
        example="/etc/airflow/seccomp.json",
        description="default, unconfined, or the path of a profile in Docker's JSON form.",
    ),
    Key(
        name="working_dir",
        parse=formats.parse_working_dir,
        author=True,
        example="/srv/work",
        default_words="the image's WORKDIR",
        description="Directory in the container in which the workload begins.",
    ),
    Key(
        name="timezone",
        parse=formats.parse_timezone,
        author=True,
        example="Europe/Berlin",
        default_words="the image's",
        description="Local time in the container (TZ). Airflow itself works in UTC.",
    ),
    Key(
        name="hostname",
        parse=formats.parse_hostname,
        author=True,
        example="sales",
        default_words="made by the backend; dag-processor for all parses",
        description="Host name inside the container.",
    ),
    Key(
        name="stop_grace_period",
        parse=quantities.parse_grace_period,
        author=True,
        default="10",
        example="30s",
        description="Seconds between SIGTERM and SIGKILL, whether a task is cleared or marked, or its worker ends or dies.",
    ),
    Key(
        name="start_timeout",
        parse=quantities.parse_duration,
        author=True,
        default="60",
        example="2m",
        description="Seconds from the container's start until its agent must have reported. The pull doesn't count.",
    ),
    Key(
        name="python",
        parse=formats.parse_interpreter,
        author=True,
        default="python3",
        example="/opt/venv/bin/python",
        description="The interpreter in the image that has Airflow: a name on the image's PATH, or an absolute path.",
    ),
    Key(
        name="parse_mode",
        parse=formats.parse_parse_mode,
        author=True,
        default="fork",
        example="fresh",
        description="How DAG files are parsed: fork has one container import Airflow once and fork for each file, one "
        "after the other; fresh starts a container for every parse, which takes seconds. Without meaning for tasks.",
    ),
    Key(
        name="start_mode",
        parse=formats.parse_start_mode,
        author=True,
        default="auto",
        example="fresh",
        description="How tasks are started: fork has a process that has imported Airflow fork into the task's container, "
        "which takes a tenth of a second; fresh imports Airflow in it, which takes seconds and works with any image; auto "
        "forks where that is safe. fork refuses to start a task that can't be forked. Without meaning for parsing.",
    ),
    Key(
        name="spare_containers",
        parse=quantities.parse_natural,
        places=(Place.HOST,),
        default="2",
        example="0",
        description="How many containers are kept ready for tasks like those that were just started. They end by "
        "themselves when no task comes.",
    ),
    Key(
        name="uid_range",
        parse=formats.parse_uid_range,
        places=(Place.HOST,),
        example="1000000:6553600",
        default_words="the entry of the worker's user in /etc/subuid, else what is free for root from 524288 on",
        description="FIRST:COUNT: uids and gids of the host that nobody else uses. Each image gets 65536 of them, for the user "
        "namespace of its tasks, so that forking needs no privilege on the host. With none there are no such namespaces.",
    ),
    Key(
        name="zygote_idle_timeout",
        parse=quantities.parse_duration,
        places=(Place.HOST,),
        default="10m",
        example="1h",
        description="The process from which tasks are forked ends when no task came for so long. It holds Airflow in memory.",
    ),
    Key(
        name="zygote_max_age",
        parse=quantities.parse_duration,
        places=(Place.HOST,),
        default="12h",
        example="24h",
        description="The process from which tasks are forked is replaced when it is older.",
    ),
    Key(
        name="zygote_max_forks",
        parse=quantities.parse_count,
        places=(Place.HOST,),
        default="10000",
        example="1000",
        description="The process from which tasks are forked is replaced after so many tasks.",
    ),
    Key(
        name="zygote_memory",
        parse=quantities.parse_memory,
        places=(Place.HOST,),
        default="1Gi",
        example="2Gi",
        description="The memory limit of the process from which tasks are forked. It is replaced when it has used "
        "half of it. Tasks have their own limits.",
    ),
    Key(
        name="cgroup_parent",
        parse=formats.parse_cgroup_parent,
        example="airflow",
        default_words="the backend's own",
        description="The cgroup below which containers are placed: one budget for all of them.",
    ),
    Key(
        name="state_dir",
        parse=formats.parse_path,
        places=(Place.HOST,),
        example="/run/airflow-isolation",
        default_words="/run/airflow-isolation for root, else airflow-isolation in $XDG_RUNTIME_DIR, "
        "else airflow-isolation-UID in the directory for temporary files",
        description="Directory for sockets between worker and container, which live as long as a container.",
    ),
    Key(
        name="node",
        parse=formats.parse_socket,
        places=(Place.NODE,),
        example="/run/airflow-isolation/node.sock",
        default_words="each worker makes its containers itself",
        description="The socket of this host's node, the service that makes tasks' containers. A worker that has it needs "
        "neither root nor the daemon's socket. All other keys are then the node's to say, in its own airflow.cfg.",
    ),
    Key(
        name="node_clients",
        parse=formats.parse_client,
        places=(Place.NODE,),
        is_list=True,
        example="airflow, 50000, @airflow-workers",
        default_words="root, and the user of the node",
        description="Who may have the node start tasks: names or uids of users, and names or gids of groups behind an @.",
    ),
    Key(
        name="node_timeout",
        parse=quantities.parse_duration,
        places=(Place.NODE,),
        default="30",
        example="2m",
        description="How long a worker waits for a node that does not answer, in seconds. Then the task is put off, and no "
        "try is used up.",
    ),
    Key(
        name="admission",
        parse=formats.parse_bool,
        places=(Place.NODE,),
        default="True",
        example="False",
        description="A node starts no more tasks at a time than this host has memory for; the others wait for their turn. A "
        "task is counted for its memory_request, else its memory, else 256 MiB.",
    ),
    Key(
        name="capacity_memory",
        parse=quantities.parse_memory,
        places=(Place.NODE,),
        example="48Gi",
        default_words="the host's memory less a tenth and 512 MiB, and budget_memory at most",
        description="What the tasks of a node may have together, in bytes.",
    ),
    Key(
        name="capacity_cpus",
        parse=quantities.parse_cpus,
        places=(Place.NODE,),
        example="16",
        default_words="cores are not counted: tasks share them",
        description="For how many cores the tasks of a node may ask together. A task is counted for its cpus, one without for "
        "none.",
    ),
    Key(
        name="admission_timeout",
        parse=quantities.parse_duration,
        places=(Place.NODE,),
        default="5m",
        example="20m",
        description="How long a task waits for its turn, in seconds. Then it is put off, and no try is used up. It waits no "
        "longer than Airflow lets a queued task be (task_queued_timeout).",
    ),
    Key(
        name="socket_path",
        parse=formats.parse_socket,
        places=(Place.CONTAINERD,),
        default="/run/containerd/containerd.sock",
        example="/run/containerd/containerd.sock",
        description="containerd's socket.",
    ),
    Key(
        name="socket_path",
        parse=formats.parse_socket,
        places=(Place.DOCKER,),
        default="/var/run/docker.sock",
        example="/run/user/1000/docker.sock",
        description="The Docker daemon's socket.",
    ),
    Key(
        name="namespace",
        parse=formats.parse_namespace,
        places=(Place.CONTAINERD,),
        default="airflow",
        example="airflow",
        description="containerd's namespace in which our containers and images live.",
    ),
    Key(
        name="namespace",
        parse=formats.parse_namespace,
        places=(Place.DOCKER,),
        default="airflow",
        example="airflow",
        description="Docker has no namespaces; a label with this value tells our containers from others'.",
    ),
    Key(
        name="snapshotter",
        parse=formats.parse_namespace,
        places=(Place.CONTAINERD,),
        default="overlayfs",
        example="native",
        description="The snapshotter that holds images and the containers' file systems.",
    ),
    Key(
        name="runtime_binary",
        parse=formats.parse_interpreter,
        places=(Place.CONTAINERD,),
        example="/usr/bin/crun",
        default_words="containerd's own, runc",
        description="The OCI runtime that containerd's shim calls.",
    ),
    Key(
        name="hosts_dir",
        parse=formats.parse_path,
        places=(Place.CONTAINERD,),
        example="/etc/containerd/certs.d",
        default_words="registries as they are",
        description="Directory with a hosts.toml for each registry: mirrors, certificates, plain HTTP.",
    ),
    Key(
        name="cgroup_mount_path",
        parse=formats.parse_path,
        places=_CONNECTION,
        default="/sys/fs/cgroup",
        example="/sys/fs/cgroup",
        description="Where the host has its cgroups.",
    ),
    Key(
        name="parse_containers",
        parse=quantities.parse_count,
        places=(Place.PARSING,),
        default="8",
        example="20",
        description="How many parse containers there may be at a time, idle ones included; each holds Airflow in memory. "
        "The least recently used one makes way.",
    ),
    Key(
        name="parse_idle_timeout",
        parse=quantities.parse_duration,
        places=(Place.PARSING,),
        default="10m",
        example="1h",
        description="A parse container that has had nothing to do for so long is removed.",
    ),
    Key(
        name="parse_max_age",
        parse=quantities.parse_duration,
        places=(Place.PARSING,),
        default="1h",
        example="24h",
        description="A parse container that is older is replaced.",
    ),
    Key(
        name="parse_max_forks",
        parse=quantities.parse_count,
        places=(Place.PARSING,),
        default="1000",
        example="100",
        description="A parse container that has parsed so many files is replaced.",
    ),
    Key(
        name="parse_max_memory",
        parse=quantities.parse_memory,
        places=(Place.PARSING,),
        example="1Gi",
        default_words="no bound",
        description="A parse container that holds more memory between two files is replaced.",
    ),
    Key(
        name="allowed_images",
        parse=formats.parse_text,
        places=(Place.POLICY,),
        is_list=True,
        example="registry.example/team/*",
        default_words="all images",
        description="Shell patterns; an image must match one, as written or in full (docker.io/library/python:3.12). "
        "Holds for the final image, whoever set it, the hook included.",
    ),
    Key(
        name="trusted_images",
        parse=formats.parse_text,
        places=(Place.POLICY,),
        is_list=True,
        example="registry.example/team/*",
        default_words="none but what airflow.cfg itself sets as image",
        description="Shell patterns of images. Where the process from which tasks are forked needs privilege on the host, "
        "only these images may hold it: with Docker, and where a task can't run in a user namespace. It starts before any "
        "user's code, and runs nothing but what is in the image.",
    ),
    Key(
        name="allowed_mount_sources",
        parse=formats.parse_path,
        places=(Place.POLICY,),
        is_list=True,
        example="/data, /scratch",
        default_words="none",
        description="Directories of the host that authors may mount from. What volume_mount_yaml lists is allowed "
        "always.",
    ),
    Key(
        name="allowed_networks",
        parse=formats.parse_network,
        places=(Place.POLICY,),
        is_list=True,
        default="host,none",
        example="none,sales",
        description="Networks that authors may choose.",
    ),
    Key(
        name="allowed_capabilities",
        parse=formats.parse_capability,
        places=(Place.POLICY,),
        is_list=True,
        example="NET_BIND_SERVICE",
        default_words="none",
        description="Linux capabilities that authors may ask for.",
    ),
    Key(
        name="max_cpus",
        parse=quantities.parse_cpus,
        places=(Place.POLICY,),
        example="8",
        default_words="no bound",
        description="The most that authors may set as cpus. Set cpus in [container_runtime] as well, to bound those "
        "who set nothing.",
    ),
    Key(
        name="max_memory",
        parse=quantities.parse_memory,
        places=(Place.POLICY,),
        example="32Gi",
        default_words="no bound",
        description="The most that authors may set as memory. Set memory in [container_runtime] as well, to bound "
        "those who set nothing.",
    ),
    Key(
        name="max_pids",
        parse=quantities.parse_pids,
        places=(Place.POLICY,),
        example="8192",
        default_words="no bound",
        description="The most that authors may set as pids.",
    ),
    Key(
        name="max_cpu_weight",
        parse=quantities.parse_weight,
        places=(Place.POLICY,),
        example="200",
        default_words="no bound",
        description="The most that authors may set as cpu_weight.",
    ),
    Key(
        name="max_memory_request",
        parse=quantities.parse_memory,
        places=(Place.POLICY,),
        example="8Gi",
        default_words="no bound",
        description="The most that authors may set as memory_request. Other workloads go without that memory.",
    ),
    Key(
        name="max_memory_swap",
        parse=quantities.parse_swap,
        places=(Place.POLICY,),
        example="1Gi",
        default_words="no bound",
        description="The most that authors may set as memory_swap; 0 is none.",
    ),
    Key(
        name="max_io_weight",
        parse=quantities.parse_weight,
        places=(Place.POLICY,),
        example="200",
        default_words="no bound",
        description="The most that authors may set as io_weight.",
    ),
    Key(
        name="max_io",
        parse=quantities.parse_device_rates,
        places=(Place.POLICY,),
        is_list=True,
        example="/dev/sda rbps=100Mi wbps=50Mi",
        default_words="no bound",
        description="The most that authors may set as io_max. An author's io_max replaces the administrator's, so one that "
        "leaves out a disk named here is refused.",
    ),
    Key(
        name="max_tmp_size",
        parse=quantities.parse_tmpfs_size,
        places=(Place.POLICY,),
        example="8Gi",
        default_words="no bound",
        description="The most that authors may set as tmp_size. Without a limit for memory, what lies there takes the host's "
        "memory.",
    ),
    Key(
        name="max_shm_size",
        parse=quantities.parse_tmpfs_size,
        places=(Place.POLICY,),
        example="2Gi",
        default_words="no bound",
        description="The most that authors may set as shm_size, as max_tmp_size.",
    ),
    Key(
        name="max_stop_grace_period",
        parse=quantities.parse_grace_period,
        places=(Place.POLICY,),
        example="2m",
        default_words="no bound",
        description="The most that authors may set as stop_grace_period. A task that was told to end holds its slot for so "
        "long.",
    ),
    Key(
        name="max_start_timeout",
        parse=quantities.parse_duration,
        places=(Place.POLICY,),
        example="5m",
        default_words="no bound",
        description="The most that authors may set as start_timeout. An image that does not start holds a slot for so long.",
    ),
    Key(
        name="max_image_pull_timeout",
        parse=quantities.parse_duration,
        places=(Place.POLICY,),
        example="30m",
        default_words="no bound",
        description="The most that authors may set as image_pull_timeout. A pull may hold a slot for so long.",
    ),
    Key(
        name="allowed_users",
        parse=formats.parse_text,
        places=(Place.POLICY,),
        is_list=True,
        example="airflow, 50000, 50000:0",
        default_words="all but root",
        description="Shell patterns of what authors may set as run_as_user, as they write it: a name, a uid, or uid:gid. "
        "Without a uid_range, and in writable volumes always, these are uids and gids of the host. The user that an image "
        "itself names is not checked here; allowed_images decides about images.",
    ),
    Key(
        name="allow_root",
        parse=formats.parse_bool,
        places=(Place.POLICY,),
        default="False",
        example="True",
        description="Containers may run as uid 0. Without it an image whose USER is root is refused.",
    ),
    Key(
        name="parse_may_write",
        parse=formats.parse_bool,
        places=(Place.POLICY,),
        default="False",
        example="True",
        description="DAG files may set and delete Variables while they are parsed. Callbacks always may.",
    ),
    Key(
        name="allowed_connections",
        parse=formats.parse_grant,
        places=(Place.POLICY,),
        is_list=True,
        example="sales/*:sales_*, */reports.py:warehouse",
        default_words="all connections, for all files",
        description="Which connections a DAG file may read, while it is parsed and in its tasks, as FILE:ID. Both are "
        "shell patterns; FILE is the bundle's name and the path in it, and * matches slashes too. As soon as there is an "
        "entry, what no entry allows is refused.",
    ),
    Key(
        name="allowed_variables",
        parse=formats.parse_grant,
        places=(Place.POLICY,),
        is_list=True,
        example="sales/*:sales_*",
        default_words="all Variables, for all files",
        description="The same for Variables, to read, set and delete. As soon as there is an entry, nobody may list all keys.",
    ),
    Key(
        name="allowed_triggering",
        parse=formats.parse_grant,
        places=(Place.POLICY,),
        is_list=True,
        example="sales/*:sales_*, */all.py:*",
        default_words="all DAGs, for all files",
        description="The same for DAGs whose runs a file's tasks may trigger, which may also reset a run. As soon as there is "
        "an entry, tasks may look at runs, task states and XComs of these DAGs and their own only.",
    ),
    Key(
        name="allowed_triggers",
        parse=formats.parse_grant,
        places=(Place.POLICY,),
        is_list=True,
        example="*:airflow.providers.*, sales/*:sales_plugin.triggers.*",
        default_words="all that triggerer and scheduler can import, for all files",
        description="The same for classes and functions that Airflow imports and calls outside of containers at a file's word: "
        "triggers of deferred tasks and of asset watchers, callbacks and own references of deadlines, by their dotted paths.",
    ),
    Key(
        name="allowed_assets",
        parse=formats.parse_grant,
        places=(Place.POLICY,),
        is_list=True,
        example="sales/*:sales_*, sales/*:s3://sales/*",
        default_words="all assets, for all files",
        description="The same for assets that a file's tasks may say they have updated, which starts the DAGs that wait for "
        "them. Both the name and the URI of an asset must be allowed.",
    ),
    Key(
        name="task_execution_runtime",
        parse=formats.parse_text,
        places=(Place.CORE,),
        example="containerd",
        default_words="tasks run as stock Airflow runs them",
        description="Where tasks run: empty, containerd or docker.",
    ),
    Key(
        name="scheduler_dag_parsing_runtime",
        parse=formats.parse_text,
        places=(Place.CORE,),
        example="containerd",
        default_words="DAG files are parsed as stock Airflow parses them",
        description="Where DAG files are parsed: empty, containerd or docker.",
    ),
)


def overriding_sections(purpose: Purpose, backend: Backend) -> tuple[str, ...]:
    """The sections that hold for a purpose on a backend, low to high."""
    prefix = PURPOSE_PREFIX[purpose]
    return (
        COMMON_SECTION,
        f"{backend}_runtime",
        f"{prefix}_{COMMON_SECTION}",
        f"{prefix}_{backend}_runtime",
    )


def runtime_sections() -> tuple[str, ...]:
    """Every ``…_runtime`` section, for either purpose and backend."""
    return tuple(
        dict.fromkeys(
            section
            for purpose in PURPOSE_PREFIX
            for backend in BACKENDS
            for section in overriding_sections(purpose, backend)
        )
    )


@cache
def known_sections() -> frozenset[str]:
    """Every section that is ours, siblings included; not [core]."""
    runtime = runtime_sections()
    siblings = (section + suffix for section in runtime for suffix in (LABELS_SUFFIX, ENVIRONMENT_SUFFIX))
    return frozenset((*runtime, *siblings, POLICY_SECTION))


def is_free(section: str) -> bool:
    """Whether the section's keys are labels or environment variables, for which any name may be chosen."""
    return section.endswith((LABELS_SUFFIX, ENVIRONMENT_SUFFIX))


@cache
def keys_of(section: str) -> tuple[Key, ...]:
    """The keys that may stand in a section."""
    places = {
        "core": {Place.CORE},
        POLICY_SECTION: {Place.POLICY},
        COMMON_SECTION: {Place.EVERYWHERE, Place.HOST, Place.NODE},
        "containerd_runtime": {Place.EVERYWHERE, Place.CONTAINERD},
        "docker_runtime": {Place.EVERYWHERE, Place.DOCKER},
        PARSING_SECTION: {Place.EVERYWHERE, Place.PARSING},
    }.get(section, {Place.EVERYWHERE})
    return tuple(key for key in KEYS if not places.isdisjoint(key.places))


@cache
def author_keys() -> tuple[Key, ...]:
    """The keys that DAG metadata and executor_config may set."""
    return tuple(key for key in KEYS if key.author)

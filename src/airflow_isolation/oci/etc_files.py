"""/etc/hostname, /etc/hosts and /etc/resolv.conf of a container: no image can contain the right ones.

The ``…_text`` functions are pure; ``write_etc_files`` reads the host's files and writes the container's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_LOOPBACK = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcFiles:
    """Paths of files on the host, mounted read-only under /etc. An empty path leaves the image's file as it is."""

    hostname: str = ""
    hosts: str = ""
    resolv_conf: str = ""

    @classmethod
    def within(cls, directory: Path) -> Self:
        """The paths to which ``write_etc_files`` writes in that directory."""
        return cls(
            hostname=str(directory / "hostname"),
            hosts=str(directory / "hosts"),
            resolv_conf=str(directory / "resolv.conf"),
        )


def hostname_text(hostname: str) -> str:
    return f"{hostname}\n"


def hosts_text(hostname: str, *, network: str, host_file: str = "") -> str:
    """The names in the host's file when the container is on the host's network, else loopback's only; and ``hostname``."""
    known = host_file if network == "host" and host_file.strip() else _LOOPBACK
    if known[-1:] != "\n":
        known += "\n"
    return f"{known}127.0.1.1\t{hostname}\n"


def resolv_conf_text(*, network: str, host_file: str = "") -> str:
    """The host's name servers when the container is on the host's network, else none.

    A local resolver such as 127.0.0.53 stays: on the host's network the container reaches it.
    """
    return host_file if network == "host" else "# This container has no network.\n"


def write_etc_files(directory: Path, *, hostname: str, network: str, host_etc: Path = Path("/etc")) -> EtcFiles:
    """Write the three files into ``directory``, readable for all, and return their paths. May be called again.

    A missing directory is made. The caller removes it.

    :raises OSError: ``directory`` can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Readable whatever the umask is: the shim and the container may run as other users.
    directory.chmod(0o755)
    texts = {
        "hostname": hostname_text(hostname),
        "hosts": hosts_text(hostname, network=network, host_file=_read(host_etc / "hosts")),
        "resolv.conf": resolv_conf_text(network=network, host_file=_read(host_etc / "resolv.conf")),
    }
    for name, text in texts.items():
        path = directory / name
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        path.chmod(0o644)
    return EtcFiles.within(directory)


def _read(path: Path) -> str:
    # A host without the file has no names to give.
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""

"""The name of an image, whole: ``alpine`` is ``docker.io/library/alpine:latest``, as docker and containerd read it.

Grammar: the distribution project's reference. ``[host[:port]/]path[:tag][@digest]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from airflow_isolation.containerd.errors import InvalidReference

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# 255 characters of host and path, a tag and a digest.
_LONGEST = 255 + 129 + 136
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Reference:
    """``tag`` or ``digest`` may be empty, not both."""

    host: str
    path: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """:raises InvalidReference: not a name that an image can have."""
        if len(text) > _LONGEST:
            raise InvalidReference(f"image name {text[:40]!r}… is longer than any can be")
        name, _, digest = text.partition("@")
        if digest and not _DIGEST.fullmatch(digest):
            raise InvalidReference(f"image name {text!r}: {digest!r} is not a sha256 or sha512 digest")
        # A colon after the last slash is the tag's; one before it is a port's.
        head, colon, tag = name.rpartition(":")
        if not colon or "/" in tag:
            head, tag = name, ""
        elif not _TAG.fullmatch(tag):
            raise InvalidReference(f"image name {text!r}: {tag!r} is not a tag")
        host, slash, path = head.partition("/")
        if not slash or not (host == "localhost" or any(c in host for c in ".:[") or host != host.lower()):
            host, path = "docker.io", head
        if host == "index.docker.io":
            host = "docker.io"
        if host == "docker.io" and "/" not in path:
            path = f"library/{path}"
        if not _HOST.fullmatch(host):
            raise InvalidReference(f"image name {text!r}: {host!r} is not a host")
        if not _PATH.fullmatch(path):
            reason = "must be lower case" if _PATH.fullmatch(path.lower()) else "is not a repository's path"
            raise InvalidReference(f"image name {text!r}: {path.removeprefix('library/')!r} {reason}")
        if len(host) + 1 + len(path) > 255:
            raise InvalidReference(f"image name {text[:40]!r}… is longer than 255 characters")
        return cls(host, path, tag or ("" if digest else "latest"), digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.path}{tag}{digest}"


def normalised(text: str) -> str:
    """The whole name.

    >>> normalised("alpine")
    'docker.io/library/alpine:latest'

    :raises InvalidReference: not a name that an image can have.
    """
    return str(Reference.parse(text))

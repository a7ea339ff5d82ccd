"""What can go wrong with containerd, as errors.

ContainerdError              what was called, the daemon's own words, and its code
├── NotFound
├── AlreadyExists
├── FailedPrecondition       the thing is in the wrong state, or a namespace is missing
├── InvalidArgument
│   └── NotASocket           the address is a file, a directory, …
├── PermissionDenied         of the socket, or by the daemon
├── Unauthenticated
├── Unavailable              the daemon is down, restarting or busy: trying again may help
│   └── SocketMissing        nothing is at the address, or nobody listens there
├── DeadlineExceeded         no answer in time; whether the daemon did it is not known
├── Cancelled
├── Unimplemented            this containerd is too old for the call
├── Aborted
├── OutOfRange
├── ResourceExhausted        a message over 16 MiB, a full disk
├── Internal
├── DataLoss
├── Unknown                  most failures of runc arrive as this; read the text
├── ClientForked             a client was used after a fork
├── ClientClosed
└── ImageError               the image, the archive or the registry, not the daemon
    ├── InvalidArchive       not an archive, truncated, a blob missing or not matching its digest
    ├── InvalidImage         a manifest or configuration in the store that can't be read
    ├── WrongPlatform        made for another operating system or processor
    ├── InvalidReference     not a name an image can have
    ├── PullRefused          the registry wants other credentials, or none are known
    ├── PullNotFound         the registry doesn't know the image
    ├── PullFailed           anything else between here and the registry
    └── CredentialsError     the docker config or a credential helper could not be read
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping


class ContainerdError(Exception):
    """A call failed. ``call`` is its name, such as ``Tasks.Start``; ``detail`` the daemon's own words; ``hint`` what to do.

    ``code`` is the gRPC status, None when the daemon was never asked.
    """

    def __init__(self, detail: str, *, call: str = "", code: grpc.StatusCode | None = None, hint: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.call = call
        self.code = code
        self.hint = hint

    def __str__(self) -> str:
        sentence = f"{self.call}: {self.detail}" if self.call else self.detail
        return f"{sentence}. {self.hint}" if self.hint else sentence


class NotFound(ContainerdError):
    """There is no such thing, or no longer."""


class AlreadyExists(ContainerdError):
    """The name or key is taken."""


class FailedPrecondition(ContainerdError):
    """The thing is in a state that doesn't allow it."""


class InvalidArgument(ContainerdError):
    """The request itself is wrong."""


class NotASocket(InvalidArgument):
    """The address is not a unix socket."""


class PermissionDenied(ContainerdError):
    """The socket's mode, or the daemon, forbids it."""


class Unauthenticated(ContainerdError):
    """The daemon, or a proxy before it, wants credentials."""


class Unavailable(ContainerdError):
    """The daemon is down, or what is asked for is busy. Trying again may help."""


class SocketMissing(Unavailable):
    """Nothing is at the address, or nobody listens there."""


class DeadlineExceeded(ContainerdError):
    """No answer in time; the daemon may still have done it."""


class Cancelled(ContainerdError):
    """The call was cancelled on this side."""


class Unimplemented(ContainerdError):
    """This containerd doesn't know the call."""


class Aborted(ContainerdError):
    """The daemon gave up."""


class OutOfRange(ContainerdError):
    """There is no such offset."""


class ResourceExhausted(ContainerdError):
    """A message is too large, or a disk is full."""


class Internal(ContainerdError):
    """A defect of the daemon, or of the connection."""


class DataLoss(ContainerdError):
    """Stored data is damaged."""


class Unknown(ContainerdError):
    """No code fits; read the text."""


class ClientForked(ContainerdError):
    """A client belongs to the process that made it: its connection and threads don't survive a fork."""


class ClientClosed(ContainerdError):
    """The client has been closed."""


class ImageError(ContainerdError):
    """The cause is an image, an archive or a registry, not the daemon."""


class InvalidArchive(ImageError):
    """The file is not an image archive, or a damaged one."""


class InvalidImage(ImageError):
    """An image in the store can't be read."""


class WrongPlatform(ImageError):
    """The image holds nothing that this host can run."""


class InvalidReference(ImageError):
    """Not a name that an image can have."""


class PullRefused(ImageError):
    """The registry wants other credentials."""


class PullNotFound(ImageError):
    """The registry doesn't know the image."""


class PullFailed(ImageError):
    """The registry, or the way to it, failed."""


class CredentialsError(ImageError):
    """Credentials are set up, but can't be read."""


BY_CODE: Mapping[grpc.StatusCode, type[ContainerdError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.UNKNOWN: Unknown,
}


def from_status(code: grpc.StatusCode | None, detail: str | None, call: str) -> ContainerdError:
    """The one place where gRPC's codes become our errors."""
    detail = detail or "no reason given"
    if code is grpc.StatusCode.UNKNOWN:
        # These are Go's own words. containerd passes them on without a code when it notices before gRPC does.
        if detail.endswith("context deadline exceeded"):
            code = grpc.StatusCode.DEADLINE_EXCEEDED
        elif detail.endswith("context canceled"):
            code = grpc.StatusCode.CANCELLED
    kind = BY_CODE.get(code, Unknown) if code is not None else Unknown
    return kind(detail, call=call, code=code)

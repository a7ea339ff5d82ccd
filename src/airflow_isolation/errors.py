"""The errors of this project: what an operator or author reads.

IsolationError                  what failed, on what, and what to do (``hint``)
├── SettingError                a setting is wrong: names the file or section, the line and the key
│   └── PolicyRefused           a setting is well formed, but the administrator's policy forbids it
├── SpecRefused                 a backend can't do it, or it would not be safe: raised before anything is made
└── ContainerRuntimeError       a daemon, an image or a container
    ├── RuntimeUnreachable      no socket, no permission, daemon gone or too slow: may heal, may be tried again
    ├── ImageError
    │   ├── ImageNotFound       not in the store; the pull policy forbids a pull, or the registry does not have it
    │   ├── ImagePullFailed     the registry or the network failed
    │   └── ImageInvalid        archive truncated, not an archive, wrong architecture, configuration not readable
    ├── ContainerNotFound
    ├── ContainerExists         the id is taken: another worker starts the same
    └── ContainerFailed         the runtime could not create or start it; the message has the runtime's own words
        └── HostTrouble         the host failed: a full disk, a state directory that can't be written; may heal
            └── ContainerKilled something killed it before its work began

After an error of ``MAY_HEAL``, a workload may be started again later, as if for the first time.
"""

from __future__ import annotations


class IsolationError(Exception):
    """Something failed. ``message`` says what and on what, ``hint`` what to do; ``str()`` is both."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class SettingError(IsolationError):
    """A setting is wrong. ``source`` is a file, a section or "executor_config"; ``line`` counts from 1.

    >>> print(SettingError("unknown key 'imgae'", source="sales.yaml", line=2, key="container.imgae"))
    sales.yaml, line 2, container.imgae: unknown key 'imgae'
    """

    def __init__(
        self, message: str, *, source: str = "", line: int | None = None, key: str = "", hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.source = source
        self.line = line
        self.key = key

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.source, f"line {self.line}" if self.line else "", self.key) if part)
        return f"{where}: {super().__str__()}" if where else super().__str__()


class PolicyRefused(SettingError):
    """The administrator's policy forbids this value."""


class SpecRefused(IsolationError):
    """This container can't be made as asked: the backend can't do it, or it would not be safe."""


class ContainerRuntimeError(IsolationError):
    """A daemon, an image or a container failed."""


class RuntimeUnreachable(ContainerRuntimeError):
    """The daemon can't be reached or did not answer in time. Trying again later may help."""


class ImageError(ContainerRuntimeError):
    """An image can't be used."""


class ImageNotFound(ImageError):
    """The image is not here, and can't be pulled or must not be."""


class ImagePullFailed(ImageError):
    """The registry, or the way to it, failed."""


class ImageInvalid(ImageError):
    """The image or archive is broken, or made for another platform."""


class ContainerNotFound(ContainerRuntimeError):
    """No container has this id."""


class ContainerExists(ContainerRuntimeError):
    """A container has this id already."""


class ContainerFailed(ContainerRuntimeError):
    """The runtime could not create or start the container; the message has its own words."""


class HostTrouble(ContainerFailed):
    """The host failed, neither the workload nor its settings. Trying again later may help."""


class ContainerKilled(HostTrouble):
    """Something outside of the container ended it before its work began."""


MAY_HEAL = (RuntimeUnreachable, ImagePullFailed, HostTrouble)

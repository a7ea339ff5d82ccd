"""Symbolic links among DAG files. The host and the container follow them in different file systems.

A link's target is in the container only if something mounts it there. A link never causes a mount: otherwise any author
could make a link and read any file of this host.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from airflow_isolation.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from airflow_isolation.container_spec import Mount
    from airflow_isolation.settings.effective import Volume

    #: Path in the container → path on this host, for each mount.
    Places: TypeAlias = Mapping[PurePosixPath, Path]

#: How many links are followed for one path, as the kernel does (path_resolution(7)).
MOST_LINKS: Final = 40
#: Bounds: how many import errors of one parse are explained, paths looked at for each, and steps of such a path. Authors
#: control all three, and the DAG processor's loop waits meanwhile.
MOST_ERRORS: Final = 4
MOST_PATHS: Final = 64
MOST_STEPS: Final = 16

_MODULE: Final = re.compile(r"No module named '([\w.]{1,256})'")
_NAME: Final = re.compile(r"cannot import name '(\w{1,128})' from '([\w.]{1,256})'")
_FILE: Final = re.compile(r"No such file or directory: '(/[^'\n]{1,1024})'")


@dataclass(frozen=True, slots=True)
class StrayLink:
    """A symbolic link that leads to something else in the container than on this host, or to nothing.

    Attributes:
        link: its path.
        target: the text of the link.
        leads_to: the path in the container to which it leads, perhaps through other links.
    """

    link: str
    target: str
    leads_to: str

    def __str__(self) -> str:
        return (
            f"{self.link} is a symbolic link to {self.target}. "
            f"It leads to {self.leads_to}, where the container does not have this host's files"
        )

    @property
    def hint(self) -> str:
        """What to do: mount a volume. If the link leads to a file, the volume is that file's directory."""
        path = PurePosixPath(self.leads_to)
        volume = path.parent if path.suffix else path
        return (
            f"Add the volume '{volume}:{volume}:ro' to [container_runtime] volume_mount_yaml, or to the YAML beside the file "
            "where [container_runtime_policy] allowed_mount_sources allows it; or put the files themselves in the link's place"
        )


def check_dag_file(dag_file: Path, bundle_path: Path, mounts: Iterable[Mount], volumes: Iterable[Volume]) -> None:
    """Check that a DAG file is the same file here and in its container.

    If the container had no such file, its DAGs would vanish silently. If the image had another file at that place, Airflow
    would show code that does not run, because it shows the file of this host.

    :raises SettingError: a link in its path leads elsewhere in the container.
    """
    if stray := stray_dag_file(dag_file, bundle_path, mounts, volumes):
        raise SettingError(str(stray), hint=stray.hint)


def stray_dag_file(
    dag_file: Path, bundle_path: Path, mounts: Iterable[Mount], volumes: Iterable[Volume]
) -> StrayLink | None:
    """The link in a DAG file's path, below its bundle, that leads elsewhere in the container; None for most files."""
    root = bundle_path if dag_file.is_relative_to(bundle_path) else dag_file.parent
    return stray_link(dag_file, root, places(mounts, volumes))


def explained(
    errors: Mapping[str, str], dag_file: Path, roots: Iterable[Path], mounts: Iterable[Mount], volumes: Iterable[Volume]
) -> dict[str, str]:
    """The import errors; where the missing file is behind a stray link, a sentence about the link is added.

    :param roots: the directories from which DAG files import, the bundle first.
    """
    found = places(mounts, volumes)
    roots = tuple(dict.fromkeys((*roots, dag_file.parent)))
    return {**errors, **{name: _explained(text, roots, found) for name, text in islice(errors.items(), MOST_ERRORS)}}


def _explained(text: str, roots: Sequence[Path], found: Places) -> str:
    for root, path in islice(_missing(text, roots), MOST_PATHS):
        if len(path.relative_to(root).parts) <= MOST_STEPS and (stray := stray_link(path, root, found)):
            return f"{text.rstrip()}\n{stray}. {stray.hint}\n"
    return text


def _missing(text: str, roots: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """The paths at which the thing that an import error misses may be, each with the root directory above it."""
    names = [*_MODULE.findall(text), *(f"{module}.{name}" for name, module in _NAME.findall(text))]
    for name in dict.fromkeys(names):
        steps = [step for step in name.split(".") if step]
        for root in roots:
            yield root, root.joinpath(*steps)
            yield from ((root, root.joinpath(*steps[:count]).with_suffix(".py")) for count in range(1, len(steps) + 1))
    for file in dict.fromkeys(_FILE.findall(text)):
        for root in roots:
            path = root / file
            if path.is_relative_to(root) and ".." not in path.parts:
                yield root, path


def places(mounts: Iterable[Mount], volumes: Iterable[Volume]) -> Places:
    """Which paths in a container show which paths of this host."""
    return {
        **{PurePosixPath(volume.target): Path(volume.source) for volume in volumes},
        **{PurePosixPath(mount.target): Path(mount.source) for mount in mounts if mount.kind == "bind"},
    }


def stray_link(path: Path, root: Path, found: Places) -> StrayLink | None:
    """The link between ``root``, a directory in the container, and ``path`` that leads elsewhere in the container.

    None when there is no link, or when ``path`` is the same file here and there. Only links in mounted directories are
    looked at.
    """
    here, link, followed = PurePosixPath(root), None, 0
    for depth, name in enumerate(path.relative_to(root).parts, 1):
        steps, begun = [name], followed
        while steps:
            step = steps.pop()
            here = here.parent if step == ".." else here / step
            on_host = _on_host(here, found)
            if on_host is None:
                if any(here in target.parents for target in found):
                    continue  # a directory that was made for a mount
                return StrayLink(*link, str(here.joinpath(*reversed(steps)))) if link else None
            try:
                target = on_host.readlink()
            except OSError:
                continue  # no link, or no such file
            if followed == begun:
                link = (str(here), str(target))
            followed += 1
            if followed > MOST_LINKS:
                return None  # it can't be followed, neither here nor there
            here = here.parent
            steps += reversed(target.parts)
        if link and followed > begun:
            there = os.path.realpath(root.joinpath(*path.relative_to(root).parts[:depth]))
            if there != str(_on_host(here, found) or here):
                return StrayLink(*link, str(here))
    return None


def _on_host(path: PurePosixPath, found: Places) -> Path | None:
    for outer in (path, *path.parents):
        if outer in found:
            return found[outer] / path.relative_to(outer)
    return None

"""Symbolic links among DAG files, which a container follows in its own file system, and this host in another.

What a link leads to is in the container only if it is mounted there. It is never mounted for the link's sake: whoever may
write a DAG file may make a link, and would have any file of this host.
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

    #: Path in the container → path on this host, for what is mounted.
    Places: TypeAlias = Mapping[PurePosixPath, Path]

#: As the kernel's (path_resolution(7)).
MOST_LINKS: Final = 40
#: Import errors of one parse that are explained, paths that are looked at for each, and steps of such a path: they are the
#: author's, and the DAG processor's loop waits.
MOST_ERRORS: Final = 4
MOST_PATHS: Final = 64
MOST_STEPS: Final = 16

_MODULE: Final = re.compile(r"No module named '([\w.]{1,256})'")
_NAME: Final = re.compile(r"cannot import name '(\w{1,128})' from '([\w.]{1,256})'")
_FILE: Final = re.compile(r"No such file or directory: '(/[^'\n]{1,1024})'")


@dataclass(frozen=True, slots=True)
class StrayLink:
    """A symbolic link that in the container leads to nothing of this host, or to something else than here.

    Attributes:
        link: its path.
        target: what it says.
        leads_to: the path in the container to which it leads, by way of other links perhaps.
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
        """What to do: a volume, of the directory where it leads to a file."""
        path = PurePosixPath(self.leads_to)
        volume = path.parent if path.suffix else path
        return (
            f"Add the volume '{volume}:{volume}:ro' to [container_runtime] volume_mount_yaml, or to the YAML beside the file "
            "where [container_runtime_policy] allowed_mount_sources allows it; or put the files themselves in the link's place"
        )


def check_dag_file(dag_file: Path, bundle_path: Path, mounts: Iterable[Mount], volumes: Iterable[Volume]) -> None:
    """See that a DAG file is the same file here and in its container.

    It would have no DAGs there and vanish without a word. And Airflow shows a DAG's code as this host reads it: an image may
    have another file where the link leads.

    :raises SettingError: a link on the way to it leads elsewhere.
    """
    if stray := stray_dag_file(dag_file, bundle_path, mounts, volumes):
        raise SettingError(str(stray), hint=stray.hint)


def stray_dag_file(
    dag_file: Path, bundle_path: Path, mounts: Iterable[Mount], volumes: Iterable[Volume]
) -> StrayLink | None:
    """The link on the way from its bundle to a DAG file that leads elsewhere in the container; None for most files."""
    root = bundle_path if dag_file.is_relative_to(bundle_path) else dag_file.parent
    return stray_link(dag_file, root, places(mounts, volumes))


def explained(
    errors: Mapping[str, str], dag_file: Path, roots: Iterable[Path], mounts: Iterable[Mount], volumes: Iterable[Volume]
) -> dict[str, str]:
    """Import errors, with a word about the link where what was not found lies behind one.

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
    """What an import error says was not there: where it may be, each with the directory below which it is."""
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
    """Where in a container what of this host is."""
    return {
        **{PurePosixPath(volume.target): Path(volume.source) for volume in volumes},
        **{PurePosixPath(mount.target): Path(mount.source) for mount in mounts if mount.kind == "bind"},
    }


def stray_link(path: Path, root: Path, found: Places) -> StrayLink | None:
    """The link on the way from ``root``, a directory in the container, to ``path``, that in there leads elsewhere.

    None when the way leads to the same as here, or when there is no link. Looks at links in mounted directories alone.
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
                continue  # no link, or nothing is there
            if followed == begun:
                link = (str(here), str(target))
            followed += 1
            if followed > MOST_LINKS:
                return None  # nobody can follow it, here or there
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

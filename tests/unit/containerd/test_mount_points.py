"""Mount points are made in a snapshot's own layer, and look as an overlay of all layers would have them."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.containerd.mount_points import (
    MountPointError,
    followed,
    layers_of,
    make_mount_points,
    with_layers,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    """Three: the snapshot's own, empty, and two of the image."""
    made = [tmp_path / name for name in ("own", "upper", "lower")]
    for layer in made:
        layer.mkdir()
    return made


def make(layers: list[Path], target: str, *, is_directory: bool = True, merged: bool = True) -> None:
    make_mount_points([str(layer) for layer in layers], [(target, is_directory)], merged=merged)


def found(layer: Path) -> list[str]:
    return sorted(str(path.relative_to(layer)) for path in layer.rglob("*"))


def test_what_is_missing_is_made_in_the_own_layer(layers: list[Path]) -> None:
    make(layers, "/a/b")
    make(layers, "/a/file", is_directory=False)
    assert found(layers[0]) == ["a", "a/b", "a/file"]
    assert stat.S_IMODE((layers[0] / "a/b").stat().st_mode) == 0o755
    assert found(layers[1]) == found(layers[2]) == []


def test_what_the_image_has_needs_nothing(layers: list[Path]) -> None:
    (layers[2] / "a/b").mkdir(parents=True)
    (layers[1] / "a").mkdir()
    (layers[1] / "a/file").touch()
    make(layers, "/a/b")
    make(layers, "/a/file", is_directory=False)
    assert found(layers[0]) == []


def test_a_directory_that_is_copied_up_looks_as_it_did(layers: list[Path]) -> None:
    (layers[2] / "a").mkdir()
    (layers[2] / "a").chmod(0o2750)
    make(layers, "/a/b")
    assert found(layers[0]) == ["a", "a/b"]
    assert stat.S_IMODE((layers[0] / "a").stat().st_mode) == 0o2750


def test_the_uppermost_layer_says_how_a_directory_looks(layers: list[Path]) -> None:
    for layer, mode in ((layers[1], 0o711), (layers[2], 0o700)):
        (layer / "a").mkdir()
        (layer / "a").chmod(mode)
    make(layers, "/a/b")
    assert stat.S_IMODE((layers[0] / "a").stat().st_mode) == 0o711


def test_made_twice_is_made_once(layers: list[Path]) -> None:
    for _ in range(2):
        make(layers, "/a/b")
        make(layers, "/a/c", is_directory=False)
    assert found(layers[0]) == ["a", "a/b", "a/c"]


def test_what_a_whiteout_hides_is_made_anew(layers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (layers[2] / "a/b").mkdir(parents=True)
    (layers[2] / "a").chmod(0o700)
    whiteout = layers[1] / "a"
    whiteout.touch()
    lstat = os.lstat

    def with_whiteout(path: str) -> os.stat_result:
        """As root would see it after ``mknod c 0 0``."""
        status = lstat(path)
        if path == str(whiteout):
            values = list(status)
            values[0] = stat.S_IFCHR
            return os.stat_result(values, {"st_rdev": 0})
        return status

    monkeypatch.setattr(os, "lstat", with_whiteout)
    make(layers, "/a/b")
    assert found(layers[0]) == ["a", "a/b"]
    assert stat.S_IMODE((layers[0] / "a").stat().st_mode) == 0o755


def test_what_lies_below_an_opaque_directory_is_hidden(layers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (layers[2] / "a/b").mkdir(parents=True)
    opaque = layers[1] / "a"
    opaque.mkdir()
    monkeypatch.setattr(
        os,
        "getxattr",
        lambda path, name, **_: b"y" if (path, name) == (str(opaque), "trusted.overlay.opaque") else b"n",
    )
    make(layers, "/a/b")
    assert found(layers[0]) == ["a", "a/b"]


def test_a_file_over_a_directory_hides_it(layers: list[Path]) -> None:
    (layers[2] / "a/b").mkdir(parents=True)
    (layers[1] / "a").touch()
    with pytest.raises(MountPointError, match="/a of the image is not what is to be mounted there"):
        make(layers, "/a/b")
    assert found(layers[0]) == []


@pytest.mark.parametrize("target", ["/link", "/link/b", "/a/link"])
def test_links_are_not_followed(layers: list[Path], tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (layers[2] / "a").mkdir()
    for link in ("link", "a/link"):
        (layers[2] / link).symlink_to(outside)
    with pytest.raises(MountPointError, match="is a symbolic link"):
        make(layers, target)
    assert found(outside) == found(layers[0]) == []


@pytest.mark.parametrize(
    ("link", "place"),
    [
        ("../run/systemd/resolve/stub", "/run/systemd/resolve/stub"),
        ("/opt/stub", "/opt/stub"),
        ("stub", "/etc/stub"),
        ("../../../../outside", "/outside"),
        ("/../outside", "/outside"),
        ("./x/../y//z", "/etc/y/z"),
        ("../var/run/x", "/run/x"),
        ("/", "/"),
    ],
)
def test_links_lead_where_they_would_if_the_image_were_the_root(layers: list[Path], link: str, place: str) -> None:
    (layers[1] / "etc").mkdir()
    (layers[2] / "var").mkdir()
    (layers[2] / "var/run").symlink_to("/run")
    (layers[1] / "etc/resolv.conf").symlink_to(link)
    assert followed([str(layer) for layer in layers], "/etc/resolv.conf") == place


def test_a_link_that_an_upper_layer_hides_is_none(layers: list[Path]) -> None:
    for layer in layers[1:]:
        (layer / "etc").mkdir()
    (layers[1] / "etc/hosts").touch()
    (layers[2] / "etc/hosts").symlink_to("/elsewhere")
    (layers[1] / "data").mkdir()
    (layers[2] / "data").symlink_to("/elsewhere")
    paths = [str(layer) for layer in layers]
    assert followed(paths, "/etc/hosts") == "/etc/hosts"
    assert followed(paths, "/data/x") == "/data/x"
    make(layers, "/data/x")
    assert found(layers[0]) == ["data", "data/x"]


def test_where_something_else_is_mounted_the_image_has_no_say(layers: list[Path]) -> None:
    (layers[2] / "run").mkdir()
    (layers[2] / "run/x").symlink_to("/elsewhere")
    paths = [str(layer) for layer in layers]
    assert followed(paths, "/run/x/y") == "/elsewhere/y"
    assert followed(paths, "/run/x/y", elsewhere={"/run"}) == "/run/x/y"
    (layers[2] / "link").symlink_to("/run/z/../../opt")
    assert followed(paths, "/link/y", elsewhere={"/run"}) == "/opt/y"


def test_links_in_a_circle_lead_nowhere(layers: list[Path]) -> None:
    (layers[2] / "a").symlink_to("b")
    (layers[1] / "b").symlink_to("a/c")
    with pytest.raises(MountPointError, match="lead nowhere"):
        followed([str(layer) for layer in layers], "/a")


@pytest.mark.parametrize(("there", "wanted"), [("file", True), ("directory", False)])
def test_a_mount_point_of_the_other_kind_is_refused(layers: list[Path], there: str, *, wanted: bool) -> None:
    (layers[2] / "file").touch()
    (layers[2] / "directory").mkdir()
    with pytest.raises(MountPointError, match=f"/{there} of the image is not what is to be mounted there"):
        make(layers, f"/{there}", is_directory=wanted)


def test_without_an_overlay_there_is_one_directory(layers: list[Path]) -> None:
    (layers[0] / "a").mkdir()
    make(layers[:1], "/a/b/c", merged=False)
    assert found(layers[0]) == ["a", "a/b", "a/b/c"]


def test_the_root_is_there(layers: list[Path]) -> None:
    make(layers, "/")
    assert found(layers[0]) == []


def test_how_a_snapshot_is_mounted_says_its_layers() -> None:
    options = ["index=off", "workdir=/s/work", "upperdir=/s/fs", "lowerdir=/l2:/l1", "userxattr"]
    assert layers_of("overlay", "overlay", options) == (("/s/fs", "/l2", "/l1"), True)
    assert layers_of("bind", "/s/fs", ["rw", "rbind"]) == (("/s/fs",), False)


@pytest.mark.parametrize(
    ("writable", "mounted"),
    [
        (False, ("index=off", "userxattr", "lowerdir=/s/fs:/shown/0:/shown/1")),
        (
            True,
            ("index=off", "workdir=/s/work", "upperdir=/s/fs", "volatile", "userxattr", "lowerdir=/shown/0:/shown/1"),
        ),
    ],
)
def test_an_overlay_of_other_layers_can_be_written_to_only_where_that_is_wanted(
    mounted: tuple[str, ...], *, writable: bool
) -> None:
    options = ["index=off", "workdir=/s/work", "upperdir=/s/fs", "lowerdir=/l2:/l1", "volatile", "userxattr"]
    assert with_layers(options, ["/shown/0", "/shown/1"], writable=writable) == mounted


@pytest.mark.parametrize(("kind", "options"), [("overlay", ["lowerdir=/l1"]), ("btrfs", []), ("ext4", ["loop"])])
def test_other_kinds_are_refused(kind: str, options: list[str]) -> None:
    with pytest.raises(MountPointError, match=f"mounted as {kind} is not understood"):
        layers_of(kind, "/s", options)

"""get_docker_runtime_image, found in a real airflow_local_settings module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.effective import Origin
from airflow_isolation.settings.hook import ask_hook, image_hook
from airflow_isolation.settings.layers import Assignment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE = Assignment("sales:1", Origin("sales.yaml", "container.image", 2, author=True))


@pytest.fixture
def local_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "airflow_local_settings", raising=False)

    def write(text: str) -> None:
        (tmp_path / "airflow_local_settings.py").write_text(text)

    yield write
    sys.modules.pop("airflow_local_settings", None)


def test_without_the_module_or_the_function_there_is_no_hook(local_settings: Callable[[str], None]) -> None:
    assert image_hook() is None
    local_settings("x = 1\n")
    assert image_hook() is None


def test_the_hook_gets_the_image_and_gives_the_one_to_use(local_settings: Callable[[str], None]) -> None:
    local_settings("def get_docker_runtime_image(image):\n    return 'mirror.example/' + image\n")
    hook = image_hook()
    assert hook is not None
    assert ask_hook(hook, IMAGE).value == "mirror.example/sales:1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("get_docker_runtime_image = 'x'\n", "this is a str, not a function"),
    ],
)
def test_a_module_that_does_not_work_is_told(local_settings: Callable[[str], None], text: str, reason: str) -> None:
    local_settings(text)
    with pytest.raises(SettingError) as caught:
        image_hook()
    assert str(caught.value).startswith("get_docker_runtime_image in airflow_local_settings: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (lambda image: None, "it returned a NoneType, not text"),
        (lambda image: "A B", "'A B' is not an image reference"),
        (lambda image: "", "'' is not an image reference"),
        (lambda image: 1 / 0, "it failed for the image sales:1: ZeroDivisionError"),
        (lambda: "x", "it failed for the image sales:1: TypeError"),
    ],
)
def test_a_hook_that_gives_no_image_is_named(hook: Callable[..., object], reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        ask_hook(hook, IMAGE)
    assert caught.value.source == "get_docker_runtime_image in airflow_local_settings"
    assert reason in str(caught.value)

"""The function get_docker_runtime_image(image) of airflow_local_settings, which may replace the image.

It gets the image that the settings give, as written, and returns the image to use. It is asked for tasks and parses
alike, after all settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final

from airflow_isolation.errors import SettingError
from airflow_isolation.settings import formats
from airflow_isolation.settings.effective import Origin
from airflow_isolation.settings.layers import Assignment

ImageHook = Callable[[str], object]

MODULE: Final = "airflow_local_settings"
NAME: Final = "get_docker_runtime_image"
SOURCE: Final = f"{NAME} in {MODULE}"


def image_hook() -> ImageHook | None:
    """The hook of this process's airflow_local_settings, or None when there is none.

    :raises SettingError: the module fails to import, or the name is not a function.
    """
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name == MODULE:
            return None
        raise SettingError(f"{MODULE} can't be imported: {_in_words(error)}", source=SOURCE) from error
    except Exception as error:
        raise SettingError(f"{MODULE} can't be imported: {_in_words(error)}", source=SOURCE) from error
    hook = getattr(module, NAME, None)
    if hook is not None and not callable(hook):
        raise SettingError(f"this is a {type(hook).__name__}, not a function", source=SOURCE)
    return hook


def ask_hook(hook: ImageHook, image: Assignment) -> Assignment:
    """The image that the hook returns. An unchanged image keeps its origin.

    :raises SettingError: the hook raises, or returns anything but an image reference.
    """
    origin = Origin(SOURCE)
    try:
        answer = hook(image.value)
    except Exception as error:
        raise origin.error(f"it failed for the image {image.value}: {_in_words(error)}") from error
    if not isinstance(answer, str):
        raise origin.error(
            f"for the image {image.value} it returned a {type(answer).__name__}, not text",
            hint="Return the image to use; for no change, the one that was given",
        )
    if answer == image.value:
        return image
    try:
        return Assignment(formats.parse_image(answer), origin)
    except ValueError as error:
        raise origin.error(f"for the image {image.value} it returned something else: {error}") from None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""Advice for authors and administrators, derived from a runtime's own error."""

from __future__ import annotations

import re

_NOT_A_PROGRAM = ("no such file or directory", "executable file not found", "permission denied", "is a directory")
_OTHER_MACHINE = "exec format error"
# Of runc, and of dockerd, which makes the working directory itself.
_NOT_MOUNTED = re.compile(r'mounting .* to rootfs at "?([^" ]+)"?.*not a directory', re.DOTALL)
_NO_DIRECTORY = re.compile(r"(?:mkdir:? |lstat \S+/merged)(/\S+?):? (?:is )?not a directory")


def start_hint(reason: str, *, image: str, program: str) -> str:
    """What to do when ``program`` of ``image`` could not be started for ``reason``; empty when that is not known."""
    if found := _NOT_MOUNTED.search(reason):
        return (
            f"In {image} there is a file where a directory belongs, or the other way round, at {found[1]} or above it:"
            " mount the volume elsewhere"
        )
    if found := _NO_DIRECTORY.search(reason):
        return f"In {image} {found[1]} is no directory: set working_dir to another place"
    text = reason.lower()
    if _OTHER_MACHINE in text:
        return f"{program} in {image} is made for another processor, or is no program: use an image of this platform"
    if program.lower() in text and any(words in text for words in _NOT_A_PROGRAM):
        return f"The image {image} has no program {program}: name its interpreter with the setting `python`"
    return ""

"""Advice for authors and administrators, derived from a runtime's own error."""

from __future__ import annotations

_NOT_A_PROGRAM = ("no such file or directory", "executable file not found", "permission denied", "is a directory")
_OTHER_MACHINE = "exec format error"


def start_hint(reason: str, *, image: str, program: str) -> str:
    """What to do when ``program`` of ``image`` could not be started for ``reason``; empty when that is not known."""
    text = reason.lower()
    if _OTHER_MACHINE in text:
        return f"{program} in {image} is made for another processor, or is no program: use an image of this platform"
    if program.lower() in text and any(words in text for words in _NOT_A_PROGRAM):
        return f"The image {image} has no program {program}: name its interpreter with the setting `python`"
    return ""

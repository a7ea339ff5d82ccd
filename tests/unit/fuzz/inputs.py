"""What the properties of this directory are tried with: documents that are almost right, and bytes that are almost whole.

Wholly random input is refused at the first look. So each input begins as a right one, and a few places are changed.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Set by hack/fuzz. Otherwise the same few inputs each time, so that a test run says the same twice.
EXAMPLES = int(os.environ.get("AIRFLOW_ISOLATION_FUZZ_EXAMPLES", "0"))

ODD_TEXT = st.sampled_from(
    (
        "",
        "\0",
        "x\0y",
        "\ud800",
        "é",
        "🐄",
        "..",
        "../../etc/passwd",
        "/",
        "~",
        "*",
        "a" * 5000,
        "9" * 5000,
        "-1",
        "1e999",
    )
)
ODD_NUMBERS = st.sampled_from((-1, 0, 1, 255, 256, 1 << 31, 1 << 63, 1 << 64, 10**400, 0.5, float("inf"), float("nan")))
SCALARS = st.none() | st.booleans() | st.integers() | ODD_NUMBERS | st.floats() | st.text(max_size=10) | ODD_TEXT
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | ODD_TEXT, inner, max_size=3),
    max_leaves=5,
)


def fuzzed(*inputs: st.SearchStrategy[Any], examples: int = 60) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property that holds for all inputs. ``examples`` are tried by hack/test, many more by hack/fuzz."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        tried = settings(
            max_examples=EXAMPLES or examples,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            # Files are written over by the next input; and inputs are large for the sake of what they are.
            suppress_health_check=[
                HealthCheck.function_scoped_fixture,
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
            ],
        )
        return tried(given(*inputs)(test))

    return decorate


@st.composite
def almost(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with up to three of its values replaced, taken away, doubled or swapped for one from elsewhere in it."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        places = list(_places(changed))
        if not places:
            return draw(ANYTHING)
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("replace", "replace", "remove", "double", "move"))):
            case "replace":
                holder[key] = draw(ODD_TEXT | SCALARS | ANYTHING)
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                other, there = draw(st.sampled_from(places))
                holder[key] = copy.deepcopy(other[there]) if _has(other, there) else None
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with a few bytes changed, taken out or put in; sometimes cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        piece = draw(st.binary(min_size=1, max_size=16))
        match draw(st.sampled_from(("over", "over", "insert", "remove"))):
            case "over":
                changed[at : at + len(piece)] = piece
            case "insert":
                changed[at:at] = piece
            case _:
                del changed[at : at + len(piece)]
    if draw(st.integers(0, 4)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)

from __future__ import annotations

import inspect
import re

import grpc
import pytest

from airflow_isolation.containerd import errors
from airflow_isolation.containerd.errors import (
    BY_CODE,
    ContainerdError,
    DeadlineExceeded,
    NotFound,
    Unknown,
    from_status,
)


def test_tree_in_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = re.findall(r"^([│ ]*)[├└]── (\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    parents = {0: "ContainerdError"}
    tree = {}
    for indent, name in drawn:
        depth = len(indent) // 4
        tree[name] = parents[depth]
        parents[depth + 1] = name

    classes = {
        name: kind.__base__.__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ContainerdError) and kind is not ContainerdError and kind.__base__
    }
    assert tree == classes


def test_every_code_has_its_error() -> None:
    assert set(BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    for code, kind in BY_CODE.items():
        error = from_status(code, "words", "Tasks.Start")
        assert type(error) is kind
        assert (error.code, error.call, error.detail) == (code, "Tasks.Start", "words")
        assert str(error) == "Tasks.Start: words"


def test_hint_ends_the_sentence() -> None:
    assert str(NotFound("no image", hint="Pull it")) == "no image. Pull it"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("subscription error: context deadline exceeded", DeadlineExceeded),
        ("x: context canceled", errors.Cancelled),
        ("OCI runtime create failed: …", Unknown),
    ],
)
def test_go_s_words_without_a_code(words: str, kind: type[ContainerdError]) -> None:
    assert type(from_status(grpc.StatusCode.UNKNOWN, words, "Events.Subscribe")) is kind


def test_no_words_at_all() -> None:
    assert str(from_status(None, None, "Tasks.Start")) == "Tasks.Start: no reason given"

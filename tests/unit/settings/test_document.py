from __future__ import annotations

from typing import Any

import pytest

from airflow_isolation.errors import SettingError
from airflow_isolation.settings.document import (
    ListNode,
    MapNode,
    Scalar,
    from_python,
    list_items,
    map_items,
    parse_yaml,
    scalar,
)


def parsed(text: str) -> Any:
    return parse_yaml(text, "sales.yaml", author=True)


def test_scalars_are_the_text_that_was_written() -> None:
    node = parsed("{a: no, b: 1.10, c: 2024-01-01, d: 0o17, e: 'x', f: 1:30}")
    assert {key: value.text for key, value in node.entries.items()} == {
        "a": "no", "b": "1.10", "c": "2024-01-01", "d": "0o17", "e": "x", "f": "1:30",
    }  # fmt: skip


def test_every_value_knows_line_and_key() -> None:
    node = parsed("a:\n  b:\n    - x\n    - y\n  c:\n    d: z\n")
    second = node.entries["a"].entries["b"].items[1]
    assert (second.origin.line, second.origin.key) == (4, "a.b[1]")
    d = node.entries["a"].entries["c"].entries["d"]
    assert (d.origin.line, d.origin.key) == (6, "a.c.d")


def test_a_value_is_found_where_its_key_stands() -> None:
    assert parsed("a:\n\n  - x\n").entries["a"].origin.line == 1


def test_nothing_and_null_are_null_and_quoted_null_is_not() -> None:
    node = parsed("{a: , b: null, c: ~, d: 'null', e: ''}")
    assert {key: value.is_null for key, value in node.entries.items()} == {
        "a": True, "b": True, "c": True, "d": False, "e": False,
    }  # fmt: skip
    with pytest.raises(SettingError, match="there is no value"):
        scalar(node.entries["a"])


@pytest.mark.parametrize(
    ("text", "read", "reason"),
    [
        ("[a]", scalar, "a single value belongs here, and this is a list"),
        ("{a: b}", scalar, "a single value belongs here, and this is a map"),
        ("{a: b}", list_items, "a list belongs here, and this is a map"),
        ("x", list_items, "a list belongs here, and this is the single value 'x'"),
        ("[a]", map_items, "a map belongs here, and this is a list"),
        ("~", map_items, "a map belongs here, and this is nothing"),
        ("!env x", scalar, "the tag !env has no meaning here"),
        ("!vault {a: b}", map_items, "the tag !vault has no meaning here"),
    ],
)
def test_the_wrong_kind_is_told_with_what_belongs_there(text: str, read: Any, reason: str) -> None:
    with pytest.raises(SettingError) as caught:
        read(parsed(text))
    assert reason in str(caught.value)
    assert caught.value.line == 1


def test_a_duplicate_key_is_told_when_the_map_is_read() -> None:
    node = parsed("a: 1\nb: {c: 1,\n c: 2}\n")
    assert map_items(node)
    with pytest.raises(SettingError, match=r"sales\.yaml, line 3, b\.c: this key stands here a second time"):
        map_items(node.entries["b"])


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "{a: " * 200_000, "- " * 500_000, "a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 60))]
)
def test_deep_nesting_is_refused_without_recursion(text: str) -> None:
    with pytest.raises(SettingError, match="nested deeper than 32 levels"):
        parsed(text)


def test_an_alias_is_the_value_of_its_anchor() -> None:
    node = parsed("a: &x {b: 1}\nc: *x\n")
    assert node.entries["c"] is node.entries["a"]


def test_a_bomb_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(SettingError, match="more than 100 aliases"):
        parsed("\n".join(lines))


@pytest.mark.parametrize("text", ["*x", "&x [*x]", "? [a]\n: b", "? *x\n: b"])
def test_aliases_without_an_anchor_and_keys_that_are_no_words_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"no anchor before it|a key must be a single word"):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "line"), [("a: b: c", 1), ("a: 1\nb: [1\nc: 2", 3), ("a:\n\t- b", 2), ("a: 'x", 1), ("a: \x07", None)]
)
def test_what_is_not_yaml_names_the_line(text: str, line: int | None) -> None:
    with pytest.raises(SettingError, match="this is not YAML") as caught:
        parsed(text)
    assert caught.value.line == line
    assert "\n" not in str(caught.value)


def test_a_second_document_is_refused() -> None:
    with pytest.raises(SettingError, match=r"line 2.*second document"):
        parsed("a: 1\n---\nb: 2\n")


def test_an_empty_text_is_nothing() -> None:
    assert parsed("# nothing\n") is None


def test_python_objects_give_the_tree_that_yaml_gives() -> None:
    def texts(node: Any) -> Any:
        if isinstance(node, MapNode):
            return {key: texts(value) for key, value in node.entries.items()}
        if isinstance(node, ListNode):
            return [texts(item) for item in node.items]
        assert isinstance(node, Scalar)
        return None if node.is_null else node.text

    value = {"a": True, "b": 2, "c": [1.5, "x"], "d": None}
    assert texts(from_python(value, "executor_config", "container", author=True)) == {
        "a": "true", "b": "2", "c": ["1.5", "x"], "d": None,
    }  # fmt: skip


def test_python_objects_of_other_kinds_are_refused() -> None:
    for value in ({"a": object()}, {1: "a"}, {"a": b"x"}, {"a": {1, 2}}):
        with pytest.raises(SettingError, match=r"can't be a setting|is not text"):
            from_python(value, "executor_config", "container", author=True)


def test_python_objects_that_hold_themselves_or_have_no_end_are_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(SettingError, match="nested deeper"):
        from_python(loop, "executor_config", "container", author=True)
    with pytest.raises(SettingError, match="more than 10000 values"):
        from_python([0] * 10_001, "executor_config", "container", author=True)

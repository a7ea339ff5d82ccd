from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.containerd.errors import InvalidReference
from airflow_isolation.containerd.reference import Reference, normalised

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.19", "docker.io/library/alpine:3.19"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/team/app:1", "docker.io/team/app:1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b/c:v1.2_x", "127.0.0.1:5000/a/b/c:v1.2_x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("registry.example/team/sales:1.4", "registry.example/team/sales:1.4"),
        ("Registry/app", "Registry/app:latest"),
        (f"app@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        (f"app:1@{DIGEST}", f"docker.io/library/app:1@{DIGEST}"),
        ("a__b/c-d--e.f", "docker.io/a__b/c-d--e.f:latest"),
    ],
)
def test_short_name_becomes_the_whole_one(written: str, whole: str) -> None:
    assert normalised(written) == whole


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", "is not a repository's path"),
        ("Alpine", "must be lower case"),
        ("app:", "'' is not a tag"),
        ("app:a/b:c d", "is not a tag"),
        ("app@sha256:12", "is not a sha256 or sha512 digest"),
        ("a b", "is not a repository's path"),
        ("../app", "is not a host"),
        ("a//b", "is not a repository's path"),
        ("app:" + "x" * 129, "is not a tag"),
        ("x" * 300, "longer than 255"),
        ("app\n", "is not a repository's path"),
    ],
)
def test_what_is_no_name_is_refused_in_words(written: str, words: str) -> None:
    with pytest.raises(InvalidReference, match=words):
        normalised(written)


@given(st.text(max_size=40))
def test_a_name_that_is_accepted_stays_as_it_is(text: str) -> None:
    try:
        whole = normalised(text)
    except InvalidReference:
        return
    assert normalised(whole) == whole
    assert str(Reference.parse(whole)) == whole

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.errors import ImageInvalid
from airflow_isolation.oci.image_config import MAX_CONFIG_SIZE, ImageConfig


def parse(**document: Any) -> ImageConfig:
    return ImageConfig.parse(json.dumps({"architecture": "amd64", "os": "linux", **document}).encode())


def test_a_whole_configuration() -> None:
    config = parse(
        variant="v3",
        created="2026-02-03T04:05:06.123456789+02:00",
        config={
            "Env": ["PATH=/bin", "EMPTY=", "URL=a=b=c"],
            "WorkingDir": "/opt/airflow",
            "User": "50000",
            "Labels": {"team": "sales"},
            "Entrypoint": ["/entrypoint"],
            "Cmd": ["bash"],
        },
        rootfs={"type": "layers", "diff_ids": []},
    )
    assert config == ImageConfig(
        architecture="amd64",
        os="linux",
        variant="v3",
        created=datetime(2026, 2, 3, 2, 5, 6, 123456, tzinfo=timezone.utc),
        env={"PATH": "/bin", "EMPTY": "", "URL": "a=b=c"},
        working_dir="/opt/airflow",
        user="50000",
        labels={"team": "sales"},
    )


def test_env_keeps_its_order() -> None:
    assert list(parse(config={"Env": ["Z=1", "A=2", "M=3"]}).env) == ["Z", "A", "M"]


def test_the_last_of_two_values_counts() -> None:
    assert parse(config={"Env": ["A=1", "A=2"]}).env == {"A": "2"}


@pytest.mark.parametrize("config", [None, {}, {"Env": None, "Labels": None, "User": None, "WorkingDir": None}])
def test_docker_writes_null_for_nothing(config: Any) -> None:
    assert parse(config=config, created=None) == ImageConfig(architecture="amd64")


@pytest.mark.parametrize(
    "created", ["0001-01-01T00:00:00Z", "2026-02-03T04:05:06Z", "2026-02-03T04:05:06.1Z", "2026-02-03T04:05:06-08:00"]
)
def test_times_that_builders_write(created: str) -> None:
    assert parse(created=created).created is not None


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"architecture": None}, "architecture"),
        ({"architecture": 64}, "architecture holds int"),
        ({"config": []}, None),
        ({"config": ["Env"]}, "config is not an object"),
        ({"config": {"Env": {"A": "1"}}}, "Env is not a list"),
        ({"config": {"Env": [1]}}, "Env holds int"),
        ({"config": {"Env": ["=1"]}}, "without a name"),
        ({"config": {"Env": ["A=\0"]}}, "NUL"),
        ({"config": {"User": 50000}}, "User holds int"),
        ({"config": {"WorkingDir": ["/"]}}, "WorkingDir holds list"),
        ({"config": {"Labels": ["a"]}}, "Labels is not an object"),
        ({"config": {"Labels": {"a": 1}}}, "Labels holds int"),
        ({"created": "yesterday"}, "'yesterday', not a time"),
        ({"created": "2026-13-45T04:05:06Z"}, "not a time"),
        ({"created": "0001-01-01T00:00:00+23:59"}, "not a time"),
    ],
)
def test_a_broken_field_is_named(document: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert parse(**document) == ImageConfig(architecture="amd64")
        return
    with pytest.raises(ImageInvalid, match=words):
        parse(**document)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_not_a_json_object_is_invalid(content: bytes) -> None:
    with pytest.raises(ImageInvalid, match=r"not (a )?JSON"):
        ImageConfig.parse(content)


def test_a_configuration_above_the_limit_is_not_read() -> None:
    with pytest.raises(ImageInvalid, match=str(MAX_CONFIG_SIZE + 1)):
        ImageConfig.parse(b" " * (MAX_CONFIG_SIZE + 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"architecture": st.just("amd64"), "config": JSON, "created": JSON, "os": JSON}))
def test_nothing_but_image_invalid_is_ever_raised(document: dict[str, Any]) -> None:
    try:
        config = ImageConfig.parse(json.dumps(document).encode())
    except ImageInvalid:
        return
    assert config.architecture == "amd64"


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    with pytest.raises(ImageInvalid):
        ImageConfig.parse(content)


def test_volumes_are_clean_paths_below_the_root() -> None:
    document = {
        "architecture": "amd64",
        "config": {"Volumes": {"/b/": {}, "a/../c": {}, "/": {}, "..": {}, "//d": None}},
    }
    assert ImageConfig.parse(json.dumps(document).encode()).volumes == ("/b", "/c", "/d")


@pytest.mark.parametrize("volumes", [["/data"], "x", {"/a\0b": {}}, {f"/{number}": {} for number in range(101)}])
def test_volumes_that_are_none_are_refused(volumes: object) -> None:
    document = {"architecture": "amd64", "config": {"Volumes": volumes}}
    with pytest.raises(ImageInvalid, match=r"Volumes|volumes"):
        ImageConfig.parse(json.dumps(document).encode())

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from airflow_isolation.containerd import payload
from airflow_isolation.containerd.api import runc_options_pb2
from airflow_isolation.containerd.errors import InvalidArgument


def test_protobuf_travels_under_its_bare_name() -> None:
    packed = payload.pack(runc_options_pb2.Options(systemd_cgroup=True))

    assert packed.type_url == "containerd.runc.v1.Options"
    assert payload.unpack(packed, runc_options_pb2.Options).systemd_cgroup


def test_prefix_of_others_is_understood() -> None:
    packed = AnyMessage()
    packed.Pack(runc_options_pb2.Options(root="/r"))

    assert packed.type_url.startswith("type.googleapis.com/")
    assert payload.unpack(packed, runc_options_pb2.Options).root == "/r"


def test_json_is_compact_utf8() -> None:
    packed = payload.pack_json(payload.SPEC, {"a": "ü"})

    assert packed.type_url == "types.containerd.io/opencontainers/runtime-spec/1/Spec"
    assert packed.value == '{"a":"ü"}'.encode()
    assert payload.unpack_json(packed) == {"a": "ü"}


def test_something_else_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"expected containerd\.runc\.v1\.Options, got x/y"):
        payload.unpack(AnyMessage(type_url="x/y"), runc_options_pb2.Options)

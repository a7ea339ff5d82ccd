"""What containerd carries in a ``google.protobuf.Any``: protobuf messages and JSON.

containerd names a protobuf message by its bare full name. It accepts the usual prefix ``type.googleapis.com/`` only from
1.7 on. JSON has URLs of its own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.any_pb2 import Any as AnyMessage

from airflow_isolation.containerd.errors import InvalidArgument

if TYPE_CHECKING:
    from google.protobuf.message import Message

    MessageType = TypeVar("MessageType", bound=Message)

SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"
LINUX_RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


def pack(message: Message) -> AnyMessage:
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def pack_json(type_url: str, value: Any) -> AnyMessage:
    """``value`` as compact JSON, such as an OCI spec under ``SPEC``."""
    return AnyMessage(type_url=type_url, value=json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


def holds(packed: AnyMessage, kind: type[Message]) -> bool:
    return packed.type_url.rpartition("/")[2] == kind.DESCRIPTOR.full_name


def unpack(packed: AnyMessage, kind: type[MessageType]) -> MessageType:
    """The message in it.

    :raises InvalidArgument: it holds something else.
    """
    if not holds(packed, kind):
        raise InvalidArgument(f"expected {kind.DESCRIPTOR.full_name}, got {packed.type_url or 'nothing'}")
    return kind.FromString(packed.value)


def unpack_json(packed: AnyMessage) -> Any:
    return json.loads(packed.value)

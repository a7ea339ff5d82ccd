"""What a message takes when it is decoded is known before, and never said too small."""

from __future__ import annotations

import gc
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_isolation.bridge import message_size
from airflow_isolation.bridge.message_size import WORST, exceeds

COUNT = 10_000
#: Bytes that the decoder uses itself, and by which its lists may be longer than what is in them.
ITS_OWN = 40_000


def array(element: bytes, count: int = COUNT) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + element * count


def said(message: bytes) -> int:
    """The smallest limit that the message does not exceed."""
    low, high = 0, WORST * len(message) + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if exceeds(message, middle) else (low, middle)
    return low


def taken(message: bytes) -> int:
    """What decoding really takes at its peak."""
    gc.collect()
    tracemalloc.start()
    try:
        msgspec.msgpack.decode(message)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ELEMENTS = {
    "nil": b"\xc0",
    "small number": b"\x05",
    "negative number": b"\xf0",
    "uint8": b"\xcc\xff",
    "int8": b"\xd0\x80",
    "uint16": b"\xcd\xff\xff",
    "uint32": b"\xce\xff\xff\xff\xff",
    "uint64": b"\xcf" + b"\xff" * 8,
    "int64": b"\xd3" + b"\x80" * 8,
    "float32": b"\xca\0\0\0\1",
    "float64": b"\xcb" + b"1" * 8,
    "empty text": b"\xa0",
    "a letter": b"\xa1a",
    "two letters": b"\xa2ab",
    "an emoji": b"\xa4\xf0\x9f\x98\x80",
    "a long text": b"\xd9\x50" + b"a" * 0x50,
    "bytes": b"\xc4\x02ab",
    "extension": b"\xd4\x01a",
    "extension of a length": b"\xc7\x02\x01ab",
    "empty list": b"\x90",
    "list of one": b"\x91\xc0",
    "empty map": b"\x80",
    "map of one": b"\x81\xa2ab\xc0",
    "map of six": b"\x86" + b"".join(b"\xa1%c\xc0" % letter for letter in b"abcdef"),
    "row": msgspec.msgpack.encode({"id": 123456, "name": "customer 17", "amount": 17.25}),
}


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_nothing_takes_more_than_is_said(element: bytes) -> None:
    message = array(element)
    assert taken(message) - ITS_OWN <= said(message) <= WORST * len(message)


@pytest.mark.parametrize("name", ["uint32", "float64", "nil", "empty list", "empty map", "row"])
def test_what_is_said_is_not_far_from_the_truth(name: str) -> None:
    message = array(ELEMENTS[name])
    assert said(message) <= 1.3 * taken(message)


def test_many_different_keys_are_counted() -> None:
    keys = b"".join(b"\xa6%06d\xc0" % number for number in range(COUNT))
    message = b"\xdf" + COUNT.to_bytes(4, "big") + keys
    assert taken(message) - ITS_OWN <= said(message)


def test_text_with_one_wide_character_takes_four_times_as_much() -> None:
    message = msgspec.msgpack.encode("a" * 1_000_000 + "😀")
    assert taken(message) - ITS_OWN <= said(message) <= 6 * len(message)


def test_depth_ends() -> None:
    assert exceeds(b"\x91" * (message_size.DEPTH_LIMIT + 1), 1 << 60)
    assert not exceeds(b"\x91" * 100, 1 << 60)


def test_there_is_a_limit_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_size, "OBJECT_LIMIT", 1000)
    assert exceeds(array(b"\xc0", 1000), 1 << 60)
    assert not exceeds(array(b"\xc0", 998), 1 << 60)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_looked_at_once(data: bytes) -> None:
    exceeds(data, 1 << 60)


@settings(max_examples=30, deadline=None)
@given(st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_what_is_skipped_is_what_belongs_to_a_tag(value: object) -> None:
    # Were a length read wrong, what follows would be, too.
    head = msgspec.msgpack.encode(value)
    tail = array(b"\x90", 1000)
    assert said(b"\x92" + head + tail) >= said(tail)
    assert said(b"\x92" + head + b"\xc0") <= said(b"\x92" + head + tail) - 70_000

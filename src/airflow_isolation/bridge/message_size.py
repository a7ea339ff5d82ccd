"""Finds out how much memory a MessagePack takes when it is decoded, without decoding it.

One byte can be an empty list, which takes 72 bytes in memory. A message is a sequence of tags, each with its content. So the
sizes are added up in one pass, which stores nothing and skips the content of texts. It takes some 0.2 µs for each object, so
only large messages are checked.

The sizes are CPython's for objects on 64-bit machines, with the reference in the list or map that holds them.
"""

from __future__ import annotations

from typing import Final

#: The most bytes in memory that one byte of a message can become: an empty list or map.
WORST: Final = 80
#: Deeper than Python's recursion limit, which bounds the decoder.
DEPTH_LIMIT: Final = 10_000
#: The most objects that are looked at; so many take some seconds.
OBJECT_LIMIT: Final = 10_000_000

_REFERENCE = 8
_NUMBER = _REFERENCE + 32
_LARGE_NUMBER = _REFERENCE + 40
_TEXT = _REFERENCE + 64
_BYTES = _REFERENCE + 80
_LIST = _REFERENCE + 72
_EMPTY_MAP = _REFERENCE + 64
_MAP = _REFERENCE + 192
#: The size of the decoder's cache for keys of maps.
_KEPT_KEYS = 512
_KEPT_KEY_LENGTH = 32
#: The number of entries for which the smallest map has room, and the bytes for each further entry.
_MAP_ENTRIES = 5
_MAP_ENTRY = 80

#: Tags that a length follows, and in how many bytes.
_TEXTS: Final = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINARIES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS: Final = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_LISTS: Final = {0xDC: 2, 0xDD: 4}
_MAPS: Final = {0xDE: 2, 0xDF: 4}
_WIDTHS: Final = {**_TEXTS, **_BINARIES, **_EXTENSIONS, **_LISTS, **_MAPS}


def _scalars() -> tuple[tuple[int, int], ...]:
    """For each tag with a value of fixed length: the bytes in the message (tag and value), and the bytes in memory."""
    # Small numbers, nil and booleans are shared objects, so only the reference counts.
    table = [(1, _REFERENCE)] * 256
    for tag in range(0xE0, 0xFB):
        table[tag] = (1, _NUMBER)
    table[0xCC] = (2, _REFERENCE)
    numbers = {0xCA: 4, 0xCB: 8, 0xCD: 2, 0xCE: 4, 0xD0: 1, 0xD1: 2, 0xD2: 4}
    large = {0xCF: 8, 0xD3: 8}
    extensions = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
    table_of = {tag: (1 + size, _NUMBER) for tag, size in numbers.items()}
    table_of |= {tag: (1 + size, _LARGE_NUMBER) for tag, size in large.items()}
    table_of |= {tag: (2 + size, _BYTES) for tag, size in extensions.items()}
    for tag, sizes in table_of.items():
        table[tag] = sizes
    return tuple(table)


_SCALARS: Final = _scalars()


def exceeds(message: bytes | bytearray, limit: int, *, start: int = 0) -> bool:
    """Whether decoding the message from ``start`` on takes more than ``limit`` bytes of memory, besides the message itself.

    True also if it is nested deeper than any decoder goes, or has more than ``OBJECT_LIMIT`` objects.
    """
    position, total, end = start, 0, len(message)
    # How many items are left in each open list or map, outermost first. A map's items are keys and values: an even number
    # means that a key is next.
    open_lists: list[tuple[int, bool]] = []
    left, in_map = 1, False
    keys: set[bytes] = set()
    for _ in range(OBJECT_LIMIT):
        if position >= end or total > limit:
            return total > limit
        while not left and open_lists:
            left, in_map = open_lists.pop()
        left -= 1
        total -= _REFERENCE if in_map else 0  # counted with the map itself
        tag = message[position]
        if 0x80 <= tag < 0xC0:
            # For short ones the tag has the length.
            width, count = 0, tag & (0x1F if tag >= 0xA0 else 0xF)
        elif tag in _WIDTHS:
            width = _WIDTHS[tag]
            count = int.from_bytes(message[position + 1 : position + 1 + width], "big")
        else:
            length, size = _SCALARS[tag]
            position += length
            total += size
            continue
        position += 1 + width
        if tag in _MAPS or tag < 0x90 or tag in _LISTS or tag < 0xA0:
            open_lists.append((left, in_map))
            if len(open_lists) > DEPTH_LIMIT:
                return True
            in_map = tag in _MAPS or tag < 0x90
            left = count * (1 + in_map)
            total += _map_size(count) if in_map else _LIST
            continue
        content = message[position : position + count] if tag in _TEXTS or tag < 0xC0 else b""
        if content:
            total += _key_size(bytes(content), keys) if in_map and left % 2 else _text_size(content)
        else:
            total += _REFERENCE if tag in _TEXTS or tag < 0xC0 else _BYTES + count
        position += count + (tag in _EXTENSIONS)
    return True


def _map_size(count: int) -> int:
    return _MAP + max(0, count - _MAP_ENTRIES) * _MAP_ENTRY if count else _EMPTY_MAP


def _text_size(text: bytes | bytearray) -> int:
    if len(text) == 1:
        return _REFERENCE  # a shared object
    # One character beyond the Basic Multilingual Plane makes all take four bytes each, and five while they are decoded.
    return _TEXT + len(text) * (1 if text.isascii() else 5)


def _key_size(key: bytes, known: set[bytes]) -> int:
    # The decoder caches short keys and reuses them; its cache is bounded.
    if len(key) > _KEPT_KEY_LENGTH or (key not in known and len(known) >= _KEPT_KEYS):
        return _text_size(key)
    if key in known:
        return _REFERENCE
    known.add(key)
    return _text_size(key)

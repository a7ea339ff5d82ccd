"""What a seccomp filter answers, by running its program as the kernel would (linux/filter.h, seccomp(2))."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

X86_64, X86, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7

KILL_THREAD, KILL_PROCESS, TRAP, ERRNO = 0, 0x80000000, 0x00030000, 0x00050000
TRACE, LOG, ALLOW = 0x7FF00000, 0x7FFC0000, 0x7FFF0000


def run(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """The action, with its number in the low 16 bits."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, *(0,) * 6)[:6])
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = index = at = 0
    memory = [0] * 16
    while True:
        code, when_true, when_false, k = instructions[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x06:
            return int(k)
        elif code == 0x05:
            at += k
        elif code in {0x15, 0x25, 0x35, 0x45}:
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: accumulator & k}[code]
            at += when_true if holds else when_false
        elif code == 0x54:
            accumulator &= k
        elif code == 0x02:
            memory[k] = accumulator
        elif code == 0x60:
            accumulator = memory[k]
        elif code == 0x07:
            index = accumulator
        elif code == 0x87:
            accumulator = index
        else:
            raise AssertionError(f"instruction {code:#x}")

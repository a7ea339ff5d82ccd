"""Runs as a workload and prints, as one JSON object, what every system call answers it, by each way to make one.

Standard library only. The calls are made with arguments that mean nothing, each in a child of its own, so that none
does harm: what counts is whether it is the kernel that refuses or the filter, and with which error.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import select
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.probe import probe
else:
    import probe  # it lies beside this file

LIBC = ctypes.CDLL(None, use_errno=True)
NOTHING = ctypes.c_ulong(2**64 - 1)

# Numbers of the x86_64 kernel. vfork shares this program's memory, sync waits for every disk of the host, returning from
# a signal that was not sent ends anywhere, and msgget leaves a queue behind that the next finds.
LEFT_OUT = {58: "vfork", 162: "sync", 15: "rt_sigreturn", 68: "msgget"}
LEFT_OUT_32 = {190: "vfork", 36: "sync", 119: "sigreturn", 173: "rt_sigreturn", 399: "msgget"}
LARGEST = 600
X32 = 0x40000000


def answer(call: Callable[[], int], *, seconds: float = 2.0) -> str:
    """``ok``, an error's name, or how the child ended that made the call; ``blocked`` when it did not come back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = os.getpid()
            result = call()
            if os.getpid() == own:
                os.write(writer, b"ok" if result >= 0 else probe.error_name(-result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    came_back = select.select([reader], (), (), seconds)[0]
    if not came_back:
        os.kill(child, signal.SIGKILL)
    said = os.read(reader, 64).decode()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or (f"ended with {status}" if came_back else "blocked")


def native(number: int, *arguments: object) -> Callable[[], int]:
    def call() -> int:
        ctypes.set_errno(0)
        result: int = LIBC.syscall(ctypes.c_long(number), *(arguments or (NOTHING,) * 6))
        error = ctypes.get_errno()
        return -error if result == -1 and error else 0

    return call


def by_interrupt(number: int, *arguments: int) -> Callable[[], int]:
    """A call of 32-bit x86, which 64-bit programs may make as well."""

    def call() -> int:
        words = (*arguments, *(-1,) * 6)[:6]
        code = b"\x53\x55" + b"\xb8" + struct.pack("<i", number)
        # ebx, ecx, edx, esi, edi, ebp
        for register, word in zip(b"\xbb\xb9\xba\xbe\xbf\xbd", words, strict=True):
            code += bytes([register]) + struct.pack("<i", word)
        code += b"\xcd\x80\x5d\x5b\xc3"
        page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        page[: len(code)] = code
        result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        return result if -4096 < result < 0 else 0

    return call


def system_calls() -> dict[str, str]:
    if platform.machine() != "x86_64":
        return {str(number): answer(native(number)) for number in range(LARGEST)}
    seen = {str(number): answer(native(number)) for number in range(LARGEST) if number not in LEFT_OUT}
    for number in range(LARGEST):
        if number not in LEFT_OUT_32:
            seen[f"32-bit {number}"] = answer(by_interrupt(number))
    for number in (0, 1, 39, 56, 435, 512, 547, 548, 600):
        seen[f"x32 {number}"] = answer(native(X32 + number))
    for number in (2**31, 2**32 - 1, 2**20):
        seen[f"far {number:#x}"] = answer(native(number))
    return seen


def calls_with_arguments() -> dict[str, str]:
    seen = {}
    one = {"x86_64": {"socket": 41, "clone": 56, "personality": 135, "ioctl": 16, "mount": 165, "unshare": 272}}.get(
        platform.machine(), {"socket": 198, "clone": 220, "personality": 92, "ioctl": 29, "mount": 40, "unshare": 97}
    )
    for family in range(50):
        for high in (0, 2**32, 2**63):
            for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
                call = native(one["socket"], ctypes.c_ulong(family + high), ctypes.c_long(kind), ctypes.c_long(0))
                seen[f"socket {family} {high:#x} {kind}"] = answer(call)
    for bit in range(7, 32):
        # CLONE_VFORK, CLONE_PARENT and the threads' flags are for children that this program could not collect.
        if 1 << bit not in {0x4000, 0x8000, 0x10000, 0x100, 0x200, 0x400, 0x800, 0x80000}:
            flags = ctypes.c_ulong(1 << bit | signal.SIGCHLD)
            seen[f"clone {1 << bit:#x}"] = answer(native(one["clone"], flags, *(None,) * 4))
        seen[f"unshare {1 << bit:#x}"] = answer(native(one["unshare"], ctypes.c_ulong(1 << bit)))
        seen[f"personality {1 << bit:#x}"] = answer(native(one["personality"], ctypes.c_ulong(1 << bit)))
    for persona in (0, 8, 0x20000, 0x20008, 0x0008 + 2**32):
        seen[f"personality {persona:#x}"] = answer(native(one["personality"], ctypes.c_ulong(persona)))
    for request in (0x5412, 0x541C, 0x5401, 0x5412 + 2**32):
        seen[f"ioctl {request:#x}"] = answer(native(one["ioctl"], ctypes.c_int(0), ctypes.c_ulong(request), None))
    seen["mount"] = answer(native(one["mount"], b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None))
    if platform.machine() == "x86_64":
        for family in (1, 2, 16, 38, 40):
            seen[f"32-bit socket {family}"] = answer(by_interrupt(359, family, socket.SOCK_STREAM, 0))
        for operation in range(-1, 22):
            seen[f"32-bit socketcall {operation}"] = answer(by_interrupt(102, operation))
        for operation in (0, 1, 2, 11, 12, 14, 21, 24):  # 13 is msgget
            seen[f"32-bit ipc {operation}"] = answer(by_interrupt(117, operation))
    return seen


if __name__ == "__main__":
    json.dump({"calls": system_calls(), "calls with arguments": calls_with_arguments()}, sys.stdout)
    sys.stdout.flush()

"""Importing Airflow once, in a process that is then forked for every workload."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import sys

TYPE_CHECKING = False  # as in agent.py
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable
    from typing import Any

    from airflow_isolation.agent import agent
else:
    import agent

#: The modules beside this one. Users' files may import modules of the same names.
OURS = ("agent", "preload", "parse_server", "zygote", "entry")

#: Modules that nearly every parse and task imports, 0.1 s of CPU; preloaded, they cost it once. Not every image has them
#: all.
USUAL = (
    "airflow.dag_processing.bundles.local",
    "airflow.models.serialized_dag",
    "airflow.providers.standard.operators.bash",
    "airflow.providers.standard.operators.empty",
    "airflow.providers.standard.operators.python",
    "airflow.providers.standard.operators.trigger_dagrun",
    "airflow.providers.standard.sensors.external_task",
    "airflow.sdk._shared.logging.factory",
    "airflow.sdk._shared.logging.remote",
    "airflow.version",
    "encodings.idna",
    "jinja2.ext",
    "setproctitle",
)


# linux/mman.h; 2 MiB on x86_64, and on aarch64 with pages of 4 KiB. Elsewhere the kernel finds nothing to do.
MADV_COLLAPSE = 25
HUGE_PAGE = 2 * 1024 * 1024


class Unable(Exception):
    """Nothing can be forked from this image; the text says why."""


def import_airflow(worker: socket.socket, required: Iterable[str], usual: Iterable[str] = USUAL) -> None:
    """Import everything that a child would import, and stay a process with one thread.

    The process ends when the worker does, even while an import hangs.

    :raises Unable: an import fails, or leaves threads.
    """
    _end_with_worker(worker)
    try:
        _import_airflow(required, usual)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        raise Unable(f"image can't import Airflow: {error!r:.1000}") from None
    if threads() > 1:
        raise Unable(f"importing Airflow left {threads()} threads running, which can't be forked")
    _stop_ending_with_worker(worker)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()
    use_huge_pages()


def _import_airflow(required: Iterable[str], usual: Iterable[str]) -> None:
    from importlib import import_module

    sys.path.pop(0)  # this file's directory, from which nothing shall be imported
    for name in OURS:
        sys.modules.pop(name, None)
    agent.keep_segfaults_deadly()
    for module in required:
        import_module(module)
    try:
        from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime
    except ImportError:
        pass  # the children try it themselves
    else:
        runtime: Any = ProvidersManagerTaskRuntime
        runtime().initialize_providers_taskflow_decorator()
    preload(usual)
    sdk = import_module("airflow.sdk")
    for name in sdk.__all__:
        # The package imports its names lazily, so ask for each.
        try:
            getattr(sdk, name)
        except Exception:  # noqa: S110 - a provider that the image lacks
            pass


def preload(modules: Iterable[str]) -> None:
    """Import what children will need. A failure is ignored: the import fails again in the child, which reports it."""
    from importlib import import_module

    for module in modules:
        if module not in sys.modules:
            try:
                import_module(module)
            except (Exception, SystemExit):  # noqa: S110 - see above
                pass


def _end_with_worker(worker: socket.socket) -> None:
    """End when the worker does, even while an import hangs: the kernel sends SIGIO when the connection closes."""

    def look(*_: object) -> None:
        poll = select.poll()
        poll.register(worker, select.POLLHUP)
        if poll.poll(0):
            os._exit(1)

    signal.signal(signal.SIGIO, look)
    signal.siginterrupt(signal.SIGIO, False)
    fcntl.fcntl(worker, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(worker, fcntl.F_SETFL, fcntl.fcntl(worker, fcntl.F_GETFL) | os.O_ASYNC)
    look()


def _stop_ending_with_worker(worker: socket.socket) -> None:
    fcntl.fcntl(worker, fcntl.F_SETFL, fcntl.fcntl(worker, fcntl.F_GETFL) & ~os.O_ASYNC)


def listen_to_children_alone() -> int:
    """As ``agent.listen_to_signals``, but for SIGCHLD only. No other signal has a handler, not even Python's for SIGINT.

    The kernel drops signals to process 1 without a handler, so the children can't affect it with any signal.
    """
    wakeups = agent.listen_to_signals()
    for number in signal.valid_signals() - {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    return wakeups


def use_huge_pages() -> None:
    """Move the memory in use into huge pages, if the kernel can (Linux 6.1); the size stays the same.

    A fork copies the page table, and the child's end frees it: for 130 MB that takes 9 ms, and half with huge pages.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, access, _, _, inode, *name = line.split()
            if access != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
                continue
            first, last = (int(address, 16) for address in addresses.split("-"))
            first, last = -(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE
            if first < last:
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_COLLAPSE)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def memory() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as counters:
        return int(counters.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

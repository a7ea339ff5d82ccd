"""Reads the channels of a workload, which may send anything, and passes their lines to the loggers of Airflow's
supervisor.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from airflow.sdk._shared.logging.structlog import reconfigure_logger
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import _log_to_target
from structlog.processors import CallsiteParameterAdder

from airflow_isolation.bridge.channels import FrameReader, LineReader
from airflow_isolation.integration.seams import log_event
from airflow_isolation.integration.seams.log_event import LogEvent, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from structlog.typing import FilteringBoundLogger

    from airflow_isolation.bridge.channels import LineAllowance
    from airflow_isolation.bridge.pipe import Channel

_NOBODY: Final[Mapping[str, Any]] = MappingProxyType({})


def channel_readers(
    loggers: Iterable[FilteringBoundLogger],
    name: str,
    *,
    request: Callable[[Any], None],
    broken: Callable[[Exception], object],
    allowance: LineAllowance | None = None,
    identity: Mapping[str, Any] = _NOBODY,
    hide: Callable[[Any], Any] | None = None,
) -> tuple[Callable[[Channel], bool], ...]:
    """Four functions that read stdout, stderr, logs and requests of a workload, in this order, when a channel is readable.

    Each returns whether it wants more. If the workload breaks the protocol, only the workload ends: ``broken`` is called,
    and the channel is not read any more. The supervisor goes on, because it has to report a state and upload a log.

    :param name: the first word of the loggers' names in the log: ``task`` or ``dag_processor``.
    :param request: is called with each request frame.
    :param allowance: how much the workload may write in all; None is no bound.
    :param identity: fields that say which workload a line is from; they replace such fields in the line.
    :param hide: masks words in a value, besides those that Airflow's masker knows.
    """
    guarded = partial(_guarded, broken)
    lines = partial(LineReader, allowance=allowance)
    decoder = msgspec.msgpack.Decoder(comms._RequestFrame)  # noqa: SLF001 - the frame has no public name
    return (
        *(guarded(lines(_text_logger(loggers, f"{name}.{stream}", level, hide)))
          for stream, level in (("stdout", logging.INFO), ("stderr", logging.ERROR))),
        log_reader(loggers, name, broken=broken, allowance=allowance, identity=identity, hide=hide),
        guarded(FrameReader(lambda body: request(decoder.decode(body)))),
    )  # fmt: skip


def log_reader(
    loggers: Iterable[FilteringBoundLogger],
    name: str,
    *,
    broken: Callable[[Exception], object],
    allowance: LineAllowance | None = None,
    identity: Mapping[str, Any] = _NOBODY,
    hide: Callable[[Any], Any] | None = None,
) -> Callable[[Channel], bool]:
    """A function that reads the structured log of a workload; see ``channel_readers``."""
    source = Source(name, datetime.now(tz=timezone.utc), identity)
    write = _writer(loggers, hide)
    reader = LineReader(
        lambda line: write(log_event.read(line, source)),
        cut=lambda line, left_out: write(log_event.read_cut(line, left_out, source)),
        allowance=allowance,
    )
    return _guarded(broken, reader)


def _guarded(broken: Callable[[Exception], object], read: Callable[[Channel], bool]) -> Callable[[Channel], bool]:
    def reader(channel: Channel) -> bool:
        try:
            return read(channel)
        except BlockingIOError:
            # At the end Airflow empties non-blocking channels: it reads until they raise this.
            raise
        except (BrokenPipeError, ConnectionResetError):
            return False
        except Exception as error:  # noqa: BLE001 - whatever undecodable bytes can raise
            broken(error)
            return False

    return reader


def _text_logger(
    loggers: Iterable[FilteringBoundLogger], logger: str, level: int, hide: Callable[[Any], Any] | None
) -> Callable[[bytes], None]:
    write = _writer(loggers, hide)
    return lambda line: write(LogEvent(level, log_event.text_of(line), {"logger": logger}))


def _writer(loggers: Iterable[FilteringBoundLogger], hide: Callable[[Any], Any] | None) -> Callable[[LogEvent], None]:
    # The workload filters by level itself, so these loggers print everything.
    targets = tuple(
        reconfigure_logger(target, CallsiteParameterAdder, level_override=logging.NOTSET) for target in loggers
    )

    def write(event: LogEvent) -> None:
        level, text, values = event
        if hide is not None:
            text, values = hide(text), hide(values)
        for target in targets:
            _log_to_target(target, level, text, **values)

    return write

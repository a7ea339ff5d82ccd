"""Blobs in containerd's content store: read, write, label, keep."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from airflow_isolation.containerd.api import content_pb2, leases_pb2
from airflow_isolation.containerd.errors import AlreadyExists, ContainerdError, InvalidImage, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from airflow_isolation.containerd.client import Leased, Services
    from airflow_isolation.containerd.layout import Blob

# Large enough that the cost of each message doesn't matter, and below the daemon's limit of 16 MiB.
CHUNK = 1 << 20


def read_document(services: Services, blob: Blob) -> bytes:
    """An index, manifest or configuration.

    :raises InvalidImage: the store doesn't have it, or it has another size than ``blob`` says.
    """
    text = bytearray()
    try:
        reading = services.content.Read(content_pb2.ReadContentRequest(digest=blob.digest))
        for part in reading:
            text += part.data
            if len(text) > blob.size:
                # A descriptor may give a layer of many gigabytes the size of a small document.
                reading.cancel()
                raise InvalidImage(f"{blob.digest} has more than the {blob.size} bytes that are said of it")
    except NotFound as error:
        raise InvalidImage(
            f"{blob.digest} is missing from the content store", hint="Import or pull the image again"
        ) from error
    if len(text) != blob.size:
        raise InvalidImage(f"{blob.digest} has {len(text)} bytes instead of {blob.size}")
    return bytes(text)


def keep(leased: Leased, blob: Blob) -> bool:
    """Whether the store has the blob; if so, it stays as long as the lease."""
    # Leased first, looked up second: the other way round, the garbage collector could remove it in between.
    leased.leases.AddResource(
        leases_pb2.AddResourceRequest(id=leased.lease_id, resource=leases_pb2.Resource(id=blob.digest, type="content"))
    )
    try:
        leased.content.Info(content_pb2.InfoRequest(digest=blob.digest))
    except NotFound:
        return False
    return True


def write(
    leased: Leased, blob: Blob, chunks: Iterable[bytes], *, done: Callable[[int], None], timeout: float = 3600.0
) -> None:
    """Store a blob; the daemon checks its digest. Success if it is there already. ``done`` gets the bytes stored so far.

    :raises FailedPrecondition: the bytes don't have the digest or the size.
    """
    ref = f"{leased.lease_id}-{blob.digest}"
    failure: list[BaseException] = []

    def requests() -> Iterator[content_pb2.WriteContentRequest]:
        offset = 0
        try:
            for chunk in chunks:
                yield content_pb2.WriteContentRequest(
                    action=content_pb2.WRITE,
                    ref=ref,
                    total=blob.size,
                    expected=blob.digest,
                    offset=offset,
                    data=chunk,
                )
                offset += len(chunk)
        except BaseException as error:  # noqa: BLE001
            # This runs in a thread of gRPC, which would only print the error.
            failure.append(error)
            return
        yield content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT, ref=ref, total=blob.size, expected=blob.digest, offset=offset
        )

    try:
        for answer in leased.content.Write(requests(), timeout=timeout):
            done(answer.offset)
        if failure:
            raise failure[0]
    except AlreadyExists:
        done(blob.size)
    except BaseException:
        abort(leased, ref)
        raise


def abort(leased: Leased, ref: str) -> None:
    try:
        leased.content.Abort(content_pb2.AbortRequest(ref=ref))
    except ContainerdError:
        # It was not begun, or is committed, or the daemon is gone: then the end of the lease removes it.
        return


def label(services: Services, blob: Blob, labels: Mapping[str, str]) -> None:
    """Add labels; labels with other names stay."""
    paths = [f"labels.{key}" for key in labels]
    if paths:
        info = content_pb2.Info(digest=blob.digest, labels=labels)
        services.content.Update(content_pb2.UpdateRequest(info=info, update_mask=FieldMask(paths=paths)))


def as_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()

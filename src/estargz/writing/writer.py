"""Tar bytes in, a finished layer out: the writer, and the same as the compressor callback of a differ."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from estargz._layer import LayerBuilder
from estargz.errors import EstargzError, UsageError
from estargz.layer import MEDIA_TYPES, Layer
from estargz.options import Options
from estargz.writing.sink import Destination, open_sink

__all__ = ["Compressor", "Writer", "finish_layer"]


def finish_layer(
    builder: LayerBuilder, options: Options, media_type: str | None = None, missing: tuple[str, ...] = ()
) -> Layer:
    """Ends a builder and describes what it has written."""
    size, digest, uncompressed_size, diff_id, toc_digest = builder.finish()
    return Layer(
        compression=options.compression,
        media_type=media_type or MEDIA_TYPES[options.compression],
        digest=f"sha256:{digest.hex()}",
        size=size,
        diff_id=f"sha256:{diff_id.hex()}",
        tar_digest=f"sha256:{builder.tar_digest.hex()}",
        uncompressed_size=uncompressed_size,
        toc_digest=f"sha256:{toc_digest.hex()}" if toc_digest is not None else None,
        encoder=options.encoder,
        prefetch_size=builder.prefetch_size,
        missing=missing,
        stages=builder.stages(),
    )


class Writer:
    """A layer made from the bytes of a tar stream, which may come in pieces of any size.

    The stream is kept exactly: unpacking an eStargz layer gives the same bytes back.

    Args:
        dest: a path, which appears when ``close`` succeeds, or an object with ``write(bytes)``, which is written to in
            order, is never sought in and never closed. It is called from the writer's own threads, one at a time.
        media_type: overrides the descriptor's media type.
        options: the fields of ``Options`` by name.

    Raises:
        UsageError: an option cannot be honoured.
        SinkError: the path cannot be written.

    As a context manager it closes on success and aborts on an exception.
    """

    def __init__(self, dest: Destination, *, media_type: str | None = None, **options: Any) -> None:
        self._layer: Layer | None = None
        self._builder: LayerBuilder | None = None
        self._options = Options(**options)
        self._media_type = media_type
        self._sink = open_sink(dest)
        try:
            self._builder = LayerBuilder(
                **self._options.kernel_arguments(),
                producer_helps=False,
                write=self._sink.target,
                output=self._sink.name,
            )
        except BaseException:
            self._sink.discard()
            raise

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Takes the next bytes of the stream, blocking while the memory budget is used up; returns their number.

        Raises:
            TarError: the stream is malformed, or holds what a layer cannot; names the entry and the offset.
            SinkError: the destination cannot be written; or whatever its own ``write`` raised.
        """
        builder = self._open_builder()
        try:
            builder.feed(data)
        except BaseException:
            self.abort()
            raise
        return memoryview(data).nbytes

    def close(self) -> Layer:
        """Ends the stream, writes the table of contents, and returns what was made. Calling it again returns the same.

        Raises:
            TarError: the stream is truncated; or, as eStargz, ends inside the padding of its last file.
            SinkError: the destination cannot be written; or whatever its own ``write`` raised.
        """
        if self._layer is not None:
            return self._layer
        builder = self._open_builder()
        try:
            builder.end_feed()
            layer = finish_layer(builder, self._options, self._media_type)
        except BaseException:
            self.abort()
            raise
        self._builder = None
        self._sink.commit()
        self._layer = layer
        return layer

    def abort(self) -> None:
        """Gives up: stops the threads and leaves nothing behind. Harmless after ``close``."""
        if self._builder is not None:
            self._builder.cancel()
            self._builder = None
            self._sink.discard()

    @property
    def layer(self) -> Layer:
        """What was made. Raises EstargzError before ``close`` has succeeded."""
        if self._layer is None:
            raise EstargzError("the layer is not finished: close() the writer first")
        return self._layer

    def _open_builder(self) -> LayerBuilder:
        if self._builder is None:
            raise EstargzError("the writer is closed")
        return self._builder

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_builder", None) is not None:
            self.abort()


def stream_type(media_type: str) -> str:
    """``gzip``, ``zstd``, or nothing: what OCI's and Docker's media types of layers say at their end."""
    return next((kind for kind in ("gzip", "zstd") if media_type.endswith((f"+{kind}", f".{kind}"))), "")


class Compressor:
    """A differ's compressor callback: ``compressor(dest, media_type)`` gives the writer that the differ fills and closes;
    ``finalize`` then gives the layer with its descriptor and annotations. It may serve several layers at once.

    This is the contract between BuildKit and containerd's differ, which lets a differ write one blob only.

    Args:
        options: the fields of ``Options`` by name.

    Raises:
        UsageError: an option cannot be honoured.
    """

    def __init__(self, **options: Any) -> None:
        self._compression = Options(**options).compression
        self._options = options
        self._latest: Writer | None = None

    def __call__(self, dest: Destination, media_type: str) -> Writer:
        """A writer for one layer. Raises UsageError when the media type does not say what will be written."""
        if stream_type(media_type) != stream_type(MEDIA_TYPES[self._compression]):
            raise UsageError(f"media type {media_type!r} is not one of {self._compression} layers")
        self._latest = Writer(dest, media_type=media_type, **self._options)
        return self._latest

    def finalize(self, writer: Writer | None = None) -> Layer:
        """The layer of ``writer``, by default the latest. Raises EstargzError while it is not closed."""
        writer = writer or self._latest
        if writer is None:
            raise EstargzError("no layer was written with this compressor")
        return writer.layer

"""One source becomes one layer: the one place that knows the order of a build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from estargz._layer import LayerBuilder
from estargz.errors import UsageError
from estargz.layer import Layer
from estargz.options import DEFAULT_CHUNK_SIZE, Options, Progress
from estargz.writing.pool import Pool
from estargz.writing.priority import Priority
from estargz.writing.sink import Destination, open_sink
from estargz.writing.source import PathLike, Readable, Source, TarSource, open_source, opened
from estargz.writing.writer import finish_layer

__all__ = ["build", "build_from", "tar_digest"]


def build(
    source: PathLike | Readable,
    dest: Destination,
    *,
    lower: PathLike | None = None,
    overlay_lower: Sequence[PathLike] | None = None,
    compression: str = "estargz",
    level: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    min_chunk_size: int = 0,
    portable: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    landmark: bool = True,
    prefetch: Iterable[str] | None = None,
    allow_missing: bool = False,
    source_date_epoch: int | None = None,
    rewrite_timestamp: bool = False,
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> Layer:
    """Builds a layer in one pass and returns its sizes, digests and descriptor.

    Args:
        source: a directory, the path of a tar file (plain, gzip, zstd, or an eStargz blob), or an object with ``read``.
        dest: a path, which appears only when everything has succeeded, or an object with ``write(bytes)``.
        lower: the directory that a source directory is compared with; the layer then holds the changes only.
        overlay_lower: the lower directories of an overlayfs, topmost first, when the source is its upperdir.
        compression: ``estargz``, ``gzip``, ``zstd`` or ``uncompressed``.
        level: 0..3 ISA-L's, 4..12 libdeflate's, of zstd 1..19; higher is smaller and slower. None for 2, of zstd 3.
        chunk_size: bytes of a file per member, 1..2**30.
        min_chunk_size: bytes that a member holds before a chunk begins another, 0..2**30. Layers made with it need
            readers that know inner offsets; containers/storage does not.
        portable: the same bytes on every CPU: levels 1..3 are libdeflate's, too, and 1 is the default (docs/reproducible.md).
        threads: 1..1024, None for the CPUs this process may use. Never changes the bytes.
        memory: bytes that data under way may take, None for a default by threads. Never changes the bytes.
        landmark: begin an eStargz layer made of directories with ``.no.prefetch.landmark``, as the format demands.
        prefetch: paths relative to the layer's root, or patterns of them (``*``, ``?``, ``[...]`` within a name, ``**`` across
            directories), in order of priority. They are written first, each behind its parent directories and its hard
            link's target, then ``.prefetch.landmark``, then everything else as usual; runtimes fetch what lies before the
            landmark in one go (``Layer.prefetch_size``). A symlink's target is not followed, a directory's content not
            taken along: name it, or use ``directory/**``. None and no paths at all are the same. eStargz layers only. A
            tar that cannot be read twice, or is compressed, is kept uncompressed in ``$TMPDIR`` meanwhile.
        allow_missing: paths to prefetch that the layer does not have are listed in ``Layer.missing``, and no error.
        source_date_epoch: upper bound in seconds of the modification times of a directory's entries.
        rewrite_timestamp: the bound holds for all times in a tar, too, which is otherwise kept to the byte.
        progress: is given the uncompressed bytes done, about ten times a second.
        pool: threads and memory shared with builds that other threads run at the same time; ``threads`` and ``memory`` are
            then the most that this build takes of it. Never changes the bytes.

    Raises:
        UsageError: options that cannot be honoured, alone or together.
        SourceError, ChangedError, TarError: the source cannot become a layer; names the file or entry.
        SinkError: the destination cannot be written. What an object's own ``write`` raises is raised as it is.
    """
    options = Options(
        compression=compression,
        level=level,
        chunk_size=chunk_size,
        min_chunk_size=min_chunk_size,
        portable=portable,
        threads=threads,
        memory=memory,
        progress=progress,
        pool=pool,
    )
    with _opened(
        source,
        options,
        lower=lower,
        overlay_lower=overlay_lower,
        landmark=landmark,
        prefetch=prefetch,
        allow_missing=allow_missing,
        source_date_epoch=source_date_epoch,
        rewrite_timestamp=rewrite_timestamp,
    ) as stream:
        return build_from(stream, dest, options)


@contextmanager
def _opened(
    source: PathLike | Readable,
    options: Options,
    *,
    lower: PathLike | None,
    overlay_lower: Sequence[PathLike] | None,
    landmark: bool,
    prefetch: Iterable[str] | None,
    allow_missing: bool,
    source_date_epoch: int | None,
    rewrite_timestamp: bool,
) -> Iterator[Source]:
    priority = Priority(prefetch or (), allow_missing=allow_missing) or None
    if rewrite_timestamp and source_date_epoch is None:
        raise UsageError("rewriting timestamps needs a source_date_epoch to compare them with")
    if priority is not None and options.compression != "estargz":
        raise UsageError(
            f"only eStargz layers have an order of prefetching; compression {options.compression!r} has none"
        )
    if priority is not None and not landmark:
        raise UsageError("prefetching needs the landmark that says how far; leave either out")
    arguments = options.kernel_arguments()
    with opened(
        open_source(
            source,
            lower=lower,
            overlay_lower=overlay_lower,
            epoch=source_date_epoch,
            rewrite=rewrite_timestamp,
            landmark=landmark and options.compression == "estargz",
            priority=priority,
            threads=arguments["threads"],
            crew=arguments["crew"],
        )
    ) as stream:
        yield stream


def build_from(stream: Source, dest: Destination, options: Options) -> Layer:
    """``build`` from a source that is open. Raises what ``build`` raises."""
    with open_sink(dest) as sink, _filled(stream, options, write=sink.target, output=sink.name) as (builder, missing):
        return finish_layer(builder, options, missing=missing)


def tar_digest(source: PathLike | Readable, options: Options, **arguments: Any) -> str:
    """``Layer.tar_digest`` of what ``build`` would make, without compressing or writing anything.

    arguments: those of ``build`` that say what the tar is made of. Raises what ``build`` raises.
    """
    with (
        _opened(source, options, **arguments) as stream,
        _filled(stream, options, compression="uncompressed") as (builder, _),
    ):
        builder.finish()
        return f"sha256:{builder.tar_digest.hex()}"


@contextmanager
def _filled(stream: Source, options: Options, **changes: Any) -> Iterator[tuple[LayerBuilder, tuple[str, ...]]]:
    """A builder that has all of a source, and what was to be prefetched and is missing."""
    builder = LayerBuilder(
        # Waiting for a pipe, or for what is inflated, keeps the caller's thread busy; walking a tree does not.
        **{**options.kernel_arguments(), "producer_helps": not isinstance(stream, TarSource), **changes}
    )
    try:
        yield builder, stream.fill(builder)
    except BaseException:
        builder.cancel()
        raise

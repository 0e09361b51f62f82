"""What a tar stream holds, as flat rows: the build without its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from estargz._layer import LayerBuilder
from estargz.options import DEFAULT_CHUNK_SIZE, Options
from estargz.writing.source import PIECE_SIZE, Readable

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ROW_FIELDS", "Ending", "Scan", "scan_tar"]

# The fields of toc_row in ext/estargz/rows.h, as a numpy dtype.
ROW_FIELDS: list[tuple[Any, ...]] = [
    ("strings_at", "<i8"),
    ("name_len", "<u4"),
    ("link_len", "<u4"),
    ("user_name_len", "<u4"),
    ("group_name_len", "<u4"),
    ("xattrs_len", "<u4"),
    ("chunk_count", "<u4"),
    ("first_chunk", "<i8"),
    ("mode", "<i8"),
    ("uid", "<i8"),
    ("gid", "<i8"),
    ("size", "<i8"),
    ("mtime_s", "<i8"),
    ("offset", "<i8"),
    ("inner_offset", "<i8"),
    ("dev_major", "<i8"),
    ("dev_minor", "<i8"),
    ("digest", "u1", (32,)),
    ("type", "u1"),
    ("has_digest", "u1"),
    ("has_mtime", "u1"),
    ("reserved", "u1", (5,)),
]


@dataclass(frozen=True, slots=True)
class Scan:
    """The entries of a tar stream.

    ``rows``: structured array of shape (entries,), fields as ROW_FIELDS, in stream order; ``strings_at`` points into
    ``strings`` at name, link, user name, group name and packed attributes, back to back. ``offset`` is where a payload
    begins in the stream, 0 without one; chunks mean nothing here. ``diff_id`` and ``size`` (bytes) are those of the stream
    itself. ``ending`` says how the archive ends in it.
    """

    rows: np.ndarray[Any, Any]
    strings: bytes
    diff_id: str
    size: int
    ending: Ending


class Ending(NamedTuple):
    """Where in a stream its tar ends, in bytes; -1: nowhere.

    at: the first zero block; zero_blocks: how many there are, 2 meaning two or more; hidden_at: the first block behind them
    that is not zero, which readers of tars do not look at.
    """

    at: int
    zero_blocks: int
    hidden_at: int


def scan_tar(readable: Readable, threads: int | None = None) -> Scan:
    """Reads a plain tar stream to its end and digests every file.

    Raises:
        TarError: it is malformed, or holds what a layer cannot; names the entry and the offset.
    """
    import numpy as np

    arguments = Options(chunk_size=DEFAULT_CHUNK_SIZE, threads=threads).kernel_arguments()
    builder = LayerBuilder(**arguments | {"compression": "none"}, producer_helps=False)
    try:
        while piece := readable.read(PIECE_SIZE):
            builder.feed(piece)
        builder.end_feed()
        _, _, size, diff_id, _ = builder.finish()
    except BaseException:
        builder.cancel()
        raise
    rows, _, strings = builder.tables()
    table = np.frombuffer(rows, dtype=np.dtype(ROW_FIELDS))
    return Scan(table, strings, f"sha256:{diff_id.hex()}", size, Ending(*builder.ending()))

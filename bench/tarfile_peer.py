"""A plain gzip layer as a Python program without this package makes it; a peer of its own process.

python bench/tarfile_peer.py gzip|igzip LEVEL THREADS TREE BLOB
"""

from __future__ import annotations

import sys
import tarfile
from typing import IO, Any


def opened(how: str, level: int, threads: int, blob: str) -> IO[Any]:
    if how == "gzip":
        import gzip

        return gzip.GzipFile(blob, "wb", compresslevel=level)  # type: ignore[return-value]
    from isal import igzip_threaded

    return igzip_threaded.open(blob, "wb", compresslevel=level, threads=threads)  # type: ignore[no-any-return]


def main() -> None:
    how, level, threads, tree, blob = sys.argv[1:]
    with opened(how, int(level), int(threads), blob) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        tar.add(tree, arcname=".")


if __name__ == "__main__":
    main()

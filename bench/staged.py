"""One build in a process of its own, which tells its stages; with parts left out if only some are to be measured.

    python bench/staged.py TREE BLOB THREADS COMPRESSION LEVEL [PART ...]

Without parts everything is done, as "estargz build" does it; "nothing" as the only part walks and does nothing else.
Prints JSON: the layer's stages in seconds, the extent of its batches, what naming and syncing the blob took ("commit"), and
all of it ("inside").
"""

from __future__ import annotations

import json
import sys
import time

from estargz._layer import LayerBuilder
from estargz.options import Options
from estargz.writing.sink import open_sink
from estargz.writing.source import open_source, opened


def staged_build(tree: str, blob: str, options: Options, parts: list[str] | None) -> dict[str, float]:
    started = time.perf_counter()
    source = open_source(tree, lower=None, overlay_lower=None, epoch=None, landmark=options.compression == "estargz")
    with opened(source) as stream:
        with open_sink(blob) as sink:
            builder = LayerBuilder(
                **options.kernel_arguments(), producer_helps=True, write=sink.target, output=sink.name, parts=parts
            )
            stream.fill(builder)
            builder.finish()
            finished = time.perf_counter()
        ended = time.perf_counter()
    return {**builder.stages(), **builder.extent(), "commit": ended - finished, "inside": ended - started}


def main() -> None:
    tree, blob, threads, compression, level, *parts = sys.argv[1:]
    options = Options(compression=compression, level=int(level), threads=int(threads))
    chosen = None if not parts else [part for part in parts if part != "nothing"]
    print(json.dumps(staged_build(tree, blob, options, chosen)))


if __name__ == "__main__":
    main()

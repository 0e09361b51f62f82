"""estargz build: a layer from a directory, two directories, an overlay's upperdir, or a tar stream."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from estargz.cli import silence, tell
from estargz.errors import SinkError, UsageError
from estargz.layer import MEDIA_TYPES, Layer
from estargz.options import DEFAULT_CHUNK_SIZE, DEFAULT_LEVEL, DEFAULT_ZSTD_LEVEL, Progress, parse_size
from estargz.writing.access_log import AccessLog, read_access_log
from estargz.writing.building import build
from estargz.writing.sink import DescriptorSink

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WARNINGS = 100  # of missing paths
_LISTEN_MS = 100


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """Bytes, or a number with KiB, MiB, GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


portable_option = click.option(
    "--portable", is_flag=True, help="The same bytes on every CPU: levels 1-3 are libdeflate's, too.  [level 1]"
)


@click.command("build")
@click.argument("source", type=click.Path())
@click.option("-o", "--output", required=True, metavar="BLOB", help="File to write; - is standard output.")
@click.option("--lower", metavar="DIR", help="Write only what SOURCE changes over DIR.")
@click.option(
    "--overlay-lower",
    multiple=True,
    metavar="DIR",
    help="SOURCE is an overlayfs upperdir over DIR; repeat for several lower layers, topmost first.",
)
@click.option("--compression", type=click.Choice(list(MEDIA_TYPES)), default="estargz", show_default=True)
@click.option(
    "--level",
    type=int,
    metavar="N",
    help=f"0-3: ISA-L, fast; 4-12: libdeflate, small; zstd: 1-19.  [{DEFAULT_LEVEL}; zstd: {DEFAULT_ZSTD_LEVEL}]",
)
@click.option("--chunk-size", type=Size(), default=DEFAULT_CHUNK_SIZE, metavar="N", help="Bytes per chunk.  [4MiB]")
@click.option(
    "--min-chunk-size",
    type=Size(),
    default=0,
    metavar="N",
    help="Pack small files into members of at least N bytes; containers/storage cannot read such layers.",
)
@portable_option
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option("--memory", type=Size(), metavar="N", help="Bytes that data under way may take.")
@click.option("--no-landmark", is_flag=True, help="Leave out .no.prefetch.landmark: the pure differ stream.")
@click.option(
    "--prefetch",
    multiple=True,
    metavar="PATH|GLOB",
    help="Write PATH of the layer first, for runtimes to fetch ahead; or all that GLOB matches (** crosses directories).",
)
@click.option(
    "--record-in",
    multiple=True,
    metavar="LOG",
    help="The same for every path in LOG: what a run of the image opened, or a list, one path or glob a line.",
)
@click.option("--allow-missing", is_flag=True, help="Only warn of paths to prefetch that the layer does not have.")
@click.option("--json", "as_json", is_flag=True, help="One line; tells what was prefetched and what is missing, too.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def command(
    source: str,
    output: str,
    lower: str | None,
    overlay_lower: tuple[str, ...],
    no_landmark: bool,
    prefetch: tuple[str, ...],
    record_in: tuple[str, ...],
    allow_missing: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Build a layer from SOURCE: a directory, a tar file (plain, gzip, zstd, eStargz), or - for standard input.

    Prints the layer's OCI descriptor on standard output, or on standard error with "-o -". SOURCE_DATE_EPOCH in the
    environment is the upper bound of a directory's modification times.

    What is to be prefetched comes in the order given, --prefetch before --record-in. A compressed tar, or one from a pipe,
    is then kept uncompressed in $TMPDIR while it is put in order.
    """
    started = time.perf_counter()
    with terminated_cleanly(), progress_bar(quiet) as progress:
        layer = build(
            standard_input() if source == "-" else source,
            standard_output() if output == "-" else output,
            lower=lower,
            overlay_lower=overlay_lower or None,
            landmark=not no_landmark,
            prefetch=[*prefetch, *(path for log in record_in for path in recorded(log))],
            allow_missing=allow_missing,
            source_date_epoch=epoch_from_environment(),
            progress=progress,
            **options,
        )
    warn_of(layer.missing)
    shown = layer.descriptor()
    if as_json and layer.prefetch_size is not None:
        shown |= {"prefetchSize": layer.prefetch_size, "missing": layer.missing}
    show_result(shown, output, in_one_line=as_json, to_stderr=output == "-")
    if not quiet:
        summarise(layer, time.perf_counter() - started)


def warn_of(missing: Sequence[str]) -> None:
    for path in missing[:WARNINGS]:
        tell(f"estargz: warning: {path}: is to be prefetched and not in the layer")
    if len(missing) > WARNINGS:
        tell(f"estargz: warning: and {len(missing) - WARNINGS} more; --json lists them all")


def show_result(result: dict[str, Any], made: str, *, in_one_line: bool, to_stderr: bool = False) -> None:
    """Prints what a command has made. SinkError when that fails: what was made is there nevertheless."""
    text = json.dumps(result, indent=None if in_one_line else 2)
    if to_stderr:
        tell(text)
        return
    try:
        click.echo(text)
    except OSError as error:
        silence(sys.stdout)
        raise SinkError(
            f"{made} was written, but what describes it cannot be printed: standard output: {error.strerror}"
        ) from error


def recorded(log: str) -> AccessLog:
    """The paths of a log; those that it does not tell are counted aloud."""
    paths = read_access_log(log)
    if paths.unresolved:
        tell(f"estargz: warning: {log}: {paths.unresolved} paths are relative to what the log does not tell")
    return paths


class _StandardInput(io.FileIO):
    """Waits a while at a time: a signal that comes just before a read begins would else be noticed when something comes."""

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        self._wait()
        return super().readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        self._wait()
        return super().read(size)

    def _wait(self) -> None:
        waiting = select.poll()
        waiting.register(self, select.POLLIN)
        while not waiting.poll(_LISTEN_MS):
            pass  # where Python runs the handlers of signals


def standard_input() -> io.FileIO:
    # Unbuffered, so that the kernels read from the descriptor themselves.
    file = _StandardInput(descriptor_of(sys.stdin, "input"), "rb", closefd=False)
    file.name = "standard input"  # instead of 0, for messages
    return file


def standard_output() -> DescriptorSink:
    descriptor = descriptor_of(sys.stdout, "output")
    if os.isatty(descriptor):
        raise UsageError("a layer is not written to a terminal; redirect standard output, or name a file")
    return DescriptorSink(descriptor, "standard output")


def descriptor_of(stream: Any, name: str) -> int:
    """A standard stream's descriptor. UsageError when the process was started without it."""
    if stream is None:
        raise UsageError(f"standard {name} is closed; leave it open, or name a file")
    return int(stream.fileno())


def epoch_from_environment() -> int | None:
    """SOURCE_DATE_EPOCH in seconds, None when it is not set. UsageError when it is no whole number."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,19}", text):  # int() takes spaces, underscores and the digits of all scripts
        raise UsageError(f"SOURCE_DATE_EPOCH is {text!r}; it must be a whole number of seconds")
    return int(text)


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Lets a termination signal unwind the build, so that nothing is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # A signal that was ignored when the process began (nohup) stays so; only the main thread may set handlers.
    wanted = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    previous = {
        number: signal.signal(number, stop) for number in wanted if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar of uncompressed bytes on standard error, if somebody watches."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.n)


def summarise(layer: Layer, seconds: float) -> None:
    ahead = f", {layer.prefetch_size / 1e6:.1f} MB of it to be prefetched" if layer.prefetch_size is not None else ""
    tell(
        f"{layer.uncompressed_size / 1e6:.1f} MB -> {layer.size / 1e6:.1f} MB{ahead} in {seconds:.2f} s, "
        f"{layer.uncompressed_size / 1e6 / seconds:.0f} MB/s"
    )

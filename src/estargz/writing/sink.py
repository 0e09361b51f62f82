"""Where bytes go: a path that appears whole or not at all, or any object with ``write``."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from estargz.descriptors import open_folder, sync_folder
from estargz.errors import SinkError, UsageError

__all__ = ["ObjectSink", "PathSink", "Writable", "open_sink"]


class Writable(Protocol):
    """An object that takes bytes: a file, a socket's file, an upload. Nothing seeks in it; it is never closed."""

    def write(self, data: bytes, /) -> Any: ...


Destination = str | os.PathLike[str] | Writable


def behind_links(path: Path) -> Path:
    """The path that a path leads to, be it there or not."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return Path(os.path.realpath(path))


class PathSink:
    """A file that is written without a name (or, where the file system cannot, under a temporary one beside it), synced,
    and given its name by ``commit``. Until then, and after ``discard``, nothing is to be seen of it; a process that is
    killed leaves nothing either.

    An existing path that is no regular file, such as a device or a named pipe, is written to as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # with each "..", which leads elsewhere behind a link
        self._temporary: Path | None = None
        self._in_place = False
        self.fd = -1  # none is open
        self._process = os.getpid()
        try:
            self.fd = self._open()
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> SinkError:
        wrapped = SinkError(
            f"{self.path}: cannot be written: {error.strerror}; free some space or check the destination"
        )
        wrapped.errno = error.errno
        return wrapped

    def _open(self) -> int:
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, os.strerror(21))
        if not stat.S_ISREG(mode):
            self._in_place = True
            return os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        self.path = behind_links(self.path)
        try:
            os.stat("/proc/self/fd")  # the only way to name the file later
            return os.open(self.path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except OSError:
            # Not every file system has nameless files; if the folder is what is wrong, this says so.
            temporary = self._temporary_path()
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._temporary = temporary
            return fd

    def _temporary_path(self) -> Path:
        return self.path.with_name(f".estargz-{os.urandom(8).hex()}.tmp")

    def write(self, data: bytes) -> int:
        """Writes all of ``data``. Raises SinkError."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as error:
            raise self._error(error) from error
        return len(data)

    def commit(self) -> None:
        """Makes the file durable and gives it its name. Raises SinkError, having discarded it."""
        try:
            if not self._in_place:
                os.fsync(self.fd)
                os.replace(self._temporary or self._give_name(self._temporary_path()), self.path)
                self._temporary = None
                sync_folder(self.path.parent)
            self._close()
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise self._error(error) from error
            raise

    def _close(self) -> None:
        handle, self.fd = self.fd, -1  # whatever close() says, nothing is open then, or it is somebody else's
        if handle >= 0:
            with suppress(InterruptedError):
                os.close(handle)

    def _give_name(self, temporary: Path) -> Path:
        self._temporary = temporary
        # Naming a nameless file means following /proc's link, which os.link does only when it is given a handle.
        with open_folder(self.path.parent) as folder:
            os.link(f"/proc/self/fd/{self.fd}", temporary.name, src_dir_fd=folder, dst_dir_fd=folder)
        return temporary

    def discard(self) -> None:
        """Leaves nothing behind. In a child that was forked meanwhile: nothing of its own, for the file is its parent's."""
        with suppress(OSError):
            self._close()
        temporary, self._temporary = self._temporary, None
        if temporary is not None and self._process == os.getpid():
            with suppress(OSError):  # the error that led here is the one to tell
                temporary.unlink()

    @property
    def name(self) -> str:
        """For messages."""
        return os.fspath(self.path)

    @property
    def target(self) -> int:
        """What the kernels write to: the descriptor itself, without Python in between."""
        return self.fd

    def __enter__(self) -> PathSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


class ObjectSink:
    """Somebody's object with ``write``; it is neither flushed nor closed."""

    def __init__(self, writable: Writable) -> None:
        self._write = writable.write
        self._raw = isinstance(writable, io.RawIOBase)

    def write(self, data: bytes) -> int:
        """Writes all of ``data``, also to a raw object that takes less at a time."""
        written = self._write(data)
        total = len(data)
        while isinstance(written, int) and written < len(data):
            data = data[written:]
            written = self._write(data)
            if written == 0 and data:
                raise took_nothing()
        if written is None and self._raw:  # how a raw file says that it would have to wait
            raise took_nothing()
        return total

    def commit(self) -> None:
        """Nothing to do: the object is its owner's."""

    def discard(self) -> None:
        """Nothing to do: what was written is its owner's to drop."""

    @property
    def name(self) -> str:
        """For messages."""
        return "output"

    @property
    def target(self) -> Callable[[bytes], int]:
        """What the kernels call."""
        return self.write

    def __enter__(self) -> ObjectSink:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def took_nothing() -> SinkError:
    return SinkError("the destination's write() took nothing; it must take all or block")


class DescriptorSink(ObjectSink):
    """An open blocking descriptor that is its owner's, such as standard output: written to without Python in between."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(io.FileIO(fd, "wb", closefd=False))
        self._fd = fd
        self._name = name

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    @property
    def target(self) -> int:  # type: ignore[override]
        """What the kernels write to."""
        return self._fd


def open_sink(dest: Destination) -> PathSink | ObjectSink:
    """The sink for a destination: a path, or any object with ``write(bytes)``.

    Raises:
        UsageError: ``dest`` is neither.
        SinkError: the path cannot be written.
    """
    if isinstance(dest, DescriptorSink):
        return dest
    if isinstance(dest, str | os.PathLike):
        if not os.fspath(dest) or "\0" in str(dest):
            raise UsageError(f"{os.fspath(dest)!r} is no path to write to")
        return PathSink(dest)
    if isinstance(dest, io.TextIOBase) or not callable(getattr(dest, "write", None)):
        raise UsageError(f"a destination is a path or an object whose write() takes bytes, not {type(dest).__name__}")
    return ObjectSink(dest)

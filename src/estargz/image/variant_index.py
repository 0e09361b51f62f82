"""What a cache of variants knows besides its blobs, in SQLite, and who uses it now: locks that end with their process."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from estargz.descriptors import naming, open_folder, quietly
from estargz.errors import CacheError

__all__ = ["VariantIndex", "locked_folder"]

_SCHEMA = 1
_TABLES = """
CREATE TABLE variants (
    key TEXT PRIMARY KEY,      -- all that was asked for, in one text
    tar_digest TEXT NOT NULL,  -- of what was compressed
    digest TEXT NOT NULL,      -- of the blob
    size INTEGER NOT NULL,
    layer TEXT NOT NULL,       -- estargz.layer.Layer as JSON
    created REAL NOT NULL,     -- seconds since 1970
    used REAL NOT NULL
);
CREATE INDEX variants_tar ON variants (tar_digest);
CREATE INDEX variants_blob ON variants (digest);
CREATE TABLE sources (
    digest TEXT PRIMARY KEY,   -- of a blob, be it here or not
    tar_digest TEXT NOT NULL,  -- of what is in it, without a table of contents
    compression TEXT,
    diff_id TEXT,
    noted REAL NOT NULL
);
CREATE TABLE leases (holder TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (holder, digest));
"""
_POLL = 0.05  # seconds between two looks at a lock

_ELSEWHERE = "choose another directory (--cache, ESTARGZ_CACHE)"
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another process holds it; try again",
    sqlite3.SQLITE_CORRUPT: "it is damaged; remove it, its -wal and its -shm",
    sqlite3.SQLITE_NOTADB: "it is damaged; remove it, its -wal and its -shm",
    sqlite3.SQLITE_FULL: "free some space",
    sqlite3.SQLITE_IOERR: "free some space, or check the file system",
    sqlite3.SQLITE_READONLY: f"check its rights, or {_ELSEWHERE}",
    sqlite3.SQLITE_CANTOPEN: f"check its rights, or {_ELSEWHERE}",
}


class VariantIndex:
    """The tables and locks of a cache's directory, which is there.

    Args:
        patience: seconds to wait while other processes write to the tables.
        sleep: waits between two looks at a lock.

    Raises:
        CacheError: the tables cannot be used; from methods, too.
    """

    def __init__(self, directory: Path, *, patience: float, sleep: Callable[[float], None]) -> None:
        self._path = directory / "index.sqlite"
        self._locks = directory / "locks"
        self._sleep = sleep
        self._process = os.getpid()
        self._thread_lock = threading.Lock()
        self._holder: tuple[Path, int] | None = None  # this object's lock: its file and handle
        self._locks.mkdir(mode=0o700, exist_ok=True)
        with self._translated():
            self._database = self._open(patience)

    def _open(self, patience: float) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=patience, isolation_level=None, check_same_thread=False)
        with ExitStack() as undo:
            undo.callback(database.close)
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA):
                raise CacheError(
                    f"{self._path}: has version {version}, made by another estargz; use that one, or {_ELSEWHERE}"
                )
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            if version == 0:
                database.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_SCHEMA}; COMMIT;")
            database.executescript("BEGIN IMMEDIATE; ROLLBACK;")  # fails where nothing can be written
            undo.pop_all()
        return database

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "remove it, its -wal and its -shm")
            raise CacheError(f"{self._path}: {error}; {remedy}") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Nobody else writes meanwhile; all is undone when the block raises. Transactions are not nested."""
        if self._process != os.getpid():
            raise CacheError(f"{self._path}: was opened by another process; open the cache after fork()")
        with self._thread_lock, self._translated():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def lease(self, database: sqlite3.Connection, digest: str) -> None:
        """Within a transaction: this object uses a blob from now on."""
        if self._holder is None:
            path = self._locks / f"use-{os.urandom(16).hex()}"
            handle = _try_lock(path, create=True)
            if handle is None:
                raise CacheError(f"{path}: cannot be locked; {_ELSEWHERE}")
            self._holder = (path, handle)
        database.execute("INSERT OR IGNORE INTO leases VALUES (?, ?)", (self._holder[0].name, digest))

    def leased(self, database: sqlite3.Connection) -> set[str]:
        """Within a transaction: the blobs that somebody uses who is alive. What others used is forgotten."""
        for path in self._locks.iterdir():
            if (handle := _try_lock(path, create=False)) is not None:
                _unlock(path, handle)
        alive = {path.name for path in self._locks.iterdir()}
        for (holder,) in database.execute("SELECT DISTINCT holder FROM leases").fetchall():
            if holder not in alive:
                database.execute("DELETE FROM leases WHERE holder = ?", (holder,))
        return {digest for (digest,) in database.execute("SELECT DISTINCT digest FROM leases")}

    @contextmanager
    def alone(self, name: str, check: Callable[[], object]) -> Iterator[None]:
        """One thread of one process at a time. ``check`` is called now and then while others are in, and may raise."""
        path = self._locks / f"make-{name}"
        while (handle := _try_lock(path, create=True)) is None:
            check()
            self._sleep(_POLL)
        try:
            yield
        finally:
            _unlock(path, handle)

    def close(self) -> None:
        """Ends all use. In a child that was forked meanwhile it does nothing: the locks are its parent's."""
        if self._process != os.getpid():
            return
        with closing(self._database), suppress(CacheError):
            if self._holder is not None:
                (path, handle), self._holder = self._holder, None
                _unlock(path, handle)
                with self.transaction() as database:
                    database.execute("DELETE FROM leases WHERE holder = ?", (path.name,))


@contextmanager
def locked_folder(directory: Path) -> Iterator[None]:
    """Nobody else changes a layout's index.json meanwhile."""
    with open_folder(directory) as handle:
        with naming(directory):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _try_lock(path: Path, *, create: bool) -> int | None:
    """A handle that locks the file; None when somebody else has it, or it is not there (any longer)."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        handle = os.open(path, flags, 0o600)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not create:
            return None
        raise CacheError(f"{path}: cannot be opened: {error.strerror}; check the rights of its directory") from error
    with ExitStack() as undo:
        undo.callback(quietly, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):  # else its last owner has removed it
                undo.pop_all()
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            raise CacheError(f"{path}: cannot be locked: {error.strerror}; {_ELSEWHERE}") from error
    return None


def _unlock(path: Path, handle: int) -> None:
    with suppress(OSError):
        path.unlink()  # while it is still locked: whoever has opened it sees that it is gone, and tries again
    quietly(os.close, handle)
